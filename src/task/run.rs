//! Polling a run on its poller, without a task.
//!
//! A handler usually ends in its first poll, or waits for nothing but a flush of its own
//! connection. Neither case needs a task. So the poller polls the run with a waker that only
//! notices whether the run has kept or used it. A flush of the run's own connection needs no waker,
//! because the poller knows when the flush is done. Such a flush calls [`waits_for_flush`] instead.
//! A run that waits for anything else becomes a task, and is polled again with a waker that works.

use std::cell::Cell;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::task::{Context, Poll, Wake, Waker};

use crate::user_code;

/// A run of a handler, whatever the type of its future.
pub(crate) type Run = Pin<Box<dyn Future<Output = ()> + Send>>;

/// How a poll of a run ended.
pub(crate) enum Polled {
    Done,
    /// The run waits for the flush of its own connection, and for nothing else.
    WaitsForFlush(Run),
    /// The run waits for something else: it must be polled again as a task.
    Waits(Run),
}

thread_local! {
    static CURRENT: Current = const {
        Current {
            owner: Cell::new(0),
            waker: Cell::new(0),
            waits_for_flush: Cell::new(false),
            has_returned: Cell::new(false),
        }
    };
    /// A waker for the next poll.
    static SPARE: Cell<Option<Noticing>> = const { Cell::new(None) };
}

/// The run that this thread polls.
struct Current {
    /// The address of the run's connection; 0 is none.
    owner: Cell<usize>,
    /// The address that the poller's waker carries; 0 is none.
    waker: Cell<usize>,
    /// Whether the run waits for its own flush.
    waits_for_flush: Cell<bool>,
    /// Whether the run has dropped its connection in this poll.
    has_returned: Cell<bool>,
}

/// Restores values of [`CURRENT`] when dropped, because a run may poll another run.
struct Restore<F: Fn(&Current)>(F);

impl<F: Fn(&Current)> Drop for Restore<F> {
    #[inline]
    fn drop(&mut self) {
        CURRENT.with(&self.0);
    }
}

/// Calls `poll`, which polls a run of `owner`: the address of a connection, or 0. Returns as well
/// whether the run has called [`returns_parts`].
#[inline(always)]
pub(crate) fn poll_for<T>(owner: usize, poll: impl FnOnce() -> T) -> (T, bool) {
    let (outer, flag) =
        CURRENT.with(|current| (current.owner.replace(owner), current.has_returned.replace(false)));
    let _restore = Restore(|current| {
        current.owner.set(outer);
        current.has_returned.set(flag);
    });
    let polled = poll();
    (polled, CURRENT.with(|current| current.has_returned.get()))
}

