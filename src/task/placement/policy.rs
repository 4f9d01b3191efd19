//! Decides whether handlers run on pollers or on workers, and how the threads that run them share a
//! CPU. [`Placement::Auto`](crate::Placement) leaves both decisions to this file. With
//! `Placement::Pool` handlers stay on workers, unless the process may use only one CPU.
//!
//! # The problem
//!
//! A poller that runs a handler does nothing else. The other connections of this poller wait for
//! the end of the handler: head-of-line blocking. A worker thread avoids that wait, but handing a
//! run to a worker costs a wake-up, some 5 µs. So short handlers belong on the poller, and long
//! handlers on workers.
//!
//! # What is measured
//!
//! Every poll of a handler is timed, wherever it runs (`measurement.rs`). The times are summed up
//! over windows of 20 ms. The cost of a wake-up is measured once in the process.
//!
//! # The rule
//!
//! Handlers belong on workers if one of these is true of a window:
//!
//! 1. The *mean delay* by other handlers is more than two wake-ups. A request that arrives at any
//!    moment finds the poller in a run of length T with a probability of T / window, and then waits
//!    for T / 2 on average. Summed over all runs:
//!
//!    ```text
//!    mean delay = sum of T² / (2 · window · pollers)
//!    ```
//!
//! 2. *Long runs*, of at least 200 µs and at least 16 wake-ups, fill more than 1 % of the pollers'
//!    time. The mean hides rare long runs, but the slowest hundredth of the requests waits for
//!    them.
//!
//! An example, with one poller and a wake-up of 5 µs:
//!
//! | runs | in a window of 20 ms | sum of T² | mean delay | handlers run on |
//! |---|---|---|---|---|
//! | 10,000/s of 10 µs | 200 · 10 µs | 20,000 µs² | 0.5 µs | the poller |
//! | 100/s of 1 ms | 2 · 1 ms | 2,000,000 µs² | 50 µs | workers |
//!
//! Both take a tenth of the poller's time. The long runs do a hundred times the harm, because a run
//! that is twice as long is met twice as often and waited for twice as long.
//!
//! # When handlers move
//!
//! All handlers of a server move together, at the end of a window: to the workers after one window
//! in which the rule holds; back to the poller after three *calm* windows in a row, with less than
//! half of the first limit (one wake-up) and of the second limit (0.5 %). Handlers that had to
//! leave again within 200 ms after they came back need twice as many calm windows, up to 25. So a
//! few long runs in a second do not move the handlers to and fro.
//!
//! # Outliers
//!
//! A hypervisor that takes the CPU away in the middle of a run (steal time) makes this run look
//! long, and often nobody tells. So up to two of the longest runs of a window are left out where
//! they alone exceed a limit. Two such exceptions are allowed at first, and one more every 10
//! windows.
//!
//! # When CPUs are short
//!
//! The rule assumes that a worker finds an idle CPU. While the process uses 90 % of its CPUs or
//! more (until it uses less than 70 %), a run on a worker delays the others as well: it takes the
//! CPU that they need. Then a move only helps short runs that would wait behind longer ones, so a
//! run counts by how much it differs from the mean length:
//!
//! ```text
//! mean delay = (sum of T² − 1.25 · number of runs · (mean T)²) / (2 · window · pollers)
//! ```
//!
//! The factor 1.25 instead of 1 makes handlers of almost the same length count as equal. These stay
//! on the poller, without wake-ups, unless they are long enough for the second limit. A run is long
//! from 500 µs on while CPUs are short, because preemption makes some runs look longer then.
//!
//! # How threads share a CPU
//!
//! A thread that wakes up may preempt the running thread. A worker that is woken for the first run
//! of a round then preempts the poller, finds one run, and sleeps again: each run costs two context
//! switches. So while CPUs are short, and handlers run on workers, threads that wake up let the
//! running thread finish its time slice (`SCHED_BATCH`): a worker finds all runs of a round. Where
//! long runs fill more than 1 % of the time (the second limit), threads preempt as usual: a short
//! run must not wait for the end of a long one.
//!
//! # What is left out
//!
//! * Requests that arrive in bursts wait longer than the mean delay says.
//! * The load is taken to be equal on all pollers of the server.
//! * How long runs wait for a worker is not measured.
//! * Short and long handlers of one server are not told apart.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use super::measurement::{self, Blocking, Host, Measurement, OUTLIERS_MAX, Tally};
use crate::clock::now_ns;
use crate::sync::{Mutex, lock, try_lock};
use crate::task::queue::is_worker;
use crate::user_code;

