//! The memory of one block, and where the block begins in it.

#![forbid(unsafe_code)]

use std::ops::Range;
// The standard atomic: loom's cannot be made in a static.
use std::sync::atomic::{AtomicUsize, Ordering};

use memmap2::MmapMut;

use crate::config::{LARGE_BLOCK_BYTES_MIN, MAPPINGS_MAX};

/// Zeroed bytes.
pub(super) struct Memory {
    bytes: Bytes,
    /// Where the block lies in these bytes.
    block: Range<usize>,
}

enum Bytes {
    Heap(Vec<u8>),
    /// Pages of the system. An allocator may keep the memory of large blocks after their end; these
    /// pages go back at once.
    Mapped(Mapped),
}

/// A mapping that is counted.
struct Mapped(MmapMut);

/// How many mappings there are. A process may have 65,530 of them, for all its purposes, unless its
/// administrator allows more.
static MAPPINGS: AtomicUsize = AtomicUsize::new(0);

impl Mapped {
    /// `None`: there are too many mappings, or the system has no memory for one.
    fn new(bytes: usize) -> Option<Mapped> {
        if MAPPINGS.fetch_add(1, Ordering::Relaxed) < MAPPINGS_MAX
            && let Ok(pages) = MmapMut::map_anon(bytes)
        {
            return Some(Mapped(pages));
        }
        MAPPINGS.fetch_sub(1, Ordering::Relaxed);
        None
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        MAPPINGS.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Memory {
    /// Memory for a block of `len` bytes.
    pub(super) fn new(len: usize) -> Memory {
        let is_large = len >= LARGE_BLOCK_BYTES_MIN;
        let spread = if is_large { PAGE_BYTES } else { 0 };
        let bytes_min = len + LINE_BYTES + spread;
        let mapped = if is_large { Mapped::new(bytes_min) } else { None };
        let bytes = mapped.map_or_else(|| Bytes::Heap(vec![0; bytes_min]), Bytes::Mapped);
        let unused = unused_before_block(bytes.address(), spread);
        Memory { bytes, block: unused..unused + len }
    }

    /// All bytes of `bytes`.
    pub(super) fn from_vec(bytes: Vec<u8>) -> Memory {
        let block = 0..bytes.len();
        Memory { bytes: Bytes::Heap(bytes), block }
    }

    pub(super) fn len(&self) -> usize {
        self.block.len()
    }

    pub(super) fn bytes(&mut self) -> &mut [u8] {
        let bytes: &mut [u8] = match &mut self.bytes {
            Bytes::Heap(bytes) => bytes,
            Bytes::Mapped(Mapped(pages)) => pages,
        };
        &mut bytes[self.block.clone()]
    }
}

impl Bytes {
    fn address(&self) -> usize {
        match self {
            Bytes::Heap(bytes) => bytes.as_ptr().addr(),
            Bytes::Mapped(Mapped(pages)) => pages.as_ptr().addr(),
        }
    }
}

/// How many bytes to leave unused at `address`, so that a block begins at a cache line, and so that
/// blocks begin at different places in their pages. `spread` is the range of these places.
///
/// On AMD's Zen cores, `rep movsb` copies up to 20 times slower if the target's place in its page
/// is 1 to 31 bytes behind the place of the source, and up to twice slower if the target does not
/// begin at half a cache line. The kernel and the C library copy with this instruction. A
/// mapping begins at a page, so a message that is shifted by its length field would meet the slow
/// case again and again.
fn unused_before_block(address: usize, spread: usize) -> usize {
    let places = (spread / LINE_BYTES).max(1);
    // Neighbouring pages get places that lie far apart; 17 has no divisor in common with `places`.
    let place = address / PAGE_BYTES * 17 % places;
    address.wrapping_neg() % LINE_BYTES + place * LINE_BYTES
}

const LINE_BYTES: usize = 64;
const PAGE_BYTES: usize = 4096;
