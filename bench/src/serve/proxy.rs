//! The scenario proxy with an upstream: bytes go there and back as they come.
//!
//! What is received stays in its blocks; only references move from one connection to the other.

use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use ringpoll::{Connection, Dialer, Placement, Pollers, ReadHalf, WriteHalf};

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
    /// drops both connections, and dropping closes them.
    pub(super) async fn relay(self, client: Connection) -> ringpoll::Result<()> {
        let upstream = self.dialer().connect(&self.addr).await?;
        let (from_client, to_client) = client.split();
        let (from_upstream, to_upstream) = upstream.split();
        tokio::try_join!(forward(from_client, to_upstream), forward(from_upstream, to_client))?;
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

/// Moves bytes one way until the sender is done, then says so to the receiver. The other direction
/// goes on.
async fn forward(mut from: ReadHalf, mut to: WriteHalf) -> ringpoll::Result<()> {
    loop {
        // No byte is ready only at the end of the stream.
        let ready = from.readable().await?;
        if ready == 0 {
            return to.shutdown_write().await;
        }
        to.append(from.slice(ready.min(CHUNK_BYTES_MAX)).await?)?;
        // Nothing more is taken from a fast sender until the receiver has taken this.
        to.flush().await?;
    }
}

const DIAL_TIMEOUT: Duration = Duration::from_secs(5);
/// What one turn moves at most.
const CHUNK_BYTES_MAX: usize = 256 << 10;
