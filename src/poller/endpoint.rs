//! What a poller knows of the connections and listeners in its slots.
//!
//! The calls go upward, and what an endpoint wants comes back as a [`Reaction`]. So the poller
//! decides when anything runs.

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
    /// What a run works with. It is taken from the endpoint as the run starts.
    type Handed: Send;

    fn token(&self) -> Token;

    /// The endpoint has a slot. `None` refuses, and the slot is given up.
    fn on_attached(self: &Arc<Self>, token: Token) -> Option<Attached<Self::Handed>>;

    /// Bytes have arrived. `share_bytes` is set while the poller is short of memory: the endpoint
    /// may hold so many unread bytes.
    fn on_received(
        self: &Arc<Self>,
        bytes: Received<'_>,
        share_bytes: Option<usize>,
    ) -> Reaction<Self::Handed>;

    /// Another operation of the endpoint is done.
    fn on_completion(self: &Arc<Self>, completion: Completion<'_>) -> Reaction<Self::Handed>;

    /// The timer for `at_ns` fired. Timers that an earlier one has replaced fire as well.
    fn on_timer(self: &Arc<Self>, at_ns: u64, now_ns: u64) -> Reaction<Self::Handed>;

    /// Whether the timer for `at_ns` is the current one.
    fn is_armed(&self, at_ns: u64) -> bool;

    /// The slot is given up, and the backend has dropped the socket.
    fn on_removed(self: &Arc<Self>);

    /// Makes the run that has started, and polls it once: here, or as a task of other threads, which
    /// counts as done. Runs user code.
    fn begin(self: &Arc<Self>, handed: Self::Handed) -> Polled;

    /// Makes a task of a run that waits for more than its own flush, and polls the task once. Runs
    /// user code.
    fn make_task(self: &Arc<Self>, run: Run);

    /// Ends a run that has started and that no thread will begin. From any thread. Runs user code.
    fn give_up(self: &Arc<Self>, handed: Self::Handed);

    /// Carries out an action of a [`Reaction`]. Runs user code.
    fn act(self: &Arc<Self>, action: Action);

    /// Whether workers may do the endpoint's runs. From any thread, with locks held.
    fn is_movable(&self) -> bool;

    /// Has workers do a run. From any thread. Only for a [movable](Self::is_movable) endpoint.
    fn run_elsewhere(self: Arc<Self>, handed: Self::Handed);

    /// Sends `bytes`, which were left to the poller, on the calling thread. From any thread.
    fn send_off_poller(self: &Arc<Self>, bytes: Chain);

    /// Bytes that the endpoint was given and that nobody has read.
    fn unread_bytes(&self) -> usize;
}

/// The answer of an endpoint that takes its slot.
pub(crate) struct Attached<H> {
    /// About how many bytes the endpoint takes before it may ask for a pause.
    pub(crate) at_once_bytes: usize,
    /// Bytes that were submitted before the endpoint had a slot.
    pub(crate) output: Option<Box<Chain>>,
    pub(crate) start: Option<H>,
}

/// What an endpoint wants of its poller after a completion or a timer.
pub(crate) struct Reaction<H> {
    pub(crate) flow: Flow,
    /// Begin this run once the round has collected everything. Comes after the actions.
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
    /// When there are two already.
    pub(crate) fn act(&mut self, action: Action) {
        let free = self.actions.iter_mut().find(|action| action.is_none());
        *free.expect("an event has two actions at most") = Some(action);
    }
}

/// What an endpoint wants done after its round has collected everything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// Tell the user that the peer has gone.
    Disconnected,
    /// Close: nothing more will happen.
    Close,
    /// Close if no work is left.
    CloseIfIdle,
    /// End the socket: the connection is closed, and the last of its output is sent.
    End,
    /// Close without delay: no byte has moved for too long, or the poller stops.
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

/// Hears of a poller that has failed: of one that ended without being asked to.
pub(crate) trait Watcher: Send + Sync {
    fn poller_failed(&self, why: &str);
}
