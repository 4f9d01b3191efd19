//! Internals that users cannot see: merging, returned memory, counts, and costs of usual
//! operations.

#![forbid(unsafe_code)]

use std::hint::black_box;
use std::thread;
use std::time::Instant;

use super::*;
use crate::config::{BLOCK_BYTES_MIN, BLOCK_CLASSES, CHAIN_PIECES_KEPT};
use crate::config::{FREE_LARGE_BYTES_MAX, LARGE_BLOCK_BYTES_MIN, with_header_room};

#[test]
fn the_sizes_that_are_moved_around_stay_small() {
    assert_eq!(size_of::<Slice>(), 24);
    assert_eq!(size_of::<Option<Slice>>(), 24);
    assert_eq!(size_of::<Option<Block>>(), 32);
    assert_eq!(size_of::<Chain>(), 96);
}

#[test]
fn blocks_begin_at_a_cache_line_and_large_ones_at_different_places_in_their_pages() {
    let pool = Pool::new();
    for class in 0..BLOCK_CLASSES {
        let bytes = with_header_room(BLOCK_BYTES_MIN << class);
        let mut blocks: Vec<Block> = (0..16).map(|_| pool.allocate(bytes)).collect();
        let place = |block: &mut Block| {
            assert_eq!(block.capacity_left(), bytes);
            let spare = block.spare();
            (spare[0], spare[bytes - 1]) = (1, 1);
            spare.as_ptr().addr() % 4096
        };
        let mut places: Vec<usize> = blocks.iter_mut().map(place).collect();
        assert!(places.iter().all(|place| place % 64 == 0), "{bytes}: {places:?}");
        places.sort_unstable();
        places.dedup();
        if bytes >= LARGE_BLOCK_BYTES_MIN {
            assert!(places.len() > 2, "{bytes}: {places:?}");
        }
    }
}

#[test]
fn neighbouring_slices_of_one_block_become_one() {
    let mut block = Pool::new().allocate(512);
    let mut chain = Chain::new();
    for byte in 0..10 {
        block.spare()[0] = byte;
        chain.push(block.take(1));
    }
    assert_eq!(pieces(&chain), [(0..10).collect::<Vec<u8>>()]);
    block.take(1);
    chain.push(block.take(1));
    assert_eq!(chain.slices().count(), 2, "there is a gap between them");
}

#[test]
fn neighbours_in_different_memory_stay_apart() {
    static BYTES: [u8; 4] = *b"abcd";
    let mut chain = Chain::new();
    chain.push(Slice::from(&BYTES[..2]));
    chain.push(Slice::from(&BYTES[2..]));
    assert_eq!(chain.slices().count(), 2);
}

#[test]
fn many_small_writes_take_few_blocks() {
    let pool = Pool::new();
    let mut chain = Chain::new();
    for _ in 0..100_000 {
        chain.write_copy(b"x", &pool);
    }
    // 528 B, 528 B, 1 KB, … 33 KB, and 66 KB from there on.
    assert_eq!(chain.slices().count(), 9);
    assert_eq!(pool.stats().blocks, 9);
}

#[test]
fn many_small_replies_take_few_blocks() {
    let pool = Pool::new();
    let mut staging = Staging::default();
    for reply in 0..64 {
        staging.write_copy(&[reply; 1028], &pool);
    }
    assert_eq!((staging.len(), pool.stats().blocks), (64 * 1028, 7));
    let copied = staging.sealed().next(64 * 1028, &pool).expect("written");
    assert!(copied.chunks(1028).zip(0..).all(|(reply, byte)| reply.iter().all(|&it| it == byte)));
}

/// A copied write ends the reservation before it, also where both lie in one block.
#[test]
fn a_commit_drops_nothing_that_was_copied() {
    let pool = Pool::new();
    let mut staging = Staging::default();
    staging.reserve(4, &pool).copy_from_slice(b"head");
    staging.write_copy(b"body", &pool);
    assert!(staging.commit(1).is_err(), "nothing is reserved");
    staging.reserve(4, &pool).copy_from_slice(b"tail");
    staging.commit(2).expect("reserved");
    assert_eq!(staging.sealed().next(10, &pool).expect("written"), b"headbodyta");
}

