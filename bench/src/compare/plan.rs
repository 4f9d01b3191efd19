//! Who is measured, under what traffic, for how long, on which CPUs.

use std::fmt;
use std::net::SocketAddr;
use std::time::Duration;

use ringpoll::{Backend, Placement};
use serde::Serialize;

use crate::cli::CompareArgs;
use crate::error::{Failure, Result};
use crate::host::cpu;
use crate::load::Plan;
use crate::peers::Peer;

/// A server to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Candidate {
    Ringpoll(Backend, Placement),
    Peer(Peer),
}

impl Candidate {
    pub(crate) fn is_ours(self) -> bool {
        matches!(self, Candidate::Ringpoll(..))
    }

    /// Ours with handlers on the poller: the ones the goals are about.
    pub(crate) fn is_inline(&self) -> bool {
        matches!(self, Candidate::Ringpoll(_, Placement::Inline))
    }

    /// Whether the candidate is worth measuring under this traffic.
    pub(crate) fn suits(&self, cell: &Cell) -> bool {
        !self.is_framed() || cell.depth > 1
    }

    /// Whether it is worth watching with nothing to do.
    pub(crate) fn suits_idle(self) -> bool {
        !self.is_framed()
    }

    /// Only says something about pipelined requests; one at a time, it is the other tokio server
    /// with one system call more.
    fn is_framed(self) -> bool {
        self == Candidate::Peer(Peer::TokioFramed)
    }

    /// The command line that starts it on a port of the kernel's choice.
    pub(crate) fn args(self, frame_max: u32) -> Vec<String> {
        let mut args = match self {
            Candidate::Ringpoll(backend, placement) => vec![
                "serve".to_owned(),
                format!("--backend={backend}"),
                format!("--placement={placement}"),
            ],
            Candidate::Peer(peer) => vec!["peer".to_owned(), peer.to_string()],
        };
        args.extend([
            "--addr=127.0.0.1:0".to_owned(),
            format!("--die-with={}", std::process::id()),
        ]);
        args.push(format!("--frame-max={frame_max}"));
        args
    }
}

impl fmt::Display for Candidate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Candidate::Ringpoll(backend, placement) => write!(f, "ringpoll {backend} {placement}"),
            Candidate::Peer(peer) => peer.fmt(f),
        }
    }
}

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
    fn new(connections: u32, depth: u32, idle: u32, payload_bytes: u32) -> Cell {
        let silent = if idle == 0 { String::new() } else { format!(" + {idle} idle") };
        let name = format!("{connections} × {depth}{silent}");
        Cell { name, connections, depth, idle, payload_bytes }
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
    pub(crate) fn new(args: &CompareArgs, measurements_per_round: usize) -> Result<Settings> {
        let rounds = args.rounds.unwrap_or(if args.quick { 3 } else { 5 });
        let duration = args.duration.unwrap_or_else(|| {
            if !args.quick {
                return Duration::from_secs(2);
            }
            let share = QUICK_ROUNDS_S / (measurements_per_round.max(1) as f64 * f64::from(rounds));
            Duration::from_secs_f64((share - QUICK_OVERHEAD_S).clamp(0.1, 0.6))
        });
        Ok(Settings {
            quick: args.quick,
            rounds,
            duration_s: duration.as_secs_f64(),
            warmup_s: (duration.as_secs_f64() / 5.0).min(0.3),
            pinned: pinned(args)?,
            frame_max: args.frame_max.0,
            program_version: env!("CARGO_PKG_VERSION"),
        })
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

/// Ours first, then the peers, in the order they were named.
pub(crate) fn candidates(args: &CompareArgs) -> Vec<Candidate> {
    let ours = args.backends.iter().flat_map(|backend| {
        args.placements.iter().map(|placement| Candidate::Ringpoll(*backend, *placement))
    });
    let mut all: Vec<Candidate> = Vec::new();
    for candidate in ours.chain(args.peers.0.iter().map(|peer| Candidate::Peer(*peer))) {
        if !all.contains(&candidate) {
            all.push(candidate);
        }
    }
    all
}

pub(crate) fn cells(args: &CompareArgs) -> Vec<Cell> {
    let bytes = args.size.0;
    let depth = args.depth.unwrap_or(1);
    let mut cells: Vec<Cell> = args
        .connections
        .iter()
        .map(|connections| Cell::new(*connections, depth, 0, bytes))
        .collect();
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
fn pinned(args: &CompareArgs) -> Result<Option<Pinned>> {
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
const QUICK_ROUNDS_S: f64 = 50.0;
/// Starting, connecting, warming up, draining and stopping, per measurement.
const QUICK_OVERHEAD_S: f64 = 0.3;
const ACTIVE_BESIDE_IDLE: u32 = 100;
