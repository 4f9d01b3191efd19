//! The load generator: one thread, one epoll, every byte of every reply checked.
//!
//! `dial` opens connections, `client` is one of them (`any_order`: its replies, where they are not
//! in order), `engine` drives them through warm-up, measurement and drain; `grpc` is another
//! engine, for the protocol whose bytes are not known beforehand. `tally` counts for both, `dice`
//! says which requests ask for work, `windows` which replies came while no CPU was stolen.
//! `http` loads HTTP servers, with tools of others too.

mod any_order;
pub(crate) mod client;
pub(crate) mod dial;
mod dice;
pub(crate) mod engine;
mod grpc;
mod http;
mod tally;
mod windows;

use std::net::SocketAddr;
use std::time::Duration;

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

use crate::cli::{LoadArgs, resolve};
use crate::error::{Failure, Result};
use crate::host;
pub(crate) use crate::load::http::HttpLoad;
use crate::load::windows::Clean;
pub(crate) use crate::load::windows::WINDOW;
use crate::rpc::Protocol;
use crate::rpc::grpc::STREAMS_MAX;
use crate::wire::{FRONT_BYTES, HEADER_BYTES};

/// What to send, to whom, for how long.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    pub(crate) protocol: Protocol,
    pub(crate) addrs: Vec<SocketAddr>,
    pub(crate) connections: u32,
    pub(crate) idle: u32,
    pub(crate) payload_bytes: u32,
    /// Requests in flight per connection, at most.
    pub(crate) depth: u32,
    /// Replies may come in any order, each with the number of its request.
    pub(crate) unordered: bool,
    /// Requests per second over all connections; `None` is a closed loop.
    pub(crate) rate: Option<f64>,
    /// The share of requests that ask for work.
    pub(crate) heavy_percent: f64,
    /// Decides which ones.
    pub(crate) seed: u64,
    /// The CPUs whose stolen time spoils a window.
    pub(crate) watched_cpus: Vec<usize>,
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
    /// Of the requests that asked for no work.
    pub(crate) cheap_latency: Histogram<u64>,
    /// Without the windows in which a CPU was stolen.
    pub(crate) clean: Clean,
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
    heavy_requests: u64,
    /// `None` where every request was heavy.
    cheap_latency_us: Option<Latency>,
    window_ms: u64,
    windows: u64,
    windows_left_out: u64,
    /// Requests that lived in no window that was left out.
    clean_requests: u64,
    /// `None` where nothing was left.
    clean_latency_us: Option<Latency>,
    clean_cheap_latency_us: Option<Latency>,
}

/// Microseconds.
#[derive(Serialize, Deserialize, Clone, Copy, Debug, Default)]
pub(crate) struct Latency {
    pub(crate) p50: f64,
    pub(crate) p90: f64,
    pub(crate) p99: f64,
    pub(crate) p999: f64,
    pub(crate) p9999: f64,
    pub(crate) max: f64,
}

impl Latency {
    /// `None` of nothing.
    pub(crate) fn of(histogram: &Histogram<u64>) -> Option<Latency> {
        let at = |quantile| histogram.value_at_quantile(quantile) as f64 / 1e3;
        (!histogram.is_empty()).then(|| Latency {
            p50: at(0.5),
            p90: at(0.9),
            p99: at(0.99),
            p999: at(0.999),
            p9999: at(0.9999),
            max: histogram.max() as f64 / 1e3,
        })
    }
}

impl Outcome {
    pub(crate) fn rps(&self) -> f64 {
        self.requests as f64 / self.elapsed.as_secs_f64()
    }

    /// Whether less was answered than an open loop offered.
    pub(crate) fn fell_behind(&self, rate: f64) -> bool {
        self.rps() < rate * KEPT_UP
    }

    pub(crate) fn heavy_requests(&self) -> u64 {
        self.latency.len() - self.cheap_latency.len()
    }

    pub(crate) fn latency_us(&self) -> Latency {
        Latency::of(&self.latency).unwrap_or_default()
    }

    fn line(&self) -> Line {
        Line {
            requests: self.requests,
            errors: self.errors,
            elapsed_s: self.elapsed.as_secs_f64(),
            rps: self.rps(),
            latency_us: self.latency_us(),
            bytes: self.bytes,
            heavy_requests: self.heavy_requests(),
            cheap_latency_us: Latency::of(&self.cheap_latency),
            window_ms: WINDOW.as_millis() as u64,
            windows: self.clean.windows,
            windows_left_out: self.clean.windows_left_out,
            clean_requests: self.clean.latency.len(),
            clean_latency_us: Latency::of(&self.clean.latency),
            clean_cheap_latency_us: Latency::of(&self.clean.cheap_latency),
        }
    }
}

