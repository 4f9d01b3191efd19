//! Bridges from [`ringpoll`] connections to the I/O traits that other code is written against.
//!
//! [`SyncStream`] is a [`ringpoll::blocking::Connection`] as `std`'s [`Read`], [`BufRead`] and
//! [`Write`]. It belongs to one thread at a time and blocks that thread; on a poller thread its
//! calls fail with [`io::ErrorKind::Unsupported`].
//!
//! With the feature `tokio`, `TokioStream` is a [`ringpoll::Connection`] as tokio's `AsyncRead`,
//! `AsyncBufRead` and `AsyncWrite`, for codecs, hyper and whatever else takes a tokio stream. It
//! comes apart into owned halves, `TokioReadHalf` and `TokioWriteHalf`.

#![forbid(unsafe_code)]

#[cfg(feature = "tokio")]
mod tokio;

use std::fmt;
use std::io::{self, BufRead, Read, Write};

use ringpoll::Slice;
use ringpoll::blocking::Connection;

#[cfg(feature = "tokio")]
pub use self::tokio::{TokioReadHalf, TokioStream, TokioWriteHalf};

/// A blocking connection as a `std` stream.
///
/// * `read` returns `Ok(0)` at the end of the peer's stream.
/// * A read or write timeout of the connection is [`io::ErrorKind::TimedOut`]; what had arrived by
///   then is kept.
/// * `write` copies into the connection's output, and hands it to the kernel once
///   [`OUTPUT_BYTES_MAX`](Self::OUTPUT_BYTES_MAX) have gathered. [`flush`](Write::flush) hands over
///   the rest and returns when the kernel has every byte.
/// * Dropping the stream closes the connection; what was not flushed is lost, as with a connection
///   of ringpoll's own.
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
    /// Taken from the connection, not yet from this stream.
    front: Slice,
}

impl SyncStream {
    /// Output that `write` gathers before it flushes by itself, in bytes.
    pub const OUTPUT_BYTES_MAX: usize = 64 * 1024;

    /// Input that `fill_buf` shows at once, in bytes.
    pub const FRONT_BYTES_MAX: usize = 64 * 1024;

    /// Wraps a connection; input that it has already buffered comes first.
    pub fn new(connection: Connection) -> SyncStream {
        SyncStream { connection, front: Slice::default() }
    }

    /// The connection, for timeouts and counters.
    pub fn get_ref(&self) -> &Connection {
        &self.connection
    }

    /// The connection. Reading from it goes past what [`fill_buf`](BufRead::fill_buf) has shown.
    pub fn get_mut(&mut self) -> &mut Connection {
        &mut self.connection
    }

    /// The connection, and the input that this stream has taken from it and not handed on. The
    /// slice comes before everything that is left in the connection.
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
    /// If `count` is more than [`fill_buf`](BufRead::fill_buf) has shown.
    fn consume(&mut self, count: usize) {
        self.front.advance(count);
        if self.front.is_empty() {
            // An empty slice still holds its block; a default one holds nothing.
            self.front = Slice::default();
        }
    }
}

impl Write for SyncStream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // Flushed before anything is taken: after a timeout these bytes are still the caller's.
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
