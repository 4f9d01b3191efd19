//! Under what traffic, for how long, and on which CPUs the candidates are measured.

use std::net::SocketAddr;
use std::time::Duration;

use serde::Serialize;

use crate::cli::CompareArgs;
use crate::error::{Failure, Result};
use crate::host::cpu;
use crate::load::Plan;

/// One kind of traffic.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Cell {
    pub(crate) name: String,
    pub(crate) connections: u32,
    pub(crate) depth: u32,
    pub(crate) idle: u32,
    pub(crate) payload_bytes: u32,
}

impl Cell {
    pub(crate) fn new(connections: u32, depth: u32, idle: u32, payload_bytes: u32) -> Cell {
        let silent = if idle == 0 { String::new() } else { format!(" + {idle} idle") };
        let name = format!("{connections} × {depth}{silent}");
        Cell { name, connections, depth, idle, payload_bytes }
    }

    /// One request at a time in all: nothing but latency.
    pub(crate) fn is_ping_pong(&self) -> bool {
        (self.connections, self.depth, self.idle) == (1, 1, 0)
    }

    pub(crate) fn plan(&self, addr: SocketAddr, settings: &Settings) -> Plan {
        Plan {
            addrs: vec![addr],
            connections: self.connections,
            idle: self.idle,
            payload_bytes: self.payload_bytes,
            depth: self.depth,
            rate: None,
            warmup: Duration::from_secs_f64(settings.warmup_s),
            duration: Duration::from_secs_f64(settings.duration_s),
            timeout: settings.timeout(),
        }
    }
}

/// How it is measured.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Settings {
    pub(crate) quick: bool,
    pub(crate) rounds: u32,
    pub(crate) duration_s: f64,
    pub(crate) warmup_s: f64,
    /// `None`: nothing is pinned.
    pub(crate) pinned: Option<Pinned>,
    pub(crate) frame_max: u32,
    pub(crate) program_version: &'static str,
}

#[derive(Clone, Debug, Serialize)]
pub(crate) struct Pinned {
    pub(crate) server_cpus: Vec<usize>,
    pub(crate) client_cpus: Vec<usize>,
}

impl Settings {
    pub(crate) fn new(
        args: &CompareArgs,
        pinned: Option<Pinned>,
        measurements_per_round: usize,
    ) -> Settings {
        let rounds = args.rounds.unwrap_or(if args.quick { 3 } else { 5 });
        let duration = args.duration.unwrap_or_else(|| {
            if !args.quick {
                return Duration::from_secs(2);
            }
            let share = QUICK_ROUNDS_S / (measurements_per_round.max(1) as f64 * f64::from(rounds));
            Duration::from_secs_f64((share - QUICK_OVERHEAD_S).clamp(0.1, 0.6))
        });
        Settings {
            quick: args.quick,
            rounds,
            duration_s: duration.as_secs_f64(),
            warmup_s: (duration.as_secs_f64() / 5.0).min(0.3),
            pinned,
            frame_max: args.frame_max.0,
            program_version: env!("CARGO_PKG_VERSION"),
        }
    }

    pub(crate) fn timeout(&self) -> Duration {
        if self.quick { Duration::from_secs(3) } else { Duration::from_secs(10) }
    }

    /// The CPUs whose stolen time matters.
    pub(crate) fn cpus_in_use(&self) -> Result<Vec<usize>> {
        match &self.pinned {
            Some(pinned) => Ok([&pinned.server_cpus[..], &pinned.client_cpus[..]].concat()),
            None => cpu::allowed(),
        }
    }
}

pub(crate) fn cells(args: &CompareArgs) -> Vec<Cell> {
    let bytes = args.size.0;
    let depth = args.depth.unwrap_or(1);
    let usual = if args.quick { QUICK_CONNECTIONS } else { CONNECTIONS };
    let connections = args.connections.as_deref().unwrap_or(usual);
    let mut cells: Vec<Cell> =
        connections.iter().map(|connections| Cell::new(*connections, depth, 0, bytes)).collect();
    if args.depth.is_none() {
        cells.push(Cell::new(4, 64, 0, bytes));
    }
    if args.idle > 0 {
        // Most connections of a real server are idle: four fifths here. Beside the same traffic
        // without them.
        if !cells.iter().any(|cell| (cell.connections, cell.depth) == (ACTIVE_BESIDE_IDLE, 1)) {
            cells.push(Cell::new(ACTIVE_BESIDE_IDLE, 1, 0, bytes));
        }
        cells.push(Cell::new(ACTIVE_BESIDE_IDLE, 1, ACTIVE_BESIDE_IDLE * 4, bytes));
    }
    cells
}

/// Server and client on CPUs of their own, where there are two.
pub(crate) fn pinned(args: &CompareArgs) -> Result<Option<Pinned>> {
    let allowed = cpu::allowed()?;
    for cpus in [&args.server_cpus, &args.client_cpus].into_iter().flatten() {
        if let Some(cpu) = cpus.0.iter().find(|cpu| !allowed.contains(cpu)) {
            return Err(Failure::new(format!(
                "cpu {cpu}: not among the allowed ones, {allowed:?}"
            )));
        }
    }
    if allowed.len() < 2 {
        return Ok(None);
    }
    let server_cpus = args.server_cpus.as_ref().map_or_else(
        || {
            allowed
                .iter()
                .copied()
                .find(|cpu| !args.client_cpus.as_ref().is_some_and(|list| list.0.contains(cpu)))
                .into_iter()
                .collect()
        },
        |list| list.0.clone(),
    );
    let client_cpus = args.client_cpus.as_ref().map_or_else(
        || allowed.iter().copied().find(|cpu| !server_cpus.contains(cpu)).into_iter().collect(),
        |list| list.0.clone(),
    );
    if server_cpus.is_empty() || client_cpus.is_empty() {
        return Err(Failure::new(
            "--server-cpus, --client-cpus: no CPU is left for the other side",
        ));
    }
    Ok(Some(Pinned { server_cpus, client_cpus }))
}

/// Of the 90 seconds of `--quick`, those for the rounds; the rest is for the idle rows, the report,
/// and bad luck.
const QUICK_ROUNDS_S: f64 = 48.0;
/// Starting, connecting, warming up, draining and stopping, per measurement.
const QUICK_OVERHEAD_S: f64 = 0.3;
const ACTIVE_BESIDE_IDLE: u32 = 100;
const CONNECTIONS: &[u32] = &[1, 10, 100, 1000];
const QUICK_CONNECTIONS: &[u32] = &[1, 100, 1000];
