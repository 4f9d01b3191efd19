//! Many producers, one connection.
//!
//! A [`Mux`] accepts whole messages from any thread. Its [`MuxDriver`] owns the writer of the
//! connection: it takes all accepted messages as one batch and flushes them together. `queue.rs`
//! has the queue between the two.

mod queue;

use std::fmt;
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::Weak;
use std::task::{Context, Poll, ready};

use crate::buffer::{Chain, LinkBuffer, Pool, Slice, Staging};
use crate::config;
use crate::connection::{Core, Handle, WriteHalf};
use crate::error::{Error, Result};
use crate::sync::Arc;

use queue::{Place, Queue};

/// Sends messages of many producers through one connection. Clones use the same connection.
///
/// Messages never interleave. The messages of a producer that awaits each [`send`](Self::send) keep
/// their order; between producers the order is not defined. The driver sends all messages that are
/// waiting with one flush. Plain threads send with [`blocking::wait`](crate::blocking::wait).
///
/// ```no_run
/// use ringpoll::{Connection, Mux, Result, Server};
///
/// /// Numbered requests of 16 bytes, served side by side and answered in any order.
/// async fn serve(conn: Connection) -> Result<()> {
///     let (mut reader, writer) = conn.split();
///     let (mux, driver) = Mux::new(writer);
///     reader.spawn(driver)?; // where the server's handlers run
///     while reader.readable().await? > 0 {
///         let request = reader.next(16).await?;
///         let mux = mux.clone();
///         reader.spawn(async move {
///             let reply = request; // a real server computes here
///             mux.send(reply).await
///         })?;
///     }
///     // The peer has ended its side. The driver ends when the last clone is gone.
///     Ok(())
/// }
///
/// fn main() -> Result<()> {
///     Server::builder().on_connect(serve).bind("127.0.0.1:8972")?.serve()
/// }
/// ```
///
/// # Bounds
/// While 1 MiB of messages wait for the driver, `send` waits. While the peer does not read, the
/// driver waits. So the memory for a slow peer is at most 1 MiB, the batch that the driver is
/// flushing, and one message for each producer. A server that starts a task for each request must
/// limit the number of tasks: their replies wait as long as the peer does not read.
///
/// # End of the driver
/// The driver ends, and drops its writer, after [`close`](Self::close), when every clone is
/// dropped, or when the connection fails or is closed. In the first two cases it first flushes all
/// accepted messages.
#[derive(Clone)]
pub struct Mux(Arc<Producers>);

/// The clones of a [`Mux`] share this. It is dropped with the last of them.
struct Producers {
    queue: Arc<Queue>,
    /// Weak, because the context of a connection may hold its mux.
    connection: Weak<Core>,
}

/// A message that [`Mux::try_send`] did not accept.
#[derive(Debug)]
pub enum TrySendError {
    /// 1 MiB of messages wait for the driver. The message may be sent later.
    Full(Slice),
    /// The mux is closed, or its driver has ended; the error says why.
    Failed(Slice, Error),
}

/// Sends the messages of a [`Mux`]. It must be polled: spawn it, or await it concurrently with
/// reading.
///
/// It returns `Ok` when the mux is closed, or all its clones are dropped, and every accepted
/// message is in the kernel.
///
/// If the driver is dropped before that, it submits the accepted messages, as far as the output
/// bound of the connection allows, and drops the writer. Producers then get a closed error.
///
/// # Errors
/// Closed, as soon as the connection is closed; write timeout; an error of the kernel. All calls of
/// the mux that wait, and all later ones, fail with the same error.
#[must_use = "nothing is sent unless the driver is polled"]
pub struct MuxDriver {
    queue: Arc<Queue>,
    /// `None` after the end of the driver.
    writer: Option<WriteHalf>,
    /// During a flush: how many accepted bytes are in the kernel when it is complete.
    flushing: Option<u64>,
}

