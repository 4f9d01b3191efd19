//! `LinkBuffer` against plain vectors, with random operations.
//!
//! A failure prints the shortest list of operations that still fails.

mod ops;

use proptest::collection::vec;
use proptest::prelude::*;

proptest! {
    #![proptest_config(config())]

    #[test]
    fn any_operations_give_the_bytes_a_vector_would(
        block_bytes in prop::sample::select(vec![1_usize, 8, 64, 0]),
        codes in vec(any::<(u8, u16)>(), 0..200),
    ) {
        ops::run(block_bytes, codes);
    }
}

/// A failure prints what it takes to repeat it, so no file has to remember it.
fn config() -> ProptestConfig {
    ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(512) }
}
