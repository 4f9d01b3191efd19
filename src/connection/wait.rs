//! Waiting for input, as futures and as polls. [`flush`](super::flush) does the same for output.
//!
//! A wait owns only the time at which it began, and a registration. A future keeps that time
//! itself, and dropping the future withdraws the registration. A poll method keeps that time in the
//! connection, from its first `Pending` to its next `Ready`. A poll method cannot know that its
//! caller has stopped polling, so its registration stays. That does no harm: it asks for one byte,
//! for one frame at most, or for output to be sent, and the next wait replaces it.

use std::borrow::Borrow;
use std::future::poll_fn;
use std::num::NonZeroU64;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use super::core::Core;
use super::input::{End, Input};
use crate::buffer::Chain;
use crate::clock::now_ns;
use crate::error::{Error, Result};
use crate::poller::timers::NEVER;
use crate::sync::{MutexGuard, lock};
use crate::user_code;

/// Waits until `reader` has `bytes`, or until nothing more will come.
pub(super) async fn fill(
    core: &Arc<Core>,
    reader: &mut Chain,
    operation: &'static str,
    bytes: usize,
) -> Result<()> {
    check_length(core, operation, bytes)?;
    let _withdraw = Withdraw(core);
    let mut began = Began::default();
    poll_fn(|cx| poll_fill(core, reader, operation, bytes, 0, &mut began, cx)).await
}

/// Polls until `reader` has a byte, or until nothing more will come.
pub(super) fn poll_readable(
    core: &Arc<Core>,
    reader: &mut Chain,
    began: &mut Began,
    cx: &Context<'_>,
) -> Poll<Result<()>> {
    let polled = poll_fill(core, reader, "readable", 1, 0, began, cx);
    if polled.is_ready() {
        began.forget();
    }
    polled
}

/// [`poll_readable`] for a reader that has room for `room_bytes`, into which it can receive by
/// itself: see [`direct`](super::direct).
pub(super) fn poll_room(
    core: &Arc<Core>,
    reader: &mut Chain,
    room_bytes: usize,
    began: &mut Began,
    cx: &Context<'_>,
) -> Poll<Result<()>> {
    let polled = poll_fill(core, reader, "read_buf", 1, room_bytes, began, cx);
    if polled.is_ready() {
        began.forget();
    }
    polled
}

/// Polls until `reader` has the `bytes` of a frame, or until nothing more will come.
pub(super) fn poll_frame(
    core: &Arc<Core>,
    reader: &mut Chain,
    bytes: usize,
    began: &mut Began,
    cx: &Context<'_>,
) -> Poll<Result<()>> {
    check_length(core, "frames", bytes)?;
    let polled = poll_fill(core, reader, "frames", bytes, 0, began, cx);
    if polled.is_ready() {
        began.forget();
    }
    polled
}

/// Waits until connecting has ended.
pub(super) async fn connected(core: &Arc<Core>) -> std::io::Result<()> {
    let _withdraw = Withdraw(core);
    poll_fn(|cx| {
        let waker = cx.waker().clone();
        let unneeded = {
            let mut input = lock(&core.input);
            if let Some(result) = input.take_dialled() {
                return Poll::Ready(result);
            }
            if core.life.is_closed() {
                return Poll::Ready(Err(std::io::ErrorKind::NotConnected.into()));
            }
            input.wait_for(usize::MAX, NEVER, waker)
        };
        user_code::discard(unneeded);
        Poll::Pending
    })
    .await
}

/// Waits until the poller has removed the connection.
pub(super) async fn removed(core: &Arc<Core>) {
    poll_fn(|cx| {
        let waker = cx.waker().clone();
        let unneeded = {
            let mut input = lock(&core.input);
            if input.removed {
                return Poll::Ready(());
            }
            input.wait_for(usize::MAX, NEVER, waker)
        };
        user_code::discard(unneeded);
        Poll::Pending
    })
    .await;
}

fn check_length(core: &Core, operation: &'static str, bytes: usize) -> Result<()> {
    let bytes_max = core.limits.read_bytes_max;
    if bytes > bytes_max {
        return Err(Error::limit(format!(
            "{operation}: {bytes} bytes are more than the {bytes_max} allowed"
        )));
    }
    Ok(())
}

