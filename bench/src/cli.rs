//! The command line: a stable contract, because scripts depend on it.

use std::net::{SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use ringpoll::{Backend, Placement, PollMode, RingTier, UringOptions};

use crate::error::{Failure, Result};
use crate::peers::Peer;
use crate::wire;

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
    /// Serve with something else than ringpoll, to compare with
    #[command(hide = true)]
    Peer(PeerArgs),
    /// ringpoll and others side by side in one run
    Compare(CompareArgs),
}

#[derive(Args)]
pub(crate) struct ServeArgs {
    /// Who talks to the kernel: auto, epoll, uring, hybrid
    #[arg(long, default_value = "auto")]
    pub(crate) backend: Backend,
    /// Where to listen; port 0 lets the kernel choose
    #[arg(long, value_name = "HOST:PORT")]
    pub(crate) addr: String,
    /// Where handlers run: auto, inline, pool, pool:N
    #[arg(long, default_value = "auto")]
    pub(crate) placement: Placement,
    /// How many poller threads; without it the placement decides
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub(crate) pollers: Option<u16>,
    /// What a poller without work does: adaptive, always, never
    #[arg(long, default_value = "adaptive")]
    pub(crate) poll: PollMode,
    /// What a request asks for
    #[arg(long, default_value = "echo")]
    pub(crate) scenario: Scenario,
    /// CPUs for the pollers, such as 0,2-3
    #[arg(long, value_name = "LIST")]
    pub(crate) poller_cpus: Option<CpuList>,
    /// CPUs for the workers of placement pool
    #[arg(long, value_name = "LIST")]
    pub(crate) worker_cpus: Option<CpuList>,
    /// Longest payload; a longer one closes its connection
    #[arg(long, value_name = "BYTES", default_value_t = FRAME_MAX)]
    pub(crate) frame_max: Bytes,
    /// Work per request of the scenario heavy, in microseconds of one CPU
    #[arg(long, value_name = "US", default_value_t = 50)]
    pub(crate) work_us: u32,
    #[arg(long, hide = true, value_name = "N")]
    pub(crate) send_rings: Option<String>,
    #[arg(long, hide = true, value_name = "K")]
    pub(crate) sqpoll_threads: Option<String>,
    #[arg(long, hide = true, value_name = "MS")]
    pub(crate) sqpoll_idle_ms: Option<String>,
    #[arg(long, hide = true, value_name = "LIST")]
    pub(crate) sqpoll_cpus: Option<String>,
    #[command(flatten)]
    pub(crate) ring: RingArgs,
    /// How the connections avoid congestion, such as reno
    #[arg(long, hide = true, value_name = "NAME")]
    pub(crate) congestion: Option<String>,
    /// A receive buffer of that size instead of one the kernel adapts
    #[arg(long, hide = true, value_name = "BYTES")]
    pub(crate) rcvbuf: Option<Bytes>,
    /// A send buffer of that size instead of one the kernel adapts
    #[arg(long, hide = true, value_name = "BYTES")]
    pub(crate) sndbuf: Option<Bytes>,
    /// Die with the process that started this one, which is PID
    #[arg(long, hide = true, value_name = "PID")]
    pub(crate) die_with: Option<u32>,
}

/// Settings of the backends on io_uring, for experiments.
#[derive(Args)]
pub(crate) struct RingArgs {
    /// Receive buffers of each poller: small ones, large ones
    #[arg(long, hide = true, value_name = "SMALL,LARGE")]
    pub(crate) ring_buffers: Option<RingBuffers>,
    /// No better ring than this: defer, coop, plain
    #[arg(long, hide = true, value_name = "TIER")]
    pub(crate) ring_tier: Option<RingTier>,
    /// One completion may report several buffers
    #[arg(long, hide = true)]
    pub(crate) bundles: bool,
    /// Several receives may share a large buffer
    #[arg(long, hide = true)]
    pub(crate) incremental: bool,
    /// Send without a copy where that much goes out at once
    #[arg(long, hide = true, value_name = "BYTES")]
    pub(crate) zero_copy: Option<Bytes>,
    /// Let a poller that waits poll the network card for so long
    #[arg(long, hide = true, value_name = "US")]
    pub(crate) napi_us: Option<u32>,
}

