//! `probe`: what this host offers, which backend `auto` takes, and why.

use ringpoll::{Backend, Pollers};

use crate::error::{Failure, Result};
use crate::host::Host;

pub(crate) fn run() -> Result<()> {
    let host = Host::read()?;
    let chosen = chosen_backend()?;
    let limit = |limit: Option<u64>| limit.map_or("unlimited".into(), |limit| limit.to_string());
    let unknown = || "unknown".to_owned();
    let quota = match host.cpu_quota {
        Some(cpus) => format!("{cpus:.2} CPUs of time"),
        None => "none".into(),
    };
    let rows = [
        ("kernel", host.kernel),
        ("cpu", host.cpu_model),
        (
            "cpus allowed",
            format!("{} of {}: {:?}", host.cpus_allowed.len(), host.cpus_online, host.cpus_allowed),
        ),
        ("cgroup cpu quota", quota),
        (
            "fd limit",
            format!("{}, can be raised to {}", limit(host.fds_soft), limit(host.fds_hard)),
        ),
        ("somaxconn", host.somaxconn.map_or_else(unknown, |count| count.to_string())),
        ("congestion control", host.congestion_control.unwrap_or_else(unknown)),
        ("backends built in", "epoll".into()),
        ("auto takes", chosen.to_string()),
        ("because", reason(chosen).into()),
    ];
    for (name, value) in rows {
        println!("{:<20}{value}", format!("{name}:"));
    }
    Ok(())
}

/// Asked of the library itself, which is what a server with `auto` gets.
fn chosen_backend() -> Result<Backend> {
    let pollers = Pollers::builder().backend(Backend::Auto).count(1).build();
    let pollers = pollers.map_err(Failure::at("start a poller"))?;
    let chosen = pollers.backend();
    pollers.shutdown().map_err(Failure::at("stop a poller"))?;
    Ok(chosen)
}

fn reason(chosen: Backend) -> &'static str {
    match chosen {
        Backend::Epoll => "it is the only backend built in, and a poller started on it",
        _ => "the library chose it",
    }
}
