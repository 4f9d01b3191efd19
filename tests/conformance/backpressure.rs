//! Back-pressure: a slow side slows the other one down, needs bounded memory, and starves no other
//! connection.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use ringpoll::Connection;

use crate::harness::*;

macro_rules! cases {
    ($tests:ident, $mount:ident) => {
        $tests! { $mount, backpressure:
            input_stops_at_the_high_watermark_and_resumes_at_the_low_one
            a_handler_that_waits_elsewhere_bounds_its_input
            a_close_behind_paused_input_is_noticed_and_loses_nothing
            a_close_before_the_first_receive_is_noticed_behind_paused_input
            a_disconnect_behind_paused_input_is_told_once
            output_is_bounded_while_the_peer_does_not_read
            a_flush_larger_than_the_output_bound_goes_through
            a_pipeline_of_two_slow_sides_moves_every_byte_in_bounded_memory
            a_flooding_connection_leaves_the_others_their_share
            a_thousand_stalled_requests_cost_little_memory_each
            idle_connections_own_no_buffers
            the_memory_of_large_messages_goes_back_to_the_system
            slices_that_the_application_keeps_count_against_nobody
            a_reader_beyond_its_share_fails_although_its_peer_is_alive
        }
    };
}
pub(crate) use cases;

/// Of a poller that has little memory.
const BUDGET: usize = 8 << 20;

const LOW: usize = 64 << 10;
const HIGH: usize = 256 << 10;
/// Of the largest blocks that are received into.
const BLOCK_BYTES: usize = 132 << 10;

fn watermarks() -> Tuning {
    Tuning { input_watermarks: (LOW, HIGH), ..Tuning::default() }
}

/// A connection whose owner is the test, not a handler, and the peer.
fn held(t: &Fixture, tuning: Tuning) -> Check<(Connection, TcpStream)> {
    let (peer, conn) = t.drive_tuned(tuning, |conn| async move { Ok(conn) })?;
    Ok((conn.wait(), peer))
}

/// Waits until `conn` receives nothing more; round trips elsewhere are the measure of time.
fn settle(t: &Fixture, conn: &Connection) -> Check<u64> {
    let bystander = t.echo_server();
    let peer = dial(&bystander)?;
    let start = Instant::now();
    loop {
        let before = conn.stats().received_bytes;
        for _ in 0..100 {
            exchange(&peer, b"?")?;
        }
        if conn.stats().received_bytes == before {
            return Ok(before);
        }
        assert!(start.elapsed() < DEADLINE, "input never stops: {:?}", conn.stats());
    }
}

pub(crate) fn input_stops_at_the_high_watermark_and_resumes_at_the_low_one(t: &Fixture) -> Check {
    const TOTAL: usize = 32 << 20;
    let (mut conn, mut peer) = held(t, watermarks())?;
    let writer = on_thread(move || {
        peer.write_all(&pattern(0, TOTAL))?;
        Ok(peer)
    });
    eventually("input fills up", || conn.stats().unread_bytes >= HIGH as u64);
    let stopped = settle(t, &conn)?;
    let unread = conn.stats().unread_bytes as usize;
    assert!(unread < 2 * HIGH, "{unread} bytes are buffered above a watermark of {HIGH}");
    writer.assert_pending();

    block_on(async { Ok(conn.skip(unread - LOW - 1).await?) })?;
    assert_eq!(settle(t, &conn)?, stopped, "resumed above the low watermark");
    block_on(async { Ok(conn.skip(2).await?) })?;
    eventually("input resumes", || conn.stats().received_bytes > stopped);

    let mut at = unread - LOW + 1;
    block_on(async {
        while at < TOTAL {
            let count = conn.readable().await?;
            assert!(count < 2 * HIGH, "{count} bytes are buffered above a watermark of {HIGH}");
            assert_pattern(&conn.next(count).await?, at);
            at += count;
        }
        Ok(())
    })?;
    assert_eq!(at, TOTAL);
    drop(writer.wait());
    Ok(())
}