/// For nanoseconds of latency.
pub(crate) fn histogram() -> Result<Histogram<u64>> {
    Histogram::new_with_bounds(1, LATENCY_NS_MAX, 3).map_err(Failure::at("histogram"))
}

/// The subcommand.
pub(crate) fn run(args: &LoadArgs) -> Result<()> {
    let depth = args.depth.unwrap_or(if args.rate.is_some() { OPEN_DEPTH_MAX } else { 1 });
    if args.size.0 == 0 && args.heavy_share.is_some_and(|share| share > 0.0) {
        return Err(Failure::new("--heavy-share: a payload of 0 bytes has no room for the mark"));
    }
    if args.unordered && (args.size.0 as usize) < NUMBER_BYTES {
        return Err(Failure::new(format!(
            "--unordered: a payload of {} bytes has no room for its number, {NUMBER_BYTES} bytes",
            args.size
        )));
    }
    if args.unordered && args.protocol != Protocol::Frames {
        let message = format!("--unordered: protocol {} has no numbers", args.protocol);
        return Err(Failure::new(message));
    }
    if args.protocol == Protocol::Grpc && depth > STREAMS_MAX {
        let message = format!("--depth {depth}: a connection of grpc has {STREAMS_MAX} streams");
        return Err(Failure::new(message));
    }
    // A server may run wherever it likes.
    let watched = args.steal_cpus.as_ref().map(|list| list.0.clone());
    let plan = Plan {
        protocol: args.protocol,
        addrs: resolve(&args.addr)?,
        connections: args.connections,
        idle: args.idle,
        payload_bytes: args.size.0,
        depth,
        unordered: args.unordered,
        rate: args.rate,
        heavy_percent: args.heavy_share.unwrap_or(100.0),
        seed: args.seed,
        watched_cpus: watched.unwrap_or_else(host::cpu::online),
        warmup: args.warmup.unwrap_or((args.duration / 10).min(Duration::from_secs(1))),
        duration: args.duration,
        requests_max: None,
        timeout: args.timeout,
    };
    let outcome =
        engine::run(&plan, &mut ()).map_err(Failure::at(format!("load {}", args.addr)))?;
    print(&outcome, args.json)?;
    if let Some(rate) = args.rate.filter(|rate| outcome.fell_behind(*rate)) {
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
    println!(
        "{} requests in {:.2} s: {:.0}/s, {:.1} MiB/s, {} errors",
        line.requests,
        line.elapsed_s,
        line.rps,
        line.bytes as f64 / line.elapsed_s / f64::from(1 << 20),
        line.errors
    );
    print_latency("latency", line.latency_us);
    let (left_out, windows) = (line.windows_left_out, line.windows);
    match line.clean_latency_us {
        Some(clean) if left_out > 0 => {
            print_latency(&format!("latency without {left_out} of {windows} windows"), clean);
        }
        Some(_) => println!("no CPU was seen stolen in {windows} windows"),
        None => println!("{left_out} of {windows} windows had CPU time stolen"),
    }
    let cheap = line.clean_cheap_latency_us.or(line.cheap_latency_us);
    if let Some(cheap) = cheap.filter(|_| line.heavy_requests > 0) {
        print_latency(
            &format!("latency of cheap ones beside {} heavy", line.heavy_requests),
            cheap,
        );
    }
    Ok(())
}

fn print_latency(what: &str, latency: Latency) {
    let Latency { p50, p90, p99, p999, p9999, max } = latency;
    println!(
        "{what} µs: p50 {p50:.1}, p90 {p90:.1}, p99 {p99:.1}, p99.9 {p999:.1}, \
         p99.99 {p9999:.1}, max {max:.1}"
    );
}

/// What tells the requests of a connection apart.
const NUMBER_BYTES: usize = FRONT_BYTES - HEADER_BYTES;
/// A minute; anything slower is recorded as that.
const LATENCY_NS_MAX: u64 = 60_000_000_000;
/// Without a bound an overloaded server's queue would be ours to keep.
pub(crate) const OPEN_DEPTH_MAX: u32 = 1024;
/// Below this share of the offered rate the server did not keep up.
const KEPT_UP: f64 = 0.95;
const FDS_SPARE: u64 = 64;
