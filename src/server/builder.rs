//! Setting a server up.

use std::future::Future;
use std::io;
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use super::shutdown::Progress;
use super::{Books, Bound, Callbacks, Counts, Inner, Server};
use crate::address::{Address, PeerAddr};
use crate::config::{
    self, Backend, Balance, Limits, Placement, PollMode, SocketOptions, UringOptions, some,
};
use crate::connection::{Connection, Handle, Handler, Service};
use crate::error::{Error, Result};
use crate::poller::group::Plan;
use crate::pollers::Pollers;
use crate::sync::Mutex;
use crate::sys::socket::{ListenOptions, Listener, Socket, listen};
use crate::sys::{turns, usage};
use crate::task::{Executor, Host, RuntimeContext, Spent};
use crate::threads;

/// Says what a server is to be; made by [`Server::builder`].
#[derive(Default)]
#[must_use]
pub struct ServerBuilder {
    plan: Plan,
    pollers: Option<Pollers>,
    placement: Placement,
    worker_cpus: Vec<usize>,
    context: RuntimeContext,
    limits: Limits,
    connections_max: Option<usize>,
    reuse_port: bool,
    keeps_socket_file: bool,
    socket: SocketOptions,
    connect: Option<Box<dyn Handler>>,
    request: Option<Box<dyn Handler>>,
    callbacks: Callbacks,
    listeners: Vec<Bound>,
}

/// Handlers.
///
/// A run of `on_connect` or `on_request` owns the [`Connection`], and there is one run at a time
/// for each connection.
impl ServerBuilder {
    /// Called on the poller for each new connection, before it can receive. An error refuses it.
    /// The place to set timeouts, contexts and close callbacks. Must not block.
    pub fn on_prepare(
        mut self,
        prepare: impl Fn(&Handle) -> Result<()> + Send + Sync + 'static,
    ) -> Self {
        self.callbacks.prepare = Some(Box::new(prepare));
        self
    }

    /// Runs once for each connection, before any `on_request`. It may read, write, wait and close.
    /// Without an `on_request` it serves the whole connection, which closes when it has returned
    /// and the [`Connection`] is dropped: a handler may move it elsewhere, and it stays open there.
    pub fn on_connect<H, F>(mut self, handler: H) -> Self
    where
        H: Fn(Connection) -> F + Send + Sync + 'static,
        F: Future<Output = Result<()>> + Send + 'static,
    {
        self.connect = Some(Box::new(handler));
        self
    }

    /// Runs when there are bytes to read, and again as long as some are left and it consumed any. A
    /// run that consumed none is not repeated before more arrive, so wait for what you need
    /// instead of returning: reception pauses at the high watermark unless a read waits for
    /// more. After the peer has ended its side it runs until the input is drained, or refused
    /// by a run that consumes nothing; then the output is sent and the connection closed. An error
    /// closes the connection and is reported to `on_error`.
    pub fn on_request<H, F>(mut self, handler: H) -> Self
    where
        H: Fn(Connection) -> F + Send + Sync + 'static,
        F: Future<Output = Result<()>> + Send + 'static,
    {
        self.request = Some(Box::new(handler));
        self
    }

    /// Called on the poller when the peer has closed, once, after `on_connect`, possibly beside a
    /// running `on_request`: the place to cancel it. Not called for connections that this side
    /// closes. Must not block.
    pub fn on_disconnect(mut self, disconnect: impl Fn(&Handle) + Send + Sync + 'static) -> Self {
        self.callbacks.disconnect = Some(Box::new(disconnect));
        self
    }

    /// Called when a run has failed or panicked, before its connection closes. Must not block.
    pub fn on_error(mut self, report: impl Fn(&Handle, &Error) + Send + Sync + 'static) -> Self {
        self.callbacks.error = Some(Box::new(report));
        self
    }
}

/// Threads.
impl ServerBuilder {
    /// Who talks to the kernel.
    pub fn backend(mut self, backend: Backend) -> Self {
        self.plan.backend = backend;
        self
    }

    /// Where handlers run.
    pub fn placement(mut self, placement: Placement) -> Self {
        self.placement = placement;
        self
    }

