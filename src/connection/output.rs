//! Bytes going out.
//!
//! A flush sends on its own thread while nothing is queued ([`Sending::Idle`]); what the socket
//! does not take is queued and the poller asked to send it ([`Sending::Handed`]); later flushes
//! then only queue. So one sender at a time, and bytes never reorder. Guarded by the output lock,
//! which is held over the non-blocking send: that and closing are all it serialises.

use std::io;
use std::sync::Arc;
use std::task::{Context, Waker};

use crate::buffer::Chain;
use crate::config;
use crate::counters::Counters;
use crate::poller::timers::NEVER;
use crate::sys::socket::Socket;

pub(super) struct Output {
    /// Taken when the connection is finished or detached.
    pub(super) socket: Option<Arc<Socket>>,
    /// Submitted, not with the backend yet.
    queue: Option<Box<Chain>>,
    sending: Sending,
    submitted: u64,
    sent: u64,
    /// A flush that waits: until so many bytes are sent, by that time.
    wait: Option<Wait>,
    failed: Option<(io::ErrorKind, Option<i32>)>,
    /// The write side was ended on purpose.
    pub(super) ended: bool,
    /// Close when everything submitted is sent.
    pub(super) close_when_sent: bool,
    /// The socket is to outlive the connection.
    pub(super) detaching: bool,
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
    waker: Waker,
    until_ns: u64,
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
            close_when_sent: false,
            detaching: false,
        }
    }

    /// Sends `bytes` or queues them.
    pub(super) fn submit(
        &mut self,
        bytes: &mut Chain,
        counters: &Counters,
    ) -> io::Result<Submitted> {
        if let Some(error) = self.failure() {
            return Err(error);
        }
        self.submitted += bytes.len() as u64;
        if self.sending == Sending::Handed {
            self.queue.get_or_insert_default().append(bytes);
            return Ok(Submitted::Queued { ask: false });
        }
        match self.send_now(bytes, counters) {
            Ok(()) if bytes.is_empty() => Ok(Submitted::Sent),
            Ok(()) => {
                self.queue = Some(Box::new(bytes.take()));
                self.sending = Sending::Handed;
                Ok(Submitted::Queued { ask: true })
            }
            Err(error) => {
                bytes.clear();
                self.fail(&error);
                Err(error)
            }
        }
    }

    /// Sends what the socket takes now, up to one turn's worth.
    fn send_now(&mut self, bytes: &mut Chain, counters: &Counters) -> io::Result<()> {
        let Some(socket) = &self.socket else { return Err(io::ErrorKind::NotConnected.into()) };
        let mut turn_bytes = 0;
        while !bytes.is_empty() && turn_bytes < config::SEND_TURN_BYTES {
            let (asked, sent) = socket.send_chain(bytes, counters)?;
            turn_bytes += sent;
            self.sent += sent as u64;
            if sent < asked {
                // Short means full: asking again would only tell us so.
                break;
            }
        }
        Ok(())
    }

    /// Everything queued, for the backend.
    pub(super) fn take_queue(&mut self) -> Option<Chain> {
        self.queue.take().map(|queue| *queue)
    }

    /// The backend sent what it was given, or failed; returns the flush that waited for it.
    pub(super) fn on_sent(&mut self, result: io::Result<usize>) -> Option<Waker> {
        match result {
            Ok(bytes) => self.sent += bytes as u64,
            Err(error) => self.fail(&error),
        }
        if self.queue.is_none() {
            self.sending = Sending::Idle;
        }
        let sent = self.sent;
        let failed = self.failed.is_some();
        self.wait.take_if(|wait| failed || wait.sent <= sent).map(|wait| wait.waker)
    }

    /// The connection failed: nothing more will be sent. The queue is dropped.
    pub(super) fn fail(&mut self, error: &io::Error) {
        self.failed.get_or_insert((error.kind(), error.raw_os_error()));
        self.queue = None;
    }

    pub(super) fn failure(&self) -> Option<io::Error> {
        let (kind, errno) = self.failed?;
        Some(errno.map_or_else(|| kind.into(), io::Error::from_raw_os_error))
    }

    pub(super) fn wait_for(&mut self, sent: u64, until_ns: u64, cx: &Context<'_>) {
        self.wait = Some(Wait { sent, waker: cx.waker().clone(), until_ns });
    }

    /// Whom to wake if its wait is over at `now_ns`, otherwise when to look again.
    pub(super) fn timer(&mut self, now_ns: u64) -> (Option<Waker>, u64) {
        match self.wait.take_if(|wait| wait.until_ns <= now_ns) {
            Some(wait) => (Some(wait.waker), NEVER),
            None => (None, self.wait.as_ref().map_or(NEVER, |wait| wait.until_ns)),
        }
    }

    pub(super) fn is_waited_for(&self) -> bool {
        self.wait.is_some()
    }

    pub(super) fn take_waker(&mut self) -> Option<Waker> {
        self.wait.take().map(|wait| wait.waker)
    }

    /// Drops what is queued.
    pub(super) fn discard(&mut self) {
        self.queue = None;
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
