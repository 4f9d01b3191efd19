//! How long handlers run, and how much a run of that length delays other connections.
//!
//! The thread that polls a handler measures that poll: wall-clock time, without the time for which
//! the thread was preempted. A preempted thread says nothing about its handler. Time for which the
//! thread waited for anything but a CPU counts, because a handler that blocks its thread delays the
//! other connections as much as a handler that computes.
//!
//! Each thread collects its measurements in one [`ThreadRecord`] and reports them to the policy in
//! batches, so that most runs touch no memory of other threads.

use std::cell::RefCell;
use std::sync::{OnceLock, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use crate::clock::now_ns;

/// What the operating system does for threads that run handlers, and what it tells about them.
#[derive(Clone, Copy)]
pub(crate) struct Host {
    /// Each worker thread calls this function when it starts.
    pub(crate) begin: fn(),
    /// Whether the calling thread, when it wakes up, lets the running thread finish its time slice
    /// instead of preempting it.
    pub(crate) let_finish: fn(bool),
    /// The run queue wait of the calling thread since it started: the time for which the thread was
    /// runnable and another thread had the CPU.
    pub(crate) starved: fn() -> Duration,
    /// How the calling thread has spent its time since it started; `None` where the host does not
    /// tell.
    pub(crate) spent: fn() -> Option<Spent>,
    /// The CPU time that the process has used since it started.
    pub(crate) used: fn() -> Duration,
}

/// How a thread has spent its time since it started.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Spent {
    /// CPU time, without steal time where the kernel accounts for steal time.
    pub(crate) ran: Duration,
    /// How often the thread gave up its CPU to wait for something (voluntary context switches).
    pub(crate) waits: u64,
}

/// One poll of a handler.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Measurement {
    pub(super) ended_ns: u64,
    /// Wall-clock time without `preempted_ns`.
    pub(super) took_ns: u64,
    /// The time for which the thread could have run and had no CPU: its run queue wait, or steal
    /// time.
    pub(super) preempted_ns: u64,
    /// How many runs this poll would have been on a poller; see [`next_part`].
    pub(super) parts: u32,
    /// The length of the longest part; `took_ns` if there is one part.
    pub(super) longest_ns: u64,
}

/// Begins to measure one poll of a handler. With `in_parts`, [`next_part`] divides it. Returns the
/// time.
#[inline]
pub(super) fn begin(in_parts: bool) -> u64 {
    THREAD.with_borrow_mut(|thread| thread.begin(in_parts))
}

/// Ends the measurement of a poll that began at `began_ns`.
#[inline]
pub(super) fn end(host: &Host, began_ns: u64) -> Measurement {
    THREAD.with_borrow_mut(|thread| thread.end(host, began_ns))
}

/// The run that is polled on this thread takes in bytes that arrived after the run had begun.
///
/// A poller receives nothing while it runs a handler, so these bytes would have started another run
/// there. The time until now and the time from now on therefore count as two runs.
#[inline]
pub(crate) fn next_part() {
    THREAD.with_borrow_mut(ThreadRecord::next_part);
}

/// Runs `code`, and does not count its time as the handler's: the poller would do the same work for
/// a handler on a worker.
#[inline]
pub(crate) fn leave_out<T>(code: impl FnOnce() -> T) -> T {
    let began_ns = now_ns();
    let done = code();
    let took_ns = now_ns().saturating_sub(began_ns);
    THREAD.with_borrow_mut(|thread| thread.leave_out(took_ns));
    done
}

/// Has the calling thread let the running thread finish its time slice, or not, as the policy at
/// address `policy` decides. A thread that runs handlers of several policies follows one of them:
/// a change takes two system calls.
#[inline]
pub(super) fn let_finish(policy: usize, host: &Host, lets: bool) {
    if THREAD.with_borrow_mut(|thread| thread.follows.changes(policy, lets)) {
        (host.let_finish)(lets);
    }
}

