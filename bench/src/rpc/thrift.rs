//! The Thrift service, as generated code would have it:
//!
//! ```text
//! struct Payload { 1: binary payload }
//! service Echo { Payload echo(1: Payload request) }
//! ```
//!
//! Framed, in the binary protocol. That leaves one way to write a call and a reply, so the load
//! generator compares bytes as it does with frames: `call` and `reply` are what stands around a
//! payload.

use bytes::{Buf, Bytes};
use pilota::FastStr;
use pilota::thrift::{
    ProtocolExceptionKind, TAsyncInputProtocol, TFieldIdentifier, TInputProtocol, TLengthProtocol,
    TLengthProtocolExt, TMessageIdentifier, TOutputProtocol, TOutputProtocolExt, TStructIdentifier,
    TType, ThriftException, new_protocol_exception,
};
use volo_thrift::codec::DefaultMakeCodec;
use volo_thrift::codec::default::framed::MakeFramedCodec;
use volo_thrift::codec::default::thrift::MakeThriftCodec;
use volo_thrift::codec::default::ttheader::MakeTTHeaderCodec;
use volo_thrift::context::ServerContext;
use volo_thrift::{
    ApplicationException, ApplicationExceptionKind, EntryMessage, Message, ServerError,
};

use crate::service::Service;
use crate::wire::Envelope;

/// The arguments of the method.
pub(crate) type Call = Entry<CALL_FIELD>;
/// Its result.
pub(crate) type Reply = Entry<REPLY_FIELD>;

/// A struct whose one field is a payload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Entry<const FIELD: i16>(pub(crate) Payload);

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Payload(pub(crate) Bytes);

impl Message for Payload {
    fn encode<T: TOutputProtocol>(&self, out: &mut T) -> Result<(), ThriftException> {
        out.write_struct_begin(&PAYLOAD)?;
        out.write_bytes_field(PAYLOAD_FIELD, self.0.clone())?;
        out.write_field_stop()?;
        out.write_struct_end()
    }

    fn decode<T: TInputProtocol>(input: &mut T) -> Result<Payload, ThriftException> {
        let mut payload = Payload::default();
        input.read_struct_begin()?;
        loop {
            let field = input.read_field_begin()?;
            match field.field_type {
                TType::Stop => break,
                TType::Binary if field.id == Some(PAYLOAD_FIELD) => {
                    check_length(input)?;
                    payload.0 = input.read_bytes()?;
                }
                _ => return Err(unknown_field(&field)),
            }
            input.read_field_end()?;
        }
        input.read_struct_end()?;
        Ok(payload)
    }

    async fn decode_async<T: TAsyncInputProtocol>(
        input: &mut T,
    ) -> Result<Payload, ThriftException> {
        let mut payload = Payload::default();
        input.read_struct_begin().await?;
        loop {
            let field = input.read_field_begin().await?;
            match field.field_type {
                TType::Stop => break,
                TType::Binary if field.id == Some(PAYLOAD_FIELD) => {
                    payload.0 = input.read_bytes().await?;
                }
                _ => return Err(unknown_field(&field)),
            }
            input.read_field_end().await?;
        }
        input.read_struct_end().await?;
        Ok(payload)
    }

    fn size<T: TLengthProtocol>(&self, out: &mut T) -> usize {
        out.struct_begin_len(&PAYLOAD)
            + out.bytes_field_len(Some(PAYLOAD_FIELD), &self.0)
            + out.field_stop_len()
            + out.struct_end_len()
    }
}

impl<const FIELD: i16> EntryMessage for Entry<FIELD> {
    fn encode<T: TOutputProtocol>(&self, out: &mut T) -> Result<(), ThriftException> {
        out.write_struct_begin(&ENTRY)?;
        out.write_struct_field(FIELD, &self.0, TType::Struct)?;
        out.write_field_stop()?;
        out.write_struct_end()
    }

    fn decode<T: TInputProtocol>(
        input: &mut T,
        message: &TMessageIdentifier,
    ) -> Result<Entry<FIELD>, ThriftException> {
        check_method(&message.name)?;
        let mut payload = None;
        input.read_struct_begin()?;
        loop {
            let field = input.read_field_begin()?;
            match field.field_type {
                TType::Stop => break,
                TType::Struct if field.id == Some(FIELD) => payload = Some(Payload::decode(input)?),
                _ => return Err(unknown_field(&field)),
            }
            input.read_field_end()?;
        }
        input.read_struct_end()?;
        payload.map(Entry).ok_or_else(no_payload)
    }

