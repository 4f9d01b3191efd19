//! Promises about ends and about time: what is on its way arrives, what is given up is let go of,
//! and a timer fires only for those who have nothing.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use ringpoll::{Connection, Dialer, Error, Handle, Pollers, Result, ServerHandle};
use rustix::net::{SendFlags, sockopt};
use tokio::sync::Semaphore;

use crate::harness::*;

macro_rules! cases {
    ($tests:ident, $mount:ident) => {
        $tests! { $mount, promises:
            a_transfer_that_moves_is_never_idle
            a_transfer_to_a_half_closed_peer_is_never_idle
            a_peer_that_takes_nothing_is_idle
            a_slow_transfer_outlives_the_linger_time
            a_peer_that_closes_on_refused_input_is_closed
            a_peer_that_resets_on_refused_input_is_closed
            a_peer_that_half_closes_on_refused_input_is_closed
            detaching_given_up_in_its_flush_closes_the_socket
            detaching_given_up_in_its_removal_closes_the_socket
            a_failed_flush_in_detach_closes_the_connection
            close_callbacks_of_a_detached_connection_have_a_valid_fd
            submitted_before_a_close_is_sent
            a_peer_that_never_reads_keeps_no_closed_connection
            idle_timers_fire_only_after_a_look_at_what_has_arrived
            read_timers_fire_only_after_a_look_at_what_has_arrived
            urgent_data_hangs_nobody
            a_server_that_is_built_and_dropped_leaves_no_thread
            a_server_whose_pollers_were_shut_down_ends_and_leaves_no_thread
            shutdown_from_a_worker_is_refused
        }
    };
}
pub(crate) use cases;

const SHORT: Duration = Duration::from_millis(50);
const IDLE: Duration = Duration::from_millis(300);
/// More than the kernel takes for a peer that does not read.
static TOO_MUCH: [u8; 16 << 20] = [7; 16 << 20];

/// Reads `total` bytes of the test stream, a chunk at a time.
fn read_slowly(peer: &TcpStream, total: usize, chunk: usize, pause: Duration) -> Check {
    let mut at = 0;
    while at < total {
        let count = chunk.min(total - at);
        let bytes = read_exactly(peer, count);
        let bytes = bytes.map_err(|error| Failure::new(format_args!("cut at {at}: {error}")))?;
        assert_pattern(&bytes, at);
        at += count;
        thread::park_timeout(pause);
    }
    Ok(())
}

/// Keeps the kernel from taking much for this peer. Below two segments of the loopback, of 64 KiB
/// each, a window opens only by a timer.
fn hold_little(peer: &TcpStream) -> Check {
    Ok(sockopt::set_socket_recv_buffer_size(peer, 128 << 10)?)
}

/// Reads to the end of the stream; how many bytes came, and whether it was a clean end.
fn read_to_end(mut peer: &TcpStream) -> Check<(usize, bool)> {
    let (mut buffer, mut bytes) = (vec![0; 64 << 10], 0);
    loop {
        match peer.read(&mut buffer) {
            Ok(0) => return Ok((bytes, true)),
            Ok(count) => bytes += count,
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return Ok((bytes, false)),
            Err(error) => {
                return Err(Failure::new(format_args!("no end after {bytes} bytes: {error}")));
            }
        }
    }
}

fn is_gone(handle: &Handle) -> bool {
    handle.with_fd(|_| ()).is_err()
}

/// Sends 8 MiB to a peer that takes seconds for it, with an idle timeout far below that.
fn transfer_slowly(t: &Fixture, half_closes: bool) -> Check {
    const TOTAL: usize = 8 << 20;
    let (mut peer, done) = t.drive(move |mut conn| async move {
        conn.next(1).await?;
        if half_closes {
            assert!(conn.next(1).await.expect_err("half-closed").is_eof());
        }
        conn.set_idle_timeout(Some(IDLE));
        conn.write(pattern(0, TOTAL))?;
        conn.flush().await?;
        Ok(())
    })?;
    hold_little(&peer)?;
    peer.write_all(b"?")?;
    if half_closes {
        peer.shutdown(Shutdown::Write)?;
    }
    read_slowly(&peer, TOTAL, 64 << 10, Duration::from_millis(25))?;
    done.wait();
    assert_eof(&peer);
    Ok(())
}

/// Also while the bytes that move are the kernel's, before the flush ends and after it.
pub(crate) fn a_transfer_that_moves_is_never_idle(t: &Fixture) -> Check {
    transfer_slowly(t, false)
}

pub(crate) fn a_transfer_to_a_half_closed_peer_is_never_idle(t: &Fixture) -> Check {
    transfer_slowly(t, true)
}

