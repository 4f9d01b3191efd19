//! The article's experiments: which servers, under what traffic, for how long, on which CPUs.

use std::time::Duration;

use ringpoll::{Backend, Placement, SqpollOptions, SqpollPreset};

use crate::article::Experiment;
use crate::cli::ArticleArgs;
use crate::compare::candidate::Candidate;
use crate::compare::model::{CellReport, Row};
use crate::compare::network::Network;
use crate::compare::plan::{Cell, Cpus, Pinned, Settings, warmup_s};
use crate::error::Result;
use crate::wire;

/// All of them, not measured yet.
pub(crate) fn plan(args: &ArticleArgs) -> Vec<Experiment> {
    let counts = |quick: &'static [u32], full| match &args.connections {
        Some(connections) => connections.clone(),
        None => if args.quick { quick } else { full }.to_vec(),
    };
    let ours = |backend| Candidate::ours(backend, args.placement);
    let polled = |preset| kernel_polled(preset, &[], args);
    // The article's number on any host: without rings there would be fewer threads than in the
    // name.
    let sending = |preset| kernel_polled(preset, &[SEND_RINGS], args);
    vec![
        experiment(
            1,
            "Ping-pong: one connection, one request at a time, handlers on the poller",
            &[1],
            // What the article tries with one thread, so no workers here.
            [Backend::Epoll, Backend::Uring].map(|one| Candidate::ours(one, Placement::Inline)),
        ),
        experiment(
            2,
            "Echo server",
            &counts(ECHO_QUICK, ECHO),
            [
                ours(Backend::Epoll),
                sending(SqpollPreset::Uring2),
                sending(SqpollPreset::Uring4),
                ours(Backend::Hybrid),
            ],
        ),
        experiment(
            3,
            "The library itself",
            &counts(LIBRARY_QUICK, LIBRARY),
            [
                ours(Backend::Epoll),
                polled(SqpollPreset::Config1),
                polled(SqpollPreset::Config2),
                polled(SqpollPreset::Shared),
                ours(Backend::Uring),
            ],
        ),
    ]
}

/// How they are measured, in `measurements` of each round.
pub(crate) fn settings(
    args: &ArticleArgs,
    cpus: Cpus,
    network: Network,
    measurements: usize,
) -> Settings {
    let rounds = args.rounds.unwrap_or(if args.quick { 3 } else { 5 });
    // A number of requests is no bound: threads that share a CPU may do a few hundred in a second.
    let duration = args.duration.unwrap_or(match (args.requests, args.quick) {
        (Some(requests), _) => {
            let seconds = requests as f64 / SLOW_SERVER_RPS;
            Duration::from_secs_f64(seconds.clamp(COUNTED_MIN_S, COUNTED_MAX_S))
        }
        (None, false) => Duration::from_secs(2),
        (None, true) => {
            let share = QUICK_ROUNDS_S / (measurements.max(1) as f64 * f64::from(rounds));
            Duration::from_secs_f64((share - QUICK_OVERHEAD_S).clamp(0.2, 1.0))
        }
    });
    Settings {
        quick: args.quick,
        rounds,
        duration_s: duration.as_secs_f64(),
        warmup_s: warmup_s(duration),
        requests_max: args.requests,
        time_max_s: args.quick.then_some(QUICK_MAX_S),
        pinned: cpus.pinned,
        cpus_allowed: cpus.allowed,
        network,
        frame_max: wire::FRAME_BYTES_MAX,
        program_version: env!("CARGO_PKG_VERSION"),
    }
}

/// Who may run where. The client of servers on another host has what there is, or what it is given.
pub(crate) fn cpus(args: &ArticleArgs, allowed: Vec<usize>) -> Result<Cpus> {
    if args.addr.is_empty() {
        return Ok(Cpus { pinned: pinned(args, &allowed)?, allowed });
    }
    args.check_cpus(&allowed)?;
    let own = args.cpus.client_cpus.as_ref().map_or(allowed, |own| own.0.clone());
    Ok(Cpus { pinned: None, allowed: own })
}

/// A CPU for the client, CPUs for SQPOLL threads where enough are left, the rest for the server.
fn pinned(args: &ArticleArgs, allowed: &[usize]) -> Result<Option<Pinned>> {
    args.check_cpus(allowed)?;
    if allowed.len() < 2 {
        return Ok(None);
    }
    let mut left = allowed.to_vec();
    let named = [&args.cpus.server_cpus, &args.sqpoll_cpus, &args.cpus.client_cpus];
    let [server, sqpoll, client] = named.map(|list| list.as_ref().map(|list| list.0.clone()));
    left.retain(|cpu| {
        ![&server, &sqpoll, &client].into_iter().flatten().flatten().any(|one| one == cpu)
    });
    let client_cpus = client.unwrap_or_else(|| left.pop().into_iter().collect());
    let sqpoll_cpus = sqpoll.unwrap_or_else(|| {
        let is_enough = server.is_none() && left.len() >= SQPOLL_CPUS * 2;
        left.split_off(left.len() - if is_enough { SQPOLL_CPUS } else { 0 })
    });
    let server_cpus = server.unwrap_or(left);
    Pinned { server_cpus, sqpoll_cpus, client_cpus }.checked().map(Some)
}

