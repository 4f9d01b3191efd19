//! The harness of behaviour tests.
//!
//! [`run`] arms a watchdog and passes the test a [`Fixture`] for its backend and placement. After
//! the test it checks that fds, blocks, sends in flight, connections and kernel threads have the
//! same counts as before. These are counts of the whole process, so a process runs one test at a
//! time; [`run_alone`] runs each test in a process of its own.

// Several test programs share this module, and each uses a part of it.
#![allow(dead_code, unused_imports)]

mod host;
mod kernel;
mod load;
mod peer;
mod random;
mod rpc;
mod unix;
mod wait;

use std::collections::BTreeMap;
use std::future::Future;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::pin::Pin;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use ringpoll::{
    Connection, Dialer, PollMode, PollerStats, Pollers, Result, Server, ServerBuilder,
    ServerHandle, SqpollOptions, SqpollPreset,
};

pub(crate) use host::{
    cpu_ticks, fds, rss_bytes, say, thread_count, threads, unblock_thread_count,
};
pub(crate) use kernel::*;
pub(crate) use load::*;
pub(crate) use peer::*;
pub(crate) use random::{Random, assert_pattern, pattern};
pub(crate) use ringpoll::{Backend, Placement};
pub(crate) use rpc::*;
pub(crate) use unix::*;
pub(crate) use wait::*;

/// Where a group of tests is mounted.
#[derive(Clone, Copy)]
pub(crate) struct Mount {
    pub(crate) backend: Backend,
    pub(crate) placement: Placement,
    pub(crate) side: Side,
}

impl Mount {
    /// Whether one kernel thread both receives and sends.
    pub(crate) fn is_shared(self) -> bool {
        self.backend.to_string() == SHARED.to_string()
    }

    /// The backend, with send queues that are as short as possible.
    pub(crate) fn with_small_queues(self) -> Backend {
        match self.backend {
            Backend::Sqpoll(options) => Backend::Sqpoll(options.send_entries(1)),
            other => other,
        }
    }

    /// Whether a kernel thread receives, even while the poller is busy.
    pub(crate) fn receives_behind_pollers(self) -> bool {
        matches!(self.backend, Backend::Sqpoll(_))
            && self.backend.to_string() != CONFIG2.to_string()
    }
}

/// The end of a connection on which [`Fixture::drive`] runs the body.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    /// The connection of a server's handler.
    Server,
    /// A client connection, driven from a tokio task.
    Client,
}

/// One kernel thread for everything.
pub(crate) const SHARED: Backend =
    Backend::Sqpoll(SqpollOptions::new().preset(SqpollPreset::Shared));

/// A kernel thread that receives and one that sends, for each poller.
pub(crate) const CONFIG1: Backend = Backend::Sqpoll(few(SqpollPreset::Config1));

/// A kernel thread that sends for each poller.
pub(crate) const CONFIG2: Backend = Backend::Sqpoll(few(SqpollPreset::Config2));

/// `preset` with as few kernel threads as possible, which sleep soon: they share CPUs with each
/// other and with the tests.
const fn few(preset: SqpollPreset) -> SqpollOptions {
    let options = SqpollOptions::new().preset(preset);
    options.send_rings(2).send_threads(1).idle(Duration::from_millis(1))
}

/// Settings that servers and dialers have in common. Zero keeps the default of the library.
#[derive(Clone, Copy, Default)]
pub(crate) struct Tuning {
    pub(crate) input_watermarks: (usize, usize),
    pub(crate) output_bytes_max: usize,
    pub(crate) read_bytes_max: usize,
    pub(crate) submit_before_read: bool,
}

/// Runs one test in a process of its own. A process that has [`ALONE`] in its environment is one
/// already: with it, tests run in the process that a debugger sees.
pub(crate) fn run_alone(mount: Mount, path: &str, body: fn(&Fixture) -> Check) {
    let name = path.split_once("::").map_or(path, |(_, name)| name);
    if std::env::var_os(ALONE).is_some() {
        return run(mount, name, body);
    }
    let program = std::env::current_exe().expect("a test program has a path");
    let mut test = Command::new(program);
    test.args(["--exact", name, "--include-ignored"]).env(ALONE, "1");
    // What tests print past the capture of output goes there.
    test.stdin(Stdio::null()).stderr(Stdio::inherit());
    let done = test.output().expect("processes can be started");
    let report = String::from_utf8_lossy(&done.stdout);
    assert!(done.status.success(), "{name}: {}\n{report}", done.status);
    assert!(report.contains("1 passed"), "{name} has not run:\n{report}");
}

