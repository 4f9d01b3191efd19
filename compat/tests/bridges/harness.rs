//! Servers and dialled connections for each case, on one backend.
//!
//! [`run`] limits a case by [`DEADLINE`]. After it, every connection must have ended, and no block
//! may be in use.

use std::error::Error;
use std::io::Write;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use ringpoll::{Backend, Connection, Dialer, Pollers, Server, ServerBuilder, ServerHandle};
use tokio::runtime::Runtime;

/// What a case returns.
pub(crate) type Check<T = ()> = Result<T, Box<dyn Error + Send + Sync>>;

/// How long one case may take on a busy host. Reached only by one that fails.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

/// The servers and the client pollers of one case.
pub(crate) struct Fixture {
    pub(crate) backend: Backend,
    clients: Pollers,
    servers: Vec<ServerHandle>,
    errors: Arc<Mutex<Vec<String>>>,
}

/// Runs one case, or says why not.
pub(crate) fn run(backend: Backend, name: &str, case: impl AsyncFnOnce(&mut Fixture) -> Check) {
    let capabilities = ringpoll::capabilities();
    if backend == Backend::Uring && capabilities.backend() != Backend::Uring {
        let must = std::env::var_os("REQUIRE_ALL_BACKENDS").is_some_and(|value| value == "1");
        let reason = format!("{name}: no {backend}: {}", capabilities.reason);
        assert!(!must, "required: {reason}");
        // Written past the capture of output, so it is visible for a passing test as well.
        return writeln!(std::io::stderr(), "skipped {reason}").expect("there is an error stream");
    }
    let clients = Pollers::builder().backend(backend).count(1).build();
    let clients = clients.expect("pollers can be started");
    let (servers, errors) = (Vec::new(), Arc::default());
    let mut fixture = Fixture { backend, clients, servers, errors };
    let done = runtime().block_on(async {
        tokio::time::timeout(DEADLINE, case(&mut fixture)).await.expect("ends in time")
    });
    if let Err(error) = done {
        panic!("{error}");
    }
    fixture.finish();
}

fn runtime() -> &'static Runtime {
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    RUNTIME.get_or_init(|| {
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        builder.worker_threads(2).enable_all().build().expect("threads can be started")
    })
}

impl Fixture {
    pub(crate) fn builder(&self) -> ServerBuilder {
        let errors = Arc::clone(&self.errors);
        Server::builder().backend(self.backend).pollers(1).on_error(move |_, error| {
            errors.lock().expect("no panic").push(format!("{error:?}"));
        })
    }

    pub(crate) fn spawn(&mut self, builder: ServerBuilder) -> Check<ServerHandle> {
        let server = builder.bind("127.0.0.1:0")?.spawn()?;
        self.servers.push(server.clone());
        Ok(server)
    }

    /// A dialer on the client pollers of the case.
    pub(crate) fn dialer(&self) -> Dialer {
        Dialer::new().pollers(self.clients.clone())
    }

    pub(crate) async fn connect(&self, server: &ServerHandle) -> Check<Connection> {
        Ok(self.dialer().connect(&server.local_addr().to_string()).await?)
    }

    /// The only error that handlers have reported. Waits for it.
    pub(crate) async fn error(&self) -> String {
        wait_until(|| !self.errors.lock().expect("no panic").is_empty()).await;
        let mut errors = self.errors.lock().expect("no panic");
        assert_eq!(errors.len(), 1, "{errors:?}");
        errors.remove(0)
    }

    fn finish(self) {
        for server in &self.servers {
            let begun = Instant::now();
            let is_empty = || {
                let stats = server.stats();
                (stats.open, stats.pollers.blocks) == (0, 0)
            };
            while !is_empty() && begun.elapsed() < DEADLINE {
                std::thread::yield_now();
            }
            assert!(is_empty(), "left behind: {:?}", server.stats());
            server.shutdown(DEADLINE).expect("nothing is busy");
        }
        let errors = self.errors.lock().expect("no panic");
        assert!(errors.is_empty(), "handlers have failed: {errors:?}");
        self.clients.shutdown().expect("client pollers end");
    }
}

/// Returns once `is_so`, with turns for others in between. The deadline of the case bounds it.
pub(crate) async fn wait_until(mut is_so: impl FnMut() -> bool) {
    while !is_so() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// Returns once `value` stays the same for a while. The peer may then have stopped for good.
pub(crate) async fn settled(value: impl Fn() -> usize) -> usize {
    let mut last = value();
    loop {
        tokio::time::sleep(Duration::from_millis(100)).await;
        let now = value();
        if now == last {
            return now;
        }
        last = now;
    }
}

/// `bytes` of a stream in which every offset looks different from its neighbours.
pub(crate) fn pattern(bytes: usize) -> Vec<u8> {
    (0..bytes).map(|at| (at ^ (at >> 8) ^ (at >> 16)) as u8).collect()
}
