//! A ring of receive buffers, from which the kernel takes the buffer for each receive.
//!
//! The buffers are blocks of the poller's pool. The kernel fills them in ring order and names each
//! by its number. A ring starts with few blocks, gets all of them when a receive finds none,
//! and gives them back when there is no traffic. A
//! new block replaces a lent block at once, so a slice that the user keeps takes memory and no
//! place in the ring. The poller's thread owns the ring and is its only producer.
//!
//! The block at ring position `p` has the number `p & mask`, so the blocks of a bundle have
//! consecutive numbers.

use std::io;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU16, Ordering};

use io_uring::types::BufRingEntry;

use super::mapping::Mapping;
use super::ring::Ring;
use crate::buffer::{Block, Pool};
use crate::config::uring as config;
use crate::sys::Received;
use crate::sys::lending::is_lent;
use crate::user_code;

pub(super) struct BufferRing {
    /// `None` after the ring was unregistered or leaked.
    slots: Option<Slots>,
    shape: Shape,
    /// By number. The kernel may fill every block that is here.
    blocks: Vec<Option<Block>>,
    /// The ring position of the next block to give to the kernel.
    tail: u16,
    /// How many blocks the kernel may fill.
    ready: usize,
    /// The largest value that `ready` may have.
    ready_max: usize,
    demand: Demand,
    /// How many blocks the pool does not count as in use.
    set_aside: usize,
}

/// How many blocks the kernel fills between two refills.
#[derive(Default)]
struct Demand {
    now: usize,
    /// The most in the last `rounds` refills.
    peak: usize,
    rounds: u32,
    /// The most since the last [`BufferRing::shrink`].
    peak_since_shrink: usize,
}

/// The form of a buffer ring.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    /// The number by which receives name the ring.
    pub(super) group: u16,
    /// How many blocks at most. Rounded up to a power of two.
    pub(super) count: u16,
    /// How many blocks the kernel has until a receive finds none.
    pub(super) first_count: u16,
    /// The size of each block.
    pub(super) bytes: usize,
    /// Several receives may fill one block.
    pub(super) is_incremental: bool,
    /// The number of ready blocks follows the demand.
    pub(super) is_elastic: bool,
}

impl BufferRing {
    /// Registers the ring, and gives its first blocks to the kernel.
    pub(super) fn new(ring: &Ring, shape: Shape, pool: &Pool) -> io::Result<BufferRing> {
        let count = shape.count.next_power_of_two();
        let slots = Slots::new(count)?;
        let flags = if shape.is_incremental { BUFFERS_INCREMENTAL } else { 0 };
        let start = slots.start.as_ptr().expose_provenance() as u64;
        let submitter = ring.io().submitter();
        // SAFETY: `slots` is page aligned and has room for `count` entries. `unregister` unmaps it
        // after the kernel has let it go; `leak` never unmaps it.
        unsafe { submitter.register_buf_ring_with_flags(start, count, shape.group, flags)? };
        let mut buffers = BufferRing {
            slots: Some(slots),
            shape,
            blocks: (0..count).map(|_| None).collect(),
            tail: 0,
            ready: 0,
            ready_max: usize::from(count.min(shape.first_count)),
            // Until the next shrink, the new ring keeps the blocks it begins with.
            demand: Demand { peak_since_shrink: usize::from(count), ..Demand::default() },
            set_aside: 0,
        };
        buffers.refill(pool);
        Ok(buffers)
    }

    pub(super) fn group(&self) -> u16 {
        self.shape.group
    }

    /// How many blocks the kernel may fill.
    pub(super) fn ready(&self) -> usize {
        self.ready
    }