/// Polls a run on its poller with `poll`, which returns the run if it waits.
#[inline(always)]
pub(crate) fn poll_run(poll: impl FnOnce(&mut Context<'_>) -> Option<Run>) -> Polled {
    let noticing = SPARE.take().unwrap_or_else(Noticing::new);
    let waker = noticing.waker.data().addr();
    let (outer, flag) = CURRENT
        .with(|current| (current.waker.replace(waker), current.waits_for_flush.replace(false)));
    let restore = Restore(|current| {
        current.waker.set(outer);
        current.waits_for_flush.set(flag);
    });
    let run = poll(&mut Context::from_waker(&noticing.waker));
    let waits_for_flush = CURRENT.with(|current| current.waits_for_flush.get());
    drop(restore);
    let was_noticed = noticing.was_noticed();
    if !was_noticed {
        SPARE.set(Some(noticing));
    }
    match run {
        None => Polled::Done,
        Some(run) if waits_for_flush && !was_noticed => Polled::WaitsForFlush(run),
        Some(run) => Polled::Waits(run),
    }
}

/// Polls a run that has waited. Returns the run if it waits again. A run that is over is dropped.
pub(crate) fn poll_again(mut run: Run, cx: &mut Context<'_>) -> Option<Run> {
    run.as_mut().poll(cx).is_pending().then_some(run)
}

/// Whether this thread polls a run of `owner`.
#[inline]
pub(crate) fn is_polled(owner: usize) -> bool {
    CURRENT.with(|current| current.owner.get() == owner)
}

/// Called by a flush of connection `owner`. Notes that the run polled by this thread waits for its
/// own flush, if `owner` is the run's connection and `waker` is the poller's. `true`: noted, so the
/// caller need not keep the waker.
#[inline]
pub(crate) fn waits_for_flush(waker: &Waker, owner: usize) -> bool {
    CURRENT.with(|current| {
        let is_polled_here =
            current.owner.get() == owner && current.waker.get() == waker.data().addr();
        if is_polled_here {
            current.waits_for_flush.set(true);
        }
        is_polled_here
    })
}

/// Called where the connection of a run is dropped. `true`: this thread polls a run of `owner`, and
/// gives the run's parts back after the poll.
#[inline]
pub(crate) fn returns_parts(owner: usize) -> bool {
    CURRENT.with(|current| {
        let is_polled_here = current.owner.get() == owner;
        if is_polled_here {
            current.has_returned.set(true);
        }
        is_polled_here
    })
}

/// A waker that does nothing but notice.
struct Noticing {
    notice: Arc<Notice>,
    waker: Waker,
}

struct Notice {
    was_woken: AtomicBool,
}

impl Noticing {
    fn new() -> Noticing {
        let notice = Arc::new(Notice { was_woken: AtomicBool::new(false) });
        Noticing { waker: Waker::from(Arc::clone(&notice)), notice }
    }

    /// Whether the waker was kept or used. A waker that was used and dropped counts as well,
    /// because its reference is released after `was_woken` is set.
    fn was_noticed(&self) -> bool {
        let count = Arc::strong_count(&self.notice);
        fence(Ordering::Acquire);
        count > OWN_COUNT || self.notice.was_woken.load(Ordering::Relaxed)
    }
}

/// The references that a [`Noticing`] itself has.
const OWN_COUNT: usize = 2;

impl Wake for Notice {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.was_woken.store(true, Ordering::Relaxed);
    }
}

pin_project_lite::pin_project! {
    /// A future of the user. A panic of its destructor ends here, because a panic that reached
    /// `async_task` would end the process.
    pub(crate) struct Guarded<F> {
        #[pin]
        future: Option<F>,
    }

    impl<F> PinnedDrop for Guarded<F> {
        fn drop(this: Pin<&mut Self>) {
            this.clear();
        }
    }
}

impl<F> Guarded<F> {
    pub(crate) fn new(future: F) -> Guarded<F> {
        Guarded { future: Some(future) }
    }

    /// A place for a future.
    pub(crate) fn none() -> Guarded<F> {
        Guarded { future: None }
    }

    /// Puts `future` in its place.
    pub(crate) fn set(self: Pin<&mut Self>, future: F) {
        self.project().future.set(Some(future));
    }

    /// Drops the future, which is done. A panic of its destructor is the caller's.
    pub(crate) fn finish(self: Pin<&mut Self>) {
        self.project().future.set(None);
    }

    /// Drops the future, if it is still there.
    pub(crate) fn clear(self: Pin<&mut Self>) {
        let mut future = self.project().future;
        if future.is_some() {
            user_code::call("destructor", || future.set(None));
        }
    }
}

impl<F: Future> Future for Guarded<F> {
    type Output = F::Output;

    #[inline(always)]
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let future = self.project().future.as_pin_mut();
        future.expect("the future is there until it is dropped").poll(cx)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::future::{pending, poll_fn, ready};

    #[derive(Debug, PartialEq, Eq)]
    enum Ended {
        Done,
        WaitsForFlush,
        Waits,
    }

