//! The task of a connection of a client: it sends the calls of its link, and matches the answers.
//!
//! It runs on the poller of the connection, so it needs no executor of the user. It is woken by
//! received bytes, by a queued call, and by room for output. The requests of many calls leave with
//! one flush. The answers of one receive are matched under one lock, and then wake their callers.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use super::codec::Codec;
use super::incoming::poll_frame;
use super::outgoing::Outgoing;
use super::shared::Shared;
use crate::connection::{Connection, ReadHalf};
use crate::error::{Error, Result};
use crate::user_code;

pub(super) struct Session<C: Codec> {
    shared: Arc<Shared<C>>,
    link: u32,
    reader: ReadHalf,
    outgoing: Outgoing,
    /// Empty between polls, like `messages`.
    answers: Vec<(u32, C::In)>,
    messages: Vec<(u32, C::Out)>,
    /// Why nothing more can be sent. The answers that have come are read before the session ends.
    send_error: Option<Error>,
    has_ended: bool,
}

impl<C: Codec> Session<C> {
    pub(super) fn new(shared: Arc<Shared<C>>, link: u32, connection: Connection) -> Session<C> {
        let (reader, writer) = connection.split();
        Session {
            shared,
            link,
            reader,
            outgoing: Outgoing::new(writer),
            answers: Vec::new(),
            messages: Vec::new(),
            send_error: None,
            has_ended: false,
        }
    }

    fn drive(&mut self, cx: &mut Context<'_>) -> Poll<Result<()>> {
        for _ in 0..TURNS_PER_POLL {
            // Answers first: an end of the stream is seen before a request is sent into it.
            let received = match self.receive(cx) {
                Ok(received) => received,
                Err(error) => return Poll::Ready(Err(self.send_error.take().unwrap_or(error))),
            };
            let sent = match self.send_error {
                Some(_) => Poll::Pending,
                None => match self.send(cx) {
                    Err(error) if error.is_closed() => {
                        self.send_error = Some(error);
                        Poll::Ready(())
                    }
                    sent => sent?,
                },
            };
            if received.is_pending() && sent.is_pending() {
                return Poll::Pending;
            }
        }
        // Other connections of the poller get a turn.
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Matches the answers that have come, up to a number. Pending: there are no more.
    fn receive(&mut self, cx: &mut Context<'_>) -> Result<Poll<()>> {
        let mut ended = Ok(Poll::Ready(()));
        while self.answers.len() < ANSWERS_PER_TURN {
            match self.poll_answer(cx) {
                Poll::Ready(Ok(answer)) => self.answers.push(answer),
                Poll::Ready(Err(error)) => {
                    ended = Err(error);
                    break;
                }
                Poll::Pending => {
                    ended = Ok(Poll::Pending);
                    break;
                }
            }
        }
        // Answers before an error are answers.
        if !self.answers.is_empty() {
            let (link, answers) = (self.link, &mut self.answers);
            self.shared.with(|calls, work| calls.deliver(link, answers, work));
        }
        ended
    }

    fn poll_answer(&mut self, cx: &mut Context<'_>) -> Poll<Result<(u32, C::In)>> {
        let codec = &self.shared.codec;
        poll_frame(codec, &mut self.reader, cx).map(|frame| match frame? {
            Some(frame) => codec.decode(frame),
            None => Err(Error::gone("the server has ended the connection")),
        })
    }

    /// Sends queued calls. Pending: none are queued, or the server must read first.
    fn send(&mut self, cx: &mut Context<'_>) -> Result<Poll<()>> {
        if self.outgoing.poll_send(cx)?.is_pending() {
            return Ok(Poll::Pending);
        }
        let mut is_empty = false;
        while !is_empty && !self.outgoing.is_full() {
            let (link, messages) = (self.link, &mut self.messages);
            let mut waker = Some(cx.waker().clone());
            self.shared.with(|calls, work| {
                calls.take_queued(link, CALLS_PER_LOCK, messages, &mut waker, work);
            });
            is_empty = messages.is_empty();
            self.encode();
        }
        // Also when this is not done, the poll of the next turn goes on with it.
        let sent = self.outgoing.poll_send(cx)?;
        Ok(if is_empty { Poll::Pending } else { sent })
    }

    fn encode(&mut self) {
        for (number, message) in self.messages.drain(..) {
            if let Err(error) = self.outgoing.put(&self.shared.codec, number, message) {
                let link = self.link;
                self.shared.with(|calls, work| calls.encode_failed(link, number, error, work));
            }
        }
    }

    fn end(&mut self, error: Error) {
        if !std::mem::replace(&mut self.has_ended, true) {
            self.reader.close();
            let (link, answers) = (self.link, &mut self.answers);
            self.shared.with(|calls, work| {
                // Answers that were decoded before a panic are answers.
                calls.deliver(link, answers, work);
                calls.disconnected(link, error, work);
            });
        }
    }
}

impl<C: Codec> Unpin for Session<C> {}

impl<C: Codec> Future for Session<C> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = self.get_mut();
        let driven = user_code::attempt("codec", || this.drive(cx));
        let error = match driven {
            Ok(Poll::Pending) => return Poll::Pending,
            Ok(Poll::Ready(ended)) => ended.err(),
            Err(panic) => Some(Error::panicked(format!("codec panicked: {panic}"))),
        };
        this.end(error.unwrap_or_else(|| Error::closed("call")));
        Poll::Ready(())
    }
}

impl<C: Codec> Drop for Session<C> {
    fn drop(&mut self) {
        self.end(Error::gone("the poller of the connection has ended"));
        self.answers.drain(..).for_each(user_code::discard);
        self.messages.drain(..).for_each(user_code::discard);
    }
}

/// Answers that are matched before requests are sent: about as many frames of 1 KB as one large
/// receive holds, twice.
const ANSWERS_PER_TURN: usize = 256;

/// Calls that are taken from the queue at a time. The batch may exceed its length by so many
/// messages, whose longer ones are not copied.
const CALLS_PER_LOCK: usize = 32;

/// Turns before other tasks of the poller run.
const TURNS_PER_POLL: usize = 4;
