//! Messages on their way in: frames become messages with a number.
//!
//! Clients and servers use it. The task of a connection owns the reader.

use std::task::{Context, Poll, ready};

use super::codec::Codec;
use crate::buffer::Slice;
use crate::connection::ReadHalf;
use crate::error::Result;

/// The next frame. `None` if the peer has ended its stream after a whole frame.
///
/// # Errors
/// Those of `frames` of a connection.
pub(super) fn poll_frame<C: Codec>(
    codec: &C,
    reader: &mut ReadHalf,
    cx: &mut Context<'_>,
) -> Poll<Result<Option<Slice>>> {
    let length_of = |front: &[u8]| codec.frame_bytes(front);
    let mut frames = reader.frames(codec.frame_bytes_max(), length_of);
    if ready!(frames.poll_next(cx))?.is_none() {
        return Poll::Ready(Ok(None));
    }
    let bytes = frames.give_back();
    drop(frames);
    // The frame is whole, so this finds it.
    Poll::Ready(Ok(reader.try_next(bytes)))
}
