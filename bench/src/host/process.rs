//! What another process has used: CPU time, memory.

use std::fs;

use serde::{Deserialize, Serialize};

use crate::error::{Failure, Result};
use crate::host::TICK_NS;

/// CPU time of a process since it started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct CpuUse {
    /// Of its living threads, to the nanosecond.
    threads_ns: u64,
    /// Of those, the ones in which the kernel polls rings for the process.
    sqpoll_ns: u64,
    /// How often its living threads were put on a CPU. A thread that never ran made no system
    /// call.
    runs: u64,
    /// Of all its threads ever, in ticks of 10 ms.
    process_ns: u64,
    thread_count: u64,
}

impl CpuUse {
    pub(crate) fn read(pid: u32) -> Result<CpuUse> {
        let gone = || Failure::new(format!("read /proc/{pid}: the process is gone"));
        let mut used = CpuUse::default();
        for task in fs::read_dir(format!("/proc/{pid}/task")).map_err(|_| gone())?.flatten() {
            // A thread may exit between the listing and the read; `process_ns` has what it used.
            let Ok(text) = fs::read_to_string(task.path().join("schedstat")) else { continue };
            let mut columns = text.split_whitespace().map(|column| column.parse().unwrap_or(0));
            let ns = columns.next().unwrap_or(0);
            used.threads_ns += ns;
            let name = fs::read_to_string(task.path().join("comm")).unwrap_or_default();
            if name.starts_with(SQPOLL_NAME) {
                used.sqpoll_ns += ns;
            }
            used.runs += columns.nth(1).unwrap_or(0);
            used.thread_count += 1;
        }
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).map_err(|_| gone())?;
        used.process_ns = process_ticks(&stat).ok_or_else(gone)? * TICK_NS;
        Ok(used)
    }

    /// Nanoseconds used since `earlier`.
    ///
    /// The threads' own clocks are exact but miss threads that exited in between. The process'
    /// clock misses nothing but counts in ticks. So the exact figure counts, unless the other is
    /// larger by more than its own error.
    pub(crate) fn ns_since(self, earlier: CpuUse) -> u64 {
        let exact = self.threads_ns.saturating_sub(earlier.threads_ns);
        let coarse = self.process_ns.saturating_sub(earlier.process_ns);
        let error = TICK_NS * 2 * (self.thread_count + 1) + exact / 10;
        if coarse > exact + error { coarse } else { exact }
    }

    /// What the kernel threads that poll took since `earlier`; it is part of the whole.
    pub(crate) fn sqpoll_ns_since(self, earlier: CpuUse) -> u64 {
        self.sqpoll_ns.saturating_sub(earlier.sqpoll_ns)
    }

    pub(crate) fn runs_since(self, earlier: CpuUse) -> u64 {
        self.runs.saturating_sub(earlier.runs)
    }
}

/// Memory of the process that is resident, in bytes.
pub(crate) fn resident_bytes(pid: u32) -> Result<u64> {
    let path = format!("/proc/{pid}/smaps_rollup");
    // `smaps_rollup` counts pages; `status` lags behind by up to 63 pages per thread, so it is only
    // the fallback.
    let text = fs::read_to_string(&path)
        .or_else(|_| fs::read_to_string(format!("/proc/{pid}/status")))
        .map_err(Failure::at(format!("read {path}")))?;
    let line =
        text.lines().find_map(|line| line.strip_prefix("Rss:").or(line.strip_prefix("VmRSS:")));
    line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok())
        .map(|kib| kib * 1024)
        .ok_or_else(|| Failure::new(format!("read {path}: no resident size in it")))
}

/// CPU time of the processes that this one has started and whose end it has taken, in ticks.
pub(crate) fn ended_children_ns() -> u64 {
    let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    children_ticks(&stat).unwrap_or(0) * TICK_NS
}

/// utime + stime. The name in parentheses may contain anything, so columns count from its end.
fn process_ticks(stat: &str) -> Option<u64> {
    ticks_at(stat, 11)
}

/// The same of its children that have ended: cutime + cstime.
fn children_ticks(stat: &str) -> Option<u64> {
    ticks_at(stat, 13)
}

/// The sum of two columns, counted after the name.
fn ticks_at(stat: &str, column: usize) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(')')?;
    let mut columns = rest.split_whitespace();
    let user: u64 = columns.nth(column)?.parse().ok()?;
    let system: u64 = columns.next()?.parse().ok()?;
    Some(user + system)
}

/// What the kernel calls them, before the number of the thread that set up their ring.
const SQPOLL_NAME: &str = "iou-sqp-";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_of_a_process_does_not_shift_the_columns() {
        let stat = "7 (a) b (c)) S 1 7 7 0 -1 4194560 100 0 0 0 30 12 5 2 20 0 1 0 5 1 1";
        assert_eq!((process_ticks(stat), children_ticks(stat)), (Some(42), Some(7)));
    }

    #[test]
    fn this_process_uses_cpu_and_memory() {
        let pid = std::process::id();
        let before = CpuUse::read(pid).unwrap();
        let mut sum = 0u64;
        let used = (0..1000).find_map(|_| {
            (0..1_000_000u64).for_each(|n| sum = std::hint::black_box(sum ^ n));
            Some(CpuUse::read(pid).unwrap().ns_since(before)).filter(|ns| *ns > 0)
        });
        assert!(used.is_some());
        assert!(resident_bytes(pid).unwrap() > 4096);
    }

    #[test]
    fn threads_that_exited_are_not_forgotten() {
        let of = |threads_ns, process_ns, thread_count| CpuUse {
            threads_ns,
            process_ns,
            thread_count,
            ..CpuUse::default()
        };
        let before = of(0, 0, 2);
        assert_eq!(of(5_000_000, 900_000_000, 1).ns_since(before), 900_000_000);
        let steady = of(880_000_000, 900_000_000, 2);
        assert_eq!(steady.ns_since(before), 880_000_000);
    }

    #[test]
    fn threads_that_poll_for_the_kernel_are_counted_apart() {
        let pid = std::process::id();
        let before = CpuUse::read(pid).unwrap();
        let polls = std::thread::Builder::new().name(format!("{SQPOLL_NAME}7"));
        let used = polls.spawn(move || {
            let mut sum = 0u64;
            (0..1000).find_map(|_| {
                (0..1_000_000u64).for_each(|n| sum = std::hint::black_box(sum ^ n));
                let used = CpuUse::read(pid).unwrap();
                Some(used.sqpoll_ns_since(before)).filter(|ns| (1..=used.threads_ns).contains(ns))
            })
        });
        assert!(used.unwrap().join().unwrap().is_some());
    }
}
