//! The arguments of the commands that measure side by side.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use ringpoll::{Backend, Placement, PollMode};

use super::scenario::{CompareScenario, ScenarioList};
use super::values::{
    Bytes, CpuList, FRAME_MAX, PeerAddr, PeerList, ServerAddr, count, host, rate, some_duration,
};
use crate::error::{Failure, Result};

#[derive(Args)]
pub(crate) struct CompareArgs {
    /// Everything in under 90 seconds
    #[arg(long)]
    pub(crate) quick: bool,
    /// What is compared, in this order: echo, sizes, stream, mux, proxy, rpc, idle, rates, heavy,
    /// http, calls; or all of them, as all
    #[arg(long, value_name = "LIST", default_value = "echo,idle")]
    pub(crate) scenario: ScenarioList,
    /// Backends of ringpoll; without it those that the scenario is about
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    pub(crate) backends: Option<Vec<Backend>>,
    /// Placements of ringpoll; without it those that the scenario is about
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    pub(crate) placements: Option<Vec<Placement>>,
    /// Servers to compare with, `--peers ''` for none; without it those that the scenario is about
    #[arg(long, value_name = "LIST")]
    pub(crate) peers: Option<PeerList>,
    /// One more server to compare with, started by somebody else: it answers the frames of `load`.
    /// May be given several times
    #[arg(long, value_name = "NAME=HOST:PORT")]
    pub(crate) peer: Vec<PeerAddr>,
    /// Its process on this host, for what it uses; the first belongs to the first --peer
    #[arg(long, value_name = "PID")]
    pub(crate) peer_pid: Vec<u32>,
    /// One more argument of `serve`; ringpoll on io_uring is measured with all of them too,
    /// beside without
    #[arg(long, value_name = "ARG", allow_hyphen_values = true)]
    pub(crate) serve_arg: Vec<String>,
    /// One more server of ringpoll, as the arguments of `serve`: 'sqpoll-config2 --send-rings=1';
    /// the backend first. May be given several times
    #[arg(long, value_name = "BACKEND ARGS")]
    pub(crate) also: Vec<String>,
    /// Scenario heavy: requests per second that each server is offered where a few are heavy;
    /// without it half of what the slowest one takes
    #[arg(long, value_name = "R", value_parser = rate)]
    pub(crate) rate: Option<f64>,
    /// Scenario http: where the programs axum_app and grpc_greeter are; without it the directory
    /// examples beside this program
    #[arg(long, value_name = "DIR")]
    pub(crate) examples: Option<PathBuf>,
    /// Connections of each row of the scenario echo; without it 1,10,100,1000, or 1,100,1000 with
    /// --quick
    #[arg(long, value_name = "LIST", value_delimiter = ',',
          value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub(crate) connections: Option<Vec<u32>>,
    /// Payload of a request, but in the scenarios sizes and stream
    #[arg(long, value_name = "BYTES", default_value_t = Bytes(1024))]
    pub(crate) size: Bytes,
    /// Requests in flight per connection in the rows of the scenario echo; leaves out the row of 4
    /// connections x 64
    #[arg(long, value_name = "D", value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub(crate) depth: Option<u32>,
    /// Rounds; each round measures every candidate once
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(crate) rounds: Option<u32>,
    /// How long one candidate is measured in one round
    #[arg(long, value_parser = some_duration)]
    pub(crate) duration: Option<Duration>,
    #[command(flatten)]
    pub(crate) cpus: CpuArgs,
    /// Count the system calls of every candidate with perf, in a round of its own
    #[arg(long)]
    pub(crate) perf: bool,
    /// An earlier report, as JSON: says whether this run agrees with it
    #[arg(long, value_name = "FILE")]
    pub(crate) against: Option<PathBuf>,
    /// Where the JSON and the HTML page go
    #[arg(long, value_name = "DIR", default_value = "report")]
    pub(crate) out: PathBuf,
    /// Longest payload the servers take
    #[arg(long, hide = true, value_name = "BYTES", default_value_t = FRAME_MAX)]
    pub(crate) frame_max: Bytes,
    /// Idle connections of the memory row; 0 leaves the idle rows out
    #[arg(long, hide = true, value_name = "N", default_value_t = 10_000)]
    pub(crate) idle: u32,
    /// How long an idle server is watched
    #[arg(long, hide = true, value_parser = some_duration, default_value = "2s")]
    pub(crate) idle_window: Duration,
}

impl CompareArgs {
    /// Whether memory and rest with silent connections are measured.
    pub(crate) fn has_idle_rows(&self) -> bool {
        self.idle > 0 && self.scenario.0.contains(&CompareScenario::Idle)
    }

    /// Where the example programs are.
    pub(crate) fn examples_dir(&self) -> PathBuf {
        let beside_program = || {
            let program = std::env::current_exe().unwrap_or_default();
            program.with_file_name("examples")
        };
        self.examples.clone().unwrap_or_else(beside_program)
    }

