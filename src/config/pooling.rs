//! Defaults and bounds of [`rpc::Pool`](crate::rpc::Pool).

use std::time::Duration;

/// How many connections a pool opens to one address, unless set. Enough for most services: with
/// calls of 1 ms, 100 connections carry 100,000 calls per second.
pub(crate) const POOL_CONNECTIONS_MAX: usize = 100;

/// How long a pooled connection stays idle, unless set. Many servers and load balancers close idle
/// connections after 60 s or more, so the pool closes them before the server does.
pub(crate) const POOL_IDLE_LIFETIME: Duration = Duration::from_secs(50);

/// How long a checkout may take, unless set. Without a limit, connections that a program never
/// gives back would make all later callers wait for ever.
pub(crate) const POOL_CHECKOUT_TIMEOUT: Duration = Duration::from_secs(30);

/// A connection ends earlier than its lifetime by a random part of it, at most this fraction. So
/// connections that were made together are not all replaced together.
pub(crate) const POOL_LIFETIME_SPREAD: u64 = 8;

/// How often a pool looks for dead idle connections, and starts the dials of a warm minimum.
pub(crate) const POOL_VISIT_INTERVAL: Duration = Duration::from_secs(1);

/// The shortest time between two such looks. It bounds the CPU time if many connections expire one
/// after the other.
pub(crate) const POOL_VISIT_PAUSE: Duration = Duration::from_millis(1);

/// How many idle connections of one address a pool closes in one look. Each close takes a system
/// call of a few microseconds on a poller, which delays the other connections of the poller.
pub(crate) const POOL_CLOSES_PER_VISIT: usize = 64;

/// The pause after the first failed dial of a warm minimum. It doubles with each failure, up to
/// `WARM_PAUSE_MAX`.
pub(crate) const WARM_PAUSE: Duration = Duration::from_millis(200);

/// The longest pause between failed dials of a warm minimum.
pub(crate) const WARM_PAUSE_MAX: Duration = Duration::from_secs(30);

/// After so many failures in a row an address is not kept warm until it is used again: after about
/// five minutes, if the dials fail at once.
pub(crate) const WARM_FAILURES_MAX: u32 = 16;
