//! Rings that a kernel thread polls.
//!
//! Any thread may push to one, through its [`Lane`], which is a lock around the submission queue
//! and nothing else; the kernel thread takes what it finds there, without a system call of ours.
//! Completions belong to one thread, which has the [`Collector`].

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
use std::time::Instant;

use io_uring::IoUring;
use io_uring::squeue::{Entry, SubmissionQueue};

use super::mapping::Mapping;
use super::raw::{self, ENTER_GETEVENTS, ENTER_NO_IOWAIT, ENTER_SQ_WAIT, ENTER_SQ_WAKEUP, Until};
use super::ring::Done;
use super::tag::{Op, user_data};
use super::tail::{self, Submissions};
use crate::config::uring::TEARDOWN;
use crate::counters::Counters;
use crate::sync::{Mutex, lock, try_lock};
use crate::sys::Token;

/// The ring itself, as everybody shares it.
pub(super) struct Polled {
    io: IoUring,
    flags: Flags,
    without_array: bool,
    /// Sends pushed. Changed under the lane's lock.
    sends: AtomicU64,
    /// Sends whose last completion was taken. Changed by the collector.
    reaped: AtomicU64,
}

/// What a polled ring is to be.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    pub(super) submissions: u32,
    pub(super) completions: u32,
    pub(super) idle_ms: u32,
    /// Where a new thread is to run.
    pub(super) cpu: Option<usize>,
}

impl Polled {
    /// Sets a ring up: on the thread of another one, or on a new one.
    pub(super) fn create(shape: Shape, thread_of: Option<&Polled>) -> io::Result<Collector> {
        let mut refused = io::Error::from_raw_os_error(libc::EINVAL);
        for (submit_all, without_array) in LADDER {
            let mut builder = IoUring::builder();
            // A forked child must not share the queues.
            builder.dontfork();
            builder.setup_cqsize(shape.completions.max(shape.submissions));
            builder.setup_sqpoll(shape.idle_ms);
            match (thread_of, shape.cpu) {
                (Some(other), _) => {
                    builder.setup_attach_wq(other.io.as_raw_fd());
                }
                (None, Some(cpu)) => {
                    builder.setup_sqpoll_cpu(cpu as u32);
                }
                (None, None) => {}
            }
            if submit_all {
                builder.setup_submit_all();
            }
            if without_array {
                builder.setup_no_sqarray();
            }
            match builder.build(shape.submissions) {
                Ok(io) => {
                    // Older kernels refuse, and do without.
                    let _ = io.submitter().register_iowq_max_workers(&mut [1, 1]);
                    let flags = Flags::of(&io)?;
                    let (sends, reaped) = (AtomicU64::new(0), AtomicU64::new(0));
                    let ring = Polled { io, flags, without_array, sends, reaped };
                    return Ok(Collector(Arc::new(ring)));
                }
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => refused = error,
                Err(error) => return Err(error),
            }
        }
        Err(refused)
    }

    pub(super) fn io(&self) -> &IoUring {
        &self.io
    }

    pub(super) fn is_without_array(&self) -> bool {
        self.without_array
    }

    /// The kernel thread has ceased to look.
    pub(super) fn is_asleep(&self) -> bool {
        fence(Ordering::SeqCst);
        self.flags.has(SQ_NEED_WAKEUP)
    }

    /// Completions that found no room wait in the kernel for somebody who enters.
    pub(super) fn has_overflowed(&self) -> bool {
        self.flags.has(SQ_CQ_OVERFLOW)
    }

    /// Wakes the kernel thread.
    fn wake(&self, counters: &Counters) {
        counters.add(|counters| &counters.sqpoll_wake_calls, 1);
        // Fails only where the thread has died; its owner hears of it with its next wait.
        let _ = raw::enter(self.io.as_raw_fd(), 0, Until::Now, ENTER_SQ_WAKEUP);
    }
}

/// What the kernel says about the submission queue. A view of our own: the one of the crate writes
/// the queue's tail when it goes, which is for those who hold the lane's lock.
struct Flags {
    word: NonNull<AtomicU32>,
    _page: Mapping,
}

// SAFETY: points into a mapping of its own that lives as long, at a word that is only read.
unsafe impl Send for Flags {}
// SAFETY: as above.
unsafe impl Sync for Flags {}

