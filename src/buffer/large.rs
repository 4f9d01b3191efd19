//! The free large blocks of a pool.
//!
//! Memory that comes new from the system costs a page fault for each page, and is zeroed. So a pool
//! keeps large blocks that are free, and reuses the block that was returned last: its bytes are
//! most likely still in the CPU cache. The kept memory has a bound. A poller calls
//! [`decay`](LargeBlocks::decay) again and again, which frees the blocks that no message needed.
//!
//! Any thread may use the lists, under a lock. A thread that holds the lock calls no other code of
//! this crate, and frees no memory. For a large block, a lock takes much less time than a copy of
//! its bytes.

#![forbid(unsafe_code)]

use super::block::FreeBlock;
use crate::config::{DECAYS_OBSERVED, LARGE_BLOCK_BYTES_MIN};
use crate::sync::atomic::{AtomicUsize, Ordering};
use crate::sync::{Mutex, lock};

pub(super) struct LargeBlocks {
    lists: Mutex<Lists>,
    /// The memory of the blocks in `lists`. Changed under the lock.
    free_bytes: AtomicUsize,
    /// The most memory that the lists keep.
    free_bytes_max: usize,
    /// All large blocks of the pool, free or in use.
    blocks: AtomicUsize,
    /// The part of these that a backend has set aside.
    aside: AtomicUsize,
}

struct Lists {
    /// The largest classes of the pool, from `first_class` on.
    classes: Box<[Class]>,
    free_blocks: usize,
}

/// The free blocks of one size.
#[derive(Default)]
struct Class {
    /// The block that was returned last is the last one.
    free: Vec<FreeBlock>,
    /// The smallest length of `free` since the observation began: so many blocks were not needed.
    least: usize,
    /// The largest length since then.
    most: usize,
    /// The decays since then.
    decays: u32,
    /// Whether a block was taken since the last decay.
    is_used: bool,
}

impl Class {
    /// Removes the blocks that a decay frees. If no block was taken since the last decay: all of
    /// them. Otherwise, in every [`DECAYS_OBSERVED`]th decay, those beyond twice the number that
    /// was needed at the same time. Freeing more, or sooner, would free blocks that the next,
    /// slightly higher peak needs.
    fn decay(&mut self, removed: &mut Vec<FreeBlock>) {
        let is_used = std::mem::take(&mut self.is_used);
        self.decays += 1;
        if is_used && self.decays < DECAYS_OBSERVED {
            return;
        }
        let needed = self.most - self.least;
        let excess = if is_used { self.least.saturating_sub(needed) } else { self.free.len() };
        removed.extend(self.free.drain(..excess));
        (self.least, self.most, self.decays) = (self.free.len(), self.free.len(), 0);
    }
}

impl LargeBlocks {
    pub(super) fn new(classes: usize, free_bytes_max: usize) -> LargeBlocks {
        let classes = (0..classes).map(|_| Class::default()).collect();
        LargeBlocks {
            lists: Mutex::new(Lists { classes, free_blocks: 0 }),
            free_bytes: AtomicUsize::new(0),
            free_bytes_max,
            blocks: AtomicUsize::new(0),
            aside: AtomicUsize::new(0),
        }
    }

    /// Removes the block of a class that was returned last. `index` counts the large classes.
    pub(super) fn pop(&self, index: usize) -> Option<FreeBlock> {
        let mut lists = lock(&self.lists);
        let class = lists.classes.get_mut(index)?;
        class.is_used = true;
        let block = class.free.pop()?;
        class.least = class.least.min(class.free.len());
        lists.free_blocks -= 1;
        self.free_bytes.fetch_sub(block.capacity(), Ordering::Relaxed);
        Some(block)
    }

    /// Keeps a free block. Returns the block if the lists are full, or have no such class.
    pub(super) fn push(&self, index: usize, block: FreeBlock) -> Option<FreeBlock> {
        let mut lists = lock(&self.lists);
        let free_bytes = self.free_bytes() + block.capacity();
        if free_bytes > self.free_bytes_max {
            return Some(block);
        }
        let Some(class) = lists.classes.get_mut(index) else { return Some(block) };
        class.free.push(block);
        class.most = class.most.max(class.free.len());
        lists.free_blocks += 1;
        self.free_bytes.store(free_bytes, Ordering::Relaxed);
        None
    }

    /// How many blocks are free, and their memory in bytes.
    pub(super) fn free(&self) -> (usize, usize) {
        let lists = lock(&self.lists);
        (lists.free_blocks, self.free_bytes())
    }

    /// The memory of the free blocks, in bytes.
    #[inline]
    pub(super) fn free_bytes(&self) -> usize {
        self.free_bytes.load(Ordering::Relaxed)
    }

