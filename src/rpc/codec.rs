//! How numbered messages become frames, and frames become numbered messages.
//!
//! A [`Codec`] is code of the user. It is called on the poller of a connection, or where the
//! handlers of a server run, and never under a lock. Its panic ends at most its connection.

use crate::buffer::{LinkBuffer, Slice, Writer, u32_be_length};
use crate::error::{Error, Result};

/// How numbered messages become frames, and frames become numbered messages.
///
/// A number connects an answer with its request. The client chooses the number of a request, and
/// the answer carries the same number. All connections share one codec, so it has no state of a
/// stream. A client encodes requests and decodes answers; a server decodes requests and encodes
/// answers.
///
/// ```
/// use ringpoll::buffer::{LinkBuffer, Writer};
/// use ringpoll::rpc::Codec;
/// use ringpoll::{Error, Result, Slice};
///
/// /// A message is a line: a number, a space, and text.
/// struct Lines;
///
/// impl Codec for Lines {
///     type In = String;
///     type Out = String;
///
///     fn frame_bytes_max(&self) -> usize {
///         1024
///     }
///
///     fn frame_bytes(&self, front: &[u8]) -> Result<Option<usize>> {
///         Ok(front.iter().position(|&byte| byte == b'\n').map(|index| index + 1))
///     }
///
///     fn decode(&self, frame: Slice) -> Result<(u32, String)> {
///         let line = std::str::from_utf8(&frame)?.trim_end();
///         let (number, text) = line.split_once(' ').ok_or_else(|| Error::other("no number"))?;
///         Ok((number.parse()?, text.to_owned()))
///     }
///
///     fn encode(&self, number: u32, text: String, writer: &mut LinkBuffer) -> Result<()> {
///         writer.write_copy(format!("{number} {text}\n").as_bytes())
///     }
/// }
/// # drop(Lines);
/// ```
pub trait Codec: Send + Sync + 'static {
    /// A received message.
    type In: Send + 'static;
    /// A message to send.
    type Out: Send + 'static;

    /// The largest length of a received frame, with its header, in bytes. A longer frame ends its
    /// connection with a limit error.
    fn frame_bytes_max(&self) -> usize;

    /// The length of the first frame in `front`, with its header, in bytes; `None` if more bytes
    /// are needed to tell. See [`Frames`](crate::buffer::Frames) for what `front` is.
    ///
    /// # Errors
    /// `front` does not begin with a frame. The error ends the connection.
    fn frame_bytes(&self, front: &[u8]) -> Result<Option<usize>>;

    /// Makes a number and a message of a whole frame. The frame refers to the memory in which it
    /// was received, and a message that keeps a part of the frame keeps this memory.
    ///
    /// # Errors
    /// The frame is not a message. The error ends the connection.
    fn decode(&self, frame: Slice) -> Result<(u32, Self::In)>;

    /// Writes the frame of `message`. The frames of other messages are in `writer` already.
    ///
    /// # Errors
    /// The message cannot be sent. What was written of it is dropped. On a client the error ends
    /// the call. On a server the error is treated like an error of the handler.
    fn encode(&self, number: u32, message: Self::Out, writer: &mut LinkBuffer) -> Result<()>;

    /// What [`failure`](Self::failure) needs of the frame of a request. A server calls it before
    /// the request is decoded, and keeps the result until the request is answered. By default it
    /// is empty.
    fn failure_front(&self, frame: &Slice) -> Slice {
        let _ = frame;
        Slice::new()
    }

    /// The answer that reports to a client that its request has failed with `error`. `front` is
    /// what [`failure_front`](Self::failure_front) has returned for the request.
    ///
    /// `None`, the default, is for protocols that have no such answer: an error or a panic of a
    /// handler then closes its connection.
    fn failure(&self, front: &Slice, error: &Error) -> Option<Self::Out> {
        let _ = (front, error);
        None
    }
}

/// Frames with a header of eight bytes: the length of the rest of the frame, then the number of the
/// message, each as a `u32` in big-endian. The body follows, so the length is that of the body
/// plus 4.
///
/// A message is the body as a [`Slice`]. A received body is not copied. A sent body of more than
/// 4096 bytes goes by reference.
///
/// The protocol has no answer for a request that has failed: see [`Codec::failure`]. Where clients
/// are to see errors, make them part of the body.
#[derive(Clone, Copy, Debug)]
pub struct LengthPrefixed {
    message_bytes_max: usize,
}

impl LengthPrefixed {
    /// The default limit of a message in bytes.
    pub const MESSAGE_BYTES_MAX: usize = 4 << 20;

    /// The codec with the default limit.
    pub fn new() -> LengthPrefixed {
        LengthPrefixed { message_bytes_max: Self::MESSAGE_BYTES_MAX }
    }

    /// Sets the largest length of a message in bytes, received and sent. The `read_bytes_max` of
    /// the connection limits received frames as well.
    #[must_use]
    pub fn with_message_bytes_max(mut self, bytes: usize) -> LengthPrefixed {
        self.message_bytes_max = bytes.min(u32::MAX as usize - NUMBER_BYTES);
        self
    }
}

impl Default for LengthPrefixed {
    fn default() -> LengthPrefixed {
        LengthPrefixed::new()
    }
}

