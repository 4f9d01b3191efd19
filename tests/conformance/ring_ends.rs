//! Ends of connections, rings and processes with operations in flight.
//!
//! A completion may come after its connection has ended, when its fd and its slot belong to another
//! connection. No connection receives a byte of another one, and nothing is kept open, not by a
//! child process either.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};

use ringpoll::{Connection, Dialer, Error, Handle, Pollers, Result, ServerHandle, UringOptions};

use crate::harness::*;

macro_rules! cases {
    ($tests:ident, $mount:ident) => {
        $tests! { $mount, ring_ends:
            reused_fds_and_slots_never_mix_connections
            clients_that_end_with_operations_in_flight_never_mix_connections
            what_was_flushed_before_a_close_arrives_at_any_size
            partial_sends_to_slow_readers_stay_in_order
            closing_thousands_under_load_leaves_nothing
            an_executed_child_inherits_no_ring_and_no_listener
            a_forked_child_disturbs_nothing_and_maps_no_ring
            a_port_is_free_again_as_soon_as_its_server_has_ended
            pollers_end_with_everything_in_flight
        }
    };
}
pub(crate) use cases;

const CONNECTIONS: usize = if cfg!(debug_assertions) { 600 } else { 4000 };

/// What a request asks for, beside its answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Then {
    /// A flush; the connection stays.
    Flush,
    /// A flush and a close at once.
    FlushAndClose,
    /// A close with the answer on its way, or not even that.
    SubmitAndClose,
    /// Nothing: the answer is on its way when the handler is done.
    Submit,
}

const THENS: [Then; 4] = [Then::Flush, Then::FlushAndClose, Then::SubmitAndClose, Then::Submit];
const SIZES: [usize; 5] = [1, 100, 5000, 70_000, 300_000];

/// A request of connection `tag`: what to do, whose it is, how much is wanted, and a body to check.
fn request(then: Then, tag: usize, size: usize, body: usize) -> Vec<u8> {
    let mut bytes = vec![then as u8];
    for word in [tag, size, body] {
        bytes.extend((word as u32).to_be_bytes());
    }
    bytes.extend(pattern(own(tag, 0), body));
    bytes
}

/// Checks a request and carries it out. Panics at a byte of another connection.
async fn obey(mut conn: Connection) -> Result<()> {
    let head = conn.next(13).await?;
    let word =
        |at: usize| u32::from_be_bytes(head[at..at + 4].try_into().expect("four bytes")) as usize;
    let (tag, size, body) = (word(1), word(5), word(9));
    assert!(body <= SIZES[SIZES.len() - 1], "this is no request: {:?}", &head[..]);
    assert_pattern(&conn.next(body).await?, own(tag, 0));
    conn.write(pattern(own(tag, 0), size))?;
    let then = THENS[usize::from(head[0])];
    match then {
        Then::Flush | Then::FlushAndClose => conn.flush().await?,
        Then::Submit | Then::SubmitAndClose => conn.submit()?,
    }
    if matches!(then, Then::FlushAndClose | Then::SubmitAndClose) {
        conn.close();
    }
    Ok(())
}

fn tiny() -> UringOptions {
    UringOptions::new().queue_entries(4, 16).receive_buffers(4, 2)
}

fn obedient_server(t: &Fixture) -> ServerHandle {
    t.spawn(t.server().backend(t.mount().with_small_queues()).uring(tiny()).on_request(obey))
}

/// Reads to the end of the stream or to a reset. Returns how much of the answer to `tag` came
/// before.
fn read_rest(mut peer: &TcpStream, tag: usize, mut at: usize) -> Check<usize> {
    let mut bytes = [0; 16 << 10];
    loop {
        let count = match peer.read(&mut bytes) {
            Ok(count) => count,
            Err(error) if error.kind() == ErrorKind::ConnectionReset => 0,
            Err(error) => return Err(error.into()),
        };
        if count == 0 {
            return Ok(at);
        }
        assert_pattern(&bytes[..count], own(tag, at));
        at += count;
    }
}

