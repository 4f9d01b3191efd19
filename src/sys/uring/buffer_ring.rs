//! Receive buffers that the kernel chooses from.
//!
//! A ring of blocks of the poller's pool. The kernel fills them in ring order and names each by its
//! number; a block that is handed on is replaced by another of the pool at once, so whoever keeps a
//! slice for long takes memory, not a place in the ring. Owned by the poller's thread, the only
//! producer.
//!
//! A buffer's number is its place: the block at ring position `p` is number `p & mask`, so
//! neighbours in a bundle follow one another.

use std::io;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU16, Ordering};

use io_uring::types::BufRingEntry;

use super::mapping::Mapping;
use super::ring::Ring;
use crate::buffer::{Block, Pool};
use crate::config::uring as config;
use crate::sys::Received;

pub(super) struct BufferRing {
    /// `None` once the ring is given back, or given up.
    entries: Option<Entries>,
    shape: Shape,
    blocks: Vec<Option<Block>>,
    /// From this length on bytes are lent; fewer are copied, so that a byte never pins a block.
    lend_bytes_min: usize,
    /// Position of the next block to be given to the kernel.
    tail: u16,
    /// Blocks the kernel may fill.
    ready: usize,
    /// How many it may have: all, or fewer where fewer do.
    ready_max: usize,
    demand: Demand,
    /// Blocks that the pool does not count as in use.
    aside: usize,
}

/// How many blocks are filled between two refills.
#[derive(Default)]
struct Demand {
    now: usize,
    peak: usize,
    rounds: u32,
}

/// What a buffer ring is to be.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    /// What receives name the ring by.
    pub(super) group: u16,
    /// How many blocks; rounded up to a power of two.
    pub(super) count: u16,
    /// Of each block.
    pub(super) bytes: usize,
    /// A receive that fills at least this part of its block is lent.
    pub(super) lent_part_min: usize,
    /// Several receives may fill one block.
    pub(super) is_incremental: bool,
    /// There may be fewer where fewer do.
    pub(super) is_elastic: bool,
}

impl BufferRing {
    /// Registers the ring, with all of its blocks for the kernel to fill.
    pub(super) fn new(ring: &Ring, shape: Shape, pool: &Pool) -> io::Result<BufferRing> {
        let count = shape.count.next_power_of_two();
        let entries = Entries::new(count)?;
        let flags = if shape.is_incremental { BUFFERS_INCREMENTAL } else { 0 };
        let start = entries.start.as_ptr().expose_provenance() as u64;
        let submitter = ring.io().submitter();
        // SAFETY: `entries` has room for `count` entries, page aligned; it is unmapped after
        // `unregister`, or never.
        unsafe { submitter.register_buf_ring_with_flags(start, count, shape.group, flags)? };
        let mut buffers = BufferRing {
            entries: Some(entries),
            shape,
            blocks: (0..count).map(|_| None).collect(),
            lend_bytes_min: shape.bytes / shape.lent_part_min,
            tail: 0,
            ready: 0,
            ready_max: usize::from(count),
            demand: Demand::default(),
            aside: 0,
        };
        buffers.refill(pool);
        Ok(buffers)
    }

    pub(super) fn group(&self) -> u16 {
        self.shape.group
    }

    /// Blocks the kernel may fill.
    pub(super) fn ready(&self) -> usize {
        self.ready
    }

