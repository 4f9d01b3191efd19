//! Waiting: what stands behind reads and flushes, as futures and as polls.
//!
//! A wait owns no operation, only when it began. A future keeps that to itself, and a read that is
//! dropped withdraws its registration. A poll method keeps it in the connection, from its first
//! poll to its last. It cannot know that it was given up, so its registration stays: it asks for no
//! more than one byte, or for output to leave, and the next wait replaces it.

use std::future::poll_fn;
use std::num::NonZeroU64;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use super::here::{flush_here, is_poller_of};
use super::input::End;
use super::output::{Flusher, Output, Submitted};
use super::run;
use super::shared::Shared;
use crate::buffer::{Chain, Staging};
use crate::clock::now_ns;
use crate::config::uring as config;
use crate::error::{Error, Result};
use crate::poller::timers::NEVER;
use crate::poller::{Command, Endpoint, Outlet, Socket, Token};
use crate::sync::atomic::Ordering;
use crate::sync::lock;
use crate::task;

/// Waits until `reader` has `bytes`, or nothing more will come.
#[cold]
pub(super) async fn fill(
    shared: &Arc<Shared>,
    reader: &mut Chain,
    operation: &'static str,
    bytes: usize,
) -> Result<()> {
    if bytes > shared.limits.read_bytes_max {
        return Err(Error::limit(format!(
            "{operation}: {bytes} bytes are more than the {} allowed",
            shared.limits.read_bytes_max
        )));
    }
    let _withdraw = Withdraw(shared);
    let mut began = Began::default();
    poll_fn(|cx| poll_fill(shared, reader, operation, bytes, &mut began, cx)).await
}

/// Waits until `reader` has a byte, or nothing more will come; from poll to poll.
pub(super) fn poll_readable(
    shared: &Arc<Shared>,
    reader: &mut Chain,
    began: &mut Began,
    cx: &Context<'_>,
) -> Poll<Result<()>> {
    let polled = poll_fill(shared, reader, "readable", 1, began, cx);
    if polled.is_ready() {
        began.forget();
    }
    polled
}

/// Waits until connecting has ended, at most until `until_ns`. `None` is a timeout.
pub(super) async fn connected(shared: &Arc<Shared>, until_ns: u64) -> Option<std::io::Result<()>> {
    let _withdraw = Withdraw(shared);
    poll_fn(|cx| {
        let mut input = lock(&shared.input);
        if let Some(result) = input.connected.take() {
            return Poll::Ready(Some(result));
        }
        if shared.life.is_closed() {
            return Poll::Ready(Some(Err(std::io::ErrorKind::NotConnected.into())));
        }
        if now_ns() >= until_ns {
            return Poll::Ready(None);
        }
        let replaced = input.wait_for(usize::MAX, until_ns, cx);
        drop(input);
        drop(replaced);
        shared.arm(until_ns);
        Poll::Pending
    })
    .await
}

/// Waits until the poller has let go of the socket.
pub(super) async fn removed(shared: &Arc<Shared>) {
    poll_fn(|cx| {
        let mut input = lock(&shared.input);
        if input.removed {
            return Poll::Ready(());
        }
        let replaced = input.wait_for(usize::MAX, NEVER, cx);
        drop(input);
        drop(replaced);
        Poll::Pending
    })
    .await;
}

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
pub(super) fn submit(shared: &Arc<Shared>, staging: &mut Staging) -> Result<Submission> {
    let (submission, ask) = submit_to(&mut lock(&shared.output), shared, staging)?;
    ask_if(shared, ask);
    Ok(submission)
}

/// Hands written bytes over, and waits until the kernel has every byte submitted so far.
pub(super) async fn flush(shared: &Arc<Shared>, staging: &mut Staging) -> Result<()> {
    let mut flush = Flush::default();
    poll_fn(|cx| flush.poll(shared, staging, cx)).await
}

/// The same from poll to poll; each covers what was written before it.
pub(super) fn poll_flush(
    shared: &Arc<Shared>,
    staging: &mut Staging,
    began: &mut Began,
    cx: &Context<'_>,
) -> Poll<Result<()>> {
    let mut flush = Flush { began: *began, ..Flush::default() };
    let polled = flush.poll(shared, staging, cx);
    *began = if polled.is_pending() { flush.began } else { Began::default() };
    polled
}

