//! Making connections.
//!
//! Runs on the caller's thread; the poller connects and watches the time. Giving up, by a timeout
//! or by dropping the future, closes the socket.

use std::future::{Future, pending, poll_fn};
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use crate::address::{Address, PeerAddr};
use crate::clock::now_ns;
use crate::config::{self, Limits, SocketOptions, some};
use crate::connection::{
    Connection, Remote, Shared, attach, current_poller, start_connect, wait_connected,
};
use crate::error::{Error, Result};
use crate::poller::Alarm;
use crate::poller::timers::{NEVER, ns_after};
use crate::pollers::Pollers;
use crate::sys::socket::Socket;
use crate::task;

/// Connects to `address` with the default settings. See [`Dialer`].
///
/// # Errors
/// See [`Dialer::connect`].
pub async fn connect(address: &str) -> Result<Connection> {
    Dialer::new().connect(address).await
}

/// Makes a connection of a connected stream socket. See [`Dialer::adopt`].
///
/// # Errors
/// See [`Dialer::adopt`].
pub fn adopt(fd: OwnedFd) -> Result<Connection> {
    Dialer::new().adopt(fd)
}

/// Makes connections that share settings.
///
/// Without [`pollers`](Self::pollers), a connection made inside a handler that runs on a poller
/// lives on that poller, so that a proxy's two sides meet on one thread; any other on one poller
/// that the whole process shares.
#[derive(Clone, Debug, Default)]
#[must_use]
pub struct Dialer {
    timeout: Option<Duration>,
    local_addr: Option<SocketAddr>,
    pollers: Option<Pollers>,
    limits: Limits,
    socket: SocketOptions,
}

impl Dialer {
    /// No timeouts, the default limits.
    pub fn new() -> Dialer {
        Dialer::default()
    }

    /// Bounds the making of a connection: looking its name up, and all its addresses together; zero
    /// is for ever.
    pub fn timeout(mut self, timeout: Duration) -> Dialer {
        self.timeout = some(timeout);
        self
    }

    /// The local end of TCP connections.
    pub fn local_addr(mut self, addr: SocketAddr) -> Dialer {
        self.local_addr = Some(addr);
        self
    }

    /// How TCP connections avoid congestion, by the kernel's name for it (such as
    /// `reno` or `cubic`); without this, as the host does.
    pub fn congestion_control(mut self, name: &str) -> Dialer {
        self.socket.congestion_control = Some(name.to_owned());
        self
    }

    /// Buffers of these sizes in bytes for each connection, in place of ones that the
    /// kernel adapts to the traffic; 0 is not. The kernel doubles what is asked for, up to
    /// `net.core.rmem_max` and `wmem_max`.
    pub fn socket_buffers(mut self, receive_bytes: usize, send_bytes: usize) -> Dialer {
        self.socket.receive_buffer_bytes = receive_bytes;
        self.socket.send_buffer_bytes = send_bytes;
        self
    }

    /// The pollers that connections live on.
    pub fn pollers(mut self, pollers: Pollers) -> Dialer {
        self.pollers = Some(pollers);
        self
    }

    /// Bounds each wait of a read; zero is for ever. [`Connection::until`] waits anew after each
    /// byte that comes.
    pub fn read_timeout(mut self, timeout: Duration) -> Dialer {
        self.limits.read_timeout = some(timeout);
        self
    }

    /// Bounds each wait of a flush; zero is for ever.
    pub fn write_timeout(mut self, timeout: Duration) -> Dialer {
        self.limits.write_timeout = some(timeout);
        self
    }

    /// Closes a connection on which no byte moved for so long; zero is never.
    pub fn idle_timeout(mut self, timeout: Duration) -> Dialer {
        self.limits.idle_timeout = some(timeout);
        self
    }

    /// Reception pauses when `high_bytes` are buffered and resumes at `low_bytes`.
    pub fn input_watermarks(mut self, low_bytes: usize, high_bytes: usize) -> Dialer {
        (self.limits.input_low_bytes, self.limits.input_high_bytes) = (low_bytes, high_bytes);
        self
    }

    /// The most that may wait for the peer before `submit` refuses more.
    pub fn output_bytes_max(mut self, bytes: usize) -> Dialer {
        self.limits.output_bytes_max = bytes;
        self
    }

    /// The most that one read may ask for.
    pub fn read_bytes_max(mut self, bytes: usize) -> Dialer {
        self.limits.read_bytes_max = bytes;
        self
    }

    /// Connects to `address` (see [`Address`]): to each address its name has, in order, until one
    /// answers.
    ///
    /// Names are looked up on the threads of [`unblock`](crate::unblock), at most 64 at a time;
    /// further dials by name wait, in order. A look-up that has begun goes on when its dial is
    /// dropped or has timed out: so a name server that does not answer holds up dials by name, and
    /// leaves most of those threads to others.
    ///
    /// # Errors
    /// Invalid address or settings; dial timeout; otherwise what the last address failed with.
    pub async fn connect(&self, address: &str) -> Result<Connection> {
        self.limits.check()?;
        let parsed: Address = address.parse()?;
        let until_ns = self.timeout.map_or(NEVER, ns_after);
        let remote = self.remote()?;
        let peers = self.resolve(&parsed, &remote, until_ns).await?;
        let limits = Arc::new(self.limits.clone());
        let mut failure = None;
        for (index, peer) in peers.iter().enumerate() {
            let left = peers.len() - index;
            let slice_ns = until_ns.saturating_sub(now_ns()) / left as u64;
            let peer_until_ns =
                if until_ns == NEVER { NEVER } else { now_ns().saturating_add(slice_ns) };
            match self.connect_peer(&remote, &limits, peer, peer_until_ns).await {
                Ok(connection) => return Ok(connection),
                Err(error) => failure = Some(error),
            }
        }
        Err(match failure {
            Some(error) if error.kind() != io::ErrorKind::TimedOut || self.timeout.is_none() => {
                Error::io(format_args!("connect {address}"), error)
            }
            _ => self.timed_out(address),
        })
    }

