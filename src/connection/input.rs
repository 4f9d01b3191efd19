//! Received bytes.
//!
//! A run that starts gets the reader, with all bytes that are unread. While a run has the reader,
//! the poller files bytes into `inbox`. The same holds for a connection without a server, whose
//! user always has the reader. The holder of the reader takes the whole inbox, and then reads
//! without a lock. All of [`Input`] is guarded by the input lock. A waker is called only after
//! unlocking.

use std::io;
use std::task::Waker;

use crate::buffer::{Chain, Pool, Staging};
use crate::config::{DIRECT_BYTES_MIN, Limits};
use crate::poller::Received;
use crate::poller::timers::NEVER;

use super::direct::Direct;
use super::parts;
use super::state::{Kind, READER, Runs};

pub(super) struct Input {
    pub(super) runs: Runs,
    /// Bytes ever received.
    pub(super) received: u64,
    /// How many bytes the reader has. While a run has the reader, this is the number when the
    /// reader last took the inbox; the run may have consumed some since.
    held_bytes: usize,
    /// The reader with its unread bytes, while no run has it, or while the run that has it waits in
    /// a queue.
    reader: Option<Box<Chain>>,
    /// The writer with bytes that the last run did not submit, while no run has it, or while the
    /// run that has it waits in a queue.
    writer: Option<Box<Staging>>,
    /// Bytes that came while a run has the reader.
    inbox: Option<Box<Chain>>,
    /// Whether there is a handler for requests. If so, bytes start a run when no run is active.
    pub(super) serves: bool,
    /// The poller has given up the slot.
    pub(super) removed: bool,
    /// The peer has gone during `on_connect`. `on_disconnect` is called after it.
    disconnect_owed: bool,
    /// Set while the server shuts down: the kernel had bytes for this connection, and the poller
    /// has received none since.
    pub(super) expects_request: bool,
    /// The peer has ended its side. Bytes may be left in the kernel while reception is paused.
    hung_up: bool,
    /// Why nothing more will be received; `None` while more may come.
    pub(super) end: Option<End>,
    pub(super) wait: Option<Wait>,
    /// Who receives.
    pub(super) direct: Direct,
    /// How often the reader has begun to receive by itself.
    pub(super) direct_number: u32,
    /// The reader found many bytes in the inbox the last time.
    pub(super) took_many: bool,
    pub(super) dial: Dial,
}

/// How far the connect of a dialled connection has come.
pub(super) enum Dial {
    /// No connect was begun, or its result was taken.
    None,
    Begun,
    Ended(io::Result<()>),
}

/// A reader that waits.
pub(super) struct Wait {
    /// How many bytes the reader wants, those it already has included.
    bytes: usize,
    waker: Waker,
    /// When the wait ends.
    pub(super) until_ns: u64,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum End {
    /// The peer finished its side.
    Eof,
    /// The kernel reported this error.
    Failed(io::ErrorKind, Option<i32>),
    /// The poller is short of memory, and this reader waits for more than its share.
    Memory,
}

/// See [`Input::discard`].
pub(super) type Discarded = (Option<Box<Chain>>, Option<Box<Chain>>, Option<Box<Staging>>);

/// The reader and the writer that a run starts with. The run begins later. Bytes that come until
/// then are in the inbox.
pub(crate) struct Started {
    pub(super) kind: Kind,
    pub(super) reader: Box<Chain>,
    /// `None` if the last run left no bytes in it.
    pub(super) writer: Option<Box<Staging>>,
}

/// What the poller does after filing bytes, or the end.
#[derive(Default)]
pub(super) struct Filed {
    pub(super) wake: Option<Waker>,
    /// A run has started for the end.
    pub(super) run: Option<Started>,
    pub(super) pause: bool,
    /// Close the connection: there are no bytes to read, and no more will come.
    pub(super) close: bool,
    /// Close the connection: it holds more than its share and waits for more.
    pub(super) over_share: bool,
}

impl Input {
    pub(super) fn new(serves: bool) -> Input {
        Input {
            inbox: None,
            received: 0,
            held_bytes: 0,
            wait: None,
            end: None,
            runs: Runs::Idle,
            removed: false,
            hung_up: false,
            serves,
            reader: None,
            writer: None,
            disconnect_owed: false,
            expects_request: false,
            direct: Direct::Off,
            direct_number: 0,
            took_many: false,
            dial: Dial::None,
        }
    }

    /// Whether received bytes start a run.
    #[inline]
    pub(super) fn may_start(&self) -> bool {
        self.serves && self.runs == Runs::Idle
    }

