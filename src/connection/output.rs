//! Bytes going out, and the one place that hands them to the kernel or to the poller.
//!
//! One sender at a time, so bytes never reorder. While the output is [`Sending::Idle`], a flush
//! sends on its own thread, or leaves its bytes to the poller, as the backend's outlet says. Bytes
//! that the socket does not take are left to the poller in any case. From then on the output is
//! [`Sending::Handed`]: the poller has some bytes, and later flushes only queue behind them.
//! Guarded by the output lock, which is held over the non-blocking send.

use std::io;
use std::sync::Arc;
use std::task::Waker;

use super::core::Core;
use crate::buffer::{Chain, Spent, Staging};
use crate::clock::now_ns;
use crate::config;
use crate::error::{Error, Result};
use crate::poller::timers::NEVER;
use crate::poller::{Command, Outlet, Reaction, Socket, Token};
use crate::sys::socket::{SendTurn, TurnEnd};
use crate::user_code;

pub(super) struct Output {
    /// Taken when the connection is finished or detached.
    pub(super) socket: Option<Arc<Socket>>,
    /// Bytes submitted so far.
    submitted: u64,
    /// Bytes that the kernel has taken so far.
    sent: u64,
    sending: Sending,
    /// Submitted while the poller has other bytes of the connection.
    queue: Option<Box<Chain>>,
    /// The write side was ended on purpose.
    pub(super) ended: bool,
    pub(super) ending: Ending,
    /// The close callbacks have run.
    pub(super) finished: bool,
    /// The socket is to outlive the connection.
    pub(super) detaching: bool,
    failed: Option<(io::ErrorKind, Option<i32>)>,
    wait: Option<FlushWait>,
}

/// How far the end of a closed connection has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ending {
    /// Not closed.
    No,
    /// Closed, and bytes that were submitted before are still to be sent.
    Lingers,
    /// The socket has ended, and its poller was asked to let go of it.
    Ended,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sending {
    /// A flush may send.
    Idle,
    /// The poller sends.
    Handed,
}

/// A flush that waits until so many bytes are sent, but no longer than until that time.
struct FlushWait {
    sent: u64,
    flusher: Flusher,
    until_ns: u64,
}

/// What continues when a flush is done.
pub(super) enum Flusher {
    Task(Waker),
    /// The run that its poller polls, or keeps until the flush is done.
    Run,
}

impl Flusher {
    /// From any thread.
    pub(super) fn wake(self, core: &Arc<Core>) {
        match self {
            Flusher::Task(waker) => user_code::wake(waker),
            Flusher::Run => core.remote.send(Command::Continue(Arc::clone(core))),
        }
    }

    /// On the poller: adds the wake-up to what the round collects.
    pub(super) fn collect<H>(self, reaction: &mut Reaction<H>) {
        match self {
            Flusher::Task(waker) => reaction.flusher = Some(waker),
            Flusher::Run => reaction.continues = true,
        }
    }
}

/// The state of submitted bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Submitted {
    /// The kernel has every byte.
    Sent,
    /// The kernel will have every byte when so many are sent in all.
    Queued(u64),
    /// Nothing was submitted: too much waits for the peer, until so many are sent in all.
    Full(u64),
}

impl Output {
    pub(super) fn new(socket: Arc<Socket>) -> Output {
        Output {
            socket: Some(socket),
            submitted: 0,
            sent: 0,
            sending: Sending::Idle,
            queue: None,
            ended: false,
            ending: Ending::No,
            finished: false,
            detaching: false,
            failed: None,
            wait: None,
        }
    }

    /// Submits everything written. `shared` is the connection of this output.
    ///
    /// # Errors
    /// Closed; what the kernel failed with.
    #[inline(always)]
    pub(super) fn submit(
        &mut self,
        core: &Arc<Core>,
        staging: &mut Staging,
        spent: &mut Spent,
    ) -> Result<Submitted> {
        // After this side has ended, nothing more can be written, but an empty flush succeeds.
        if core.life.is_closed() || (self.ended && !staging.is_empty()) {
            return Err(Error::closed("flush"));
        }
        if staging.is_empty() && self.unsent() == 0 {
            return Ok(Submitted::Sent);
        }
        if let Some(error) = self.failure() {
            return Err(Error::io("send", error));
        }
        if staging.is_empty() {
            return Ok(Submitted::Queued(self.submitted));
        }
        let unsent_max = core.limits.output_bytes_max as u64;
        if self.unsent() >= unsent_max {
            return Ok(Submitted::Full(self.submitted - unsent_max + 1));
        }
        if core.idle_timeout.is_set() {
            core.timeouts.touch(now_ns());
        }
        let bytes = staging.sealed();
        self.submitted += bytes.len() as u64;
        if self.sending == Sending::Handed {
            self.queue.get_or_insert_default().append(bytes);
        } else if self.leave(core, bytes) {
            self.sending = Sending::Handed;
        } else {
            self.send_now(core, bytes, spent).map_err(|error| Error::io("send", error))?;
        }
        Ok(if self.unsent() == 0 { Submitted::Sent } else { Submitted::Queued(self.submitted) })
    }

    /// Takes `bytes` to where the poller's backend sends them without a system call of this thread:
    /// to a send ring, or to the outbox of a poller that is awake. `false`: `bytes` are left as
    /// they are.
    #[inline]
    fn leave(&mut self, core: &Arc<Core>, bytes: &mut Chain) -> bool {
        let (token, outlet) = (core.token(), &core.remote.outlet);
        let Some(socket) = &self.socket else { return false };
        match outlet {
            Outlet::Flusher => false,
            // The poller is about to give the connection a slot, and then takes the queue.
            _ if token == Token::NONE => {
                self.queue = Some(Box::new(bytes.take()));
                true
            }
            Outlet::Rings(rings) => rings.send(token, socket, bytes),
            // A large send is worth a system call: its bytes are still in the cache, and the peer
            // can start on them.
            Outlet::Poller => {
                bytes.len() <= config::uring::RING_SEND_BYTES_MAX
                    && core.remote.leave_if_awake(core, bytes)
            }
        }
    }

