//! The listeners of a server: their settings, and making or adopting them.
//!
//! Each method changes the [`ServerBuilder`], on the thread that starts the server.

use std::io;
use std::net::TcpListener;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::Duration;

use super::{Bound, Server, ServerBuilder};
use crate::address::{Address, PeerAddr};
use crate::config::{SocketOptions, some};
use crate::error::{Error, Result};
use crate::sys::socket::{Listener, Socket, SocketError, SocketHook, listen};

/// Settings of listeners. Each applies to the listeners that [`listen`](Self::listen) and
/// [`bind`](Self::bind) add after the call. A value that the kernel refuses is an error there, as
/// [`SocketOptions`] describes it.
impl ServerBuilder {
    /// The options of listeners and of their connections, in place of those that were set before.
    /// Adopted listeners keep their own, but for `TCP_NODELAY`, which is set unless these options
    /// say otherwise.
    pub fn socket_options(mut self, options: SocketOptions) -> Self {
        self.listening.socket = options;
        self
    }

    /// Changes [`SocketOptions::congestion_control`] of the socket options.
    pub fn congestion_control(mut self, name: &str) -> Self {
        self.listening.socket = self.listening.socket.congestion_control(name);
        self
    }

    /// Changes [`SocketOptions::buffers`] of the socket options.
    pub fn socket_buffers(mut self, receive_bytes: usize, send_bytes: usize) -> Self {
        self.listening.socket = self.listening.socket.buffers(receive_bytes, send_bytes);
        self
    }

    /// `SO_REUSEPORT`: several processes, or several listeners of this one, can share an address,
    /// and the kernel distributes the connections among them. Off by default. Unix listeners ignore
    /// this setting.
    pub fn reuse_port(mut self, reuse: bool) -> Self {
        self.listening.reuse_port = reuse;
        self
    }

    /// `IPV6_V6ONLY`: whether a listener on an IPv6 address refuses IPv4. By default the address
    /// decides: `:PORT` accepts both, and other addresses accept IPv6 only. Listeners on IPv4 and
    /// Unix addresses ignore this setting.
    pub fn v6_only(mut self, only: bool) -> Self {
        self.listening.v6_only = Some(only);
        self
    }

    /// The length of the kernel's queue of connections that are not accepted yet: 4096 by default.
    /// The kernel limits it by `net.core.somaxconn`. While the queue is full, TCP ignores further
    /// handshakes, which the clients repeat, and a connect on a Unix socket waits.
    pub fn backlog(mut self, connections: u32) -> Self {
        self.listening.backlog = Some(connections);
        self
    }

    /// `TCP_DEFER_ACCEPT`: a connection is accepted when its first bytes have arrived, or after
    /// about `timeout` without bytes. Zero, the default, accepts it after the handshake. This
    /// saves a wake-up for each connection; it delays servers that send first. Unix listeners
    /// ignore this setting.
    ///
    /// The kernel rounds the time up to 1, 3, 7, 15, 31, 63 or 127 seconds, and a longer time to
    /// further steps of 120 seconds.
    pub fn defer_accept(mut self, timeout: Duration) -> Self {
        self.listening.defer_accept = some(timeout);
        self
    }

    /// `TCP_FASTOPEN`: the kernel accepts bytes that a client sends with its SYN. `connections` is
    /// the largest number of connections that were opened so and whose handshake is not complete;
    /// the kernel limits it by `net.core.somaxconn`. Zero, the default, turns it off. Unix
    /// listeners ignore this setting.
    ///
    /// It has an effect only if `net.ipv4.tcp_fastopen` has the bit 2. Such bytes can arrive twice.
    pub fn fast_open(mut self, connections: u32) -> Self {
        self.listening.fast_open = (connections > 0).then_some(connections);
        self
    }

    /// Keeps the socket files of Unix listeners. By default, a server removes at its end the socket
    /// files that its [`listen`](Self::listen) made; so does a builder or server that is dropped
    /// before it served. Other files at such a path are never removed.
    pub fn keep_socket_file(mut self, keep: bool) -> Self {
        self.listening.keeps_file = keep;
        self
    }

