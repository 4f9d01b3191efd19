//! A queue of slices: input, output and `LinkBuffer` store their bytes in it.
//!
//! Owned and used by one thread at a time. Between calls, three things hold:
//!
//! * No piece is empty.
//! * `head` is empty only while the chain is empty.
//! * An empty chain owns no memory except the block of the last call of `spare`.

#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::fmt;
use std::io::IoSlice;

use super::block::{Block, Slice};
use super::pool::Pool;
use crate::config::{APPEND_COPY_BYTES_MAX, CHAIN_PIECES_KEPT};

/// Bytes in order, in pieces. A piece that follows the last one in memory is merged with it.
#[derive(Default)]
pub(crate) struct Chain {
    len: usize,
    /// The first piece. It is not in `rest`, so a chain of one piece allocates no queue.
    head: Slice,
    rest: VecDeque<Slice>,
    /// The block whose spare takes the next copied bytes.
    tail: Option<Block>,
}

impl Chain {
    #[inline]
    pub(crate) fn new() -> Chain {
        Chain::default()
    }

    /// Length in bytes.
    #[inline]
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    #[inline]
    pub(crate) fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Adds `slice` at the end, without copying.
    #[inline]
    pub(crate) fn push(&mut self, slice: Slice) {
        let bytes = slice.len();
        if bytes == 0 {
            return;
        }
        if self.len == 0 {
            self.head = slice;
        } else if let Err(slice) = self.last_mut().try_merge(slice) {
            self.rest.push_back(slice);
        }
        self.len += bytes;
    }

    /// Adds a copy of `data` at the end: first into the spare, then into one new block. That block
    /// is as large as the whole chain, within bounds, so many small writes take few blocks.
    #[inline]
    pub(crate) fn write_copy(&mut self, data: &[u8], pool: &Pool) {
        let (fitting, rest) = data.split_at(data.len().min(self.capacity_left()));
        self.fill_spare(fitting);
        if !rest.is_empty() {
            self.spare(rest.len(), pool);
            self.fill_spare(rest);
        }
    }

    /// Moves everything from `other` to the end. A few bytes that fit into the spare are copied
    /// instead: otherwise a peer that sends single bytes would occupy a block for each byte. User
    /// memory is never copied, because the copy would drop it, and the caller may hold a lock.
    #[inline]
    pub(crate) fn append(&mut self, other: &mut Chain) {
        if self.len == 0 {
            std::mem::swap(self, other);
            other.release();
        } else if other.len <= APPEND_COPY_BYTES_MAX
            && other.len <= self.capacity_left()
            && !other.slices().any(Slice::is_foreign)
        {
            for piece in other.slices() {
                self.fill_spare(piece);
            }
            other.clear();
        } else {
            if other.capacity_left() > self.capacity_left() {
                self.tail = other.tail.take();
            }
            self.push_all(other);
        }
    }

    /// Removes the first `bytes` as one slice: by reference if they lie in one piece, otherwise as
    /// one copy. `None` if the chain has fewer.
    #[inline]
    pub(crate) fn next(&mut self, bytes: usize, pool: &Pool) -> Option<Slice> {
        if bytes < self.head.len() {
            self.len -= bytes;
            return Some(self.head.split_to(bytes));
        }
        if bytes == self.head.len() {
            return Some(self.pop_front());
        }
        (bytes <= self.len).then(|| self.join_front(bytes, pool))
    }

    /// Like [`next`](Self::next), but the bytes stay. Bytes that were copied stay as one piece, so
    /// the next call copies nothing.
    #[inline]
    pub(crate) fn peek(&mut self, bytes: usize, pool: &Pool) -> Option<Slice> {
        self.join(bytes, pool).then(|| self.head.slice(..bytes))
    }

    /// Makes the first piece at least `bytes` long: copies the first `bytes` into one block if they
    /// span pieces. If the chain has fewer, returns `false` and changes nothing.
    #[inline]
    pub(crate) fn join(&mut self, bytes: usize, pool: &Pool) -> bool {
        if bytes <= self.head.len() {
            return true;
        }
        if bytes > self.len {
            return false;
        }
        let joined = self.join_front(bytes, pool);
        self.push_front(joined);
        true
    }

    /// Drops the first `bytes`. If the chain has fewer, returns `false` and drops nothing.
    #[inline]
    pub(crate) fn skip(&mut self, bytes: usize) -> bool {
        let enough = bytes <= self.len;
        if enough {
            self.advance(bytes);
        }
        enough
    }

    /// Drops the first `bytes`.
    ///
    /// # Panics
    /// When the chain has fewer.
    #[inline]
    pub(crate) fn advance(&mut self, bytes: usize) {
        self.remove_front(bytes, drop);
    }

