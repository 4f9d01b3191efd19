//! One ring: its set-up, its queues, and the raw calls.
//!
//! Owned and used by one thread, which is also the one that enabled it: `SINGLE_ISSUER` allows no
//! other, and a request armed by a thread that ends would end with it. Nothing submitted is ever
//! lost here: what finds the submission queue full waits in `backlog`.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::Duration;

use io_uring::squeue::Entry;
use io_uring::types::{CancelBuilder, Fd};
use io_uring::{IoUring, opcode};
use libc::{c_int, c_long, c_void};

use crate::config::{RingTier, UringOptions};
use crate::counters::Counters;

pub(super) struct Ring {
    io: IoUring,
    tier: RingTier,
    /// What `enter` names: an index that the kernel knows this thread's ring by, or the
    /// descriptor.
    enter_fd: RawFd,
    enter_flags: u32,
    registered: bool,
    without_array: bool,
    /// Submissions that found the queue full.
    backlog: VecDeque<Entry>,
}

/// One completion.
#[derive(Clone, Copy, Debug)]
pub(super) struct Done {
    pub(super) user_data: u64,
    pub(super) result: i32,
    pub(super) flags: u32,
}

/// How long to stay in the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Until {
    /// Submit, and collect what is ready.
    Now,
    /// Until there is a completion.
    Completion,
    /// Until there is a completion, or so much time has passed.
    Timeout(Duration),
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
                Ok(io) => {
                    let enter_fd = io.as_raw_fd();
                    let no_iowait = io.params().is_feature_no_iowait();
                    let enter_flags = if no_iowait { ENTER_NO_IOWAIT } else { 0 };
                    return Ok(Ring {
                        io,
                        tier,
                        enter_fd,
                        enter_flags,
                        registered: false,
                        without_array,
                        backlog: VecDeque::new(),
                    });
                }
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => refused = error,
                Err(error) => return Err(error),
            }
        }
        Err(refused)
    }

    /// Makes the ring the calling thread's. Call it once, on the thread that will use it.
    pub(super) fn enable(&mut self) -> io::Result<()> {
        self.io.submitter().register_enable_rings()?;
        // Both only make things cheaper or safer: older kernels refuse them, and do without.
        let _ = self.io.submitter().register_iowq_max_workers(&mut [1, 1]);
        let mut update =
            RingUpdate { offset: u32::MAX, reserved: 0, data: self.io.as_raw_fd() as u64 };
        // SAFETY: the kernel reads and writes one `io_uring_rsrc_update`, whose layout `RingUpdate`
        // has, and does not keep the address.
        if unsafe { register(self.io.as_raw_fd(), REGISTER_RING_FDS, (&raw mut update).cast(), 1) }
            .is_ok_and(|count| count == 1)
        {
            self.enter_fd = update.offset as RawFd;
            self.enter_flags |= ENTER_REGISTERED_RING;
            self.registered = true;
        }
        Ok(())
    }

    pub(super) fn tier(&self) -> RingTier {
        self.tier
    }

    pub(super) fn is_without_array(&self) -> bool {
        self.without_array
    }

    pub(super) fn io(&self) -> &IoUring {
        &self.io
    }

    /// Queues an operation; the next `enter` submits it.
    ///
    /// # Safety
    /// All memory that `sqe` names stays as it is until the operation's last completion was taken,
    /// or for ever.
    #[inline]
    pub(super) unsafe fn push(&mut self, sqe: Entry) {
        if self.backlog.is_empty() {
            // SAFETY: promised by the caller.
            if unsafe { self.io.submission().push(&sqe) }.is_ok() {
                return;
            }
        }
        self.backlog.push_back(sqe);
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
        let sqe = opcode::AsyncCancel2::new(CancelBuilder::any().all()).build();
        // SAFETY: names no memory.
        unsafe { self.push(sqe.user_data(user_data)) }
    }

    /// Has a poller that waits poll the network cards of its connections for so long.
    pub(super) fn poll_cards(&mut self, time: Duration) -> io::Result<()> {
        let micros = u32::try_from(time.as_micros()).unwrap_or(u32::MAX);
        let mut napi = Napi { busy_poll_us: micros, ..Napi::default() };
        // SAFETY: the kernel reads and writes one `io_uring_napi`, whose layout `Napi` has.
        unsafe { register(self.io.as_raw_fd(), REGISTER_NAPI, (&raw mut napi).cast(), 1)? };
        Ok(())
    }

    /// Something is queued that the kernel has not seen.
    pub(super) fn has_submissions(&mut self) -> bool {
        !self.io.submission().is_empty()
    }

    /// Completions wait in the kernel for an `enter`: task work, or an overflow of the queue.
    pub(super) fn wants_enter(&mut self) -> bool {
        let queue = self.io.submission();
        queue.taskrun() || queue.cq_overflow()
    }

    pub(super) fn has_overflowed(&mut self) -> bool {
        self.io.submission().cq_overflow()
    }

    pub(super) fn has_completions(&mut self) -> bool {
        !self.io.completion().is_empty()
    }

    /// Submits what is queued and collects completions; waits for one as `until` says, unless some
    /// are there or not everything could be submitted.
    ///
    /// An interrupted wait, a timeout, a kernel short of memory for now: all of them are success
    /// with nothing to collect.
    pub(super) fn enter(&mut self, until: Until, counters: &Counters) -> io::Result<()> {
        loop {
            let queued = self.io.submission().len() as u32;
            let full = !self.backlog.is_empty();
            let until = if full { Until::Now } else { until };
            if full {
                counters.submit_calls.add_owned(1);
            } else {
                counters.wait_calls.add_owned(1);
            }
            let taken = match self.enter_once(queued, until) {
                Ok(taken) => taken,
                Err(error) if is_passing(&error) => return Ok(()),
                Err(error) => return Err(error),
            };
            counters.ring_submissions.add_owned(u64::from(taken));
            if !full || taken == 0 {
                return Ok(());
            }
            self.refill();
        }
    }

    /// Moves completions to `into`, `limit` at most.
    pub(super) fn collect(&mut self, into: &mut Vec<Done>, limit: usize) {
        let completions = self.io.completion();
        into.extend(completions.take(limit).map(|cqe| Done {
            user_data: cqe.user_data(),
            result: cqe.result(),
            flags: cqe.flags(),
        }));
    }

    /// Moves the backlog to the queue, as far as there is room.
    fn refill(&mut self) {
        let mut queue = self.io.submission();
        while let Some(sqe) = self.backlog.front() {
            // SAFETY: it came through `push`, whose caller promised.
            if unsafe { queue.push(sqe) }.is_err() {
                break;
            }
            self.backlog.pop_front();
        }
    }

    fn enter_once(&self, queued: u32, until: Until) -> io::Result<u32> {
        let timeout = match until {
            Until::Timeout(timeout) => Some(libc::timespec {
                tv_sec: timeout.as_secs().min(i64::MAX as u64) as _,
                tv_nsec: timeout.subsec_nanos() as _,
            }),
            Until::Now | Until::Completion => None,
        };
        let wait_for = c_int::from(until != Until::Now);
        let arg = WaitArg {
            sigmask: 0,
            sigmask_bytes: 0,
            min_wait_us: 0,
            timeout: timeout.as_ref().map_or(0, |timeout| (&raw const *timeout).addr() as u64),
        };
        let (flags, arg, arg_bytes): (u32, *const c_void, usize) = match timeout {
            Some(_) => (ENTER_EXT_ARG, (&raw const arg).cast(), size_of::<WaitArg>()),
            None => (0, std::ptr::null(), 0),
        };
        let flags = flags | ENTER_GETEVENTS | self.enter_flags;
        // SAFETY: the queued entries were vetted by `push`; `arg` and the timeout it names live
        // until the call returns, and the kernel does not keep their addresses.
        let taken: c_long = unsafe {
            libc::syscall(
                libc::SYS_io_uring_enter,
                self.enter_fd,
                queued,
                wait_for,
                flags,
                arg,
                arg_bytes,
            )
        };
        u32::try_from(taken).map_err(|_| io::Error::last_os_error())
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        if self.registered {
            let mut update = RingUpdate { offset: self.enter_fd as u32, reserved: 0, data: 0 };
            // Fails only for a ring that is not registered; it is.
            // SAFETY: as in `enable`.
            let _ = unsafe {
                register(self.io.as_raw_fd(), UNREGISTER_RING_FDS, (&raw mut update).cast(), 1)
            };
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

/// Errors of `enter` that say nothing about the ring: an interruption, a timeout, a lack of memory
/// or of room for completions that passes when some are taken.
fn is_passing(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINTR | libc::ETIME | libc::EAGAIN | libc::EBUSY))
}

