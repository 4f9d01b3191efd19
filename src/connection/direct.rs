//! Direct reception: the reader receives from the socket straight into the user's memory.
//!
//! Usually the poller receives into blocks, and the reader copies from them. For a stream of many
//! bytes, that copy is a large part of the work. A reader that offers room for many bytes saves it:
//!
//! ```text
//!        the reader waits          the socket is readable
//!  Off ───────────────────► Asked ────────────────────────► Open
//!   ▲                                                         │
//!   └── another read, few bytes, the end, the run is over ────┘
//! ```
//!
//! * `Off`: the poller receives.
//! * `Asked`: the poller has been asked to stop, and to report what arrives. Bytes that it receives
//!   until then go to the inbox, and the reader takes them first.
//! * `Open`: only the reader receives. It waits when the socket is empty, until the poller reports
//!   an arrival.
//!
//! While the state is not `Off`, reception is paused for the poller. Only the owner of the reader
//! resumes it, and the state is `Off` then. A close resumes it as well: from then on nobody takes
//! the bytes.

use std::io;
use std::sync::Arc;
use std::task::{Context, Poll, Waker, ready};

use bytes::BufMut;

use super::core::Core;
use super::input::Input;
use super::wait::{self, Began};
use crate::buffer::{Chain, Spent};
use crate::clock::now_ns;
use crate::config::{
    DIRECT_BYTES_MAX, DIRECT_BYTES_MIN, DIRECT_ROOM_MIN, DIRECT_SLOW_MAX, DIRECT_TURN_BYTES,
};
use crate::error::Result;
use crate::poller::{Command, Socket};
use crate::sync::atomic::Ordering;
use crate::sync::{MutexGuard, lock};
use crate::task;
use crate::user_code;

/// Who receives: see the module's documentation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direct {
    Off,
    Asked,
    Open(Turn),
}

/// What the reader does between two waits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Turn {
    received_bytes: u32,
    /// How many turns in sequence have received few bytes.
    slow_turns: u8,
    /// A receive has emptied the socket, and the poller has reported no arrival since.
    is_empty: bool,
    /// An urgent byte may have come. A receive stops before it, and more may be behind it.
    is_urgent: bool,
}

/// What the reader does next.
enum Step {
    Receive(Arc<Socket>),
    /// Take what has come, or wait for more.
    Wait,
    /// Let the other connections of the poller be served.
    Yield,
    /// Leave the receiving to the poller.
    Leave,
}

/// What a receive of the reader has found.
enum Received {
    Bytes(usize),
    Nothing,
    /// Nothing more will come. The poller then receives, finds the same end, and reports it.
    End,
}

/// Polls until `buffer` has some of the received bytes. The reader holds no bytes, and `buffer` has
/// room. Returns the number of bytes.
pub(super) fn poll_read(
    core: &Arc<Core>,
    reader: &mut Chain,
    buffer: &mut impl BufMut,
    began: &mut Began,
    cx: &Context<'_>,
) -> Poll<Result<usize>> {
    // The state is `Off` while reception is not paused, and only this reader leaves `Off`.
    if !core.paused.load(Ordering::Relaxed) {
        let room_bytes = buffer.chunk_mut().len();
        ready!(wait::poll_room(core, reader, room_bytes, began, cx))?;
        return Poll::Ready(Ok(take(core, reader, buffer)));
    }
    loop {
        let room_bytes = buffer.chunk_mut().len();
        let mut step = core.next_step(room_bytes);
        if let Step::Receive(socket) = &step {
            match core.receive_directly(socket, buffer, room_bytes) {
                Received::Bytes(bytes) => {
                    began.forget();
                    return Poll::Ready(Ok(bytes));
                }
                Received::Nothing => continue,
                Received::End => step = Step::Leave,
            }
        }
        let polled = match step {
            Step::Yield => {
                user_code::wake(cx.waker().clone());
                return Poll::Pending;
            }
            Step::Leave => wait::poll_room(core, reader, 0, began, cx),
            Step::Wait | Step::Receive(_) => wait::poll_room(core, reader, room_bytes, began, cx),
        };
        // An arrival that was reported before the wait was registered wakes nobody.
        if polled.is_ready() || !core.ends_wait() {
            ready!(polled)?;
            return Poll::Ready(Ok(take(core, reader, buffer)));
        }
    }
}

