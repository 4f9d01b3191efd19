//! The life of a connection, as pure transitions.
//!
//! [`Life`] has bits that any thread may set: whether the connection was closed, whether the peer
//! has gone, whether the connection must end when it is idle. [`Runs`] says whether a run has the
//! reader and the writer. It is guarded by the input lock:
//!
//! ```text
//!            start                     last part is back
//!   Idle ─────────────► Active ────────────────────────────► Idle
//!    ▲  nothing is out   │  parts: handler's future,           │ finish
//!    │                   │  reader, writer                     ▼
//!    └───────────────────┘                                    Over
//! ```
//!
//! In `Idle` the poller may start a run. In `Active` the poller only notes that bytes or an end
//! came. In `Over` the close callbacks have run and the descriptor is closed.

use crate::sync::atomic::{AtomicU8, Ordering};

/// Bits that are set and never cleared, except `DETACHED`.
pub(super) struct Life(AtomicU8);

const CLOSED: u8 = 1;
const PEER_GONE: u8 = 2;
const DETACHED: u8 = 4;
const ENDING: u8 = 8;

impl Life {
    pub(super) fn new() -> Life {
        Life(AtomicU8::new(0))
    }

    /// Closes. Returns `true` to the first caller only.
    pub(super) fn close(&self) -> bool {
        self.0.fetch_or(CLOSED, Ordering::AcqRel) & CLOSED == 0
    }

    /// Closes, but keeps the socket and all bytes that come. Returns `true` to the first caller
    /// only.
    pub(super) fn detach(&self) -> bool {
        let detached = |bits| (bits & CLOSED == 0).then_some(bits | CLOSED | DETACHED);
        self.0.fetch_update(Ordering::AcqRel, Ordering::Acquire, detached).is_ok()
    }

    /// Ends detaching. The connection is closed from now on.
    pub(super) fn end_detaching(&self) {
        self.0.fetch_and(!DETACHED, Ordering::AcqRel);
    }

    /// Whether received bytes are dropped.
    #[inline]
    pub(super) fn drops_input(&self) -> bool {
        self.0.load(Ordering::Acquire) & (CLOSED | DETACHED) == CLOSED
    }

    #[inline]
    pub(super) fn is_detached(&self) -> bool {
        self.0.load(Ordering::Acquire) & DETACHED != 0
    }

    /// Notes that the peer has gone. Returns `true` to the first caller only.
    pub(super) fn peer_gone(&self) -> bool {
        self.0.fetch_or(PEER_GONE, Ordering::AcqRel) & PEER_GONE == 0
    }

    #[inline]
    pub(super) fn is_closed(&self) -> bool {
        self.0.load(Ordering::Acquire) & CLOSED != 0
    }

    #[inline]
    pub(super) fn is_active(&self) -> bool {
        self.0.load(Ordering::Acquire) & !ENDING == 0
    }

    /// Notes that the server is shutting down. The connection must close when no run is active and
    /// no bytes are left to read or to send.
    pub(super) fn end_when_idle(&self) {
        self.0.fetch_or(ENDING, Ordering::AcqRel);
    }

    #[inline]
    pub(super) fn ends_when_idle(&self) -> bool {
        self.0.load(Ordering::Acquire) & ENDING != 0
    }

    /// No bit is set: the connection is open, and nothing is to end it.
    #[inline]
    pub(super) fn is_undisturbed(&self) -> bool {
        self.0.load(Ordering::Acquire) == 0
    }
}

/// Which handler a run calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Connect,
    Request,
}

/// Parts of a run. The run is over when all have been given back.
pub(super) const FUTURE: u8 = 1;
pub(super) const READER: u8 = 2;
pub(super) const WRITER: u8 = 4;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Runs {
    /// No run is active.
    Idle,
    /// A run is active.
    Active {
        kind: Kind,
        /// The parts that have not been given back.
        parts: u8,
        /// Whether bytes or an end came since the run started.
        news: bool,
        /// How many bytes all earlier runs together consumed.
        consumed_before: u64,
    },
    /// Finished for good.
    Over,
}

