//! Thrift messages in the framed transport.
//!
//! Only the header of a message is read: protocol, type, name, sequence number. The formats are
//! those of `doc/specs/thrift-binary-protocol.md` and `thrift-compact-protocol.md` in Apache
//! Thrift.

use super::codec::{Codec, LENGTH_BYTES, length_within};
use crate::buffer::{LinkBuffer, Slice, Writer, u32_be_length};
use crate::error::{Error, Result};

/// Thrift messages in the framed transport: four bytes of length in big-endian, then the message.
///
/// The protocol of each message is read from its first bytes: binary, strict or not, or compact. A
/// message is a [`Slice`] of the whole message without the length, as a Thrift library writes and
/// reads it. The number is the *sequence number* of the message. [`encode`](Codec::encode) puts the
/// number of the call in the place of the sequence number that the message was made with.
///
/// A request that has failed is answered by a `TApplicationException` of the type internal error,
/// in the protocol and with the name of the request. An answer of the type exception is an answer
/// like any other to the client: the code that reads the message tells it.
///
/// Requests of the type *oneway* have no answer, so they are refused in both directions.
#[derive(Clone, Copy, Debug)]
pub struct FramedThrift {
    message_bytes_max: usize,
}

impl FramedThrift {
    /// The default limit of a message in bytes. It is the default limit of a frame in Apache
    /// Thrift.
    pub const MESSAGE_BYTES_MAX: usize = 16_384_000;

    /// The codec with the default limit.
    pub fn new() -> FramedThrift {
        FramedThrift { message_bytes_max: Self::MESSAGE_BYTES_MAX }
    }

    /// Sets the largest length of a message in bytes, received and sent. The `read_bytes_max` of
    /// the connection limits received frames as well.
    #[must_use]
    pub fn with_message_bytes_max(mut self, bytes: usize) -> FramedThrift {
        self.message_bytes_max = bytes.min(u32::MAX as usize);
        self
    }
}

impl Default for FramedThrift {
    fn default() -> FramedThrift {
        FramedThrift::new()
    }
}

impl Codec for FramedThrift {
    type In = Slice;
    type Out = Slice;

    fn frame_bytes_max(&self) -> usize {
        self.message_bytes_max.saturating_add(LENGTH_BYTES)
    }

    #[inline]
    fn frame_bytes(&self, front: &[u8]) -> Result<Option<usize>> {
        u32_be_length(front)
    }

    fn decode(&self, mut frame: Slice) -> Result<(u32, Slice)> {
        frame.advance(LENGTH_BYTES.min(frame.len()));
        let header = Header::read(&frame)?;
        Ok((header.number, frame))
    }

    fn encode(&self, number: u32, message: Slice, writer: &mut LinkBuffer) -> Result<()> {
        let header = Header::read(&message)?;
        let mut patch = Bytes::default();
        match header.protocol {
            Protocol::Compact => patch.varint(number),
            Protocol::Strict | Protocol::Old => patch.put(&number.to_be_bytes()),
        }
        let (at, end) = (header.number_at, header.number_end);
        let bytes = message.len() - (end - at) + patch.len;
        let length = length_within(bytes, self.message_bytes_max)?;
        writer.write_copy(&length.to_be_bytes())?;
        writer.write_copy(&message[..at])?;
        writer.write_copy(patch.as_slice())?;
        let mut rest = message;
        rest.advance(end);
        writer.write(rest)
    }

    /// The header of the request, which has its protocol and its name.
    fn failure_front(&self, frame: &Slice) -> Slice {
        let Some(message) = frame.get(LENGTH_BYTES..) else { return Slice::new() };
        match Header::read(message) {
            Ok(header) => frame.slice(LENGTH_BYTES..LENGTH_BYTES + header.header_end),
            Err(_) => Slice::new(),
        }
    }

    fn failure(&self, front: &Slice, error: &Error) -> Option<Slice> {
        let header = Header::read(front).ok()?;
        let name = &front[header.name_at..header.name_at + header.name_bytes];
        // A message of any length fits into the frame with the name.
        let text = error.to_string();
        let mut bytes = text.len().min(FAILURE_TEXT_BYTES_MAX);
        while !text.is_char_boundary(bytes) {
            bytes -= 1;
        }
        Some(Slice::from(exception(header.protocol, name, &text.as_bytes()[..bytes])))
    }
}

