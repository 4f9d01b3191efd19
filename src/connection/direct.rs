//! Direct reception: the reader receives from the socket straight into the user's memory.
//!
//! Usually the poller receives into blocks, and the reader copies from them. For a stream of many
//! bytes, that copy is a large part of the work. A reader that offers room for many bytes saves it:
//!
//! ```text
//!        the reader waits          the socket is readable
//!  Off ───────────────────► Asked ────────────────────────► Open
//!   ▲                         ▲ ◄──────────────────────────── │
//!   │                             nothing left, or a turn over │
//!   └── another read, few bytes, the end, the run is over ─────┘
//! ```
//!
//! * `Off`: the poller receives.
//! * `Asked`: the poller has been asked to stop, and to report when there is something to receive.
//!   Bytes that it receives until then go to the inbox, and the reader takes them first.
//! * `Open`: only the reader receives.
//!
//! While the state is not `Off`, reception is paused for the poller. Everything that resumes it
//! also leads back to `Off`.

use std::io;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::BufMut;

use super::core::Core;
use super::input::Input;
use super::wait::{self, Began};
use crate::buffer::{Chain, Spent};
use crate::clock::now_ns;
use crate::config::{DIRECT_BYTES_MIN, DIRECT_ROOM_MIN, DIRECT_TURN_BYTES};
use crate::error::Result;
use crate::poller::Command;
use crate::sync::atomic::Ordering;
use crate::sync::{MutexGuard, lock};

/// Who receives: see the module's documentation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direct {
    Off,
    Asked,
    Open {
        /// Bytes that the reader has received since the state is `Open`.
        turn_bytes: u32,
    },
}

/// What the reader finds when it looks at the socket.
enum Found {
    Bytes(usize),
    /// The poller tells the reader when there is more.
    Nothing,
    /// The poller must receive again.
    NotDirect,
}

/// Polls until `buffer` has some of the received bytes. The reader has none, and `buffer` has room.
/// Returns the number of bytes.
pub(super) fn poll_read(
    core: &Arc<Core>,
    reader: &mut Chain,
    buffer: &mut impl BufMut,
    began: &mut Began,
    cx: &Context<'_>,
) -> Poll<Result<usize>> {
    let room_bytes = match core.receive_directly(buffer) {
        Found::Bytes(bytes) => {
            began.forget();
            return Poll::Ready(Ok(bytes));
        }
        Found::Nothing => buffer.chunk_mut().len(),
        Found::NotDirect => 0,
    };
    ready!(wait::poll_room(core, reader, room_bytes, began, cx))?;
    Poll::Ready(Ok(take(core, reader, buffer)))
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
    /// Receives into `buffer`, if the reader may.
    fn receive_directly(self: &Arc<Self>, buffer: &mut impl BufMut) -> Found {
        {
            let input = lock(&self.input);
            let Direct::Open { turn_bytes } = input.direct else { return Found::Nothing };
            let has_room = buffer.chunk_mut().len() >= DIRECT_ROOM_MIN;
            if !has_room || self.life.is_closed() || input.end.is_some() {
                return Found::NotDirect;
            }
            // Other connections of the poller are served now.
            if turn_bytes >= DIRECT_TURN_BYTES || input.inbox_len() > 0 {
                return Found::Nothing;
            }
        }
        let Some(socket) = lock(&self.output).socket.clone() else { return Found::NotDirect };
        let received = socket.receive_into(buffer);
        self.remote.counters.add(|counters| &counters.direct_receives, 1);
        match received {
            Ok(0) => Found::NotDirect,
            Ok(bytes) => {
                self.remote.counters.add(|counters| &counters.received_bytes, bytes as u64);
                if self.idle_timeout.is_set() {
                    self.timeouts.touch(now_ns());
                }
                lock(&self.input).received_directly(bytes);
                Found::Bytes(bytes)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                let direct = lock(&self.input).direct;
                let is_slow = matches!(direct, Direct::Open { turn_bytes }
                    if (1..DIRECT_BYTES_MIN).contains(&turn_bytes));
                if is_slow { Found::NotDirect } else { Found::Nothing }
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
                Found::NotDirect
            }
        }
    }

    /// Decides who receives for a reader that waits for one byte and has room for `room_bytes`.
    pub(super) fn ask_if_direct(
        self: &Arc<Self>,
        mut input: MutexGuard<'_, Input>,
        room_bytes: usize,
        waits: bool,
    ) {
        if !self.is_direct(&input, room_bytes) {
            return self.resume_if_room(input, 1);
        }
        if !waits || input.direct == Direct::Asked {
            return;
        }
        let number = input.ask();
        self.paused.store(true, Ordering::Relaxed);
        drop(input);
        self.remote.send(Command::AwaitReadable(Arc::clone(self), number));
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

impl Input {
    /// Begins a wait until the socket is readable. Returns its number.
    fn ask(&mut self) -> u32 {
        self.direct = Direct::Asked;
        self.asked = self.asked.wrapping_add(1);
        self.asked
    }

    /// The poller reports that the socket is readable. Returns `false` if this wait is not the last
    /// one, or if reception was resumed.
    pub(super) fn open(&mut self, number: u32) -> bool {
        let is_current = self.direct == Direct::Asked && self.asked == number;
        if is_current {
            self.direct = Direct::Open { turn_bytes: 0 };
        }
        is_current
    }
}
