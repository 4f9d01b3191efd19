//! Promises of a server about ends and timeouts: connections of ended peers close, a timer fires
//! only if no byte has arrived, and threads end.

use std::io::Write;
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use ringpoll::{Connection, Error, Handle, Result, ServerHandle};

use crate::harness::*;

macro_rules! cases {
    ($tests:ident, $mount:ident) => {
        $tests! { $mount, server_promises:
            a_peer_that_closes_on_refused_input_is_closed
            a_peer_that_resets_on_refused_input_is_closed
            a_peer_that_half_closes_on_refused_input_is_closed
            idle_timers_fire_only_after_a_look_at_what_has_arrived
            read_timers_fire_only_after_a_look_at_what_has_arrived
            a_peer_that_sends_now_and_then_is_not_idle
            a_server_that_is_built_and_dropped_leaves_no_thread
            a_server_whose_pollers_were_shut_down_ends_and_leaves_no_thread
            shutdown_from_a_worker_is_refused
        }
    };
}
pub(crate) use cases;

/// A handler that refuses its input: reception pauses, and the peer ends behind what is paused.
fn end_on_refused_input(t: &Fixture, end: fn(TcpStream) -> Check<Option<TcpStream>>) -> Check {
    let is_gone = Arc::new(AtomicBool::new(false));
    let (told, asked) = (Arc::clone(&is_gone), Arc::clone(&is_gone));
    let runs_after_end = Arc::new(AtomicUsize::new(0));
    let counts = Arc::clone(&runs_after_end);
    let (prepared, handles) = channel();
    let server = t.spawn(
        t.server()
            .input_watermarks(1 << 10, 4 << 10)
            .on_prepare(move |handle| prepared.send(handle.clone()).map_err(Error::other))
            .on_disconnect(move |_| told.store(true, Ordering::SeqCst))
            .on_request(move |conn| {
                if asked.load(Ordering::SeqCst) && !conn.is_empty() {
                    counts.fetch_add(1, Ordering::SeqCst);
                }
                async move {
                    drop(conn);
                    Ok(())
                }
            }),
    );
    let mut peer = dial(&server)?;
    peer.write_all(&pattern(0, 64 << 10))?;
    let handle: Handle = handles.recv_timeout(DEADLINE)?;
    eventually("reception pauses", || handle.stats().unread_bytes >= 4 << 10);
    let left = end(peer)?;
    let closed = || server.stats().open == 0;
    assert!(holds_within(DEADLINE, closed), "it stays open");
    assert!(is_gone.load(Ordering::SeqCst), "nobody was told of the end");
    let runs = runs_after_end.load(Ordering::SeqCst);
    assert!(runs > 0, "its handler was not run again after the end");
    if let Some(peer) = left {
        assert_ended(&peer);
    }
    Ok(server.shutdown(DEADLINE)?)
}

pub(crate) fn a_peer_that_closes_on_refused_input_is_closed(t: &Fixture) -> Check {
    end_on_refused_input(t, |_| Ok(None))
}

pub(crate) fn a_peer_that_resets_on_refused_input_is_closed(t: &Fixture) -> Check {
    end_on_refused_input(t, |peer| {
        reset(peer)?;
        Ok(None)
    })
}

pub(crate) fn a_peer_that_half_closes_on_refused_input_is_closed(t: &Fixture) -> Check {
    end_on_refused_input(t, |peer| {
        peer.shutdown(Shutdown::Write)?;
        Ok(Some(peer))
    })
}

/// Connections that a poller finds all at once when it was held up: more than it looks at in one
/// go.
const CROWD: usize = 200;
/// When their timers are due, and for how long their poller is held up.
const DUE: Duration = Duration::from_millis(500);
const HELD: Duration = Duration::from_millis(1200);
/// Tries to hold a poller up before the timers are due, for a busy host.
const TRIES: usize = 5;

/// Holds up the poller until after `start + DUE`, while all `peers` send. `false`: too late.
fn hold_beyond(
    gate: &Gate,
    server: &ServerHandle,
    start: Instant,
    send: impl FnOnce() -> Check,
) -> Check<bool> {
    gate.hold(server, || {
        send()?;
        let in_time = start.elapsed() < DUE - DUE / 4;
        holds_within(HELD.saturating_sub(start.elapsed()), || false);
        Ok(in_time)
    })
}

