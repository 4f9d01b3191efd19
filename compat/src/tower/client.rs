//! A client over one connection, whose answers come in the order of its requests.
//!
//! The driver owns the connection. Clients pass requests to it through a bounded queue; each
//! request carries the sender of its answer. Sent requests wait in a list, in their order, so the
//! next received frame is the answer of the first one.

use std::collections::VecDeque;
use std::error::Error as StdError;
use std::fmt;
use std::future::Future;
use std::io;
use std::ops::Deref;
use std::pin::Pin;
use std::sync::atomic::{Ordering, fence};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, ready};

use ringpoll::{Connection, Error, Result};
use tokio::sync::mpsc::error::{SendError, TrySendError};
use tokio::sync::mpsc::{self, OwnedPermit};
use tokio::sync::oneshot;
use tower::Service;

use super::{Codec, OUTPUT_BYTES_MAX, PIPELINED_REQUESTS_MAX};

/// A [`Service`] that sends its requests over one connection. Answers come in the order of the
/// requests. Clones use the same connection.
///
/// * **Pipelining.** Up to 64 requests are sent without an answer. One flush sends all requests
///   that wait.
/// * **Back-pressure.** 64 more requests wait in a queue; when it is full, `poll_ready` waits. No
///   request is sent while 256 KiB of the connection are not in the kernel.
/// * **Cancelling.** A dropped [`ClientResponse`] withdraws a request that is not sent yet. The
///   answer to a sent one is read and dropped.
/// * **Errors.** After an error of the connection, or a bad frame, all calls fail with the same
///   [`ClientError`], and the connection is closed. The client does not connect again.
/// * **Timeouts.** The read timeout of the connection bounds each wait for an answer, and the write
///   timeout the wait for a peer that does not read. A connection without requests has no timeout
///   but the idle timeout.
///
/// The module [`tower`](super) has an example.
pub struct FramedClient<C: Codec> {
    requests: mpsc::Sender<Call<C>>,
    place: Place<Call<C>>,
    failure: Arc<OnceLock<ClientError>>,
}

/// Drives the connection of a [`FramedClient`]. It must be polled: spawn it on any executor.
///
/// It returns `Ok` when all clients are dropped and every request is answered. If the driver is
/// dropped before that, the connection closes, and all calls fail.
///
/// # Errors
/// What ended the connection. All calls fail with the same error. The end of the peer's stream is
/// an error as well; [`is_closed`](Error::is_closed) tells it from others.
#[must_use = "no request is sent unless the driver is polled"]
pub struct ClientDriver<C: Codec> {
    codec: C,
    requests: mpsc::Receiver<Call<C>>,
    /// The senders of the next answers, in the order of the requests.
    waiting: VecDeque<Reply<C::In>>,
    /// No client is left.
    is_closing: bool,
    /// The present wait for a frame began while no answer was expected.
    waited_idle: bool,
    failure: Arc<OnceLock<ClientError>>,
    conn: Connection,
}

/// The answer to one request of a [`FramedClient`].
#[must_use = "dropping it cancels the request"]
pub struct ClientResponse<T> {
    answer: oneshot::Receiver<Result<T, ClientError>>,
    failure: Arc<OnceLock<ClientError>>,
}

/// Why a call of a [`FramedClient`] failed. Clones are the same [`Error`], which this dereferences
/// to.
#[derive(Clone)]
pub struct ClientError(Arc<Error>);

type Reply<T> = oneshot::Sender<Result<T, ClientError>>;

struct Call<C: Codec> {
    request: C::Out,
    reply: Reply<C::In>,
}

type Reserving<T> = Pin<Box<dyn Future<Output = Result<OwnedPermit<T>, SendError<()>>> + Send>>;

/// A place in the queue, which `poll_ready` takes.
enum Place<T> {
    None,
    Waiting(Reserving<T>),
    Held(OwnedPermit<T>),
}

impl<C: Codec> FramedClient<C> {
    /// A client over `conn`, and the driver that sends and receives. Bytes that `conn` has already
    /// buffered belong to the first answer.
    pub fn new(conn: Connection, codec: C) -> (FramedClient<C>, ClientDriver<C>) {
        let (sender, receiver) = mpsc::channel(PIPELINED_REQUESTS_MAX);
        let failure = Arc::new(OnceLock::new());
        let driver = ClientDriver {
            codec,
            requests: receiver,
            waiting: VecDeque::new(),
            is_closing: false,
            waited_idle: false,
            failure: Arc::clone(&failure),
            conn,
        };
        (FramedClient { requests: sender, place: Place::None, failure }, driver)
    }
}

