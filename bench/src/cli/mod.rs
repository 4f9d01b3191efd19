//! The command line: a stable contract, because scripts depend on it.
//!
//! `serve`, `calls` and `compare` hold the arguments of those commands, `values` what can stand
//! behind a flag.

mod calls;
mod compare;
mod scenario;
mod serve;
mod values;

use std::time::Duration;

use clap::{Args, Parser, Subcommand};

pub(crate) use self::calls::{CallsArgs, ClientKind, RuntimeKind};
pub(crate) use self::compare::{ArticleArgs, CompareArgs, CpuArgs};
pub(crate) use self::scenario::CompareScenario;
pub(crate) use self::serve::{Scenario, ServeArgs};
use self::serve::{UpstreamArgs, WorkArgs};
pub(crate) use self::values::{Bytes, CpuList, PeerAddr, ServerAddr, resolve};
use self::values::{FRAME_MAX, duration, percent, rate, some_duration};
use crate::peers::Peer;
use crate::rpc::Protocol;

/// Measures ringpoll: servers, a load generator, and side-by-side comparisons.
#[derive(Parser)]
#[command(name = "ringpoll-bench", version)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Subcommand)]
pub(crate) enum Command {
    /// What this host offers, which backend `auto` takes, and why
    Probe,
    /// Serve with ringpoll until SIGINT or SIGTERM
    Serve(ServeArgs),
    /// Send requests and measure
    Load(LoadArgs),
    /// Make calls with an RPC client, and measure the client
    Calls(CallsArgs),
    /// Serve with something else than ringpoll, to compare with
    #[command(hide = true)]
    Peer(PeerArgs),
    /// ringpoll and others side by side in one run
    Compare(CompareArgs),
    /// The experiments of the article that ringpoll implements, with its claims beside the figures
    Article(ArticleArgs),
}

#[derive(Args)]
pub(crate) struct LoadArgs {
    /// The server
    #[arg(long, value_name = "HOST:PORT")]
    pub(crate) addr: String,
    /// How the server talks
    #[arg(long, default_value = "frames")]
    pub(crate) protocol: Protocol,
    /// Connections that send requests
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub(crate) connections: u32,
    /// Payload of a request
    #[arg(long, value_name = "BYTES")]
    pub(crate) size: Bytes,
    /// How long to measure, such as 10s or 500ms
    #[arg(long, value_parser = some_duration)]
    pub(crate) duration: Duration,
    /// Requests in flight per connection: 1 in a closed loop; with --rate a bound, 1024
    #[arg(long, value_name = "D", value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub(crate) depth: Option<u32>,
    /// Take replies in any order, as --scenario mux sends them: matched by the number in their
    /// payload, of 8 bytes at least
    #[arg(long)]
    pub(crate) unordered: bool,
    /// Open loop: requests per second over all connections, timed from when each was due
    #[arg(long, value_name = "R", value_parser = rate)]
    pub(crate) rate: Option<f64>,
    /// The share of requests marked as heavy, which a server of that scenario works for; without it
    /// all
    #[arg(long, value_name = "PERCENT", value_parser = percent)]
    pub(crate) heavy_share: Option<f64>,
    /// Decides which requests those are
    #[arg(long, hide = true, value_name = "N", default_value_t = SEED)]
    pub(crate) seed: u64,
    /// CPUs whose stolen time spoils the windows it falls into; without it all of them
    #[arg(long, hide = true, value_name = "LIST")]
    pub(crate) steal_cpus: Option<CpuList>,
    /// More connections that stay silent
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) idle: u32,
    /// Print one JSON object instead of text
    #[arg(long)]
    pub(crate) json: bool,
    /// Traffic before the measurement; a tenth of it, at most 1 s, unless given
    #[arg(long, value_parser = duration)]
    pub(crate) warmup: Option<Duration>,
    /// How long the server may take to accept a connection or to answer anything
    #[arg(long, value_parser = some_duration, default_value = "10s")]
    pub(crate) timeout: Duration,
}

#[derive(Args)]
pub(crate) struct PeerArgs {
    #[arg(value_name = "NAME")]
    pub(crate) peer: Peer,
    #[arg(long, value_name = "HOST:PORT")]
    pub(crate) addr: String,
    /// What a request asks for: echo, heavy; with tokio and tokio-ws also mux
    #[arg(long, default_value = "echo")]
    pub(crate) scenario: Scenario,
    #[command(flatten)]
    pub(crate) work: WorkArgs,
    #[command(flatten)]
    pub(crate) upstream: UpstreamArgs,
    #[arg(long, value_name = "BYTES", default_value_t = FRAME_MAX)]
    pub(crate) frame_max: Bytes,
    #[arg(long, value_name = "PID")]
    pub(crate) die_with: Option<u32>,
    /// Leave it to the scheduler where the runtimes run that are one for each CPU
    #[arg(long)]
    pub(crate) unpinned: bool,
    /// Accept into the ring's own table of descriptors
    #[arg(long)]
    pub(crate) direct_fds: bool,
    /// How the connections avoid congestion, such as reno
    #[arg(long, value_name = "NAME")]
    pub(crate) congestion: Option<String>,
    /// A receive buffer of that size instead of one the kernel adapts
    #[arg(long, value_name = "BYTES")]
    pub(crate) rcvbuf: Option<Bytes>,
    /// A send buffer of that size instead of one the kernel adapts
    #[arg(long, value_name = "BYTES")]
    pub(crate) sndbuf: Option<Bytes>,
}

/// Of the choice of heavy requests, where nobody asks for another one.
pub(crate) const SEED: u64 = 1;

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
