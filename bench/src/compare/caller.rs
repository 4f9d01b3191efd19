//! The clients of the scenario calls: each a process of its own that calls a server.
//!
//! In a round of these, the CPU time, the memory and the system calls are those of the client.

use std::fmt;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use ringpoll::{Backend, Placement};

use crate::calls::Line;
use crate::cli::CompareArgs;
use crate::compare::candidate::Candidate;
use crate::compare::child::Server;
use crate::compare::measure::{SYSTEM_CALLS, counted_by_perf};
use crate::compare::model::{Curve, Round};
use crate::compare::plan::{Cell, Settings};
use crate::compare::scenario::Usual;
use crate::error::{Failure, Result};
use crate::peers::Peer;

/// A client to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Caller {
    Ringpoll(Backend),
    /// The same, and the callers are tasks of its poller.
    OnPoller(Backend),
    Tokio,
    Tonic,
}

impl Caller {
    /// The backend of a client of ringpoll.
    pub(crate) fn backend(self) -> Option<Backend> {
        match self {
            Caller::Ringpoll(backend) | Caller::OnPoller(backend) => Some(backend),
            Caller::Tokio | Caller::Tonic => None,
        }
    }

    pub(crate) fn version(self) -> String {
        match self {
            Caller::Ringpoll(_) | Caller::OnPoller(_) => {
                format!("ringpoll {}", env!("CARGO_PKG_VERSION"))
            }
            Caller::Tokio => Peer::Tokio.version(),
            Caller::Tonic => Peer::Tonic.version(),
        }
    }

    pub(crate) fn settings(self) -> &'static str {
        match self {
            Caller::Ringpoll(_) => "rpc::Client with one poller",
            Caller::OnPoller(_) => "rpc::Client with one poller, which runs the callers too",
            Caller::Tokio => "a task that reads and a mutexed writer for each connection",
            Caller::Tonic => "a Channel for each connection, in turn; its server is tonic's",
        }
    }

    /// The command line that starts it, without its server and its traffic.
    pub(crate) fn args(self) -> Vec<String> {
        let kind = match self {
            Caller::Ringpoll(_) | Caller::OnPoller(_) => "ringpoll",
            Caller::Tokio => "tokio",
            Caller::Tonic => "tonic",
        };
        let backend = self.backend().map(|backend| format!("--backend={backend}"));
        let mut args = vec!["calls".to_owned(), format!("--client={kind}")];
        args.extend(backend);
        if let Caller::OnPoller(_) = self {
            args.push("--runtime=poller".to_owned());
        }
        args
    }

    /// What it calls.
    fn server(self) -> (Candidate, &'static [&'static str]) {
        match self {
            Caller::Tonic => (Candidate::Peer(Peer::Tonic), &[]),
            _ => (Candidate::ours(Backend::Auto, Placement::Inline), &["--scenario=calls"]),
        }
    }

    fn start_server(self, cell: &Cell, settings: &Settings) -> Result<Server> {
        let (server, args) = self.server();
        let args: Vec<_> = args.iter().map(|arg| (*arg).to_owned()).collect();
        Server::start(&server, &args, settings, settings.pinned_for(cell))
    }
}

impl fmt::Display for Caller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Caller::Ringpoll(backend) => write!(f, "client ringpoll {backend}"),
            Caller::OnPoller(backend) => {
                write!(f, "client ringpoll {backend}, callers on the poller")
            }
            Caller::Tokio => f.write_str(ON_TOKIO),
            Caller::Tonic => f.write_str(&name("tonic")),
        }
    }
}

/// The client of that name.
pub(crate) fn name(peer: &str) -> String {
    format!("client {peer}")
}

/// The clients of the scenario calls: ours, then those of the peers that have one.
pub(crate) fn candidates(args: &CompareArgs, usual: &Usual) -> Vec<Candidate> {
    let backends = args.backends.as_deref().unwrap_or(usual.backends);
    let peers = args.peers.as_ref().map_or(usual.peers, |peers| &peers.0);
    let on_tokio = backends.iter().map(|backend| Caller::Ringpoll(*backend));
    let ours = on_tokio.chain(backends.iter().map(|backend| Caller::OnPoller(*backend)));
    let others = peers.iter().filter_map(|peer| match peer {
        Peer::Tokio => Some(Caller::Tokio),
        Peer::Tonic => Some(Caller::Tonic),
        _ => None,
    });
    let mut all: Vec<Candidate> = Vec::new();
    for caller in ours.chain(others).map(Candidate::Caller) {
        if !all.contains(&caller) {
            all.push(caller);
        }
    }
    all
}

/// A client under one kind of traffic, once; and what its server warned of.
pub(crate) fn round(
    caller: Caller,
    cell: &Cell,
    settings: &Settings,
    index: u32,
) -> Result<(Round, Vec<String>)> {
    let server = caller.start_server(cell, settings)?;
    let program = std::env::current_exe().map_err(Failure::at("find this program"))?;
    let mut command = Command::new(program);
    command.args(client_args(caller, &server, cell, settings));
    command.arg(format!("--die-with={}", std::process::id()));
    match measured(command) {
        Ok((line, _)) => Ok((line.round(index), server.stop()?.warnings)),
        Err(failure) => Err(server.explain(failure)),
    }
}

