//! Flushing: what is written is handed over, and whoever wants to waits until the kernel has it.
//!
//! As a future and as polls; see [`wait`](super::wait) for what a wait owns.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use super::here::{flush_here, is_poller_of};
use super::output::{Flusher, Output, Submitted};
use super::shared::Shared;
use super::wait::Began;
use crate::buffer::{Chain, Spent, Staging};
use crate::clock::now_ns;
use crate::config::uring as config;
use crate::error::{Error, Result};
use crate::poller::timers::NEVER;
use crate::poller::{Command, Endpoint, Outlet, Socket, Token};
use crate::sync::atomic::Ordering;
use crate::sync::lock;
use crate::task;
use crate::user_code;

/// What became of a submission.
pub(super) enum Submission {
    /// The kernel has every byte.
    Sent,
    /// It will, when so many are sent in all.
    Queued(u64),
    /// Nothing was handed over: too much waits for the peer, until so many are sent in all.
    Full(u64),
}

/// Hands written bytes over.
#[inline(never)]
pub(super) fn submit(shared: &Arc<Shared>, staging: &mut Staging) -> Result<Submission> {
    submit_here(shared, staging)
}

#[inline(always)]
fn submit_here(shared: &Arc<Shared>, staging: &mut Staging) -> Result<Submission> {
    let mut spent = Spent::default();
    let (submission, ask) = submit_to(&mut lock(&shared.output), shared, staging, &mut spent)?;
    ask_if(shared, ask);
    Ok(submission)
}

/// Hands written bytes over, and waits until the kernel has every byte submitted so far.
pub(super) struct Flushing<'a> {
    shared: &'a Arc<Shared>,
    staging: &'a mut Staging,
    /// Once it has to wait.
    flush: Option<Flush>,
}

impl<'a> Flushing<'a> {
    #[inline]
    pub(super) fn new(shared: &'a Arc<Shared>, staging: &'a mut Staging) -> Flushing<'a> {
        Flushing { shared, staging, flush: None }
    }
}

impl Future for Flushing<'_> {
    type Output = Result<()>;

    // What is sent at once is part of the poll that this is inside of, as `Epoll::handle` is of its
    // loop, and for the same reason. Where others send, there is always something to wait for.
    #[inline(always)]
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<()>> {
        let this = self.get_mut();
        let flush = match &mut this.flush {
            Some(flush) => flush,
            None if matches!(this.shared.remote.outlet, Outlet::Flusher) => {
                let target = match submit_here(this.shared, this.staging) {
                    Ok(Submission::Sent) => return Poll::Ready(Ok(())),
                    Ok(Submission::Queued(target)) => Some(target),
                    // Not handed over: room comes first.
                    Ok(Submission::Full(_)) => None,
                    Err(error) => return Poll::Ready(Err(error)),
                };
                this.flush.insert(Flush { target, ..Flush::default() })
            }
            None => this.flush.insert(Flush::default()),
        };
        flush.poll(this.shared, this.staging, cx)
    }
}

/// The same from poll to poll; each covers what was written before it. Waits no longer than until
/// the kernel has all but `unsent_bytes_max` bytes.
pub(super) fn poll_flush(
    shared: &Arc<Shared>,
    staging: &mut Staging,
    unsent_bytes_max: usize,
    began: &mut Began,
    cx: &Context<'_>,
) -> Poll<Result<()>> {
    let unsent_max = unsent_bytes_max as u64;
    let mut flush = Flush { unsent_max, began: *began, ..Flush::default() };
    let polled = flush.poll(shared, staging, cx);
    *began = if polled.is_pending() { flush.began } else { Began::default() };
    polled
}

/// Polls for room to write, and returns the room in bytes. Unsent bytes are those written or
/// submitted that the kernel has not taken. There is room while fewer than `bytes_max` bytes, and
/// fewer than `output_bytes_max`, are unsent.
pub(super) fn poll_room(
    shared: &Arc<Shared>,
    staging: &mut Staging,
    bytes_max: usize,
    began: &mut Began,
    cx: &Context<'_>,
) -> Poll<Result<usize>> {
    // There is never room for less than a byte.
    let bytes_max = bytes_max.min(shared.limits.output_bytes_max).max(1) as u64;
    let (mut spent, mut waiter) = (Spent::default(), Waiter::new(cx));
    let polled = loop {
        let mut output = lock(&shared.output);
        if let Some(error) = output.failure() {
            break Poll::Ready(Err(Error::io("send", error)));
        }
        if shared.life.is_closed() || output.ended {
            break Poll::Ready(Err(Error::closed("write")));
        }
        let mut ask = false;
        if output.unsent() + staging.len() as u64 >= bytes_max {
            (_, ask) = submit_to(&mut output, shared, staging, &mut spent)?;
        }
        let room = bytes_max.saturating_sub(output.unsent() + staging.len() as u64);
        let registered = match room {
            0 => {
                let target = output.submitted() - bytes_max + 1;
                wait_for_sent(&mut output, target, shared, began, "write", &mut waiter)
            }
            _ => Ok(Registered::No),
        };
        drop(output);
        ask_if(shared, ask);
        match registered {
            Ok(Registered::NeedsWaker) => waiter.clone_waker(),
            Ok(Registered::Yes) => {
                shared.arm(write_until_ns(shared, began));
                return Poll::Pending;
            }
            done => break Poll::Ready(done.map(|_| room as usize)),
        }
    };
    began.forget();
    polled
}

