//! Whether a server's handlers are worth crossing threads.
//!
//! A run of length T on a poller delays the others there by λ·E[T²]/2 on average, where λ is how
//! many come in a unit of time (the Pollaczek–Khinchine formula): the sum of the squares over twice
//! the time in which they ran. Crossing to a worker costs a wake-up. So while the first is below
//! the second, handlers run on the poller.
//!
//! That is about the mean. A few long runs in a second hardly move it, and yet are all that those
//! see who have to wait for them: where pollers would be held up for more than a hundredth of the
//! time by runs that are worth many wake-ups, the slowest hundredth of the others is theirs, and
//! handlers run on workers as well.
//!
//! All that is about waiting for a poller while CPUs are idle. Where the process has none left,
//! others wait whoever runs what: then a run only delays them by what it takes more than the
//! others do, so the sum of the squares is taken about the mean, and what differs little counts as
//! alike. Handlers of one length all stay on the poller, which does without the wake-ups, and serve
//! more. (So do those that block alike, if others use up the CPUs; but not for longer than a run
//! may hold up a poller.)
//!
//! Runs are timed by the clock on the wall. A long one may have been interrupted by other threads,
//! which says nothing about the handler: what its thread waited for the CPU is taken off. What it
//! waited for anything else is not: a handler that blocks holds up the others for as long. Where
//! one long run follows another, and the thread waited for nothing, it took what the thread ran, at
//! most: that leaves out as well what a host took from a virtual machine. Everywhere else nobody
//! tells of that, so a few of the longest runs of each second are left out.
//!
//! A run on a worker also answers what comes in meanwhile. On a poller that would be another run,
//! so it counts as one.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::num::NonZeroU64;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, mpsc};
use std::task::{Context, Poll};
use std::thread;
use std::time::{Duration, Instant};

use super::own_time::{InParts, OwnTime};
use super::tally::{Harm, Tally, Took};
use crate::clock::now_ns;
use crate::config;
use crate::sync::{Mutex, lock, try_lock};

pub(crate) struct Policy {
    is_inline: AtomicBool,
    pollers: u64,
    wake_ns: u64,
    /// CPUs that the process may use.
    cpus: u64,
    host: Host,
    window: Mutex<Window>,
    /// As of the last window.
    used_ppm: AtomicU64,
    is_crowded: AtomicBool,
    delay_ns: AtomicU64,
    held_up_ppm: AtomicU64,
    flips: AtomicU64,
}

/// What the operating system does for threads that run handlers, and tells of them.
#[derive(Clone, Copy)]
pub(crate) struct Host {
    /// Called by each worker at its start.
    pub(crate) begin: fn(),
    /// For how long the calling thread was ready to run, in all, and others had the CPU.
    pub(crate) starved: fn() -> Duration,
    /// How the calling thread has spent its time. `None`: nobody tells.
    pub(crate) spent: fn() -> Option<Spent>,
    /// The CPU time that the process has used.
    pub(crate) used: fn() -> Duration,
}

/// How a thread has spent its time, in all.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Spent {
    /// It had a CPU.
    pub(crate) ran: Duration,
    /// How often it gave its CPU up, to wait.
    pub(crate) waits: u64,
}

/// What a policy goes by, and what it has decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct PlacementStats {
    /// Handlers run on the poller now.
    pub is_inline: bool,
    /// How long handlers would delay the other connections of a poller, on average, if they ran on
    /// it: in nanoseconds, over the last window of 20 ms. While CPUs are short, what they would
    /// delay them by for not taking all about the same time.
    pub delay_ns: u64,
    /// How much of its CPUs the process used, spinning included, and long runs of its handlers
    /// waited for or a host took from them, in that window: in millionths.
    pub used_ppm: u64,
    /// CPUs are short: that was nine tenths or more, and has not been below seven since.
    pub is_crowded: bool,
    /// For how much of the time a poller would be held up by runs that take longer than 16
    /// wake-ups and 200 µs: in millionths of it, over the same window.
    pub held_up_ppm: u64,
    /// What it costs to wake a worker, in nanoseconds, as measured at the start.
    pub wake_ns: u64,
    /// How often the decision has changed.
    pub flips: u64,
}

