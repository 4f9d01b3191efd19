//! A connection whose framed requests are answered by a service.

use std::collections::VecDeque;
use std::error::Error as StdError;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use ringpoll::{Connection, Error, Result, ShutdownBegun};
use tower::Service;

use super::{Codec, OUTPUT_BYTES_MAX, PIPELINED_REQUESTS_MAX};

/// A handler for [`on_connect`](ringpoll::ServerBuilder::on_connect) that answers the framed
/// requests of a connection with `service`.
///
/// Each connection gets a clone of the service when it begins. Layers with state that connections
/// share, such as a limit of concurrency, share it between clones.
///
/// * **Order.** Up to 64 requests of a connection are in progress at a time. Answers are sent in
///   the order of the requests, and one flush sends all answers that are ready.
/// * **Back-pressure.** A request is decoded, then waits until `poll_ready` of the service is
///   ready. Meanwhile no other request of the connection is decoded. No answer is written while 256
///   KiB of the connection are not in the kernel. Unread requests fill the input up to its
///   [watermark](ringpoll::ServerBuilder::input_watermarks), then TCP slows the peer down.
/// * **Errors.** A bad frame, an error of the service, and a failed connection are the error of the
///   handler, once: it is reported to [`on_error`](ringpoll::ServerBuilder::on_error) and closes
///   this connection only. Requests before it are answered first. Errors that the peer is to see
///   are answers: make them part of the service's response.
/// * **Panics** of the service close this connection only.
/// * **Timeouts.** The read timeout bounds the wait for a whole request while none is in progress.
///   The write timeout bounds the wait for a peer that does not read. The request timeout of the
///   server has no effect here.
/// * **The end.** After the end of the peer's stream, the requests before it are answered, and the
///   connection closes. A shutdown of the server does the same once the connection has no request.
///
/// The module [`tower`](super) has an example.
pub fn serve_tower<S, C>(
    service: S,
    codec: C,
) -> impl Fn(Connection) -> Serving<S, C> + Send + Sync + 'static
where
    C: Codec,
    S: Service<C::In, Response = C::Out> + Clone + Send + Sync + 'static,
    S::Error: Into<Box<dyn StdError + Send + Sync>> + Send,
    S::Future: Send + 'static,
{
    let codec = Arc::new(codec);
    move |conn| Serving {
        service: service.clone(),
        codec: Arc::clone(&codec),
        next: None,
        calls: VecDeque::new(),
        ending: None,
        waited_busy: false,
        shutdown: conn.shutdown_begun(),
        conn,
    }
}

/// The future of a handler that [`serve_tower`] has made: serves one connection.
#[must_use = "futures do nothing unless polled"]
pub struct Serving<S: Service<C::In>, C: Codec> {
    service: S,
    codec: Arc<C>,
    /// A request that waits until the service is ready.
    next: Option<C::In>,
    /// The requests in progress, in their order.
    calls: VecDeque<Call<S::Future>>,
    /// No more requests are read, for this reason. `Ok` is the end of the peer's stream.
    ending: Option<Result<()>>,
    /// The present wait for a request began while other requests were in progress.
    waited_busy: bool,
    shutdown: ShutdownBegun,
    conn: Connection,
}

enum Call<F: Future> {
    Running(Pin<Box<F>>),
    Done(F::Output),
}

/// What came of writing answers.
enum Wrote {
    /// This many were written. The next one is not ready.
    Answers(usize),
    /// The next one waits until the peer has read.
    Blocked,
}

// Only the boxed futures are pinned.
impl<S: Service<C::In>, C: Codec> Unpin for Serving<S, C> {}

