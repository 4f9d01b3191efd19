//! A connection as a tokio stream.
//!
//! [`TokioStream`] and its owned halves are [`AsyncRead`], [`AsyncBufRead`] and [`AsyncWrite`] on
//! [`ringpoll::Connection`] and its halves. They own nothing besides: input is shown where it was
//! received, output is staged in the connection, so a connection that is taken back is complete.
//! Their methods run on whichever task polls them, on any executor.

mod traits;

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use ringpoll::{Connection, ReadHalf, WriteHalf};
use tokio::io::{AsyncBufRead, AsyncRead, AsyncWrite, ReadBuf};
use tokio::task::coop;

use traits::{impl_async_read, impl_async_write};

/// A connection as tokio's [`AsyncRead`], [`AsyncBufRead`] and [`AsyncWrite`].
///
/// For code that is written against these traits: codecs, hyper through `hyper_util::rt::TokioIo`,
/// `tokio::io::copy` and its kin. It works in handlers wherever they are placed, and on dialled
/// connections; what else that code needs of tokio, its timers for example, needs a runtime's
/// context, see `ringpoll::ServerBuilder::tokio`.
///
/// * **Reading** returns `Ok(0)` at the end of the peer's stream. `fill_buf` shows the received
///   bytes where they lie.
/// * **Writing** takes all pieces of a vectored write in one go. Bytes are gathered in the
///   connection and handed over without waiting when
///   [`GATHERED_BYTES_MAX`](Self::GATHERED_BYTES_MAX) have come together, by a flush, or by a read
///   that has to wait: so nobody waits for the answer to a question that was never sent. The owned
///   halves know nothing of each other: there it takes a flush.
/// * **A bound on output** makes writes wait while [`OUTPUT_BYTES_MAX`](Self::OUTPUT_BYTES_MAX)
///   bytes of this stream, gathered or handed over, are not in the kernel. That is what a peer
///   that does not read costs; [`with_output_bytes_max`](Self::with_output_bytes_max) moves it. A
///   write takes no more than there is room for.
/// * **Flushing** hands over the gathered bytes, and the poller sends them; a flush does not wait
///   for the kernel. It waits only while more than the bound is unsent (after writes through
///   `get_mut`, or a lowered bound) or while the connection's own bound is reached. **Shutting
///   down** waits until the kernel has every byte, then ends this side of the stream; reading stays
///   possible. Only a shutdown confirms that the kernel has every byte.
/// * **Errors** of bytes that were handed over come with the next write, flush or shutdown.
/// * **Timeouts and deadlines** of the connection hold for each wait and come as
///   [`io::ErrorKind::TimedOut`]: the write timeout for writes at the bound and for a shutdown.
///   What has arrived by then is kept. A wait goes on when the future
///   that polled it is dropped, and ends when bytes come. hyper reads while its service computes,
///   to notice a client that leaves: a read or idle timeout bounds that as well.
/// * **Cancelling** a read takes no bytes; a write that was not ready has taken none.
/// * **Dropping** the stream closes the connection, or gives it back to its server. Output that was
///   not handed over is lost with the former, and waits for the next handler's flush in the latter.
///   Output that was handed over is on its way in either case; only a shutdown says that it left.
/// * **A server's shutdown** waits for handlers that run, also for one that waits for the next
///   request on a kept connection, until its deadline.
///
/// ```
/// use ringpoll::Server;
/// use ringpoll_compat::TokioStream;
/// use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt};
///
/// #[tokio::main]
/// async fn main() -> ringpoll::Result<()> {
///     let server = Server::builder()
///         .on_request(|conn| async move {
///             let mut stream = TokioStream::from(conn);
///             let mut line = String::new();
///             stream.read_line(&mut line).await?;
///             stream.write_all(line.to_uppercase().as_bytes()).await?;
///             Ok(stream.flush().await?)
///         })
///         .bind("127.0.0.1:0")?
///         .spawn()?;
///
///     let conn = ringpoll::connect(&server.local_addr().to_string()).await?;
///     let mut stream = TokioStream::from(conn);
///     stream.write_all(b"hello\n").await?;
///     let mut answer = [0; 6];
///     stream.read_exact(&mut answer).await?;
///     assert_eq!(&answer, b"HELLO\n");
///     Ok(())
/// }
/// ```
///
/// An HTTP server, one handler for all requests of a connection:
///
/// ```no_run
/// use hyper::{Error, Response, server::conn::http1, service::service_fn};
/// use hyper_util::rt::TokioIo;
/// use ringpoll::Server;
/// use ringpoll_compat::TokioStream;
///
/// # fn main() -> ringpoll::Result<()> {
/// Server::builder()
///     .on_connect(|conn| async move {
///         let stream = TokioIo::new(TokioStream::from(conn));
///         let greet = |_| async { Ok::<_, Error>(Response::new("hello".to_string())) };
///         let served = http1::Builder::new().serve_connection(stream, service_fn(greet)).await;
///         served.map_err(ringpoll::Error::other)
///     })
///     .bind("127.0.0.1:8972")?
///     .serve()
/// # }
/// ```
#[derive(Debug)]
pub struct TokioStream {
    inner: Connection,
    /// The most that may wait for the peer, gathered or handed over.
    output_bytes_max: usize,
}

