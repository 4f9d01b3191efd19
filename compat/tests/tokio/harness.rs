//! A server and a dialled stream for each case, on one backend.
//!
//! [`run`] limits a case by [`DEADLINE`]. After it, no handler may have failed, every connection
//! must have ended, and no block may be in use.

use std::error::Error;
use std::io::Write;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use ringpoll::{Backend, Connection, Dialer, Placement, Pollers, Server, ServerHandle};
use ringpoll_compat::TokioStream;
use tokio::runtime::Runtime;

/// What a case returns.
pub(crate) type Check<T = ()> = Result<T, Box<dyn Error + Send + Sync>>;

/// How long one case may take on a busy host. Reached only by one that fails.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

/// Where a group of cases is mounted.
#[derive(Clone, Copy)]
pub(crate) struct Mount {
    pub(crate) backend: Backend,
    pub(crate) placement: Placement,
}

/// The server and the client pollers of one case.
pub(crate) struct Fixture {
    mount: Mount,
    clients: Pollers,
    servers: Vec<ServerHandle>,
}

/// Runs one case, or says why not.
pub(crate) fn run(mount: Mount, name: &str, case: impl AsyncFnOnce(&mut Fixture) -> Check) {
    let capabilities = ringpoll::capabilities();
    if mount.backend == Backend::Uring && capabilities.backend() != Backend::Uring {
        let must = std::env::var_os("REQUIRE_ALL_BACKENDS").is_some_and(|value| value == "1");
        let reason = format!("{name}: no {}: {}", mount.backend, capabilities.reason);
        assert!(!must, "required: {reason}");
        // Written past the capture of output, so it is visible for a passing test as well.
        return writeln!(std::io::stderr(), "skipped {reason}").expect("there is an error stream");
    }
    let clients = Pollers::builder().backend(mount.backend).count(1).build();
    let clients = clients.expect("pollers can be started");
    let mut fixture = Fixture { mount, clients, servers: Vec::new() };
    let done = runtime().block_on(async {
        tokio::time::timeout(DEADLINE, case(&mut fixture)).await.expect("ends in time")
    });
    if let Err(error) = done {
        panic!("{error}");
    }
    fixture.finish();
}

/// The runtime of the cases, and of the handlers that are placed there.
pub(crate) fn runtime() -> &'static Runtime {
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    RUNTIME.get_or_init(|| {
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        builder.worker_threads(2).enable_all().build().expect("threads can be started")
    })
}

impl Fixture {
    /// A server of which `handler` has each connection from its beginning to its end.
    pub(crate) fn serve<H, F>(&mut self, handler: H) -> Check<ServerHandle>
    where
        H: Fn(TokioStream) -> F + Send + Sync + 'static,
        F: Future<Output = Check> + Send + 'static,
    {
        let server = self.builder().on_connect(move |conn| {
            let run = handler(TokioStream::from(conn));
            async move { run.await.map_err(ringpoll::Error::other) }
        });
        self.spawn(server)
    }

    pub(crate) fn builder(&self) -> ringpoll::ServerBuilder {
        self.builder_without_runtime().tokio(runtime().handle().clone())
    }

    pub(crate) fn builder_without_runtime(&self) -> ringpoll::ServerBuilder {
        let builder = Server::builder().backend(self.mount.backend).pollers(1);
        builder.placement(self.mount.placement)
    }

    pub(crate) fn spawn(&mut self, builder: ringpoll::ServerBuilder) -> Check<ServerHandle> {
        let server = builder.bind("127.0.0.1:0")?.spawn()?;
        self.servers.push(server.clone());
        Ok(server)
    }

    /// A dialer on the pollers of the case.
    pub(crate) fn dialer(&self) -> Dialer {
        Dialer::new().pollers(self.clients.clone())
    }

    pub(crate) async fn connect(&self, server: &ServerHandle) -> Check<Connection> {
        Ok(self.dialer().connect(&server.local_addr().to_string()).await?)
    }

    pub(crate) async fn dial(&self, server: &ServerHandle) -> Check<TokioStream> {
        Ok(TokioStream::from(self.connect(server).await?))
    }

    fn finish(self) {
        for server in &self.servers {
            let begun = Instant::now();
            // Looked at once: a poller that frees a block counts it as used for a moment.
            let mut stats = server.stats();
            while (stats.open, stats.pollers.blocks) != (0, 0) && begun.elapsed() < DEADLINE {
                std::thread::yield_now();
                stats = server.stats();
            }
            assert_eq!((stats.open, stats.pollers.blocks), (0, 0), "left behind: {stats:?}");
            assert_eq!((stats.handler_errors, stats.handler_panics), (0, 0), "{stats:?}");
            server.shutdown(DEADLINE).expect("nothing is busy");
        }
        self.clients.shutdown().expect("client pollers end");
    }
}

/// Returns once `is_so`, with turns for others in between. The deadline of the case bounds it.
pub(crate) async fn wait_until(mut is_so: impl FnMut() -> bool) {
    while !is_so() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// `bytes` of a stream in which every offset looks different from its neighbours.
pub(crate) fn pattern(bytes: usize) -> Vec<u8> {
    (0..bytes).map(|at| (at ^ (at >> 8) ^ (at >> 16)) as u8).collect()
}
