//! volo-thrift on tokio's work-stealing runtime, as its own server runs it. A task for each
//! connection, which answers one call after the other.

use std::io;
use std::net::TcpListener;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde_json::Value;
use tokio::runtime::Builder;
use volo::net::conn::Conn;
use volo::net::incoming::{Incoming, MakeIncoming};
use volo_thrift::server::Server;

use super::{Service, until_stopped};
use crate::error::{Failure, Result};
use crate::rpc::thrift::{EchoServer, codec};

/// How it is set up, for the report.
pub(super) const SETTINGS: &str = "its own server on tokio's work-stealing runtime, a worker for \
    each CPU; framed, the binary protocol";

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
        let server = Server::new(EchoServer(service)).make_codec(codec(service.frame_max));
        until_stopped(stop, server.run(Accepting { listener, count })).await
    })?;
    Ok(super::counters(accepted.load(Ordering::Relaxed), None))
}

/// The listener there is, with the backlog that all servers have.
#[derive(Debug)]
struct Accepting {
    listener: tokio::net::TcpListener,
    count: Arc<AtomicU64>,
}

impl MakeIncoming for Accepting {
    type Incoming = Accepting;

    async fn make_incoming(self) -> io::Result<Accepting> {
        Ok(self)
    }
}

impl Incoming for Accepting {
    async fn accept(&mut self) -> io::Result<Option<Conn>> {
        loop {
            if let Ok((stream, _)) = self.listener.accept().await {
                self.count.fetch_add(1, Ordering::Relaxed);
                return Ok(Some(Conn::from(stream)));
            }
            // Out of descriptors: an error would end the server, and the others go on.
            tokio::task::yield_now().await;
        }
    }
}
