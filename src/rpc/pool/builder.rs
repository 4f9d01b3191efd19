//! The settings of a pool.

use std::time::Duration;

use super::Pool;
use crate::config::{self, some};
use crate::dial::Dialer;

/// Settings of a [`Pool`]; made by [`Pool::builder`]. All counts are for each address.
#[derive(Clone, Debug)]
#[must_use]
pub struct PoolBuilder(Settings);

#[derive(Clone, Debug)]
pub(super) struct Settings {
    pub(super) dialer: Dialer,
    pub(super) connections_max: usize,
    pub(super) idle_max: usize,
    pub(super) idle_min: usize,
    pub(super) idle_lifetime: Option<Duration>,
    pub(super) lifetime: Option<Duration>,
    pub(super) checkout_timeout: Option<Duration>,
    lost_peer_timeout: Duration,
}

impl PoolBuilder {
    pub(super) fn new() -> PoolBuilder {
        PoolBuilder(Settings {
            dialer: Dialer::new(),
            connections_max: config::POOL_CONNECTIONS_MAX,
            idle_max: usize::MAX,
            idle_min: 0,
            idle_lifetime: Some(config::POOL_IDLE_LIFETIME),
            lifetime: None,
            checkout_timeout: Some(config::POOL_CHECKOUT_TIMEOUT),
            lost_peer_timeout: config::calls::LOST_PEER_TIMEOUT,
        })
    }

    /// Makes the connections, with its settings and on its pollers. The default is
    /// [`Dialer::new`].
    pub fn dialer(mut self, dialer: Dialer) -> PoolBuilder {
        self.0.dialer = dialer;
        self
    }

    /// The largest number of connections that are open at the same time: idle, checked out or being
    /// dialled. Further callers wait. At least 1; 100 by default.
    ///
    /// The bound is strict: a connection counts until this side has closed it. Connections that
    /// were [taken](super::Pooled::take) do not count.
    pub fn connections_max(mut self, count: usize) -> PoolBuilder {
        self.0.connections_max = count.max(1);
        self
    }

    /// The largest number of idle connections. A connection that is given back beyond it is closed,
    /// unless a caller waits for it. By default all `connections_max` may be idle. With fewer than
    /// the usual number of concurrent calls, most calls dial.
    pub fn idle_max(mut self, count: usize) -> PoolBuilder {
        self.0.idle_max = count;
        self
    }

    /// Keeps at least this many connections idle, so that callers find them open; 0 by default. At
    /// most `idle_max`, and no more than `connections_max` leaves.
    ///
    /// This begins with the first use of an address, or with [`Pool::warm`]. Within a second after
    /// idle connections are checked out, closed by the server or expired, background dials replace
    /// them. They run on a poller of the [dialer](Self::dialer). While they fail, the pauses
    /// between them grow from 200 ms to 30 s. After 16 failures in a row, they stop until the
    /// address is used again. [`Pool::forget`] stops them as well.
    pub fn idle_min(mut self, count: usize) -> PoolBuilder {
        self.0.idle_min = count;
        self
    }

    /// How long a connection may be idle before it is closed; 50 s by default. Zero means no limit.
    /// Keep it below the time after which the server closes idle connections: a request that
    /// crosses the server's close fails.
    pub fn idle_lifetime(mut self, lifetime: Duration) -> PoolBuilder {
        self.0.idle_lifetime = some(lifetime);
        self
    }

    /// The age at which a connection is replaced, for example so that calls follow a changed name
    /// or load balancer. Zero, the default, means no limit.
    ///
    /// A connection that is in use then is closed when it is given back; an idle one within a
    /// second. Each connection ends earlier by a random time of up to an eighth of `lifetime`.
    pub fn lifetime(mut self, lifetime: Duration) -> PoolBuilder {
        self.0.lifetime = some(lifetime);
        self
    }

    /// How long a [`checkout`](Pool::checkout) may take: the wait for a connection and the dial;
    /// 30 s by default. Zero means no limit. Background dials take no longer either.
    pub fn checkout_timeout(mut self, timeout: Duration) -> PoolBuilder {
        self.0.checkout_timeout = some(timeout);
        self
    }

    /// How long the host of the server may be silent until a connection fails, mostly as
    /// `ETIMEDOUT`; 20 s by default. A host that has lost its power or its network ends no
    /// connection. With this timeout, callers see the failure, and idle connections to the
    /// host are closed.
    ///
    /// The time starts when bytes are sent that the host does not acknowledge. TCP probes an idle
    /// connection after half of the time, and every quarter after that, in whole seconds. A server
    /// that is alive, and slow to answer, is not silent. A server that reads nothing for this time,
    /// while bytes wait for it, is treated as silent. A dial ends after this time as well.
    ///
    /// Zero leaves it to the kernel: about 15 minutes while bytes are sent, and no limit for an
    /// idle connection. The setting has no effect if the socket options of the dialer have a
    /// [`keepalive`](crate::SocketOptions::keepalive) or a
    /// [`user_timeout`](crate::SocketOptions::user_timeout).
    pub fn lost_peer_timeout(mut self, timeout: Duration) -> PoolBuilder {
        self.0.lost_peer_timeout = timeout;
        self
    }

    /// Makes the pool. Nothing is dialled before the first use of an address.
    pub fn build(self) -> Pool {
        Pool::with_settings(self.settings())
    }

    /// The settings, which do not contradict each other.
    pub(super) fn settings(self) -> Settings {
        let idle_min = self.0.idle_min.min(self.0.idle_max);
        let dialer = self.0.dialer.or_lost_after(self.0.lost_peer_timeout);
        Settings { idle_min, dialer, ..self.0 }
    }
}