    /// Drops the first `bytes`, but moves user memory into `spent`. For callers that hold a lock:
    /// no destructor of the user may run under it.
    ///
    /// # Panics
    /// When the chain has fewer.
    #[inline]
    pub(crate) fn spend(&mut self, bytes: usize, spent: &mut Spent) {
        self.remove_front(bytes, |piece| {
            if piece.is_foreign() {
                spent.0.push(piece);
            }
        });
    }

    /// Index of the first `byte` whose index is `from` or more.
    pub(crate) fn find(&self, byte: u8, from: usize) -> Option<usize> {
        let mut piece_start = 0;
        let mut searched = 0;
        if from > 0 {
            // A reader repeats its search after each arrival, and few pieces are new. So this
            // counts the new pieces from the back.
            let (mut fresh_start, mut fresh) = (self.len, 0);
            for piece in self.slices().rev() {
                if fresh_start <= from {
                    break;
                }
                fresh_start -= piece.len();
                fresh += 1;
            }
            let pieces = usize::from(self.len > 0) + self.rest.len();
            (piece_start, searched) = (fresh_start, pieces - fresh);
        }
        for piece in self.slices().skip(searched) {
            let skipped = from.saturating_sub(piece_start).min(piece.len());
            if let Some(index) = memchr::memchr(byte, &piece[skipped..]) {
                return Some(piece_start + skipped + index);
            }
            piece_start += piece.len();
        }
        None
    }

    /// Removes the first `bytes` without copying. `None` if the chain has fewer.
    pub(crate) fn split(&mut self, bytes: usize) -> Option<Chain> {
        if bytes > self.len {
            return None;
        }
        let mut front = Chain::new();
        let mut left = bytes;
        while left > 0 && left >= self.head.len() {
            let piece = self.pop_front();
            left -= piece.len();
            front.push(piece);
        }
        if left > 0 {
            front.push(self.head.split_to(left));
            self.len -= left;
        }
        Some(front)
    }

    /// Moves bytes from the front into `into` until the chain is empty or `into` is full. Returns
    /// how many.
    pub(crate) fn read_into(&mut self, into: &mut [u8]) -> usize {
        let bytes = into.len().min(self.len);
        self.copy_front(&mut into[..bytes]);
        self.advance(bytes);
        bytes
    }

    /// Removes everything, the spare included.
    #[inline]
    pub(crate) fn take(&mut self) -> Chain {
        std::mem::take(self)
    }

    /// Drops everything, the spare included.
    #[inline]
    pub(crate) fn clear(&mut self) {
        self.len = 0;
        self.head = Slice::new();
        self.rest.clear();
        self.release();
    }

    /// Drops everything after the first `bytes`.
    pub(crate) fn truncate(&mut self, bytes: usize) {
        drop(self.split_back(bytes));
        if self.len == 0 {
            self.release();
        }
    }

    /// Puts `slice` before the last `remaining` bytes, without copying.
    ///
    /// # Panics
    /// When `remaining` is more than the length.
    pub(crate) fn insert(&mut self, slice: Slice, remaining: usize) {
        assert!(remaining <= self.len, "insert {remaining} bytes before the end of {}", self.len);
        let mut back = self.split_back(self.len - remaining);
        self.push(slice);
        self.push_all(&mut back);
    }

    /// Room for at least `bytes_min` more bytes. [`extend`](Self::extend) adds it to the chain.
    #[inline]
    pub(crate) fn spare(&mut self, bytes_min: usize, pool: &Pool) -> &mut [u8] {
        if bytes_min > self.capacity_left() {
            self.tail = None;
        }
        let wanted = bytes_min.max(self.len.min(pool.growth_bytes_max()));
        self.tail.get_or_insert_with(|| pool.allocate(wanted)).spare()
    }

    /// The spare, without making room.
    #[inline]
    pub(crate) fn spare_left(&mut self) -> &mut [u8] {
        self.tail.as_mut().map_or(&mut [], Block::spare)
    }

    /// Length of the spare in bytes.
    #[inline]
    pub(crate) fn capacity_left(&self) -> usize {
        self.tail.as_ref().map_or(0, Block::capacity_left)
    }

    /// Adds the first `bytes` of the spare to the end of the chain.
    ///
    /// # Panics
    /// When the spare is shorter.
    #[inline]
    pub(crate) fn extend(&mut self, bytes: usize) {
        assert!(bytes <= self.capacity_left(), "extend {bytes} of {}", self.capacity_left());
        if let Some(tail) = &mut self.tail {
            let last = self.rest.back_mut().unwrap_or(&mut self.head);
            if tail.extend(last, bytes) {
                self.len += bytes;
            } else {
                let slice = tail.take(bytes);
                self.push(slice);
            }
        }
    }