/// What [`Placement::Auto`](crate::Placement) has decided for the handlers of a server, and the
/// figures that it decided by.
///
/// Figures are those of the last complete window. A window lasts 20 ms, or longer where handlers
/// run less often.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct PlacementStats {
    /// `true`: handlers run on the pollers at present. `false`: they run on workers.
    pub is_inline: bool,
    /// The mean delay of a request by the handlers of other connections on its poller, in
    /// nanoseconds, if all handlers run on pollers. While `is_crowded`, only as far as handlers
    /// differ in how long they run. Handlers move to workers above two times `wake_ns`.
    pub delay_ns: u64,
    /// The share of the CPUs available to the process that was in use, in millionths: CPU time of
    /// the whole process, spinning included, and the time for which this server's handlers were
    /// preempted.
    pub used_ppm: u64,
    /// CPUs are short: `used_ppm` has reached 900,000, and has not been below 700,000 since.
    pub is_crowded: bool,
    /// The share of a poller's time that handlers of at least 16 times `wake_ns` and at least
    /// 200 µs (500 µs while `is_crowded`) take, in millionths, if all handlers run on pollers.
    /// Handlers move to workers above 10,000.
    pub held_up_ppm: u64,
    /// The cost of waking a worker, in nanoseconds, as measured once in the process.
    pub wake_ns: u64,
    /// How often the handlers have moved, to the pollers or to the workers.
    pub flips: u64,
}

/// Where the handlers of a server may run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Places {
    /// On pollers and on workers; on pollers until they have been measured.
    PollersFirst,
    /// On pollers and on workers; on workers until they have been measured.
    WorkersFirst,
    /// On workers.
    Workers,
}

/// The decision for one server. All threads that run its handlers share it.
pub(in crate::task) struct Policy {
    places: Places,
    is_inline: AtomicBool,
    /// Threads that wake up let the running thread finish its time slice.
    lets_finish: AtomicBool,
    /// [`PlacementStats::is_crowded`], for threads that do not take the lock.
    is_crowded: AtomicBool,
    pollers: u64,
    /// CPUs that the process may use.
    cpus: u64,
    wake_ns: u64,
    host: Host,
    window: Mutex<Window>,
}

/// Runs since the last decision, and what the next decision depends on.
struct Window {
    began_ns: u64,
    /// The CPU time of the process when the window began.
    used: Duration,
    tally: Tally,
    /// How many windows in a row were calm.
    calm: u32,
    /// How many calm windows in a row bring the handlers back to the pollers.
    calm_wanted: u32,
    /// When the handlers last came back.
    came_back_ns: Option<u64>,
    /// Outliers that may be left out, in units of 1 / [`WINDOWS_PER_OUTLIER`].
    outlier_credit: u32,
    /// As of the last complete window.
    stats: PlacementStats,
}

impl Policy {
    /// For the handlers of `pollers`, in a process that may use `cpus`. A wake-up costs `wake_ns`.
    pub(super) fn new(
        places: Places,
        pollers: usize,
        cpus: usize,
        wake_ns: u64,
        host: Host,
    ) -> Policy {
        let is_inline = places == Places::PollersFirst;
        Policy {
            places,
            is_inline: AtomicBool::new(is_inline),
            lets_finish: AtomicBool::new(false),
            is_crowded: AtomicBool::new(false),
            pollers: pollers.max(1) as u64,
            cpus: cpus.max(1) as u64,
            wake_ns,
            host,
            window: Mutex::new(Window {
                began_ns: now_ns(),
                used: (host.used)(),
                tally: Tally::EMPTY,
                calm: 0,
                calm_wanted: CALM_WINDOWS,
                came_back_ns: None,
                outlier_credit: OUTLIER_CREDIT_MAX,
                stats: PlacementStats {
                    is_inline,
                    delay_ns: 0,
                    used_ppm: 0,
                    is_crowded: false,
                    held_up_ppm: 0,
                    wake_ns,
                    flips: 0,
                },
            }),
        }
    }

    /// Whether handlers run on the pollers at present.
    #[inline]
    pub(super) fn is_inline(&self) -> bool {
        self.is_inline.load(Ordering::Relaxed)
    }

    pub(super) fn stats(&self) -> PlacementStats {
        lock(&self.window).stats
    }

    /// Has the calling thread, which runs handlers or queues them, follow the decision how it
    /// shares its CPU.
    #[inline]
    pub(super) fn follow(&self) {
        let lets = self.lets_finish.load(Ordering::Relaxed);
        measurement::let_finish(std::ptr::from_ref(self).addr(), &self.host, lets);
    }

    /// Runs `code`, a poll of a handler, and records its length.
    #[inline]
    pub(super) fn time<T>(&self, code: impl FnOnce() -> T) -> T {
        let began_ns = self.begin_poll();
        let done = code();
        self.end_poll(began_ns);
        done
    }

