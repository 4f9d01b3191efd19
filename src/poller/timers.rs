//! The poller's timers.
//!
//! The poller thread owns them. An endpoint has at most one live timer, which is set again only for
//! an earlier time. The timer that it replaces stays in the heap, and is ignored when it fires. So
//! a timeout that moves with every request costs nothing until it is due.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::{Duration, Instant};

use super::alarm::Bell;
use crate::clock::now_ns;
use crate::config;
use crate::sys::Token;

/// No timer: later than any time of the clock.
pub(crate) const NEVER: u64 = u64::MAX;

/// `after` from now, on the clock of [`now_ns`].
pub(crate) fn ns_after(after: Duration) -> u64 {
    now_ns().saturating_add(u64::try_from(after.as_nanos()).unwrap_or(NEVER)).min(NEVER - 1)
}

/// `instant` on the clock of [`now_ns`]. A past instant becomes the present time.
pub(crate) fn ns_at(instant: Instant) -> u64 {
    ns_after(instant.saturating_duration_since(Instant::now()))
}

pub(crate) struct Timers {
    heap: BinaryHeap<Reverse<Entry>>,
    /// How many entries the last sweep kept, as far as they may still be in the heap.
    swept: usize,
}

/// Ordered by time alone.
pub(crate) struct Entry {
    pub(crate) at_ns: u64,
    pub(crate) whom: Whom,
}

pub(crate) enum Whom {
    Slot(Token),
    Bell(Bell),
}

impl Timers {
    pub(crate) fn new() -> Timers {
        Timers { heap: BinaryHeap::new(), swept: 0 }
    }

    pub(crate) fn arm(&mut self, at_ns: u64, whom: Whom) {
        self.heap.push(Reverse(Entry { at_ns, whom }));
    }

    /// How long until the first timer is due.
    pub(crate) fn next_in(&self, now_ns: u64) -> Option<Duration> {
        let Reverse(first) = self.heap.peek()?;
        Some(Duration::from_nanos(first.at_ns.saturating_sub(now_ns)))
    }

    pub(crate) fn pop_due(&mut self, now_ns: u64) -> Option<Entry> {
        if self.heap.peek()?.0.at_ns > now_ns {
            return None;
        }
        let first = self.heap.pop().map(|Reverse(entry)| entry);
        self.swept = self.swept.min(self.heap.len());
        first
    }

    /// Whether a sweep is due. A sweep visits all entries, so the next is due only after as many
    /// new entries.
    pub(crate) fn is_sweep_due(&self) -> bool {
        self.heap.len() >= 2 * self.swept + config::STALE_TIMERS_MAX
    }

    /// Drops entries of slots for which `live` is false, and the bells of dropped alarms.
    pub(crate) fn sweep(&mut self, mut live: impl FnMut(Token, u64) -> bool) {
        self.heap.retain(|Reverse(entry)| match entry.whom {
            Whom::Slot(token) => live(token, entry.at_ns),
            Whom::Bell(ref bell) => !bell.is_dead(),
        });
        self.swept = self.heap.len();
    }

    pub(crate) fn count(&self) -> usize {
        self.heap.len()
    }
}

impl PartialEq for Entry {
    fn eq(&self, other: &Entry) -> bool {
        self.at_ns == other.at_ns
    }
}

impl Eq for Entry {}

impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Entry) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Entry {
    fn cmp(&self, other: &Entry) -> std::cmp::Ordering {
        self.at_ns.cmp(&other.at_ns)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn timers_come_up_in_order_and_never_early() {
        let mut timers = Timers::new();
        for at_ns in [30, 10, 20] {
            timers.arm(at_ns, Whom::Slot(Token::new(at_ns as u32, 0)));
        }
        assert_eq!(timers.next_in(4), Some(Duration::from_nanos(6)));
        assert!(timers.pop_due(9).is_none());
        assert_eq!(timers.pop_due(25).map(|entry| entry.at_ns), Some(10));
        assert_eq!(timers.pop_due(25).map(|entry| entry.at_ns), Some(20));
        assert!(timers.pop_due(25).is_none());
        assert_eq!(timers.count(), 1);
    }

    #[test]
    fn the_end_of_time_is_not_never() {
        assert!(ns_after(Duration::MAX) < NEVER);
    }
}
