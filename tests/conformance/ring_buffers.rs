//! Receive buffers of a ring: running out of them, lending them, and their sizes.
//!
//! A connection that finds no buffer waits and loses nothing. A buffer that the user holds is not
//! reused until it is dropped. A stream gets larger buffers.

use std::io::Write;
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::thread;

use ringpoll::{
    Connection, Error, Handle, PollerStats, RingTier, ServerHandle, Slice, UringOptions,
};

use crate::harness::*;

macro_rules! cases {
    ($tests:ident, $mount:ident) => {
        $tests! { $mount, ring_buffers:
            connections_that_find_no_buffer_lose_nothing
            connections_that_find_no_buffer_are_served_in_order
            floods_leave_buffers_to_the_others
            connections_may_end_while_they_wait_for_a_buffer
            closed_connections_do_not_use_up_the_turns_of_others
            ends_behind_data_wait_for_a_buffer_as_well
            a_stream_moves_to_large_buffers_and_back
            streams_that_outnumber_the_large_buffers_arrive_whole
            lent_buffers_keep_their_bytes_while_others_are_served
            lent_buffers_outlive_their_connections_and_their_ring
            lent_buffers_dropped_on_other_threads_are_free_again
        }
    };
}
pub(crate) use cases;

/// Two small buffers, so that the third connection with data waits.
fn two_buffers() -> UringOptions {
    UringOptions::new().receive_buffers(2, 2)
}

/// One poller with `options`, whose handler echoes frames or stands at the gate.
fn gated_server(t: &Fixture, options: UringOptions) -> (ServerHandle, Arc<Gate>) {
    let gate = Gate::new();
    let halts = Arc::clone(&gate);
    let builder = t.gated_server().uring(options);
    let server = t.spawn(builder.on_request(move |conn| Arc::clone(&halts).echo_frame(conn)));
    (server, gate)
}

/// The same with two buffers, and a handle of each connection that it takes.
fn watched_server(t: &Fixture) -> (ServerHandle, Arc<Gate>, Receiver<Handle>) {
    let gate = Gate::new();
    let halts = Arc::clone(&gate);
    let (prepared, handles) = channel();
    let builder = t.gated_server().uring(two_buffers());
    let builder =
        builder.on_prepare(move |handle| prepared.send(handle.clone()).map_err(Error::other));
    let server = t.spawn(builder.on_request(move |conn| Arc::clone(&halts).echo_frame(conn)));
    (server, gate, handles)
}

/// The connection at whose other end `peer` is.
fn handle_of<'a>(handles: &'a [Handle], peer: &TcpStream) -> Check<&'a Handle> {
    let addr = Some(peer.local_addr()?);
    let found = handles.iter().find(|handle| handle.peer_addr().as_inet() == addr);
    found.ok_or_else(|| Failure::new("a peer without a connection"))
}

fn stats(server: &ServerHandle) -> PollerStats {
    server.stats().pollers
}

/// `count` connections that have been accepted and served.
fn served(server: &ServerHandle, count: usize) -> Check<Vec<TcpStream>> {
    let peers: Vec<_> = (0..count).map(|_| dial(server)).collect::<Check<_>>()?;
    for (tag, peer) in peers.iter().enumerate() {
        exchange_frame(peer, tag, 10)?;
    }
    Ok(peers)
}

/// Two buffers, two hundred connections that all have data at once.
pub(crate) fn connections_that_find_no_buffer_lose_nothing(t: &Fixture) -> Check {
    const COUNT: usize = 200;
    let (server, gate) = gated_server(t, two_buffers());
    let peers = served(&server, COUNT)?;
    for (round, size) in [100, 10_000, 5000, 1].into_iter().enumerate() {
        gate.hold(&server, || {
            for (tag, mut peer) in peers.iter().enumerate() {
                peer.write_all(&frame(tag + round, size))?;
            }
            Ok(())
        })?;
        for (tag, peer) in peers.iter().enumerate() {
            expect_frame(peer, tag + round, size)?;
        }
    }
    assert_starved(t, &server);
    left_with(&server, COUNT as u64);
    Ok(())
}

