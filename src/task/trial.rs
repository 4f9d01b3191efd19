//! Polling a future that may never have to become a task.
//!
//! A handler usually ends in its first poll, or waits for nothing but a flush of its own
//! connection. Neither needs a task. So the poller tries it with a waker that does nothing but
//! notice: whether somebody has kept it, or used it. If so, the future is made a task and polled
//! again, with a waker that works. If not, only its poller can know when to go on.

use std::cell::Cell;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::task::{Context, Wake, Waker};

/// How a trial ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tried {
    Done,
    /// Somebody has the waker, or has used it: as a task the future must be polled again.
    Kept,
    /// Nobody does.
    Left,
}

/// Polls `future` once, on behalf of `owner`, an address that stands for it.
pub(crate) fn try_poll<F>(future: Pin<&mut F>, owner: usize) -> Tried
where
    F: Future<Output = ()> + ?Sized,
{
    let trial = SPARE.take().unwrap_or_else(Trial::new);
    let running = Running::begin(owner, trial.waker.data());
    let is_done = future.poll(&mut Context::from_waker(&trial.waker)).is_ready();
    drop(running);
    let is_kept = trial.is_kept();
    if !is_kept {
        SPARE.set(Some(trial));
    }
    match (is_done, is_kept) {
        (true, _) => Tried::Done,
        (false, true) => Tried::Kept,
        (false, false) => Tried::Left,
    }
}

/// Whether `waker` is that of the trial which runs on this thread for `owner`.
#[inline]
pub(crate) fn is_trial(waker: &Waker, owner: usize) -> bool {
    CURRENT.get() == (owner, waker.data().addr())
}

thread_local! {
    /// Owner and waker of the trial that runs, by their addresses.
    static CURRENT: Cell<(usize, usize)> = const { Cell::new((0, 0)) };
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

/// Marks the trial that runs; the one around it, if any, goes on when this is dropped.
struct Running {
    outer: (usize, usize),
}

impl Running {
    fn begin(owner: usize, waker: *const ()) -> Running {
        Running { outer: CURRENT.replace((owner, waker.addr())) }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        CURRENT.set(self.outer);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::future::{pending, poll_fn, ready};
    use std::pin::pin;
    use std::task::Poll;

    #[test]
    fn a_future_that_keeps_no_waker_is_left() {
        assert_eq!(try_poll(pin!(ready(())), 1), Tried::Done);
        assert_eq!(try_poll(pin!(pending::<()>()), 1), Tried::Left);
    }

    #[test]
    fn a_waker_that_is_kept_or_used_is_noticed() {
        let mut kept = None;
        let keeps = poll_fn(|cx| {
            kept = Some(cx.waker().clone());
            Poll::<()>::Pending
        });
        assert_eq!(try_poll(pin!(keeps), 1), Tried::Kept);
        let wakes_itself = poll_fn(|cx| {
            cx.waker().wake_by_ref();
            Poll::<()>::Pending
        });
        assert_eq!(try_poll(pin!(wakes_itself), 1), Tried::Kept);
        let wakes_with_a_clone = poll_fn(|cx| {
            let clone = cx.waker().clone();
            std::thread::spawn(|| clone.wake()).join().expect("only wakes");
            Poll::<()>::Pending
        });
        assert_eq!(try_poll(pin!(wakes_with_a_clone), 1), Tried::Kept);
        // The waker that is still kept must not count against the next trial.
        assert_eq!(try_poll(pin!(pending::<()>()), 1), Tried::Left);
        drop(kept);
    }

    #[test]
    fn a_trial_is_known_by_its_owner_and_its_waker() {
        let asks = poll_fn(|cx| {
            assert!(is_trial(cx.waker(), 7));
            assert!(!is_trial(cx.waker(), 8));
            assert!(!is_trial(Waker::noop(), 7));
            Poll::Ready(())
        });
        assert_eq!(try_poll(pin!(asks), 7), Tried::Done);
        assert!(!is_trial(Waker::noop(), 7));
    }
}