const ALONE: &str = "RINGPOLL_TEST_ALONE";

/// Runs one test and checks that it leaves nothing behind.
pub(crate) fn run(mut mount: Mount, name: &str, body: fn(&Fixture) -> Check) {
    if let Ok(name) = std::env::var("RINGPOLL_BACKEND") {
        // The library replaces the backend of each test by this one.
        mount.backend = match name.parse().expect("a backend") {
            Backend::Auto => ringpoll::capabilities().backend(),
            named => named,
        };
    }
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    if let Err(reason) = available(mount.backend) {
        let must = std::env::var_os("REQUIRE_ALL_BACKENDS").is_some_and(|value| value == "1");
        assert!(!must, "{} is required: {reason}", mount.backend);
        return say(&format!("{name} skipped, no {}: {reason}", mount.backend));
    }
    let seed = random::seed();
    eprintln!("RINGPOLL_SEED={seed} repeats this run");
    let _watchdog = Watchdog::arm(name);
    warm_up();
    let (before, threads) = (host::fds(), KernelThreadsBefore::now());
    let fixture = Fixture::new(mount, seed).expect("pollers can be started");
    let result = catch_unwind(AssertUnwindSafe(|| body(&fixture)));
    match result {
        Ok(Ok(())) => {
            fixture.finish();
            assert_fds_return(&before);
            threads.assert_return();
        }
        Ok(Err(failure)) => {
            fixture.abandon();
            panic!("{}", failure.message());
        }
        Err(panic) => {
            fixture.abandon();
            resume_unwind(panic);
        }
    }
}

/// Marks the message of a panic that a test provokes; such panics are not printed.
pub(crate) const ON_PURPOSE: &str = "(panics on purpose)";

/// Ends pollers as soon as they hold nothing of their ended connections.
pub(crate) fn end_empty(group: &Pollers) -> Check {
    let is_empty = || {
        let stats = group.stats();
        (stats.connections, stats.blocks, stats.sends_in_flight) == (0, 0, 0)
    };
    assert!(holds_within(DEADLINE, is_empty), "left behind: {:?}", group.stats());
    Ok(group.shutdown()?)
}

/// Whether the environment limits the tier of rings.
pub(crate) fn is_tier_capped() -> bool {
    std::env::var_os("RINGPOLL_URING_TIER").is_some_and(|tier| tier != "defer")
}

/// Prints the reason for skipping a test on this host.
pub(crate) fn skip(test: &str, reason: impl std::fmt::Display) -> Check {
    say(&format!("{test} skipped: {reason}"));
    Ok(())
}

/// One test's servers, clients and randomness.
pub(crate) struct Fixture {
    mount: Mount,
    clients: Pollers,
    servers: Mutex<Vec<ServerHandle>>,
    random: Mutex<Random>,
    /// The one server that [`drive`](Self::drive) uses.
    driven: OnceLock<(ServerHandle, Arc<Drive>)>,
}

/// The body for the next connection of a driven server.
#[derive(Default)]
struct Drive {
    next: Mutex<Option<Body>>,
}

type Body = Box<dyn FnOnce(Connection) -> Pin<Box<dyn Future<Output = ()> + Send>> + Send>;

impl Fixture {
    fn new(mount: Mount, seed: u64) -> Result<Fixture> {
        let clients = Pollers::builder().backend(mount.backend).count(1).build()?;
        Ok(Fixture {
            mount,
            clients,
            servers: Mutex::new(Vec::new()),
            random: Mutex::new(Random::new(seed)),
            driven: OnceLock::new(),
        })
    }

    pub(crate) fn mount(&self) -> Mount {
        self.mount
    }

    /// The options of this mount, which is an `sqpoll` one.
    pub(crate) fn sqpoll(&self) -> SqpollOptions {
        match self.mount.backend {
            Backend::Sqpoll(options) => options,
            other => panic!("{other} is no backend whose kernel threads poll"),
        }
    }