impl Flags {
    fn of(io: &IoUring) -> io::Result<Flags> {
        // SAFETY: `Parameters` is documented as a transparent wrapper of `io_uring_params`, which
        // has this size and is made of integers.
        let params: [u32; 30] = unsafe { std::mem::transmute_copy(io.params()) };
        let offset = params[SQ_OFF_FLAGS] as usize;
        let bytes = offset + size_of::<AtomicU32>();
        let page = Mapping::view(io.as_raw_fd(), bytes)?;
        // SAFETY: the kernel says that the word is there, and the mapping reaches to its end.
        let word = unsafe { page.start().add(offset) }.cast();
        Ok(Flags { word, _page: page })
    }

    #[inline]
    fn has(&self, flag: u32) -> bool {
        // SAFETY: inside the mapping, four-aligned; written by the kernel alone, atomically.
        unsafe { self.word.as_ref() }.load(Ordering::Acquire) & flag != 0
    }
}

const _: () = assert!(size_of::<io_uring::Parameters>() == size_of::<[u32; 30]>());

// uapi/linux/io_uring.h.
const SQ_NEED_WAKEUP: u32 = 1 << 0;
const SQ_CQ_OVERFLOW: u32 = 1 << 1;
/// Of `sq_off.flags`, in words from the start of `io_uring_params`.
const SQ_OFF_FLAGS: usize = 14;

/// From the best to the plainest.
const LADDER: [(bool, bool); 3] = [(true, true), (true, false), (false, false)];

/// Why an operation was not pushed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refused {
    /// The kernel thread has to take some first.
    Full,
    /// There is no ring.
    Closed,
}

/// The way into a ring, for any thread.
pub(super) struct Lane {
    ring: Mutex<Option<Arc<Polled>>>,
    counters: Arc<Counters>,
}

impl Lane {
    /// Leads nowhere until it is opened.
    pub(super) fn new(counters: &Arc<Counters>) -> Lane {
        Lane { ring: Mutex::new(None), counters: Arc::clone(counters) }
    }

    pub(super) fn open(&self, collector: &Collector) {
        *lock(&self.ring) = Some(Arc::clone(&collector.0));
    }

    /// No send is pushed any more.
    pub(super) fn close(&self) {
        *lock(&self.ring) = None;
    }

    /// Pushes a send to the ring that the lane leads to.
    ///
    /// # Safety
    /// All memory that `sqe` names stays as it is until the operation's last completion was taken,
    /// or for ever.
    pub(super) unsafe fn push_send(&self, sqe: &Entry) -> Result<(), Refused> {
        let slot = try_lock(&self.ring).unwrap_or_else(|| {
            self.counters.add(|counters| &counters.send_contentions, 1);
            lock(&self.ring)
        });
        let Some(ring) = slot.as_ref() else { return Err(Refused::Closed) };
        let sends = ring.sends.load(Ordering::Relaxed);
        // Before its completion can be counted.
        ring.sends.store(sends + 1, Ordering::Relaxed);
        // SAFETY: promised by the caller; the lane is locked.
        let published = unsafe { publish(ring, sqe) };
        let is_asleep = published.inspect_err(|_| ring.sends.store(sends, Ordering::Relaxed))?;
        let asleep = is_asleep.then(|| Arc::clone(ring));
        // The others need not wait for the kernel.
        drop(slot);
        if let Some(ring) = asleep {
            ring.wake(&self.counters);
        }
        Ok(())
    }

    /// Pushes to the collector's own ring, whose lane this is or was.
    ///
    /// # Safety
    /// As for [`push_send`](Self::push_send).
    pub(super) unsafe fn push_to(&self, own: &Collector, sqe: &Entry) -> Result<(), Refused> {
        let slot = lock(&self.ring);
        // SAFETY: promised by the caller; the lane is locked.
        let is_asleep = unsafe { publish(&own.0, sqe)? };
        drop(slot);
        if is_asleep {
            own.0.wake(&self.counters);
        }
        Ok(())
    }
}

/// Puts an operation where the kernel thread looks; says whether the caller has to wake it.
///
/// # Safety
/// As for [`Lane::push_send`]; and the ring's lane is locked.
unsafe fn publish(ring: &Polled, sqe: &Entry) -> Result<bool, Refused> {
    // SAFETY: the lane's lock makes this the only view of the queue.
    let mut queue = unsafe { ring.io.submission_shared() };
    // SAFETY: promised by the caller.
    unsafe { queue.push(sqe) }.map_err(|_| Refused::Full)?;
    Ok(tail::publish(&mut View { queue, ring }))
}

/// The submission queue, for who holds the lane's lock.
struct View<'a> {
    queue: SubmissionQueue<'a>,
    ring: &'a Polled,
}

