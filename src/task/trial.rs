//! Polling a future that may never have to become a task.
//!
//! A handler usually ends in its first poll, or waits for nothing but a flush of its own
//! connection. Neither needs a task. So the poller tries it with a waker that does nothing but
//! notice whether somebody has kept it, or used it. Who needs no waker, because its poller knows
//! when to go on, marks the trial instead. Any other future that waits is made a task and polled
//! again, with a waker that works.

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::task::{Context, Poll, Wake, Waker};

/// How a trial ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tried<T> {
    Done(T),
    Waits(Wait),
}

/// What a future waits for after its trial.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wait {
    /// For who has marked the trial, and for nobody else.
    Marked,
    /// For something: as a task it must be polled again.
    Open,
}

/// Polls a future once, on behalf of `owner`, an address that stands for it.
#[inline(always)]
pub(crate) fn try_poll<T>(
    owner: usize,
    poll: impl FnOnce(&mut Context<'_>) -> Poll<T>,
) -> Tried<T> {
    let trial = SPARE.with(Cell::take).unwrap_or_else(Trial::new);
    let running = Running::begin(owner, trial.waker.data());
    let polled = poll(&mut Context::from_waker(&trial.waker));
    let is_marked = MARKED.get();
    drop(running);
    let is_kept = trial.is_kept();
    if !is_kept {
        SPARE.with(|spare| spare.set(Some(trial)));
    }
    match polled {
        Poll::Ready(done) => Tried::Done(done),
        Poll::Pending if is_marked && !is_kept => Tried::Waits(Wait::Marked),
        Poll::Pending => Tried::Waits(Wait::Open),
    }
}

/// Marks the trial that runs on this thread, if it is of `owner` and with this waker: whoever marks
/// it will see to it that the future is polled again.
#[inline]
pub(crate) fn mark_trial(waker: &Waker, owner: usize) -> bool {
    let is_trial = OWNER.get() == owner && WAKER.get() == waker.data().addr();
    if is_trial {
        MARKED.set(true);
    }
    is_trial
}

thread_local! {
    /// The trial that runs, by the addresses of its owner and its waker.
    static OWNER: Cell<usize> = const { Cell::new(0) };
    static WAKER: Cell<usize> = const { Cell::new(0) };
    static MARKED: Cell<bool> = const { Cell::new(false) };
    /// For the next trial.
    static SPARE: Cell<Option<Trial>> = const { Cell::new(None) };
}

struct Trial {
    notice: Arc<Notice>,
    waker: Waker,
}

struct Notice {
    woken: AtomicBool,
}

impl Trial {
    fn new() -> Trial {
        let notice = Arc::new(Notice { woken: AtomicBool::new(false) });
        Trial { waker: Waker::from(Arc::clone(&notice)), notice }
    }

    /// A waker that was used and dropped is noticed as well: its count falls after `woken` is set.
    fn is_kept(&self) -> bool {
        let count = Arc::strong_count(&self.notice);
        fence(Ordering::Acquire);
        count > OWN_COUNT || self.notice.woken.load(Ordering::Relaxed)
    }
}

/// The trial's own references to its notice.
const OWN_COUNT: usize = 2;

impl Wake for Notice {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.woken.store(true, Ordering::Relaxed);
    }
}

/// Names the trial that runs; the one around it, if any, goes on when this is dropped.
struct Running {
    outer: (usize, usize, bool),
}

impl Running {
    fn begin(owner: usize, waker: *const ()) -> Running {
        let outer = (OWNER.replace(owner), WAKER.replace(waker.addr()), MARKED.replace(false));
        Running { outer }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let (owner, waker, is_marked) = self.outer;
        OWNER.set(owner);
        WAKER.set(waker);
        MARKED.set(is_marked);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::future::{Future, pending, poll_fn, ready};
    use std::pin::pin;

    fn tried(future: impl Future<Output = ()>, owner: usize) -> Tried<()> {
        let mut future = pin!(future);
        try_poll(owner, |cx| future.as_mut().poll(cx))
    }

    const WAITS_MARKED: Tried<()> = Tried::Waits(Wait::Marked);
    const OPEN: Tried<()> = Tried::Waits(Wait::Open);

    #[test]
    fn a_future_that_marked_its_trial_need_not_become_a_task() {
        assert_eq!(tried(ready(()), 1), Tried::Done(()));
        assert_eq!(tried(pending::<()>(), 1), OPEN);
        let marks = poll_fn(|cx| {
            assert!(mark_trial(cx.waker(), 1));
            Poll::<()>::Pending
        });
        assert_eq!(tried(marks, 1), WAITS_MARKED);
    }

    #[test]
    fn a_waker_that_is_kept_or_used_counts_for_more_than_the_mark() {
        let mut kept = None;
        let keeps = poll_fn(|cx| {
            kept = Some(cx.waker().clone());
            mark_trial(cx.waker(), 1);
            Poll::<()>::Pending
        });
        assert_eq!(tried(keeps, 1), OPEN);
        let wakes_itself = poll_fn(|cx| {
            cx.waker().wake_by_ref();
            mark_trial(cx.waker(), 1);
            Poll::<()>::Pending
        });
        assert_eq!(tried(wakes_itself, 1), OPEN);
        let wakes_from_elsewhere = poll_fn(|cx| {
            let clone = cx.waker().clone();
            std::thread::spawn(|| clone.wake()).join().expect("only wakes");
            mark_trial(cx.waker(), 1);
            Poll::<()>::Pending
        });
        assert_eq!(tried(wakes_from_elsewhere, 1), OPEN);
        // The waker that is still kept must not count against the next trial.
        let marks = poll_fn(|cx| {
            mark_trial(cx.waker(), 1);
            Poll::<()>::Pending
        });
        assert_eq!(tried(marks, 1), WAITS_MARKED);
        drop(kept);
    }

    #[test]
    fn only_the_trial_s_own_owner_and_waker_mark_it() {
        let marks_another = poll_fn(|cx| {
            assert!(!mark_trial(cx.waker(), 8));
            assert!(!mark_trial(Waker::noop(), 7));
            Poll::<()>::Pending
        });
        assert_eq!(tried(marks_another, 7), OPEN);
        assert!(!mark_trial(Waker::noop(), 7));
    }
}
