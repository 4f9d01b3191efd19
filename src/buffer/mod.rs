//! Memory that moves without being copied.
//!
//! [`Slice`] is an immutable, ref-counted view of bytes; [`LinkBuffer`] is a queue of them that is
//! written at one end and read at the other. [`Reader`] and [`Writer`] are what every byte stream
//! of this crate offers; [`IoReader`], [`IoWriter`], [`AsRead`] and [`AsWrite`] connect them with
//! [`std::io`].
//!
//! Nothing here knows a file descriptor or a thread. A slice goes to any thread; everything else is
//! used by one thread at a time, which the borrow checker sees to.

#![deny(unsafe_code)]

mod adapter;
#[allow(unsafe_code)]
mod block;
mod chain;
mod link;
mod pool;
mod slice;
mod staging;

use crate::error::{Error, Result};

pub use adapter::{AsRead, AsWrite, IoReader, IoWriter};
pub(crate) use block::Block;
pub use block::Slice;
pub(crate) use chain::{Chain, Spent};
pub use link::LinkBuffer;
pub(crate) use pool::Pool;
pub(crate) use staging::Staging;

/// What an [`IoReader`] asks its source for at least.
const READ_BYTES_MIN: usize = 4096;

/// Pieces that an [`IoWriter`] passes to its sink at once.
const WRITE_SLICES_MAX: usize = 64;

/// Reads bytes in order.
///
/// Lengths are in bytes. A length of zero does nothing and succeeds. An error leaves the bytes that
/// are there unread, unless a method says otherwise.
pub trait Reader {
    /// Removes the next `bytes`. Copies only when they lie in several blocks.
    ///
    /// # Errors
    /// [`is_eof`](Error::is_eof) when fewer are left; whatever the source reports.
    fn next(&mut self, bytes: usize) -> Result<Slice>;

    /// Like [`next`](Self::next), but the bytes stay.
    ///
    /// # Errors
    /// As for [`next`](Self::next).
    fn peek(&mut self, bytes: usize) -> Result<Slice>;

    /// Drops the next `bytes`.
    ///
    /// # Errors
    /// As for [`next`](Self::next).
    fn skip(&mut self, bytes: usize) -> Result<()>;

    /// Removes everything up to and with the first `delimiter`.
    ///
    /// # Errors
    /// [`is_eof`](Error::is_eof) when there is none. Where more bytes can never come, those left
    /// are removed and are in [`Error::partial`].
    fn until(&mut self, delimiter: u8) -> Result<Slice>;

    /// Moves up to `into.len()` bytes into `into` and returns how many; 0 only at the end, or for
    /// an empty `into`.
    ///
    /// # Errors
    /// Whatever the source reports.
    fn read(&mut self, into: &mut [u8]) -> Result<usize>;

    /// Removes the next `bytes` as a buffer of their own. Never copies.
    ///
    /// # Errors
    /// As for [`next`](Self::next).
    fn slice(&mut self, bytes: usize) -> Result<LinkBuffer>;

    /// How many bytes are there without waiting.
    fn len(&self) -> usize;

    /// Whether no byte is there without waiting.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Fills `into`.
    ///
    /// # Errors
    /// As for [`next`](Self::next).
    fn read_exact(&mut self, into: &mut [u8]) -> Result<()> {
        into.copy_from_slice(&self.next(into.len())?);
        Ok(())
    }

    /// Removes one byte.
    ///
    /// # Errors
    /// As for [`next`](Self::next).
    fn read_byte(&mut self) -> Result<u8> {
        Ok(self.next(1)?[0])
    }

    /// Removes `bytes` as a string.
    ///
    /// # Errors
    /// As for [`next`](Self::next); [`is_invalid`](Error::is_invalid) when they are not UTF-8.
    fn read_string(&mut self, bytes: usize) -> Result<String> {
        let string = String::from_utf8(self.peek(bytes)?.to_vec())
            .map_err(|error| Error::invalid(format!("read string of {bytes} bytes: {error}")))?;
        self.skip(bytes)?;
        Ok(string)
    }

    /// Removes `bytes` as a vector.
    ///
    /// # Errors
    /// As for [`next`](Self::next).
    fn read_to_vec(&mut self, bytes: usize) -> Result<Vec<u8>> {
        Ok(self.next(bytes)?.to_vec())
    }
}

/// Writes bytes in order. Nothing is visible at the other end before [`flush`](Self::flush).
///
/// Lengths are in bytes. A length of zero does nothing and succeeds.
pub trait Writer {
    /// Adds `bytes` zeroes and returns them to be filled.
    ///
    /// # Errors
    /// Whatever the sink reports.
    fn reserve(&mut self, bytes: usize) -> Result<&mut [u8]>;

    /// Keeps only the first `bytes` of what was reserved since the last commit, flush or other
    /// write. What was [inserted](Self::insert) there counts.
    ///
    /// # Errors
    /// [`is_invalid`](Error::is_invalid), and nothing changed, when less was reserved.
    fn commit(&mut self, bytes: usize) -> Result<()>;

    /// Adds `data`: a copy of up to 4096 bytes, a reference to more.
    ///
    /// # Errors
    /// Whatever the sink reports.
    fn write(&mut self, data: impl Into<Slice>) -> Result<()>;

    /// Adds a copy of `data`.
    ///
    /// # Errors
    /// Whatever the sink reports.
    fn write_copy(&mut self, data: &[u8]) -> Result<()>;

    /// Puts `data` inside what was reserved, `remaining` bytes before its end, without copying. The
    /// bytes after it must have been filled before. With nothing remaining this adds `data` at the
    /// end.
    ///
    /// # Errors
    /// [`is_invalid`](Error::is_invalid), and nothing changed, when less was reserved.
    fn insert(&mut self, data: impl Into<Slice>, remaining: usize) -> Result<()>;

    /// Adds everything in `other`, first what is flushed there and then what is not, without
    /// copying.
    ///
    /// # Errors
    /// Whatever the sink reports.
    fn append(&mut self, other: LinkBuffer) -> Result<()>;

    /// Makes everything written visible at the other end.
    ///
    /// # Errors
    /// Whatever the sink reports.
    fn flush(&mut self) -> Result<()>;

    /// How many bytes are written and not flushed.
    fn pending_len(&self) -> usize;
}

#[cfg(all(test, loom))]
mod loom_tests;
#[cfg(all(test, not(loom)))]
mod tests;