/// From inside a handler that sleeps and does not read.
pub(crate) fn a_handler_that_waits_elsewhere_bounds_its_input(t: &Fixture) -> Check {
    let gate = Arc::new(tokio::sync::Semaphore::new(0));
    let opened = Arc::clone(&gate);
    let builder = t.server().input_watermarks(LOW, HIGH);
    let server = t.spawn(builder.on_request(move |mut conn| {
        let gate = Arc::clone(&opened);
        async move {
            let _ = gate.acquire().await.expect("the gate stays");
            let count = conn.readable().await?;
            conn.skip(count).await
        }
    }));
    let mut peers: Vec<_> = (0..4).map(|_| dial(&server)).collect::<Check<_>>()?;
    for peer in &mut peers {
        peer.set_write_timeout(Some(Duration::from_millis(50)))?;
        // Until the buffers of the kernel and of the library are full.
        while peer.write_all(&[0; 64 << 10]).is_ok() {}
    }
    let block_bytes = server.stats().pollers.block_bytes as usize;
    // The receive that reaches the watermark may pass it by a block, and a block that is kept with
    // what it received is a quarter full at least.
    let most = 4 * 4 * (HIGH + BLOCK_BYTES);
    assert!(block_bytes <= most, "{block_bytes} bytes of blocks for 4 connections");
    gate.add_permits(1);
    drop(peers);
    eventually("all is drained", || server.stats().open == 0);
    Ok(())
}

/// While reception is paused, `is_active` needs no read either.
pub(crate) fn a_close_behind_paused_input_is_noticed_and_loses_nothing(t: &Fixture) -> Check {
    const SIZE: usize = 50_000;
    let tuning = Tuning { input_watermarks: (1024, 4096), ..Tuning::default() };
    let (mut conn, mut peer) = held(t, tuning)?;
    for at in (0..SIZE).step_by(1000) {
        peer.write_all(&pattern(at, 1000))?;
    }
    drop(peer);
    eventually("the close is noticed", || !conn.is_active());
    assert!(conn.len() < SIZE, "reception was not paused");
    block_on(async {
        assert_pattern(&conn.next(SIZE).await?, 0);
        assert!(conn.next(1).await.expect_err("no more").is_eof());
        Ok(())
    })
}

/// The library learns of the close before it has received a byte.
pub(crate) fn a_close_before_the_first_receive_is_noticed_behind_paused_input(
    t: &Fixture,
) -> Check {
    const SIZE: usize = 50_000;
    for _ in 0..20 {
        let (one, mut peer) = tcp_pair()?;
        peer.write_all(&pattern(0, SIZE))?;
        drop(peer);
        let mut conn = t.dialer().input_watermarks(1024, 4096).adopt(one.into())?;
        eventually("the close is noticed", || !conn.is_active());
        block_on(async {
            assert_pattern(&conn.next(SIZE).await?, 0);
            assert!(conn.next(1).await.expect_err("no more").is_eof());
            Ok(())
        })?;
    }
    Ok(())
}

/// The close is seen twice then, before the rest of the input and after it.
pub(crate) fn a_disconnect_behind_paused_input_is_told_once(t: &Fixture) -> Check {
    let (gate, told) = (Arc::new(tokio::sync::Semaphore::new(0)), Arc::new(AtomicUsize::new(0)));
    let (opened, counted) = (Arc::clone(&gate), Arc::clone(&told));
    let server = t.spawn(
        t.server()
            .input_watermarks(1024, 4096)
            .on_request(move |mut conn| {
                let gate = Arc::clone(&opened);
                async move {
                    let _ = gate.acquire().await.expect("the gate stays");
                    let count = conn.readable().await?;
                    conn.skip(count).await
                }
            })
            .on_disconnect(move |_| {
                counted.fetch_add(1, Ordering::SeqCst);
            }),
    );
    let mut peer = dial(&server)?;
    for at in (0..50_000).step_by(1000) {
        peer.write_all(&pattern(at, 1000))?;
    }
    drop(peer);
    eventually("the disconnect is told", || told.load(Ordering::SeqCst) == 1);
    gate.add_permits(1);
    eventually("the input is drained", || server.stats().open == 0);
    assert_eq!(server.stats().pollers.received_bytes, 50_000);
    assert_eq!(told.load(Ordering::SeqCst), 1, "told twice");
    Ok(())
}