    /// Lets handlers use tokio: they, and what [`Handle::spawn`] runs, run inside the context of
    /// this runtime, wherever they are placed, so `tokio::time`, `tokio::spawn` and clients built
    /// on tokio work in them. With [`Placement::Tokio`] they run on it.
    ///
    /// Without this it is the runtime in whose context [`build`](Self::build) is called, if there
    /// is one: in a program with `#[tokio::main]` handlers can use tokio as they are.
    ///
    /// The runtime itself is the program's. Timers fire, and spawned tasks run, only while somebody
    /// drives it: one with threads of its own does that by itself, a `current_thread` one only
    /// inside `block_on`. Once it is shut down, what handlers ask of it fails or panics.
    #[cfg(feature = "tokio")]
    pub fn tokio(mut self, runtime: tokio::runtime::Handle) -> Self {
        self.context = RuntimeContext::of(runtime);
        self
    }

    /// How many pollers; 0 is one for each CPU with inline handlers, and one for 20 CPUs with a
    /// pool, or with kernel threads that poll.
    pub fn pollers(mut self, count: usize) -> Self {
        self.plan.count = count;
        self
    }

    /// Whether pollers spin before they sleep.
    pub fn poll_mode(mut self, poll_mode: PollMode) -> Self {
        self.plan.poll_mode = poll_mode;
        self
    }

    /// Settings of the io_uring backends; the others have none.
    pub fn uring(mut self, options: UringOptions) -> Self {
        self.plan.uring = options;
        self
    }

    /// How connections spread over the pollers.
    pub fn balance(mut self, balance: Balance) -> Self {
        self.plan.balance = balance;
        self
    }

    /// The CPUs that pollers may run on; empty is all.
    pub fn poller_cpus(mut self, cpus: Vec<usize>) -> Self {
        self.plan.cpus = cpus;
        self
    }

    /// The CPUs that the kernel threads of [`Backend::Sqpoll`] run on, one each, in turn; empty is
    /// those this process may use.
    pub fn sqpoll_cpus(mut self, cpus: Vec<usize>) -> Self {
        self.plan.sqpoll_cpus = cpus;
        self
    }

    /// The CPUs that the pool's workers may run on; empty is all.
    pub fn worker_cpus(mut self, cpus: Vec<usize>) -> Self {
        self.worker_cpus = cpus;
        self
    }

    /// Uses a group of pollers that exists, instead of starting one; the server leaves it running
    /// when it ends.
    pub fn use_pollers(mut self, pollers: Pollers) -> Self {
        self.pollers = Some(pollers);
        self
    }
}

/// Bounds.
impl ServerBuilder {
    /// Bounds each wait of a read; zero is for ever. A read of a known length waits once, for all
    /// of it; [`until`](crate::Connection::until) waits anew after each byte that comes, so a peer
    /// that sends a byte at a time is never late. [`request_timeout`](Self::request_timeout) ends
    /// that.
    pub fn read_timeout(mut self, timeout: Duration) -> Self {
        self.limits.read_timeout = some(timeout);
        self
    }

    /// Bounds how long a request may take to arrive; zero is for ever. When `timeout` has passed
    /// since a run of [`on_request`](Self::on_request) started, every read of that run that has to
    /// wait fails with a read timeout. Single bytes from the peer do not extend this time. Timeouts
    /// and deadlines of the connection still hold; the earliest one ends the wait.
    ///
    /// The time covers one run, so a handler should serve one request in each run.
    /// What a run computes or sends is not bounded, and bytes that have come can be read at any
    /// time. A handler that returns before its request is whole has the whole time again when it is
    /// called with the next bytes. The waits of [`on_connect`](Self::on_connect) are not bounded.
    pub fn request_timeout(mut self, timeout: Duration) -> Self {
        self.limits.request_timeout = some(timeout);
        self
    }

    /// Bounds each wait of a flush; zero is for ever.
    pub fn write_timeout(mut self, timeout: Duration) -> Self {
        self.limits.write_timeout = some(timeout);
        self
    }

    /// Closes a connection on which no byte moved for so long while no handler computed; zero is
    /// never.
    pub fn idle_timeout(mut self, timeout: Duration) -> Self {
        self.limits.idle_timeout = some(timeout);
        self
    }

    /// The most connections at a time; further ones are accepted and closed at once.
    pub fn connections_max(mut self, count: usize) -> Self {
        self.connections_max = Some(count);
        self
    }