/// # Safety
/// `arg` is what `operation` takes, `count` of it.
pub(super) unsafe fn register(
    fd: RawFd,
    operation: u32,
    arg: *mut c_void,
    count: u32,
) -> io::Result<c_long> {
    // SAFETY: promised by the caller.
    let result = unsafe { libc::syscall(libc::SYS_io_uring_register, fd, operation, arg, count) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

// What the `io-uring` crate does not offer; uapi/linux/io_uring.h.
const ENTER_GETEVENTS: u32 = 1 << 0;
const ENTER_EXT_ARG: u32 = 1 << 3;
const ENTER_REGISTERED_RING: u32 = 1 << 4;
const ENTER_NO_IOWAIT: u32 = 1 << 7;
const REGISTER_RING_FDS: u32 = 20;
const UNREGISTER_RING_FDS: u32 = 21;
const REGISTER_NAPI: u32 = 27;
const RECVSEND_POLL_FIRST: u16 = 1 << 0;

/// `struct io_uring_getevents_arg`.
#[repr(C)]
struct WaitArg {
    sigmask: u64,
    sigmask_bytes: u32,
    min_wait_us: u32,
    timeout: u64,
}

/// `struct io_uring_rsrc_update`.
#[repr(C)]
struct RingUpdate {
    offset: u32,
    reserved: u32,
    data: u64,
}

/// `struct io_uring_napi`.
#[derive(Default)]
#[repr(C)]
struct Napi {
    busy_poll_us: u32,
    prefer_busy_poll: u8,
    operation: u8,
    padding: [u8; 2],
    operation_arg: u32,
    reserved: u32,
}
