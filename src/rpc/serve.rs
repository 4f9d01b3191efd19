//! The server of calls: one task for each connection, which runs its requests side by side.
//!
//! The task of a connection reads requests, and polls the future of each request once. Most are
//! ready then. A future that has to wait becomes a task of its own, beside the handlers of the
//! server, and leaves its answer in `done.rs`. The task of the connection sends all answers that
//! are there with one flush.

use std::fmt;
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker, ready};

use super::codec::Codec;
use super::done::{Answer, Done, Finish, Receipt};
use super::incoming::poll_frame;
use super::outgoing::Outgoing;
use crate::buffer::Slice;
use crate::clock::now_ns;
use crate::config::calls;
use crate::connection::{Connection, Handle, ReadHalf, ShutdownBegun};
use crate::error::{Error, Result};
use crate::task::line::{Line, Place, WaitPlace};
use crate::user_code;

/// A handler for [`on_connect`](crate::ServerBuilder::on_connect) that answers the calls of a
/// connection, within the default [`CallLimits`].
///
/// `handler` gets each request and the handle of its connection, and returns the answer.
///
/// * **Order.** The requests of a connection run side by side, and are answered in the order in
///   which they end. The futures of requests run where the server's
///   [placement](crate::ServerBuilder::placement) runs handlers.
/// * **Limits.** A connection that runs as many requests as allowed is not read until one of them
///   is answered. While a client does not read, its requests are not read either.
/// * **Errors** of `handler`, and its panics, are answered if the codec has an answer for them; see
///   [`Codec::failure`]. Otherwise the connection reads no more requests. It closes when the
///   running ones are answered, and the error is reported to
///   [`on_error`](crate::ServerBuilder::on_error). A bad frame has the same effect.
/// * **Timeouts.** The read timeout bounds the wait for a request while none is running. The
///   request timeout of the server has no effect here.
/// * **The end.** After the end of the peer's stream, and when a shutdown of the server begins, the
///   connection reads no more requests. It closes when the running ones are answered. A request
///   whose connection has failed runs to its end.
///
/// The [module](super) has an example.
pub fn serve_calls<C, H, F>(
    codec: C,
    handler: H,
) -> impl Fn(Connection) -> ServingCalls<C, H> + Send + Sync + 'static
where
    C: Codec,
    H: Fn(C::In, Handle) -> F + Send + Sync + 'static,
    F: Future<Output = Result<C::Out>> + Send + 'static,
{
    serve_calls_within(CallLimits::new(), codec, handler)
}

/// [`serve_calls`] with limits.
pub fn serve_calls_within<C, H, F>(
    limits: CallLimits,
    codec: C,
    handler: H,
) -> impl Fn(Connection) -> ServingCalls<C, H> + Send + Sync + 'static
where
    C: Codec,
    H: Fn(C::In, Handle) -> F + Send + Sync + 'static,
    F: Future<Output = Result<C::Out>> + Send + 'static,
{
    let service = Arc::new(Service { codec, handler, limits });
    move |connection| ServingCalls::new(Arc::clone(&service), connection)
}

/// How many requests run at a time. Clones share the limit [in total](Self::in_total).
#[derive(Clone)]
#[must_use]
pub struct CallLimits {
    per_connection: usize,
    total: Option<Arc<Line>>,
}

impl CallLimits {
    /// 256 requests of each connection, and no limit in total.
    pub fn new() -> CallLimits {
        CallLimits { per_connection: calls::PER_CONNECTION_MAX, total: None }
    }

    /// The largest number of requests of one connection that run at a time. 0 counts as 1.
    pub fn per_connection(mut self, count: usize) -> CallLimits {
        self.per_connection = count.max(1);
        self
    }

    /// The largest number of requests of all connections that run at a time. Connections whose
    /// request has to wait are served in the order in which they came. A connection whose client
    /// does not read its answers leaves the line, and waits again after the client has read. 0
    /// counts as 1.
    pub fn in_total(mut self, count: usize) -> CallLimits {
        self.total = Some(Arc::new(Line::new(count.max(1))));
        self
    }
}

impl Default for CallLimits {
    fn default() -> CallLimits {
        CallLimits::new()
    }
}

/// One value for all connections of a server.
struct Service<C, H> {
    codec: C,
    handler: H,
    limits: CallLimits,
}

