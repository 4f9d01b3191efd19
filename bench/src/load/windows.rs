//! The measurement cut into short windows, and those left out in which a hypervisor took a CPU.
//!
//! A reply belongs to the window it arrived in. It counts as clean when no window it lived through
//! is left out: what a gap delayed is delayed wherever it arrives. A window is judged when the
//! watch has had time to see what happened in it, with the rest at the end. The raw figures are
//! kept apart and leave nothing out.

use std::collections::VecDeque;
use std::time::Duration;

use hdrhistogram::Histogram;

use crate::error::Result;
use crate::host::steal::Gap;
use crate::load::client::Reply;

/// What is left when the stolen windows are out.
pub(crate) struct Clean {
    pub(crate) windows: u64,
    pub(crate) windows_left_out: u64,
    pub(crate) latency: Histogram<u64>,
    /// Of those, the requests that asked for no work.
    pub(crate) cheap_latency: Histogram<u64>,
}

pub(crate) struct Windows {
    /// Not judged yet, the last one still open.
    waiting: VecDeque<Window>,
    gaps: Vec<Gap>,
    /// Whatever lived before that may have been delayed.
    stolen_until_ns: u64,
    /// Its `latency` is put together at the end.
    clean: Clean,
    heavy_latency: Histogram<u64>,
    /// Kept for the replies of the next window.
    spare: Vec<Vec<Reply>>,
}

struct Window {
    start_ns: u64,
    end_ns: u64,
    replies: Vec<Reply>,
}

impl Windows {
    pub(crate) fn new() -> Result<Windows> {
        let clean = Clean {
            windows: 0,
            windows_left_out: 0,
            latency: super::histogram()?,
            cheap_latency: super::histogram()?,
        };
        Ok(Windows {
            waiting: VecDeque::new(),
            gaps: Vec::new(),
            stolen_until_ns: 0,
            clean,
            heavy_latency: super::histogram()?,
            spare: Vec::new(),
        })
    }

    /// Opens the first window.
    pub(crate) fn open(&mut self, now_ns: u64) {
        let replies = self.spare.pop().unwrap_or_default();
        self.waiting.push_back(Window { start_ns: now_ns, end_ns: u64::MAX, replies });
    }

    pub(crate) fn add(&mut self, reply: Reply) {
        if let Some(window) = self.waiting.back_mut() {
            window.replies.push(reply);
        }
    }

    /// Whether the open window has lasted long enough.
    pub(crate) fn is_due(&self, now_ns: u64) -> bool {
        self.waiting.back().is_some_and(|open| now_ns >= open.start_ns + WINDOW_NS)
    }

    /// Closes the open window, opens the next one, and judges those that are old enough by the gaps
    /// seen up to now.
    pub(crate) fn turn(&mut self, now_ns: u64, gaps: Vec<Gap>) {
        self.close(now_ns);
        self.open(now_ns);
        self.gaps.extend(gaps);
        let judged_ns = now_ns.saturating_sub(JUDGE_AFTER_NS);
        while self.waiting.front().is_some_and(|first| first.end_ns <= judged_ns) {
            self.judge_first();
        }
    }

    /// Ends with the window that is open.
    pub(crate) fn close(&mut self, now_ns: u64) {
        if let Some(open) = self.waiting.back_mut() {
            open.end_ns = open.end_ns.min(now_ns);
        }
    }

    /// Judges the rest by the last gaps. The last window must be closed.
    pub(crate) fn finish(mut self, gaps: Vec<Gap>) -> Clean {
        self.gaps.extend(gaps);
        while !self.waiting.is_empty() {
            self.judge_first();
        }
        let mut clean = self.clean;
        clean.latency = self.heavy_latency;
        clean.latency.add(&clean.cheap_latency).expect("both have the same bounds");
        clean
    }