/// First starved, first served.
pub(crate) fn connections_that_find_no_buffer_are_served_in_order(t: &Fixture) -> Check {
    const COUNT: usize = 64;
    /// How far a connection may fall behind its place: the kernel looks at so many sockets in one
    /// pass, and those it comes to later may find a buffer that was just returned.
    const OUT_OF_PLACE_MAX: usize = 8;
    let is_lesser = is_tier_capped() || ringpoll::capabilities().tier < Some(RingTier::Defer);
    if is_lesser || t.mount().receives_behind_pollers() {
        return skip("order of starved connections", "this ring receives behind a gate too");
    }
    let gate = Gate::new();
    let halts = Arc::clone(&gate);
    let (begins, order) = channel();
    let (prepared, handles) = channel::<Handle>();
    let builder = t.gated_server().uring(two_buffers());
    let builder =
        builder.on_prepare(move |handle| prepared.send(handle.clone()).map_err(Error::other));
    let server = t.spawn(builder.on_request(move |conn| {
        begins.send(conn.peer_addr()).expect("the test listens");
        Arc::clone(&halts).echo_frame(conn)
    }));
    let peers: Vec<_> = (0..COUNT).map(|_| dial(&server)).collect::<Check<_>>()?;
    let handles: Vec<_> = (0..COUNT)
        .map(|_| handles.recv_timeout(DEADLINE))
        .collect::<std::result::Result<_, _>>()?;
    gate.hold(&server, || {
        while order.try_recv().is_ok() {}
        for (tag, mut peer) in peers.iter().enumerate() {
            let handle = handle_of(&handles, peer)?;
            peer.write_all(&frame(tag, 100))?;
            // Each frame arrives before the next is sent, so the kernel has them in this order.
            let arrived = || handle.with_fd(|fd| rustix::io::ioctl_fionread(fd) == Ok(104));
            eventually("the frame arrives", || arrived().unwrap_or(false));
        }
        Ok(())
    })?;
    for (tag, peer) in peers.iter().enumerate() {
        expect_frame(peer, tag, 100)?;
    }
    let order: Vec<_> = order.try_iter().filter_map(|addr| addr.as_inet()).collect();
    for (wanted, peer) in peers.iter().enumerate() {
        let addr = peer.local_addr()?;
        let place = order.iter().position(|one| *one == addr).expect("every peer was answered");
        let late = place.saturating_sub(wanted);
        assert!(late <= OUT_OF_PLACE_MAX, "connection {wanted} came in place {place}: {order:?}");
    }
    let stats = stats(&server);
    assert!(stats.starvations >= COUNT as u64 / 2, "nobody found no buffer: {stats:?}");
    Ok(())
}

/// A stream that could fill every buffer gets no more than its share.
pub(crate) fn floods_leave_buffers_to_the_others(t: &Fixture) -> Check {
    let builder = t.gated_server().uring(two_buffers());
    let server = t.spawn(builder.on_request(|mut conn: Connection| async move {
        if conn.peek(1).await?[0] != b'f' {
            return echo_frame(conn).await;
        }
        let count = conn.readable().await?;
        conn.skip(count).await
    }));
    let stop = Arc::new(AtomicBool::new(false));
    let floods: Vec<_> = (0..4)
        .map(|_| {
            let (mut flood, stop) = (dial(&server)?, Arc::clone(&stop));
            Ok(on_thread(move || {
                while !stop.load(Ordering::Relaxed) {
                    flood.write_all(&[b'f'; 64 << 10])?;
                }
                Ok(())
            }))
        })
        .collect::<Check<_>>()?;
    eventually("the floods run", || stats(&server).received_bytes > 8 << 20);
    let peers = served(&server, 10)?;
    for round in 0..10 {
        for (tag, mut peer) in peers.iter().enumerate() {
            peer.write_all(&frame(tag + round, 3000))?;
        }
        for (tag, peer) in peers.iter().enumerate() {
            expect_frame(peer, tag + round, 3000)?;
        }
    }
    stop.store(true, Ordering::Relaxed);
    for flood in floods {
        flood.wait_for_all();
    }
    assert_starved(t, &server);
    Ok(())
}