/// Waits until fewer than `output_bytes_max` bytes are on their way to the peer, those included
/// that are not handed over; says how many more may be written. From poll to poll.
pub(super) fn poll_room(
    shared: &Arc<Shared>,
    staging: &mut Staging,
    began: &mut Began,
    cx: &Context<'_>,
) -> Poll<Result<usize>> {
    let bytes_max = shared.limits.output_bytes_max as u64;
    let mut output = lock(&shared.output);
    if let Some(error) = output.failure() {
        return Poll::Ready(Err(Error::io("send", error)));
    }
    if shared.life.is_closed() || output.ended {
        return Poll::Ready(Err(Error::closed("write")));
    }
    let mut ask = false;
    if output.unsent() + staging.len() as u64 >= bytes_max {
        (_, ask) = submit_to(&mut output, shared, staging)?;
    }
    let room = bytes_max.saturating_sub(output.unsent() + staging.len() as u64);
    let registered = match room {
        0 => {
            let target = output.submitted() - bytes_max + 1;
            wait_for_sent(&mut output, target, shared, began, "write", cx).map(Some)
        }
        _ => Ok(None),
    };
    drop(output);
    ask_if(shared, ask);
    match registered {
        Ok(Some(_)) => {
            shared.arm(write_until_ns(shared, began));
            Poll::Pending
        }
        done => {
            began.forget();
            Poll::Ready(done.map(|_| room as usize))
        }
    }
}

/// Waits until nothing more can be sent; from poll to poll.
pub(super) fn poll_end(shared: &Arc<Shared>, cx: &Context<'_>) -> Poll<Error> {
    let mut output = lock(&shared.output);
    if let Some(error) = output.failure() {
        return Poll::Ready(Error::io("send", error));
    }
    if shared.life.is_closed() || output.ended {
        return Poll::Ready(Error::closed("write"));
    }
    // A flush that never comes: whoever closes, or fails, wakes it.
    let replaced = output.wait_for(u64::MAX, NEVER, false, cx);
    drop(output);
    drop(replaced);
    Poll::Pending
}

/// One flush.
#[derive(Default)]
struct Flush {
    /// Everything is handed over, and is in the kernel when so many bytes are.
    target: Option<u64>,
    began: Began,
}

impl Flush {
    #[inline(always)]
    fn poll(
        &mut self,
        shared: &Arc<Shared>,
        staging: &mut Staging,
        cx: &Context<'_>,
    ) -> Poll<Result<()>> {
        // Usually the poller has gone on with us because it is so.
        if self.target.is_some_and(|target| shared.sent.load(Ordering::Acquire) >= target) {
            return Poll::Ready(Ok(()));
        }
        let mut ask = false;
        let mut replaced = None;
        let mut output = lock(&shared.output);
        let polled = loop {
            let target = match self.target {
                Some(target) => target,
                None => match submit_to(&mut output, shared, staging) {
                    Ok((Submission::Sent, _)) => break Poll::Ready(Ok(())),
                    Ok((Submission::Queued(target), must_ask)) => {
                        ask = must_ask;
                        *self.target.insert(target)
                    }
                    // Not handed over: room comes first.
                    Ok((Submission::Full(target), _)) => target,
                    Err(error) => break Poll::Ready(Err(error)),
                },
            };
            if output.sent() < target {
                match wait_for_sent(&mut output, target, shared, &mut self.began, "flush", cx) {
                    Ok(flusher) => replaced = flusher,
                    Err(error) => break Poll::Ready(Err(error)),
                }
                break Poll::Pending;
            }
            if self.target.is_some() {
                break Poll::Ready(Ok(()));
            }
        };
        drop(output);
        drop(replaced);
        ask_if(shared, ask);
        if polled.is_pending() {
            shared.arm(write_until_ns(shared, &mut self.began));
        }
        polled
    }
}

