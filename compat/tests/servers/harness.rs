//! A served application for each case.

use std::error::Error;
use std::io::Write;
use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use ringpoll::{Backend, ServerHandle};
use ringpoll_compat::axum::Serve;
use rustls::pki_types::CertificateDer;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use tokio::runtime::Runtime;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

/// What a case returns.
pub(crate) type Check<T = ()> = Result<T, Box<dyn Error + Send + Sync>>;

/// How long one case may take on a busy host. Reached only by one that fails.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

/// Runs one case, or says why not.
pub(crate) fn run(backend: Backend, name: &str, case: impl AsyncFnOnce(Backend) -> Check) {
    let capabilities = ringpoll::capabilities();
    if backend == Backend::Uring && capabilities.backend() != Backend::Uring {
        let must = std::env::var_os("REQUIRE_ALL_BACKENDS").is_some_and(|value| value == "1");
        let reason = format!("{name}: no {backend}: {}", capabilities.reason);
        assert!(!must, "required: {reason}");
        // Written past the capture of output, so it is visible for a passing test as well.
        return writeln!(std::io::stderr(), "skipped {reason}").expect("there is an error stream");
    }
    let done = runtime().block_on(async {
        tokio::time::timeout(DEADLINE, case(backend)).await.expect("ends in time")
    });
    if let Err(error) = done {
        panic!("{error}");
    }
}

fn runtime() -> &'static Runtime {
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    RUNTIME.get_or_init(|| {
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        builder.worker_threads(2).enable_all().build().expect("threads can be started")
    })
}

/// An application that is served.
pub(crate) struct Served {
    pub(crate) addr: SocketAddr,
    pub(crate) server: ServerHandle,
    stop: oneshot::Sender<()>,
    task: JoinHandle<ringpoll::Result<()>>,
}

impl Served {
    pub(crate) fn new(backend: Backend, app: Serve) -> Check<Served> {
        let (stop, stopped) = oneshot::channel::<()>();
        let app = app.backend(backend).server(|server| server.pollers(1));
        let bound = app.with_graceful_shutdown(async { drop(stopped.await) }).bind()?;
        let addr = bound.local_addr().as_inet().expect("a TCP address");
        let server = bound.handle();
        Ok(Served { addr, server, stop, task: tokio::spawn(bound.into_future()) })
    }

    /// Begins the shutdown. Returns what waits for its end.
    pub(crate) fn stop(self) -> JoinHandle<ringpoll::Result<()>> {
        drop(self.stop);
        self.task
    }

    /// Shuts down, and expects that no handler has failed and no connection was cut.
    pub(crate) async fn end(self) -> Check {
        let server = self.server.clone();
        self.stop().await??;
        let stats = server.stats();
        let counts = (stats.open, stats.cut, stats.handler_errors, stats.handler_panics);
        assert_eq!(counts, (0, 0, 0, 0), "{stats:?}");
        Ok(())
    }

    /// Ends the task without a shutdown.
    pub(crate) fn abandon(self) {
        self.task.abort();
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

/// A certificate for `localhost`, as its owner has it and as others trust it.
pub(crate) struct Identity {
    made: rcgen::CertifiedKey<rcgen::KeyPair>,
}

impl Identity {
    pub(crate) fn new() -> Check<Identity> {
        Ok(Identity { made: rcgen::generate_simple_self_signed(["localhost".to_owned()])? })
    }

    pub(crate) fn certificate(&self) -> CertificateDer<'static> {
        self.made.cert.der().clone()
    }

    pub(crate) fn server(&self) -> Check<ServerConfig> {
        let key = self.made.signing_key.serialize_der().try_into()?;
        let config = ServerConfig::builder().with_no_client_auth();
        Ok(config.with_single_cert(vec![self.certificate()], key)?)
    }

    /// Trusts this certificate only, and offers `protocols`.
    pub(crate) fn client(&self, protocols: &[&str]) -> Check<Arc<ClientConfig>> {
        let mut roots = RootCertStore::empty();
        roots.add(self.certificate())?;
        let config = ClientConfig::builder().with_root_certificates(roots);
        let mut config = config.with_no_client_auth();
        config.alpn_protocols = protocols.iter().map(|name| name.as_bytes().to_vec()).collect();
        Ok(Arc::new(config))
    }
}
