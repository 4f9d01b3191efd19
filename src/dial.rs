//! Outgoing connections.
//!
//! The code runs on the thread that polls the dial's future; a poller performs the connect and its
//! timers. A dial that times out or is dropped closes its sockets.
//!
//! ```text
//! address → resolve: look up, choose, order → race: attempts with overlap → connection
//! ```

mod race;
mod resolve;

use std::future::{Future, poll_fn};
use std::io;
use std::net::SocketAddr;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::pin::pin;
use std::slice;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use crate::address::{Address, Target};
use crate::config::{self, Limits, SocketOptions, some};
use crate::connection::{Connection, Core, Remote, attach, current_poller};
use crate::error::{Error, Result};
use crate::poller::timers::{NEVER, ns_after};
use crate::pollers::Pollers;
use crate::sys::socket::{DialOptions, Socket, SocketHook};
use crate::user_code;

use race::{Attempts, Cut, Failure, Tried, within};
use resolve::{Allowed, Resolver, look_up};

pub use resolve::Resolve;

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
    attempt_timeout: Option<Duration>,
    attempt_delay: Option<Duration>,
    resolver: Option<Resolver>,
    pollers: Option<Pollers>,
    limits: Limits,
    dialing: DialOptions,
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

    /// Limits the time of the attempt on one address, its retries included. Zero, the default,
    /// means no limit of its own. Linux itself gives up after about two minutes without an answer
    /// (`tcp_syn_retries`, tcp(7)).
    pub fn attempt_timeout(mut self, timeout: Duration) -> Dialer {
        self.attempt_timeout = some(timeout);
        self
    }

    /// How long an attempt may run before the attempt on the next address of the name begins: the
    /// "connection attempt delay" of RFC 8305. From 10 ms to 2 s; the default is 250 ms.
    pub fn attempt_delay(mut self, delay: Duration) -> Dialer {
        self.attempt_delay = Some(delay);
        self
    }

    /// Looks up names with `resolver`, in place of the system's resolver.
    pub fn resolver(mut self, resolver: impl Resolve) -> Dialer {
        self.resolver = Some(Resolver::new(resolver));
        self
    }

    /// The local address of TCP connections; with the port 0 the kernel chooses the port. By
    /// default the kernel chooses both. Addresses of the other family are not tried. Unix sockets
    /// ignore this setting.
    pub fn local_addr(mut self, addr: SocketAddr) -> Dialer {
        self.dialing.local_addr = Some(addr);
        self
    }

    /// The options of the sockets of all connections, in place of those that were set before.
    /// Sockets of [`adopt`](Self::adopt) keep their own, but for `TCP_NODELAY`, which is set unless
    /// these options say otherwise.
    pub fn socket_options(mut self, options: SocketOptions) -> Dialer {
        self.dialing.socket = options;
        self
    }

    /// See [`SocketOptions::or_lost_after`].
    pub(crate) fn or_lost_after(mut self, timeout: Duration) -> Dialer {
        self.dialing.socket = self.dialing.socket.or_lost_after(timeout);
        self
    }

    /// Changes [`SocketOptions::congestion_control`] of the socket options.
    pub fn congestion_control(mut self, name: &str) -> Dialer {
        self.dialing.socket = self.dialing.socket.congestion_control(name);
        self
    }

    /// Changes [`SocketOptions::buffers`] of the socket options.
    pub fn socket_buffers(mut self, receive_bytes: usize, send_bytes: usize) -> Dialer {
        self.dialing.socket = self.dialing.socket.buffers(receive_bytes, send_bytes);
        self
    }

    /// `TCP_FASTOPEN_CONNECT`: to a server from which the kernel has a cookie, the first flush
    /// connects and sends its bytes with the SYN. This saves a round trip. Off by default. Unix
    /// sockets ignore this setting.
    ///
    /// With a cookie, [`connect`](Self::connect) returns before anything is sent. So the first
    /// flush reports that no server answers, and **a connection that reads before it has flushed
    /// waits for ever**. A server may receive the first bytes twice. Use this only for requests
    /// that may be repeated, and with a read timeout.
    ///
    /// A host whose `net.ipv4.tcp_fastopen` does not have the bit 1 refuses the option: `connect`
    /// fails with `EOPNOTSUPP`.
    pub fn fast_open(mut self, on: bool) -> Dialer {
        self.dialing.fast_open = on;
        self
    }

    /// Calls `hook` with each socket before it is bound to the
    /// [local address](Self::local_addr) and connected. The hook can set options that have no
    /// setting here, such as `SO_MARK`. It runs after the other options are set, on the thread that
    /// polls the dial, once for each attempt to connect.
    ///
    /// An error of the hook ends the dial, without further attempts. A panic of the hook unwinds
    /// out of the dial. A dial of a [`Client`](crate::rpc::Client), and one that a
    /// [`Pool`](crate::rpc::Pool) makes in the background, fails then. The hook must not block.
    ///
    /// # Examples
    /// ```
    /// # use ringpoll::Dialer;
    /// let dialer = Dialer::new().before_connect(|fd| {
    ///     Ok(rustix::net::sockopt::set_ip_ttl(fd, 16)?)
    /// });
    /// # drop(dialer);
    /// ```
    pub fn before_connect(
        mut self,
        hook: impl Fn(BorrowedFd<'_>) -> io::Result<()> + Send + Sync + 'static,
    ) -> Dialer {
        self.dialing.before_connect = Some(SocketHook::new(hook));
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

    /// Ends the wait of a flush when its peer has taken no byte for `timeout`; zero means no limit.
    /// See [`Handle::set_write_stall_timeout`](crate::Handle::set_write_stall_timeout).
    pub fn write_stall_timeout(mut self, timeout: Duration) -> Dialer {
        self.limits.write_stall_timeout = some(timeout);
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

    /// Makes a read of a [`Connection`] that has to wait submit the written bytes first. The
    /// default is `false`. See [`Connection`](Connection#pipelining).
    pub fn submit_before_read(mut self, submit: bool) -> Dialer {
        self.limits.submit_before_read = submit;
        self
    }

    /// The largest length that a read may ask for. It protects memory from length fields that a
    /// peer sends.
    pub fn read_bytes_max(mut self, bytes: usize) -> Dialer {
        self.limits.read_bytes_max = bytes;
        self
    }

    /// Connects to `address` (see [`Address`]).
    ///
    /// Dropping the future, at any time, closes its sockets and removes its timers. The time limits
    /// hold on every executor and thread, also where the future is polled in a handler.
    ///
    /// # Names with several addresses
    /// The dial tries the addresses with overlap, as RFC 8305 ("happy eyeballs") describes. IPv4
    /// and IPv6 addresses take turns; the first address of the resolver comes first, and within a
    /// family the order of the resolver stays. The next attempt begins when the attempt before it
    /// has run for the [attempt delay](Self::attempt_delay), or as soon as any attempt has failed.
    /// The first connection wins, and the other attempts are closed. A server may therefore accept
    /// a connection that ends without a byte.
    ///
    /// At most 64 addresses of a name are tried, and further ones are ignored. Addresses whose
    /// family differs from that of the [local address](Self::local_addr) are not tried.
    ///
    /// # Names
    /// Without a [`resolver`](Self::resolver), names are looked up by the system on the threads of
    /// [`unblock`](crate::unblock), at most 64 at a time; further dials by name wait, in order. A
    /// lookup that has begun continues after its dial is dropped or has timed out. So a name server
    /// that does not answer delays only dials by name: most threads of `unblock` stay free for
    /// other calls.
    ///
    /// # Errors
    /// Invalid address or settings; an error of the resolver; no address of the family that
    /// `address` or the local address asks for; dial timeout, if the dial has reached its time
    /// limit or the last attempt to fail has reached that of an attempt; a
    /// [socket option](SocketOptions) that the kernel refuses, or an error of
    /// [`before_connect`](Self::before_connect), which end the dial at once; otherwise the error of
    /// the last attempt to fail. If there are several addresses, the message says how many were
    /// tried, and names the address of this attempt.
    ///
    /// # Examples
    /// ```no_run
    /// use std::time::Duration;
    ///
    /// # async fn run() -> ringpoll::Result<()> {
    /// let dialer = ringpoll::Dialer::new()
    ///     .timeout(Duration::from_secs(10))
    ///     .attempt_timeout(Duration::from_secs(3));
    /// let mut conn = dialer.connect("example.com:80").await?;
    /// conn.write_copy(b"HEAD / HTTP/1.0\r\n\r\n")?;
    /// conn.flush().await
    /// # }
    /// ```
    pub async fn connect(&self, address: &str) -> Result<Connection> {
        self.limits.check()?;
        let delay = self.checked_attempt_delay()?;
        let parsed: Address = address.parse()?;
        let attempts = Attempts {
            remote: &self.remote()?,
            limits: Arc::new(self.limits.clone()),
            dialing: &self.dialing,
            timeout: self.attempt_timeout,
            delay,
        };
        let until_ns = self.timeout.map_or(NEVER, ns_after);
        let mut tried = Tried::default();
        let dial = self.dial(address, &parsed, &attempts, &mut tried);
        match within(attempts.remote, until_ns, dial).await {
            Ok(done) => done,
            Err(Cut::Late) => {
                let after = self.timeout.unwrap_or_default();
                Err(Error::dial_timeout(&format!("{address}{tried}"), after))
            }
            Err(Cut::PollerEnded) => Err(Error::closed("connect")),
        }
    }

    /// [`connect`](Self::connect) for a task of the library. A panic of the user's code becomes an
    /// error.
    pub(crate) async fn connect_guarded(&self, address: &str) -> Result<Connection> {
        let mut dial = pin!(self.connect(address));
        poll_fn(|cx| match user_code::attempt("dial", || dial.as_mut().poll(cx)) {
            Ok(polled) => polled,
            Err(panic) => {
                let message = format!("connect {address}: panicked: {panic}");
                Poll::Ready(Err(Error::panicked(message)))
            }
        })
        .await
    }

    /// Makes a connection from a connected stream socket. The socket becomes non-blocking.
    ///
    /// # Errors
    /// Invalid settings; an error of the kernel, for example if `fd` is not a stream socket.
    pub fn adopt(&self, fd: OwnedFd) -> Result<Connection> {
        self.limits.check()?;
        let socket = Socket::adopt(fd).map_err(|error| Error::io("adopt", error))?;
        socket.adopt_nodelay(&self.dialing.socket).map_err(|error| Error::io("adopt", error))?;
        let peer = socket.peer_addr().map_err(|error| Error::io("adopt", error))?;
        let socket = Arc::new(socket);
        let limits = Arc::new(self.limits.clone());
        let core = Core::new(&self.remote()?, &limits, None, Arc::clone(&socket), peer);
        attach(&core, socket);
        Ok(Connection::owned(&core))
    }

    /// A poller for a connection, or for a task that makes connections.
    pub(crate) fn remote(&self) -> Result<Arc<Remote>> {
        match (&self.pollers, current_poller()) {
            (Some(pollers), _) => Ok(Arc::clone(pollers.pick())),
            (None, Some(current)) => Ok(current),
            (None, None) => Ok(Arc::clone(Pollers::shared()?.pick())),
        }
    }

    /// The poller for the timers of these dials. Unlike [`remote`](Self::remote), this takes no
    /// turn in the balance of connections over pollers.
    pub(crate) fn home(&self) -> Result<Arc<Remote>> {
        match (&self.pollers, current_poller()) {
            (None, Some(current)) => Ok(current),
            _ => self.lasting_home(),
        }
    }

    /// The poller for background work that goes on after the current handler and its server.
    pub(crate) fn lasting_home(&self) -> Result<Arc<Remote>> {
        match &self.pollers {
            Some(pollers) => Ok(Arc::clone(&pollers.remotes()[0])),
            None => Ok(Arc::clone(&Pollers::shared()?.remotes()[0])),
        }
    }

    fn checked_attempt_delay(&self) -> Result<Duration> {
        let delay = self.attempt_delay.unwrap_or(config::DIAL_ATTEMPT_DELAY);
        let (least, most) = config::DIAL_ATTEMPT_DELAYS.into_inner();
        if delay < least || delay > most {
            return Err(Error::invalid(format!(
                "attempt delay {delay:?}: it is from {least:?} to {most:?}"
            )));
        }
        Ok(delay)
    }

    /// [`connect`](Self::connect) without the time limit.
    async fn dial(
        &self,
        text: &str,
        address: &Address,
        attempts: &Attempts<'_>,
        tried: &mut Tried,
    ) -> Result<Connection> {
        let allowed = Allowed { address, local: self.dialing.local_addr };
        let (known, found);
        let peers = match address.target() {
            Target::Peer(peer) => {
                peer.as_inet().map_or(Ok(()), |addr| allowed.check(&[addr]))?;
                known = peer;
                slice::from_ref(&known)
            }
            Target::Name { host, port } => {
                let all = look_up(host, port, self.resolver.as_ref()).await?;
                found = allowed.in_order(&all)?;
                &found[..]
            }
        };
        let raced = attempts.race(peers, tried).await;
        raced.map_err(|failure| self.failed(text, tried, failure))
    }

    fn failed(&self, address: &str, tried: &Tried, failure: Failure) -> Error {
        let (peer, error) = match failure {
            Failure::Setup(setup) => return setup.of(format_args!("connect {address}")),
            Failure::Address(peer, error) => (peer, error),
        };
        let place = match tried.is_one() {
            true => address.to_owned(),
            false => format!("{address}{tried}: {peer}"),
        };
        // An error of the kernel has a number: `ETIMEDOUT` is no limit of this dialer.
        let is_own = error.kind() == io::ErrorKind::TimedOut && error.raw_os_error().is_none();
        match self.attempt_timeout {
            Some(limit) if is_own => Error::dial_timeout(&place, limit),
            _ => Error::io(format_args!("connect {place}"), error),
        }
    }
}
