//! A ring that a kernel thread polls.
//!
//! Any thread may push to the submission queue through a [`SharedQueue`], a lock around that queue.
//! The kernel thread takes submissions without a system call of this process. One thread owns the
//! completion queue through the [`Collector`].

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
use std::time::Instant;

use io_uring::IoUring;
use io_uring::cqueue::CompletionQueue;
use io_uring::squeue::{Entry, SubmissionQueue};

use super::tail::{self, Submissions};
use crate::config::uring::TEARDOWN;
use crate::counters::Counters;
use crate::sync::{Mutex, lock, try_lock};
use crate::sys::Token;
use crate::sys::uring::mapping::Mapping;
use crate::sys::uring::raw::{
    self, ENTER_GETEVENTS, ENTER_NO_IOWAIT, ENTER_SQ_WAIT, ENTER_SQ_WAKEUP, Until,
};
use crate::sys::uring::ring::Cqe;
use crate::sys::uring::tag::Op;

/// The ring, shared by its queues.
pub(in crate::sys::uring) struct Polled {
    io: IoUring,
    flags: Flags,
    without_array: bool,
    /// How many sends were pushed. Changed with the queue locked.
    sends: AtomicU64,
}

/// The form of a polled ring.
#[derive(Clone, Copy, Debug)]
pub(in crate::sys::uring) struct Shape {
    pub(in crate::sys::uring) submissions: u32,
    pub(in crate::sys::uring) completions: u32,
    pub(in crate::sys::uring) idle_ms: u32,
    /// The CPU of a new kernel thread. `None`: any CPU.
    pub(in crate::sys::uring) cpu: Option<usize>,
}

impl Polled {
    /// Sets up a ring that is polled by the kernel thread of another ring, or by a new one.
    pub(in crate::sys::uring) fn create(
        shape: Shape,
        thread_of: Option<&Polled>,
    ) -> io::Result<Collector> {
        let mut refused = io::Error::from_raw_os_error(libc::EINVAL);
        for (submit_all, without_array) in SETUPS {
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
                    // The ring works without the limit, which older kernels refuse.
                    let _ = io.submitter().register_iowq_max_workers(&mut [1, 1]);
                    let flags = Flags::of(&io)?;
                    let ring = Polled { io, flags, without_array, sends: AtomicU64::new(0) };
                    return Ok(Collector {
                        ring: Arc::new(ring),
                        ended_sends: 0,
                        reported_lost: 0,
                    });
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

    pub(in crate::sys::uring) fn is_without_array(&self) -> bool {
        self.without_array
    }

    /// The kernel thread sleeps, or is about to.
    pub(in crate::sys::uring) fn is_asleep(&self) -> bool {
        fence(Ordering::SeqCst);
        self.flags.has(SQ_NEED_WAKEUP)
    }

    /// The kernel holds completions that found the queue full. It posts them during an `enter`.
    pub(in crate::sys::uring) fn has_overflowed(&self) -> bool {
        self.flags.has(SQ_CQ_OVERFLOW)
    }

    /// Wakes the kernel thread.
    fn wake(&self, counters: &Counters) {
        counters.add(|counters| &counters.sqpoll_wake_calls, 1);
        // Fails only when the kernel thread has died. The poller's next wait reports that.
        let _ = raw::enter(self.io.as_raw_fd(), 0, Until::Now, ENTER_SQ_WAKEUP);
    }
}

/// The flags that the kernel sets for the submission queue. This is a separate mapping, because the
/// crate's view of the queue writes the tail when it drops, which needs the lock of the queue.
struct Flags {
    word: NonNull<AtomicU32>,
    _page: Mapping,
}

// SAFETY: `word` points into `_page`, which lives as long. This process only reads the word, as an
// atomic.
unsafe impl Send for Flags {}
// SAFETY: as above.
unsafe impl Sync for Flags {}

impl Flags {
    fn of(io: &IoUring) -> io::Result<Flags> {
        // SAFETY: `Parameters` is documented as a transparent wrapper of `io_uring_params`, which
        // is made of integers. The assertion below checks its size.
        let params: [u32; 30] = unsafe { std::mem::transmute_copy(io.params()) };
        let offset = params[SQ_OFF_FLAGS] as usize;
        let bytes = offset + size_of::<AtomicU32>();
        let page = Mapping::view(io.as_raw_fd(), bytes)?;
        // SAFETY: the kernel gave the offset of the word, and the mapping reaches to the word's
        // end.
        let word = unsafe { page.start().add(offset) }.cast();
        Ok(Flags { word, _page: page })
    }

    fn has(&self, flag: u32) -> bool {
        // SAFETY: the word is inside the mapping and four-aligned. Only the kernel writes it,
        // atomically.
        unsafe { self.word.as_ref() }.load(Ordering::Acquire) & flag != 0
    }
}

const _: () = assert!(size_of::<io_uring::Parameters>() == size_of::<[u32; 30]>());

// uapi/linux/io_uring.h.
const SQ_NEED_WAKEUP: u32 = 1 << 0;
const SQ_CQ_OVERFLOW: u32 = 1 << 1;
/// The index of `sq_off.flags` in `io_uring_params`, in words.
const SQ_OFF_FLAGS: usize = 14;

/// Whether to ask for `SUBMIT_ALL` and for `NO_SQARRAY`; the best comes first.
const SETUPS: [(bool, bool); 3] = [(true, true), (true, false), (false, false)];

/// Why an operation was not pushed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::sys::uring) enum Refused {
    /// The queue is full until the kernel thread takes submissions.
    Full,
    /// The queue belongs to no ring.
    Closed,
}

/// The submission queue of a ring, for any thread.
pub(in crate::sys::uring) struct SharedQueue {
    ring: Mutex<Option<Arc<Polled>>>,
    counters: Arc<Counters>,
}

impl SharedQueue {
    /// A queue of no ring, until [`open`](Self::open).
    pub(in crate::sys::uring) fn new(counters: &Arc<Counters>) -> SharedQueue {
        SharedQueue { ring: Mutex::new(None), counters: Arc::clone(counters) }
    }

