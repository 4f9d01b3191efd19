//! The parts of a server that its connections use: handlers, their threads, and hooks.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use super::Handle;
use super::run::Handler;
use super::state::Kind;
use crate::error::{Error, Result};
use crate::task::{Executor, Signal, WaitSignal};
use crate::user_code;

/// One value for all connections of a server.
pub(crate) struct Service {
    pub(crate) connect: Option<Box<dyn Handler>>,
    pub(crate) request: Option<Box<dyn Handler>>,
    /// Runs the handlers.
    pub(crate) executor: Executor,
    /// Raised when a shutdown begins.
    pub(crate) shutdown: Arc<Signal>,
    pub(crate) hooks: Arc<dyn Hooks>,
}

impl Service {
    /// The handler for a run of this kind.
    ///
    /// # Panics
    /// If there is no such handler. A run starts only where there is one.
    #[inline]
    pub(super) fn handler(&self, kind: Kind) -> &dyn Handler {
        let handler = match kind {
            Kind::Connect => &self.connect,
            Kind::Request => &self.request,
        };
        handler.as_deref().expect("a run starts only where there is a handler")
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        // The handlers are the user's closures.
        user_code::discard(self.connect.take());
        user_code::discard(self.request.take());
    }
}

/// The calls of a connection to its server. `prepare`, `disconnected` and `failed` run user code.
pub(crate) trait Hooks: Send + Sync {
    /// Called on the poller before registration. An error refuses the connection.
    fn prepare(&self, handle: &Handle) -> Result<()>;
    fn disconnected(&self, handle: &Handle);
    fn failed(&self, handle: &Handle, error: &Error);
    /// A future was spawned.
    fn spawned(&self);
    /// A spawned future has ended.
    fn spawn_ended(&self);
    /// A connection is finished.
    fn gone(&self);
}

/// Ready when a shutdown of the server has begun. Made by [`Handle::shutdown_begun`] and
/// [`ServerHandle::shutdown_begun`](crate::ServerHandle::shutdown_begun).
///
/// Any executor may poll it, and it may be polled again after it was ready. It does not keep its
/// connection or server alive. Dropping it removes its waker.
#[must_use = "futures do nothing unless polled"]
pub struct ShutdownBegun(Option<WaitSignal>);

impl ShutdownBegun {
    /// Waits for `signal`. Without a signal, the future is never ready.
    pub(crate) fn new(signal: Option<&Arc<Signal>>) -> ShutdownBegun {
        ShutdownBegun(signal.map(Signal::wait))
    }
}

impl Future for ShutdownBegun {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        match &mut self.0 {
            Some(wait) => Pin::new(wait).poll(cx),
            None => Poll::Pending,
        }
    }
}

impl fmt::Debug for ShutdownBegun {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ShutdownBegun").finish_non_exhaustive()
    }
}

const _: () = {
    const fn goes_anywhere<T: Send + Sync + Unpin + 'static>() {}
    goes_anywhere::<ShutdownBegun>();
};
