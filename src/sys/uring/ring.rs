//! A poller's ring: its set-up and its queues.
//!
//! Owned and used by one thread. Where no kernel thread polls the ring, that is also the thread
//! that enabled it: `SINGLE_ISSUER` allows no other, and a request armed by a thread that ends
//! would end with it. Nothing submitted is ever lost here: what finds the submission queue full
//! waits in `backlog`.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use io_uring::squeue::Entry;
use io_uring::types::Fd;
use io_uring::{IoUring, cqueue, opcode};

use super::polled::{Collector, Lane};
use super::raw::{
    self, ENTER_GETEVENTS, ENTER_NO_IOWAIT, ENTER_REGISTERED_RING, ENTER_SQ_WAIT, ENTER_SQ_WAKEUP,
    RECVSEND_POLL_FIRST, Until,
};
use super::tag::Op;
use crate::config::{RingTier, UringOptions};
use crate::counters::Counters;

pub(super) struct Ring {
    driver: Driver,
    tier: RingTier,
    /// What `enter` names: an index that the kernel knows this thread's ring by, or the
    /// descriptor.
    enter_fd: RawFd,
    enter_flags: u32,
    without_array: bool,
    /// Submissions that found the queue full.
    backlog: VecDeque<Entry>,
}

/// Who takes what is queued. There is one for each poller, used with every completion.
#[allow(clippy::large_enum_variant)]
enum Driver {
    /// The kernel, when the owner enters it.
    Owner(IoUring),
    /// A kernel thread, all the time. Others may push as well, through the lane.
    Thread(Collector, Arc<Lane>),
}

/// One completion.
#[derive(Clone, Copy, Debug)]
pub(super) struct Done {
    pub(super) user_data: u64,
    pub(super) result: i32,
    pub(super) flags: u32,
}

impl Done {
    /// It is the last completion of a send that any thread may have started.
    pub(super) fn ends_flush(&self) -> bool {
        Op::Flush.is_of(self.user_data) && !cqueue::more(self.flags)
    }
}

impl From<cqueue::Entry> for Done {
    fn from(cqe: cqueue::Entry) -> Done {
        Done { user_data: cqe.user_data(), result: cqe.result(), flags: cqe.flags() }
    }
}

