//! Every setting and limit, with its reason.
//!
//! Settings are public enums and [`Limits`]; the constants are the bounds of our own queues, loops
//! and retries. A leaf: imports nothing of ours but the error.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use crate::error::{Error, Result};

mod listening;
mod memory;
mod placing;
pub(crate) mod sqpoll;
pub(crate) mod uring;

pub(crate) use listening::*;
pub(crate) use memory::*;
pub(crate) use placing::*;
pub use sqpoll::{SqpollOptions, SqpollPreset};
pub use uring::{Capabilities, RingTier, UringOptions};

/// Who talks to the kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Backend {
    /// [`Uring`](Self::Uring) where the probe passes, else [`Epoll`](Self::Epoll); see
    /// [`capabilities`](crate::capabilities).
    #[default]
    Auto,
    /// Readiness by `epoll(7)`: works on every Linux.
    Epoll,
    /// Completions by `io_uring(7)`: multishot accept and receive into kernel-chosen buffers, sends
    /// submitted together with the next wait.
    Uring,
    /// Receives as [`Uring`](Self::Uring) does; a flush sends on its own thread, as with
    /// [`Epoll`](Self::Epoll).
    Hybrid,
    /// Kernel threads poll the rings, so that a busy server makes no system calls: for hosts with
    /// CPUs to spare. Never chosen by [`Auto`](Self::Auto).
    Sqpoll(SqpollOptions),
}

/// Where handlers run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Placement {
    /// [`Inline`](Self::Inline) while that is cheaper for everybody else, otherwise on a pool of
    /// workers, two for each CPU this process may use and four more. Decided for each server from
    /// how long its handlers run, and again every 20 ms; see
    /// [`PlacementStats`](crate::PlacementStats).
    #[default]
    Auto,
    /// On the poller that received the bytes, between two waits. Best for handlers that finish
    /// within microseconds: caches, proxies, routers. A handler that blocks holds up every
    /// connection of its poller; [`unblock`](crate::unblock) is for what has to.
    Inline,
    /// On work-stealing worker threads; pollers only move bytes. Best for handlers that compute or
    /// block.
    Pool {
        /// How many threads; 0 means one per CPU this process may use.
        workers: usize,
    },
    /// On a tokio runtime, each run a task of it: that of `ServerBuilder::tokio`, or the one that
    /// the server is built in. Needs the feature `tokio`.
    Tokio,
}

/// How new connections spread over pollers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Balance {
    /// Each poller in turn.
    #[default]
    RoundRobin,
    /// Any poller.
    Random,
    /// The poller that has the fewest connections.
    LeastConnections,
}

/// Whether a poller that ran out of work looks again before it sleeps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum PollMode {
    /// Spin for a short, bounded time while that keeps finding work and CPUs are free; otherwise
    /// sleep.
    #[default]
    Adaptive,
    /// Never sleep: one full CPU per poller, the lowest latency.
    Always,
    /// Sleep at once.
    Never,
}

/// The bounds of one connection.
#[derive(Clone, Debug)]
pub(crate) struct Limits {
    /// How long a read may wait; `None` is for ever.
    pub(crate) read_timeout: Option<Duration>,
    /// How long after its start a request's run may wait for input; `None` is for ever.
    pub(crate) request_timeout: Option<Duration>,
    /// How long a flush may wait; `None` is for ever.
    pub(crate) write_timeout: Option<Duration>,
    /// After how long without a byte either way an unoccupied connection is closed.
    pub(crate) idle_timeout: Option<Duration>,
    /// Reception resumes when no more than this is buffered.
    pub(crate) input_low_bytes: usize,
    /// Reception pauses when this much is buffered and no read waits for more.
    pub(crate) input_high_bytes: usize,
    /// The most a single read may ask for: a length field from the network ends here, not in our
    /// memory.
    pub(crate) read_bytes_max: usize,
    /// `submit` refuses while this much waits for the peer.
    pub(crate) output_bytes_max: usize,
}

