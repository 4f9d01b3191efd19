//! Which requests are heavy: at random, the same ones in every run with the same seed.

pub(crate) struct Dice {
    state: u64,
    /// A number below it is a heavy request.
    heavy_below: u64,
}

impl Dice {
    pub(crate) fn new(heavy_percent: f64, seed: u64) -> Dice {
        assert!((0.0..=100.0).contains(&heavy_percent), "a share of {heavy_percent} %");
        let heavy_below = (heavy_percent / 100.0 * RANGE as f64) as u64;
        Dice { state: seed, heavy_below }
    }

    pub(crate) fn is_heavy(&mut self) -> bool {
        // A Weyl sequence, and what SplitMix64 does to scramble it.
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % RANGE < self.heavy_below
    }
}

/// Fine enough for a thousandth of a percent, exact in a float.
const RANGE: u64 = 1 << 32;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_share_is_kept_and_its_ends_are_exact() {
        let count = |percent, seed| {
            let mut dice = Dice::new(percent, seed);
            (0..100_000).filter(|_| dice.is_heavy()).count()
        };
        assert_eq!((count(0.0, 1), count(100.0, 1)), (0, 100_000));
        // Eight standard deviations around a thousand; the seed is fixed.
        assert!((750..1250).contains(&count(1.0, 7)), "{}", count(1.0, 7));
    }

    #[test]
    fn the_same_seed_chooses_the_same_requests() {
        let choice = |seed| {
            let mut dice = Dice::new(30.0, seed);
            (0..64).map(|_| dice.is_heavy()).collect::<Vec<_>>()
        };
        assert_eq!(choice(5), choice(5));
        assert_ne!(choice(5), choice(6));
    }
}
