//! The gRPC service, as generated code would have it:
//!
//! ```text
//! package ringpoll.bench;
//! message Payload { bytes payload = 1; }
//! service Echo { rpc Echo(Payload) returns (Payload); }
//! ```
//!
//! `EchoServer` answers requests of whatever carries HTTP/2. The settings of HTTP/2 are those of
//! both sides.

use std::convert::Infallible;
use std::future::{Ready, ready};
use std::task::{Context, Poll};

use bytes::{Buf, Bytes};
use prost::DecodeError;
use prost::encoding::{self, DecodeContext};
use tonic::body::Body;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::codegen::{BoxFuture, StdError, http};
use tonic::server::Grpc;
use tonic::{Request, Response, Status};

use crate::service::Service;

/// Messages are their payload.
#[derive(Clone, Copy, Default)]
pub(crate) struct EchoCodec;

impl Codec for EchoCodec {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = EchoCodec;
    type Decoder = EchoCodec;

    fn encoder(&mut self) -> EchoCodec {
        *self
    }

    fn decoder(&mut self) -> EchoCodec {
        *self
    }
}

impl Encoder for EchoCodec {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, payload: Bytes, out: &mut EncodeBuf<'_>) -> Result<(), Status> {
        // A field that has its default value is not sent.
        if !payload.is_empty() {
            out.reserve(encoding::bytes::encoded_len(PAYLOAD, &payload));
            encoding::bytes::encode(PAYLOAD, &payload, out);
        }
        Ok(())
    }
}

impl Decoder for EchoCodec {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, input: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        payload_of(input).map(Some).map_err(|error| Status::invalid_argument(error.to_string()))
    }
}

/// The payload of a message, which may have fields that later versions know.
fn payload_of(input: &mut impl Buf) -> Result<Bytes, DecodeError> {
    let mut payload = Bytes::new();
    while input.has_remaining() {
        let context = DecodeContext::default();
        match encoding::decode_key(input)? {
            (PAYLOAD, wire_type) => {
                encoding::bytes::merge(wire_type, &mut payload, input, context)?;
            }
            (tag, wire_type) => encoding::skip_field(wire_type, tag, input, context)?,
        }
    }
    Ok(payload)
}

/// How many bytes a message with that payload takes, with what gRPC puts before it.
pub(crate) fn message_bytes(payload: &Bytes) -> usize {
    let field = encoding::bytes::encoded_len(PAYLOAD, payload);
    PREFIX_BYTES + if payload.is_empty() { 0 } else { field }
}

/// The service with its one method.
#[derive(Clone)]
pub(crate) struct EchoServer {
    service: Service,
}

impl EchoServer {
    pub(crate) fn new(service: Service) -> EchoServer {
        EchoServer { service }
    }
}

impl<B> tonic::codegen::Service<http::Request<B>> for EchoServer
where
    B: tonic::codegen::Body + Send + 'static,
    B::Error: Into<StdError> + Send + 'static,
{
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<http::Response<Body>, Infallible>;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<B>) -> Self::Future {
        if request.uri().path() != PATH {
            let refusal = Status::unimplemented(format!("no method {}", request.uri().path()));
            return Box::pin(ready(Ok(refusal.into_http())));
        }
        let service = self.service;
        Box::pin(async move {
            let bytes_max = service.frame_max.saturating_add(FIELD_BYTES_MAX);
            let mut grpc = Grpc::new(EchoCodec).max_decoding_message_size(bytes_max);
            Ok(grpc.unary(EchoMethod(service), request).await)
        })
    }
}

struct EchoMethod(Service);

impl tonic::codegen::Service<Request<Bytes>> for EchoMethod {
    type Response = Response<Bytes>;
    type Error = Status;
    type Future = Ready<Result<Response<Bytes>, Status>>;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), Status>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Bytes>) -> Self::Future {
        ready(Ok(Response::new(self.0.reply_to(request.get_ref()))))
    }
}

pub(crate) const PATH: &str = "/ringpoll.bench.Echo/Echo";
/// The field's tag.
const PAYLOAD: u32 = 1;
/// A flag and a length.
const PREFIX_BYTES: usize = 5;
/// A tag and a length, at most.
const FIELD_BYTES_MAX: usize = 11;

/// What may be on its way without the receiver's leave, on a stream and on a connection: more than
/// the 64 KiB of HTTP/2, which make large messages wait.
pub(crate) const STREAM_WINDOW_BYTES: u32 = 1 << 20;
pub(crate) const CONNECTION_WINDOW_BYTES: u32 = 4 << 20;
/// Requests in flight on a connection: as many as an open loop of `load` has.
pub(crate) const STREAMS_MAX: u32 = 1024;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_those_of_protocol_buffers() {
        // Field 1, two bytes of length, 300 bytes.
        let known = [&[0x0a, 0xac, 0x02][..], &[7; 300]].concat();
        assert_eq!(payload_of(&mut &known[..]).unwrap(), vec![7; 300]);
        assert_eq!(message_bytes(&vec![7; 300].into()), PREFIX_BYTES + known.len());
        assert_eq!(payload_of(&mut &[][..]).unwrap(), Bytes::new());
        assert_eq!(message_bytes(&Bytes::new()), PREFIX_BYTES);
        // Field 2 as a number, then the payload.
        assert_eq!(payload_of(&mut &[0x10, 5, 0x0a, 1, 9][..]).unwrap(), vec![9]);
    }

    #[test]
    fn malformed_messages_are_refused() {
        // A length beyond the end, a payload that is a number, a tag without a value, no tag.
        for input in [&[0x0a, 5, 1][..], &[0x08, 5], &[0x0a], &[0x00, 1], &[0xff; 12]] {
            assert!(payload_of(&mut &input[..]).is_err(), "{input:?}");
        }
    }
}
