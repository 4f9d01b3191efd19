//! Blocks kept for the next use.
//!
//! Owns the free lists, one for each size. A poller has one pool; its blocks come home from
//! whatever thread drops their last slice. Nothing here locks or waits. Blocks in use hold the
//! lists, so a pool may be dropped before them.

#![forbid(unsafe_code)]

// Not loom's: see `block.rs`.
use std::sync::{Arc, OnceLock};

use crossbeam_queue::ArrayQueue;

use super::block::{Block, FreeBlock, Home};
use super::{BLOCK_BYTES_MIN, BLOCK_CLASSES, BLOCK_GROWTH_BYTES_MAX};
use super::{FREE_BLOCKS_MAX, FREE_BYTES_MAX};
use crate::sync::atomic::{AtomicUsize, Ordering};

/// Hands out blocks of some size classes and recycles them. A clone is the same pool.
#[derive(Clone)]
pub(crate) struct Pool(Arc<FreeLists>);

/// Blocks of a pool that are in use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct PoolStats {
    /// Blocks that a writer fills or a slice refers to.
    pub(crate) blocks: usize,
    /// Their memory in bytes.
    pub(crate) block_bytes: usize,
}

impl Pool {
    /// A pool with the size classes of the limits in [`buffer`](super).
    pub(crate) fn new() -> Pool {
        Pool::with_classes(BLOCK_BYTES_MIN, BLOCK_CLASSES, BLOCK_GROWTH_BYTES_MAX)
    }

    /// A pool of blocks as small as `block_bytes` (rounded up to a power of two), so that a few
    /// bytes already take several blocks.
    pub(crate) fn with_block_bytes(block_bytes: usize) -> Pool {
        Pool::with_classes(block_bytes.max(1).next_power_of_two(), 1, block_bytes)
    }

    /// The pool of buffers that belong to no poller.
    pub(crate) fn shared() -> &'static Pool {
        static SHARED: OnceLock<Pool> = OnceLock::new();
        SHARED.get_or_init(Pool::new)
    }

    /// A block with at least `bytes_min` to fill. Sizes above the largest class are not recycled.
    #[inline]
    pub(crate) fn allocate(&self, bytes_min: usize) -> Block {
        let class = self.0.class(bytes_min);
        let free = self.0.lists.get(class).and_then(ArrayQueue::pop);
        let block = free.unwrap_or_else(|| self.0.create(class, bytes_min));
        block.lend(Arc::clone(&self.0) as Arc<dyn Home>)
    }

    /// The largest block to allocate in expectation of more bytes than are known yet.
    #[inline]
    pub(crate) fn growth_bytes_max(&self) -> usize {
        self.0.growth_bytes_max
    }

    /// Counts what is in use. Exact when no other thread allocates or frees meanwhile.
    pub(crate) fn stats(&self) -> PoolStats {
        let mut stats = PoolStats {
            blocks: self.0.blocks.load(Ordering::Acquire),
            block_bytes: self.0.block_bytes.load(Ordering::Acquire),
        };
        for (class, list) in self.0.lists.iter().enumerate() {
            let free = list.len();
            stats.blocks = stats.blocks.saturating_sub(free);
            let free_bytes = free * self.0.class_bytes(class);
            stats.block_bytes = stats.block_bytes.saturating_sub(free_bytes);
        }
        stats
    }

    /// Frees the blocks kept for later.
    pub(crate) fn trim(&self) {
        for list in &self.0.lists {
            while let Some(block) = list.pop() {
                self.0.destroy(block);
            }
        }
    }

    fn with_classes(bytes_min: usize, count: usize, growth_bytes_max: usize) -> Pool {
        let free_max =
            |class: usize| (FREE_BYTES_MAX / (bytes_min << class)).clamp(1, FREE_BLOCKS_MAX);
        Pool(Arc::new(FreeLists {
            lists: (0..count).map(|class| ArrayQueue::new(free_max(class))).collect(),
            bytes_min_log2: bytes_min.ilog2(),
            growth_bytes_max,
            blocks: AtomicUsize::new(0),
            block_bytes: AtomicUsize::new(0),
        }))
    }
}

struct FreeLists {
    /// The list at index `class` has blocks of `class_bytes(class)`.
    lists: Box<[ArrayQueue<FreeBlock>]>,
    bytes_min_log2: u32,
    growth_bytes_max: usize,
    /// All blocks there are, free or in use.
    blocks: AtomicUsize,
    block_bytes: AtomicUsize,
}

impl FreeLists {
    /// The smallest class whose blocks have `bytes`; beyond the last list when there is none.
    #[inline]
    fn class(&self, bytes: usize) -> usize {
        let units = bytes.saturating_sub(1) >> self.bytes_min_log2;
        (usize::BITS - units.leading_zeros()) as usize
    }

    #[inline]
    fn class_bytes(&self, class: usize) -> usize {
        1 << (self.bytes_min_log2 as usize + class)
    }

    #[cold]
    fn create(&self, class: usize, bytes_min: usize) -> FreeBlock {
        let bytes = if class < self.lists.len() { self.class_bytes(class) } else { bytes_min };
        let block = FreeBlock::new(bytes);
        self.blocks.fetch_add(1, Ordering::Relaxed);
        self.block_bytes.fetch_add(bytes, Ordering::Relaxed);
        block
    }

    #[cold]
    fn destroy(&self, block: FreeBlock) {
        self.blocks.fetch_sub(1, Ordering::Relaxed);
        self.block_bytes.fetch_sub(block.capacity(), Ordering::Relaxed);
    }
}

impl Home for FreeLists {
    fn give_back(&self, block: FreeBlock) {
        let class = self.class(block.capacity());
        let rejected = match self.lists.get(class) {
            Some(list) => list.push(block).err(),
            None => Some(block),
        };
        if let Some(block) = rejected {
            self.destroy(block);
        }
    }
}
