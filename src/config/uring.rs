//! Settings of the io_uring backends, and the bounds of their rings.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use super::{Backend, unknown};
use crate::error::{Error, Result};

/// How modern a ring is, worst first. Which one a host offers is probed, never guessed from the
/// kernel's version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum RingTier {
    /// No flags: completions interrupt the poller whenever they come.
    Plain,
    /// `COOP_TASKRUN` (Linux 5.19): completions wait for the poller's next system call.
    Coop,
    /// `DEFER_TASKRUN` (Linux 6.1): completions wait for the poller to ask for them.
    Defer,
}

/// Settings of the io_uring backends ([`Uring`](super::Backend::Uring),
/// [`Hybrid`](super::Backend::Hybrid)). The defaults are the best of those measured
/// (docs/IO_URING.md); the others are for other hosts and for tests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UringOptions {
    pub(crate) tier_max: RingTier,
    pub(crate) submission_entries: u32,
    pub(crate) completion_entries: u32,
    pub(crate) small_buffers: u16,
    pub(crate) large_buffers: u16,
    pub(crate) receive_bundles: bool,
    pub(crate) incremental_buffers: bool,
    pub(crate) zero_copy_bytes_min: Option<usize>,
    pub(crate) napi_busy_poll: Option<Duration>,
    /// Not for users to choose: the probe knows.
    pub(crate) has_budget: bool,
}

impl Default for UringOptions {
    fn default() -> UringOptions {
        UringOptions {
            tier_max: RingTier::Defer,
            submission_entries: SUBMISSION_ENTRIES,
            completion_entries: COMPLETION_ENTRIES,
            small_buffers: SMALL_BUFFERS,
            large_buffers: LARGE_BUFFERS,
            receive_bundles: false,
            incremental_buffers: false,
            zero_copy_bytes_min: None,
            napi_busy_poll: None,
            has_budget: false,
        }
    }
}

impl UringOptions {
    /// The defaults.
    #[must_use]
    pub fn new() -> UringOptions {
        UringOptions::default()
    }

    /// Use no better tier than this one. The environment variable `RINGPOLL_URING_TIER` (`defer`,
    /// `coop` or `plain`) says so for a whole process.
    #[must_use]
    pub fn tier_max(mut self, tier: RingTier) -> Self {
        self.tier_max = tier;
        self
    }

    /// Entries of the submission queue, and of the completion queue, which must not be smaller.
    /// Both are rounded up to powers of two. A full queue costs system calls and loses nothing.
    #[must_use]
    pub fn queue_entries(mut self, submissions: u32, completions: u32) -> Self {
        self.submission_entries = submissions;
        self.completion_entries = completions;
        self
    }

    /// Receive buffers of each poller, rounded up to powers of two: `small` ones of 4 KiB, for
    /// requests, and `large` ones of 128 KiB, for connections whose receives keep filling the small
    /// ones. A connection that finds none waits for its turn.
    #[must_use]
    pub fn receive_buffers(mut self, small: u16, large: u16) -> Self {
        self.small_buffers = small;
        self.large_buffers = large;
        self
    }

    /// Let one completion report several filled buffers (Linux 6.10). Ignored where the probe finds
    /// no support, and with [`incremental_buffers`](Self::incremental_buffers).
    #[must_use]
    pub fn receive_bundles(mut self, on: bool) -> Self {
        self.receive_bundles = on;
        self
    }

    /// Let several receives fill one large buffer, one after the other (Linux 6.12). Ignored where
    /// the probe finds no support.
    #[must_use]
    pub fn incremental_buffers(mut self, on: bool) -> Self {
        self.incremental_buffers = on;
        self
    }

    /// Send from the memory itself, without the kernel's copy, where at least `bytes` go out at
    /// once; `None` is never. Pays on a network card, from about 3 KB on; over loopback the kernel
    /// copies all the same. Ignored where the probe finds no support, on Unix sockets, and on a
    /// connection for which the kernel has refused it.
    #[must_use]
    pub fn zero_copy_send(mut self, bytes_min: Option<usize>) -> Self {
        self.zero_copy_bytes_min = bytes_min;
        self
    }

    /// Have a poller that waits poll the network card for so long (Linux 6.9); `None` is never.
    /// Ignored where the probe finds no support.
    #[must_use]
    pub fn napi_busy_poll(mut self, time: Option<Duration>) -> Self {
        self.napi_busy_poll = time;
        self
    }

    /// The options less what the host does not offer.
    pub(crate) fn supported(&self, found: &Capabilities) -> UringOptions {
        let mut options = self.clone();
        options.receive_bundles &= found.receive_bundles;
        options.incremental_buffers &= found.incremental_buffers;
        options.zero_copy_bytes_min = options.zero_copy_bytes_min.filter(|_| found.zero_copy_send);
        options.napi_busy_poll = options.napi_busy_poll.filter(|_| found.napi_busy_poll);
        options.has_budget = found.receive_budget;
        // A bundle of incremental buffers would not say where each part of it lies.
        options.receive_bundles &= !options.incremental_buffers;
        options
    }

    /// Refuses what no kernel accepts.
    pub(crate) fn check(&self) -> Result<()> {
        let (submissions, completions) = (self.submission_entries, self.completion_entries);
        if !(1..=SUBMISSION_ENTRIES_MAX).contains(&submissions)
            || !(submissions..=2 * SUBMISSION_ENTRIES_MAX).contains(&completions)
        {
            return Err(Error::invalid(format!(
                "ring queues: {submissions} submissions and {completions} completions: choose 1 \
                 to {SUBMISSION_ENTRIES_MAX}, and no fewer completions"
            )));
        }
        for buffers in [self.small_buffers, self.large_buffers] {
            if !(1..=BUFFERS_MAX).contains(&buffers) {
                return Err(Error::invalid(format!(
                    "receive buffers: {buffers} is not one of 1 to {BUFFERS_MAX}"
                )));
            }
        }
        Ok(())
    }
}

