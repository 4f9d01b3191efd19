//! Settings, and the bounds that users can reach, with their reasons.
//!
//! Settings are public enums and [`Limits`]. The constants bound queues, loops and retries. A
//! constant of a single algorithm stands beside that algorithm instead. A leaf: of this crate it
//! imports the error only.

use std::fmt;
use std::ops::RangeInclusive;
use std::str::FromStr;
use std::time::Duration;

use crate::error::{Error, Result};

pub(crate) mod calls;
mod listening;
mod memory;
mod pooling;
mod socket;
pub(crate) mod sqpoll;
pub(crate) mod uring;

pub(crate) use listening::*;
pub(crate) use memory::*;
pub(crate) use pooling::*;
pub use socket::SocketOptions;
pub use sqpoll::{SqpollOptions, SqpollPreset};
pub(crate) use uring::ZeroCopyRule;
pub use uring::{Capabilities, RingTier, UringOptions, ZeroCopySend};

/// The kernel interface of the pollers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Backend {
    /// [`Uring`](Self::Uring) where the probe passes, else [`Epoll`](Self::Epoll); see
    /// [`capabilities`](crate::capabilities).
    #[default]
    Auto,
    /// `epoll(7)`: works on every Linux.
    Epoll,
    /// `io_uring(7)`: multishot accept, multishot receive into buffers that the kernel selects, and
    /// sends that are submitted together with the next wait.
    Uring,
    /// Receives with io_uring, as [`Uring`](Self::Uring) does. A flush sends on its own thread, as
    /// with [`Epoll`](Self::Epoll).
    Hybrid,
    /// io_uring with kernel threads that poll the rings. A busy server makes no system calls, but
    /// the kernel threads need CPUs of their own. [`Auto`](Self::Auto) never selects this.
    Sqpoll(SqpollOptions),
}

/// Where handlers run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Placement {
    /// [`Inline`](Self::Inline) while handlers delay other connections less than a wake-up of a
    /// worker would, otherwise on a pool of workers. The pool has two workers for each CPU that
    /// this process may use, and four more. Each server decides every 20 ms, from the measured run
    /// times of its handlers; see [`PlacementStats`](crate::PlacementStats).
    #[default]
    Auto,
    /// On the poller that received the bytes. Best for handlers that finish within microseconds:
    /// caches, proxies, routers. A handler that blocks delays every connection of its poller; it
    /// should call blocking code through [`unblock`](crate::unblock).
    Inline,
    /// On work-stealing worker threads; pollers only receive and send. Best for handlers that
    /// compute or block.
    ///
    /// There is one exception. If this process may use only one CPU, short handlers run on the
    /// poller, as with [`Auto`](Self::Auto): a worker could not begin them sooner. With
    /// [`PollMode::Always`] all handlers run on workers.
    Pool {
        /// The number of threads. 0 means two for each CPU that the workers may use or, with
        /// [`PollMode::Always`], one for each of these CPUs that no poller needs, and at least one.
        workers: usize,
    },
    /// On a tokio runtime, each run as a task. The runtime is that of `ServerBuilder::tokio` or,
    /// without it, the runtime in whose context the server is built. Needs the feature `tokio`.
    Tokio,
}

/// How new connections are distributed over pollers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Balance {
    /// One poller after the other.
    #[default]
    RoundRobin,
    /// A random poller.
    Random,
    /// The poller that has the fewest connections.
    LeastConnections,
}

/// Whether a poller or a worker without work spins (checks for work in a loop) before it sleeps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum PollMode {
    /// Spin for a short, bounded time, as long as most spins find work, and there are more CPUs
    /// than pollers, workers and polling kernel threads.
    #[default]
    Adaptive,
    /// Never sleep. Each poller and each worker occupies a CPU, also while there is no traffic.
    /// Latency is lowest if there are as many CPUs; with fewer, threads wait for each other.
    Always,
    /// Sleep without spinning.
    Never,
}

/// The limits of one connection.
#[derive(Clone, Debug)]
pub(crate) struct Limits {
    /// The longest wait of a read; `None` is no limit.
    pub(crate) read_timeout: Option<Duration>,
    /// How long after its start a run of `on_request` may wait for input; `None` is no limit.
    pub(crate) request_timeout: Option<Duration>,
    /// The longest wait of a flush; `None` is no limit.
    pub(crate) write_timeout: Option<Duration>,
    /// The longest wait of a flush during which the peer takes no byte; `None` is no limit.
    pub(crate) write_stall_timeout: Option<Duration>,
    /// A connection is closed when no byte has moved for this time and no handler computes; `None`
    /// is never.
    pub(crate) idle_timeout: Option<Duration>,
    /// Reception resumes when at most this many bytes are buffered.
    pub(crate) input_low_bytes: usize,
    /// Reception pauses when this many bytes are buffered and no read waits for more.
    pub(crate) input_high_bytes: usize,
    /// The largest length of one read. It bounds the memory for a length field from the network.
    pub(crate) read_bytes_max: usize,
    /// `submit` fails while this many bytes are not in the kernel.
    pub(crate) output_bytes_max: usize,
    /// A read that has to wait first submits the written bytes.
    pub(crate) submit_before_read: bool,
}