struct Window {
    /// On the clock of [`now_ns`].
    began_ns: u64,
    /// What the process had used by then.
    used: Duration,
    tally: Tally,
    /// Windows in a row in which handlers would have been cheap enough for the poller.
    calm: u32,
    /// How many of them it takes.
    calm_wanted: u32,
    /// When handlers last came back to the poller.
    came_back_ns: Option<u64>,
    /// Long runs that may still be left out, in parts of a window's share.
    pardons: u32,
}

thread_local! {
    /// What this thread has not told yet.
    static OWN: RefCell<Own> = const { RefCell::new(Own::NONE) };
    /// When the last run ended that this thread has timed, if the next one follows at once.
    static ENDED_NS: Cell<Option<NonZeroU64>> = const { Cell::new(None) };
}

/// Runs that a thread has not told yet.
struct Own {
    /// The address of the policy that they are for; 0 is none.
    whose: usize,
    tally: Tally,
    /// Runs for other policies since: those are told at once.
    strangers: u32,
}

/// Something else than a run comes next on this thread: it is not part of one.
#[inline]
pub(crate) fn pause_timing() {
    ENDED_NS.set(None);
}

/// A run that goes on.
#[must_use]
pub(crate) struct Timing<'a> {
    policy: &'a Policy,
    began_ns: u64,
}

impl Timing<'_> {
    /// It has ended, or waits.
    #[inline]
    pub(crate) fn end(self) {
        let ended_ns = now_ns();
        ENDED_NS.set(NonZeroU64::new(ended_ns));
        let wall_ns = ended_ns.saturating_sub(self.began_ns);
        let OwnTime { took_ns, starved_ns } = OwnTime::of_run(&self.policy.host, wall_ns, ended_ns);
        self.policy.record(1, took_ns, starved_ns, ended_ns);
    }
}

impl Policy {
    /// For handlers on so many pollers, in a process that may use so many CPUs.
    pub(crate) fn new(pollers: usize, cpus: usize, host: Host) -> Policy {
        Policy {
            host,
            is_inline: AtomicBool::new(true),
            pollers: pollers.max(1) as u64,
            cpus: cpus.max(1) as u64,
            wake_ns: wake_cost_ns(),
            window: Mutex::new(Window {
                began_ns: now_ns(),
                used: (host.used)(),
                tally: Tally::NONE,
                calm: 0,
                calm_wanted: config::CALM_WINDOWS,
                came_back_ns: None,
                pardons: config::PARDONS_MAX * config::WINDOWS_PER_PARDON,
            }),
            used_ppm: AtomicU64::new(0),
            is_crowded: AtomicBool::new(false),
            delay_ns: AtomicU64::new(0),
            held_up_ppm: AtomicU64::new(0),
            flips: AtomicU64::new(0),
        }
    }

    #[inline]
    pub(crate) fn is_inline(&self) -> bool {
        self.is_inline.load(Ordering::Relaxed)
    }

    /// Runs `code`, which is a poll of a handler, and takes its time.
    pub(crate) fn time<T>(&self, code: impl FnOnce() -> T) -> T {
        pause_timing();
        let began_ns = now_ns();
        let run = InParts::begin(began_ns);
        let done = code();
        let ended_ns = now_ns();
        let parts = run.end(ended_ns);
        let wall_ns = ended_ns.saturating_sub(began_ns);
        let OwnTime { took_ns, starved_ns } = OwnTime::of_run(&self.host, wall_ns, ended_ns);
        let longest_ns = parts.longest_ns(took_ns, wall_ns);
        self.record(1, longest_ns, starved_ns, ended_ns);
        if parts.count > 1 {
            self.record(parts.count - 1, took_ns - longest_ns, 0, ended_ns);
        }
        done
    }

