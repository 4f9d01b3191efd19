//! Settings and construction of a server.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use super::shutdown::Progress;
use super::{Bound, Callbacks, Counts, Inner, Server, ServerState};
use crate::config::{self, Backend, Balance, Limits, Placement, PollMode, UringOptions, some};
use crate::connection::{Connection, Handle, Handler, Service};
use crate::error::{Error, Result};
use crate::poller::group::Plan;
use crate::pollers::Pollers;
use crate::sync::Mutex;
use crate::sys::socket::ListenOptions;
use crate::sys::{time_slice, usage};
use crate::task::{Executor, Host, RuntimeContext, Signal, Spent};
use crate::threads;

/// The settings of a server; made by [`Server::builder`].
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
    connect: Option<Box<dyn Handler>>,
    request: Option<Box<dyn Handler>>,
    callbacks: Callbacks,
    /// How `listen` makes the next listener.
    pub(super) listening: ListenOptions,
    pub(super) listeners: Vec<Bound>,
}

/// Handlers.
///
/// A run of `on_connect` or `on_request` owns the [`Connection`]. Each connection has one run at a
/// time.
impl ServerBuilder {
    /// Called on the poller for each new connection, before it can receive. It may set timeouts,
    /// contexts and close callbacks. If it returns an error, the connection is refused. It must not
    /// block.
    pub fn on_prepare(
        mut self,
        prepare: impl Fn(&Handle) -> Result<()> + Send + Sync + 'static,
    ) -> Self {
        self.callbacks.prepare = Some(Box::new(prepare));
        self
    }

    /// Runs once for each connection, before any `on_request`. It may read, write, wait and close.
    ///
    /// Without an `on_request` handler, this handler serves the whole connection. The connection
    /// closes when the handler has returned and the [`Connection`] is dropped. So a handler can
    /// move the [`Connection`] into another task and return: it stays open until that task drops
    /// it.
    pub fn on_connect<H, F>(mut self, handler: H) -> Self
    where
        H: Fn(Connection) -> F + Send + Sync + 'static,
        F: Future<Output = Result<()>> + Send + 'static,
    {
        self.connect = Some(Box::new(handler));
        self
    }

    /// Runs when there are bytes to read. It runs again while bytes are left and the last run
    /// consumed some.
    ///
    /// After a run that consumed nothing, the handler runs again only when more bytes have arrived.
    /// So a handler should wait for the bytes it needs instead of returning: above the high
    /// watermark, reception pauses unless a read waits for more.
    ///
    /// After the peer has ended its side, the handler runs until all input is consumed, or until a
    /// run consumes nothing. Then the output is sent and the connection closes.
    ///
    /// An error closes the connection and is reported to `on_error`.
    /// [`any_error`](crate::any_error) lets a handler return errors of other types.
    pub fn on_request<H, F>(mut self, handler: H) -> Self
    where
        H: Fn(Connection) -> F + Send + Sync + 'static,
        F: Future<Output = Result<()>> + Send + 'static,
    {
        self.request = Some(Box::new(handler));
        self
    }

    /// Called on the poller, once, when the peer has closed the connection. It is called after
    /// `on_connect`, possibly while `on_request` runs, so it can cancel that run. It is not called
    /// for connections that this side closes. It must not block.
    pub fn on_disconnect(mut self, disconnect: impl Fn(&Handle) + Send + Sync + 'static) -> Self {
        self.callbacks.disconnect = Some(Box::new(disconnect));
        self
    }

    /// Called when a run has failed or panicked, before its connection closes. The message of a
    /// panic is part of the error's message. It must not block.
    pub fn on_error(mut self, report: impl Fn(&Handle, &Error) + Send + Sync + 'static) -> Self {
        self.callbacks.error = Some(Box::new(report));
        self
    }
}

/// Threads.
impl ServerBuilder {
    /// The kernel interface of the pollers.
    pub fn backend(mut self, backend: Backend) -> Self {
        self.plan.backend = backend;
        self
    }

    /// Where handlers run.
    pub fn placement(mut self, placement: Placement) -> Self {
        self.placement = placement;
        self
    }