impl Submissions for View<'_> {
    #[inline]
    fn publish(&mut self) {
        self.queue.sync();
    }

    #[inline]
    fn untaken(&mut self) -> usize {
        // Reads the head anew.
        self.queue.sync();
        self.queue.len()
    }

    #[inline]
    fn is_asleep(&self) -> bool {
        self.ring.flags.has(SQ_NEED_WAKEUP)
    }
}

/// A ring's completions: one thread's.
pub(super) struct Collector(Arc<Polled>);

impl Collector {
    pub(super) fn ring(&self) -> &Arc<Polled> {
        &self.0
    }

    pub(super) fn io(&self) -> &IoUring {
        &self.0.io
    }

    #[inline]
    pub(super) fn has_completions(&self) -> bool {
        // SAFETY: the collector is the ring's only one and does not leave its thread meanwhile.
        let queue = unsafe { self.0.io.completion_shared() };
        !queue.is_empty()
    }

    pub(super) fn completion_count(&self) -> usize {
        // SAFETY: the collector is the ring's only one and does not leave its thread meanwhile.
        let queue = unsafe { self.0.io.completion_shared() };
        queue.len()
    }

    /// Completions that found no room wait for somebody to enter.
    pub(super) fn has_overflowed(&self) -> bool {
        self.0.has_overflowed()
    }

    /// Moves completions to `into`, `limit` at most.
    pub(super) fn collect(&mut self, into: &mut Vec<Done>, limit: usize) {
        // SAFETY: the collector is the ring's only one.
        let completions = unsafe { self.0.io.completion_shared() };
        into.extend(completions.take(limit).map(Done::from));
    }

    /// Counts the sends that ended with these completions, which were taken here.
    pub(super) fn count_reaped(&self, completions: &[Done]) {
        let ended = completions.iter().filter(|done| done.ends_flush()).count() as u64;
        // The only writer.
        let reaped = self.0.reaped.load(Ordering::Relaxed) + ended;
        self.0.reaped.store(reaped, Ordering::Relaxed);
    }

    /// Sends that are pushed and not reaped.
    pub(super) fn sends_in_flight(&self) -> u64 {
        self.0.sends.load(Ordering::Relaxed) - self.0.reaped.load(Ordering::Relaxed)
    }

    /// Has each completion ring `fd`, an eventfd, while [`ring_bell`](Self::ring_bell) says so.
    pub(super) fn set_bell(&self, fd: RawFd) -> io::Result<()> {
        self.io().submitter().register_eventfd(fd)?;
        self.ring_bell(false);
        Ok(())
    }

    pub(super) fn ring_bell(&self, on: bool) {
        // SAFETY: the collector is the ring's only one.
        let queue = unsafe { self.0.io.completion_shared() };
        if on { queue.enable_eventfd() } else { queue.disable_eventfd() }
    }

    /// Waits for completions, or for room to push.
    pub(super) fn enter(&self, wait: Wait, counters: &Counters) -> io::Result<()> {
        let (until, mut flags) = match wait {
            Wait::Completion(until) => (until, ENTER_GETEVENTS),
            Wait::Room => (Until::Now, ENTER_SQ_WAIT),
        };
        if self.io().params().is_feature_no_iowait() {
            flags |= ENTER_NO_IOWAIT;
        }
        counters.wait_calls.add_owned(1);
        match raw::enter(self.io().as_raw_fd(), 0, until, flags) {
            Err(error) if !raw::is_passing(&error) => Err(error),
            _ => Ok(()),
        }
    }

    /// Cancels everything in the ring.
    pub(super) fn cancel_all(&self, lane: &Lane) {
        let sqe = raw::cancel_all(user_data(Op::Cancel, Token::NONE));
        // SAFETY: names no memory. Where there is no room, the sends end by themselves or not.
        let _ = unsafe { lane.push_to(self, &sqe) };
    }

    /// Takes completions until no send is in flight, for a while at most.
    pub(super) fn drain(&mut self, into: &mut Vec<Done>, counters: &Counters) {
        let begun = Instant::now();
        while self.sends_in_flight() > 0 && begun.elapsed() < TEARDOWN {
            let turn = Wait::Completion(Until::Timeout(TEARDOWN / 20));
            if self.enter(turn, counters).is_err() {
                return;
            }
            let before = into.len();
            self.collect(into, usize::MAX);
            self.count_reaped(&into[before..]);
        }
    }
}

/// What to wait for.
#[derive(Clone, Copy, Debug)]
pub(super) enum Wait {
    Completion(Until),
    /// In the submission queue.
    Room,
}
