//! Outgoing connections.
//!
//! The code runs on the thread that polls the dial's future; a poller performs the connect and its
//! timers. A dial that times out or is dropped closes its socket.

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
    Connection, Core, Remote, attach, current_poller, start_connect, wait_connected,
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

/// Makes a connection from a connected stream socket. See [`Dialer::adopt`].
///
/// # Errors
/// See [`Dialer::adopt`].
pub fn adopt(fd: OwnedFd) -> Result<Connection> {
    Dialer::new().adopt(fd)
}

/// Makes connections that share settings.
///
/// Each connection belongs to one of the given [`pollers`](Self::pollers). Without them, a
/// connection that is made in a handler on a poller belongs to this poller, so both connections of
/// a proxy are on one thread. Other connections belong to one poller that the process shares.
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
    /// A dialer without timeouts and with the default limits.
    pub fn new() -> Dialer {
        Dialer::default()
    }

    /// Limits the time to connect: the lookup of the name, and the attempts on all its addresses.
    /// Zero means no limit.
    pub fn timeout(mut self, timeout: Duration) -> Dialer {
        self.timeout = some(timeout);
        self
    }

    /// The local address of TCP connections.
    pub fn local_addr(mut self, addr: SocketAddr) -> Dialer {
        self.local_addr = Some(addr);
        self
    }

    /// The congestion control of TCP connections, by its name in the kernel, such as `reno` or
    /// `cubic`. The default is that of the host.
    pub fn congestion_control(mut self, name: &str) -> Dialer {
        self.socket.congestion_control = Some(name.to_owned());
        self
    }

    /// The sizes in bytes of the socket buffers of each connection. With 0 (the default), the
    /// kernel adapts the size to the traffic. The kernel doubles the given size, and limits it by
    /// `net.core.rmem_max` and `wmem_max`.
    pub fn socket_buffers(mut self, receive_bytes: usize, send_bytes: usize) -> Dialer {
        self.socket.receive_buffer_bytes = receive_bytes;
        self.socket.send_buffer_bytes = send_bytes;
        self
    }

    /// The pollers that the connections belong to.
    pub fn pollers(mut self, pollers: Pollers) -> Dialer {
        self.pollers = Some(pollers);
        self
    }

    /// Limits each wait of a read; zero means no limit. [`Connection::until`] starts a new wait
    /// after each received byte.
    pub fn read_timeout(mut self, timeout: Duration) -> Dialer {
        self.limits.read_timeout = some(timeout);
        self
    }

    /// Limits each wait of a flush; zero means no limit.
    pub fn write_timeout(mut self, timeout: Duration) -> Dialer {
        self.limits.write_timeout = some(timeout);
        self
    }

    /// Closes a connection when no byte has moved in either direction for `timeout`; zero means
    /// never.
    pub fn idle_timeout(mut self, timeout: Duration) -> Dialer {
        self.limits.idle_timeout = some(timeout);
        self
    }

    /// Reception of a connection pauses when `high_bytes` are buffered and no read waits for more.
    /// It resumes when no more than `low_bytes` are buffered.
    pub fn input_watermarks(mut self, low_bytes: usize, high_bytes: usize) -> Dialer {
        (self.limits.input_low_bytes, self.limits.input_high_bytes) = (low_bytes, high_bytes);
        self
    }

    /// The largest number of submitted bytes of a connection that are not yet in the kernel. While
    /// there are as many, `submit` fails and `flush` waits.
    pub fn output_bytes_max(mut self, bytes: usize) -> Dialer {
        self.limits.output_bytes_max = bytes;
        self
    }

    /// The largest length that a read may ask for. It protects memory from length fields that a
    /// peer sends.
    pub fn read_bytes_max(mut self, bytes: usize) -> Dialer {
        self.limits.read_bytes_max = bytes;
        self
    }

    /// Connects to `address` (see [`Address`]). Tries each address of the name, in order, until one
    /// succeeds.
    ///
    /// Names are looked up on the threads of [`unblock`](crate::unblock), at most 64 at a time;
    /// further dials by name wait, in order. A lookup that has begun continues after its dial is
    /// dropped or has timed out. So a name server that does not answer delays only dials by name:
    /// most threads of `unblock` stay free for other calls.
    ///
    /// # Errors
    /// Invalid address or settings; dial timeout; otherwise the error of the last address.
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

    /// Makes a connection from a connected stream socket. The socket becomes non-blocking.
    ///
    /// # Errors
    /// Invalid settings; an error of the kernel, for example if `fd` is not a stream socket.
    pub fn adopt(&self, fd: OwnedFd) -> Result<Connection> {
        self.limits.check()?;
        let socket = Socket::adopt(fd).map_err(|error| Error::io("adopt", error))?;
        socket.set_nodelay().map_err(|error| Error::io("adopt", error))?;
        let peer = socket.peer_addr().map_err(|error| Error::io("adopt", error))?;
        let socket = Arc::new(socket);
        let limits = Arc::new(self.limits.clone());
        let core = Core::new(&self.remote()?, &limits, None, Arc::clone(&socket), peer);
        attach(&core, socket);
        Ok(Connection::owned(&core))
    }

    fn remote(&self) -> Result<Arc<Remote>> {
        match (&self.pollers, current_poller()) {
            (Some(pollers), _) => Ok(Arc::clone(pollers.pick())),
            (None, Some(current)) => Ok(current),
            (None, None) => Ok(Arc::clone(Pollers::shared()?.pick())),
        }
    }

    fn timed_out(&self, address: &str) -> Error {
        Error::dial_timeout(address, self.timeout.unwrap_or_default())
    }

    /// Looks up the name on a thread for blocking calls.
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
                // The kernel chose the target port as the local port, and TCP connected the socket
                // to itself. No server listens on this port.
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
        let core = Core::new(remote, limits, None, Arc::clone(&socket), peer.clone());
        // Dropping the connection closes the socket, if this future is dropped or fails below.
        let connection = Connection::owned(&core);
        start_connect(&core, socket, peer.clone());
        match wait_connected(&core, until_ns).await {
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

/// Waits for `future`, at most until `until_ns`. Returns `None` after that time, or when the poller
/// has ended.
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
