//! Settings of the io_uring backends, and bounds of their rings.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use super::{Backend, unknown};
use crate::error::{Error, Result};

/// The features of a ring, from fewest to most. The library finds the tier of a host by a probe,
/// not by the kernel's version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum RingTier {
    /// No flags: the kernel interrupts the poller to post a completion.
    Plain,
    /// `COOP_TASKRUN` (Linux 5.19): the kernel posts completions in the poller's next system call.
    Coop,
    /// `DEFER_TASKRUN` (Linux 6.1): the kernel posts completions when the poller asks for them.
    Defer,
}

/// Settings of the io_uring backends ([`Uring`](super::Backend::Uring),
/// [`Hybrid`](super::Backend::Hybrid)). The defaults are the best measured values
/// (docs/IO_URING.md). Other values are for other hosts and for tests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UringOptions {
    pub(crate) tier_max: RingTier,
    pub(crate) submission_entries: u32,
    pub(crate) completion_entries: u32,
    pub(crate) small_buffers: u16,
    pub(crate) large_buffers: u16,
    pub(crate) receive_bundles: bool,
    pub(crate) incremental_buffers: bool,
    pub(crate) zero_copy_send: ZeroCopySend,
    pub(crate) napi_busy_poll: Option<Duration>,
    /// Set from the probe; users cannot choose it.
    pub(crate) has_budget: bool,
    /// Set from the probe; users cannot choose it.
    pub(crate) has_zero_copy_reports: bool,
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
            zero_copy_send: ZeroCopySend::Off,
            napi_busy_poll: None,
            has_budget: false,
            has_zero_copy_reports: false,
        }
    }
}

impl UringOptions {
    /// The defaults.
    #[must_use]
    pub fn new() -> UringOptions {
        UringOptions::default()
    }

    /// Use no higher tier than this. The environment variable `RINGPOLL_URING_TIER` (`defer`,
    /// `coop` or `plain`) sets a limit for the whole process.
    #[must_use]
    pub fn tier_max(mut self, tier: RingTier) -> Self {
        self.tier_max = tier;
        self
    }

    /// Entries of the submission queue and of the completion queue, both rounded up to powers of
    /// two. The completion queue must not be smaller. A full queue costs system calls and loses
    /// nothing.
    #[must_use]
    pub fn queue_entries(mut self, submissions: u32, completions: u32) -> Self {
        self.submission_entries = submissions;
        self.completion_entries = completions;
        self
    }

    /// Receive buffers of each poller, rounded up to powers of two: `small` buffers of 4 KiB;
    /// `large` buffers of 128 KiB, and four times as many of 32 KiB, for connections whose
    /// receives fill smaller ones. A poller starts with fewer, and gets all of them when a receive
    /// finds none. Connections that find no buffer wait in order.
    #[must_use]
    pub fn receive_buffers(mut self, small: u16, large: u16) -> Self {
        self.small_buffers = small;
        self.large_buffers = large;
        self
    }

    /// Let one completion report several filled buffers (Linux 6.10). Ignored where the probe finds
    /// no support, and with [`incremental_buffers`](Self::incremental_buffers). Off by default.
    #[must_use]
    pub fn receive_bundles(mut self, on: bool) -> Self {
        self.receive_bundles = on;
        self
    }

    /// Let several receives fill one large buffer, one after the other (Linux 6.12). Ignored where
    /// the probe finds no support. Off by default.
    #[must_use]
    pub fn incremental_buffers(mut self, on: bool) -> Self {
        self.incremental_buffers = on;
        self
    }

    /// Which sends the kernel makes without its copy of the bytes. `Some(bytes_min)` stands for
    /// [`ZeroCopySend::Always`], and `None` for [`ZeroCopySend::Off`], the default. Ignored where
    /// the probe finds no support, with [`Backend::Sqpoll`], on Unix sockets, and on a connection
    /// for which the kernel has refused it.
    #[must_use]
    pub fn zero_copy_send(mut self, which: impl Into<ZeroCopySend>) -> Self {
        self.zero_copy_send = which.into();
        self
    }

    /// Let a waiting poller first poll the network card, at most this long (Linux 6.9); `None`:
    /// never, the default. Ignored where the probe finds no support.
    #[must_use]
    pub fn napi_busy_poll(mut self, time: Option<Duration>) -> Self {
        self.napi_busy_poll = time;
        self
    }

