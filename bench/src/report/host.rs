//! Where and how it was measured, for the pages.

use super::grid::Grid;
use super::text;
use crate::compare::plan::Settings;
use crate::host::{Host, facts};

/// What is said of something, and its name.
pub(super) type Fact = (&'static str, String);

/// What must be known before anything else.
pub(super) fn in_short(host: &Host, settings: &Settings) -> String {
    format!(
        "All on one host over loopback: {}, {} CPUs, Linux {}. {} Every figure is the median of {} \
         rounds of {:.2} s; where there are brackets, they are the least and the greatest round.",
        host.cpu_model,
        host.cpus_allowed.len(),
        host.kernel,
        settings.cpus(),
        settings.rounds,
        settings.duration_s
    )
}

/// The machine and its kernel.
pub(super) fn facts(host: &Host) -> Vec<Fact> {
    let unknown = || "unknown".to_owned();
    let or_unknown = |value: &Option<String>| value.clone().unwrap_or_else(unknown);
    let threads = match host.smt_active {
        Some(true) => "; CPUs share cores (SMT)",
        Some(false) => "; no two CPUs share a core",
        None => "",
    };
    let rings = &host.rings;
    let list = |names: &[&str]| match names {
        [] => "none".to_owned(),
        names => names.join(", "),
    };
    let sysctl = match rings.disabled_sysctl {
        Some(value) => format!("kernel.io_uring_disabled = {value}"),
        None => "no sysctl kernel.io_uring_disabled".to_owned(),
    };
    vec![
        ("CPU", host.cpu_model.clone()),
        ("CPUs", format!("{} of {} allowed{threads}", host.cpus_allowed.len(), host.cpus_online)),
        (
            "CPU quota",
            host.cpu_quota.map_or("none".into(), |cpus| format!("{cpus:.2} CPUs of time")),
        ),
        ("frequency governor", or_unknown(&host.frequency_governor)),
        ("memory", host.memory_bytes.map_or_else(unknown, |bytes| text::bytes(bytes as f64))),
        ("virtualised", host.virtualization.clone()),
        ("kernel", host.kernel.clone()),
        ("preemption", or_unknown(&host.preemption)),
        ("clock source", or_unknown(&host.clock_source)),
        ("CPU flaws", facts::mitigations_in_short(&host.mitigations)),
        ("runs as", host.privileges.in_short()),
        (
            "io_uring",
            match &rings.tier {
                Some(tier) => format!("tier {tier}: {}; {sysctl}", rings.reason),
                None => format!("none: {}; {sysctl}", rings.reason),
            },
        ),
        (
            "io_uring features",
            format!("{}; not offered: {}", list(&rings.offered), list(&rings.missing)),
        ),
        (
            "SQPOLL",
            format!(
                "{}: {}",
                if rings.sqpoll { "usable" } else { "not usable" },
                rings.sqpoll_reason
            ),
        ),
        ("congestion control", or_unknown(&host.congestion_control)),
        ("somaxconn", host.somaxconn.map_or_else(unknown, |count| count.to_string())),
        (
            "file descriptors",
            host.fds_hard.map_or("no limit".into(), |count| format!("{count} at most")),
        ),
    ]
}

/// How it was run.
pub(super) fn run(settings: &Settings, command_line: &str, elapsed_s: f64) -> Vec<Fact> {
    vec![
        ("command", command_line.to_owned()),
        ("program", format!("{} {}", super::PROGRAM, settings.program_version)),
        ("who runs where", settings.cpus()),
        (
            "rounds",
            format!(
                "{} × {:.2} s after {:.2} s of warm-up, a fresh process each; servers interleaved \
                 and rotated; {:.0} s in all",
                settings.rounds, settings.duration_s, settings.warmup_s, elapsed_s
            ),
        ),
    ]
}

/// Each flaw that the kernel names, in its own words.
pub(super) fn mitigations(host: &Host) -> Grid {
    let rows = host.mitigations.iter();
    let rows = rows.map(|one| vec![one.flaw.clone(), one.state.clone()]).collect();
    Grid::words("CPU flaws, and what the kernel does about them", &["flaw", "state"], rows)
}
