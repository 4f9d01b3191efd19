//! A poller's ring: its set-up and its queues.
//!
//! One thread, the poller's, enables and uses the ring. `SINGLE_ISSUER` allows no other thread, and
//! the kernel ends the operations of a thread that ends. No submission is lost: a submission that
//! finds the queue full waits in `backlog`.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::time::Duration;

use io_uring::squeue::Entry;
use io_uring::types::Fd;
use io_uring::{IoUring, cqueue, opcode};

use super::raw::{
    self, ENTER_GETEVENTS, ENTER_NO_IOWAIT, ENTER_SQ_WAIT, ENTER_SQ_WAKEUP, RECVSEND_POLL_FIRST,
    Until,
};
use super::sqpoll::polled::{Collector, SharedQueue};
use super::tag::Op;
use crate::config::{RingTier, UringOptions};
use crate::counters::Counters;

pub(super) struct Ring {
    driver: Driver,
    tier: RingTier,
    enter_flags: u32,
    without_array: bool,
    /// Submissions that found the queue full.
    backlog: VecDeque<Entry>,
}

/// How the kernel takes submissions.
// One `Driver` exists for each poller, so its size does not matter.
#[allow(clippy::large_enum_variant)]
enum Driver {
    /// When the owner enters the kernel.
    Owner(IoUring),
    /// `sqpoll`: a kernel thread polls the submission queue. Other threads may push to the queue.
    Thread(Collector, Arc<SharedQueue>),
}

/// A completion queue entry.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cqe {
    pub(super) user_data: u64,
    pub(super) result: i32,
    pub(super) flags: u32,
}

impl Cqe {
    /// The operation has no further completions.
    pub(super) fn is_last(&self) -> bool {
        !cqueue::more(self.flags)
    }

    /// The last completion of an [`Op::SendRecord`].
    pub(super) fn ends_record(&self) -> bool {
        Op::SendRecord.is_of(self.user_data) && self.is_last()
    }
}

impl From<cqueue::Entry> for Cqe {
    fn from(cqe: cqueue::Entry) -> Cqe {
        Cqe { user_data: cqe.user_data(), result: cqe.result(), flags: cqe.flags() }
    }
}

impl Ring {
    /// The best ring up to `options.tier_max`, set up but not enabled.
    ///
    /// A kernel answers EINVAL to an unknown flag. Then the next tier is tried. Any other error is
    /// final.
    pub(super) fn new(options: &UringOptions) -> io::Result<Ring> {
        let mut refused = io::Error::from_raw_os_error(libc::EINVAL);
        for (tier, without_array) in TIERS {
            if tier > options.tier_max {
                continue;
            }
            match build(options, tier, without_array) {
                Ok(io) => return Ok(Ring::over(Driver::Owner(io), tier, without_array)),
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => refused = error,
                Err(error) => return Err(error),
            }
        }
        Err(refused)
    }

    /// A ring that a kernel thread polls. Other threads may push to `queue`.
    pub(super) fn polled(collector: Collector, queue: &Arc<SharedQueue>) -> Ring {
        let without_array = collector.ring().is_without_array();
        let driver = Driver::Thread(collector, Arc::clone(queue));
        Ring::over(driver, RingTier::Plain, without_array)
    }

    fn over(driver: Driver, tier: RingTier, without_array: bool) -> Ring {
        let io = driver.io();
        let enter_flags = if io.params().is_feature_no_iowait() { ENTER_NO_IOWAIT } else { 0 };
        Ring { driver, tier, enter_flags, without_array, backlog: VecDeque::new() }
    }

    /// Makes the calling thread the ring's user. Call this once.
    pub(super) fn enable(&mut self) -> io::Result<()> {
        if let Driver::Owner(io) = &self.driver {
            io.submitter().register_enable_rings()?;
        }
        // The ring works without the limit, which older kernels refuse.
        let _ = self.io().submitter().register_iowq_max_workers(&mut [1, 1]);
        Ok(())
    }

    /// The completion queue of a ring that a kernel thread polls.
    pub(super) fn collector(&self) -> Option<&Collector> {
        match &self.driver {
            Driver::Owner(_) => None,
            Driver::Thread(collector, _) => Some(collector),
        }
    }

    /// How many [`Op::SendRecord`]s are in flight in this ring, if a kernel thread polls it.
    pub(super) fn sends_in_flight(&self) -> u64 {
        self.collector().map_or(0, Collector::sends_in_flight)
    }

    pub(super) fn tier(&self) -> RingTier {
        self.tier
    }

    pub(super) fn is_without_array(&self) -> bool {
        self.without_array
    }

    pub(super) fn io(&self) -> &IoUring {
        self.driver.io()
    }

