//! Every setting of a ring carries the same bytes; only those no kernel takes are refused.

use std::io::Write;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use ringpoll::{Backend, Placement, Pollers, RingTier, ServerHandle, UringOptions, ZeroCopySend};

use crate::harness::*;

macro_rules! cases {
    ($tests:ident, $mount:ident) => {
        $tests! { $mount, ring_options:
            default_options_carry_every_byte
            bundled_receives_carry_every_byte
            incremental_buffers_carry_every_byte
            bundles_of_incremental_buffers_carry_every_byte
            sends_without_a_copy_carry_every_byte
            sends_without_a_copy_from_some_size_on_carry_every_byte
            sends_without_a_copy_where_it_pays_carry_every_byte
            sends_without_a_copy_end_where_the_kernel_copies
            a_close_leaves_memory_to_the_kernel_until_it_has_left
            unix_sockets_are_served_whatever_is_asked_of_sends
            sends_that_the_kernel_refuses_without_a_copy_are_made_with_one
            busy_polling_carries_every_byte
            lesser_rings_carry_every_byte
            the_best_tier_is_an_upper_bound
            the_smallest_queues_and_buffers_carry_every_byte
            everything_at_once_carries_every_byte
            memory_sent_without_a_copy_is_left_alone_until_it_has_left
            options_that_no_kernel_takes_are_refused
            the_probe_says_what_it_found
        }
    };
}
pub(crate) use cases;

pub(crate) fn default_options_carry_every_byte(t: &Fixture) -> Check {
    every_byte(t, UringOptions::new())
}

pub(crate) fn bundled_receives_carry_every_byte(t: &Fixture) -> Check {
    every_byte(t, UringOptions::new().receive_bundles(true))
}

pub(crate) fn incremental_buffers_carry_every_byte(t: &Fixture) -> Check {
    every_byte(t, UringOptions::new().incremental_buffers(true))
}

pub(crate) fn bundles_of_incremental_buffers_carry_every_byte(t: &Fixture) -> Check {
    every_byte(t, UringOptions::new().receive_bundles(true).incremental_buffers(true))
}

pub(crate) fn sends_without_a_copy_carry_every_byte(t: &Fixture) -> Check {
    every_byte(t, UringOptions::new().zero_copy_send(Some(0)))
}

pub(crate) fn sends_without_a_copy_from_some_size_on_carry_every_byte(t: &Fixture) -> Check {
    every_byte(t, UringOptions::new().zero_copy_send(Some(3000)))
}

pub(crate) fn sends_without_a_copy_where_it_pays_carry_every_byte(t: &Fixture) -> Check {
    every_byte(t, UringOptions::new().zero_copy_send(ZeroCopySend::Auto))
}

/// Over loopback the kernel copies every send, and reports so.
pub(crate) fn sends_without_a_copy_end_where_the_kernel_copies(t: &Fixture) -> Check {
    let found = ringpoll::capabilities();
    if !found.zero_copy_reports {
        return skip("reports of copied sends", format!("{found:?}"));
    }
    // A handler on a worker finds its poller asleep, and then sends with a copy.
    let options = UringOptions::new().zero_copy_send(ZeroCopySend::Auto);
    let builder = t.server().placement(Placement::Inline).uring(options);
    let server = t.spawn(builder.on_request(echo_frame));
    let peers: Vec<_> = (0..3).map(|_| dial(&server)).collect::<Check<_>>()?;
    for round in 0..20 {
        for peer in &peers {
            exchange_frame(peer, round, 100_000)?;
        }
        let pollers = || server.stats().pollers;
        eventually("every byte has left", || pollers().zero_copy_held_bytes == 0);
    }
    let stats = server.stats().pollers;
    assert_eq!(stats.zero_copy_copied, stats.zero_copy_sends);
    match t.mount().backend {
        Backend::Uring => assert!(stats.zero_copy_sends >= 3, "{stats:?}"),
        Backend::Sqpoll(_) => assert_eq!(stats.zero_copy_sends, 0),
        // A flush sends by itself, and leaves only what the socket does not take to the ring.
        _ => {}
    }
    // A send may need several operations, and only the first of them meets no report.
    assert!(stats.zero_copy_stops <= 3 && stats.zero_copy_sends < 30, "{stats:?}");
    assert_eq!(stats.zero_copy_stops > 0, stats.zero_copy_sends > 0, "{stats:?}");
    Ok(())
}