impl Mux {
    /// Sends through `writer`. Bytes that are written there and not submitted are sent first.
    pub fn new(writer: WriteHalf) -> (Mux, MuxDriver) {
        let queue = Arc::new(Queue::new(writer.pool().clone()));
        let flushing = (writer.pending_len() > 0).then_some(0);
        let driver = MuxDriver { queue: Arc::clone(&queue), writer: Some(writer), flushing };
        let connection = driver.writer.as_ref().map_or_else(Weak::new, WriteHalf::downgrade);
        (Mux(Arc::new(Producers { queue, connection })), driver)
    }

    /// The handle of the connection. `None` if the connection has ended and nothing else refers to
    /// it: neither the driver nor another handle.
    pub fn handle(&self) -> Option<Handle> {
        self.0.connection.upgrade().map(|core| Handle::of(&core))
    }

    /// Adds a message to the queue: a copy of up to 4096 bytes, a reference to more. Waits while
    /// 1 MiB of messages wait for the driver.
    ///
    /// After `Ok` the message is accepted: it is sent unless the connection fails. If it fails, the
    /// next call of any method returns the error. If the future is dropped before `Ok`, the message
    /// is not sent.
    ///
    /// # Errors
    /// Closed, if the mux is closed or its driver was dropped; the error of the driver.
    pub async fn send(&self, message: impl Into<Slice>) -> Result<()> {
        let message = message.into();
        // A clone, so that the lock of the queue is not held while user memory is dropped.
        self.accept(|staged, pool| staged.write(message.clone(), pool)).await
    }

    /// Like [`send`](Self::send), but never waits: while 1 MiB of messages wait for the driver, the
    /// message comes back. So a producer can drop or delay messages for a peer that is too slow:
    ///
    /// ```
    /// use ringpoll::{Mux, Result, TrySendError};
    ///
    /// /// Sends one update. `false`: the peer is too slow, so this update is left out.
    /// fn publish(mux: &Mux, update: &'static [u8]) -> Result<bool> {
    ///     match mux.try_send(update) {
    ///         Ok(()) => Ok(true),
    ///         Err(TrySendError::Full(_)) => Ok(false),
    ///         Err(error) => Err(error.into()),
    ///     }
    /// }
    /// ```
    ///
    /// # Errors
    /// Full; failed, as for [`send`](Self::send). Both carry the message.
    pub fn try_send(&self, message: impl Into<Slice>) -> Result<(), TrySendError> {
        let message = message.into();
        // A clone, so that the lock of the queue is not held while user memory is dropped.
        match self.queue().try_accept(|staged, pool| staged.write(message.clone(), pool)) {
            Ok(true) => Ok(()),
            Ok(false) => Err(TrySendError::Full(message)),
            Err(error) => Err(TrySendError::Failed(message, error)),
        }
    }

    /// Like [`send`](Self::send), with a copy of `message`.
    ///
    /// # Errors
    /// As for [`send`](Self::send).
    pub async fn send_copy(&self, message: &[u8]) -> Result<()> {
        self.accept(|staged, pool| staged.write_copy(message, pool)).await
    }

    /// Like [`send`](Self::send): sends all bytes of the buffer, flushed there or not, as one
    /// message. Copies the shortest pieces only.
    ///
    /// # Errors
    /// As for [`send`](Self::send).
    pub async fn send_buffer(&self, message: LinkBuffer) -> Result<()> {
        let mut message: Chain = message.into_chain();
        self.accept(|staged, _| staged.append(&mut message)).await
    }

    /// Waits until all messages accepted so far are in the kernel.
    ///
    /// # Errors
    /// The error of the driver; closed, if it was dropped.
    pub async fn flush(&self) -> Result<()> {
        let queue = self.queue();
        let bytes = queue.accepted();
        let mut place = Place::of_flusher(queue);
        poll_fn(|cx| queue.poll_flushed(bytes, &mut place, cx)).await
    }

    /// Accepts no more messages, and waits until all accepted messages are in the kernel and the
    /// driver has ended. Producers that wait for room get a closed error.
    ///
    /// The mux stays closed if this future is dropped after its first poll.
    ///
    /// # Errors
    /// Closed, if the mux was closed before; the error of the driver.
    pub async fn close(&self) -> Result<()> {
        let queue = self.queue();
        queue.begin_close()?;
        let mut place = Place::of_flusher(queue);
        poll_fn(|cx| queue.poll_ended(&mut place, cx)).await
    }

