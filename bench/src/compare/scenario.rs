//! What each scenario measures: its kinds of traffic, and the servers it is about unless others are
//! named.

use ringpoll::{Backend, Placement};

use crate::cli::{CompareArgs, CompareScenario};
use crate::compare::plan::{Cell, Question};
use crate::load::HttpLoad;
use crate::peers::Peer;
use crate::rpc::Protocol;

/// The kinds of traffic of all scenarios that were asked for.
pub(crate) fn cells(args: &CompareArgs) -> Vec<Cell> {
    let mut cells: Vec<Cell> = Vec::new();
    for scenario in &args.scenario.0 {
        for cell in of_scenario(args, *scenario) {
            // Two scenarios may have one in common.
            if !cells.iter().any(|one| one.name == cell.name) {
                cells.push(cell);
            }
        }
    }
    cells
}

fn of_scenario(args: &CompareArgs, scenario: CompareScenario) -> Vec<Cell> {
    let bytes = args.size.0;
    match scenario {
        CompareScenario::Echo => echo(args),
        CompareScenario::Sizes => {
            let cell = |bytes: &u32| sized(scenario, SIZES_CONNECTIONS, 1, *bytes);
            SIZES.iter().map(cell).collect()
        }
        CompareScenario::Stream => {
            let cell = |bytes: &u32| sized(scenario, STREAMS, STREAM_DEPTH, *bytes);
            STREAM_SIZES.iter().map(cell).collect()
        }
        CompareScenario::Mux => {
            let cell = Cell::new(MUX_CONNECTIONS, MUX_DEPTH, 0, bytes);
            vec![Cell { name: format!("mux: {}, any order", cell.name), scenario, ..cell }]
        }
        CompareScenario::Proxy => {
            let cell = |(connections, depth)| sized(scenario, connections, depth, bytes);
            PROXIED.iter().copied().map(cell).collect()
        }
        CompareScenario::Rpc => {
            let cell = |(protocol, connections, depth)| {
                let cell = Cell::new(connections, depth, 0, bytes);
                let name = format!("rpc: {protocol}, {}", cell.name);
                Cell { name, scenario, protocol, ..cell }
            };
            RPCS.iter().copied().map(cell).collect()
        }
        // Most connections of a real server are silent: four fifths here. Beside the same traffic
        // without them.
        CompareScenario::Idle if args.idle > 0 => {
            let idle = |count| Cell { scenario, ..Cell::new(BESIDE_IDLE, 1, count, bytes) };
            vec![idle(0), idle(BESIDE_IDLE * 4)]
        }
        CompareScenario::Idle => Vec::new(),
        CompareScenario::Rates => {
            let cell = |percent: &u32| Cell {
                name: format!("rates: {percent} %"),
                scenario,
                load_percent: Some(*percent),
                ..Cell::new(RATES_CONNECTIONS, 1, 0, bytes)
            };
            RATES.iter().map(cell).collect()
        }
        CompareScenario::Heavy => {
            let questions = [
                Question::FewHeavy,
                Question::AllHeavy,
                Question::AllLong,
                Question::AllCheap,
                Question::Fairness,
            ];
            let apart = args.cpus.server_cpus.is_some() || args.cpus.client_cpus.is_some();
            let cell = |question| Cell { shares_cpus: !apart, ..Cell::heavy(question, bytes) };
            let mut cells: Vec<_> = questions.map(cell).into();
            // A rate that was asked for is the only one.
            if args.rate.is_none() {
                // The same work, which is measured once.
                let few = cells[0].clone();
                let name = format!("{}, little load", few.name);
                cells.insert(1, Cell { name, load_percent: Some(LITTLE_LOAD), ..few });
            }
            cells
        }
        CompareScenario::Http => HttpLoad::ALL.map(Cell::http).into(),
        CompareScenario::Calls => vec![calls(bytes)],
    }
}