pub(crate) fn a_close_leaves_memory_to_the_kernel_until_it_has_left(t: &Fixture) -> Check {
    const PEERS: usize = 4;
    const BYTES: usize = 300_000;
    let options = UringOptions::new().zero_copy_send(ZeroCopySend::Always { bytes_min: 1 });
    let server = t.spawn(t.server().uring(options).on_connect(|mut conn| async move {
        // Into blocks that others would get if they were free too early.
        conn.reserve(BYTES)?.copy_from_slice(&pattern(0, BYTES));
        conn.submit()?;
        conn.close();
        Ok(())
    }));
    let peers: Vec<_> = (0..PEERS).map(|_| dial(&server)).collect::<Check<_>>()?;
    for peer in &peers {
        assert_pattern(&read_exactly(peer, BYTES)?, 0);
        assert_eof(peer);
    }
    let is_free = || {
        let pollers = server.stats().pollers;
        (pollers.zero_copy_held_bytes, pollers.sends_in_flight, pollers.connections) == (0, 0, 0)
    };
    eventually("nothing is held", is_free);
    Ok(())
}

/// The kernel sends without a copy over networks only.
pub(crate) fn unix_sockets_are_served_whatever_is_asked_of_sends(t: &Fixture) -> Check {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("socket");
    let builder = t.server().uring(UringOptions::new().zero_copy_send(Some(0)));
    let server = builder.on_request(echo_frame).bind(&format!("unix:{}", path.display()))?;
    let server = t.spawn_bound(server);
    let mut peer = UnixStream::connect(&path)?;
    bound_unix(&peer)?;
    // The last frame fills the socket, so the backend sends the rest, for every kind of flush.
    for size in [1, 5000, 1 << 20] {
        peer.write_all(&frame(size, size))?;
        expect_frame(&peer, size, size)?;
    }
    assert_eq!(server.stats().handler_errors, 0);
    Ok(())
}

/// The library treats Multipath TCP as TCP. The kernel refuses zero-copy sends on it.
pub(crate) fn sends_that_the_kernel_refuses_without_a_copy_are_made_with_one(t: &Fixture) -> Check {
    let listener = match mptcp() {
        Ok(listener) => listener,
        Err(error) => return skip("a refused send without a copy", error),
    };
    rustix::net::bind(&listener, &SocketAddr::from(([127, 0, 0, 1], 0)))?;
    rustix::net::listen(&listener, 1)?;
    let listener = TcpListener::from(listener);
    let addr = listener.local_addr()?;
    let builder = t.server().uring(UringOptions::new().zero_copy_send(Some(0)));
    let server = t.spawn_bound(builder.on_request(echo_frame).listener(listener)?.build()?);
    let peer = mptcp()?;
    rustix::net::connect(&peer, &addr)?;
    let peer = TcpStream::from(peer);
    bound(&peer)?;
    for size in [1, 5000, 1 << 20] {
        exchange_frame(&peer, size, size)?;
    }
    assert_eq!(server.stats().handler_errors, 0);
    Ok(())
}

fn mptcp() -> rustix::io::Result<OwnedFd> {
    use rustix::net::{AddressFamily, SocketType, ipproto, socket};
    socket(AddressFamily::INET, SocketType::STREAM, Some(ipproto::MPTCP))
}

pub(crate) fn busy_polling_carries_every_byte(t: &Fixture) -> Check {
    every_byte(t, UringOptions::new().napi_busy_poll(Some(Duration::from_micros(50))))
}

