//! Running futures: tasks, their queues, and threads that run them. Knows no sockets.
//!
//! A *task* is a future with a waker of its own. The waker puts the task back where it runs: into
//! the poller's mailbox, or into the workers' queue. A task belongs to a [`TaskSet`], which cancels
//! it at a forced shutdown of its server, or at the end of its poller.

pub(crate) mod line;
mod parking;
mod placement;
pub(crate) mod queue;
mod run;
mod set;
mod signal;
mod unblock;
pub(crate) mod waiters;

pub(crate) use async_task::Runnable;

use crate::user_code;

pub use placement::PlacementStats;
pub(crate) use placement::{
    Executor, Host, RuntimeContext, Spent, Used, Watched, leave_out, next_part,
};
pub(crate) use queue::{Queued, Start, Workers, is_worker};
pub(crate) use run::{Guarded, Polled, Run, is_polled, poll_again, poll_for, poll_run};
pub(crate) use run::{returns_parts, waits_for_flush};
pub(crate) use set::TaskSet;
pub(crate) use signal::{Signal, WaitSignal};
pub(crate) use unblock::look_up;
pub use unblock::unblock;

/// Polls the task once. A panic of the future ends the task, and does not reach the caller.
pub(crate) fn run(runnable: Runnable) {
    // The unwinding drops the future. No other code uses its state.
    user_code::call("task", || runnable.run());
}

/// Drops an unfinished task. A panic of a destructor does not reach the caller.
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

    /// A waker that asserts, when it is called and when it is dropped, that no lock is held:
    /// `is_free`.
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
