//! `calls`: many callers share the few connections of an RPC client, and the client is measured.
//!
//! The callers are tasks of a tokio runtime with one worker, with every client; or tasks of the
//! poller. Each composes a request in memory of its own, awaits the answer, checks every byte of
//! it, and makes the next call. The CPU time is that of the whole process, callers included.
//! `clients` and `on_tokio` are the clients, `load` the callers, `outstanding` the calls that are
//! made all at once.

mod clients;
mod load;
mod on_tokio;
mod outstanding;

use std::net::SocketAddr;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::runtime::Builder;

use self::clients::{Echo, OnRingpoll, OnTonic, Within};
use self::on_tokio::OnTokio;
use crate::cli::{CallsArgs, ClientKind, RuntimeKind, resolve};
use crate::error::{Failure, Result};
use crate::load::Latency;
use crate::signals;

/// The JSON object of `calls --json`.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Line {
    /// Calls answered in the measured time.
    pub(crate) calls: u64,
    /// Calls answered at all.
    pub(crate) calls_ever: u64,
    pub(crate) elapsed_s: f64,
    pub(crate) calls_per_s: f64,
    /// Of the client's process, with all its threads.
    pub(crate) cpu_us_per_call: f64,
    pub(crate) calls_per_cpu_s: f64,
    pub(crate) client_cpus_busy: f64,
    /// `None` without `--server-pid`.
    pub(crate) server_cpus_busy: Option<f64>,
    pub(crate) latency_us: Latency,
    /// By the client's own count: those of its pollers. `None` of a client that does not count.
    pub(crate) system_calls_per_call: Option<f64>,
    /// Of the client.
    pub(crate) rss_bytes: u64,
    pub(crate) steal_percent: f64,
    /// `None` without `--server-pid`.
    pub(crate) others_percent: Option<f64>,
}

/// The subcommand.
pub(crate) fn run(args: &CallsArgs) -> Result<()> {
    if (args.size.0 as usize) < load::FRONT_BYTES {
        let (size, least) = (args.size.0, load::FRONT_BYTES);
        return Err(Failure::new(format!("--size {size}: a call needs {least} bytes at least")));
    }
    if args.outstanding.is_some() && args.client == ClientKind::Tonic {
        return Err(Failure::new("--outstanding: the server of client tonic cannot hold calls"));
    }
    if args.runtime == RuntimeKind::Poller && args.client != ClientKind::Ringpoll {
        return Err(Failure::new("--runtime poller: only client ringpoll has a poller"));
    }
    args.die_with.map_or(Ok(()), signals::die_with)?;
    let addr = resolve(&args.addr)?[0];
    let mut runtime = match args.runtime {
        RuntimeKind::OneWorker => Builder::new_multi_thread(),
        RuntimeKind::CurrentThread | RuntimeKind::Poller => Builder::new_current_thread(),
    };
    let runtime =
        runtime.worker_threads(1).enable_all().build().map_err(Failure::at("start tokio"))?;
    let measured = runtime.block_on(measure(args, addr));
    measured.map_err(Failure::at(format!("calls {}", args.addr)))
}

async fn measure(args: &CallsArgs, addr: SocketAddr) -> Result<()> {
    let limit = args.call_timeout.filter(|limit| !limit.is_zero());
    match args.client {
        ClientKind::Ringpoll => with_client(args, OnRingpoll::new(args, addr)?).await,
        ClientKind::Tokio => {
            let client = OnTokio::connect(args.connections, addr).await?;
            with_limit(args, client, limit).await
        }
        ClientKind::Tonic => with_limit(args, OnTonic::connect(args, addr).await?, limit).await,
    }
}

async fn with_limit<E: Echo>(args: &CallsArgs, client: E, limit: Option<Duration>) -> Result<()> {
    match limit {
        Some(limit) => with_client(args, Within(client, limit)).await,
        None => with_client(args, client).await,
    }
}

async fn with_client<E: Echo>(args: &CallsArgs, client: E) -> Result<()> {
    match args.outstanding {
        Some(count) => {
            let found = outstanding::run(args, client, count).await?;
            print_json(&found)
        }
        None => print(&load::run(args, client).await?, args.json),
    }
}

fn print(line: &Line, json: bool) -> Result<()> {
    if json {
        return print_json(line);
    }
    println!(
        "{} calls in {:.2} s: {:.0}/s, {:.0} per CPU-second of the client, \
         {:.2} µs of CPU each",
        line.calls, line.elapsed_s, line.calls_per_s, line.calls_per_cpu_s, line.cpu_us_per_call
    );
    let Latency { p50, p90, p99, p999, max, .. } = line.latency_us;
    println!("latency µs: p50 {p50:.1}, p90 {p90:.1}, p99 {p99:.1}, p99.9 {p999:.1}, max {max:.1}");
    if let Some(count) = line.system_calls_per_call {
        println!("{count:.4} system calls a call, by the client's count");
    }
    Ok(())
}

fn print_json(found: &impl Serialize) -> Result<()> {
    let text = serde_json::to_string(found).map_err(Failure::at("write the result as JSON"))?;
    println!("{text}");
    Ok(())
}