    /// Randomness of this test.
    pub(crate) fn random(&self) -> Random {
        self.random.lock().expect("no test panics here").fork()
    }

    /// A server for this mount, not yet bound.
    pub(crate) fn server(&self) -> ServerBuilder {
        let server = Server::builder().backend(self.mount.backend).pollers(2);
        let server = server.placement(self.mount.placement);
        match self.mount.placement {
            Placement::Tokio => server.tokio(runtime().handle().clone()),
            _ => server,
        }
    }

    /// A server with one poller that a handler can block at a gate. Handlers stay on the poller,
    /// even if they take long.
    pub(crate) fn gated_server(&self) -> ServerBuilder {
        let server = self.server().pollers(1).poll_mode(PollMode::Never);
        server.placement(Placement::Inline)
    }

    /// Binds to a free loopback port and serves in the background.
    #[track_caller]
    pub(crate) fn spawn(&self, builder: ServerBuilder) -> ServerHandle {
        self.spawn_bound(builder.bind("127.0.0.1:0").expect("a loopback port can be bound"))
    }

    /// Serves in the background until the test ends.
    #[track_caller]
    pub(crate) fn spawn_bound(&self, server: Server) -> ServerHandle {
        let handle = server.spawn().expect("a bound server can serve");
        self.watch(handle.clone());
        handle
    }

    /// Includes `handle` in the checks and the shutdown at the end of the test.
    pub(crate) fn watch(&self, handle: ServerHandle) {
        self.servers.lock().expect("no test panics here").push(handle);
    }

    /// A server that sends every received byte back.
    #[track_caller]
    pub(crate) fn echo_server(&self) -> ServerHandle {
        self.spawn(self.server().on_request(echo))
    }

    /// A dialer on this test's client pollers.
    pub(crate) fn dialer(&self) -> Dialer {
        Dialer::new().pollers(self.clients.clone())
    }

    /// The poller group of this test's clients.
    pub(crate) fn clients(&self) -> &Pollers {
        &self.clients
    }

    /// A client connection and the plain socket at its other end.
    pub(crate) fn client(&self) -> Check<(Connection, TcpStream)> {
        let (one, other) = tcp_pair()?;
        Ok((self.dialer().adopt(one.into())?, other))
    }

    /// Counters of everything this test started.
    pub(crate) fn stats(&self) -> PollerStats {
        let servers = self.servers.lock().expect("no test panics here");
        let mut sum = self.clients.stats();
        for stats in servers.iter().map(|server| server.stats().pollers) {
            sum.connections += stats.connections;
            sum.blocks += stats.blocks;
            sum.block_bytes += stats.block_bytes;
            sum.sends_in_flight += stats.sends_in_flight;
            sum.received_bytes += stats.received_bytes;
            sum.sent_bytes += stats.sent_bytes;
            sum.direct_receives += stats.direct_receives;
        }
        sum
    }

    /// Send calls of everything that this test started.
    pub(crate) fn send_calls(&self) -> u64 {
        let servers = self.servers.lock().expect("no test panics here");
        let of_servers: u64 = servers.iter().map(|server| server.stats().pollers.send_calls).sum();
        of_servers + self.clients.stats().send_calls
    }

    /// Pending timers of everything that this test started.
    pub(crate) fn timers(&self) -> u64 {
        let servers = self.servers.lock().expect("no test panics here");
        let of_servers: u64 = servers.iter().map(|server| server.stats().pollers.timers).sum();
        of_servers + self.clients.stats().timers
    }

    /// Runs `body` on one end of a connection: in a handler, or on a task at the client's end, as
    /// the mount selects. Returns the plain socket at the other end, and the outcome of `body`.
    pub(crate) fn drive<F, T>(
        &self,
        body: impl FnOnce(Connection) -> F + Send + 'static,
    ) -> Check<(TcpStream, Outcome<T>)>
    where
        F: Future<Output = Check<T>> + Send + 'static,
        T: Send + 'static,
    {
        let (body, outcome) = boxed(body);
        if self.mount.side == Side::Client {
            let (conn, peer) = self.client()?;
            runtime().spawn(body(conn));
            return Ok((peer, outcome));
        }
        let (server, drive) = self.driven.get_or_init(|| self.driven_server(Tuning::default()));
        Ok((drive.connect(server, body)?, outcome))
    }