impl Ring {
    /// The best ring up to `options.tier_max`, set up but not enabled.
    ///
    /// Each refusal with EINVAL, which is how a kernel answers to a flag that it does not know,
    /// takes one step down; any other error is final.
    pub(super) fn new(options: &UringOptions) -> io::Result<Ring> {
        let mut refused = io::Error::from_raw_os_error(libc::EINVAL);
        for (tier, without_array) in LADDER {
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

    /// A ring that a kernel thread polls, with its lane, which others may push through.
    pub(super) fn polled(collector: Collector, lane: &Arc<Lane>) -> Ring {
        let without_array = collector.ring().is_without_array();
        // The tier says how completions come about; here they come by themselves.
        Ring::over(Driver::Thread(collector, Arc::clone(lane)), RingTier::Plain, without_array)
    }

    fn over(driver: Driver, tier: RingTier, without_array: bool) -> Ring {
        let io = driver.io();
        let enter_fd = io.as_raw_fd();
        let enter_flags = if io.params().is_feature_no_iowait() { ENTER_NO_IOWAIT } else { 0 };
        Ring { driver, tier, enter_fd, enter_flags, without_array, backlog: VecDeque::new() }
    }

    /// Makes the ring the calling thread's. Call it once, on the thread that will use it.
    pub(super) fn enable(&mut self) -> io::Result<()> {
        if let Driver::Owner(io) = &self.driver {
            io.submitter().register_enable_rings()?;
        }
        // Both only make things cheaper or safer: older kernels refuse them, and do without.
        let _ = self.io().submitter().register_iowq_max_workers(&mut [1, 1]);
        if let Some(number) = raw::remember_ring(self.io().as_raw_fd()) {
            self.enter_fd = number;
            self.enter_flags |= ENTER_REGISTERED_RING;
        }
        Ok(())
    }

    /// The collector, where a kernel thread polls the ring.
    pub(super) fn collector(&self) -> Option<&Collector> {
        match &self.driver {
            Driver::Owner(_) => None,
            Driver::Thread(collector, _) => Some(collector),
        }
    }

    /// Sends that others have pushed and that have not ended.
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

    /// Queues an operation; the next `enter` submits it.
    ///
    /// # Safety
    /// All memory that `sqe` names stays as it is until the operation's last completion was taken,
    /// or for ever.
    #[inline]
    pub(super) unsafe fn push(&mut self, sqe: Entry) {
        // SAFETY: promised by the caller.
        if !self.backlog.is_empty() || unsafe { !self.driver.push(&sqe) } {
            self.backlog.push_back(sqe);
        }
    }

    /// Receives from `fd` into buffers of a group until told otherwise, from when the socket is
    /// readable on: a try before that would fail at once where the group has run dry.
    pub(super) fn receive(&mut self, fd: Fd, receive: Receive, user_data: u64) {
        let sqe = if receive.bundle {
            opcode::RecvMultiBundle::new(fd, receive.group).build()
        } else {
            opcode::RecvMulti::new(fd, receive.group).build()
        };
        // SAFETY: names no memory; the kernel takes it from the buffer ring.
        unsafe { self.push(with_extras(sqe, receive.budget_bytes).user_data(user_data)) }
    }

    /// Accepts on `fd` until told otherwise.
    pub(super) fn accept(&mut self, fd: Fd, user_data: u64) {
        let sqe =
            opcode::AcceptMulti::new(fd).flags(libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC).build();
        // SAFETY: names no memory.
        unsafe { self.push(sqe.user_data(user_data)) }
    }

    /// Waits for `events` on `fd`: once, or until told otherwise.
    pub(super) fn poll(&mut self, fd: Fd, events: i16, multi: bool, user_data: u64) {
        let events = u32::from(events.cast_unsigned());
        let sqe = opcode::PollAdd::new(fd, events).multi(multi).build();
        // SAFETY: names no memory.
        unsafe { self.push(sqe.user_data(user_data)) }
    }

    /// Cancels the operation that has `target` for its user data; its own completion has
    /// `user_data`.
    pub(super) fn cancel(&mut self, target: u64, user_data: u64) {
        let sqe = opcode::AsyncCancel::new(target).build();
        // SAFETY: names no memory.
        unsafe { self.push(sqe.user_data(user_data)) }
    }

    /// Cancels everything.
    pub(super) fn cancel_all(&mut self, user_data: u64) {
        // SAFETY: names no memory.
        unsafe { self.push(raw::cancel_all(user_data)) }
    }

    /// Has a poller that waits poll the network cards of its connections for so long.
    pub(super) fn poll_cards(&mut self, time: Duration) -> io::Result<()> {
        let micros = u32::try_from(time.as_micros()).unwrap_or(u32::MAX);
        raw::poll_cards(self.io().as_raw_fd(), micros)
    }

    /// Something is queued that the kernel will not see by itself.
    pub(super) fn has_submissions(&mut self) -> bool {
        match &mut self.driver {
            Driver::Owner(io) => !io.submission().is_empty(),
            Driver::Thread(..) => !self.backlog.is_empty(),
        }
    }

    /// Completions wait in the kernel for an `enter`: task work, or an overflow of the queue.
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

    pub(super) fn has_completions(&mut self) -> bool {
        match &mut self.driver {
            Driver::Owner(io) => !io.completion().is_empty(),
            Driver::Thread(collector, _) => collector.has_completions(),
        }
    }

    /// How many completions are there.
    pub(super) fn completion_count(&mut self) -> usize {
        match &mut self.driver {
            Driver::Owner(io) => io.completion().len(),
            Driver::Thread(collector, _) => collector.completion_count(),
        }
    }

    /// Submits what is queued and collects completions; waits for one as `until` says, unless some
    /// are there or not everything could be submitted.
    ///
    /// An interrupted wait, a timeout, a kernel short of memory for now: all of them are success
    /// with nothing to collect.
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

    /// Moves completions to `into`, `limit` at most.
    pub(super) fn collect(&mut self, into: &mut Vec<Done>, limit: usize) {
        match &mut self.driver {
            Driver::Owner(io) => into.extend(io.completion().take(limit).map(Done::from)),
            Driver::Thread(collector, _) => {
                let before = into.len();
                collector.collect(into, limit);
                collector.count_reaped(&into[before..]);
            }
        }
    }

    /// Moves the backlog to the queue, as far as there is room. `false`: there is none.
    fn refill(&mut self) -> bool {
        let before = self.backlog.len();
        while let Some(sqe) = self.backlog.front() {
            // SAFETY: it came through `push`, whose caller promised.
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
        raw::enter(self.enter_fd, queued, until, flags)
    }
}

impl Driver {
    fn io(&self) -> &IoUring {
        match self {
            Driver::Owner(io) => io,
            Driver::Thread(collector, _) => collector.io(),
        }
    }

    /// `false`: there is no room.
    ///
    /// # Safety
    /// As for [`Ring::push`].
    #[inline]
    unsafe fn push(&mut self, sqe: &Entry) -> bool {
        match self {
            // SAFETY: promised by the caller.
            Driver::Owner(io) => unsafe { io.submission().push(sqe) }.is_ok(),
            // SAFETY: promised by the caller.
            Driver::Thread(collector, lane) => unsafe { lane.push_to(collector, sqe) }.is_ok(),
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        if self.enter_flags & ENTER_REGISTERED_RING != 0 {
            raw::forget_ring(self.io().as_raw_fd(), self.enter_fd);
        }
    }
}

/// How a receive is armed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Receive {
    pub(super) group: u16,
    pub(super) bundle: bool,
    /// End after about so many bytes (Linux 6.17); 0 is never.
    pub(super) budget_bytes: u32,
}

/// From the best to the plainest.
const LADDER: [(RingTier, bool); 4] = [
    (RingTier::Defer, true),
    (RingTier::Defer, false),
    (RingTier::Coop, false),
    (RingTier::Plain, false),
];

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

/// Sets what `opcode::RecvMulti` has no methods for: poll first, and the budget.
fn with_extras(sqe: Entry, budget_bytes: u32) -> Entry {
    // SAFETY: `Entry` is a transparent `io_uring_sqe`: 64 bytes of plain integers.
    let mut bytes: [u8; 64] = unsafe { std::mem::transmute(sqe) };
    // uapi/linux/io_uring.h: `ioprio` is the u16 at byte 2, `optlen` the u32 at byte 44.
    let ioprio = u16::from_ne_bytes([bytes[2], bytes[3]]) | RECVSEND_POLL_FIRST;
    bytes[2..4].copy_from_slice(&ioprio.to_ne_bytes());
    bytes[44..48].copy_from_slice(&budget_bytes.to_ne_bytes());
    // SAFETY: as above; every value of these fields is valid.
    unsafe { std::mem::transmute(bytes) }
}
