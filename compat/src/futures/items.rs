//! The halves of a connection as a [`Stream`] of slices and as a [`Sink`] of bytes.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use futures_core::Stream;
use futures_core::stream::FusedStream;
use futures_sink::Sink;
use ringpoll::{ReadHalf, Result, Slice, WriteHalf};

use super::FuturesStream;

/// The received bytes as a [`Stream`] of [`Slice`]s.
///
/// An item is the bytes that lie in one received block: between one byte and the length of a block.
/// It refers to that block and is not copied. How the peer divided the bytes into writes has no
/// influence.
///
/// The stream ends (`None`) at the end of the peer's stream, and after an error. A read timeout
/// does not end it: the next poll waits anew. Dropping it in the middle of a wait loses no bytes.
/// The connection pauses reception while
/// [`input_watermarks`](ringpoll::ServerBuilder::input_watermarks) are reached, so a slow consumer
/// slows the peer down.
///
/// ```
/// use futures_util::StreamExt;
/// use ringpoll::{Server, blocking};
/// use ringpoll_compat::{ByteSink, SliceStream};
///
/// // Sends everything back, without copying.
/// let server = Server::builder()
///     .on_connect(|conn| async move {
///         let (reader, writer) = conn.split();
///         SliceStream::new(reader).forward(ByteSink::new(writer)).await
///     })
///     .bind("127.0.0.1:0")?
///     .spawn()?;
///
/// let mut conn = blocking::connect(&server.local_addr().to_string())?;
/// conn.write("hello")?;
/// conn.flush()?;
/// assert_eq!(conn.next(5)?, "hello");
/// # Ok::<(), ringpoll::Error>(())
/// ```
#[derive(Debug)]
pub struct SliceStream {
    inner: ReadHalf,
    has_ended: bool,
}

/// A [`Sink`] that sends bytes: `Bytes`, [`Slice`], `Vec<u8>`, and all else that becomes a `Slice`.
///
/// * An item of up to 4096 bytes is copied, a longer one is sent by reference.
/// * `poll_ready` waits while [`OUTPUT_BYTES_MAX`](FuturesStream::OUTPUT_BYTES_MAX) bytes are not
///   in the kernel; [`with_output_bytes_max`](Self::with_output_bytes_max) changes that bound. So
///   the memory for a peer that does not read is the bound and one item.
/// * Items are gathered, and submitted when
///   [`GATHERED_BYTES_MAX`](FuturesStream::GATHERED_BYTES_MAX) bytes are gathered, and by a flush.
///   So `feed` many items, then `flush` once.
/// * A flush waits until the kernel has every byte.
/// * Closing flushes, then ends this side of the stream. Dropping the sink does not.
/// * The write timeout and deadline of the connection bound each wait.
///
/// ```no_run
/// use futures_util::SinkExt;
/// use ringpoll_compat::ByteSink;
///
/// # async fn example(conn: ringpoll::Connection) -> ringpoll::Result<()> {
/// let (_reader, writer) = conn.split();
/// let mut sink = ByteSink::new(writer);
/// for number in 0_u32..1000 {
///     sink.feed(number.to_string().into_bytes()).await?;
/// }
/// SinkExt::<Vec<u8>>::flush(&mut sink).await // every byte is in the kernel
/// # }
/// ```
#[derive(Debug)]
pub struct ByteSink {
    inner: WriteHalf,
    /// The largest number of bytes, gathered or submitted, that are not in the kernel.
    output_bytes_max: usize,
}

impl SliceStream {
    /// A stream of what `inner` receives. Input that it has already buffered comes first.
    pub fn new(inner: ReadHalf) -> SliceStream {
        SliceStream { inner, has_ended: false }
    }

    /// The wrapped half, for timeouts and counters.
    pub fn get_ref(&self) -> &ReadHalf {
        &self.inner
    }

    /// The wrapped half. What it reads is missing from the stream.
    pub fn get_mut(&mut self) -> &mut ReadHalf {
        &mut self.inner
    }

    /// The wrapped half, with all bytes that were not returned.
    pub fn into_inner(self) -> ReadHalf {
        self.inner
    }
}

impl Stream for SliceStream {
    type Item = Result<Slice>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Slice>>> {
        let this = self.get_mut();
        if this.has_ended {
            return Poll::Ready(None);
        }
        match ready!(this.inner.poll_readable(cx)) {
            Ok(0) => {
                this.has_ended = true;
                Poll::Ready(None)
            }
            Ok(_) => {
                let bytes = this.inner.buffered().len();
                Poll::Ready(this.inner.try_next(bytes).map(Ok))
            }
            Err(error) => {
                this.has_ended = !error.is_timeout();
                Poll::Ready(Some(Err(error)))
            }
        }
    }
}

impl FusedStream for SliceStream {
    fn is_terminated(&self) -> bool {
        self.has_ended
    }
}

impl ByteSink {
    /// A sink that sends through `inner`, with a bound on output of
    /// [`OUTPUT_BYTES_MAX`](FuturesStream::OUTPUT_BYTES_MAX).
    pub fn new(inner: WriteHalf) -> ByteSink {
        ByteSink { inner, output_bytes_max: FuturesStream::OUTPUT_BYTES_MAX }
    }

    /// Makes `poll_ready` wait while `bytes` bytes, gathered or submitted, are not in the kernel.
    /// With 0, the `output_bytes_max` of the connection is the only bound.
    #[must_use]
    pub fn with_output_bytes_max(mut self, bytes: usize) -> ByteSink {
        self.output_bytes_max = if bytes == 0 { usize::MAX } else { bytes };
        self
    }

    /// The wrapped half, for timeouts and counters.
    pub fn get_ref(&self) -> &WriteHalf {
        &self.inner
    }

    /// The wrapped half. What it writes goes to the same stream.
    pub fn get_mut(&mut self) -> &mut WriteHalf {
        &mut self.inner
    }

    /// The wrapped half, with all bytes that were not submitted.
    pub fn into_inner(self) -> WriteHalf {
        self.inner
    }
}

impl<T: Into<Slice>> Sink<T> for ByteSink {
    type Error = ringpoll::Error;

    fn poll_ready(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<()>> {
        let this = self.get_mut();
        this.inner.poll_writable_within(cx, this.output_bytes_max).map_ok(|_| ())
    }

    fn start_send(self: Pin<&mut Self>, item: T) -> Result<()> {
        let writer = &mut self.get_mut().inner;
        writer.write(item)?;
        if writer.pending_len() >= FuturesStream::GATHERED_BYTES_MAX {
            writer.submit()?;
        }
        Ok(())
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<()>> {
        self.get_mut().inner.poll_flush(cx)
    }

    fn poll_close(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<()>> {
        self.get_mut().inner.poll_shutdown_write(cx)
    }
}

const _: () = {
    const fn is_stream<T: FusedStream + Send + Sync + Unpin + 'static>() {}
    const fn is_sink<T: Sink<Slice> + Send + Sync + Unpin + 'static>() {}
    is_stream::<SliceStream>();
    is_sink::<ByteSink>();
};