    async fn accept(&self, mut put: impl FnMut(&mut Staging, &Pool)) -> Result<()> {
        let queue = self.queue();
        let mut place = Place::of_sender(queue);
        poll_fn(|cx| queue.poll_accept(&mut put, &mut place, cx)).await
    }

    fn queue(&self) -> &Queue {
        &self.0.queue
    }
}

impl TrySendError {
    /// The message.
    pub fn into_message(self) -> Slice {
        match self {
            TrySendError::Full(message) | TrySendError::Failed(message, _) => message,
        }
    }

    /// Whether the message may be sent later.
    pub fn is_full(&self) -> bool {
        matches!(self, TrySendError::Full(_))
    }
}

impl From<TrySendError> for Error {
    /// [`TrySendError::Full`] becomes a limit error.
    fn from(error: TrySendError) -> Error {
        match error {
            TrySendError::Failed(_, error) => error,
            TrySendError::Full(_) => Error::limit(error.to_string()),
        }
    }
}

impl fmt::Display for TrySendError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            TrySendError::Full(message) => write!(
                f,
                "try_send: no room for {} bytes, {} bytes of messages wait for the peer",
                message.len(),
                config::MUX_BYTES_MAX
            ),
            TrySendError::Failed(_, error) => error.fmt(f),
        }
    }
}

impl std::error::Error for TrySendError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            TrySendError::Full(_) => None,
            TrySendError::Failed(_, error) => Some(error),
        }
    }
}

impl Drop for Producers {
    fn drop(&mut self) {
        // Fails if the mux is closed already.
        let _ = self.queue.begin_close();
    }
}

impl Future for MuxDriver {
    type Output = Result<()>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<()>> {
        let this = &mut *self;
        for _ in 0..config::MUX_BATCHES_PER_POLL {
            let Some(writer) = &mut this.writer else {
                return Poll::Ready(Err(Error::gone("mux: the driver has ended")));
            };
            if let Some(end) = this.flushing {
                if let Err(error) = ready!(writer.poll_flush(cx)) {
                    return Poll::Ready(this.fail(error));
                }
                this.flushing = None;
                this.queue.flushed(end);
            }
            match this.queue.poll_batch(cx) {
                Poll::Ready(Some(batch)) => {
                    if let Err(error) = writer.append(LinkBuffer::from_chain(batch.bytes)) {
                        return Poll::Ready(this.fail(error));
                    }
                    this.flushing = Some(batch.end);
                }
                Poll::Ready(None) => {
                    this.end(None);
                    return Poll::Ready(Ok(()));
                }
                Poll::Pending => {
                    let error = ready!(writer.poll_end(cx));
                    return Poll::Ready(this.fail(error));
                }
            }
        }
        // Yields to other tasks of this thread.
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}

impl MuxDriver {
    fn fail(&mut self, error: Error) -> Result<()> {
        self.end(Some(error.copy()));
        Err(error)
    }

    /// Ends the driver, once. Submits the accepted messages that no batch has taken.
    fn end(&mut self, failure: Option<Error>) {
        let Some(mut writer) = self.writer.take() else { return };
        writer.forget_wait();
        let left = self.queue.end(failure);
        // Fails if the connection is closed or its output is full. Producers have the error
        // already.
        let _ = writer.append(LinkBuffer::from_chain(left)).and_then(|()| writer.submit());
    }
}

impl Drop for MuxDriver {
    fn drop(&mut self) {
        self.end(Some(Error::gone("mux: its driver was dropped")));
    }
}

impl fmt::Debug for Mux {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mux")
            .field("accepted_bytes", &self.queue().accepted())
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for MuxDriver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MuxDriver").field("writer", &self.writer).finish_non_exhaustive()
    }
}

const _: () = {
    const fn goes_anywhere<T: Send + Sync + Unpin + 'static>() {}
    goes_anywhere::<Mux>();
    goes_anywhere::<MuxDriver>();
};