/// Adds a measurement to the batch of this thread. Returns the batch if it is due; the caller
/// reports it to the policy, whose address is `policy`. Runs of `blocking_ns_min` or more block a
/// poller.
#[inline]
pub(super) fn collect(policy: usize, poll: &Measurement, blocking_ns_min: u64) -> Option<Tally> {
    THREAD.with_borrow_mut(|thread| thread.batch.add(policy, poll, blocking_ns_min))
}

/// Puts a batch back, to be reported with the next one. `false`: this thread collects for another
/// policy at present.
pub(super) fn put_back(policy: usize, batch: &Tally) -> bool {
    THREAD.with_borrow_mut(|thread| thread.batch.put_back(policy, batch))
}

thread_local! {
    static THREAD: RefCell<ThreadRecord> = const { RefCell::new(ThreadRecord::NEW) };
}

/// What a thread knows about the handlers that it polls.
struct ThreadRecord {
    /// The parts of the present poll, if that is measured in parts.
    parts: Option<Parts>,
    /// The time of the present poll that is not the handler's.
    left_out_ns: u64,
    /// The latest reading of the thread's run queue wait.
    queue_wait: Option<QueueWait>,
    /// Read at the end of the latest poll, if that took [`CHECKED_NS_MIN`] or more.
    spent: Option<Spent>,
    batch: Batch,
    follows: Follows,
}

impl ThreadRecord {
    const NEW: ThreadRecord = ThreadRecord {
        parts: None,
        left_out_ns: 0,
        queue_wait: None,
        spent: None,
        batch: Batch::NEW,
        follows: Follows::NOTHING,
    };

    fn begin(&mut self, in_parts: bool) -> u64 {
        let began_ns = now_ns();
        self.left_out_ns = 0;
        // A poll that panicked has left its parts here.
        self.parts = in_parts.then_some(Parts { began_ns, count: 1, longest_ns: 0 });
        began_ns
    }

    fn next_part(&mut self) {
        let Some(parts) = &mut self.parts else { return };
        let now_ns = now_ns();
        if now_ns.saturating_sub(parts.began_ns) >= PART_NS_MIN {
            let longest_ns = parts.longest_by(now_ns);
            *parts = Parts { began_ns: now_ns, count: parts.count + 1, longest_ns };
        }
    }

    fn leave_out(&mut self, took_ns: u64) {
        self.left_out_ns += took_ns;
        if let Some(parts) = &mut self.parts {
            parts.began_ns += took_ns;
        }
    }

    fn end(&mut self, host: &Host, began_ns: u64) -> Measurement {
        let ended_ns = now_ns();
        let wall_ns = ended_ns.saturating_sub(began_ns + self.left_out_ns);
        let preempted_ns = self.preempted_ns(host, wall_ns, ended_ns);
        let took_ns = wall_ns - preempted_ns;
        let (parts, longest_ns) = match self.parts.take() {
            Some(parts) if parts.count > 1 => {
                // Nobody knows in which part the thread was preempted: each part bears its share.
                let share = parts.longest_by(ended_ns) as f64 / wall_ns.max(1) as f64;
                (parts.count, took_ns.min((took_ns as f64 * share) as u64))
            }
            _ => (1, took_ns),
        };
        Measurement { ended_ns, took_ns, preempted_ns, parts, longest_ns }
    }

    /// For how much of a poll its thread was preempted; 0 for a short poll.
    fn preempted_ns(&mut self, host: &Host, wall_ns: u64, ended_ns: u64) -> u64 {
        let is_long = wall_ns >= CHECKED_NS_MIN;
        let spent = if is_long { (host.spent)() } else { None };
        let spent_before = std::mem::replace(&mut self.spent, spent);
        let is_stale = self.queue_wait.is_none_or(|read| read.is_stale(ended_ns));
        // A short poll refreshes a stale reading as well: the next long poll counts from there.
        let waited_ns = if is_long || is_stale { self.read_queue_wait(host, ended_ns) } else { 0 };
        if !is_long {
            return 0;
        }
        let off_cpu_ns = spent_before.zip(spent).and_then(|(before, now)| {
            // Between two long polls in a row a thread runs little else.
            let ran_ns = now.ran.saturating_sub(before.ran).as_nanos() as u64;
            // A thread that waited for something may have blocked for as long as it was off its
            // CPU. A CPU clock that stands still tells nothing.
            let is_known = now.waits == before.waits && ran_ns > 0;
            is_known.then(|| wall_ns.saturating_sub(ran_ns))
        });
        off_cpu_ns.unwrap_or(waited_ns).min(wall_ns)
    }