impl<S, C> Future for Serving<S, C>
where
    C: Codec,
    S: Service<C::In, Response = C::Out>,
    S::Error: Into<Box<dyn StdError + Send + Sync>>,
{
    type Output = Result<()>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<()>> {
        let this = self.get_mut();
        // After this many requests, other tasks get a turn.
        let mut budget = PIPELINED_REQUESTS_MAX;
        loop {
            this.take_requests(cx, &mut budget);
            let was_full = this.calls.len() == PIPELINED_REQUESTS_MAX;
            match this.write_answers(cx)? {
                // Woken when there is room. A flush would replace that wake-up.
                Wrote::Blocked => return Poll::Pending,
                Wrote::Answers(count) if count > 0 && was_full && budget > 0 => {}
                Wrote::Answers(_) => break,
            }
        }
        if budget == 0 {
            cx.waker().wake_by_ref();
        }
        let is_flushed = match this.conn.poll_flush(cx) {
            Poll::Ready(flushed) => {
                flushed?;
                true
            }
            Poll::Pending => false,
        };
        if !this.calls.is_empty() || this.next.is_some() {
            return Poll::Pending;
        }
        match &this.ending {
            // The close that follows sends what was submitted.
            Some(Err(_)) => Poll::Ready(this.ending.take().unwrap_or(Ok(()))),
            Some(Ok(())) if is_flushed => Poll::Ready(Ok(())),
            None if is_flushed && budget > 0 => Pin::new(&mut this.shutdown).poll(cx).map(Ok),
            _ => Poll::Pending,
        }
    }
}

impl<S, C> Serving<S, C>
where
    C: Codec,
    S: Service<C::In, Response = C::Out>,
    S::Error: Into<Box<dyn StdError + Send + Sync>>,
{
    /// Reads requests, and passes them to the service while it is ready.
    fn take_requests(&mut self, cx: &mut Context<'_>, budget: &mut usize) {
        while self.calls.len() < PIPELINED_REQUESTS_MAX && *budget > 0 {
            if self.next.is_none() {
                self.next = self.read_request(cx);
            }
            // Asked only when there is a request: a ready service may hold a place for it, which
            // others wait for.
            if self.next.is_none() {
                return;
            }
            match self.service.poll_ready(cx) {
                Poll::Pending => return,
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(error)) => {
                    self.next = None;
                    self.ending = Some(Err(Error::other(error)));
                    return;
                }
            }
            if let Some(request) = self.next.take() {
                self.calls.push_back(Call::Running(Box::pin(self.service.call(request))));
                *budget -= 1;
            }
        }
    }

    /// The next request. `None` if it has not arrived, or if no more will come.
    fn read_request(&mut self, cx: &mut Context<'_>) -> Option<C::In> {
        if self.ending.is_some() {
            return None;
        }
        let codec = &*self.codec;
        let is_busy = !self.calls.is_empty();
        let (mut reader, _) = self.conn.parts();
        let mut frames = reader.frames(codec.frame_bytes_max(), |front| codec.frame_bytes(front));
        let ending = loop {
            match frames.poll_next(cx) {
                Poll::Pending => {
                    self.waited_busy |= is_busy;
                    return None;
                }
                Poll::Ready(Ok(Some(frame))) => {
                    self.waited_busy = false;
                    match codec.decode(frame) {
                        Ok(request) => return Some(request),
                        Err(error) => break Err(error),
                    }
                }
                Poll::Ready(Ok(None)) => break Ok(()),
                // The timeout is for a peer that sends nothing, and not for a service that
                // computes. So the wait begins anew.
                Poll::Ready(Err(error)) if error.is_read_timeout() && self.waited_busy => {
                    self.waited_busy = false;
                }
                Poll::Ready(Err(error)) => break Err(error),
            }
        };
        self.ending = Some(ending);
        None
    }

    /// Polls the calls, and writes the answers that are next.
    fn write_answers(&mut self, cx: &mut Context<'_>) -> Result<Wrote> {
        for call in &mut self.calls {
            if let Call::Running(future) = call
                && let Poll::Ready(answer) = future.as_mut().poll(cx)
            {
                *call = Call::Done(answer);
            }
        }
        let (_, mut writer) = self.conn.parts();
        let mut count = 0;
        while let Some(Call::Done(_)) = self.calls.front() {
            match writer.poll_writable_within(cx, OUTPUT_BYTES_MAX) {
                Poll::Ready(room) => room?,
                Poll::Pending => return Ok(Wrote::Blocked),
            };
            let Some(Call::Done(answer)) = self.calls.pop_front() else { break };
            match answer {
                Ok(answer) => self.codec.encode(answer, &mut writer)?,
                Err(error) => {
                    // The answers before it are sent by the close that follows.
                    writer.submit()?;
                    return Err(Error::other(error));
                }
            }
            count += 1;
        }
        Ok(Wrote::Answers(count))
    }
}

impl<S: Service<C::In>, C: Codec> fmt::Debug for Serving<S, C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Serving")
            .field("conn", &self.conn)
            .field("calls", &self.calls.len())
            .finish_non_exhaustive()
    }
}
