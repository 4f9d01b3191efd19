//! Bridges to `std::io`, both ways.
//!
//! Used by one thread at a time; a call waits exactly as long as the source or sink does.

#![forbid(unsafe_code)]

use std::io::{self, IoSlice, Read, Write};

use super::block::Slice;
use super::chain::Chain;
use super::link::LinkBuffer;
use super::pool::Pool;
use super::staging::Staging;
use super::{READ_BYTES_MIN, Reader, WRITE_SLICES_MAX, Writer};
use crate::error::{Error, Result};

/// A [`Reader`] over any [`Read`].
///
/// Reads ahead: bytes of the source that nobody asked for yet are in the reader's buffer.
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

    /// The source. Reading from it directly misses the bytes that are buffered.
    pub fn source(&self) -> &R {
        &self.source
    }

    /// The source, and the bytes read from it that nobody consumed.
    pub fn into_inner(self) -> (R, LinkBuffer) {
        (self.source, LinkBuffer::from_chain(self.buffered))
    }

    /// Reads until `bytes` are buffered.
    fn fill(&mut self, operation: &str, bytes: usize) -> Result<()> {
        while self.buffered.len() < bytes {
            if self.fill_once()? == 0 {
                return Err(Error::eof(operation, bytes, self.buffered.len()));
            }
        }
        Ok(())
    }

    /// One successful read; returns how many bytes it added, 0 at the end of the source.
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

/// A [`Writer`] over any [`Write`]. The sink sees nothing before a flush.
///
/// Dropping it drops what is not flushed.
#[derive(Debug)]
pub struct IoWriter<W> {
    sink: W,
    staging: Staging,
    /// Flushed, but refused by the sink so far; goes first the next time.
    unsent: Chain,
}

impl<W: Write> IoWriter<W> {
    /// Writes to `sink`.
    pub fn new(sink: W) -> IoWriter<W> {
        IoWriter { sink, staging: Staging::new(), unsent: Chain::new() }
    }

    /// The sink, as far as it was written.
    pub fn sink(&self) -> &W {
        &self.sink
    }

    /// The sink. Writing to it directly overtakes the bytes that are not flushed.
    pub fn sink_mut(&mut self) -> &mut W {
        &mut self.sink
    }

    /// The sink; what is not flushed is dropped.
    pub fn into_inner(self) -> W {
        self.sink
    }
}

impl<W: Write> Writer for IoWriter<W> {
    fn reserve(&mut self, bytes: usize) -> Result<&mut [u8]> {
        Ok(self.staging.reserve(bytes, Pool::shared()))
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

    /// Writes everything to the sink and flushes it. After an error, what the sink did not take is
    /// kept and goes first the next time.
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
            // A closed stream has ended, as far as `Read` is concerned.
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