    fn polled(owner: usize, future: impl Future<Output = ()> + Send + 'static) -> Ended {
        let mut future = Box::pin(future);
        let run = poll_fn(move |cx| poll_for(owner, || future.as_mut().poll(cx)).0);
        match poll_run(|cx| poll_again(Box::pin(run), cx)) {
            Polled::Done => Ended::Done,
            Polled::WaitsForFlush(_) => Ended::WaitsForFlush,
            Polled::Waits(_) => Ended::Waits,
        }
    }

    #[test]
    fn a_run_that_waits_for_its_flush_alone_need_not_become_a_task() {
        assert_eq!(polled(1, ready(())), Ended::Done);
        assert_eq!(polled(1, pending()), Ended::Waits);
        let flushes = poll_fn(|cx| {
            assert!(waits_for_flush(cx.waker(), 1));
            Poll::Pending
        });
        assert_eq!(polled(1, flushes), Ended::WaitsForFlush);
    }

    #[test]
    fn a_run_that_keeps_or_uses_the_waker_as_well_must_become_a_task() {
        let kept = Arc::new(std::sync::Mutex::new(None));
        let keeps = {
            let kept = Arc::clone(&kept);
            poll_fn(move |cx| {
                *kept.lock().expect("not poisoned") = Some(cx.waker().clone());
                waits_for_flush(cx.waker(), 1);
                Poll::Pending
            })
        };
        assert_eq!(polled(1, keeps), Ended::Waits);
        let wakes_itself = poll_fn(|cx| {
            cx.waker().wake_by_ref();
            waits_for_flush(cx.waker(), 1);
            Poll::Pending
        });
        assert_eq!(polled(1, wakes_itself), Ended::Waits);
        let wakes_from_elsewhere = poll_fn(|cx| {
            let clone = cx.waker().clone();
            std::thread::spawn(|| clone.wake()).join().expect("only wakes");
            waits_for_flush(cx.waker(), 1);
            Poll::Pending
        });
        assert_eq!(polled(1, wakes_from_elsewhere), Ended::Waits);
        // The waker that is still kept must not count against the next poll.
        let flushes = poll_fn(|cx| {
            waits_for_flush(cx.waker(), 1);
            Poll::Pending
        });
        assert_eq!(polled(1, flushes), Ended::WaitsForFlush);
        drop(kept);
    }

    #[test]
    fn only_the_run_s_own_connection_and_waker_count() {
        let flushes_another = poll_fn(|cx| {
            assert!(is_polled(7) && !is_polled(8));
            assert!(!waits_for_flush(cx.waker(), 8));
            assert!(!waits_for_flush(Waker::noop(), 7));
            Poll::Pending
        });
        assert_eq!(polled(7, flushes_another), Ended::Waits);
        assert!(!waits_for_flush(Waker::noop(), 7) && !is_polled(7));
    }

    #[test]
    fn a_poll_inside_of_another_is_named_apart() {
        let outer = poll_fn(|cx| {
            let inner = poll_fn(|cx| {
                assert!(is_polled(2) && waits_for_flush(cx.waker(), 2));
                Poll::Pending
            });
            assert_eq!(polled(2, inner), Ended::WaitsForFlush);
            assert!(is_polled(1) && !waits_for_flush(cx.waker(), 2));
            Poll::Pending
        });
        assert_eq!(polled(1, outer), Ended::Waits);
    }

    #[test]
    fn a_thread_that_ends_polls_nothing() {
        struct Late;
        impl Drop for Late {
            fn drop(&mut self) {
                assert!(!is_polled(1) && !waits_for_flush(Waker::noop(), 1));
            }
        }
        thread_local!(static LATE: Late = const { Late });
        let ends = std::thread::spawn(|| {
            // Destructors run in the reverse order of these first uses.
            LATE.with(|_| {});
            assert!(!is_polled(1));
        });
        ends.join().expect("a destructor that panics would abort the process");
    }

    #[test]
    fn a_destructor_that_panics_ends_there() {
        struct Bomb;
        impl Drop for Bomb {
            fn drop(&mut self) {
                panic!("expected");
            }
        }
        let bomb = Bomb;
        drop(Guarded::new(async move { drop(bomb) }));
    }
}
