//! A connection as a tokio stream.
//!
//! [`TokioStream`] and its owned halves implement [`AsyncRead`], [`AsyncBufRead`] and
//! [`AsyncWrite`] for [`ringpoll::Connection`] and its halves. They have no buffers of their own:
//! input is read from the received blocks, and output is sent at once or stored in the connection.
//! Any task on any executor may poll them.

mod traits;

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use ringpoll::{Connection, ReadHalf, WriteHalf};
use tokio::io::{AsyncBufRead, AsyncRead, AsyncWrite, ReadBuf};
use tokio::task::coop;

use crate::gathered::SubmitOnDrop;
use traits::{impl_async_read, impl_async_write};

/// A connection that implements tokio's [`AsyncRead`], [`AsyncBufRead`] and [`AsyncWrite`].
///
/// For code that is written for these traits: codecs, `tokio::io::copy` and others. With the
/// feature `hyper` it implements the I/O traits of hyper as well. It works in handlers in every
/// placement, and on dialled connections. Code that also needs a tokio runtime, for example for
/// timers, works in handlers of a server that was built in a runtime: see
/// `ringpoll::ServerBuilder::tokio`.
///
/// * **Reading** returns `Ok(0)` at the end of the peer's stream. `fill_buf` returns the received
///   bytes without copying.
/// * **Writing** gathers bytes in the connection. They are submitted, without waiting, when
///   [`GATHERED_BYTES_MAX`](Self::GATHERED_BYTES_MAX) are gathered, by a flush, by dropping the
///   stream, or by a read that has to wait: otherwise the peer would not see the request whose
///   answer the read waits for. A read of an owned half does not submit, because the halves are
///   independent; it takes a flush.
/// * **Large writes**, of 32 KiB or more in at most 64 pieces, are not gathered. They wait until
///   the kernel has every earlier byte, then go from the writer's memory to the kernel; at most 16
///   KiB that the kernel does not take are copied.
/// * **A bound on output** makes writes wait while [`OUTPUT_BYTES_MAX`](Self::OUTPUT_BYTES_MAX)
///   bytes of this stream, gathered or submitted, are not in the kernel. It bounds the memory for a
///   peer that does not read. [`with_output_bytes_max`](Self::with_output_bytes_max) changes it.
/// * **Flushing** submits the gathered bytes, which the poller then sends. A flush does not wait
///   for the kernel, with two exceptions: it waits while more bytes than the bound are unsent
///   (after writes through `get_mut`, or a lowered bound), and while the bound of the connection is
///   reached.
/// * **Shutting down** waits until the kernel has every byte, then ends this side of the stream.
///   Reading stays possible. Only a shutdown confirms that the kernel has every byte.
/// * **Errors** of submitted bytes are returned by the next write, flush or shutdown.
/// * **Timeouts and deadlines** of the connection apply to each wait, and are reported as
///   [`io::ErrorKind::TimedOut`]. The write timeout applies to writes at the bound and to a
///   shutdown. Received bytes stay readable. A wait continues when the future that polled it is
///   dropped, and ends when bytes arrive. hyper reads while its service computes, to detect that
///   the client has gone, so a read or idle timeout limits the computation as well.
/// * **Cancelling** a read loses no bytes. A write that was pending has written none.
/// * **Dropping** the stream, or its writing half, submits the gathered bytes. Then the connection
///   closes, or returns to its server. Submitted bytes are sent in both cases; only a shutdown
///   confirms it.
/// * **A shutdown of the server** waits for running handlers until its deadline. That includes a
///   handler that waits for the next request on a kept connection.
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
///         // With the feature `hyper`, hyper takes the stream without `TokioIo`.
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
    inner: SubmitOnDrop<Connection>,
    /// The largest number of bytes, gathered or submitted, that are not in the kernel.
    output_bytes_max: usize,
}

/// The reading half of a [`TokioStream`].
#[derive(Debug)]
pub struct TokioReadHalf {
    inner: ReadHalf,
}

