//! What users cannot see: merging, memory coming home, counts; and what the fast paths cost.

use std::hint::black_box;
use std::time::Instant;

use super::*;

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
    let mut staging = Staging::new();
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
        drop(black_box(staging.take()));
    });
    measure("write_copy 1 KB, take, append to another, advance", || {
        staging.write_copy(black_box(&data), &pool);
        let mut out = Chain::new();
        out.append(&mut staging.take());
        out.advance(1024);
        black_box(&out);
    });
    let mut chain = Chain::new();
    measure("write_copy 1 KB, move_to another, advance", || {
        staging.write_copy(black_box(&data), &pool);
        staging.move_to(&mut chain);
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
        staging.commit(1024).unwrap();
        drop(black_box(staging.take()));
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
        drop(black_box(staging.take()));
    });
}
