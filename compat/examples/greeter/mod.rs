//! What `tonic-prost-build` generates from the following definition, without the parts that are
//! not used here. So the example builds without `protoc`.
//!
//! ```protobuf
//! syntax = "proto3";
//! package greeter;
//!
//! message Hello { string name = 1; }
//! message Greeting { string text = 1; }
//!
//! service Greeter {
//!   rpc Greet(Hello) returns (Greeting);
//!   rpc GreetOften(Hello) returns (stream Greeting);
//!   rpc GreetAll(stream Hello) returns (Greeting);
//!   rpc GreetEach(stream Hello) returns (stream Greeting);
//! }
//! ```

// A program that includes this file uses one side of it.
#![allow(dead_code, unreachable_pub)]

use std::convert::Infallible;
use std::sync::Arc;

use tonic::client::Grpc as ClientGrpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::codegen::{Body, BoxFuture, Bytes, Context, Poll, Service, StdError, http};
use tonic::server::{
    ClientStreamingService, Grpc, NamedService, ServerStreamingService, StreamingService,
    UnaryService,
};
use tonic::transport::Channel;
use tonic::{IntoRequest, IntoStreamingRequest, Request, Response, Status, Streaming};
use tonic_prost::ProstCodec;

#[derive(Clone, PartialEq, prost::Message)]
pub struct Hello {
    #[prost(string, tag = "1")]
    pub name: String,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct Greeting {
    #[prost(string, tag = "1")]
    pub text: String,
}

/// Greetings that a method sends one after the other.
pub type Greetings =
    std::pin::Pin<Box<dyn tokio_stream::Stream<Item = Result<Greeting, Status>> + Send + 'static>>;

/// The methods of the service, for the server to implement.
#[tonic::async_trait]
pub trait Greeter: Send + Sync + 'static {
    async fn greet(&self, request: Request<Hello>) -> Result<Response<Greeting>, Status>;

    async fn greet_often(&self, request: Request<Hello>) -> Result<Response<Greetings>, Status>;

    async fn greet_all(
        &self,
        request: Request<Streaming<Hello>>,
    ) -> Result<Response<Greeting>, Status>;

    async fn greet_each(
        &self,
        request: Request<Streaming<Hello>>,
    ) -> Result<Response<Greetings>, Status>;
}

/// The service, for `Routes::new`.
pub struct GreeterServer<T> {
    inner: Arc<T>,
}

impl<T: Greeter> GreeterServer<T> {
    pub fn new(inner: T) -> Self {
        Self { inner: Arc::new(inner) }
    }
}

impl<T> Clone for GreeterServer<T> {
    fn clone(&self) -> Self {
        Self { inner: Arc::clone(&self.inner) }
    }
}

impl<T> NamedService for GreeterServer<T> {
    const NAME: &'static str = "greeter.Greeter";
}

impl<T, B> Service<http::Request<B>> for GreeterServer<T>
where
    T: Greeter,
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: Into<StdError> + Send + 'static,
{
    type Response = http::Response<tonic::body::Body>;
    type Error = Infallible;
    type Future = BoxFuture<Self::Response, Infallible>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<B>) -> Self::Future {
        let inner = Arc::clone(&self.inner);
        let mut grpc = Grpc::new(ProstCodec::default());
        match request.uri().path() {
            "/greeter.Greeter/Greet" => {
                Box::pin(async move { Ok(grpc.unary(Greet(inner), request).await) })
            }
            "/greeter.Greeter/GreetOften" => {
                Box::pin(async move { Ok(grpc.server_streaming(GreetOften(inner), request).await) })
            }
            "/greeter.Greeter/GreetAll" => {
                Box::pin(async move { Ok(grpc.client_streaming(GreetAll(inner), request).await) })
            }
            "/greeter.Greeter/GreetEach" => {
                Box::pin(async move { Ok(grpc.streaming(GreetEach(inner), request).await) })
            }
            _ => Box::pin(async { Ok(Status::unimplemented("").into_http()) }),
        }
    }
}

struct Greet<T>(Arc<T>);

impl<T: Greeter> UnaryService<Hello> for Greet<T> {
    type Response = Greeting;
    type Future = BoxFuture<Response<Greeting>, Status>;

    fn call(&mut self, request: Request<Hello>) -> Self::Future {
        let inner = Arc::clone(&self.0);
        Box::pin(async move { inner.greet(request).await })
    }
}

struct GreetOften<T>(Arc<T>);

impl<T: Greeter> ServerStreamingService<Hello> for GreetOften<T> {
    type Response = Greeting;
    type ResponseStream = Greetings;
    type Future = BoxFuture<Response<Greetings>, Status>;

    fn call(&mut self, request: Request<Hello>) -> Self::Future {
        let inner = Arc::clone(&self.0);
        Box::pin(async move { inner.greet_often(request).await })
    }
}

struct GreetAll<T>(Arc<T>);

impl<T: Greeter> ClientStreamingService<Hello> for GreetAll<T> {
    type Response = Greeting;
    type Future = BoxFuture<Response<Greeting>, Status>;

    fn call(&mut self, request: Request<Streaming<Hello>>) -> Self::Future {
        let inner = Arc::clone(&self.0);
        Box::pin(async move { inner.greet_all(request).await })
    }
}

struct GreetEach<T>(Arc<T>);

impl<T: Greeter> StreamingService<Hello> for GreetEach<T> {
    type Response = Greeting;
    type ResponseStream = Greetings;
    type Future = BoxFuture<Response<Greetings>, Status>;

    fn call(&mut self, request: Request<Streaming<Hello>>) -> Self::Future {
        let inner = Arc::clone(&self.0);
        Box::pin(async move { inner.greet_each(request).await })
    }
}

/// Calls the service over a channel.
#[derive(Clone)]
pub struct GreeterClient {
    inner: ClientGrpc<Channel>,
}

impl GreeterClient {
    pub fn new(channel: Channel) -> Self {
        Self { inner: ClientGrpc::new(channel) }
    }

    pub async fn greet(
        &mut self,
        request: impl IntoRequest<Hello>,
    ) -> Result<Response<Greeting>, Status> {
        let path = self.ready("/greeter.Greeter/Greet").await?;
        self.inner.unary(request.into_request(), path, ProstCodec::default()).await
    }

    pub async fn greet_often(
        &mut self,
        request: impl IntoRequest<Hello>,
    ) -> Result<Response<Streaming<Greeting>>, Status> {
        let path = self.ready("/greeter.Greeter/GreetOften").await?;
        self.inner.server_streaming(request.into_request(), path, ProstCodec::default()).await
    }

    pub async fn greet_all(
        &mut self,
        request: impl IntoStreamingRequest<Message = Hello>,
    ) -> Result<Response<Greeting>, Status> {
        let path = self.ready("/greeter.Greeter/GreetAll").await?;
        let request = request.into_streaming_request();
        self.inner.client_streaming(request, path, ProstCodec::default()).await
    }

    pub async fn greet_each(
        &mut self,
        request: impl IntoStreamingRequest<Message = Hello>,
    ) -> Result<Response<Streaming<Greeting>>, Status> {
        let path = self.ready("/greeter.Greeter/GreetEach").await?;
        let request = request.into_streaming_request();
        self.inner.streaming(request, path, ProstCodec::default()).await
    }

    async fn ready(&mut self, path: &'static str) -> Result<PathAndQuery, Status> {
        let ready = self.inner.ready().await;
        ready.map_err(|error| Status::unavailable(format!("the service is not ready: {error}")))?;
        Ok(PathAndQuery::from_static(path))
    }
}
