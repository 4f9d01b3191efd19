//! Submitted bytes, and the one place that passes them to the kernel or to the poller.
//!
//! Only one thread sends at a time, so bytes never reorder. While the output is [`Sending::Idle`],
//! a flush sends on its own thread, or leaves its bytes to the poller; the backend's outlet
//! decides. Bytes that the socket does not take are left to the poller. From then on the output is
//! [`Sending::ByPoller`]: the poller has some bytes, and later flushes queue behind them. All of
//! [`Output`] is guarded by the output lock, which is held during the non-blocking send.

use std::io::{self, IoSlice};
use std::sync::Arc;
use std::task::Waker;

use super::core::Core;
use super::input::End;
use super::timeout::Stall;
use crate::buffer::{Chain, Spent, Staging};
use crate::clock::now_ns;
use crate::config::{self, Limits};
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
    /// A thread of `unblock` sends from a file, without the lock.
    pub(super) sends_file: bool,
    /// Submitted while the poller has other bytes of the connection.
    queue: Option<Box<Chain>>,
    /// The user has ended this side of the stream.
    pub(super) ended: bool,
    pub(super) ending: Ending,
    /// The close callbacks have run.
    pub(super) finished: bool,
    /// `detach` is under way: the socket must stay open.
    pub(super) detaching: bool,
    failed: Option<(io::ErrorKind, Option<i32>)>,
    wait: Option<FlushWait>,
    /// Ends waits of flushes while the peer takes no byte. Boxed, because few connections have it.
    pub(super) stall: Option<Box<Stall>>,
}

/// How far the end of a closed connection has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ending {
    /// Not closed.
    No,
    /// Closed, and submitted bytes are not sent yet.
    Lingers,
    /// The socket has ended, and the poller was asked to remove the connection.
    Ended,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sending {
    /// A flush may send.
    Idle,
    /// The poller sends.
    ByPoller,
}

/// A flush that waits until `sent` bytes are sent in all, or until `until_ns`.
struct FlushWait {
    sent: u64,
    flusher: Flusher,
    until_ns: u64,
}

/// What is woken when a flush is done.
pub(super) enum Flusher {
    Task(Waker),
    /// The run that its poller polls, or keeps until the flush is done.
    Run,
}

impl Flusher {
    /// Wakes the task or the run, from any thread.
    pub(super) fn wake(self, core: &Arc<Core>) {
        match self {
            Flusher::Task(waker) => user_code::wake(waker),
            Flusher::Run => core.remote.send(Command::Continue(Arc::clone(core))),
        }
    }

    /// Adds the wake-up to the reaction of this round. On the poller.
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
    /// The flush is done when this many bytes are sent in all.
    Queued(u64),
    /// Nothing was submitted, because too many bytes are unsent. There is room when this many bytes
    /// are sent in all.
    Full(u64),
}

impl Output {
    pub(super) fn new(socket: Arc<Socket>, limits: &Limits) -> Output {
        Output {
            socket: Some(socket),
            submitted: 0,
            sent: 0,
            sending: Sending::Idle,
            sends_file: false,
            queue: None,
            ended: false,
            ending: Ending::No,
            finished: false,
            detaching: false,
            failed: None,
            wait: None,
            stall: Stall::new(limits.write_stall_timeout),
        }
    }

    /// Submits all written bytes. `core` is the connection of this output.
    ///
    /// # Errors
    /// Closed. An error of the kernel.
    #[inline(always)]
    pub(super) fn submit(
        &mut self,
        core: &Arc<Core>,
        staging: &mut Staging,
        spent: &mut Spent,
    ) -> Result<Submitted> {
        // Only an empty flush succeeds after this side has ended.
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
        if self.sending == Sending::ByPoller {
            self.queue.get_or_insert_default().append(bytes);
        } else if self.leave(core, bytes) {
            self.sending = Sending::ByPoller;
        } else {
            self.send_now(core, bytes, spent).map_err(|error| Error::io("send", error))?;
        }
        Ok(if self.unsent() == 0 { Submitted::Sent } else { Submitted::Queued(self.submitted) })
    }

