//! Servers: listeners, handlers, shutdown.
//!
//! Each connection of a server belongs to one poller and holds an `Arc` of the server's
//! [`Service`]: its handlers, and its hooks, which are [`ServerState`]. Each listener belongs to
//! one poller, which accepts its connections and distributes them over all pollers. The accept
//! methods and the hooks run on pollers; `ServerHandle` is called from any other thread.

mod builder;
mod listeners;
mod shutdown;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use crate::address::PeerAddr;
use crate::config::{Backend, Limits, Placement};
use crate::connection::{Core, Handle, Hooks, Service, attach};
use crate::counters::PollerStats;
use crate::error::{Error, Result};
use crate::poller::{Accept, Command, Watcher};
use crate::pollers::Pollers;
use crate::sync::{Mutex, lock};
use crate::sys::socket::{Socket, SocketFile};
use crate::task::{PlacementStats, Signal};
use crate::user_code;

pub use builder::ServerBuilder;
use shutdown::Progress;

/// A server that is bound and does not accept connections yet.
pub struct Server {
    inner: Arc<Inner>,
    listeners: Vec<Bound>,
}

/// Observes and ends a server. Clones refer to the same server.
#[derive(Clone)]
pub struct ServerHandle(Arc<Inner>);

/// Counts of a server, and the backend and placement that it uses.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ServerStats {
    /// Connections accepted and served.
    pub accepted: u64,
    /// Connections closed right after they were accepted: above the limit, or refused by
    /// `on_prepare`.
    pub refused: u64,
    /// Connections open now.
    pub open: u64,
    /// Runs of `on_connect` and `on_request` that were begun, or queued for a worker or a runtime.
    /// Runs of other servers that use the same pollers count as well.
    pub handler_runs: u64,
    /// Futures of [`Handle::spawn`] that have not ended.
    pub spawned: u64,
    /// Runs, and spawned futures, that returned an error.
    pub handler_errors: u64,
    /// Runs, and spawned futures, that panicked.
    pub handler_panics: u64,
    /// How often accepting paused because the process or the host had no free descriptors or
    /// memory.
    pub accept_pauses: u64,
    /// Connections that a forced shutdown has cut.
    pub cut: u64,
    /// Counts of the pollers.
    pub pollers: PollerStats,
    /// The backend in use.
    pub backend: Backend,
    /// The placement in use.
    pub placement: Placement,
    /// Measurements and decisions where handlers move between pollers and workers: with
    /// [`Placement::Auto`], and with [`Placement::Pool`] on one CPU. `None` otherwise.
    pub auto: Option<PlacementStats>,
    /// Number of poller threads.
    pub poller_count: usize,
}

type Prepare = Box<dyn Fn(&Handle) -> Result<()> + Send + Sync>;
type Notify = Box<dyn Fn(&Handle) + Send + Sync>;
type Report = Box<dyn Fn(&Handle, &Error) + Send + Sync>;

/// Callbacks of the user, except the handlers of connections and requests.
#[derive(Default)]
struct Callbacks {
    prepare: Option<Prepare>,
    disconnect: Option<Notify>,
    error: Option<Report>,
}

/// State of a server that its connections share: callbacks, counts and the shutdown.
struct ServerState {
    callbacks: Callbacks,
    counts: Counts,
    /// Raised when the shutdown begins. Also the signal of the service.
    shutdown: Arc<Signal>,
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
    /// Also the hooks of `service`.
    state: Arc<ServerState>,
    pollers: Pollers,
    owns_pollers: bool,
    limits: Arc<Limits>,
    addrs: Vec<PeerAddr>,
    acceptors: Mutex<Vec<Arc<dyn Accept>>>,
}

impl Drop for Inner {
    /// No handle and no listener of the server exists any more, so its executor ends.
    fn drop(&mut self) {
        self.service.executor.stop(false);
    }
}

/// A listener of a server that does not run yet.
struct Bound {
    socket: Arc<Socket>,
    addr: PeerAddr,
    /// The socket file, if its removal is this server's task.
    file: Option<SocketFile>,
}

impl Server {
    /// A builder with default settings.
    pub fn builder() -> ServerBuilder {
        ServerBuilder::default()
    }

    /// The address of the first listener, with the port that the kernel chose.
    pub fn local_addr(&self) -> PeerAddr {
        self.inner.addrs[0].clone()
    }

    /// The addresses of all listeners, in the order in which they were added.
    pub fn local_addrs(&self) -> Vec<PeerAddr> {
        self.inner.addrs.clone()
    }

    /// A handle that can end the server from another thread.
    pub fn handle(&self) -> ServerHandle {
        ServerHandle(Arc::clone(&self.inner))
    }

    /// Serves until the server is shut down or a listener fails.
    ///
    /// # Errors
    /// The error of the listener that failed, or of a poller that ended.
    pub fn serve(self) -> Result<()> {
        self.spawn()?.wait()
    }

