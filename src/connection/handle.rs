//! What any thread may do with a connection.

use std::any::Any;
use std::fmt;
use std::future::Future;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::core::Core;
use crate::address::PeerAddr;
use crate::clock::now_ns;
use crate::config;
use crate::error::{Error, Result};
use crate::poller::{Command, Side};
use crate::sync::lock;

/// A reference to a connection that any thread may hold: closes it, asks about it, moves its
/// timeouts.
///
/// Clones refer to the same connection. A handle does not keep a connection open, and stays valid
/// after its end.
#[derive(Clone)]
pub struct Handle(pub(super) Arc<Core>);

/// Bytes of one connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ConnectionStats {
    /// Received from the peer.
    pub received_bytes: u64,
    /// Taken by the kernel.
    pub sent_bytes: u64,
    /// Received and, as of the reader's last wait, not consumed.
    pub unread_bytes: u64,
    /// Submitted and not yet taken by the kernel.
    pub unsent_bytes: u64,
}

impl Handle {
    pub(crate) fn of(core: &Arc<Core>) -> Handle {
        Handle(Arc::clone(core))
    }

    /// Closes the connection. Idempotent, from any thread.
    ///
    /// Waiting reads and flushes fail with a closed error. Bytes that are written but not submitted
    /// are dropped. Submitted bytes are still sent while the peer takes them. If the peer takes
    /// nothing for 30 s, or for a shorter idle timeout, the rest is dropped and a TCP peer sees a
    /// reset; after ten minutes it does in any case. A peer that goes on sending may lose the last
    /// of the output: TCP resets a connection that closes with unread input. The descriptor closes
    /// after all this, once a running handler has returned and its
    /// [`Connection`](crate::Connection) is dropped. The close callbacks run just before.
    pub fn close(&self) {
        self.0.close();
    }

    /// Closes the connection at once. Like [`close`](Self::close), but what the kernel has not sent
    /// is dropped, whoever handed it over, and a TCP peer sees a reset.
    pub fn abort(&self) {
        self.0.abort();
    }

    /// Neither side has closed. Turns `false` when the peer does, without a read.
    pub fn is_active(&self) -> bool {
        self.0.life.is_active()
    }

    /// This side has closed.
    pub fn is_closed(&self) -> bool {
        self.0.life.is_closed()
    }

    /// The other end, as it was when the connection was made.
    pub fn peer_addr(&self) -> PeerAddr {
        self.0.peer.clone()
    }

    /// This end.
    ///
    /// # Errors
    /// Closed, once the descriptor is gone.
    pub fn local_addr(&self) -> Result<PeerAddr> {
        let output = lock(&self.0.output);
        let socket = output.socket.as_ref().ok_or_else(|| Error::closed("local_addr"))?;
        socket.local_addr().map_err(|error| Error::io("getsockname", error))
    }

    /// Distinguishes connections that exist at the same time.
    pub fn id(&self) -> u64 {
        Arc::as_ptr(&self.0).addr() as u64
    }

    /// Counts of bytes.
    pub fn stats(&self) -> ConnectionStats {
        let mut stats = ConnectionStats::default();
        {
            let input = lock(&self.0.input);
            stats.received_bytes = input.received();
            stats.unread_bytes = input.buffered_bytes() as u64;
        }
        let output = lock(&self.0.output);
        stats.sent_bytes = output.sent();
        stats.unsent_bytes = output.unsent();
        stats
    }

    /// Bounds each wait of a read from now on; `None` or zero is for ever. Clears the read
    /// deadline. A read of a known length waits once, for all of it;
    /// [`until`](crate::Connection::until) waits anew after each byte that comes.
    pub fn set_read_timeout(&self, timeout: Option<Duration>) {
        self.0.timeouts.read.set_timeout(timeout);
        self.rouse_reader();
    }

    /// Bounds each wait of a flush from now on; `None` or zero is for ever. Clears the write
    /// deadline.
    pub fn set_write_timeout(&self, timeout: Option<Duration>) {
        self.0.timeouts.write.set_timeout(timeout);
        self.rouse_flusher();
    }

    /// Ends every wait of a read at `deadline`, whatever the timeout; `None` clears it. A read that
    /// waits now obeys.
    pub fn set_read_deadline(&self, deadline: Option<Instant>) {
        self.0.timeouts.read.set_deadline(deadline);
        self.rouse_reader();
    }