/// A `TApplicationException` with the sequence number 0.
fn exception(protocol: Protocol, name: &[u8], text: &[u8]) -> Vec<u8> {
    let mut message = Vec::with_capacity(name.len() + text.len() + 64);
    match protocol {
        Protocol::Compact => {
            message.extend([COMPACT_ID, EXCEPTION << COMPACT_TYPE_SHIFT | COMPACT_VERSION, 0]);
            put_varint(&mut message, name.len() as u32);
            message.extend(name);
            // The field 1, a binary.
            message.push(0x18);
            put_varint(&mut message, text.len() as u32);
            message.extend(text);
            // The field 2, an i32 in zigzag form.
            message.extend([0x15, INTERNAL_ERROR << 1]);
        }
        Protocol::Strict | Protocol::Old => {
            if protocol == Protocol::Strict {
                message.extend([STRICT_VERSION[0], STRICT_VERSION[1], 0, EXCEPTION]);
            }
            message.extend((name.len() as u32).to_be_bytes());
            message.extend(name);
            if protocol == Protocol::Old {
                message.push(EXCEPTION);
            }
            message.extend([0; 4]);
            // The field 1, a string.
            message.extend([11, 0, 1]);
            message.extend((text.len() as u32).to_be_bytes());
            message.extend(text);
            // The field 2, an i32.
            message.extend([8, 0, 2, 0, 0, 0, INTERNAL_ERROR]);
        }
    }
    message.push(0); // the end of the struct
    message
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Protocol {
    /// Binary, with a version.
    Strict,
    /// Binary, without a version.
    Old,
    Compact,
}

/// Where the parts of a message header stand.
struct Header {
    protocol: Protocol,
    number: u32,
    number_at: usize,
    number_end: usize,
    name_at: usize,
    name_bytes: usize,
    header_end: usize,
}

impl Header {
    fn read(message: &[u8]) -> Result<Header> {
        let mut cursor = Cursor { bytes: message, at: 0 };
        let header = match message.first() {
            Some(&COMPACT_ID) => Header::compact(&mut cursor),
            Some(first) if first & 0x80 != 0 => Header::strict(&mut cursor),
            Some(_) => Header::old(&mut cursor),
            None => None,
        };
        header.ok_or_else(|| {
            let front = message[..message.len().min(16)].escape_ascii();
            let bytes = message.len();
            Error::invalid(format!("thrift: no message that has an answer: {bytes} bytes, {front}"))
        })
    }

    /// `80 01 00 type · name length i32 · name · sequence number i32`.
    fn strict(cursor: &mut Cursor<'_>) -> Option<Header> {
        let [a, b, _, kind] = cursor.take::<4>()?;
        ([a, b] == STRICT_VERSION && has_answer(kind)).then_some(())?;
        let (name_at, name_bytes) = cursor.name()?;
        Header::with_number(cursor, Protocol::Strict, name_at, name_bytes)
    }

    /// `name length i32 · name · type · sequence number i32`.
    fn old(cursor: &mut Cursor<'_>) -> Option<Header> {
        let (name_at, name_bytes) = cursor.name()?;
        let [kind] = cursor.take::<1>()?;
        has_answer(kind).then_some(())?;
        Header::with_number(cursor, Protocol::Old, name_at, name_bytes)
    }

    fn with_number(
        cursor: &mut Cursor<'_>,
        protocol: Protocol,
        name_at: usize,
        name_bytes: usize,
    ) -> Option<Header> {
        let number_at = cursor.at;
        let number = u32::from_be_bytes(cursor.take()?);
        let (number_end, header_end) = (cursor.at, cursor.at);
        Some(Header { protocol, number, number_at, number_end, name_at, name_bytes, header_end })
    }

    /// `82 · type and version · sequence number varint · name length varint · name`.
    fn compact(cursor: &mut Cursor<'_>) -> Option<Header> {
        let [_, kind] = cursor.take::<2>()?;
        let is_known = kind & COMPACT_VERSION_MASK == COMPACT_VERSION;
        (is_known && has_answer(kind >> COMPACT_TYPE_SHIFT)).then_some(())?;
        let number_at = cursor.at;
        let number = cursor.varint()?;
        let number_end = cursor.at;
        let name_bytes = cursor.varint()? as usize;
        let name_at = cursor.at;
        cursor.skip(name_bytes)?;
        let header_end = cursor.at;
        let protocol = Protocol::Compact;
        Some(Header { protocol, number, number_at, number_end, name_at, name_bytes, header_end })
    }
}

/// Whether a message of this type is a request that has an answer, or an answer.
fn has_answer(kind: u8) -> bool {
    matches!(kind, CALL | REPLY | EXCEPTION)
}

struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Cursor<'_> {
    fn take<const LEN: usize>(&mut self) -> Option<[u8; LEN]> {
        let taken = *self.bytes.get(self.at..)?.first_chunk()?;
        self.at += LEN;
        Some(taken)
    }

    fn skip(&mut self, bytes: usize) -> Option<()> {
        (bytes <= self.bytes.len() - self.at).then(|| self.at += bytes)
    }

    /// A name behind its length. Returns where it begins, and its length.
    fn name(&mut self) -> Option<(usize, usize)> {
        let bytes = u32::from_be_bytes(self.take()?) as usize;
        let at = self.at;
        self.skip(bytes)?;
        Some((at, bytes))
    }

    fn varint(&mut self) -> Option<u32> {
        let mut value = 0_u64;
        for index in 0..VARINT_BYTES_MAX {
            let [byte] = self.take::<1>()?;
            value |= u64::from(byte & 0x7f) << (7 * index);
            if byte & 0x80 == 0 {
                return u32::try_from(value).ok();
            }
        }
        None
    }
}