    /// Queues an operation. The next `enter` submits it.
    ///
    /// # Safety
    /// The memory that `sqe` names stays valid and unmoved until the operation's last completion is
    /// taken, or forever.
    pub(super) unsafe fn push(&mut self, sqe: Entry) {
        // SAFETY: the caller keeps the contract of `Driver::push`, which is the same.
        if !self.backlog.is_empty() || unsafe { !self.driver.push(&sqe) } {
            self.backlog.push_back(sqe);
        }
    }

    /// Receives from `fd` into buffers of a group until cancelled. The first receive waits until
    /// the socket is readable: a receive at once would fail where the group has no buffer.
    pub(super) fn receive(&mut self, fd: Fd, receive: Receive, user_data: u64) {
        let sqe = if receive.bundle {
            opcode::RecvMultiBundle::new(fd, receive.group).build()
        } else {
            opcode::RecvMulti::new(fd, receive.group).build()
        };
        // SAFETY: the operation names no memory; the kernel takes buffers from the buffer ring.
        unsafe { self.push(with_extras(sqe, receive.budget_bytes).user_data(user_data)) }
    }

    /// Accepts on `fd` until cancelled.
    pub(super) fn accept(&mut self, fd: Fd, user_data: u64) {
        let sqe =
            opcode::AcceptMulti::new(fd).flags(libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC).build();
        // SAFETY: the operation names no memory.
        unsafe { self.push(sqe.user_data(user_data)) }
    }

    /// Polls `fd` for `events`: once, or where `multi`, until cancelled.
    pub(super) fn poll(&mut self, fd: Fd, events: i16, multi: bool, user_data: u64) {
        let events = u32::from(events.cast_unsigned());
        let sqe = opcode::PollAdd::new(fd, events).multi(multi).build();
        // SAFETY: the operation names no memory.
        unsafe { self.push(sqe.user_data(user_data)) }
    }

    /// Cancels the operation with the user data `target`. The cancellation's own completion has
    /// `user_data`.
    pub(super) fn cancel(&mut self, target: u64, user_data: u64) {
        let sqe = opcode::AsyncCancel::new(target).build();
        // SAFETY: the operation names no memory.
        unsafe { self.push(sqe.user_data(user_data)) }
    }

    /// Cancels every operation. The cancellation's own completion has `user_data`.
    pub(super) fn cancel_all(&mut self, user_data: u64) {
        // SAFETY: the operation names no memory.
        unsafe { self.push(raw::cancel_all(user_data)) }
    }

    /// Makes waits on the ring first poll the network cards of its sockets, at most `time` long.
    pub(super) fn poll_cards(&mut self, time: Duration) -> io::Result<()> {
        let micros = u32::try_from(time.as_micros()).unwrap_or(u32::MAX);
        raw::poll_cards(self.io().as_raw_fd(), micros)
    }

    /// Submissions are queued that the kernel takes only with the next `enter`.
    pub(super) fn has_submissions(&mut self) -> bool {
        match &mut self.driver {
            Driver::Owner(io) => !io.submission().is_empty(),
            Driver::Thread(..) => !self.backlog.is_empty(),
        }
    }

    /// The kernel holds completions that it posts only during an `enter`.
    pub(super) fn wants_enter(&mut self) -> bool {
        match &mut self.driver {
            Driver::Owner(io) => {
                let queue = io.submission();
                queue.taskrun() || queue.cq_overflow()
            }
            Driver::Thread(collector, _) => collector.ring().has_overflowed(),
        }
    }

    pub(super) fn has_overflowed(&mut self) -> bool {
        match &mut self.driver {
            Driver::Owner(io) => io.submission().cq_overflow(),
            Driver::Thread(collector, _) => collector.ring().has_overflowed(),
        }
    }

    /// Whether the kernel has ever dropped a completion. It has filled a buffer then that no
    /// completion names.
    pub(super) fn has_lost_completions(&mut self) -> bool {
        match &mut self.driver {
            Driver::Owner(io) => io.completion().overflow() > 0,
            Driver::Thread(collector, _) => collector.lost_completions() > 0,
        }
    }

    /// How many completions the queue holds.
    pub(super) fn completion_count(&mut self) -> usize {
        match &mut self.driver {
            Driver::Owner(io) => io.completion().len(),
            Driver::Thread(collector, _) => collector.completion_count(),
        }
    }

    /// Submits the queued operations, and waits for a completion as `until` says. Does not wait
    /// where there is a completion, or where the backlog did not fit the queue.
    ///
    /// A signal, a timeout and a short lack of kernel memory are no errors: the wait ends.
    pub(super) fn enter(&mut self, until: Until, counters: &Counters) -> io::Result<()> {
        loop {
            let queued = match &mut self.driver {
                Driver::Owner(io) => io.submission().len() as u32,
                Driver::Thread(..) => 0,
            };
            let full = !self.backlog.is_empty();
            let until = if full { Until::Now } else { until };
            if full {
                counters.submit_calls.add_owned(1);
            } else {
                counters.wait_calls.add_owned(1);
            }
            let taken = match self.enter_once(queued, until) {
                Ok(taken) => taken,
                Err(error) if raw::is_passing(&error) => return Ok(()),
                Err(error) => return Err(error),
            };
            counters.ring_submissions.add_owned(u64::from(taken));
            if !full || !self.refill() {
                return Ok(());
            }
        }
    }