/// One connection that is opened, used and ended in some way.
fn live_once(addr: SocketAddr, tag: usize, random: &mut Random) -> Check {
    let then = THENS[random.within(0..THENS.len())];
    let size = SIZES[random.within(0..SIZES.len())];
    let body = random.within(0..9000);
    let mut peer = connect(addr)?;
    peer.write_all(&request(then, tag, size, body))?;
    match random.within(0..6) {
        // Ended with the request, the answer or both in flight.
        0 => return Ok(()),
        1 => return Ok(reset(peer)?),
        2 => {
            // A part of the answer; a close that did not wait may have cut it.
            if let Ok(part) = read_exactly(&peer, random.within(0..size + 1)) {
                assert_pattern(&part, own(tag, 0));
            }
            return Ok(reset(peer)?);
        }
        3 => peer.shutdown(Shutdown::Write)?,
        _ if then == Then::Flush || then == Then::Submit => {
            assert_pattern(&read_exactly(&peer, size)?, own(tag, 0));
            // Once more on the same connection, whose slot is no longer new.
            peer.write_all(&request(Then::FlushAndClose, tag, size, body))?;
        }
        _ => {}
    }
    let whole = read_rest(&peer, tag, 0)?;
    assert!(whole == size || then == Then::SubmitAndClose, "{whole} of {size} bytes, {then:?}");
    Ok(())
}

/// Every byte that a connection receives belongs to it.
pub(crate) fn reused_fds_and_slots_never_mix_connections(t: &Fixture) -> Check {
    const THREADS: usize = 4;
    let server = obedient_server(t);
    let threads: Vec<_> = (0..THREADS)
        .map(|thread| {
            let (addr, mut random) = (addr_of(&server), t.random());
            on_thread(move || {
                (thread..CONNECTIONS)
                    .step_by(THREADS)
                    .try_for_each(|tag| live_once(addr, tag, &mut random))
            })
        })
        .collect();
    for thread in threads {
        thread.wait_for_all();
    }
    left_with(&server, 0);
    assert_eq!(server.stats().handler_panics, 0, "a handler got bytes of another connection");
    Ok(())
}

/// At the client's end: dials take the fd numbers of connections that are just closing.
pub(crate) fn clients_that_end_with_operations_in_flight_never_mix_connections(
    t: &Fixture,
) -> Check {
    const TASKS: usize = 4;
    let server = obedient_server(t);
    let group =
        Pollers::builder().backend(t.mount().with_small_queues()).count(1).uring(tiny()).build()?;
    let tasks: Vec<_> = (0..TASKS)
        .map(|task| {
            let addr = addr_of(&server).to_string();
            let (dialer, mut random) = (Dialer::new().pollers(group.clone()), t.random());
            on_task(async move {
                for tag in (task..CONNECTIONS / 2).step_by(TASKS) {
                    dial_once(&dialer, &addr, tag, &mut random).await?;
                }
                Ok(())
            })
        })
        .collect();
    for task in tasks {
        task.wait_for_all();
    }
    end_empty(&group)?;
    left_with(&server, 0);
    assert_eq!(server.stats().handler_panics, 0, "a handler got bytes of another connection");
    Ok(())
}

/// One dial that is used, and given up in some way.
async fn dial_once(dialer: &Dialer, addr: &str, tag: usize, random: &mut Random) -> Result<()> {
    let size = SIZES[random.within(0..SIZES.len())];
    let body = [0, 100, 9000, 200_000][random.within(0..4)];
    let mut conn = dialer.connect(addr).await?;
    conn.write(request(Then::Flush, tag, size, body))?;
    match random.within(0..5) {
        // Dropped with the send in flight, with the read, with both.
        0 => conn.submit()?,
        1 => drop(poll_once(conn.flush()).await),
        2 => {
            conn.submit()?;
            drop(poll_once(conn.next(size)).await);
            if let Some(part) = conn.try_next(conn.len()) {
                assert_pattern(&part, own(tag, 0));
            }
        }
        3 => {
            // Closed by another task while both wait.
            let handle = (*conn).clone();
            let (mut reader, mut writer) = conn.split();
            let closer = runtime().spawn(async move { handle.close() });
            let (_, read) = tokio::join!(writer.flush(), reader.next(size));
            // Either may have been done before the close.
            if let Ok(answer) = read {
                assert_pattern(&answer, own(tag, 0));
            }
            closer.await.map_err(Error::other)?;
        }
        _ => {
            conn.flush().await?;
            assert_pattern(&conn.next(size).await?, own(tag, 0));
        }
    }
    Ok(())
}