    /// The options without those that the host does not support.
    pub(crate) fn supported(&self, found: &Capabilities) -> UringOptions {
        let mut options = self.clone();
        options.receive_bundles &= found.receive_bundles;
        options.incremental_buffers &= found.incremental_buffers;
        options.has_zero_copy_reports = found.zero_copy_reports;
        let has_zero_copy = match options.zero_copy_send {
            ZeroCopySend::Off => true,
            ZeroCopySend::Auto => found.zero_copy_reports,
            ZeroCopySend::Always { .. } => found.zero_copy_send,
        };
        if !has_zero_copy {
            options.zero_copy_send = ZeroCopySend::Off;
        }
        options.napi_busy_poll = options.napi_busy_poll.filter(|_| found.napi_busy_poll);
        options.has_budget = found.receive_budget;
        // A bundle of incremental buffers would not tell where each of its parts is.
        options.receive_bundles &= !options.incremental_buffers;
        options
    }

    /// The rule for zero-copy sends, for options that the host supports.
    pub(crate) fn zero_copy_rule(&self) -> ZeroCopyRule {
        ZeroCopyRule {
            bytes_min: match self.zero_copy_send {
                ZeroCopySend::Off => return ZeroCopyRule::NEVER,
                ZeroCopySend::Auto => ZERO_COPY_BYTES_MIN,
                ZeroCopySend::Always { bytes_min } => bytes_min,
            },
            has_reports: self.has_zero_copy_reports,
            stops_where_copied: self.zero_copy_send == ZeroCopySend::Auto,
        }
    }

    /// Refuses options that no kernel accepts.
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

/// Which sends on TCP the kernel makes without its copy of the bytes (`IORING_OP_SEND_ZC`).
///
/// The memory of such a send stays in use until the peer has acknowledged the bytes. A flush does
/// not wait for that. The bytes go through the ring of the poller, so a flush on another thread,
/// while the poller sleeps, copies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ZeroCopySend {
    /// No send.
    #[default]
    Off,
    /// Sends of at least 32 KiB, where the kernel does not copy the bytes all the same. The kernel
    /// copies over loopback, and between network namespaces of a host. It reports that it has
    /// copied, and then the sends of that connection are ordinary for 10 seconds. Needs Linux 6.2.
    Auto,
    /// Every send of at least `bytes_min` bytes, also where the kernel reports that it has copied.
    /// Needs Linux 6.1.
    Always {
        /// The fewest bytes that are sent at once, in bytes.
        bytes_min: usize,
    },
}

impl From<Option<usize>> for ZeroCopySend {
    fn from(bytes_min: Option<usize>) -> ZeroCopySend {
        bytes_min.map_or(ZeroCopySend::Off, |bytes_min| ZeroCopySend::Always { bytes_min })
    }
}

/// [`ZeroCopySend`], as the backend applies it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ZeroCopyRule {
    /// The fewest bytes of a zero-copy send. `usize::MAX`: no send.
    pub(crate) bytes_min: usize,
    /// The kernel can report whether it has copied.
    pub(crate) has_reports: bool,
    /// A connection whose bytes were copied gets ordinary sends.
    pub(crate) stops_where_copied: bool,
}

impl ZeroCopyRule {
    /// Every send is ordinary. Backends whose kernel threads poll use this rule: such a thread ends
    /// only after the notifications of its sends, and keeps the descriptors of the process open. A
    /// peer that does not read would thus keep a process from ending, also after SIGKILL. Seen on
    /// Linux 6.18.
    pub(crate) const NEVER: ZeroCopyRule =
        ZeroCopyRule { bytes_min: usize::MAX, has_reports: false, stops_where_copied: false };
}

/// What io_uring of this host supports, as the probe found it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Capabilities {
    /// The highest tier that works. `None`: no ring works.
    pub tier: Option<RingTier>,
    /// Why a higher tier does not work, or that every check passed.
    pub reason: String,
    /// [`Backend::Sqpoll`] works.
    pub sqpoll: bool,
    /// Why it does not work, or that every check passed.
    pub sqpoll_reason: String,
    /// The submission queue needs no index array (`NO_SQARRAY`, Linux 6.6).
    pub no_sq_array: bool,
    /// A wait does not count as waiting for a disk (`ENTER_NO_IOWAIT`, Linux 6.15).
    pub no_iowait: bool,
    /// A multishot receive ends after a number of bytes (Linux 6.17). A fast sender then exceeds
    /// the input's high watermark only a little.
    pub receive_budget: bool,
    /// [`UringOptions::receive_bundles`] works.
    pub receive_bundles: bool,
    /// [`UringOptions::incremental_buffers`] works.
    pub incremental_buffers: bool,
    /// [`ZeroCopySend::Always`] works.
    pub zero_copy_send: bool,
    /// The kernel reports whether it has copied a zero-copy send, so [`ZeroCopySend::Auto`] works.
    pub zero_copy_reports: bool,
    /// [`UringOptions::napi_busy_poll`] works.
    pub napi_busy_poll: bool,
}