/// System calls of the whole life of the client for each call, counted by the kernel.
pub(crate) fn system_calls_by_perf(
    caller: Caller,
    cell: &Cell,
    settings: &Settings,
) -> Result<f64> {
    let server = caller.start_server(cell, settings)?;
    let program = std::env::current_exe().map_err(Failure::at("find this program"))?;
    let mut command = Command::new("perf");
    command.args(["stat", "-x", ",", "-e", SYSTEM_CALLS, "--"]).arg(program);
    command.args(client_args(caller, &server, cell, settings));
    let (line, said) = measured(command)?;
    Ok(counted_by_perf(&said)? as f64 / line.calls_ever as f64)
}

fn client_args(caller: Caller, server: &Server, cell: &Cell, settings: &Settings) -> Vec<String> {
    let mut args = caller.args();
    let watched: Vec<_> = settings.cpus_in_use(cell).iter().map(usize::to_string).collect();
    args.extend([
        format!("--addr={}", server.addr()),
        format!("--callers={}", cell.connections * cell.depth),
        format!("--connections={}", cell.connections),
        format!("--size={}", cell.payload_bytes),
        format!("--duration={}ms", settings.duration_s * 1e3),
        format!("--warmup={}ms", settings.warmup_s * 1e3),
        format!("--steal-cpus={}", watched.join(",")),
        "--json".to_owned(),
    ]);
    args.extend(server.pid().map(|pid| format!("--server-pid={pid}")));
    args
}

/// What a client has measured, and what it printed on standard error. This thread is on the CPUs
/// of clients, and so is the client.
fn measured(mut command: Command) -> Result<(Line, Vec<u8>)> {
    // An interrupt from the keyboard goes to a process group, and is for this process alone.
    command.stdin(Stdio::null()).process_group(0);
    let output = command.output().map_err(Failure::at("start the client"))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let last = said.lines().last().unwrap_or("nothing on standard error");
        return Err(Failure::new(format!("the client failed, {}: {last}", output.status)));
    }
    let line = serde_json::from_slice(&output.stdout).map_err(Failure::at("read the client"))?;
    Ok((line, output.stderr))
}

impl Line {
    fn round(&self, index: u32) -> Round {
        let latency = self.latency_us;
        Round {
            index,
            requests: self.calls,
            elapsed_s: self.elapsed_s,
            rps: self.calls_per_s,
            per_cpu_s: Some(self.calls_per_cpu_s),
            server_cpus_busy: self.server_cpus_busy,
            sqpoll_cpus_busy: None,
            client_cpus_busy: self.client_cpus_busy,
            p50_us: latency.p50,
            p90_us: latency.p90,
            p99_us: latency.p99,
            p999_us: latency.p999,
            p9999_us: None,
            max_us: latency.max,
            latency_curve: Curve::new(),
            clean_p50_us: None,
            clean_p99_us: None,
            windows: 0,
            windows_left_out: 0,
            cheap_p99_us: None,
            clean_cheap_p99_us: None,
            heavy_requests: 0,
            steal_percent: self.steal_percent,
            others_percent: self.others_percent,
            rss_bytes: Some(self.rss_bytes),
            system_calls_per_request: self.system_calls_per_call,
            completions_per_wait: None,
            sqpoll_work_share: None,
        }
    }
}

/// What others are held against.
pub(crate) const ON_TOKIO: &str = "client tokio";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Cli, Command as Asked};
    use crate::compare::{candidate, scenario};
    use clap::Parser;

    #[test]
    fn clients_are_measured_on_both_backends_beside_tokio_and_tonic() {
        let names = [
            "client ringpoll epoll",
            "client ringpoll uring",
            "client ringpoll epoll, callers on the poller",
            "client ringpoll uring, callers on the poller",
            ON_TOKIO,
            "client tonic",
        ];
        assert_eq!(measured_names(&[]), names);
        assert_eq!(measured_names(&["--backends", "epoll", "--peers", ""]), [names[0], names[2]]);
        assert_eq!(
            measured_names(&["--backends", "epoll", "--peers", "tokio,bare-epoll"]),
            [names[0], names[2], names[4]]
        );
    }

    #[test]
    fn a_client_is_started_with_what_the_traffic_is() {
        let args = asked(&[]);
        let cells = scenario::cells(&args);
        let [cell] = &cells[..] else { panic!("one kind of traffic, and not {cells:?}") };
        assert_eq!((cell.connections, cell.depth), (4, 64));
        let caller = Candidate::Caller(Caller::Ringpoll(Backend::Uring));
        assert!(caller.suits(cell) && !caller.suits(&Cell::new(4, 64, 0, 1024)));
        assert!(!Candidate::Peer(Peer::Tokio).suits(cell));
        let line = [vec!["ringpoll-bench".to_owned()], caller.args(1, None)].concat();
        let line = line.into_iter().chain(["--addr=127.0.0.1:1".to_owned()]);
        let Asked::Calls(args) = Cli::try_parse_from(line).unwrap().command else {
            panic!("it is not the command calls");
        };
        assert_eq!((args.backend, args.callers, args.size.0), (Backend::Uring, 256, 1024));
    }

    fn measured_names(more: &[&str]) -> Vec<String> {
        let all = candidate::candidates(&asked(more), true, &[]).unwrap();
        all.iter().map(Candidate::to_string).collect()
    }

    fn asked(more: &[&str]) -> CompareArgs {
        let line = ["ringpoll-bench", "compare", "--scenario", "calls"];
        match Cli::try_parse_from(line.iter().chain(more)).unwrap().command {
            Asked::Compare(args) => args,
            _ => unreachable!("it is what was asked for"),
        }
    }
}
