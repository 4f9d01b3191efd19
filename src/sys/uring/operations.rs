//! The ring with its receive buffers: starting the operations of an entry, and taking their
//! completions.
//!
//! Owned by the poller's thread. The memory of each operation belongs to the entry or to the
//! buffers until the operation's last completion.

use std::io;
use std::sync::Arc;
use std::time::Instant;

use super::buffers::{Buffers, group};
use super::entries::Entries;
use super::entry::{self, Entry, Reception, Role};
use super::raw::Until;
use super::ring::{Cqe, Receive, Ring, fd_of};
use super::send_record::{self, Outcome, SendRecord};
use super::sending::{Progress, Sending};
use super::tag::Op;
use crate::buffer::{Chain, Pool};
use crate::config::uring::{TEARDOWN, TEARDOWN_AFTER_LOSS};
use crate::config::{UringOptions, ZeroCopyRule};
use crate::counters::Counters;
use crate::sys::{Completion, Sink, Token, Wake};
use crate::user_code;

pub(super) struct Operations {
    pub(super) ring: Ring,
    pub(super) buffers: Buffers,
    pub(super) options: UringOptions,
    counters: Arc<Counters>,
    /// Connections to drain after the completions of the round.
    pub(super) draining: Vec<Token>,
    /// Operations in flight, without cancellations and without [`Op::SendRecord`].
    pub(super) in_flight: usize,
    zero_copy: ZeroCopyRule,
    /// Zero-copy sends that the kernel makes, or whose memory it uses. The records of `sqpoll` are
    /// counted with their rings.
    zero_copy_in_flight: usize,
}

impl Operations {
    /// Enables `ring`, and registers its buffers.
    pub(super) fn new(
        mut ring: Ring,
        options: &UringOptions,
        pool: &Pool,
        counters: &Arc<Counters>,
    ) -> io::Result<Operations> {
        ring.enable()?;
        if let Some(time) = options.napi_busy_poll {
            ring.poll_cards(time)?;
        }
        let buffers = Buffers::new(&ring, options, pool)?;
        Ok(Operations {
            ring,
            buffers,
            options: options.clone(),
            counters: Arc::clone(counters),
            draining: Vec::new(),
            in_flight: 0,
            zero_copy: options.zero_copy_rule(),
            zero_copy_in_flight: 0,
        })
    }

    /// Starts the operations that the entry wants, and cancels a reception that it does not want.
    pub(super) fn follow(&mut self, entry: &mut Entry) {
        if entry.is_to_drain() {
            entry.reception = Reception::Draining;
            self.draining.push(entry.token);
        } else if entry.is_to_arm() {
            self.arm(entry);
        } else if entry.is_to_cancel() {
            entry.reception = Reception::Ending;
            self.cancel(entry.reception_op(), entry.token);
        }
        if entry.is_to_watch() {
            self.watch(entry, libc::POLLRDHUP);
        }
        if entry.is_to_await() {
            entry.awaiting = true;
            self.in_flight += 1;
            let user_data = Op::Readable.with_token(entry.token);
            self.ring.poll(entry.fd(), libc::POLLIN | libc::POLLRDHUP, true, user_data);
        }
    }

    fn arm(&mut self, entry: &mut Entry) {
        let user_data = entry.reception_op().with_token(entry.token);
        if entry.role == Role::Listener {
            self.ring.accept(entry.fd(), user_data);
        } else {
            let size = entry.buffer_size.size();
            entry.armed_size = self.buffers.provide(size, &self.ring);
            if entry.armed_size != size {
                entry.buffer_size.set(entry.armed_size);
            }
            self.buffers.class(entry.armed_size).start_receive();
            // Without a budget, one socket may fill every buffer before the sink can pause it.
            let budget_bytes = if self.options.has_budget { entry.budget_bytes } else { 0 };
            let receive = Receive {
                group: group(entry.armed_size),
                bundle: self.options.receive_bundles,
                budget_bytes,
            };
            self.ring.receive(entry.fd(), receive, user_data);
        }
        entry.reception = Reception::Armed;
        self.in_flight += 1;
    }

    /// Polls the socket once.
    pub(super) fn watch(&mut self, entry: &mut Entry, events: i16) {
        entry.watching = true;
        self.in_flight += 1;
        self.ring.poll(entry.fd(), events, false, Op::Watch.with_token(entry.token));
    }

