//! A shutdown that finds thousands of runs queued behind handlers that block.

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use crate::harness::*;

macro_rules! cases {
    ($tests:ident, $mount:ident) => {
        $tests! { $mount, backlog:
            a_forced_shutdown_gives_up_what_is_queued_behind_blocked_handlers
        }
    };
}
pub(crate) use cases;

/// Threads that run handlers; the mounts have so many workers or pollers.
const THREADS: usize = 2;

/// Counts how many futures of handlers there are.
struct Counted(Arc<AtomicUsize>);

impl Counted {
    fn new(count: &Arc<AtomicUsize>) -> Counted {
        count.fetch_add(1, Ordering::SeqCst);
        Counted(Arc::clone(count))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Where a connection's run is queued apart from its poller there are more of them: elsewhere
/// blocked pollers do not even receive.
fn crowd(placement: Placement) -> usize {
    match placement {
        Placement::Pool { .. } => 2000,
        _ => 500,
    }
}

pub(crate) fn a_forced_shutdown_gives_up_what_is_queued_behind_blocked_handlers(
    t: &Fixture,
) -> Check {
    let placement = t.mount().placement;
    let crowd = crowd(placement);
    let before = thread_count();
    // The threads of the group are blocked, so no other test may use them.
    let mut own = tokio::runtime::Builder::new_multi_thread();
    let own = own.worker_threads(THREADS).build()?;
    let (latch, live) = (Latch::new(), Arc::new(AtomicUsize::new(0)));
    let (halts, counted) = (Arc::clone(&latch), Arc::clone(&live));
    let builder = match placement {
        Placement::Tokio => t.server().tokio(own.handle().clone()),
        _ => t.server(),
    };
    let server = t.spawn(builder.pollers(THREADS).on_request(move |mut conn| {
        let (latch, counted) = (Arc::clone(&halts), Counted::new(&counted));
        async move {
            let _counted = counted;
            latch.pass();
            // The rest of the request never comes.
            conn.next(1000).await.map(drop)
        }
    }));
    let mut peers = (0..crowd).map(|_| dial(&server)).collect::<Check<Vec<_>>>()?;
    eventually("all are accepted", || server.stats().accepted == crowd as u64);
    for peer in &mut peers {
        peer.write_all(b"?")?;
    }
    eventually("the threads are blocked", || latch.count() == THREADS);
    let queues = matches!(placement, Placement::Pool { .. } | Placement::Tokio);
    let queued = || server.stats().pollers.received_bytes == crowd as u64 || !queues;
    eventually("all runs are queued", queued);
    assert_eq!(live.load(Ordering::SeqCst), THREADS, "what is queued has no future");

    let error = server.shutdown(Duration::from_millis(20)).expect_err("all are busy");
    assert!(error.is_timeout() && error.to_string().contains(&crowd.to_string()), "{error}");
    assert_eq!(server.shutdown_forced(Duration::from_millis(20))?, crowd);
    if let Placement::Pool { .. } = placement {
        // At once, though the workers are still blocked.
        assert_eq!(server.stats().open, THREADS as u64);
    }
    latch.open();
    eventually("no future is left", || live.load(Ordering::SeqCst) == 0);
    eventually("no connection is left", || server.stats().open == 0);
    peers.iter().for_each(assert_ended);
    own.shutdown_timeout(DEADLINE);
    // The test runner itself may come by with a thread.
    let gone = holds_within(DEADLINE, || thread_count() <= before + 1);
    assert!(gone, "{before} threads before, now:\n{}", threads());
    let stats = server.stats();
    assert_eq!((stats.accepted, stats.cut, stats.handler_panics), (crowd as u64, crowd as u64, 0));
    assert_eq!(
        stats.handler_errors, stats.handler_runs,
        "each run that was begun or queued has failed"
    );
    Ok(())
}
