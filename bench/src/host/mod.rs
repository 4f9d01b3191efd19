//! What the host offers and how busy it is, read from `/proc` and `/sys`.

pub(crate) mod cpu;
pub(crate) mod facts;
pub(crate) mod namespaces;
pub(crate) mod process;
pub(crate) mod steal;

use std::fs;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde::Serialize;

use self::facts::{Mitigation, Privileges, Rings};
use crate::error::{Failure, Result};

/// The facts a figure means nothing without.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Host {
    pub(crate) kernel: String,
    pub(crate) cpu_model: String,
    pub(crate) cpus_online: usize,
    pub(crate) cpus_allowed: Vec<usize>,
    /// CPUs' worth of time the control group grants, where it limits it.
    pub(crate) cpu_quota: Option<f64>,
    pub(crate) fds_soft: Option<u64>,
    pub(crate) fds_hard: Option<u64>,
    pub(crate) somaxconn: Option<u64>,
    pub(crate) congestion_control: Option<String>,
    pub(crate) memory_bytes: Option<u64>,
    pub(crate) virtualization: String,
    pub(crate) clock_source: Option<String>,
    pub(crate) preemption: Option<String>,
    pub(crate) frequency_governor: Option<String>,
    pub(crate) smt_active: Option<bool>,
    pub(crate) mitigations: Vec<Mitigation>,
    pub(crate) privileges: Privileges,
    pub(crate) rings: Rings,
}

impl Host {
    pub(crate) fn read() -> Result<Host> {
        let fds = getrlimit(Resource::Nofile);
        Ok(Host {
            kernel: read_line("/proc/sys/kernel/osrelease").unwrap_or_else(|| "unknown".into()),
            cpu_model: cpu_model().unwrap_or_else(|| "unknown".into()),
            cpus_online: cpu::online().len(),
            cpus_allowed: cpu::allowed()?,
            cpu_quota: cpu::quota(),
            fds_soft: fds.current,
            fds_hard: fds.maximum,
            somaxconn: read_line("/proc/sys/net/core/somaxconn").and_then(|text| text.parse().ok()),
            congestion_control: read_line("/proc/sys/net/ipv4/tcp_congestion_control"),
            memory_bytes: facts::memory_bytes(),
            virtualization: facts::virtualization(),
            clock_source: facts::clock_source(),
            preemption: facts::preemption(),
            frequency_governor: facts::frequency_governor(),
            smt_active: facts::smt_active(),
            mitigations: facts::mitigations(),
            privileges: Privileges::read(),
            rings: Rings::probe(),
        })
    }
}

/// Makes sure this process may hold `fd_count` descriptors, raising the limit where that is
/// allowed.
pub(crate) fn reserve_fds(fd_count: u64) -> Result<()> {
    let limit = getrlimit(Resource::Nofile);
    let Some(soft) = limit.current.filter(|soft| *soft < fd_count) else {
        return Ok(());
    };
    let maximum = limit.maximum.map(|hard| hard.max(fd_count));
    let kept = Rlimit { current: Some(fd_count), maximum: limit.maximum };
    let raised = Rlimit { current: Some(fd_count), maximum };
    // The hard limit moves only with privilege; without it the soft one may still go up to it.
    setrlimit(Resource::Nofile, kept).or_else(|_| setrlimit(Resource::Nofile, raised)).map_err(
        |_| {
            let hard = limit.maximum.map_or("none".into(), |hard| hard.to_string());
            Failure::new(format!(
                "needs {fd_count} file descriptors: limit is {soft} (hard {hard})"
            ))
        },
    )
}

/// How many descriptors this process can have at most, up to `wanted`.
pub(crate) fn fds_up_to(wanted: u64) -> u64 {
    if reserve_fds(wanted).is_ok() {
        return wanted;
    }
    let limit = getrlimit(Resource::Nofile);
    match limit.maximum {
        Some(hard) if reserve_fds(hard).is_ok() => hard,
        _ => limit.current.unwrap_or(wanted),
    }
}

/// The first line of a small file, if it is there.
pub(crate) fn read_line(path: &str) -> Option<String> {
    Some(fs::read_to_string(path).ok()?.lines().next()?.trim().to_owned())
}

fn cpu_model() -> Option<String> {
    let info = fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = info.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

/// `/proc` counts in `USER_HZ`, which is 100 on every Linux that runs this.
const TICK_NS: u64 = 10_000_000;