pub(crate) fn lesser_rings_carry_every_byte(t: &Fixture) -> Check {
    every_byte(t, UringOptions::new().tier_max(RingTier::Coop))?;
    every_byte(t, UringOptions::new().tier_max(RingTier::Plain))
}

/// Seen from outside: only the best ring leaves everything until its thread asks.
pub(crate) fn the_best_tier_is_an_upper_bound(t: &Fixture) -> Check {
    if is_tier_capped() {
        return skip("tiers by their options", "RINGPOLL_URING_TIER caps them all");
    }
    for tier in [RingTier::Defer, RingTier::Coop, RingTier::Plain] {
        let best = ringpoll::capabilities().tier.min(Some(tier));
        let is_deferred = best == Some(RingTier::Defer) && !t.mount().receives_behind_pollers();
        let builder = t.gated_server().uring(UringOptions::new().tier_max(tier));
        let is_received = receives_behind_a_handler(builder)?;
        assert_eq!(is_received, !is_deferred, "a ring that is {tier:?} at best");
    }
    Ok(())
}

pub(crate) fn the_smallest_queues_and_buffers_carry_every_byte(t: &Fixture) -> Check {
    every_byte(t, UringOptions::new().queue_entries(1, 1).receive_buffers(1, 1))
}

pub(crate) fn everything_at_once_carries_every_byte(t: &Fixture) -> Check {
    let small = UringOptions::new().queue_entries(2, 4).receive_buffers(3, 1);
    let all = small.receive_bundles(true).incremental_buffers(true).zero_copy_send(Some(0));
    every_byte(t, all.napi_busy_poll(Some(Duration::from_micros(50))))
}

/// The data path from one byte to a megabyte, pipelined, and with many connections.
fn every_byte(t: &Fixture, options: UringOptions) -> Check {
    let builder = t.server().uring(options).on_request(obey);
    let server = t.spawn(builder);
    let peer = dial(&server)?;
    for size in [1, 2, 100, 4091, 4092, 4093, 8192, 65_532, 65_533, 200_000, 1 << 20] {
        exchange_frame(&peer, size, size)?;
    }
    pipelined(&peer, t.random())?;
    crowd(&server, t.random())?;
    flushed_and_closed(&server)?;
    // The first is served as ever, by small buffers or by large ones.
    for size in 0..100 {
        exchange_frame(&peer, size, size)?;
    }
    let stats = server.stats();
    assert_eq!((stats.handler_errors, stats.handler_panics), (0, 0));
    Ok(())
}

/// Answers a frame with the same one; a length from [`ASK`] on is answered by a frame and a close.
async fn obey(mut conn: ringpoll::Connection) -> ringpoll::Result<()> {
    let handle = (*conn).clone();
    let head = conn.peek(4).await?;
    let size = u32::from_be_bytes(head[..4].try_into().expect("four bytes")) as usize;
    if size < ASK {
        return echo_frame(conn).await;
    }
    // Not the size of what comes, but of what is asked for.
    conn.skip(4).await?;
    conn.write(frame(size - ASK, size - ASK))?;
    conn.flush().await?;
    handle.close();
    Ok(())
}

/// Lengths from here on ask for a frame and a close.
const ASK: usize = 16 << 20;

/// 64 requests in flight on each of four connections' worth of rounds.
fn pipelined(peer: &TcpStream, mut random: Random) -> Check {
    for round in 0..8 {
        let sizes: Vec<_> = (0..64).map(|_| random.within(0..2500)).collect();
        let requests = sizes.iter().enumerate().flat_map(|(tag, size)| frame(round + tag, *size));
        let requests: Vec<u8> = requests.collect();
        let mut sender = peer.try_clone()?;
        let sending = on_thread(move || Ok(sender.write_all(&requests)?));
        for (tag, size) in sizes.into_iter().enumerate() {
            expect_frame(peer, round + tag, size)?;
        }
        sending.wait();
    }
    Ok(())
}

