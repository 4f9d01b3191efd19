//! Waiting: the futures behind reads and flushes.
//!
//! They own no operation. Dropping one withdraws its registration and loses nothing.

use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use super::input::End;
use super::output::{Output, Submitted};
use super::shared::{Shared, flush_here, is_poller_of};
use crate::buffer::{Chain, Staging};
use crate::config::uring as config;
use crate::error::{Error, Result};
use crate::poller::timers::{NEVER, now_ns};
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
    let mut wait = Wait::new(shared);
    poll_fn(|cx| wait.poll_fill(reader, operation, bytes, cx)).await
}

/// Waits until connecting has ended, at most until `until_ns`. `None` is a timeout.
pub(super) async fn connected(shared: &Arc<Shared>, until_ns: u64) -> Option<std::io::Result<()>> {
    let _withdraw = Wait::new(shared);
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
        input.wait_for(usize::MAX, until_ns, cx);
        drop(input);
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
        input.wait_for(usize::MAX, NEVER, cx);
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
    let mut flush = Flush { target: None, started_ns: None };
    poll_fn(|cx| flush.poll(shared, staging, cx)).await
}

/// One flush.
struct Flush {
    /// Everything is handed over, and is in the kernel when so many bytes are.
    target: Option<u64>,
    started_ns: Option<u64>,
}

impl Flush {
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
                break self.wait(&mut output, target, shared, cx);
            }
            if self.target.is_some() {
                break Poll::Ready(Ok(()));
            }
        };
        drop(output);
        ask_if(shared, ask);
        match polled {
            Poll::Pending => {
                shared.arm(self.until_ns(shared));
                Poll::Pending
            }
            ready => ready,
        }
    }

    /// Registers for `target`, unless the wait is over already.
    fn wait(
        &mut self,
        output: &mut Output,
        target: u64,
        shared: &Arc<Shared>,
        cx: &Context<'_>,
    ) -> Poll<Result<()>> {
        if let Some(error) = output.failure() {
            return Poll::Ready(Err(Error::io("send", error)));
        }
        if shared.life.is_closed() {
            return Poll::Ready(Err(Error::closed("flush")));
        }
        let until_ns = self.until_ns(shared);
        // The clock is read only where somebody has set a time.
        if until_ns != NEVER {
            let now_ns = now_ns();
            if now_ns >= until_ns {
                let after = Duration::from_nanos(now_ns - self.started_ns.unwrap_or(now_ns));
                return Poll::Ready(Err(Error::write_timeout("flush", after)));
            }
        }
        let is_trial = task::mark_trial(cx.waker(), shared.owner());
        output.wait_for(target, until_ns, is_trial, cx);
        Poll::Pending
    }

    fn until_ns(&mut self, shared: &Shared) -> u64 {
        shared.timeouts.write.end_of_wait(|| *self.started_ns.get_or_insert_with(now_ns))
    }
}

/// Hands written bytes over; says whether the poller must be asked to send.
fn submit_to(
    output: &mut Output,
    shared: &Arc<Shared>,
    staging: &mut Staging,
) -> Result<(Submission, bool)> {
    if shared.life.is_closed() || output.ended {
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
    if shared.timeouts.watches_idle() {
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
    let token = shared.token();
    match &shared.remote.outlet {
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

/// One wait of a reader; withdraws its registration when it ends, however it ends. A forgotten one
/// would let the input grow to what it waited for.
struct Wait<'a> {
    shared: &'a Arc<Shared>,
    started_ns: Option<u64>,
}

impl<'a> Wait<'a> {
    fn new(shared: &'a Arc<Shared>) -> Wait<'a> {
        Wait { shared, started_ns: None }
    }

    fn poll_fill(
        &mut self,
        reader: &mut Chain,
        operation: &'static str,
        bytes: usize,
        cx: &Context<'_>,
    ) -> Poll<Result<()>> {
        let shared = self.shared;
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
            let started_ns = *self.started_ns.get_or_insert(now_ns);
            until_ns = shared.timeouts.read.end_of_wait(|| started_ns);
            let late = now_ns >= until_ns;
            late.then(|| {
                Err(Error::read_timeout(operation, Duration::from_nanos(now_ns - started_ns)))
            })
        };
        if done.is_none() {
            input.wait_for(bytes, until_ns, cx);
        }
        shared.resume_if_room(input, bytes);
        match done {
            Some(done) => Poll::Ready(done),
            None => {
                shared.arm(until_ns);
                Poll::Pending
            }
        }
    }
}

impl Drop for Wait<'_> {
    fn drop(&mut self) {
        drop(lock(&self.shared.input).take_waker());
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
