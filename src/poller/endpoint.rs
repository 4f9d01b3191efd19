//! The calls upward: what a poller knows of the connections and listeners in its slots.

use std::io;
use std::task::Waker;

use crossbeam_deque::Worker;

use super::ready::Job;
use super::{Flow, Received, Remote, Socket, Token};
use crate::address::PeerAddr;
use crate::buffer::Chain;
use crate::clock::now_ns;
use crate::sync::Arc;
use crate::task::Run;

/// What a slot holds for a connection: the calls upward. They come from the poller's thread, unless
/// they say otherwise; none may block.
pub(crate) trait Endpoint: Sized + Send + Sync + 'static {
    /// What a run works with. It is taken from the endpoint as the run starts.
    type Handed: Send;

    /// This thread is `remote`'s poller from now on.
    fn enter_poller(remote: &Arc<Remote<Self>>);
    fn token(&self) -> Token;
    /// About how many bytes it takes before it may ask for a pause.
    fn receives_at_once(&self) -> usize;
    /// The endpoint has a slot. `false` refuses, and the slot is given up.
    fn on_attached(self: &Arc<Self>, token: Token, batch: &mut Batch<Self>) -> bool;
    fn on_connected(self: &Arc<Self>, result: io::Result<()>, batch: &mut Batch<Self>);
    fn on_received(self: &Arc<Self>, bytes: Received<'_>, batch: &mut Batch<Self>) -> Flow;
    /// The peer is known to have ended, though bytes of it are still to be received.
    fn on_hung_up(self: &Arc<Self>, batch: &mut Batch<Self>);
    fn on_ended(self: &Arc<Self>, result: io::Result<()>, batch: &mut Batch<Self>);
    /// The bytes that the backend is to send now.
    fn take_output(&self) -> Option<Chain>;
    /// `true`: there is more to send.
    fn on_sent(self: &Arc<Self>, result: io::Result<usize>, batch: &mut Batch<Self>) -> bool;
    /// A timer came up: when is the next one due? Called for entries that were overtaken as well.
    fn on_timer(self: &Arc<Self>, at_ns: u64, batch: &mut Batch<Self>) -> Option<u64>;
    /// Whether the entry for this time is the one that counts.
    fn is_armed(&self, at_ns: u64) -> bool;
    /// The slot is given up; the backend has dropped the socket.
    fn on_removed(self: &Arc<Self>);
    /// Begins a run that the endpoint has put into the batch, here, which runs user code, or
    /// elsewhere. What is returned is a run that waits for its flush, and for nothing else: the
    /// poller keeps it, and goes on with it when [asked to](Batch::go_on).
    fn begin(self: &Arc<Self>, handed: Self::Handed) -> Option<Run>;
    /// Ends a run that has started, and that nobody will begin.
    fn give_up(self: &Arc<Self>, handed: Self::Handed);
    /// Does what else the endpoint has put into the batch. Runs user code as well.
    fn act(self: &Arc<Self>, action: Action);
    /// Goes on with a run that was kept.
    fn go_on(self: &Arc<Self>, run: Run) -> Option<Run>;
    /// Whether workers may do its runs. From any thread, with locks held: it only looks.
    fn is_movable(&self) -> bool;
    /// Has workers do a run that this poller does not come to. From any thread; only where it is
    /// [movable](Self::is_movable).
    fn run_elsewhere(self: Arc<Self>, handed: Self::Handed);
    /// Sends `first`, then what else a flusher has left to a poller that does not come to it: so
    /// the caller has `first`, or the [`Command::Send`](super::Command::Send), and the poller has
    /// neither. From any thread.
    fn send_here(self: &Arc<Self>, first: Chain);
    /// Closes it, and asks for its removal once its output is sent.
    fn close(self: &Arc<Self>);
    /// Closes it, and asks for its removal at once: what it was to send is dropped.
    fn cut(self: &Arc<Self>);
    /// Bytes that it has been given and nobody has read.
    fn unread_bytes(&self) -> usize;
    /// Swaps what was flushed on this thread since the last time into `into`, which is empty.
    fn take_flushed(into: &mut Vec<(Token, Chain)>);
}

/// Takes the connections of one listener.
pub(crate) trait Accept: Send + Sync {
    fn on_accepted(&self, socket: Socket, peer: PeerAddr);
    /// Accepting failed. `true`: try again after a pause.
    fn on_failed(&self, error: &io::Error) -> bool;
    /// The listener is closed.
    fn on_removed(&self);
}

/// Hears of a poller that has failed: that has ended though nobody asked it to.
pub(crate) trait Watcher: Send + Sync {
    fn poller_failed(&self, why: &str);
}

/// What an endpoint wants run once everything is collected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// Tell the user that the peer has gone.
    Disconnected,
    /// Nothing more will happen: close.
    Close,
    /// Close if there is nothing to do.
    CloseIfIdle,
    /// It is closed, and the last of its output is sent: let go of the socket.
    End,
    /// No byte has moved for too long.
    Cut,
}

/// What a round collected, to be done in this order.
pub(crate) struct Batch<E: Endpoint> {
    pub(crate) wakers: Vec<Waker>,
    /// Whose kept runs go on. Nobody else may take those, however long the poller is held up.
    pub(super) go_ons: Vec<Arc<E>>,
    /// What others can steal. Only while somebody watches the poller.
    pub(super) open: Worker<Job<E>>,
    /// Some went there since it was last run empty.
    pub(super) is_open: bool,
    /// How many more jobs this round puts there.
    pub(super) open_left: usize,
    pub(super) jobs: Vec<Job<E>>,
    /// The clock after the last wait that ended with a timer armed.
    pub(crate) now_ns: u64,
    /// Set while too much block memory is in use: what each connection may hold.
    pub(crate) share_bytes: Option<usize>,
}

impl<E: Endpoint> Batch<E> {
    pub(super) fn new() -> Batch<E> {
        Batch {
            wakers: Vec::new(),
            go_ons: Vec::new(),
            open: Worker::new_fifo(),
            is_open: false,
            open_left: 0,
            jobs: Vec::new(),
            now_ns: now_ns(),
            share_bytes: None,
        }
    }

    #[inline(always)]
    pub(crate) fn start(&mut self, endpoint: &Arc<E>, handed: E::Handed) {
        self.push(Job::Begin(Arc::clone(endpoint), handed));
    }

    pub(crate) fn act(&mut self, endpoint: &Arc<E>, action: Action) {
        self.push(Job::Act(Arc::clone(endpoint), action));
    }

    /// Goes on with the run that the poller keeps for the endpoint.
    #[inline]
    pub(crate) fn go_on(&mut self, endpoint: &Arc<E>) {
        self.go_ons.push(Arc::clone(endpoint));
    }

    #[inline(always)]
    pub(super) fn push(&mut self, job: Job<E>) {
        if self.open_left > 0 {
            self.push_open(job);
        } else {
            self.jobs.push(job);
        }
    }

    #[inline(never)]
    fn push_open(&mut self, job: Job<E>) {
        self.open_left -= 1;
        self.is_open = true;
        self.open.push(job);
    }
}