    /// Makes a connection of a connected stream socket, which becomes non-blocking.
    ///
    /// # Errors
    /// Invalid settings; the kernel's, if `fd` is no stream socket.
    pub fn adopt(&self, fd: OwnedFd) -> Result<Connection> {
        self.limits.check()?;
        let socket = Socket::adopt(fd).map_err(|error| Error::io("adopt", error))?;
        socket.set_nodelay().map_err(|error| Error::io("adopt", error))?;
        let peer = socket.peer_addr().map_err(|error| Error::io("adopt", error))?;
        let socket = Arc::new(socket);
        let limits = Arc::new(self.limits.clone());
        let shared = Shared::new(&self.remote()?, &limits, None, Arc::clone(&socket), peer);
        attach(&shared, socket);
        Ok(Connection::owned(&shared))
    }

    fn remote(&self) -> Result<Arc<Remote>> {
        match (&self.pollers, current_poller()) {
            (Some(pollers), _) => Ok(Arc::clone(pollers.pick())),
            (None, Some(here)) => Ok(here),
            (None, None) => Ok(Arc::clone(Pollers::shared()?.pick())),
        }
    }

    fn timed_out(&self, address: &str) -> Error {
        Error::dial_timeout(address, self.timeout.unwrap_or_default())
    }

    /// Asks the resolver, which blocks, on a thread for that.
    async fn resolve(
        &self,
        address: &Address,
        remote: &Arc<Remote>,
        until_ns: u64,
    ) -> Result<Vec<PeerAddr>> {
        if !address.needs_resolver() {
            return address.resolve_peers();
        }
        let asked = address.clone();
        let answer = task::look_up(move || asked.resolve_peers());
        match within(remote, until_ns, answer).await {
            Some(answer) => answer?,
            None if now_ns() >= until_ns => Err(self.timed_out(&address.to_string())),
            None => Err(Error::closed("connect")),
        }
    }

    async fn connect_peer(
        &self,
        remote: &Arc<Remote>,
        limits: &Arc<Limits>,
        peer: &PeerAddr,
        until_ns: u64,
    ) -> io::Result<Connection> {
        let mut retries = 0;
        loop {
            let error = match self.try_peer(remote, limits, peer, until_ns).await {
                Ok(connection) if !is_self_connected(&connection) => return Ok(connection),
                // A port of ours was free, was chosen, and answered itself: nobody listens there.
                Ok(_) => io::ErrorKind::ConnectionRefused.into(),
                Err(error) => error,
            };
            let backlog_full = error.kind() == io::ErrorKind::WouldBlock;
            let again = match error.kind() {
                io::ErrorKind::WouldBlock => now_ns() < until_ns,
                io::ErrorKind::AddrNotAvailable => retries < config::DIAL_RETRIES_MAX,
                io::ErrorKind::ConnectionRefused if error.raw_os_error().is_none() => {
                    retries < config::DIAL_RETRIES_MAX
                }
                _ => false,
            };
            if !again {
                return Err(if backlog_full { io::ErrorKind::TimedOut.into() } else { error });
            }
            retries += 1;
            let pause_ns = ns_after(config::DIAL_RETRY_PAUSE).min(until_ns);
            within(remote, pause_ns, pending::<()>()).await;
            if now_ns() >= until_ns {
                return Err(io::ErrorKind::TimedOut.into());
            }
        }
    }

    async fn try_peer(
        &self,
        remote: &Arc<Remote>,
        limits: &Arc<Limits>,
        peer: &PeerAddr,
        until_ns: u64,
    ) -> io::Result<Connection> {
        let local = self.local_addr.filter(|_| matches!(peer, PeerAddr::Inet(_)));
        let socket = Arc::new(Socket::for_peer(peer, local, &self.socket)?);
        let shared = Shared::new(remote, limits, None, Arc::clone(&socket), peer.clone());
        // Dropping it, with this future or on a failure below, closes the socket.
        let connection = Connection::owned(&shared);
        start_connect(&shared, socket, peer.clone());
        match wait_connected(&shared, until_ns).await {
            Some(Ok(())) => Ok(connection),
            Some(Err(error)) => Err(error),
            None => Err(io::ErrorKind::TimedOut.into()),
        }
    }
}

fn is_self_connected(connection: &Connection) -> bool {
    let peer = connection.peer_addr();
    peer.as_inet().is_some() && connection.local_addr().is_ok_and(|local| local == peer)
}

/// Waits for `future`, at most until `until_ns`. `None`: that has passed, or the poller has ended.
async fn within<T>(
    remote: &Arc<Remote>,
    until_ns: u64,
    future: impl Future<Output = T>,
) -> Option<T> {
    let mut future = pin!(future);
    let mut alarm = (until_ns != NEVER).then(|| Alarm::new(remote, until_ns));
    poll_fn(|cx| match (future.as_mut().poll(cx), &mut alarm) {
        (Poll::Ready(done), _) => Poll::Ready(Some(done)),
        (Poll::Pending, Some(alarm)) => alarm.poll(cx).map(|()| None),
        (Poll::Pending, None) => Poll::Pending,
    })
    .await
}
