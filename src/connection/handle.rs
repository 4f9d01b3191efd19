//! The part of a connection that any thread may use.

use std::any::Any;
use std::fmt;
use std::future::Future;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::core::Core;
use super::service::ShutdownBegun;
use super::sleep::Sleep;
use super::timeout::Stall;
use crate::address::PeerAddr;
use crate::clock::now_ns;
use crate::config;
use crate::error::{Error, Result};
use crate::poller::timers::ns_at;
use crate::poller::{Alarm, Command, Side};
use crate::sync::lock;

/// A reference to a connection. Any thread may use it to close the connection, to ask about it, and
/// to change its timeouts.
///
/// Clones refer to the same connection. A handle does not keep the connection open. It stays valid
/// after the connection's end.
#[derive(Clone)]
pub struct Handle(pub(super) Arc<Core>);

/// Counts of the bytes of one connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ConnectionStats {
    /// Received from the peer.
    pub received_bytes: u64,
    /// Taken by the kernel.
    pub sent_bytes: u64,
    /// Received and not consumed. Consumed bytes are subtracted when the reader next waits.
    pub unread_bytes: u64,
    /// Submitted and not yet taken by the kernel.
    pub unsent_bytes: u64,
}

impl Handle {
    pub(crate) fn of(core: &Arc<Core>) -> Handle {
        Handle(Arc::clone(core))
    }

    /// Closes the connection. Calling it again has no effect.
    ///
    /// Waiting reads and flushes fail with a closed error. Bytes that are written and not submitted
    /// are dropped. Submitted bytes are still sent while the peer takes them. If the peer takes
    /// nothing for 30 s, or for the idle timeout if that is shorter, the unsent bytes are dropped
    /// and a TCP peer sees a reset. The same happens in any case ten minutes after the close. A
    /// peer that still sends may lose the last output: TCP resets a connection that closes with
    /// unread input.
    ///
    /// The descriptor closes when the output is sent or dropped, a running handler has returned,
    /// and the [`Connection`](crate::Connection) is dropped. The close callbacks run just before.
    pub fn close(&self) {
        self.0.close();
    }

    /// Closes the connection at once. Like [`close`](Self::close), but all bytes that the kernel
    /// has not sent are dropped, and a TCP peer sees a reset. So the peer cannot mistake the bytes
    /// that it got for the whole. After a close, this ends the time in which bytes are still sent.
    pub fn abort(&self) {
        self.0.abort();
    }

    /// Whether neither side has closed. Changes to `false` when the peer closes, without a read.
    pub fn is_active(&self) -> bool {
        self.0.life.is_active()
    }

    /// Whether this side has closed.
    pub fn is_closed(&self) -> bool {
        self.0.life.is_closed()
    }

    /// Whether a shutdown of the connection's server has begun. `false` if the connection has no
    /// server.
    pub fn is_shutting_down(&self) -> bool {
        self.0.service.as_ref().is_some_and(|service| service.shutdown.is_raised())
    }

    /// Ready when a shutdown of the connection's server has begun. Never ready if the connection
    /// has no server.
    ///
    /// A shutdown closes connections without a handler, and waits for handlers. So a handler that
    /// serves many requests in one run waits for this future as well, and returns:
    ///
    /// ```
    /// use ringpoll::{Connection, Result};
    ///
    /// async fn serve(mut conn: Connection) -> Result<()> {
    ///     let mut shutdown = conn.shutdown_begun();
    ///     loop {
    ///         tokio::select! {
    ///             request = conn.until(b'\n') => {
    ///                 let request = request?;
    ///                 conn.write(request)?;
    ///                 conn.flush().await?;
    ///             }
    ///             () = &mut shutdown => return Ok(()), // closes the connection
    ///         }
    ///     }
    /// }
    /// ```
    ///
    /// Where the pollers end without a shutdown of the server, connections close, and this future
    /// is not ready.
    pub fn shutdown_begun(&self) -> ShutdownBegun {
        ShutdownBegun::new(self.0.service.as_ref().map(|service| &service.shutdown))
    }

    /// The peer's address, as it was when the connection was made.
    pub fn peer_addr(&self) -> PeerAddr {
        self.0.peer.clone()
    }

    /// The local address.
    ///
    /// # Errors
    /// Closed, after the descriptor has closed. An error of the kernel.
    pub fn local_addr(&self) -> Result<PeerAddr> {
        let output = lock(&self.0.output);
        let socket = output.socket.as_ref().ok_or_else(|| Error::closed("local_addr"))?;
        socket.local_addr().map_err(|error| Error::io("getsockname", error))
    }

    /// A number that differs between connections that exist at the same time.
    pub fn id(&self) -> u64 {
        Arc::as_ptr(&self.0).addr() as u64
    }

    /// The connection's byte counts.
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

    /// Sets the longest time that one wait of a read may take; `None` or zero is no limit. Clears
    /// the read deadline. A wait that has begun without a limit counts from when one is set. A read
    /// of a known length waits once, for all its bytes.
    /// [`until`](crate::Connection::until) starts a new wait after each byte that comes.
    pub fn set_read_timeout(&self, timeout: Option<Duration>) {
        self.0.timeouts.read.set_timeout(timeout);
        self.rouse_reader();
    }

    /// Sets the longest time that one wait of a flush may take; `None` or zero is no limit. Clears
    /// the write deadline.
    ///
    /// The time does not restart while the peer takes bytes. Where answers are long, or peers are
    /// slow, use [`set_write_stall_timeout`](Self::set_write_stall_timeout).
    pub fn set_write_timeout(&self, timeout: Option<Duration>) {
        self.0.timeouts.write.set_timeout(timeout);
        self.rouse_flusher();
    }

