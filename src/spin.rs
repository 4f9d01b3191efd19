//! Spinning: how long a poller or a worker checks for work in a loop before it sleeps.
//!
//! A wake-up by the kernel costs more than a short spin. But a spin pays only while work keeps
//! coming and no other thread needs the CPU. So a thread spins for about twice the usual time
//! between arrivals, at most for `SPIN_NS_MAX`. It spins only while at least half of its recent
//! spins found work.
//!
//! A leaf: of this crate it imports the configuration only.

use crate::config::{self, PollMode};

/// When one thread spins.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Spin {
    mode: PollMode,
    /// Whether there are more CPUs than threads that need one.
    affordable: bool,
    /// Mean time between arrivals; recent arrivals count more.
    gap_ns: u64,
    /// Recent spins that found work minus those that did not, 0..=SCORE_MAX. From the middle on,
    /// spinning pays.
    score: u32,
    sleeps: u32,
}

const SCORE_MAX: u32 = 16;
/// After so many sleeps, a thread that has stopped spinning may try again.
const RETRY_SLEEPS: u32 = 256;

impl Spin {
    #[cfg(all(test, not(loom)))]
    pub(crate) const NEVER: Spin =
        Spin { mode: PollMode::Never, affordable: false, gap_ns: 0, score: 0, sleeps: 0 };

    pub(crate) fn new(mode: PollMode, affordable: bool) -> Spin {
        Spin { mode, affordable, gap_ns: config::SPIN_NS_MAX, score: SCORE_MAX / 2, sleeps: 0 }
    }

    /// Whether the thread may ever spin.
    pub(crate) fn is_enabled(&self) -> bool {
        match self.mode {
            PollMode::Always => true,
            PollMode::Never => false,
            PollMode::Adaptive => self.affordable,
        }
    }

    /// Whether the thread never sleeps.
    pub(crate) fn is_endless(&self) -> bool {
        self.mode == PollMode::Always
    }

    /// How long to spin now; 0 is not at all, `u64::MAX` is without end.
    pub(crate) fn budget_ns(&self) -> u64 {
        match self.mode {
            PollMode::Always => u64::MAX,
            PollMode::Never => 0,
            PollMode::Adaptive if !self.affordable || self.score < SCORE_MAX / 2 => 0,
            PollMode::Adaptive => (2 * self.gap_ns).min(config::SPIN_NS_MAX),
        }
    }

    /// Notes that a spin ended after `waited_ns`. `won`: it found work.
    pub(crate) fn record(&mut self, won: bool, waited_ns: u64) {
        self.score =
            if won { (self.score + 1).min(SCORE_MAX) } else { self.score.saturating_sub(1) };
        if won {
            self.observe_gap(waited_ns);
        }
    }

    /// Notes that the thread slept for `slept_ns` until work came.
    pub(crate) fn record_sleep(&mut self, slept_ns: u64) {
        self.observe_gap(slept_ns);
        self.sleeps += 1;
        if self.sleeps >= RETRY_SLEEPS {
            self.sleeps = 0;
            if 2 * self.gap_ns <= config::SPIN_NS_MAX {
                self.score = self.score.max(SCORE_MAX / 2);
            }
        }
    }

    fn observe_gap(&mut self, gap_ns: u64) {
        // One long pause must not outweigh the traffic before and after it.
        let gap_ns = gap_ns.min(16 * config::SPIN_NS_MAX);
        self.gap_ns = (7 * self.gap_ns + gap_ns) / 8;
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn an_adaptive_thread_stops_spinning_when_it_finds_nothing() {
        let mut spin = Spin::new(PollMode::Adaptive, true);
        assert!(spin.budget_ns() > 0);
        for _ in 0..SCORE_MAX {
            spin.record(false, config::SPIN_NS_MAX);
        }
        assert_eq!(spin.budget_ns(), 0);
    }

    #[test]
    fn it_tries_again_when_work_comes_quickly() {
        let mut spin = Spin::new(PollMode::Adaptive, true);
        spin.record(false, 0);
        assert_eq!(spin.budget_ns(), 0);
        for _ in 0..RETRY_SLEEPS {
            spin.record_sleep(10_000);
        }
        assert!(spin.budget_ns() >= 20_000 && spin.budget_ns() <= config::SPIN_NS_MAX);
    }

    #[test]
    fn without_spare_cpus_it_never_spins_unless_told_to() {
        assert_eq!(Spin::new(PollMode::Adaptive, false).budget_ns(), 0);
        assert_eq!(Spin::new(PollMode::Always, false).budget_ns(), u64::MAX);
    }
}
