//! A ringpoll server as a source of connections, for servers of other crates.
//!
//! Each connection is one run of the server's handler, which performs the TLS handshake, if any,
//! and leaves the stream in a bounded queue. The run ends there; the connection stays open until
//! its stream is dropped.

use std::fmt;
use std::io;
#[cfg(feature = "tonic")]
use std::pin::Pin;
use std::task::{Context, Poll};
use std::thread;
use std::time::Duration;

use ringpoll::{PeerAddr, Result, Server, ServerBuilder, ServerHandle};
use tokio::sync::mpsc;

use crate::TokioStream;
use crate::accepted::Accepted;
use crate::axum::{INPUT_HIGH_BYTES, INPUT_LOW_BYTES};
#[cfg(feature = "rustls")]
use crate::rustls::{Acceptor, TLS_OUTPUT_BYTES_MAX};

/// Connections that a ringpoll server has accepted.
///
/// With the feature `axum` it implements `axum::serve::Listener`, and with `tonic` it is the stream
/// that `tonic::transport::Server::serve_with_incoming` takes. The tasks that serve the connections
/// are those of axum or tonic; only their I/O is ringpoll's. If you do not need
/// these servers, `axum::serve` and `tonic::serve` of this crate save the way between the threads.
///
/// Dropping the listener stops accepting. Connections that were taken from it continue.
pub struct Listener {
    server: ServerHandle,
    accepted: mpsc::Receiver<Accepted>,
}

/// Settings of a [`Listener`].
#[must_use]
pub struct ListenerBuilder {
    server: ServerBuilder,
    queue_max: usize,
    #[cfg(feature = "rustls")]
    tls: Option<Acceptor>,
}

impl Listener {
    /// A listener on `address` (see [`ringpoll::Address`]) with default settings.
    ///
    /// # Errors
    /// Those of [`ServerBuilder::bind`].
    pub fn bind(address: &str) -> Result<Listener> {
        Listener::builder().bind(address)
    }

    /// A builder with default settings.
    pub fn builder() -> ListenerBuilder {
        ListenerBuilder {
            server: Server::builder().input_watermarks(INPUT_LOW_BYTES, INPUT_HIGH_BYTES),
            queue_max: QUEUE_MAX,
            #[cfg(feature = "rustls")]
            tls: None,
        }
    }

    /// The address, with the port that the kernel chose.
    pub fn local_addr(&self) -> PeerAddr {
        self.server.local_addr()
    }

    /// A handle of the server, for counts.
    pub fn handle(&self) -> ServerHandle {
        self.server.clone()
    }

    /// Polls for the next connection. `None`: the server has ended.
    pub fn poll_accept(&mut self, cx: &mut Context<'_>) -> Poll<Option<Accepted>> {
        self.accepted.poll_recv(cx)
    }
}

impl ListenerBuilder {
    /// Any setting of the ringpoll server. Handlers that are set here are replaced.
    pub fn server(
        mut self,
        change: impl FnOnce(ServerBuilder) -> ServerBuilder,
    ) -> ListenerBuilder {
        self.server = change(self.server);
        self
    }

    /// How many connections may be queued for the server that takes them; 1024 by default, and at
    /// least 1. More connections wait beside the queue, each as a handler that has not ended;
    /// [`ServerBuilder::connections_max`] bounds all of them.
    pub fn queue_max(mut self, count: usize) -> ListenerBuilder {
        self.queue_max = count.max(1);
        self
    }

    /// Performs a TLS handshake on each connection before it is queued.
    #[cfg(feature = "rustls")]
    pub fn rustls(mut self, acceptor: impl Into<Acceptor>) -> ListenerBuilder {
        self.tls = Some(acceptor.into());
        self
    }

    /// Binds `address` (see [`ringpoll::Address`]) and accepts.
    ///
    /// # Errors
    /// Those of [`ServerBuilder::bind`].
    pub fn bind(self, address: &str) -> Result<Listener> {
        let (sender, accepted) = mpsc::channel(self.queue_max);
        #[cfg(feature = "rustls")]
        let tls = self.tls;
        let server = self.server.on_connect(move |conn| {
            let sender = sender.clone();
            #[cfg(feature = "rustls")]
            let tls = tls.clone();
            async move {
                #[cfg(feature = "rustls")]
                let accepted = match tls {
                    Some(acceptor) => {
                        let stream = TokioStream::new(conn);
                        let stream = stream.with_output_bytes_max(TLS_OUTPUT_BYTES_MAX);
                        Accepted::over_tls(acceptor.accept(stream).await?)
                    }
                    None => Accepted::plain(TokioStream::new(conn)),
                };
                #[cfg(not(feature = "rustls"))]
                let accepted = Accepted::plain(TokioStream::new(conn));
                // Fails if the listener was dropped; the connection closes then.
                let _ = sender.send(accepted).await;
                Ok(())
            }
        });
        Ok(Listener { server: server.bind(address)?.spawn()?, accepted })
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let server = self.server.clone();
        // The shutdown waits until the last connection has ended, and blocks meanwhile.
        let end = thread::Builder::new().name("ringpoll-end".to_owned());
        if let Err(error) = end.spawn(move || server.shutdown(Duration::MAX)) {
            tracing::warn!(%error, "no thread to end a listener that was dropped");
        }
    }
}

#[cfg(feature = "axum")]
impl axum::serve::Listener for Listener {
    type Io = Accepted;
    type Addr = PeerAddr;

    async fn accept(&mut self) -> (Accepted, PeerAddr) {
        match self.accepted.recv().await {
            Some(accepted) => {
                let peer = accepted.peer_addr();
                (accepted, peer)
            }
            // The server has ended, and `axum::serve` knows no end.
            None => std::future::pending().await,
        }
    }

    fn local_addr(&self) -> io::Result<PeerAddr> {
        Ok(self.server.local_addr())
    }
}

#[cfg(feature = "tonic")]
impl futures_core::Stream for Listener {
    type Item = io::Result<Accepted>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<io::Result<Accepted>>> {
        self.get_mut().poll_accept(cx).map(|accepted| accepted.map(Ok))
    }
}

impl fmt::Debug for Listener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Listener").field(&self.server).finish()
    }
}

impl fmt::Debug for ListenerBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ListenerBuilder").field(&self.server).finish()
    }
}

/// As the backlog of a listener: a burst of connections, until tasks that take them run.
const QUEUE_MAX: usize = 1024;
