//! The scenario proxy with an upstream: bytes go there and back as they come.
//!
//! What is received stays in its blocks; only references move from one connection to the other.

use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use ringpoll::{Connection, Dialer, Placement, Pollers, copy_bidirectional};

/// How clients' connections get one to the upstream.
#[derive(Clone)]
pub(super) struct Upstream {
    addr: Arc<str>,
    placement: Placement,
    /// The server's own, known once it is built.
    pollers: Arc<OnceLock<Pollers>>,
}

impl Upstream {
    pub(super) fn new(addr: SocketAddr, placement: Placement) -> Upstream {
        Upstream { addr: addr.to_string().into(), placement, pollers: Arc::default() }
    }

    /// To be called before the first connection comes.
    pub(super) fn use_pollers(&self, pollers: Pollers) {
        // Set once, by whoever has built the server.
        let _ = self.pollers.set(pollers);
    }

    /// A client's whole life. It ends when both directions have ended; an error in one of them
    /// aborts both connections.
    pub(super) async fn relay(self, mut client: Connection) -> ringpoll::Result<()> {
        let mut upstream = self.dialer().connect(&self.addr).await?;
        copy_bidirectional(&mut client, &mut upstream).await?;
        Ok(())
    }

    fn dialer(&self) -> Dialer {
        let dialer = Dialer::new().timeout(DIAL_TIMEOUT);
        match self.pollers.get() {
            // A handler on a poller gets a connection on the same one, where both sides meet.
            Some(pollers) if self.placement != Placement::Inline => dialer.pollers(pollers.clone()),
            _ => dialer,
        }
    }
}

const DIAL_TIMEOUT: Duration = Duration::from_secs(5);
