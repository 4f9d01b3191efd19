//! Bytes written but not handed on.
//!
//! Owned and used by the writing thread. A reservation is filled by the caller after `reserve` has
//! returned, so its bytes stay in the chain's spare (`unsealed`) until the next call shows that the
//! caller's borrow has ended.

#![forbid(unsafe_code)]

use std::fmt;

use super::block::Slice;
use super::chain::Chain;
use super::pool::Pool;
use crate::config::COPY_BYTES_MAX;
use crate::error::{Error, Result};

/// The writing end of a buffer or a connection.
#[derive(Default)]
pub(crate) struct Staging {
    chain: Chain,
    /// Reserved bytes at the start of the chain's spare.
    unsealed: usize,
    /// Bytes at the end that the next commit decides about.
    open: usize,
}

impl Staging {
    #[inline]
    pub(crate) fn new() -> Staging {
        Staging::default()
    }

    /// Length in bytes, with everything reserved.
    #[inline]
    pub(crate) fn len(&self) -> usize {
        self.chain.len() + self.unsealed
    }

    #[inline]
    pub(crate) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Lets go of what an empty one does not need.
    #[inline]
    pub(crate) fn release(&mut self) {
        self.chain.release();
        self.open = 0;
    }

    /// Adds `bytes` zeroes in one piece and returns them to be filled.
    #[inline]
    pub(crate) fn reserve(&mut self, bytes: usize, pool: &Pool) -> &mut [u8] {
        if bytes == 0 {
            return &mut [];
        }
        if self.unsealed + bytes > self.chain.capacity_left() {
            self.seal();
        }
        let start = self.unsealed;
        self.unsealed += bytes;
        self.open += bytes;
        let reserved = &mut self.chain.spare(self.unsealed, pool)[start..start + bytes];
        reserved.fill(0);
        reserved
    }

    /// Keeps only the first `bytes` of what is open. See [`Writer::commit`](super::Writer::commit).
    #[inline]
    pub(crate) fn commit(&mut self, bytes: usize) -> Result<()> {
        let Some(dropped) = self.open.checked_sub(bytes) else {
            return Err(Error::invalid(format!("commit {bytes} bytes of {} reserved", self.open)));
        };
        let unsealed_dropped = dropped.min(self.unsealed);
        self.unsealed -= unsealed_dropped;
        if dropped > unsealed_dropped {
            self.chain.truncate(self.chain.len() - (dropped - unsealed_dropped));
        }
        self.open = 0;
        Ok(())
    }

    /// Adds `slice`: a copy if it is short, a reference if it is long.
    #[inline]
    pub(crate) fn write(&mut self, slice: Slice, pool: &Pool) {
        if slice.len() <= COPY_BYTES_MAX {
            self.write_copy(&slice, pool);
        } else {
            self.close();
            self.chain.push(slice);
        }
    }

    /// Adds a copy of `data`.
    #[inline]
    pub(crate) fn write_copy(&mut self, data: &[u8], pool: &Pool) {
        if data.is_empty() {
            return;
        }
        self.close();
        self.chain.write_copy(data, pool);
    }

    /// Puts `slice` before the last `remaining` reserved bytes. See
    /// [`Writer::insert`](super::Writer::insert).
    pub(crate) fn insert(&mut self, slice: Slice, remaining: usize) -> Result<()> {
        if remaining > self.open {
            return Err(Error::invalid(format!(
                "insert {remaining} bytes before the end of {} reserved",
                self.open
            )));
        }
        self.seal();
        self.open += slice.len();
        self.chain.insert(slice, remaining);
        Ok(())
    }

    /// Moves everything from `other` to the end.
    pub(crate) fn append(&mut self, other: &mut Chain) {
        if other.is_empty() {
            return;
        }
        self.close();
        self.chain.append(other);
    }

    /// Everything, with the reservation ended: what is removed from it is no longer here.
    #[inline]
    pub(crate) fn sealed(&mut self) -> &mut Chain {
        self.close();
        &mut self.chain
    }

    /// Ends the reservation as it is.
    #[inline]
    fn close(&mut self) {
        self.seal();
        self.open = 0;
    }

    /// Makes the reserved bytes part of the chain; nobody can fill them any more.
    #[inline]
    fn seal(&mut self) {
        if self.unsealed > 0 {
            self.chain.extend(self.unsealed);
            self.unsealed = 0;
        }
    }
}

impl fmt::Debug for Staging {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Staging").field("len", &self.len()).finish_non_exhaustive()
    }
}