fn calls(bytes: u32) -> Cell {
    let cell = Cell::new(CALLS_CONNECTIONS, CALLERS / CALLS_CONNECTIONS, 0, bytes);
    let name = format!("calls: {CALLERS} callers, {CALLS_CONNECTIONS} connections");
    Cell { name, scenario: CompareScenario::Calls, ..cell }
}

fn echo(args: &CompareArgs) -> Vec<Cell> {
    let bytes = args.size.0;
    let depth = args.depth.unwrap_or(1);
    let usual = if args.quick { QUICK_CONNECTIONS } else { CONNECTIONS };
    let connections = args.connections.as_deref().unwrap_or(usual);
    let mut cells: Vec<Cell> =
        connections.iter().map(|connections| Cell::new(*connections, depth, 0, bytes)).collect();
    if args.depth.is_none() {
        cells.push(Cell::new(4, 64, 0, bytes));
    }
    cells
}

fn sized(scenario: CompareScenario, connections: u32, depth: u32, bytes: u32) -> Cell {
    let size = if bytes < 1 << 10 { format!("{bytes} B") } else { format!("{} KiB", bytes >> 10) };
    let cell = Cell::new(connections, depth, 0, bytes);
    Cell { name: format!("{scenario}: {size}, {}", cell.name), scenario, ..cell }
}

/// The servers a scenario is about.
pub(crate) struct Usual {
    pub(crate) backends: &'static [Backend],
    pub(crate) peers: &'static [Peer],
}

impl Usual {
    pub(crate) fn of(scenario: CompareScenario) -> Usual {
        match scenario {
            CompareScenario::Echo | CompareScenario::Idle => Usual {
                backends: &[Backend::Epoll, Backend::Uring, Backend::Hybrid],
                peers: &[
                    Peer::Tokio,
                    Peer::TokioFramed,
                    Peer::BareEpoll,
                    Peer::BareRing,
                    Peer::BareRing64k,
                ],
            },
            CompareScenario::Sizes | CompareScenario::Stream => Usual {
                backends: &[Backend::Epoll, Backend::Uring],
                peers: &[Peer::Tokio, Peer::BareEpoll, Peer::BareRing64k],
            },
            CompareScenario::Mux => Usual {
                backends: &[Backend::Epoll, Backend::Uring],
                peers: &[Peer::Tokio, Peer::TokioWs],
            },
            CompareScenario::Proxy => Usual {
                backends: &[Backend::Epoll, Backend::Uring],
                peers: &[Peer::Tokio, Peer::BareEpoll],
            },
            CompareScenario::Rpc => Usual {
                backends: &[Backend::Epoll, Backend::Uring],
                peers: &[Peer::Tonic, Peer::VoloThrift],
            },
            CompareScenario::Rates => Usual {
                backends: &[Backend::Epoll, Backend::Uring],
                peers: &[Peer::Tokio, Peer::BareEpoll, Peer::BareRing],
            },
            // The peers are the same programs on tokio.
            CompareScenario::Http => {
                Usual { backends: &[Backend::Epoll, Backend::Uring], peers: &[] }
            }
            CompareScenario::Calls => Usual {
                backends: &[Backend::Epoll, Backend::Uring],
                peers: &[Peer::Tokio, Peer::Tonic],
            },
            CompareScenario::Heavy => Usual {
                backends: &[Backend::Uring],
                peers: &[Peer::TokioWs, Peer::TokioPerCpu, Peer::Monoio, Peer::Compio],
            },
        }
    }
}

/// Where handlers run in our own servers, unless it was said.
pub(crate) fn placements(
    scenario: CompareScenario,
    backend: Backend,
    quick: bool,
) -> &'static [Placement] {
    const POOL: Placement = Placement::Pool { workers: 0 };
    match scenario {
        CompareScenario::Heavy => &[Placement::Auto, Placement::Inline, POOL],
        CompareScenario::Mux => &[Placement::Inline, POOL],
        CompareScenario::Echo | CompareScenario::Idle if !quick && backend != Backend::Hybrid => {
            &[Placement::Inline, POOL]
        }
        _ => &[Placement::Inline],
    }
}