impl<C: Codec> Service<C::Out> for FramedClient<C> {
    type Response = C::In;
    type Error = ClientError;
    type Future = ClientResponse<C::In>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ClientError>> {
        if let Some(failure) = self.failure.get() {
            return Poll::Ready(Err(failure.clone()));
        }
        loop {
            let taken = match &mut self.place {
                Place::Held(_) => return Poll::Ready(Ok(())),
                Place::Waiting(place) => ready!(place.as_mut().poll(cx)).map(Place::Held).ok(),
                Place::None => match self.requests.clone().try_reserve_owned() {
                    Ok(permit) => Some(Place::Held(permit)),
                    Err(TrySendError::Full(requests)) => {
                        Some(Place::Waiting(Box::pin(requests.reserve_owned())))
                    }
                    Err(TrySendError::Closed(_)) => None,
                },
            };
            self.place = match taken {
                Some(place) => place,
                None => {
                    self.place = Place::None;
                    return Poll::Ready(Err(failure_of(&self.failure)));
                }
            };
        }
    }

    /// # Panics
    /// If [`poll_ready`](Self::poll_ready) did not return `Ok` before.
    fn call(&mut self, request: C::Out) -> ClientResponse<C::In> {
        let place = std::mem::replace(&mut self.place, Place::None);
        let Place::Held(permit) = place else { panic!("call without a successful poll_ready") };
        let (reply, mut answer) = oneshot::channel();
        permit.send(Call { request, reply });
        // The driver notes a failure before it empties the queue for the last time. So either the
        // failure is seen here, or the driver takes this call from the queue (see `fail`).
        fence(Ordering::SeqCst);
        if self.failure.get().is_some() {
            // Its sender is dropped.
            answer = oneshot::channel().1;
        }
        ClientResponse { answer, failure: Arc::clone(&self.failure) }
    }
}

impl<C: Codec> Clone for FramedClient<C> {
    fn clone(&self) -> FramedClient<C> {
        FramedClient {
            requests: self.requests.clone(),
            place: Place::None,
            failure: Arc::clone(&self.failure),
        }
    }
}

impl<T> Future for ClientResponse<T> {
    type Output = Result<T, ClientError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let answer = ready!(Pin::new(&mut self.answer).poll(cx));
        Poll::Ready(answer.unwrap_or_else(|_| Err(failure_of(&self.failure))))
    }
}

// Nothing in it is pinned.
impl<C: Codec> Unpin for ClientDriver<C> {}

impl<C: Codec> Future for ClientDriver<C> {
    type Output = Result<(), ClientError>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.get_mut();
        if let Some(failure) = this.failure.get() {
            return Poll::Ready(Err(failure.clone()));
        }
        match ready!(this.drive(cx)) {
            Ok(()) => {
                this.conn.close();
                Poll::Ready(Ok(()))
            }
            Err(error) => Poll::Ready(Err(this.fail(error))),
        }
    }
}

impl<C: Codec> ClientDriver<C> {
    fn drive(&mut self, cx: &mut Context<'_>) -> Poll<Result<()>> {
        // After this many answers, other tasks get a turn.
        let mut budget = PIPELINED_REQUESTS_MAX;
        let is_blocked = loop {
            let is_blocked = self.send_requests(cx)?;
            let was_full = self.waiting.len() == PIPELINED_REQUESTS_MAX;
            let before = budget;
            self.receive_answers(cx, &mut budget)?;
            if is_blocked || !was_full || budget == before || budget == 0 {
                break is_blocked;
            }
        };
        if budget == 0 {
            cx.waker().wake_by_ref();
        }
        if is_blocked {
            // Woken when there is room. A flush would replace that wake-up.
            return Poll::Pending;
        }
        ready!(self.conn.poll_flush(cx))?;
        if self.is_closing && self.waiting.is_empty() { Poll::Ready(Ok(())) } else { Poll::Pending }
    }

