//! Queues of a ring that are too small, and how many connections share them.
//!
//! A full queue costs visits to the kernel and loses nothing.

use std::io::Write;
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use ringpoll::{PollerStats, ServerHandle, UringOptions};
use rustix::process::{Resource, getrlimit};

use crate::harness::*;

macro_rules! cases {
    ($tests:ident, $mount:ident) => {
        $tests! { $mount, ring_queues:
            a_submission_queue_of_two_entries_loses_nothing
            an_overflowing_completion_queue_loses_nothing
            accepts_that_overflow_the_completion_queue_are_served
            ends_that_overflow_the_completion_queue_are_seen
            timers_fire_beside_an_overflowing_completion_queue
            dials_through_tiny_queues_all_succeed
            thousands_of_connections_share_a_small_buffer_ring
        }
    };
}
pub(crate) use cases;

/// Small queues and few buffers, so all of them run out.
fn tiny() -> UringOptions {
    UringOptions::new().queue_entries(2, 4).receive_buffers(4, 1)
}

/// One poller with `options`, whose handler echoes frames or stands at the gate.
fn gated_server(t: &Fixture, options: UringOptions) -> (ServerHandle, Arc<Gate>) {
    let gate = Gate::new();
    let halts = Arc::clone(&gate);
    let builder = t.gated_server().uring(options);
    let builder = builder.backend(t.mount().with_small_queues());
    let server = t.spawn(builder.on_request(move |conn| Arc::clone(&halts).echo_frame(conn)));
    (server, gate)
}

fn stats(server: &ServerHandle) -> PollerStats {
    server.stats().pollers
}

/// Rounds of all connections sending at once, while the poller looks elsewhere.
fn burst(server: &ServerHandle, gate: &Gate, peers: &[TcpStream], rounds: usize) -> Check {
    for round in 0..rounds {
        let size = [10, 3000, 9000][round % 3];
        gate.hold(server, || {
            for (tag, mut peer) in peers.iter().enumerate() {
                peer.write_all(&frame(tag + round, size))?;
            }
            Ok(())
        })?;
        for (tag, peer) in peers.iter().enumerate() {
            expect_frame(peer, tag + round, size)?;
        }
    }
    Ok(())
}

/// Two hundred answers, two entries.
pub(crate) fn a_submission_queue_of_two_entries_loses_nothing(t: &Fixture) -> Check {
    let options = UringOptions::new().queue_entries(2, 1024);
    let (server, gate) = gated_server(t, options);
    // Accepted all at once: a receive has to be armed for each.
    let peers =
        gate.hold(&server, || (0..200).map(|_| dial(&server)).collect::<Check<Vec<_>>>())?;
    burst(&server, &gate, &peers, 6)?;
    let stats = stats(&server);
    // A kernel thread that empties it has to be waited for, but not to be called.
    let is_full = stats.submit_calls > 0 || stats.full_send_rings > 0;
    assert!(is_full, "the queue was never full: {stats:?}");
    assert_eq!(server.stats().handler_errors, 0);
    left_with(&server, 200);
    Ok(())
}

/// Hundreds of completions, room for four.
pub(crate) fn an_overflowing_completion_queue_loses_nothing(t: &Fixture) -> Check {
    let (server, gate) = gated_server(t, UringOptions::new().queue_entries(4, 4));
    let peers: Vec<_> = (0..200).map(|_| dial(&server)).collect::<Check<_>>()?;
    burst(&server, &gate, &peers, 9)?;
    let stats = stats(&server);
    let (overflows, rearms) = (stats.completion_overflows, stats.rearms);
    assert!(overflows + rearms > 0, "the queue never overflowed: {stats:?}");
    assert_eq!(server.stats().handler_errors, 0);
    left_with(&server, 200);
    Ok(())
}

/// At the listener: a connection whose completion was set aside is not forgotten.
pub(crate) fn accepts_that_overflow_the_completion_queue_are_served(t: &Fixture) -> Check {
    const COUNT: usize = 300;
    let (server, gate) = gated_server(t, tiny());
    for _ in 0..3 {
        let peers = gate.hold(&server, || {
            (0..COUNT)
                .map(|tag| {
                    let mut peer = dial(&server)?;
                    peer.write_all(&frame(tag, 500))?;
                    Ok(peer)
                })
                .collect::<Check<Vec<_>>>()
        })?;
        for (tag, peer) in peers.iter().enumerate() {
            expect_frame(peer, tag, 500)?;
        }
        drop(peers);
        left_with(&server, 0);
    }
    // The three connections that blocked the gate are included.
    assert_eq!(server.stats().accepted, 3 * (COUNT as u64 + 1));
    Ok(())
}