/// Whether a peer's figures say something there.
pub(crate) fn suits_peer(peer: Peer, cell: &Cell) -> bool {
    match (cell.scenario, peer) {
        _ if peer.protocol() != cell.protocol => false,
        (CompareScenario::Heavy, _) => true,
        // Clients are measured there, and not servers.
        (CompareScenario::Calls, _) => false,
        // The others have no task for each request, or do not forward.
        (CompareScenario::Mux, _) => matches!(peer, Peer::Tokio | Peer::TokioWs),
        (CompareScenario::Proxy, _) => {
            matches!(peer, Peer::Tokio | Peer::TokioWs | Peer::BareEpoll)
        }
        // They only say something about pipelined requests. One at a time, the first is the other
        // tokio server with one system call more, the second has too few buffers.
        (_, Peer::TokioFramed) => cell.depth > 1,
        (CompareScenario::Echo | CompareScenario::Idle, Peer::BareRing64k) => cell.depth > 1,
        // Small buffers are a handicap, and no limit, where requests are pipelined or large.
        (_, Peer::BareRing) => cell.depth == 1 && cell.payload_bytes < SMALL_BUFFER,
        _ => true,
    }
}

/// Of what the slowest candidate takes, where CPUs are seldom short and only whoever computes is in
/// the way.
const LITTLE_LOAD: u32 = 10;

const CONNECTIONS: &[u32] = &[1, 10, 100, 1000];
const QUICK_CONNECTIONS: &[u32] = &[1, 100, 1000];
const SIZES: &[u32] = &[64, 1 << 10, 4 << 10, 16 << 10, 64 << 10];
const SIZES_CONNECTIONS: u32 = 100;
const STREAM_SIZES: &[u32] = &[64 << 10, 256 << 10, 1 << 20];
const STREAMS: u32 = 4;
const STREAM_DEPTH: u32 = 2;
const MUX_CONNECTIONS: u32 = 4;
const MUX_DEPTH: u32 = 64;
/// Connections and depth.
const PROXIED: &[(u32, u32)] = &[(100, 1), (4, 64)];
/// Protocol, connections and depth; a server of Thrift answers one request after the other.
const RPCS: &[(Protocol, u32, u32)] =
    &[(Protocol::Grpc, 100, 1), (Protocol::Grpc, 4, 64), (Protocol::Thrift, 100, 1)];
const CALLERS: u32 = 256;
const CALLS_CONNECTIONS: u32 = 4;
const BESIDE_IDLE: u32 = 100;
/// Percent of what the slowest server takes.
const RATES: &[u32] = &[25, 50, 75, 90];
const RATES_CONNECTIONS: u32 = 100;
/// Of the ring that is there for single requests.
const SMALL_BUFFER: u32 = 4 << 10;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Cli, Command};
    use clap::Parser;

    #[test]
    fn a_few_heavy_requests_come_at_two_loads_unless_a_rate_is_asked_for() {
        let loads = |more: &[&str]| -> Vec<_> {
            let line = ["ringpoll-bench", "compare", "--scenario", "heavy"];
            let line = line.iter().chain(more);
            let Command::Compare(args) = Cli::try_parse_from(line).unwrap().command else {
                unreachable!("it is what was asked for");
            };
            let few = |cell: &Cell| cell.question == Question::FewHeavy;
            let cells = cells(&args);
            let few: Vec<_> = cells.iter().filter(|cell| few(cell)).collect();
            assert!(few.iter().all(|cell| cell.work_steps == few[0].work_steps), "{few:?}");
            few.iter().map(|cell| cell.load_percent).collect()
        };
        assert_eq!(loads(&[]), [Some(50), Some(LITTLE_LOAD)]);
        assert_eq!(loads(&["--rate", "1000"]), [Some(50)]);
    }
}