    /// Whether there are large blocks, except those that a backend has set aside.
    #[inline]
    pub(super) fn exist(&self) -> bool {
        self.blocks.load(Ordering::Relaxed) > self.aside.load(Ordering::Relaxed)
    }

    /// Removes blocks that were not needed.
    pub(super) fn decay(&self) -> Vec<FreeBlock> {
        let mut removed = Vec::new();
        let mut lists = lock(&self.lists);
        lists.classes.iter_mut().for_each(|class| class.decay(&mut removed));
        lists.free_blocks -= removed.len();
        let removed_bytes = removed.iter().map(FreeBlock::capacity).sum();
        self.free_bytes.fetch_sub(removed_bytes, Ordering::Relaxed);
        removed
    }

    /// Notes that a block was made.
    pub(super) fn count_made(&self) {
        self.blocks.fetch_add(1, Ordering::Relaxed);
    }

    /// Notes that a block was freed.
    pub(super) fn count_freed(&self) {
        self.blocks.fetch_sub(1, Ordering::Relaxed);
    }

    /// Notes that a backend has set blocks aside.
    pub(super) fn set_aside(&self, blocks: usize, bytes: usize) {
        if are_large(blocks, bytes) {
            self.aside.fetch_add(blocks, Ordering::Relaxed);
        }
    }

    /// Notes that blocks are no longer set aside.
    pub(super) fn bring_back(&self, blocks: usize, bytes: usize) {
        if are_large(blocks, bytes) {
            self.aside.fetch_sub(blocks, Ordering::Relaxed);
        }
    }
}

/// Whether blocks of one size, with `bytes` in all, are large.
fn are_large(blocks: usize, bytes: usize) -> bool {
    bytes >= blocks * LARGE_BLOCK_BYTES_MIN
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    const BYTES: usize = LARGE_BLOCK_BYTES_MIN;

    fn block() -> FreeBlock {
        FreeBlock::new(BYTES, 0)
    }

    #[test]
    fn the_block_returned_last_is_taken_first() {
        let large = LargeBlocks::new(1, 4 * BYTES);
        let (first, second) = (block(), FreeBlock::new(2 * BYTES, 0));
        assert!(large.push(0, first).is_none() && large.push(0, second).is_none());
        assert_eq!(large.pop(0).map(|block| block.capacity()), Some(2 * BYTES));
        assert_eq!(large.pop(0).map(|block| block.capacity()), Some(BYTES));
        assert!(large.pop(0).is_none());
    }

    #[test]
    fn the_lists_keep_no_more_than_their_bound() {
        let large = LargeBlocks::new(2, 3 * BYTES);
        assert!(large.push(0, block()).is_none() && large.push(1, block()).is_none());
        assert!(large.push(0, block()).is_none());
        assert!(large.push(1, block()).is_some());
        assert_eq!(large.free(), (3, 3 * BYTES));
        assert!(large.pop(0).is_some());
        assert!(large.push(2, block()).is_some(), "there is no such class");
        assert!(large.push(1, block()).is_none());
    }

    #[test]
    fn a_decay_keeps_twice_what_was_needed_and_nothing_of_an_unused_class() {
        let large = LargeBlocks::new(2, 100 * BYTES);
        let put = |index, count| (0..count).for_each(|_| drop(large.push(index, block())));
        let take_and_put = |count| {
            let taken: Vec<_> = (0..count).filter_map(|_| large.pop(0)).collect();
            assert_eq!(taken.len(), count);
            put(0, count);
        };
        // The decays of one observation: the first ones free nothing while blocks are taken.
        let decay = || {
            for _ in 1..DECAYS_OBSERVED {
                take_and_put(1);
                assert_eq!(large.decay().len(), 0);
            }
            take_and_put(1);
            large.decay().len()
        };
        put(0, 20);
        assert_eq!(decay(), 0, "the lists were empty at first");
        take_and_put(7);
        take_and_put(3);
        assert_eq!(decay(), 20 - 2 * 7);
        assert_eq!(large.free(), (14, 14 * BYTES));
        take_and_put(8);
        assert_eq!(decay(), 0);
        put(1, 5);
        take_and_put(1);
        assert_eq!(large.decay().len(), 5, "nothing was taken from the second class");
        // A decay while the blocks are in use.
        let taken: Vec<_> = (0..7).filter_map(|_| large.pop(0)).collect();
        assert_eq!(large.decay().len(), 0);
        taken.into_iter().for_each(|block| drop(large.push(0, block)));
        assert!(large.pop(0).is_some());
        assert_eq!(large.decay().len(), 0);
        assert_eq!(large.decay().len(), 13, "nothing was taken since");
        assert_eq!(large.free(), (0, 0));
    }
}