/// Waits until nothing more can be sent; from poll to poll.
pub(super) fn poll_end(shared: &Arc<Shared>, cx: &Context<'_>) -> Poll<Error> {
    let waker = cx.waker().clone();
    let mut output = lock(&shared.output);
    if let Some(error) = output.failure() {
        return Poll::Ready(Error::io("send", error));
    }
    if shared.life.is_closed() || output.ended {
        return Poll::Ready(Error::closed("write"));
    }
    // A flush that never comes: whoever closes, or fails, wakes it.
    let replaced = output.wait_for(u64::MAX, NEVER, Flusher::Task(waker));
    drop(output);
    user_code::discard(replaced);
    Poll::Pending
}

/// One flush.
#[derive(Default)]
struct Flush {
    /// Set once everything is handed over: the total of sent bytes at which the flush is done.
    target: Option<u64>,
    /// How many of the submitted bytes may still be unsent when the flush is done.
    unsent_max: u64,
    began: Began,
}

impl Flush {
    #[inline(never)]
    fn poll(
        &mut self,
        shared: &Arc<Shared>,
        staging: &mut Staging,
        cx: &Context<'_>,
    ) -> Poll<Result<()>> {
        // The poller resumes a flush only after its bytes are sent, so this usually succeeds.
        if self.target.is_some_and(|target| shared.sent.load(Ordering::Acquire) >= target) {
            return Poll::Ready(Ok(()));
        }
        let (mut spent, mut waiter) = (Spent::default(), Waiter::new(cx));
        loop {
            let mut ask = false;
            let looked = {
                let mut output = lock(&shared.output);
                self.attempt(&mut output, shared, staging, &mut spent, &mut waiter, &mut ask)
            };
            ask_if(shared, ask);
            match looked {
                Ok(Registered::No) => return Poll::Ready(Ok(())),
                Ok(Registered::NeedsWaker) => waiter.clone_waker(),
                Ok(Registered::Yes) => {
                    shared.arm(write_until_ns(shared, &mut self.began));
                    return Poll::Pending;
                }
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }

    /// One attempt, with the output lock held. Returns `Registered::No` when the flush is done.
    /// Sets `ask` when the caller must ask the poller to send.
    fn attempt(
        &mut self,
        output: &mut Output,
        shared: &Arc<Shared>,
        staging: &mut Staging,
        spent: &mut Spent,
        waiter: &mut Waiter<'_>,
        ask: &mut bool,
    ) -> Result<Registered> {
        loop {
            let target = match self.target {
                Some(target) => target,
                None => match submit_to(output, shared, staging, spent)? {
                    (Submission::Sent, _) => return Ok(Registered::No),
                    (Submission::Queued(submitted), must_ask) => {
                        *ask = must_ask;
                        *self.target.insert(submitted.saturating_sub(self.unsent_max))
                    }
                    // Not handed over: room comes first.
                    (Submission::Full(target), _) => target,
                },
            };
            if output.sent() < target {
                return wait_for_sent(output, target, shared, &mut self.began, "flush", waiter);
            }
            if self.target.is_some() {
                return Ok(Registered::No);
            }
        }
    }
}

/// Whether a wait is registered.
enum Registered {
    /// There is nothing to wait for.
    No,
    Yes,
    /// Not yet: the caller must unlock, clone the waker, and try again.
    NeedsWaker,
}

/// The task that polls. Cloning and dropping wakers runs code of their user's, so both are done
/// without the output lock: before it is taken, and when this is dropped.
struct Waiter<'a> {
    waker: &'a Waker,
    clone: Option<Waker>,
    /// Who was registered before.
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

/// Registers a writer until `target` bytes are sent, unless its wait is over already. A run that
/// its poller tries keeps no waker, so that it need not become a task.
#[inline(never)]
fn wait_for_sent(
    output: &mut Output,
    target: u64,
    shared: &Arc<Shared>,
    began: &mut Began,
    operation: &'static str,
    waiter: &mut Waiter<'_>,
) -> Result<Registered> {
    if let Some(error) = output.failure() {
        return Err(Error::io("send", error));
    }
    if shared.life.is_closed() {
        return Err(Error::closed(operation));
    }
    let until_ns = write_until_ns(shared, began);
    // The clock is read only where somebody has set a time.
    if until_ns != NEVER {
        let now_ns = now_ns();
        if now_ns >= until_ns {
            return Err(Error::write_timeout(operation, began.elapsed(now_ns)));
        }
    }
    let flusher = if task::mark_trial(waiter.waker, shared.owner()) {
        Flusher::Run
    } else if output.renew_wait(target, until_ns, waiter.waker) {
        return Ok(Registered::Yes);
    } else if let Some(clone) = waiter.clone.take() {
        Flusher::Task(clone)
    } else {
        return Ok(Registered::NeedsWaker);
    };
    waiter.replaced = output.wait_for(target, until_ns, flusher);
    Ok(Registered::Yes)
}

fn write_until_ns(shared: &Shared, began: &mut Began) -> u64 {
    shared.timeouts.write.end_of_wait(|| began.at_or(now_ns))
}

/// Hands written bytes over; says whether the poller must be asked to send.
#[inline(always)]
fn submit_to(
    output: &mut Output,
    shared: &Arc<Shared>,
    staging: &mut Staging,
    spent: &mut Spent,
) -> Result<(Submission, bool)> {
    // Once this side has ended there is nothing to do, but nothing more can be written either.
    if shared.life.is_closed() || (output.ended && !staging.is_empty()) {
        return Err(Error::closed("flush"));
    }
    if staging.is_empty() {
        if output.unsent() == 0 {
            return Ok((Submission::Sent, false));
        }
        return match output.failure() {
            // What was handed over before is lost.
            Some(error) => Err(Error::io("send", error)),
            None => Ok((Submission::Queued(output.submitted()), false)),
        };
    }
    let unsent_max = shared.limits.output_bytes_max as u64;
    if output.unsent() >= unsent_max {
        return Ok((Submission::Full(output.submitted() - unsent_max + 1), false));
    }
    let counters = &shared.remote.counters;
    let leave = |socket: &_, bytes: &mut _| leave(shared, socket, bytes);
    let done = output.submit(staging.sealed(), spent, counters, leave);
    if shared.idle_timeout.is_set() {
        shared.timeouts.touch(now_ns());
    }
    match done {
        Ok(Submitted::Sent) => Ok((Submission::Sent, false)),
        Ok(Submitted::Queued { ask }) => Ok((Submission::Queued(output.submitted()), ask)),
        Err(error) => Err(Error::io("send", error)),
    }
}

/// Asks the poller to send, if that is called for; without the output lock.
#[inline]
fn ask_if(shared: &Arc<Shared>, ask: bool) {
    if ask {
        shared.remote.send(Command::Send(Arc::clone(shared)));
    }
}

/// Sends bytes as the poller's backend wants it, if that takes no system call: through a send ring;
/// or, on the poller's own thread, by taking them to where it finds them after the handlers;
/// elsewhere, if it is awake, by asking it to look at the queue. Called with the output lock held,
/// so it looks after us. What is not taken is left in `bytes`.
#[inline]
fn leave(shared: &Arc<Shared>, socket: &Arc<Socket>, bytes: &mut Chain) -> bool {
    match &shared.remote.outlet {
        Outlet::Flusher => false,
        outlet => leave_to(outlet, shared, socket, bytes),
    }
}

/// The rest of [`leave`], out of the way of those that send by themselves.
#[inline(never)]
fn leave_to(
    outlet: &Outlet,
    shared: &Arc<Shared>,
    socket: &Arc<Socket>,
    bytes: &mut Chain,
) -> bool {
    let token = shared.token();
    match outlet {
        Outlet::Flusher => return false,
        Outlet::Rings(rings) if token != Token::NONE => return rings.send(token, socket, bytes),
        // A large send is worth a system call: its bytes are still in the cache, and the peer can
        // start on them.
        Outlet::Poller if bytes.len() > config::RING_SEND_BYTES_MAX => return false,
        Outlet::Poller if token != Token::NONE && is_poller_of(shared) => {
            if !shared.remote.take_over(shared, bytes) {
                flush_here(token, bytes.take());
            }
            return true;
        }
        Outlet::Poller | Outlet::Rings(_) => {}
    }
    if shared.remote.is_held_up() {
        return false;
    }
    shared.remote.send_if_awake(Command::Send(Arc::clone(shared)))
}

/// What `submit` fails with where `flush` waits.
pub(super) fn full(shared: &Shared) -> Error {
    Error::limit(format!(
        "submit: {} bytes wait for the peer already",
        shared.limits.output_bytes_max
    ))
}