    /// Points `iovs` at the first pieces. Returns how many it used, and how many bytes they cover.
    pub(crate) fn fill_iovs<'a>(&'a self, iovs: &mut [IoSlice<'a>]) -> (usize, usize) {
        let (mut count, mut bytes) = (0, 0);
        for (iov, piece) in iovs.iter_mut().zip(self.slices()) {
            *iov = IoSlice::new(piece);
            count += 1;
            bytes += piece.len();
        }
        (count, bytes)
    }

    /// The pieces in order.
    pub(crate) fn slices(&self) -> impl DoubleEndedIterator<Item = &Slice> {
        let head = (self.len > 0).then_some(&self.head);
        head.into_iter().chain(&self.rest)
    }

    /// The first piece. It is empty only if the chain is empty.
    #[inline]
    pub(crate) fn front_slice(&self) -> &[u8] {
        &self.head
    }

    #[cfg(test)]
    pub(super) fn queue_capacity(&self) -> usize {
        self.rest.capacity()
    }

    /// Removes the first `bytes`, which lie in several pieces, as one copy.
    fn join_front(&mut self, bytes: usize, pool: &Pool) -> Slice {
        let mut block = pool.allocate(bytes);
        self.copy_front(&mut block.spare()[..bytes]);
        self.advance(bytes);
        block.take(bytes)
    }

    /// Copies as many bytes from the front as `into` has.
    fn copy_front(&self, into: &mut [u8]) {
        let mut copied = 0;
        for piece in self.slices() {
            if copied == into.len() {
                break;
            }
            let bytes = piece.len().min(into.len() - copied);
            into[copied..copied + bytes].copy_from_slice(&piece[..bytes]);
            copied += bytes;
        }
    }

    /// Removes everything after the first `bytes`. The spare stays.
    fn split_back(&mut self, bytes: usize) -> Chain {
        let mut back = Chain::new();
        while self.len > bytes {
            let mut piece = self.rest.pop_back().unwrap_or_else(|| std::mem::take(&mut self.head));
            self.len -= piece.len();
            if self.len < bytes {
                let moved = piece.split_off(bytes - self.len);
                self.push(std::mem::replace(&mut piece, moved));
            }
            back.push_front(piece);
        }
        back
    }

    /// Adds a copy of `data`, which fits into the spare.
    #[inline]
    fn fill_spare(&mut self, data: &[u8]) {
        if let Some(tail) = &mut self.tail {
            tail.spare()[..data.len()].copy_from_slice(data);
            self.extend(data.len());
        }
    }

    fn push_all(&mut self, other: &mut Chain) {
        self.rest.reserve(other.rest.len());
        while other.len > 0 {
            self.push(other.pop_front());
        }
    }

    fn push_front(&mut self, slice: Slice) {
        let second = std::mem::replace(&mut self.head, slice);
        if self.len > 0 {
            self.rest.push_front(second);
        }
        self.len += self.head.len();
    }

    /// Removes the first `bytes`. Calls `each` with every whole piece among them.
    #[inline]
    fn remove_front(&mut self, bytes: usize, mut each: impl FnMut(Slice)) {
        assert!(bytes <= self.len, "remove {bytes} of {} bytes", self.len);
        let mut left = bytes;
        while left > 0 && left >= self.head.len() {
            let piece = self.pop_front();
            left -= piece.len();
            each(piece);
        }
        self.head.advance(left);
        self.len -= left;
    }

    /// Removes the first piece. It is empty only if the chain is empty.
    #[inline]
    fn pop_front(&mut self) -> Slice {
        let next = self.rest.pop_front().unwrap_or_default();
        let mut piece = std::mem::replace(&mut self.head, next);
        self.len -= piece.len();
        if self.len == 0 {
            if let Some(tail) = self.tail.take() {
                tail.leave_to(&mut piece);
            }
            self.release();
        }
        piece
    }

    /// Frees the memory that an empty chain does not need.
    #[inline]
    pub(crate) fn release(&mut self) {
        self.tail = None;
        if self.rest.capacity() > CHAIN_PIECES_KEPT {
            self.rest = VecDeque::new();
        }
    }

    #[inline]
    fn last_mut(&mut self) -> &mut Slice {
        self.rest.back_mut().unwrap_or(&mut self.head)
    }
}

/// User memory that the connection no longer needs. Dropping a `Spent` runs destructors of the
/// user, so it is declared before a lock is taken, and thus dropped after the unlock.
#[derive(Default)]
pub(crate) struct Spent(Vec<Slice>);

impl fmt::Debug for Chain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Chain").field("len", &self.len()).finish_non_exhaustive()
    }
}