    fn judge_first(&mut self) {
        let Some(mut window) = self.waiting.pop_front() else { return };
        let mut stolen = false;
        for gap in self.gaps.iter().filter(|gap| gap.start_ns < window.end_ns) {
            if gap.end_ns > window.start_ns {
                stolen = true;
            } else {
                // Before the first window, where nothing is left out but replies still come from.
                self.stolen_until_ns = self.stolen_until_ns.max(gap.end_ns);
            }
        }
        self.gaps.retain(|gap| gap.end_ns > window.end_ns);
        self.clean.windows += 1;
        if stolen {
            self.clean.windows_left_out += 1;
            self.stolen_until_ns = window.end_ns;
        } else {
            for reply in window.replies.iter().filter(|one| one.since_ns >= self.stolen_until_ns) {
                let cheap = &mut self.clean.cheap_latency;
                let latency = if reply.heavy { &mut self.heavy_latency } else { cheap };
                latency.saturating_record(reply.latency_ns());
            }
        }
        window.replies.clear();
        self.spare.push(window.replies);
    }
}

/// Short enough that a gap costs few replies, long enough that a window holds hundreds of them.
pub(crate) const WINDOW: Duration = Duration::from_millis(25);
const WINDOW_NS: u64 = WINDOW.as_nanos() as u64;
/// Longer than a gap and the look that follows it.
const JUDGE_AFTER_NS: u64 = 2 * WINDOW_NS;

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    #[test]
    fn without_gaps_every_reply_counts() {
        let clean = judged(&[]);
        assert_eq!((clean.windows, clean.windows_left_out), (4, 0));
        assert_eq!((clean.latency.len(), clean.cheap_latency.len()), (8, 4));
    }

    #[test]
    fn a_window_is_left_out_with_all_that_lived_in_it() {
        // In the second window; the third has one reply that was asked for in the second.
        let clean = judged(&[(30, 31)]);
        assert_eq!((clean.windows, clean.windows_left_out), (4, 1));
        assert_eq!(clean.latency.len(), 8 - 2 - 1);
        // Over the border of two windows.
        let clean = judged(&[(24, 26)]);
        assert_eq!((clean.windows, clean.windows_left_out), (4, 2));
        assert_eq!(clean.latency.len(), 8 - 4 - 1);
    }

    #[test]
    fn a_gap_of_the_warm_up_takes_what_it_delayed() {
        let mut windows = Windows::new().unwrap();
        windows.open(100 * MS);
        for since_ms in [85, 95] {
            windows.add(Reply { since_ns: since_ms * MS, now_ns: 101 * MS, heavy: false });
        }
        windows.close(125 * MS);
        let clean = windows.finish(vec![Gap { start_ns: 88 * MS, end_ns: 90 * MS }]);
        assert_eq!((clean.windows, clean.windows_left_out, clean.latency.len()), (1, 0, 1));
    }

    #[test]
    fn a_gap_reported_late_still_finds_its_window() {
        let mut windows = Windows::new().unwrap();
        windows.open(0);
        windows.add(Reply { since_ns: 0, now_ns: MS, heavy: false });
        windows.turn(25 * MS, Vec::new());
        windows.turn(50 * MS, vec![Gap { start_ns: 2 * MS, end_ns: 3 * MS }]);
        windows.turn(75 * MS, Vec::new());
        windows.close(80 * MS);
        let clean = windows.finish(Vec::new());
        assert_eq!((clean.windows, clean.windows_left_out, clean.latency.len()), (4, 1, 0));
    }

    /// Four windows of 25 ms: in each a heavy reply as old as 1 ms, and a cheap one as old as 6 ms
    /// that arrives 5 ms after its window begins.
    fn judged(gaps_ms: &[(u64, u64)]) -> Clean {
        let mut windows = Windows::new().unwrap();
        let gap = |(start, end): &(u64, u64)| Gap { start_ns: start * MS, end_ns: end * MS };
        windows.gaps = gaps_ms.iter().map(gap).collect();
        windows.open(0);
        for start in [0, 25, 50, 75] {
            if start > 0 {
                assert!(windows.is_due(start * MS));
                windows.turn(start * MS, Vec::new());
            }
            assert!(!windows.is_due((start + 5) * MS));
            let since_ns = (start * MS + 5 * MS).saturating_sub(6 * MS);
            windows.add(Reply { since_ns, now_ns: (start + 5) * MS, heavy: false });
            let (since_ns, now_ns) = ((start + 9) * MS, (start + 10) * MS);
            windows.add(Reply { since_ns, now_ns, heavy: true });
        }
        windows.close(100 * MS);
        windows.finish(Vec::new())
    }
}
