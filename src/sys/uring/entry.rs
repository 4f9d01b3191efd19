//! One token's state in the ring: its socket, its operations in flight, and the operations to
//! start.
//!
//! Reception has these states. Only a completion without `F_MORE` leads back to `Off`.
//!
//! ```text
//!        arm              cancel: a pause, another buffer size, removal
//!  Off ───────► Armed ───────────────────────────────────────► Ending
//!   ▲  ◄──────────┴─────────── last completion ───────────────────┘
//!   │ ENOBUFS         buffers are free
//!   └───────► Starved ─────────────────► Armed
//! ```
//!
//! After the peer's end is known, `Off` leads to `Draining`: the remaining bytes are received
//! without the ring, after the completions of the round, and the state is `Off` again.
//!
//! An entry lives until `remove` was called *and* no operation is in flight. So no operation names
//! a closed descriptor, and no late completion reaches the next owner of a slot.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use io_uring::cqueue;
use io_uring::types::Fd;

use super::buffer_ring::BufferRing;
use super::ring::{Cqe, fd_of};
use super::sending::Sending;
use super::tag::Op;
use crate::buffer::Pool;
use crate::config::{SMALL_BUFFER_BYTES, uring as config};
use crate::counters::Counters;
use crate::sys::buffer_size::{Size, SizeChoice};
use crate::sys::lending::lend_or_copy;
use crate::sys::{Completion, Flow, Received, Sink, Socket, Token};

pub(super) struct Entry {
    pub(super) token: Token,
    pub(super) socket: Arc<Socket>,
    pub(super) role: Role,
    pub(super) reception: Reception,
    /// The buffers of the receive in flight.
    pub(super) armed_size: Size,
    /// The buffers of the next receive.
    pub(super) buffer_size: SizeChoice,
    /// About how many bytes one receive operation may receive before it ends.
    pub(super) budget_bytes: u32,
    /// When the connection found no buffer. `None` after the next received bytes.
    pub(super) starved_since: Option<Instant>,
    pub(super) paused: bool,
    /// The number of `watch_readable`, until `resume`. The entry is paused meanwhile.
    pub(super) direct: Option<u32>,
    /// A poll for something to receive is in flight. It completes many times.
    pub(super) awaiting: bool,
    /// The peer has ended its side, so the remaining bytes are received without the ring. A
    /// multishot receive that finds bytes and the end together may report only the bytes;
    /// docs/IO_URING.md tells on which kernels.
    pub(super) peer_ended: bool,
    /// A poll can report the peer's end.
    watches_end: bool,
    /// `Ended` was reported, or connecting failed.
    pub(super) ended: bool,
    /// A poll of the socket is in flight.
    pub(super) watching: bool,
    pub(super) removing: bool,
    /// The send in flight. `sqpoll` keeps its sends elsewhere.
    pub(super) sending: Option<Box<Sending>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    Listener,
    Connecting,
    Stream,
}

/// See the module's documentation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reception {
    Off,
    Armed,
    Ending,
    Starved,
    Draining,
}

impl Entry {
    pub(super) fn new(
        token: Token,
        socket: Arc<Socket>,
        role: Role,
        size: Size,
        budget_bytes: usize,
    ) -> Entry {
        Entry {
            token,
            socket,
            role,
            reception: Reception::Off,
            armed_size: size,
            buffer_size: SizeChoice::new(size),
            budget_bytes: budget_bytes.clamp(1, i32::MAX as usize) as u32,
            starved_since: None,
            paused: false,
            direct: None,
            awaiting: false,
            peer_ended: false,
            watches_end: true,
            ended: false,
            watching: false,
            removing: false,
            sending: None,
        }
    }

    pub(super) fn fd(&self) -> Fd {
        fd_of(&*self.socket)
    }

    /// The kind of operation that receives or accepts.
    pub(super) fn reception_op(&self) -> Op {
        if self.role == Role::Listener { Op::Accept } else { Op::Receive }
    }

    /// The entry was removed, and no operation is in flight.
    pub(super) fn is_gone(&self) -> bool {
        let receiving = matches!(self.reception, Reception::Armed | Reception::Ending);
        let polling = self.watching || self.awaiting;
        self.removing && !receiving && !polling && self.sending.is_none()
    }

    /// The entry wants bytes or connections, and no operation brings them.
    pub(super) fn is_to_arm(&self) -> bool {
        self.reception == Reception::Off
            && self.role != Role::Connecting
            && !self.paused
            && !self.ended
            && !self.removing
    }

    /// The entry wants bytes, and receives them without the ring.
    pub(super) fn is_to_drain(&self) -> bool {
        self.peer_ended && self.is_to_arm()
    }

    /// The entry no longer wants the receive or accept in flight.
    pub(super) fn is_to_cancel(&self) -> bool {
        self.reception == Reception::Armed
            && (self.paused
                || self.armed_size != self.buffer_size.size()
                || self.peer_ended
                || self.removing)
    }

    /// The entry needs a poll for the peer's end.
    pub(super) fn is_to_watch(&self) -> bool {
        self.role == Role::Stream
            && self.watches_end
            && !self.peer_ended
            && !self.ended
            && !self.watching
            && !self.removing
    }

    /// The entry needs a poll for something to receive.
    pub(super) fn is_to_await(&self) -> bool {
        self.direct.is_some()
            && self.reception == Reception::Off
            && !self.awaiting
            && !self.ended
            && !self.removing
    }