fn experiment(
    number: u32,
    title: &'static str,
    connections: &[u32],
    candidates: impl AsRef<[Candidate]>,
) -> Experiment {
    let cell = |count: &u32| {
        let cell = Cell::new(*count, 1, 0, PAYLOAD_BYTES);
        // Experiments have the same traffic.
        let name = format!("experiment {number}, {}", cell.name);
        let rows = candidates.as_ref().iter().map(Row::new).collect();
        CellReport::new(Cell { name, ..cell }, rows)
    };
    let cells = connections.iter().map(cell).collect();
    Experiment { number, title, cells, claims: Vec::new() }
}

/// A server whose kernel threads poll, with a poller that does what was asked for.
fn kernel_polled(preset: SqpollPreset, more: &[&str], args: &ArticleArgs) -> Candidate {
    let poll = args.poll.iter().map(|mode| format!("--poll={mode}"));
    Candidate::Ringpoll {
        backend: Backend::Sqpoll(SqpollOptions::new().preset(preset)),
        placement: args.placement,
        spinning: false,
        extra: more.iter().map(|arg| (*arg).to_owned()).chain(poll).collect(),
    }
}

/// One for each CPU of a poller's.
const SEND_RINGS: &str = "--send-rings=20";
const PAYLOAD_BYTES: u32 = 1024;
/// The article tells of 100 and of 200 and more.
const ECHO: &[u32] = &[100, 200, 500];
const ECHO_QUICK: &[u32] = &[100, 500];
const LIBRARY: &[u32] = &[10, 50, 100, 200, 300, 400, 500, 1000];
const LIBRARY_QUICK: &[u32] = &[10, 100, 500];
/// What the article reserves for them.
const SQPOLL_CPUS: usize = 3;
/// A number of requests is waited for as long as a server takes that answers so many per second:
/// slower than any with CPUs of its own.
const SLOW_SERVER_RPS: f64 = 50_000.0;
/// But not less than what the article's client ran for, and not all day.
const COUNTED_MIN_S: f64 = 60.0;
const COUNTED_MAX_S: f64 = 3600.0;
/// Of the 3 minutes of `--quick`, those for the rounds; the rest is for servers that are slow to
/// answer what is in flight, and for the report.
const QUICK_ROUNDS_S: f64 = 120.0;
/// Starting, connecting, warming up, draining and stopping, per measurement.
const QUICK_OVERHEAD_S: f64 = 0.5;
/// No measurement of `--quick` starts later than this. A server that stalls takes seconds more.
const QUICK_MAX_S: f64 = 155.0;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Cli, Command};
    use clap::Parser;

    #[test]
    fn the_experiments_are_the_articles() {
        let experiments = plan(&parse(&[]));
        assert_eq!(connections(&experiments[0]), [1]);
        assert_eq!(names(&experiments[0]), ["ringpoll epoll inline", "ringpoll uring inline"]);
        assert_eq!(connections(&experiments[1]), [100, 200, 500]);
        assert_eq!(
            names(&experiments[1]),
            [
                "ringpoll epoll pool",
                "ringpoll uring-2 pool --send-rings=20",
                "ringpoll uring-4 pool --send-rings=20",
                "ringpoll hybrid pool"
            ]
        );
        assert_eq!(connections(&experiments[2]), [10, 50, 100, 200, 300, 400, 500, 1000]);
        assert_eq!(
            names(&experiments[2]),
            [
                "ringpoll epoll pool",
                "ringpoll sqpoll-config1 pool",
                "ringpoll sqpoll-config2 pool",
                "ringpoll sqpoll-shared pool",
                "ringpoll uring pool"
            ]
        );
    }

    #[test]
    fn connections_placement_and_polling_can_be_chosen() {
        let args = ["--connections", "7,9", "--placement", "inline", "--poll", "always"];
        let experiments = plan(&parse(&args));
        assert_eq!(connections(&experiments[0]), [1]);
        assert_eq!(connections(&experiments[1]), [7, 9]);
        assert_eq!(connections(&experiments[2]), [7, 9]);
        let servers = names(&experiments[2]);
        // Epoll and uring are what the others are held against, so they stay as they come.
        assert_eq!(servers[0], "ringpoll epoll inline");
        assert_eq!(servers[1], "ringpoll sqpoll-config1 inline --poll=always");
        assert_eq!(servers[4], "ringpoll uring inline");
    }

    #[test]
    fn every_measurement_is_bounded_in_time() {
        let of = |extra: &[&str]| {
            let cpus = Cpus { allowed: vec![0], pinned: None };
            settings(&parse(extra), cpus, Network::Loopback, 25)
        };
        assert_eq!((of(&[]).duration_s, of(&[]).time_max_s), (2.0, None));
        for full in ["50M", "50000000"] {
            let counted = of(&["--requests", full]);
            assert_eq!((counted.requests_max, counted.duration_s), (Some(50_000_000), 1000.0));
        }
        assert_eq!(of(&["--requests", "1000"]).duration_s, 60.0);
        assert_eq!(of(&["--requests", "18446744073709551615"]).duration_s, 3600.0);
        assert_eq!(of(&["--requests", "5", "--duration", "1s"]).duration_s, 1.0);
        let quick = of(&["--quick"]);
        let each = quick.duration_s + quick.warmup_s + QUICK_OVERHEAD_S;
        assert!(each * 25.0 * f64::from(quick.rounds) <= QUICK_MAX_S, "{quick:?}");
        assert!(quick.time_max_s <= Some(QUICK_MAX_S) && quick.duration_s >= 0.2);
    }

    #[test]
    fn kernel_threads_get_cpus_where_the_server_keeps_as_many() {
        let of = |cpus: usize, extra: &[&str]| {
            let allowed: Vec<_> = (0..cpus).collect();
            pinned(&parse(extra), &allowed).map(|pinned| {
                pinned.map(|Pinned { server_cpus, sqpoll_cpus, client_cpus }| {
                    (server_cpus, sqpoll_cpus, client_cpus)
                })
            })
        };
        assert_eq!(of(1, &[]).unwrap(), None);
        assert_eq!(of(2, &[]).unwrap(), Some((vec![0], vec![], vec![1])));
        assert_eq!(of(6, &[]).unwrap(), Some((vec![0, 1, 2, 3, 4], vec![], vec![5])));
        assert_eq!(of(7, &[]).unwrap(), Some((vec![0, 1, 2], vec![3, 4, 5], vec![6])));
        let chosen = of(4, &["--sqpoll-cpus", "0", "--client-cpus", "2-3"]).unwrap();
        assert_eq!(chosen, Some((vec![1], vec![0], vec![2, 3])));
        // They may share the server's.
        let shared = of(2, &["--server-cpus", "0", "--sqpoll-cpus", "0"]).unwrap();
        assert_eq!(shared, Some((vec![0], vec![0], vec![1])));
        assert!(of(2, &["--server-cpus", "0-1"]).is_err());
        assert!(of(2, &["--sqpoll-cpus", "0-1"]).is_err());
        for flag in ["--server-cpus", "--sqpoll-cpus", "--client-cpus"] {
            let said = of(2, &[flag, "1-2"]).unwrap_err().to_string();
            assert!(said.starts_with(&format!("{flag}: cpu 2: ")), "{said}");
        }
        for flag in ["--server-cpus", "--sqpoll-cpus"] {
            let said = of(4, &[flag, "0,2", "--client-cpus", "2-3"]).unwrap_err().to_string();
            assert!(said.contains(flag) && said.contains("cpu 2 is in both"), "{said}");
        }
    }

    #[test]
    fn the_client_of_servers_elsewhere_may_have_all_cpus() {
        let of = |extra: &[&str]| {
            let args = [&["--addr", "127.0.0.1:1"][..], extra].concat();
            let cpus = cpus(&parse(&args), vec![0, 1, 2]).unwrap();
            (cpus.allowed, cpus.pinned.is_some())
        };
        assert_eq!(of(&[]), (vec![0, 1, 2], false));
        assert_eq!(of(&["--client-cpus", "0-2"]), (vec![0, 1, 2], false));
        assert_eq!(of(&["--client-cpus", "1"]), (vec![1], false));
        let missing = parse(&["--addr", "127.0.0.1:1", "--client-cpus", "3"]);
        assert!(cpus(&missing, vec![0, 1, 2]).is_err());
    }

    fn connections(experiment: &Experiment) -> Vec<u32> {
        experiment.cells.iter().map(|report| report.cell.connections).collect()
    }

    /// The servers of each cell, which are the same in all.
    fn names(experiment: &Experiment) -> Vec<String> {
        let of = |cell: &CellReport| -> Vec<_> {
            cell.rows.iter().map(|row| row.candidate.clone()).collect()
        };
        let first = of(&experiment.cells[0]);
        assert!(experiment.cells.iter().all(|cell| of(cell) == first));
        first
    }

    fn parse(extra: &[&str]) -> ArticleArgs {
        let args = [&["ringpoll-bench", "article"][..], extra].concat();
        match Cli::try_parse_from(args).unwrap().command {
            Command::Article(args) => args,
            _ => unreachable!("it was asked for the article"),
        }
    }
}
