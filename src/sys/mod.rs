//! The kernel interface: descriptors, bytes and tokens.
//!
//! A [`Backend`] carries out operations and reports completed operations. It reports readiness only
//! where the sink receives by itself: see [`Backend::watch_readable`]. One poller thread owns a
//! backend and makes all calls to it. Other threads use only [`Socket`], [`Wake`] and
//! [`SendRings`].
//!
//! A backend keeps these promises:
//! 1. Each completion carries the token of its operation. `Removed` is a token's last completion.
//! 2. The backend holds the `Arc<Socket>` from the first operation until `Removed`. A send that
//!    another thread started, and a zero-copy send, hold an `Arc<Socket>` of their own until
//!    `Sent`. So no operation names a closed descriptor.
//! 3. A token has at most one send in flight. The backend owns the memory of the send until `Sent`,
//!    and longer where the kernel still uses it after a zero-copy send.
//! 4. `Received` comes in stream order. After `Ended` come only `Sent` and `Removed`, and a second
//!    `Ended` with an error if the backend has lost completions.

mod buffer_size;
pub(crate) mod epoll;
mod lending;
mod progress;
pub(crate) mod socket;
pub(crate) mod time_slice;
pub(crate) mod uring;
pub(crate) mod usage;
pub(crate) mod wake;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use crate::address::PeerAddr;
use crate::buffer::{Chain, Pool, Slice};
use crate::config::ZeroCopyRule;
use crate::counters::Counters;

pub(crate) use socket::Socket;
pub(crate) use uring::SendRings;
pub(crate) use wake::Wake;

/// Names the owner of operations: the index of a poller's slot, and the slot's generation. The
/// poller makes tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Token(u64);

impl Token {
    /// The token of no slot.
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

/// A completed operation.
pub(crate) enum Completion<'a> {
    /// A listener has a new connection.
    Accepted(Socket, PeerAddr),
    /// A listener could not accept. The listener is paused until `resume`.
    AcceptFailed(io::Error),
    /// An outgoing connection is established and receives from now on, or connecting failed.
    Connected(io::Result<()>),
    Received(Received<'a>),
    /// A receive would find bytes, the end or an error: see [`Backend::watch_readable`]. `true`: an
    /// urgent byte may have come, and a receive stops before it.
    Readable(u32, bool),
    /// The peer ended its side while reception was paused. The kernel may still hold bytes.
    HungUp,
    /// Reception is over: end of stream, or an error.
    Ended(io::Result<()>),
    /// The kernel took every byte of the send, or the send failed.
    Sent(io::Result<usize>),
    /// The backend has forgotten the token and dropped its socket.
    Removed,
}

/// Bytes from a peer.
pub(crate) enum Received<'a> {
    /// The sink copies these bytes before it returns.
    Copied(&'a [u8]),
    /// The sink owns these bytes.
    Lent(Slice),
}

/// What the sink wants after a completion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flow {
    Continue,
    /// Stop receiving or accepting until `resume`.
    Pause,
}

/// How a flush reaches the kernel.
pub(crate) enum Outlet {
    /// The flushing thread sends. The backend sends the bytes that the socket did not take.
    Flusher,
    /// The backend sends together with the poller's next wait. The flushing thread sends where the
    /// poller sleeps or is held up, and where there are many bytes that no zero-copy send takes.
    Poller(ZeroCopyRule),
    /// The flushing thread pushes the send to a ring that a kernel thread polls.
    Rings(Arc<SendRings>),
}

impl Outlet {
    /// Whether kernel threads make all sends.
    pub(crate) fn is_of_kernel_threads(&self) -> bool {
        matches!(self, Outlet::Rings(_))
    }
}

/// Takes completions while the backend collects them. A sink must not run user code.
pub(crate) trait Sink {
    fn complete(&mut self, token: Token, completion: Completion<'_>) -> Flow;
}

/// Carries out operations for one poller thread. `resume`, `send` and `remove` take tokens that
/// were passed to `listen`, `attach` or `connect`, and not yet to `remove`.
pub(crate) trait Backend: Sized {
    /// The settings.
    type Options: Clone + Send + 'static;

    /// Call this on the poller's thread. `wake` interrupts a wait.
    fn new(
        wake: &Arc<Wake>,
        pool: &Pool,
        counters: &Arc<Counters>,
        options: &Self::Options,
    ) -> io::Result<Self>;

    /// Starts accepting on `listener`.
    fn listen(&mut self, token: Token, listener: Arc<Socket>) -> io::Result<()>;

    /// Starts receiving on a connected stream. io_uring receives about `at_once` bytes before the
    /// sink can ask for a pause; epoll ignores `at_once`.
    fn attach(&mut self, token: Token, socket: Arc<Socket>, at_once: usize) -> io::Result<()>;

    /// Starts connecting. Reports `Connected`, and then receives as after `attach`.
    fn connect(&mut self, token: Token, socket: Arc<Socket>, peer: &PeerAddr, at_once: usize);

    /// Receives or accepts again after a pause, or after
    /// [`watch_readable`](Self::watch_readable).
    fn resume(&mut self, token: Token);

    /// Stops receiving, until `resume`. Then reports `Readable(number, _)` once the backend has no
    /// receive in flight and the socket has bytes, an end or an error, and again after each further
    /// arrival. The caller may receive from the first report on.
    fn watch_readable(&mut self, token: Token, number: u32);

    /// Sends all of `gather`, waiting for room in the socket as often as needed. Reports `Sent`.
    fn send(&mut self, token: Token, gather: Chain);

    /// Ends every operation of `token` and drops unsent bytes. Reports `Removed`. A send that
    /// another thread started, and a zero-copy send, end only with the socket, so the caller first
    /// shuts down a socket that still sends.
    fn remove(&mut self, token: Token);

    /// Waits for completions, at most `timeout`, and passes them to `sink`. With `None` the wait
    /// ends with a completion or a wake-up. Returns `true` when the pass is complete: `sink` has
    /// every completion that existed when the pass began. The next call begins a new pass.
    fn wait(&mut self, timeout: Option<Duration>, sink: &mut impl Sink) -> io::Result<bool>;

    /// Whether the backend has more receive buffers than it needs without traffic, and
    /// [`shrink`](Self::shrink) can give them back.
    fn has_grown(&self) -> bool;

    /// Gives receive buffers back to the pool that were not needed since the last call.
    fn shrink(&mut self);
}