    /// Called before a poll of a handler. On a worker, input that the handler takes in meanwhile
    /// divides the poll into several runs. A poller receives no input meanwhile.
    #[inline]
    pub(super) fn begin_poll(&self) -> u64 {
        self.follow();
        measurement::begin(is_worker())
    }

    /// Called after a poll that began at `began_ns`. Records its length.
    #[inline]
    pub(super) fn end_poll(&self, began_ns: u64) {
        self.record(&measurement::end(&self.host, began_ns));
    }

    fn record(&self, poll: &Measurement) {
        let address = std::ptr::from_ref(self).addr();
        let Some(batch) = measurement::collect(address, poll, self.blocking_ns_min()) else {
            return;
        };
        let mut window = match try_lock(&self.window) {
            Some(window) => window,
            // Another thread has the lock. Waiting for it could cost a context switch.
            None if measurement::put_back(address, &batch) => return,
            None => lock(&self.window),
        };
        window.tally.merge(&batch);
        let lasted_ns = poll.ended_ns.saturating_sub(window.began_ns);
        if lasted_ns < WINDOW.as_nanos() as u64 {
            return;
        }
        let has_moved = self.end_window(&mut window, lasted_ns, poll.ended_ns);
        let stats = window.stats;
        drop(window);
        if has_moved {
            // Without the lock: a subscriber is code of the user, and may ask for the statistics.
            user_code::log(|| tracing::debug!(?stats, "handlers move"));
        }
    }

    /// Decides where handlers run, and begins the next window. `true`: the handlers move.
    fn end_window(&self, window: &mut Window, lasted_ns: u64, now_ns: u64) -> bool {
        let used_ppm = self.used_ppm(window, lasted_ns);
        let crowded_ppm =
            if window.stats.is_crowded { CROWDED_UNTIL_PPM } else { CROWDED_FROM_PPM };
        let is_crowded = used_ppm >= crowded_ppm;
        let blocking = self.blocking(window, lasted_ns, is_crowded);
        let was_inline = self.is_inline();
        window.calm = if self.is_calm(blocking) { window.calm + 1 } else { 0 };
        let is_inline = match was_inline {
            true => !self.is_too_much(blocking),
            false => self.places != Places::Workers && window.calm >= window.calm_wanted,
        };
        let lets_finish = !is_inline && is_crowded && !self.is_held_up(blocking);
        self.lets_finish.store(lets_finish, Ordering::Relaxed);
        self.is_crowded.store(is_crowded, Ordering::Relaxed);
        let has_moved = is_inline != was_inline;
        if has_moved {
            self.is_inline.store(is_inline, Ordering::Relaxed);
            window.calm = 0;
            window.choose_calm_wanted(is_inline, now_ns);
        }
        window.stats = PlacementStats {
            is_inline,
            delay_ns: blocking.delay_ns,
            used_ppm,
            is_crowded,
            held_up_ppm: blocking.held_up_ppm,
            wake_ns: self.wake_ns,
            flips: window.stats.flips + u64::from(has_moved),
        };
        window.tally = Tally::EMPTY;
        window.began_ns = now_ns;
        has_moved
    }

    /// The share of the CPUs that the process has used or waited for in this window.
    fn used_ppm(&self, window: &mut Window, lasted_ns: u64) -> u64 {
        let used = (self.host.used)();
        let before = std::mem::replace(&mut window.used, used);
        let used_ns = used.saturating_sub(before).as_nanos() as u64 + window.tally.preempted_ns;
        (used_ns as f64 / (lasted_ns * self.cpus) as f64 * 1e6) as u64
    }

    /// The blocking by the runs of this window, without the longest runs while they exceed a limit
    /// and the credit lasts.
    fn blocking(&self, window: &mut Window, lasted_ns: u64, is_crowded: bool) -> Blocking {
        let without = |outliers| {
            let lasted_ns = lasted_ns * self.pollers;
            window.tally.blocking(lasted_ns, self.blocking_ns_min(), is_crowded, outliers)
        };
        let allowed = window.outlier_credit / WINDOWS_PER_OUTLIER;
        window.outlier_credit = (window.outlier_credit + 1).min(OUTLIER_CREDIT_MAX);
        let mut blocking = without(0);
        for outliers in 1..=allowed {
            if !self.is_too_much(blocking) {
                break;
            }
            blocking = without(outliers as usize);
            window.outlier_credit -= WINDOWS_PER_OUTLIER;
        }
        blocking
    }

