//! Waiting for a time on a connection's poller.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use super::core::Core;
use crate::poller::Alarm;
use crate::poller::timers::{ns_after, ns_at};

/// A wait until a time; see [`Handle::sleep_until`](crate::Handle::sleep_until). Dropping it ends
/// the wait.
pub struct Sleep(Alarm<Core>);

impl Sleep {
    pub(super) fn new(alarm: Alarm<Core>) -> Sleep {
        Sleep(alarm)
    }

    /// Waits until `deadline` instead. A wait that has ended begins again.
    ///
    /// A later deadline costs no work of the poller. So a timeout that is renewed for each request
    /// is cheaper with one `Sleep` than with a new one each time.
    pub fn reset(&mut self, deadline: Instant) {
        self.0.reset(ns_at(deadline));
    }

    /// [`reset`](Self::reset) to `timeout` from now.
    pub fn reset_after(&mut self, timeout: Duration) {
        self.0.reset(ns_after(timeout));
    }
}

impl Future for Sleep {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        self.get_mut().0.poll(cx)
    }
}

impl fmt::Debug for Sleep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sleep").finish_non_exhaustive()
    }
}