    /// Sends `pieces`, memory of the caller, if no other byte is unsent and the calling thread may
    /// send. Returns how many bytes the kernel took, which may be none. `core` is the connection of
    /// this output.
    ///
    /// # Errors
    /// Closed. An error of the kernel.
    pub(super) fn send_pieces(
        &mut self,
        core: &Arc<Core>,
        pieces: &[IoSlice<'_>],
        spent: &mut Spent,
    ) -> Result<usize> {
        if core.life.is_closed() || self.ended {
            return Err(Error::closed("write"));
        }
        if let Some(error) = self.failure() {
            return Err(Error::io("send", error));
        }
        if self.sending == Sending::ByPoller || self.unsent() > 0 {
            return Ok(0);
        }
        let Some(socket) = &self.socket else { return Err(Error::closed("write")) };
        match socket.send_pieces(pieces, &core.remote.counters) {
            Ok(bytes) => {
                self.sent_directly(core, bytes as u64);
                Ok(bytes)
            }
            Err(error) => {
                self.fail(&error, spent);
                Err(Error::io("send", error))
            }
        }
    }

    /// Leaves `bytes` where the backend sends them without a system call of this thread: in a send
    /// ring, or in the outbox of a poller that is awake. `false`: nothing was taken from `bytes`.
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
            // can start on them. A zero-copy send needs the ring.
            Outlet::Poller(rule) => {
                let is_for_ring = bytes.len() <= config::uring::RING_SEND_BYTES_MAX
                    || socket.suits_zero_copy(bytes.len(), rule, &core.remote.counters);
                is_for_ring && core.remote.leave_if_awake(core, bytes)
            }
        }
    }

    /// Sends the bytes that the socket takes now, about `SEND_TURN_BYTES` at most, and leaves the
    /// rest to the poller.
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
                self.sending = Sending::ByPoller;
                if core.token() == Token::NONE {
                    // The poller takes the queue when it gives the connection a slot.
                    self.queue = Some(Box::new(bytes.take()));
                } else {
                    let left = core.remote.leave(core, bytes.take());
                    if let Err(mut lost) = left {
                        lost.spend(lost.len(), spent);
                    }
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

    /// Sends bytes that were left to a poller that is held up, then the queue. Returns the flush
    /// that is done by this.
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
            // `send_now` keeps the error, and the waiting flush finds it.
            let _ = self.send_now(core, &mut bytes, spent);
        }
        self.take_done()
    }

    /// Bytes that were submitted before the connection had a slot.
    pub(super) fn take_queue(&mut self) -> Option<Box<Chain>> {
        self.queue.take()
    }

    /// The poller has sent the bytes that it had, or has failed. Returns the flush that is done by
    /// this, and the bytes to send next.
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

    /// Takes the registered flush if it is done or has failed.
    fn take_done(&mut self) -> Option<Flusher> {
        let (sent, has_failed) = (self.sent, self.failed.is_some());
        self.wait.take_if(|wait| has_failed || wait.sent <= sent).map(|wait| wait.flusher)
    }

    /// Counts bytes that the kernel took past this output, while the output had no unsent byte.
    pub(super) fn sent_directly(&mut self, core: &Core, bytes: u64) {
        if bytes > 0 && core.idle_timeout.is_set() {
            core.timeouts.touch(now_ns());
        }
        self.submitted += bytes;
        self.sent += bytes;
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

    /// Why nothing more will be received, if a receive has found the end of the stream: that end,
    /// or the failure of the connection that a send has got. `None`: a send under way may have got
    /// it. A reset that follows the end of the peer's stream is another error (`EPIPE`), and the
    /// end stays an end.
    pub(super) fn end_of_stream(&self) -> Option<End> {
        let is_over = || {
            let socket = self.socket.as_ref();
            socket.is_some_and(|socket| socket.is_over().unwrap_or(false))
        };
        match self.failed {
            Some((io::ErrorKind::BrokenPipe, _)) => Some(End::Eof),
            Some((kind, errno)) if kind == io::ErrorKind::ConnectionReset || is_over() => {
                Some(End::Failed(kind, errno))
            }
            None if (self.sending == Sending::ByPoller || self.sends_file) && !self.ended => {
                (!is_over()).then_some(End::Eof)
            }
            _ => Some(End::Eof),
        }
    }

    /// Registers a flush that waits until `sent` bytes are sent. Returns the flush registered
    /// before, which the caller drops without the lock.
    #[must_use]
    pub(super) fn wait_for(
        &mut self,
        sent: u64,
        until_ns: u64,
        flusher: Flusher,
    ) -> Option<Flusher> {
        self.wait.replace(FlushWait { sent, flusher, until_ns }).map(|replaced| replaced.flusher)
    }

    /// Changes the target and the end of the registered wait, if `waker` wakes the same task.
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

    /// The flush whose wait ends by `now_ns`, otherwise the time of the next check.
    pub(super) fn timer(&mut self, now_ns: u64) -> (Option<Flusher>, u64) {
        match self.wait.take_if(|wait| wait.until_ns <= now_ns) {
            Some(wait) => (Some(wait.flusher), NEVER),
            None => (None, self.wait.as_ref().map_or(NEVER, |wait| wait.until_ns)),
        }
    }

    /// When a flush that waits since `began_ns` must look again because of the stall timeout.
    ///
    /// # Errors
    /// Write timeout: the peer has taken no byte for too long.
    pub(super) fn end_of_stall(
        &mut self,
        operation: &str,
        began_ns: u64,
        now_ns: u64,
    ) -> Result<u64> {
        let Some(stall) = &mut self.stall else { return Ok(NEVER) };
        if now_ns >= stall.next_ns(began_ns) {
            let taken = self.socket.as_ref().and_then(|socket| socket.taken_by_peer().ok());
            stall.note(now_ns, self.sent, taken.map(|taken| (taken.mark, taken.age)));
        }
        match stall.end_ns(began_ns) {
            end_ns if end_ns > now_ns => Ok(stall.next_ns(began_ns)),
            _ => Err(Error::write_stall(operation, stall.after())),
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

    /// Whether no byte is left that could still be sent.
    pub(super) fn is_settled(&self) -> bool {
        self.failed.is_some() || self.unsent() == 0
    }
}