/// Copies buffered bytes to the next chunk of `buffer`. Returns their number.
pub(super) fn take(core: &Arc<Core>, reader: &mut Chain, buffer: &mut impl BufMut) -> usize {
    let room_bytes = buffer.chunk_mut().len();
    let mut left_bytes = room_bytes;
    while left_bytes > 0 && !reader.is_empty() {
        let front = reader.front_slice();
        let bytes = front.len().min(left_bytes);
        buffer.put_slice(&front[..bytes]);
        reader.advance(bytes);
        left_bytes -= bytes;
    }
    core.consumed_into(reader.len(), room_bytes);
    room_bytes - left_bytes
}

impl Core {
    fn next_step(&self, room_bytes: usize) -> Step {
        {
            let mut input = lock(&self.input);
            let inbox_bytes = input.inbox_len();
            let Direct::Open(turn) = &mut input.direct else { return Step::Wait };
            if turn.slow_turns >= DIRECT_SLOW_MAX
                || room_bytes < DIRECT_ROOM_MIN
                || self.life.is_closed()
            {
                return Step::Leave;
            }
            // The bytes of the inbox came first.
            if turn.is_empty || inbox_bytes > 0 {
                return Step::Wait;
            }
            if turn.received_bytes >= DIRECT_TURN_BYTES {
                turn.end();
                return Step::Yield;
            }
            // From here on, a report of the poller sets it to `false` again.
            turn.is_empty = true;
        }
        lock(&self.output).socket.clone().map_or(Step::Leave, Step::Receive)
    }

    /// Whether the poller has reported an arrival meanwhile. If so, the reader waits no longer.
    fn ends_wait(&self) -> bool {
        let mut input = lock(&self.input);
        let has_news = matches!(input.direct, Direct::Open(turn) if !turn.is_empty);
        let waker = if has_news { input.take_waker() } else { None };
        drop(input);
        user_code::discard(waker);
        has_news
    }

    /// Whether the kernel has bytes that nobody has received.
    pub(super) fn has_unreceived(&self) -> bool {
        let socket = lock(&self.output).socket.clone();
        socket.is_some_and(|socket| socket.arrived_bytes().is_ok_and(|bytes| bytes > 0))
    }