/// Half closed, reset, and closed by this side, all of them without a buffer.
pub(crate) fn connections_may_end_while_they_wait_for_a_buffer(t: &Fixture) -> Check {
    const COUNT: usize = 90;
    let (server, gate, handles) = watched_server(t);
    for round in 0..3 {
        let mut peers: Vec<_> = served(&server, COUNT)?.into_iter().map(Some).collect();
        let handles: Vec<_> = handles.try_iter().collect();
        gate.hold(&server, || {
            for (tag, peer) in peers.iter_mut().enumerate() {
                let mut stream = peer.as_ref().expect("only taken below");
                stream.write_all(&frame(tag + round, 10_000))?;
                match tag % 3 {
                    0 => stream.shutdown(Shutdown::Write)?,
                    1 => reset(peer.take().expect("it is there"))?,
                    _ => handle_of(&handles, stream)?.close(),
                }
            }
            Ok(())
        })?;
        for (tag, peer) in peers.iter().enumerate() {
            match (tag % 3, peer) {
                (0, Some(peer)) => {
                    expect_frame(peer, tag + round, 10_000)?;
                    assert_eof(peer);
                }
                (2, Some(peer)) => assert_ended(peer),
                _ => {}
            }
        }
        drop(handles);
        left_with(&server, 0);
    }
    assert_starved(t, &server);
    Ok(())
}

/// Those at the head of the queue are gone when their turn comes.
pub(crate) fn closed_connections_do_not_use_up_the_turns_of_others(t: &Fixture) -> Check {
    const COUNT: usize = 40;
    let (server, gate, handles) = watched_server(t);
    let peers = served(&server, COUNT)?;
    let handles: Vec<_> = handles.try_iter().collect();
    gate.hold(&server, || {
        // The first takes a buffer, and the poller to the gate; most of the others find none.
        Gate::halt(&peers[0])?;
        for (tag, mut peer) in peers.iter().enumerate().skip(1) {
            peer.write_all(&frame(tag, 100))?;
        }
        Ok(())
    })?;
    gate.held(|| {
        assert_starved(t, &server);
        peers[1..COUNT - 2].iter().try_for_each(|peer| {
            handle_of(&handles, peer)?.close();
            Ok(())
        })
    })?;
    for (tag, peer) in peers.iter().enumerate().skip(COUNT - 2) {
        expect_frame(peer, tag, 100)?;
    }
    left_with(&server, 3);
    Ok(())
}

/// The end comes after the data although the data had to wait.
pub(crate) fn ends_behind_data_wait_for_a_buffer_as_well(t: &Fixture) -> Check {
    const COUNT: usize = 100;
    const SIZE: usize = 20_000;
    let (told, totals) = channel();
    let builder = t.gated_server().uring(two_buffers());
    let server = t.spawn(builder.on_connect(move |mut conn| {
        let told = told.clone();
        async move {
            let mut at = 0;
            loop {
                let count = conn.readable().await?;
                if count == 0 {
                    return told.send(at).map_err(Error::other);
                }
                assert_pattern(&conn.next(count).await?, at);
                at += count;
            }
        }
    }));
    let bytes = pattern(0, SIZE);
    for _ in 0..COUNT {
        let mut peer = dial(&server)?;
        peer.write_all(&bytes)?;
        // Closed at once: a FIN right behind the last byte.
    }
    for _ in 0..COUNT {
        assert_eq!(totals.recv_timeout(DEADLINE)?, SIZE);
    }
    assert_eq!(server.stats().handler_panics, 0);
    Ok(())
}

/// Reads a stream of the announced length, says so, and goes on with the next.
async fn take_streams(mut conn: Connection) -> ringpoll::Result<()> {
    let length = u32::from_be_bytes(conn.next(4).await?[..4].try_into().expect("four bytes"));
    let mut at = 0;
    while at < length as usize {
        let count = conn.readable().await?.min(length as usize - at);
        if count == 0 {
            return Err(Error::other("the stream is short"));
        }
        assert_pattern(&conn.next(count).await?, at);
        at += count;
    }
    conn.write_copy(b"!")?;
    conn.flush().await
}

/// Sends a stream that [`take_streams`] takes.
fn stream(mut peer: &TcpStream, length: usize) -> Check {
    peer.write_all(&(length as u32).to_be_bytes())?;
    let mut at = 0;
    while at < length {
        let count = (length - at).min(256 << 10);
        peer.write_all(&pattern(at, count))?;
        at += count;
    }
    assert_eq!(read_exactly(peer, 1)?, b"!");
    Ok(())
}

