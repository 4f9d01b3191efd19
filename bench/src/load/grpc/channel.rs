//! One HTTP/2 connection, and calls on it: tonic's client on hyper's connection, with nothing
//! between them that would dial again.

use std::task::{Context, Poll};

use bytes::Bytes;
use hyper::body::Incoming;
use hyper::client::conn::http2::{Builder, SendRequest};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpStream;
use tonic::body::Body;
use tonic::client::Grpc;
use tonic::codegen::http::uri::{PathAndQuery, Uri};
use tonic::codegen::{BoxFuture, Service, http};
use tonic::{Request, Status};

use crate::rpc::grpc::{CONNECTION_WINDOW_BYTES, EchoCodec, PATH, STREAM_WINDOW_BYTES};

/// Closes when the last clone is dropped.
#[derive(Clone)]
pub(super) struct Channel(SendRequest<Body>);

impl Channel {
    /// The channel, and what drives its connection to its end.
    pub(super) async fn begin(
        stream: TokioIo<TcpStream>,
    ) -> hyper::Result<(Channel, impl Future<Output = ()> + Send + 'static)> {
        let (requests, connection) = Builder::new(TokioExecutor::new())
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .handshake(stream)
            .await?;
        // How it ends is told to the calls on it.
        Ok((Channel(requests), async move { drop(connection.await) }))
    }

    pub(super) fn is_closed(&self) -> bool {
        self.0.is_closed()
    }
}

impl Service<http::Request<Body>> for Channel {
    type Response = http::Response<Incoming>;
    type Error = hyper::Error;
    type Future = BoxFuture<Self::Response, hyper::Error>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<hyper::Result<()>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        Box::pin(self.0.send_request(request))
    }
}

/// What calls the method.
#[derive(Clone)]
pub(super) struct Client(Grpc<Channel>);

impl Client {
    pub(super) fn new(channel: Channel) -> Client {
        // Nobody looks at the name: the connection is there.
        let origin = Uri::from_static("http://localhost");
        // What is compared is the payload, however long it is.
        Client(Grpc::with_origin(channel, origin).max_decoding_message_size(usize::MAX))
    }

    pub(super) async fn call(&mut self, payload: Bytes) -> Result<Bytes, Status> {
        let unavailable = |error: hyper::Error| Status::unavailable(error.to_string());
        self.0.ready().await.map_err(unavailable)?;
        let path = PathAndQuery::from_static(PATH);
        self.0.unary(Request::new(payload), path, EchoCodec).await.map(|reply| reply.into_inner())
    }
}
