//! The attempts of one dial: one for each address, with overlap (RFC 8305, section 5).
//!
//! An attempt owns its socket and its connection, so dropping an attempt closes both. The code runs
//! on the thread that polls the dial.

use std::fmt;
use std::future::{Future, pending, poll_fn};
use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use crate::address::PeerAddr;
use crate::clock::now_ns;
use crate::config::{self, Limits};
use crate::connection::{Connection, Core, Remote, start_connect, wait_connected};
use crate::poller::Alarm;
use crate::poller::timers::{NEVER, ns_after};
use crate::sys::socket::{DialOptions, Socket, SocketError};

/// What the attempts of one dial share.
pub(super) struct Attempts<'a> {
    pub(super) remote: &'a Arc<Remote>,
    pub(super) limits: Arc<Limits>,
    pub(super) dialing: &'a DialOptions,
    /// How long an attempt may run.
    pub(super) timeout: Option<Duration>,
    /// How long an attempt may run before the next one begins.
    pub(super) delay: Duration,
}

/// How many addresses a dial has tried. The text is empty if the dial has only one.
#[derive(Default)]
pub(super) struct Tried {
    count: usize,
    of: usize,
}

/// Why no attempt has succeeded.
pub(super) enum Failure {
    /// An attempt failed for a reason that all other attempts share.
    Setup(SocketError),
    /// The attempt that failed last, by its address.
    Address(PeerAddr, io::Error),
}

/// Why a wait has ended before its future was ready.
pub(super) enum Cut {
    Late,
    PollerEnded,
}

/// An attempt that has begun.
struct Running<'a> {
    peer: &'a PeerAddr,
    attempt: Pin<Box<dyn Future<Output = Result<Connection, SocketError>> + Send + 'a>>,
}

impl Attempts<'_> {
    /// Connects to one of `peers`. An attempt begins when the attempt before it has run for the
    /// delay, or as soon as any attempt has failed. The first connection wins, and the other
    /// attempts are dropped.
    pub(super) async fn race(
        &self,
        peers: &[PeerAddr],
        tried: &mut Tried,
    ) -> Result<Connection, Failure> {
        *tried = Tried { count: 0, of: peers.len() };
        if let [peer] = peers {
            // One attempt needs neither a box nor a timer.
            tried.count = 1;
            return self.connect(peer).await.map_err(|error| Failure::of(peer, error));
        }
        let mut waiting = peers.iter();
        let mut running: Vec<Running<'_>> = Vec::new();
        loop {
            if let Some(peer) = waiting.next() {
                tried.count += 1;
                running.push(Running { peer, attempt: Box::pin(self.connect(peer)) });
            }
            let is_last = waiting.len() == 0;
            let next_ns = if is_last { NEVER } else { ns_after(self.delay) };
            match within(self.remote, next_ns, first_done(&mut running)).await {
                // The delay is over.
                Err(_) => {}
                Ok(Err(Failure::Address(..))) if !is_last || !running.is_empty() => {}
                Ok(done) => return done,
            }
        }
    }

    /// Connects to one address within the time limit of an attempt.
    async fn connect(&self, peer: &PeerAddr) -> Result<Connection, SocketError> {
        let until_ns = self.timeout.map_or(NEVER, ns_after);
        match within(self.remote, until_ns, self.connect_with_retries(peer)).await {
            Ok(done) => done,
            Err(Cut::Late) => Err(io::Error::from(io::ErrorKind::TimedOut).into()),
            Err(Cut::PollerEnded) => Err(io::Error::from(io::ErrorKind::NotConnected).into()),
        }
    }

    async fn connect_with_retries(&self, peer: &PeerAddr) -> Result<Connection, SocketError> {
        let mut retries = 0;
        loop {
            let error = match self.connect_once(peer).await {
                Ok(connection) if !is_self_connected(&connection) => return Ok(connection),
                // The kernel chose the target port as the local port, and TCP connected the socket
                // to itself. No server listens on this port.
                Ok(_) => io::ErrorKind::ConnectionRefused.into(),
                Err(SocketError::Address(error)) => error,
                Err(setup) => return Err(setup),
            };
            let again = match error.kind() {
                // The backlog of a Unix socket is full.
                io::ErrorKind::WouldBlock => true,
                io::ErrorKind::AddrNotAvailable => retries < config::DIAL_RETRIES_MAX,
                io::ErrorKind::ConnectionRefused if error.raw_os_error().is_none() => {
                    retries < config::DIAL_RETRIES_MAX
                }
                _ => false,
            };
            if !again {
                return Err(error.into());
            }
            retries += 1;
            // Where the poller has ended, the next connect fails.
            let _ = within(self.remote, ns_after(config::DIAL_RETRY_PAUSE), pending::<()>()).await;
        }
    }

    async fn connect_once(&self, peer: &PeerAddr) -> Result<Connection, SocketError> {
        let socket = Arc::new(Socket::for_peer(peer, self.dialing)?);
        let core = Core::new(self.remote, &self.limits, None, Arc::clone(&socket), peer.clone());
        // Dropping the connection closes the socket, if this future is dropped or fails below.
        let connection = Connection::owned(&core);
        start_connect(&core, socket, peer.clone());
        wait_connected(&core).await?;
        Ok(connection)
    }
}

