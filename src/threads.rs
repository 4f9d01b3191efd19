//! Starts named threads on chosen CPUs.
//!
//! A leaf: of this crate it imports the error only.

use std::sync::mpsc;
use std::thread::{self, JoinHandle};

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use crate::error::{Error, Result};

/// The number of CPUs in `cpus` or, if it is empty, of those that affinity and cgroup quota allow.
pub(crate) fn cpu_count(cpus: &[usize]) -> usize {
    match cpus.len() {
        0 => thread::available_parallelism().map_or(1, usize::from),
        count => count,
    }
}

/// The number of CPUs that the process may use, even if the calling thread may use fewer.
pub(crate) fn cpus_of_process() -> usize {
    let (own, all) = (sched_getaffinity(None), sched_getaffinity(Some(rustix::process::getpid())));
    match (own, all) {
        (Ok(own), Ok(all)) if all.count() > own.count() => all.count() as usize,
        _ => cpu_count(&[]),
    }
}

/// The CPUs that the calling thread, and threads started by it, may run on.
pub(crate) fn allowed_cpus() -> Result<Vec<usize>> {
    let allowed = sched_getaffinity(None).map_err(|error| Error::io("sched_getaffinity", error))?;
    Ok((0..CpuSet::MAX_CPU).filter(|cpu| allowed.is_set(*cpu)).collect())
}

/// Refuses CPUs that do not exist or that this process may not use.
pub(crate) fn check_cpus(what: &str, cpus: &[usize]) -> Result<()> {
    if cpus.is_empty() {
        return Ok(());
    }
    let allowed = allowed_cpus()?;
    for &cpu in cpus {
        if !allowed.contains(&cpu) {
            return Err(Error::invalid(format!(
                "{what}: CPU {cpu} is not one this process may use"
            )));
        }
    }
    Ok(())
}

/// Starts a thread that runs `body` on `cpus`, or on any CPU if `cpus` is empty.
pub(crate) fn spawn(
    name: &str,
    cpus: Vec<usize>,
    body: impl FnOnce() + Send + 'static,
) -> Result<JoinHandle<()>> {
    check_cpus(name, &cpus)?;
    let (pinned, wait) = mpsc::sync_channel(1);
    let thread = thread::Builder::new()
        .name(name.to_owned())
        .spawn(move || {
            let done = pin(&cpus);
            let go = done.is_ok();
            // Cannot fail: the starting thread waits for this message.
            let _ = pinned.send(done);
            if go {
                body();
            }
        })
        .map_err(|error| Error::io(format_args!("start thread {name}"), error))?;
    match wait.recv() {
        Ok(Ok(())) => Ok(thread),
        Ok(Err(error)) => Err(Error::io(format_args!("pin thread {name}"), error)),
        Err(_) => Err(Error::panicked(format!("thread {name} ended at its start"))),
    }
}

/// Lets the calling thread run on the CPUs of the first thread of the process, instead of those
/// that it inherited.
pub(crate) fn unpin() {
    if let Ok(allowed) = sched_getaffinity(Some(rustix::process::getpid())) {
        // If this fails, the thread keeps the CPUs that it inherited.
        let _ = sched_setaffinity(None, &allowed);
    }
}

fn pin(cpus: &[usize]) -> std::io::Result<()> {
    if cpus.is_empty() {
        return Ok(());
    }
    let mut set = CpuSet::new();
    for &cpu in cpus {
        set.set(cpu);
    }
    Ok(sched_setaffinity(None, &set)?)
}