pub(crate) fn what_was_flushed_before_a_close_arrives_at_any_size(t: &Fixture) -> Check {
    let server = obedient_server(t);
    let mut sizes = vec![1, 2, 1000, 65_535, 65_536, 65_537, 300_000, 1 << 20, 4 << 20];
    sizes.extend([4095, 4096, 4097, 16_383, 16_384, 16_385]);
    let mut random = t.random();
    sizes.extend((0..20).map(|_| random.within(1..100_000)));
    for (tag, &size) in sizes.iter().enumerate() {
        let mut peer = dial(&server)?;
        peer.write_all(&request(Then::FlushAndClose, tag, size, 10))?;
        if size <= 16 << 10 {
            // Everything is in the kernel, and the connection is long gone.
            left_with(&server, 0);
        }
        assert_eq!(read_rest(&peer, tag, 0)?, size);
    }
    // Many at once.
    let peers: Vec<_> = (0..40)
        .map(|tag| {
            let mut peer = dial(&server)?;
            peer.write_all(&request(Then::FlushAndClose, tag, 1000 * tag, 10))?;
            Ok(peer)
        })
        .collect::<Check<_>>()?;
    for (tag, peer) in peers.iter().enumerate() {
        assert_eq!(read_rest(peer, tag, 0)?, 1000 * tag);
        assert_eof(peer);
    }
    Ok(())
}

/// One poller, many connections, and sends of which the socket takes a part.
pub(crate) fn partial_sends_to_slow_readers_stay_in_order(t: &Fixture) -> Check {
    const READERS: usize = 32;
    const TOTAL: usize = 400_000;
    let seed = t.random().next();
    let builder = t.server().backend(t.mount().with_small_queues()).pollers(1).uring(tiny());
    let builder = builder.on_prepare(shrink_send_buffer);
    let server = t.spawn(builder.on_request(move |mut conn| async move {
        let head = conn.next(4).await?;
        let tag = u32::from_be_bytes(head[..4].try_into().expect("four bytes")) as usize;
        let mut random = Random::new(seed ^ tag as u64);
        let mut at = 0;
        while at < TOTAL {
            let count = random.within(1..50_000).min(TOTAL - at);
            conn.write(pattern(own(tag, at), count))?;
            at += count;
            match random.within(0..3) {
                0 => conn.submit()?,
                1 => conn.flush().await?,
                _ => {}
            }
        }
        conn.flush().await?;
        conn.close();
        Ok(())
    }));
    let readers: Vec<_> = (0..2)
        .map(|thread| {
            let peers: Vec<_> = (thread..READERS)
                .step_by(2)
                .map(|tag| {
                    let mut peer = dial(&server)?;
                    peer.write_all(&(tag as u32).to_be_bytes())?;
                    Ok((tag, peer))
                })
                .collect::<Check<_>>()?;
            let mut random = t.random();
            Ok(on_thread(move || {
                let mut at = vec![0; peers.len()];
                while at.iter().any(|at| *at < TOTAL) {
                    let index = random.within(0..peers.len());
                    let (tag, peer) = &peers[index];
                    let count = random.within(1..20_000).min(TOTAL - at[index]);
                    assert_pattern(&read_exactly(peer, count)?, own(*tag, at[index]));
                    at[index] += count;
                }
                peers.iter().for_each(|(_, peer)| assert_eof(peer));
                Ok(())
            }))
        })
        .collect::<Check<_>>()?;
    for reader in readers {
        reader.wait_for_all();
    }
    assert_eq!((server.stats().handler_errors, server.stats().handler_panics), (0, 0));
    Ok(())
}

/// Both sides close at any moment, under load, thousands of times.
pub(crate) fn closing_thousands_under_load_leaves_nothing(t: &Fixture) -> Check {
    const COUNT: usize = if cfg!(debug_assertions) { 2000 } else { 10_000 };
    const AT_ONCE: usize = 100;
    let (prepared, handles) = channel::<Handle>();
    let builder =
        t.server().backend(t.mount().with_small_queues()).uring(tiny()).on_request(echo_frame);
    let server = t.spawn(
        builder.on_prepare(move |handle| prepared.send(handle.clone()).map_err(Error::other)),
    );
    let stop = Arc::new(AtomicBool::new(false));
    let closer = closer(handles, Arc::clone(&stop), t.random());
    let steady = dial(&server)?;
    // Served before any other comes, so that its handle is the first.
    exchange_frame(&steady, 0, 1000)?;
    let mut random = t.random();
    for round in 0..COUNT / AT_ONCE {
        let peers: Vec<_> = (0..AT_ONCE).map(|_| dial(&server)).collect::<Check<_>>()?;
        for (tag, mut peer) in peers.into_iter().enumerate() {
            // The server may have closed it.
            let sent = peer.write_all(&frame(tag, random.within(1..6000)));
            match random.within(0..4) {
                0 if sent.is_ok() => drop(peer.read(&mut [0; 1000])),
                1 => reset(peer)?,
                _ => {}
            }
        }
        exchange_frame(&steady, round, 1000)?;
    }
    stop.store(true, Ordering::Relaxed);
    assert!(closer.wait_for_all() > 0, "the server closed nothing");
    left_with(&server, 1);
    Ok(())
}