#[test]
fn an_empty_chain_owns_no_block() {
    let pool = Pool::new();
    let mut chain = Chain::new();
    chain.write_copy(&[1; 100], &pool);
    assert_eq!(pool.stats().blocks, 1);
    drop(chain.next(100, &pool));
    assert_eq!(in_use(&pool), (0, 0));
    chain.write_copy(&[1; 100], &pool);
    chain.advance(100);
    assert_eq!(in_use(&pool), (0, 0));
    chain.write_copy(&[1; 100], &pool);
    chain.truncate(0);
    assert_eq!(in_use(&pool), (0, 0));
    chain.write_copy(&[1; 100], &pool);
    chain.clear();
    assert_eq!(in_use(&pool), (0, 0));

    let mut staging = Staging::default();
    staging.reserve(100, &pool);
    drop(staging.sealed().take());
    assert_eq!(in_use(&pool), (0, 0));
}

#[test]
fn a_long_queue_is_freed_when_the_chain_is_empty() {
    for empty in [|chain: &mut Chain| chain.advance(50_000), Chain::clear] {
        let mut chain = Chain::new();
        for _ in 0..10_000 {
            chain.push(Slice::from("piece"));
        }
        empty(&mut chain);
        assert!(chain.is_empty() && chain.slices().next().is_none());
        assert!(chain.queue_capacity() <= CHAIN_PIECES_KEPT);
    }
}

#[test]
fn a_few_appended_bytes_are_copied_into_the_spare() {
    let pool = Pool::new();
    let mut chain = Chain::new();
    chain.write_copy(&[0], &pool);
    for byte in 1..=255 {
        let mut other = Chain::new();
        other.write_copy(&[byte], &pool);
        chain.append(&mut other);
        assert!(other.is_empty());
    }
    assert_eq!(pieces(&chain), [(0..=255).collect::<Vec<u8>>()]);
    assert_eq!(pool.stats().blocks, 1);
}

/// The caller may hold a lock, under which no destructor of the user's may run.
#[test]
fn appended_bytes_of_the_user_are_not_dropped_however_few_they_are() {
    struct Owner {
        _alive: std::sync::Arc<()>,
    }
    impl AsRef<[u8]> for Owner {
        fn as_ref(&self) -> &[u8] {
            b"of the user"
        }
    }
    let (pool, alive) = (Pool::new(), std::sync::Arc::new(()));
    let mut chain = Chain::new();
    chain.write_copy(&[0; 100], &pool);
    let mut other = Chain::new();
    other.push(Slice::from(bytes::Bytes::from_owner(Owner { _alive: alive.clone() })));
    chain.append(&mut other);
    assert_eq!(std::sync::Arc::strong_count(&alive), 2, "it was dropped");
    let mut spent = Spent::default();
    chain.spend(chain.len(), &mut spent);
    assert_eq!((chain.len(), std::sync::Arc::strong_count(&alive)), (0, 2), "spent, and kept");
    drop(spent);
    assert_eq!(std::sync::Arc::strong_count(&alive), 1);
}

#[test]
fn an_appended_chain_brings_its_spare_along() {
    let pool = Pool::new();
    let (mut chain, mut other) = (Chain::new(), Chain::new());
    chain.write_copy(&[1; 528], &pool);
    other.write_copy(&[2; 300], &pool);
    chain.append(&mut other);
    assert_eq!(chain.capacity_left(), 228);
    chain.write_copy(&[3; 228], &pool);
    assert_eq!(chain.slices().map(|slice| slice.len()).collect::<Vec<_>>(), [528, 528]);
}

#[test]
fn next_and_peek_copy_only_what_spans_and_peek_only_once() {
    let pool = Pool::with_block_bytes(8);
    let mut chain = Chain::new();
    chain.write_copy(&[1; 8], &pool);
    chain.write_copy(&[2; 8], &pool);
    let front = chain.front_slice().as_ptr();
    assert_eq!(chain.peek(8, &pool).expect("buffered").as_ptr(), front);
    assert_eq!(chain.next(4, &pool).expect("buffered").as_ptr(), front);

    let joined = chain.peek(6, &pool).expect("buffered");
    assert_eq!(joined, [1, 1, 1, 1, 2, 2]);
    assert_eq!(chain.peek(6, &pool).expect("buffered").as_ptr(), joined.as_ptr());
    assert_eq!(chain.next(6, &pool).expect("buffered").as_ptr(), joined.as_ptr());
    assert_eq!(chain.len(), 6);
}