/// The reading half of a [`TokioStream`].
#[derive(Debug)]
pub struct TokioReadHalf {
    inner: ReadHalf,
}

/// The writing half of a [`TokioStream`]. Dropping it does not end this side of the stream;
/// shutting it down does.
#[derive(Debug)]
pub struct TokioWriteHalf {
    inner: WriteHalf,
    /// As for the stream.
    output_bytes_max: usize,
}

impl TokioStream {
    /// Output that writes gather before it is handed over without a flush, in bytes.
    pub const GATHERED_BYTES_MAX: usize = 64 * 1024;

    /// The most output that waits for the peer, in bytes, unless
    /// [`with_output_bytes_max`](Self::with_output_bytes_max) says otherwise: four times what is
    /// handed over at once, so that the kernel has more to take while writes gather.
    pub const OUTPUT_BYTES_MAX: usize = 4 * Self::GATHERED_BYTES_MAX;

    /// Wraps it; input that it has already buffered comes first.
    pub fn new(inner: Connection) -> TokioStream {
        TokioStream { inner, output_bytes_max: Self::OUTPUT_BYTES_MAX }
    }

    /// Parts reading from writing, for two tasks. The connection closes, or goes back to its
    /// server, when both halves are dropped. The bound on output goes with the writing half.
    pub fn into_split(self) -> (TokioReadHalf, TokioWriteHalf) {
        let TokioStream { inner, output_bytes_max } = self;
        let (inner, writer) = inner.split();
        (TokioReadHalf { inner }, TokioWriteHalf { inner: writer, output_bytes_max })
    }

    /// Waits for input, for which the peer may need what was written.
    fn poll_input(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let polled = self.inner.poll_readable(cx);
        if polled.is_pending() && self.inner.pending_len() > 0 {
            // What keeps it from leaving is told by the next write or flush, whose business it is.
            let _ = self.inner.submit();
        }
        polled.map_err(io::Error::from)
    }
}

impl TokioReadHalf {
    /// Wraps it; input that it has already buffered comes first.
    pub fn new(inner: ReadHalf) -> TokioReadHalf {
        TokioReadHalf { inner }
    }

    fn poll_input(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        self.inner.poll_readable(cx).map_err(io::Error::from)
    }
}

impl TokioWriteHalf {
    /// Wraps it, with a bound on output of
    /// [`OUTPUT_BYTES_MAX`](TokioStream::OUTPUT_BYTES_MAX).
    pub fn new(inner: WriteHalf) -> TokioWriteHalf {
        TokioWriteHalf { inner, output_bytes_max: TokioStream::OUTPUT_BYTES_MAX }
    }
}

macro_rules! impl_wrapper {
    ($type:ident of $inner:ident) => {
        impl $type {
            /// What is wrapped, for timeouts and counters.
            pub fn get_ref(&self) -> &$inner {
                &self.inner
            }

            /// What is wrapped. Reads and writes there and here are one stream.
            pub fn get_mut(&mut self) -> &mut $inner {
                &mut self.inner
            }

            /// What is wrapped, with all that is unread, and all that is written and not flushed.
            pub fn into_inner(self) -> $inner {
                self.inner
            }
        }

        impl From<$inner> for $type {
            fn from(inner: $inner) -> $type {
                $type::new(inner)
            }
        }
    };
}

macro_rules! impl_output_bound {
    ($type:ident) => {
        impl $type {
            /// Makes writes wait while `bytes` bytes, gathered or handed over, are not in the
            /// kernel, in place of [`OUTPUT_BYTES_MAX`](TokioStream::OUTPUT_BYTES_MAX), which are
            /// 256 KiB. 0 leaves the bound to the connection.
            ///
            /// The connection's own `output_bytes_max` holds in any case, so a larger bound comes
            /// to that one.
            #[must_use]
            pub fn with_output_bytes_max(mut self, bytes: usize) -> $type {
                self.output_bytes_max = if bytes == 0 { usize::MAX } else { bytes };
                self
            }
        }
    };
}

impl_wrapper!(TokioStream of Connection);
impl_wrapper!(TokioReadHalf of ReadHalf);
impl_wrapper!(TokioWriteHalf of WriteHalf);
impl_output_bound!(TokioStream);
impl_output_bound!(TokioWriteHalf);

impl_async_read!(TokioStream);
impl_async_read!(TokioReadHalf);
impl_async_write!(TokioStream);
impl_async_write!(TokioWriteHalf);

const _: () = {
    const fn reads<T: AsyncRead + AsyncBufRead + Send + Sync + Unpin + 'static>() {}
    const fn writes<T: AsyncWrite + Send + Sync + Unpin + 'static>() {}
    reads::<TokioStream>();
    reads::<TokioReadHalf>();
    writes::<TokioStream>();
    writes::<TokioWriteHalf>();
};
