//! Giving a connection's reader and writer to a run, and taking them back.

use std::sync::Arc;

use super::Connection;
use super::core::Core;
use super::input::{Discarded, Input, Started};
use super::parts;
use super::state::{FUTURE, Found, Kind, Next, READER, WRITER};
use crate::buffer::{Chain, Staging};
use crate::poller::{Command, Job};
use crate::sync::atomic::Ordering;
use crate::sync::{MutexGuard, lock};
use crate::task;
use crate::user_code;

/// The parts of the connection that a run has at first.
pub(super) const BOTH: u8 = READER | WRITER;

/// All parts of a run.
pub(super) const ALL: u8 = BOTH | FUTURE;

impl Core {
    /// Makes the connection for a run. It has all bytes that have come so far.
    #[inline]
    pub(super) fn hand_out(self: &Arc<Self>, started: Started) -> Connection {
        let Started { mut reader, writer, kind } = started;
        if let Some(after) = self.limits.request_timeout
            && kind == Kind::Request
        {
            self.timeouts.start_request(after);
        }
        let mut writer = writer.unwrap_or_else(parts::writer);
        if self.life.drops_input() {
            // The connection was closed after the run started. The handler must see the close, and
            // must not serve a request that it can no longer answer.
            (reader, writer) = (parts::reader(), parts::writer());
        } else if self.has_arrivals() {
            self.refill(&mut reader, 0);
        }
        Connection::with_parts(Arc::clone(self), reader, writer)
    }

    /// A run drops its connection.
    ///
    /// Most runs end in the same poll. So while this thread polls the run, empty parts are only
    /// noted as returned. They are given back after the poll, together with the run if it is over.
    #[inline]
    pub(super) fn take_home(self: &Arc<Self>, reader: Box<Chain>, writer: Box<Staging>) {
        if reader.is_empty() && writer.is_empty() && task::returns_parts(self.owner()) {
            // Both are kept, since they are empty.
            let _ = (parts::keep_reader(reader), parts::keep_writer(writer));
        } else {
            self.release(BOTH, Some(reader), Some(writer));
        }
    }

    /// Takes parts of a run back; `None` stands for an empty reader or writer. If all parts are
    /// back, the run is over, and this does what follows.
    #[inline]
    pub(super) fn release(
        self: &Arc<Self>,
        parts: u8,
        reader: Option<Box<Chain>>,
        writer: Option<Box<Staging>>,
    ) {
        let mut input = lock(&self.input);
        let stale_waker = input.take_back(parts, reader, writer);
        let is_over = input.runs.give_back(parts);
        let is_usual = self.life.is_undisturbed() && !self.paused.load(Ordering::Relaxed);
        // Usually there is nothing to do, or nothing but to wait for the next bytes.
        if !is_usual || is_over && !input.rest() {
            // A reader that is still out may be receiving.
            let has_reader = is_over || parts & READER != 0;
            self.follow_release(input, is_over, has_reader);
        } else {
            drop(input);
        }
        if let Some(waker) = stale_waker {
            user_code::discard(waker);
        }
    }

    /// Does what follows when parts of a run are back. `has_reader`: the reader is one of them.
    fn follow_release(
        self: &Arc<Self>,
        mut input: MutexGuard<'_, Input>,
        is_over: bool,
        has_reader: bool,
    ) {
        let mut unread = Discarded::default();
        if self.life.drops_input() {
            // A handle may keep the connection's core for long, so free its bytes now.
            unread = input.discard();
        }
        let next = match is_over {
            true => self.next_after_run(&mut input),
            false => Next::Rest,
        };
        let again = (next == Next::Again).then(|| {
            self.took_arrivals();
            input.start(Kind::Request)
        });
        let disconnected = is_over && input.take_disconnect_owed();
        if has_reader {
            self.resume_if_room(input, 0);
        } else {
            drop(input);
        }
        drop(unread);
        if disconnected {
            self.tell_disconnected();
        }
        match next {
            Next::Close => self.close(),
            Next::Finish => self.finish(),
            Next::Again | Next::Rest => {}
        }
        if let Some(started) = again {
            self.remote.send(Command::Run(Job::Begin(Arc::clone(self), started)));
        }
    }

    /// Decides what follows a run. All its parts are back.
    fn next_after_run(&self, input: &mut Input) -> Next {
        let unseen = input.inbox_len() > 0;
        input.join_inbox();
        let found = Found {
            unread: input.buffered_bytes() > 0,
            unseen,
            consumed: input.consumed(),
            peer_gone: input.end.is_some(),
            hung_up: input.has_hung_up(),
            closed: self.life.is_closed(),
            removed: input.removed,
            ends_when_idle: self.life.ends_when_idle() && !input.expects_request,
            serves_requests: input.serves,
        };
        input.runs.end(found)
    }

    /// A connection without a server was split.
    pub(super) fn count_halves(&self) {
        self.halves.store(2, Ordering::Relaxed);
    }

    /// A half is dropped. In a server its part is given back. Otherwise the second drop closes the
    /// connection.
    pub(super) fn drop_half(
        self: &Arc<Self>,
        part: u8,
        reader: Option<Box<Chain>>,
        writer: Option<Box<Staging>>,
    ) {
        if self.is_serving() {
            self.release(part, reader, writer);
        } else if self.halves.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.close();
        } else if part == READER {
            // The last poll of the half may have registered a waker.
            let waker = lock(&self.input).take_waker();
            user_code::discard(waker);
        } else {
            let flusher = lock(&self.output).take_flusher();
            user_code::discard(flusher);
        }
    }
}
