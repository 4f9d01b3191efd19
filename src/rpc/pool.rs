//! A pool of connections for each address.
//!
//! The file has the public type and the checkout, which run on the caller's thread. `state` decides
//! who gets what; `shared` carries the decisions out; `keeper` works in the background.

mod builder;
mod keeper;
mod limit;
mod pooled;
mod shared;
mod state;

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

pub use builder::PoolBuilder;
use builder::Settings;
use limit::{Limited, limited};
pub use pooled::Pooled;
use shared::{Got, Place, Shared};

use crate::clock::now_ns;
use crate::error::{Error, Result};
use crate::poller::Alarm;
use crate::poller::timers::{NEVER, ns_after};
use crate::sync::Arc;

/// A pool of connections for each address, for protocols that have one request at a time on a
/// connection. Clones use the same pool. Dropping the last clone [closes](Self::close) it.
///
/// ```
/// use ringpoll::rpc::Pool;
/// use ringpoll::{Connection, Result, Server, Slice};
///
/// /// Sends a line and returns the line that the server answers.
/// async fn ask(pool: &Pool, address: &str, question: &str) -> Result<Slice> {
///     let mut conn = pool.checkout(address).await?;
///     conn.write_copy(question.as_bytes())?;
///     conn.write_copy(b"\n")?;
///     conn.flush().await?;
///     let answer = conn.until(b'\n').await?;
///     conn.give_back(); // an error before this closes the connection
///     Ok(answer)
/// }
///
/// fn main() -> Result<()> {
///     let echo = |mut conn: Connection| async move {
///         let line = conn.until(b'\n').await?;
///         conn.write(line)?;
///         conn.flush().await
///     };
///     let server = Server::builder().on_request(echo).bind("127.0.0.1:0")?.spawn()?;
///     let address = server.local_addr().to_string();
///
///     let pool = Pool::builder().connections_max(8).build();
///     for _ in 0..3 {
///         let answer = ringpoll::blocking::wait(ask(&pool, &address, "hello"))?;
///         assert_eq!(&answer[..], b"hello\n");
///     }
///     assert_eq!(pool.stats().dials, 1); // all calls have used one connection
///     Ok(())
/// }
/// ```
///
/// # Checking out
/// A caller gets the idle connection that was given back last. It is not used if the server has
/// closed it or has sent bytes that nobody read, such as a late answer; the caller then gets
/// another one, and notices nothing. This check makes no system call. If no connection is idle, the
/// caller dials. A dial that fails fails only its own caller.
///
/// While [`connections_max`](PoolBuilder::connections_max) connections to an address are open,
/// further callers wait, first in, first out. A caller that stops waiting passes its turn on. Any
/// executor can poll a checkout, and its time limit holds everywhere.
///
/// # Addresses
/// An address is a string as [`connect`](crate::connect) takes it. Two strings are two addresses,
/// also if they lead to the same server. The pool forgets an address that has no connections and no
/// callers, and is not kept warm.
///
/// # Background
/// Idle connections that are dead or expired are closed within a second by a poller of the
/// [dialer](PoolBuilder::dialer), which also dials for the [warm minimum](PoolBuilder::idle_min). A
/// pool without idle connections uses no timer. The pool has no threads of its own.
#[derive(Clone)]
pub struct Pool(Arc<Owned>);

/// The clones of a [`Pool`] share this. The keeper does not, so this is dropped with the last
/// clone.
struct Owned(Arc<Shared>);

/// Counts of a [`Pool`], over all addresses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct PoolStats {
    /// Addresses that the pool knows now.
    pub addresses: usize,
    /// Connections that are idle now.
    pub idle: usize,
    /// Connections that are checked out now.
    pub checked_out: usize,
    /// Connections that are being dialled now, in the background as well.
    pub dialing: usize,
    /// Callers that wait for a place now.
    pub waiting: usize,
    /// Dials that have begun.
    pub dials: u64,
    /// Dials that have failed or have taken too long. Dials that were dropped do not count.
    pub dial_failures: u64,
    /// Checkouts that got an idle connection.
    pub reused: u64,
    /// Connections that were closed because they were idle for too long or too old.
    pub expired: u64,
    /// Idle connections that the server had closed, or on which it had sent bytes that nobody read.
    pub dead: u64,
    /// Checkouts that took too long.
    pub timeouts: u64,
}

impl Pool {
    /// Settings of a new pool.
    pub fn builder() -> PoolBuilder {
        PoolBuilder::new()
    }

    fn with_settings(settings: Settings) -> Pool {
        Pool(Arc::new(Owned(Shared::new(settings))))
    }

    /// Gets a connection to `address`: an idle one, or a new one. Waits while `connections_max`
    /// connections to the address are open.
    ///
    /// Dropping the future is safe at any time. A connection that was ready for it goes to the next
    /// caller, and a dial of it ends.
    ///
    /// # Errors
    /// [Checkout timeout](Error::is_checkout_timeout), after
    /// [`checkout_timeout`](PoolBuilder::checkout_timeout). Closed, if the pool is closed or its
    /// pollers have ended. The errors of [`Dialer::connect`](crate::Dialer::connect).
    pub async fn checkout(&self, address: &str) -> Result<Pooled> {
        self.checkout_until(address, self.shared().settings.checkout_timeout).await
    }

    /// Like [`checkout`](Self::checkout), with a time limit of its own. With a limit of zero, only
    /// an idle connection is taken.
    ///
    /// # Errors
    /// As for [`checkout`](Self::checkout).
    pub async fn checkout_within(&self, address: &str, limit: Duration) -> Result<Pooled> {
        self.checkout_until(address, Some(limit)).await
    }