/// Fifty connections at once.
fn crowd(server: &ServerHandle, mut random: Random) -> Check {
    let peers: Vec<_> = (0..50).map(|_| dial(server)).collect::<Check<_>>()?;
    for round in 0..4 {
        let sizes: Vec<_> = peers.iter().map(|_| random.within(0..20_000)).collect();
        for (tag, mut peer) in peers.iter().enumerate() {
            peer.write_all(&frame(tag + round, sizes[tag]))?;
        }
        for (tag, peer) in peers.iter().enumerate() {
            expect_frame(peer, tag + round, sizes[tag])?;
        }
    }
    Ok(())
}

fn flushed_and_closed(server: &ServerHandle) -> Check {
    for size in [1, 5000, 300_000] {
        let mut peer = dial(server)?;
        peer.write_all(&((ASK + size) as u32).to_be_bytes())?;
        expect_frame(&peer, size, size)?;
        assert_eof(&peer);
    }
    Ok(())
}

/// The kernel refers to the memory until it says otherwise, which is after the flush: what is
/// written next must not take its place.
pub(crate) fn memory_sent_without_a_copy_is_left_alone_until_it_has_left(t: &Fixture) -> Check {
    const PIECE: usize = 50_000;
    const PIECES: usize = 60;
    let options = UringOptions::new().zero_copy_send(Some(0));
    let server = t.spawn(t.server().pollers(1).uring(options).on_connect(|mut conn| async move {
        for index in 0..PIECES {
            // Into recycled blocks: this is where the last piece's memory would come back.
            let area = conn.reserve(PIECE)?;
            area.copy_from_slice(&pattern(index * PIECE, PIECE));
            conn.flush().await?;
        }
        conn.close();
        Ok(())
    }));
    let peers: Vec<_> = (0..4).map(|_| dial(&server)).collect::<Check<_>>()?;
    // In turns, so that most of what was flushed waits in the kernel.
    for index in 0..PIECES {
        for peer in &peers {
            assert_pattern(&read_exactly(peer, PIECE)?, index * PIECE);
        }
    }
    for peer in &peers {
        assert_eof(peer);
    }
    Ok(())
}

pub(crate) fn options_that_no_kernel_takes_are_refused(t: &Fixture) -> Check {
    let options = UringOptions::new;
    let refused = [
        options().queue_entries(0, 4),
        options().queue_entries(4, 0),
        options().queue_entries(8, 4),
        options().queue_entries((32 << 10) + 1, 64 << 10),
        options().queue_entries(4, (64 << 10) + 1),
        options().queue_entries(u32::MAX, u32::MAX),
        options().receive_buffers(0, 4),
        options().receive_buffers(4, 0),
        options().receive_buffers((32 << 10) + 1, 4),
        options().receive_buffers(4, u16::MAX),
    ];
    for options in refused {
        let builder = Pollers::builder().backend(t.mount().backend).count(1);
        let error = builder.uring(options.clone()).build().err();
        assert!(error.is_some_and(|error| error.is_invalid()), "pollers took {options:?}");
        let builder = t.server().uring(options.clone()).on_request(echo);
        let error = builder.bind("127.0.0.1:0").err();
        assert!(error.is_some_and(|error| error.is_invalid()), "a server took {options:?}");
    }
    Ok(())
}

/// A mounted ring is one that the probe found.
pub(crate) fn the_probe_says_what_it_found(t: &Fixture) -> Check {
    let found = ringpoll::capabilities();
    assert!(found.tier.is_some() && !found.reason.is_empty(), "{found:?}");
    assert_eq!(found.backend(), ringpoll::Backend::Uring);
    assert!(std::ptr::eq(found, ringpoll::capabilities()), "probed twice");
    let pollers = Pollers::builder().backend(ringpoll::Backend::Auto).count(1).build()?;
    assert_eq!(pollers.backend(), found.backend());
    pollers.shutdown()?;
    let server = t.spawn(t.server().on_request(echo));
    assert_eq!(server.stats().backend.to_string(), t.mount().backend.to_string());
    Ok(())
}