/// An EOF or a reset that was set aside still ends its connection.
pub(crate) fn ends_that_overflow_the_completion_queue_are_seen(t: &Fixture) -> Check {
    const COUNT: usize = 200;
    let (server, gate) = gated_server(t, tiny());
    for round in 0..3 {
        let peers: Vec<_> = (0..COUNT).map(|_| dial(&server)).collect::<Check<_>>()?;
        for (tag, peer) in peers.iter().enumerate() {
            exchange_frame(peer, tag, 100)?;
        }
        let half_closed = gate.hold(&server, || {
            let mut half_closed = Vec::new();
            for (tag, mut peer) in peers.into_iter().enumerate() {
                match (tag + round) % 4 {
                    0 => drop(peer),
                    1 => reset(peer)?,
                    2 => {
                        peer.write_all(&frame(tag, 6000))?;
                        peer.shutdown(Shutdown::Write)?;
                        half_closed.push((tag, peer));
                    }
                    _ => peer.write_all(&frame(tag, 6000))?,
                }
            }
            Ok(half_closed)
        })?;
        for (tag, peer) in half_closed {
            expect_frame(&peer, tag, 6000)?;
            assert_eof(&peer);
        }
        left_with(&server, 0);
    }
    Ok(())
}

/// A timeout is on time although completions of others crowd the queue.
pub(crate) fn timers_fire_beside_an_overflowing_completion_queue(t: &Fixture) -> Check {
    let (server, gate) = gated_server(t, tiny());
    let peers: Vec<_> = (0..100).map(|_| dial(&server)).collect::<Check<_>>()?;
    let timed = t.spawn(
        t.server()
            .use_pollers(server.pollers())
            .read_timeout(Duration::from_millis(30))
            .on_request(echo_frame),
    );
    for _ in 0..5 {
        let mut late = dial(&timed)?;
        late.write_all(&[0, 0])?;
        burst(&server, &gate, &peers, 2)?;
        // The rest never comes: the read of four bytes times out and its connection is closed.
        assert_ended(&late);
    }
    assert_eq!(timed.stats().handler_errors, 5);
    Ok(())
}

/// At the client's end: connects, receives and sends through queues of two and four.
pub(crate) fn dials_through_tiny_queues_all_succeed(t: &Fixture) -> Check {
    const AT_ONCE: usize = 100;
    let server = t.spawn(t.server().on_request(echo_frame));
    let addr = addr_of(&server).to_string();
    let builder = ringpoll::Pollers::builder().backend(t.mount().with_small_queues()).count(1);
    let group = builder.uring(tiny()).build()?;
    let dialer = ringpoll::Dialer::new().pollers(group.clone());
    for _ in 0..3 {
        let dials: Vec<_> = (0..AT_ONCE)
            .map(|tag| {
                let (dialer, addr) = (dialer.clone(), addr.clone());
                runtime().spawn(async move {
                    let mut conn = dialer.connect(&addr).await?;
                    for size in [10, 5000, 100] {
                        conn.write(frame(tag, size))?;
                        conn.flush().await?;
                        let got = conn.next(4 + size).await?;
                        assert_pattern(&got[4..], own(tag, 0));
                    }
                    Check::Ok(())
                })
            })
            .collect();
        block_on(async {
            for dial in dials {
                dial.await??;
            }
            Ok(())
        })?;
    }
    end_empty(&group)
}

/// As many as the process may have: both ends are in it.
pub(crate) fn thousands_of_connections_share_a_small_buffer_ring(t: &Fixture) -> Check {
    const SPARE_FDS: usize = 500;
    let wanted = if cfg!(debug_assertions) { 2000 } else { 10_000 };
    let fds_max = getrlimit(Resource::Nofile).current.unwrap_or(1 << 20) as usize;
    let count = wanted.min(fds_max.saturating_sub(SPARE_FDS) / 2);
    let options = UringOptions::new().receive_buffers(16, 4);
    let server = t.spawn(t.server().uring(options).on_request(echo_frame));
    let mut peers = Vec::with_capacity(count);
    for tag in 0..count {
        peers.push(dial(&server)?);
        // Some speak while others come.
        if tag % 7 == 0 {
            exchange_frame(&peers[tag / 2], tag, 100)?;
        }
    }
    for (round, size) in [1000, 5000].into_iter().enumerate() {
        for (tag, mut peer) in peers.iter().enumerate() {
            peer.write_all(&frame(tag + round, size))?;
        }
        for (tag, peer) in peers.iter().enumerate() {
            expect_frame(peer, tag + round, size)?;
        }
    }
    assert_eq!(server.stats().open, count as u64);
    eventually("idle ones own no buffers", || stats(&server).blocks == 0);
    // All leave at once, while others come.
    let leaving = thread::spawn(move || drop(peers));
    for tag in 0..50 {
        exchange_frame(&dial(&server)?, tag, 2000)?;
    }
    leaving.join().expect("a drop does not panic");
    left_with(&server, 0);
    Ok(())
}