    /// Ends every wait of a flush at `deadline`, whatever the timeout; `None` clears it. A flush
    /// that waits now obeys.
    pub fn set_write_deadline(&self, deadline: Option<Instant>) {
        self.0.timeouts.write.set_deadline(deadline);
        self.rouse_flusher();
    }

    /// Sets both deadlines.
    pub fn set_deadline(&self, deadline: Option<Instant>) {
        self.set_read_deadline(deadline);
        self.set_write_deadline(deadline);
    }

    /// Closes the connection when no byte has moved for `timeout` and no handler computes; `None`
    /// or zero is never.
    pub fn set_idle_timeout(&self, timeout: Option<Duration>) {
        self.0.timeouts.touch(now_ns());
        self.0.idle_timeout.set(timeout);
        if self.is_closed() {
            // The bound of what is still sent stays.
            self.0.idle_timeout.cap(config::LINGER);
        }
        self.0.arm(self.0.idle_at());
    }

    /// Calls `callback` when the connection ends: last added first, once, after the handler that
    /// runs has returned, with the descriptor still valid. If that has happened, calls it now.
    pub fn on_close(&self, callback: impl FnOnce(&Handle) + Send + 'static) {
        {
            let mut extras = lock(&self.0.extras);
            if !extras.finished {
                extras.callbacks.push(Box::new(callback));
                return;
            }
        }
        callback(self);
    }

    /// Runs `future` where the handlers of the connection's server run: on the connection's poller,
    /// on the workers, or on the runtime, as the placement says. Beside the handlers, so requests
    /// of one connection can be served at the same time; their replies go through a
    /// [`Mux`](crate::Mux).
    ///
    /// A shutdown waits for it as it does for handlers, whatever becomes of the connection. An
    /// error or a panic is reported to `on_error` and counted; the connection stays, unless that
    /// closes it. To the idle timeout only the handler counts, and its waits for the peer: not what
    /// was spawned.
    ///
    /// # Errors
    /// Unsupported: the connection has no server. Spawn on an executor of your own there.
    pub fn spawn<F>(&self, future: F) -> Result<()>
    where
        F: Future<Output = Result<()>> + Send + 'static,
    {
        self.0.spawn(future)
    }

    /// Calls `code` with the descriptor, which stays open meanwhile.
    ///
    /// # Errors
    /// Closed, once the descriptor is gone.
    pub fn with_fd<T>(&self, code: impl FnOnce(BorrowedFd<'_>) -> T) -> Result<T> {
        let socket = lock(&self.0.output).socket.clone();
        let socket = socket.ok_or_else(|| Error::closed("with_fd"))?;
        Ok(code(socket.as_fd()))
    }

    /// Attaches a value to the connection, in place of the one before.
    pub fn set_context<T: Any + Send + Sync>(&self, context: T) {
        let old = lock(&self.0.extras).context.replace(Arc::new(context));
        // Dropped outside the lock: it may be anything.
        drop(old);
    }

    /// The attached value, if it is a `T`.
    pub fn context<T: Any + Send + Sync>(&self) -> Option<Arc<T>> {
        lock(&self.0.extras).context.clone()?.downcast().ok()
    }

    /// Ends this side of the stream.
    pub(super) fn end_output(&self) -> Result<()> {
        let mut output = lock(&self.0.output);
        output.ended = true;
        let socket = output.socket.as_ref().ok_or_else(|| Error::closed("shutdown_write"))?;
        self.0.remote.counters.add(|counters| &counters.setup_calls, 1);
        match socket.shutdown(Side::Write) {
            // The peer has reset the connection: its reader will not miss our end.
            Err(error) if error.kind() == io::ErrorKind::NotConnected => Ok(()),
            done => done.map_err(|error| Error::io("shutdown", error)),
        }
    }

    /// Makes a waiting reader compute its end anew.
    fn rouse_reader(&self) {
        let waker = lock(&self.0.input).take_waker();
        self.0.wake(waker, None);
    }

    fn rouse_flusher(&self) {
        let flusher = lock(&self.0.output).take_flusher();
        self.0.wake(None, flusher);
    }

    pub(super) fn request_removal(&self) {
        self.0.remote.send(Command::Remove(Arc::clone(&self.0)));
    }
}

impl fmt::Debug for Handle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Handle")
            .field("peer", &format_args!("{}", self.0.peer))
            .field("active", &self.is_active())
            .finish_non_exhaustive()
    }
}