    async fn decode_async<T: TAsyncInputProtocol>(
        input: &mut T,
        message: &TMessageIdentifier,
    ) -> Result<Entry<FIELD>, ThriftException> {
        check_method(&message.name)?;
        let mut payload = None;
        input.read_struct_begin().await?;
        loop {
            let field = input.read_field_begin().await?;
            match field.field_type {
                TType::Stop => break,
                TType::Struct if field.id == Some(FIELD) => {
                    payload = Some(Payload::decode_async(input).await?);
                }
                _ => return Err(unknown_field(&field)),
            }
            input.read_field_end().await?;
        }
        input.read_struct_end().await?;
        payload.map(Entry).ok_or_else(no_payload)
    }

    fn size<T: TLengthProtocol>(&self, out: &mut T) -> usize {
        out.struct_begin_len(&ENTRY)
            + out.struct_field_len(Some(FIELD), &self.0)
            + out.field_stop_len()
            + out.struct_end_len()
    }
}

/// The service with its one method.
#[derive(Clone)]
pub(crate) struct EchoServer(pub(crate) Service);

impl volo::service::Service<ServerContext, Call> for EchoServer {
    type Response = Reply;
    type Error = ServerError;

    async fn call(
        &self,
        _cx: &mut ServerContext,
        Entry(Payload(payload)): Call,
    ) -> Result<Reply, ServerError> {
        Ok(Entry(Payload(self.0.reply_to(&payload))))
    }
}

/// Detects the framing of a client, and refuses calls with a longer payload.
pub(crate) fn codec(payload_bytes_max: usize) -> Codec {
    let bytes = payload_bytes_max.saturating_add(AROUND_BYTES_MAX);
    let frame_max = i32::try_from(bytes).unwrap_or(i32::MAX);
    let framed = MakeFramedCodec::new(MakeThriftCodec::new()).with_max_frame_size(frame_max);
    DefaultMakeCodec::new(MakeTTHeaderCodec::new(framed))
}

/// What volo's server has unless told otherwise.
type Codec = DefaultMakeCodec<MakeTTHeaderCodec<MakeFramedCodec<MakeThriftCodec>>>;

/// What stands around the payload of a call.
pub(crate) fn call(payload_bytes: u32) -> Envelope {
    envelope(CALL, CALL_FIELD, payload_bytes)
}

/// What stands around the payload of a reply.
pub(crate) fn reply(payload_bytes: u32) -> Envelope {
    envelope(REPLY, REPLY_FIELD, payload_bytes)
}

fn envelope(message: u32, field: i16, payload_bytes: u32) -> Envelope {
    let head_after_number = [
        &[STRUCT][..],
        &field.to_be_bytes(),
        &[BINARY],
        &PAYLOAD_FIELD.to_be_bytes(),
        &payload_bytes.to_be_bytes(),
    ];
    let head_after_number = head_after_number.concat();
    let name = [&(METHOD.len() as u32).to_be_bytes()[..], METHOD.as_bytes()].concat();
    let head_to_number = [&(VERSION | message).to_be_bytes()[..], &name].concat();
    // Both structs end.
    let tail = vec![STOP; 2];
    let number = [0; 4];
    let around = head_to_number.len() + number.len() + head_after_number.len() + tail.len();
    let length = (around as u32 + payload_bytes).to_be_bytes();
    Envelope {
        number_at: Some(length.len() + head_to_number.len()),
        head: [&length[..], &head_to_number, &number, &head_after_number].concat(),
        tail,
    }
}

/// pilota takes as many bytes as the length says, and panics where there are fewer.
fn check_length<T: TInputProtocol>(input: &mut T) -> Result<(), ThriftException> {
    let input = input.buf();
    let bytes = input.chunk().first_chunk().map(|length| i32::from_be_bytes(*length));
    let there = input.remaining().saturating_sub(4);
    match bytes.map(usize::try_from) {
        Some(Ok(bytes)) if bytes <= there => Ok(()),
        _ => Err(refusal(format!("a payload of {bytes:?} bytes, {there} are there"))),
    }
}

fn check_method(name: &FastStr) -> Result<(), ThriftException> {
    if name == METHOD {
        return Ok(());
    }
    let why = format!("no method {name}");
    Err(ApplicationException::new(ApplicationExceptionKind::UNKNOWN_METHOD, why).into())
}

/// Client and server are built together: a field that one of them does not know is a mistake.
fn unknown_field(field: &TFieldIdentifier) -> ThriftException {
    refusal(format!("unexpected field {:?} of type {:?}", field.id, field.field_type))
}

fn no_payload() -> ThriftException {
    refusal("no payload".to_owned())
}

fn refusal(why: String) -> ThriftException {
    new_protocol_exception(ProtocolExceptionKind::InvalidData, why)
}

