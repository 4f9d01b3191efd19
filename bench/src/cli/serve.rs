//! The arguments of `serve`.

use std::time::Duration;

use clap::{Args, ValueEnum};
use ringpoll::{Backend, Placement, PollMode, RingTier, UringOptions};

use super::values::{Bytes, CpuList, FRAME_MAX, RingBuffers};

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