    pub(super) fn open(&self, collector: &Collector) {
        *lock(&self.ring) = Some(Arc::clone(&collector.ring));
    }

    /// Refuses all later sends.
    pub(super) fn close(&self) {
        *lock(&self.ring) = None;
    }

    /// Pushes a send.
    ///
    /// # Safety
    /// The memory that `sqe` names stays valid and unmoved until the operation's last completion is
    /// taken, or forever.
    pub(super) unsafe fn push_send(&self, sqe: &Entry) -> Result<(), Refused> {
        let locked = try_lock(&self.ring).unwrap_or_else(|| {
            self.counters.add(|counters| &counters.send_contentions, 1);
            lock(&self.ring)
        });
        let Some(ring) = locked.as_ref() else { return Err(Refused::Closed) };
        let sends = ring.sends.load(Ordering::Relaxed);
        // Counted before the push, so that the completion is not counted first.
        ring.sends.store(sends + 1, Ordering::Relaxed);
        // SAFETY: the caller keeps the named memory valid, and the queue is locked.
        let published = unsafe { publish(ring, sqe) };
        let must_wake = published.inspect_err(|_| ring.sends.store(sends, Ordering::Relaxed))?;
        let asleep = must_wake.then(|| Arc::clone(ring));
        // The wake-up is a system call, which other producers need not wait for.
        drop(locked);
        if let Some(ring) = asleep {
            ring.wake(&self.counters);
        }
        Ok(())
    }

    /// Pushes to the ring of `own`, which this queue belongs to or belonged to.
    ///
    /// # Safety
    /// As for [`push_send`](Self::push_send).
    pub(in crate::sys::uring) unsafe fn push_to(
        &self,
        own: &Collector,
        sqe: &Entry,
    ) -> Result<(), Refused> {
        let locked = lock(&self.ring);
        // SAFETY: the caller keeps the named memory valid, and the queue is locked.
        let must_wake = unsafe { publish(&own.ring, sqe)? };
        drop(locked);
        if must_wake {
            own.ring.wake(&self.counters);
        }
        Ok(())
    }
}

/// Pushes an operation. Returns whether the caller must wake the kernel thread.
///
/// # Safety
/// As for [`SharedQueue::push_send`]; and the ring's queue is locked.
unsafe fn publish(ring: &Polled, sqe: &Entry) -> Result<bool, Refused> {
    // SAFETY: the lock makes this the only view of the queue.
    let mut queue = unsafe { ring.io.submission_shared() };
    // SAFETY: the caller keeps the named memory valid.
    unsafe { queue.push(sqe) }.map_err(|_| Refused::Full)?;
    Ok(tail::publish(&mut View { queue, ring }))
}

/// The submission queue, while it is locked.
struct View<'a> {
    queue: SubmissionQueue<'a>,
    ring: &'a Polled,
}

