//! The behaviour suite: the promises of the public API, checked on every backend.
//!
//! A group is a file of cases. `mount!` mounts groups for one backend; a new backend needs one more
//! such line. Some groups also run with other placements of handlers, and at the client's end of a
//! connection. Groups named `ring_…` and `sqpoll_…` check rules of io_uring, and are mounted for
//! the backends that use it. Cases of a backend that the host does not offer are skipped with a
//! printed reason; with `REQUIRE_ALL_BACKENDS=1` they fail.
//!
//! Each case runs in a process of its own, and several of them at the same time.
//!
//! Mounts that repeat what other mounts check with a similar backend are *nightly*: their cases are
//! ignored unless `--include-ignored` is given.

mod adapters;
mod backlog;
mod backpressure;
mod blocking;
mod buffer;
mod clients;
mod close;
mod copying;
mod data_path;
mod dial;
mod direct;
mod draining;
mod events;
mod eyeballs;
mod failures;
mod fairness;
mod files;
mod flushing;
mod frames;
mod harness;
mod hostile;
mod listeners;
mod mux;
mod pipelining;
mod placement;
mod poller_tasks;
mod polls;
mod promises;
mod races;
mod requests;
mod ring_arming;
mod ring_buffers;
mod ring_ends;
mod ring_options;
mod ring_queues;
mod rpc_calls;
mod rpc_chaos;
mod rpc_lost_peers;
mod rpc_pool;
mod rpc_serving;
mod runtime;
mod server;
mod server_promises;
mod shutdown;
mod socket_options;
mod spawning;
mod sqpoll_ends;
mod sqpoll_idle;
mod sqpoll_presets;
mod sqpoll_sends;
mod timeouts;
mod turns;
mod unblock;
mod unix_sockets;
mod user_code;
mod wakers;
mod writing;

macro_rules! mount {
    // `$others` mounts the groups that the two similar backends share: `tests` or `nightly`.
    ($name:ident, $others:ident: $backend:expr $(; rings: $($group:ident)+)?) => {
        mod $name {
            at!(server_side: $backend, Placement::Auto, Side::Server =>
                data_path direct frames writing flushing copying files pipelining requests timeouts
                close
                events failures server shutdown races listeners dial eyeballs backpressure hostile
                blocking runtime placement clients unblock turns fairness polls mux spawning
                unix_sockets socket_options user_code wakers promises server_promises draining
                rpc_calls rpc_chaos rpc_lost_peers rpc_pool rpc_serving poller_tasks);
            at!(inline: $backend, Placement::Inline, Side::Server =>
                direct failures runtime clients unblock turns fairness mux spawning user_code wakers
                draining rpc_serving);
            at!(pool, $others: $backend, Placement::Pool { workers: 2 }, Side::Server =>
                data_path direct frames writing flushing copying files pipelining requests close
                events
                failures server shutdown races runtime clients unblock turns fairness backlog polls
                mux spawning user_code draining rpc_serving);
            at!(tokio, $others: $backend, Placement::Tokio, Side::Server =>
                data_path direct frames flushing copying files pipelining requests events failures
                shutdown races runtime clients unblock turns mux spawning draining rpc_serving);
            at!(client_side, $others: $backend, Placement::Auto, Side::Client =>
                data_path direct frames writing flushing copying files pipelining timeouts close
                races
                polls mux promises wakers);
            $(at!(rings: $backend, Placement::Auto, Side::Server => $($group)+);)?
        }
    };
}

macro_rules! at {
    ($name:ident: $($rest:tt)*) => {
        at!($name, tests: $($rest)*);
    };
    ($name:ident, $tests:ident: $backend:expr, $placement:expr, $side:expr =>
        $($group:ident)*) => {
        mod $name {
            use crate::harness::*;

            const MOUNT: Mount = Mount { backend: $backend, placement: $placement, side: $side };
            $(crate::$group::cases!($tests, MOUNT);)*
        }
    };
}

macro_rules! tests {
    ($mount:ident, $group:ident: $($name:ident)*) => {
        mod $group {
            $(
                #[test]
                fn $name() {
                    case!($mount, $group, $name);
                }
            )*
        }
    };
}

macro_rules! nightly {
    ($mount:ident, $group:ident: $($name:ident)*) => {
        mod $group {
            $(
                #[test]
                #[ignore = "nightly"]
                fn $name() {
                    case!($mount, $group, $name);
                }
            )*
        }
    };
}

macro_rules! case {
    ($mount:ident, $group:ident, $name:ident) => {
        let name = concat!(module_path!(), "::", stringify!($name));
        crate::harness::run_alone(super::$mount, name, crate::$group::$name);
    };
}

mount!(epoll, tests: Backend::Epoll);
mount!(uring, tests: Backend::Uring;
    rings: ring_arming ring_buffers ring_ends ring_options ring_queues);
mount!(hybrid, nightly: Backend::Hybrid;
    rings: ring_arming ring_buffers ring_ends ring_options ring_queues);

/// Queued runs at a forced shutdown. The result does not depend on the backend, and the case is
/// slow. So it is mounted once for each placement; the mounts above have it for the pool.
mod backlogs {
    at!(auto: Backend::Auto, Placement::Auto, Side::Server => backlog);
    at!(inline: Backend::Auto, Placement::Inline, Side::Server => backlog);
    at!(tokio: Backend::Auto, Placement::Tokio, Side::Server => backlog);
}

/// Backends whose kernel threads poll.
///
/// With one kernel thread, all groups run. With several kernel threads on a small host, each switch
/// between them takes up to one tick of the scheduler. So the presets with several threads run only
/// the groups that depend on the layout of their rings: mainly sends and ends.
mod sqpoll {
    mount!(shared, nightly: SHARED;
        rings: ring_arming ring_buffers ring_ends ring_options ring_queues sqpoll_sends sqpoll_idle
        sqpoll_ends);
    at!(shared_pool: SHARED, Placement::Pool { workers: 2 }, Side::Server =>
        sqpoll_sends sqpoll_ends);
    at!(presets: SHARED, Placement::Auto, Side::Server => sqpoll_presets);

    mod config1 {
        at!(server_side, nightly: CONFIG1, Placement::Auto, Side::Server =>
            data_path writing flushing close events failures races mux);
        at!(rings: CONFIG1, Placement::Auto, Side::Server =>
            ring_arming ring_ends sqpoll_sends sqpoll_idle sqpoll_ends);
    }

    mod config2 {
        at!(server_side, nightly: CONFIG2, Placement::Auto, Side::Server =>
            data_path writing flushing timeouts close events failures shutdown races);
        at!(pool, nightly: CONFIG2, Placement::Pool { workers: 2 }, Side::Server =>
            writing close failures races sqpoll_sends mux);
        at!(rings: CONFIG2, Placement::Auto, Side::Server =>
            ring_buffers ring_ends ring_queues sqpoll_sends sqpoll_idle sqpoll_ends);
    }
}