/// Receives that keep filling small buffers, then many that do not.
pub(crate) fn a_stream_moves_to_large_buffers_and_back(t: &Fixture) -> Check {
    let server = t.spawn(t.server().pollers(1).on_request(take_streams));
    let peer = dial(&server)?;
    let mut moves = 0;
    for _ in 0..2 {
        stream(&peer, 4 << 20)?;
        let streaming = stats(&server).buffer_moves;
        assert!(streaming > moves, "a stream stays with small buffers: {:?}", stats(&server));
        for size in 0..300 {
            stream(&peer, size % 50)?;
        }
        moves = stats(&server).buffer_moves;
        assert!(moves > streaming, "requests stay with large buffers: {:?}", stats(&server));
    }
    Ok(())
}

/// With large buffers, and requests between the streams.
pub(crate) fn streams_that_outnumber_the_large_buffers_arrive_whole(t: &Fixture) -> Check {
    const STREAMS: usize = 8;
    let options = UringOptions::new().receive_buffers(4, 1);
    let server = t.spawn(t.gated_server().uring(options).on_request(take_streams));
    let streams: Vec<_> = (0..STREAMS)
        .map(|index| {
            let peer = dial(&server)?;
            Ok(on_thread(move || {
                for round in 0..3 {
                    stream(&peer, 500_000 + 10_000 * index)?;
                    stream(&peer, round)?;
                }
                Ok(())
            }))
        })
        .collect::<Check<_>>()?;
    let peer = dial(&server)?;
    for size in 0..50 {
        stream(&peer, size)?;
    }
    for stream in streams {
        stream.wait_for_all();
    }
    assert_eq!(server.stats().handler_panics, 0);
    Ok(())
}

/// A server that keeps every message of `MESSAGE` bytes it is sent, and echoes frames besides.
fn keeping_server(t: &Fixture) -> (ServerHandle, Arc<Mutex<Vec<Slice>>>) {
    let kept = Arc::new(Mutex::new(Vec::new()));
    let keeps = Arc::clone(&kept);
    let builder = t.gated_server().uring(two_buffers());
    let server = t.spawn(builder.on_request(move |mut conn: Connection| {
        let keeps = Arc::clone(&keeps);
        async move {
            if conn.peek(1).await?[0] != b'k' {
                return echo_frame(conn).await;
            }
            // As a whole, so that what is kept is what was received, and not a copy.
            let message = conn.next(1 + MESSAGE).await?;
            keeps.lock().expect("nobody panics here").push(message);
            conn.write_copy(b"!")?;
            conn.flush().await
        }
    }));
    (server, kept)
}

/// More than a quarter of a small buffer: lent, not copied.
const MESSAGE: usize = 3000;

/// Has `count` messages kept, each of them in a receive of its own.
fn keep(mut peer: &TcpStream, count: usize) -> Check {
    for tag in 0..count {
        let mut message = vec![b'k'];
        message.extend(pattern(own(tag, 0), MESSAGE));
        peer.write_all(&message)?;
        assert_eq!(read_exactly(peer, 1)?, b"!");
    }
    Ok(())
}

fn assert_kept(kept: &[Slice]) {
    for (tag, message) in kept.iter().enumerate() {
        assert_eq!((message[0], message.len()), (b'k', 1 + MESSAGE));
        assert_pattern(&message[1..], own(tag, 0));
    }
}

/// A slow holder takes memory, not a place in the ring.
pub(crate) fn lent_buffers_keep_their_bytes_while_others_are_served(t: &Fixture) -> Check {
    const KEPT: usize = 200;
    let (server, kept) = keeping_server(t);
    let keeper = dial(&server)?;
    keep(&keeper, KEPT)?;
    let at_start = stats(&server);
    assert!(at_start.lent_receives > 0, "nothing is lent: {at_start:?}");
    assert!(
        at_start.block_bytes >= (KEPT * MESSAGE) as u64,
        "the kept are elsewhere: {at_start:?}"
    );
    let peers = served(&server, 10)?;
    for round in 0..50 {
        for (tag, mut peer) in peers.iter().enumerate() {
            peer.write_all(&frame(tag * round, 4000 + round))?;
        }
        for (tag, peer) in peers.iter().enumerate() {
            expect_frame(peer, tag * round, 4000 + round)?;
        }
    }
    let kept = std::mem::take(&mut *kept.lock().expect("nobody panics here"));
    assert_eq!(kept.len(), KEPT);
    assert_kept(&kept);
    thread::spawn(move || drop(kept)).join().expect("a drop does not panic");
    eventually("all blocks are back", || stats(&server).blocks == 0);
    exchange_frame(&keeper, 1, 5000)?;
    Ok(())
}

