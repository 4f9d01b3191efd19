//! Pools of free blocks.
//!
//! A pool has one free list for each size class; any thread may use them. One thread may be
//! *attached* to the pool: it has free lists of its own, which need no atomic operations, and uses
//! the lists of the pool when its own are empty or full. Each poller has a pool, and its thread is
//! attached to it. The thread that drops the last slice of a block returns the block to its pool.
//! Blocks in use keep the lists alive, so a pool may be dropped before its blocks.
//!
//! Large blocks have lists of their own, which all threads share, under a lock: see `large.rs`. All
//! other functions in this file neither take a lock nor wait.

#![forbid(unsafe_code)]

use std::cell::Cell;
use std::marker::PhantomData;
use std::mem::ManuallyDrop;
// The standard `Arc`: see `block.rs`.
use std::sync::{Arc, OnceLock};

use crossbeam_queue::ArrayQueue;

use super::block::{Block, FreeBlock, Home};
use super::large::LargeBlocks;
use crate::config::{BLOCK_BYTES_MIN, BLOCK_CLASSES, BLOCK_GROWTH_BYTES_MAX, with_header_room};
use crate::config::{FREE_BLOCKS_MAX, FREE_BYTES_MAX, LOCAL_BLOCKS_MAX, LOCAL_BYTES_MAX};
use crate::config::{FREE_LARGE_BYTES_MAX, LARGE_BLOCK_BYTES_MIN, SHARED_LARGE_BYTES_MAX};
use crate::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// Allocates blocks of some size classes and recycles them. A clone is the same pool.
#[derive(Clone)]
pub(crate) struct Pool(Arc<FreeLists>);

/// The memory of a pool.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct PoolStats {
    /// Blocks in use: those that are being filled, or that a slice refers to.
    pub(crate) blocks: u64,
    /// Their memory in bytes.
    pub(crate) block_bytes: u64,
    /// Memory of the free blocks that the pool keeps, in bytes.
    pub(crate) free_bytes: u64,
}

impl Pool {
    /// A pool with the size classes of [`config`](crate::config), for a poller, which calls
    /// [`decay`](Self::decay).
    pub(crate) fn new() -> Pool {
        Pool::with_large_bytes(FREE_LARGE_BYTES_MAX)
    }

    /// A pool of one size class: `block_bytes`, rounded up to a power of two, and 1/32 more. Tests
    /// use it to let a few bytes span several blocks.
    pub(crate) fn with_block_bytes(block_bytes: usize) -> Pool {
        let bytes = block_bytes.max(1).next_power_of_two();
        Pool::with_classes(bytes, 1, block_bytes, SHARED_LARGE_BYTES_MAX)
    }

