//! Random operations on a `LinkBuffer`, beside the vectors that say what must come out.
//!
//! The first byte chooses the block size, every three after it are one operation.

#![no_main]

#[path = "../../tests/buffer_oracle/ops.rs"]
mod ops;

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some((&first, rest)) = data.split_first() else { return };
    let block_bytes = [1, 8, 64, 0][usize::from(first) % 4];
    let codes = rest.chunks_exact(3).map(|op| (op[0], u16::from_le_bytes([op[1], op[2]])));
    ops::run(block_bytes, codes);
});
