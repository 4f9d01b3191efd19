//! The memory of one block, and where the block begins in it.

#![forbid(unsafe_code)]

use crate::config::LARGE_BLOCK_BYTES_MIN;

/// Zeroed bytes.
pub(super) struct Memory {
    bytes: Vec<u8>,
    /// How many bytes lie before the block.
    unused: usize,
}

impl Memory {
    /// Memory for a block of `len` bytes.
    pub(super) fn new(len: usize) -> Memory {
        let spread = if len < LARGE_BLOCK_BYTES_MIN { 0 } else { PAGE_BYTES };
        let mut bytes = vec![0; len + LINE_BYTES + spread];
        let unused = unused_before_block(bytes.as_ptr().addr(), spread);
        bytes.truncate(unused + len);
        Memory { bytes, unused }
    }

    /// All bytes of `bytes`.
    pub(super) fn from_vec(bytes: Vec<u8>) -> Memory {
        Memory { bytes, unused: 0 }
    }

    pub(super) fn len(&self) -> usize {
        self.bytes.len() - self.unused
    }

    pub(super) fn bytes(&mut self) -> &mut [u8] {
        &mut self.bytes[self.unused..]
    }
}

/// How many bytes to leave unused at `address`, so that a block begins at a cache line, and so that
/// blocks begin at different places in their pages. `spread` is the range of these places.
///
/// On AMD's Zen cores, `rep movsb` copies up to 20 times slower if the target's place in its page
/// is 1 to 31 bytes behind the place of the source, and up to twice slower if the target does not
/// begin at half a cache line. The kernel and the C library copy with this instruction. The
/// allocator gives most large blocks the same place, so a message that is shifted by its length
/// field would meet the slow case again and again.
fn unused_before_block(address: usize, spread: usize) -> usize {
    let places = (spread / LINE_BYTES).max(1);
    // Neighbouring pages get places that lie far apart; 17 has no divisor in common with `places`.
    let place = address / PAGE_BYTES * 17 % places;
    address.wrapping_neg() % LINE_BYTES + place * LINE_BYTES
}

const LINE_BYTES: usize = 64;
const PAGE_BYTES: usize = 4096;