    /// Passes the received bytes of a completion to `each`: `bytes` from the block `first` on, and
    /// from the following blocks where one block does not hold them. Where `is_partly_filled`, the
    /// kernel continues to fill the last block. The kernel has finished with all other blocks.
    ///
    /// # Panics
    /// When the kernel names a block that it does not have.
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
            let block = block.expect("the kernel fills only blocks that it was given");
            let part = left.min(block.capacity_left());
            left -= part;
            let is_kept = is_partly_filled && left == 0;
            let is_whole = block.capacity_left() == self.shape.bytes;
            // The completion for the end of the stream may name a block too.
            if part > 0 {
                // Bytes of a block that several receives fill are always lent: the kernel continues
                // behind these bytes, and does not get the block's start again.
                let shares_block = is_kept || !is_whole;
                if shares_block || is_lent(part, self.shape.bytes) {
                    each(Received::Lent(block.take(part)));
                } else {
                    each(Received::Copied(&block.spare()[..part]));
                }
            }
            if is_kept {
                return;
            }
            self.take_back(number);
            if left == 0 {
                return;
            }
            number = (number + 1) & self.mask();
        }
    }

    /// Takes a block back that the kernel has finished with.
    fn take_back(&mut self, number: u16) {
        self.ready -= 1;
        self.demand.now += 1;
        let Some(block) = self.blocks[usize::from(number)].take() else { return };
        // The kernel can have a whole block again at once, so the memory of few blocks stays in the
        // CPU cache. `refill` replaces the other blocks.
        let place = usize::from(self.tail & self.mask());
        if block.capacity_left() == self.shape.bytes
            && self.blocks[place].is_none()
            && self.ready < self.ready_max
        {
            self.provide(place, block);
            self.publish();
        }
    }

    /// Gives the kernel new blocks in ring order, up to `ready_max`.
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
        self.account(self.ready, pool);
    }

    /// Notes that a receive found no block. Until the next shrink, the kernel gets as many blocks
    /// as fit.
    pub(super) fn ran_dry(&mut self) {
        self.ready_max = self.blocks.len();
        self.demand = Demand { peak_since_shrink: self.blocks.len(), ..Demand::default() };
    }

    /// Whether the kernel has more blocks than an idle poller keeps ready.
    pub(super) fn has_grown(&self) -> bool {
        self.ready > self.idle_count()
    }

    /// Takes back the blocks beyond twice the demand since the last call, except those that an
    /// idle poller keeps ready. The kernel must not take blocks meanwhile, and every completion
    /// that names a block must have been taken.
    pub(super) fn shrink(&mut self, pool: &Pool) {
        let peak = std::mem::take(&mut self.demand).peak_since_shrink;
        let needed = (2 * peak).next_power_of_two();
        self.ready_max = self.ready_max.min(needed.max(self.idle_count()));
        let mut unneeded = Vec::new();
        while self.ready > self.ready_max {
            let place = usize::from(self.tail.wrapping_sub(1) & self.mask());
            // The kernel continues to fill a block that several receives share.
            let is_whole = |block: &mut Block| block.capacity_left() == self.shape.bytes;
            let Some(block) = self.blocks[place].take_if(is_whole) else { break };
            unneeded.push(block);
            self.tail = self.tail.wrapping_sub(1);
            self.ready -= 1;
        }
        // The kernel must not see these blocks when the pool has them.
        self.publish();
        drop(unneeded);
        self.account(self.ready, pool);
    }

    fn idle_count(&self) -> usize {
        let first_count = usize::from(self.shape.first_count);
        let count = if self.shape.is_elastic { config::READY_BLOCKS_MIN } else { first_count };
        count.min(self.blocks.len())
    }

    /// Limits the ready blocks of an elastic ring to twice the peak demand. The kernel fills blocks
    /// in ring order, so the memory of few blocks stays in the CPU cache.
    fn settle_demand(&mut self) {
        let demand = &mut self.demand;
        let now = std::mem::take(&mut demand.now);
        demand.peak = demand.peak.max(now);
        demand.peak_since_shrink = demand.peak_since_shrink.max(now);
        demand.rounds += 1;
        if demand.rounds < config::DEMAND_ROUNDS || !self.shape.is_elastic {
            return;
        }
        let wanted = (2 * demand.peak).next_power_of_two();
        self.ready_max =
            wanted.clamp(config::READY_BLOCKS_MIN.min(self.blocks.len()), self.blocks.len());
        (demand.peak, demand.rounds) = (0, 0);
    }

    /// Tells the pool how many blocks the kernel has.
    fn account(&mut self, blocks: usize, pool: &Pool) {
        let bytes = |blocks: usize| blocks * self.shape.bytes;
        if blocks > self.set_aside {
            pool.set_aside(blocks - self.set_aside, bytes(blocks - self.set_aside));
        } else if blocks < self.set_aside {
            pool.bring_back(self.set_aside - blocks, bytes(self.set_aside - blocks));
        }
        self.set_aside = blocks;
    }

    /// Unregisters the ring, and returns its blocks to the pool. No receive that uses the ring may
    /// be in flight.
    pub(super) fn unregister(&mut self, ring: &Ring, pool: &Pool) {
        if let Err(error) = ring.io().submitter().unregister_buf_ring(self.shape.group) {
            user_code::log(|| tracing::error!(%error, "unregister receive buffers"));
            return self.leak();
        }
        self.account(0, pool);
        self.slots = None;
        self.blocks.clear();
    }

    /// Never frees the memory: the kernel may still write to it.
    pub(super) fn leak(&mut self) {
        std::mem::forget(self.slots.take());
        std::mem::forget(std::mem::take(&mut self.blocks));
    }

    fn provide(&mut self, place: usize, mut block: Block) {
        let start = block.spare().as_mut_ptr();
        // The kernel writes through this address after the borrow has ended. Meanwhile the block is
        // in `blocks`. `take_filled` reads the block only after a completion has named it, and then
        // only the bytes that the kernel has written.
        if let Some(slots) = &mut self.slots {
            slots.set(place, start.expose_provenance() as u64, self.shape.bytes);
        }
        self.blocks[place] = Some(block);
        self.tail = self.tail.wrapping_add(1);
        self.ready += 1;
    }

    fn publish(&self) {
        if let Some(slots) = &self.slots {
            // Release: when the kernel sees the tail, it sees the entries before the tail.
            slots.tail().store(self.tail, Ordering::Release);
        }
    }

    fn mask(&self) -> u16 {
        self.blocks.len() as u16 - 1
    }
}