impl Failure {
    fn of(peer: &PeerAddr, error: SocketError) -> Failure {
        match error {
            SocketError::Address(error) => Failure::Address(peer.clone(), error),
            setup => Failure::Setup(setup),
        }
    }
}

impl Tried {
    pub(super) fn is_one(&self) -> bool {
        self.of <= 1
    }
}

impl fmt::Display for Tried {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Tried { of: 0 | 1, .. } => Ok(()),
            Tried { count, of } if count == of => write!(f, " ({count} addresses tried)"),
            Tried { count, of } => write!(f, " ({count} of {of} addresses tried)"),
        }
    }
}

/// Waits until an attempt is done, and removes it. If several are done, the one that began first
/// counts.
async fn first_done(running: &mut Vec<Running<'_>>) -> Result<Connection, Failure> {
    poll_fn(|cx| {
        for index in 0..running.len() {
            if let Poll::Ready(done) = running[index].attempt.as_mut().poll(cx) {
                let peer = running.remove(index).peer;
                return Poll::Ready(done.map_err(|error| Failure::of(peer, error)));
            }
        }
        Poll::Pending
    })
    .await
}

fn is_self_connected(connection: &Connection) -> bool {
    let peer = connection.peer_addr();
    peer.as_inet().is_some() && connection.local_addr().is_ok_and(|local| local == peer)
}

/// Waits for `future`, at most until `until_ns` or the end of the poller.
pub(super) async fn within<T>(
    remote: &Arc<Remote>,
    until_ns: u64,
    future: impl Future<Output = T>,
) -> Result<T, Cut> {
    let mut future = pin!(future);
    let mut alarm = (until_ns != NEVER).then(|| Alarm::new(remote, until_ns));
    poll_fn(|cx| {
        if let Poll::Ready(done) = future.as_mut().poll(cx) {
            return Poll::Ready(Ok(done));
        }
        match alarm.as_mut().map(|alarm| alarm.poll(cx)) {
            Some(Poll::Ready(())) if now_ns() >= until_ns => Poll::Ready(Err(Cut::Late)),
            Some(Poll::Ready(())) => Poll::Ready(Err(Cut::PollerEnded)),
            _ => Poll::Pending,
        }
    })
    .await
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn the_number_of_tried_addresses_is_told_where_there_are_several() {
        let text = |count, of| Tried { count, of }.to_string();
        assert_eq!([text(0, 0), text(1, 1)], ["", ""]);
        assert_eq!(text(2, 2), " (2 addresses tried)");
        assert_eq!(text(1, 3), " (1 of 3 addresses tried)");
    }
}
