//! Adapters from and to `std::io`.
//!
//! Used by one thread at a time. A call blocks only while its source or sink blocks.

#![forbid(unsafe_code)]

use std::io::{self, IoSlice, Read, Write};

use super::block::{ReservedBuf, Slice};
use super::chain::Chain;
use super::link::LinkBuffer;
use super::pool::Pool;
use super::staging::Staging;
use super::{READ_BYTES_MIN, Reader, WRITE_SLICES_MAX, Writer};
use crate::error::{Error, Result};

/// A [`Reader`] over any [`Read`].
///
/// It reads ahead: its buffer may hold bytes of the source that no method has returned yet.
#[derive(Debug)]
pub struct IoReader<R> {
    source: R,
    buffered: Chain,
}

impl<R: Read> IoReader<R> {
    /// Reads from `source`.
    pub fn new(source: R) -> IoReader<R> {
        IoReader { source, buffered: Chain::new() }
    }

    /// The source. Direct reads from it skip the buffered bytes.
    pub fn source(&self) -> &R {
        &self.source
    }

    /// The source, and the bytes that were read from it and not consumed.
    pub fn into_inner(self) -> (R, LinkBuffer) {
        (self.source, LinkBuffer::from_chain(self.buffered))
    }

    /// Reads from the source until `bytes` are buffered.
    fn fill(&mut self, operation: &str, bytes: usize) -> Result<()> {
        while self.buffered.len() < bytes {
            if self.fill_once()? == 0 {
                return Err(Error::eof(operation, bytes, self.buffered.len()));
            }
        }
        Ok(())
    }

    /// Reads once from the source. Returns how many bytes were added, 0 at its end.
    fn fill_once(&mut self) -> Result<usize> {
        let spare = self.buffered.spare(READ_BYTES_MIN, Pool::shared());
        loop {
            match self.source.read(spare) {
                Ok(bytes) => {
                    self.buffered.extend(bytes);
                    return Ok(bytes);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Error::io("read", error)),
            }
        }
    }
}

impl<R: Read> Reader for IoReader<R> {
    fn next(&mut self, bytes: usize) -> Result<Slice> {
        self.fill("next", bytes)?;
        let len = self.buffered.len();
        self.buffered.next(bytes, Pool::shared()).ok_or_else(|| Error::eof("next", bytes, len))
    }

    fn peek(&mut self, bytes: usize) -> Result<Slice> {
        self.fill("peek", bytes)?;
        let len = self.buffered.len();
        self.buffered.peek(bytes, Pool::shared()).ok_or_else(|| Error::eof("peek", bytes, len))
    }

    fn skip(&mut self, bytes: usize) -> Result<()> {
        self.fill("skip", bytes)?;
        self.buffered.advance(bytes);
        Ok(())
    }

    fn until(&mut self, delimiter: u8) -> Result<Slice> {
        let mut searched = 0;
        loop {
            if let Some(index) = self.buffered.find(delimiter, searched) {
                return self.next(index + 1);
            }
            searched = self.buffered.len();
            if self.fill_once()? == 0 {
                let partial = self.next(searched)?;
                return Err(
                    Error::eof("until", searched + 1, searched).with_partial(partial.into())
                );
            }
        }
    }

    fn read(&mut self, into: &mut [u8]) -> Result<usize> {
        if self.buffered.is_empty() && !into.is_empty() {
            self.fill_once()?;
        }
        Ok(self.buffered.read_into(into))
    }

    fn slice(&mut self, bytes: usize) -> Result<LinkBuffer> {
        self.fill("slice", bytes)?;
        let len = self.buffered.len();
        let front = self.buffered.split(bytes).ok_or_else(|| Error::eof("slice", bytes, len))?;
        Ok(LinkBuffer::from_chain(front))
    }

    fn len(&self) -> usize {
        self.buffered.len()
    }
}

/// A [`Writer`] over any [`Write`]. Written bytes reach the sink with the next flush.
///
/// Dropping the writer drops the bytes that are not flushed.
#[derive(Debug)]
pub struct IoWriter<W> {
    sink: W,
    staging: Staging,
    /// Flushed bytes that the sink has not accepted; the next flush sends them first.
    unsent: Chain,
}

impl<W: Write> IoWriter<W> {
    /// Writes to `sink`.
    pub fn new(sink: W) -> IoWriter<W> {
        IoWriter { sink, staging: Staging::default(), unsent: Chain::new() }
    }

    /// The sink.
    pub fn sink(&self) -> &W {
        &self.sink
    }

    /// The sink. Bytes written to it directly come before the bytes that are not flushed.
    pub fn sink_mut(&mut self) -> &mut W {
        &mut self.sink
    }

    /// The sink. Drops the bytes that are not flushed.
    pub fn into_inner(self) -> W {
        self.sink
    }
}

impl<W: Write> Writer for IoWriter<W> {
    fn reserve(&mut self, bytes: usize) -> Result<&mut [u8]> {
        Ok(self.staging.reserve(bytes, Pool::shared()))
    }

    fn reserve_buf(&mut self, bytes: usize) -> Result<ReservedBuf<'_>> {
        Ok(self.staging.reserve_buf(bytes, Pool::shared()))
    }

    fn commit(&mut self, bytes: usize) -> Result<()> {
        self.staging.commit(bytes)
    }

    fn write(&mut self, data: impl Into<Slice>) -> Result<()> {
        self.staging.write(data.into(), Pool::shared());
        Ok(())
    }

    fn write_copy(&mut self, data: &[u8]) -> Result<()> {
        self.staging.write_copy(data, Pool::shared());
        Ok(())
    }

    fn insert(&mut self, data: impl Into<Slice>, remaining: usize) -> Result<()> {
        self.staging.insert(data.into(), remaining)
    }

    fn append(&mut self, other: LinkBuffer) -> Result<()> {
        self.staging.append(&mut other.into_chain());
        Ok(())
    }

    /// Writes everything to the sink and flushes the sink. After an error, the next flush continues
    /// with the first byte that the sink has not accepted.
    fn flush(&mut self) -> Result<()> {
        self.unsent.append(self.staging.sealed());
        while !self.unsent.is_empty() {
            let mut iovs = [IoSlice::new(&[]); WRITE_SLICES_MAX];
            let (count, _) = self.unsent.fill_iovs(&mut iovs);
            match self.sink.write_vectored(&iovs[..count]) {
                Ok(0) => return Err(Error::io("write", io::ErrorKind::WriteZero)),
                Ok(bytes) => self.unsent.advance(bytes),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Error::io("write", error)),
            }
        }
        self.sink.flush().map_err(|error| Error::io("flush", error))
    }

    fn pending_len(&self) -> usize {
        self.unsent.len() + self.staging.len()
    }
}

/// A [`Read`] over any [`Reader`].
#[derive(Debug)]
pub struct AsRead<R>(pub R);

impl<R: Reader> Read for AsRead<R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        match self.0.read(into) {
            // `Read` reports the end of a stream as 0 bytes.
            Err(error) if error.is_eof() => Ok(0),
            result => Ok(result?),
        }
    }
}

/// A [`Write`] over any [`Writer`]. Its flush is the writer's.
#[derive(Debug)]
pub struct AsWrite<W>(pub W);

impl<W: Writer> Write for AsWrite<W> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.0.write_copy(data)?;
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(self.0.flush()?)
    }
}