/// The state of the connection at the end of a run.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Found {
    pub(super) unread: bool,
    /// The inbox has bytes: they came during the run, and the handler has not seen them.
    pub(super) unseen: bool,
    pub(super) consumed: u64,
    pub(super) peer_gone: bool,
    /// The peer has ended its side while reception is paused.
    pub(super) hung_up: bool,
    pub(super) closed: bool,
    pub(super) removed: bool,
    pub(super) ends_when_idle: bool,
    /// There is a handler for requests.
    pub(super) serves_requests: bool,
}

/// What follows a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Wait for bytes.
    Rest,
    /// Start another run.
    Again,
    /// Close after submitted bytes are sent.
    Close,
    /// Finish: the connection is closed and removed.
    Finish,
}

impl Runs {
    pub(super) fn start(&mut self, kind: Kind, consumed_before: u64) {
        assert_eq!(*self, Runs::Idle, "one run at a time");
        *self =
            Runs::Active { kind, parts: FUTURE | READER | WRITER, news: false, consumed_before };
    }

    /// Notes that bytes or an end came. `true`: the caller must start a run for them.
    #[inline]
    pub(super) fn on_news(&mut self) -> bool {
        match self {
            Runs::Idle => true,
            Runs::Active { news, .. } => {
                *news = true;
                false
            }
            Runs::Over => false,
        }
    }

    pub(super) fn is_active(&self) -> bool {
        matches!(self, Runs::Active { .. })
    }

    /// Whether `on_connect` runs.
    pub(super) fn is_connecting(&self) -> bool {
        matches!(self, Runs::Active { kind: Kind::Connect, .. })
    }

    /// Takes back the parts in `returned`. `true`: all parts are back, and the caller must call
    /// `end`.
    pub(super) fn give_back(&mut self, returned: u8) -> bool {
        let Runs::Active { parts, .. } = self else { return false };
        *parts &= !returned;
        *parts == 0
    }

    /// Ends a run that nothing follows.
    pub(super) fn rest(&mut self) {
        debug_assert!(matches!(self, Runs::Active { parts: 0, .. }), "{self:?}");
        *self = Runs::Idle;
    }

    /// Ends a run, and decides what follows.
    pub(super) fn end(&mut self, found: Found) -> Next {
        let Runs::Active { kind, parts: 0, news, consumed_before } = *self else {
            unreachable!("a run that ends has nothing out: {self:?}");
        };
        let consumes = found.consumed > consumed_before;
        let progress = news || found.unseen || consumes || kind == Kind::Connect;
        *self = Runs::Idle;
        match found {
            Found { closed: true, removed: true, .. } => Next::Finish,
            Found { closed: true, .. } => Next::Rest,
            Found { serves_requests: false, .. } => Next::Close,
            Found { unread: true, .. } if progress => Next::Again,
            Found { peer_gone: true, .. } => Next::Close,
            // The run consumed nothing, so no further run makes room for the end.
            Found { unread: true, hung_up: true, .. } => Next::Close,
            Found { ends_when_idle: true, unread: false, .. } => Next::Close,
            _ => Next::Rest,
        }
    }