    /// Moves at most `limit` completions to `into`.
    pub(super) fn collect(&mut self, into: &mut Vec<Cqe>, limit: usize) {
        match &mut self.driver {
            Driver::Owner(io) => into.extend(io.completion().take(limit).map(Cqe::from)),
            Driver::Thread(collector, _) => collector.collect(into, limit),
        }
    }

    /// Moves the backlog to the queue until the queue is full. `false`: the queue had no room.
    fn refill(&mut self) -> bool {
        let before = self.backlog.len();
        while let Some(sqe) = self.backlog.front() {
            // SAFETY: `sqe` came through `push`, whose caller keeps the same contract.
            if !unsafe { self.driver.push(sqe) } {
                break;
            }
            self.backlog.pop_front();
        }
        self.backlog.len() < before
    }

    fn enter_once(&self, queued: u32, until: Until) -> io::Result<u32> {
        let mut flags = ENTER_GETEVENTS | self.enter_flags;
        if let Driver::Thread(collector, _) = &self.driver {
            if collector.ring().is_asleep() {
                flags |= ENTER_SQ_WAKEUP;
            }
            if !self.backlog.is_empty() {
                flags |= ENTER_SQ_WAIT;
            }
        }
        raw::enter(self.io().as_raw_fd(), queued, until, flags)
    }
}

impl Driver {
    fn io(&self) -> &IoUring {
        match self {
            Driver::Owner(io) => io,
            Driver::Thread(collector, _) => collector.io(),
        }
    }

    /// `false`: the queue is full.
    ///
    /// # Safety
    /// As for [`Ring::push`].
    unsafe fn push(&mut self, sqe: &Entry) -> bool {
        match self {
            // SAFETY: the caller keeps the named memory valid.
            Driver::Owner(io) => unsafe { io.submission().push(sqe) }.is_ok(),
            // SAFETY: the caller keeps the named memory valid.
            Driver::Thread(collector, queue) => unsafe { queue.push_to(collector, sqe) }.is_ok(),
        }
    }
}

/// Options of a multishot receive.
#[derive(Clone, Copy, Debug)]
pub(super) struct Receive {
    pub(super) group: u16,
    pub(super) bundle: bool,
    /// The receive ends after about this many bytes (Linux 6.17). 0: never.
    pub(super) budget_bytes: u32,
}

/// Tiers, and whether to ask for `NO_SQARRAY`; the best comes first.
const TIERS: [(RingTier, bool); 4] = [
    (RingTier::Defer, true),
    (RingTier::Defer, false),
    (RingTier::Coop, false),
    (RingTier::Plain, false),
];

/// The descriptor of a socket or an eventfd, as an operation names it.
pub(super) fn fd_of(owner: &impl AsFd) -> Fd {
    Fd(owner.as_fd().as_raw_fd())
}

fn build(options: &UringOptions, tier: RingTier, without_array: bool) -> io::Result<IoUring> {
    let mut builder = IoUring::builder();
    // A forked child must not share the queues.
    builder.dontfork();
    builder.setup_r_disabled();
    builder.setup_cqsize(options.completion_entries);
    match tier {
        RingTier::Defer => {
            builder.setup_single_issuer();
            builder.setup_defer_taskrun();
            builder.setup_taskrun_flag();
            builder.setup_submit_all();
        }
        RingTier::Coop => {
            builder.setup_coop_taskrun();
            builder.setup_taskrun_flag();
            builder.setup_submit_all();
        }
        RingTier::Plain => {}
    }
    if without_array {
        builder.setup_no_sqarray();
    }
    builder.build(options.submission_entries)
}

/// Sets two fields that `opcode::RecvMulti` has no methods for: poll-first and the budget.
fn with_extras(sqe: Entry, budget_bytes: u32) -> Entry {
    // SAFETY: `Entry` is a transparent wrapper of `io_uring_sqe`, 64 bytes of integers.
    let mut bytes: [u8; 64] = unsafe { std::mem::transmute(sqe) };
    // uapi/linux/io_uring.h: `ioprio` is the u16 at byte 2, `optlen` the u32 at byte 44.
    let ioprio = u16::from_ne_bytes([bytes[2], bytes[3]]) | RECVSEND_POLL_FIRST;
    bytes[2..4].copy_from_slice(&ioprio.to_ne_bytes());
    bytes[44..48].copy_from_slice(&budget_bytes.to_ne_bytes());
    // SAFETY: as above, and every value of these integers is valid.
    unsafe { std::mem::transmute(bytes) }
}