/// The ring's memory, which the kernel reads. The `resv` field of entry 0 is the tail, so entries
/// are written field by field, never whole.
struct Slots {
    start: NonNull<BufRingEntry>,
    count: usize,
    _memory: Mapping,
}

impl Slots {
    fn new(count: u16) -> io::Result<Slots> {
        let count = usize::from(count);
        let memory = Mapping::memory(count * size_of::<BufRingEntry>())?;
        Ok(Slots { start: memory.start().cast(), count, _memory: memory })
    }

    fn set(&mut self, place: usize, address: u64, bytes: usize) {
        assert!(place < self.count, "place {place} of {}", self.count);
        // SAFETY: the assertion keeps the place inside the mapping.
        let mut entry = unsafe { self.start.add(place) };
        // SAFETY: the mapping is zeroed memory, which is an initialised entry. The kernel reads the
        // entry only after the tail has passed it.
        let entry = unsafe { entry.as_mut() };
        entry.set_addr(address);
        entry.set_len(bytes as u32);
        entry.set_bid(place as u16);
    }

    fn tail(&self) -> &AtomicU16 {
        // SAFETY: the mapping holds at least one entry.
        let tail = unsafe { BufRingEntry::tail(self.start.as_ptr()) };
        // SAFETY: the tail is two-aligned and inside the mapping. All writes to it are atomic, and
        // the kernel only reads it.
        unsafe { AtomicU16::from_ptr(tail.cast_mut()) }
    }
}

impl Drop for BufferRing {
    fn drop(&mut self) {
        // The ring was neither unregistered nor leaked when its set-up failed, or when its owner
        // panicked. Leaking twice does no harm.
        self.leak();
    }
}

/// `IOU_PBUF_RING_INC` of uapi/linux/io_uring.h.
const BUFFERS_INCREMENTAL: u16 = 2;
