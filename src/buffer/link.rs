//! A queue of bytes in memory: written at one end, read at the other.

#![forbid(unsafe_code)]

use std::fmt;
use std::io::{self, BufRead, Read, Write};

use super::block::{ReservedBuf, Slice};
use super::chain::Chain;
use super::frames::{Frames, Source};
use super::pool::Pool;
use super::staging::Staging;
use super::{Reader, Writer};
use crate::error::{Error, Result};

/// A byte queue of linked memory blocks.
///
/// Written bytes become readable with the next flush. Bytes are copied only where a method says so:
/// reading, writing and moving them into another buffer work by reference. The methods are those of
/// [`Reader`] and [`Writer`]. The buffer also implements [`Read`], [`BufRead`] and [`Write`].
///
/// ```
/// use ringpoll::buffer::{LinkBuffer, Reader, Writer};
///
/// let mut buffer = LinkBuffer::new();
/// buffer.reserve(4)?.copy_from_slice(&5_u32.to_be_bytes());
/// buffer.write("hello")?;
/// buffer.flush()?;
/// assert_eq!(buffer.skip(4)?, ());
/// assert_eq!(buffer.next(5)?, "hello");
/// # Ok::<(), ringpoll::Error>(())
/// ```
#[derive(Default)]
pub struct LinkBuffer {
    readable: Chain,
    staging: Staging,
    /// The pool of new blocks; `None` is the one that the process shares.
    pool: Option<Pool>,
}

impl LinkBuffer {
    /// An empty buffer. Allocates nothing.
    pub fn new() -> LinkBuffer {
        LinkBuffer::default()
    }

    /// An empty buffer with blocks of about `block_bytes`: rounded up to a power of two, and 1/32
    /// of that more, or as large as a single write needs. With tiny blocks, tests can cover bytes
    /// that span blocks. Other code uses [`new`](Self::new).
    pub fn with_block_bytes(block_bytes: usize) -> LinkBuffer {
        LinkBuffer::with_pool(Pool::with_block_bytes(block_bytes))
    }

    /// An empty buffer that allocates from `pool`.
    pub(crate) fn with_pool(pool: Pool) -> LinkBuffer {
        LinkBuffer { pool: Some(pool), ..LinkBuffer::default() }
    }

    /// A buffer in which `chain` is readable.
    pub(crate) fn from_chain(chain: Chain) -> LinkBuffer {
        LinkBuffer { readable: chain, ..LinkBuffer::default() }
    }

    /// All bytes: first the flushed ones, then the others.
    pub(crate) fn into_chain(mut self) -> Chain {
        self.readable.append(self.staging.sealed());
        self.readable
    }

    /// Takes all bytes: first the flushed ones, then the others.
    pub(crate) fn take(&mut self) -> LinkBuffer {
        let mut bytes = std::mem::take(&mut self.readable);
        bytes.append(self.staging.sealed());
        LinkBuffer::from_chain(bytes)
    }

    /// Drops all but the first `bytes`, counted over the flushed and the other ones.
    pub(crate) fn truncate(&mut self, bytes: usize) {
        self.readable.append(self.staging.sealed());
        self.readable.truncate(bytes);
    }

    /// The readable frames, one after the other, each of at most `bytes_max`. `length_of` tells the
    /// length of the first frame in a slice; see [`Frames`].
    pub fn frames<F>(&mut self, bytes_max: usize, length_of: F) -> Frames<'_, LinkBuffer, F>
    where
        F: FnMut(&[u8]) -> Result<Option<usize>>,
    {
        Frames::new(self, bytes_max, length_of)
    }

    /// The readable bytes, in order, as the pieces that are stored.
    pub fn slices(&self) -> impl Iterator<Item = &Slice> {
        self.readable.slices()
    }
}

impl Reader for LinkBuffer {
    #[inline]
    fn next(&mut self, bytes: usize) -> Result<Slice> {
        let len = self.readable.len();
        let pool = pool_of(&self.pool);
        self.readable.next(bytes, pool).ok_or_else(|| Error::eof("next", bytes, len))
    }