    /// Handlers on the pollers would move to the workers.
    fn is_too_much(&self, blocking: Blocking) -> bool {
        blocking.delay_ns > DELAY_WAKES_MAX * self.wake_ns || self.is_held_up(blocking)
    }

    /// Long runs delay the others.
    fn is_held_up(&self, blocking: Blocking) -> bool {
        blocking.held_up_ppm > HELD_UP_PPM_MAX
    }

    /// Enough such windows bring handlers back to the pollers.
    fn is_calm(&self, blocking: Blocking) -> bool {
        blocking.delay_ns < DELAY_WAKES_MAX * self.wake_ns / 2
            && blocking.held_up_ppm < HELD_UP_PPM_MAX / 2
    }

    /// Runs of this length or more count for the second limit of the rule.
    fn blocking_ns_min(&self) -> u64 {
        let floor_ns = match self.is_crowded.load(Ordering::Relaxed) {
            true => BLOCKING_NS_FLOOR_CROWDED,
            false => BLOCKING_NS_FLOOR,
        };
        (BLOCKING_WAKES * self.wake_ns).max(floor_ns)
    }
}

impl Window {
    /// The handlers move: chooses how many calm windows it takes next time.
    fn choose_calm_wanted(&mut self, is_inline: bool, now_ns: u64) {
        if is_inline {
            self.came_back_ns = Some(now_ns);
            return;
        }
        let proven_ns = CALM_PROVEN.as_nanos() as u64;
        let came_back_too_early =
            self.came_back_ns.is_some_and(|since_ns| now_ns.saturating_sub(since_ns) < proven_ns);
        self.calm_wanted = match came_back_too_early {
            true => (2 * self.calm_wanted).min(CALM_WINDOWS_MAX),
            false => CALM_WINDOWS,
        };
    }
}

pin_project_lite::pin_project! {
    /// A run in a task, which records how long its polls take.
    pub(in crate::task) struct Timed<F> {
        #[pin]
        run: F,
        policy: Arc<Policy>,
    }
}

impl<F> Timed<F> {
    pub(in crate::task) fn new(run: F, policy: &Arc<Policy>) -> Timed<F> {
        Timed { run, policy: Arc::clone(policy) }
    }
}

impl<F: Future<Output = ()>> Future for Timed<F> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = self.project();
        let run = this.run;
        this.policy.time(|| run.poll(cx))
    }
}

/// How long runs are summed up before a decision.
const WINDOW: Duration = Duration::from_millis(20);

/// Handlers move to the workers when they delay others by more wake-ups than this. The length of a
/// run includes its flush, which is a system call with epoll.
const DELAY_WAKES_MAX: u64 = 2;

/// A run of so many wake-ups blocks a poller: a request that waits for it had better woken a
/// worker.
const BLOCKING_WAKES: u64 = 16;
/// Shorter runs never count as blocking, however cheap a wake-up is: a connection that has sent
/// many small requests has them answered in one run.
const BLOCKING_NS_FLOOR: u64 = 200_000;
/// The same while CPUs are short. Preemption makes some runs of 100 µs look longer than 200 µs, and
/// the time in the run queue is known only roughly.
const BLOCKING_NS_FLOOR_CROWDED: u64 = 500_000;

/// Handlers move to the workers when blocking runs take more than this share of the pollers' time.
/// On two CPUs, with 4,000 requests a second of which 1 % take a millisecond, the P99 of the others
/// is 0.2 ms on workers and 0.8 ms on pollers, although the mean delay is no more than a wake-up.
const HELD_UP_PPM_MAX: u64 = 10_000;

/// Calm windows before handlers come back to the pollers. Together with the window in which
/// handlers became short, this is well within 100 ms.
const CALM_WINDOWS: u32 = 3;
/// The most calm windows that are asked for: half a second.
const CALM_WINDOWS_MAX: u32 = 25;
/// Handlers that stay on the pollers for this long came back for good reason.
const CALM_PROVEN: Duration = Duration::from_millis(200);

/// CPUs are short from this share in use on, in millionths.
const CROWDED_FROM_PPM: u64 = 900_000;
/// CPUs are no longer short below this share. The distance between the two is more than a move of
/// the handlers changes: they use up to a third more or less CPU time where they have moved to.
const CROWDED_UNTIL_PPM: u64 = 700_000;

/// After so many windows one more outlier may be left out. Hypervisors take a CPU away a few times
/// in a second, and seldom more often in a window.
const WINDOWS_PER_OUTLIER: u32 = 10;
const OUTLIER_CREDIT_MAX: u32 = OUTLIERS_MAX as u32 * WINDOWS_PER_OUTLIER;

#[cfg(all(test, not(loom)))]
mod tests;
