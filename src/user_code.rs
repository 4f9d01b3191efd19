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
    attempt(what, code).ok()
}

/// Like [`call`]. If `code` panicked, returns the message of the panic.
#[inline(always)]
pub(crate) fn attempt<T>(what: &str, code: impl FnOnce() -> T) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(code)).map_err(|panic| report(what, panic))
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

/// Passes an event to the subscriber of the process, which is code of the user: a panic of it ends
/// here, and is not reported, because reporting would call the subscriber again.
#[inline]
pub(crate) fn log(event: impl FnOnce()) {
    if let Err(panic) = catch_unwind(AssertUnwindSafe(event)) {
        forget(panic);
    }
}

/// Drops what a panic carries, which is a value of the user's as well. One that panics once more,
/// as it is dropped, is leaked.
fn forget(panic: Box<dyn Any + Send>) {
    if let Err(second) = catch_unwind(AssertUnwindSafe(|| drop(panic))) {
        std::mem::forget(second);
    }
}

/// The message of a panic. A literal is carried as a `&str`, a formatted message as a `String`.
pub(crate) fn message_of(panic: &(dyn Any + Send)) -> &str {
    let literal = panic.downcast_ref::<&str>().copied();
    literal.or(panic.downcast_ref::<String>().map(String::as_str)).unwrap_or(NO_TEXT)
}

/// Stands for the message of a panic that carries another value.
const NO_TEXT: &str = "a value that is no text";

/// Logs a panic, and returns its message.
#[cold]
fn report(what: &str, panic: Box<dyn Any + Send>) -> String {
    let message = message_of(&*panic).to_owned();
    log(|| tracing::error!("{what} panicked: {message}"));
    forget(panic);
    message
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
    fn the_message_of_a_panic_is_a_literal_or_formatted_text() {
        let message = |code: fn()| attempt("test", code).expect_err("it panics");
        assert_eq!(message(|| panic!("a literal")), "a literal");
        assert_eq!(message(|| panic!("number {}", std::hint::black_box(7))), "number 7");
        assert_eq!(message(|| std::panic::panic_any(7)), NO_TEXT);
        assert_eq!(message(|| std::panic::panic_any(Bomb)), NO_TEXT);
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