    /// The pool that the process shares, for buffers that belong to no poller. No poller calls its
    /// `decay`, so it keeps few large blocks.
    pub(crate) fn shared() -> &'static Pool {
        static SHARED: OnceLock<Pool> = OnceLock::new();
        SHARED.get_or_init(|| Pool::with_large_bytes(SHARED_LARGE_BYTES_MAX))
    }

    /// Attaches the calling thread to this pool until the result is dropped.
    ///
    /// # Panics
    /// When the thread is attached to a pool, or another thread to this one.
    pub(crate) fn attach(&self) -> Attached {
        let other = self.0.attached.swap(true, Ordering::Acquire);
        assert!(!other, "attach: another thread is attached to this pool");
        assert!(LOCAL.take().is_none(), "attach: this thread is attached to another pool");
        LOCAL.set(ManuallyDrop::new(Some(Box::new(Local::new(Arc::clone(&self.0))))));
        Attached(PhantomData)
    }

    /// A block of at least `bytes_min`. Blocks larger than the largest class are not recycled.
    #[inline]
    pub(crate) fn allocate(&self, bytes_min: usize) -> Block {
        let class = self.0.class(bytes_min);
        let kept = with_local(Arc::as_ptr(&self.0), |local| local?.pop(class));
        let block = kept.unwrap_or_else(|| {
            let mut block = self.0.pop(class, bytes_min);
            block.set_home(Home::Lists(Arc::clone(&self.0)));
            block
        });
        block.lend()
    }

    /// The largest block to allocate in advance, before its bytes are known.
    #[inline]
    pub(crate) fn growth_bytes_max(&self) -> usize {
        self.0.growth_bytes_max
    }

    /// Stops counting blocks as in use: a backend keeps them for the kernel to fill.
    pub(crate) fn set_aside(&self, blocks: usize, bytes: usize) {
        self.0.aside_blocks.fetch_add(blocks, Ordering::Relaxed);
        self.0.aside_bytes.fetch_add(bytes, Ordering::Relaxed);
        self.0.large.set_aside(blocks, bytes);
    }

    /// Counts blocks again that were set aside.
    pub(crate) fn bring_back(&self, blocks: usize, bytes: usize) {
        self.0.aside_blocks.fetch_sub(blocks, Ordering::Relaxed);
        self.0.aside_bytes.fetch_sub(bytes, Ordering::Relaxed);
        self.0.large.bring_back(blocks, bytes);
    }

    /// Counts the blocks. Exact if no other thread allocates or frees at the same time.
    pub(crate) fn stats(&self) -> PoolStats {
        let blocks = self.0.blocks.load(Ordering::Acquire);
        let block_bytes = self.0.block_bytes.load(Ordering::Acquire);
        let (mut free, mut free_bytes) = self.0.large.free();
        for (class, list) in self.0.lists.iter().enumerate() {
            let count = list.len() + self.0.local_counts[class].load(Ordering::Relaxed);
            free += count;
            free_bytes += count * self.0.class_bytes(class);
        }
        let unused = free + self.0.aside_blocks.load(Ordering::Relaxed);
        let unused_bytes = free_bytes + self.0.aside_bytes.load(Ordering::Relaxed);
        PoolStats {
            blocks: blocks.saturating_sub(unused) as u64,
            block_bytes: block_bytes.saturating_sub(unused_bytes) as u64,
            free_bytes: free_bytes as u64,
        }
    }

    /// Memory of all blocks in bytes, without free large blocks. Cheaper than `stats`.
    #[inline]
    pub(crate) fn memory_bytes(&self) -> usize {
        let block_bytes = self.0.block_bytes.load(Ordering::Relaxed);
        block_bytes.saturating_sub(self.0.large.free_bytes())
    }

    /// Frees the free blocks that are not large, except those in the lists of another thread that
    /// is attached.
    pub(crate) fn trim(&self) {
        with_local(Arc::as_ptr(&self.0), |local| local.map(Local::clear));
        for list in &self.0.lists {
            while let Some(block) = list.pop() {
                self.0.destroy(block);
            }
        }
    }

    /// Whether the pool has large blocks, except those that were set aside. If so, the poller calls
    /// [`decay`](Self::decay) in regular intervals.
    #[inline]
    pub(crate) fn has_large_blocks(&self) -> bool {
        self.0.large.exist()
    }

    /// Frees large free blocks that were not needed since the last call: all of them, if no block
    /// of their size was allocated since.
    pub(crate) fn decay(&self) {
        self.0.large.decay().into_iter().for_each(|block| self.0.destroy(block));
    }

    #[cfg(test)]
    pub(super) fn total_blocks(&self) -> usize {
        self.0.blocks.load(Ordering::Relaxed)
    }

    #[cfg(test)]
    pub(super) fn total_bytes(&self) -> usize {
        self.0.block_bytes.load(Ordering::Relaxed)
    }

    fn with_large_bytes(free_large_bytes_max: usize) -> Pool {
        let growth_bytes_max = BLOCK_GROWTH_BYTES_MAX;
        Pool::with_classes(BLOCK_BYTES_MIN, BLOCK_CLASSES, growth_bytes_max, free_large_bytes_max)
    }

    fn with_classes(
        bytes_min: usize,
        count: usize,
        growth_bytes_max: usize,
        free_large_bytes_max: usize,
    ) -> Pool {
        let is_small = |class: &usize| bytes_min << *class < LARGE_BLOCK_BYTES_MIN;
        let small_count = (0..count).filter(is_small).count();
        let list = |class: usize| {
            let count_max = (FREE_BYTES_MAX / (bytes_min << class)).clamp(1, FREE_BLOCKS_MAX);
            ArrayQueue::new(count_max)
        };
        Pool(Arc::new(FreeLists {
            lists: (0..small_count).map(list).collect(),
            local_counts: (0..small_count).map(|_| AtomicUsize::new(0)).collect(),
            large: LargeBlocks::new(count - small_count, free_large_bytes_max),
            class_count: count,
            bytes_min_log2: bytes_min.ilog2(),
            growth_bytes_max,
            blocks: AtomicUsize::new(0),
            block_bytes: AtomicUsize::new(0),
            aside_blocks: AtomicUsize::new(0),
            aside_bytes: AtomicUsize::new(0),
            attached: AtomicBool::new(false),
        }))
    }
}

/// The state of a pool: its free blocks, and counts of all its blocks.
pub(super) struct FreeLists {
    /// The list at index `class` holds blocks of `class_bytes(class)`. Large blocks are in `large`.
    lists: Box<[ArrayQueue<FreeBlock>]>,
    /// Lengths of the attached thread's lists. Only that thread writes them.
    local_counts: Box<[AtomicUsize]>,
    large: LargeBlocks,
    /// How many size classes there are, large ones included.
    class_count: usize,
    bytes_min_log2: u32,
    growth_bytes_max: usize,
    /// All blocks, free or in use.
    blocks: AtomicUsize,
    block_bytes: AtomicUsize,
    /// The part of these that a backend has set aside.
    aside_blocks: AtomicUsize,
    aside_bytes: AtomicUsize,
    /// Whether a thread is attached.
    attached: AtomicBool,
}

