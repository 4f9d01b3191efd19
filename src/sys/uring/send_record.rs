//! A send that owns everything its operation names: its bytes, their addresses and its socket.
//!
//! The address of the record is the user data of the operation, so no table refers to the record.
//! From the push on the kernel has the record, and a completion brings the record to the poller. So
//! no descriptor is closed and no byte is freed while an operation names it, even when the
//! connection is gone. Zero-copy sends have records, and so have the ordinary sends of `sqpoll`.
//!
//! ```text
//!               result, F_MORE               notification
//!  Sends ───────────────────────────► Held ────────────────► freed
//!    │ result without F_MORE
//!    └───────────────────────────► over, or pushed again
//! ```
//!
//! An ordinary send has one completion, its result. A zero-copy send has two. Its result reports
//! that the kernel has taken the bytes, and the send is over. The kernel still uses the memory,
//! until the peer has acknowledged the bytes or the socket has ended; then the notification
//! comes. In between the record is `Held`: it keeps the memory, and no socket, because the
//! connection may close.

use std::io;
use std::sync::{Arc, LazyLock, Weak};

use crossbeam_queue::ArrayQueue;
use io_uring::squeue::Entry;

use super::raw::NOTIF_USAGE_ZC_COPIED;
use super::ring::Cqe;
use super::sending::{Progress, Sending};
use super::tag::{self, Op};
use crate::buffer::Chain;
use crate::config::ZeroCopyRule;
use crate::counters::Counters;
use crate::sys::{Socket, Token};

pub(super) struct SendRecord {
    token: Token,
    state: State,
}

// SAFETY: the pointers in a `Sending` name memory that the record owns, and which moves with it.
unsafe impl Send for SendRecord {}

enum State {
    /// In flight, or about to be pushed.
    Sends { socket: Arc<Socket>, sending: Sending },
    /// The kernel uses `memory` until the notification.
    Held { socket: Weak<Socket>, memory: Chain, sent_bytes: usize },
    /// The record is not in use.
    Free,
}

/// Free records of all pollers. Any thread makes a record, and the poller frees it. If the
/// allocator got it back each time, both threads would contend for a lock of the allocator.
static FREE: LazyLock<ArrayQueue<Box<SendRecord>>> =
    LazyLock::new(|| ArrayQueue::new(FREE_RECORDS_MAX));

/// A full list is some 256 KiB.
const FREE_RECORDS_MAX: usize = 1024;

/// What a completion means for a send.
pub(super) enum Outcome {
    /// Nothing is to do: the memory of an earlier send is free, or the connection is gone.
    Nothing,
    /// Bytes are left, and the next operation is to be pushed.
    Unfinished(Box<SendRecord>),
    /// The send is over.
    Done(Token, io::Result<usize>),
}

impl SendRecord {
    pub(super) fn new(token: Token, socket: &Arc<Socket>, bytes: Chain) -> Box<SendRecord> {
        let state = State::Sends { socket: Arc::clone(socket), sending: Sending::new(bytes) };
        SendRecord::in_state(token, state)
    }

    fn in_state(token: Token, state: State) -> Box<SendRecord> {
        match FREE.pop() {
            Some(mut record) => {
                *record = SendRecord { token, state };
                record
            }
            None => Box::new(SendRecord { token, state }),
        }
    }

    pub(super) fn token(&self) -> Token {
        self.token
    }

    /// The next operation of the send, and the record as a pointer. [`complete`] frees the record.
    ///
    /// The operation names memory of the record.
    pub(super) fn into_operation(
        mut self: Box<Self>,
        rule: ZeroCopyRule,
        counters: &Counters,
    ) -> (Entry, *mut SendRecord) {
        // An address of user space has at most 56 bits.
        let address = std::ptr::from_ref(&*self).expose_provenance() as u64;
        let user_data = Op::SendRecord.with_payload(address);
        let State::Sends { socket, sending } = &mut self.state else {
            unreachable!("a record whose send is over is not pushed");
        };
        let is_zero_copy = socket.suits_zero_copy(sending.rest_bytes(), &rule, counters);
        let sqe = sending.prepare(socket, user_data, is_zero_copy.then_some(rule));
        (sqe, Box::into_raw(self))
    }

