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
use hyper::body::{Body as _, Frame, Incoming, SizeHint};
use hyper::{Request, Response};
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
    /// How many uploads had ended when the sleep was last set.
    uploads_seen: u64,
    sleep: Sleep,
}

impl HeadLimit {
    /// A limit of `timeout` for each head on the connection `stream`. `requests` are those of this
    /// connection.
    pub(super) fn new(timeout: Duration, requests: Arc<Requests>, stream: &Accepted) -> HeadLimit {
        let sleep = stream.handle().sleep_until(Instant::now());
        let writing = stream.writing();
        HeadLimit { timeout, requests, writing, seen: None, uploads_seen: 0, sleep }
    }

    /// Polled after the connection, which waits. Ready: the head has not come in time.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let begun = self.requests.answers.begun();
        if begun != self.requests.answers.ended() {
            return Poll::Pending;
        }
        // hyper keeps bytes of the last answer, which has ended, until the peer takes more.
        if self.writing.waits() {
            self.seen = None;
            return Poll::Pending;
        }
        if self.seen.replace(begun) != Some(begun) {
            self.begin();
        }
        ready!(Pin::new(&mut self.sleep).poll(cx));
        if self.requests.uploads.begun() == self.uploads_seen {
            return Poll::Ready(());
        }
        // The end of an upload may not wake this task. So the sleep goes on during an upload, and
        // the time begins anew after it.
        self.begin();
        if Pin::new(&mut self.sleep).poll(cx).is_ready() {
            cx.waker().wake_by_ref();
        }
        Poll::Pending
    }

    fn begin(&mut self) {
        self.uploads_seen = self.requests.uploads.ended();
        self.sleep.reset_after(self.timeout);
    }
}

/// Counts the requests of a connection.
#[derive(Default)]
pub(super) struct Requests {
    /// A request ends here when hyper has taken the whole body of its answer, which it drops then.
    answers: Count,
    /// The bodies of requests. One that is dropped, or read to its end, has ended.
    uploads: Count,
}

/// How many have begun and ended. The counts order no other memory.
#[derive(Default)]
struct Count {
    begun: AtomicU64,
    ended: AtomicU64,
}

impl Count {
    fn begun(&self) -> u64 {
        self.begun.load(Ordering::Relaxed)
    }

    fn ended(&self) -> u64 {
        self.ended.load(Ordering::Relaxed)
    }
}

/// Counts as ended when it is dropped.
struct Running {
    requests: Arc<Requests>,
    count: fn(&Requests) -> &Count,
}

impl Running {
    fn begin(requests: &Arc<Requests>, count: fn(&Requests) -> &Count) -> Running {
        count(requests).begun.fetch_add(1, Ordering::Relaxed);
        Running { requests: Arc::clone(requests), count }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        (self.count)(&self.requests).ended.fetch_add(1, Ordering::Relaxed);
    }
}

/// A service whose requests are counted.
pub(super) struct Counted<S> {
    pub(super) service: S,
    pub(super) requests: Arc<Requests>,
}

impl<S> hyper::service::Service<Request<Incoming>> for Counted<S>
where
    S: hyper::service::Service<Request<Body>, Response = Response<Body>>,
{
    type Response = Response<CountedBody<Body>>;
    type Error = S::Error;
    type Future = CountedFuture<S::Future>;

    fn call(&self, request: Request<Incoming>) -> Self::Future {
        let running = Some(Running::begin(&self.requests, |requests| &requests.answers));
        let request = request.map(|body| {
            if body.is_end_stream() {
                return Body::new(body);
            }
            let upload = Running::begin(&self.requests, |requests| &requests.uploads);
            Body::new(CountedBody { body, running: Some(upload) })
        });
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
    type Output = Result<Response<CountedBody<Body>>, E>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let answer = ready!(this.answer.poll(cx))?;
        let running = this.running.take();
        Poll::Ready(Ok(answer.map(|body| CountedBody { body, running })))
    }
}

/// The body of a request or of an answer, which runs until the body is read to its end or dropped.
pub(super) struct CountedBody<B> {
    body: B,
    running: Option<Running>,
}

impl<B> hyper::body::Body for CountedBody<B>
where
    B: hyper::body::Body<Data = Bytes> + Unpin,
{
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        // hyper tells the end of an upload of a known length only with the next request, if the
        // answer is complete.
        let frame = match self.body.is_end_stream() {
            true => None,
            false => ready!(Pin::new(&mut self.body).poll_frame(cx)),
        };
        if frame.is_none() || self.body.is_end_stream() {
            self.running = None;
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