    /// Passes on what a completion reports: `bytes` from the block of number `first` on, in as many
    /// of its neighbours as they fill. The kernel goes on filling the last block where it
    /// `is_partly_filled`; the others are given up, and those that nothing was lent of are filled
    /// again.
    ///
    /// # Panics
    /// When the kernel names a block that it was not given.
    pub(super) fn take_filled(
        &mut self,
        first: u16,
        bytes: usize,
        is_partly_filled: bool,
        mut each: impl FnMut(Received<'_>),
    ) {
        let (mut number, mut left) = (first, bytes);
        loop {
            let block = self.blocks[usize::from(number)].as_mut();
            let block = block.expect("the kernel fills only what it was given");
            let part = left.min(block.capacity_left());
            left -= part;
            let is_kept = is_partly_filled && left == 0;
            let is_whole = block.capacity_left() == self.shape.bytes;
            if part == 0 {
                // An end of stream may come with a buffer.
            } else if part >= self.lend_bytes_min || is_kept || !is_whole {
                each(Received::Lent(block.take(part)));
            } else {
                each(Received::Copied(&block.spare()[..part]));
            }
            if is_kept {
                return;
            }
            self.give_up(number);
            if left == 0 {
                return;
            }
            number = (number + 1) & self.mask();
        }
    }

    /// The kernel is through with the block.
    fn give_up(&mut self, number: u16) {
        self.ready -= 1;
        self.demand.now += 1;
        let Some(block) = self.blocks[usize::from(number)].take() else { return };
        // The usual case: blocks come back in the order in which they went, and this one can go
        // again. `refill` replaces all others.
        if block.capacity_left() == self.shape.bytes
            && number == self.tail & self.mask()
            && self.ready < self.ready_max
        {
            self.provide(usize::from(number), block);
            self.publish();
        }
    }

    /// Fills free places in ring order, as many as there is demand for.
    pub(super) fn refill(&mut self, pool: &Pool) {
        self.settle_demand();
        let before = self.tail;
        while self.ready < self.ready_max {
            let place = usize::from(self.tail & self.mask());
            if self.blocks[place].is_some() {
                break;
            }
            let block = pool.allocate(self.shape.bytes);
            self.provide(place, block);
        }
        if self.tail != before {
            self.publish();
        }
        self.set_aside(self.ready, pool);
    }

    /// A receive found no block: from now on there are as many as fit.
    pub(super) fn ran_dry(&mut self) {
        self.ready_max = self.blocks.len();
        self.demand = Demand::default();
    }

    /// The kernel fills blocks in turn. Those that it comes to first are still cached where there
    /// are few of them; so a ring of large ones has no more than twice what it fills at once.
    fn settle_demand(&mut self) {
        let demand = &mut self.demand;
        demand.peak = demand.peak.max(std::mem::take(&mut demand.now));
        demand.rounds += 1;
        if demand.rounds < config::DEMAND_ROUNDS || !self.shape.is_elastic {
            return;
        }
        let wanted = (2 * demand.peak).next_power_of_two();
        self.ready_max =
            wanted.clamp(config::READY_BLOCKS_MIN.min(self.blocks.len()), self.blocks.len());
        self.demand = Demand::default();
    }

    /// Tells the pool what the kernel has.
    fn set_aside(&mut self, blocks: usize, pool: &Pool) {
        let bytes = |blocks: usize| blocks * self.shape.bytes;
        if blocks > self.aside {
            pool.set_aside(blocks - self.aside, bytes(blocks - self.aside));
        } else if blocks < self.aside {
            pool.bring_back(self.aside - blocks, bytes(self.aside - blocks));
        }
        self.aside = blocks;
    }

    /// Gives the ring back; its blocks return to their pool. Nothing may be armed with it.
    pub(super) fn unregister(&mut self, ring: &Ring, pool: &Pool) {
        if let Err(error) = ring.io().submitter().unregister_buf_ring(self.shape.group) {
            tracing::error!(%error, "unregister receive buffers");
            return self.leak();
        }
        self.set_aside(0, pool);
        self.entries = None;
        self.blocks.clear();
    }

    /// Keeps the memory for ever: the kernel may still write to it.
    pub(super) fn leak(&mut self) {
        std::mem::forget(self.entries.take());
        std::mem::forget(std::mem::take(&mut self.blocks));
    }

    fn provide(&mut self, place: usize, mut block: Block) {
        let start = block.spare().as_mut_ptr();
        // The kernel writes through this address after the borrow has ended, so the block must not
        // be used meanwhile: it lies in `blocks`, and `take_filled` looks at it only when a
        // completion names it, and then only at what the kernel has filled.
        if let Some(entries) = &mut self.entries {
            entries.set(place, start.expose_provenance() as u64, self.shape.bytes);
        }
        self.blocks[place] = Some(block);
        self.tail = self.tail.wrapping_add(1);
        self.ready += 1;
    }

    fn publish(&self) {
        if let Some(entries) = &self.entries {
            // Release: the kernel that sees the tail sees the entries before it.
            entries.tail().store(self.tail, Ordering::Release);
        }
    }

    fn mask(&self) -> u16 {
        self.blocks.len() as u16 - 1
    }
}

/// The shared memory of the ring. The `resv` field of entry 0 is the tail: entries are written
/// field by field, never whole.
struct Entries {
    start: NonNull<BufRingEntry>,
    count: usize,
    _memory: Mapping,
}

impl Entries {
    fn new(count: u16) -> io::Result<Entries> {
        let count = usize::from(count);
        let memory = Mapping::memory(count * size_of::<BufRingEntry>())?;
        Ok(Entries { start: memory.start().cast(), count, _memory: memory })
    }

    fn set(&mut self, place: usize, address: u64, bytes: usize) {
        assert!(place < self.count, "place {place} of {}", self.count);
        // SAFETY: the place is inside the mapping (asserted).
        let mut entry = unsafe { self.start.add(place) };
        // SAFETY: the mapping is zeroed memory, which is an initialised entry; the kernel does not
        // look at it before the tail has passed it.
        let entry = unsafe { entry.as_mut() };
        entry.set_addr(address);
        entry.set_len(bytes as u32);
        entry.set_bid(place as u16);
    }

    fn tail(&self) -> &AtomicU16 {
        // SAFETY: the mapping holds at least one entry.
        let tail = unsafe { BufRingEntry::tail(self.start.as_ptr()) };
        // SAFETY: it is two-aligned, inside the mapping, and written by nobody else but through
        // atomics; the kernel only reads it.
        unsafe { AtomicU16::from_ptr(tail.cast_mut()) }
    }
}

impl Drop for BufferRing {
    fn drop(&mut self) {
        // Neither given back nor given up: the ring's set-up failed, or its owner panicked.
        self.leak();
    }
}

/// `IOU_PBUF_RING_INC` of uapi/linux/io_uring.h.
const BUFFERS_INCREMENTAL: u16 = 2;