/// A few bytes on the stack.
#[derive(Default)]
struct Bytes {
    bytes: [u8; VARINT_BYTES_MAX],
    len: usize,
}

impl Bytes {
    fn put(&mut self, bytes: &[u8]) {
        self.bytes[self.len..self.len + bytes.len()].copy_from_slice(bytes);
        self.len += bytes.len();
    }

    fn varint(&mut self, mut value: u32) {
        while value >= 0x80 {
            self.put(&[value as u8 | 0x80]);
            value >>= 7;
        }
        self.put(&[value as u8]);
    }

    fn as_slice(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

fn put_varint(message: &mut Vec<u8>, value: u32) {
    let mut bytes = Bytes::default();
    bytes.varint(value);
    message.extend(bytes.as_slice());
}

const CALL: u8 = 1;
const REPLY: u8 = 2;
const EXCEPTION: u8 = 3;

/// The type of a `TApplicationException`.
const INTERNAL_ERROR: u8 = 6;

const STRICT_VERSION: [u8; 2] = [0x80, 0x01];
const COMPACT_ID: u8 = 0x82;
const COMPACT_VERSION: u8 = 1;
const COMPACT_VERSION_MASK: u8 = 0x1f;
const COMPACT_TYPE_SHIFT: u32 = 5;

/// The bytes of the longest varint of 32 bits.
const VARINT_BYTES_MAX: usize = 5;

/// The text of an error that a client gets is cut after this many bytes. Messages of errors are
/// shorter, unless an error of the user repeats data of its request.
const FAILURE_TEXT_BYTES_MAX: usize = 4096;

#[cfg(all(test, not(loom)))]
mod tests {
    use proptest::prelude::*;

    use super::super::codec::tests::{decode_all, encoded};
    use super::*;

    const PROTOCOLS: [Protocol; 3] = [Protocol::Strict, Protocol::Old, Protocol::Compact];

    fn message(protocol: Protocol, kind: u8, name: &str, number: u32, body: &[u8]) -> Vec<u8> {
        let mut message = Vec::new();
        let length = (name.len() as u32).to_be_bytes();
        match protocol {
            Protocol::Strict => {
                message.extend([0x80, 1, 0, kind]);
                message.extend(length);
                message.extend(name.as_bytes());
                message.extend(number.to_be_bytes());
            }
            Protocol::Old => {
                message.extend(length);
                message.extend(name.as_bytes());
                message.push(kind);
                message.extend(number.to_be_bytes());
            }
            Protocol::Compact => {
                message.extend([0x82, kind << 5 | 1]);
                put_varint(&mut message, number);
                put_varint(&mut message, name.len() as u32);
                message.extend(name.as_bytes());
            }
        }
        message.extend(body);
        message
    }

    fn protocols() -> impl Strategy<Value = Protocol> {
        prop::sample::select(&PROTOCOLS[..])
    }

    proptest! {
        #[test]
        fn the_number_of_a_message_is_replaced_and_nothing_else(
            protocol in protocols(), kind in 1_u8..=3, name in "[a-z]{0,200}",
            old: u32, new: u32, body: Vec<u8>,
        ) {
            let codec = FramedThrift::new();
            let made = Slice::from(message(protocol, kind, &name, old, &body));
            let frame = encoded(&codec, new, made);
            prop_assert_eq!(codec.frame_bytes(&frame).expect("valid"), Some(frame.len()));
            let (number, read) = codec.decode(frame).expect("valid");
            prop_assert_eq!(number, new);
            prop_assert_eq!(read, message(protocol, kind, &name, new, &body));
        }

        #[test]
        fn random_bytes_are_messages_or_an_error(mut bytes: Vec<u8>, start in 0_usize..4) {
            let codec = FramedThrift::new().with_message_bytes_max(64);
            let starts: [&[u8]; 4] = [&[], &[0x80, 1, 0, 1], &[0x82, 0x21], &[0, 0, 0, 2]];
            bytes.splice(..0, starts[start].iter().copied());
            let length = (bytes.len() as u32).to_be_bytes();
            let framed = Slice::from([&length, &bytes[..]].concat());
            // Both results are right. The calls must return.
            let _ = decode_all(&codec, &bytes);
            let _ = codec.failure_front(&framed);
            let _ = codec.decode(framed);
        }

        #[test]
        fn a_failure_has_the_protocol_and_the_name_of_its_request(
            protocol in protocols(), name in "[a-z]{0,200}", number: u32,
        ) {
            let codec = FramedThrift::new();
            let request = Slice::from(message(protocol, CALL, &name, number, b"\0"));
            let frame = encoded(&codec, number, request);
            let front = codec.failure_front(&frame);
            let answer = codec.failure(&front, &Error::other("on purpose")).expect("it has one");
            let (_, answer) = codec.decode(encoded(&codec, number, answer)).expect("valid");
            let wanted = message(protocol, EXCEPTION, &name, number, &fields(protocol));
            prop_assert_eq!(answer, wanted);
        }
    }

    /// The struct of the exception in the test above, written by hand.
    fn fields(protocol: Protocol) -> Vec<u8> {
        match protocol {
            Protocol::Compact => b"\x18\x0aon purpose\x15\x0c\0".to_vec(),
            _ => b"\x0b\0\x01\0\0\0\x0aon purpose\x08\0\x02\0\0\0\x06\0".to_vec(),
        }
    }

    #[test]
    fn the_text_of_a_failure_is_cut_between_two_characters() {
        let frame = Slice::from(b"\0\0\0\x10\x80\x01\0\x01\0\0\0\x03run\0\0\0\x01\0".to_vec());
        let front = FramedThrift::new().failure_front(&frame);
        let error = Error::invalid(format!("x{}", "é".repeat(FAILURE_TEXT_BYTES_MAX)));
        let answer = FramedThrift::new().failure(&front, &error).expect("it has one");
        // The header, a field of a text, a field of a number, and the end of the struct.
        let text = &answer[4 + 4 + 3 + 4 + 3 + 4..answer.len() - 8];
        assert_eq!(text.len(), FAILURE_TEXT_BYTES_MAX - 1);
        assert!(std::str::from_utf8(text).is_ok());
    }

    #[test]
    fn a_oneway_request_and_an_unknown_version_are_refused() {
        for protocol in PROTOCOLS {
            for kind in [0, 4, 5] {
                let bytes = message(protocol, kind, "ping", 7, b"\0");
                assert!(Header::read(&bytes).is_err_and(|error| error.is_invalid()));
            }
        }
        assert!(Header::read(b"\x80\x02\0\x01\0\0\0\0\0\0\0\x01").is_err());
        assert!(Header::read(b"\x82\x22\0\0").is_err());
        assert!(Header::read(b"").is_err());
    }
}