    /// The same on a poller, from the end of the run before it on where [nothing
    /// else](pause_timing) came between them: reading the clock is most of what timing costs.
    #[inline]
    pub(crate) fn time_next(&self) -> Timing<'_> {
        Timing { policy: self, began_ns: ENDED_NS.take().map_or_else(now_ns, NonZeroU64::get) }
    }

    /// So many runs that took about the same.
    #[inline]
    fn record(&self, count: u32, took_ns: u64, starved_ns: u64, now_ns: u64) {
        let whose = std::ptr::from_ref(self).addr();
        let each_ns = if count == 1 { took_ns } else { took_ns / u64::from(count) };
        let run = Took { each_ns, count, starved_ns, is_long: each_ns >= self.long_ns() };
        let told = OWN.with_borrow_mut(|own| own.add(whose, run));
        if let Some(tally) = told {
            self.tell(whose, &tally, now_ns);
        }
    }

    #[inline(never)]
    fn tell(&self, whose: usize, tally: &Tally, now_ns: u64) {
        // Another thread is telling something where this fails. Whoever waited for that would wait
        // for its turn on a CPU as well.
        let mut window = match try_lock(&self.window) {
            Some(window) => window,
            None if OWN.with_borrow_mut(|own| own.keep(whose, tally)) => return,
            None => lock(&self.window),
        };
        window.tally.merge(tally);
        let lasted_ns = now_ns.saturating_sub(window.began_ns);
        if lasted_ns >= config::PLACEMENT_WINDOW.as_nanos() as u64 {
            self.decide(&mut window, lasted_ns, now_ns);
            window.tally = Tally::NONE;
            window.began_ns = now_ns;
        }
    }

    /// Whether the process has no CPUs left.
    fn look_for_cpus(&self, window: &mut Window, lasted_ns: u64) -> bool {
        let used = (self.host.used)();
        let before = std::mem::replace(&mut window.used, used);
        let used_ns = used.saturating_sub(before).as_nanos() as u64 + window.tally.starved_ns;
        let used_ppm = (used_ns as f64 / (lasted_ns * self.cpus) as f64 * 1e6) as u64;
        self.used_ppm.store(used_ppm, Ordering::Relaxed);
        let is_crowded = match self.is_crowded.load(Ordering::Relaxed) {
            true => used_ppm >= config::CROWDED_UNTIL_PPM,
            false => used_ppm >= config::CROWDED_PPM,
        };
        self.is_crowded.store(is_crowded, Ordering::Relaxed);
        is_crowded
    }

    /// At once to the workers, and back after a few calm windows.
    fn decide(&self, window: &mut Window, lasted_ns: u64, now_ns: u64) {
        let is_crowded = self.look_for_cpus(window, lasted_ns);
        let lasted_ns = lasted_ns * self.pollers;
        let is_inline = self.is_inline();
        let is_too_much = |harm: Harm| {
            harm.delay_ns > config::DELAY_WAKES_MAX * self.wake_ns
                || harm.held_up_ppm > config::HELD_UP_PPM_MAX
        };
        let harm = window.harm(lasted_ns, self.long_ns(), is_crowded, is_too_much);
        self.delay_ns.store(harm.delay_ns, Ordering::Relaxed);
        self.held_up_ppm.store(harm.held_up_ppm, Ordering::Relaxed);
        let is_calm =
            harm.delay_ns < self.wake_ns && harm.held_up_ppm < config::HELD_UP_PPM_MAX / 2;
        window.calm = if is_calm { window.calm + 1 } else { 0 };
        let wants_inline = match is_inline {
            true => !is_too_much(harm),
            false => window.calm >= window.calm_wanted,
        };
        if wants_inline != is_inline {
            self.is_inline.store(wants_inline, Ordering::Relaxed);
            self.flips.fetch_add(1, Ordering::Relaxed);
            window.calm = 0;
            window.turned(wants_inline, now_ns);
            let Harm { delay_ns, held_up_ppm } = harm;
            let wake_ns = self.wake_ns;
            tracing::debug!(delay_ns, held_up_ppm, wake_ns, wants_inline, "handlers move");
        }
    }

    /// A run of that length holds up a poller.
    #[inline]
    fn long_ns(&self) -> u64 {
        (config::LONG_WAKES * self.wake_ns).max(config::HELD_UP_NS_MIN)
    }

    pub(crate) fn stats(&self) -> PlacementStats {
        PlacementStats {
            is_inline: self.is_inline(),
            delay_ns: self.delay_ns.load(Ordering::Relaxed),
            used_ppm: self.used_ppm.load(Ordering::Relaxed),
            is_crowded: self.is_crowded.load(Ordering::Relaxed),
            held_up_ppm: self.held_up_ppm.load(Ordering::Relaxed),
            wake_ns: self.wake_ns,
            flips: self.flips.load(Ordering::Relaxed),
        }
    }
}