impl RingArgs {
    /// The first one that is given.
    pub(crate) fn first(&self) -> Option<&'static str> {
        let given = [
            ("--ring-buffers", self.ring_buffers.is_some()),
            ("--ring-tier", self.ring_tier.is_some()),
            ("--bundles", self.bundles),
            ("--incremental", self.incremental),
            ("--zero-copy", self.zero_copy.is_some()),
            ("--napi-us", self.napi_us.is_some()),
        ];
        given.into_iter().find(|(_, given)| *given).map(|(flag, _)| flag)
    }

    pub(crate) fn options(&self) -> UringOptions {
        let mut options = UringOptions::new()
            .receive_bundles(self.bundles)
            .incremental_buffers(self.incremental)
            .zero_copy_send(self.zero_copy.map(|bytes| bytes.0 as usize))
            .napi_busy_poll(self.napi_us.map(|us| Duration::from_micros(us.into())));
        if let Some(buffers) = self.ring_buffers {
            options = options.receive_buffers(buffers.small, buffers.large);
        }
        if let Some(tier) = self.ring_tier {
            options = options.tier_max(tier);
        }
        options
    }
}

#[derive(Args)]
pub(crate) struct LoadArgs {
    /// The server
    #[arg(long, value_name = "HOST:PORT")]
    pub(crate) addr: String,
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
    /// Open loop: requests per second over all connections, timed from when each was due
    #[arg(long, value_name = "R", value_parser = rate)]
    pub(crate) rate: Option<f64>,
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
    #[arg(long, value_name = "BYTES", default_value_t = FRAME_MAX)]
    pub(crate) frame_max: Bytes,
    #[arg(long, value_name = "PID")]
    pub(crate) die_with: Option<u32>,
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

#[derive(Args)]
pub(crate) struct CompareArgs {
    /// Everything in under 90 seconds
    #[arg(long)]
    pub(crate) quick: bool,
    /// Backends of ringpoll
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "epoll,uring,hybrid")]
    pub(crate) backends: Vec<Backend>,
    /// Placements of ringpoll; without it inline, and pool too unless --quick or the backend is
    /// hybrid
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    pub(crate) placements: Option<Vec<Placement>>,
    /// Servers to compare with; `--peers ''` for none
    #[arg(
        long,
        value_name = "LIST",
        default_value = "tokio,tokio-framed,bare-epoll,bare-ring,bare-ring-64k"
    )]
    pub(crate) peers: PeerList,
    /// One more argument of `serve`; ringpoll on io_uring is measured with all of them too,
    /// beside without
    #[arg(long, value_name = "ARG", allow_hyphen_values = true)]
    pub(crate) serve_arg: Vec<String>,
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
    /// CPUs of the servers
    #[arg(long, value_name = "LIST")]
    pub(crate) server_cpus: Option<CpuList>,
    /// CPUs of the client
    #[arg(long, value_name = "LIST")]
    pub(crate) client_cpus: Option<CpuList>,
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

/// What the handler does with a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Scenario {
    /// Copy it into the reply
    Echo,
    /// Compute, then copy it into the reply
    Heavy,
    /// Pass it on by reference
    Proxy,
    #[value(hide = true)]
    Mux,
}

/// CPU numbers as people write them: `0,2-3`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct CpuList(pub(crate) Vec<usize>);

impl FromStr for CpuList {
    type Err = Failure;

    fn from_str(text: &str) -> Result<CpuList> {
        let malformed = || Failure::new(format!("{text:?} is not a list of CPUs such as 0,2-3"));
        let mut cpus = Vec::new();
        for part in text.split(',') {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let first: usize = first.parse().map_err(|_| malformed())?;
            let last: usize = last.parse().map_err(|_| malformed())?;
            if first > last || last >= CPUS_MAX {
                return Err(malformed());
            }
            cpus.extend(first..=last);
        }
        cpus.sort_unstable();
        cpus.dedup();
        Ok(CpuList(cpus))
    }
}

/// Two counts of buffers: `256,16`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RingBuffers {
    small: u16,
    large: u16,
}

impl FromStr for RingBuffers {
    type Err = Failure;

    fn from_str(text: &str) -> Result<RingBuffers> {
        let counts = text.split_once(',').and_then(|(small, large)| {
            Some(RingBuffers { small: small.parse().ok()?, large: large.parse().ok()? })
        });
        counts.ok_or_else(|| {
            Failure::new(format!("{text:?} is not two numbers of buffers such as 256,16"))
        })
    }
}

/// Peers by name, separated by commas; empty for none.
#[derive(Clone, Debug)]
pub(crate) struct PeerList(pub(crate) Vec<Peer>);

impl FromStr for PeerList {
    type Err = Failure;

    fn from_str(text: &str) -> Result<PeerList> {
        let names = text.split(',').filter(|name| !name.is_empty());
        names.map(str::parse).collect::<Result<_>>().map(PeerList)
    }
}

/// A number of bytes: `1024`, `1k`, `16M`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Bytes(pub(crate) u32);

impl FromStr for Bytes {
    type Err = Failure;

