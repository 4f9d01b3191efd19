//! How long runs took, and what that does to others.

use crate::config;

/// A run, or several that took about the same.
#[derive(Clone, Copy)]
pub(super) struct Took {
    /// Each of them.
    pub(super) each_ns: u64,
    pub(super) count: u32,
    /// For how long all of them were ready to go on, beside that, and had no CPU.
    pub(super) starved_ns: u64,
    /// Each holds up a poller.
    pub(super) is_long: bool,
}

/// Run times.
pub(super) struct Tally {
    pub(super) runs: u32,
    sum_ns: u64,
    squares: f64,
    /// For how long they were ready to go on, beside that.
    pub(super) starved_ns: u64,
    /// The sum of those that hold up a poller.
    long_ns: u64,
    /// In descending order.
    pub(super) longest_ns: [u64; config::PARDONS_MAX as usize],
}

/// What runs do to others.
#[derive(Clone, Copy)]
pub(super) struct Harm {
    pub(super) delay_ns: u64,
    pub(super) held_up_ppm: u64,
}

impl Tally {
    pub(super) const NONE: Tally = Tally {
        runs: 0,
        sum_ns: 0,
        squares: 0.0,
        starved_ns: 0,
        long_ns: 0,
        longest_ns: [0; config::PARDONS_MAX as usize],
    };

    #[inline]
    pub(super) fn add(&mut self, run: Took) {
        let took_ns = run.each_ns * u64::from(run.count);
        self.runs += run.count;
        self.sum_ns += took_ns;
        self.squares += (took_ns as f64) * (run.each_ns as f64);
        self.starved_ns += run.starved_ns;
        if run.is_long {
            self.long_ns += took_ns;
        }
        self.keep_longest(run.each_ns);
    }

    pub(super) fn merge(&mut self, other: &Tally) {
        self.runs += other.runs;
        self.sum_ns += other.sum_ns;
        self.squares += other.squares;
        self.starved_ns += other.starved_ns;
        self.long_ns += other.long_ns;
        for took_ns in other.longest_ns {
            self.keep_longest(took_ns);
        }
    }

    #[inline]
    fn keep_longest(&mut self, took_ns: u64) {
        let mut took_ns = took_ns;
        for longest in &mut self.longest_ns {
            if took_ns > *longest {
                std::mem::swap(longest, &mut took_ns);
            }
        }
    }

    /// What these runs, but for the longest `left_out`, have done to others in `lasted_ns`, if they
    /// ran one after the other. Those of `long_ns` hold them up.
    pub(super) fn harm(
        &self,
        lasted_ns: u64,
        long_ns: u64,
        is_crowded: bool,
        left_out: usize,
    ) -> Harm {
        let longest = || self.longest_ns.iter().take(left_out).copied();
        let square = |ns: f64| ns * ns;
        let mut squares = self.squares - longest().map(|ns| square(ns as f64)).sum::<f64>();
        if is_crowded {
            let runs = self.runs.saturating_sub(left_out as u32).max(1);
            let of_one_length =
                square((self.sum_ns - longest().sum::<u64>()) as f64) / f64::from(runs);
            squares -= of_one_length * (1.0 + config::ALIKE_VARIANCE);
        }
        let long: u64 = longest().filter(|ns| *ns >= long_ns).sum();
        let lasted_ns = lasted_ns.max(1) as f64;
        Harm {
            // Rounding may have left less than was taken out.
            delay_ns: (squares.max(0.0) / (2.0 * lasted_ns)) as u64,
            held_up_ppm: ((self.long_ns - long) as f64 / lasted_ns * 1e6) as u64,
        }
    }
}
