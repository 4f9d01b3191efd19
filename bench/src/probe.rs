//! `probe`: what this host offers, which backend `auto` takes, and why.

use ringpoll::{Backend, Capabilities, Pollers};

use crate::error::{Failure, Result};
use crate::host::{Host, facts};

pub(crate) fn run() -> Result<()> {
    let chosen = chosen_backend()?;
    let rows = host_rows(Host::read()?).into_iter();
    let rows = rows.chain(ring_rows(ringpoll::capabilities())).chain([
        ("auto takes", chosen.to_string()),
        ("because", reason(chosen, ringpoll::capabilities())),
    ]);
    for (name, value) in rows {
        println!("{:<22}{value}", format!("{name}:"));
    }
    Ok(())
}

fn host_rows(host: Host) -> Vec<(&'static str, String)> {
    let limit = |limit: Option<u64>| limit.map_or("unlimited".into(), |limit| limit.to_string());
    let unknown = || "unknown".to_owned();
    let quota = match host.cpu_quota {
        Some(cpus) => format!("{cpus:.2} CPUs of time"),
        None => "none".into(),
    };
    let cpus = &host.cpus_allowed;
    vec![
        ("kernel", host.kernel),
        ("cpu", host.cpu_model),
        ("cpus allowed", format!("{} of {}: {cpus:?}", cpus.len(), host.cpus_online)),
        ("cgroup cpu quota", quota),
        (
            "fd limit",
            format!("{}, can be raised to {}", limit(host.fds_soft), limit(host.fds_hard)),
        ),
        ("somaxconn", host.somaxconn.map_or_else(unknown, |count| count.to_string())),
        ("congestion control", host.congestion_control.unwrap_or_else(unknown)),
        ("virtualised", host.virtualization),
        ("clock source", host.clock_source.unwrap_or_else(unknown)),
        ("preemption", host.preemption.unwrap_or_else(unknown)),
        ("cpu flaws", facts::mitigations_in_short(&host.mitigations)),
        ("runs as", host.privileges.in_short()),
    ]
}

fn ring_rows(found: &Capabilities) -> Vec<(&'static str, String)> {
    let yes_or_no = |offered: bool| if offered { "yes" } else { "no" }.to_owned();
    let mut offered = vec!["epoll"];
    let mut missing = Vec::new();
    let mut sort = |works: bool, names: &[&'static str]| {
        if works { &mut offered } else { &mut missing }.extend(names);
    };
    sort(found.tier.is_some(), &["uring", "hybrid"]);
    sort(found.sqpoll, &["sqpoll"]);
    let missing: String = missing.iter().map(|name| format!("; not {name}")).collect();
    let rows = [
        ("backends available", offered.join(", ") + &missing),
        ("ring tier", found.tier.map_or("none".into(), |tier| tier.to_string())),
        ("ring reason", found.reason.clone()),
        ("sqpoll", yes_or_no(found.sqpoll)),
        ("sqpoll reason", found.sqpoll_reason.clone()),
    ];
    let features = facts::features(found).map(|(name, offered)| (name, yes_or_no(offered)));
    rows.into_iter().chain(features).collect()
}

/// Asked of the library itself, which is what a server with `auto` gets.
fn chosen_backend() -> Result<Backend> {
    let pollers = Pollers::builder().backend(Backend::Auto).count(1).build();
    let pollers = pollers.map_err(Failure::at("start a poller"))?;
    let chosen = pollers.backend();
    pollers.shutdown().map_err(Failure::at("stop a poller"))?;
    Ok(chosen)
}

fn reason(chosen: Backend, found: &Capabilities) -> String {
    if let Ok(name) = std::env::var(BACKEND_VARIABLE) {
        return format!("{BACKEND_VARIABLE}={name} says so");
    }
    match (chosen, found.tier) {
        (Backend::Epoll, None) => format!("no ring works here: {}", found.reason),
        (Backend::Uring, Some(tier)) => {
            format!("a ring of tier {tier} passed the probe, and a poller started on it")
        }
        _ => format!("the library chose it; {}", found.reason),
    }
}

/// An operator's switch: it replaces the backend that a program asks for.
pub(crate) const BACKEND_VARIABLE: &str = "RINGPOLL_BACKEND";
/// The same for the tier of its rings.
pub(crate) const TIER_VARIABLE: &str = "RINGPOLL_URING_TIER";
