//! Running handlers: futures, queues of them, and threads to run them. Knows no sockets.
//!
//! A *task* is one run of a handler. Its waker hands it back to where it runs: the poller's command
//! queue, or the workers' queue.

mod line;
mod parking;
mod placement;
pub(crate) mod queue;
mod run;
mod unblock;

use std::future::Future;

pub(crate) use async_task::Runnable;

use crate::user_code;

pub use placement::PlacementStats;
pub(crate) use placement::{Executor, Host, RuntimeContext, Spent, Used, Watched, next_part};
pub(crate) use queue::{Workers, is_worker};
pub(crate) use run::{Guarded, Polled, Run, is_polled, poll_for, poll_run, waits_for_flush};
pub(crate) use unblock::look_up;
pub use unblock::unblock;

/// Makes a task of `future`. `schedule` is called with it on each wake-up; the first run is up to
/// the caller.
pub(crate) fn spawn<F, S>(future: F, schedule: S) -> Runnable
where
    F: Future<Output = ()> + Send + 'static,
    S: Fn(Runnable) + Send + Sync + 'static,
{
    let (runnable, task) = async_task::spawn(Guarded::new(future), schedule);
    task.detach();
    runnable
}

/// Polls the task once. A panic ends the task, whose own guards report it, and goes no further.
pub(crate) fn run(runnable: Runnable) {
    // The future is dropped by the unwinding; nothing else is shared with it.
    user_code::call("task", || runnable.run());
}

/// Drops the task unfinished. A panic of what it held goes no further.
pub(crate) fn give_up(runnable: Runnable) {
    user_code::discard(runnable);
}

/// Wakers for tests.
#[cfg(all(test, not(loom)))]
pub(crate) mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::{Wake, Waker};

    /// Panics when it is called.
    pub(crate) struct Panics;

    impl Panics {
        pub(crate) fn waker() -> Waker {
            Waker::from(Arc::new(Panics))
        }
    }

    impl Wake for Panics {
        fn wake(self: Arc<Self>) {
            panic!("a waker panics on purpose");
        }
    }

    pub(crate) struct CountsWakes(AtomicUsize);

    impl CountsWakes {
        pub(crate) fn new() -> Arc<CountsWakes> {
            Arc::new(CountsWakes(AtomicUsize::new(0)))
        }

        pub(crate) fn waker(self: &Arc<Self>) -> Waker {
            Waker::from(Arc::clone(self))
        }

        pub(crate) fn count(&self) -> usize {
            self.0.load(Ordering::Relaxed)
        }
    }

    impl Wake for CountsWakes {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// A waker whose call and whose end demand that `is_free` holds: that no lock is held.
    pub(crate) fn locks_nothing(is_free: impl Fn() -> bool + Send + Sync + 'static) -> Waker {
        struct Demands<F: Fn() -> bool>(F);

        impl<F: Fn() -> bool + Send + Sync> Wake for Demands<F> {
            fn wake(self: Arc<Self>) {
                assert!((self.0)(), "woken with the lock held");
            }
        }

        impl<F: Fn() -> bool> Drop for Demands<F> {
            fn drop(&mut self) {
                assert!((self.0)(), "dropped with the lock held");
            }
        }

        Waker::from(Arc::new(Demands(is_free)))
    }
}