    /// Lets handlers use tokio. In every placement, handlers and futures of [`Handle::spawn`] run
    /// inside the context of this runtime, so `tokio::time`, `tokio::spawn` and clients built on
    /// tokio work in them. With [`Placement::Tokio`] they also run on its threads.
    ///
    /// The default is the runtime in whose context [`build`](Self::build) is called, if there is
    /// one. So handlers can use tokio in a program with `#[tokio::main]` without this setting.
    ///
    /// The server does not drive the runtime. A runtime with threads of its own drives itself; the
    /// timers and tasks of a `current_thread` runtime make progress only inside its `block_on`.
    /// After the runtime is shut down, calls of handlers to it fail or panic.
    #[cfg(feature = "tokio")]
    pub fn tokio(mut self, runtime: tokio::runtime::Handle) -> Self {
        self.context = RuntimeContext::of(runtime);
        self
    }

    /// The number of pollers. With 0, there is one for each CPU; with handlers on a pool or on
    /// tokio, or with kernel threads that poll, there is one for 20 CPUs.
    pub fn pollers(mut self, count: usize) -> Self {
        self.plan.count = count;
        self
    }

    /// Whether pollers spin before they sleep.
    pub fn poll_mode(mut self, poll_mode: PollMode) -> Self {
        self.plan.poll_mode = poll_mode;
        self
    }

    /// Settings of the io_uring backends. The epoll backend ignores them.
    pub fn uring(mut self, options: UringOptions) -> Self {
        self.plan.uring = options;
        self
    }

    /// How connections are distributed over the pollers.
    pub fn balance(mut self, balance: Balance) -> Self {
        self.plan.balance = balance;
        self
    }

    /// The CPUs that pollers may run on. Empty means all CPUs.
    pub fn poller_cpus(mut self, cpus: Vec<usize>) -> Self {
        self.plan.cpus = cpus;
        self
    }

    /// The CPUs of the kernel threads of [`Backend::Sqpoll`]. The first thread runs on the first
    /// CPU of the list, and so on, from the start again after the last CPU. Empty means all CPUs
    /// that this process may use.
    pub fn sqpoll_cpus(mut self, cpus: Vec<usize>) -> Self {
        self.plan.sqpoll_cpus = cpus;
        self
    }

    /// The CPUs that the workers may run on. Empty means all CPUs.
    pub fn worker_cpus(mut self, cpus: Vec<usize>) -> Self {
        self.worker_cpus = cpus;
        self
    }

    /// Uses an existing group of pollers instead of starting one. The group continues to run after
    /// the end of the server.
    pub fn use_pollers(mut self, pollers: Pollers) -> Self {
        self.pollers = Some(pollers);
        self
    }
}

/// Bounds.
impl ServerBuilder {
    /// Limits each wait of a read; zero means no limit. A read of a known length waits once, for
    /// all its bytes. [`until`](crate::Connection::until) starts a new wait after each received
    /// byte, so a peer that sends single bytes never exceeds this timeout. Use
    /// [`request_timeout`](Self::request_timeout) against such peers.
    pub fn read_timeout(mut self, timeout: Duration) -> Self {
        self.limits.read_timeout = some(timeout);
        self
    }

    /// Limits how long a request may take to arrive; zero means no limit. When `timeout` has passed
    /// since a run of [`on_request`](Self::on_request) started, every read of that run that has to
    /// wait fails with a read timeout. Single bytes from the peer do not extend this time. Timeouts
    /// and deadlines of the connection still hold; the earliest one ends the wait.
    ///
    /// The limit covers one run, so a handler should serve one request in each run. It does not
    /// limit computing or sending, and buffered bytes can be read at any time. If a handler returns
    /// before its request is complete, the time starts again with the next run. The waits of
    /// [`on_connect`](Self::on_connect) are not limited.
    pub fn request_timeout(mut self, timeout: Duration) -> Self {
        self.limits.request_timeout = some(timeout);
        self
    }

    /// Limits each wait of a flush; zero means no limit.
    pub fn write_timeout(mut self, timeout: Duration) -> Self {
        self.limits.write_timeout = some(timeout);
        self
    }

    /// Ends the wait of a flush when its peer has taken no byte for `timeout`; zero means no limit.
    /// See [`Handle::set_write_stall_timeout`].
    pub fn write_stall_timeout(mut self, timeout: Duration) -> Self {
        self.limits.write_stall_timeout = some(timeout);
        self
    }