/// What this host offers, as the probe found it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Capabilities {
    /// The best ring that works; `None` is none at all.
    pub tier: Option<RingTier>,
    /// Why it is not a better one, or that it is the best.
    pub reason: String,
    /// [`Backend::Sqpoll`] works.
    pub sqpoll: bool,
    /// Why it does not, or that it does.
    pub sqpoll_reason: String,
    /// The submission queue does without an index array (`NO_SQARRAY`, Linux 6.6).
    pub no_sq_array: bool,
    /// A wait does not count as waiting for a disk (`ENTER_NO_IOWAIT`, Linux 6.15).
    pub no_iowait: bool,
    /// A multishot receive ends by itself after some bytes (Linux 6.17), so that a fast sender
    /// overshoots the input's high watermark by little.
    pub receive_budget: bool,
    /// [`UringOptions::receive_bundles`] works.
    pub receive_bundles: bool,
    /// [`UringOptions::incremental_buffers`] works.
    pub incremental_buffers: bool,
    /// [`UringOptions::zero_copy_send`] works.
    pub zero_copy_send: bool,
    /// [`UringOptions::napi_busy_poll`] works.
    pub napi_busy_poll: bool,
}

impl Capabilities {
    /// The backend that [`Backend::Auto`] is here.
    pub fn backend(&self) -> Backend {
        if self.tier.is_some() { Backend::Uring } else { Backend::Epoll }
    }

    /// No ring works, for this reason.
    pub(crate) fn without_rings(reason: String) -> Capabilities {
        Capabilities {
            tier: None,
            sqpoll: false,
            sqpoll_reason: reason.clone(),
            reason,
            no_sq_array: false,
            no_iowait: false,
            receive_budget: false,
            receive_bundles: false,
            incremental_buffers: false,
            zero_copy_send: false,
            napi_busy_poll: false,
        }
    }
}

/// Submissions between two visits to the kernel; more cost another visit.
pub(crate) const SUBMISSION_ENTRIES: u32 = 256;

/// Completions that wait for the poller: a receive and a send for each of 2048 connections. Beyond
/// them the kernel keeps a list, and ends the receives that are armed.
pub(crate) const COMPLETION_ENTRIES: u32 = 4096;

/// The kernel's own bound (`IORING_MAX_ENTRIES`).
pub(crate) const SUBMISSION_ENTRIES_MAX: u32 = 32 << 10;

/// The kernel's own bound on a buffer ring; a buffer's number travels as a u16.
pub(crate) const BUFFERS_MAX: u16 = 32 << 10;

/// 1 MiB of small buffers: half of a usual second-level cache.
pub(crate) const SMALL_BUFFERS: u16 = 256;

/// What a fast sender puts on the wire between two visits: 64 requests of 1 KB are just more than
/// 64 KiB, and would take two receives.
pub(crate) const LARGE_BUFFER_BYTES: usize = 128 << 10;

/// 2 MiB of large buffers, allocated when the first connection needs them. Fewer starve 16
/// connections: 8 and 4 served 0.94 and 0.86 of what these do; 32 and 64, which the cache does not
/// hold, 0.93 and 0.85.
pub(crate) const LARGE_BUFFERS: u16 = 16;

/// Rounds over which the demand for large buffers is observed.
pub(crate) const DEMAND_ROUNDS: u32 = 64;

/// Large buffers that are kept ready at least.
pub(crate) const READY_BLOCKS_MIN: usize = 2;

/// What [`LENT_PART_MIN`](super::LENT_PART_MIN) is for small buffers, for large ones: a copy keeps
/// the cache for the next receive. With 16 connections and 16 requests of 1 KB in flight each,
/// lending from an eighth on served 0.73 of what lending from a half on does.
pub(crate) const LARGE_LENT_PART_MIN: usize = 2;

/// A flush of more than this goes out at once, on the thread that flushes, and not with the next
/// wait. Measured at 4 connections with 64 requests of 1 KB in flight: 3.4 million requests for a
/// second of CPU, and 1.8 to 2.8 million where the ring sends them.
pub(crate) const RING_SEND_BYTES_MAX: usize = 16 << 10;

/// Completions handled before handlers run, so that one round ends. Fewer lose: 64, 32 and 16
/// served 0.92, 0.88 and 0.84 of it with 100 connections, and 0.7 to 0.5 with 1000; 1024 made no
/// difference.
pub(crate) const COMPLETIONS_PER_ROUND: usize = 256;

/// Records of sends kept for the next ones: a busy round's worth.
pub(crate) const SPARE_SENDINGS_MAX: usize = 256;

/// How long a ring that is taken down waits for the kernel to be through with it; after that its
/// memory is given up for lost.
pub(crate) const TEARDOWN: Duration = Duration::from_secs(2);

/// Receives in a row that fill a small buffer move a connection to the large ones.
pub(crate) const FILLED_TO_GROW: u8 = 2;

/// Receives in a row that would have fitted a small buffer move it back.
pub(crate) const SMALL_TO_SHRINK: u8 = 64;

impl FromStr for RingTier {
    type Err = Error;

    fn from_str(name: &str) -> Result<RingTier> {
        match name {
            "defer" => Ok(RingTier::Defer),
            "coop" => Ok(RingTier::Coop),
            "plain" => Ok(RingTier::Plain),
            _ => Err(unknown("ring tier", name, &["defer", "coop", "plain"])),
        }
    }
}

impl fmt::Display for RingTier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            RingTier::Defer => "defer",
            RingTier::Coop => "coop",
            RingTier::Plain => "plain",
        })
    }
}