    async fn checkout_until(&self, address: &str, limit: Option<Duration>) -> Result<Pooled> {
        let shared = self.shared();
        let until_ns = limit.map_or(NEVER, ns_after);
        let got = match shared.enter(address, &mut None, None) {
            Some(got) => got,
            None => {
                let turn = Turn { shared, address, ticket: None };
                let home = shared.settings.dialer.home()?;
                match limited(shared, &home, until_ns, turn).await {
                    Limited::Done(got) => got,
                    Limited::Closed => Got::Closed,
                    Limited::TimedOut => return Err(shared.too_late(address, until_ns, limit)),
                }
            }
        };
        match got {
            Got::Idle(place, member) => Ok(Pooled::new(place, member, true)),
            Got::Closed => Err(pool_closed(address)),
            Got::Dial(place) => dial(shared, place, until_ns, limit).await,
        }
    }

    /// Keeps [`idle_min`](PoolBuilder::idle_min) connections to `address` open from now on, as if a
    /// caller had used the address. The dials run in the background, and their failures are only
    /// counted. Does nothing if `idle_min` is 0.
    pub fn warm(&self, address: &str) {
        let shared = self.shared();
        if shared.settings.idle_min == 0 {
            return;
        }
        let starts_keeper = shared.state().warm(address);
        if starts_keeper {
            keeper::start(shared);
        }
    }

    /// Closes the idle connections to `address` and keeps none of them warm, until the address is
    /// used again. Call it for a server that has left.
    pub fn forget(&self, address: &str) {
        let closes = self.shared().state().cool(address);
        self.shared().close_members(address, closes);
    }

    /// The counts of the pool. Visits all addresses.
    pub fn stats(&self) -> PoolStats {
        self.shared().state().stats()
    }

    /// Closes the pool. Idle connections close, waiting callers get a closed error, and so do later
    /// ones and those that dial. Connections that are checked out stay usable, and close when they
    /// are given back or dropped. Calling this again has no effect.
    pub fn close(&self) {
        self.shared().close();
    }

    /// Closes the pool, then waits until its last connection is closed, at most for `timeout`.
    /// Dropping the future leaves the pool closed.
    ///
    /// # Errors
    /// Shutdown timeout, with the number of connections that are still checked out. The kernel's
    /// error, if the dialer has no pollers and none can be started.
    pub async fn shutdown(&self, timeout: Duration) -> Result<()> {
        let shared = self.shared();
        shared.close();
        let mut emptied = shared.emptied.wait();
        let mut alarm = None;
        let home = shared.settings.dialer.home()?;
        std::future::poll_fn(|cx| {
            if Pin::new(&mut emptied).poll(cx).is_ready() {
                return Poll::Ready(Ok(()));
            }
            let alarm = alarm.get_or_insert_with(|| Alarm::new(&home, ns_after(timeout)));
            alarm.poll(cx).map(|()| {
                let busy_count = shared.state().open();
                Err(Error::shutdown_timeout(busy_count, 0, timeout))
            })
        })
        .await
    }

    fn shared(&self) -> &Arc<Shared> {
        &self.0.0
    }
}

/// Waits for a place in line.
struct Turn<'a> {
    shared: &'a Arc<Shared>,
    address: &'a str,
    /// Set while the caller is in line.
    ticket: Option<u64>,
}

impl Future for Turn<'_> {
    type Output = Got;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Got> {
        let Turn { shared, address, ticket } = self.get_mut();
        // The waker is cloned only for a caller that has to wait, and without the lock.
        let got = shared
            .enter(address, ticket, None)
            .or_else(|| shared.enter(address, ticket, Some(cx.waker().clone())));
        got.map_or(Poll::Pending, Poll::Ready)
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        if let Some(ticket) = self.ticket {
            self.shared.leave(self.address, ticket);
        }
    }
}

/// Dials at `place`.
async fn dial(
    shared: &Arc<Shared>,
    place: Place,
    until_ns: u64,
    limit: Option<Duration>,
) -> Result<Pooled> {
    let address = Arc::clone(&place.address);
    if until_ns != NEVER && now_ns() >= until_ns {
        return Err(shared.too_late(&address, until_ns, limit));
    }
    let home = shared.settings.dialer.home()?;
    shared.state().counts.dials += 1;
    // Boxed, so that the future of a checkout stays small.
    let dial = Box::pin(shared.settings.dialer.connect(&address));
    match limited(shared, &home, until_ns, dial).await {
        Limited::Done(Ok(connection)) => match place.dialed(connection) {
            Some((place, member)) => Ok(Pooled::new(place, member, false)),
            None => Err(pool_closed(&address)),
        },
        Limited::Done(Err(error)) => {
            shared.state().counts.dial_failures += 1;
            Err(error)
        }
        Limited::TimedOut => {
            shared.state().counts.dial_failures += 1;
            Err(shared.too_late(&address, until_ns, limit))
        }
        Limited::Closed => Err(pool_closed(&address)),
    }
}

impl Shared {
    fn too_late(&self, address: &str, until_ns: u64, limit: Option<Duration>) -> Error {
        if now_ns() < until_ns {
            return Error::gone(format!("checkout {address}: the pollers have ended"));
        }
        self.state().counts.timeouts += 1;
        Error::checkout_timeout(address, limit.unwrap_or_default())
    }
}

fn pool_closed(address: &str) -> Error {
    Error::gone(format!("checkout {address}: the pool is closed"))
}

impl Drop for Owned {
    fn drop(&mut self) {
        self.0.close();
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool").field("stats", &self.stats()).finish_non_exhaustive()
    }
}

const _: () = {
    const fn goes_anywhere<T: Send + Sync + Unpin + 'static>() {}
    goes_anywhere::<Pool>();
    goes_anywhere::<PoolBuilder>();
};
