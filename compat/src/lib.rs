//! [`ringpoll`] connections as streams of `std` and of tokio.
//!
//! [`SyncStream`] wraps a [`ringpoll::blocking::Connection`] and implements `std`'s [`Read`],
//! [`BufRead`] and [`Write`]. One thread at a time uses it, and its calls block that thread. On a
//! poller thread they fail with [`io::ErrorKind::Unsupported`].
//!
//! With the feature `tokio`, `TokioStream` wraps a [`ringpoll::Connection`] and implements tokio's
//! `AsyncRead`, `AsyncBufRead` and `AsyncWrite`, for codecs, hyper and other code that takes a
//! tokio stream. It splits into owned halves, `TokioReadHalf` and `TokioWriteHalf`.
//!
//! With the feature `hyper`, `TokioStream` implements hyper's `Read` and `Write` as well.
//! `HyperExecutor` and `HyperTimer` are what hyper's builders take for HTTP/2 and for timeouts.
//! With the feature `hyper-util`, `HyperConnector` connects for the clients of hyper-util.
//!
//! Whole servers on ringpoll: `axum::serve` with the feature `axum`, `tonic::serve` with `tonic`,
//! and TLS for them and for any connection with `rustls`.
//!
//! With the feature `futures`, `FuturesStream` implements the same traits of `futures-io`,
//! `SliceStream` is a stream of received slices, and `ByteSink` is a sink.
//!
//! With the feature `tower`, `tower::serve_tower` serves framed requests with a service, and
//! `tower::FramedClient` is a service over one connection. With the feature `metrics`,
//! `metrics::ServerMetrics` and `metrics::timed` record counts of servers and times of handlers.
//! With the feature `hickory`, `HickoryResolver` looks up the names of a [`ringpoll::Dialer`].

#![forbid(unsafe_code)]

#[cfg(feature = "axum")]
mod accepted;
#[cfg(feature = "axum")]
pub mod axum;
#[cfg(feature = "futures")]
mod futures;
#[cfg(any(feature = "futures", feature = "tokio"))]
mod gathered;
#[cfg(feature = "hickory")]
mod hickory;
#[cfg(feature = "hyper")]
mod hyper;
#[cfg(feature = "axum")]
mod listener;
#[cfg(feature = "metrics")]
pub mod metrics;
#[cfg(feature = "rustls")]
pub mod rustls;
#[cfg(feature = "tokio")]
mod tokio;
#[cfg(feature = "tonic")]
pub mod tonic;
#[cfg(feature = "tower")]
pub mod tower;

use std::fmt;
use std::io::{self, BufRead, Read, Write};

use ringpoll::Slice;
use ringpoll::blocking::Connection;

#[cfg(feature = "futures")]
pub use self::futures::{ByteSink, FuturesStream, SliceStream};
#[cfg(feature = "hickory")]
pub use self::hickory::HickoryResolver;
#[cfg(feature = "hyper-util")]
pub use self::hyper::HyperConnector;
#[cfg(feature = "hyper")]
pub use self::hyper::{HyperExecutor, HyperTimer};
#[cfg(feature = "tokio")]
pub use self::tokio::{TokioReadHalf, TokioStream, TokioWriteHalf};

/// A blocking connection as a `std` stream.
///
/// * `read` returns `Ok(0)` at the end of the peer's stream.
/// * A read or write timeout of the connection is reported as [`io::ErrorKind::TimedOut`]. Received
///   bytes stay readable.
/// * `write` copies into the connection. When [`OUTPUT_BYTES_MAX`](Self::OUTPUT_BYTES_MAX) are
///   pending, the next `write` flushes them first. [`flush`](Write::flush) returns when the kernel
///   has every byte.
/// * Dropping the stream closes the connection. Bytes that were not flushed are lost, as with a
///   ringpoll connection.
///
/// ```no_run
/// use std::io::{BufRead, Write};
///
/// use ringpoll_compat::SyncStream;
///
/// # fn main() -> std::io::Result<()> {
/// let mut stream = SyncStream::new(ringpoll::blocking::connect("127.0.0.1:8972")?);
/// writeln!(stream, "hello")?;
/// stream.flush()?;
/// let mut line = String::new();
/// stream.read_line(&mut line)?;
/// # Ok(())
/// # }
/// ```
pub struct SyncStream {
    connection: Connection,
    /// Bytes that were taken from the connection and not yet read from this stream.
    front: Slice,
}

impl SyncStream {
    /// The largest number of pending bytes, before `write` flushes.
    pub const OUTPUT_BYTES_MAX: usize = 64 * 1024;

    /// The largest number of bytes that `fill_buf` returns.
    pub const FRONT_BYTES_MAX: usize = 64 * 1024;

    /// Wraps a connection. Input that it has already buffered is read first.
    pub fn new(connection: Connection) -> SyncStream {
        SyncStream { connection, front: Slice::default() }
    }

    /// The connection, for timeouts and counters.
    pub fn get_ref(&self) -> &Connection {
        &self.connection
    }

    /// The connection. Reading from it directly skips bytes that [`fill_buf`](BufRead::fill_buf)
    /// has returned.
    pub fn get_mut(&mut self) -> &mut Connection {
        &mut self.connection
    }

    /// The connection, and the bytes that this stream has taken from it and that were not read.
    /// They come before the bytes in the connection.
    pub fn into_parts(self) -> (Connection, Slice) {
        (self.connection, self.front)
    }
}

impl Read for SyncStream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.front.is_empty() {
            return Ok(self.connection.read(buffer)?);
        }
        let count = buffer.len().min(self.front.len());
        buffer[..count].copy_from_slice(&self.front[..count]);
        self.consume(count);
        Ok(count)
    }
}

impl BufRead for SyncStream {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.front.is_empty() {
            let ready = self.connection.readable()?;
            self.front = self.connection.next(ready.min(Self::FRONT_BYTES_MAX))?;
        }
        Ok(&self.front)
    }

    /// # Panics
    /// If `count` is more than [`fill_buf`](BufRead::fill_buf) has returned.
    fn consume(&mut self, count: usize) {
        self.front.advance(count);
        if self.front.is_empty() {
            // An empty slice still keeps its block in memory; a default one does not.
            self.front = Slice::default();
        }
    }
}

impl Write for SyncStream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // Flushes before it accepts bytes: if the flush times out, `bytes` are not written.
        if self.connection.pending_len() >= Self::OUTPUT_BYTES_MAX {
            self.connection.flush()?;
        }
        let count = bytes.len().min(Self::OUTPUT_BYTES_MAX);
        self.connection.write_copy(&bytes[..count])?;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(self.connection.flush()?)
    }
}

impl From<Connection> for SyncStream {
    fn from(connection: Connection) -> SyncStream {
        SyncStream::new(connection)
    }
}

impl fmt::Debug for SyncStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SyncStream")
            .field("peer_addr", &self.connection.peer_addr().to_string())
            .field("front_bytes", &self.front.len())
            .finish_non_exhaustive()
    }
}

/// The programs of the migration guide.
#[cfg(doctest)]
#[doc = include_str!("../../docs/MIGRATING.md")]
mod migrating {}
