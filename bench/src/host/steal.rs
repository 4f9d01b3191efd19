//! When a hypervisor took CPUs away, as precisely as a guest can tell.
//!
//! Two witnesses, because neither sees everything:
//!
//! * The kernel's count of stolen time in `/proc/stat`. It is the hypervisor's own word, but in
//!   hundredths of a second: time is seen when enough of it has added up.
//! * A thread on each CPU that asks for a timer every millisecond. It is late when the CPU did not
//!   run, but also when somebody else ran on it. The scheduler tells the two apart: it counts how
//!   long a thread ran, which includes interrupts that were served on its back, and how long it was
//!   ready and waited for its turn (`/proc/thread-self/schedstat`). A timer that fires makes the
//!   thread ready, also in the middle of another one's system call; so lateness beyond both means
//!   that not even the timer's interrupt came, and the only thing that keeps interrupts away for so
//!   long is a CPU that is not running. No load on the CPU makes it say so; gaps shorter than a
//!   millisecond may fall between two timers, or into a wait, and stay unseen.
//!
//! Both go into one list of stretches of time. The threads belong to the client's process and take
//! well below a hundredth of each CPU, from every candidate alike.

use std::fs::File;
use std::num::NonZeroU64;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

use crate::error::{Failure, Result};
use crate::host::cpu::{self, Ticks};

/// Time in which a CPU was away, in nanoseconds of the watch's clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Gap {
    pub(crate) start_ns: u64,
    pub(crate) end_ns: u64,
}

