//! The kernel: descriptors, bytes and tokens, nothing above them.
//!
//! A [`Backend`] carries out operations and reports what is *done*, never what is possible.
//! Everything here is called by one poller thread, which owns the backend; only [`Socket`] and
//! [`Wake`] are shared.
//!
//! What a backend promises:
//! 1. A token passed in is reported back with each completion, until `Removed`, which is the last
//!    one.
//! 2. It holds the `Arc<Socket>` from the first operation to `Removed`, and a send that a flusher
//!    has started holds one of its own: so no operation names a closed descriptor.
//! 3. At most one gathered send is in flight per token, and its memory belongs to the backend until
//!    `Sent`.
//! 4. `Received` comes in stream order; nothing follows `Ended` but `Sent` and `Removed`.

pub(crate) mod epoll;
mod progress;
pub(crate) mod socket;
pub(crate) mod turns;
pub(crate) mod uring;
pub(crate) mod usage;
pub(crate) mod wake;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use crate::address::PeerAddr;
use crate::buffer::{Chain, Pool, Slice};
use crate::counters::Counters;

pub(crate) use socket::Socket;
pub(crate) use uring::SendRings;
pub(crate) use wake::Wake;

/// Names an operation's owner: a slot's index and its generation. Made by the poller, opaque here
/// but for the index.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Token(u64);

impl Token {
    /// Names no slot.
    pub(crate) const NONE: Token = Token(u64::MAX);

    pub(crate) fn new(index: u32, generation: u32) -> Token {
        Token(u64::from(generation) << 32 | u64::from(index))
    }

    pub(crate) fn from_bits(bits: u64) -> Token {
        Token(bits)
    }

    pub(crate) fn bits(self) -> u64 {
        self.0
    }

    pub(crate) fn index(self) -> usize {
        (self.0 & u64::from(u32::MAX)) as usize
    }

    pub(crate) fn generation(self) -> u32 {
        (self.0 >> 32) as u32
    }
}

/// An operation that is done.
pub(crate) enum Completion<'a> {
    /// A listener has a new connection.
    Accepted(Socket, PeerAddr),
    /// A listener could not accept; it is paused until `resume`.
    AcceptFailed(io::Error),
    /// An outgoing connection stands, and receives from now on; or it failed.
    Connected(io::Result<()>),
    Received(Received<'a>),
    /// The peer ended its side while reception is paused; bytes may still be in the kernel.
    HungUp,
    /// Nothing more will be received: end of stream, or the reason.
    Ended(io::Result<()>),
    /// The send is through, whole, or it failed.
    Sent(io::Result<usize>),
    /// The backend has forgotten the token and dropped its socket.
    Removed,
}

/// Bytes from a peer.
pub(crate) enum Received<'a> {
    /// To be copied out before the call returns.
    Copied(&'a [u8]),
    /// In memory of their own.
    Lent(Slice),
}

/// What the owner of a token wants after a completion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flow {
    Continue,
    /// Stop receiving or accepting until `resume`.
    Pause,
}

/// How a flush reaches the kernel.
pub(crate) enum Outlet {
    /// The flusher sends; what the socket does not take is left to the backend.
    Flusher,
    /// The backend sends, together with the poller's next wait; while the poller sleeps or is held
    /// up, and where there is much to send, the flusher.
    Poller,
    /// The flusher puts it where a kernel thread finds it.
    Rings(Arc<SendRings>),
}

/// Takes completions as the backend collects them. It must not run user code: it only files them.
pub(crate) trait Sink {
    fn complete(&mut self, token: Token, completion: Completion<'_>) -> Flow;
}

/// Carries out operations for one poller thread. Tokens must be in use: `attach`ed, not yet
/// `remove`d.
pub(crate) trait Backend: Sized {
    /// What can be set.
    type Options: Clone + Send + 'static;

    /// Called on the poller's own thread; `wake` interrupts a wait.
    fn new(
        wake: &Arc<Wake>,
        pool: &Pool,
        counters: &Arc<Counters>,
        options: &Self::Options,
    ) -> io::Result<Self>;

    /// Starts accepting on `listener`.
    fn listen(&mut self, token: Token, listener: Arc<Socket>) -> io::Result<()>;

    /// Starts receiving on a connected stream: about `at_once` bytes, where the backend can tell,
    /// before the sink may ask for a pause.
    fn attach(&mut self, token: Token, socket: Arc<Socket>, at_once: usize) -> io::Result<()>;

    /// Starts connecting; reports `Connected`, then receives as from `attach`.
    fn connect(&mut self, token: Token, socket: Arc<Socket>, peer: &PeerAddr, at_once: usize);

    /// Receives or accepts again after a pause.
    fn resume(&mut self, token: Token);

    /// Sends all of `gather`, however often the socket is full meanwhile; reports `Sent`.
    fn send(&mut self, token: Token, gather: Chain);

    /// Ends every operation of `token`, unsent bytes included; reports `Removed`. What a flusher
    /// has started ends with the socket: whoever removes a connection in mid-send shuts it down
    /// first.
    fn remove(&mut self, token: Token);

    /// Waits for completions, at most `timeout` (`None`: until there is one, or a wake-up), and
    /// files them in `sink`. `true`: the pass is complete, so every completion that existed when
    /// the pass began has been filed. The next call begins a new pass.
    fn wait(&mut self, timeout: Option<Duration>, sink: &mut impl Sink) -> io::Result<bool>;
}