/// Registers a writer until `target` bytes are sent, unless its wait is over already. Returns who
/// was registered before, to be dropped without the lock.
#[inline(never)]
fn wait_for_sent(
    output: &mut Output,
    target: u64,
    shared: &Arc<Shared>,
    began: &mut Began,
    operation: &'static str,
    cx: &Context<'_>,
) -> Result<Option<Flusher>> {
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
    let is_trial = task::mark_trial(cx.waker(), shared.owner());
    Ok(output.wait_for(target, until_ns, is_trial, cx))
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
) -> Result<(Submission, bool)> {
    // Once this side has ended there is nothing to do, but nothing more can be written either.
    if shared.life.is_closed() || (output.ended && !staging.is_empty()) {
        return Err(Error::closed("flush"));
    }
    if staging.is_empty() {
        let submission = match output.unsent() {
            0 => Submission::Sent,
            _ => Submission::Queued(output.submitted()),
        };
        return Ok((submission, false));
    }
    let unsent_max = shared.limits.output_bytes_max as u64;
    if output.unsent() >= unsent_max {
        return Ok((Submission::Full(output.submitted() - unsent_max + 1), false));
    }
    let counters = &shared.remote.counters;
    let done =
        output.submit(staging.sealed(), counters, |socket, bytes| leave(shared, socket, bytes));
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

/// One look of a reader that waits until it has `bytes`.
fn poll_fill(
    shared: &Arc<Shared>,
    reader: &mut Chain,
    operation: &'static str,
    bytes: usize,
    began: &mut Began,
    cx: &Context<'_>,
) -> Poll<Result<()>> {
    if shared.has_arrivals() {
        run::takes_in(shared);
    }
    let mut input = lock(&shared.input);
    input.refill(reader);
    shared.took_arrivals();
    let mut until_ns = NEVER;
    let done = if reader.len() >= bytes {
        Some(Ok(()))
    } else if shared.life.is_closed() && !matches!(input.end, Some(End::Memory)) {
        Some(Err(Error::closed(operation)))
    } else if let Some(end) = input.end {
        Some(Err(ended(operation, end, bytes, reader.len())))
    } else {
        let now_ns = now_ns();
        let began_ns = began.at_or(|| now_ns);
        until_ns = shared.timeouts.read.end_of_wait(|| began_ns);
        let late = now_ns >= until_ns;
        late.then(|| Err(Error::read_timeout(operation, began.elapsed(now_ns))))
    };
    let replaced = match done {
        Some(_) => None,
        None => input.wait_for(bytes, until_ns, cx),
    };
    shared.resume_if_room(input, bytes);
    drop(replaced);
    match done {
        Some(done) => Poll::Ready(done),
        None => {
            shared.arm(until_ns);
            Poll::Pending
        }
    }
}

/// When a wait began, on the clock of `now_ns`; nothing, while nobody had to know.
#[derive(Clone, Copy, Default)]
pub(super) struct Began(Option<NonZeroU64>);

impl Began {
    /// The wait is over.
    #[inline]
    pub(super) fn forget(&mut self) {
        self.0 = None;
    }

    fn at_or(&mut self, now_ns: impl FnOnce() -> u64) -> u64 {
        self.0.get_or_insert_with(|| NonZeroU64::MIN.saturating_add(now_ns())).get()
    }

    fn elapsed(self, now_ns: u64) -> Duration {
        Duration::from_nanos(self.0.map_or(0, |began_ns| now_ns.saturating_sub(began_ns.get())))
    }
}

/// Withdraws a reader's registration when its future ends, however it ends. A forgotten one would
/// let the input grow to what it waited for.
struct Withdraw<'a>(&'a Arc<Shared>);

impl Drop for Withdraw<'_> {
    fn drop(&mut self) {
        let waker = lock(&self.0.input).take_waker();
        drop(waker);
    }
}

fn ended(operation: &'static str, end: End, wanted_bytes: usize, left_bytes: usize) -> Error {
    match end {
        End::Eof => Error::eof(operation, wanted_bytes, left_bytes),
        End::Failed(kind, errno) => {
            let error = errno.map_or_else(|| kind.into(), std::io::Error::from_raw_os_error);
            Error::io(operation, error)
        }
        End::Memory => Error::limit(format!(
            "{operation}: the poller is out of memory, and {left_bytes} bytes exceed a fair share"
        )),
    }
}