/// The writing half of a [`TokioStream`]. Shutting it down ends this side of the stream; dropping
/// it does not.
#[derive(Debug)]
pub struct TokioWriteHalf {
    inner: SubmitOnDrop<WriteHalf>,
    /// As for [`TokioStream`].
    output_bytes_max: usize,
}

impl TokioStream {
    /// The number of gathered bytes that are submitted without a flush.
    pub const GATHERED_BYTES_MAX: usize = 64 * 1024;

    /// The default bound on output in bytes, see
    /// [`with_output_bytes_max`](Self::with_output_bytes_max). It is four times
    /// [`GATHERED_BYTES_MAX`](Self::GATHERED_BYTES_MAX), so the kernel has bytes to send while
    /// writes gather more.
    pub const OUTPUT_BYTES_MAX: usize = 4 * Self::GATHERED_BYTES_MAX;

    /// Wraps a connection. Input that it has already buffered is read first.
    pub fn new(inner: Connection) -> TokioStream {
        let inner = SubmitOnDrop::new(inner);
        TokioStream { inner, output_bytes_max: Self::OUTPUT_BYTES_MAX }
    }

    /// Splits the stream into a reading and a writing half, for two tasks. The connection closes,
    /// or returns to its server, when both halves are dropped. The writing half keeps the bound on
    /// output.
    pub fn into_split(self) -> (TokioReadHalf, TokioWriteHalf) {
        let TokioStream { inner, output_bytes_max } = self;
        let (reader, writer) = inner.into_inner().split();
        let writer = SubmitOnDrop::new(writer);
        (TokioReadHalf { inner: reader }, TokioWriteHalf { inner: writer, output_bytes_max })
    }

    /// Submits the gathered bytes where a read waits, because the peer may wait for them.
    fn note_input(&mut self, waits: bool) {
        if waits && self.inner.pending_len() > 0 {
            // An error of it is returned by the next write or flush.
            let _ = self.inner.submit();
        }
    }
}

impl TokioReadHalf {
    /// Wraps the reading half of a connection. Input that it has already buffered is read first.
    pub fn new(inner: ReadHalf) -> TokioReadHalf {
        TokioReadHalf { inner }
    }

    /// The wrapped half, with all unread bytes.
    pub fn into_inner(self) -> ReadHalf {
        self.inner
    }

    /// A reader without its writer submits nothing.
    fn note_input(&self, _waits: bool) {}
}

impl TokioWriteHalf {
    /// Wraps the writing half of a connection, with a bound on output of
    /// [`OUTPUT_BYTES_MAX`](TokioStream::OUTPUT_BYTES_MAX).
    pub fn new(inner: WriteHalf) -> TokioWriteHalf {
        let inner = SubmitOnDrop::new(inner);
        TokioWriteHalf { inner, output_bytes_max: TokioStream::OUTPUT_BYTES_MAX }
    }
}

macro_rules! impl_wrapper {
    ($type:ident of $inner:ident) => {
        impl $type {
            /// The wrapped value, for timeouts and counters.
            pub fn get_ref(&self) -> &$inner {
                &self.inner
            }

            /// The wrapped value. Reads and writes of it and of this wrapper act on the same
            /// stream.
            pub fn get_mut(&mut self) -> &mut $inner {
                &mut self.inner
            }
        }

        impl From<$inner> for $type {
            fn from(inner: $inner) -> $type {
                $type::new(inner)
            }
        }
    };
}

macro_rules! impl_output {
    ($type:ident of $inner:ident) => {
        impl $type {
            /// The wrapped value, with all unread bytes and all written bytes.
            pub fn into_inner(self) -> $inner {
                self.inner.into_inner()
            }

            /// Makes writes wait while `bytes` bytes, gathered or submitted, are not in the kernel.
            /// The default is [`OUTPUT_BYTES_MAX`](TokioStream::OUTPUT_BYTES_MAX), which is 256
            /// KiB.
            ///
            /// The `output_bytes_max` of the connection applies as well. With 0, it is the only
            /// bound.
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
impl_output!(TokioStream of Connection);
impl_output!(TokioWriteHalf of WriteHalf);

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