    /// Refuses what the scenarios have no use for.
    pub(crate) fn check(&self) -> Result<()> {
        let has = |scenario| self.scenario.0.contains(&scenario);
        let misplaced = [
            ("--rate", self.rate.is_some(), CompareScenario::Heavy),
            ("--connections", self.connections.is_some(), CompareScenario::Echo),
            ("--depth", self.depth.is_some(), CompareScenario::Echo),
            ("--examples", self.examples.is_some(), CompareScenario::Http),
        ];
        match misplaced.into_iter().find(|(_, given, scenario)| *given && !has(*scenario)) {
            None => Ok(()),
            Some((flag, _, scenario)) => {
                Err(Failure::new(format!("{flag}: only the scenario {scenario} has a use for it")))
            }
        }
    }
}

/// Who runs where.
#[derive(Args)]
pub(crate) struct CpuArgs {
    /// CPUs of the servers
    #[arg(long, value_name = "LIST")]
    pub(crate) server_cpus: Option<CpuList>,
    /// CPUs of the client
    #[arg(long, value_name = "LIST")]
    pub(crate) client_cpus: Option<CpuList>,
}

impl CpuArgs {
    /// Refuses CPUs that are not among those this process may use.
    pub(crate) fn check(&self, allowed: &[usize]) -> Result<()> {
        [&self.server_cpus, &self.client_cpus]
            .into_iter()
            .flatten()
            .try_for_each(|list| list.check(allowed))
    }
}

#[derive(Args)]
pub(crate) struct ArticleArgs {
    /// Everything in under 3 minutes
    #[arg(long)]
    pub(crate) quick: bool,
    /// Connections of experiments 2 and 3; without it 100,200,500 and
    /// 10,50,100,200,300,400,500,1000, or 100,500 and 10,100,500 with --quick
    #[arg(long, value_name = "LIST", value_delimiter = ',',
          value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub(crate) connections: Option<Vec<u32>>,
    /// Rounds; each round measures every server once
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(crate) rounds: Option<u32>,
    /// How long one server is measured in one round, at most
    #[arg(long, value_parser = some_duration)]
    pub(crate) duration: Option<Duration>,
    /// So many replies end a measurement sooner, such as 50M, which is the article's number;
    /// without --duration it then lasts as long as a slow server takes for them, and no longer
    #[arg(long, value_name = "N", value_parser = count)]
    pub(crate) requests: Option<u64>,
    /// Where the handlers of experiments 2 and 3 run; the article's have workers
    #[arg(long, default_value = "pool")]
    pub(crate) placement: Placement,
    /// What a poller without work does where kernel threads poll too: adaptive, always, never
    #[arg(long)]
    pub(crate) poll: Option<PollMode>,
    #[command(flatten)]
    pub(crate) cpus: CpuArgs,
    /// CPUs of the kernel threads that poll; without it beside the server, unless there are many
    #[arg(long, value_name = "LIST")]
    pub(crate) sqpoll_cpus: Option<CpuList>,
    /// Servers and client in network namespaces of their own, joined by a veth pair, instead of
    /// over loopback; for root, with the command ip
    #[arg(long)]
    pub(crate) namespaces: bool,
    /// A server on another host instead of those started here: where its `serve --stats` tells of
    /// it, or a server that does not tell, as in epoll=HOST:PORT or epoll/inline=HOST:PORT. May be
    /// given several times; experiments without any server are left out
    #[arg(long, value_name = "[NAME=]HOST:PORT", conflicts_with_all =
          ["namespaces", "poll", "server_cpus", "sqpoll_cpus"])]
    pub(crate) addr: Vec<ServerAddr>,
    /// Print what to type for servers on that host and a client on another, and do nothing else
    #[arg(long, value_name = "HOST", value_parser = host, conflicts_with_all =
          ["addr", "namespaces", "server_cpus", "sqpoll_cpus"])]
    pub(crate) commands: Option<String>,
    /// Where the JSON and the HTML page go
    #[arg(long, value_name = "DIR", default_value = "report")]
    pub(crate) out: PathBuf,
}

impl ArticleArgs {
    /// Refuses CPUs that are not among those this process may use, and a client that shares one
    /// with the other side. SQPOLL threads may share the server's.
    pub(crate) fn check_cpus(&self, allowed: &[usize]) -> Result<()> {
        let CpuArgs { server_cpus, client_cpus } = &self.cpus;
        let server_side = [("--server-cpus", server_cpus), ("--sqpoll-cpus", &self.sqpoll_cpus)];
        for (flag, list) in server_side.into_iter().chain([("--client-cpus", client_cpus)]) {
            let checked = list.as_ref().map_or(Ok(()), |list| list.check(allowed));
            checked.map_err(Failure::at(flag))?;
        }
        let of_client = |cpu: &&usize| client_cpus.as_ref().is_some_and(|own| own.0.contains(cpu));
        for (flag, list) in server_side {
            if let Some(cpu) = list.iter().flat_map(|list| &list.0).find(of_client) {
                return Err(Failure::new(format!(
                    "--client-cpus, {flag}: cpu {cpu} is in both, and each side needs its own"
                )));
            }
        }
        Ok(())
    }
}
