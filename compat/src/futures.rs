//! A connection for code that is written for the traits of `futures`.
//!
//! [`FuturesStream`] implements [`AsyncRead`], [`AsyncBufRead`] and [`AsyncWrite`], [`SliceStream`]
//! is a `Stream` of the received slices, and [`ByteSink`] is a `Sink`. They have no buffers of
//! their own: input is read from the received blocks, and output is stored in the connection. Any
//! task on any executor may poll them.

mod items;

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use futures_io::{AsyncBufRead, AsyncRead, AsyncWrite};
use ringpoll::Connection;

use crate::gathered::SubmitOnDrop;

pub use items::{ByteSink, SliceStream};

/// A connection that implements the traits [`AsyncRead`], [`AsyncBufRead`] and [`AsyncWrite`] of
/// `futures-io`.
///
/// It behaves like `TokioStream`, which is the same for tokio's traits:
///
/// * **Reading** returns `Ok(0)` at the end of the peer's stream. `fill_buf` returns the received
///   bytes without copying.
/// * **Writing** gathers bytes in the connection. They are submitted, without waiting, when
///   [`GATHERED_BYTES_MAX`](Self::GATHERED_BYTES_MAX) are gathered, by a flush, or by a read that
///   has to wait.
/// * **A bound on output** makes writes wait while [`OUTPUT_BYTES_MAX`](Self::OUTPUT_BYTES_MAX)
///   bytes, gathered or submitted, are not in the kernel.
///   [`with_output_bytes_max`](Self::with_output_bytes_max) changes it.
/// * **Flushing** submits the gathered bytes, and does not wait for the kernel unless more bytes
///   than the bound are unsent.
/// * **Closing** waits until the kernel has every byte, then ends this side of the stream. Reading
///   stays possible.
/// * **Timeouts and deadlines** of the connection apply to each wait, and are reported as
///   [`io::ErrorKind::TimedOut`]. Received bytes stay readable.
/// * **Cancelling** a read loses no bytes. A write that was pending has written none.
/// * **Dropping** the stream submits the gathered bytes. Then the connection closes, or returns to
///   its server. Submitted bytes are sent in both cases; only closing confirms it.
///
/// ```
/// use futures_util::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt};
/// use ringpoll::{Server, blocking};
/// use ringpoll_compat::FuturesStream;
///
/// let server = Server::builder()
///     .on_connect(|conn| async move {
///         let mut stream = FuturesStream::from(conn);
///         let mut line = String::new();
///         stream.read_line(&mut line).await?;
///         stream.write_all(line.to_uppercase().as_bytes()).await?;
///         Ok(stream.flush().await?)
///     })
///     .bind("127.0.0.1:0")?
///     .spawn()?;
///
/// let answer = blocking::wait(async {
///     let conn = ringpoll::connect(&server.local_addr().to_string()).await?;
///     let mut stream = FuturesStream::from(conn);
///     stream.write_all(b"hello\n").await?;
///     let mut answer = String::new();
///     stream.read_to_string(&mut answer).await?;
///     Ok::<_, std::io::Error>(answer)
/// })?;
/// assert_eq!(answer, "HELLO\n");
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Debug)]
pub struct FuturesStream {
    inner: SubmitOnDrop<Connection>,
    /// The largest number of bytes, gathered or submitted, that are not in the kernel.
    output_bytes_max: usize,
}

impl FuturesStream {
    /// The number of gathered bytes that are submitted without a flush.
    pub const GATHERED_BYTES_MAX: usize = 64 * 1024;

    /// The default bound on output in bytes. It is four times
    /// [`GATHERED_BYTES_MAX`](Self::GATHERED_BYTES_MAX), so the kernel has bytes to send while
    /// writes gather more.
    pub const OUTPUT_BYTES_MAX: usize = 4 * Self::GATHERED_BYTES_MAX;

    /// Wraps a connection. Input that it has already buffered is read first.
    pub fn new(inner: Connection) -> FuturesStream {
        let inner = SubmitOnDrop::new(inner);
        FuturesStream { inner, output_bytes_max: Self::OUTPUT_BYTES_MAX }
    }

    /// Makes writes wait while `bytes` bytes, gathered or submitted, are not in the kernel. With 0,
    /// the `output_bytes_max` of the connection is the only bound.
    #[must_use]
    pub fn with_output_bytes_max(mut self, bytes: usize) -> FuturesStream {
        self.output_bytes_max = if bytes == 0 { usize::MAX } else { bytes };
        self
    }

    /// The wrapped connection, for timeouts and counters.
    pub fn get_ref(&self) -> &Connection {
        &self.inner
    }

    /// The wrapped connection. Reads and writes of it and of this wrapper act on the same stream.
    pub fn get_mut(&mut self) -> &mut Connection {
        &mut self.inner
    }

    /// The wrapped connection, with all unread bytes and all written bytes.
    pub fn into_inner(self) -> Connection {
        self.inner.into_inner()
    }

    /// Waits for input. If it has to wait, it submits the gathered bytes, because the peer may wait
    /// for them.
    fn poll_input(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let polled = self.inner.poll_readable(cx);
        if polled.is_pending() && self.inner.pending_len() > 0 {
            // An error of it is returned by the next write or flush.
            let _ = self.inner.submit();
        }
        polled.map_err(io::Error::from)
    }
}

impl From<Connection> for FuturesStream {
    fn from(inner: Connection) -> FuturesStream {
        FuturesStream::new(inner)
    }
}

impl AsyncRead for FuturesStream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        if buffer.is_empty() {
            return Poll::Ready(Ok(0));
        }
        let this = self.get_mut();
        ready!(this.poll_input(cx))?;
        let mut taken = 0;
        // The bytes may lie in several blocks.
        while taken < buffer.len() {
            let front = this.inner.buffered();
            if front.is_empty() {
                break;
            }
            let count = front.len().min(buffer.len() - taken);
            buffer[taken..][..count].copy_from_slice(&front[..count]);
            this.inner.advance(count);
            taken += count;
        }
        Poll::Ready(Ok(taken))
    }
}

impl AsyncBufRead for FuturesStream {
    fn poll_fill_buf(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<&[u8]>> {
        let this = self.get_mut();
        ready!(this.poll_input(cx))?;
        Poll::Ready(Ok(this.inner.buffered()))
    }

    /// # Panics
    /// If `count` is more than `fill_buf` has returned.
    fn consume(self: Pin<&mut Self>, count: usize) {
        let this = self.get_mut();
        let shown = this.inner.buffered().len();
        assert!(count <= shown, "consume {count} bytes of {shown} shown");
        this.inner.advance(count);
    }
}

impl AsyncWrite for FuturesStream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(bytes)])
    }

    /// Writes as many bytes of the pieces as there is room for.
    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pieces: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if pieces.iter().all(|piece| piece.is_empty()) {
            return Poll::Ready(Ok(0));
        }
        let this = self.get_mut();
        let writer = &mut this.inner;
        let bytes_max = this.output_bytes_max;
        let taken = ready!(writer.poll_write_vectored_within(cx, pieces, bytes_max))?;
        if writer.pending_len() >= Self::GATHERED_BYTES_MAX {
            writer.submit()?;
        }
        Poll::Ready(Ok(taken))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        this.inner.poll_flush_within(cx, this.output_bytes_max).map_err(io::Error::from)
    }

    fn poll_close(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.get_mut().inner.poll_shutdown_write(cx).map_err(io::Error::from)
    }
}

const _: () = {
    const fn is_stream<T: AsyncBufRead + AsyncWrite + Send + Sync + Unpin + 'static>() {}
    is_stream::<FuturesStream>();
};
