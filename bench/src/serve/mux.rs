//! The scenario mux: the requests of a connection are served side by side, and answered in any
//! order.

use ringpoll::buffer::{LinkBuffer, Writer, u32_be_length};
use ringpoll::rpc::{CallLimits, Codec, serve_calls_within};
use ringpoll::{Handle, Result, ServerBuilder, Slice};

use crate::wire::{HEADER_BYTES, REQUESTS_MAX};

pub(super) fn serve(server: ServerBuilder, frame_max: usize) -> ServerBuilder {
    // A peer that sends and does not read must not fill this process with its requests.
    let limits = CallLimits::new().per_connection(REQUESTS_MAX);
    server.on_connect(serve_calls_within(limits, Frames { frame_max }, echo))
}

/// Composes the reply in a buffer of its own, as a server does that computes it.
async fn echo(frame: Slice, _: Handle) -> Result<Vec<u8>> {
    Ok(frame.to_vec())
}

/// The number of a request is a part of its payload, which the reply repeats. So a message here is
/// a whole frame, and needs no other number.
struct Frames {
    frame_max: usize,
}

impl Codec for Frames {
    type In = Slice;
    type Out = Vec<u8>;

    fn frame_bytes_max(&self) -> usize {
        HEADER_BYTES + self.frame_max
    }

    fn frame_bytes(&self, front: &[u8]) -> Result<Option<usize>> {
        u32_be_length(front)
    }

    fn decode(&self, frame: Slice) -> Result<(u32, Slice)> {
        Ok((0, frame))
    }

    fn encode(&self, _: u32, frame: Vec<u8>, writer: &mut LinkBuffer) -> Result<()> {
        writer.write(frame)
    }
}
