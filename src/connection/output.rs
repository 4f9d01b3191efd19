//! Bytes going out.
//!
//! One sender at a time, so bytes never reorder. While nothing is queued ([`Sending::Idle`]) a
//! flush sends on its own thread, or leaves its bytes to the poller, as the backend's outlet says;
//! what the socket does not take is left to the poller in any case. From then on the poller sends
//! ([`Sending::Handed`]), or whoever has taken from it what it was left and has not come to; later
//! flushes only queue. Guarded by the output lock, which is held
//! over the non-blocking send: that and closing are all it serialises.

use std::io;
use std::sync::Arc;
use std::task::Waker;

use crate::buffer::{Chain, Spent};
use crate::config;
use crate::counters::Counters;
use crate::poller::timers::NEVER;
use crate::poller::{Batch, Command};
use crate::sys::socket::Socket;
use crate::user_code;

use super::shared::Shared;

/// In this order, so that what every request needs lies together.
#[repr(C)]
pub(super) struct Output {
    /// Taken when the connection is finished or detached.
    pub(super) socket: Option<Arc<Socket>>,
    submitted: u64,
    sent: u64,
    /// Submitted, not with the backend yet.
    queue: Option<Box<Chain>>,
    sending: Sending,
    /// The write side was ended on purpose.
    pub(super) ended: bool,
    pub(super) ending: Ending,
    /// The close callbacks have run.
    pub(super) finished: bool,
    /// The socket is to outlive the connection.
    pub(super) detaching: bool,
    failed: Option<(io::ErrorKind, Option<i32>)>,
    /// A flush that waits: until so many bytes are sent, by that time.
    wait: Option<Wait>,
}

/// How far the end of a closed connection has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ending {
    /// Not closed.
    No,
    /// Closed, and what was submitted before is still to be sent.
    Lingers,
    /// The socket has ended, and its poller was asked to let go of it.
    Ended,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sending {
    /// Nothing is queued; the flusher may send.
    Idle,
    /// The poller sends.
    Handed,
}

struct Wait {
    sent: u64,
    flusher: Flusher,
    until_ns: u64,
}

/// Who waits for a flush.
pub(super) enum Flusher {
    Task(Waker),
    /// The run that its poller tries, or has kept.
    Run,
}

impl Flusher {
    /// From any thread.
    pub(super) fn wake(self, shared: &Arc<Shared>) {
        match self {
            Flusher::Task(waker) => user_code::wake(waker),
            Flusher::Run => shared.remote.send(Command::Continue(Arc::clone(shared))),
        }
    }

    /// On the poller, with what the round collects.
    pub(super) fn file(self, shared: &Arc<Shared>, batch: &mut Batch<Shared>) {
        match self {
            Flusher::Task(waker) => batch.wakers.push(waker),
            Flusher::Run => batch.go_on(shared),
        }
    }
}

/// What became of submitted bytes.
#[derive(Debug)]
pub(super) enum Submitted {
    /// The kernel has them all.
    Sent,
    /// The poller will send them; it must be asked to, if `ask`.
    Queued { ask: bool },
}

impl Output {
    pub(super) fn new(socket: Arc<Socket>) -> Output {
        Output {
            socket: Some(socket),
            queue: None,
            sending: Sending::Idle,
            submitted: 0,
            sent: 0,
            wait: None,
            failed: None,
            ended: false,
            ending: Ending::No,
            finished: false,
            detaching: false,
        }
    }

    /// Takes `bytes` in. While nothing is queued, `leave` may take them from here to the poller by
    /// itself (`true`); otherwise they are sent, or queued.
    #[inline(always)]
    pub(super) fn submit(
        &mut self,
        bytes: &mut Chain,
        spent: &mut Spent,
        counters: &Counters,
        leave: impl FnOnce(&Arc<Socket>, &mut Chain) -> bool,
    ) -> io::Result<Submitted> {
        if let Some(error) = self.failure() {
            return Err(error);
        }
        self.submitted += bytes.len() as u64;
        if self.sending == Sending::Handed {
            return Ok(self.append(bytes, false));
        }
        if self.socket.as_ref().is_some_and(|socket| leave(socket, bytes)) {
            return Ok(self.append(bytes, false));
        }
        match self.send_now(bytes, spent, counters) {
            Ok(()) if bytes.is_empty() => Ok(Submitted::Sent),
            Ok(()) => Ok(self.append(bytes, true)),
            Err(error) => {
                bytes.spend(bytes.len(), spent);
                self.fail(&error, spent);
                Err(error)
            }
        }
    }

