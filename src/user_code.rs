//! Calling code of the user: where a panic of it ends.
//!
//! Handlers, callbacks, wakers and destructors may panic, block, or call any method of ours again.
//! So they are called here, without a lock of ours, and a panic goes no further: the panic hook
//! has reported it, and a log line says what panicked. Any thread may call this.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::task::Waker;

/// Runs `code`; `None` if it panicked. `what` names it in the log.
#[inline(always)]
pub(crate) fn call<T>(what: &str, code: impl FnOnce() -> T) -> Option<T> {
    match catch_unwind(AssertUnwindSafe(code)) {
        Ok(done) => Some(done),
        Err(panic) => {
            report(what, panic);
            None
        }
    }
}

/// Wakes a task.
#[inline]
pub(crate) fn wake(waker: Waker) {
    call("waker", || waker.wake());
}

/// Wakes each of them: one that panics takes no wake-up from the others.
#[inline]
pub(crate) fn wake_all(wakers: impl IntoIterator<Item = Waker>) {
    wakers.into_iter().for_each(wake);
}

/// Drops a value that may be anything, or may hold anything: a waker, a context, a closure.
#[inline]
pub(crate) fn discard<T>(value: T) {
    if std::mem::needs_drop::<T>() {
        call("destructor", || drop(value));
    }
}

fn report(what: &str, panic: Box<dyn Any + Send>) {
    tracing::error!("{what} panicked");
    // What the panic carries is a value of the user's as well. One that panics once more, as it is
    // dropped, is leaked.
    if let Err(second) = catch_unwind(AssertUnwindSafe(|| drop(panic))) {
        std::mem::forget(second);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    struct Bomb;

    impl Drop for Bomb {
        fn drop(&mut self) {
            std::panic::panic_any(Bomb);
        }
    }

    #[test]
    fn a_panic_that_carries_a_panic_goes_no_further() {
        assert_eq!(call("test", || 7), Some(7));
        assert_eq!(call("test", || std::panic::panic_any(Bomb)), None::<()>);
    }

    #[test]
    fn a_destructor_that_panics_goes_no_further() {
        struct Once;
        impl Drop for Once {
            fn drop(&mut self) {
                panic!("expected");
            }
        }
        discard(Once);
        discard(Some(Once));
    }
}