    /// Sends one turn's worth, and leaves the rest to the poller.
    #[inline(always)]
    fn send_now(
        &mut self,
        core: &Arc<Core>,
        bytes: &mut Chain,
        spent: &mut Spent,
    ) -> io::Result<()> {
        let turn = match &self.socket {
            Some(socket) => socket.send_turn(bytes, spent, &core.remote.counters),
            None => SendTurn { bytes: 0, end: Err(io::ErrorKind::NotConnected.into()) },
        };
        self.sent += turn.bytes as u64;
        match turn.end {
            Ok(TurnEnd::Done) => self.sending = Sending::Idle,
            Ok(TurnEnd::Full | TurnEnd::Unfinished) => {
                self.sending = Sending::Handed;
                if core.token() == Token::NONE {
                    // The poller takes the queue as it gives the connection a slot.
                    self.queue = Some(Box::new(bytes.take()));
                } else {
                    core.remote.leave(core, bytes.take());
                }
            }
            Err(error) => {
                bytes.spend(bytes.len(), spent);
                self.fail(&error, spent);
                return Err(error);
            }
        }
        Ok(())
    }

    /// Sends bytes that were left to a poller which is held up, and the queue behind them. Returns
    /// the flush that waited for them.
    pub(super) fn send_left(
        &mut self,
        core: &Arc<Core>,
        bytes: Chain,
        spent: &mut Spent,
    ) -> Option<Flusher> {
        let mut bytes = bytes;
        if let Some(mut queue) = self.queue.take() {
            bytes.append(&mut queue);
        }
        if self.failed.is_some() {
            bytes.spend(bytes.len(), spent);
        } else {
            // An error is kept, and the flush that waits finds it.
            let _ = self.send_now(core, &mut bytes, spent);
        }
        self.take_done()
    }

    /// Bytes that were submitted before the connection had a slot.
    pub(super) fn take_queue(&mut self) -> Option<Box<Chain>> {
        self.queue.take()
    }

    /// The poller has sent what it was given, or failed. Returns the flush that waited for it, and
    /// the bytes to send next.
    pub(super) fn on_sent(
        &mut self,
        result: io::Result<usize>,
        spent: &mut Spent,
    ) -> (Option<Flusher>, Option<Box<Chain>>) {
        match result {
            Ok(bytes) => self.sent += bytes as u64,
            Err(error) => self.fail(&error, spent),
        }
        let next = self.queue.take();
        if next.is_none() {
            self.sending = Sending::Idle;
        }
        (self.take_done(), next)
    }

    /// The flush that need not wait any longer.
    fn take_done(&mut self) -> Option<Flusher> {
        let (sent, has_failed) = (self.sent, self.failed.is_some());
        self.wait.take_if(|wait| has_failed || wait.sent <= sent).map(|wait| wait.flusher)
    }

    /// The connection failed: nothing more will be sent. The queue is dropped.
    pub(super) fn fail(&mut self, error: &io::Error, spent: &mut Spent) {
        self.failed.get_or_insert((error.kind(), error.raw_os_error()));
        if let Some(mut queue) = self.queue.take() {
            queue.spend(queue.len(), spent);
        }
    }

    pub(super) fn failure(&self) -> Option<io::Error> {
        let (kind, errno) = self.failed?;
        Some(errno.map_or_else(|| kind.into(), io::Error::from_raw_os_error))
    }

    /// Registers a flush that waits until `sent` bytes are sent. Returns the flush that was
    /// registered before, to be dropped without the lock.
    #[must_use]
    pub(super) fn wait_for(
        &mut self,
        sent: u64,
        until_ns: u64,
        flusher: Flusher,
    ) -> Option<Flusher> {
        self.wait.replace(FlushWait { sent, flusher, until_ns }).map(|replaced| replaced.flusher)
    }

    /// Changes what the registered task waits for, if `waker` wakes that task.
    pub(super) fn renew_wait(&mut self, sent: u64, until_ns: u64, waker: &Waker) -> bool {
        match &mut self.wait {
            Some(FlushWait { flusher: Flusher::Task(known), sent: old, until_ns: old_ns })
                if known.will_wake(waker) =>
            {
                (*old, *old_ns) = (sent, until_ns);
                true
            }
            _ => false,
        }
    }

    /// The flush whose time is up at `now_ns`, and otherwise when to ask again.
    pub(super) fn timer(&mut self, now_ns: u64) -> (Option<Flusher>, u64) {
        match self.wait.take_if(|wait| wait.until_ns <= now_ns) {
            Some(wait) => (Some(wait.flusher), NEVER),
            None => (None, self.wait.as_ref().map_or(NEVER, |wait| wait.until_ns)),
        }
    }

    pub(super) fn is_waited_for(&self) -> bool {
        self.wait.is_some()
    }

    pub(super) fn take_flusher(&mut self) -> Option<Flusher> {
        self.wait.take().map(|wait| wait.flusher)
    }

    pub(super) fn submitted(&self) -> u64 {
        self.submitted
    }

    pub(super) fn sent(&self) -> u64 {
        self.sent
    }

    pub(super) fn unsent(&self) -> u64 {
        self.submitted - self.sent
    }

    /// No byte is left that could still be sent.
    pub(super) fn is_settled(&self) -> bool {
        self.failed.is_some() || self.unsent() == 0
    }
}