impl Limits {
    /// How much may be buffered before reception pauses; `share_bytes` is what a connection may
    /// hold while memory is short.
    #[inline]
    pub(crate) fn input_bytes_max(&self, share_bytes: Option<usize>) -> usize {
        self.input_high_bytes.min(share_bytes.unwrap_or(usize::MAX))
    }
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            read_timeout: None,
            request_timeout: None,
            write_timeout: None,
            idle_timeout: None,
            // Half a high mark of work is left when reception resumes, so the handler never runs
            // dry meanwhile.
            input_low_bytes: 512 << 10,
            // Enough for sixteen receives of the largest block.
            input_high_bytes: 1 << 20,
            read_bytes_max: 256 << 20,
            output_bytes_max: 64 << 20,
        }
    }
}

/// What the kernel is asked to do with a connection, where it is not left as it is.
#[derive(Clone, Debug, Default)]
pub(crate) struct SocketOptions {
    /// `None` is the host's.
    pub(crate) congestion_control: Option<String>,
    /// 0 is a size that the kernel adapts.
    pub(crate) receive_buffer_bytes: usize,
    /// 0 is a size that the kernel adapts.
    pub(crate) send_buffer_bytes: usize,
}

/// A timeout as settings take it: zero is none.
pub(crate) fn some(timeout: Duration) -> Option<Duration> {
    (!timeout.is_zero()).then_some(timeout)
}

impl Limits {
    /// Refuses bounds that contradict each other.
    pub(crate) fn check(&self) -> Result<()> {
        if self.input_high_bytes == 0 || self.input_low_bytes >= self.input_high_bytes {
            return Err(Error::invalid(format!(
                "input watermarks: low {} must be below high {}",
                self.input_low_bytes, self.input_high_bytes
            )));
        }
        if self.read_bytes_max == 0 || self.output_bytes_max == 0 {
            return Err(Error::invalid("read_bytes_max and output_bytes_max must not be 0"));
        }
        Ok(())
    }
}

/// What one receive fills. A request of an RPC fits; more such blocks fit the cache than larger
/// ones.
pub(crate) const SMALL_BUFFER_BYTES: usize = 4 << 10;

/// The size of a large receive buffer, for a connection whose receives fill the small one: as much
/// as a fast sender sends between two visits of the poller. With 64 requests of 1 KB in flight,
/// which are just more than 64 KiB, a buffer of 64 KiB served 0.85 of the requests (epoll, 4
/// connections, medians of 5 interleaved rounds on a busy machine).
pub(crate) const LARGE_BUFFER_BYTES: usize = 128 << 10;

/// A receive that fills at least this part of its block is lent; less is copied out of it, into a
/// block of its size. So a byte that is kept pins no more than four, as long as it came with
/// others.
pub(crate) const LENT_PART_MIN: usize = 4;

/// Events taken from the kernel at once: bounds how long a connection waits for its turn.
pub(crate) const EVENTS_MAX: usize = 512;

/// Of these, handled before handlers run. Measured with 1 KB echoes: 64 gains 2 % at 100
/// connections and loses 3 % at 1000 against 16; 3 loses at both.
pub(crate) const EVENTS_PER_ROUND: usize = 32;

/// Connections accepted per event, so that a burst of newcomers does not starve the ones that are
/// here.
pub(crate) const ACCEPTS_PER_EVENT_MAX: usize = 64;

/// Slices in one gathered send: 1 KiB of stack for their addresses. `UIO_MAXIOV` allows 1024.
pub(crate) const GATHER_SLICES_MAX: usize = 64;

/// Bytes one connection may send before the others get their turn.
pub(crate) const SEND_TURN_BYTES: usize = 1 << 20;

/// How long the peer of a closed connection may take none of what was submitted before the close.
pub(crate) const LINGER: Duration = Duration::from_secs(30);

/// How long a closed connection may take in all for what was submitted before the close, however
/// the peer trickles: 64 MiB at a megabit a second.
pub(crate) const LINGER_MAX: Duration = Duration::from_secs(10 * 60);