/// Memory of a ring lives as long as the last slice of it.
pub(crate) fn lent_buffers_outlive_their_connections_and_their_ring(t: &Fixture) -> Check {
    const KEPT: usize = 50;
    let (server, kept) = keeping_server(t);
    keep(&dial(&server)?, KEPT)?;
    assert!(stats(&server).lent_receives > 0, "nothing is lent: {:?}", stats(&server));
    eventually("the connection is gone", || server.stats().open == 0);
    server.shutdown(DEADLINE)?;
    // Whatever memory was given back is in use again.
    let (other, others_kept) = keeping_server(t);
    keep(&dial(&other)?, KEPT)?;
    let kept = std::mem::take(&mut *kept.lock().expect("nobody panics here"));
    let checked = on_thread(move || {
        assert_kept(&kept);
        Ok(kept.len())
    });
    assert_eq!(checked.wait(), KEPT);
    assert_kept(&others_kept.lock().expect("nobody panics here"));
    others_kept.lock().expect("nobody panics here").clear();
    Ok(())
}

/// Returned from anywhere, while the poller takes and lends.
pub(crate) fn lent_buffers_dropped_on_other_threads_are_free_again(t: &Fixture) -> Check {
    const EACH: usize = 200;
    let (ends, droppers): (Vec<_>, Vec<_>) = (0..3)
        .map(|_| {
            let (sink, slices) = channel::<Option<(Slice, usize)>>();
            let dropper = on_thread(move || {
                let mut held = std::collections::VecDeque::new();
                let mut count = 0;
                while let Some(kept) = slices.recv()? {
                    held.push_back(kept);
                    count += 1;
                    if held.len() > 20 {
                        let (slice, tag) = held.pop_front().expect("it is not empty");
                        assert_pattern(&slice[4..], own(tag, 0));
                    }
                }
                Ok(count)
            });
            (sink, dropper)
        })
        .unzip();
    let sinks = ends.clone();
    let builder = t.gated_server().uring(two_buffers());
    let server = t.spawn(builder.on_request(move |mut conn: Connection| {
        let sinks = sinks.clone();
        async move {
            let head = conn.peek(8).await?;
            let word = |at: usize| {
                u32::from_be_bytes(head[at..at + 4].try_into().expect("four bytes")) as usize
            };
            let (tag, size) = (word(0), word(4));
            conn.skip(4).await?;
            let frame = conn.next(4 + size).await?;
            sinks[tag % sinks.len()].send(Some((frame.clone(), tag))).map_err(Error::other)?;
            conn.write(frame)?;
            conn.flush().await
        }
    }));
    let mut random = t.random();
    let senders: Vec<_> = (0..4)
        .map(|client| {
            let (mut peer, mut random) = (dial(&server)?, random.fork());
            Ok(on_thread(move || {
                for round in 0..EACH {
                    let (tag, size) = (client * EACH + round, random.within(1..8000));
                    peer.write_all(&(tag as u32).to_be_bytes())?;
                    exchange_frame(&peer, tag, size)?;
                }
                Ok(())
            }))
        })
        .collect::<Check<_>>()?;
    for sender in senders {
        sender.wait_for_all();
    }
    for end in ends {
        end.send(None)?;
    }
    let dropped: usize = droppers.iter().map(Outcome::wait_for_all).sum();
    assert_eq!(dropped, 4 * EACH);
    assert!(stats(&server).lent_receives > 0, "nothing is lent: {:?}", stats(&server));
    eventually("all blocks are back", || stats(&server).blocks == 0);
    Ok(())
}
