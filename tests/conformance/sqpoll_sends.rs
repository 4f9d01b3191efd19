//! Sends that kernel threads carry out: whole, in order, and each to its own peer, however many
//! connections share a send ring, however small it is, and whichever threads flush.

use std::io::Write;
use std::net::TcpStream;
use std::time::Instant;

use ringpoll::{
    Backend, Connection, Dialer, PollerStats, Pollers, Result, ServerBuilder, ServerHandle,
    SqpollOptions, blocking,
};

use crate::harness::*;

macro_rules! cases {
    ($tests:ident, $mount:ident) => {
        $tests! { $mount, sqpoll_sends:
            partial_sends_through_one_ring_stay_in_order
            sends_through_a_ring_of_one_entry_lose_nothing
            large_sends_through_a_ring_of_one_entry_stay_in_order
            connections_of_every_send_ring_are_served
            flushes_of_many_threads_keep_the_order_of_each_connection
            thousands_of_flushes_of_any_size_arrive_in_order
            a_flush_of_more_slices_than_one_send_takes_stays_whole
            a_flush_of_nothing_asks_nothing_of_the_kernel
        }
    };
}
pub(crate) use cases;

/// All connections of a poller through one send ring.
fn one_ring(t: &Fixture) -> SqpollOptions {
    t.sqpoll().send_rings(1)
}

/// One poller with `options`.
fn builder(t: &Fixture, options: SqpollOptions) -> ServerBuilder {
    t.server().backend(Backend::Sqpoll(options)).pollers(1)
}

/// The number that a peer begins with.
async fn id_of(conn: &mut Connection) -> Result<u32> {
    Ok(u32::from_be_bytes(conn.next(4).await?[..4].try_into().expect("four bytes")))
}

/// Connections that have begun with the numbers `ids`.
fn identified(server: &ServerHandle, ids: impl Iterator<Item = u32>) -> Check<Vec<Peer>> {
    ids.map(|id| {
        let mut stream = dial(server)?;
        stream.write_all(&id.to_be_bytes())?;
        Ok(Peer { stream, id, at: 0 })
    })
    .collect()
}

/// A reader of the stream that is marked with its number.
struct Peer {
    stream: TcpStream,
    id: u32,
    at: usize,
}

impl Peer {
    fn read(&mut self, count: usize) -> Check {
        assert_marked(&read_exactly(&self.stream, count)?, self.id, self.at);
        self.at += count;
        Ok(())
    }
}

/// Reads a stream of `total` bytes from each of `peers`, a little here and a little there.
fn read_slowly(mut peers: Vec<Peer>, total: usize, mut random: Random) -> Check {
    while let Some(last) = peers.len().checked_sub(1) {
        let index = random.within(0..last + 1);
        let peer = &mut peers[index];
        peer.read(random.within(1..20_000).min(total - peer.at))?;
        if peer.at == total {
            assert_eof(&peer.stream);
            peers.swap_remove(index);
        }
    }
    Ok(())
}

/// What the socket did not take stays in front of what comes later.
pub(crate) fn partial_sends_through_one_ring_stay_in_order(t: &Fixture) -> Check {
    const READERS: u32 = 48;
    const TOTAL: usize = 400_000;
    let seed = t.random().next();
    let builder = builder(t, one_ring(t)).on_prepare(shrink_send_buffer);
    let server = t.spawn(builder.on_request(move |mut conn| async move {
        let id = id_of(&mut conn).await?;
        let mut random = Random::new(seed ^ u64::from(id));
        let mut at = 0;
        while at < TOTAL {
            let count = random.within(1..150_000).min(TOTAL - at);
            conn.write(marked(id, at, count))?;
            at += count;
            match random.within(0..3) {
                0 => conn.submit()?,
                _ => conn.flush().await?,
            }
        }
        conn.flush().await?;
        conn.close();
        Ok(())
    }));
    let readers: Vec<_> = (0..2)
        .map(|thread| {
            let peers = identified(&server, (thread..READERS).step_by(2))?;
            let random = t.random();
            Ok(on_thread(move || read_slowly(peers, TOTAL, random)))
        })
        .collect::<Check<_>>()?;
    for reader in readers {
        reader.wait_for_all();
    }
    left_with(&server, 0);
    assert_eq!((server.stats().handler_errors, server.stats().handler_panics), (0, 0));
    Ok(())
}

/// Rounds of all peers, until at least one flush has found its ring full.
fn until_a_ring_is_full(server: &ServerHandle, mut round: impl FnMut(usize) -> Check) -> Check {
    const ROUNDS_MIN: usize = 5;
    let (start, mut rounds) = (Instant::now(), 0);
    // Timing determines whether the flushers fill the ring faster than the kernel thread empties
    // it.
    while rounds < ROUNDS_MIN || server.stats().pollers.full_send_rings == 0 {
        assert!(start.elapsed() < DEADLINE, "never full: {:?}", server.stats());
        round(rounds)?;
        rounds += 1;
    }
    Ok(())
}

