//! The load generator: one thread, one epoll, every byte of every reply checked.
//!
//! `dial` opens connections, `client` is one of them, `engine` drives them through warm-up,
//! measurement and drain.

pub(crate) mod client;
pub(crate) mod dial;
pub(crate) mod engine;

use std::net::SocketAddr;
use std::time::Duration;

use hdrhistogram::Histogram;
use serde::Serialize;

use crate::cli::{LoadArgs, resolve};
use crate::error::{Failure, Result};
use crate::host;

/// What to send, to whom, for how long.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    pub(crate) addrs: Vec<SocketAddr>,
    pub(crate) connections: u32,
    pub(crate) idle: u32,
    pub(crate) payload_bytes: u32,
    /// Requests in flight per connection, at most.
    pub(crate) depth: u32,
    /// Requests per second over all connections; `None` is a closed loop.
    pub(crate) rate: Option<f64>,
    pub(crate) warmup: Duration,
    pub(crate) duration: Duration,
    /// So many replies end the measurement before its time is up; never later.
    pub(crate) requests_max: Option<u64>,
    /// How long the server may take to accept a connection or to answer anything.
    pub(crate) timeout: Duration,
}

/// Told when the measured window opens and closes, to read other clocks at the same moments.
pub(crate) trait Observer {
    fn on_window_open(&mut self) {}
    fn on_window_close(&mut self) {}
}

impl Observer for () {}

/// What the measured window saw.
pub(crate) struct Outcome {
    /// Requests answered in the window.
    pub(crate) requests: u64,
    /// Requests answered at all, with those of warm-up and drain.
    pub(crate) requests_ever: u64,
    /// Wrong replies and lost connections, at any time.
    pub(crate) errors: u64,
    pub(crate) first_error: Option<String>,
    pub(crate) elapsed: Duration,
    /// Bytes of the replies in the window, with their headers.
    pub(crate) bytes: u64,
    /// Nanoseconds from send (open loop: from when it was due) to the last byte of the reply.
    pub(crate) latency: Histogram<u64>,
}

/// The JSON object of `load --json`.
#[derive(Serialize)]
struct Line {
    requests: u64,
    errors: u64,
    elapsed_s: f64,
    rps: f64,
    latency_us: Latency,
    bytes: u64,
}

/// Microseconds.
#[derive(Serialize, Clone, Copy, Debug, Default)]
pub(crate) struct Latency {
    pub(crate) p50: f64,
    pub(crate) p90: f64,
    pub(crate) p99: f64,
    pub(crate) p999: f64,
    pub(crate) p9999: f64,
    pub(crate) max: f64,
}

impl Outcome {
    pub(crate) fn rps(&self) -> f64 {
        self.requests as f64 / self.elapsed.as_secs_f64()
    }

    pub(crate) fn latency_us(&self) -> Latency {
        let at = |quantile| self.latency.value_at_quantile(quantile) as f64 / 1e3;
        Latency {
            p50: at(0.5),
            p90: at(0.9),
            p99: at(0.99),
            p999: at(0.999),
            p9999: at(0.9999),
            max: self.latency.max() as f64 / 1e3,
        }
    }

    fn line(&self) -> Line {
        Line {
            requests: self.requests,
            errors: self.errors,
            elapsed_s: self.elapsed.as_secs_f64(),
            rps: self.rps(),
            latency_us: self.latency_us(),
            bytes: self.bytes,
        }
    }
}

/// The subcommand.
pub(crate) fn run(args: &LoadArgs) -> Result<()> {
    let depth = args.depth.unwrap_or(if args.rate.is_some() { OPEN_DEPTH_MAX } else { 1 });
    let plan = Plan {
        addrs: resolve(&args.addr)?,
        connections: args.connections,
        idle: args.idle,
        payload_bytes: args.size.0,
        depth,
        rate: args.rate,
        warmup: args.warmup.unwrap_or((args.duration / 10).min(Duration::from_secs(1))),
        duration: args.duration,
        requests_max: None,
        timeout: args.timeout,
    };
    let outcome =
        engine::run(&plan, &mut ()).map_err(Failure::at(format!("load {}", args.addr)))?;
    print(&outcome, args.json)?;
    if let Some(rate) = args.rate.filter(|rate| outcome.rps() < rate * KEPT_UP) {
        eprintln!(
            "ringpoll-bench: offered {rate:.0}/s, answered {:.0}/s: these are the latencies of a \
             queue that grows",
            outcome.rps()
        );
    }
    match outcome.first_error {
        None => Ok(()),
        Some(first) => Err(Failure::new(format!(
            "load {}: {} errors, the first: {first}",
            args.addr, outcome.errors
        ))),
    }
}

/// Descriptors a plan needs: its connections, the epoll, standard streams, and what a runtime keeps
/// open.
pub(crate) fn fds_needed(connections: u32, idle: u32) -> u64 {
    u64::from(connections) + u64::from(idle) + FDS_SPARE
}

pub(crate) fn reserve_fds(connections: u32, idle: u32) -> Result<()> {
    let wanted = u64::from(connections) + u64::from(idle);
    host::reserve_fds(fds_needed(connections, idle))
        .map_err(Failure::at(format!("open {wanted} connections")))
}

fn print(outcome: &Outcome, json: bool) -> Result<()> {
    let line = outcome.line();
    if json {
        let text = serde_json::to_string(&line).map_err(Failure::at("write the result as JSON"))?;
        println!("{text}");
        return Ok(());
    }
    let Latency { p50, p90, p99, p999, p9999, max } = line.latency_us;
    println!(
        "{} requests in {:.2} s: {:.0}/s, {:.1} MiB/s, {} errors",
        line.requests,
        line.elapsed_s,
        line.rps,
        line.bytes as f64 / line.elapsed_s / f64::from(1 << 20),
        line.errors
    );
    println!(
        "latency µs: p50 {p50:.1}, p90 {p90:.1}, p99 {p99:.1}, p99.9 {p999:.1}, \
         p99.99 {p9999:.1}, max {max:.1}"
    );
    Ok(())
}

/// Without a bound an overloaded server's queue would be ours to keep.
const OPEN_DEPTH_MAX: u32 = 1024;
/// Below this share of the offered rate the server did not keep up.
const KEPT_UP: f64 = 0.95;
const FDS_SPARE: u64 = 64;
