//! Limits the waits of a pool: by a time, and by the end of the pool.

use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::task::Poll;

use super::shared::Shared;
use crate::connection::Remote;
use crate::poller::Alarm;
use crate::poller::timers::NEVER;
use crate::sync::Arc;

/// How a limited wait has ended.
pub(super) enum Limited<T> {
    Done(T),
    /// The time has come, or the poller that watches it has ended.
    TimedOut,
    /// The pool was closed.
    Closed,
}

/// Waits for `future`, at most until `until_ns` and until the pool is closed. A timer of `home`
/// watches the time.
pub(super) async fn limited<T>(
    shared: &Shared,
    home: &Arc<Remote>,
    until_ns: u64,
    future: impl Future<Output = T>,
) -> Limited<T> {
    let mut future = pin!(future);
    let mut closed = shared.closed.wait();
    let mut alarm = (until_ns != NEVER).then(|| Alarm::new(home, until_ns));
    poll_fn(|cx| {
        if let Poll::Ready(done) = future.as_mut().poll(cx) {
            return Poll::Ready(Limited::Done(done));
        }
        if Pin::new(&mut closed).poll(cx).is_ready() {
            return Poll::Ready(Limited::Closed);
        }
        match &mut alarm {
            Some(alarm) => alarm.poll(cx).map(|()| Limited::TimedOut),
            None => Poll::Pending,
        }
    })
    .await
}