impl Codec for LengthPrefixed {
    type In = Slice;
    type Out = Slice;

    fn frame_bytes_max(&self) -> usize {
        self.message_bytes_max.saturating_add(HEADER_BYTES)
    }

    #[inline]
    fn frame_bytes(&self, front: &[u8]) -> Result<Option<usize>> {
        match u32_be_length(front)? {
            Some(bytes) if bytes < HEADER_BYTES => {
                let length = bytes - LENGTH_BYTES;
                let message = format!("frame: a length of {length} has no room for a number");
                Err(Error::invalid(message))
            }
            bytes => Ok(bytes),
        }
    }

    #[inline]
    fn decode(&self, mut frame: Slice) -> Result<(u32, Slice)> {
        let number = frame.get(LENGTH_BYTES..).and_then(|rest| rest.first_chunk());
        let Some(number) = number.map(|bytes| u32::from_be_bytes(*bytes)) else {
            return Err(Error::invalid(format!("frame: {} bytes are no frame", frame.len())));
        };
        frame.advance(HEADER_BYTES);
        Ok((number, frame))
    }

    #[inline]
    fn encode(&self, number: u32, message: Slice, writer: &mut LinkBuffer) -> Result<()> {
        let bytes_max = self.message_bytes_max + NUMBER_BYTES;
        let length = length_within(message.len() + NUMBER_BYTES, bytes_max)?;
        let mut header = [0; HEADER_BYTES];
        header[..LENGTH_BYTES].copy_from_slice(&length.to_be_bytes());
        header[LENGTH_BYTES..].copy_from_slice(&number.to_be_bytes());
        writer.write_copy(&header)?;
        writer.write(message)
    }
}

/// The length field of a frame that has `bytes` behind this field.
pub(super) fn length_within(bytes: usize, bytes_max: usize) -> Result<u32> {
    let length = u32::try_from(bytes).ok().filter(|_| bytes <= bytes_max);
    length.ok_or_else(|| {
        Error::limit(format!("send: a frame of {bytes} bytes: limit is {bytes_max}"))
    })
}

pub(super) const LENGTH_BYTES: usize = size_of::<u32>();
const NUMBER_BYTES: usize = size_of::<u32>();
const HEADER_BYTES: usize = LENGTH_BYTES + NUMBER_BYTES;

#[cfg(all(test, not(loom)))]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::buffer::Reader;

    pub(in super::super) fn encoded<C: Codec>(codec: &C, number: u32, message: C::Out) -> Slice {
        let mut writer = LinkBuffer::new();
        codec.encode(number, message, &mut writer).expect("it fits");
        writer.flush().expect("memory");
        let bytes = writer.len();
        writer.next(bytes).expect("written")
    }

    /// Passes `bytes` through the codec as a connection does.
    pub(in super::super) fn decode_all<C: Codec>(codec: &C, bytes: &[u8]) -> Result<usize> {
        let mut buffer = LinkBuffer::with_block_bytes(16);
        buffer.write_copy(bytes)?;
        buffer.flush()?;
        let mut count = 0;
        loop {
            let mut frames =
                buffer.frames(codec.frame_bytes_max(), |front| codec.frame_bytes(front));
            let Some(frame) = frames.try_next()?.map(<[u8]>::to_vec) else { return Ok(count) };
            codec.decode(Slice::from(frame))?;
            count += 1;
        }
    }

    proptest! {
        #[test]
        fn a_message_comes_back_with_its_number(number: u32, body: Vec<u8>) {
            let codec = LengthPrefixed::new();
            let frame = encoded(&codec, number, Slice::from(body.clone()));
            prop_assert_eq!(codec.frame_bytes(&frame).expect("valid"), Some(frame.len()));
            prop_assert_eq!(codec.decode(frame).expect("valid"), (number, Slice::from(body)));
        }

        #[test]
        fn random_bytes_are_messages_or_an_error(bytes: Vec<u8>) {
            let codec = LengthPrefixed::new().with_message_bytes_max(64);
            // Both results are right. The call must return.
            let _ = decode_all(&codec, &bytes);
            let _ = codec.decode(Slice::from(bytes));
        }
    }

    #[test]
    fn a_length_without_room_for_a_number_and_a_long_message_are_refused() {
        let codec = LengthPrefixed::new().with_message_bytes_max(8);
        for length in 0..NUMBER_BYTES as u32 {
            let error = codec.frame_bytes(&length.to_be_bytes()).expect_err("too short");
            assert!(error.is_invalid(), "{error:?}");
        }
        let mut writer = LinkBuffer::new();
        codec.encode(1, Slice::from(b"12345678"), &mut writer).expect("as long as allowed");
        let error = codec.encode(1, Slice::from(b"123456789"), &mut writer).expect_err("too long");
        assert!(error.is_limit(), "{error:?}");
        assert_eq!(codec.frame_bytes_max(), 16);
    }

    #[test]
    fn a_body_refers_to_the_memory_of_its_frame() {
        let frame = encoded(&LengthPrefixed::new(), 7, Slice::from(b"body"));
        let start = frame.as_ptr().addr();
        let (_, body) = LengthPrefixed::new().decode(frame).expect("valid");
        assert_eq!(body.as_ptr().addr() - start, HEADER_BYTES);
    }
}
