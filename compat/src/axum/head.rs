//! A time limit for the heads of HTTP/1 requests.
//!
//! hyper has such a limit as well. With it, hyper reads once more after each answer, and asks for
//! another wait. [`HeadLimit`] looks only when hyper waits anyway, and moves one wait. It serves
//! 1.04 times the requests in the row `GET /` with io_uring (docs/reports/http.md).

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use axum::body::{Body, Bytes};
use hyper::Response;
use hyper::body::{Frame, SizeHint};
use pin_project_lite::pin_project;
use ringpoll::Sleep;

use crate::accepted::{Accepted, Writing};

/// Ends a connection whose peer takes too long to send the head of a request.
pub(super) struct HeadLimit {
    timeout: Duration,
    requests: Arc<Requests>,
    writing: Arc<Writing>,
    /// How many requests had begun when the peer was last waited for.
    seen: Option<u64>,
    sleep: Sleep,
}

impl HeadLimit {
    /// A limit of `timeout` for each head on the connection `stream`. `requests` are those of this
    /// connection.
    pub(super) fn new(timeout: Duration, requests: Arc<Requests>, stream: &Accepted) -> HeadLimit {
        let sleep = stream.handle().sleep_until(Instant::now());
        HeadLimit { timeout, requests, writing: stream.writing(), seen: None, sleep }
    }

    /// Polled after the connection, which waits. Ready: the head has not come in time.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let begun = self.requests.begun.load(Ordering::Relaxed);
        if begun != self.requests.ended.load(Ordering::Relaxed) {
            return Poll::Pending;
        }
        // hyper keeps bytes of the last answer, which has ended, until the peer takes more.
        if self.writing.waits() {
            self.seen = None;
            return Poll::Pending;
        }
        if self.seen.replace(begun) != Some(begun) {
            self.sleep.reset_after(self.timeout);
        }
        Pin::new(&mut self.sleep).poll(cx)
    }
}

/// Counts the requests of a connection. All is done by the task of the connection, so the counts
/// need no order.
#[derive(Default)]
pub(super) struct Requests {
    begun: AtomicU64,
    /// The body of the answer was dropped: hyper has taken all of it.
    ended: AtomicU64,
}

struct Running(Arc<Requests>);

impl Running {
    fn begin(requests: &Arc<Requests>) -> Running {
        requests.begun.fetch_add(1, Ordering::Relaxed);
        Running(Arc::clone(requests))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.0.ended.fetch_add(1, Ordering::Relaxed);
    }
}

/// A service whose requests are counted.
pub(super) struct Counted<S> {
    pub(super) service: S,
    pub(super) requests: Arc<Requests>,
}

impl<S, R> hyper::service::Service<R> for Counted<S>
where
    S: hyper::service::Service<R, Response = Response<Body>>,
{
    type Response = Response<CountedBody>;
    type Error = S::Error;
    type Future = CountedFuture<S::Future>;

    fn call(&self, request: R) -> Self::Future {
        let running = Some(Running::begin(&self.requests));
        CountedFuture { answer: self.service.call(request), running }
    }
}

pin_project! {
    /// The answer to a counted request.
    pub(super) struct CountedFuture<F> {
        #[pin]
        answer: F,
        running: Option<Running>,
    }
}

impl<F, E> Future for CountedFuture<F>
where
    F: Future<Output = Result<Response<Body>, E>>,
{
    type Output = Result<Response<CountedBody>, E>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let answer = ready!(this.answer.poll(cx))?;
        let running = this.running.take();
        Poll::Ready(Ok(answer.map(|body| CountedBody { body, _running: running })))
    }
}

/// The body of an answer. Its request runs until it is dropped.
pub(super) struct CountedBody {
    body: Body,
    _running: Option<Running>,
}

impl hyper::body::Body for CountedBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