    /// [`drive`](Self::drive) with the limits of `tuning`.
    pub(crate) fn drive_tuned<F, T>(
        &self,
        tuning: Tuning,
        body: impl FnOnce(Connection) -> F + Send + 'static,
    ) -> Check<(TcpStream, Outcome<T>)>
    where
        F: Future<Output = Check<T>> + Send + 'static,
        T: Send + 'static,
    {
        let (body, outcome) = boxed(body);
        if self.mount.side == Side::Client {
            let (one, other) = tcp_pair()?;
            let conn = tuning.dialer(self.dialer()).adopt(one.into())?;
            runtime().spawn(body(conn));
            return Ok((other, outcome));
        }
        let (server, drive) = self.driven_server(tuning);
        Ok((drive.connect(&server, body)?, outcome))
    }

    fn driven_server(&self, tuning: Tuning) -> (ServerHandle, Arc<Drive>) {
        let drive = Arc::<Drive>::default();
        let driven = Arc::clone(&drive);
        let server = self.spawn(tuning.server(self.server()).on_connect(move |conn| {
            let body = driven.next.lock().expect("no test panics here").take();
            let running = body.expect("each connection has been announced")(conn);
            async move {
                running.await;
                Ok(())
            }
        }));
        (server, drive)
    }

    /// Checks that everything that this test started is idle, and ends it.
    fn finish(self) {
        let servers = self.servers.into_inner().expect("no test panics here");
        for server in &servers {
            let idle = holds_within(DEADLINE, || is_idle(&server.stats().pollers));
            assert!(idle, "left behind by a server: {:?}", server.stats());
            let ended = server.shutdown(DEADLINE);
            assert!(ended.is_ok(), "shutdown of an idle server: {ended:?} {:?}", server.stats());
        }
        let idle = holds_within(DEADLINE, || is_idle(&self.clients.stats()));
        assert!(idle, "left behind by a client: {:?}", self.clients.stats());
        let ended = self.clients.shutdown();
        assert!(ended.is_ok(), "shutdown of idle pollers: {ended:?}");
    }

    /// Ends everything after a failure, without checks.
    fn abandon(self) {
        for server in self.servers.into_inner().unwrap_or_default() {
            // Its result is ignored: the test has failed already.
            let _ = server.shutdown_forced(Duration::ZERO);
        }
        let _ = self.clients.shutdown();
    }
}

impl Drive {
    /// Makes a connection whose handler is `body`, and waits until it has begun.
    fn connect(&self, server: &ServerHandle, body: Body) -> Check<TcpStream> {
        *self.next.lock().expect("no test panics here") = Some(body);
        let peer = dial(server)?;
        let taken = || self.next.lock().expect("no test panics here").is_none();
        eventually("on_connect begins", taken);
        Ok(peer)
    }
}

/// Boxes `body`, and connects it with an outcome.
fn boxed<F, T>(body: impl FnOnce(Connection) -> F + Send + 'static) -> (Body, Outcome<T>)
where
    F: Future<Output = Check<T>> + Send + 'static,
    T: Send + 'static,
{
    let (report, outcome) = outcome();
    let run = |conn| Box::pin(async move { tell(report, body(conn).await) }) as Pin<Box<_>>;
    (Box::new(run), outcome)
}

impl Tuning {
    pub(crate) fn server(self, mut builder: ServerBuilder) -> ServerBuilder {
        if self.input_watermarks != (0, 0) {
            let (low, high) = self.input_watermarks;
            builder = builder.input_watermarks(low, high);
        }
        if self.output_bytes_max != 0 {
            builder = builder.output_bytes_max(self.output_bytes_max);
        }
        if self.read_bytes_max != 0 {
            builder = builder.read_bytes_max(self.read_bytes_max);
        }
        builder.submit_before_read(self.submit_before_read)
    }

    pub(crate) fn dialer(self, mut dialer: Dialer) -> Dialer {
        if self.input_watermarks != (0, 0) {
            let (low, high) = self.input_watermarks;
            dialer = dialer.input_watermarks(low, high);
        }
        if self.output_bytes_max != 0 {
            dialer = dialer.output_bytes_max(self.output_bytes_max);
        }
        if self.read_bytes_max != 0 {
            dialer = dialer.read_bytes_max(self.read_bytes_max);
        }
        dialer.submit_before_read(self.submit_before_read)
    }
}

/// A handler that sends every received byte back.
pub(crate) async fn echo(mut conn: Connection) -> Result<()> {
    let count = conn.readable().await?;
    let bytes = conn.next(count).await?;
    conn.write(bytes)?;
    conn.flush().await
}

/// Where a server on TCP listens.
#[track_caller]
pub(crate) fn addr_of(server: &ServerHandle) -> SocketAddr {
    server.local_addr().as_inet().expect("the server listens on tcp")
}

/// Connects a plain socket to `server`.
pub(crate) fn dial(server: &ServerHandle) -> Check<TcpStream> {
    Ok(connect(addr_of(server))?)
}

/// The tokio runtime that async test code runs on.
pub(crate) fn runtime() -> &'static tokio::runtime::Runtime {
    static RUNTIME: OnceLock<tokio::runtime::Runtime> = OnceLock::new();
    RUNTIME.get_or_init(|| {
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        builder.worker_threads(2).enable_all().build().expect("threads can be started")
    })
}