/// Its pauses are longer than half of the idle timeout, and nothing else happens at the poller.
pub(crate) fn a_peer_that_sends_now_and_then_is_not_idle(t: &Fixture) -> Check {
    const IDLE: Duration = Duration::from_millis(1500);
    const PAUSE: Duration = Duration::from_millis(1000);
    let server =
        t.spawn(t.server().pollers(1).idle_timeout(IDLE).on_request(|mut conn| async move {
            if conn.next(1).await?[0] == b'?' {
                conn.write_copy(b"!")?;
                conn.flush().await?;
            }
            Ok(())
        }));
    let mut peer = dial(&server)?;
    for byte in [b".", b".", b"?"] {
        thread::park_timeout(PAUSE);
        peer.write_all(byte)?;
    }
    assert_eq!(read_exactly(&peer, 1)?, b"!");
    Ok(())
}

pub(crate) fn idle_timers_fire_only_after_a_look_at_what_has_arrived(t: &Fixture) -> Check {
    for _ in 0..TRIES {
        let gate = Gate::new();
        let halts = Arc::clone(&gate);
        let (prepared, handles) = channel();
        let server = t.spawn(
            t.gated_server()
                .on_prepare(move |handle| prepared.send(handle.clone()).map_err(Error::other))
                .on_request(move |conn| Arc::clone(&halts).echo_frame(conn)),
        );
        let peers = (0..CROWD).map(|_| dial(&server)).collect::<Check<Vec<_>>>()?;
        for (tag, peer) in peers.iter().enumerate() {
            exchange_frame(peer, tag, 10)?;
        }
        let handles: Vec<Handle> = handles.try_iter().collect();
        assert_eq!(handles.len(), CROWD);
        let start = Instant::now();
        handles.iter().for_each(|handle| handle.set_idle_timeout(Some(DUE)));
        let is_in_time = hold_beyond(&gate, &server, start, || {
            for (tag, mut peer) in peers.iter().enumerate() {
                peer.write_all(&frame(tag, 10))?;
            }
            Ok(())
        })?;
        if is_in_time {
            // One that answers was not cut; none has to wait for long now.
            let served = peers.iter().enumerate();
            let cut = served.filter(|(tag, peer)| expect_frame(*peer, *tag, 10).is_err()).count();
            assert_eq!(cut, 0, "of {CROWD} that had sent in time");
            return Ok(());
        }
    }
    skip("idle timers", "this host is too slow to hold a poller up in time")
}

pub(crate) fn read_timers_fire_only_after_a_look_at_what_has_arrived(t: &Fixture) -> Check {
    /// Waits for the rest of its request.
    async fn wait(mut conn: Connection) -> Result<()> {
        conn.next(1).await?;
        conn.set_read_timeout(Some(DUE));
        conn.write_copy(b"k")?;
        conn.flush().await?;
        let rest = conn.next(4).await?;
        conn.set_read_timeout(None);
        conn.write(rest)?;
        conn.flush().await
    }
    for _ in 0..TRIES {
        let gate = Gate::new();
        let halts = Arc::clone(&gate);
        let server = t.spawn(t.gated_server().on_request(move |mut conn| {
            let gate = Arc::clone(&halts);
            async move {
                match conn.peek(1).await?[0] {
                    HALT => gate.echo_frame(conn).await,
                    _ => wait(conn).await,
                }
            }
        }));
        let peers = (0..CROWD).map(|_| dial(&server)).collect::<Check<Vec<_>>>()?;
        let start = Instant::now();
        for peer in &peers {
            let mut peer = peer;
            peer.write_all(b"w")?;
        }
        for peer in &peers {
            assert_eq!(read_exactly(peer, 1)?, b"k");
        }
        let is_in_time = hold_beyond(&gate, &server, start, || {
            for mut peer in &peers {
                peer.write_all(b"rest")?;
            }
            Ok(())
        })?;
        if is_in_time {
            let is_served =
                |peer: &&TcpStream| read_exactly(*peer, 4).is_ok_and(|rest| rest == b"rest");
            let served = peers.iter().filter(is_served).count();
            assert_eq!(served, CROWD, "of {CROWD} whose bytes came in time");
            return Ok(());
        }
    }
    skip("read timers", "this host is too slow to hold a poller up in time")
}

const PLACEMENTS: [Placement; 4] =
    [Placement::Auto, Placement::Inline, Placement::Pool { workers: 3 }, Placement::Tokio];

/// The threads of servers and pollers, without those for synchronous code, which end by themselves.
fn own_threads() -> usize {
    let all = threads();
    all.lines().filter(|line| line.contains(" ringpoll-") && !line.contains(" ringpoll-b")).count()
}

