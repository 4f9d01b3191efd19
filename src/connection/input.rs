//! Bytes coming in.
//!
//! While the reader is home, the poller files bytes there; while it is out, into `inbox`, which its
//! holder takes whole and then reads without a lock. Guarded by the input lock; the waker is fired
//! outside it.

use std::io;
use std::task::Waker;

use crate::buffer::{Chain, Pool, Staging};
use crate::config::Limits;
use crate::poller::Received;
use crate::poller::timers::NEVER;

use super::parts;
use super::state::{Kind, Runs};

pub(super) struct Input {
    pub(super) runs: Runs,
    /// Bytes ever received.
    received: u64,
    /// What the reader has; while it is out, what it had when it last looked in, and may have
    /// consumed since.
    held_bytes: usize,
    /// The reader, while it is home, with what is unread.
    reader: Option<Box<Chain>>,
    /// The writer, while it is home, with what the last run wrote and did not submit.
    writer: Option<Box<Staging>>,
    /// Apart, since a server's reader is home most of the time and the bytes go there.
    inbox: Option<Box<Chain>>,
    /// There is a handler for requests: bytes that nobody waits for start a run.
    pub(super) serves: bool,
    /// The poller has given up the slot.
    pub(super) removed: bool,
    /// The peer has gone during `on_connect`; the user is told after it.
    disconnect_owed: bool,
    /// The peer has ended its side; bytes of it may be left in the kernel, while reception is
    /// paused.
    hung_up: bool,
    /// Nothing more will come, and why.
    pub(super) end: Option<End>,
    pub(super) wait: Option<Wait>,
    /// How connecting ended.
    pub(super) connected: Option<io::Result<()>>,
}

