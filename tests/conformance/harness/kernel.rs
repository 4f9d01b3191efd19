//! The kernel threads of this process that poll rings, as the host shows them.

use std::collections::BTreeSet;
use std::fs;
use std::sync::OnceLock;
use std::time::Duration;

use super::{DEADLINE, eventually, fds, holds_within};

/// One thread that polls rings for this process.
#[derive(Clone, Debug)]
pub(crate) struct KernelThread {
    pub(crate) id: u32,
    /// The CPUs it may run on, as the kernel writes them: `0-3,7`.
    pub(crate) cpus_allowed: String,
    /// The CPU it ran on last.
    pub(crate) cpu: usize,
    pub(crate) is_asleep: bool,
    /// CPU time it has taken. Of one that runs now, up to the last tick.
    pub(crate) run_ns: u64,
}

/// All of them. One that has just been started is not told from the thread that started it before
/// it has run.
pub(crate) fn kernel_threads() -> Vec<KernelThread> {
    // One that ends while we look has no files any more.
    threads().into_iter().filter_map(kernel_thread).collect()
}

/// The threads of this process. The kernel's list breaks off where a thread ends while it is read,
/// so it counts once it says the same twice.
fn threads() -> BTreeSet<u32> {
    let list = || -> BTreeSet<u32> {
        let tasks = fs::read_dir("/proc/self/task").expect("proc is mounted").flatten();
        tasks.filter_map(|task| task.file_name().to_str()?.parse().ok()).collect()
    };
    let mut threads = list();
    loop {
        let again = list();
        if again == threads {
            return threads;
        }
        threads = again;
    }
}

fn kernel_thread(id: u32) -> Option<KernelThread> {
    let read = |file: &str| fs::read_to_string(format!("/proc/self/task/{id}/{file}")).ok();
    if !read("comm")?.starts_with("iou-sqp-") {
        return None;
    }
    let (status, stat) = (read("status")?, read("stat")?);
    let allowed = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?;
    // What follows the name, which may hold spaces: the third field is the first of these.
    let fields: Vec<_> = stat.rsplit(')').next()?.split_whitespace().collect();
    let run_ns = read("schedstat")?.split_whitespace().next()?.parse().ok()?;
    Some(KernelThread {
        id,
        cpus_allowed: allowed.trim().to_owned(),
        cpu: fields.get(36)?.parse().ok()?,
        is_asleep: fields.first() == Some(&"S"),
        run_ns,
    })
}

/// Tells the kernel threads of what is started later from those that were there before.
pub(crate) struct KernelThreadsBefore(BTreeSet<u32>);

impl KernelThreadsBefore {
    pub(crate) fn now() -> KernelThreadsBefore {
        KernelThreadsBefore(threads())
    }

    /// Those that were started since, and are still there.
    pub(crate) fn started(&self) -> Vec<KernelThread> {
        let mut threads = kernel_threads();
        threads.retain(|thread| !self.0.contains(&thread.id));
        threads
    }

    /// Waits until as many as these have been started.
    #[track_caller]
    pub(crate) fn assert_started(&self, count: usize) {
        let started = holds_within(DEADLINE, || self.started().len() == count);
        assert!(started, "not {count} kernel threads: {:?}", self.started());
    }

    /// Waits until those that were started since have ended.
    #[track_caller]
    pub(crate) fn assert_return(&self) {
        let ended = holds_within(DEADLINE, || self.started().is_empty());
        let (left, rings) = (self.started(), ring_count());
        assert!(ended, "{rings} rings, and these kernel threads are left: {left:?}");
    }
}

/// Those of the groups that live as long as the process.
static STAYING: OnceLock<BTreeSet<u32>> = OnceLock::new();

/// Those that are there now are no test's.
pub(super) fn stay() {
    STAYING.get_or_init(|| kernel_threads().iter().map(|thread| thread.id).collect());
}

/// What a test finds of the one before it.
pub(crate) struct LeavingKernelThreads(BTreeSet<u32>);

impl LeavingKernelThreads {
    pub(crate) fn of_the_last_test() -> LeavingKernelThreads {
        let ids = kernel_threads().into_iter().map(|thread| thread.id);
        let staying = STAYING.get().expect("the first test says which stay");
        LeavingKernelThreads(ids.filter(|id| !staying.contains(id)).collect())
    }

    /// Waits until they have ended.
    #[track_caller]
    pub(crate) fn assert_gone(&self) {
        let left = || {
            let mut threads = kernel_threads();
            threads.retain(|thread| self.0.contains(&thread.id));
            threads
        };
        let gone = holds_within(DEADLINE, || left().is_empty());
        assert!(gone, "kernel threads of the test before are left: {:?}", left());
    }
}

/// Rings that this process has open.
pub(crate) fn ring_count() -> usize {
    fds().values().filter(|target| target.contains("io_uring")).count()
}

/// Waits until every kernel thread of this process has ceased to poll.
#[track_caller]
pub(crate) fn let_kernel_threads_sleep() {
    /// Longer than one that waits for a CPU, or for a lock, looks like one that sleeps.
    const MOMENT: Duration = Duration::from_millis(12);
    let run = || {
        let threads = kernel_threads();
        threads
            .iter()
            .all(|thread| thread.is_asleep)
            .then(|| threads.iter().map(|thread| (thread.id, thread.run_ns)).collect::<Vec<_>>())
    };
    eventually("the kernel threads sleep", || {
        let before = run();
        before.is_some() && !holds_within(MOMENT, || run() != before)
    });
}