    /// Reception pauses when `high_bytes` are buffered and no read waits for more, and resumes at
    /// `low_bytes`.
    pub fn input_watermarks(mut self, low_bytes: usize, high_bytes: usize) -> Self {
        (self.limits.input_low_bytes, self.limits.input_high_bytes) = (low_bytes, high_bytes);
        self
    }

    /// The most that may wait for a peer before `submit` refuses more.
    pub fn output_bytes_max(mut self, bytes: usize) -> Self {
        self.limits.output_bytes_max = bytes;
        self
    }

    /// The most that one read may ask for: the bound of a length field.
    pub fn read_bytes_max(mut self, bytes: usize) -> Self {
        self.limits.read_bytes_max = bytes;
        self
    }

    /// Received bytes that may lie unread at each poller: 1 GiB unless told otherwise. While there
    /// are more, a connection that holds more than an equal share is paused; a read that can then
    /// never be satisfied fails with a limit error. Memory that the application keeps does not
    /// count. If the server is given existing pollers, their own bound applies instead
    /// ([`PollersBuilder::unread_bytes_max`](crate::PollersBuilder::unread_bytes_max)).
    pub fn unread_bytes_max(mut self, bytes: usize) -> Self {
        self.plan.unread_bytes_max = bytes;
        self
    }

    /// Sets SO_REUSEPORT on the TCP listeners added after this: several processes, or several
    /// listeners of this one, may share an address, and the kernel spreads the connections. Says
    /// nothing to Unix listeners.
    pub fn reuse_port(mut self, reuse: bool) -> Self {
        self.reuse_port = reuse;
        self
    }

    /// Leaves the socket files of the Unix listeners added after this where they are when the
    /// server ends. Without this, the end of the server, or of a builder or server that never
    /// served, removes the file that [`listen`](Self::listen) has made, and no other file that has
    /// come to its path.
    pub fn keep_socket_file(mut self, keep: bool) -> Self {
        self.keeps_socket_file = keep;
        self
    }

    /// How TCP connections of the listeners added after this avoid congestion, by the kernel's name
    /// for it (such as `reno` or `cubic`); without this, as the host does.
    pub fn congestion_control(mut self, name: &str) -> Self {
        self.socket.congestion_control = Some(name.to_owned());
        self
    }

    /// Buffers of these sizes in bytes for each connection of the listeners added after this, in
    /// place of ones that the kernel adapts to the traffic; 0 is not. The kernel doubles what
    /// is asked for, up to `net.core.rmem_max` and `wmem_max`.
    pub fn socket_buffers(mut self, receive_bytes: usize, send_bytes: usize) -> Self {
        self.socket.receive_buffer_bytes = receive_bytes;
        self.socket.send_buffer_bytes = send_bytes;
        self
    }
}

/// Listeners.
impl ServerBuilder {
    /// Adds a listener on `address` (see [`Address`]). Where the address is in use, blocks for up
    /// to 50 ms for it to become free: a server that was killed may hold it for a moment longer.
    ///
    /// On a Unix path, `listen` replaces a socket file that no process has bound any more. If
    /// several servers start at once, one of them gets the path: each locks the directory
    /// (`flock(2)`). If another program holds the lock, `listen` waits up to half a second. Without
    /// the lock (also if the directory cannot be read), `listen` takes a free path but replaces no
    /// file.
    ///
    /// # Errors
    /// Invalid address; the kernel's, for example when the address is in use.
    pub fn listen(mut self, address: &str) -> Result<Self> {
        let parsed: Address = address.parse()?;
        let (addr, both_ip) = parsed.resolve_local()?;
        let options = ListenOptions {
            both_ip,
            reuse_port: self.reuse_port,
            keeps_file: self.keeps_socket_file,
            socket: &self.socket,
        };
        let mut made = listen(&addr, options);
        if both_ip && made.as_ref().is_err_and(|error| error.kind() != io::ErrorKind::AddrInUse) {
            // A host without IPv6.
            let port = addr.as_inet().map_or(0, |inet| inet.port());
            let addr = PeerAddr::Inet(([0, 0, 0, 0], port).into());
            made = listen(&addr, ListenOptions { both_ip: false, ..options });
        }
        let made = made.map_err(|error| Error::io(format_args!("listen {address}"), error))?;
        self.add(made)?;
        Ok(self)
    }