/// A flush that finds the ring full sends by itself.
pub(crate) fn sends_through_a_ring_of_one_entry_lose_nothing(t: &Fixture) -> Check {
    const PEERS: usize = 100;
    let server = t.spawn(builder(t, one_ring(t).send_entries(1)).on_request(echo_frame));
    let peers: Vec<_> = (0..PEERS).map(|_| dial(&server)).collect::<Check<_>>()?;
    until_a_ring_is_full(&server, |round| {
        let size = [10, 2000, 9000][round % 3];
        for (tag, mut peer) in peers.iter().enumerate() {
            peer.write_all(&frame(tag + round, size))?;
        }
        peers.iter().enumerate().try_for_each(|(tag, peer)| expect_frame(peer, tag + round, size))
    })?;
    assert_eq!(server.stats().handler_errors, 0);
    left_with(&server, PEERS as u64);
    Ok(())
}

/// The first part is sent by the flusher, the rest by the ring, and both are in pieces.
pub(crate) fn large_sends_through_a_ring_of_one_entry_stay_in_order(t: &Fixture) -> Check {
    const PEERS: u32 = 24;
    const PIECE: usize = 60_000;
    let builder = builder(t, one_ring(t).send_entries(1)).on_prepare(shrink_send_buffer);
    // Each request is for one piece of the stream.
    let server = t.spawn(builder.on_connect(|mut conn| async move {
        let id = id_of(&mut conn).await?;
        let mut at = 0;
        while conn.readable().await? != 0 {
            conn.skip(1).await?;
            for half in [0, PIECE / 2] {
                conn.write(marked(id, at + half, PIECE / 2))?;
                conn.submit()?;
            }
            conn.flush().await?;
            at += PIECE;
        }
        Ok(())
    }));
    let mut peers = identified(&server, 0..PEERS)?;
    let mut random = t.random();
    until_a_ring_is_full(&server, |_| {
        for peer in &mut peers {
            peer.stream.write_all(b"?")?;
        }
        let mut waiting: Vec<_> = peers.iter_mut().map(|peer| (peer.at + PIECE, peer)).collect();
        while let Some(last) = waiting.len().checked_sub(1) {
            let index = random.within(0..last + 1);
            let (end, peer) = &mut waiting[index];
            peer.read(random.within(1..PIECE).min(*end - peer.at))?;
            if peer.at == *end {
                waiting.swap_remove(index);
            }
        }
        Ok(())
    })?;
    drop(peers);
    left_with(&server, 0);
    assert_eq!((server.stats().handler_errors, server.stats().handler_panics), (0, 0));
    Ok(())
}

/// Each ring is polled, and what has come back from each is seen.
pub(crate) fn connections_of_every_send_ring_are_served(t: &Fixture) -> Check {
    const PEERS: usize = 200;
    let server = t.spawn(builder(t, t.sqpoll().send_rings(20)).on_request(echo_frame));
    let peers: Vec<_> = (0..PEERS).map(|_| dial(&server)).collect::<Check<_>>()?;
    for (round, size) in [1, 3000, 40_000].into_iter().enumerate() {
        for (tag, peer) in peers.iter().enumerate() {
            exchange_frame(peer, tag + round, size)?;
        }
    }
    // More than a ring has entries for, so that none of them is left out.
    for round in 0..10 {
        for (tag, mut peer) in peers.iter().enumerate() {
            peer.write_all(&frame(tag + round, 500))?;
        }
        for (tag, peer) in peers.iter().enumerate() {
            expect_frame(peer, tag + round, 500)?;
        }
    }
    left_with(&server, PEERS as u64);
    Ok(())
}

/// Eight threads with four connections each, all of them through one ring.
pub(crate) fn flushes_of_many_threads_keep_the_order_of_each_connection(t: &Fixture) -> Check {
    const THREADS: u32 = 8;
    const EACH: u32 = 4;
    const ROUNDS: usize = if cfg!(debug_assertions) { 150 } else { 1000 };
    let backend = Backend::Sqpoll(one_ring(t));
    let group = Pollers::builder().backend(backend).count(1).build()?;
    let dialer = Dialer::new().pollers(group.clone());
    let mut ends = Vec::new();
    for thread in 0..THREADS {
        let (mut conns, mut peers) = (Vec::new(), Vec::new());
        for id in thread * EACH..(thread + 1) * EACH {
            let (one, stream) = tcp_pair()?;
            conns.push((dialer.adopt(one.into())?, id, 0));
            peers.push(Peer { stream, id, at: 0 });
        }
        // The reader knows the sizes, so that it never waits for one whose turn is later.
        let random = t.random();
        let (mut sizes, mut same_sizes) = (random.clone(), random);
        ends.push(on_thread(move || {
            for _ in 0..ROUNDS {
                for (conn, id, at) in &mut conns {
                    let count = sizes.within(1..20_000);
                    conn.write(marked(*id, *at, count))?;
                    blocking::wait(conn.flush())?;
                    *at += count;
                }
            }
            Ok(())
        }));
        ends.push(on_thread(move || {
            (0..ROUNDS).try_for_each(|_| {
                peers.iter_mut().try_for_each(|peer| peer.read(same_sizes.within(1..20_000)))
            })
        }));
    }
    for end in ends {
        end.wait_for_all();
    }
    end_empty(&group)
}