    /// The thread's run queue wait since the reading before this one.
    fn read_queue_wait(&mut self, host: &Host, now_ns: u64) -> u64 {
        let total = (host.starved)();
        let before = self.queue_wait.replace(QueueWait { read_ns: now_ns, total });
        before.map_or(0, |before| total.saturating_sub(before.total).as_nanos() as u64)
    }
}

/// The decision of [`let_finish`] that a thread follows.
struct Follows {
    /// The address of the policy that has decided; 0 is none.
    policy: usize,
    lets_finish: bool,
    /// Decisions of other policies since the latest one of this policy.
    others: u32,
}

impl Follows {
    const NOTHING: Follows = Follows { policy: 0, lets_finish: false, others: 0 };

    /// Takes a decision. `true`: it is of the policy that the thread follows, and new.
    fn changes(&mut self, policy: usize, lets: bool) -> bool {
        if self.policy != policy {
            self.others += 1;
            if self.policy != 0 && self.others < BATCH_RUNS {
                return false;
            }
            // The policy that was followed may be gone: its server may have ended.
            self.policy = policy;
        }
        self.others = 0;
        std::mem::replace(&mut self.lets_finish, lets) != lets
    }
}

/// The run queue wait of a thread since the thread started.
#[derive(Clone, Copy)]
struct QueueWait {
    read_ns: u64,
    total: Duration,
}

impl QueueWait {
    fn is_stale(&self, now_ns: u64) -> bool {
        now_ns.saturating_sub(self.read_ns) >= QUEUE_WAIT_REFRESH.as_nanos() as u64
    }
}

/// The runs that a poll would have been on a poller.
#[derive(Clone, Copy)]
struct Parts {
    /// When the present part began.
    began_ns: u64,
    /// Parts, with the present one.
    count: u32,
    /// The longest part before the present one, in wall-clock time.
    longest_ns: u64,
}

impl Parts {
    /// The longest part if the present one ends now.
    fn longest_by(&self, now_ns: u64) -> u64 {
        self.longest_ns.max(now_ns.saturating_sub(self.began_ns))
    }
}

/// Runs that a thread has measured and not reported yet. A thread that runs handlers of several
/// policies keeps a batch for one of them and reports each run of the others by itself.
struct Batch {
    /// The address of the batch's policy; 0 is none.
    policy: usize,
    tally: Tally,
    /// Runs of other policies since the latest run of this one.
    others: u32,
}

impl Batch {
    const NEW: Batch = Batch { policy: 0, tally: Tally::EMPTY, others: 0 };

    fn add(&mut self, policy: usize, poll: &Measurement, blocking_ns_min: u64) -> Option<Tally> {
        if self.policy != policy {
            self.others += 1;
            if self.policy != 0 && self.others < BATCH_RUNS {
                let mut tally = Tally::EMPTY;
                tally.add(poll, blocking_ns_min);
                return Some(tally);
            }
            // The batch's policy may be gone: its server may have ended.
            *self = Batch { policy, ..Batch::NEW };
        }
        self.others = 0;
        self.tally.add(poll, blocking_ns_min);
        let is_due = self.tally.runs >= BATCH_RUNS || self.tally.longest_ns[0] >= CHECKED_NS_MIN;
        is_due.then(|| std::mem::replace(&mut self.tally, Tally::EMPTY))
    }

    fn put_back(&mut self, policy: usize, batch: &Tally) -> bool {
        let is_own = self.policy == policy;
        if is_own {
            self.tally.merge(batch);
        }
        is_own
    }
}

/// Sums over the lengths of runs.
pub(super) struct Tally {
    pub(super) runs: u32,
    sum_ns: u64,
    /// The sum of the squared lengths, in ns².
    squares: f64,
    /// For how long the threads of these runs were preempted.
    pub(super) preempted_ns: u64,
    /// The sum of the lengths of those runs that block a poller.
    blocking_ns: u64,
    /// The longest runs, in descending order.
    pub(super) longest_ns: [u64; OUTLIERS_MAX],
}

