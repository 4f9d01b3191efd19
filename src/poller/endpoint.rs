//! A connection or a listener, as its poller sees it.
//!
//! The poller calls an [`Endpoint`], and the endpoint answers with a [`Reaction`] or, for received
//! bytes, with a [`Receipt`]. An endpoint runs user code only in the calls that say so: the poller
//! decides when.

use std::io;
use std::task::Waker;

use super::{Completion, Flow, Received, Socket, Token};
use crate::address::PeerAddr;
use crate::buffer::Chain;
use crate::sync::Arc;
use crate::task::{Polled, Run};

/// A connection, as its poller sees it.
///
/// Methods are called on the poller's thread, unless they say otherwise. None of them may block.
pub(crate) trait Endpoint: Sized + Send + Sync + 'static {
    /// The reader and the writer that a run starts with.
    type Started: Send;

    fn token(&self) -> Token;

    /// The endpoint has a slot. `None` refuses, and the slot is given up.
    fn on_attached(self: &Arc<Self>, token: Token) -> Option<Attached<Self::Started>>;

    /// Bytes have arrived. `share_bytes` is set while the poller is short of memory. It is the
    /// number of unread bytes that the endpoint may hold.
    fn on_received(
        self: &Arc<Self>,
        bytes: Received<'_>,
        share_bytes: Option<usize>,
    ) -> Receipt<Self::Started>;

    /// Another operation of the endpoint is done.
    fn on_completion(self: &Arc<Self>, completion: Completion<'_>) -> Reaction<Self::Started>;

    /// The timer for `at_ns` fired. A timer that an earlier one has replaced fires as well.
    fn on_timer(self: &Arc<Self>, at_ns: u64, now_ns: u64) -> Reaction<Self::Started>;

    /// Whether the timer for `at_ns` is the current one.
    fn is_armed(&self, at_ns: u64) -> bool;

    /// The slot is given up, and the backend has dropped the socket. Runs user code.
    fn on_removed(self: &Arc<Self>);

    /// Begins a run that has started: calls the handler and polls the run once. The run may also be
    /// given to other threads as a task; the result is `Done` then. Runs user code.
    fn begin(self: &Arc<Self>, started: Self::Started) -> Polled;

    /// Makes a task of a run that waits for more than its own flush, and polls the task once. Runs
    /// user code.
    fn make_task(self: &Arc<Self>, run: Run);

    /// Ends a run that has started and that no thread will begin. From any thread. Runs user code.
    fn give_up(self: &Arc<Self>, started: Self::Started);

    /// Carries out an action of a [`Reaction`]. Runs user code.
    fn act(self: &Arc<Self>, action: Action);

    /// Whether workers may do the endpoint's runs. From any thread, with locks held.
    fn is_movable(&self) -> bool;

    /// Has workers do a run. From any thread. Only for a [movable](Self::is_movable) endpoint.
    fn run_elsewhere(self: Arc<Self>, started: Self::Started);

    /// Sends `bytes`, which were left to the poller, on the calling thread. From any thread.
    fn send_off_poller(self: &Arc<Self>, bytes: Chain);

    /// How many bytes the endpoint has received and its user has not read.
    fn unread_bytes(&self) -> usize;
}

/// The answer of an endpoint that takes its slot.
pub(crate) struct Attached<H> {
    /// About how many bytes the endpoint takes before it asks for a pause.
    pub(crate) at_once_bytes: usize,
    /// Bytes that were submitted before the endpoint had a slot.
    pub(crate) output: Option<Box<Chain>>,
    pub(crate) start: Option<H>,
}

/// The answer of an endpoint to received bytes.
pub(crate) enum Receipt<H> {
    /// Begin this run when the round has collected everything.
    Starts(H, Flow),
    /// The bytes are filed for the reader, or dropped because the connection is closed.
    Filed(Reaction<H>),
}

/// What an endpoint asks of its poller after a completion or a timer.
pub(crate) struct Reaction<H> {
    pub(crate) flow: Flow,
    /// Begin this run after the actions, when the round has collected everything.
    pub(crate) start: Option<H>,
    /// Wake the task that waits for input.
    pub(crate) reader: Option<Waker>,
    /// Wake the task that waits for its flush.
    pub(crate) flusher: Option<Waker>,
    /// Continue the run that the poller keeps until its flush is done.
    pub(crate) continues: bool,
    /// Send these bytes next.
    pub(crate) output: Option<Box<Chain>>,
    /// Call [`Endpoint::act`] with these, in order.
    pub(crate) actions: [Option<Action>; 2],
    /// Set the timer to this time.
    pub(crate) timer_ns: Option<u64>,
}

impl<H> Default for Reaction<H> {
    #[inline]
    fn default() -> Reaction<H> {
        Reaction {
            flow: Flow::Continue,
            start: None,
            reader: None,
            flusher: None,
            continues: false,
            output: None,
            actions: [None, None],
            timer_ns: None,
        }
    }
}

impl<H> Reaction<H> {
    /// Adds an action.
    ///
    /// # Panics
    /// If there are two already.
    pub(crate) fn act(&mut self, action: Action) {
        let free = self.actions.iter_mut().find(|action| action.is_none());
        *free.expect("an event has two actions at most") = Some(action);
    }
}

/// An action of an endpoint. It is carried out when the round has collected everything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// Call `on_disconnect`: the peer has gone.
    Disconnected,
    /// Close the connection.
    Close,
    /// Close the connection if no run is active and no bytes are left to read or to send.
    CloseIfIdle,
    /// End the socket: the connection is closed and all its output is sent.
    End,
    /// Close without delay: the connection is idle for too long, or the poller stops.
    Cut,
}

/// Takes the connections of one listener.
pub(crate) trait Accept: Send + Sync {
    fn on_accepted(&self, socket: Socket, peer: PeerAddr);
    /// Accepting failed. `true`: try again after a pause.
    fn on_failed(&self, error: &io::Error) -> bool;
    /// The listener is closed.
    fn on_removed(&self);
}

/// An object that is told when a poller ends without being asked to.
pub(crate) trait Watcher: Send + Sync {
    fn poller_failed(&self, why: &str);
}