    /// The unsent bytes.
    pub(super) fn into_rest(self) -> Chain {
        match self.state {
            State::Sends { sending, .. } => sending.into_rest(),
            State::Held { .. } | State::Free => Chain::new(),
        }
    }
}

/// Takes a completion of a record's operation, and frees the record with the last one. `is_live`:
/// the connection of a token is not removed.
///
/// # Safety
/// A completion of an [`Op::SendRecord`] is `cqe`. The caller calls this once for each completion,
/// in the order in which the kernel posted them.
pub(super) unsafe fn complete(
    cqe: Cqe,
    rule: ZeroCopyRule,
    counters: &Counters,
    is_live: impl FnOnce(Token) -> bool,
) -> Outcome {
    let address = tag::payload(cqe.user_data) as usize;
    let record = std::ptr::with_exposed_provenance_mut::<SendRecord>(address);
    // SAFETY: `into_operation` made the box raw and gave its address only to the operation that
    // completed. The box is made raw again below where a completion follows.
    let mut record = unsafe { Box::from_raw(record) };
    let token = record.token;
    let (socket, mut sending) = match std::mem::replace(&mut record.state, State::Free) {
        State::Held { socket, memory, sent_bytes } => {
            release(cqe, &socket, &memory, sent_bytes, rule, counters);
            return Outcome::Nothing;
        }
        State::Sends { socket, sending } => (socket, sending),
        State::Free => unreachable!("the kernel knows no free record"),
    };
    let memory = (!cqe.is_last()).then(|| sending.named());
    let progress = sending.complete(cqe.result, &socket, counters);
    if let Some(memory) = memory {
        counters.zero_copy_held_bytes.add_owned(memory.len() as u64);
        let sent_bytes = usize::try_from(cqe.result).unwrap_or(0);
        record.state = State::Held { socket: Arc::downgrade(&socket), memory, sent_bytes };
        // The kernel posts the notification after this completion.
        let _ = Box::into_raw(record);
    } else {
        // A full list leaves the record to be freed.
        let _ = FREE.push(record);
    }
    let is_live = is_live(token);
    if is_live && matches!(progress, Progress::Unfinished) {
        let state = State::Sends { socket, sending };
        return Outcome::Unfinished(SendRecord::in_state(token, state));
    }
    counters.sends_in_flight.add_owned(1u64.wrapping_neg());
    match progress {
        Progress::Done(result) if is_live => Outcome::Done(token, result),
        _ => Outcome::Nothing,
    }
}

/// Takes a completion of a record's operation whose poller ends: the send is given up.
///
/// # Safety
/// As for [`complete`].
pub(super) unsafe fn discard(cqe: Cqe, rule: ZeroCopyRule, counters: &Counters) {
    // SAFETY: the caller keeps the contract of `complete`, which is the same.
    drop(unsafe { complete(cqe, rule, counters, |_| false) });
}

/// Takes a notification: the kernel no longer uses the memory of a zero-copy send.
fn release(
    cqe: Cqe,
    socket: &Weak<Socket>,
    memory: &Chain,
    sent_bytes: usize,
    rule: ZeroCopyRule,
    counters: &Counters,
) {
    counters.zero_copy_held_bytes.add_owned((memory.len() as u64).wrapping_neg());
    if sent_bytes == 0 {
        // The send was refused or cancelled. The kernel reports a copy here too.
        return;
    }
    counters.zero_copy_sends.add_owned(1);
    if !rule.has_reports {
        return;
    }
    let socket = socket.upgrade().filter(|_| rule.stops_where_copied);
    if cqe.result.cast_unsigned() & NOTIF_USAGE_ZC_COPIED == 0 {
        if let Some(socket) = socket {
            socket.allow_zero_copy();
        }
        return;
    }
    counters.zero_copy_copied.add_owned(1);
    if let Some(socket) = socket {
        counters.zero_copy_stops.add_owned(u64::from(socket.pause_zero_copy()));
    }
}
