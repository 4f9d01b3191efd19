//! The monotonic clock, as a number.

use rustix::time::{ClockId, clock_gettime};

/// Nanoseconds of `CLOCK_MONOTONIC`; never 0.
#[inline]
pub(crate) fn now_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    // Both numbers are never negative on this clock. The sum overflows after 584 years.
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}
