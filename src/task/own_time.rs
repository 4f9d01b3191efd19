//! What a run took itself, of the time that passed on the wall. On the thread that ran it.

use std::cell::Cell;
use std::time::Duration;

use super::policy::{Host, Spent};
use crate::clock::now_ns;
use crate::config;

thread_local! {
    static STARVED: Cell<Option<Starved>> = const { Cell::new(None) };
    /// As of the end of the last run that was timed here, if that was a long one.
    static SPENT: Cell<Option<Spent>> = const { Cell::new(None) };
    /// Of the run that is timed here.
    static PARTS: Cell<Option<Parts>> = const { Cell::new(None) };
}

/// A run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct OwnTime {
    pub(super) took_ns: u64,
    /// For how long it was ready to go on, beside that, and had no CPU.
    pub(super) starved_ns: u64,
}

impl OwnTime {
    /// Of a run that took so long by the clock on the wall, and has just ended.
    #[inline]
    pub(super) fn of_run(host: &Host, wall_ns: u64, ended_ns: u64) -> OwnTime {
        let is_old = STARVED.get().is_none_or(|before| before.is_old(ended_ns));
        if is_old || wall_ns >= config::LONG_RUN_NS {
            return OwnTime::checked(host, wall_ns, ended_ns);
        }
        SPENT.set(None);
        OwnTime { took_ns: wall_ns, starved_ns: 0 }
    }

    #[cold]
    fn checked(host: &Host, wall_ns: u64, ended_ns: u64) -> OwnTime {
        // In any case, since the next run's are counted from here.
        let starved_ns = starved_ns(host, ended_ns);
        let is_long = wall_ns >= config::LONG_RUN_NS;
        let missed_ns = missed_ns(if is_long { (host.spent)() } else { None }, wall_ns);
        let starved_ns = if is_long { missed_ns.unwrap_or(starved_ns).min(wall_ns) } else { 0 };
        OwnTime { took_ns: wall_ns - starved_ns, starved_ns }
    }
}

/// For how long this thread has waited for a CPU by then.
#[derive(Clone, Copy)]
struct Starved {
    by_ns: u64,
    total: Duration,
}

impl Starved {
    #[inline]
    fn is_old(self, now_ns: u64) -> bool {
        now_ns.saturating_sub(self.by_ns) >= config::STARVED_REFRESH.as_nanos() as u64
    }
}

/// For how long this thread has waited for a CPU since it looked before.
fn starved_ns(host: &Host, now_ns: u64) -> u64 {
    let total = (host.starved)();
    let before = STARVED.replace(Some(Starved { by_ns: now_ns, total }));
    before.map_or(0, |before| total.saturating_sub(before.total).as_nanos() as u64)
}

/// For how much of a long run its thread had no CPU, if it is known to have waited for nothing
/// else.
fn missed_ns(now: Option<Spent>, wall_ns: u64) -> Option<u64> {
    let (before, now) = SPENT.replace(now).zip(now)?;
    // Since the long run before this one it did little else.
    let ran_ns = now.ran.saturating_sub(before.ran).as_nanos() as u64;
    // A clock that stands still says nothing.
    (now.waits == before.waits && ran_ns > 0).then(|| wall_ns.saturating_sub(ran_ns))
}

/// What a run would be on a poller, which receives nothing while it runs: several.
#[derive(Clone, Copy, Debug)]
pub(super) struct Parts {
    /// When the last one began.
    since_ns: u64,
    pub(super) count: u32,
    longest_ns: u64,
}

impl Parts {
    fn one(since_ns: u64) -> Parts {
        Parts { since_ns, count: 1, longest_ns: 0 }
    }

    /// The longest of them, where all of them took so long themselves.
    pub(super) fn longest_ns(&self, took_ns: u64, wall_ns: u64) -> u64 {
        let share = self.longest_ns as f64 / wall_ns.max(1) as f64;
        took_ns.min((took_ns as f64 * share) as u64)
    }

