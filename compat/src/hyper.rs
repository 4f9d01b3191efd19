//! hyper on ringpoll connections, without adapters between them.
//!
//! [`TokioStream`] implements hyper's [`Read`] and [`Write`]. [`HyperExecutor`] and [`HyperTimer`]
//! use the threads of a connection: the threads of its handlers, and its poller.

#[cfg(feature = "hyper-util")]
mod connector;

use std::future::Future;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use hyper::rt::{Executor, Read, ReadBufCursor, Sleep, Timer, Write};
use hyper_util::rt::TokioIo;
use ringpoll::Handle;
use tokio::io::AsyncWrite;

use crate::TokioStream;
#[cfg(feature = "hyper-util")]
pub use connector::HyperConnector;

/// Runs hyper's tasks, such as the streams of HTTP/2, where the handlers of a connection run: see
/// [`Handle::spawn`].
///
/// A connection that was dialled has no handlers. Its tasks run on the tokio runtime that the
/// caller is in.
///
/// ```no_run
/// use hyper::{Error, Response, server::conn::http2, service::service_fn};
/// use ringpoll::Server;
/// use ringpoll_compat::{HyperExecutor, HyperTimer, TokioStream};
///
/// # fn main() -> ringpoll::Result<()> {
/// Server::builder()
///     .on_connect(|conn| async move {
///         let mut http = http2::Builder::new(HyperExecutor::new(conn.handle()));
///         http.timer(HyperTimer::new(conn.handle()));
///         let greet = |_| async { Ok::<_, Error>(Response::new("hello".to_string())) };
///         let greet = service_fn(greet);
///         let served = http.serve_connection(TokioStream::from(conn), greet).await;
///         served.map_err(ringpoll::Error::other)
///     })
///     .bind("127.0.0.1:8972")?
///     .serve()
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct HyperExecutor {
    handle: Handle,
}

/// hyper's timer on the poller of a connection: see [`Handle::sleep_until`]. It needs no runtime.
///
/// hyper drops its wait for the head of a request when the head has come, and begins another one
/// for the next request. The timer keeps the dropped wait and sets it anew, so that a request costs
/// the poller no timer. Clones share the kept wait.
#[derive(Clone, Debug)]
pub struct HyperTimer {
    handle: Handle,
    kept: Kept,
}

/// A wait of hyper.
struct HyperSleep {
    /// `None` only during the drop.
    sleep: Option<ringpoll::Sleep>,
    kept: Kept,
}

/// The wait that a timer keeps.
type Kept = Arc<Mutex<Option<ringpoll::Sleep>>>;

impl HyperExecutor {
    /// An executor for the tasks of the connection of `handle`.
    pub fn new(handle: Handle) -> HyperExecutor {
        HyperExecutor { handle }
    }
}

impl<F> Executor<F> for HyperExecutor
where
    F: Future + Send + 'static,
    F::Output: Send,
{
    /// # Panics
    /// If the connection has no server, and the caller is not in a tokio runtime.
    fn execute(&self, future: F) {
        let future = async move {
            future.await;
            Ok(())
        };
        if self.handle.has_server() {
            self.handle.spawn(future).expect("the connection has a server");
        } else {
            tokio::spawn(future);
        }
    }
}

impl HyperTimer {
    /// A timer on the poller of the connection of `handle`.
    pub fn new(handle: Handle) -> HyperTimer {
        HyperTimer { handle, kept: Arc::default() }
    }
}

impl Timer for HyperTimer {
    fn sleep(&self, duration: Duration) -> Pin<Box<dyn Sleep>> {
        // A duration that overflows the clock would never end.
        let now = Instant::now();
        self.sleep_until(now.checked_add(duration).unwrap_or(now + NEARLY_FOREVER))
    }

    fn sleep_until(&self, deadline: Instant) -> Pin<Box<dyn Sleep>> {
        let kept = lock(&self.kept).take();
        let sleep = match kept {
            Some(mut sleep) => {
                sleep.reset(deadline);
                sleep
            }
            None => self.handle.sleep_until(deadline),
        };
        Box::pin(HyperSleep { sleep: Some(sleep), kept: Arc::clone(&self.kept) })
    }

    fn reset(&self, sleep: &mut Pin<Box<dyn Sleep>>, deadline: Instant) {
        match sleep.as_mut().downcast_mut_pin::<HyperSleep>() {
            Some(sleep) => sleep.get_mut().sleep_mut().reset(deadline),
            None => *sleep = self.sleep_until(deadline),
        }
    }
}

impl HyperSleep {
    fn sleep_mut(&mut self) -> &mut ringpoll::Sleep {
        self.sleep.as_mut().expect("only the drop takes it")
    }
}

impl Drop for HyperSleep {
    fn drop(&mut self) {
        let replaced = std::mem::replace(&mut *lock(&self.kept), self.sleep.take());
        drop(replaced);
    }
}

impl Sleep for HyperSleep {}

impl Future for HyperSleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        Pin::new(self.sleep_mut()).poll(cx)
    }
}

impl Read for TokioStream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        // The adapter lends the room in `buffer` as tokio's type, into which a read can receive.
        Pin::new(&mut TokioIo::new(self.get_mut())).poll_read(cx, buffer)
    }
}

impl Write for TokioStream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        AsyncWrite::poll_write(self, cx, bytes)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pieces: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        AsyncWrite::poll_write_vectored(self, cx, pieces)
    }

    fn is_write_vectored(&self) -> bool {
        AsyncWrite::is_write_vectored(self)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        AsyncWrite::poll_flush(self, cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        AsyncWrite::poll_shutdown(self, cx)
    }
}

fn lock(kept: &Kept) -> MutexGuard<'_, Option<ringpoll::Sleep>> {
    kept.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A century.
const NEARLY_FOREVER: Duration = Duration::from_secs(100 * 365 * 24 * 60 * 60);