/// How much the runs of a window block the other connections of a poller, or would block them if
/// they ran on a poller.
#[derive(Clone, Copy, Debug)]
pub(super) struct Blocking {
    /// The mean delay of a run by the run before it.
    pub(super) delay_ns: u64,
    /// The share of the time in which a poller runs a long handler, in millionths.
    pub(super) held_up_ppm: u64,
}

impl Tally {
    pub(super) const EMPTY: Tally = Tally {
        runs: 0,
        sum_ns: 0,
        squares: 0.0,
        preempted_ns: 0,
        blocking_ns: 0,
        longest_ns: [0; OUTLIERS_MAX],
    };

    /// Adds the longest part by itself, and the others as runs of their mean length.
    fn add(&mut self, poll: &Measurement, blocking_ns_min: u64) {
        self.preempted_ns += poll.preempted_ns;
        self.add_runs(1, poll.longest_ns, blocking_ns_min);
        if poll.parts > 1 {
            let others = poll.parts - 1;
            let each_ns = (poll.took_ns - poll.longest_ns) / u64::from(others);
            self.add_runs(others, each_ns, blocking_ns_min);
        }
    }

    fn add_runs(&mut self, count: u32, each_ns: u64, blocking_ns_min: u64) {
        let sum_ns = each_ns * u64::from(count);
        self.runs += count;
        self.sum_ns += sum_ns;
        self.squares += (sum_ns as f64) * (each_ns as f64);
        if each_ns >= blocking_ns_min {
            self.blocking_ns += sum_ns;
        }
        self.keep_longest(each_ns);
    }

    pub(super) fn merge(&mut self, other: &Tally) {
        self.runs += other.runs;
        self.sum_ns += other.sum_ns;
        self.squares += other.squares;
        self.preempted_ns += other.preempted_ns;
        self.blocking_ns += other.blocking_ns;
        for took_ns in other.longest_ns {
            self.keep_longest(took_ns);
        }
    }

    fn keep_longest(&mut self, mut took_ns: u64) {
        for longest in &mut self.longest_ns {
            if took_ns > *longest {
                std::mem::swap(longest, &mut took_ns);
            }
        }
    }

    /// The blocking by these runs, without the `outliers` longest ones, on one poller that ran all
    /// of them in `lasted_ns`. With `by_spread`, run lengths count by how much they differ; see
    /// `policy.rs`.
    pub(super) fn blocking(
        &self,
        lasted_ns: u64,
        blocking_ns_min: u64,
        by_spread: bool,
        outliers: usize,
    ) -> Blocking {
        let outliers = &self.longest_ns[..outliers];
        let square = |ns: f64| ns * ns;
        let mut squares = self.squares - outliers.iter().map(|ns| square(*ns as f64)).sum::<f64>();
        if by_spread {
            let runs = self.runs.saturating_sub(outliers.len() as u32).max(1);
            let sum_ns = self.sum_ns - outliers.iter().sum::<u64>();
            squares -= square(sum_ns as f64) / f64::from(runs) * (1.0 + SPREAD_IGNORED);
        }
        let long_outliers_ns = outliers.iter().filter(|ns| **ns >= blocking_ns_min).sum::<u64>();
        // `blocking_ns` used the limit that held when a run ended. That limit may have been higher.
        let blocking_ns = self.blocking_ns.saturating_sub(long_outliers_ns);
        let lasted_ns = lasted_ns.max(1) as f64;
        Blocking {
            // A difference of large sums of floating-point numbers may be below zero.
            delay_ns: (squares.max(0.0) / (2.0 * lasted_ns)) as u64,
            held_up_ppm: (blocking_ns as f64 / lasted_ns * 1e6) as u64,
        }
    }
}