    /// Serves in the background.
    ///
    /// # Errors
    /// Closed, if the server was shut down before.
    pub fn spawn(self) -> Result<ServerHandle> {
        let inner = self.inner;
        inner.state.progress.start(self.listeners.len())?;
        let remotes = inner.pollers.remotes();
        let watcher: Arc<dyn Watcher> = Arc::clone(&inner.state) as _;
        remotes.iter().for_each(|remote| remote.tell_of_failure(&watcher));
        let mut acceptors = Vec::new();
        for (index, bound) in self.listeners.into_iter().enumerate() {
            let acceptor: Arc<dyn Accept> =
                Arc::new(Acceptor { inner: Arc::clone(&inner), file: Mutex::new(bound.file) });
            acceptors.push(Arc::clone(&acceptor));
            lock(&inner.acceptors).push(Arc::clone(&acceptor));
            let remote = &remotes[index % remotes.len()];
            remote.send(Command::Listen(acceptor, bound.socket));
        }
        // A shutdown that began meanwhile may have ended listeners before their pollers had them,
        // or may have missed some.
        if inner.state.progress.is_ending() {
            lock(&inner.acceptors).clear();
            inner.unlisten(acceptors);
        }
        Ok(ServerHandle(inner))
    }
}

impl ServerHandle {
    /// The address of the first listener.
    pub fn local_addr(&self) -> PeerAddr {
        self.0.addrs[0].clone()
    }

    /// The addresses of all listeners, in the order in which they were added. A shutdown does not
    /// change them.
    pub fn local_addrs(&self) -> Vec<PeerAddr> {
        self.0.addrs.clone()
    }

    /// The pollers of the server's connections.
    pub fn pollers(&self) -> Pollers {
        self.0.pollers.clone()
    }

    /// Counts up to now, and the settings in use.
    pub fn stats(&self) -> ServerStats {
        let counts = &self.0.state.counts;
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

impl Hooks for ServerState {
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
        user_code::log(|| tracing::debug!(peer = %handle.peer_addr(), %error, "handler failed"));
        if let Some(report) = &self.callbacks.error {
            report(handle, error);
        }
    }

    fn spawned(&self) {
        self.counts.spawned.fetch_add(1, Ordering::Relaxed);
    }

    fn spawn_ended(&self) {
        // A shutdown raises its signal and then loads `spawned`; this function changes `spawned`
        // and then looks at the signal. All four are SeqCst, so at least one thread sees the
        // other's change.
        let before = self.counts.spawned.fetch_sub(1, Ordering::SeqCst);
        if before == 1 && self.shutdown.is_raised() {
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

impl Watcher for ServerState {
    fn poller_failed(&self, why: &str) {
        self.progress.fail(Error::other(format!("serve: a poller has ended: {why}")));
    }
}

impl Drop for ServerState {
    fn drop(&mut self) {
        // No run of this server exists any more. A future that still waits for the shutdown, and
        // its waker, refer to each other; this ends the cycle.
        self.shutdown.raise();
        // The closures are the user's, and so are the destructors of their captures.
        let Callbacks { prepare, disconnect, error } = std::mem::take(&mut self.callbacks);
        user_code::discard(prepare);
        user_code::discard(disconnect);
        user_code::discard(error);
    }
}

/// Accepts the connections of one listener. It holds its server, so a server exists until it is
/// shut down, even without a handle.
struct Acceptor {
    inner: Arc<Inner>,
    file: Mutex<Option<SocketFile>>,
}

impl Accept for Acceptor {
    fn on_accepted(&self, socket: Socket, peer: PeerAddr) {
        let inner = &self.inner;
        let counts = &inner.state.counts;
        if inner.state.shutdown.is_raised()
            || counts.open.load(Ordering::Relaxed) >= inner.state.connections_max
        {
            // Dropping the socket closes it, so the peer does not wait in the backlog.
            counts.refused.fetch_add(1, Ordering::Relaxed);
            return;
        }
        counts.open.fetch_add(1, Ordering::AcqRel);
        let socket = Arc::new(socket);
        let service = Some(Arc::clone(&inner.service));
        let remote = inner.pollers.pick();
        let core = Core::new(remote, &inner.limits, service, Arc::clone(&socket), peer);
        attach(&core, socket);
    }

    fn on_failed(&self, error: &io::Error) -> bool {
        use rustix::io::Errno;
        const SHORT: [Errno; 4] = [Errno::MFILE, Errno::NFILE, Errno::NOBUFS, Errno::NOMEM];
        let inner = &self.inner;
        if SHORT.iter().any(|errno| error.raw_os_error() == Some(errno.raw_os_error())) {
            let before = inner.state.counts.pauses.fetch_add(1, Ordering::Relaxed);
            if before == 0 {
                user_code::log(|| tracing::warn!(%error, "accept: pausing until there is room"));
            }
            return true;
        }
        inner.state.progress.fail(Error::io("accept", copy(error)));
        false
    }

    fn on_removed(&self) {
        // The socket file is removed before `listener_gone` reports the address as free.
        drop(lock(&self.file).take());
        // The acceptor and its server refer to each other. This ends the cycle.
        let address = std::ptr::from_ref(self).addr();
        let acceptor = {
            let mut acceptors = lock(&self.inner.acceptors);
            let index = acceptors.iter().position(|other| Arc::as_ptr(other).addr() == address);
            index.map(|index| acceptors.swap_remove(index))
        };
        drop(acceptor);
        self.inner.state.progress.listener_gone();
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

/// A copy of an error from the kernel. It keeps the error number or, without one, the kind.
fn copy(error: &io::Error) -> io::Error {
    error.raw_os_error().map_or_else(|| error.kind().into(), io::Error::from_raw_os_error)
}