    /// Adds a listener of the standard library's.
    ///
    /// # Errors
    /// The kernel's.
    pub fn listener(mut self, listener: TcpListener) -> Result<Self> {
        let socket = adopt(listener.into())?;
        socket.set_nodelay().map_err(|error| Error::io("listen", error))?;
        self.add(Listener { socket: Arc::new(socket), file: None })?;
        Ok(self)
    }

    /// Adds a unix listener of the standard library's. Its socket file stays the caller's.
    ///
    /// # Errors
    /// The kernel's.
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

    /// Makes the server: starts its threads, which have nothing to do yet. With the feature
    /// `tokio`, handlers run inside the context of the tokio runtime that this is called in, unless
    /// `ServerBuilder::tokio` has named another.
    ///
    /// # Errors
    /// Invalid, if there is no listener, no handler, or settings contradict each other; the
    /// kernel's, for lack of descriptors or threads.
    pub fn build(mut self) -> Result<Server> {
        if self.listeners.is_empty() {
            return Err(Error::invalid("server: no listener; call listen or bind"));
        }
        if self.connect.is_none() && self.request.is_none() {
            return Err(Error::invalid("server: no handler; set on_request or on_connect"));
        }
        self.limits.check()?;
        threads::check_cpus("worker_cpus", &self.worker_cpus)?;
        let owns_pollers = self.pollers.is_none();
        let pollers = match self.pollers.take() {
            Some(pollers) => pollers,
            None => self.start_pollers()?,
        };
        let context = std::mem::take(&mut self.context);
        let watched = pollers.remotes().iter().map(|remote| Arc::clone(remote) as _).collect();
        let host = Host {
            begin: || turns::ask_for_turns(config::TURN),
            starved: usage::starved_of_this_thread,
            spent: || {
                let (ran, waits) = (usage::ran_of_this_thread()?, usage::waits_of_this_thread()?);
                Some(Spent { ran, waits })
            },
            used: usage::used_by_process,
        };
        let executor = Executor::start(self.placement, &self.worker_cpus, watched, host, context)?;
        let books = Arc::new(Books {
            callbacks: self.callbacks,
            counts: Counts::default(),
            draining: AtomicBool::new(false),
            connections_max: self.connections_max.unwrap_or(usize::MAX),
            progress: Progress::new(),
        });
        let inner = Arc::new(Inner {
            service: Arc::new(Service {
                connect: self.connect,
                request: self.request,
                executor,
                hooks: Arc::clone(&books) as _,
            }),
            books,
            pollers,
            owns_pollers,
            limits: Arc::new(self.limits),
            addrs: self.listeners.iter().map(|bound| bound.addr.clone()).collect(),
            acceptors: Mutex::new(Vec::new()),
        });
        Ok(Server { inner, listeners: self.listeners })
    }

    fn start_pollers(&self) -> Result<Pollers> {
        let mut plan = self.plan.clone();
        plan.cpus_per_poller = match self.placement {
            Placement::Pool { .. } | Placement::Tokio => config::CPUS_PER_POLLER,
            Placement::Auto | Placement::Inline => 1,
        };
        plan.workers = match self.placement {
            Placement::Inline => 0,
            Placement::Pool { workers } if workers > 0 => workers,
            Placement::Pool { .. } => threads::cpu_count(&self.worker_cpus),
            // There are more of them than CPUs that they take.
            Placement::Auto => threads::cpu_count(&self.worker_cpus),
            // How many a runtime has is its own affair.
            Placement::Tokio => threads::cpu_count(&[]),
        };
        Pollers::start(&plan)
    }

    fn add(&mut self, Listener { socket, file }: Listener) -> Result<()> {
        let addr = socket.local_addr().map_err(|error| Error::io("getsockname", error))?;
        self.listeners.push(Bound { socket, addr, file });
        Ok(())
    }
}

fn adopt(fd: OwnedFd) -> Result<Socket> {
    Socket::adopt(fd).map_err(|error| Error::io("listen", error))
}

impl std::fmt::Debug for ServerBuilder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ServerBuilder").field("plan", &self.plan).finish_non_exhaustive()
    }
}
