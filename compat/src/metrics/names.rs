//! The names of the metrics of a server, with their units and values.

use metrics::Unit;
use ringpoll::{Placement, PlacementStats, ServerStats};

/// One metric of a server.
pub(super) struct Metric {
    pub(super) name: &'static str,
    pub(super) value: Value,
    unit: Unit,
    help: &'static str,
}

/// How the value is read from the counts of a server.
#[derive(Clone, Copy)]
pub(super) enum Value {
    /// A sum, which never decreases.
    Counter(fn(&ServerStats) -> u64),
    /// A present value.
    Gauge(fn(&ServerStats) -> u64),
}

/// Tells the recorder the unit and the meaning of each metric.
pub(super) fn describe() {
    for Metric { name, value, unit, help } in METRICS {
        match value {
            Value::Counter(_) => metrics::describe_counter!(*name, *unit, *help),
            Value::Gauge(_) => metrics::describe_gauge!(*name, *unit, *help),
        }
    }
}

/// 1 if handlers run on the pollers.
fn is_inline(stats: &ServerStats) -> u64 {
    let is_inline = match &stats.auto {
        Some(auto) => auto.is_inline,
        None => stats.placement == Placement::Inline,
    };
    is_inline.into()
}

/// A measurement of the placement; 0 where handlers never move.
fn auto(stats: &ServerStats, read: impl FnOnce(&PlacementStats) -> u64) -> u64 {
    stats.auto.as_ref().map_or(0, read)
}

macro_rules! metrics {
    ($($kind:ident $name:literal, $unit:ident, $help:literal: |$stats:ident| $value:expr;)+) => {
        pub(super) const METRICS: &[Metric] = &[$(
            Metric {
                name: concat!("ringpoll_", $name),
                value: Value::$kind(|$stats| $value),
                unit: Unit::$unit,
                help: $help,
            },
        )+];
    };
}

