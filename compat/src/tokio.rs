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
///   connection and handed over without waiting when [`OUTPUT_BYTES_MAX`](Self::OUTPUT_BYTES_MAX)
///   have come together, by a flush, or by a read that has to wait: so nobody waits for the answer
///   to a question that was never sent. The owned halves know nothing of each other: there it takes
///   a flush. While `output_bytes_max` bytes are on their way to the peer, writes wait.
/// * **Flushing** waits until the kernel has every byte; **shutting down** does that, then ends
///   this side of the stream. Reading goes on.
/// * **Timeouts and deadlines** of the connection hold for each wait and come as
///   [`io::ErrorKind::TimedOut`]; what has arrived by then is kept. A wait goes on when the future
///   that polled it is dropped, and ends when bytes come. hyper reads while its service computes,
///   to notice a client that leaves: a read or idle timeout bounds that as well.
/// * **Cancelling** a read takes no bytes; a write that was not ready has taken none.
/// * **Dropping** the stream closes the connection, or gives it back to its server. Output that was
///   not handed over is lost with the former, and waits for the next handler's flush in the latter.
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
pub struct TokioStream(Connection);

/// The reading half of a [`TokioStream`].
#[derive(Debug)]
pub struct TokioReadHalf(ReadHalf);

/// The writing half of a [`TokioStream`]. Dropping it does not end this side of the stream;
/// shutting it down does.
#[derive(Debug)]
pub struct TokioWriteHalf(WriteHalf);

impl TokioStream {
    /// Output that writes gather before it is handed over without a flush, in bytes.
    pub const OUTPUT_BYTES_MAX: usize = 64 * 1024;

    /// Parts reading from writing, for two tasks. The connection closes, or goes back to its
    /// server, when both halves are dropped.
    pub fn into_split(self) -> (TokioReadHalf, TokioWriteHalf) {
        let (reader, writer) = self.0.split();
        (TokioReadHalf(reader), TokioWriteHalf(writer))
    }

    /// Waits for input, for which the peer may need what was written.
    fn poll_input(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let polled = self.0.poll_readable(cx);
        if polled.is_pending() && self.0.pending_len() > 0 {
            // What keeps it from leaving is told by the next write or flush, whose business it is.
            let _ = self.0.submit();
        }
        polled.map_err(io::Error::from)
    }
}

impl TokioReadHalf {
    fn poll_input(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        self.0.poll_readable(cx).map_err(io::Error::from)
    }
}

macro_rules! impl_wrapper {
    ($type:ident of $inner:ident) => {
        impl $type {
            /// Wraps it; input that it has already buffered comes first.
            pub fn new(inner: $inner) -> $type {
                $type(inner)
            }

            /// What is wrapped, for timeouts and counters.
            pub fn get_ref(&self) -> &$inner {
                &self.0
            }

            /// What is wrapped. Reads and writes there and here are one stream.
            pub fn get_mut(&mut self) -> &mut $inner {
                &mut self.0
            }

            /// What is wrapped, with all that is unread, and all that is written and not flushed.
            pub fn into_inner(self) -> $inner {
                self.0
            }
        }

        impl From<$inner> for $type {
            fn from(inner: $inner) -> $type {
                $type::new(inner)
            }
        }
    };
}

impl_wrapper!(TokioStream of Connection);
impl_wrapper!(TokioReadHalf of ReadHalf);
impl_wrapper!(TokioWriteHalf of WriteHalf);

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