    /// Sets for how long the peer may take no byte while a flush waits; `None` or zero is no limit.
    /// The flush then fails with a write timeout. A peer that takes bytes, however slowly, is not
    /// cut.
    ///
    /// A TCP peer takes bytes when it acknowledges them. The kernel is asked for this four times in
    /// `timeout`, so a flush ends when between one and one and a quarter of `timeout` have passed
    /// since the peer took the last byte, or since the wait began. Write timeout and write deadline
    /// hold as well, and the earliest of them ends the wait.
    ///
    /// On a Unix socket, the kernel tells how much memory the unread bytes use. The timeout can end
    /// a flush too early only if this amount is the same each time that the kernel is asked.
    pub fn set_write_stall_timeout(&self, timeout: Option<Duration>) {
        let flusher = {
            let mut output = lock(&self.0.output);
            output.stall = Stall::new(timeout);
            output.take_flusher()
        };
        self.0.wake(None, flusher);
    }

    /// Ends every wait of a read at `deadline`, and overrides the read timeout. `None` clears the
    /// deadline. A read that waits already obeys as well.
    pub fn set_read_deadline(&self, deadline: Option<Instant>) {
        self.0.timeouts.read.set_deadline(deadline);
        self.rouse_reader();
    }

    /// Ends every wait of a flush at `deadline`, and overrides the write timeout. `None` clears the
    /// deadline. A flush that waits already obeys as well.
    pub fn set_write_deadline(&self, deadline: Option<Instant>) {
        self.0.timeouts.write.set_deadline(deadline);
        self.rouse_flusher();
    }

    /// Sets the read deadline and the write deadline.
    pub fn set_deadline(&self, deadline: Option<Instant>) {
        self.set_read_deadline(deadline);
        self.set_write_deadline(deadline);
    }

    /// Closes the connection when no byte has moved for `timeout` while no handler was computing.
    /// `None` or zero is no limit. A handler that waits for the peer is not computing.
    pub fn set_idle_timeout(&self, timeout: Option<Duration>) {
        self.0.timeouts.touch(now_ns());
        self.0.idle_timeout.set(timeout);
        if self.is_closed() {
            // After a close, `LINGER` still bounds the time for unsent bytes.
            self.0.idle_timeout.cap(config::LINGER);
        }
        self.0.arm(self.0.idle_at());
    }

    /// Calls `callback` once when the connection ends. The callback added last is called first.
    /// Callbacks are called after the running handler has returned, while the descriptor is still
    /// open. If the callbacks have been called already, `callback` is called at once.
    ///
    /// # Panics
    /// If `callback` is called at once and panics.
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

    /// Runs `future` at the same time as the handlers, where the server's placement runs them: on
    /// the connection's poller, on the workers, or on the runtime. So requests of one connection
    /// can be served at the same time. Their replies go through a [`Mux`](crate::Mux).
    ///
    /// A shutdown waits for `future` as it does for handlers, also if the connection has ended. An
    /// error or a panic of `future` is counted and reported to `on_error`, and does not close the
    /// connection. The idle timeout ignores `future`: only handlers and their waits count.
    ///
    /// # Errors
    /// Unsupported, if the connection has no server. Use an executor of your own then, or
    /// [`Pollers::spawn`](crate::Pollers::spawn).
    pub fn spawn<F>(&self, future: F) -> Result<()>
    where
        F: Future<Output = Result<()>> + Send + 'static,
    {
        self.0.spawn(future)
    }

    /// Whether a server accepted the connection, so that [`spawn`](Self::spawn) can run futures.
    pub fn has_server(&self) -> bool {
        self.0.is_serving()
    }

    /// Waits until `deadline`. The connection's poller wakes the task then, on any executor and
    /// also after the connection has ended. If the poller ends before, the wait ends then.
    pub fn sleep_until(&self, deadline: Instant) -> Sleep {
        Sleep::new(Alarm::new(&self.0.remote, ns_at(deadline)))
    }

    /// Calls `code` with the descriptor, which stays open until `code` returns.
    ///
    /// # Errors
    /// Closed, after the descriptor has closed.
    ///
    /// # Panics
    /// If `code` panics.
    pub fn with_fd<T>(&self, code: impl FnOnce(BorrowedFd<'_>) -> T) -> Result<T> {
        let socket = lock(&self.0.output).socket.clone();
        let socket = socket.ok_or_else(|| Error::closed("with_fd"))?;
        Ok(code(socket.as_fd()))
    }

    /// Attaches a value to the connection. It replaces the value attached before.
    pub fn set_context<T: Any + Send + Sync>(&self, context: T) {
        let old = lock(&self.0.extras).context.replace(Arc::new(context));
        // The destructor is user code, so no lock is held.
        drop(old);
    }

    /// The attached value, if it is a `T`.
    pub fn context<T: Any + Send + Sync>(&self) -> Option<Arc<T>> {
        lock(&self.0.extras).context.clone()?.downcast().ok()
    }

    /// Ends this side of the stream.
    pub(super) fn end_output(&self) -> Result<()> {
        let mut output = lock(&self.0.output);
        let output = &mut *output;
        let socket = output.socket.as_ref().ok_or_else(|| Error::closed("shutdown_write"))?;
        output.ended = true;
        self.0.remote.counters.add(|counters| &counters.setup_calls, 1);
        match socket.shutdown(Side::Write) {
            // The peer has reset the connection, so there is no stream left to end.
            Err(error) if error.kind() == io::ErrorKind::NotConnected => Ok(()),
            done => done.map_err(|error| Error::io("shutdown", error)),
        }
    }

    /// Wakes a waiting reader, which then computes the end of its wait anew.
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
