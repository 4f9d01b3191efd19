//! gRPC services of tonic on ringpoll: one call in the place of tonic's server.
//!
//! [`serve`] runs each connection as one handler of a [`ringpoll::Server`]. [`Incoming`] is for
//! programs that keep `tonic::transport::Server`, with its layers and limits. A client connects
//! with [`Connector`].
//!
//! ```no_run
//! use tonic::service::Routes;
//!
//! # async fn run(routes: Routes) -> ringpoll::Result<()> {
//! // let routes = Routes::new(GreeterServer::new(Greeter));
//! ringpoll_compat::tonic::serve("0.0.0.0:50051", routes).await
//! # }
//! ```
//!
//! ```no_run
//! use ringpoll_compat::tonic::{Connector, Incoming};
//! use tonic::transport::{Channel, Endpoint, Server};
//!
//! # async fn run(routes: tonic::service::Routes) -> Result<(), Box<dyn std::error::Error>> {
//! let incoming = Incoming::bind("0.0.0.0:50051")?;
//! tokio::spawn(Server::builder().add_routes(routes).serve_with_incoming(incoming));
//!
//! let endpoint = Endpoint::from_static("http://127.0.0.1:50051");
//! let channel: Channel = endpoint.connect_with_connector(Connector::default()).await?;
//! # Ok(())
//! # }
//! ```

use std::convert::Infallible;
use std::future::{Ready, ready};
#[cfg(feature = "rustls")]
use std::pin::Pin;
use std::task::{Context, Poll};

use axum::middleware::AddExtension;
use axum::{Extension, Router};
#[cfg(feature = "rustls")]
use hyper::Uri;
#[cfg(feature = "rustls")]
use hyper_util::rt::TokioIo;
use ringpoll::Handle;
use tonic::service::Routes;
use tonic::transport::server::{Connected, TcpConnectInfo};
use tower::{Layer, Service};

use crate::axum::{Accepted, Peer, Serve};

pub use crate::HyperConnector as Connector;
pub use crate::listener::Listener as Incoming;

/// Serves `routes` on `address` (see [`ringpoll::Address`]), over HTTP/2 only.
///
/// The returned value is the same as that of [`axum::serve`](crate::axum::serve), and has the same
/// settings. `Request::remote_addr` and `local_addr` of tonic return the addresses of TCP peers.
/// The layers of `tonic::transport::Server` do not apply: add layers to the routes, or use
/// [`Incoming`].
pub fn serve(address: &str, routes: impl Into<Routes>) -> Serve {
    let router = routes.into().prepare().into_axum_router();
    crate::axum::serve(address, Grpc(router)).http2_only()
}

/// Makes the service of a connection, which tells each request the addresses of the connection.
#[derive(Clone)]
struct Grpc(Router);

impl Service<Peer> for Grpc {
    type Response = AddExtension<Router, TcpConnectInfo>;
    type Error = Infallible;
    type Future = Ready<Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, peer: Peer) -> Self::Future {
        ready(Ok(Extension(addresses(peer.connection())).layer(self.0.clone())))
    }
}

impl Connected for Accepted {
    type ConnectInfo = TcpConnectInfo;

    fn connect_info(&self) -> TcpConnectInfo {
        addresses(self.handle())
    }
}

fn addresses(connection: &Handle) -> TcpConnectInfo {
    TcpConnectInfo {
        local_addr: connection.local_addr().ok().and_then(|addr| addr.as_inet()),
        remote_addr: connection.peer_addr().as_inet(),
    }
}

/// Connects a channel of tonic over TLS. The configuration should offer the protocol `h2`.
#[cfg(feature = "rustls")]
impl Service<Uri> for crate::rustls::Connector {
    type Response = TokioIo<crate::rustls::ClientStream>;
    type Error = ringpoll::Error;
    type Future = Pin<Box<dyn Future<Output = ringpoll::Result<Self::Response>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<ringpoll::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let connector = self.clone();
        Box::pin(async move {
            let host = uri.host().unwrap_or_default();
            let address = format!("{host}:{}", uri.port_u16().unwrap_or(HTTPS_PORT));
            Ok(TokioIo::new(connector.connect(&address).await?))
        })
    }
}

/// The port of a URI that names none.
#[cfg(feature = "rustls")]
const HTTPS_PORT: u16 = 443;
