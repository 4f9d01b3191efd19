//! The reference count under every interleaving and every allowed reordering.
//!
//! Run with `RUSTFLAGS="--cfg loom" cargo test --release --lib loom`.

#![forbid(unsafe_code)]

use std::sync::Arc;

use loom::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use loom::thread;

use super::block::{Block, FreeBlock, Home, Slice};

/// Records which readers have read. Its operations are relaxed, so `give_back` sees a read only if
/// the reference count has ordered it.
struct Witness {
    has_read: Vec<AtomicBool>,
    returns: AtomicUsize,
}

impl Witness {
    fn lend(readers: usize) -> (Arc<Witness>, Block) {
        let has_read = (0..readers).map(|_| AtomicBool::new(false)).collect();
        let witness = Arc::new(Witness { has_read, returns: AtomicUsize::new(0) });
        let sees = Arc::clone(&witness);
        let mut block = FreeBlock::new(8, 0);
        block.set_home(Home::Model(Arc::new(move || sees.give_back())));
        let block = block.lend();
        (witness, block)
    }

    fn give_back(&self) {
        for has_read in &self.has_read {
            assert!(has_read.load(Ordering::Relaxed), "reused while read");
        }
        self.returns.fetch_add(1, Ordering::Relaxed);
    }

    fn read_and_drop(&self, reader: usize, slice: Slice) {
        assert!(!slice.is_empty());
        self.has_read[reader].store(true, Ordering::Relaxed);
        drop(slice);
    }
}

#[test]
fn the_last_drop_returns_the_block_once_and_after_every_read() {
    loom::model(|| {
        let (witness, mut block) = Witness::lend(2);
        let threads: Vec<_> = (0..2)
            .map(|reader| {
                let (witness, slice) = (Arc::clone(&witness), block.take(2));
                thread::spawn(move || witness.read_and_drop(reader, slice))
            })
            .collect();
        drop(block);
        for thread in threads {
            thread.join().expect("no panic");
        }
        assert_eq!(witness.returns.load(Ordering::Relaxed), 1);
    });
}

#[test]
fn cutting_a_slice_while_another_thread_drops_its_own_loses_no_reference() {
    loom::model(|| {
        let (witness, mut block) = Witness::lend(3);
        let mut slice = block.take(4);
        drop(block);
        let clone = slice.clone();
        let dropping = {
            let witness = Arc::clone(&witness);
            thread::spawn(move || witness.read_and_drop(0, clone))
        };
        let cutting = {
            let witness = Arc::clone(&witness);
            thread::spawn(move || {
                let front = slice.split_to(2);
                witness.read_and_drop(1, slice);
                witness.read_and_drop(2, front);
            })
        };
        dropping.join().expect("no panic");
        cutting.join().expect("no panic");
        assert_eq!(witness.returns.load(Ordering::Relaxed), 1);
    });
}

#[test]
fn a_block_may_be_finished_while_another_thread_drops_what_was_taken_before() {
    loom::model(|| {
        let (witness, mut block) = Witness::lend(2);
        let earlier = block.take(1);
        let thread = {
            let witness = Arc::clone(&witness);
            thread::spawn(move || witness.read_and_drop(0, earlier))
        };
        witness.read_and_drop(1, block.finish(2));
        thread.join().expect("no panic");
        assert_eq!(witness.returns.load(Ordering::Relaxed), 1);
    });
}

#[test]
fn the_slice_of_a_finished_block_is_counted_like_any_other() {
    loom::model(|| {
        let (witness, block) = Witness::lend(2);
        let slice = block.finish(2);
        let thread = {
            let (witness, clone) = (Arc::clone(&witness), slice.clone());
            thread::spawn(move || witness.read_and_drop(0, clone))
        };
        witness.read_and_drop(1, slice);
        thread.join().expect("no panic");
        assert_eq!(witness.returns.load(Ordering::Relaxed), 1);
    });
}