#[test]
fn iovs_cover_the_front_and_an_advance_may_end_anywhere() {
    let pool = Pool::with_block_bytes(8);
    let mut chain = Chain::new();
    for byte in 0..4 {
        chain.write_copy(&[byte; 8], &pool);
    }
    let mut iovs = [std::io::IoSlice::new(&[]); 3];
    assert_eq!(chain.fill_iovs(&mut iovs), (3, 24));
    assert_eq!(&*iovs[2], [2; 8]);
    chain.advance(11);
    let mut iovs = [std::io::IoSlice::new(&[]); 8];
    assert_eq!(chain.fill_iovs(&mut iovs), (3, 21));
    assert_eq!(&*iovs[0], [1; 5]);
    assert_eq!(chain.find(3, 0), Some(13));
    assert_eq!(chain.find(3, 20), Some(20));
    assert_eq!(chain.find(3, 21), None);
    let bytes: Vec<u8> = chain.slices().flat_map(|piece| piece.to_vec()).collect();
    for (byte, from) in (0..5).flat_map(|byte| (0..=bytes.len()).map(move |from| (byte, from))) {
        let index = bytes[from..].iter().position(|other| *other == byte);
        assert_eq!(chain.find(byte, from), index.map(|index| from + index), "{byte} from {from}");
    }
}

#[test]
fn size_classes_round_up_and_beyond_the_largest_is_exact() {
    let pool = Pool::new();
    let of_64_kib = (64 << 10) + (2 << 10);
    let classes = [
        (0, 528),
        (528, 528),
        (529, 1056),
        (65_536, of_64_kib),
        (of_64_kib, of_64_kib),
        (of_64_kib + 1, 2 * of_64_kib),
    ];
    for (bytes, capacity) in classes {
        assert_eq!(pool.allocate(bytes).capacity_left(), capacity, "{bytes}");
    }
    let largest = with_header_room(BLOCK_BYTES_MIN << (BLOCK_CLASSES - 1));
    assert_eq!(pool.allocate(largest / 2 + 1).capacity_left(), largest);
    assert_eq!(pool.allocate(largest + 1).capacity_left(), largest + 1);
    assert_eq!(in_use(&pool), (0, 0));
}

#[test]
fn a_block_is_in_use_until_its_last_slice_is_dropped_on_any_thread() {
    let pool = Pool::new();
    let mut block = pool.allocate(1000);
    let slice = block.take(10);
    assert_eq!(in_use(&pool), (1, 1056));
    drop(block);
    assert_eq!(in_use(&pool), (1, 1056));
    let start = slice.as_ptr();
    thread::spawn(move || drop(slice)).join().expect("no panic");
    assert_eq!(in_use(&pool), (0, 0));
    assert_eq!(pool.allocate(1000).take(1).as_ptr(), start, "the memory is used again");
}

#[test]
fn an_attached_thread_recycles_through_lists_of_its_own() {
    let pool = Pool::new();
    let attached = pool.attach();
    let block = pool.allocate(1000);
    assert_eq!(pool.stats().blocks, 1);
    drop(block);
    assert_eq!(in_use(&pool), (0, 0));
    let mut blocks: Vec<Block> = (0..200).map(|_| pool.allocate(1000)).collect();
    assert_eq!(pool.stats().blocks, 200);
    // More than the lists of this thread keep, and some from another thread.
    let others = blocks.split_off(100);
    thread::spawn(move || drop(others)).join().expect("no panic");
    assert_eq!(pool.stats().blocks, 100);
    drop(blocks);
    assert_eq!(in_use(&pool), (0, 0));
    assert!(pool.total_blocks() > 100);
    pool.trim();
    assert_eq!(pool.total_blocks(), 0);

    let kept = pool.allocate(1000);
    drop(attached);
    drop(kept);
    assert_eq!((pool.stats().blocks, pool.total_blocks()), (0, 1));
    drop(pool.attach());
}

#[test]
fn a_thread_attached_to_one_pool_uses_others_all_the_same() {
    let (pool, other) = (Pool::new(), Pool::new());
    let _attached = pool.attach();
    drop(other.allocate(1000));
    drop(pool.allocate(1000));
    assert_eq!((pool.total_blocks(), other.total_blocks()), (1, 1));
    let second = thread::spawn(move || drop(pool.attach())).join();
    assert!(second.is_err(), "one thread at a time");
}

#[test]
fn a_pool_may_be_dropped_before_its_slices() {
    let pool = Pool::new();
    let attached = pool.attach();
    let slice = pool.allocate(1000).take(1000);
    let other = pool.allocate(1000).take(1000);
    drop(pool);
    drop(other);
    drop(attached);
    assert_eq!(slice.len(), 1000);
}