metrics! {
    Counter "accepted_total", Count, "Connections accepted and served":
        |s| s.accepted;
    Counter "refused_total", Count, "Connections closed right after they were accepted":
        |s| s.refused;
    Gauge "open_connections", Count, "Connections of the server that are open":
        |s| s.open;
    Gauge "spawned_futures", Count, "Spawned futures that have not ended":
        |s| s.spawned;
    Counter "handler_errors_total", Count, "Runs and spawned futures that returned an error":
        |s| s.handler_errors;
    Counter "handler_panics_total", Count, "Runs and spawned futures that panicked":
        |s| s.handler_panics;
    Counter "accept_pauses_total", Count, "Pauses of accepting, for want of descriptors or memory":
        |s| s.accept_pauses;
    Counter "cut_total", Count, "Connections that a forced shutdown has cut":
        |s| s.cut;
    Gauge "pollers", Count, "Poller threads":
        |s| s.poller_count as u64;
    Gauge "poller_connections", Count, "Connections that the pollers hold":
        |s| s.pollers.connections;
    Gauge "poller_listeners", Count, "Listeners that the pollers hold":
        |s| s.pollers.listeners;
    Gauge "poller_timers", Count, "Timers that are armed":
        |s| s.pollers.timers;
    Gauge "poller_blocks", Count, "Blocks of buffer memory in use":
        |s| s.pollers.blocks;
    Gauge "poller_block_bytes", Bytes, "Bytes of the blocks in use":
        |s| s.pollers.block_bytes;
    Gauge "poller_free_block_bytes", Bytes, "Bytes of free blocks that the pollers keep":
        |s| s.pollers.free_block_bytes;
    Counter "poller_received_bytes_total", Bytes, "Bytes received":
        |s| s.pollers.received_bytes;
    Counter "poller_sent_bytes_total", Bytes, "Bytes that the kernel has accepted for sending":
        |s| s.pollers.sent_bytes;
    Gauge "poller_sends_in_flight", Count, "Sends that are not complete":
        |s| s.pollers.sends_in_flight;
    Counter "poller_handler_runs_total", Count, "Runs of handlers that were begun or queued":
        |s| s.pollers.handler_runs;
    Counter "poller_moved_runs_total", Count, "Runs that workers took from a blocked poller":
        |s| s.pollers.moved_runs;
    Counter "poller_system_calls_total", Count, "System calls of all kinds that are counted":
        |s| s.pollers.system_calls();
    Counter "poller_wait_calls_total", Count, "Calls that wait for events":
        |s| s.pollers.wait_calls;
    Counter "poller_receive_calls_total", Count, "Receive calls of pollers":
        |s| s.pollers.receive_calls;
    Counter "poller_direct_receives_total", Count, "Receive calls of readers":
        |s| s.pollers.direct_receives;
    Counter "poller_send_calls_total", Count, "Send calls":
        |s| s.pollers.send_calls;
    Counter "poller_wake_calls_total", Count, "Wake-ups of a sleeping poller":
        |s| s.pollers.wake_calls;
    Counter "poller_ring_submissions_total", Count, "Operations submitted to a ring":
        |s| s.pollers.ring_submissions;
    Counter "poller_ring_completions_total", Count, "Completions taken from a ring":
        |s| s.pollers.ring_completions;
    Counter "poller_completion_overflows_total", Count, "Overflows of a completion queue":
        |s| s.pollers.completion_overflows;
    Counter "poller_starvations_total", Count, "Waits of a connection for a free receive buffer":
        |s| s.pollers.starvations;
    Counter "poller_starved_ns_total", Nanoseconds, "Waits of connections for a receive buffer":
        |s| s.pollers.starved_ns;
    Counter "poller_zero_copy_sends_total", Count, "Zero-copy sends that have ended":
        |s| s.pollers.zero_copy_sends;
    Counter "poller_zero_copy_copied_total", Count, "Zero-copy sends that the kernel has copied":
        |s| s.pollers.zero_copy_copied;
    Gauge "poller_zero_copy_held_bytes", Bytes, "Bytes that the kernel uses after a zero-copy send":
        |s| s.pollers.zero_copy_held_bytes;
    Counter "poller_spins_won_total", Count, "Spins that found work":
        |s| s.pollers.spins_won;
    Counter "poller_spins_lost_total", Count, "Spins that found no work":
        |s| s.pollers.spins_lost;
    Gauge "sqpoll_threads", Count, "Kernel threads that poll rings":
        |s| s.pollers.sqpoll_threads;
    Counter "sqpoll_cpu_us_total", Microseconds, "CPU time of the kernel threads that poll rings":
        |s| s.pollers.sqpoll_cpu_us;
    Counter "sqpoll_work_us_total", Microseconds, "The part of that time with requests":
        |s| s.pollers.sqpoll_work_us;
    Gauge "placement_inline", Count, "1: handlers run on pollers, 0: elsewhere":
        |s| is_inline(s);
    Gauge "placement_crowded", Count, "1: CPUs are short":
        |s| auto(s, |auto| auto.is_crowded.into());
    Counter "placement_flips_total", Count, "Moves of the handlers, to pollers or to workers":
        |s| auto(s, |auto| auto.flips);
    Gauge "placement_delay_ns", Nanoseconds, "Mean delay of requests by other handlers":
        |s| auto(s, |auto| auto.delay_ns);
    Gauge "placement_wake_ns", Nanoseconds, "The cost of waking a worker":
        |s| auto(s, |auto| auto.wake_ns);
    Gauge "placement_used_ppm", Count, "CPUs in use, in millionths of those that there are":
        |s| auto(s, |auto| auto.used_ppm);
    Gauge "placement_held_up_ppm", Count, "Time of a poller that long handlers take, in millionths":
        |s| auto(s, |auto| auto.held_up_ppm);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_those_of_counters_end_in_total() {
        let mut names: Vec<_> = METRICS.iter().map(|metric| metric.name).collect();
        for Metric { name, value, .. } in METRICS {
            assert_eq!(name.ends_with("_total"), matches!(value, Value::Counter(_)), "{name}");
        }
        let count = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), count);
    }
}
