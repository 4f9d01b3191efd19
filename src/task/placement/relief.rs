//! Moves work away from a poller that a handler blocks.
//!
//! A handler that was taken for short and is not blocks its poller, and everything else that this
//! poller has to do. A watching thread looks every few milliseconds at the progress counter of each
//! poller. It looks at a poller that made no progress again after one millisecond. If the poller
//! has still made none, and has not just waited for a CPU, the watching thread relieves it: workers
//! take over the runs that the poller has not begun.
//!
//! While all pollers sleep, the watching thread sleeps as well, until a poller that wakes up
//! unparks it. So an idle server costs nothing, and a busy poller makes no system call for it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle, Thread};
use std::time::{Duration, Instant};

use super::policy::Policy;
use crate::error::Result;
use crate::sync::{Mutex, lock};
use crate::threads;
use crate::user_code;

/// A poller, as the watching thread sees it.
pub(crate) trait Watched: Send + Sync {
    /// `true`: one more thread watches this poller from now on. `false`: one thread less does.
    fn watch(&self, on: bool);
    /// The progress counter: grows with every run, or other piece of work, that the poller begins.
    fn progress(&self) -> u64;
    /// The poller has nothing to do.
    fn is_asleep(&self) -> bool;
    /// If the poller is asleep: returns `true`, and the poller unparks `watcher` when it wakes up.
    fn call_when_awake(&self, watcher: &Thread) -> bool;
    /// The CPU use of the poller's thread.
    fn used(&self) -> Used;
    /// Has workers take over the work that the poller has not begun.
    fn relieve(&self);
}

/// The CPU use of a thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Used {
    /// CPU time since the thread started.
    pub(crate) cpu: Duration,
    /// The thread runs on a CPU or waits for a CPU, and for nothing else.
    pub(crate) is_runnable: bool,
}

/// The thread that watches the pollers of a server.
pub(super) struct Watch {
    pollers: Arc<[Arc<dyn Watched>]>,
    stopping: Arc<AtomicBool>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Watch {
    /// # Errors
    /// The thread cannot be started.
    pub(super) fn start(pollers: Vec<Arc<dyn Watched>>, policy: &Arc<Policy>) -> Result<Watch> {
        let pollers: Arc<[_]> = pollers.into();
        let stopping = Arc::new(AtomicBool::new(false));
        let thread = {
            let (pollers, policy, stopping) =
                (Arc::clone(&pollers), Arc::clone(policy), Arc::clone(&stopping));
            threads::spawn("ringpoll-watch", Vec::new(), move || {
                watch(&pollers, &policy, &stopping);
            })?
        };
        pollers.iter().for_each(|poller| poller.watch(true));
        Ok(Watch { pollers, stopping, thread: Mutex::new(Some(thread)) })
    }

    /// Ends the thread. With `join` it waits for the end, unless this is called on that thread.
    pub(super) fn stop(&self, join: bool) {
        let Some(thread) = lock(&self.thread).take() else { return };
        self.stopping.store(true, Ordering::SeqCst);
        self.pollers.iter().for_each(|poller| poller.watch(false));
        thread.thread().unpark();
        // The watching thread may run code of the user that ends the server: a relief may wake a
        // task or end a run.
        if join && thread.thread().id() != thread::current().id() {
            // A panic of the thread was reported when it happened.
            let _ = thread.join();
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.stop(false);
    }
}

/// Body of the watching thread.
fn watch(pollers: &[Arc<dyn Watched>], policy: &Policy, stopping: &AtomicBool) {
    let mut seen: Vec<Seen> = pollers.iter().map(|_| Seen::Asleep).collect();
    let mut idle_ticks = 0;
    while !stopping.load(Ordering::SeqCst) {
        let mut began = Instant::now();
        if idle_ticks < IDLE_TICKS_MAX {
            let tick = match policy.is_inline() {
                true if seen.iter().any(Seen::is_suspect) => TICK_OF_SUSPECT,
                true => TICK,
                false => TICK_OF_WORKERS,
            };
            // An unpark of an earlier sleep may come late, and end this one early.
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

/// What the watching thread saw of a poller at its latest look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Seen {
    Asleep,
    Awake {
        progress: u64,
    },
    /// No progress since the look before. `cpu` is the CPU time of the poller's thread.
    Suspect {
        progress: u64,
        cpu: Duration,
    },
}

impl Seen {
    fn is_suspect(&self) -> bool {
        matches!(self, Seen::Suspect { .. })
    }

    /// Looks after another `tick`, and relieves a poller that made no progress before it and in it.
    fn look_again(self, poller: &dyn Watched, tick: Duration) -> Seen {
        if poller.is_asleep() {
            return Seen::Asleep;
        }
        let progress = poller.progress();
        match self {
            Seen::Awake { progress: before } if before == progress => {
                Seen::Suspect { progress, cpu: poller.used().cpu }
            }
            Seen::Suspect { progress: before, cpu: cpu_before } if before == progress => {
                let used = poller.used();
                let has_run = used.cpu.saturating_sub(cpu_before) >= tick / 2;
                // A poller that only waits for a CPU is not blocked by a handler, and workers would
                // have to wait for a CPU as well.
                if has_run || !used.is_runnable {
                    // A relief may run code of the user: destructors and wakers.
                    user_code::call("relieving a poller", || poller.relieve());
                }
                Seen::Suspect { progress, cpu: used.cpu }
            }
            _ => Seen::Awake { progress },
        }
    }
}

/// Time between two looks at pollers that are awake. Measured with 1 KB echoes: 1 ms takes 0.7 % of
/// a CPU, 4 ms take 0.2 %.
const TICK: Duration = Duration::from_millis(4);

/// The same while a poller is suspected to be blocked.
const TICK_OF_SUSPECT: Duration = Duration::from_millis(1);

/// The same while handlers run on workers.
const TICK_OF_WORKERS: Duration = Duration::from_millis(20);

/// After so many looks at pollers that all sleep the watching thread sleeps as well.
const IDLE_TICKS_MAX: u32 = 20;
