//! One token's side of the ring: its socket, what is in flight for it, and what it is to do next.
//!
//! What a reception goes through; only completions without `F_MORE` lead back to `Off`:
//!
//! ```text
//!        arm              cancel: a pause, other buffers, removal
//!  Off ───────► Armed ───────────────────────────────────► Ending
//!   ▲  ◄──────────┴─────────── last completion ───────────────┘
//!   │ ENOBUFS         buffers are back
//!   └───────► Starved ─────────────────► Armed
//! ```
//!
//! Once the peer is known to have ended, `Off` leads to `Draining` instead: the rest is received
//! without the ring, after the round's completions, and then it is `Off` again.
//!
//! An entry lives until `remove` was called *and* nothing of it is in flight: so no operation names
//! a closed descriptor, and a slot is reused only when no completion can come for it.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::Instant;

use io_uring::cqueue;
use io_uring::types::Fd;

use super::buffer_ring::BufferRing;
use super::buffers::Size;
use super::in_flight::Sending;
use super::ring::Done;
use super::tag::Op;
use crate::buffer::Pool;
use crate::config::{LENT_PART_MIN, SMALL_BUFFER_BYTES, uring as config};
use crate::counters::Counters;
use crate::sys::{Completion, Flow, Received, Sink, Socket, Token};

