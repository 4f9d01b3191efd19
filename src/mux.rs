//! Many producers, one connection.
//!
//! A [`Mux`] takes whole messages from any thread; its [`MuxDriver`] owns the connection's writer,
//! gathers everything that was taken since its last look, and flushes that once. What is between
//! them is in `queue.rs`.

mod queue;

use std::fmt;
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use crate::buffer::{Chain, LinkBuffer, Pool, Slice, Staging};
use crate::config;
use crate::connection::WriteHalf;
use crate::error::{Error, Result};
use crate::sync::Arc;

use queue::{Place, Queue};

/// Sends messages of many producers through one connection. Clones send through the same one.
///
/// A message goes out whole: never between parts of another's. Those of one producer that awaits
/// each [`send`](Self::send) keep their order; for others there is none. All messages that are
/// there when the driver looks leave with one flush. Plain threads send with
/// [`blocking::wait`](crate::blocking::wait).
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
///             let reply = request; // the work
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
/// While 1 MiB of messages wait for the driver, `send` waits. The driver waits while the peer does
/// not read, so a producer is never further ahead of a slow peer than that, what the driver is
/// flushing, and its own message. A server that starts a task for each request has to bound these
/// as well: they wait, with their replies, for a peer that sends requests and reads no replies.
///
/// # Its end
/// The driver ends, and drops its writer, after [`close`](Self::close); when every clone is
/// dropped; or when the connection fails or is closed. In the first two cases it flushes what was
/// accepted before.
#[derive(Clone)]
pub struct Mux(Arc<Producers>);

/// All clones of a [`Mux`].
struct Producers(Arc<Queue>);

/// Moves the messages of a [`Mux`] into its connection. Nothing moves unless this is polled: spawn
/// it, or await it beside the reading.
///
/// It ends with `Ok` when the mux was closed, or all its clones were dropped, and every message
/// accepted before is in the kernel.
///
/// # Errors
/// Closed, as soon as the connection is; write timeout; the kernel's. Whoever sends, flushes or
/// closes is told the same.
///
/// Dropped before its end, it submits what was accepted, as far as the connection's bound of output
/// allows, and drops the writer; producers then get a closed error.
#[must_use = "nothing is sent unless the driver is polled"]
pub struct MuxDriver {
    queue: Arc<Queue>,
    /// `None` when it has ended.
    writer: Option<WriteHalf>,
    /// A flush is under way, and covers so many of the accepted bytes.
    flushing: Option<u64>,
}

impl Mux {
    /// Sends through `writer`. What is written there and not submitted goes first.
    pub fn new(writer: WriteHalf) -> (Mux, MuxDriver) {
        let queue = Arc::new(Queue::new(writer.pool().clone()));
        let flushing = (writer.pending_len() > 0).then_some(0);
        let driver = MuxDriver { queue: Arc::clone(&queue), writer: Some(writer), flushing };
        (Mux(Arc::new(Producers(queue))), driver)
    }

    /// Hands in a message: a copy up to 4096 bytes, a reference above. Waits while 1 MiB of others
    /// wait for the driver.
    ///
    /// `Ok`: accepted, whatever becomes of this future, and sent unless the connection fails; then
    /// the next call tells, and [`flush`](Self::flush) and [`close`](Self::close) do. Dropped
    /// before that, the message is not sent.
    ///
    /// # Errors
    /// Closed, if the mux is or its driver was dropped; what the driver has ended with.
    pub async fn send(&self, message: impl Into<Slice>) -> Result<()> {
        let message = message.into();
        // A clone, so that the message's memory is not given back under the queue's lock.
        self.accept(|staged, pool| staged.write(message.clone(), pool)).await
    }

    /// The same with a copy of `message`.
    ///
    /// # Errors
    /// As for [`send`](Self::send).
    pub async fn send_copy(&self, message: &[u8]) -> Result<()> {
        self.accept(|staged, pool| staged.write_copy(message, pool)).await
    }

    /// The same with everything in `message`, flushed there or not, as one message; copies nothing
    /// but the shortest pieces.
    ///
    /// # Errors
    /// As for [`send`](Self::send).
    pub async fn send_buffer(&self, message: LinkBuffer) -> Result<()> {
        let mut message: Chain = message.into_chain();
        self.accept(|staged, _| staged.append(&mut message)).await
    }

    /// Waits until the kernel has every message accepted so far.
    ///
    /// # Errors
    /// What the driver has ended with instead; closed, if it was dropped.
    pub async fn flush(&self) -> Result<()> {
        let queue = self.queue();
        let bytes = queue.accepted();
        let mut place = Place::of_flusher(queue);
        poll_fn(|cx| queue.poll_flushed(bytes, &mut place, cx)).await
    }

    /// Accepts nothing more, and waits until everything accepted is in the kernel and the driver
    /// has ended. Producers that still wait for room get a closed error.
    ///
    /// Dropped after its first poll, this future leaves the mux closing.
    ///
    /// # Errors
    /// Closed, if that was done before; what the driver has ended with instead.
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
        &self.0.0
    }
}

impl Drop for Producers {
    fn drop(&mut self) {
        // Fails where it is closed already.
        let _ = self.0.begin_close();
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
        // Others of this thread have their turn.
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}

impl MuxDriver {
    fn fail(&mut self, error: Error) -> Result<()> {
        self.end(Some(error.copy()));
        Err(error)
    }

    /// Ends, once; what was accepted and not taken is submitted if that can be.
    fn end(&mut self, failure: Option<Error>) {
        let Some(mut writer) = self.writer.take() else { return };
        writer.forget_wait();
        let left = self.queue.end(failure);
        // Fails where the connection is closed, or its output is full: everybody has been told.
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