    /// Receives into `buffer`.
    fn receive_directly(
        self: &Arc<Self>,
        socket: &Socket,
        buffer: &mut impl BufMut,
        room_bytes: usize,
    ) -> Received {
        let bytes_max = room_bytes.min(DIRECT_BYTES_MAX);
        self.remote.counters.add(|counters| &counters.direct_receives, 1);
        match task::leave_out(|| socket.receive_into(buffer, bytes_max, || !self.life.is_closed()))
        {
            Ok(bytes) if bytes > 0 => {
                self.remote.counters.add(|counters| &counters.received_bytes, bytes as u64);
                if self.idle_timeout.is_set() {
                    self.timeouts.touch(now_ns());
                }
                let has_emptied = bytes < bytes_max && socket.is_tcp();
                lock(&self.input).received_directly(bytes, has_emptied);
                Received::Bytes(bytes)
            }
            Ok(_) => Received::End,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                let input = lock(&self.input);
                // The end is known, but no receive finds it. Each wait for it would be over at
                // once, and this task would never rest.
                if input.has_hung_up() { Received::End } else { Received::Nothing }
            }
            Err(error) => {
                // The kernel reports a failure once. The poller will find the end of the stream,
                // and looks here for the reason.
                let mut spent = Spent::default();
                let flusher = {
                    let mut output = lock(&self.output);
                    output.fail(&error, &mut spent);
                    output.take_flusher()
                };
                self.wake(None, flusher);
                Received::End
            }
        }
    }

    /// Decides who receives for a reader that wants one byte and has room for `room_bytes`.
    pub(super) fn ask_if_direct(
        self: &Arc<Self>,
        mut input: MutexGuard<'_, Input>,
        room_bytes: usize,
        waits: bool,
    ) {
        if !self.is_direct(&input, room_bytes) {
            return self.resume_if_room(input, 1);
        }
        if !waits {
            return;
        }
        match &mut input.direct {
            Direct::Off => {
                let number = input.ask();
                self.paused.store(true, Ordering::Relaxed);
                // Under the lock, so that the poller obeys such commands in their order.
                self.remote.send(Command::WatchReadable(Arc::clone(self), number));
            }
            Direct::Asked => {}
            Direct::Open(turn) => turn.end(),
        }
    }

    /// Whether a reader with room for `room_bytes` receives by itself, now or when it waits next.
    /// Kernel threads receive without a system call, and the reader would make one.
    fn is_direct(&self, input: &Input, room_bytes: usize) -> bool {
        let is_many = input.direct != Direct::Off || input.took_many;
        is_many && room_bytes >= DIRECT_ROOM_MIN && !self.remote.outlet.is_of_kernel_threads()
    }

    /// [`consumed`](Self::consumed) for a reader that had room for `room_bytes`. A paused reception
    /// stays paused if the reader is going to receive.
    fn consumed_into(self: &Arc<Self>, left_bytes: usize, room_bytes: usize) {
        if !self.paused.load(Ordering::Relaxed) {
            return;
        }
        let mut input = lock(&self.input);
        input.set_held_bytes(left_bytes);
        if !self.is_direct(&input, room_bytes) {
            self.resume_if_room(input, 0);
        }
    }
}

impl Turn {
    fn end(&mut self) {
        match std::mem::take(&mut self.received_bytes) {
            0 => {}
            1..DIRECT_BYTES_MIN => self.slow_turns += 1,
            _ => self.slow_turns = 0,
        }
    }
}

impl Input {
    /// The reader begins to receive by itself. Returns the number for the poller's reports.
    fn ask(&mut self) -> u32 {
        self.direct = Direct::Asked;
        self.expects_request = false;
        self.direct_number = self.direct_number.wrapping_add(1);
        self.direct_number
    }

    /// The poller receives again.
    pub(super) fn end_direct(&mut self) {
        if self.direct != Direct::Off {
            self.direct = Direct::Off;
            self.took_many = false;
        }
    }

    /// The poller reports an arrival. Returns the waker of a reader that waits. A report may come
    /// late, after the poller was asked to resume; its number is an old one, or the state is `Off`.
    pub(super) fn on_readable(&mut self, number: u32, is_urgent: bool) -> Option<Waker> {
        if self.direct_number != number {
            return None;
        }
        match &mut self.direct {
            Direct::Off => return None,
            Direct::Asked => {
                self.direct = Direct::Open(Turn { is_urgent, ..Turn::default() });
            }
            Direct::Open(turn) => {
                turn.is_empty = false;
                turn.is_urgent |= is_urgent;
            }
        }
        self.take_waker()
    }

    /// The peer has ended its side. Returns the waker of a reader that is to receive the end.
    pub(super) fn end_is_readable(&mut self) -> Option<Waker> {
        let Direct::Open(turn) = &mut self.direct else { return None };
        turn.is_empty = false;
        self.take_waker()
    }

    /// Notes bytes that the reader has received by itself. `has_emptied`: a receive has found fewer
    /// bytes than there was room for.
    fn received_directly(&mut self, bytes: usize, has_emptied: bool) {
        self.received += bytes as u64;
        let hung_up = self.has_hung_up();
        if let Direct::Open(turn) = &mut self.direct {
            let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
            turn.received_bytes = turn.received_bytes.saturating_add(bytes);
            // One event may have reported these bytes together with an end, or with bytes behind an
            // urgent byte. No second event comes.
            if !has_emptied || turn.is_urgent || hung_up {
                turn.is_empty = false;
            }
        }
    }
}
