//! Servers: listeners, handlers, shutdown.
//!
//! A server's connections live on its pollers; each carries an `Arc` of its [`Service`], which
//! holds the handlers and, as its hooks, the books. Listeners live on the first poller, which
//! accepts and hands connections out to all, or, with `reuse_port`, one on each poller.

mod builder;
mod shutdown;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use crate::address::PeerAddr;
use crate::config::{Backend, Limits, Placement};
use crate::connection::{Handle, Hooks, Service, Shared, attach};
use crate::counters::PollerStats;
use crate::error::{Error, Result};
use crate::poller::{Accept, Command, Watcher};
use crate::pollers::Pollers;
use crate::sync::{Mutex, lock};
use crate::sys::socket::{Socket, SocketFile};
use crate::task::PlacementStats;
use crate::user_code;

pub use builder::ServerBuilder;
use shutdown::Progress;

/// A server that is bound and does not accept yet.
pub struct Server {
    inner: Arc<Inner>,
    listeners: Vec<Bound>,
}

/// Watches and ends a server. Clones refer to the same one.
#[derive(Clone)]
pub struct ServerHandle(Arc<Inner>);

/// Counts of a server, and what it chose.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ServerStats {
    /// Connections accepted and served.
    pub accepted: u64,
    /// Connections closed at once: over the limit, or by `on_prepare`.
    pub refused: u64,
    /// Connections open now.
    pub open: u64,
    /// Runs of `on_connect` and `on_request`, begun or queued for a worker or a runtime, of the
    /// pollers' connections; other servers may share those.
    pub handler_runs: u64,
    /// Futures of [`Handle::spawn`] that have not ended.
    pub spawned: u64,
    /// Runs, and spawned futures, that returned an error.
    pub handler_errors: u64,
    /// Runs, and spawned futures, that panicked.
    pub handler_panics: u64,
    /// Times accepting paused because the process or the host was out of descriptors or memory.
    pub accept_pauses: u64,
    /// Connections cut by a forced shutdown.
    pub cut: u64,
    /// The pollers' counts.
    pub pollers: PollerStats,
    /// The backend in use.
    pub backend: Backend,
    /// The placement in use.
    pub placement: Placement,
    /// How [`Placement::Auto`] decides, where it does.
    pub auto: Option<PlacementStats>,
    /// How many poller threads.
    pub poller_count: usize,
}

type Prepare = Box<dyn Fn(&Handle) -> Result<()> + Send + Sync>;
type Notify = Box<dyn Fn(&Handle) + Send + Sync>;
type Report = Box<dyn Fn(&Handle, &Error) + Send + Sync>;

/// The user's code, but for the handlers of connections and requests.
#[derive(Default)]
struct Callbacks {
    prepare: Option<Prepare>,
    disconnect: Option<Notify>,
    error: Option<Report>,
}

/// What all connections of a server share beside its handlers.
struct Books {
    callbacks: Callbacks,
    counts: Counts,
    draining: AtomicBool,
    connections_max: usize,
    progress: Progress,
}

#[derive(Default)]
struct Counts {
    accepted: AtomicU64,
    refused: AtomicU64,
    open: AtomicUsize,
    spawned: AtomicUsize,
    errors: AtomicU64,
    panics: AtomicU64,
    pauses: AtomicU64,
    cut: AtomicU64,
}

struct Inner {
    service: Arc<Service>,
    /// The hooks of the service.
    books: Arc<Books>,
    pollers: Pollers,
    owns_pollers: bool,
    limits: Arc<Limits>,
    addrs: Vec<PeerAddr>,
    acceptors: Mutex<Vec<Arc<dyn Accept>>>,
}

impl Drop for Inner {
    /// Nobody can serve, watch or end the server any more.
    fn drop(&mut self) {
        self.service.executor.stop(false);
    }
}

