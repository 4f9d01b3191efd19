//! The kernel threads that poll rings for this process, as procfs shows them.

use std::collections::BTreeSet;
use std::fs;
use std::time::Duration;

use super::{DEADLINE, eventually, fds, holds_within};

/// One thread that polls rings for this process.
#[derive(Clone, Debug)]
pub(crate) struct KernelThread {
    pub(crate) id: u32,
    /// The CPUs that it may run on, in the notation of the kernel: `0-3,7`.
    pub(crate) cpus_allowed: String,
    /// The CPU it ran on last.
    pub(crate) cpu: usize,
    pub(crate) is_asleep: bool,
    /// Its CPU time. While it runs, up to the last tick.
    pub(crate) run_ns: u64,
}

/// All such threads. A new one looks like the thread that started it until it has run once.
pub(crate) fn kernel_threads() -> Vec<KernelThread> {
    // A thread that ends meanwhile has no files.
    threads().into_iter().filter_map(kernel_thread).collect()
}

/// The threads of this process. If a thread ends while the list is read, the list is incomplete. So
/// it is read until two lists are equal.
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
    // The fields after the name, which may contain spaces: the first of them is the third field.
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

/// Distinguishes kernel threads that are started later from the existing ones.
pub(crate) struct KernelThreadsBefore(BTreeSet<u32>);

impl KernelThreadsBefore {
    pub(crate) fn now() -> KernelThreadsBefore {
        KernelThreadsBefore(threads())
    }

    /// Kernel threads that were started since, and have not ended.
    pub(crate) fn started(&self) -> Vec<KernelThread> {
        let mut threads = kernel_threads();
        threads.retain(|thread| !self.0.contains(&thread.id));
        threads
    }

    /// Waits until this many have been started.
    #[track_caller]
    pub(crate) fn assert_started(&self, count: usize) {
        let started = holds_within(DEADLINE, || self.started().len() == count);
        assert!(started, "not {count} kernel threads: {:?}", self.started());
    }

    /// Waits until the threads that were started since have ended.
    #[track_caller]
    pub(crate) fn assert_return(&self) {
        let ended = holds_within(DEADLINE, || self.started().is_empty());
        let (left, rings) = (self.started(), ring_count());
        assert!(ended, "{rings} rings, and these kernel threads are left: {left:?}");
    }
}

/// The number of rings that this process has open.
pub(crate) fn ring_count() -> usize {
    fds().values().filter(|target| target.contains("io_uring")).count()
}

/// Waits until every kernel thread of this process sleeps.
#[track_caller]
pub(crate) fn let_kernel_threads_sleep() {
    /// A thread that waits for a CPU or a lock looks like a sleeping one, but for a shorter time.
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