/// Runs async test code to its end, which must come within [`DEADLINE`].
pub(crate) fn block_on<T>(future: impl Future<Output = Check<T>>) -> Check<T> {
    runtime().block_on(async {
        match tokio::time::timeout(DEADLINE, future).await {
            Ok(result) => result,
            Err(_) => Err(Failure::new(format_args!("no result within {DEADLINE:?}"))),
        }
    })
}

/// Runs `body` on a task of its own.
pub(crate) fn on_task<T: Send + 'static>(
    body: impl Future<Output = Check<T>> + Send + 'static,
) -> Outcome<T> {
    let (report, outcome) = outcome();
    runtime().spawn(async move { tell(report, body.await) });
    outcome
}

fn is_idle(stats: &PollerStats) -> bool {
    stats.connections == 0 && stats.blocks == 0 && stats.sends_in_flight == 0
}

/// Starts everything that lives as long as the process, so its fds exist before the first count.
fn warm_up() {
    static ONCE: OnceLock<()> = OnceLock::new();
    ONCE.get_or_init(|| {
        host::raise_fd_limit();
        keep_quiet_about_panics_on_purpose();
        runtime();
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("loopback works");
        let addr = listener.local_addr().expect("a bound socket has a name").to_string();
        let conn = ringpoll::blocking::connect(&addr).expect("the default group can dial");
        let handle = (*conn).clone();
        drop(conn);
        eventually("its fd is closed", || handle.with_fd(|_| ()).is_err());
    });
}

fn keep_quiet_about_panics_on_purpose() {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        // A literal message is a &str, a formatted one a String.
        let literal = panic.payload().downcast_ref::<&str>().copied();
        let message = literal.or(panic.payload().downcast_ref::<String>().map(String::as_str));
        if !message.is_some_and(|message| message.contains(ON_PURPOSE)) {
            report(panic);
        }
    }));
}

/// Whether this host has `backend`, asked once.
fn available(backend: Backend) -> Result<(), String> {
    static KNOWN: Mutex<BTreeMap<String, Result<(), String>>> = Mutex::new(BTreeMap::new());
    let mut known = KNOWN.lock().expect("no probe panics");
    let probe = || match Pollers::builder().backend(backend).count(1).build() {
        Ok(pollers) => pollers.shutdown().map_err(|error| error.to_string()),
        Err(error) => Err(error.to_string()),
    };
    known.entry(backend.to_string()).or_insert_with(probe).clone()
}

fn assert_fds_return(before: &BTreeMap<i32, String>) {
    // Fewer fds are not a leak: those of an earlier, failed test may have been closed meanwhile.
    let returned = holds_within(DEADLINE, || host::fds().len() <= before.len());
    let left = host::fds();
    let leaked: Vec<_> =
        left.iter().filter(|(fd, target)| before.get(fd) != Some(target)).collect();
    assert!(returned, "fds before: {}, after: {}; new: {leaked:?}", before.len(), left.len());
}