    fn end_one(self, now_ns: u64) -> Parts {
        let longest_ns = self.longest_ns.max(now_ns.saturating_sub(self.since_ns));
        Parts { longest_ns, ..self }
    }
}

/// The run that is timed here takes in what came since it began. On a poller that would be another
/// run's.
#[inline]
pub(crate) fn next_part() {
    if let Some(parts) = PARTS.get() {
        let now_ns = now_ns();
        // Unless it has done nothing yet.
        if now_ns.saturating_sub(parts.since_ns) >= config::PART_NS_MIN {
            let ended = parts.end_one(now_ns);
            PARTS.set(Some(Parts { since_ns: now_ns, count: parts.count + 1, ..ended }));
        }
    }
}

/// A run that is timed in parts, until this is dropped.
pub(super) struct InParts {
    began_ns: u64,
}

impl InParts {
    pub(super) fn begin(began_ns: u64) -> InParts {
        PARTS.set(Some(Parts::one(began_ns)));
        InParts { began_ns }
    }

    pub(super) fn end(self, ended_ns: u64) -> Parts {
        PARTS.get().unwrap_or_else(|| Parts::one(self.began_ns)).end_one(ended_ns)
    }
}

impl Drop for InParts {
    fn drop(&mut self) {
        PARTS.set(None);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    thread_local! {
        static NOW: Cell<(Duration, Option<Spent>)> = const { Cell::new((Duration::ZERO, None)) };
    }

    const HOST: Host = Host {
        begin: || {},
        starved: || NOW.get().0,
        spent: || NOW.get().1,
        used: || Duration::ZERO,
    };

    /// A run of a millisecond, at whose end its thread has starved, run and waited so much in all.
    fn run(starved_us: u64, ran_us: u64, waits: u64) -> OwnTime {
        let spent = Spent { ran: Duration::from_micros(ran_us), waits };
        NOW.set((Duration::from_micros(starved_us), Some(spent)));
        OwnTime::of_run(&HOST, 1_000_000, now_ns())
    }

    fn own(took_us: u64) -> OwnTime {
        OwnTime { took_ns: took_us * 1000, starved_ns: 1_000_000 - took_us * 1000 }
    }

    #[test]
    fn a_run_behind_another_one_took_what_its_thread_ran_unless_that_waited() {
        assert_eq!(run(0, 1_000, 7), own(1000), "nothing is known of what was before");
        assert_eq!(run(100, 1_300, 7), own(300), "the host took the rest");
        // What the thread has starved for until here was taken off there.
        assert_eq!(run(200, 1_350, 8), own(900), "it may have blocked for as long");
        assert_eq!(run(200, 1_650, 8), own(300));
        assert_eq!(run(500, 1_650, 8), own(700), "this clock stands still");
    }

    #[test]
    fn nobody_knows_what_a_thread_ran_between_two_runs_with_a_short_one_between_them() {
        run(0, 1_000, 7);
        OwnTime::of_run(&HOST, 1_000, now_ns());
        assert_eq!(run(400, 1_300, 7), own(600));
    }

    #[test]
    fn what_a_run_takes_in_while_it_runs_is_another_part_of_it() {
        next_part();
        let began_ns = now_ns();
        let run = InParts::begin(began_ns);
        let pass = || std::thread::sleep(Duration::from_nanos(config::PART_NS_MIN));
        pass();
        next_part();
        std::thread::sleep(Duration::from_millis(1));
        next_part();
        pass();
        let ended_ns = now_ns();
        let parts = run.end(ended_ns);
        assert_eq!(parts.count, 3);
        assert!(parts.longest_ns >= 1_000_000 && parts.longest_ns < ended_ns - began_ns);
        // Half of it was others'.
        let halves = Parts { longest_ns: 600, ..parts };
        assert_eq!(halves.longest_ns(500, 1000), 300);
        assert!(PARTS.get().is_none());
    }
}