impl Limits {
    /// How many bytes may be buffered before reception pauses. `share_bytes` is the share of a
    /// connection while its poller exceeds its memory budget.
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
            write_stall_timeout: None,
            idle_timeout: None,
            // Half of the high watermark is still unread when reception resumes, so the handler has
            // input until more arrives.
            input_low_bytes: 512 << 10,
            // Room for several receives into the largest block.
            input_high_bytes: 1 << 20,
            read_bytes_max: 256 << 20,
            output_bytes_max: 64 << 20,
            submit_before_read: false,
        }
    }
}

/// The timeout of a setting, for which zero means no timeout.
pub(crate) fn some(timeout: Duration) -> Option<Duration> {
    (!timeout.is_zero()).then_some(timeout)
}

impl Limits {
    /// Refuses limits that contradict each other.
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

/// The size of a small receive buffer. A typical RPC request fits. More of these buffers than of
/// larger ones fit into the CPU cache.
pub(crate) const SMALL_BUFFER_BYTES: usize = with_header_room(4 << 10);

/// The size of a medium receive buffer, for messages that are longer than a small buffer.
/// docs/EXPERIMENTS.md has figures.
pub(crate) const MEDIUM_BUFFER_BYTES: usize = with_header_room(32 << 10);

/// The size of a large receive buffer: as much as a fast sender sends between two visits of the
/// poller. Two messages of 64 KiB fit, each with a header. Larger buffers would push the received
/// bytes out of the CPU cache before they are read.
pub(crate) const LARGE_BUFFER_BYTES: usize = with_header_room(128 << 10);

/// Receives in a row that would fit a smaller buffer, after which a connection moves to it.
pub(crate) const FIT_SMALLER_TO_SHRINK: i8 = 64;

/// A receive that fills at least 1 / `LENT_PART_MIN` of its block, header room apart, stays in it.
/// A shorter one is copied into a block of its size. So a stored byte occupies about four bytes of
/// memory at most.
pub(crate) const LENT_PART_MIN: usize = 4;

/// The largest number of events that one call takes from the kernel. It bounds how long a
/// connection waits while others are handled.
pub(crate) const EVENTS_MAX: usize = 512;

/// How many of these events are processed before handlers run. With 1 KB echoes, 64 was 2 % faster
/// than 16 at 100 connections and 3 % slower at 1000; 3 was slower at both.
pub(crate) const EVENTS_PER_ROUND: usize = 32;

/// How often a round obeys commands, and runs what they have added, before the poller checks for
/// events again.
pub(crate) const COMMAND_PASSES_MAX: usize = 2;

/// Connections accepted for one event. It bounds how long a burst of new connections delays the
/// existing ones.
pub(crate) const ACCEPTS_PER_EVENT_MAX: usize = 64;

/// Slices in one gathered send. Their addresses take 1 KiB of stack. The kernel allows 1024
/// (`UIO_MAXIOV`).
pub(crate) const GATHER_SLICES_MAX: usize = 64;

/// Bytes that one connection may send before other connections of its poller are served.
pub(crate) const SEND_TURN_BYTES: usize = 1 << 20;

/// How long a closed connection keeps sending its submitted bytes while the peer accepts none.
pub(crate) const LINGER: Duration = Duration::from_secs(30);

/// How long a closed connection keeps sending its submitted bytes in all, even if the peer accepts
/// some again and again: enough for 64 MiB at a megabit per second.
pub(crate) const LINGER_MAX: Duration = Duration::from_secs(10 * 60);

/// How long a due timer is delayed while the kernel holds received bytes for its connection that no
/// pass has taken. Taking them may need another pass, or a free receive buffer.
pub(crate) const UNSEEN_INPUT_NS: u64 = 1_000_000;

/// The longest delay of a timer by such bytes. After it the timer fires, so bytes that are never
/// received cannot keep a connection open.
pub(crate) const UNSEEN_INPUT_MAX_NS: u64 = 1_000_000_000;

/// How soon the end of a stream is looked at again, while a send of the dead connection is under
/// way. The kernel fails such a send at once.
pub(crate) const SEND_RESULT_NS: u64 = 1_000_000;

/// How long a forced shutdown waits until the handlers of cut connections have returned.
pub(crate) const CUT_GRACE: Duration = Duration::from_secs(1);

/// After that, the remaining futures are cancelled. This is how long the shutdown waits for their
/// threads to drop them.
pub(crate) const CANCEL_GRACE: Duration = Duration::from_millis(100);

/// Timer entries of connections and futures that have ended stay until they are due. They are
/// removed when the number of entries exceeds twice the number after the last removal by this many.
pub(crate) const STALE_TIMERS_MAX: usize = 4096;

/// The longest single wait of a poller, which then checks its timers and waits again. Kernels
/// without `epoll_pwait2` take milliseconds as an `i32`, which overflows after 24 days.
pub(crate) const WAIT_MAX: Duration = Duration::from_secs(24 * 60 * 60);

/// How often a dial is tried again after a self-connect or `EADDRNOTAVAIL`.
pub(crate) const DIAL_RETRIES_MAX: usize = 3;

/// The pause before a dial is tried again, for example because the backlog of a Unix socket is
/// full.
pub(crate) const DIAL_RETRY_PAUSE: Duration = Duration::from_millis(2);

/// How long an attempt to connect may run before the next begins (RFC 8305, section 8).
pub(crate) const DIAL_ATTEMPT_DELAY: Duration = Duration::from_millis(250);
/// The limits of RFC 8305, section 8, for this delay.
pub(crate) const DIAL_ATTEMPT_DELAYS: RangeInclusive<Duration> =
    Duration::from_millis(10)..=Duration::from_secs(2);

/// The addresses of a name that one dial tries. All attempts of a dial may run at the same time,
/// so this bounds the sockets of a dial. One UDP answer of a name server, of 1232 bytes, has room
/// for 75 IPv4 or 43 IPv6 addresses.
pub(crate) const DIAL_ADDRESSES_MAX: usize = 64;

/// The longest an adaptive poller spins without finding work.
pub(crate) const SPIN_NS_MAX: u64 = 100_000;

/// The scheduler's time slice for pollers and workers. A thread that computes for longer is
/// preempted by threads that wake up. On two CPUs, with four workers and 8,000 requests per second
/// of which 1 % take a millisecond, the P99 of the other requests was 0.72 ms instead of 0.97 ms;
/// throughput did not change.
pub(crate) const TIME_SLICE: Duration = Duration::from_micros(100);

/// Commands that workers take over at once from a poller that a handler blocks.
pub(crate) const RELIEF_COMMANDS_MAX: usize = 1024;

/// How often an idle worker checks for work before it parks. On the load of `WORKERS_MORE`, a
/// request took 2 µs less than with 32 checks, most of which found nothing.
pub(crate) const WORKER_LOOKS_MAX: usize = 4;

/// The smallest batch of tasks that a worker takes from the shared queue, if there are as many. On
/// two CPUs, with eight workers and 100 connections whose requests all take 300 µs, the P99 was
/// 81 ms with unlimited batches, 42 ms with 4, and 37 ms with 1. With 1, short handlers on a pool
/// had a tenth less throughput.
pub(crate) const BATCH_MIN: usize = 4;
/// The largest batch. Other workers steal half of the remaining batch at a time, if its worker is
/// blocked.
pub(crate) const BATCH_MAX: usize = 32;

/// How long a woken worker may take to find work before the next push wakes another worker. On a
/// free CPU a wake-up takes much less. On two CPUs, with four workers and 8,000 requests per second
/// of which 1 % take a millisecond, the P99 of the other requests was 0.4 to 0.5 ms instead of
/// 0.7 ms.
pub(crate) const SEARCH_LATE: Duration = Duration::from_micros(50);

/// After this many runs a worker checks another queue first: alternately the shared queue and that
/// of another worker. So no queue can starve the others.
pub(crate) const RUNS_PER_LOOK: u32 = 32;

/// Threads for blocking calls, in the whole process. Most of them wait for a disk or a lock, so
/// there may be many more threads than CPUs.
pub(crate) const UNBLOCK_THREADS_MAX: usize = 256;
const _: () = assert!(UNBLOCK_THREADS_MAX <= THREADS_MAX);

/// Blocking calls that wait in the queue of these threads. Further callers wait for a place in the
/// queue. A few calls for each thread keep all threads busy.
pub(crate) const UNBLOCK_QUEUE_MAX: usize = 4 * UNBLOCK_THREADS_MAX;

/// Names that are looked up at the same time; further dials wait. A lookup blocks for about ten
/// seconds for each name server that does not answer (resolv.conf(5)). This bound keeps most
/// threads free for other calls.
pub(crate) const LOOKUPS_MAX: usize = UNBLOCK_THREADS_MAX / 4;

/// How long such a thread waits for its next call before it ends. Starting a thread takes much less
/// time.
pub(crate) const UNBLOCK_IDLE: Duration = Duration::from_secs(1);

/// Bytes of messages that may wait for the driver of a mux. While there are as many, `send` waits.
/// At least [`SEND_TURN_BYTES`], so that a full batch fills one send quantum.
pub(crate) const MUX_BYTES_MAX: usize = 1 << 20;
const _: () = assert!(MUX_BYTES_MAX >= SEND_TURN_BYTES);

/// Batches that the driver of a mux flushes before it yields to other tasks of its thread. A batch
/// is [`MUX_BYTES_MAX`] long at most, plus one message.
pub(crate) const MUX_BATCHES_PER_POLL: usize = 4;

/// CPUs for each poller when handlers run elsewhere: such a poller only receives and sends.
pub(crate) const CPUS_PER_POLLER: usize = 20;

/// The largest number of pollers, or of workers, in a setting. Larger numbers are mistakes.
pub(crate) const THREADS_MAX: usize = 1024;

/// Applies the environment to the settings of the program: `RINGPOLL_BACKEND` replaces the backend,
/// `RINGPOLL_URING_TIER` limits the tier.
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

/// The value of an environment variable; `None` if it is not set or empty.
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

/// The names of all backends.
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
