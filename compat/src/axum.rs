//! axum applications on ringpoll: one call in the place of `axum::serve`.
//!
//! [`serve`] runs each connection as one handler of a [`ringpoll::Server`]: hyper reads and writes
//! on the thread that polls the connection, and nothing is passed between threads for a request.
//! [`Listener`] is for programs that keep `axum::serve`: a ringpoll server accepts the connections,
//! and tasks of tokio serve them.
//!
//! ```no_run
//! use axum::{Router, routing::get};
//!
//! #[tokio::main]
//! async fn main() -> ringpoll::Result<()> {
//!     let router = Router::new().route("/", get(|| async { "hello" }));
//!     ringpoll_compat::axum::serve("0.0.0.0:8080", router).await
//! }
//! ```

mod connection;
mod head;
mod peer;
mod shutdown;

use std::convert::Infallible;
use std::fmt;
use std::future::{Future, IntoFuture};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::Request;
use axum::response::Response;
use hyper::server::conn::{http1, http2};
use ringpoll::ServerHandle;
use ringpoll::{Backend, Connection, PeerAddr, Placement, Result, Server, ServerBuilder};
use tower::Service;

use crate::HyperExecutor;
#[cfg(feature = "rustls")]
use crate::rustls::Acceptor;

pub use self::peer::Peer;
pub use crate::accepted::Accepted;
pub use crate::listener::{Listener, ListenerBuilder};
use connection::Http;

/// Serves `make_service` on `address` (see [`ringpoll::Address`]).
///
/// `make_service` is what `axum::serve` takes: a `Router`, a `MethodRouter`, or what
/// `into_make_service` and `into_make_service_with_connect_info` return. The connect info may be a
/// [`Peer`], a [`PeerAddr`], a [`SocketAddr`](std::net::SocketAddr), or a type of the user that
/// implements `Connected<Peer>`.
///
/// Awaiting the returned value binds and serves:
///
/// ```no_run
/// use axum::{Router, extract::ConnectInfo, routing::get};
/// use ringpoll::PeerAddr;
///
/// # async fn interrupted() {}
/// # async fn run() -> ringpoll::Result<()> {
/// let router = Router::new().route(
///     "/",
///     get(|ConnectInfo(peer): ConnectInfo<PeerAddr>| async move { peer.to_string() }),
/// );
/// let app = router.into_make_service_with_connect_info::<PeerAddr>();
/// ringpoll_compat::axum::serve("0.0.0.0:8080", app)
///     .connections_max(10_000)
///     .with_graceful_shutdown(interrupted())
///     .await
/// # }
/// ```
pub fn serve<M, S>(address: &str, make_service: M) -> Serve
where
    M: Service<Peer, Response = S, Error = Infallible> + Clone + Send + Sync + 'static,
    M::Future: Send,
    S: Service<Request, Response = Response, Error = Infallible> + Clone + Send + 'static,
    S::Future: Send,
{
    let handler = move |conn: Connection, http: Arc<Http>| -> Run {
        Box::pin(connection::serve(conn, make_service.clone(), http))
    };
    Serve {
        address: address.to_owned(),
        handler: Box::new(handler),
        server: Server::builder().input_watermarks(INPUT_LOW_BYTES, INPUT_HIGH_BYTES),
        http: Http::default(),
        signal: None,
        shutdown_timeout: SHUTDOWN_TIMEOUT,
    }
}

/// A server that is not bound yet, made by [`serve`]. Its methods are settings; awaiting it binds
/// and serves.
///
/// * **Where handlers run.** The connection, its requests and its HTTP/2 streams run where
///   [`placement`](Self::placement) says; the default is [`Placement::Auto`]. If `serve` is awaited
///   in a tokio runtime, handlers are inside the context of this runtime, so `tokio::time`,
///   `tokio::spawn` and clients built on tokio work in them.
/// * **Versions.** HTTP/1 and HTTP/2 on one port: the first bytes tell which. With TLS, ALPN tells.
///   Upgrades, such as WebSockets, work with both.
/// * **Bounds.** A peer has [`header_timeout`](Self::header_timeout) to send the head of a request.
///   [`connections_max`](Self::connections_max) bounds connections, and
///   [`TokioStream`](crate::TokioStream) the memory for a peer that does not read.
/// * **Ends.** It serves until the signal of
///   [`with_graceful_shutdown`](Self::with_graceful_shutdown), a [`ServerHandle`], or the failure
///   of a listener ends it. Dropping the future stops the server and cuts its connections.
/// * **Panics.** A handler that panics ends its own HTTP/1 connection, or its own HTTP/2 stream.
#[must_use = "a server does nothing until it is awaited"]
pub struct Serve {
    address: String,
    handler: Box<Handler>,
    server: ServerBuilder,
    http: Http,
    signal: Option<Signal>,
    shutdown_timeout: Duration,
}

type Run = Pin<Box<dyn Future<Output = Result<()>> + Send>>;
type Handler = dyn Fn(Connection, Arc<Http>) -> Run + Send + Sync;
type Signal = Pin<Box<dyn Future<Output = ()> + Send>>;

impl Serve {
    /// Ends the server when `signal` completes. The server stops accepting, connections without a
    /// request end at once, and requests that have begun are answered, until
    /// [`shutdown_timeout`](Self::shutdown_timeout).
    pub fn with_graceful_shutdown(
        mut self,
        signal: impl Future<Output = ()> + Send + 'static,
    ) -> Serve {
        self.signal = Some(Box::pin(signal));
        self
    }

    /// How long a graceful shutdown waits for requests and for upgraded connections. After it the
    /// remaining connections are cut. The default is 30 s.
    pub fn shutdown_timeout(mut self, timeout: Duration) -> Serve {
        self.shutdown_timeout = timeout;
        self
    }