    /// Leaves `bytes`, if there are any, behind what is with the poller; it must be asked to send
    /// them, if `ask`.
    #[inline(never)]
    fn append(&mut self, bytes: &mut Chain, ask: bool) -> Submitted {
        self.sending = Sending::Handed;
        if !bytes.is_empty() {
            self.queue.get_or_insert_default().append(bytes);
        }
        Submitted::Queued { ask }
    }

    /// Sends what the socket takes now, up to one turn's worth.
    #[inline(always)]
    fn send_now(
        &mut self,
        bytes: &mut Chain,
        spent: &mut Spent,
        counters: &Counters,
    ) -> io::Result<()> {
        let Some(socket) = &self.socket else { return Err(io::ErrorKind::NotConnected.into()) };
        let mut turn_bytes = 0;
        while !bytes.is_empty() && turn_bytes < config::SEND_TURN_BYTES {
            let (asked, sent) = socket.send_chain(bytes, spent, counters)?;
            turn_bytes += sent;
            self.sent += sent as u64;
            if sent < asked {
                // Short means full: asking again would only tell us so.
                break;
            }
        }
        Ok(())
    }

    /// Sends what was left to a poller that has not taken it yet: `first`, then the queue. Whom to
    /// wake, and whether the poller must be asked to send the rest.
    pub(super) fn send_queue(
        &mut self,
        first: Chain,
        spent: &mut Spent,
        counters: &Counters,
    ) -> (Option<Flusher>, bool) {
        let mut bytes = first;
        if let Some(mut queue) = self.queue.take() {
            bytes.append(&mut queue);
        }
        if self.failed.is_none()
            && let Err(error) = self.send_now(&mut bytes, spent, counters)
        {
            self.fail(&error, spent);
        }
        if self.failed.is_some() {
            bytes.spend(bytes.len(), spent);
        } else if !bytes.is_empty() {
            self.queue = Some(Box::new(bytes));
        }
        // Nothing is with the backend.
        (self.on_sent(Ok(0), spent), self.queue.is_some())
    }

    pub(super) fn has_queue(&self) -> bool {
        self.queue.is_some()
    }

    /// Everything queued, for the backend.
    pub(super) fn take_queue(&mut self) -> Option<Chain> {
        self.queue.take().map(|queue| *queue)
    }

    /// The backend sent what it was given, or failed; returns the flush that waited for it.
    pub(super) fn on_sent(
        &mut self,
        result: io::Result<usize>,
        spent: &mut Spent,
    ) -> Option<Flusher> {
        match result {
            Ok(bytes) => self.sent += bytes as u64,
            Err(error) => self.fail(&error, spent),
        }
        if self.queue.is_none() {
            self.sending = Sending::Idle;
        }
        let sent = self.sent;
        let failed = self.failed.is_some();
        self.wait.take_if(|wait| failed || wait.sent <= sent).map(|wait| wait.flusher)
    }

    /// The connection failed: nothing more will be sent. The queue is dropped.
    #[cold]
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

    /// Registers the one that waits until `sent` bytes are sent. Returns who was registered before,
    /// to be dropped without the lock.
    #[must_use]
    pub(super) fn wait_for(
        &mut self,
        sent: u64,
        until_ns: u64,
        flusher: Flusher,
    ) -> Option<Flusher> {
        self.wait.replace(Wait { sent, flusher, until_ns }).map(|replaced| replaced.flusher)
    }

    /// Changes what the registered task waits for, if it is the one that `waker` wakes.
    pub(super) fn renew_wait(&mut self, sent: u64, until_ns: u64, waker: &Waker) -> bool {
        match &mut self.wait {
            Some(Wait { flusher: Flusher::Task(known), sent: old, until_ns: old_ns })
                if known.will_wake(waker) =>
            {
                (*old, *old_ns) = (sent, until_ns);
                true
            }
            _ => false,
        }
    }

    /// Who is to look again if its wait is over at `now_ns`, otherwise when to ask again.
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

    /// Nothing is left that could still be sent.
    pub(super) fn is_settled(&self) -> bool {
        self.failed.is_some() || self.unsent() == 0
    }
}