    /// Takes the result of the connect, once that has ended.
    pub(super) fn take_dialled(&mut self) -> Option<io::Result<()>> {
        match std::mem::replace(&mut self.dial, Dial::None) {
            Dial::Ended(result) => Some(result),
            other => {
                self.dial = other;
                None
            }
        }
    }

    /// No run is active, and none will start for bytes that have come.
    pub(super) fn is_idle(&self) -> bool {
        self.runs == Runs::Idle && self.buffered_bytes() == 0 && !self.expects_request
    }

    /// Starts a run with the received bytes, and with the bytes left unread before.
    #[inline]
    pub(super) fn start_with(&mut self, bytes: Received<'_>, pool: &Pool) -> Started {
        self.expects_request = false;
        let reader = self.reader.get_or_insert_with(parts::reader);
        self.received += add(bytes, reader, pool) as u64;
        self.held_bytes = reader.len();
        self.start(Kind::Request)
    }

    /// Files received bytes into the inbox, while a run has the reader.
    pub(super) fn file(
        &mut self,
        bytes: Received<'_>,
        pool: &Pool,
        limits: &Limits,
        share_bytes: Option<usize>,
    ) -> Filed {
        self.expects_request = false;
        let inbox = self.inbox.get_or_insert_with(parts::reader);
        self.received += add(bytes, inbox, pool) as u64;
        let buffered = self.buffered_bytes();
        let waits_on = self.wait.as_ref().map(|wait| buffered < wait.bytes);
        if waits_on != Some(false) {
            // These bytes wake no reader, or the reader's handler may drop its wait without taking
            // them. Note them, so that another run follows.
            self.runs.on_news();
        }
        if waits_on == Some(true) {
            let over_share = share_bytes.is_some_and(|share| buffered > share);
            return Filed { over_share, ..Filed::default() };
        }
        let pause = buffered >= limits.input_bytes_max(share_bytes);
        Filed { wake: self.take_waker(), pause, ..Filed::default() }
    }

    /// Notes the end. Returns the waker of a waiting reader, and the run that starts for the end,
    /// if any.
    pub(super) fn end(&mut self, end: End) -> Filed {
        self.end.get_or_insert(end);
        let home = self.runs == Runs::Idle;
        let drained = self.buffered_bytes() == 0;
        Filed {
            wake: self.take_waker(),
            run: if home && drained { None } else { self.start_for_end() },
            close: home && drained && self.serves,
            ..Filed::default()
        }
    }

    /// Notes that the peer has ended while reception is paused. A handler gets the buffered bytes:
    /// in a run that starts now, or in a run that follows the active one.
    pub(super) fn hang_up(&mut self) -> Option<Started> {
        self.hung_up = true;
        let drained = self.runs == Runs::Idle && self.buffered_bytes() == 0;
        if drained { None } else { self.start_for_end() }
    }

    pub(super) fn has_hung_up(&self) -> bool {
        self.hung_up
    }

    fn start_for_end(&mut self) -> Option<Started> {
        let starts = self.runs.on_news() && self.serves;
        starts.then(|| self.start(Kind::Request))
    }

    /// Starts a run with all buffered bytes.
    #[inline]
    pub(super) fn start(&mut self, kind: Kind) -> Started {
        debug_assert_eq!(self.inbox_len(), 0, "what is home has been settled");
        // The bytes that start the run are not consumed yet.
        let consumed = self.consumed();
        self.runs.start(kind, consumed);
        let reader = self.reader.take().unwrap_or_else(parts::reader);
        Started { kind, reader, writer: self.writer.take() }
    }

    /// Keeps what a run starts with while the run waits in a queue.
    pub(super) fn keep_started(&mut self, started: Started) {
        self.reader = Some(started.reader);
        self.writer = started.writer;
    }

    /// Takes what a run starts with, for the thread that has taken the run from the queue.
    pub(super) fn take_started(&mut self) -> Option<Started> {
        let Runs::Active { kind, .. } = self.runs else { return None };
        // A close may have discarded the reader.
        let reader = self.reader.take().unwrap_or_else(parts::reader);
        Some(Started { kind, reader, writer: self.writer.take() })
    }

    /// Returns `true` if `on_disconnect` must wait for the end of `on_connect`.
    pub(super) fn owe_disconnect_if_connecting(&mut self) -> bool {
        self.disconnect_owed |= self.runs.is_connecting();
        self.disconnect_owed
    }

    pub(super) fn take_disconnect_owed(&mut self) -> bool {
        std::mem::take(&mut self.disconnect_owed)
    }

    pub(super) fn is_waited_for(&self) -> bool {
        self.wait.is_some()
    }

