//! The clients that `calls` measures. Each sends requests and gets their answers.

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use ringpoll::rpc::{Client, LengthPrefixed};
use ringpoll::{Dialer, Pollers, Slice};
use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::{Channel, Endpoint};

use crate::cli::{CallsArgs, RuntimeKind};
use crate::error::{Failure, Result};
use crate::rpc::grpc::{CONNECTION_WINDOW_BYTES, EchoCodec, PATH, STREAM_WINDOW_BYTES};

/// A client. Clones are the same client.
pub(super) trait Echo: Clone + Send + Sync + 'static {
    type Answer: AsRef<[u8]> + Send;

    /// Calls the server once.
    fn echo(&self, request: Vec<u8>) -> impl Future<Output = Result<Self::Answer>> + Send;

    /// Runs a caller.
    fn spawn(&self, caller: impl Future<Output = ()> + Send + 'static) {
        tokio::spawn(caller);
    }

    /// System calls since the start, by the client's own count; `None` of a client without one.
    fn system_calls(&self) -> Option<u64> {
        None
    }

    /// Calls that are outstanding, answers, and answers without a call; `None` of a client that
    /// does not count.
    fn counts(&self) -> Option<Counts> {
        None
    }
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Counts {
    pub(super) outstanding: usize,
    pub(super) answers: u64,
    pub(super) discarded: u64,
}

/// The client of this project, with one poller.
#[derive(Clone)]
pub(super) struct OnRingpoll {
    client: Client<LengthPrefixed>,
    pollers: Pollers,
    callers_on: RuntimeKind,
}

impl OnRingpoll {
    pub(super) fn new(args: &CallsArgs, addr: SocketAddr) -> Result<OnRingpoll> {
        let failed = || Failure::at("client ringpoll");
        let pollers = Pollers::builder().backend(args.backend).count(1).build();
        let pollers = pollers.map_err(failed())?;
        let codec = LengthPrefixed::new().with_message_bytes_max(args.size.0 as usize);
        let mut builder = Client::builder(codec)
            .dialer(Dialer::new().pollers(pollers.clone()))
            .connections(args.connections as usize);
        if let Some(timeout) = args.call_timeout {
            builder = builder.call_timeout(timeout);
        }
        if let Some(count) = args.outstanding {
            builder = builder.outstanding_max(count as usize);
        }
        let client = builder.connect(&addr.to_string()).map_err(failed())?;
        Ok(OnRingpoll { client, pollers, callers_on: args.runtime })
    }
}

impl Echo for OnRingpoll {
    type Answer = Slice;

    async fn echo(&self, request: Vec<u8>) -> Result<Slice> {
        let answer = self.client.call(Slice::from(request)).await;
        answer.map_err(|error| Failure::new(error.to_string()))
    }

    fn spawn(&self, caller: impl Future<Output = ()> + Send + 'static) {
        match self.callers_on {
            RuntimeKind::Poller => self.pollers.spawn(caller),
            RuntimeKind::OneWorker | RuntimeKind::CurrentThread => drop(tokio::spawn(caller)),
        }
    }

    fn system_calls(&self) -> Option<u64> {
        Some(self.pollers.stats().system_calls())
    }

    fn counts(&self) -> Option<Counts> {
        let stats = self.client.stats();
        Some(Counts {
            outstanding: stats.outstanding,
            answers: stats.answers,
            discarded: stats.discarded_answers,
        })
    }
}

/// The client of tonic. Its channels take turns.
#[derive(Clone)]
pub(super) struct OnTonic {
    channels: Arc<[Channel]>,
    next: Arc<AtomicUsize>,
}

impl OnTonic {
    pub(super) async fn connect(args: &CallsArgs, addr: SocketAddr) -> Result<OnTonic> {
        let endpoint = Endpoint::from_shared(format!("http://{addr}"))
            .map_err(Failure::at("client tonic"))?
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES);
        let mut channels = Vec::new();
        for _ in 0..args.connections {
            channels.push(endpoint.connect().await.map_err(Failure::at(format!("dial {addr}")))?);
        }
        Ok(OnTonic { channels: channels.into(), next: Arc::default() })
    }
}

impl Echo for OnTonic {
    type Answer = Bytes;

    async fn echo(&self, request: Vec<u8>) -> Result<Bytes> {
        let index = self.next.fetch_add(1, Ordering::Relaxed) % self.channels.len();
        let mut grpc = Grpc::new(self.channels[index].clone());
        grpc.ready().await.map_err(Failure::at("tonic: ready"))?;
        let request = tonic::Request::new(Bytes::from(request));
        let path = PathAndQuery::from_static(PATH);
        let answer = grpc.unary(request, path, EchoCodec).await;
        answer.map(tonic::Response::into_inner).map_err(Failure::at("tonic"))
    }
}

/// A client whose calls have a time limit that it has not itself.
#[derive(Clone)]
pub(super) struct Within<E>(pub(super) E, pub(super) Duration);

impl<E: Echo> Echo for Within<E> {
    type Answer = E::Answer;

    async fn echo(&self, request: Vec<u8>) -> Result<E::Answer> {
        let Within(client, limit) = self;
        let answer = tokio::time::timeout(*limit, client.echo(request)).await;
        answer.map_err(|_| Failure::new(format!("call: no answer in {limit:?}")))?
    }
}
