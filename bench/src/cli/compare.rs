//! The arguments of the commands that measure side by side.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};
use ringpoll::{Backend, Placement, PollMode};

use super::values::{Bytes, CpuList, FRAME_MAX, PeerList, count, rate, some_duration};
use crate::error::{Failure, Result};
use crate::peers::Peer;

#[derive(Args)]
pub(crate) struct CompareArgs {
    /// Everything in under 90 seconds
    #[arg(long)]
    pub(crate) quick: bool,
    /// echo: what serving costs; heavy: what becomes of cheap requests and of throughput where
    /// requests compute
    #[arg(long, default_value = "echo")]
    pub(crate) scenario: CompareScenario,
    /// Backends of ringpoll; without it epoll,uring,hybrid, or uring in the scenario heavy
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    backends: Option<Vec<Backend>>,
    /// Placements of ringpoll; without it inline, and pool too unless --quick or the backend is
    /// hybrid; auto,inline,pool in the scenario heavy
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    pub(crate) placements: Option<Vec<Placement>>,
    /// Servers to compare with, `--peers ''` for none; without it
    /// tokio,tokio-framed,bare-epoll,bare-ring,bare-ring-64k, or
    /// tokio-ws,tokio-per-cpu,monoio,compio in the scenario heavy
    #[arg(long, value_name = "LIST")]
    peers: Option<PeerList>,
    /// One more argument of `serve`; ringpoll on io_uring is measured with all of them too,
    /// beside without
    #[arg(long, value_name = "ARG", allow_hyphen_values = true)]
    pub(crate) serve_arg: Vec<String>,
    /// Scenario heavy: requests per second that each server is offered where a few are heavy;
    /// without it half of what the slowest one takes
    #[arg(long, value_name = "R", value_parser = rate)]
    pub(crate) rate: Option<f64>,
    /// Connections of each row; without it 1,10,100,1000, or 1,100,1000 with --quick
    #[arg(long, value_name = "LIST", value_delimiter = ',',
          value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub(crate) connections: Option<Vec<u32>>,
    /// Payload of a request
    #[arg(long, value_name = "BYTES", default_value_t = Bytes(1024))]
    pub(crate) size: Bytes,
    /// Requests in flight per connection in those rows; leaves out the row of 4 connections x 64
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

/// What is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum CompareScenario {
    Echo,
    Heavy,
}

impl CompareArgs {
    /// Refuses what the scenario has no use for.
    pub(crate) fn check(&self) -> Result<()> {
        let misplaced = match self.scenario {
            CompareScenario::Echo => self.rate.map(|_| "--rate"),
            CompareScenario::Heavy => {
                let depth = self.depth.map(|_| "--depth");
                self.connections.as_ref().map(|_| "--connections").or(depth)
            }
        };
        match misplaced {
            None => Ok(()),
            Some(flag) => Err(Failure::new(format!("{flag}: not in this scenario"))),
        }
    }

    pub(crate) fn backends(&self) -> Vec<Backend> {
        match (&self.backends, self.scenario) {
            (Some(backends), _) => backends.clone(),
            (None, CompareScenario::Echo) => vec![Backend::Epoll, Backend::Uring, Backend::Hybrid],
            (None, CompareScenario::Heavy) => vec![Backend::Uring],
        }
    }

    pub(crate) fn peers(&self) -> &[Peer] {
        match (&self.peers, self.scenario) {
            (Some(peers), _) => &peers.0,
            (None, CompareScenario::Echo) => &[
                Peer::Tokio,
                Peer::TokioFramed,
                Peer::BareEpoll,
                Peer::BareRing,
                Peer::BareRing64k,
            ],
            (None, CompareScenario::Heavy) => {
                &[Peer::TokioWs, Peer::TokioPerCpu, Peer::Monoio, Peer::Compio]
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
    /// without --duration it then takes a minute at most
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
    /// Where the JSON and the HTML page go
    #[arg(long, value_name = "DIR", default_value = "report")]
    pub(crate) out: PathBuf,
}

impl ArticleArgs {
    /// Refuses CPUs that are not among those this process may use.
    pub(crate) fn check_cpus(&self, allowed: &[usize]) -> Result<()> {
        self.cpus.check(allowed)?;
        self.sqpoll_cpus.iter().try_for_each(|list| list.check(allowed))
    }
}