impl FreeLists {
    /// The smallest class whose blocks hold `bytes`. It is `class_count` or more if `bytes` exceeds
    /// the largest class.
    #[inline]
    fn class(&self, bytes: usize) -> usize {
        let units = bytes.saturating_sub(1) >> self.bytes_min_log2;
        let class = (usize::BITS - units.leading_zeros()) as usize;
        let fits_before = class > 0 && bytes <= self.class_bytes(class - 1);
        class - usize::from(fits_before)
    }

    #[inline]
    fn class_bytes(&self, class: usize) -> usize {
        with_header_room(1 << (self.bytes_min_log2 as usize + class))
    }

    /// Returns a block that was lent. Its home is at `home`.
    pub(super) fn give_back(home: *const FreeLists, block: FreeBlock) {
        let rejected = with_local(home, |local| match local {
            Some(local) => local.push(block),
            None => Some(block),
        });
        if let Some(mut block) = rejected
            && let Some(Home::Lists(home)) = block.take_home()
        {
            home.push(block.class(), block);
        }
    }

    fn pop(&self, class: usize, bytes_min: usize) -> FreeBlock {
        let free = match self.lists.get(class) {
            Some(list) => list.pop(),
            None => self.large.pop(class - self.lists.len()),
        };
        let is_recycled = class < self.class_count;
        let bytes = if is_recycled { self.class_bytes(class) } else { bytes_min };
        free.unwrap_or_else(|| self.create(bytes, class))
    }

    fn push(&self, class: usize, block: FreeBlock) {
        let rejected = match self.lists.get(class) {
            Some(list) => list.push(block).err(),
            None => self.large.push(class - self.lists.len(), block),
        };
        if let Some(block) = rejected {
            self.destroy(block);
        }
    }

    fn create(&self, bytes: usize, class: usize) -> FreeBlock {
        let block = FreeBlock::new(bytes, class);
        self.blocks.fetch_add(1, Ordering::Relaxed);
        self.block_bytes.fetch_add(bytes, Ordering::Relaxed);
        if class >= self.lists.len() {
            self.large.count_made();
        }
        block
    }

    fn destroy(&self, block: FreeBlock) {
        self.blocks.fetch_sub(1, Ordering::Relaxed);
        self.block_bytes.fetch_sub(block.capacity(), Ordering::Relaxed);
        if block.class() >= self.lists.len() {
            self.large.count_freed();
        }
    }
}

thread_local! {
    /// The free lists of this thread while it is attached to a pool. `Attached` empties the cell,
    /// so it needs no destructor, and a slice may be dropped even while the thread ends.
    static LOCAL: Cell<ManuallyDrop<Option<Box<Local>>>> =
        const { Cell::new(ManuallyDrop::new(None)) };
}

/// Runs `run` with the free lists of the calling thread, if it is attached to the pool of `lists`.
#[inline]
fn with_local<R>(lists: *const FreeLists, run: impl FnOnce(Option<&mut Local>) -> R) -> R {
    let mut local = LOCAL.take();
    let result = run(local.as_deref_mut().filter(|local| Arc::as_ptr(&local.pool) == lists));
    LOCAL.set(local);
    result
}

/// Keeps the calling thread attached to a pool until it is dropped.
#[must_use]
pub(crate) struct Attached(PhantomData<*const ()>);

impl Drop for Attached {
    fn drop(&mut self) {
        if let Some(mut local) = LOCAL.take().take() {
            local.clear();
            local.pool.attached.store(false, Ordering::Release);
        }
    }
}

/// The free lists of an attached thread.
struct Local {
    pool: Arc<FreeLists>,
    /// Free blocks, which keep their reference to the pool.
    lists: Box<[Vec<FreeBlock>]>,
}

impl Local {
    fn new(pool: Arc<FreeLists>) -> Local {
        let count_max =
            |class| (LOCAL_BYTES_MAX / pool.class_bytes(class)).clamp(1, LOCAL_BLOCKS_MAX);
        let lists =
            (0..pool.lists.len()).map(|class| Vec::with_capacity(count_max(class))).collect();
        Local { pool, lists }
    }

    #[inline]
    fn pop(&mut self, class: usize) -> Option<FreeBlock> {
        let list = self.lists.get_mut(class)?;
        let block = list.pop()?;
        self.pool.local_counts[class].store(list.len(), Ordering::Relaxed);
        Some(block)
    }

    /// Returns `block` if its list is full.
    #[inline]
    fn push(&mut self, block: FreeBlock) -> Option<FreeBlock> {
        let class = block.class();
        match self.lists.get_mut(class) {
            Some(list) if list.len() < list.capacity() => {
                list.push(block);
                self.pool.local_counts[class].store(list.len(), Ordering::Relaxed);
                None
            }
            _ => Some(block),
        }
    }

    /// Frees all blocks.
    fn clear(&mut self) {
        for (class, list) in self.lists.iter_mut().enumerate() {
            for block in list.drain(..) {
                self.pool.destroy(block);
            }
            self.pool.local_counts[class].store(0, Ordering::Relaxed);
        }
    }
}