impl Window {
    /// Handlers move, to the poller or from it: how many calm windows the next way back takes.
    fn turned(&mut self, is_inline: bool, now_ns: u64) {
        if is_inline {
            self.came_back_ns = Some(now_ns);
            return;
        }
        let proven_ns = config::CALM_PROVEN.as_nanos() as u64;
        let was_wrong =
            self.came_back_ns.is_some_and(|since_ns| now_ns.saturating_sub(since_ns) < proven_ns);
        self.calm_wanted = match was_wrong {
            true => (2 * self.calm_wanted).min(config::CALM_WINDOWS_MAX),
            false => config::CALM_WINDOWS,
        };
    }

    /// What its runs have done to others, without the longest of them while that is too much and
    /// may still be forgiven.
    fn harm(
        &mut self,
        lasted_ns: u64,
        long_ns: u64,
        is_crowded: bool,
        is_too_much: impl Fn(Harm) -> bool,
    ) -> Harm {
        let allowed = self.pardons / config::WINDOWS_PER_PARDON;
        let full = config::PARDONS_MAX * config::WINDOWS_PER_PARDON;
        self.pardons = (self.pardons + 1).min(full);
        let mut harm = self.tally.harm(lasted_ns, long_ns, is_crowded, 0);
        for pardoned in 1..=allowed {
            if !is_too_much(harm) {
                break;
            }
            harm = self.tally.harm(lasted_ns, long_ns, is_crowded, pardoned as usize);
            self.pardons -= config::WINDOWS_PER_PARDON;
        }
        harm
    }
}

impl Own {
    const NONE: Own = Own { whose: 0, tally: Tally::NONE, strangers: 0 };

    /// Adds a run for that policy. Returns what is to be told.
    #[inline]
    fn add(&mut self, whose: usize, run: Took) -> Option<Tally> {
        if self.whose != whose {
            self.strangers += 1;
            if self.whose != 0 && self.strangers < config::RUNS_PER_TALLY {
                let mut tally = Tally::NONE;
                tally.add(run);
                return Some(tally);
            }
            // Its policy has not been heard of for a while.
            *self = Own { whose, ..Own::NONE };
        }
        self.strangers = 0;
        self.tally.add(run);
        let is_due = self.tally.runs >= config::RUNS_PER_TALLY
            || self.tally.longest_ns[0] >= config::LONG_RUN_NS;
        is_due.then(|| std::mem::replace(&mut self.tally, Tally::NONE))
    }

    /// Takes back what could not be told, to tell it with the next run. `false`: it is a
    /// stranger's.
    #[cold]
    fn keep(&mut self, whose: usize, tally: &Tally) -> bool {
        let is_own = self.whose == whose;
        if is_own {
            self.tally.merge(tally);
        }
        is_own
    }
}

pin_project_lite::pin_project! {
    /// A run whose polls are timed.
    pub(crate) struct Timed<F> {
        #[pin]
        run: F,
        policy: Arc<Policy>,
    }
}