/// Watches CPUs until it is dropped.
pub(crate) struct StealWatch {
    gaps: Arc<Mutex<Vec<Gap>>>,
    stopped: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl StealWatch {
    /// `started` is the zero of its clock.
    pub(crate) fn start(cpus: &[usize], started: Instant) -> Result<StealWatch> {
        let mut watch =
            StealWatch { gaps: Arc::default(), stopped: Arc::default(), threads: Vec::new() };
        for cpu in cpus {
            let (cpu, gaps, stopped) = (*cpu, Arc::clone(&watch.gaps), Arc::clone(&watch.stopped));
            let run = move || {
                // A CPU this process may not use is watched by the kernel's count alone.
                if let (Ok(()), Ok(awake)) = (cpu::pin(&[cpu]), Awake::open()) {
                    watch_timers(&awake, started, &gaps, &stopped);
                }
            };
            let thread = std::thread::Builder::new().name(format!("steal-{cpu}")).spawn(run);
            watch.threads.push(thread.map_err(Failure::at("start a thread"))?);
        }
        let (cpus, gaps, stopped) =
            (cpus.to_vec(), Arc::clone(&watch.gaps), Arc::clone(&watch.stopped));
        let run = move || watch_ticks(&cpus, started, &gaps, &stopped);
        let thread = std::thread::Builder::new().name("steal-ticks".to_owned()).spawn(run);
        watch.threads.push(thread.map_err(Failure::at("start a thread"))?);
        Ok(watch)
    }

    /// Takes the gaps that were seen since the last call, in no order.
    pub(crate) fn take(&self) -> Vec<Gap> {
        std::mem::take(&mut *self.gaps.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Looks once more, and takes the last gaps.
    pub(crate) fn finish(mut self) -> Vec<Gap> {
        self.stop();
        self.take()
    }

    fn stop(&mut self) {
        self.stopped.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            thread.thread().unpark();
            // One that panicked has seen nothing more.
            let _ = thread.join();
        }
    }
}

impl Drop for StealWatch {
    fn drop(&mut self) {
        self.stop();
    }
}

/// How long the calling thread has run, or was ready and waited for its turn, since it began.
struct Awake(File);

impl Awake {
    fn open() -> std::io::Result<Awake> {
        File::open("/proc/thread-self/schedstat").map(Awake)
    }

    fn ns(&self) -> Option<u64> {
        let mut text = [0; 64];
        let bytes = self.0.read_at(&mut text, 0).ok()?;
        let text = std::str::from_utf8(&text[..bytes]).ok()?;
        let waited_ns: u64 = text.split_whitespace().nth(1)?.parse().ok()?;
        // The first column has the time it ran, but without what it has run since the last tick.
        let ran = clock_gettime(ClockId::ThreadCPUTime);
        Some(waited_ns + ran.tv_sec as u64 * 1_000_000_000 + ran.tv_nsec as u64)
    }
}

fn watch_timers(awake: &Awake, started: Instant, gaps: &Mutex<Vec<Gap>>, stopped: &AtomicBool) {
    // Without it timers are late by 50 µs, which the threshold has room for.
    let _ = rustix::thread::set_current_timer_slack(Some(NonZeroU64::MIN));
    let Some(mut awake_ns) = awake.ns() else { return };
    while !stopped.load(Ordering::Relaxed) {
        let due_ns = ns_since(started) + TIMER.as_nanos() as u64;
        std::thread::sleep(TIMER);
        let now_ns = ns_since(started);
        let Some(all_ns) = awake.ns() else { return };
        if missing_ns(now_ns.saturating_sub(due_ns), all_ns - awake_ns) >= GAP_NS {
            note(gaps, Gap { start_ns: due_ns, end_ns: now_ns });
        }
        awake_ns = all_ns;
    }
}

/// Of a thread's lateness, the part in which it was not even ready to run.
fn missing_ns(late_ns: u64, awake_ns: u64) -> u64 {
    late_ns.saturating_sub(awake_ns)
}

fn watch_ticks(cpus: &[usize], started: Instant, gaps: &Mutex<Vec<Gap>>, stopped: &AtomicBool) {
    let mut before = Ticks::read(cpus);
    let mut looked_ns = ns_since(started);
    loop {
        std::thread::park_timeout(TICK_PAUSE);
        // Read before the last look, which so comes after the end of what is measured.
        let last = stopped.load(Ordering::Relaxed);
        let (ticks, now_ns) = (Ticks::read(cpus), ns_since(started));
        if ticks.has_more_stolen_than(before) {
            let start_ns = looked_ns.saturating_sub(TICK_LAG.as_nanos() as u64);
            note(gaps, Gap { start_ns, end_ns: now_ns });
        }
        (before, looked_ns) = (ticks, now_ns);
        if last {
            return;
        }
    }
}

fn note(gaps: &Mutex<Vec<Gap>>, gap: Gap) {
    gaps.lock().unwrap_or_else(PoisonError::into_inner).push(gap);
}

fn ns_since(started: Instant) -> u64 {
    started.elapsed().as_nanos() as u64
}

const TIMER: Duration = Duration::from_millis(1);
/// Above what a guest needs to wake up an idle CPU, below what hurts a tail.
const GAP_NS: u64 = 200_000;
const TICK_PAUSE: Duration = Duration::from_millis(10);
/// The kernel counts stolen time when its next tick comes, up to 10 ms later.
const TICK_LAG: Duration = Duration::from_millis(10);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn running_and_waiting_for_a_turn_are_no_gap() {
        assert_eq!(missing_ns(5_000_000, 4_900_000), 100_000);
        assert_eq!(missing_ns(5_000_000, 10_000), 4_990_000);
        assert_eq!(missing_ns(100, 200), 0);
    }

    #[test]
    fn the_scheduler_tells_how_long_a_thread_was_awake() {
        let awake = Awake::open().unwrap();
        let before = awake.ns().unwrap();
        let mut sum = 0_u64;
        let ran = (0..1000).any(|_| {
            (0..1_000_000_u64).for_each(|n| sum = std::hint::black_box(sum ^ n));
            awake.ns().unwrap() > before
        });
        assert!(ran);
    }

    #[test]
    fn a_watch_ends_when_it_is_told() {
        let started = Instant::now();
        let cpus = cpu::allowed().unwrap();
        let watch = StealWatch::start(&cpus, started).unwrap();
        for gap in watch.take().into_iter().chain(watch.finish()) {
            assert!(gap.start_ns < gap.end_ns && gap.end_ns <= ns_since(started), "{gap:?}");
        }
    }
}
