//! Which CPUs this process may use, and what else they are doing.

use std::fs;

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use serde::{Deserialize, Serialize};

use crate::error::{Failure, Result};
use crate::host::{TICK_NS, read_line};

/// CPUs the calling thread may run on.
pub(crate) fn allowed() -> Result<Vec<usize>> {
    let set = sched_getaffinity(None).map_err(Failure::at("read the CPU affinity"))?;
    Ok((0..CpuSet::MAX_CPU).filter(|cpu| set.is_set(*cpu)).collect())
}

/// Moves the calling thread, and what it spawns from now on, to these CPUs.
pub(crate) fn pin(cpus: &[usize]) -> Result<()> {
    let mut set = CpuSet::new();
    cpus.iter().for_each(|cpu| set.set(*cpu));
    sched_setaffinity(None, &set).map_err(Failure::at(format!("pin to CPUs {cpus:?}")))
}

pub(crate) fn online() -> Vec<usize> {
    let stat = fs::read_to_string("/proc/stat").unwrap_or_default();
    stat.lines().filter_map(|line| cpu_of(line).map(|(cpu, _)| cpu)).collect()
}

/// CPUs' worth of time the control group grants: version 2, or version 1's two files.
pub(crate) fn quota() -> Option<f64> {
    let paths = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    paths.lines().filter_map(quota_of).reduce(f64::min)
}

fn quota_of(line: &str) -> Option<f64> {
    let mut parts = line.splitn(3, ':');
    let (_, controllers, path) = (parts.next()?, parts.next()?, parts.next()?);
    // Inside a container the path may be that of the host; the mount point itself is then the right
    // group.
    let roots = [path.trim_end_matches('/'), ""];
    if controllers.is_empty() {
        return roots.iter().find_map(|root| {
            let text = read_line(&format!("/sys/fs/cgroup{root}/cpu.max"))?;
            let (quota, period) = text.split_once(' ')?;
            Some(quota.parse::<f64>().ok()? / period.parse::<f64>().ok()?)
        });
    }
    controllers.split(',').find(|name| *name == "cpu")?;
    roots.iter().find_map(|root| {
        let read =
            |name| read_line(&format!("/sys/fs/cgroup/cpu{root}/cpu.{name}"))?.parse::<f64>().ok();
        let quota = read("cfs_quota_us")?;
        // -1 is "no limit".
        (quota > 0.0).then_some(quota / read("cfs_period_us")?)
    })
}

/// Ticks of some CPUs since boot.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Ticks {
    total: u64,
    idle: u64,
    stolen: u64,
}

impl Ticks {
    /// Of these CPUs, now. Zeros where `/proc/stat` cannot be read.
    pub(crate) fn read(cpus: &[usize]) -> Ticks {
        Ticks::parse(&fs::read_to_string("/proc/stat").unwrap_or_default(), cpus)
    }

    /// The share of time since `earlier` in which a hypervisor ran somebody else, in percent.
    pub(crate) fn stolen_percent_since(self, earlier: Ticks) -> f64 {
        self.percent_since(earlier, self.stolen.saturating_sub(earlier.stolen) as f64)
    }

    /// Whether a hypervisor ran somebody else since `earlier`.
    pub(crate) fn has_more_stolen_than(self, earlier: Ticks) -> bool {
        self.stolen > earlier.stolen
    }

    /// The share of time since `earlier` that went to other processes than those that used
    /// `own_ns`, in percent. Ticks are 10 ms, so a short window knows it to a few percent only.
    pub(crate) fn others_percent_since(self, earlier: Ticks, own_ns: u64) -> f64 {
        let not_busy = (self.idle + self.stolen).saturating_sub(earlier.idle + earlier.stolen);
        let busy = self.total.saturating_sub(earlier.total).saturating_sub(not_busy);
        self.percent_since(earlier, (busy as f64 - own_ns as f64 / TICK_NS as f64).max(0.0))
    }

    fn percent_since(self, earlier: Ticks, ticks: f64) -> f64 {
        match self.total.saturating_sub(earlier.total) {
            0 => 0.0,
            total => ticks * 100.0 / total as f64,
        }
    }

    fn parse(stat: &str, cpus: &[usize]) -> Ticks {
        let mut ticks = Ticks::default();
        for line in stat.lines() {
            let Some((cpu, rest)) = cpu_of(line) else { continue };
            if cpus.contains(&cpu) {
                // user nice system idle iowait irq softirq steal; what follows is counted in user
                // and nice.
                let columns =
                    rest.split_whitespace().take(8).filter_map(|column| column.parse::<u64>().ok());
                for (index, count) in columns.enumerate() {
                    ticks.total += count;
                    match index {
                        STEAL_COLUMN => ticks.stolen += count,
                        IDLE_COLUMN | IOWAIT_COLUMN => ticks.idle += count,
                        _ => {}
                    }
                }
            }
        }
        ticks
    }
}

fn cpu_of(line: &str) -> Option<(usize, &str)> {
    let (name, rest) = line.split_once(' ')?;
    Some((name.strip_prefix("cpu")?.parse().ok()?, rest))
}

const IDLE_COLUMN: usize = 3;
const IOWAIT_COLUMN: usize = 4;
const STEAL_COLUMN: usize = 7;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steal_is_counted_on_the_chosen_cpus_only() {
        let before = "cpu  9 9 9 9 9 9 9 9 0 0\n\
            cpu0 10 0 0 10 0 0 0 0 0 0\ncpu1 0 0 0 0 0 0 0 90 0 0\nintr 5";
        let after = "cpu  9 9 9 9 9 9 9 9 0 0\n\
            cpu0 20 0 0 15 0 0 0 5 0 0\ncpu1 0 0 0 0 0 0 0 99 0 0\nintr 5";
        let (before, after) = (Ticks::parse(before, &[0]), Ticks::parse(after, &[0]));
        assert_eq!(after.stolen_percent_since(before), 25.0);
        assert!(after.has_more_stolen_than(before) && !before.has_more_stolen_than(before));
        // Ten ticks busy of twenty; six of them were ours.
        assert_eq!(after.others_percent_since(before, 6 * TICK_NS), 20.0);
        assert_eq!(after.others_percent_since(before, 11 * TICK_NS), 0.0);
    }

    #[test]
    fn the_calling_thread_may_run_somewhere() {
        assert!(!allowed().unwrap().is_empty());
        assert!(!online().is_empty());
    }
}