const METHOD: &str = "echo";
const PAYLOAD: TStructIdentifier = TStructIdentifier { name: "Payload" };
const ENTRY: TStructIdentifier = TStructIdentifier { name: "EchoEntry" };
const PAYLOAD_FIELD: i16 = 1;
const CALL_FIELD: i16 = 1;
/// What a result has that is no exception.
const REPLY_FIELD: i16 = 0;

/// What a frame may have besides its payload.
const AROUND_BYTES_MAX: usize = 64;
/// Of the binary protocol.
const VERSION: u32 = 0x8001_0000;
const CALL: u32 = 1;
const REPLY: u32 = 2;
const STOP: u8 = 0;
const BINARY: u8 = 11;
const STRUCT: u8 = 12;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rpc::Protocol;
    use crate::wire::{Request, Template};
    use pilota::thrift::TMessageType;
    use pilota::thrift::binary::TBinaryProtocol;
    use volo_thrift::BytesMut;

    #[test]
    fn the_calls_of_the_load_generator_are_calls_and_replies_to_them_match() {
        for payload_bytes in [0, 1, 8, 1000] {
            let template = Template::of(Protocol::Thrift, payload_bytes);
            for heavy in [false, true] {
                let request = Request { sequence: 0x0102_0304_0506, heavy };
                let mut sent = Vec::new();
                template.append(request, &mut sent);
                let mut frame = Bytes::from(sent);
                assert_eq!(frame.get_u32() as usize, frame.len());
                let mut input = TBinaryProtocol::new(&mut frame, true);
                let message = input.read_message_begin().unwrap();
                assert_eq!(message.message_type, TMessageType::Call);
                assert_eq!(message.sequence_number, 0x0304_0506);
                let Entry(payload) = Call::decode(&mut input, &message).unwrap();
                assert!(frame.is_empty() && payload.0.len() == payload_bytes as usize);
                let number = message.sequence_number;
                let reply = TMessageIdentifier::new(METHOD.into(), TMessageType::Reply, number);
                let reply = framed(&reply, &Entry::<REPLY_FIELD>(payload));
                assert_eq!(reply.len(), template.reply_bytes());
                for index in 0..reply.len() {
                    let (front, back) = reply.split_at(index);
                    assert!(template.matches(request, 0, front), "cut {index}");
                    assert!(template.matches(request, index, back), "cut {index}");
                    let mut wrong = reply.clone();
                    wrong[index] ^= 1;
                    assert!(!template.matches(request, 0, &wrong), "byte {index}");
                }
            }
        }
    }

    #[test]
    fn a_message_comes_back_as_it_was_and_knows_its_size() {
        let message = TMessageIdentifier::new(METHOD.into(), TMessageType::Call, 9);
        let call: Call = Entry(Payload(vec![3; 50].into()));
        let mut frame = framed(&message, &call).freeze().split_off(4);
        let mut input = TBinaryProtocol::new(&mut frame, true);
        let found = input.read_message_begin().unwrap();
        assert_eq!(Call::decode(&mut input, &found).unwrap(), call);
        let size = call.size(&mut TBinaryProtocol::new((), false));
        assert_eq!(size, framed(&message, &call).len() - 4 - 4 - 4 - METHOD.len() - 4);
    }

    #[test]
    fn malformed_calls_are_refused() {
        let message =
            |name: &'static str| TMessageIdentifier::new(FastStr::new(name), TMessageType::Call, 0);
        let decode = |name, bytes: &[u8]| {
            let mut bytes = Bytes::copy_from_slice(bytes);
            Call::decode(&mut TBinaryProtocol::new(&mut bytes, true), &message(name))
        };
        let good = [STRUCT, 0, 1, BINARY, 0, 1, 0, 0, 0, 1, 7, STOP, STOP];
        assert!(decode(METHOD, &good).is_ok());
        assert!(decode("other", &good).is_err());
        // Cut short anywhere, a length too long, a negative one, other fields, no payload at all.
        for cut in 0..good.len() {
            assert!(decode(METHOD, &good[..cut]).is_err(), "cut {cut}");
        }
        for (at, wrong) in [(9, 9), (6, 0xff), (2, 2), (5, 2), (0, 8), (3, 3)] {
            let mut bad = good;
            bad[at] = wrong;
            assert!(decode(METHOD, &bad).is_err(), "byte {at}");
        }
        assert!(decode(METHOD, &[STOP]).is_err());
    }

    fn framed(message: &TMessageIdentifier, entry: &impl EntryMessage) -> BytesMut {
        let mut body = BytesMut::new();
        let mut out = TBinaryProtocol::new(&mut body, false);
        out.write_message_begin(message).unwrap();
        entry.encode(&mut out).unwrap();
        let mut frame = BytesMut::from(&(body.len() as u32).to_be_bytes()[..]);
        frame.extend_from_slice(&body);
        frame
    }
}
