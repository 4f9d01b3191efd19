//! The rule for received bytes: a backend either lends the block that holds them, or copies them.
//!
//! Lending moves no bytes, but a slice that the user keeps then keeps its whole block. So a backend
//! lends a block only when the received bytes fill a large part of the block.

use super::Received;
use crate::buffer::{Block, Pool};
use crate::config::{LENT_PART_MIN, with_header_room};

/// Whether to lend a block of `block_bytes` that received `bytes`.
pub(super) fn is_lent(bytes: usize, block_bytes: usize) -> bool {
    with_header_room(bytes) >= block_bytes / LENT_PART_MIN
}

/// The `bytes` that `block` received, lent or copied. After lending, `block` is a new block of the
/// same size.
pub(super) fn lend_or_copy<'a>(block: &'a mut Block, bytes: usize, pool: &Pool) -> Received<'a> {
    let block_bytes = block.capacity_left();
    if !is_lent(bytes, block_bytes) {
        return Received::Copied(&block.spare()[..bytes]);
    }
    let filled = std::mem::replace(block, pool.allocate(block_bytes));
    Received::Lent(filled.finish(bytes))
}