/// How long a due timer is put off while the kernel holds bytes for its connection that no pass has
/// received. Receiving them may take another pass, or a free receive buffer.
pub(crate) const UNSEEN_INPUT_NS: u64 = 1_000_000;

/// How long such bytes put a timer off at most. Bytes that do not come by then, for whatever
/// reason, are not to keep a connection for ever.
pub(crate) const UNSEEN_INPUT_MAX_NS: u64 = 1_000_000_000;

/// How long a forced shutdown waits for the handlers of cut connections to notice.
pub(crate) const CUT_GRACE: Duration = Duration::from_secs(1);

/// Timers of connections and futures that are gone stay until they would be due; when there are
/// this many more than twice what the last sweep has left, they are swept out.
pub(crate) const STALE_TIMERS_MAX: usize = 4096;

/// The longest wait of a poller, which then looks at its timers and waits again. Kernels without
/// `epoll_pwait2` count milliseconds in an `i32`, which 25 days do not fit into.
pub(crate) const WAIT_MAX: Duration = Duration::from_secs(24 * 60 * 60);

/// Tries when a port cannot be had: self-connect, or `EADDRNOTAVAIL`.
pub(crate) const DIAL_RETRIES_MAX: usize = 3;

/// Pause before a unix socket whose backlog is full is tried again.
pub(crate) const DIAL_RETRY_PAUSE: Duration = Duration::from_millis(2);

/// The longest an adaptive poller spins without finding work.
pub(crate) const SPIN_NS_MAX: u64 = 100_000;

/// How long the scheduler is to let a poller or a worker run at a time, where others want the CPU
/// too. A handler that computes for longer then gives way to those that just woke: on two CPUs,
/// with four workers and 8,000 requests a second of which 1 % take a millisecond, the P99 of the
/// others was 0.72 ms instead of 0.97; throughput did not change.
pub(crate) const TURN: Duration = Duration::from_micros(100);

/// Workers with [`Placement::Auto`](crate::Placement), for so many CPUs: the second one of a CPU
/// runs where handlers compute on all the first ones, and the scheduler shares the CPUs out. Few
/// CPUs need more, since it is no rare chance there that as many long runs are under way at once as
/// there are workers.
pub(crate) fn auto_workers(cpus: usize) -> usize {
    (2 * cpus + AUTO_WORKERS_MORE).min(THREADS_MAX)
}

/// Workers of `Auto` beside two for each CPU. On two CPUs, with 33,000 requests a second of which
/// 1 % take a millisecond, the P99 of the others was 2.3 ms with four workers, 2.0 with six, 1.7
/// with eight, 1.8 with twelve.
const AUTO_WORKERS_MORE: usize = 4;

/// The share of its CPUs that a process uses when they are short, in millionths, and below which
/// they are not any more. Handlers that move take up to a third less or more of them, which shall
/// not be why they move again.
pub(crate) const CROWDED_PPM: u64 = 900_000;
/// See [`CROWDED_PPM`].
pub(crate) const CROWDED_UNTIL_PPM: u64 = 700_000;

/// How often an idle worker looks for work again before it parks. On the same load a request cost
/// 2 µs less than with 32 looks, which seldom found anything.
pub(crate) const WORKER_SPINS_MAX: usize = 4;

/// How many tasks a worker takes from the shared queue at once, however few there are. On two CPUs,
/// with eight workers and 100 connections whose requests all take 300 µs, the P99 was 81 ms where
/// it takes all it can, 42 with 4, 37 with 1; but with 1, cheap handlers on a pool served a tenth
/// less.
pub(crate) const BATCH_MIN: usize = 4;
/// And however many: what waits behind one that blocks is taken over by halves.
pub(crate) const BATCH_MAX: usize = 32;