#[test]
fn free_memory_is_bounded() {
    let pool = Pool::new();
    let attached = pool.attach();
    for class in 0..BLOCK_CLASSES {
        let bytes = BLOCK_BYTES_MIN << class;
        // More than is kept: of each small class, and of large blocks in all.
        let count = 2 * FREE_LARGE_BYTES_MAX.min(bytes * 1000) / bytes;
        let blocks: Vec<Block> = (0..count).map(|_| pool.allocate(bytes)).collect();
        assert_eq!(pool.stats().blocks, count as u64);
        drop(blocks);
    }
    assert_eq!(in_use(&pool), (0, 0));
    let small_bytes_max = 5 << 20;
    let kept_bytes = pool.total_bytes();
    assert_eq!(pool.stats().free_bytes, kept_bytes as u64);
    assert!(kept_bytes > FREE_LARGE_BYTES_MAX, "{kept_bytes} bytes are kept");
    assert!(kept_bytes < FREE_LARGE_BYTES_MAX + small_bytes_max, "{kept_bytes} bytes are kept");
    // The first decay sees that blocks of each size were taken, the second that none was.
    pool.decay();
    pool.decay();
    assert!(!pool.has_large_blocks());
    assert!(pool.total_bytes() < small_bytes_max, "{} bytes are kept", pool.total_bytes());
    pool.trim();
    assert_eq!((pool.total_blocks(), pool.total_bytes()), (0, 0));
    drop(attached);
}

#[test]
fn large_blocks_that_were_set_aside_need_no_decay() {
    let pool = Pool::new();
    let aside = pool.allocate(LARGE_BLOCK_BYTES_MIN);
    assert!(pool.has_large_blocks());
    pool.set_aside(1, LARGE_BLOCK_BYTES_MIN);
    assert!(!pool.has_large_blocks());
    drop(pool.allocate(LARGE_BLOCK_BYTES_MIN / 2));
    assert!(!pool.has_large_blocks());
    drop(pool.allocate(LARGE_BLOCK_BYTES_MIN));
    assert!(pool.has_large_blocks(), "a free block");
    pool.bring_back(1, LARGE_BLOCK_BYTES_MIN);
    drop(aside);
    pool.decay();
    pool.decay();
    assert_eq!(pool.total_blocks(), 1, "the small one");
}

#[test]
fn large_blocks_are_recycled_between_threads_and_last_in_first_out() {
    let pool = Pool::new();
    let _attached = pool.attach();
    let bytes = (1 << 20) + 4;
    let (first, second) = (pool.allocate(bytes).take(bytes), pool.allocate(bytes).take(bytes));
    let (first_start, second_start) = (first.as_ptr(), second.as_ptr());
    drop(second);
    thread::spawn(move || drop(first)).join().expect("no panic");
    assert_eq!(pool.allocate(bytes).take(1).as_ptr(), first_start);
    let again = [pool.allocate(bytes).take(1), pool.allocate(bytes).take(1)];
    assert_eq!(again.map(|slice| slice.as_ptr()), [first_start, second_start]);
    assert_eq!(pool.total_blocks(), 2);
}

#[test]
fn stats_are_exact_after_many_threads_have_allocated_and_dropped() {
    let pool = Pool::new();
    let (sender, receiver) = std::sync::mpsc::sync_channel::<Slice>(64);
    thread::scope(|scope| {
        for thread in 0..3 {
            let (pool, sender) = (&pool, sender.clone());
            scope.spawn(move || {
                for index in 0..2000 {
                    let mut block = pool.allocate(index % 5000 + 1);
                    let slice = block.take(1);
                    if (index + thread) % 3 == 0 {
                        sender.send(slice.clone()).expect("the receiver waits for all");
                    }
                }
            });
        }
        drop(sender);
        receiver.iter().for_each(drop);
    });
    assert_eq!(in_use(&pool), (0, 0));
}

#[test]
fn slices_behave_like_bytes() {
    let mut slice = Slice::from(vec![1, 2, 3, 4, 5]);
    assert_eq!(slice.split_to(2), [1, 2]);
    assert_eq!(slice.split_off(2), vec![5]);
    assert_eq!(slice, [3, 4]);
    assert_eq!(slice.slice(1..=1), [4]);
    assert_eq!(slice.slice(2..), "");
    assert_eq!(Slice::from("text"), "text");
    assert_eq!(Slice::from("text".to_string()), Slice::from(b"text"));
    assert_eq!(bytes::Bytes::from(slice.clone()), &[3, 4][..]);
    assert_eq!(Slice::from(bytes::Bytes::from_static(b"abc")).slice(1..), "bc");
    assert_eq!(format!("{:?}", Slice::from("a\n")), "b\"a\\n\"");
    assert!(Slice::default().is_empty());
    for range in [3..3, 1..3] {
        let slice = slice.clone();
        assert!(std::panic::catch_unwind(|| slice.slice(range)).is_err(), "beyond the end");
    }
}