/// Polls once until `reader` has `bytes`. A reader with `room_bytes` may receive by itself; other
/// reads have 0.
fn poll_fill(
    core: &Arc<Core>,
    reader: &mut Chain,
    operation: &'static str,
    bytes: usize,
    room_bytes: usize,
    began: &mut Began,
    cx: &Context<'_>,
) -> Poll<Result<()>> {
    if core.has_arrivals() {
        core.begins_part();
        let mut input = lock(&core.input);
        input.refill(reader);
        core.took_arrivals();
        if reader.len() >= bytes {
            core.follow_refill(input, bytes, room_bytes, false);
            return Poll::Ready(Ok(()));
        }
    }
    // Clone before locking: a waker's clone is user code.
    let waker = cx.waker().clone();
    let mut input = lock(&core.input);
    input.refill(reader);
    core.took_arrivals();
    let mut until_ns = NEVER;
    let done = if reader.len() >= bytes {
        Some(Ok(()))
    } else if core.life.is_closed() && !matches!(input.end, Some(End::Memory)) {
        Some(Err(Error::closed(operation)))
    } else if let Some(end) = input.end {
        Some(Err(ended(operation, end, bytes, reader.len())))
    } else {
        until_ns = core.timeouts.read.end_of_wait(|| began.at_or(now_ns));
        if core.limits.request_timeout.is_some() {
            until_ns = until_ns.min(core.timeouts.end_of_request());
        }
        // The clock is read only where there is a timeout or a deadline.
        match until_ns {
            NEVER => None,
            _ => {
                let now_ns = now_ns();
                let began_ns = began.at_or(|| now_ns);
                let waited = Duration::from_nanos(now_ns.saturating_sub(began_ns));
                (now_ns >= until_ns).then(|| Err(Error::read_timeout(operation, waited)))
            }
        }
    };
    let unneeded = match done {
        Some(_) => Some(waker),
        None => input.wait_for(bytes, until_ns, waker),
    };
    core.follow_refill(input, bytes, room_bytes, done.is_none());
    if let Some(waker) = unneeded {
        user_code::discard(waker);
    }
    match done {
        Some(done) => Poll::Ready(done),
        None => {
            core.arm(until_ns);
            Poll::Pending
        }
    }
}

impl Core {
    /// Decides who receives, after a reader that wants `bytes` has taken what was there.
    fn follow_refill(
        self: &Arc<Self>,
        input: MutexGuard<'_, Input>,
        bytes: usize,
        room_bytes: usize,
        waits: bool,
    ) {
        match room_bytes {
            0 => self.resume_if_room(input, bytes),
            _ => self.ask_if_direct(input, room_bytes, waits),
        }
    }
}

/// When a wait began, on the clock of `now_ns`. `None` until the time is needed.
#[derive(Clone, Copy, Default)]
pub(super) struct Began(Option<NonZeroU64>);

impl Began {
    /// Notes that the wait is over.
    #[inline]
    pub(super) fn forget(&mut self) {
        self.0 = None;
    }

    pub(super) fn at_or(&mut self, now_ns: impl FnOnce() -> u64) -> u64 {
        self.0.get_or_insert_with(|| NonZeroU64::MIN.saturating_add(now_ns())).get()
    }

    pub(super) fn elapsed(self, now_ns: u64) -> Duration {
        Duration::from_nanos(self.0.map_or(0, |began_ns| now_ns.saturating_sub(began_ns.get())))
    }
}

/// Withdraws a reader's registration when its future is done or dropped. A registration that stayed
/// would let the input grow to the bytes that it asks for.
pub(super) struct Withdraw<C: Borrow<Arc<Core>>>(pub(super) C);

impl<C: Borrow<Arc<Core>>> Drop for Withdraw<C> {
    fn drop(&mut self) {
        let waker = lock(&self.0.borrow().input).take_waker();
        user_code::discard(waker);
    }
}

fn ended(operation: &'static str, end: End, wanted_bytes: usize, left_bytes: usize) -> Error {
    match end {
        End::Eof => Error::eof(operation, wanted_bytes, left_bytes),
        End::Failed(kind, errno) => {
            let error = errno.map_or_else(|| kind.into(), std::io::Error::from_raw_os_error);
            Error::io(operation, error)
        }
        End::Memory => Error::limit(format!(
            "{operation}: the poller is out of memory, and {left_bytes} bytes exceed a fair share"
        )),
    }
}
