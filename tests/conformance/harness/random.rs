//! Reproducible randomness and bytes that tell their position.

use std::time::{SystemTime, UNIX_EPOCH};

/// A small generator (xorshift64*), good enough to vary a schedule.
#[derive(Clone)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Random {
        // The state of a xorshift must not be zero.
        Random(seed | 1)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number from `range`.
    pub(crate) fn within(&mut self, range: std::ops::Range<usize>) -> usize {
        range.start + (self.next() >> 11) as usize % (range.end - range.start)
    }

    /// True once in `count` times.
    pub(crate) fn one_in(&mut self, count: usize) -> bool {
        self.within(0..count) == 0
    }

    /// Another generator, independent of this one.
    pub(crate) fn fork(&mut self) -> Random {
        Random::new(self.next())
    }
}

/// The seed of this run: `RINGPOLL_SEED` to repeat one, else the clock.
pub(crate) fn seed() -> u64 {
    match std::env::var("RINGPOLL_SEED") {
        Ok(text) => text.parse().expect("RINGPOLL_SEED is a number"),
        Err(_) => SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(1, |elapsed| elapsed.as_nanos() as u64),
    }
}

/// `count` bytes of the endless test stream, starting at `offset`.
///
/// No period of the stream divides a block size, so bytes lost, doubled or swapped show up.
pub(crate) fn pattern(offset: usize, count: usize) -> Vec<u8> {
    (offset..offset + count).map(byte_at).collect()
}

/// Fails unless `bytes` are the test stream from `offset` on.
#[track_caller]
pub(crate) fn assert_pattern(bytes: &[u8], offset: usize) {
    let wrong = bytes.iter().enumerate().find(|(index, byte)| **byte != byte_at(offset + index));
    if let Some((index, byte)) = wrong {
        let wanted = byte_at(offset + index);
        panic!("byte {} of the stream is {byte}, not {wanted}", offset + index);
    }
}

fn byte_at(position: usize) -> u8 {
    (position % 251) as u8 ^ (position >> 16) as u8
}