/// Blocks in use, and their bytes.
fn in_use(pool: &Pool) -> (u64, u64) {
    let stats = pool.stats();
    (stats.blocks, stats.block_bytes)
}

fn pieces(chain: &Chain) -> Vec<Vec<u8>> {
    chain.slices().map(|slice| slice.to_vec()).collect()
}

/// Prints nanoseconds for each call of `run`, the best of several rounds.
fn measure(name: &str, mut run: impl FnMut()) {
    if std::env::var("ONLY").is_ok_and(|only| !name.contains(&only)) {
        return;
    }
    const CALLS: u32 = 200_000;
    let best = (0..10).map(|_| {
        let start = Instant::now();
        (0..CALLS).for_each(|_| run());
        start.elapsed().as_nanos() as f64 / f64::from(CALLS)
    });
    println!("{name:<60} {:7.1} ns", best.fold(f64::INFINITY, f64::min));
}

#[test]
#[ignore = "prints figures: cargo test --release buffer::tests::cost -- --ignored --nocapture"]
fn cost_of_the_fast_paths() {
    let pool = Pool::new();
    measure("not attached: allocate 1 KB and drop it", || drop(black_box(pool.allocate(1024))));
    let _attached = pool.attach();
    let data = vec![7; 1024];
    let mut staging = Staging::default();
    measure("copy 1 KB alone", {
        let mut into = vec![0; 1024];
        let data = data.clone();
        move || {
            black_box(&mut into).copy_from_slice(black_box(&data));
        }
    });
    measure("free: allocate 1 KB and drop it", || drop(black_box(pool.allocate(1024))));
    measure("write_copy 1 KB, take, drop", || {
        staging.write_copy(black_box(&data), &pool);
        drop(black_box(staging.sealed().take()));
    });
    measure("write_copy 1 KB, take, append to another, advance", || {
        staging.write_copy(black_box(&data), &pool);
        let mut out = Chain::new();
        out.append(&mut staging.sealed().take());
        out.advance(1024);
        black_box(&out);
    });
    let mut chain = Chain::new();
    measure("write_copy 1 KB, append to another, advance", || {
        staging.write_copy(black_box(&data), &pool);
        chain.append(staging.sealed());
        chain.advance(1024);
    });
    measure("write_copy 1 KB to a chain, advance", || {
        chain.write_copy(black_box(&data), &pool);
        chain.advance(1024);
    });
    measure("allocate 1 KB, copy, take, drop", || {
        let mut block = pool.allocate(1024);
        block.spare()[..1024].copy_from_slice(black_box(&data));
        drop(black_box(block.take(1024)));
    });
    measure("reserve 1 KB, commit, take, drop", || {
        black_box(staging.reserve(1024, &pool));
        staging.commit(1024).expect("just reserved");
        drop(black_box(staging.sealed().take()));
    });
    let mut block = pool.allocate(64 << 10);
    let mut chain = Chain::new();
    measure("take 1028 of 64 KB, push, next 1028, drop", || {
        if block.capacity_left() < 1028 {
            block = pool.allocate(64 << 10);
        }
        chain.push(block.take(1028));
        drop(black_box(chain.next(1028, &pool)));
    });
    measure("take 1028 of 64 KB, push, next 4, next 1024, drop", || {
        if block.capacity_left() < 1028 {
            block = pool.allocate(64 << 10);
        }
        chain.push(block.take(1028));
        drop(black_box(chain.next(4, &pool)));
        drop(black_box(chain.next(1024, &pool)));
    });
    measure("next 1028 out of one 64 KB slice, drop", || {
        if chain.len() < 1028 {
            chain.clear();
            chain.push(pool.allocate(64 << 10).take(64 << 10));
        }
        drop(black_box(chain.next(1028, &pool)));
    });
    measure("peek 4, drop", || drop(black_box(chain.peek(4, &pool))));
    measure("peek 4, peek 1028, skip 1028", || {
        if chain.len() < 1028 {
            chain.clear();
            chain.push(pool.allocate(64 << 10).take(64 << 10));
        }
        drop(black_box(chain.peek(4, &pool)));
        drop(black_box(chain.next(1028, &pool)));
    });
    let large: Slice = vec![1; 8192].into();
    measure("write 8 KB by reference, take, drop", || {
        staging.write(large.clone(), &pool);
        drop(black_box(staging.sealed().take()));
    });
}
