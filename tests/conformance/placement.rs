//! Where handlers run when the library chooses: they move, and nothing is lost or reordered.

use std::io::{Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use ringpoll::ServerHandle;

use crate::harness::*;

macro_rules! cases {
    ($tests:ident, $mount:ident) => {
        $tests! { $mount, placement:
            handlers_move_when_their_cost_changes_and_nothing_is_lost
            only_the_library_s_own_choice_is_explained
        }
    };
}
pub(crate) use cases;

fn is_inline(server: &ServerHandle) -> bool {
    server.stats().auto.expect("the library chooses").is_inline
}

/// Counts up on one connection until told to stop; how far it came.
fn count_up(server: &ServerHandle, stop: &AtomicBool) -> Check<u64> {
    let mut peer = dial(server)?;
    let mut count = 0_u64;
    // One number in flight: handlers that are cheap even in a debug build keep no poller busy.
    while !stop.load(Ordering::Relaxed) {
        peer.write_all(&count.to_be_bytes())?;
        let mut number = [0; 8];
        peer.read_exact(&mut number)?;
        assert_eq!(u64::from_be_bytes(number), count, "lost or out of order");
        count += 1;
    }
    Ok(count)
}

struct StopsAtEnd<'a>(&'a AtomicBool);

impl Drop for StopsAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Cheap handlers on the poller, costly ones on workers, and back.
pub(crate) fn handlers_move_when_their_cost_changes_and_nothing_is_lost(t: &Fixture) -> Check {
    let cost_us = Arc::new(AtomicU64::new(0));
    let burns = Arc::clone(&cost_us);
    let server = t.spawn(t.server().on_request(move |mut conn| {
        let burn = Duration::from_micros(burns.load(Ordering::Relaxed));
        async move {
            while conn.len() >= 8 {
                let number = conn.next(8).await?;
                let begun = Instant::now();
                while begun.elapsed() < burn {
                    std::hint::spin_loop();
                }
                conn.write(number)?;
            }
            conn.flush().await?;
            // A number may have come in part.
            if !conn.is_empty() { conn.peek(8).await.map(drop) } else { Ok(()) }
        }
    }));
    let stop = AtomicBool::new(false);
    let counted = thread::scope(|scope| {
        let clients: Vec<_> = (0..2).map(|_| scope.spawn(|| count_up(&server, &stop))).collect();
        // A case that fails must not wait for its clients for ever.
        let _stops = StopsAtEnd(&stop);
        for round in 0..3 {
            cost_us.store(500, Ordering::Relaxed);
            let what = format!("costly handlers leave the poller, round {round}");
            eventually(&what, || !is_inline(&server));
            cost_us.store(0, Ordering::Relaxed);
            let what = format!("cheap handlers come back, round {round}");
            eventually(&what, || is_inline(&server));
        }
        stop.store(true, Ordering::Relaxed);
        let counted = clients.into_iter().map(|client| client.join().expect("does not panic"));
        counted.sum::<Check<u64>>()
    })?;
    let stats = server.stats();
    assert!(counted > 0 && stats.handler_errors == 0, "{counted}, {stats:?}");
    assert!(stats.auto.expect("the library chooses").flips >= 6);
    Ok(())
}

pub(crate) fn only_the_library_s_own_choice_is_explained(t: &Fixture) -> Check {
    for placement in [Placement::Inline, Placement::Pool { workers: 1 }] {
        let server = t.spawn(t.server().placement(placement).on_request(echo));
        assert!(server.stats().auto.is_none() && server.stats().placement == placement);
    }
    let server = t.echo_server();
    let auto = server.stats().auto.expect("the library chooses");
    assert!(auto.is_inline && auto.wake_ns > 0 && auto.flips == 0, "{auto:?}");
    assert_eq!(server.stats().placement, Placement::Auto);
    Ok(())
}