impl<F> Timed<F> {
    pub(crate) fn new(run: F, policy: &Arc<Policy>) -> Timed<F> {
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

/// What it takes to wake a thread that sleeps, measured once: there and back, halved.
fn wake_cost_ns() -> u64 {
    static COST: OnceLock<u64> = OnceLock::new();
    *COST.get_or_init(|| {
        let (there, called) = mpsc::sync_channel::<()>(0);
        let (answers, back) = mpsc::sync_channel::<()>(0);
        let echo = thread::Builder::new()
            .name("ringpoll-t".to_owned())
            .spawn(move || while called.recv().is_ok() && answers.send(()).is_ok() {});
        let Ok(echo) = echo else { return config::WAKE_NS_GUESS };
        let mut took: Vec<u64> = (0..config::WAKE_TRIALS)
            .filter_map(|_| {
                let began = Instant::now();
                there.send(()).ok()?;
                back.recv().ok()?;
                Some(began.elapsed().as_nanos() as u64 / 2)
            })
            .collect();
        drop(there);
        // It has nothing left to do, and nothing in it panics.
        let _ = echo.join();
        took.sort_unstable();
        let median = took.get(took.len() / 2).copied().unwrap_or(config::WAKE_NS_GUESS);
        median.clamp(config::WAKE_NS_GUESS / 5, config::WAKE_NS_GUESS * 5)
    })
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    /// Lets `runs` of that length pass in each of `windows`.
    fn pass(policy: &Policy, windows: u32, runs: u32, took: Duration) {
        pass_used(policy, windows, 0, &[(runs, took)]);
    }

    fn policy(pollers: usize) -> Policy {
        Policy { wake_ns: 5_000, ..Policy::new(pollers, 1, IDLE) }
    }

    const IDLE: Host =
        Host { begin: || {}, starved: || Duration::ZERO, spent: || None, used: || Duration::ZERO };

    thread_local! {
        static USED: Cell<Duration> = const { Cell::new(Duration::ZERO) };
    }

    /// Lets the process use so many millionths of its CPU in each of `windows`, and `runs` pass.
    fn pass_used(policy: &Policy, windows: u32, used_ppm: u32, runs: &[(u32, Duration)]) {
        let window_ns = config::PLACEMENT_WINDOW.as_nanos() as u64;
        for _ in 0..windows {
            USED.set(USED.get() + config::PLACEMENT_WINDOW * used_ppm / 1_000_000);
            let began_ns = lock(&policy.window).began_ns;
            for (count, took) in runs {
                for _ in 0..*count {
                    policy.record(1, took.as_nanos() as u64, 0, began_ns + window_ns / 2);
                }
            }
            // Ends the window, whatever is left of the tally.
            policy.record(1, config::LONG_RUN_NS, 0, began_ns + window_ns);
        }
    }

    fn on_one_cpu() -> Policy {
        let host = Host { used: || USED.get(), ..IDLE };
        Policy { wake_ns: 5_000, ..Policy::new(1, 1, host) }
    }

    #[test]
    fn handlers_of_one_length_move_only_while_there_are_cpus_left() {
        let policy = on_one_cpu();
        let alike = [(280, Duration::from_micros(60))];
        pass_used(&policy, 50, 950_000, &alike);
        assert_eq!(policy.stats().flips, 0, "{:?}", policy.stats());
        pass_used(&policy, 3, 750_000, &alike);
        assert!(policy.is_inline() && policy.stats().is_crowded, "{:?}", policy.stats());
        pass_used(&policy, 1, 650_000, &alike);
        assert!(!policy.is_inline() && !policy.stats().is_crowded, "{:?}", policy.stats());
        // There they take more, and yet not all.
        pass_used(&policy, 50, 850_000, &alike);
        assert!(!policy.is_inline(), "{:?}", policy.stats());
        // They need not be of the very same length.
        let nearly = [(100, Duration::from_micros(60)), (100, Duration::from_micros(140))];
        pass_used(&policy, config::CALM_WINDOWS, 950_000, &nearly);
        assert!(policy.is_inline(), "{:?}", policy.stats());
    }

    #[test]
    fn short_ones_do_not_wait_behind_long_ones_even_where_cpus_are_short() {
        let policy = on_one_cpu();
        let mixed = [(100, Duration::from_micros(5)), (100, Duration::from_micros(150))];
        pass_used(&policy, 5, 1_000_000, &mixed);
        assert!(!policy.is_inline(), "{:?}", policy.stats());
        pass_used(&policy, 50, 1_000_000, &mixed);
        assert!(!policy.is_inline(), "{:?}", policy.stats());
    }

    #[test]
    fn what_handlers_wait_for_a_cpu_says_that_there_is_none() {
        let policy = policy(1);
        let began_ns = lock(&policy.window).began_ns;
        let window_ns = config::PLACEMENT_WINDOW.as_nanos() as u64;
        policy.record(1, config::LONG_RUN_NS, window_ns, began_ns + window_ns);
        assert!(policy.stats().is_crowded, "{:?}", policy.stats());
    }

    #[test]
    fn cheap_handlers_stay_on_the_poller_however_many_there_are() {
        let policy = policy(1);
        pass(&policy, 50, 5_000, Duration::from_nanos(500));
        assert!(policy.is_inline(), "{:?}", policy.stats());
        assert_eq!(policy.stats().flips, 0);
    }

    #[test]
    fn a_few_long_runs_move_the_handlers_to_the_workers_within_100_ms() {
        let policy = policy(1);
        // One in a hundred, 10,000 in a second, a millisecond each: two of them in 20 ms.
        let windows = Duration::from_millis(100).as_micros() / config::PLACEMENT_WINDOW.as_micros();
        pass(&policy, windows as u32, 4, Duration::from_millis(1));
        assert!(!policy.is_inline(), "{:?}", policy.stats());
        assert_eq!(policy.stats().flips, 1);
    }

    #[test]
    fn handlers_of_middling_length_move_where_they_crowd_a_poller() {
        let few = policy(1);
        pass(&few, 10, 20, Duration::from_micros(40));
        assert!(few.is_inline(), "{:?}", few.stats());
        let many = policy(1);
        pass(&many, 10, 400, Duration::from_micros(40));
        assert!(!many.is_inline(), "{:?}", many.stats());
        let spread = policy(4);
        pass(&spread, 10, 400, Duration::from_micros(40));
        assert!(spread.is_inline(), "{:?}", spread.stats());
    }

    #[test]
    fn what_the_host_takes_away_now_and_then_moves_nothing() {
        let policy = policy(1);
        for _ in 0..10 {
            pass(&policy, 1, 2, Duration::from_millis(8));
            pass(&policy, 2 * config::WINDOWS_PER_PARDON, 640, Duration::from_micros(5));
        }
        assert!(policy.is_inline(), "{:?}", policy.stats());
    }

    #[test]
    fn long_runs_that_hardly_move_the_mean_move_the_handlers() {
        let policy = policy(1);
        let length = Duration::from_nanos(policy.long_ns() + 1000);
        // Three in 20 ms, 200 µs each: on average others wait for less than one wake-up.
        pass(&policy, 10, 3, length);
        assert!(policy.stats().delay_ns < policy.wake_ns, "{:?}", policy.stats());
        assert!(!policy.is_inline(), "{:?}", policy.stats());
    }

    #[test]
    fn few_runs_that_fill_window_after_window_move() {
        let policy = policy(1);
        pass(&policy, 4, 1, Duration::from_millis(30));
        assert!(!policy.is_inline(), "{:?}", policy.stats());
    }

    #[test]
    fn they_come_back_when_they_have_become_cheap_and_not_before() {
        let policy = policy(1);
        pass(&policy, 1, 100, Duration::from_millis(1));
        assert!(!policy.is_inline());
        // Between the two marks nothing moves.
        pass(&policy, 20, 640, Duration::from_micros(20));
        assert!(!policy.is_inline(), "{:?}", policy.stats());
        pass(&policy, config::CALM_WINDOWS, 5_000, Duration::from_nanos(500));
        assert!(policy.is_inline(), "{:?}", policy.stats());
        assert_eq!(policy.stats().flips, 2);
    }

    #[test]
    fn now_and_then_a_long_run_does_not_move_them_back_and_forth() {
        let policy = policy(1);
        let again = |policy: &Policy, calm: u32| {
            pass(policy, 1, 10, Duration::from_millis(1));
            pass(policy, calm, 640, Duration::from_nanos(500));
        };
        for _ in 0..100 {
            again(&policy, config::CALM_WINDOWS + 2);
        }
        // There and back twice: then it takes more calm windows than there ever are.
        assert!(!policy.is_inline() && policy.stats().flips <= 5, "{:?}", policy.stats());
        pass(&policy, config::CALM_WINDOWS_MAX, 640, Duration::from_nanos(500));
        assert!(policy.is_inline(), "{:?}", policy.stats());
        // Once they were right to be there for a while it takes a few again.
        pass(&policy, 60, 640, Duration::from_nanos(500));
        again(&policy, config::CALM_WINDOWS);
        assert!(policy.is_inline(), "{:?}", policy.stats());
    }

    /// Runs of a millisecond that are timed, until the handlers move or there were enough of them.
    fn moves(policy: &Policy, run: impl Fn()) -> bool {
        let begun = Instant::now();
        while policy.is_inline() && begun.elapsed() < 10 * config::PLACEMENT_WINDOW {
            policy.time(&run);
        }
        !policy.is_inline()
    }

    #[test]
    fn a_run_begins_where_the_last_one_ended_unless_something_came_between() {
        let saw_a_long_run = |policy: &Policy| {
            // By now its window may be over.
            let longest_ns = lock(&policy.window).tally.longest_ns[0];
            !policy.is_inline() || longest_ns > 1_000_000_000
        };
        let follows = policy(1);
        ENDED_NS.set(NonZeroU64::new(1));
        follows.time_next().end();
        assert!(saw_a_long_run(&follows), "it took since the machine was started");
        let does_not = policy(1);
        ENDED_NS.set(NonZeroU64::new(1));
        pause_timing();
        does_not.time_next().end();
        ENDED_NS.set(NonZeroU64::new(1));
        does_not.time(|| {});
        assert!(!saw_a_long_run(&does_not), "{:?}", does_not.stats());
    }

    #[test]
    fn two_policies_on_one_thread_hear_of_their_runs() {
        let (one, other) = (policy(1), policy(1));
        for _ in 0..200 {
            for policy in [&one, &other] {
                let now_ns = lock(&policy.window).began_ns;
                policy.record(1, 40_000, 0, now_ns);
            }
        }
        for policy in [&one, &other] {
            assert!(lock(&policy.window).tally.runs >= 100, "{:?}", policy.stats());
        }
    }

    #[test]
    fn time_that_others_took_from_a_run_is_not_held_against_it() {
        thread_local! {
            static STOOD: Cell<Duration> = const { Cell::new(Duration::ZERO) };
        }
        // A sleep stands for it.
        let starves = || {
            let from = Instant::now();
            thread::sleep(Duration::from_millis(1));
            STOOD.set(STOOD.get() + from.elapsed());
        };
        let policy = Policy { host: Host { starved: || STOOD.get(), ..IDLE }, ..policy(1) };
        policy.time(|| {});
        assert!(!moves(&policy, starves), "{:?}", policy.stats());
    }

    #[test]
    fn what_a_host_took_from_runs_that_never_waited_moves_nothing() {
        thread_local! {
            static SAID: Cell<Spent> = const { Cell::new(Spent { ran: Duration::ZERO, waits: 0 }) };
        }
        let spent = |waits| {
            SAID.set(Spent { ran: SAID.get().ran + Duration::from_micros(1), waits });
            // It stands for the host, as long as the thread is not said to wait.
            thread::sleep(Duration::from_millis(1));
        };
        let host = Host { spent: || Some(SAID.get()), ..IDLE };
        let never_waits = Policy { host, ..policy(1) };
        assert!(!moves(&never_waits, || spent(7)), "{:?}", never_waits.stats());
        assert!(moves(&Policy { host, ..policy(1) }, || spent(SAID.get().waits + 1)));
        assert!(moves(&policy(1), || spent(7)));
    }

    #[test]
    fn parts_of_a_run_count_as_runs_and_the_longest_for_itself() {
        let policy = policy(1);
        let began_ns = lock(&policy.window).began_ns;
        policy.record(1, config::LONG_RUN_NS, 0, began_ns);
        policy.record(3, 3_000, 0, began_ns);
        assert_eq!(lock(&policy.window).tally.runs, 1);
        policy.record(1, config::LONG_RUN_NS, 0, began_ns);
        let window = lock(&policy.window);
        assert_eq!((window.tally.runs, window.tally.longest_ns[1]), (5, config::LONG_RUN_NS));
        let harm = window.tally.harm(1_000, policy.long_ns(), false, 0);
        assert_eq!(harm.delay_ns, (2 * config::LONG_RUN_NS.pow(2) + 3 * 1_000_000) / 2_000);
    }

    #[test]
    fn nobody_waits_to_tell_of_a_run_and_nothing_is_lost() {
        let policy = policy(1);
        let window = lock(&policy.window);
        let began_ns = window.began_ns;
        for _ in 0..3 {
            policy.record(1, config::LONG_RUN_NS, 0, began_ns);
        }
        drop(window);
        policy.record(1, 1_000, 0, began_ns);
        assert_eq!(lock(&policy.window).tally.runs, 4);
    }

    #[test]
    fn runs_that_compute_or_block_for_long_move() {
        let computes = || {
            let from = Instant::now();
            while from.elapsed() < Duration::from_millis(1) {}
        };
        assert!(moves(&policy(1), computes));
        assert!(moves(&policy(1), || thread::sleep(Duration::from_millis(1))));
    }

    #[test]
    fn waking_a_thread_costs_something_believable() {
        let cost = wake_cost_ns();
        assert!((config::WAKE_NS_GUESS / 5..=config::WAKE_NS_GUESS * 5).contains(&cost), "{cost}");
    }
}
