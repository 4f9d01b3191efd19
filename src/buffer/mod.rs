//! Buffers whose bytes move by reference.
//!
//! [`Slice`] is an immutable, reference-counted view of bytes. [`LinkBuffer`] is a queue of slices:
//! it is written at one end and read at the other. [`Reader`] and [`Writer`] are the methods of
//! every synchronous byte stream of this crate. [`IoReader`], [`IoWriter`], [`AsRead`] and
//! [`AsWrite`] adapt from and to [`std::io`].
//!
//! This module knows neither descriptors nor threads. Any thread may use a slice. Every other type
//! is used by one thread at a time, which the borrow checker enforces.

#![deny(unsafe_code)]

mod adapter;
#[allow(unsafe_code)]
mod block;
mod chain;
mod frames;
mod large;
mod link;
mod memory;
mod pool;
mod slice;
mod staging;

use crate::error::{Error, Result};

pub use adapter::{AsRead, AsWrite, IoReader, IoWriter};
pub(crate) use block::Block;
pub use block::{ReservedBuf, Slice};
pub(crate) use chain::{Chain, Spent};
pub(crate) use frames::{Found, Source};
pub use frames::{Frames, u32_be_length};
pub use link::LinkBuffer;
pub(crate) use pool::Pool;
pub(crate) use staging::Staging;

/// The smallest buffer that an [`IoReader`] passes to its source, in bytes.
const READ_BYTES_MIN: usize = 4096;

/// The largest number of pieces that an [`IoWriter`] passes to its sink in one call.
const WRITE_SLICES_MAX: usize = 64;

/// Reads bytes in order.
///
/// These types implement it: [`LinkBuffer`], [`IoReader`] and
/// [`blocking::Connection`](crate::blocking::Connection). The async [`Connection`] and
/// [`ReadHalf`] have the same methods with the same meaning, as `async fn`s (but for `len` and
/// `is_empty`, which never wait), so they do not implement the trait.
///
/// Lengths are in bytes. A length of zero does nothing and succeeds. After an error the bytes stay
/// unread, except where a method says otherwise.
///
/// [`Connection`]: crate::Connection
/// [`ReadHalf`]: crate::ReadHalf
pub trait Reader {
    /// Removes the next `bytes`. Copies them only if they lie in several blocks.
    ///
    /// # Errors
    /// [`is_eof`](Error::is_eof) if fewer are left; any error of the source.
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

    /// Removes everything up to and including the first `delimiter`.
    ///
    /// # Errors
    /// [`is_eof`](Error::is_eof) if there is none. At the end of a stream, the remaining bytes are
    /// removed and are in [`Error::partial`]. A [`LinkBuffer`] keeps them: it may get more.
    fn until(&mut self, delimiter: u8) -> Result<Slice>;

    /// Moves up to `into.len()` bytes into `into`. Returns how many; 0 only at the end of the
    /// stream, or if `into` is empty.
    ///
    /// # Errors
    /// Any error of the source.
    fn read(&mut self, into: &mut [u8]) -> Result<usize>;

    /// Removes the next `bytes` as a buffer. Never copies.
    ///
    /// # Errors
    /// As for [`next`](Self::next).
    fn slice(&mut self, bytes: usize) -> Result<LinkBuffer>;

    /// How many bytes can be read without waiting.
    fn len(&self) -> usize;

    /// Whether no byte can be read without waiting.
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
    /// As for [`next`](Self::next); [`is_invalid`](Error::is_invalid) if the bytes are not UTF-8.
    /// Such bytes are removed, so the next read begins behind them.
    fn read_string(&mut self, bytes: usize) -> Result<String> {
        String::from_utf8(self.read_to_vec(bytes)?)
            .map_err(|error| Error::invalid(format!("read_string: {error}")))
    }

    /// Removes `bytes` as a vector.
    ///
    /// # Errors
    /// As for [`next`](Self::next).
    fn read_to_vec(&mut self, bytes: usize) -> Result<Vec<u8>> {
        Ok(self.next(bytes)?.to_vec())
    }
}

/// Writes bytes in order. They become visible at the other end with [`flush`](Self::flush).
///
/// These types implement it: [`LinkBuffer`], [`IoWriter`] and
/// [`blocking::Connection`](crate::blocking::Connection). The async [`Connection`] and
/// [`WriteHalf`] have the same methods with the same meaning, but their `flush` is `async`, so they
/// do not implement the trait.
///
/// Lengths are in bytes. A length of zero does nothing and succeeds.
///
/// [`Connection`]: crate::Connection
/// [`WriteHalf`]: crate::WriteHalf
pub trait Writer {
    /// Adds `bytes` zeroes and returns them. The caller fills them.
    ///
    /// # Errors
    /// Any error of the sink.
    fn reserve(&mut self, bytes: usize) -> Result<&mut [u8]>;

    /// Returns room for `bytes`, to be filled with the methods of [`BufMut`](bytes::BufMut). Unlike
    /// [`reserve`](Self::reserve), this writes no zeroes: only the bytes that are put into the room
    /// are added. Earlier reserved bytes can no longer be dropped by a commit.
    ///
    /// # Errors
    /// Any error of the sink.
    fn reserve_buf(&mut self, bytes: usize) -> Result<ReservedBuf<'_>>;

    /// Keeps only the first `bytes` of those that were reserved since the last commit, flush or
    /// other write. [Inserted](Self::insert) bytes count as reserved.
    ///
    /// # Errors
    /// [`is_invalid`](Error::is_invalid) if fewer bytes are reserved; nothing changes then.
    fn commit(&mut self, bytes: usize) -> Result<()>;

    /// Adds `data`: a copy of up to 4096 bytes, a reference to more.
    ///
    /// # Errors
    /// Any error of the sink.
    fn write(&mut self, data: impl Into<Slice>) -> Result<()>;

    /// Adds a copy of `data`.
    ///
    /// # Errors
    /// Any error of the sink.
    fn write_copy(&mut self, data: &[u8]) -> Result<()>;

    /// Inserts `data` before the last `remaining` reserved bytes, by reference. The caller fills
    /// the reservation before this call. If `remaining` is 0, this adds `data` at the end.
    ///
    /// # Errors
    /// [`is_invalid`](Error::is_invalid) if fewer bytes are reserved; nothing changes then.
    fn insert(&mut self, data: impl Into<Slice>, remaining: usize) -> Result<()>;

    /// Moves all bytes of `other` to the end: first its flushed ones, then the others. Copies
    /// nothing but the shortest pieces.
    ///
    /// # Errors
    /// Any error of the sink.
    fn append(&mut self, other: LinkBuffer) -> Result<()>;

    /// Makes all written bytes visible at the other end. A connection has passed them to the kernel
    /// when this returns.
    ///
    /// # Errors
    /// Any error of the sink.
    fn flush(&mut self) -> Result<()>;

    /// How many bytes are written and not flushed.
    fn pending_len(&self) -> usize;
}

#[cfg(all(test, loom))]
mod loom_tests;
#[cfg(all(test, not(loom)))]
mod tests;