pub(crate) fn output_is_bounded_while_the_peer_does_not_read(t: &Fixture) -> Check {
    const BOUND: usize = 256 << 10;
    const CHUNK: usize = 64 << 10;
    let tuning = Tuning { output_bytes_max: BOUND, ..Tuning::default() };
    let (mut conn, peer) = held(t, tuning)?;
    let start = Instant::now();
    let mut at = 0;
    let error = loop {
        conn.write(pattern(at, CHUNK))?;
        at += CHUNK;
        if let Err(error) = conn.submit() {
            break error;
        }
        assert!(start.elapsed() < DEADLINE, "{at} bytes are accepted for a peer that reads none");
    };
    assert!(error.is_limit() && !error.is_closed(), "{error:?}");
    assert_eq!(conn.pending_len(), CHUNK, "the refused data has to stay");
    assert!(conn.submit().is_err_and(|error| error.is_limit()));
    let unsent = conn.stats().unsent_bytes as usize;
    assert!(unsent <= BOUND + 2 * CHUNK, "{unsent} bytes wait, {BOUND} may");
    let block_bytes = t.stats().block_bytes as usize;
    assert!(block_bytes <= 2 * (BOUND + 2 * CHUNK), "{block_bytes} bytes of blocks");

    let waits = block_on(async { Ok(poll_once(conn.flush()).await.is_none()) })?;
    assert!(waits, "a flush did not wait");
    let reader = on_thread(move || {
        assert_pattern(&read_exactly(&peer, at)?, 0);
        Ok(peer)
    });
    block_on(async { Ok(conn.flush().await?) })?;
    assert_eq!((conn.pending_len(), conn.stats().unsent_bytes), (0, 0));
    drop(reader.wait());
    Ok(())
}

/// The bound is on what waits, not on the size of a message.
pub(crate) fn a_flush_larger_than_the_output_bound_goes_through(t: &Fixture) -> Check {
    const SIZE: usize = 8 << 20;
    let tuning = Tuning { output_bytes_max: 64 << 10, ..Tuning::default() };
    let (peer, done) = t.drive_tuned(tuning, |mut conn| async move {
        for round in 0..2 {
            conn.write(pattern(round * SIZE, SIZE))?;
            conn.flush().await?;
        }
        Ok(())
    })?;
    assert_pattern(&read_exactly(&peer, 2 * SIZE)?, 0);
    done.wait();
    Ok(())
}

/// With a peer that reads slowly: memory stays flat.
pub(crate) fn a_pipeline_of_two_slow_sides_moves_every_byte_in_bounded_memory(
    t: &Fixture,
) -> Check {
    const TOTAL: usize = 16 << 20;
    let tuning =
        Tuning { input_watermarks: (LOW, HIGH), output_bytes_max: HIGH, ..Tuning::default() };
    let (peer, moved) = t.drive_tuned(tuning, |mut conn| async move {
        let mut at = 0;
        while at < TOTAL {
            let count = conn.readable().await?;
            let bytes = conn.next(count).await?;
            conn.write(bytes)?;
            conn.flush().await?;
            at += count;
        }
        Ok(())
    })?;
    let mut sender = peer.try_clone()?;
    let writer = on_thread(move || Ok(sender.write_all(&pattern(0, TOTAL))?));
    let mut random = t.random();
    let mut at = 0;
    let mut block_bytes_peak = 0;
    while at < TOTAL {
        let count = random.within(1..200_000).min(TOTAL - at);
        assert_pattern(&read_exactly(&peer, count)?, at);
        at += count;
        block_bytes_peak = block_bytes_peak.max(t.stats().block_bytes as usize);
    }
    writer.wait();
    moved.wait();
    assert!(block_bytes_peak <= 8 * HIGH, "{block_bytes_peak} bytes of blocks at the peak");
    Ok(())
}