/// The future of a handler that [`serve_calls`] has made: serves one connection.
#[must_use = "futures do nothing unless polled"]
pub struct ServingCalls<C: Codec, H> {
    service: Arc<Service<C, H>>,
    reader: ReadHalf,
    outgoing: Outgoing,
    done: Arc<Done<C>>,
    /// Empty between polls.
    answers: Vec<Answer<C>>,
    /// Requests that run as tasks.
    running: usize,
    /// A request that waits for its place in total.
    next: Option<Request<C>>,
    place: Option<WaitPlace<Arc<Line>>>,
    /// No more requests are read, for this reason.
    ending: Option<Result<()>>,
    shutdown: ShutdownBegun,
    /// The waker that `shutdown` has.
    shutdown_waker: Option<Waker>,
    /// When the futures of this poll began.
    began_ns: u64,
}

struct Request<C: Codec> {
    number: u32,
    front: Slice,
    message: C::In,
}

/// What the first poll of a request has found.
enum Begun<F, T> {
    Ended(T),
    Waits(Pin<Box<F>>),
}

// Nothing in it is pinned.
impl<C: Codec, H> Unpin for ServingCalls<C, H> {}

impl<C, H, F> Future for ServingCalls<C, H>
where
    C: Codec,
    H: Fn(C::In, Handle) -> F + Send + Sync + 'static,
    F: Future<Output = Result<C::Out>> + Send + 'static,
{
    type Output = Result<()>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<()>> {
        let this = self.get_mut();
        this.look_for_shutdown(cx);
        this.began_ns = 0;
        for _ in 0..TURNS_PER_POLL {
            // A client that does not read gets no further answers, and no requests are read.
            ready!(this.poll_send(cx))?;
            this.collect_answers(cx);
            let waits = this.take_requests(cx).is_pending();
            ready!(this.poll_send(cx))?;
            if this.running == 0 && this.next.is_none() && this.ending.is_some() {
                ready!(this.outgoing.poll_end(cx))?;
                return Poll::Ready(this.ending.take().unwrap_or(Ok(())));
            }
            if waits {
                return Poll::Pending;
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}

impl<C, H, F> ServingCalls<C, H>
where
    C: Codec,
    H: Fn(C::In, Handle) -> F + Send + Sync + 'static,
    F: Future<Output = Result<C::Out>> + Send + 'static,
{
    /// Begins the requests that have come. Pending: there are no more, or no more may run.
    fn take_requests(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        for _ in 0..REQUESTS_PER_TURN {
            if self.outgoing.is_full() {
                break;
            }
            if self.running >= self.service.limits.per_connection {
                return Poll::Pending;
            }
            if self.next.is_none() {
                self.next = ready!(self.read_request(cx));
            }
            let place = match &self.service.limits.total {
                None => None,
                Some(_) if self.next.is_none() => None,
                Some(line) => {
                    let wait = self.place.get_or_insert_with(|| WaitPlace::new(Arc::clone(line)));
                    let place = ready!(Pin::new(wait).poll(cx));
                    self.place = None;
                    Some(place)
                }
            };
            match self.next.take() {
                Some(request) => self.begin(request, place, cx),
                None => return Poll::Pending,
            }
        }
        Poll::Ready(())
    }

    /// Polls the future of a request once. One that has to wait becomes a task.
    fn begin(
        &mut self,
        request: Request<C>,
        place: Option<Place<Arc<Line>>>,
        cx: &mut Context<'_>,
    ) {
        let Request { number, front, message } = request;
        let receipt = Receipt { number, front };
        let handle = (*self.reader).clone();
        let now_ns = now_ns();
        if self.began_ns == 0 {
            self.began_ns = now_ns;
        }
        let is_late = now_ns - self.began_ns > INLINE_NS_MAX;
        let handler = &self.service.handler;
        let begun = user_code::attempt("handler", || {
            let mut future = Box::pin(handler(message, handle));
            // Another future took long, so this one runs beside the next ones.
            if !is_late && let Poll::Ready(outcome) = future.as_mut().poll(cx) {
                user_code::discard(future);
                return Begun::Ended(outcome);
            }
            Begun::Waits(future)
        });
        let outcome = match begun {
            Ok(Begun::Ended(outcome)) => outcome,
            Ok(Begun::Waits(future)) => {
                let done = Arc::clone(&self.done);
                return self.spawn(future, Finish::new(done, receipt, place));
            }
            Err(panic) => Err(panicked(&panic)),
        };
        drop(place);
        self.answer(Answer { receipt, outcome });
    }

    fn spawn(&mut self, mut future: Pin<Box<F>>, mut finish: Finish<C>) {
        self.running += 1;
        let spawned = self.reader.spawn(async move {
            let outcome =
                poll_fn(|cx| match user_code::attempt("handler", || future.as_mut().poll(cx)) {
                    Ok(polled) => polled,
                    Err(panic) => Poll::Ready(Err(panicked(&panic))),
                });
            let outcome = outcome.await;
            user_code::discard(future);
            finish.finish(outcome);
            Ok(())
        });
        if let Err(error) = spawned {
            self.ending.get_or_insert(Err(error));
        }
    }
}

impl<C: Codec, H> ServingCalls<C, H> {
    fn new(service: Arc<Service<C, H>>, connection: Connection) -> ServingCalls<C, H> {
        let shutdown = connection.shutdown_begun();
        let (reader, writer) = connection.split();
        ServingCalls {
            service,
            reader,
            outgoing: Outgoing::new(writer),
            done: Arc::new(Done::new()),
            answers: Vec::new(),
            running: 0,
            next: None,
            place: None,
            ending: None,
            shutdown,
            shutdown_waker: None,
            began_ns: 0,
        }
    }

    /// Sends the answers. A connection whose client does not read leaves the line for a place.
    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<Result<()>> {
        let sent = self.outgoing.poll_send(cx);
        if sent.is_pending() {
            self.place = None;
        }
        sent
    }

    /// The wakers of all connections share a lock, so the waker is renewed only where it changed.
    fn look_for_shutdown(&mut self, cx: &mut Context<'_>) {
        let is_known =
            self.shutdown_waker.as_ref().is_some_and(|known| known.will_wake(cx.waker()));
        let has_begun = match is_known {
            true => self.reader.is_shutting_down(),
            false => {
                self.shutdown_waker = Some(cx.waker().clone());
                Pin::new(&mut self.shutdown).poll(cx).is_ready()
            }
        };
        if has_begun {
            self.ending.get_or_insert(Ok(()));
        }
    }

    /// The next request. `None`: no more will come.
    fn read_request(&mut self, cx: &mut Context<'_>) -> Poll<Option<Request<C>>> {
        if self.ending.is_some() {
            return Poll::Ready(None);
        }
        let codec = &self.service.codec;
        let mut is_late = false;
        let ending = loop {
            match ready!(poll_frame(codec, &mut self.reader, cx)) {
                Ok(Some(frame)) => {
                    let front = codec.failure_front(&frame);
                    match codec.decode(frame) {
                        Ok((number, message)) => {
                            return Poll::Ready(Some(Request { number, front, message }));
                        }
                        Err(error) => break Err(error),
                    }
                }
                Ok(None) => break Ok(()),
                // The timeout is for a client that sends nothing, and not for handlers. After a
                // deadline every wait fails at once. The next answer wakes this task then.
                Err(error) if error.is_read_timeout() && self.running > 0 => {
                    if std::mem::replace(&mut is_late, true) {
                        return Poll::Pending;
                    }
                }
                Err(error) => break Err(error),
            }
        };
        self.ending = Some(ending);
        Poll::Ready(None)
    }

    fn collect_answers(&mut self, cx: &Context<'_>) {
        let mut answers = std::mem::take(&mut self.answers);
        self.done.take(&mut answers, cx.waker().clone());
        for answer in answers.drain(..) {
            self.running -= 1;
            if self.running == 0 {
                // The wait for the next request begins now.
                self.reader.end_wait();
            }
            self.answer(answer);
        }
        self.answers = answers;
    }

    /// Adds an answer to the batch, or the answer that reports a failure.
    fn answer(&mut self, answer: Answer<C>) {
        let Answer { receipt, outcome } = answer;
        let number = receipt.number;
        let codec = &self.service.codec;
        let put = outcome.and_then(|message| self.outgoing.put(codec, number, message));
        let Err(error) = put else { return };
        let reported = match codec.failure(&receipt.front, &error) {
            Some(failure) => self.outgoing.put(codec, number, failure).is_ok(),
            None => false,
        };
        if !reported {
            self.ending.get_or_insert(Err(error));
        }
    }
}

impl<C: Codec, H> Drop for ServingCalls<C, H> {
    fn drop(&mut self) {
        self.done.close();
    }
}

fn panicked(message: &str) -> Error {
    Error::panicked(format!("handler panicked: {message}"))
}

impl fmt::Debug for CallLimits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CallLimits")
            .field("per_connection", &self.per_connection)
            .field("has_total", &self.total.is_some())
            .finish_non_exhaustive()
    }
}

impl<C: Codec, H> fmt::Debug for ServingCalls<C, H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServingCalls")
            .field("reader", &self.reader)
            .field("running", &self.running)
            .finish_non_exhaustive()
    }
}

/// Requests that are begun before answers are sent.
const REQUESTS_PER_TURN: usize = 256;

/// Turns before other tasks of the thread run.
const TURNS_PER_POLL: usize = 4;

/// How long the futures of one poll may run in the task of their connection. Later ones become
/// tasks at once, so that they do not wait for one that computes. It is the time slice of the
/// threads of the library.
const INLINE_NS_MAX: u64 = 100_000;
