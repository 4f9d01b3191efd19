//! Bytes that are written and not flushed.
//!
//! Owned and used by the writing thread. The caller fills a reservation after `reserve` has
//! returned. So the reserved bytes stay in the spare of the chain (`unsealed`): only with the next
//! call has the caller's borrow ended. Copied bytes stay there as well, so many small writes become
//! one piece at once.

#![forbid(unsafe_code)]

use std::fmt;

use super::block::{ReservedBuf, Slice};
use super::chain::Chain;
use super::pool::Pool;
use crate::config::COPY_BYTES_MAX;
use crate::error::{Error, Result};

/// The writing end of a buffer or a connection.
#[derive(Default)]
pub(crate) struct Staging {
    chain: Chain,
    /// Length of the bytes at the start of the chain's spare that are reserved, copied, or put into
    /// a [`ReservedBuf`].
    unsealed: usize,
    /// Length of the bytes at the end that the next commit may drop.
    open: usize,
}

impl Staging {
    /// Length in bytes, reserved ones included.
    #[inline]
    pub(crate) fn len(&self) -> usize {
        self.chain.len() + self.unsealed
    }

    #[inline]
    pub(crate) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Frees the memory that is not needed while this is empty.
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

    /// See [`Writer::reserve_buf`](super::Writer::reserve_buf).
    #[inline]
    pub(crate) fn reserve_buf(&mut self, bytes: usize, pool: &Pool) -> ReservedBuf<'_> {
        self.close();
        let room = match bytes {
            0 => &mut [],
            _ => &mut self.chain.spare(bytes, pool)[..bytes],
        };
        // What is put is not open, so a commit never drops it.
        ReservedBuf::new(room, &mut self.unsealed)
    }

    /// See [`Writer::commit`](super::Writer::commit).
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

    /// Adds `slice`: a copy of up to [`COPY_BYTES_MAX`], a reference to more.
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
        self.open = 0;
        let spare = self.chain.spare_left();
        match spare.get_mut(self.unsealed..).and_then(|rest| rest.get_mut(..data.len())) {
            Some(rest) => {
                rest.copy_from_slice(data);
                self.unsealed += data.len();
            }
            None => self.write_beyond(data, pool),
        }
    }

    /// Adds a copy of `data`, which the spare has no room for: first into the spare, then into one
    /// new block.
    fn write_beyond(&mut self, data: &[u8], pool: &Pool) {
        let (fitting, rest) = data.split_at(self.chain.capacity_left() - self.unsealed);
        self.chain.spare_left()[self.unsealed..].copy_from_slice(fitting);
        self.unsealed += fitting.len();
        self.seal();
        self.chain.spare(rest.len(), pool)[..rest.len()].copy_from_slice(rest);
        self.unsealed = rest.len();
    }

    /// See [`Writer::insert`](super::Writer::insert).
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

    /// Ends the reservation and returns all bytes. The caller may remove them.
    #[inline]
    pub(crate) fn sealed(&mut self) -> &mut Chain {
        self.close();
        &mut self.chain
    }

    /// Ends the reservation and keeps all its bytes.
    #[inline]
    fn close(&mut self) {
        self.seal();
        self.open = 0;
    }

    /// Moves the bytes of the spare that are written into the chain. They can no longer be filled.
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