/// A listener before its server runs.
struct Bound {
    socket: Arc<Socket>,
    addr: PeerAddr,
    /// The socket file, if it is ours to remove.
    file: Option<SocketFile>,
}

impl Server {
    /// A server with nothing set.
    pub fn builder() -> ServerBuilder {
        ServerBuilder::default()
    }

    /// What the first listener is bound to, with the port that the kernel chose.
    pub fn local_addr(&self) -> PeerAddr {
        self.inner.addrs[0].clone()
    }

    /// What every listener is bound to, in the order they were added.
    pub fn local_addrs(&self) -> Vec<PeerAddr> {
        self.inner.addrs.clone()
    }

    /// A handle, to end the server from elsewhere.
    pub fn handle(&self) -> ServerHandle {
        ServerHandle(Arc::clone(&self.inner))
    }

    /// Accepts and serves until it is shut down, or until a listener dies.
    ///
    /// # Errors
    /// What a listener died of.
    pub fn serve(self) -> Result<()> {
        self.spawn()?.wait()
    }

    /// Accepts and serves in the background.
    ///
    /// # Errors
    /// Closed, if it was shut down before.
    pub fn spawn(self) -> Result<ServerHandle> {
        let inner = self.inner;
        inner.books.progress.start(self.listeners.len())?;
        let remotes = inner.pollers.remotes();
        let watcher: Arc<dyn Watcher> = Arc::clone(&inner.books) as _;
        remotes.iter().for_each(|remote| remote.tell_of_failure(&watcher));
        for (index, bound) in self.listeners.into_iter().enumerate() {
            let acceptor: Arc<dyn Accept> =
                Arc::new(Acceptor { inner: Arc::clone(&inner), file: Mutex::new(bound.file) });
            lock(&inner.acceptors).push(Arc::clone(&acceptor));
            let remote = &remotes[index % remotes.len()];
            remote.send(Command::Listen(acceptor, bound.socket));
        }
        Ok(ServerHandle(inner))
    }
}

impl ServerHandle {
    /// What the first listener is bound to.
    pub fn local_addr(&self) -> PeerAddr {
        self.0.addrs[0].clone()
    }

    /// The pollers that the connections live on.
    pub fn pollers(&self) -> Pollers {
        self.0.pollers.clone()
    }

    /// What the server did and holds.
    pub fn stats(&self) -> ServerStats {
        let counts = &self.0.books.counts;
        let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
        let pollers = self.0.pollers.stats();
        ServerStats {
            accepted: read(&counts.accepted),
            refused: read(&counts.refused),
            open: counts.open.load(Ordering::Relaxed) as u64,
            handler_runs: pollers.handler_runs,
            spawned: counts.spawned.load(Ordering::Relaxed) as u64,
            handler_errors: read(&counts.errors),
            handler_panics: read(&counts.panics),
            accept_pauses: read(&counts.pauses),
            cut: read(&counts.cut),
            pollers,
            backend: self.0.pollers.backend(),
            placement: self.0.service.executor.placement(),
            auto: self.0.service.executor.stats(),
            poller_count: self.0.pollers.count(),
        }
    }
}

impl Hooks for Books {
    fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }

    fn prepare(&self, handle: &Handle) -> Result<()> {
        let prepared = self.callbacks.prepare.as_ref().map_or(Ok(()), |prepare| prepare(handle));
        let stays = prepared.is_ok() && !handle.is_closed();
        let count = if stays { &self.counts.accepted } else { &self.counts.refused };
        count.fetch_add(1, Ordering::Relaxed);
        prepared
    }

    fn disconnected(&self, handle: &Handle) {
        if let Some(disconnect) = &self.callbacks.disconnect {
            disconnect(handle);
        }
    }

    fn failed(&self, handle: &Handle, error: &Error) {
        let count = if error.is_panicked() { &self.counts.panics } else { &self.counts.errors };
        count.fetch_add(1, Ordering::Relaxed);
        tracing::debug!(peer = %handle.peer_addr(), %error, "handler failed");
        if let Some(report) = &self.callbacks.error {
            report(handle, error);
        }
    }

    fn spawned(&self) {
        self.counts.spawned.fetch_add(1, Ordering::Relaxed);
    }

    fn spawn_ended(&self) {
        // A shutdown sets the one and looks at the other; we do it the other way round. In one
        // order of all four, one of us sees what the other did.
        let before = self.counts.spawned.fetch_sub(1, Ordering::SeqCst);
        if before == 1 && self.draining.load(Ordering::SeqCst) {
            self.progress.check();
        }
    }

    fn gone(&self) {
        let before = self.counts.open.fetch_sub(1, Ordering::AcqRel);
        if before == 1 {
            self.progress.check();
        }
    }
}