    /// Takes a completion of the poll for something to receive.
    pub(super) fn readable(&mut self, cqe: Cqe, sink: &mut impl Sink) {
        self.awaiting = !cqe.is_last();
        // A cancelled poll may complete once more while a receive is in flight. That is not
        // reported, because two receivers would mix up the bytes.
        if cqe.result > 0
            && self.reception == Reception::Off
            && !self.removing
            && let Some(number) = self.direct
        {
            // The result does not tell: the kernel reports `POLLPRI` for ordinary bytes as well.
            let may_be_urgent = true;
            sink.complete(self.token, Completion::Readable(number, may_be_urgent));
        }
    }

    /// Takes one completion of a multishot receive: bytes, the end, or the reason for no bytes.
    pub(super) fn received(
        &mut self,
        cqe: Cqe,
        buffers: &mut BufferRing,
        counters: &Counters,
        sink: &mut impl Sink,
    ) {
        let Ok(bytes) = usize::try_from(cqe.result) else {
            let is_passing = matches!(
                -cqe.result,
                libc::ENOBUFS | libc::ECANCELED | libc::EAGAIN | libc::EINTR | libc::ENOMEM
            );
            if !is_passing && !self.ended {
                self.end(Err(io::Error::from_raw_os_error(-cqe.result)), sink);
            }
            return;
        };
        if let Some(since) = self.starved_since.take() {
            counters.starved_ns.add_owned(since.elapsed().as_nanos() as u64);
        }
        if let Some(first) = cqueue::buffer_select(cqe.flags) {
            counters.received_bytes.add_owned(bytes as u64);
            let is_partly_filled = cqueue::buffer_more(cqe.flags);
            buffers.take_filled(first, bytes, is_partly_filled, |received| {
                if matches!(received, Received::Lent(_)) {
                    counters.lent_receives.add_owned(1);
                }
                if sink.complete(self.token, Completion::Received(received)) == Flow::Pause {
                    self.paused = true;
                }
            });
        }
        // A receive that was armed before the size changed tells nothing about the new size.
        if self.armed_size == self.buffer_size.size() {
            self.buffer_size.note(bytes, config::FILLED_TO_GROW);
        }
        if bytes == 0 && !self.ended {
            self.end(Ok(()), sink);
        }
        self.tell_end_behind_pause(sink);
    }

    /// Receives without the ring what the peer sent before its end, and the end.
    pub(super) fn drain(&mut self, pool: &Pool, counters: &Counters, sink: &mut impl Sink) {
        let mut block = pool.allocate(SMALL_BUFFER_BYTES);
        while !self.paused && !self.ended {
            counters.receive_calls.add_owned(1);
            match self.socket.receive(block.spare()) {
                Ok(0) => self.end(Ok(()), sink),
                Ok(bytes) => {
                    counters.received_bytes.add_owned(bytes as u64);
                    let received = lend_or_copy(&mut block, bytes, pool);
                    let flow = sink.complete(self.token, Completion::Received(received));
                    self.paused = flow == Flow::Pause;
                }
                // The poll reported an end, but the stream has not ended. A new poll would report
                // the same event at once.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.peer_ended = false;
                    self.watches_end = false;
                    return;
                }
                Err(error) => self.end(Err(error), sink),
            }
        }
        self.tell_end_behind_pause(sink);
    }

    /// While reception is paused, no receive finds the peer's end. The pause and the news of the
    /// end come in any order, so this runs after each of them. The sink may hear of the end twice.
    fn tell_end_behind_pause(&self, sink: &mut impl Sink) {
        if self.peer_ended && self.paused && !self.ended {
            sink.complete(self.token, Completion::HungUp);
        }
    }

    /// Takes the completion of the poll: events, or an error.
    pub(super) fn watched(&mut self, result: i32, sink: &mut impl Sink) {
        self.watching = false;
        if self.role == Role::Connecting && !self.removing {
            let connected = self.socket.take_error();
            self.role = Role::Stream;
            self.ended = connected.is_err();
            sink.complete(self.token, Completion::Connected(connected));
        } else if result > 0 && !self.ended && !self.removing {
            self.peer_ended = true;
            self.tell_end_behind_pause(sink);
        }
    }

    /// Takes one completion of a multishot accept.
    pub(super) fn accepted(&mut self, result: i32, counters: &Counters, sink: &mut impl Sink) {
        let error = match adopt(result) {
            Ok(fd) => {
                counters.accepts.add_owned(1);
                // A multishot accept does not return addresses, because all its completions would
                // write to one place. So the address takes a call.
                counters.setup_calls.add_owned(1);
                // This does not fail on Linux: `SO_PEERNAME` names the peer of every accepted
                // connection.
                let Ok((accepted, peer)) = self.socket.accepted(fd) else { return };
                let flow = sink.complete(self.token, Completion::Accepted(accepted, peer));
                self.paused |= flow == Flow::Pause;
                return;
            }
            Err(error) => error,
        };
        let errno = error.raw_os_error();
        let is_passing = matches!(errno, Some(libc::ECANCELED | libc::EAGAIN | libc::EINTR));
        if is_passing || Socket::is_error_of_the_newcomer(&error) || self.removing {
            return;
        }
        self.paused = true;
        sink.complete(self.token, Completion::AcceptFailed(error));
    }

    fn end(&mut self, result: io::Result<()>, sink: &mut impl Sink) {
        self.ended = true;
        sink.complete(self.token, Completion::Ended(result));
    }
}

/// The descriptor that the accept with this result installed.
pub(super) fn adopt(result: i32) -> io::Result<OwnedFd> {
    if result < 0 {
        return Err(io::Error::from_raw_os_error(-result));
    }
    // SAFETY: the kernel installed this descriptor for the accept that completed with it. Each
    // completion is handled once, so nothing else owns the descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(result) })
}
