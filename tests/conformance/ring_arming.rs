//! Receives that end and are armed again: none is forgotten, none spins, and none misses the end.
//!
//! The kernel tells of an end once. A receive that is armed when data and the end are both there
//! already must come to the end all the same, whether it is the connection's first, or follows a
//! pause, or a wait for a buffer.

use std::io::Write;
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;

use ringpoll::buffer::Reader;
use ringpoll::{
    Connection, Detached, Error, Handle, PollMode, PollerStats, Result, ServerBuilder,
    ServerHandle, UringOptions,
};
use tokio::sync::Semaphore;

use crate::harness::*;

macro_rules! cases {
    ($tests:ident, $mount:ident) => {
        $tests! { $mount, ring_arming:
            a_half_closed_connection_that_stays_does_not_spin
            receives_go_on_after_every_pause
            resets_between_receives_leave_the_others_armed
            a_reset_right_behind_data_is_noticed
            a_close_before_the_first_receive_is_noticed
            an_end_behind_data_that_waits_for_a_buffer_is_noticed
            an_end_behind_data_that_waits_for_the_reader_is_noticed
            a_detach_around_the_peers_end_loses_no_byte
        }
    };
}
pub(crate) use cases;

/// Small queues and few buffers, so all of them run out.
fn tiny() -> UringOptions {
    UringOptions::new().queue_entries(2, 4).receive_buffers(4, 1)
}

fn stats(server: &ServerHandle) -> PollerStats {
    server.stats().pollers
}

/// The receive that said EOF is not armed again and again.
pub(crate) fn a_half_closed_connection_that_stays_does_not_spin(t: &Fixture) -> Check {
    let gate = Arc::new(Semaphore::new(0));
    let opened = Arc::clone(&gate);
    let (ended, ends) = std::sync::mpsc::channel();
    let server = t.spawn(t.server().on_connect(move |mut conn| {
        let (gate, ended) = (Arc::clone(&opened), ended.clone());
        async move {
            assert_pattern(&conn.next(5000).await?, 0);
            assert_eq!(conn.readable().await?, 0);
            ended.send(()).map_err(Error::other)?;
            let _ = gate.acquire().await.expect("the gate stays");
            assert_eq!(conn.readable().await?, 0);
            conn.write(pattern(0, 100_000))?;
            conn.flush().await
        }
    }));
    let peers: Vec<_> = (0..20).map(|_| dial(&server)).collect::<Check<_>>()?;
    for mut peer in &peers {
        peer.write_all(&pattern(0, 5000))?;
        peer.shutdown(Shutdown::Write)?;
    }
    for _ in &peers {
        ends.recv_timeout(DEADLINE)?;
    }
    // The last spins, if any, are over soon; what is asked for then is nothing.
    holds_within(Duration::from_millis(50), || false);
    let before = stats(&server);
    holds_within(Duration::from_millis(200), || false);
    let after = stats(&server);
    let calls = after.system_calls() - before.system_calls();
    let completions = after.ring_completions - before.ring_completions;
    assert!(calls < 50, "{calls} system calls for connections that have ended");
    assert!(completions < 50, "{completions} completions for connections that have ended");
    gate.add_permits(peers.len());
    for peer in &peers {
        assert_pattern(&read_exactly(peer, 100_000)?, 0);
        assert_eof(peer);
    }
    Ok(())
}

/// At random and with few buffers: bytes that were on their way when a receive was stopped are
/// kept.
pub(crate) fn receives_go_on_after_every_pause(t: &Fixture) -> Check {
    const CONNECTIONS: usize = 6;
    const TOTAL: usize = 1 << 20;
    let seeds = t.random().next();
    let builder = t
        .server()
        .pollers(1)
        .poll_mode(PollMode::Never)
        .uring(tiny())
        .input_watermarks(4096, 16_384);
    let server = t.spawn(builder.on_connect(move |mut conn| async move {
        let head = conn.next(4).await?;
        let tag = u32::from_be_bytes(head[..4].try_into().expect("four bytes")) as usize;
        let mut random = Random::new(seeds ^ tag as u64);
        let mut at = 0;
        while at < TOTAL {
            // More than the high mark at times, which lifts it for one read.
            let count = random.within(1..20_000).min(TOTAL - at);
            assert_pattern(&conn.next(count).await?, own(tag, at));
            at += count;
            if random.one_in(4) {
                // Others get a turn, and the buffer fills up to its mark.
                tokio::task::yield_now().await;
            }
        }
        conn.write_copy(b"!")?;
        conn.flush().await
    }));
    let senders: Vec<_> = (0..CONNECTIONS)
        .map(|tag| {
            let mut peer = dial(&server)?;
            Ok(on_thread(move || {
                peer.write_all(&(tag as u32).to_be_bytes())?;
                peer.write_all(&pattern(own(tag, 0), TOTAL))?;
                assert_eq!(read_exactly(&peer, 1)?, b"!");
                Ok(())
            }))
        })
        .collect::<Check<_>>()?;
    for sender in senders {
        sender.wait_for_all();
    }
    assert_eq!(server.stats().handler_panics, 0);
    Ok(())
}