impl Capabilities {
    /// The backend that [`Backend::Auto`] chooses on this host.
    pub fn backend(&self) -> Backend {
        if self.tier.is_some() { Backend::Uring } else { Backend::Epoll }
    }

    /// The capabilities of a host where no ring works, for this reason.
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
            zero_copy_reports: false,
            napi_busy_poll: false,
        }
    }
}

/// Submissions between two system calls. More submissions cost another system call.
pub(crate) const SUBMISSION_ENTRIES: u32 = 256;

/// Completions that wait for the poller: a receive and a send for each of 2048 connections. Above
/// that number the kernel keeps further completions in a list, and ends multishot receives.
pub(crate) const COMPLETION_ENTRIES: u32 = 4096;

/// The kernel's bound (`IORING_MAX_ENTRIES`).
pub(crate) const SUBMISSION_ENTRIES_MAX: u32 = 32 << 10;

/// The kernel's bound on a buffer ring. A buffer's number is a u16.
pub(crate) const BUFFERS_MAX: u16 = 32 << 10;

/// 1 MiB of small buffers: half of a common second-level cache.
pub(crate) const SMALL_BUFFERS: u16 = 256;

/// 2 MiB of large buffers, allocated when the first connection needs one. With 16 connections, 8
/// and 4 buffers served 0.94 and 0.86 of the requests, because connections starved; 32 and 64
/// buffers, which do not fit the cache, served 0.93 and 0.85.
pub(crate) const LARGE_BUFFERS: u16 = 16;

/// Small buffers of a poller until a receive finds none: enough for a few dozen busy connections.
pub(crate) const FIRST_SMALL_BUFFERS: u16 = 64;

/// Large buffers of a poller until a receive finds none: enough for one or two streams. The medium
/// buffers have as much memory, at first and at most.
pub(crate) const FIRST_LARGE_BUFFERS: u16 = 4;

/// Rounds over which the demand for medium and large buffers is observed.
pub(crate) const DEMAND_ROUNDS: u32 = 64;

/// The fewest medium and large buffers that are kept ready.
pub(crate) const READY_BLOCKS_MIN: usize = 2;

/// A flush of more bytes sends with a system call on the flushing thread, not with the poller's
/// next wait. With 4 connections and 64 requests of 1 KB in flight on each, that served 3.4 million
/// requests for each second of CPU; sends through the ring served 1.8 to 2.8 million.
pub(crate) const RING_SEND_BYTES_MAX: usize = 16 << 10;

/// The fewest bytes of a zero-copy send of [`ZeroCopySend::Auto`]. Published measurements with
/// network cards find a gain from about 3 KB on. This value is ten times larger, and was not
/// measured with a network card.
pub(crate) const ZERO_COPY_BYTES_MIN: usize = 32 << 10;

/// How long the sends of a connection are ordinary after the kernel has copied a zero-copy send.
/// A zero-copy send that is copied costs more than an ordinary send: 21 µs with 64 KiB, 160 µs with
/// 1 MiB. That is less than 0.002 % of this time.
pub(crate) const ZERO_COPY_RETRY: Duration = Duration::from_secs(10);

/// Bytes of a poller's sends whose memory the kernel may still use after their flush. Above that
/// number sends are ordinary, so peers that do not read cannot occupy more memory.
pub(crate) const ZERO_COPY_HELD_BYTES_MAX: u64 = 64 << 20;

/// Completions handled before handlers run, so that a round ends. 64, 32 and 16 served 0.92, 0.88
/// and 0.84 of the requests with 100 connections, and 0.7 to 0.5 with 1000. 1024 made no
/// difference.
pub(crate) const COMPLETIONS_PER_ROUND: usize = 256;

/// How long closing a ring waits for operations that have not ended. After that time their memory
/// is leaked.
pub(crate) const TEARDOWN: Duration = Duration::from_secs(2);

/// The same for a ring that has lost completions: some of its operations may never end. Its poller
/// waits for the end before it uses a new ring, so the time is short. A zero-copy send that the
/// peer has not acknowledged by then is leaked.
pub(crate) const TEARDOWN_AFTER_LOSS: Duration = Duration::from_millis(50);

/// How long a poller does without receive buffers of a size that could not be made.
pub(crate) const BUFFERS_RETRY: Duration = Duration::from_secs(1);

/// Receives in a row that suit a larger buffer, after which a connection moves to it. Moving takes
/// a cancellation and another receive operation.
pub(crate) const FILLED_TO_GROW: i8 = 2;

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