/// How long a worker that was woken may take to find work before another is woken beside it. Far
/// more than a wake-up takes on a CPU that is free. On two CPUs, with four workers and 8,000
/// requests a second of which 1 % take a millisecond, the P99 of the others was 0.4 to 0.5 ms
/// instead of 0.7.
pub(crate) const SEARCH_LATE: Duration = Duration::from_micros(50);

/// Runs of a worker between two looks elsewhere, which are for the shared queue and for a
/// neighbour's in turn: what its own queue holds, or the shared one, must not keep out the rest.
pub(crate) const RUNS_PER_LOOK: u32 = 32;

/// Threads for synchronous code, in the whole process. Most of them wait, for a disk or a lock, so
/// there may be many more than CPUs.
pub(crate) const UNBLOCK_THREADS_MAX: usize = 256;
const _: () = assert!(UNBLOCK_THREADS_MAX <= THREADS_MAX);

/// Calls of synchronous code that wait for one of those threads; further callers wait to get so
/// far. A few for each thread keep all of them busy.
pub(crate) const UNBLOCK_QUEUE_MAX: usize = 4 * UNBLOCK_THREADS_MAX;

/// Names that are looked up at a time; further dials wait. A look-up hangs for some ten seconds for
/// each name server that does not answer (resolv.conf(5)), so most threads are for other calls.
pub(crate) const LOOKUPS_MAX: usize = UNBLOCK_THREADS_MAX / 4;

/// How long such a thread waits for its next call before it ends: long beside what it costs to
/// start another.
pub(crate) const UNBLOCK_IDLE: Duration = Duration::from_secs(1);

/// Messages that wait for the driver of a mux, in bytes; while there are as many, further ones have
/// to wait. As much as one connection may send in a turn: what a batch takes at least while its
/// producers keep ahead of it.
pub(crate) const MUX_BYTES_MAX: usize = 1 << 20;
const _: () = assert!(MUX_BYTES_MAX >= SEND_TURN_BYTES);

/// Batches that the driver of a mux flushes before it lets other tasks of its thread run: none of
/// them is more than a turn's worth, but for one large message.
pub(crate) const MUX_BATCHES_PER_POLL: usize = 4;

/// CPUs one poller serves when handlers run on a pool: pollers then only move bytes.
pub(crate) const CPUS_PER_POLLER: usize = 20;

/// Threads nobody means to start in one process.
pub(crate) const THREADS_MAX: usize = 1024;

/// What the environment makes of a program's choice: `RINGPOLL_BACKEND` replaces the backend, for
/// whoever runs a program and cannot change it; `RINGPOLL_URING_TIER` caps the tier.
pub(crate) fn by_environment(
    backend: Backend,
    options: &UringOptions,
) -> Result<(Backend, UringOptions)> {
    let mut options = options.clone();
    let backend = match variable("RINGPOLL_BACKEND")? {
        Some(name) => {
            name.parse().map_err(|error| Error::invalid(format!("RINGPOLL_BACKEND: {error}")))?
        }
        None => backend,
    };
    if let Some(name) = variable("RINGPOLL_URING_TIER")? {
        let tier: RingTier = name
            .parse()
            .map_err(|error| Error::invalid(format!("RINGPOLL_URING_TIER: {error}")))?;
        options.tier_max = options.tier_max.min(tier);
    }
    Ok((backend, options))
}

/// An environment variable, unless it is empty.
fn variable(name: &str) -> Result<Option<String>> {
    match std::env::var(name) {
        Ok(value) => Ok(Some(value).filter(|value| !value.is_empty())),
        Err(std::env::VarError::NotPresent) => Ok(None),
        Err(std::env::VarError::NotUnicode(_)) => {
            Err(Error::invalid(format!("{name}: not a name")))
        }
    }
}

macro_rules! named {
    ($type:ident, $what:literal, $($name:literal => $value:ident),+) => {
        impl FromStr for $type {
            type Err = Error;

            fn from_str(name: &str) -> Result<$type> {
                match name {
                    $($name => Ok($type::$value),)+
                    _ => Err(unknown($what, name, &[$($name),+])),
                }
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(match self { $($type::$value => $name,)+ })
            }
        }
    };
}

