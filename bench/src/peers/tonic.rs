//! tonic: gRPC on hyper's HTTP/2 and tokio's work-stealing runtime, as its own server runs it. A
//! task for each connection, and one for each request.

use std::net::TcpListener;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use futures_util::stream;
use serde_json::Value;
use tokio::runtime::Builder;
use tonic::transport::Server;

use super::{Service, until_stopped};
use crate::error::{Failure, Result};
use crate::rpc::grpc::{CONNECTION_WINDOW_BYTES, EchoServer, STREAM_WINDOW_BYTES, STREAMS_MAX};

/// How it is set up, for the report.
pub(super) const SETTINGS: &str = "its own server on tokio's work-stealing runtime, a worker for \
    each CPU; windows of 1 MiB a stream and 4 MiB a connection, 1024 streams";

pub(super) fn serve(
    listener: TcpListener,
    stop: UnixStream,
    service: Service,
    threads: usize,
) -> Result<Value> {
    let runtime = Builder::new_multi_thread().worker_threads(threads).enable_all().build();
    let runtime = runtime.map_err(Failure::at("start tokio"))?;
    let accepted = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&accepted);
    runtime.block_on(async move {
        let listener =
            tokio::net::TcpListener::from_std(listener).map_err(Failure::at("listener"))?;
        // An error is the client's, or ends when a descriptor is free; tonic goes on after it.
        let incoming = stream::poll_fn(move |cx| {
            listener.poll_accept(cx).map(|accepted| {
                count.fetch_add(u64::from(accepted.is_ok()), Ordering::Relaxed);
                Some(accepted.map(|(stream, _)| stream))
            })
        });
        let server = Server::builder()
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .max_concurrent_streams(STREAMS_MAX)
            .serve_with_incoming(EchoServer::new(service), incoming);
        until_stopped(stop, server).await
    })?;
    Ok(super::counters(accepted.load(Ordering::Relaxed), None))
}