/// A reader that waits.
pub(super) struct Wait {
    /// For so many bytes, in all.
    bytes: usize,
    waker: Waker,
    /// Until then.
    pub(super) until_ns: u64,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum End {
    /// The peer finished its side.
    Eof,
    /// The kernel reported this error.
    Failed(io::ErrorKind, Option<i32>),
    /// The poller's memory is used up by readers that wait for more than their share.
    Memory,
}

/// See [`Input::discard`].
pub(super) type Discarded = (Option<Box<Chain>>, Option<Box<Chain>>, Option<Box<Staging>>);

/// What a run works with. Taken as it starts; it begins later, and what comes until then is in the
/// inbox.
pub(crate) struct Handed {
    pub(super) kind: Kind,
    pub(super) reader: Box<Chain>,
    /// Only where the last run has left something in it.
    pub(super) writer: Option<Box<Staging>>,
}

/// What the poller does after filing bytes, or the end.
#[derive(Default)]
pub(super) struct Filed {
    pub(super) wake: Option<Waker>,
    /// A run has started for the end.
    pub(super) run: Option<Handed>,
    pub(super) pause: bool,
    /// Nobody will have anything to do here any more.
    pub(super) close: bool,
    /// Give up on this connection: it holds more than its share and waits for more.
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
            runs: Runs::Home,
            removed: false,
            hung_up: false,
            serves,
            reader: None,
            writer: None,
            disconnect_owed: false,
            connected: None,
        }
    }

    /// Whether bytes start a run: the reader is home, and a handler takes them.
    #[inline]
    pub(super) fn may_start(&self) -> bool {
        self.serves && self.runs == Runs::Home
    }

    /// Starts a run with what the poller received, and with what was left unread before.
    #[inline]
    pub(super) fn start_with(&mut self, bytes: Received<'_>, pool: &Pool) -> Handed {
        let reader = self.reader.get_or_insert_with(parts::reader);
        self.received += add(bytes, reader, pool) as u64;
        self.held_bytes = reader.len();
        self.start(Kind::Request)
    }

    /// Takes in what the poller received for a reader that is out.
    pub(super) fn file(
        &mut self,
        bytes: Received<'_>,
        pool: &Pool,
        limits: &Limits,
        share_bytes: Option<usize>,
    ) -> Filed {
        let inbox = self.inbox.get_or_insert_with(parts::reader);
        self.received += add(bytes, inbox, pool) as u64;
        let buffered = self.buffered_bytes();
        let waits_on = self.wait.as_ref().map(|wait| buffered < wait.bytes);
        if waits_on != Some(false) {
            // Nobody is told of them; a handler may also give up its wait, having seen none.
            self.runs.on_news();
        }
        if waits_on == Some(true) {
            let over_share = share_bytes.is_some_and(|share| buffered > share);
            return Filed { over_share, ..Filed::default() };
        }
        let pause = buffered >= limits.input_bytes_max(share_bytes);
        Filed { wake: self.take_waker(), pause, ..Filed::default() }
    }

    /// Notes the end; returns who waits and whether a run is to be started for it.
    pub(super) fn end(&mut self, end: End) -> Filed {
        self.end.get_or_insert(end);
        let home = self.runs == Runs::Home;
        let drained = self.buffered_bytes() == 0;
        Filed {
            wake: self.take_waker(),
            run: if home && drained { None } else { self.start_for_end() },
            close: home && drained && self.serves,
            ..Filed::default()
        }
    }

    /// Notes that the peer has ended while reception is paused. A handler gets what there is: in a
    /// run that is started here, or, where one is out already, in one that follows.
    pub(super) fn hang_up(&mut self) -> Option<Handed> {
        self.hung_up = true;
        let drained = self.runs == Runs::Home && self.buffered_bytes() == 0;
        if drained { None } else { self.start_for_end() }
    }

    pub(super) fn has_hung_up(&self) -> bool {
        self.hung_up
    }

    fn start_for_end(&mut self) -> Option<Handed> {
        let starts = self.runs.on_news() && self.serves;
        starts.then(|| self.start(Kind::Request))
    }

    /// Starts a run, with all that is here.
    #[inline]
    pub(super) fn start(&mut self, kind: Kind) -> Handed {
        debug_assert_eq!(self.inbox_len(), 0, "what is home has been settled");
        // What starts it is not consumed yet.
        let consumed = self.consumed();
        self.runs.start(kind, consumed);
        let reader = self.reader.take().unwrap_or_else(parts::reader);
        Handed { kind, reader, writer: self.writer.take() }
    }

    /// `true`: `on_connect` runs, and the user will be told after it.
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

    /// Hands everything to the reader.
    pub(super) fn refill(&mut self, reader: &mut Chain) {
        if let Some(mut inbox) = self.inbox.take() {
            reader.append(&mut inbox);
            self.inbox = parts::keep_reader(inbox);
        }
        self.held_bytes = reader.len();
    }

    /// Notes how much the reader has left.
    pub(super) fn set_held_bytes(&mut self, bytes: usize) {
        self.held_bytes = bytes;
    }

    /// Ends a run that has left nothing, if nothing has come meanwhile.
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

    /// Takes back what comes home. Returns who was registered still, to be dropped without the
    /// lock.
    #[inline]
    pub(super) fn bring_home(
        &mut self,
        reader: Option<Box<Chain>>,
        writer: Option<Box<Staging>>,
    ) -> Option<Waker> {
        if let Some(writer) = writer {
            self.writer = parts::keep_writer(writer);
        }
        let reader = reader?;
        self.held_bytes = reader.len();
        self.reader = parts::keep_reader(reader);
        self.take_waker()
    }

    /// Everything is home: what came meanwhile follows what was left unread.
    pub(super) fn settle_home(&mut self) {
        if self.inbox_len() > 0 {
            let mut reader = self.reader.take().unwrap_or_else(parts::reader);
            self.refill(&mut reader);
            self.reader = Some(reader);
        }
    }

    /// Registers the reader; `file` wakes it when `bytes` are there. Returns the waker that is not
    /// needed, to be dropped without the lock: a last one may drop a task with all it has.
    #[must_use]
    pub(super) fn wait_for(&mut self, bytes: usize, until_ns: u64, waker: Waker) -> Option<Waker> {
        let (waker, unneeded) = match self.take_waker() {
            Some(known) if known.will_wake(&waker) => (known, Some(waker)),
            replaced => (waker, replaced),
        };
        self.wait = Some(Wait { bytes, waker, until_ns });
        unneeded
    }

    /// When a reader's wait is over.
    pub(super) fn until_ns(&self) -> u64 {
        self.wait.as_ref().map_or(NEVER, |wait| wait.until_ns)
    }

    /// Whom to wake if its wait is over at `now_ns`, otherwise when to look again.
    pub(super) fn timer(&mut self, now_ns: u64) -> (Option<Waker>, u64) {
        match self.wait.take_if(|wait| wait.until_ns <= now_ns) {
            Some(wait) => (Some(wait.waker), NEVER),
            None => (None, self.until_ns()),
        }
    }

    pub(super) fn take_waker(&mut self) -> Option<Waker> {
        self.wait.take().map(|wait| wait.waker)
    }

    /// Bytes that came while the reader was out, and that it has not taken yet.
    #[inline]
    pub(super) fn inbox_len(&self) -> usize {
        self.inbox.as_ref().map_or(0, |inbox| inbox.len())
    }

    /// Buffered here and, at most, by the reader.
    pub(super) fn buffered_bytes(&self) -> usize {
        self.inbox_len() + self.held_bytes
    }

    /// Bytes the user has consumed; exact when the reader is home.
    pub(super) fn consumed(&self) -> u64 {
        self.received - self.buffered_bytes() as u64
    }

    pub(super) fn received(&self) -> u64 {
        self.received
    }

    /// Takes out what nobody will read or send, to be dropped without the lock: the writer may hold
    /// memory of the user's.
    #[must_use]
    pub(super) fn discard(&mut self) -> Discarded {
        self.held_bytes = 0;
        (self.inbox.take(), self.reader.take(), self.writer.take())
    }
}

/// Adds what was received; says how many bytes those are.
#[inline]
fn add(bytes: Received<'_>, into: &mut Chain, pool: &Pool) -> usize {
    let before = into.len();
    match bytes {
        Received::Copied(bytes) => into.write_copy(bytes, pool),
        Received::Lent(slice) => into.push(slice),
    }
    into.len() - before
}