    /// The kernel interface of the pollers.
    pub fn backend(self, backend: Backend) -> Serve {
        self.server(|server| server.backend(backend))
    }

    /// Where connections and their requests run.
    pub fn placement(self, placement: Placement) -> Serve {
        self.server(|server| server.placement(placement))
    }

    /// The largest number of open connections. Further connections are accepted and closed at once.
    pub fn connections_max(self, count: usize) -> Serve {
        self.server(|server| server.connections_max(count))
    }

    /// Any setting of the ringpoll server: pollers, CPUs, socket options, limits, callbacks. The
    /// handlers are set by [`serve`], which replaces handlers that are set here.
    ///
    /// A read timeout or an idle timeout that is set here also limits how long a handler may
    /// compute, because hyper reads meanwhile to see that the client has gone.
    pub fn server(mut self, change: impl FnOnce(ServerBuilder) -> ServerBuilder) -> Serve {
        self.server = change(self.server);
        self
    }

    /// How long a peer may take for the head of an HTTP/1 request, and how long it may leave a kept
    /// connection without one; also for the first bytes of an HTTP/2 connection. Zero means no
    /// limit. The default is 30 s.
    ///
    /// The time does not begin before the last answer is written and the body of its request is
    /// read. An answer that waits for a peer that does not read is bounded by
    /// [`ServerBuilder::write_stall_timeout`].
    pub fn header_timeout(mut self, timeout: Duration) -> Serve {
        self.http.header_timeout = (!timeout.is_zero()).then_some(timeout);
        self
    }

    /// Makes writes of a connection wait while `bytes` bytes are not in the kernel; see
    /// [`TokioStream::with_output_bytes_max`](crate::TokioStream::with_output_bytes_max). The
    /// default is 256 KiB, and 64 KiB with TLS, which has a buffer of its own.
    pub fn output_bytes_max(mut self, bytes: usize) -> Serve {
        self.http.output_bytes_max = Some(bytes);
        self
    }

    /// Serves HTTP/1 only.
    pub fn http1_only(mut self) -> Serve {
        self.http.versions = connection::Versions::Http1;
        self
    }

    /// Serves HTTP/2 only, as gRPC needs it.
    pub fn http2_only(mut self) -> Serve {
        self.http.versions = connection::Versions::Http2;
        self
    }

    /// Changes hyper's settings of HTTP/1. Called for each connection.
    pub fn http1(mut self, change: impl Fn(&mut http1::Builder) + Send + Sync + 'static) -> Serve {
        self.http.http1 = Some(Box::new(change));
        self
    }

    /// Changes hyper's settings of HTTP/2. Called for each connection.
    pub fn http2(
        mut self,
        change: impl Fn(&mut http2::Builder<HyperExecutor>) + Send + Sync + 'static,
    ) -> Serve {
        self.http.http2 = Some(Box::new(change));
        self
    }

    /// Serves over TLS: takes a `rustls::ServerConfig` or an [`Acceptor`], whose certificates can
    /// be reloaded. If the configuration names no ALPN protocols, `h2` and `http/1.1` are offered,
    /// as far as they are served.
    #[cfg(feature = "rustls")]
    pub fn rustls(mut self, acceptor: impl Into<Acceptor>) -> Serve {
        self.http.tls = Some(acceptor.into());
        self
    }

    /// Binds the address. Connections wait in the kernel until the returned value is awaited.
    ///
    /// # Errors
    /// Those of [`ServerBuilder::bind`].
    pub fn bind(self) -> Result<Bound> {
        #[cfg_attr(not(feature = "rustls"), expect(unused_mut, reason = "for TLS"))]
        let Serve { address, handler, server, mut http, signal, shutdown_timeout } = self;
        #[cfg(feature = "rustls")]
        http.offer_alpn();
        let http = Arc::new(http);
        let server = server.on_connect(move |conn| handler(conn, Arc::clone(&http)));
        let server = server.bind(&address)?;
        Ok(Bound { server, signal, shutdown_timeout })
    }
}

impl IntoFuture for Serve {
    type Output = Result<()>;
    type IntoFuture = Pin<Box<dyn Future<Output = Result<()>> + Send>>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(async move { self.bind()?.await })
    }
}

impl fmt::Debug for Serve {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Serve").field("address", &self.address).finish_non_exhaustive()
    }
}

/// A server that is bound, made by [`Serve::bind`]. Awaiting it serves.
#[must_use = "a server does nothing until it is awaited"]
pub struct Bound {
    server: Server,
    signal: Option<Signal>,
    shutdown_timeout: Duration,
}

impl Bound {
    /// The address, with the port that the kernel chose.
    pub fn local_addr(&self) -> PeerAddr {
        self.server.local_addr()
    }

    /// A handle for counts, and for ending the server.
    pub fn handle(&self) -> ServerHandle {
        self.server.handle()
    }
}

impl IntoFuture for Bound {
    type Output = Result<()>;
    type IntoFuture = Pin<Box<dyn Future<Output = Result<()>> + Send>>;

    fn into_future(self) -> Self::IntoFuture {
        let Bound { server, signal, shutdown_timeout } = self;
        Box::pin(shutdown::run(server, signal, shutdown_timeout))
    }
}

impl fmt::Debug for Bound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Bound").field(&self.server).finish()
    }
}

/// Container orchestrators give a process 30 s between the request to end and the kill.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(30);

/// hyper reads a body only as fast as the application takes it, so what is received in advance is
/// memory that a slow application costs. Half of the library's largest block, and the whole block.
pub(crate) const INPUT_LOW_BYTES: usize = 64 << 10;
pub(crate) const INPUT_HIGH_BYTES: usize = 128 << 10;