    /// Calls `hook` with the socket of each listener before it is bound. The hook can set options
    /// that have no setting here, such as `SO_MARK`. It runs after the other options are set, on
    /// the thread that calls `listen`. While the address is in use, `listen` tries again with a new
    /// socket, and calls the hook for each of them. Adopted listeners are not given to the hook.
    ///
    /// An error of the hook is the error of `listen`. A panic of the hook unwinds out of `listen`.
    ///
    /// # Examples
    /// ```
    /// # use ringpoll::Server;
    /// let builder = Server::builder().before_bind(|fd| {
    ///     Ok(rustix::net::sockopt::set_ip_freebind(fd, true)?)
    /// });
    /// # drop(builder);
    /// ```
    pub fn before_bind(
        mut self,
        hook: impl Fn(BorrowedFd<'_>) -> io::Result<()> + Send + Sync + 'static,
    ) -> Self {
        self.listening.before_bind = Some(SocketHook::new(hook));
        self
    }
}

/// Listeners.
impl ServerBuilder {
    /// Adds a listener on `address` (see [`Address`]). If the address is in use, this blocks for up
    /// to 50 ms until it is free: the sockets of a killed process may exist for some milliseconds.
    ///
    /// On a Unix path, `listen` replaces a socket file that no process is bound to. If several
    /// servers start at the same time, exactly one of them gets the path, because each locks the
    /// directory (`flock(2)`). If another program holds the lock, `listen` waits up to half a
    /// second. If it cannot lock the directory, `listen` uses a free path but replaces no file.
    ///
    /// # Errors
    /// Invalid address; an error of the kernel, for example because the address is in use, or
    /// because it refuses a [socket option](SocketOptions); an error of
    /// [`before_bind`](Self::before_bind).
    pub fn listen(mut self, address: &str) -> Result<Self> {
        let parsed: Address = address.parse()?;
        let (addr, any_ip) = parsed.resolve_local()?;
        let v6_only = self.listening.v6_only.unwrap_or(!any_ip);
        let mut made = listen(&addr, v6_only, &self.listening);
        if any_ip && !v6_only && matches!(&made, Err(error) if may_lack_ipv6(error)) {
            let port = addr.as_inet().map_or(0, |inet| inet.port());
            let addr = PeerAddr::Inet(([0, 0, 0, 0], port).into());
            made = listen(&addr, false, &self.listening);
        }
        self.add(made.map_err(|error| error.of(format_args!("listen {address}")))?)?;
        Ok(self)
    }

    /// Adds a listener of the standard library.
    ///
    /// # Errors
    /// An error of the kernel.
    pub fn listener(mut self, listener: TcpListener) -> Result<Self> {
        let socket = adopt(listener.into())?;
        let adopted = socket.adopt_nodelay(&self.listening.socket);
        adopted.map_err(|error| Error::io("listen", error))?;
        self.add(Listener { socket: Arc::new(socket), file: None })?;
        Ok(self)
    }

    /// Adds a Unix listener of the standard library. The server never removes its socket file.
    ///
    /// # Errors
    /// An error of the kernel.
    pub fn unix_listener(mut self, listener: UnixListener) -> Result<Self> {
        let socket = adopt(listener.into())?;
        self.add(Listener { socket: Arc::new(socket), file: None })?;
        Ok(self)
    }

    /// Adds a listener on `address` and makes the server.
    ///
    /// # Errors
    /// As for [`listen`](Self::listen) and [`build`](Self::build).
    pub fn bind(self, address: &str) -> Result<Server> {
        self.listen(address)?.build()
    }

    fn add(&mut self, Listener { socket, file }: Listener) -> Result<()> {
        let addr = socket.local_addr().map_err(|error| Error::io("getsockname", error))?;
        self.listeners.push(Bound { socket, addr, file });
        Ok(())
    }
}

/// Whether listening may have failed because the host has no IPv6.
fn may_lack_ipv6(error: &SocketError) -> bool {
    matches!(error, SocketError::Address(_)) && !error.is_in_use()
}

fn adopt(fd: OwnedFd) -> Result<Socket> {
    Socket::adopt(fd).map_err(|error| Error::io("listen", error))
}
