//! How long runs of handlers take.

use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Instant;

use metrics::{SharedString, Unit};
use ringpoll::{Connection, Result};

/// Wraps a handler: records the time of each of its runs, from the call to the end of its future.
///
/// The histogram `ringpoll_handler_seconds` has the labels `server` = `name` and `outcome`: `ok`,
/// `error`, `panic`, or `dropped` for a run that was given up, for example by a forced shutdown.
/// The time includes all waits for the peer. So it is the latency of a request where one run
/// serves one request.
///
/// A run costs two readings of the clock and one call of the recorder. The recorder is that of the
/// thread on which the run ends.
///
/// ```no_run
/// use ringpoll::Server;
/// use ringpoll_compat::metrics::timed;
///
/// # fn main() -> ringpoll::Result<()> {
/// Server::builder()
///     .on_request(timed("echo", |mut conn| async move {
///         let line = conn.until(b'\n').await?;
///         conn.write(line)?;
///         conn.flush().await
///     }))
///     .bind("127.0.0.1:8972")?
///     .serve()
/// # }
/// ```
pub fn timed<H, F>(
    name: impl Into<SharedString>,
    handler: H,
) -> impl Fn(Connection) -> Timed<F> + Send + Sync + 'static
where
    H: Fn(Connection) -> F + Send + Sync + 'static,
    F: Future<Output = Result<()>> + Send + 'static,
{
    let name = name.into();
    move |conn| {
        let mut timer = Timer::begin(name.clone());
        let future = handler(conn);
        timer.runs_handler = false;
        Timed { future, timer }
    }
}

pin_project_lite::pin_project! {
    /// The future of a handler that [`timed`] has wrapped.
    #[derive(Debug)]
    #[must_use = "futures do nothing unless polled"]
    pub struct Timed<F> {
        #[pin]
        future: F,
        timer: Timer,
    }
}

impl<F: Future<Output = Result<()>>> Future for Timed<F> {
    type Output = Result<()>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<()>> {
        let this = self.project();
        this.timer.runs_handler = true;
        let polled = this.future.poll(cx);
        this.timer.runs_handler = false;
        let done = ready!(polled);
        this.timer.record(if done.is_ok() { "ok" } else { "error" });
        Poll::Ready(done)
    }
}

/// Tells the recorder the unit and the meaning of the histogram.
pub(super) fn describe() {
    metrics::describe_histogram!(SECONDS, Unit::Seconds, "Time from the begin of a run to its end");
}

/// Records one run: at its end, or when it is dropped.
#[derive(Debug)]
struct Timer {
    name: SharedString,
    begun: Instant,
    /// The handler is being called or polled. It stays so after a panic.
    runs_handler: bool,
    is_recorded: bool,
}

impl Timer {
    fn begin(name: SharedString) -> Timer {
        Timer { name, begun: Instant::now(), runs_handler: true, is_recorded: false }
    }

    fn record(&mut self, outcome: &'static str) {
        self.is_recorded = true;
        let server = self.name.clone();
        let histogram = metrics::histogram!(SECONDS, "server" => server, "outcome" => outcome);
        histogram.record(self.begun.elapsed().as_secs_f64());
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        if !self.is_recorded {
            let outcome = if self.runs_handler { "panic" } else { "dropped" };
            // The recorder may panic. This thread may be unwinding, and a second panic that leaves
            // a destructor would abort the process.
            let _ = catch_unwind(AssertUnwindSafe(|| self.record(outcome)));
        }
    }
}

const SECONDS: &str = "ringpoll_handler_seconds";