impl Submissions for View<'_> {
    fn publish(&mut self) {
        self.queue.sync();
    }

    fn untaken(&mut self) -> usize {
        // `sync` reads the head again.
        self.queue.sync();
        self.queue.len()
    }

    fn is_asleep(&self) -> bool {
        self.ring.flags.has(SQ_NEED_WAKEUP)
    }
}

/// The completion queue of a ring, for one thread.
pub(in crate::sys::uring) struct Collector {
    ring: Arc<Polled>,
    /// How many sends have ended.
    ended_sends: u64,
    /// How many lost completions [`has_lost_more`](Self::has_lost_more) has reported.
    reported_lost: u32,
}

impl Collector {
    pub(in crate::sys::uring) fn ring(&self) -> &Arc<Polled> {
        &self.ring
    }

    pub(in crate::sys::uring) fn io(&self) -> &IoUring {
        &self.ring.io
    }

    fn queue(&self) -> CompletionQueue<'_> {
        // SAFETY: a ring has one `Collector`, which one thread uses, and no caller keeps two views.
        unsafe { self.ring.io.completion_shared() }
    }

    pub(in crate::sys::uring) fn completion_count(&self) -> usize {
        self.queue().len()
    }

    /// How many completions the kernel has dropped, because it had no memory for them.
    pub(in crate::sys::uring) fn lost_completions(&self) -> u32 {
        self.queue().overflow()
    }

    /// Whether the kernel has dropped completions since the last call.
    pub(super) fn has_lost_more(&mut self) -> bool {
        let lost = self.lost_completions();
        std::mem::replace(&mut self.reported_lost, lost) != lost
    }

    /// Moves at most `limit` completions to `into`, and counts the sends that ended with them.
    pub(in crate::sys::uring) fn collect(&mut self, into: &mut Vec<Cqe>, limit: usize) {
        let before = into.len();
        into.extend(self.queue().take(limit).map(Cqe::from));
        let ended = into[before..].iter().filter(|cqe| cqe.ends_record()).count();
        self.ended_sends += ended as u64;
    }

    /// How many pushed sends have not ended.
    pub(in crate::sys::uring) fn sends_in_flight(&self) -> u64 {
        self.ring.sends.load(Ordering::Relaxed) - self.ended_sends
    }

    /// Registers the eventfd that completions write to while
    /// [`wake_on_completion`](Self::wake_on_completion) is on.
    pub(super) fn register_wake(&self, fd: RawFd) -> io::Result<()> {
        self.io().submitter().register_eventfd(fd)?;
        self.wake_on_completion(false);
        Ok(())
    }

    pub(super) fn wake_on_completion(&self, on: bool) {
        let queue = self.queue();
        if on { queue.enable_eventfd() } else { queue.disable_eventfd() }
    }

    /// Enters the kernel to wait.
    pub(super) fn enter(&self, wait: WaitFor, counters: &Counters) -> io::Result<()> {
        let (until, mut flags) = match wait {
            WaitFor::Completion(until) => (until, ENTER_GETEVENTS),
            WaitFor::QueueRoom => (Until::Now, ENTER_SQ_WAIT),
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

    /// Cancels every operation of the ring, through its queue.
    pub(super) fn cancel_all(&self, queue: &SharedQueue) {
        let sqe = raw::cancel_all(Op::Cancel.with_token(Token::NONE));
        // A full queue refuses the cancellation. The sends then end by themselves, or `drain` gives
        // them up.
        // SAFETY: the operation names no memory.
        let _ = unsafe { queue.push_to(self, &sqe) };
    }

    /// Takes completions until no send is in flight, for [`TEARDOWN`] at most.
    pub(super) fn drain(&mut self, into: &mut Vec<Cqe>, counters: &Counters) {
        let begun = Instant::now();
        while self.sends_in_flight() > 0 && begun.elapsed() < TEARDOWN {
            let wait = WaitFor::Completion(Until::Timeout(TEARDOWN / 20));
            if self.enter(wait, counters).is_err() {
                return;
            }
            self.collect(into, usize::MAX);
        }
    }
}

/// What an `enter` waits for.
#[derive(Clone, Copy, Debug)]
pub(super) enum WaitFor {
    Completion(Until),
    /// Room in the submission queue.
    QueueRoom,
}
