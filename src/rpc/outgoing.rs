//! Messages on their way out: encoded into one batch, and flushed together.
//!
//! Clients and servers use it. The task of a connection owns it.

use std::task::{Context, Poll, ready};

use super::codec::Codec;
use crate::buffer::{LinkBuffer, Reader, Writer};
use crate::connection::WriteHalf;
use crate::error::{Error, Result};
use crate::user_code;

pub(super) struct Outgoing {
    writer: WriteHalf,
    batch: LinkBuffer,
    /// A flush is not done.
    is_flushing: bool,
}

impl Outgoing {
    pub(super) fn new(writer: WriteHalf) -> Outgoing {
        let batch = LinkBuffer::with_pool(writer.pool().clone());
        Outgoing { writer, batch, is_flushing: false }
    }

    /// Adds a message to the batch.
    ///
    /// # Errors
    /// The codec could not encode it, or has panicked. The batch is as before then.
    pub(super) fn put<C: Codec>(&mut self, codec: &C, number: u32, message: C::Out) -> Result<()> {
        let before = self.batch_bytes();
        let batch = &mut self.batch;
        let encode = || codec.encode(number, message, &mut *batch);
        let encoded = user_code::attempt("codec", encode)
            .unwrap_or_else(|panic| Err(Error::panicked(format!("codec panicked: {panic}"))));
        if encoded.is_err() {
            self.batch.truncate(before);
        }
        encoded
    }

    /// Whether the batch is as long as a batch may be.
    pub(super) fn is_full(&self) -> bool {
        self.batch_bytes() >= BATCH_BYTES
    }

    /// A codec may have flushed the buffer, and a cut flushes it.
    fn batch_bytes(&self) -> usize {
        self.batch.len() + self.batch.pending_len()
    }

    /// Sends the batch. Ready when all but a few bytes are in the kernel.
    pub(super) fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<Result<()>> {
        self.poll_flush(UNSENT_BYTES_MAX, cx)
    }

    /// Sends the batch. Ready when every byte is in the kernel.
    pub(super) fn poll_end(&mut self, cx: &mut Context<'_>) -> Poll<Result<()>> {
        self.is_flushing = true;
        self.poll_flush(0, cx)
    }

    fn poll_flush(&mut self, unsent_bytes_max: usize, cx: &mut Context<'_>) -> Poll<Result<()>> {
        if self.batch_bytes() > 0 {
            self.writer.append(self.batch.take())?;
            self.is_flushing = true;
        }
        if self.is_flushing {
            ready!(self.writer.poll_flush_within(cx, unsent_bytes_max))?;
            self.is_flushing = false;
        }
        Poll::Ready(Ok(()))
    }
}

/// No message is added to a longer batch: as much as a connection may send before others of its
/// poller get a turn is four such batches.
const BATCH_BYTES: usize = 256 << 10;

/// So many submitted bytes may wait for the kernel while the next batch is made.
const UNSENT_BYTES_MAX: usize = 256 << 10;

#[cfg(all(test, not(loom)))]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixStream;
    use std::task::Waker;

    use super::*;
    use crate::buffer::Slice;

    /// Writes its message. Then fails for `bad`, and panics for `panic`.
    struct Fails;

    impl Codec for Fails {
        type In = Slice;
        type Out = &'static str;

        fn frame_bytes_max(&self) -> usize {
            0
        }

        fn frame_bytes(&self, _: &[u8]) -> Result<Option<usize>> {
            Ok(None)
        }

        fn decode(&self, frame: Slice) -> Result<(u32, Slice)> {
            Ok((0, frame))
        }

        fn encode(&self, _: u32, message: &'static str, writer: &mut LinkBuffer) -> Result<()> {
            writer.write_copy(message.as_bytes())?;
            assert_ne!(message, "panic", "on purpose");
            if message == "flush" {
                writer.flush()?;
            }
            if message == "bad" { Err(Error::invalid("on purpose")) } else { Ok(()) }
        }
    }

    #[test]
    fn a_message_that_cannot_be_encoded_leaves_the_batch_as_it_was() {
        let (one, mut other) = UnixStream::pair().expect("sockets");
        let (_reader, writer) = crate::dial::adopt(one.into()).expect("a stream").split();
        let mut outgoing = Outgoing::new(writer);
        for message in ["bad", "one ", "bad", "two ", "panic", "flush", "bad", " three"] {
            let put = outgoing.put(&Fails, 0, message);
            assert_eq!(put.is_err(), ["bad", "panic"].contains(&message));
        }
        let mut cx = Context::from_waker(Waker::noop());
        while outgoing.poll_end(&mut cx).map(|sent| sent.expect("the peer reads")).is_pending() {
            std::thread::yield_now();
        }
        let mut received = [0; 19];
        other.read_exact(&mut received).expect("all is sent");
        assert_eq!(&received, b"one two flush three");
    }
}