    /// Writes the requests of the queue. `true` if the peer must read before there is room for
    /// more.
    fn send_requests(&mut self, cx: &mut Context<'_>) -> Result<bool> {
        let (_, mut writer) = self.conn.parts();
        while !self.is_closing && self.waiting.len() < PIPELINED_REQUESTS_MAX {
            match writer.poll_writable_within(cx, OUTPUT_BYTES_MAX) {
                Poll::Ready(room) => room?,
                Poll::Pending => return Ok(true),
            };
            let Call { request, reply } = match self.requests.poll_recv(cx) {
                Poll::Ready(Some(call)) => call,
                Poll::Ready(None) => {
                    self.is_closing = true;
                    break;
                }
                Poll::Pending => break,
            };
            if reply.is_closed() {
                continue;
            }
            let before = writer.pending_len();
            match self.codec.encode(request, &mut writer) {
                Ok(()) => self.waiting.push_back(reply),
                Err(error) if writer.pending_len() == before => {
                    // The caller may have gone.
                    let _ = reply.send(Err(ClientError::from(error)));
                }
                Err(error) => {
                    self.waiting.push_back(reply);
                    return Err(error);
                }
            }
        }
        Ok(false)
    }

    /// Passes the received answers to their callers.
    fn receive_answers(&mut self, cx: &mut Context<'_>, budget: &mut usize) -> Result<()> {
        let codec = &self.codec;
        let (mut reader, _) = self.conn.parts();
        let mut frames = reader.frames(codec.frame_bytes_max(), |front| codec.frame_bytes(front));
        let mut waits_anew = false;
        while *budget > 0 {
            let frame = match frames.poll_next(cx) {
                Poll::Pending => {
                    self.waited_idle |= self.waiting.is_empty();
                    return Ok(());
                }
                Poll::Ready(Ok(Some(frame))) => frame,
                Poll::Ready(Ok(None)) => {
                    return Err(closed(format!(
                        "framed client: the peer has ended its stream, {} answers are missing",
                        self.waiting.len()
                    )));
                }
                // The timeout is for answers. A new wait sees the peer's close. A wait after a
                // deadline ends at once, so there is only one new wait.
                Poll::Ready(Err(error)) if error.is_read_timeout() && self.waiting.is_empty() => {
                    self.waited_idle = false;
                    if std::mem::replace(&mut waits_anew, true) {
                        return Ok(());
                    }
                    continue;
                }
                Poll::Ready(Err(error)) if error.is_read_timeout() && self.waited_idle => {
                    self.waited_idle = false;
                    continue;
                }
                Poll::Ready(Err(error)) => return Err(error),
            };
            self.waited_idle = false;
            if self.waiting.is_empty() {
                return Err(Error::other("framed client: an answer without a request"));
            }
            // A reply that is dropped has to find the failure, so it stays here until `fail`.
            let answer = codec.decode(frame)?;
            if let Some(reply) = self.waiting.pop_front() {
                // The caller may have gone.
                let _ = reply.send(Ok(answer));
            }
            *budget -= 1;
        }
        Ok(())
    }

    /// Ends the connection and all calls with `error`, or with the error that ended them before.
    fn fail(&mut self, error: Error) -> ClientError {
        let failure = self.failure.get_or_init(|| ClientError::from(error)).clone();
        fence(Ordering::SeqCst);
        self.conn.close();
        self.requests.close();
        self.waiting.clear();
        while self.requests.try_recv().is_ok() {}
        failure
    }
}

impl<C: Codec> Drop for ClientDriver<C> {
    fn drop(&mut self) {
        self.fail(closed("framed client: its driver has ended".to_owned()));
    }
}

impl From<Error> for ClientError {
    fn from(error: Error) -> ClientError {
        ClientError(Arc::new(error))
    }
}

impl Deref for ClientError {
    type Target = Error;

    fn deref(&self) -> &Error {
        &self.0
    }
}

impl fmt::Display for ClientError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl fmt::Debug for ClientError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

impl StdError for ClientError {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.0.source()
    }
}

impl<C: Codec> fmt::Debug for FramedClient<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FramedClient").field("failure", &self.failure.get()).finish_non_exhaustive()
    }
}

impl<C: Codec> fmt::Debug for ClientDriver<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientDriver")
            .field("conn", &self.conn)
            .field("waiting", &self.waiting.len())
            .finish_non_exhaustive()
    }
}

impl<T> fmt::Debug for ClientResponse<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientResponse").finish_non_exhaustive()
    }
}

fn failure_of(failure: &OnceLock<ClientError>) -> ClientError {
    let unknown = || ClientError::from(closed("framed client: its driver has ended".to_owned()));
    failure.get().cloned().unwrap_or_else(unknown)
}

/// An error whose [`Error::is_closed`] is true.
fn closed(message: String) -> Error {
    Error::from(io::Error::new(io::ErrorKind::NotConnected, message))
}