/// Both connections share the one poller there is.
pub(crate) fn a_flooding_connection_leaves_the_others_their_share(t: &Fixture) -> Check {
    let server = t.spawn(t.server().pollers(1).on_request(|mut conn| async move {
        if conn.peek(1).await?[0] == b'p' {
            return echo(conn).await;
        }
        let count = conn.readable().await?;
        conn.skip(count).await
    }));
    let stop = Arc::new(AtomicBool::new(false));
    let mut flood = dial(&server)?;
    let stopped = Arc::clone(&stop);
    let flooding = on_thread(move || {
        let mut sent = 0_usize;
        while !stopped.load(Ordering::Relaxed) {
            flood.write_all(&[0; 64 << 10])?;
            sent += 64 << 10;
        }
        Ok(sent)
    });
    eventually("the flood runs", || server.stats().pollers.received_bytes > 4 << 20);
    let peer = dial(&server)?;
    let mut latencies: Vec<_> = (0..200)
        .map(|_| {
            let start = Instant::now();
            assert_eq!(exchange(&peer, b"ping")?, b"ping");
            Ok(start.elapsed())
        })
        .collect::<Check<_>>()?;
    stop.store(true, Ordering::Relaxed);
    let flooded = flooding.wait();
    latencies.sort_unstable();
    let median = latencies[latencies.len() / 2];
    // A turn of the flood is a bounded number of bytes; half a second of them is starvation.
    assert!(median < Duration::from_millis(500), "median {median:?} beside {flooded} bytes");
    Ok(())
}

/// The first bytes of a request, and never the rest.
pub(crate) fn a_thousand_stalled_requests_cost_little_memory_each(t: &Fixture) -> Check {
    const COUNT: usize = 1000;
    let server = t.spawn(t.server().on_request(|mut conn| async move {
        let frame = conn.next(100).await?;
        conn.write(frame)?;
        conn.flush().await
    }));
    let peers: Vec<_> = (0..COUNT).map(|_| dial(&server)).collect::<Check<_>>()?;
    for (index, mut peer) in peers.iter().enumerate() {
        peer.write_all(&pattern(0, 1 + index % 50))?;
        peer.write_all(&pattern(1 + index % 50, 1))?;
    }
    let sent: usize = (0..COUNT).map(|index| 2 + index % 50).sum();
    eventually("all have arrived", || server.stats().pollers.received_bytes == sent as u64);
    let block_bytes = server.stats().pollers.block_bytes as usize;
    assert!(block_bytes <= COUNT * 4096, "{} bytes of blocks each", block_bytes / COUNT);
    let swift = dial(&server)?;
    assert_pattern(&exchange(&swift, &pattern(0, 100))?, 0);
    for (index, mut peer) in peers.iter().enumerate() {
        let sent = 2 + index % 50;
        peer.write_all(&pattern(sent, 100 - sent))?;
        assert_pattern(&read_exactly(peer, 100)?, 0);
    }
    Ok(())
}

/// Fix row 10.
pub(crate) fn idle_connections_own_no_buffers(t: &Fixture) -> Check {
    let server = t.echo_server();
    let peers: Vec<_> = (0..200).map(|_| dial(&server)).collect::<Check<_>>()?;
    for peer in &peers {
        assert_pattern(&exchange(peer, &pattern(0, 10_000))?, 0);
    }
    eventually("all blocks are back", || server.stats().pollers.blocks == 0);
    assert_eq!(server.stats().open, 200);
    Ok(())
}