/// A cut is a reset: a clean end would pass for the whole.
pub(crate) fn a_peer_that_takes_nothing_is_idle(t: &Fixture) -> Check {
    let (peer, ended) = t.drive(|mut conn| async move {
        conn.set_idle_timeout(Some(IDLE));
        conn.write(&TOO_MUCH[..])?;
        let handle = conn.handle();
        Ok((handle, conn.flush().await))
    })?;
    let (handle, flushed) = ended.wait();
    let error = flushed.expect_err("nobody reads");
    assert!(error.is_closed(), "{error:?}");
    eventually("its descriptor is closed", || is_gone(&handle));
    let (bytes, is_clean) = read_to_end(&peer)?;
    assert!(bytes < TOO_MUCH.len(), "everything came");
    assert!(!is_clean, "a clean end after {bytes} bytes of {}", TOO_MUCH.len());
    Ok(())
}

/// Takes longer than the linger time, so only when asked for, and with one backend.
pub(crate) fn a_slow_transfer_outlives_the_linger_time(t: &Fixture) -> Check {
    const TOTAL: usize = 16 << 20;
    const CHUNK: usize = 64 << 10;
    /// Of the reading.
    const TIME: Duration = Duration::from_secs(35);
    let is_nightly = std::env::var_os("RINGPOLL_NIGHTLY").is_some_and(|value| value == "1");
    if !is_nightly || t.mount().backend != Backend::Epoll {
        return skip("a slow transfer", "it takes 35 s: RINGPOLL_NIGHTLY=1, epoll");
    }
    let mut readings = Vec::new();
    for half_closes in [false, true] {
        let (peer, done) = t.drive(move |mut conn| async move {
            if half_closes {
                assert!(conn.next(1).await.expect_err("half-closed").is_eof());
            }
            conn.write(pattern(0, TOTAL))?;
            conn.submit()?;
            Ok(())
        })?;
        hold_little(&peer)?;
        if half_closes {
            peer.shutdown(Shutdown::Write)?;
        }
        done.wait();
        readings.push(on_thread(move || {
            read_slowly(&peer, TOTAL, CHUNK, TIME / (TOTAL / CHUNK) as u32)?;
            assert_eof(&peer);
            Ok(())
        }));
    }
    readings.iter().for_each(Outcome::wait_for_all);
    Ok(())
}

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

/// Begins to detach and drops the future, while a handle is kept.
fn give_up_detaching(t: &Fixture, output: &'static [u8]) -> Check {
    const ROUNDS: usize = 20;
    let mut given_up = 0;
    for _ in 0..ROUNDS {
        let (peer, done) = t.drive(move |mut conn| async move {
            let handle = conn.handle();
            if !output.is_empty() {
                conn.write(output)?;
            }
            let is_given_up = poll_once(conn.detach()).await.is_none();
            Ok((handle, is_given_up))
        })?;
        let (handle, is_given_up) = done.wait();
        read_to_end(&peer)?;
        assert!(holds_within(DEADLINE, || is_gone(&handle)), "its descriptor stays open");
        given_up += usize::from(is_given_up);
        if given_up == 3 {
            return Ok(());
        }
    }
    // A poller may be faster than one poll, but not so often.
    assert!(given_up > 0, "each of {ROUNDS} was detached in one poll");
    Ok(())
}

pub(crate) fn detaching_given_up_in_its_flush_closes_the_socket(t: &Fixture) -> Check {
    give_up_detaching(t, &TOO_MUCH)
}

pub(crate) fn detaching_given_up_in_its_removal_closes_the_socket(t: &Fixture) -> Check {
    give_up_detaching(t, b"")
}

/// As its documentation says; while its handler still runs.
pub(crate) fn a_failed_flush_in_detach_closes_the_connection(t: &Fixture) -> Check {
    let permits = Arc::new(Semaphore::new(0));
    let stays = Arc::clone(&permits);
    let (report, failed) = outcome();
    let (peer, done) = t.drive(|mut conn| async move {
        conn.set_write_timeout(Some(SHORT));
        conn.write(&TOO_MUCH[..])?;
        let handle = conn.handle();
        let error = conn.detach().await.expect_err("nobody reads");
        tell(report, Ok((handle, error)));
        stays.acquire().await?.forget();
        Ok(())
    })?;
    let (handle, error) = failed.wait();
    assert!(error.is_write_timeout(), "{error:?}");
    let is_closed = holds_within(DEADLINE, || handle.is_closed());
    permits.add_permits(1);
    done.wait();
    assert!(is_closed, "it is not closed while its handler runs");
    drop(peer);
    eventually("its descriptor is closed", || is_gone(&handle));
    Ok(())
}