pub(super) struct Entry {
    pub(super) token: Token,
    pub(super) socket: Arc<Socket>,
    /// The socket's; here as well, so that a request does not have to look at the socket.
    fd: RawFd,
    pub(super) role: Role,
    pub(super) reception: Reception,
    /// Which buffers the receive that is in flight uses.
    pub(super) armed_size: Size,
    /// Which the next one is to use.
    pub(super) wanted_size: Size,
    /// About how much may be received before we hear of it.
    pub(super) budget_bytes: u32,
    /// It has found no buffer since then. Boxed, because few ever starve.
    pub(super) starved_since: Option<Box<Instant>>,
    /// Receives in a row that spoke for the other size.
    streak: u8,
    pub(super) paused: bool,
    /// The peer has ended its side: what is left is received without the ring. A multishot receive
    /// that comes upon bytes and the end at once may report the bytes and then wait for ever; see
    /// docs/IO_URING.md for which kernels and when.
    pub(super) peer_ended: bool,
    /// A poll can tell when the peer ends.
    watches_end: bool,
    /// Nothing more will be received.
    pub(super) ended: bool,
    /// A poll of the socket is in flight.
    pub(super) watching: bool,
    pub(super) removing: bool,
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

/// One cache line, since every request needs it.
const _: () = assert!(size_of::<Entry>() <= 64);

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
            fd: socket.as_fd().as_raw_fd(),
            socket,
            role,
            reception: Reception::Off,
            armed_size: size,
            wanted_size: size,
            budget_bytes: budget_bytes.clamp(1, i32::MAX as usize) as u32,
            starved_since: None,
            streak: 0,
            paused: false,
            peer_ended: false,
            watches_end: true,
            ended: false,
            watching: false,
            removing: false,
            sending: None,
        }
    }

    #[inline]
    pub(super) fn fd(&self) -> Fd {
        Fd(self.fd)
    }

    /// The operation that its reception is.
    pub(super) fn reception_op(&self) -> Op {
        if self.role == Role::Listener { Op::Accept } else { Op::Receive }
    }

    /// It was removed, and no completion can come for it any more.
    pub(super) fn is_gone(&self) -> bool {
        let receiving = matches!(self.reception, Reception::Armed | Reception::Ending);
        self.removing && !receiving && !self.watching && self.sending.is_none()
    }

    /// Something is to be received or accepted, and nothing under way will.
    pub(super) fn is_to_arm(&self) -> bool {
        self.reception == Reception::Off
            && self.role != Role::Connecting
            && !self.paused
            && !self.ended
            && !self.removing
    }

    /// The same, without the ring.
    pub(super) fn is_to_drain(&self) -> bool {
        self.peer_ended && self.is_to_arm()
    }

    /// What is under way is not what is wanted.
    pub(super) fn is_to_end(&self) -> bool {
        self.reception == Reception::Armed
            && (self.paused
                || self.armed_size != self.wanted_size
                || self.peer_ended
                || self.removing)
    }

    /// The peer's end is still to be noticed.
    pub(super) fn is_to_watch(&self) -> bool {
        self.role == Role::Stream
            && self.watches_end
            && !self.peer_ended
            && !self.ended
            && !self.watching
            && !self.removing
    }

    /// Notes one receive; the streak decides which buffers suit the connection.
    fn note_received(&mut self, bytes: usize) {
        let (speaks_for_other, streak_max) = match self.wanted_size {
            Size::Small => (bytes >= SMALL_BUFFER_BYTES, config::FILLED_TO_GROW),
            Size::Large => (bytes <= SMALL_BUFFER_BYTES, config::SMALL_TO_SHRINK),
        };
        if !speaks_for_other || self.armed_size != self.wanted_size {
            self.streak = 0;
            return;
        }
        self.streak += 1;
        if self.streak >= streak_max {
            self.streak = 0;
            self.wanted_size = match self.wanted_size {
                Size::Small => Size::Large,
                Size::Large => Size::Small,
            };
        }
    }

    /// One completion of a multishot receive: bytes, the end, or the reason why there are none.
    pub(super) fn received(
        &mut self,
        done: Done,
        buffers: &mut BufferRing,
        counters: &Counters,
        sink: &mut impl Sink,
    ) {
        let buffer = cqueue::buffer_select(done.flags);
        let Ok(bytes) = usize::try_from(done.result) else {
            let ends = !matches!(
                -done.result,
                libc::ENOBUFS | libc::ECANCELED | libc::EAGAIN | libc::EINTR | libc::ENOMEM
            );
            if ends && !self.ended {
                self.end(Err(io::Error::from_raw_os_error(-done.result)), sink);
            }
            return;
        };
        let is_partly_filled = cqueue::buffer_more(done.flags);
        if let Some(since) = self.starved_since.take() {
            counters.starved_ns.add_owned(since.elapsed().as_nanos() as u64);
        }
        if let Some(first) = buffer {
            counters.received_bytes.add_owned(bytes as u64);
            buffers.take_filled(first, bytes, is_partly_filled, |received| {
                if matches!(received, Received::Lent(_)) {
                    counters.lent_receives.add_owned(1);
                }
                if sink.complete(self.token, Completion::Received(received)) == Flow::Pause {
                    self.paused = true;
                }
            });
        }
        self.note_received(bytes);
        if bytes == 0 && !self.ended {
            self.end(Ok(()), sink);
        }
    }

    /// Receives what the peer sent before its end, and the end, with plain calls.
    pub(super) fn drain(&mut self, pool: &Pool, counters: &Counters, sink: &mut impl Sink) {
        while !self.paused && !self.ended {
            counters.receive_calls.add_owned(1);
            let mut block = pool.allocate(SMALL_BUFFER_BYTES);
            match self.socket.receive(block.spare()) {
                Ok(0) => self.end(Ok(()), sink),
                Ok(bytes) => {
                    counters.received_bytes.add_owned(bytes as u64);
                    let received = if bytes >= block.capacity_left() / LENT_PART_MIN {
                        Received::Lent(block.finish(bytes))
                    } else {
                        Received::Copied(&block.spare()[..bytes])
                    };
                    let flow = sink.complete(self.token, Completion::Received(received));
                    self.paused = flow == Flow::Pause;
                }
                // The poll reported an end, but the stream has none. Do not arm the poll again: it
                // would report the same event at once.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.peer_ended = false;
                    self.watches_end = false;
                    return;
                }
                Err(error) => self.end(Err(error), sink),
            }
        }
        if !self.ended {
            // A reader that is behind learns of the end before it comes to it.
            sink.complete(self.token, Completion::HungUp);
        }
    }

    /// The poll of the socket has completed, with these events or an error.
    pub(super) fn watched(&mut self, result: i32, sink: &mut impl Sink) {
        self.watching = false;
        if self.role == Role::Connecting && !self.removing {
            let connected = self.socket.take_error();
            self.role = Role::Stream;
            self.ended = connected.is_err();
            sink.complete(self.token, Completion::Connected(connected));
        } else if result > 0 && !self.ended && !self.removing {
            self.peer_ended = true;
            if self.paused {
                sink.complete(self.token, Completion::HungUp);
            }
        }
    }

    /// One completion of a multishot accept.
    pub(super) fn accepted(&mut self, result: i32, counters: &Counters, sink: &mut impl Sink) {
        let error = match adopt(result) {
            Ok(fd) => {
                counters.accepts.add_owned(1);
                // The address is not told by a multishot accept: its one place for it would be
                // overwritten.
                counters.setup_calls.add_owned(1);
                // `SO_PEERNAME` names the peer of every connection that was accepted, so this does
                // not fail on Linux.
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

/// The descriptor that an accept has installed.
pub(super) fn adopt(result: i32) -> io::Result<OwnedFd> {
    if result < 0 {
        return Err(io::Error::from_raw_os_error(-result));
    }
    // SAFETY: the kernel installed this descriptor for the accept that completed with it, and each
    // completion is looked at once: nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(result) })
}