/// What it takes to wake a thread that sleeps, in nanoseconds: half of a round trip between two
/// threads. Measured at the first call in the process.
pub(super) fn wake_cost_ns() -> u64 {
    static COST: OnceLock<u64> = OnceLock::new();
    *COST.get_or_init(|| {
        let (there, called) = mpsc::sync_channel::<()>(0);
        let (answers, back) = mpsc::sync_channel::<()>(0);
        let echo = thread::Builder::new()
            .name("ringpoll-t".to_owned())
            .spawn(move || while called.recv().is_ok() && answers.send(()).is_ok() {});
        let Ok(echo) = echo else { return WAKE_NS_GUESS };
        let mut took: Vec<u64> = (0..WAKE_TRIALS)
            .filter_map(|_| {
                let began = Instant::now();
                there.send(()).ok()?;
                back.recv().ok()?;
                Some(began.elapsed().as_nanos() as u64 / 2)
            })
            .collect();
        drop(there);
        // An error would be a panic of the thread, and nothing in it panics.
        let _ = echo.join();
        took.sort_unstable();
        let median = took.get(took.len() / 2).copied().unwrap_or(WAKE_NS_GUESS);
        median.clamp(WAKE_NS_GUESS / WAKE_NS_FACTOR, WAKE_NS_GUESS * WAKE_NS_FACTOR)
    })
}

/// A poll of this length or more is checked for preemption and reported at once. For a shorter poll
/// the check would cost too much: it takes three system calls.
pub(super) const CHECKED_NS_MIN: u64 = 50_000;

/// A reading of the run queue wait is refreshed after this time. A long poll subtracts the wait
/// since the latest reading, which may have been in the time before the poll.
const QUEUE_WAIT_REFRESH: Duration = Duration::from_millis(1);

/// A shorter part does not count as a run: it has only looked for input.
const PART_NS_MIN: u64 = 2_000;

/// A thread reports its runs after this many.
const BATCH_RUNS: u32 = 64;

/// How many of the longest runs of a window may be left out as outliers.
pub(super) const OUTLIERS_MAX: usize = 2;

/// Runs count as equally long while the variance of their lengths is at most this part of the
/// squared mean. The lengths of a handler that always computes for 100 µs differed by a tenth.
const SPREAD_IGNORED: f64 = 0.25;