pub(crate) fn close_callbacks_of_a_detached_connection_have_a_valid_fd(t: &Fixture) -> Check {
    for round in 0..20 {
        let (peer, done) = t.drive(|conn| async move {
            let (report, seen) = channel();
            conn.on_close(move |handle| {
                report.send(handle.with_fd(|_| ()).is_ok()).expect("the test listens");
            });
            Ok((conn.detach().await?, seen))
        })?;
        let (detached, seen) = done.wait();
        assert!(seen.recv_timeout(DEADLINE)?, "no descriptor in a callback, round {round}");
        drop(detached);
        assert_eof(&peer);
    }
    Ok(())
}

/// All of it, and then a clean end; what was only written is not sent.
pub(crate) fn submitted_before_a_close_is_sent(t: &Fixture) -> Check {
    /// Pieces, and bytes of each.
    const SHAPES: [(usize, usize); 5] =
        [(1, 1 << 10), (100, 1 << 10), (1, 1 << 20), (3, 1 << 20), (8, 1 << 20)];
    for round in 0..50 {
        let (count, bytes) = SHAPES[round % SHAPES.len()];
        let (peer, done) = t.drive(move |mut conn| async move {
            for index in 0..count {
                conn.write(pattern(index * bytes, bytes))?;
            }
            conn.submit()?;
            conn.write_copy(b"only written")?;
            conn.close();
            assert!(conn.is_closed());
            Ok(())
        })?;
        let (mut at, mut buffer) = (0, vec![0; 256 << 10]);
        let wanted = count * bytes;
        loop {
            let got = (&peer).read(&mut buffer);
            let end = |what| Failure::new(format_args!("round {round}, {at} of {wanted}: {what}"));
            match got {
                Ok(0) if at == wanted => break,
                Ok(0) => return Err(end("a clean end too early".to_owned())),
                Ok(more) => assert_pattern(&buffer[..more], at),
                Err(ref error) => return Err(end(error.to_string())),
            }
            at += got.unwrap_or_default();
        }
        done.wait();
    }
    Ok(())
}

/// Closed at once for everybody here, and ended by a shutdown that does not wait.
pub(crate) fn a_peer_that_never_reads_keeps_no_closed_connection(t: &Fixture) -> Check {
    let close = |mut conn: Connection| async move {
        conn.write(&TOO_MUCH[..])?;
        conn.submit()?;
        conn.close();
        Ok::<_, Error>(conn.handle())
    };
    if t.mount().side == Side::Client {
        let group = Pollers::builder().backend(t.mount().backend).count(1).build()?;
        let (one, _peer) = tcp_pair()?;
        let conn = Dialer::new().pollers(group.clone()).adopt(one.into())?;
        let handle = block_on(async { Ok(close(conn).await?) })?;
        assert!(handle.is_closed());
        on_thread(move || Ok(group.shutdown()?)).wait();
        assert!(is_gone(&handle), "its descriptor outlives its pollers");
        return Ok(());
    }
    let (sender, closed) = channel();
    let server = t.spawn(t.server().on_connect(move |conn| {
        let sender = sender.clone();
        async move { sender.send(close(conn).await?).map_err(Error::other) }
    }));
    let _peer = dial(&server)?;
    let handle: Handle = closed.recv_timeout(DEADLINE)?;
    assert!(handle.is_closed());
    let ending = server.clone();
    on_thread(move || Ok(ending.shutdown_forced(Duration::ZERO)?)).wait();
    assert_eq!(server.stats().open, 0);
    assert!(is_gone(&handle), "its descriptor outlives its server");
    Ok(())
}

/// Connections that a poller finds all at once when it was held up: more than it looks at in one go.
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

/// The urgent byte is not in the stream (`SO_OOBINLINE` is off), and a receive stops before it.
pub(crate) fn urgent_data_hangs_nobody(t: &Fixture) -> Check {
    for round in 0..20 {
        let (mut peer, done) = t.drive(move |mut conn| async move {
            assert_pattern(&conn.next(200).await?, round);
            conn.write_copy(b"answer")?;
            conn.flush().await?;
            Ok(())
        })?;
        peer.write_all(&pattern(round, 100))?;
        rustix::net::send(&peer, b"!", SendFlags::OOB)?;
        peer.write_all(&pattern(round + 100, 100))?;
        let answer = read_exactly(&peer, 6);
        let answer =
            answer.map_err(|error| Failure::new(format_args!("round {round}: {error}")))?;
        assert_eq!(answer, b"answer");
        done.wait();
    }
    Ok(())
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