impl Watcher for Books {
    fn poller_failed(&self, why: &str) {
        self.progress.fail(Error::other(format!("serve: a poller has ended: {why}")));
    }
}

impl Drop for Books {
    fn drop(&mut self) {
        // What the user's closures hold.
        let Callbacks { prepare, disconnect, error } = std::mem::take(&mut self.callbacks);
        user_code::discard(prepare);
        user_code::discard(disconnect);
        user_code::discard(error);
    }
}

/// Takes the connections of one listener. It keeps its server alive until that is shut down.
struct Acceptor {
    inner: Arc<Inner>,
    file: Mutex<Option<SocketFile>>,
}

impl Accept for Acceptor {
    fn on_accepted(&self, socket: Socket, peer: PeerAddr) {
        let inner = &self.inner;
        let counts = &inner.books.counts;
        if inner.books.is_draining()
            || counts.open.load(Ordering::Relaxed) >= inner.books.connections_max
        {
            // Accepted and closed: the peer sees an end at once, instead of waiting in the backlog.
            counts.refused.fetch_add(1, Ordering::Relaxed);
            return;
        }
        counts.open.fetch_add(1, Ordering::AcqRel);
        let socket = Arc::new(socket);
        let service = Some(Arc::clone(&inner.service));
        let remote = inner.pollers.pick();
        let shared = Shared::new(remote, &inner.limits, service, Arc::clone(&socket), peer);
        attach(&shared, socket);
    }

    fn on_failed(&self, error: &io::Error) -> bool {
        use rustix::io::Errno;
        const SHORT: [Errno; 4] = [Errno::MFILE, Errno::NFILE, Errno::NOBUFS, Errno::NOMEM];
        let inner = &self.inner;
        if SHORT.iter().any(|errno| error.raw_os_error() == Some(errno.raw_os_error())) {
            let before = inner.books.counts.pauses.fetch_add(1, Ordering::Relaxed);
            if before == 0 {
                tracing::warn!(%error, "accept: pausing until there is room");
            }
            return true;
        }
        inner.books.progress.fail(Error::io("accept", copy(error)));
        false
    }

    fn on_removed(&self) {
        // Before the address counts as free.
        let file = lock(&self.file).take();
        drop(file);
        // We keep the server alive, and it keeps us to end us: that is over.
        let here = std::ptr::from_ref(self).addr();
        let gone = {
            let mut acceptors = lock(&self.inner.acceptors);
            let place = acceptors.iter().position(|own| Arc::as_ptr(own).addr() == here);
            place.map(|place| acceptors.swap_remove(place))
        };
        drop(gone);
        self.inner.books.progress.listener_gone();
    }
}

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Server").field("addrs", &self.inner.addrs).finish_non_exhaustive()
    }
}

impl std::fmt::Debug for ServerHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ServerHandle").field("addrs", &self.0.addrs).finish_non_exhaustive()
    }
}

/// An error to keep; the kernel's number is all there is in it.
fn copy(error: &io::Error) -> io::Error {
    error.raw_os_error().map_or_else(|| error.kind().into(), io::Error::from_raw_os_error)
}