    /// Polls the eventfd, so that other threads can end a wait. Each write completes the poll
    /// again, so nothing reads the eventfd.
    pub(super) fn watch_wake(&mut self, wake: &Wake) {
        self.in_flight += 1;
        self.ring.poll(fd_of(wake), libc::POLLIN, true, Op::Wake.with_token(Token::NONE));
    }

    /// Sends all of `bytes`.
    pub(super) fn send(&mut self, entry: &mut Entry, bytes: Chain) {
        assert!(entry.sending.is_none(), "one send in flight for each token");
        self.counters.sends_in_flight.add_owned(1);
        if entry.socket.suits_zero_copy(bytes.len(), &self.zero_copy, &self.counters) {
            return self.push_record(SendRecord::new(entry.token, &entry.socket, bytes));
        }
        entry.sending = Some(Box::new(Sending::new(bytes)));
        self.submit_send(entry);
    }

    fn push_record(&mut self, send: Box<SendRecord>) {
        let (sqe, _) = send.into_operation(self.zero_copy, &self.counters);
        self.zero_copy_in_flight += 1;
        // SAFETY: `sqe` names memory that the record owns. Only `send_record::complete` frees the
        // record, after the last completion.
        unsafe { self.ring.push(sqe) }
    }

    /// Takes a completion of a zero-copy send. Returns the token and the result when the send is
    /// over and its connection is not removed.
    pub(super) fn on_zero_copy(
        &mut self,
        cqe: Cqe,
        entries: &Entries,
    ) -> Option<(Token, io::Result<usize>)> {
        self.zero_copy_in_flight -= usize::from(cqe.is_last());
        // SAFETY: the completion is of a record's send, and each completion is handled once.
        match unsafe {
            send_record::complete(cqe, self.zero_copy, &self.counters, |token| {
                entries.is_live(token)
            })
        } {
            Outcome::Nothing => None,
            Outcome::Unfinished(send) => {
                self.push_record(send);
                None
            }
            Outcome::Done(token, result) => Some((token, result)),
        }
    }

    fn submit_send(&mut self, entry: &mut Entry) {
        let Some(sending) = &mut entry.sending else { return };
        let user_data = Op::Send.with_token(entry.token);
        let sqe = sending.prepare(&entry.socket, user_data, None);
        self.in_flight += 1;
        // SAFETY: `sqe` names memory of the box in `entry.sending`. `on_send` drops the box after
        // the last completion. The table keeps an entry that has a box. Where an operation does not
        // end, `Uring::rebuild` and the drop of `Uring` leak the box.
        unsafe { self.ring.push(sqe) }
    }

    /// Cancels the operations of a removed entry.
    pub(super) fn remove(&mut self, entry: &mut Entry) {
        if matches!(entry.reception, Reception::Starved | Reception::Draining) {
            entry.reception = Reception::Off;
        }
        if entry.watching {
            self.cancel(Op::Watch, entry.token);
        }
        self.forget_readable(entry);
        if entry.sending.is_some() {
            self.cancel(Op::Send, entry.token);
        }
        self.follow(entry);
    }

    /// Ends the poll for something to receive.
    pub(super) fn forget_readable(&mut self, entry: &Entry) {
        if entry.awaiting {
            self.cancel(Op::Readable, entry.token);
        }
    }

    fn cancel(&mut self, op: Op, token: Token) {
        self.ring.cancel(op.with_token(token), Op::Cancel.with_token(token));
    }

    /// Takes a completion of a multishot receive or accept. The flags alone tell whether the
    /// operation continues, whatever the result.
    pub(super) fn on_received(&mut self, entry: &mut Entry, cqe: Cqe, sink: &mut impl Sink) {
        let was_armed = entry.reception == Reception::Armed;
        if cqe.is_last() {
            entry.reception = Reception::Off;
        }
        if entry.role == Role::Listener {
            entry.accepted(cqe.result, &self.counters, sink);
        } else {
            let class = self.buffers.class(entry.armed_size);
            if cqe.is_last() {
                class.end_receive();
            }
            let size = entry.buffer_size.size();
            entry.received(cqe, &mut class.ring, &self.counters, sink);
            if entry.buffer_size.size() != size {
                self.counters.buffer_moves.add_owned(1);
            }
            if cqe.result == -libc::ENOBUFS && entry.is_to_arm() {
                self.counters.starvations.add_owned(1);
                entry.reception = Reception::Starved;
                let since = *entry.starved_since.get_or_insert_with(Instant::now);
                class.starve(entry.token, since);
            }
        }
        if cqe.is_last() && was_armed && entry.is_to_arm() {
            self.counters.rearms.add_owned(1);
        }
        // Arms an ended receive again. Without that, the connection would look idle for ever.
        self.follow(entry);
    }