/// What is left of a server, if anything is.
fn left_of(placement: Placement, before: usize) -> Option<String> {
    let gone = holds_within(DEADLINE, || own_threads() <= before);
    let left = || format!("{placement:?}: {before} threads before, now:\n{}", threads());
    (!gone).then(left)
}

/// A server of its own, not one of the fixture's, which keeps its servers to the end.
fn own_server(t: &Fixture, placement: Placement) -> Check<ringpoll::Server> {
    let builder = t.server().placement(placement).tokio(runtime().handle().clone());
    Ok(builder.on_request(echo).bind("127.0.0.1:0")?)
}

pub(crate) fn a_server_that_is_built_and_dropped_leaves_no_thread(t: &Fixture) -> Check {
    let mut left = Vec::new();
    for placement in PLACEMENTS {
        let before = own_threads();
        let server = own_server(t, placement)?;
        assert!(own_threads() > before, "it has no threads");
        drop(server);
        left.extend(left_of(placement, before));
    }
    assert!(left.is_empty(), "{}", left.concat());
    Ok(())
}

pub(crate) fn a_server_whose_pollers_were_shut_down_ends_and_leaves_no_thread(
    t: &Fixture,
) -> Check {
    let mut left = Vec::new();
    for (placement, is_awaited) in PLACEMENTS.into_iter().flat_map(|p| [(p, true), (p, false)]) {
        let before = own_threads();
        let server = own_server(t, placement)?.spawn()?;
        let peer = dial(&server)?;
        assert_eq!(exchange(&peer, b"hello")?, b"hello");
        server.pollers().shutdown()?;
        if is_awaited {
            let waits = server.clone();
            let ended = on_thread(move || Ok(waits.wait().map_err(|error| error.to_string())));
            assert!(ended.wait().is_err(), "{placement:?}: it was not told to end");
        }
        assert_ended(&peer);
        drop(server);
        left.extend(left_of(placement, before).map(|left| format!("{is_awaited}, {left}")));
    }
    assert!(left.is_empty(), "awaited: {}", left.concat());
    Ok(())
}

/// What a handler on a worker is told that shuts its server down: it would wait for itself.
pub(crate) fn shutdown_from_a_worker_is_refused(t: &Fixture) -> Check {
    type Refusal = (&'static str, std::result::Result<(), (bool, String)>);
    let ask = |server: &ServerHandle| -> [Refusal; 2] {
        let told = |error: Error| (error.is_unsupported(), error.to_string());
        let limit = Duration::from_secs(2);
        [
            ("shutdown", server.shutdown(limit).map_err(told)),
            ("shutdown_forced", server.shutdown_forced(limit).map(drop).map_err(told)),
        ]
    };
    let mut failures = String::new();
    for placement in [Placement::Pool { workers: 2 }, Placement::Auto] {
        let asked = Arc::new(Mutex::new(None::<ServerHandle>));
        let asks = Arc::clone(&asked);
        let (report, told) = channel();
        let server = t.spawn(t.server().placement(placement).on_request(move |conn| {
            // Long enough for handlers to be moved to workers, where the library chooses.
            thread::park_timeout(Duration::from_millis(2));
            let name = thread::current().name().unwrap_or_default().to_owned();
            if name.starts_with("ringpoll-w")
                && let Some(server) = asks.lock().expect("nobody panics here").take()
            {
                // Fails where the test has failed.
                let _ = report.send(ask(&server));
            }
            echo(conn)
        }));
        *asked.lock().expect("nobody panics here") = Some(server.clone());
        let peers = (0..8).map(|_| dial(&server)).collect::<Check<Vec<_>>>()?;
        let start = Instant::now();
        let refusals = loop {
            if let Ok(refusals) = told.try_recv() {
                break refusals;
            }
            assert!(start.elapsed() < DEADLINE, "{placement:?}: no handler came to a worker");
            for mut peer in &peers {
                // Fails where the server is shut down, as it should not be.
                let _ = peer.write_all(b"?");
            }
            for peer in &peers {
                let _ = read_exactly(peer, 1);
            }
        };
        for (call, result) in refusals {
            match result {
                Err((true, _)) => {}
                Err((false, other)) => failures += &format!("\n  {placement:?}, {call}: {other}"),
                Ok(()) => failures += &format!("\n  {placement:?}, {call}: it works"),
            }
        }
        if failures.is_empty() {
            for peer in &peers {
                assert_eq!(exchange(peer, b"served")?, b"served");
            }
        }
    }
    assert!(failures.is_empty(), "{failures}");
    Ok(())
}
