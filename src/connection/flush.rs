//! Flushing: submits written bytes and waits until the kernel has taken them.
//!
//! [`wait`](super::wait) explains what a wait owns.

use std::future::Future;
use std::io::IoSlice;
use std::ops::Range;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker, ready};

use super::core::Core;
use super::output::{Flusher, Output, Submitted};
use super::wait::Began;
use crate::buffer::{Spent, Staging};
use crate::clock::now_ns;
use crate::config;
use crate::error::{Error, Result};
use crate::poller::timers::NEVER;
use crate::sync::lock;
use crate::task;
use crate::user_code;

/// Submits written bytes without waiting.
pub(super) fn submit(core: &Arc<Core>, staging: &mut Staging) -> Result<()> {
    let mut spent = Spent::default();
    let submitted = lock(&core.output).submit(core, staging, &mut spent)?;
    match submitted {
        Submitted::Sent | Submitted::Queued(_) => Ok(()),
        Submitted::Full(_) => Err(Error::limit(format!(
            "submit: {} bytes wait for the peer already",
            core.limits.output_bytes_max
        ))),
    }
}

/// Polls until written bytes are submitted. Waits for room if `output_bytes_max` bytes are unsent.
pub(super) fn poll_submit(
    core: &Arc<Core>,
    staging: &mut Staging,
    began: &mut Began,
    cx: &Context<'_>,
) -> Poll<Result<()>> {
    // A flush that may leave every submitted byte unsent.
    poll_flush(core, staging, usize::MAX, began, cx)
}

/// Submits written bytes, and waits until the kernel has every byte submitted so far.
pub(super) struct Flushing<'a> {
    core: &'a Arc<Core>,
    staging: &'a mut Staging,
    flush: Flush,
}

impl<'a> Flushing<'a> {
    #[inline]
    pub(super) fn new(core: &'a Arc<Core>, staging: &'a mut Staging) -> Flushing<'a> {
        Flushing { core, staging, flush: Flush::default() }
    }
}

impl Future for Flushing<'_> {
    type Output = Result<()>;

    #[inline(always)]
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<()>> {
        let Flushing { core, staging, flush } = self.get_mut();
        flush.poll(core, staging, cx)
    }
}

/// Polls a flush. Each poll covers the bytes written before it. The flush is done when the kernel
/// has all but `unsent_bytes_max` bytes.
pub(super) fn poll_flush(
    core: &Arc<Core>,
    staging: &mut Staging,
    unsent_bytes_max: usize,
    began: &mut Began,
    cx: &Context<'_>,
) -> Poll<Result<()>> {
    let unsent_max = unsent_bytes_max as u64;
    let mut flush = Flush { unsent_max, began: *began, target: None };
    let polled = flush.poll(core, staging, cx);
    *began = if polled.is_pending() { flush.began } else { Began::default() };
    polled
}

/// Polls for room to write, and returns the room in bytes. Unsent bytes are those written or
/// submitted that the kernel has not taken. There is room while fewer than `bytes_max` bytes, and
/// fewer than `output_bytes_max`, are unsent.
pub(super) fn poll_room(
    core: &Arc<Core>,
    staging: &mut Staging,
    bytes_max: usize,
    began: &mut Began,
    cx: &Context<'_>,
) -> Poll<Result<usize>> {
    // A limit of 0 would never leave room.
    let bytes_max = bytes_max.min(core.limits.output_bytes_max).max(1) as u64;
    let waiter = Waiter::new(cx);
    let mut wait = SentWait { core, operation: "write", began: &mut *began, waiter };
    let polled = wait.poll(|output, wait, spent| {
        if let Some(error) = output.failure() {
            return Err(Error::io("send", error));
        }
        if core.life.is_closed() || output.ended {
            return Err(Error::closed("write"));
        }
        if output.unsent() + staging.len() as u64 >= bytes_max {
            output.submit(core, staging, spent)?;
        }
        match bytes_max.saturating_sub(output.unsent() + staging.len() as u64) {
            0 => wait.register(output, output.submitted() - bytes_max + 1),
            room => Ok(Look::Done(room as usize)),
        }
    });
    drop(wait);
    if polled.is_ready() {
        began.forget();
    }
    polled
}

