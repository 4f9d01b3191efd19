//! The arguments of `calls`.

use std::time::Duration;

use clap::{Args, ValueEnum};
use ringpoll::Backend;

use super::values::{Bytes, CpuList, duration, some_duration};

#[derive(Args)]
pub(crate) struct CallsArgs {
    /// The client to measure
    #[arg(long)]
    pub(crate) client: ClientKind,
    /// Who talks to the kernel, with client ringpoll: auto, epoll, uring, hybrid
    #[arg(long, default_value = "auto")]
    pub(crate) backend: Backend,
    /// The server: `serve --scenario calls`, or for client tonic a server of gRPC
    #[arg(long, value_name = "HOST:PORT")]
    pub(crate) addr: String,
    /// Tasks that each make one call after the other
    #[arg(long, value_name = "N", default_value_t = 256,
          value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub(crate) callers: u32,
    /// Connections of the client
    #[arg(long, value_name = "N", default_value_t = 4,
          value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(crate) connections: u32,
    /// Body of a request and of its answer, 16 bytes at least
    #[arg(long, value_name = "BYTES", default_value_t = Bytes(1024))]
    pub(crate) size: Bytes,
    /// Where the callers run: on a runtime of tokio with one worker, on its current-thread runtime,
    /// or, with client ringpoll, on the poller of the connections
    #[arg(long, default_value = "one-worker")]
    pub(crate) runtime: RuntimeKind,
    /// How long to measure, such as 10s or 500ms
    #[arg(long, value_parser = some_duration, default_value = "2s")]
    pub(crate) duration: Duration,
    /// Traffic before the measurement; a fifth of it, at most 300 ms, unless given
    #[arg(long, value_parser = duration)]
    pub(crate) warmup: Option<Duration>,
    /// The longest time of a call, 0 for no limit. Without it, client ringpoll has its default
    /// limit, and the others have none
    #[arg(long, value_parser = duration)]
    pub(crate) call_timeout: Option<Duration>,
    /// Make so many calls at once instead, each once, and measure the memory that they take. The
    /// server must have the same number for `--hold`
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub(crate) outstanding: Option<u32>,
    /// How often to make the calls of `--outstanding`, one wave after the other
    #[arg(long, value_name = "N", default_value_t = 3,
          value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(crate) waves: u32,
    /// The server's process on this host, for what it uses
    #[arg(long, value_name = "PID")]
    pub(crate) server_pid: Option<u32>,
    /// Print one JSON object instead of text
    #[arg(long)]
    pub(crate) json: bool,
    /// CPUs whose stolen time is told; without it all of them
    #[arg(long, hide = true, value_name = "LIST")]
    pub(crate) steal_cpus: Option<CpuList>,
    /// Die with the process that started this one, which is PID
    #[arg(long, hide = true, value_name = "PID")]
    pub(crate) die_with: Option<u32>,
}

/// The runtime of the callers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum RuntimeKind {
    /// The multi-thread one, as `#[tokio::main]` makes it on one CPU
    OneWorker,
    /// The current-thread one. It writes to an eventfd for each task that another thread wakes
    CurrentThread,
    /// The poller, as for a caller that is a handler itself
    Poller,
}

/// A client of the scenario calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ClientKind {
    /// `ringpoll::rpc::Client`
    Ringpoll,
    /// tokio with a task that reads and a mutexed writer for each connection
    Tokio,
    /// The Channel of tonic, one for each connection
    Tonic,
}
