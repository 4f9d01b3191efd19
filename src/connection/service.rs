//! The parts of a server that its connections use: handlers, their threads, and hooks.

use std::sync::Arc;

use super::Handle;
use super::run::Handler;
use super::state::Kind;
use crate::error::{Error, Result};
use crate::task::Executor;
use crate::user_code;

/// One value for all connections of a server.
pub(crate) struct Service {
    pub(crate) connect: Option<Box<dyn Handler>>,
    pub(crate) request: Option<Box<dyn Handler>>,
    /// Runs the handlers.
    pub(crate) executor: Executor,
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
    /// Whether the server is shutting down.
    fn is_draining(&self) -> bool;
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
