//! The arguments of `serve`.

use std::net::SocketAddr;
use std::time::Duration;

use clap::{Args, ValueEnum};
use ringpoll::{Backend, Placement, PollMode, RingTier, SqpollOptions, UringOptions, ZeroCopySend};

use super::values::{Bytes, CpuList, FRAME_MAX, RingBuffers, resolve};
use crate::error::{Failure, Result};
use crate::rpc::Protocol;
use crate::work::Work;

#[derive(Args)]
pub(crate) struct ServeArgs {
    /// Who talks to the kernel: auto, epoll, uring, hybrid; with kernel threads that poll: sqpoll,
    /// which chooses among uring-2, uring-4, sqpoll-config1, sqpoll-config2, sqpoll-shared
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
    /// How clients talk
    #[arg(long, default_value = "frames")]
    pub(crate) protocol: Protocol,
    /// What a request asks for
    #[arg(long, default_value = "echo")]
    pub(crate) scenario: Scenario,
    /// Scenario calls: answer no request until so many are there, then all of them, in reverse
    /// order
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub(crate) hold: Option<u32>,
    /// CPUs for the pollers, such as 0,2-3
    #[arg(long, value_name = "LIST")]
    pub(crate) poller_cpus: Option<CpuList>,
    /// CPUs for the workers of placement pool
    #[arg(long, value_name = "LIST")]
    pub(crate) worker_cpus: Option<CpuList>,
    /// Longest payload; a longer one closes its connection
    #[arg(long, value_name = "BYTES", default_value_t = FRAME_MAX)]
    pub(crate) frame_max: Bytes,
    #[command(flatten)]
    pub(crate) work: WorkArgs,
    #[command(flatten)]
    upstream: UpstreamArgs,
    #[command(flatten)]
    pub(crate) sqpoll: SqpollArgs,
    #[command(flatten)]
    pub(crate) ring: RingArgs,
    /// Where to tell of itself, for a client on another host: who connects gets one line of JSON
    #[arg(long, value_name = "HOST:PORT")]
    pub(crate) stats: Option<String>,
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

impl ServeArgs {
    /// Where the scenario proxy forwards to; `None` where there is none.
    ///
    /// # Errors
    /// An upstream of another scenario, or one that cannot be found.
    pub(crate) fn upstream(&self) -> Result<Option<SocketAddr>> {
        self.upstream.addr(self.scenario)
    }
}

/// Where bytes go in the scenario proxy.
#[derive(Args)]
pub(crate) struct UpstreamArgs {
    /// Scenario proxy: forward bytes to this server and back; without it, requests go back by
    /// reference
    #[arg(long, value_name = "HOST:PORT")]
    upstream: Option<String>,
}

impl UpstreamArgs {
    pub(crate) fn addr(&self, scenario: Scenario) -> Result<Option<SocketAddr>> {
        let Some(addr) = &self.upstream else { return Ok(None) };
        if scenario != Scenario::Proxy {
            return Err(Failure::new("--upstream: only the scenario proxy has one"));
        }
        let found = resolve(addr).map_err(Failure::at("--upstream"))?;
        Ok(found.first().copied())
    }
}

/// What a request of the scenario heavy costs that the client has marked.
#[derive(Args)]
pub(crate) struct WorkArgs {
    /// Work per marked request of the scenario heavy, in microseconds of one CPU
    #[arg(long, value_name = "US", default_value_t = 50)]
    work_us: u32,
    /// The same, counted: servers that are compared do the same work, not each what it measured
    #[arg(long, hide = true, value_name = "N")]
    work_steps: Option<u64>,
}

impl WorkArgs {
    pub(crate) fn work(&self) -> Work {
        match self.work_steps {
            Some(steps) => Work { steps },
            None => Work::calibrate(Duration::from_micros(self.work_us.into())),
        }
    }
}

/// Settings of the backends whose kernel threads poll.
#[derive(Args)]
pub(crate) struct SqpollArgs {
    /// Send rings of each poller, with backend sqpoll; without it the preset decides
    #[arg(long, value_name = "N")]
    pub(crate) send_rings: Option<u16>,
    /// Kernel threads of each poller that send, with backend sqpoll
    #[arg(long, value_name = "K")]
    pub(crate) sqpoll_threads: Option<u16>,
    /// How long such a thread polls in vain before it sleeps
    #[arg(long, value_name = "MS")]
    pub(crate) sqpoll_idle_ms: Option<u32>,
    /// CPUs for those threads, one each, in turn
    #[arg(long, value_name = "LIST")]
    pub(crate) sqpoll_cpus: Option<CpuList>,
    /// Entries of each send ring
    #[arg(long, hide = true, value_name = "N")]
    pub(crate) send_entries: Option<u32>,
    /// Makes the choice of send rings repeatable
    #[arg(long, hide = true, value_name = "N")]
    pub(crate) sqpoll_seed: Option<u64>,
    /// Niceness of the kernel threads, -20 to 19
    #[arg(long, hide = true, value_name = "N", allow_hyphen_values = true)]
    pub(crate) sqpoll_nice: Option<i8>,
}

impl SqpollArgs {
    /// The first one that is given.
    pub(crate) fn first(&self) -> Option<&'static str> {
        first_given(&[
            ("--send-rings", self.send_rings.is_some()),
            ("--sqpoll-threads", self.sqpoll_threads.is_some()),
            ("--sqpoll-idle-ms", self.sqpoll_idle_ms.is_some()),
            ("--sqpoll-cpus", self.sqpoll_cpus.is_some()),
            ("--send-entries", self.send_entries.is_some()),
            ("--sqpoll-seed", self.sqpoll_seed.is_some()),
            ("--sqpoll-nice", self.sqpoll_nice.is_some()),
        ])
    }

