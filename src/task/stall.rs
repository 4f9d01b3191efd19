//! Looking after pollers that handlers hold up.
//!
//! A handler that was taken for cheap, and is not, keeps its poller from everything else. A thread
//! of its own looks every few milliseconds whether each poller has done something since, and sooner
//! again at one that has not. If that still stands still, although it did not wait for its CPU, it
//! is relieved of the runs it has not come to: workers do those. While all pollers sleep this
//! thread sleeps as well, until one of them calls it; so it costs an idle server nothing, and the
//! pollers no system call but that.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle, Thread};
use std::time::{Duration, Instant};

use super::policy::Policy;
use crate::config;
use crate::error::Result;
use crate::sync::{Mutex, lock};
use crate::threads;

/// A thread that runs handlers, as seen by whoever looks whether it is held up.
pub(crate) trait Watched: Send + Sync {
    /// Somebody watches it from now on, or one less does.
    fn watch(&self, on: bool);
    /// Counts up with everything it begins.
    fn progress(&self) -> u64;
    /// It has nothing to do.
    fn is_asleep(&self) -> bool;
    /// `true`: it is asleep, and will unpark `watcher` when it is not any more.
    fn call_when_awake(&self, watcher: &Thread) -> bool;
    /// What its thread has used.
    fn used(&self) -> Used;
    /// Has workers do what it has not come to.
    fn relieve(&self);
}

/// What a thread has used of the CPU, and whether it could use more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Used {
    pub(crate) cpu: Duration,
    /// It waits for nothing but a CPU, if that.
    pub(crate) is_runnable: bool,
}

/// Watches pollers until it is stopped.
pub(crate) struct Watch {
    pollers: Arc<[Arc<dyn Watched>]>,
    stopping: Arc<AtomicBool>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Watch {
    /// # Errors
    /// No thread can be started.
    pub(crate) fn start(pollers: Vec<Arc<dyn Watched>>, policy: &Arc<Policy>) -> Result<Watch> {
        let pollers: Arc<[_]> = pollers.into();
        let stopping = Arc::new(AtomicBool::new(false));
        let thread = {
            let (pollers, policy, stopping) =
                (Arc::clone(&pollers), Arc::clone(policy), Arc::clone(&stopping));
            threads::spawn("ringpoll-watch", Vec::new(), move || {
                look(&pollers, &policy, &stopping);
            })?
        };
        pollers.iter().for_each(|poller| poller.watch(true));
        Ok(Watch { pollers, stopping, thread: Mutex::new(Some(thread)) })
    }

    /// Ends the thread, and joins it, if `join`, unless this is called on it.
    pub(crate) fn stop(&self, join: bool) {
        let Some(thread) = lock(&self.thread).take() else { return };
        self.stopping.store(true, Ordering::SeqCst);
        self.pollers.iter().for_each(|poller| poller.watch(false));
        thread.thread().unpark();
        // To relieve a poller may be to wake a task or to end a run: that may be anybody's code.
        if join && thread.thread().id() != thread::current().id() {
            // What panicked there was reported when it did.
            let _ = thread.join();
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.stop(false);
    }
}

fn look(pollers: &[Arc<dyn Watched>], policy: &Policy, stopping: &AtomicBool) {
    let mut seen: Vec<Seen> = pollers.iter().map(|_| Seen::Asleep).collect();
    let mut idle_ticks = 0;
    while !stopping.load(Ordering::SeqCst) {
        let mut began = Instant::now();
        if idle_ticks < config::STALL_TICKS_IDLE {
            let tick = match policy.is_inline() {
                true if seen.iter().any(Seen::is_suspect) => config::STALL_TICK_OF_SUSPECT,
                true => config::STALL_TICK,
                false => config::STALL_TICK_OF_POOL,
            };
            // A poller that has just woken may call although this does not sleep any more.
            while began.elapsed() < tick && !stopping.load(Ordering::SeqCst) {
                thread::park_timeout(tick.saturating_sub(began.elapsed()));
            }
        } else {
            idle_ticks = 0;
            if pollers.iter().all(|poller| poller.call_when_awake(&thread::current())) {
                thread::park();
                began = Instant::now();
            }
        }
        idle_ticks += 1;
        for (poller, seen) in pollers.iter().zip(&mut seen) {
            *seen = seen.look_again(&**poller, began.elapsed());
            if *seen != Seen::Asleep {
                idle_ticks = 0;
            }
        }
    }
}

/// What was seen of a poller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Seen {
    Asleep,
    /// Awake, at that turn.
    At(u64),
    /// Still at that turn, for which its thread had used so much CPU time by then.
    Still(u64, Duration),
}

impl Seen {
    fn is_suspect(&self) -> bool {
        matches!(self, Seen::Still(..))
    }

    /// Looks after another `tick`, and relieves a poller that stood still before it and has since.
    /// Not one that only waits for its CPU: workers would have to wait for one as well.
    fn look_again(self, poller: &dyn Watched, tick: Duration) -> Seen {
        if poller.is_asleep() {
            return Seen::Asleep;
        }
        let turns = poller.progress();
        match self {
            Seen::At(before) if before == turns => Seen::Still(turns, poller.used().cpu),
            Seen::Still(before, cpu_before) if before == turns => {
                let used = poller.used();
                let computes = used.cpu.saturating_sub(cpu_before) >= tick / 2;
                if computes || !used.is_runnable {
                    // A task that is woken may run here and then, and panic.
                    let relieved = catch_unwind(AssertUnwindSafe(|| poller.relieve()));
                    if relieved.is_err() {
                        tracing::error!("relieving a poller panicked");
                    }
                }
                Seen::Still(turns, used.cpu)
            }
            _ => Seen::At(turns),
        }
    }
}