    /// `true` once: the connection is finished now.
    pub(super) fn finish(&mut self) -> bool {
        let first = *self != Runs::Over;
        *self = Runs::Over;
        first
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    const SERVING: Found = Found {
        unread: false,
        unseen: false,
        consumed: 0,
        peer_gone: false,
        hung_up: false,
        closed: false,
        removed: false,
        ends_when_idle: false,
        serves_requests: true,
    };

    fn ended(news: bool, found: Found) -> Next {
        let mut runs = Runs::Idle;
        runs.start(Kind::Request, 10);
        if news {
            assert!(!runs.on_news());
        }
        assert!(!runs.give_back(READER | WRITER));
        assert!(runs.give_back(FUTURE));
        runs.end(found)
    }

    #[test]
    fn a_run_is_over_when_its_last_part_is_back_in_whatever_order() {
        for order in [[FUTURE, READER, WRITER], [WRITER, FUTURE, READER], [READER, WRITER, FUTURE]]
        {
            let mut runs = Runs::Idle;
            runs.start(Kind::Request, 0);
            assert_eq!(order.map(|part| runs.give_back(part)), [false, false, true]);
            assert_eq!(runs.end(SERVING), Next::Rest);
        }
    }

    #[test]
    fn a_handler_that_consumed_nothing_waits_for_more_bytes() {
        let unread = Found { unread: true, consumed: 10, ..SERVING };
        assert_eq!(ended(false, unread), Next::Rest);
        assert_eq!(ended(true, unread), Next::Again);
        assert_eq!(ended(false, Found { consumed: 11, ..unread }), Next::Again);
        assert_eq!(ended(false, Found { unseen: true, ..unread }), Next::Again);
    }

    #[test]
    fn after_the_peer_has_gone_a_drained_or_refused_input_ends_the_connection() {
        let gone = Found { peer_gone: true, ..SERVING };
        assert_eq!(ended(true, gone), Next::Close);
        assert_eq!(ended(false, Found { unread: true, consumed: 10, ..gone }), Next::Close);
        assert_eq!(ended(true, Found { unread: true, ..gone }), Next::Again);
    }

    #[test]
    fn input_that_is_refused_after_the_peer_has_hung_up_ends_the_connection() {
        let hung_up = Found { hung_up: true, consumed: 10, ..SERVING };
        assert_eq!(ended(false, Found { unread: true, ..hung_up }), Next::Close);
        assert_eq!(ended(true, Found { unread: true, ..hung_up }), Next::Again);
        assert_eq!(ended(false, Found { unread: true, consumed: 11, ..hung_up }), Next::Again);
        // Reception goes on, and comes to the end.
        assert_eq!(ended(false, hung_up), Next::Rest);
    }

    #[test]
    fn news_during_a_run_is_never_lost() {
        let mut runs = Runs::Idle;
        assert!(runs.on_news());
        runs.start(Kind::Request, 0);
        assert!(!runs.on_news());
        let found = Found { unread: true, ..SERVING };
        assert!(runs.give_back(FUTURE | READER | WRITER));
        assert_eq!(runs.end(found), Next::Again);
    }

    #[test]
    fn a_closed_connection_finishes_once_and_starts_nothing() {
        let closed = Found { closed: true, unread: true, consumed: 11, ..SERVING };
        assert_eq!(ended(true, closed), Next::Rest);
        assert_eq!(ended(true, Found { removed: true, ..closed }), Next::Finish);
        let mut runs = Runs::Idle;
        assert!(runs.finish());
        assert!(!runs.finish());
        assert!(!runs.on_news());
    }

    #[test]
    fn a_connection_that_ends_when_it_is_idle_is_active_until_then() {
        let life = Life::new();
        assert!(life.is_active() && !life.ends_when_idle());
        life.end_when_idle();
        assert!(life.ends_when_idle() && life.is_active());
        let drained = Found { ends_when_idle: true, ..SERVING };
        assert_eq!(ended(true, drained), Next::Close);
        assert_eq!(ended(true, Found { unread: true, ..drained }), Next::Again);
    }

    #[test]
    fn closing_has_one_winner() {
        let life = Life::new();
        assert!(life.is_active());
        assert!(life.peer_gone());
        assert!(!life.is_active() && !life.is_closed());
        assert!(life.close());
        assert!(!life.close());
        assert!(!life.detach() && !life.is_detached(), "whoever closed does what follows");
        let life = Life::new();
        assert!(life.detach() && life.is_detached() && !life.close());
    }
}