/// Polls for room as [`poll_room`] does, then writes `pieces`. Returns how many bytes are written.
///
/// A large write of few pieces waits until no other byte is unsent, and passes the memory of the
/// caller to the kernel. Of the bytes that the kernel does not take, it copies a few: the poller
/// sends them as soon as the socket has room, which wakes the task for its next write. So a stream
/// of large writes is hardly copied, and a peer that does not read occupies little memory.
pub(super) fn poll_write(
    core: &Arc<Core>,
    staging: &mut Staging,
    pieces: &[IoSlice<'_>],
    bytes_max: usize,
    began: &mut Began,
    cx: &Context<'_>,
) -> Poll<Result<usize>> {
    let bytes: usize = pieces.iter().map(|piece| piece.len()).sum();
    let is_large =
        bytes >= config::DIRECT_SEND_BYTES_MIN && pieces.len() <= config::GATHER_SLICES_MAX;
    if !is_large || core.remote.outlet.is_of_kernel_threads() {
        let room = ready!(poll_room(core, staging, bytes_max, began, cx))?;
        copy_part(core, staging, pieces, 0..room.min(bytes));
        return Poll::Ready(Ok(room.min(bytes)));
    }
    ready!(poll_room(core, staging, 1, began, cx))?;
    let mut spent = Spent::default();
    let sent = lock(&core.output).send_pieces(core, pieces, &mut spent)?;
    let written = bytes.min(sent + config::KEPT_OF_DIRECT_SEND_BYTES.min(bytes_max.max(1)));
    if sent < written {
        copy_part(core, staging, pieces, sent..written);
        // An error of this is returned by the next write, because bytes of this one are sent.
        let _ = submit(core, staging);
    }
    Poll::Ready(Ok(written))
}

/// Copies the bytes in `range` of the pieces, taken together, into `staging`.
fn copy_part(core: &Arc<Core>, staging: &mut Staging, pieces: &[IoSlice<'_>], range: Range<usize>) {
    let mut at = 0;
    for piece in pieces {
        let start = range.start.clamp(at, at + piece.len()) - at;
        let end = range.end.clamp(at, at + piece.len()) - at;
        staging.write_copy(&piece[start..end], &core.remote.pool);
        at += piece.len();
    }
}

/// Polls until nothing more can be sent.
pub(super) fn poll_end(core: &Arc<Core>, cx: &Context<'_>) -> Poll<Error> {
    let waker = cx.waker().clone();
    let mut output = lock(&core.output);
    if let Some(error) = output.failure() {
        return Poll::Ready(Error::io("send", error));
    }
    if core.life.is_closed() || output.ended {
        return Poll::Ready(Error::closed("write"));
    }
    // No flush reaches this target, so only a close or a failure wakes the task.
    let replaced = output.wait_for(u64::MAX, NEVER, Flusher::Task(waker));
    drop(output);
    user_code::discard(replaced);
    Poll::Pending
}

/// One flush.
#[derive(Default)]
struct Flush {
    /// Set once everything is submitted: the total of sent bytes at which the flush is done.
    target: Option<u64>,
    /// How many of the submitted bytes may still be unsent when the flush is done.
    unsent_max: u64,
    began: Began,
}

impl Flush {
    #[inline(always)]
    fn poll(
        &mut self,
        core: &Arc<Core>,
        staging: &mut Staging,
        cx: &Context<'_>,
    ) -> Poll<Result<()>> {
        let (target, unsent_max) = (&mut self.target, self.unsent_max);
        let waiter = Waiter::new(cx);
        let mut wait = SentWait { core, operation: "flush", began: &mut self.began, waiter };
        wait.poll(|output, wait, spent| {
            loop {
                let wanted = match *target {
                    Some(target) => target,
                    None => match output.submit(core, staging, spent)? {
                        Submitted::Sent => return Ok(Look::Done(())),
                        Submitted::Queued(submitted) => {
                            *target.insert(submitted.saturating_sub(unsent_max))
                        }
                        // Nothing was submitted: the flush first waits for room.
                        Submitted::Full(room_at) => room_at,
                    },
                };
                if output.sent() < wanted {
                    return wait.register(output, wanted);
                }
                if target.is_some() {
                    return Ok(Look::Done(()));
                }
            }
        })
    }
}

/// The result of one check of the output under its lock.
enum Look<T> {
    Done(T),
    /// The wait is registered, and looks again at this time at the latest.
    Waits(u64),
    /// The wait needs a clone of the waker. The caller makes the clone without the lock, then
    /// checks again.
    NeedsWaker,
}

/// A wait until bytes are sent.
struct SentWait<'a> {
    core: &'a Arc<Core>,
    operation: &'static str,
    began: &'a mut Began,
    waiter: Waiter<'a>,
}

impl SentWait<'_> {
    #[inline(always)]
    fn poll<T>(
        &mut self,
        mut look: impl FnMut(&mut Output, &mut Self, &mut Spent) -> Result<Look<T>>,
    ) -> Poll<Result<T>> {
        let mut spent = Spent::default();
        loop {
            let core = self.core;
            let looked = look(&mut lock(&core.output), self, &mut spent);
            match looked {
                Ok(Look::Done(done)) => return Poll::Ready(Ok(done)),
                Ok(Look::NeedsWaker) => self.waiter.clone_waker(),
                Ok(Look::Waits(until_ns)) => {
                    core.arm(until_ns);
                    return Poll::Pending;
                }
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }

    /// Registers the wait until `target` bytes are sent, unless its time is up. A run that its
    /// poller polls keeps no waker here, so it need not become a task.
    fn register<T>(&mut self, output: &mut Output, target: u64) -> Result<Look<T>> {
        if let Some(error) = output.failure() {
            return Err(Error::io("send", error));
        }
        if self.core.life.is_closed() {
            return Err(Error::closed(self.operation));
        }
        let mut until_ns = self.core.timeouts.write.end_of_wait(|| self.began.at_or(now_ns));
        // The clock is read only where there is a timeout or a deadline.
        if until_ns != NEVER || output.stall.is_some() {
            let now_ns = now_ns();
            if now_ns >= until_ns {
                return Err(Error::write_timeout(self.operation, self.began.elapsed(now_ns)));
            }
            let began_ns = self.began.at_or(|| now_ns);
            until_ns = until_ns.min(output.end_of_stall(self.operation, began_ns, now_ns)?);
        }
        let waiter = &mut self.waiter;
        let flusher = if task::waits_for_flush(waiter.waker, self.core.owner()) {
            Flusher::Run
        } else if output.renew_wait(target, until_ns, waiter.waker) {
            return Ok(Look::Waits(until_ns));
        } else if let Some(clone) = waiter.clone.take() {
            Flusher::Task(clone)
        } else {
            return Ok(Look::NeedsWaker);
        };
        waiter.replaced = output.wait_for(target, until_ns, flusher);
        Ok(Look::Waits(until_ns))
    }
}

/// The task that polls. Cloning and dropping wakers is user code, so both are done without the
/// output lock.
struct Waiter<'a> {
    waker: &'a Waker,
    clone: Option<Waker>,
    /// The flush that was registered before.
    replaced: Option<Flusher>,
}

impl<'a> Waiter<'a> {
    fn new(cx: &Context<'a>) -> Waiter<'a> {
        Waiter { waker: cx.waker(), clone: None, replaced: None }
    }

    fn clone_waker(&mut self) {
        self.clone = Some(self.waker.clone());
    }
}

impl Drop for Waiter<'_> {
    fn drop(&mut self) {
        if let Some(clone) = self.clone.take() {
            user_code::discard(clone);
        }
        if let Some(replaced) = self.replaced.take() {
            user_code::discard(replaced);
        }
    }
}
