//! What both engines count, what they call a failure, and when the requests of an open loop are
//! due.

use std::time::Duration;

use hdrhistogram::Histogram;

use crate::error::{Failure, Result};
use crate::host::steal::StealWatch;
use crate::load::client::{OnReply, Reply};
use crate::load::windows::{Clean, Windows};
use crate::load::{Outcome, histogram};

/// What the replies add up to, and what went wrong.
pub(super) struct Tally {
    measuring: bool,
    replies: u64,
    replies_measured: u64,
    /// Of the requests that asked for no work, and of those that did.
    cheap_latency: Histogram<u64>,
    heavy_latency: Histogram<u64>,
    windows: Windows,
    errors: u64,
    first_error: Option<String>,
}

impl OnReply for Tally {
    fn on_reply(&mut self, reply: Reply) {
        self.replies += 1;
        if self.measuring {
            self.replies_measured += 1;
            let latency =
                if reply.heavy { &mut self.heavy_latency } else { &mut self.cheap_latency };
            latency.saturating_record(reply.latency_ns());
            self.windows.add(reply);
        }
    }
}

impl Tally {
    pub(super) fn new() -> Result<Tally> {
        Ok(Tally {
            measuring: false,
            replies: 0,
            replies_measured: 0,
            cheap_latency: histogram()?,
            heavy_latency: histogram()?,
            windows: Windows::new()?,
            errors: 0,
            first_error: None,
        })
    }

    pub(super) fn open_window(&mut self, now_ns: u64) {
        self.measuring = true;
        self.windows.open(now_ns);
    }

    /// Once the open one has lasted long enough.
    pub(super) fn turn_window(&mut self, now_ns: u64, watch: &StealWatch) {
        if self.windows.is_due(now_ns) {
            self.windows.turn(now_ns, watch.take());
        }
    }

    /// The windows, to be judged by the last gaps.
    pub(super) fn close_window(&mut self, now_ns: u64) -> Result<Windows> {
        self.measuring = false;
        let mut windows = std::mem::replace(&mut self.windows, Windows::new()?);
        windows.close(now_ns);
        Ok(windows)
    }

    /// Of any time.
    pub(super) fn replies(&self) -> u64 {
        self.replies
    }

    /// Whether the measurement has no reply yet.
    pub(super) fn is_empty(&self) -> bool {
        self.replies_measured == 0
    }

    /// Whether the measurement has all the replies it needs.
    pub(super) fn has_all(&self, requests_max: Option<u64>) -> bool {
        requests_max.is_some_and(|max| self.replies_measured >= max)
    }

    pub(super) fn count_error(&mut self, message: impl FnOnce() -> String) {
        self.errors += 1;
        self.first_error.get_or_insert_with(message);
    }

    pub(super) fn all_lost(&self) -> Failure {
        let why = self.first_error.as_deref().unwrap_or("unknown");
        Failure::new(format!("every connection is lost after {} replies: {why}", self.replies))
    }

    pub(super) fn outcome(
        self,
        elapsed: Duration,
        reply_bytes: u64,
        clean: Clean,
    ) -> Result<Outcome> {
        if self.replies == 0 {
            let why = self.first_error.unwrap_or("the window was shorter than one reply".into());
            return Err(Failure::new(format!("not one reply: {why}")));
        }
        let mut latency = self.heavy_latency;
        latency.add(&self.cheap_latency).expect("both have the same bounds");
        Ok(Outcome {
            requests: self.replies_measured,
            requests_ever: self.replies,
            errors: self.errors,
            first_error: self.first_error,
            elapsed,
            bytes: self.replies_measured * reply_bytes,
            latency,
            cheap_latency: self.cheap_latency,
            clean,
        })
    }
}

pub(super) fn no_reply_in(timeout: Duration) -> Failure {
    Failure::new(format!("the server stopped answering: no reply in {timeout:?}"))
}

pub(super) fn still_open(requests: usize, waited: Duration) -> Failure {
    Failure::new(format!(
        "the server stopped answering: {requests} requests open after {waited:.1?}"
    ))
}

/// When the requests of an open loop are due.
pub(super) struct Pace {
    interval_ns: f64,
    scheduled: u64,
}

impl Pace {
    pub(super) fn new(rate: f64) -> Pace {
        Pace { interval_ns: 1e9 / rate, scheduled: 0 }
    }

    /// How many were handed out.
    pub(super) fn scheduled(&self) -> u64 {
        self.scheduled
    }

    /// When the next one is due.
    pub(super) fn due_ns(&self) -> u64 {
        (self.scheduled as f64 * self.interval_ns) as u64
    }

    /// The next one that is due by `now_ns`: its number, and when it was due.
    pub(super) fn next_due_by(&mut self, now_ns: u64) -> Option<(u64, u64)> {
        let due_ns = self.due_ns();
        (due_ns <= now_ns).then(|| {
            self.scheduled += 1;
            (self.scheduled - 1, due_ns)
        })
    }
}

/// After the end: how long without any reply, and how long at all.
pub(super) const DRAIN_PATIENCE: Duration = Duration::from_secs(5);
pub(super) const DRAIN_MAX: Duration = Duration::from_secs(30);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_due_at_their_rate_and_none_twice() {
        let mut pace = Pace::new(1e6);
        let due: Vec<_> = std::iter::from_fn(|| pace.next_due_by(3_500)).collect();
        assert_eq!(due, [(0, 0), (1, 1_000), (2, 2_000), (3, 3_000)]);
        assert_eq!((pace.scheduled(), pace.due_ns()), (4, 4_000));
    }
}