    /// A preset with what these arguments change.
    pub(crate) fn options(&self, mut options: SqpollOptions) -> SqpollOptions {
        if let Some(count) = self.send_rings {
            options = options.send_rings(count);
        }
        if let Some(count) = self.sqpoll_threads {
            options = options.send_threads(count);
        }
        if let Some(ms) = self.sqpoll_idle_ms {
            options = options.idle(Duration::from_millis(ms.into()));
        }
        if let Some(count) = self.send_entries {
            options = options.send_entries(count);
        }
        if let Some(nice) = self.sqpoll_nice {
            options = options.nice(nice);
        }
        if let Some(seed) = self.sqpoll_seed {
            options = options.seed(seed);
        }
        options
    }
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
    /// Send without a copy: auto, off, or always where that much goes out at once
    #[arg(long, hide = true, value_name = "auto|off|BYTES", value_parser = zero_copy)]
    pub(crate) zero_copy: Option<ZeroCopySend>,
    /// Let a poller that waits poll the network card for so long
    #[arg(long, hide = true, value_name = "US")]
    pub(crate) napi_us: Option<u32>,
}

impl RingArgs {
    /// The first one that is given.
    pub(crate) fn first(&self) -> Option<&'static str> {
        first_given(&[
            ("--ring-buffers", self.ring_buffers.is_some()),
            ("--ring-tier", self.ring_tier.is_some()),
            ("--bundles", self.bundles),
            ("--incremental", self.incremental),
            ("--zero-copy", self.zero_copy.is_some()),
            ("--napi-us", self.napi_us.is_some()),
        ])
    }

    pub(crate) fn options(&self) -> UringOptions {
        let mut options = UringOptions::new()
            .receive_bundles(self.bundles)
            .incremental_buffers(self.incremental)
            .zero_copy_send(self.zero_copy.unwrap_or_default())
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

/// What the handler does with a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Scenario {
    /// Copy it into the reply
    Echo,
    /// Compute where the client has marked it, then copy it into the reply
    Heavy,
    /// Pass it on by reference, or to another server and back
    Proxy,
    /// Copy it into the reply in a task of its own; replies come in any order (load --unordered)
    Mux,
    /// Copy it into the answer of a call (command calls)
    Calls,
}

fn zero_copy(text: &str) -> Result<ZeroCopySend> {
    match text {
        "off" => Ok(ZeroCopySend::Off),
        "auto" => Ok(ZeroCopySend::Auto),
        _ => text.parse().map(|Bytes(bytes)| ZeroCopySend::Always { bytes_min: bytes as usize }),
    }
}

fn first_given(flags: &[(&'static str, bool)]) -> Option<&'static str> {
    flags.iter().find(|(_, given)| *given).map(|(flag, _)| *flag)
}