    /// Closes a connection when no byte has moved in either direction for `timeout` and no handler
    /// is computing; zero means never.
    pub fn idle_timeout(mut self, timeout: Duration) -> Self {
        self.limits.idle_timeout = some(timeout);
        self
    }

    /// The largest number of open connections. Further connections are accepted and closed at
    /// once.
    pub fn connections_max(mut self, count: usize) -> Self {
        self.connections_max = Some(count);
        self
    }

    /// Reception of a connection pauses when `high_bytes` are buffered and no read waits for more.
    /// It resumes when no more than `low_bytes` are buffered.
    pub fn input_watermarks(mut self, low_bytes: usize, high_bytes: usize) -> Self {
        (self.limits.input_low_bytes, self.limits.input_high_bytes) = (low_bytes, high_bytes);
        self
    }

    /// The largest number of submitted bytes of a connection that are not yet in the kernel. While
    /// there are as many, `submit` fails and `flush` waits.
    pub fn output_bytes_max(mut self, bytes: usize) -> Self {
        self.limits.output_bytes_max = bytes;
        self
    }

    /// Makes a read of a [`Connection`] that has to wait submit the written bytes first, so that a
    /// handler answers pipelined requests without a flush for each. The default is `false`. See
    /// [`Connection`](Connection#pipelining).
    pub fn submit_before_read(mut self, submit: bool) -> Self {
        self.limits.submit_before_read = submit;
        self
    }

    /// The largest length that a read may ask for. It protects memory from length fields that a
    /// peer sends.
    pub fn read_bytes_max(mut self, bytes: usize) -> Self {
        self.limits.read_bytes_max = bytes;
        self
    }

    /// The budget of received, unread bytes for each poller; 1 GiB by default. While a poller
    /// exceeds it, each connection above an equal share is paused; a read that the pause would keep
    /// from ever completing fails with a limit error. Memory that the application keeps does not
    /// count. With [`use_pollers`](Self::use_pollers) the budget of these pollers applies instead
    /// ([`PollersBuilder::unread_bytes_max`](crate::PollersBuilder::unread_bytes_max)).
    pub fn unread_bytes_max(mut self, bytes: usize) -> Self {
        self.plan.unread_bytes_max = bytes;
        self
    }
}

/// Construction.
impl ServerBuilder {
    /// Makes the server and starts its threads. It does not accept connections yet. With the
    /// feature `tokio`, handlers run inside the context of the tokio runtime in which this is
    /// called, unless `ServerBuilder::tokio` has set another runtime.
    ///
    /// # Errors
    /// Invalid, if there is no listener or no handler, or if settings contradict each other; an
    /// error of the kernel, for lack of descriptors or threads.
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
            begin: || time_slice::ask_for_time_slice(config::TIME_SLICE),
            let_finish: time_slice::wait_for_the_running_thread,
            starved: usage::starved_of_this_thread,
            spent: || {
                let (ran, waits) = (usage::ran_of_this_thread()?, usage::waits_of_this_thread()?);
                Some(Spent { ran, waits })
            },
            used: usage::used_by_process,
        };
        let (placement, cpus, spin) = (self.placement, &self.worker_cpus, pollers.spin());
        let executor = Executor::start(placement, cpus, spin, watched, host, context)?;
        let shutdown = Signal::new();
        let state = Arc::new(ServerState {
            callbacks: self.callbacks,
            counts: Counts::default(),
            shutdown: Arc::clone(&shutdown),
            connections_max: self.connections_max.unwrap_or(usize::MAX),
            progress: Progress::new(),
        });
        let inner = Arc::new(Inner {
            service: Arc::new(Service {
                connect: self.connect,
                request: self.request,
                executor,
                shutdown,
                hooks: Arc::clone(&state) as _,
            }),
            state,
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
            // `Auto` starts more workers than this, but they use no more CPUs.
            Placement::Auto => threads::cpu_count(&self.worker_cpus),
            // The number of threads of a runtime is unknown.
            Placement::Tokio => threads::cpu_count(&[]),
        };
        Pollers::start(&plan)
    }
}

impl std::fmt::Debug for ServerBuilder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ServerBuilder").field("plan", &self.plan).finish_non_exhaustive()
    }
}