    #[inline]
    fn peek(&mut self, bytes: usize) -> Result<Slice> {
        let len = self.readable.len();
        let pool = pool_of(&self.pool);
        self.readable.peek(bytes, pool).ok_or_else(|| Error::eof("peek", bytes, len))
    }

    #[inline]
    fn skip(&mut self, bytes: usize) -> Result<()> {
        let len = self.readable.len();
        if self.readable.skip(bytes) { Ok(()) } else { Err(Error::eof("skip", bytes, len)) }
    }

    /// Without a `delimiter` the bytes stay, because later flushes may add more.
    fn until(&mut self, delimiter: u8) -> Result<Slice> {
        match self.readable.find(delimiter, 0) {
            Some(index) => Reader::next(self, index + 1),
            None => Err(Error::eof("until", self.readable.len() + 1, self.readable.len())),
        }
    }

    #[inline]
    fn read(&mut self, into: &mut [u8]) -> Result<usize> {
        Ok(self.readable.read_into(into))
    }

    fn slice(&mut self, bytes: usize) -> Result<LinkBuffer> {
        match self.readable.split(bytes) {
            Some(readable) => {
                Ok(LinkBuffer { readable, pool: self.pool.clone(), ..LinkBuffer::new() })
            }
            None => Err(Error::eof("slice", bytes, self.readable.len())),
        }
    }

    #[inline]
    fn len(&self) -> usize {
        self.readable.len()
    }
}

impl Source for LinkBuffer {
    #[inline]
    fn front(&self) -> &[u8] {
        self.readable.front_slice()
    }

    #[inline]
    fn join(&mut self, bytes_min: usize, bytes_max: usize) -> bool {
        let bytes = bytes_max.min(self.readable.len());
        bytes >= bytes_min && self.readable.join(bytes, pool_of(&self.pool))
    }

    #[inline]
    fn consume(&mut self, bytes: usize) {
        self.readable.advance(bytes);
    }
}

impl Writer for LinkBuffer {
    #[inline]
    fn reserve(&mut self, bytes: usize) -> Result<&mut [u8]> {
        Ok(self.staging.reserve(bytes, pool_of(&self.pool)))
    }

    #[inline]
    fn reserve_buf(&mut self, bytes: usize) -> Result<ReservedBuf<'_>> {
        Ok(self.staging.reserve_buf(bytes, pool_of(&self.pool)))
    }

    #[inline]
    fn commit(&mut self, bytes: usize) -> Result<()> {
        self.staging.commit(bytes)
    }

    #[inline]
    fn write(&mut self, data: impl Into<Slice>) -> Result<()> {
        self.staging.write(data.into(), pool_of(&self.pool));
        Ok(())
    }

    #[inline]
    fn write_copy(&mut self, data: &[u8]) -> Result<()> {
        self.staging.write_copy(data, pool_of(&self.pool));
        Ok(())
    }

    fn insert(&mut self, data: impl Into<Slice>, remaining: usize) -> Result<()> {
        self.staging.insert(data.into(), remaining)
    }

    fn append(&mut self, other: LinkBuffer) -> Result<()> {
        self.staging.append(&mut other.into_chain());
        Ok(())
    }

    #[inline]
    fn flush(&mut self) -> Result<()> {
        self.readable.append(self.staging.sealed());
        Ok(())
    }

    #[inline]
    fn pending_len(&self) -> usize {
        self.staging.len()
    }
}

impl Read for LinkBuffer {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        Ok(self.readable.read_into(into))
    }
}

impl BufRead for LinkBuffer {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        Ok(self.readable.front_slice())
    }

    fn consume(&mut self, bytes: usize) {
        self.readable.advance(bytes);
    }
}

impl Write for LinkBuffer {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.staging.write_copy(data, pool_of(&self.pool));
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(Writer::flush(self)?)
    }
}

impl fmt::Debug for LinkBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LinkBuffer")
            .field("len", &self.readable.len())
            .field("pending_len", &self.staging.len())
            .finish_non_exhaustive()
    }
}

/// The pool to allocate from. It borrows the field only, so the chains can be borrowed mutably.
#[inline]
fn pool_of(pool: &Option<Pool>) -> &Pool {
    pool.as_ref().unwrap_or_else(|| Pool::shared())
}