/// Ten connections, a thousand flushes each, from a byte to a megabyte.
pub(crate) fn thousands_of_flushes_of_any_size_arrive_in_order(t: &Fixture) -> Check {
    const CONNECTIONS: u32 = 10;
    const FLUSHES: usize = if cfg!(debug_assertions) { 200 } else { 1000 };
    let seed = t.random().next();
    let server = t.spawn(builder(t, t.sqpoll()).on_connect(move |mut conn| async move {
        let id = id_of(&mut conn).await?;
        let mut random = Random::new(seed ^ u64::from(id));
        let mut at = 0;
        for _ in 0..FLUSHES {
            let count = any_size(&mut random);
            conn.write(marked(id, at, count))?;
            conn.flush().await?;
            at += count;
            // Until the kernel has every byte.
            assert_eq!(conn.stats().sent_bytes, at as u64);
        }
        conn.close();
        Ok(())
    }));
    let readers: Vec<_> = identified(&server, 0..CONNECTIONS)?
        .into_iter()
        .map(|mut peer| {
            on_thread(move || {
                let mut random = Random::new(seed ^ u64::from(peer.id));
                (0..FLUSHES).try_for_each(|_| peer.read(any_size(&mut random)))?;
                assert_eof(&peer.stream);
                Ok(())
            })
        })
        .collect();
    for reader in readers {
        reader.wait_for_all();
    }
    left_with(&server, 0);
    assert_eq!((server.stats().handler_errors, server.stats().handler_panics), (0, 0));
    Ok(())
}

/// As many small ones as large ones, up to a megabyte.
fn any_size(random: &mut Random) -> usize {
    let magnitude = random.within(0..21);
    random.within(1..(1 << magnitude) + 1)
}

/// More pieces than are gathered at once, and more than the kernel takes in one call.
pub(crate) fn a_flush_of_more_slices_than_one_send_takes_stays_whole(t: &Fixture) -> Check {
    const COUNTS: [usize; 9] = [1, 63, 64, 65, 128, 129, 1024, 1025, 2500];
    let seed = t.random().next();
    let server = t.spawn(builder(t, one_ring(t)).on_connect(move |mut conn| async move {
        let id = id_of(&mut conn).await?;
        let mut random = Random::new(seed ^ u64::from(id));
        let mut at = 0;
        for pieces in COUNTS {
            for _ in 0..pieces {
                // Too large to be copied: each stays a piece of its own.
                let count = random.within(4097..5000);
                conn.write(marked(id, at, count))?;
                at += count;
            }
            conn.flush().await?;
        }
        conn.close();
        Ok(())
    }));
    let readers: Vec<_> = identified(&server, 0..3)?
        .into_iter()
        .map(|peer| {
            on_thread(move || {
                let bytes = read_all(&peer.stream)?;
                assert_marked(&bytes, peer.id, 0);
                Ok(bytes.len())
            })
        })
        .collect();
    for reader in readers {
        let count = reader.wait_for_all();
        assert!(count >= COUNTS.iter().sum::<usize>() * 4097, "{count} bytes are not all");
    }
    assert_eq!((server.stats().handler_errors, server.stats().handler_panics), (0, 0));
    Ok(())
}

/// It completes at once, wakes no thread, and leaves no byte unsent.
pub(crate) fn a_flush_of_nothing_asks_nothing_of_the_kernel(t: &Fixture) -> Check {
    let (mut conn, peer) = t.client()?;
    let_kernel_threads_sleep();
    let before = t.clients().stats();
    for _ in 0..1000 {
        conn.write_copy(b"")?;
        conn.submit()?;
        blocking::wait(conn.flush())?;
    }
    let after = t.clients().stats();
    let asked = |stats: &PollerStats| {
        (stats.ring_submissions, stats.sqpoll_wake_calls, stats.send_calls, stats.sends_in_flight)
    };
    assert_eq!(asked(&after), asked(&before), "a flush of nothing was sent");
    conn.write_copy(b"x")?;
    blocking::wait(conn.flush())?;
    blocking::wait(conn.shutdown_write())?;
    assert_eq!(read_all(&peer)?, b"x");
    Ok(())
}