/// The cost of a wake-up where it cannot be measured.
const WAKE_NS_GUESS: u64 = 5_000;
/// A measured cost is limited to this factor above and below the guess.
const WAKE_NS_FACTOR: u64 = 5;
/// Wake-ups to measure: they take less than a millisecond.
const WAKE_TRIALS: usize = 50;

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::cell::Cell;

    thread_local! {
        static NOW: Cell<(Duration, Option<Spent>)> = const { Cell::new((Duration::ZERO, None)) };
    }

    const HOST: Host = Host {
        begin: || {},
        let_finish: |_| {},
        starved: || NOW.get().0,
        spent: || NOW.get().1,
        used: || Duration::ZERO,
    };

    fn time<T>(host: &Host, in_parts: bool, code: impl FnOnce() -> T) -> (T, Measurement) {
        let began_ns = begin(in_parts);
        let done = code();
        (done, end(host, began_ns))
    }

    #[test]
    fn a_thread_between_two_policies_follows_one_until_the_other_is_alone() {
        let mut follows = Follows::NOTHING;
        assert!(follows.changes(1, true));
        for _ in 0..1000 {
            assert!(!follows.changes(2, false) && !follows.changes(1, true));
        }
        assert_eq!((0..BATCH_RUNS).filter(|_| follows.changes(2, false)).count(), 1);
        assert!(!follows.changes(2, false) && follows.changes(2, true));
    }

    /// A poll that ends after `wall_ns`: the time that it took, and the time of preemption.
    fn poll(wall_ns: u64) -> (u64, u64) {
        THREAD.with_borrow_mut(|thread| {
            let preempted_ns = thread.preempted_ns(&HOST, wall_ns, now_ns());
            (wall_ns - preempted_ns, preempted_ns)
        })
    }

    /// A poll of a millisecond. At its end the thread has waited in the run queue, run and waited
    /// for events so much since it started.
    fn long_poll(queued_us: u64, ran_us: u64, waits: u64) -> (u64, u64) {
        let spent = Spent { ran: Duration::from_micros(ran_us), waits };
        NOW.set((Duration::from_micros(queued_us), Some(spent)));
        poll(1_000_000)
    }

    fn took(took_us: u64) -> (u64, u64) {
        (took_us * 1000, 1_000_000 - took_us * 1000)
    }

    #[test]
    fn a_run_behind_another_one_took_what_its_thread_ran_unless_that_waited() {
        assert_eq!(long_poll(0, 1_000, 7), took(1000), "nothing is known of the time before");
        assert_eq!(long_poll(100, 1_300, 7), took(300), "the rest is steal time");
        // The run queue wait of 100 µs was subtracted from the poll before.
        assert_eq!(long_poll(200, 1_350, 8), took(900), "it may have blocked for as long");
        assert_eq!(long_poll(200, 1_650, 8), took(300));
        assert_eq!(long_poll(500, 1_650, 8), took(700), "the CPU clock stands still");
    }

    #[test]
    fn nobody_knows_what_a_thread_ran_between_two_runs_with_a_short_one_between_them() {
        long_poll(0, 1_000, 7);
        assert_eq!(poll(1_000), (1_000, 0));
        assert_eq!(long_poll(400, 1_300, 7), took(600));
    }

    #[test]
    fn what_a_run_takes_in_while_it_runs_is_another_part_of_it() {
        next_part();
        let pass = || thread::sleep(Duration::from_nanos(PART_NS_MIN));
        let runs = || {
            next_part();
            pass();
            next_part();
            thread::sleep(Duration::from_millis(1));
            next_part();
            pass();
        };
        let ((), poll) = time(&HOST, true, runs);
        assert_eq!(poll.parts, 3);
        assert!(poll.longest_ns >= 1_000_000 && poll.longest_ns < poll.took_ns, "{poll:?}");
        assert!(THREAD.with_borrow(|thread| thread.parts.is_none()));
        let ((), poll) = time(&HOST, false, runs);
        assert_eq!((poll.parts, poll.longest_ns), (1, poll.took_ns));
    }

    #[test]
    fn what_is_left_out_of_a_poll_is_not_its_time() {
        let long = Duration::from_millis(20);
        let began = Instant::now();
        let ((), poll) = time(&HOST, false, || leave_out(|| thread::sleep(long)));
        let other = began.elapsed() - Duration::from_nanos(poll.took_ns);
        assert!(other >= long, "{poll:?}");
        leave_out(|| thread::sleep(long));
        let ((), poll) = time(&HOST, false, || thread::sleep(long));
        assert!(poll.took_ns >= long.as_nanos() as u64, "the time before this poll counts");
    }

    #[test]
    fn a_part_bears_its_share_of_the_preemption() {
        let mut thread = ThreadRecord::NEW;
        // Reads the run queue wait, which the next poll counts from.
        NOW.set((Duration::ZERO, None));
        thread.preempted_ns(&HOST, 0, now_ns());
        NOW.set((Duration::from_secs(50), None));
        let began_ns = now_ns() - 100_000_000_000;
        thread.parts = Some(Parts { began_ns: now_ns(), count: 2, longest_ns: 60_000_000_000 });
        let poll = thread.end(&HOST, began_ns);
        assert!((49_999_000_000..51_000_000_000).contains(&poll.took_ns), "{poll:?}");
        let share = poll.longest_ns as f64 / poll.took_ns as f64;
        assert!((0.59..=0.6).contains(&share), "{poll:?}");
    }

    #[test]
    fn the_limit_of_long_runs_may_change_between_a_run_and_the_end_of_its_window() {
        let mut tally = Tally::EMPTY;
        tally.add_runs(1, 300_000, 500_000);
        assert_eq!(tally.blocking(1_000_000, 200_000, false, 1).held_up_ppm, 0);
    }

    #[test]
    fn waking_a_thread_costs_something_believable() {
        let (cost, factor) = (wake_cost_ns(), WAKE_NS_FACTOR);
        assert!((WAKE_NS_GUESS / factor..=WAKE_NS_GUESS * factor).contains(&cost), "{cost}");
    }
}
