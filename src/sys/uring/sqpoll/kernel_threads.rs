//! The kernel threads that poll rings: their thread numbers, their niceness, their CPU time.
//!
//! The poller's thread starts them. Any thread may ask for their CPU time.

use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread;
use std::time::Duration;

use super::polled::{Collector, Polled, Shape};

/// CPU time of kernel threads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct ThreadUse {
    pub(crate) cpu_us: u64,
    /// The part of `cpu_us` in which there was work.
    pub(crate) work_us: u64,
}

/// The kernel threads of one poller, and the CPU time of those that have ended.
#[derive(Default)]
pub(super) struct KernelThreads {
    living: Vec<KernelThread>,
    ended: ThreadUse,
    /// Why a thread could not be given its niceness, until it is logged.
    unranked: Option<io::Error>,
}

struct KernelThread {
    /// Its number in this process. `None` where the kernel does not report it.
    id: Option<u32>,
    /// A ring that the thread polls.
    ring: Weak<Polled>,
    /// The last reading. The kernel reports no times while the ring is locked.
    used: ThreadUse,
}

impl KernelThreads {
    /// Makes a ring with a new kernel thread, which gets the given niceness.
    pub(super) fn start(&mut self, shape: Shape, nice: Option<i8>) -> io::Result<Collector> {
        // The lock makes sure that the new thread in /proc is the thread of this ring.
        static STARTING: Mutex<()> = Mutex::new(());
        let starting = STARTING.lock().unwrap_or_else(PoisonError::into_inner);
        let before = ids();
        let collector = Polled::create(shape, None)?;
        let id = newcomer(&before);
        drop(starting);
        if let Some(nice) = nice {
            self.unranked = rank(id, nice).err().or(self.unranked.take());
        }
        self.living.push(KernelThread {
            id,
            ring: Arc::downgrade(collector.ring()),
            used: ThreadUse::default(),
        });
        Ok(collector)
    }

    /// Why a thread could not be given its niceness, if that happened since the last call.
    pub(super) fn take_unranked(&mut self) -> Option<io::Error> {
        self.unranked.take()
    }

    /// Notes that `new` replaces the ring of the only thread.
    pub(super) fn follow(&mut self, new: &Collector) {
        if let [thread] = &mut self.living[..] {
            thread.ring = Arc::downgrade(new.ring());
        }
    }

    /// How many threads there are, and the CPU time of all threads so far.
    pub(super) fn usage(&mut self) -> (u64, ThreadUse) {
        let (mut count, mut sum) = (0, self.ended);
        for thread in &mut self.living {
            let Some(ring) = thread.ring.upgrade() else { continue };
            count += 1;
            let used = thread.used(&ring);
            sum.cpu_us += used.cpu_us;
            sum.work_us += used.work_us;
        }
        (count, sum)
    }

    /// Forgets the threads, which end with their rings, and keeps their CPU time.
    pub(super) fn end(&mut self) {
        self.ended = self.usage().1;
        self.living.clear();
    }
}

impl KernelThread {
    /// Reads the CPU time from `schedstat`, and the work in it from the ring's `fdinfo` (Linux
    /// 6.9).
    fn used(&mut self, ring: &Polled) -> ThreadUse {
        let read = |path: String| fs::read_to_string(path).unwrap_or_default();
        let fd = ring.io().as_raw_fd();
        let ring = read(format!("/proc/self/fdinfo/{fd}"));
        let micros = |name: &str| {
            let line = ring.lines().find_map(|line| line.strip_prefix(name));
            line.and_then(|value| value.trim().parse::<u64>().ok()).unwrap_or(0)
        };
        let thread = self.id.map(|id| read(format!("/proc/self/task/{id}/schedstat")));
        let ran_ns = thread.and_then(|text| text.split_whitespace().next()?.parse::<u64>().ok());
        let cpu_us = ran_ns.map_or_else(|| micros("SqTotalTime:"), |ran_ns| ran_ns / 1000);
        self.used.cpu_us = self.used.cpu_us.max(cpu_us);
        self.used.work_us = self.used.work_us.max(micros("SqWorkTime:").min(cpu_us));
        self.used
    }
}

/// The kernel thread that is not in `before`. The thread gets its name only when it begins to run,
/// so this looks several times.
fn newcomer(before: &[u32]) -> Option<u32> {
    if !fs::exists("/proc/self/task").unwrap_or(false) {
        return None;
    }
    (0..START_LOOKS).find_map(|look| {
        if look > 0 {
            thread::sleep(START_PAUSE);
        }
        ids().into_iter().find(|id| !before.contains(id))
    })
}

/// How often to look for a new thread: for half a second at most.
const START_LOOKS: u32 = 1000;
const START_PAUSE: Duration = Duration::from_micros(500);

/// The threads of this process that poll rings. In a container, a ring's `fdinfo` has a number of
/// another namespace, so this looks for the threads' names.
fn ids() -> Vec<u32> {
    let Ok(tasks) = fs::read_dir("/proc/self/task") else { return Vec::new() };
    let polls = |path: std::path::PathBuf| {
        fs::read_to_string(path.join("comm")).is_ok_and(|name| name.starts_with("iou-sqp-"))
    };
    let found = tasks.flatten().filter(|task| polls(task.path()));
    found.filter_map(|task| task.file_name().to_str()?.parse().ok()).collect()
}

fn rank(id: Option<u32>, nice: i8) -> io::Result<()> {
    let id = id.ok_or(io::ErrorKind::NotFound)?;
    // SAFETY: the call takes numbers only, and changes the niceness of one thread.
    match unsafe { libc::setpriority(libc::PRIO_PROCESS, id, nice.into()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