/// Peers that do not read make the server hold their answers; then they read, and go.
pub(crate) fn the_memory_of_large_messages_goes_back_to_the_system(t: &Fixture) -> Check {
    const PEERS: usize = 12;
    // The kernel takes half of it at most (`tcp_wmem`).
    const ANSWER: usize = 8 << 20;
    static PIECE: [u8; 64 << 10] = [7; 64 << 10];
    const LEFT_MAX: usize = 16 << 20;
    let server = t.spawn(t.server().on_request(|mut conn| async move {
        conn.next(1).await?;
        for _ in 0..ANSWER / PIECE.len() {
            conn.write_copy(&PIECE)?;
        }
        conn.flush().await
    }));
    let before = rss_bytes();
    let peers: Vec<_> = (0..PEERS).map(|_| dial(&server)).collect::<Check<_>>()?;
    for mut peer in &peers {
        peer.write_all(b"x")?;
    }
    let held = || server.stats().pollers.block_bytes as usize;
    eventually("the answers are held", || held() > PEERS * ANSWER / 3);
    let mut bytes = vec![0; 64 << 10];
    for mut peer in &peers {
        let mut left = ANSWER;
        while left > 0 {
            let most = left.min(bytes.len());
            left -= peer.read(&mut bytes[..most])?;
        }
    }
    drop(peers);
    eventually("no block is in use", || held() == 0);
    eventually("the memory is back", || rss_bytes() < before + LEFT_MAX);
    Ok(())
}

/// The application keeps four times what may lie unread, and another connection needs more than an
/// equal share of that.
pub(crate) fn slices_that_the_application_keeps_count_against_nobody(t: &Fixture) -> Check {
    const FRAME: usize = 1 << 20;
    let kept = Arc::new(Mutex::new(Vec::new()));
    let keeps = Arc::clone(&kept);
    let builder = t.server().pollers(1).unread_bytes_max(BUDGET);
    let server = t.spawn(builder.on_connect(move |mut conn| {
        let kept = Arc::clone(&keeps);
        async move {
            let bytes = u32::from_be_bytes((*conn.next(4).await?).try_into().expect("four bytes"));
            let slice = conn.next(bytes as usize).await?;
            if bytes as usize == FRAME {
                kept.lock().expect("nobody panics here").push(slice);
            }
            conn.write_copy(b"ok")?;
            conn.flush().await
        }
    }));
    let sent = |bytes: usize| {
        let mut peer = dial(&server)?;
        peer.write_all(&(bytes as u32).to_be_bytes())?;
        peer.write_all(&pattern(0, bytes))?;
        assert_eq!(read_exactly(&peer, 2)?, b"ok", "{bytes} bytes");
        Check::Ok(peer)
    };
    let _peers: Vec<_> = (0..4 * BUDGET / FRAME).map(|_| sent(FRAME)).collect::<Check<_>>()?;
    sent(BUDGET * 3 / 4)?;
    kept.lock().expect("nobody panics here").clear();
    Ok(())
}

/// It waits for more than may lie unread. That is a limit of this side, and says nothing of the
/// peer.
pub(crate) fn a_reader_beyond_its_share_fails_although_its_peer_is_alive(t: &Fixture) -> Check {
    let is_told = Arc::new(AtomicBool::new(false));
    let tells = Arc::clone(&is_told);
    let (report, ended) = outcome();
    let builder = t.server().pollers(1).unread_bytes_max(BUDGET);
    let builder = builder.on_disconnect(move |_| tells.store(true, Ordering::SeqCst));
    let server = t.spawn(builder.on_connect(move |mut conn| {
        let report = report.clone();
        async move {
            let error = conn.next(8 * BUDGET).await.expect_err("there is no memory for it");
            tell(report, Ok((error.is_limit(), error.to_string(), conn.is_active())));
            Err(error)
        }
    }));
    let mut peer = dial(&server)?;
    let sending = on_thread(move || {
        // The server ends it at some point.
        let _ = peer.write_all(&vec![7; 8 * BUDGET]);
        Ok(peer)
    });
    let (is_limit, message, is_active) = ended.wait();
    assert!(is_limit && is_active, "{message:?}, active: {is_active}");
    drop(sending.wait());
    eventually("its connection is closed", || server.stats().open == 0);
    assert!(!is_told.load(Ordering::SeqCst), "a disconnect that was none");
    Ok(())
}