    /// Moves all bytes of the inbox to the reader.
    pub(super) fn refill(&mut self, reader: &mut Chain) {
        if let Some(mut inbox) = self.inbox.take() {
            self.took_many = inbox.len() >= DIRECT_BYTES_MIN as usize;
            reader.append(&mut inbox);
            self.inbox = parts::keep_reader(inbox);
        }
        self.held_bytes = reader.len();
    }

    /// Notes how many bytes the reader has left.
    pub(super) fn set_held_bytes(&mut self, bytes: usize) {
        self.held_bytes = bytes;
    }

    /// Ends a run after which there is nothing to do but to wait for bytes. `false`: there may be
    /// more to do.
    #[inline]
    pub(super) fn rest(&mut self) -> bool {
        let is_quiet = self.buffered_bytes() == 0
            && self.end.is_none()
            && self.serves
            && !self.hung_up
            && !self.removed
            && !self.disconnect_owed;
        if is_quiet {
            self.runs.rest();
        }
        is_quiet
    }

    /// Takes back the reader, the writer, or both, as `parts` says; `None` is an empty one. Returns
    /// the waker that the reader had registered, to be dropped without the lock.
    #[inline]
    pub(super) fn take_back(
        &mut self,
        parts: u8,
        reader: Option<Box<Chain>>,
        writer: Option<Box<Staging>>,
    ) -> Option<Waker> {
        if let Some(writer) = writer {
            self.writer = parts::keep_writer(writer);
        }
        if parts & READER == 0 {
            return None;
        }
        self.held_bytes = reader.as_ref().map_or(0, |reader| reader.len());
        self.reader = reader.and_then(parts::keep_reader);
        self.take_waker()
    }

    /// All parts of a run are back: appends the bytes of the inbox to the reader's unread bytes.
    pub(super) fn join_inbox(&mut self) {
        if self.inbox_len() > 0 {
            let mut reader = self.reader.take().unwrap_or_else(parts::reader);
            self.refill(&mut reader);
            self.reader = Some(reader);
        }
    }

    /// Registers a reader that waits; `file` wakes it when `bytes` are buffered. Returns the waker
    /// that is not needed. The caller drops it without the lock, because dropping the last waker
    /// may drop a task.
    #[must_use]
    pub(super) fn wait_for(&mut self, bytes: usize, until_ns: u64, waker: Waker) -> Option<Waker> {
        let (waker, unneeded) = match self.take_waker() {
            Some(known) if known.will_wake(&waker) => (known, Some(waker)),
            replaced => (waker, replaced),
        };
        self.wait = Some(Wait { bytes, waker, until_ns });
        unneeded
    }

    /// When the reader's wait ends.
    pub(super) fn until_ns(&self) -> u64 {
        self.wait.as_ref().map_or(NEVER, |wait| wait.until_ns)
    }

    /// The waker to call if the wait ends by `now_ns`, otherwise the time of the next check.
    pub(super) fn timer(&mut self, now_ns: u64) -> (Option<Waker>, u64) {
        match self.wait.take_if(|wait| wait.until_ns <= now_ns) {
            Some(wait) => (Some(wait.waker), NEVER),
            None => (None, self.until_ns()),
        }
    }

    pub(super) fn take_waker(&mut self) -> Option<Waker> {
        self.wait.take().map(|wait| wait.waker)
    }

    /// How many bytes are in the inbox.
    #[inline]
    pub(super) fn inbox_len(&self) -> usize {
        self.inbox.as_ref().map_or(0, |inbox| inbox.len())
    }

    /// How many bytes are in the inbox and the reader. Those consumed since the reader last took
    /// the inbox are included.
    pub(super) fn buffered_bytes(&self) -> usize {
        self.inbox_len() + self.held_bytes
    }

    /// How many bytes the user has consumed. Exact while no run has the reader.
    pub(super) fn consumed(&self) -> u64 {
        self.received - self.buffered_bytes() as u64
    }

    pub(super) fn received(&self) -> u64 {
        self.received
    }

    /// Takes out all buffered bytes. The caller drops them without the lock, because the writer may
    /// hold memory of the user.
    #[must_use]
    pub(super) fn discard(&mut self) -> Discarded {
        self.held_bytes = 0;
        (self.inbox.take(), self.reader.take(), self.writer.take())
    }
}

/// Adds received bytes to a chain. Returns their number.
#[inline]
fn add(bytes: Received<'_>, into: &mut Chain, pool: &Pool) -> usize {
    let before = into.len();
    match bytes {
        Received::Copied(bytes) => into.write_copy(bytes, pool),
        Received::Lent(slice) => into.push(slice),
    }
    into.len() - before
}