impl FromStr for Backend {
    type Err = Error;

    fn from_str(name: &str) -> Result<Backend> {
        match name {
            "auto" => Ok(Backend::Auto),
            "epoll" => Ok(Backend::Epoll),
            "uring" => Ok(Backend::Uring),
            "hybrid" => Ok(Backend::Hybrid),
            "sqpoll" => Ok(Backend::Sqpoll(SqpollOptions::new())),
            _ => {
                let preset = SqpollPreset::ALL.into_iter().find(|one| one.to_string() == name);
                let preset = preset.ok_or_else(|| unknown("backend", name, &BACKENDS))?;
                Ok(Backend::Sqpoll(SqpollOptions::new().preset(preset)))
            }
        }
    }
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Backend::Auto => f.pad("auto"),
            Backend::Epoll => f.pad("epoll"),
            Backend::Uring => f.pad("uring"),
            Backend::Hybrid => f.pad("hybrid"),
            Backend::Sqpoll(options) => options.fmt(f),
        }
    }
}

/// What a backend may be called.
const BACKENDS: [&str; 10] = [
    "auto",
    "epoll",
    "uring",
    "hybrid",
    "sqpoll",
    "uring-2",
    "uring-4",
    "sqpoll-config1",
    "sqpoll-config2",
    "sqpoll-shared",
];

named!(PollMode, "poll mode", "adaptive" => Adaptive, "always" => Always, "never" => Never);
named!(
    Balance, "balance",
    "round-robin" => RoundRobin, "random" => Random, "least" => LeastConnections
);

impl FromStr for Placement {
    type Err = Error;

    fn from_str(name: &str) -> Result<Placement> {
        match name {
            "auto" => Ok(Placement::Auto),
            "inline" => Ok(Placement::Inline),
            "pool" => Ok(Placement::Pool { workers: 0 }),
            "tokio" => Ok(Placement::Tokio),
            _ => name
                .strip_prefix("pool:")
                .and_then(|count| count.parse().ok())
                .filter(|workers| (1..=THREADS_MAX).contains(workers))
                .map(|workers| Placement::Pool { workers })
                .ok_or_else(|| {
                    unknown("placement", name, &["auto", "inline", "pool", "pool:4", "tokio"])
                }),
        }
    }
}

impl fmt::Display for Placement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Placement::Auto => f.pad("auto"),
            Placement::Inline => f.pad("inline"),
            Placement::Tokio => f.pad("tokio"),
            Placement::Pool { workers: 0 } => f.pad("pool"),
            Placement::Pool { workers } => write!(f, "pool:{workers}"),
        }
    }
}

fn unknown(what: &str, name: &str, known: &[&str]) -> Error {
    Error::invalid(format!("unknown {what} {name:?}: choose one of {}", known.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_read_back_as_what_they_print() {
        for placement in ["auto", "inline", "pool", "pool:4", "tokio"] {
            assert_eq!(placement.parse::<Placement>().unwrap().to_string(), placement);
        }
        for backend in BACKENDS {
            assert_eq!(backend.parse::<Backend>().unwrap().to_string(), backend);
        }
    }

    #[test]
    fn an_unknown_name_is_refused_with_the_known_ones() {
        let error = "kqueue".parse::<Backend>().unwrap_err();
        assert!(error.is_invalid());
        assert_eq!(
            error.to_string(),
            "unknown backend \"kqueue\": choose one of auto, epoll, uring, hybrid, sqpoll, \
             uring-2, uring-4, sqpoll-config1, sqpoll-config2, sqpoll-shared"
        );
        assert!("pool:0".parse::<Placement>().is_err());
        assert!("pool:x".parse::<Placement>().is_err());
    }

    #[test]
    fn watermarks_that_cross_are_refused() {
        let limits = Limits { input_low_bytes: 10, input_high_bytes: 10, ..Limits::default() };
        assert!(limits.check().unwrap_err().is_invalid());
    }
}