/// Closes every other connection but the first, soon after it was accepted.
fn closer(handles: Receiver<Handle>, stop: Arc<AtomicBool>, mut random: Random) -> Outcome<usize> {
    on_thread(move || {
        let steady = handles.recv_timeout(DEADLINE)?;
        let mut count = 0;
        while !stop.load(Ordering::Relaxed) {
            for handle in handles.try_iter().filter(|_| random.one_in(2)) {
                handle.close();
                count += 1;
            }
            std::thread::yield_now();
        }
        drop(steady);
        Ok(count)
    })
}

/// A child process that is gone when the test is.
struct Kept(Child);

impl Drop for Kept {
    fn drop(&mut self) {
        // It may have ended by itself, which is as good.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A server under load from three threads, until the returned flag is set.
fn loaded(t: &Fixture) -> Check<(ServerHandle, Arc<AtomicBool>, Vec<Outcome<usize>>)> {
    let server = t.spawn(t.server().on_request(echo_frame));
    let stop = Arc::new(AtomicBool::new(false));
    let loads: Vec<_> = (0..3)
        .map(|tag| {
            let (peer, stop) = (dial(&server)?, Arc::clone(&stop));
            Ok(on_thread(move || {
                let mut rounds = 0;
                while !stop.load(Ordering::Relaxed) {
                    exchange_frame(&peer, tag + rounds, 1 + rounds * 37 % 10_000)?;
                    rounds += 1;
                }
                Ok(rounds)
            }))
        })
        .collect::<Check<_>>()?;
    eventually("the load runs", || server.stats().handler_runs > 50);
    Ok((server, stop, loads))
}

/// Every descriptor is close-on-exec.
pub(crate) fn an_executed_child_inherits_no_ring_and_no_listener(t: &Fixture) -> Check {
    let (server, stop, loads) = loaded(t)?;
    let mut sleep = Command::new("sleep");
    sleep.arg("100").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let children: Vec<_> =
        (0..5).map(|_| sleep.spawn().map(Kept)).collect::<std::io::Result<_>>()?;
    for child in &children {
        for entry in fs::read_dir(format!("/proc/{}/fd", child.0.id()))? {
            // One that it has closed meanwhile is no more than that.
            let target = fs::read_link(entry?.path()).unwrap_or_default().display().to_string();
            let is_ours = target.starts_with("anon_inode:") || target.starts_with("socket:");
            assert!(!is_ours, "a child has {target}");
        }
    }
    let before = server.stats().handler_runs;
    eventually("the load goes on", || server.stats().handler_runs > before + 50);
    stop.store(true, Ordering::Relaxed);
    for load in loads {
        load.wait_for_all();
    }
    server.shutdown(DEADLINE)?;
    // The children live, and hold nothing.
    let listener = TcpListener::bind(addr_of(&server))?;
    drop(listener);
    let again = t.spawn_bound(t.server().on_request(echo).bind(&addr_of(&server).to_string())?);
    assert_eq!(exchange(&dial(&again)?, b"again")?, b"again");
    drop(children);
    Ok(())
}

/// Copies of memory and descriptors in a forked child do not affect the parent.
pub(crate) fn a_forked_child_disturbs_nothing_and_maps_no_ring(t: &Fixture) -> Check {
    let (server, stop, loads) = loaded(t)?;
    let children: Vec<_> = (0..3).map(|_| Forked::sleeping()).collect::<std::io::Result<_>>()?;
    for child in &children {
        let maps = fs::read_to_string(format!("/proc/{}/maps", child.0))?;
        let ring = maps.lines().find(|line| line.contains("io_uring"));
        assert_eq!(ring, None, "a forked child shares a ring's memory");
    }
    let before = server.stats().handler_runs;
    eventually("the load goes on", || server.stats().handler_runs > before + 200);
    for tag in 0..20 {
        exchange_frame(&dial(&server)?, tag, 5000)?;
    }
    stop.store(true, Ordering::Relaxed);
    for load in loads {
        assert!(load.wait_for_all() > 0);
    }
    // With the children's copies of every fd still open.
    server.shutdown(DEADLINE)?;
    drop(children);
    let again = t.spawn_bound(t.server().on_request(echo).bind(&addr_of(&server).to_string())?);
    assert_eq!(exchange(&dial(&again)?, b"again")?, b"again");
    Ok(())
}

/// A child that was forked and never executes anything; gone when dropped.
struct Forked(libc::pid_t);

impl Forked {
    fn sleeping() -> std::io::Result<Forked> {
        // SAFETY: until it is killed the child only calls `pause`, which is async-signal-safe, as
        // the child of a process with several threads must (fork(2)).
        match unsafe { libc::fork() } {
            -1 => Err(std::io::Error::last_os_error()),
            0 => loop {
                // SAFETY: `pause` has no preconditions.
                unsafe { libc::pause() };
            },
            id => Ok(Forked(id)),
        }
    }
}

impl Drop for Forked {
    fn drop(&mut self) {
        // SAFETY: `kill` takes any numbers; the child is not waited for before, so the id is its.
        unsafe { libc::kill(self.0, libc::SIGKILL) };
        // SAFETY: a null status is allowed (wait(2)).
        unsafe { libc::waitpid(self.0, std::ptr::null_mut(), 0) };
    }
}

/// Neither an accept in flight nor a ring that is being torn down holds a port.
pub(crate) fn a_port_is_free_again_as_soon_as_its_server_has_ended(t: &Fixture) -> Check {
    let first = t.server().on_request(echo_frame).bind("127.0.0.1:0")?.spawn()?;
    let addr = addr_of(&first);
    first.shutdown(DEADLINE)?;
    for round in 0..50 {
        let bound = t.server().on_request(echo_frame).bind(&addr.to_string());
        let server =
            bound.map_err(|error| Failure::new(format!("round {round}: {error}")))?.spawn()?;
        let peer = connect(addr)?;
        exchange_frame(&peer, round, 2000)?;
        // One in the middle of a request, one that was never served.
        let mut busy = connect(addr)?;
        busy.write_all(&[0])?;
        let _silent = connect(addr)?;
        server.shutdown_forced(DEADLINE / 1000)?;
        assert_ended(&peer);
        assert_ended(&busy);
    }
    Ok(())
}

/// Rule of teardown: everything is cancelled and drained before the ring and its memory go.
pub(crate) fn pollers_end_with_everything_in_flight(t: &Fixture) -> Check {
    static TOO_MUCH: [u8; 8 << 20] = [7; 8 << 20];
    for round in 0..10 {
        let group = Pollers::builder()
            .backend(t.mount().with_small_queues())
            .count(2)
            .uring(tiny())
            .build()?;
        let dialer = Dialer::new().pollers(group.clone());
        let server = t.server().use_pollers(group.clone()).on_request(|mut conn| async move {
            conn.next(1).await?;
            conn.write(&TOO_MUCH[..])?;
            conn.flush().await
        });
        let server = server.bind("127.0.0.1:0")?.spawn()?;
        let mut clients = Vec::new();
        for index in 0..10 {
            // A client of the same group that reads nothing, and one that waits for a byte.
            let addr = addr_of(&server).to_string();
            let mut conn = block_on(async { Ok(dialer.connect(&addr).await?) })?;
            if index % 2 == 0 {
                conn.write_copy(b"?")?;
                conn.submit()?;
            }
            clients.push(conn);
        }
        let mut peer = dial(&server)?;
        peer.write_all(b"?")?;
        eventually("sends are in flight", || group.stats().sends_in_flight > 0);
        group.shutdown()?;
        server.shutdown(DEADLINE)?;
        for mut conn in clients {
            let error = block_on(async { Ok(conn.skip(10 << 20).await) })?.expect_err("closed");
            assert!(error.is_closed() || error.is_eof(), "round {round}: {error:?}");
        }
    }
    Ok(())
}
