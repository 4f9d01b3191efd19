//! What a make-service is told of a connection.

use std::convert::Infallible;
use std::future::{Ready, ready};
use std::net::{Ipv4Addr, SocketAddr};
use std::task::{Context, Poll};

use axum::Router;
use axum::extract::connect_info::Connected;
use axum::routing::MethodRouter;
use axum::serve::IncomingStream;
use ringpoll::{Handle, PeerAddr, Result};
use tower::Service;

use crate::listener::Listener;

/// The peer of an accepted connection. [`serve`](super::serve) passes it to the make-service, and
/// handlers get it as `ConnectInfo<Peer>`.
#[derive(Clone, Debug)]
pub struct Peer(Handle);

impl Peer {
    pub(super) fn new(connection: &Handle) -> Peer {
        Peer(connection.clone())
    }

    /// The peer's address.
    pub fn addr(&self) -> PeerAddr {
        self.0.peer_addr()
    }

    /// The local address.
    ///
    /// # Errors
    /// Closed, after the descriptor has closed. An error of the kernel.
    pub fn local_addr(&self) -> Result<PeerAddr> {
        self.0.local_addr()
    }

    /// The connection, for its counts, its context, and its end.
    pub fn connection(&self) -> &Handle {
        &self.0
    }
}

impl Connected<Peer> for Peer {
    fn connect_info(peer: Peer) -> Peer {
        peer
    }
}

impl Connected<Peer> for PeerAddr {
    fn connect_info(peer: Peer) -> PeerAddr {
        peer.addr()
    }
}

/// The address `0.0.0.0:0` stands for the peer of a Unix socket.
impl Connected<Peer> for SocketAddr {
    fn connect_info(peer: Peer) -> SocketAddr {
        peer.addr().as_inet().unwrap_or((Ipv4Addr::UNSPECIFIED, 0).into())
    }
}

impl Connected<IncomingStream<'_, Listener>> for Peer {
    fn connect_info(stream: IncomingStream<'_, Listener>) -> Peer {
        Peer(stream.io().handle().clone())
    }
}

macro_rules! impl_make_service {
    ($($type:ty),+) => {$(
        /// Serves each connection with a clone.
        impl Service<Peer> for $type {
            type Response = $type;
            type Error = Infallible;
            type Future = Ready<std::result::Result<$type, Infallible>>;

            fn poll_ready(
                &mut self,
                _: &mut Context<'_>,
            ) -> Poll<std::result::Result<(), Infallible>> {
                Poll::Ready(Ok(()))
            }

            fn call(&mut self, _: Peer) -> Self::Future {
                // With its state set, the router prepares once what each request needs.
                ready(Ok(self.clone().with_state(())))
            }
        }
    )+};
}

impl_make_service!(Router, MethodRouter);
