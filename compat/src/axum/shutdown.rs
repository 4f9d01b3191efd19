//! The future of a served application, and its end.

use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::task::Poll;
use std::thread;
use std::time::Duration;

use ringpoll::{Result, Server, ServerHandle, unblock};

/// Serves until `signal` completes, then shuts down; or until the server has ended otherwise.
pub(super) async fn run(
    server: Server,
    signal: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
    shutdown_timeout: Duration,
) -> Result<()> {
    let running = Running(Some(server.spawn()?));
    let handle = running.handle();
    let mut ended = pin!(unblock(move || handle.wait()));
    if let Some(mut signal) = signal {
        let first = poll_fn(|cx| match ended.as_mut().poll(cx) {
            Poll::Ready(result) => Poll::Ready(Some(result)),
            Poll::Pending => signal.as_mut().poll(cx).map(|()| None),
        });
        if let Some(result) = first.await {
            return running.ended(result?);
        }
        let cut = running.handle().shutdown_forced_async(shutdown_timeout).await?;
        if cut > 0 {
            tracing::warn!(cut, ?shutdown_timeout, "connections were busy at the end");
        }
    }
    let result = ended.await?;
    running.ended(result)
}

/// A server that runs. Dropping it ends the server.
struct Running(Option<ServerHandle>);

impl Running {
    fn handle(&self) -> ServerHandle {
        self.0.clone().expect("the server runs")
    }

    fn ended(mut self, result: Result<()>) -> Result<()> {
        self.0 = None;
        result
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let Some(handle) = self.0.take() else { return };
        // The shutdown blocks, and this may be a poller or a thread of a runtime.
        let end = thread::Builder::new().name("ringpoll-end".to_owned());
        let ending = end.spawn(move || handle.shutdown_forced(Duration::ZERO));
        if let Err(error) = ending {
            tracing::warn!(%error, "no thread to end a server that was dropped");
        }
    }
}