/// An error ends one receive, not the one whose slot is next.
pub(crate) fn resets_between_receives_leave_the_others_armed(t: &Fixture) -> Check {
    let builder = t.server().pollers(1).poll_mode(PollMode::Never).uring(tiny());
    let server = t.spawn(builder.on_request(echo_frame));
    let mut random = t.random();
    let steady: Vec<_> = (0..20).map(|_| dial(&server)).collect::<Check<_>>()?;
    for round in 0..30 {
        let mut victims: Vec<_> = (0..10).map(|_| dial(&server)).collect::<Check<_>>()?;
        for (tag, mut peer) in steady.iter().enumerate() {
            peer.write_all(&frame(tag + round, 2000))?;
            if let Some(mut victim) = victims.pop_if(|_| random.one_in(2)) {
                victim.write_all(&frame(tag, random.within(1..9000)))?;
                reset(victim)?;
            }
        }
        for (tag, peer) in steady.iter().enumerate() {
            expect_frame(peer, tag + round, 2000)?;
        }
    }
    left_with(&server, 20);
    Ok(())
}

/// A message to which there is no answer.
const MESSAGE: [u8; 100] = [b'm'; 100];

/// Takes messages and says nothing, so that no failing send gives the end away; or echoes, or
/// stands at the gate.
async fn take_silently(gate: Arc<Gate>, mut conn: Connection) -> Result<()> {
    if conn.peek(1).await?[0] != MESSAGE[0] {
        return gate.echo_frame(conn).await;
    }
    conn.skip(MESSAGE.len()).await
}

/// One poller, whose handler takes messages silently.
fn silent(builder: ServerBuilder) -> (ServerBuilder, Arc<Gate>) {
    let gate = Gate::new();
    let halts = Arc::clone(&gate);
    (builder.on_request(move |conn| take_silently(Arc::clone(&halts), conn)), gate)
}

/// Data and end arrive before the poller runs. The first receive takes the data only.
pub(crate) fn a_reset_right_behind_data_is_noticed(t: &Fixture) -> Check {
    let (builder, gate) = silent(t.gated_server());
    let server = t.spawn(builder);
    let peers: Vec<_> = (0..20).map(|_| dial(&server)).collect::<Check<_>>()?;
    for (tag, peer) in peers.iter().enumerate() {
        exchange_frame(peer, tag, 10)?;
    }
    gate.hold(&server, || {
        for mut peer in peers {
            peer.write_all(&MESSAGE)?;
            reset(peer)?;
        }
        Ok(())
    })?;
    left_with(&server, 0);
    Ok(())
}

/// The connection has come and gone before it is accepted, and left a message.
pub(crate) fn a_close_before_the_first_receive_is_noticed(t: &Fixture) -> Check {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("socket");
    let (builder, gate) = silent(t.gated_server());
    let builder = builder.listen("127.0.0.1:0")?.unix_listener(UnixListener::bind(&path)?)?;
    let server = t.spawn_bound(builder.build()?);
    gate.hold(&server, || {
        for _ in 0..20 {
            UnixStream::connect(&path)?.write_all(&MESSAGE)?;
            dial(&server)?.write_all(&MESSAGE)?;
        }
        Ok(())
    })?;
    eventually("all have been accepted", || server.stats().accepted == 41);
    left_with(&server, 0);
    assert_eq!(stats(&server).received_bytes as usize, 40 * MESSAGE.len() + 1);
    Ok(())
}

/// Connections that found no buffer are armed when the end has arrived already.
pub(crate) fn an_end_behind_data_that_waits_for_a_buffer_is_noticed(t: &Fixture) -> Check {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("socket");
    let two_buffers = UringOptions::new().receive_buffers(2, 2);
    let (builder, gate) = silent(t.gated_server().uring(two_buffers));
    let builder = builder.listen("127.0.0.1:0")?.unix_listener(UnixListener::bind(&path)?)?;
    let server = t.spawn_bound(builder.build()?);
    let tcp: Vec<_> = (0..20).map(|_| dial(&server)).collect::<Check<_>>()?;
    let unix: Vec<_> =
        (0..20).map(|_| UnixStream::connect(&path)).collect::<std::io::Result<_>>()?;
    eventually("all have been accepted", || server.stats().open == 40);
    gate.hold(&server, || {
        for (mut tcp, mut unix) in tcp.into_iter().zip(unix) {
            tcp.write_all(&MESSAGE)?;
            unix.write_all(&MESSAGE)?;
            reset(tcp)?;
        }
        Ok(())
    })?;
    left_with(&server, 0);
    assert_starved(t, &server);
    Ok(())
}

