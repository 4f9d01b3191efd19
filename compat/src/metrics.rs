//! Counts of servers, and times of handlers, under the facade [`metrics`].
//!
//! [`ServerMetrics`] passes the counts of a [`ServerHandle`] to the recorder that the program has
//! installed, each time that it is sampled. [`timed`] wraps a handler and records how long its runs
//! take. All names begin with `ringpoll_`, and all metrics have the label `server`. [`PoolMetrics`]
//! passes the counts of a client's pool on, with the label `pool`.
//!
//! ```
//! use std::time::Duration;
//!
//! use ringpoll::{Connection, Result, Server};
//! use ringpoll_compat::metrics::{ServerMetrics, timed};
//!
//! async fn echo(mut conn: Connection) -> Result<()> {
//!     let bytes = conn.len();
//!     let data = conn.next(bytes).await?;
//!     conn.write(data)?;
//!     conn.flush().await
//! }
//!
//! fn main() -> Result<()> {
//!     // First install a recorder, for example that of an exporter to Prometheus.
//!     let server = Server::builder()
//!         .on_request(timed("echo", echo))
//!         .bind("127.0.0.1:0")?
//!         .spawn()?;
//!     let sampling = ServerMetrics::new(server.clone(), "echo").spawn(Duration::from_secs(5))?;
//!
//!     // The thread of the samples ends with the server.
//!     server.shutdown(Duration::from_secs(5))?;
//!     drop(sampling); // waits for that thread
//!     Ok(())
//! }
//! ```

mod names;
mod pool;
mod timing;

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Wake, Waker};
use std::thread::{self, JoinHandle, Thread};
use std::time::{Duration, Instant};

use metrics::SharedString;
use ringpoll::ServerHandle;

use names::{METRICS, Value};
pub use pool::PoolMetrics;
pub use timing::{Timed, timed};

/// The counts of one server, for the recorder of the program.
///
/// A *sample* reads [`ServerHandle::stats`] and passes every count on: sums as counters, by
/// [`Counter::absolute`](::metrics::Counter::absolute), and present values as gauges. Counters
/// never decrease. Servers that share pollers have equal counts of pollers.
///
/// It holds a handle of the server, so keep it only as long as the server is of interest.
///
/// ```
/// use ringpoll::Server;
/// use ringpoll_compat::metrics::ServerMetrics;
///
/// let server = Server::builder()
///     .on_request(|mut conn| async move {
///         let bytes = conn.len();
///         conn.skip(bytes).await
///     })
///     .bind("127.0.0.1:0")?
///     .spawn()?;
/// let metrics = ServerMetrics::new(server, "sink");
/// metrics.sample(); // call this from a loop of your own, or use `spawn`
/// # Ok::<(), ringpoll::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct ServerMetrics {
    server: ServerHandle,
    name: SharedString,
}

/// The thread that takes samples of a server, made by [`ServerMetrics::spawn`].
///
/// The thread ends with the server. Dropping this ends the thread before that, and waits for it.
/// [`detach`](Self::detach) lets it run until the server ends.
#[derive(Debug)]
#[must_use = "dropping it ends the thread"]
pub struct Sampling {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl ServerMetrics {
    /// The counts of `server`, with the label `server` = `name`. Describes all metrics to the
    /// recorder that is installed, so install it before.
    pub fn new(server: ServerHandle, name: impl Into<SharedString>) -> ServerMetrics {
        names::describe();
        timing::describe();
        ServerMetrics { server, name: name.into() }
    }

    /// Takes one sample, for the recorder of the calling thread.
    pub fn sample(&self) {
        let stats = self.server.stats();
        for metric in METRICS {
            let name = self.name.clone();
            match metric.value {
                Value::Counter(read) => {
                    metrics::counter!(metric.name, "server" => name).absolute(read(&stats));
                }
                Value::Gauge(read) => {
                    metrics::gauge!(metric.name, "server" => name).set(read(&stats) as f64);
                }
            }
        }
    }

    /// Takes a sample now, after each `interval`, and at the end of the server, on a thread of its
    /// own. `interval` is at least a millisecond.
    ///
    /// The thread ends when the server has ended: after its shutdown, or after a shutdown has begun
    /// and no connection is left, or after a failure. A recorder that panics ends the thread.
    ///
    /// # Errors
    /// The kernel's error, if no thread can be started.
    pub fn spawn(self, interval: Duration) -> io::Result<Sampling> {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let interval = interval.max(INTERVAL_MIN);
        let thread = thread::Builder::new()
            .name("ringpoll-metrics".to_owned())
            .spawn(move || self.run(interval, &stopped))?;
        Ok(Sampling { stop, thread: Some(thread) })
    }

    fn run(&self, interval: Duration, stop: &AtomicBool) {
        let waker = Waker::from(Arc::new(Unparks(thread::current())));
        let mut cx = Context::from_waker(&waker);
        let mut shutdown = self.server.shutdown_begun();
        let mut last = None;
        loop {
            let is_over = stop.load(Ordering::Acquire) || self.has_ended();
            let since = last.map(|last: Instant| last.elapsed());
            if is_over || since.is_none_or(|since| since >= interval) {
                self.sample();
                last = Some(Instant::now());
            }
            if is_over {
                return;
            }
            // The begin of a shutdown unparks this thread. The end of the server does not.
            let is_ending = Pin::new(&mut shutdown).poll(&mut cx).is_ready();
            let wait = interval.saturating_sub(last.map_or(Duration::ZERO, |last| last.elapsed()));
            thread::park_timeout(if is_ending { wait.min(END_CHECK_INTERVAL) } else { wait });
        }
    }

    fn has_ended(&self) -> bool {
        let is_drained = || {
            let stats = self.server.stats();
            self.server.is_shutting_down() && (stats.open, stats.spawned) == (0, 0)
        };
        self.server.has_ended() || is_drained()
    }
}

impl Sampling {
    /// Lets the thread run until the server ends.
    pub fn detach(mut self) {
        self.thread = None;
    }

    /// Whether the thread has ended.
    pub fn is_finished(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }
}

impl Drop for Sampling {
    fn drop(&mut self) {
        let Some(thread) = self.thread.take() else { return };
        self.stop.store(true, Ordering::Release);
        thread.thread().unpark();
        // The panic of a recorder was reported by the panic hook.
        let _ = thread.join();
    }
}

struct Unparks(Thread);

impl Wake for Unparks {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

const INTERVAL_MIN: Duration = Duration::from_millis(1);

/// How often a thread checks whether a server that shuts down has ended. A shutdown is rare and
/// short, so these checks need not be cheap.
const END_CHECK_INTERVAL: Duration = Duration::from_millis(20);