    fn from_str(text: &str) -> Result<Bytes> {
        let (digits, shift) = match text.as_bytes().last() {
            Some(b'k' | b'K') => (&text[..text.len() - 1], 10),
            Some(b'm' | b'M') => (&text[..text.len() - 1], 20),
            _ => (text, 0),
        };
        let count = digits.parse::<u32>().ok().and_then(|count| count.checked_mul(1 << shift));
        count.filter(|bytes| *bytes <= BYTES_MAX).map(Bytes).ok_or_else(|| {
            Failure::new(format!("{text:?} is not a size such as 1024, 1k or 16M, up to 1024M"))
        })
    }
}

impl std::fmt::Display for Bytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

/// The addresses a `HOST:PORT` stands for.
pub(crate) fn resolve(addr: &str) -> Result<Vec<SocketAddr>> {
    let wrong = |why: String| Failure::new(format!("bad address {addr:?}: {why}"));
    let (host, port) = addr.rsplit_once(':').ok_or_else(|| wrong("no port".into()))?;
    if host.is_empty() {
        return Err(wrong("no host".into()));
    }
    port.parse::<u16>().map_err(|_| wrong(format!("port {port:?} is not a number up to 65535")))?;
    let found: Vec<_> = addr.to_socket_addrs().map_err(|error| wrong(error.to_string()))?.collect();
    if found.is_empty() { Err(wrong("the host has no address".into())) } else { Ok(found) }
}

fn duration(text: &str) -> Result<Duration> {
    let unit_at = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(unit_at);
    let scale = match unit {
        "ms" => Some(1e-3),
        "" | "s" => Some(1.0),
        "m" => Some(60.0),
        _ => None,
    };
    let seconds = scale.zip(number.parse::<f64>().ok()).map(|(scale, number)| scale * number);
    seconds
        .filter(|seconds| (0.0..=SECONDS_MAX).contains(seconds))
        .map(Duration::from_secs_f64)
        .ok_or_else(|| Failure::new(format!("{text:?} is not a duration such as 10s, 500ms or 2m")))
}

fn some_duration(text: &str) -> Result<Duration> {
    duration(text)?
        .checked_sub(Duration::from_millis(1))
        .map(|rest| rest + Duration::from_millis(1))
        .ok_or_else(|| Failure::new(format!("{text:?} is too short: 1ms is the least")))
}

fn rate(text: &str) -> Result<f64> {
    let rate = text.parse::<f64>().ok().filter(|rate| (0.001..=1e9).contains(rate));
    rate.ok_or_else(|| Failure::new(format!("{text:?} is not a number of requests per second")))
}

const FRAME_MAX: Bytes = Bytes(wire::FRAME_BYTES_MAX);
/// What `sched_setaffinity` takes in this program.
const CPUS_MAX: usize = 1024;
/// A gigabyte per frame: enough for every question, small enough for a laptop.
const BYTES_MAX: u32 = 1 << 30;
/// A week.
const SECONDS_MAX: f64 = 7.0 * 24.0 * 3600.0;

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn cpu_lists_read_as_people_write_them() {
        assert_eq!("0".parse::<CpuList>().unwrap().0, [0]);
        assert_eq!("3,0-2,1".parse::<CpuList>().unwrap().0, [0, 1, 2, 3]);
        for wrong in ["", "a", "2-1", "1-", "0,", "1-99999999999"] {
            assert!(wrong.parse::<CpuList>().is_err(), "{wrong:?}");
        }
        assert_eq!("256,16".parse::<RingBuffers>().unwrap(), RingBuffers { small: 256, large: 16 });
        for wrong in ["", "256", "256,", "256,x", "1,2,3", "70000,1"] {
            assert!(wrong.parse::<RingBuffers>().is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn sizes_and_durations_read_as_people_write_them() {
        assert_eq!("16M".parse::<Bytes>().unwrap().0, 16 << 20);
        assert_eq!("0".parse::<Bytes>().unwrap().0, 0);
        for wrong in ["", "k", "-1", "1G", "2000M", "4294967296"] {
            assert!(wrong.parse::<Bytes>().is_err(), "{wrong:?}");
        }
        assert_eq!(duration("500ms").unwrap(), Duration::from_millis(500));
        assert_eq!(duration("1.5s").unwrap(), Duration::from_millis(1500));
        assert_eq!(duration("2m").unwrap(), Duration::from_secs(120));
        for wrong in ["", "s", "1h", "-1s", "1e9s", "NaN", "99999999999m"] {
            assert!(duration(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn a_bad_address_says_what_is_wrong() {
        assert!(resolve("nowhere").unwrap_err().to_string().contains("no port"));
        assert!(resolve("127.0.0.1:99999").unwrap_err().to_string().contains("99999"));
        assert!(resolve(":80").unwrap_err().to_string().contains("no host"));
        assert_eq!(resolve("127.0.0.1:80").unwrap(), [SocketAddr::from(([127, 0, 0, 1], 80))]);
    }
}