/// Receiving goes on after a pause, with bytes and the end waiting in the kernel.
pub(crate) fn an_end_behind_data_that_waits_for_the_reader_is_noticed(t: &Fixture) -> Check {
    const ROUNDS: usize = 10;
    const FIRST: usize = 20_000;
    const REST: usize = 3000;
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("socket");
    let gate = Arc::new(Semaphore::new(0));
    let opened = Arc::clone(&gate);
    let (report, ends) = channel();
    let (connected, handles) = channel();
    let builder = t.server().input_watermarks(1000, 10_000).on_connect(move |mut conn| {
        let (gate, report) = (Arc::clone(&opened), report.clone());
        let announced = connected.send((*conn).clone()).map_err(Error::other);
        async move {
            announced?;
            gate.acquire().await.expect("the gate stays").forget();
            let mut at = 0;
            let end = loop {
                match conn.next(100).await {
                    Ok(bytes) => assert_pattern(&bytes, at),
                    Err(error) => break error,
                }
                at += 100;
            };
            report.send((at, end.is_eof(), end.is_closed())).map_err(Error::other)
        }
    });
    let builder = builder.listen("127.0.0.1:0")?.unix_listener(UnixListener::bind(&path)?)?;
    let server = t.spawn_bound(builder.build()?);
    for round in 0..ROUNDS {
        for peer in 0..3 {
            // A close over each kind of socket, and a reset, which only TCP has.
            let (mut tcp, mut unix) = (None, None);
            let stream: &mut dyn Write = match peer {
                0 => unix.insert(UnixStream::connect(&path)?),
                _ => tcp.insert(dial(&server)?),
            };
            let handle: Handle = handles.recv_timeout(DEADLINE)?;
            stream.write_all(&pattern(0, FIRST))?;
            let unread = || handle.stats().unread_bytes as usize;
            eventually("receiving pauses", || unread() == FIRST);
            stream.write_all(&pattern(FIRST, REST))?;
            let is_reset = peer == 2;
            match tcp {
                Some(tcp) if is_reset => reset(tcp)?,
                _ => drop((tcp, unix)),
            }
            // Known without a read, although bytes of it are still in the kernel.
            eventually("the end is noticed", || !handle.is_active());
            gate.add_permits(1);
            let (at, is_eof, is_closed) = ends.recv_timeout(DEADLINE).map_err(|error| {
                Failure::new(format!("round {round}, peer {peer}: {error}, {} left", unread()))
            })?;
            assert_eq!((is_eof, is_closed), (!is_reset, true), "peer {peer} after {at} bytes");
            // A reset may drop what was not read.
            assert!(at == FIRST + REST || is_reset, "{at} bytes of peer {peer}");
        }
    }
    Ok(())
}

/// At any moment: bytes that the ring was about to receive are in the buffer or in the socket.
pub(crate) fn a_detach_around_the_peers_end_loses_no_byte(t: &Fixture) -> Check {
    let mut random = t.random();
    let tuning = Tuning { input_watermarks: (1000, 10_000), ..Tuning::default() };
    for _ in 0..60 {
        let (size, turns) = (random.within(1..300_000), random.within(0..40));
        let (mut peer, detached) = t.drive_tuned(tuning, move |mut conn| async move {
            conn.readable().await?;
            for _ in 0..turns {
                tokio::task::yield_now().await;
            }
            Ok(conn.detach().await?)
        })?;
        let writer = on_thread(move || {
            peer.write_all(&pattern(0, size))?;
            drop(peer);
            Ok(())
        });
        let Detached { fd, mut unread, .. } = detached.wait();
        let plain = TcpStream::from(fd);
        plain.set_nonblocking(false)?;
        bound(&plain)?;
        let mut got = vec![0; unread.len()];
        assert_eq!(Reader::read(&mut unread, &mut got)?, got.len());
        got.extend(read_all(&plain)?);
        assert_pattern(&got, 0);
        assert_eq!(got.len(), size, "after {turns} turns");
        writer.wait();
    }
    Ok(())
}
