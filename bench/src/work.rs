//! What a heavy request costs, in every server alike.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// A fixed amount of computation. Counted in steps, not in time: a handler that spins on a clock
/// would do less work the more often it is interrupted.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Work {
    pub(crate) steps: u64,
}

impl Work {
    /// So many steps as take that long here, when nobody interrupts.
    pub(crate) fn calibrate(duration: Duration) -> Work {
        let fastest = (0..CALIBRATIONS).map(|_| {
            let begun = Instant::now();
            compute(CALIBRATION_STEPS);
            begun.elapsed()
        });
        // The fastest run is the one nobody interrupted.
        let fastest = fastest.min().unwrap_or_default().as_secs_f64().max(1e-9);
        Work { steps: (duration.as_secs_f64() / fastest * CALIBRATION_STEPS as f64) as u64 }
    }

    pub(crate) fn run(self) {
        compute(self.steps);
        RUNS.fetch_add(1, Ordering::Relaxed);
    }
}

/// How often this process has worked for a request.
pub(crate) fn runs() -> u64 {
    RUNS.load(Ordering::Relaxed)
}

fn compute(steps: u64) {
    let mut state = 1_u64;
    for _ in 0..steps {
        state = std::hint::black_box(state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1));
    }
}

static RUNS: AtomicU64 = AtomicU64::new(0);

const CALIBRATIONS: usize = 20;
const CALIBRATION_STEPS: u64 = 100_000;