    /// Takes a completion of the poll of the socket.
    pub(super) fn on_watched(&mut self, entry: &mut Entry, cqe: Cqe, sink: &mut impl Sink) {
        entry.watched(cqe.result, sink);
        self.follow(entry);
    }

    /// Takes a completion of the poll for something to receive, and polls again where it has ended.
    pub(super) fn on_readable(&mut self, entry: &mut Entry, cqe: Cqe, sink: &mut impl Sink) {
        entry.readable(cqe, sink);
        self.follow(entry);
    }

    /// Takes a completion of the entry's send.
    pub(super) fn on_send(&mut self, entry: &mut Entry, cqe: Cqe, sink: &mut impl Sink) {
        let Some(sending) = &mut entry.sending else { return };
        let progress = sending.complete(cqe.result, &entry.socket, &self.counters);
        if matches!(progress, Progress::Unfinished) && !entry.removing {
            return self.submit_send(entry);
        }
        entry.sending = None;
        self.counters.sends_in_flight.add_owned(1u64.wrapping_neg());
        if let Progress::Done(result) = progress
            && !entry.removing
        {
            sink.complete(entry.token, Completion::Sent(result));
        }
    }

    /// Receives without the ring what a peer sent before its end.
    pub(super) fn drain(&mut self, entry: &mut Entry, sink: &mut impl Sink) {
        if entry.reception == Reception::Draining {
            entry.reception = Reception::Off;
            entry.drain(self.buffers.pool(), &self.counters, sink);
            self.follow(entry);
        }
    }

    /// Cancels every operation, and waits until the kernel no longer uses their memory. The kernel
    /// tears down the ring itself later, in the background. `false`: some operations have not
    /// ended, and the kernel may use their memory for ever.
    pub(super) fn end(&mut self) -> bool {
        self.ring.cancel_all(Op::Cancel.with_token(Token::NONE));
        let begun = Instant::now();
        let limit = match self.ring.has_lost_completions() {
            // The last completion of some operation may never come.
            true => TEARDOWN_AFTER_LOSS,
            false => TEARDOWN,
        };
        let mut cqes = Vec::new();
        let is_used = |operations: &Operations| {
            operations.in_flight + operations.zero_copy_in_flight > 0
                || operations.ring.sends_in_flight() > 0
        };
        while is_used(self) && begun.elapsed() < limit {
            if self.ring.enter(Until::Timeout(limit / 20), &self.counters).is_err() {
                break;
            }
            self.ring.collect(&mut cqes, usize::MAX);
            for cqe in cqes.drain(..) {
                self.discard(cqe);
            }
        }
        if self.zero_copy_in_flight > 0 {
            // The kernel still sends from the memory of the records, which is never freed.
            let sends = self.zero_copy_in_flight;
            user_code::log(|| {
                tracing::warn!(sends, "ring closed before its zero-copy sends were acknowledged")
            });
        }
        if self.in_flight > 0 {
            user_code::log(|| {
                tracing::error!(
                    operations = self.in_flight,
                    "ring closed with operations in flight"
                )
            });
            self.buffers.leak();
            return false;
        }
        self.buffers.unregister(&self.ring);
        true
    }

    /// Frees what a completion brings, without reporting it.
    fn discard(&mut self, cqe: Cqe) {
        match Op::of(cqe.user_data) {
            Op::SendRecord => {
                if self.ring.collector().is_none() {
                    self.zero_copy_in_flight -= usize::from(cqe.is_last());
                }
                // SAFETY: the completion is of a record's send, and each is handled once.
                unsafe { send_record::discard(cqe, self.zero_copy, &self.counters) }
            }
            Op::Cancel => {}
            op => {
                if op == Op::Accept {
                    // Closes the descriptor that the kernel has installed.
                    drop(entry::adopt(cqe.result));
                }
                self.in_flight -= usize::from(cqe.is_last());
            }
        }
    }
}
