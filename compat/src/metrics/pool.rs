//! Counts of pools of connections.

use metrics::{SharedString, Unit};
use ringpoll::rpc::{Pool, PoolStats};

/// The counts of one [`Pool`], for the recorder of the program.
///
/// A *sample* reads [`Pool::stats`] and passes every count on, with the label `pool`: sums as
/// counters, and present values as gauges. It holds a clone of the pool, so drop it to let the pool
/// end.
///
/// ```
/// use ringpoll::rpc::Pool;
/// use ringpoll_compat::metrics::PoolMetrics;
///
/// let pool = Pool::builder().build();
/// let metrics = PoolMetrics::new(pool, "users");
/// metrics.sample(); // call this from a loop of your own
/// ```
#[derive(Clone, Debug)]
pub struct PoolMetrics {
    pool: Pool,
    name: SharedString,
}

impl PoolMetrics {
    /// The counts of `pool`, with the label `pool` = `name`. Describes all metrics to the recorder
    /// that is installed, so install it before.
    pub fn new(pool: Pool, name: impl Into<SharedString>) -> PoolMetrics {
        for (name, help, _) in GAUGES {
            metrics::describe_gauge!(*name, Unit::Count, *help);
        }
        for (name, help, _) in COUNTERS {
            metrics::describe_counter!(*name, Unit::Count, *help);
        }
        PoolMetrics { pool, name: name.into() }
    }

    /// Takes one sample, for the recorder of the calling thread.
    pub fn sample(&self) {
        let stats = self.pool.stats();
        for (name, _, read) in GAUGES {
            metrics::gauge!(*name, "pool" => self.name.clone()).set(read(&stats) as f64);
        }
        for (name, _, read) in COUNTERS {
            metrics::counter!(*name, "pool" => self.name.clone()).absolute(read(&stats));
        }
    }
}

/// The name of a metric, its meaning, and how it is read.
type Metric<T> = (&'static str, &'static str, fn(&PoolStats) -> T);

const GAUGES: &[Metric<usize>] = &[
    ("ringpoll_pool_addresses", "Addresses that the pool knows", |s| s.addresses),
    ("ringpoll_pool_idle", "Connections that are idle", |s| s.idle),
    ("ringpoll_pool_checked_out", "Connections that are checked out", |s| s.checked_out),
    ("ringpoll_pool_dialing", "Connections that are being dialled", |s| s.dialing),
    ("ringpoll_pool_waiting", "Callers that wait for a connection", |s| s.waiting),
];

const COUNTERS: &[Metric<u64>] = &[
    ("ringpoll_pool_dials_total", "Dials that have begun", |s| s.dials),
    ("ringpoll_pool_dial_failures_total", "Dials that have failed", |s| s.dial_failures),
    ("ringpoll_pool_reused_total", "Checkouts of an idle connection", |s| s.reused),
    ("ringpoll_pool_expired_total", "Connections closed by their age or idle time", |s| s.expired),
    ("ringpoll_pool_dead_total", "Idle connections that were found dead", |s| s.dead),
    ("ringpoll_pool_timeouts_total", "Checkouts that took too long", |s| s.timeouts),
];
