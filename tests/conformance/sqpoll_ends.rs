//! Ends of connections, servers and poller groups with sends on their way.
//!
//! A kernel thread looks up a send's descriptor when it comes to it, which may be long after the
//! flush: the number must still be that connection's. And a send that its peer never takes holds up
//! neither others nor an end.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use ringpoll::{
    Backend, Connection, Dialer, Error, Handle, Pollers, Result, ServerBuilder, ServerHandle,
    UringOptions, blocking,
};

use crate::harness::*;

macro_rules! cases {
    ($tests:ident, $mount:ident) => {
        $tests! { $mount, sqpoll_ends:
            descriptors_reused_under_load_never_carry_bytes_of_others
            clients_closed_with_sends_in_flight_never_send_to_others
            stuck_sends_hold_up_nobody_on_their_ring
            aborting_stuck_sends_all_at_once_leaves_nothing
            stuck_sends_that_outnumber_the_queues_starve_nobody
            a_server_with_stuck_sends_can_be_shut_down
            pollers_dropped_with_sends_in_flight_end
            a_shutdown_leaves_no_kernel_thread_and_no_ring
            groups_made_and_dropped_in_a_row_leave_nothing
            a_group_that_ends_leaves_the_others_alone
        }
    };
}
pub(crate) use cases;

/// More than the kernel takes for a peer that does not read.
static TOO_MUCH: [u8; 8 << 20] = [7; 8 << 20];

/// All connections of a poller through one send ring of few entries.
fn crowded(t: &Fixture) -> Backend {
    Backend::Sqpoll(t.sqpoll().send_rings(1).send_entries(4))
}

fn builder(t: &Fixture, backend: Backend) -> ServerBuilder {
    t.server().backend(backend).pollers(1)
}

/// How a stream ends, by the side that sends it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Ending {
    /// Whole: after a flush.
    Flushed,
    /// With the last flush given up, and closed at once.
    GivenUp,
    /// Submitted, and closed at once.
    Submitted,
    /// Never: others close it.
    Cut,
}

const ENDINGS: [Ending; 4] = [Ending::Flushed, Ending::GivenUp, Ending::Submitted, Ending::Cut];

/// A request for a stream: whose it is, how long, in flushes of what size, and how it ends.
fn request(id: u32, total: usize, piece: usize, ending: Ending) -> Vec<u8> {
    let words = [id, total as u32, piece as u32, ending as u32];
    words.iter().flat_map(|word| word.to_be_bytes()).collect()
}

/// Sends the requested stream. Panics at any input but one request, because no client sends any.
async fn stream(mut conn: Connection) -> Result<()> {
    let head = conn.next(16).await?;
    let word = |at: usize| u32::from_be_bytes(head[at..at + 4].try_into().expect("four bytes"));
    let (id, total, piece) = (word(0), word(4) as usize, word(8) as usize);
    let ending = ENDINGS[word(12) as usize];
    let mut at = 0;
    while at < total || ending == Ending::Cut {
        assert_eq!(conn.len(), 0, "a connection got bytes that its peer never sent");
        conn.write(marked(id, at, piece))?;
        at += piece;
        match ending {
            Ending::Flushed | Ending::Cut => conn.flush().await?,
            Ending::GivenUp => drop(poll_once(conn.flush()).await),
            Ending::Submitted => conn.submit()?,
        }
    }
    conn.close();
    Ok(())
}

/// Reads the stream of `id` from `at` until `enough` or the end; returns how far it came, and
/// whether that was the end.
fn read_marked(
    mut peer: &TcpStream,
    id: u32,
    mut at: usize,
    enough: usize,
) -> Check<(usize, bool)> {
    let mut bytes = vec![0; 32 << 10];
    while at < enough {
        let count = match peer.read(&mut bytes) {
            Ok(count) => count,
            Err(error) if error.kind() == ErrorKind::ConnectionReset => 0,
            Err(error) => return Err(error.into()),
        };
        if count == 0 {
            return Ok((at, true));
        }
        assert_marked(&bytes[..count], id, at);
        at += count;
    }
    Ok((at, false))
}

/// One stream that is asked for, and ended by either side in some way.
fn live_once(addr: SocketAddr, id: u32, random: &mut Random) -> Check {
    let ending = ENDINGS[random.within(0..ENDINGS.len())];
    let piece = [8, 1000, 5000, 40_000, 300_000][random.within(0..5)];
    let total = piece * random.within(1..8);
    let mut peer = connect(addr)?;
    peer.write_all(&request(id, total, piece, ending))?;
    let how = random.within(0..5);
    if how < 3 {
        let (at, is_end) = read_marked(&peer, id, 0, random.within(0..total + 1))?;
        match how {
            _ if is_end => {}
            0 => reset(peer)?,
            1 => drop(peer),
            // Half closed: the stream goes on until it is cut.
            _ => {
                match peer.shutdown(Shutdown::Write) {
                    // A closer was faster, and its close was a reset.
                    Err(error) if error.kind() == ErrorKind::NotConnected => return Ok(()),
                    done => done?,
                }
                read_marked(&peer, id, at, total)?;
            }
        }
        return Ok(());
    }
    let enough = if ending == Ending::Cut { 4 * total } else { usize::MAX };
    let (count, _) = read_marked(&peer, id, 0, enough)?;
    // A closer may cut any of them, so that less than all is no fault; more is.
    assert!(ending == Ending::Cut || count <= total, "{count} bytes of {total}");
    Ok(())
}

/// Closes connections that were just accepted, about one in `one_in`, until told to stop.
fn closer(handles: Receiver<Handle>, one_in: usize, mut random: Random) -> Closer {
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = Arc::clone(&stop);
    let closed = on_thread(move || {
        let (mut kept, mut count) = (Vec::new(), 0);
        while !stopped.load(Ordering::Relaxed) {
            kept.extend(handles.try_iter().filter(|_| random.one_in(one_in)));
            if !kept.is_empty() && random.one_in(3) {
                let handle: Handle = kept.swap_remove(random.within(0..kept.len()));
                count += u64::from(handle.is_active());
                handle.close();
            }
            std::thread::yield_now();
        }
        kept.iter().for_each(Handle::close);
        Ok(count)
    });
    Closer { stop, closed }
}

struct Closer {
    stop: Arc<AtomicBool>,
    closed: Outcome<u64>,
}

impl Closer {
    /// How many it has closed that were open.
    fn stop(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.closed.wait_for_all()
    }
}

impl Drop for Closer {
    /// A test that fails must not leave a busy thread beside the next tests.
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// Connections close with sends in flight, on either side, and new connections reuse their
/// descriptors at once. No connection receives a byte of the earlier owner.
pub(crate) fn descriptors_reused_under_load_never_carry_bytes_of_others(t: &Fixture) -> Check {
    const LIVES: u32 = if cfg!(debug_assertions) { 800 } else { 12_000 };
    const THREADS: u32 = 6;
    let (prepared, handles) = channel();
    let builder = builder(t, Backend::Sqpoll(t.sqpoll().send_rings(2))).on_connect(stream);
    let server = t.spawn(
        builder.on_prepare(move |handle| prepared.send(handle.clone()).map_err(Error::other)),
    );
    let closer = closer(handles, 3, t.random());
    let next = Arc::new(AtomicU64::new(0));
    let threads: Vec<_> = (0..THREADS)
        .map(|_| {
            let (addr, mut random, next) = (addr_of(&server), t.random(), Arc::clone(&next));
            on_thread(move || {
                loop {
                    let id = next.fetch_add(1, Ordering::Relaxed) as u32;
                    if id >= LIVES {
                        return Ok(());
                    }
                    live_once(addr, 0x5a00_0000 + id, &mut random)?;
                }
            })
        })
        .collect();
    for thread in threads {
        thread.wait_for_all();
    }
    assert!(closer.stop() > 0, "the server closed nothing");
    left_with(&server, 0);
    assert_eq!(server.stats().handler_panics, 0, "a handler got bytes that nobody sent it");
    Ok(())
}

/// At the client's end: a dial takes the descriptor of a connection that was just closed, and its
/// server must not see what that one had still to send.
pub(crate) fn clients_closed_with_sends_in_flight_never_send_to_others(t: &Fixture) -> Check {
    const LIVES: u32 = if cfg!(debug_assertions) { 600 } else { 8000 };
    const TASKS: u32 = 4;
    // Reads a stream, and checks that all of it belongs to one client.
    let server = t.spawn(t.server().on_connect(|mut conn| async move {
        let id = u32::from_be_bytes(conn.next(4).await?[..4].try_into().expect("four bytes"));
        let mut at = 0;
        loop {
            let count = conn.readable().await?;
            if count == 0 {
                return Ok(());
            }
            assert_marked(&conn.next(count).await?, id, at);
            at += count;
        }
    }));
    let backend = Backend::Sqpoll(t.sqpoll().send_rings(2));
    let group = Pollers::builder().backend(backend).count(1).build()?;
    let tasks: Vec<_> = (0..TASKS)
        .map(|task| {
            let (dialer, addr) = (Dialer::new().pollers(group.clone()), addr_of(&server));
            let mut random = t.random();
            on_task(async move {
                for id in (task..LIVES).step_by(TASKS as usize) {
                    send_once(&dialer, addr, id, &mut random).await?;
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
    assert_eq!(server.stats().handler_panics, 0, "a server got bytes of another client");
    Ok(())
}

/// One dial that sends some of its stream, and is closed with the rest on its way.
async fn send_once(dialer: &Dialer, addr: SocketAddr, id: u32, random: &mut Random) -> Result<()> {
    let mut conn = dialer.connect(&addr.to_string()).await?;
    conn.write(id.to_be_bytes().to_vec())?;
    let mut at = 0;
    for _ in 0..random.within(1..6) {
        let count = [8, 1000, 5000, 40_000, 300_000][random.within(0..5)];
        conn.write(marked(id, at, count))?;
        at += count;
        match random.within(0..4) {
            0 => conn.flush().await?,
            1 => drop(poll_once(conn.flush()).await),
            _ => conn.submit()?,
        }
    }
    if random.one_in(3) {
        conn.flush().await?;
    }
    Ok(())
}

/// Connections that have asked for [`TOO_MUCH`] and read nothing.
struct Stuck {
    peers: Vec<TcpStream>,
    handles: Vec<Handle>,
    /// Whether each of the flushes that ended did so because its connection was closed.
    ended: Receiver<bool>,
}

/// What a peer sends to have a send of its stuck.
const STICK: u8 = b'!';

/// A server of frames where a peer may also have a send stuck, and `count` peers that had.
fn with_stuck(builder: ServerBuilder, t: &Fixture, count: usize) -> Check<(ServerHandle, Stuck)> {
    let (report, ended) = channel();
    let (prepared, handles) = channel();
    let builder = builder
        .on_prepare(move |handle| {
            // Fails for later connections, which the test does not use.
            let _ = prepared.send(handle.clone());
            Ok(())
        })
        .on_request(move |mut conn: Connection| {
            let report = report.clone();
            async move {
                if conn.peek(1).await?[0] != STICK {
                    return echo_frame(conn).await;
                }
                conn.skip(1).await?;
                conn.write(&TOO_MUCH[..])?;
                let flushed = conn.flush().await;
                let is_closed = flushed.as_ref().is_err_and(|error| error.is_closed());
                report.send(is_closed).map_err(Error::other)?;
                flushed
            }
        });
    let server = t.spawn(builder);
    let mut peers = Vec::new();
    for _ in 0..count {
        let mut peer = dial(&server)?;
        peer.write_all(&[STICK])?;
        peers.push(peer);
    }
    let all_wait = || server.stats().pollers.sends_in_flight == count as u64;
    eventually("all flushes wait", all_wait);
    let handles: Vec<_> = (0..count)
        .map(|_| handles.recv_timeout(DEADLINE))
        .collect::<std::result::Result<_, _>>()?;
    Ok((server, Stuck { peers, handles, ended }))
}

impl Stuck {
    /// Every flush ends, as closed.
    fn assert_ended(&self) -> Check {
        for _ in &self.handles {
            assert!(self.ended.recv_timeout(DEADLINE)?, "a flush ended as something else");
        }
        Ok(())
    }
}

/// Many more of them than the ring has entries, and the others are served.
pub(crate) fn stuck_sends_hold_up_nobody_on_their_ring(t: &Fixture) -> Check {
    let (server, stuck) = with_stuck(builder(t, crowded(t)), t, 40)?;
    let peers: Vec<_> = (0..20).map(|_| dial(&server)).collect::<Check<_>>()?;
    for round in 0..10 {
        for (tag, mut peer) in peers.iter().enumerate() {
            peer.write_all(&frame(tag + round, 3000))?;
        }
        for (tag, peer) in peers.iter().enumerate() {
            expect_frame(peer, tag + round, 3000)?;
        }
    }
    eventually("only the stuck sends are left", || server.stats().pollers.sends_in_flight == 40);
    // One of them reads after all.
    let rest = read_exactly(&stuck.peers[7], TOO_MUCH.len())?;
    assert!(rest == TOO_MUCH, "the stuck bytes are not what was sent");
    assert!(!stuck.ended.recv_timeout(DEADLINE)?, "a flush whose bytes were all taken failed");
    // The others leave without a word.
    drop((stuck.peers, peers));
    left_with(&server, 0);
    Ok(())
}

/// Many more ends than the ring has room for, all at once.
pub(crate) fn aborting_stuck_sends_all_at_once_leaves_nothing(t: &Fixture) -> Check {
    let (server, stuck) = with_stuck(builder(t, crowded(t)), t, 60)?;
    stuck.handles.iter().for_each(Handle::abort);
    stuck.assert_ended()?;
    // The descriptors go although the peers' ends stay.
    left_with(&server, 0);
    for handle in &stuck.handles {
        eventually("its descriptor is closed", || handle.with_fd(|_| ()).is_err());
    }
    // Bytes that were in the kernel, then the end.
    for peer in &stuck.peers {
        let mut rest = Vec::new();
        // A reset ends it as well.
        let _ = (&mut &*peer).read_to_end(&mut rest);
        assert!(rest.len() < TOO_MUCH.len(), "all was sent");
    }
    exchange_frame(&dial(&server)?, 1, 5000)?;
    Ok(())
}

/// Many more sends in the kernel than it has room to tell of, and large answers to others
/// in between; then all of them are taken at once.
pub(crate) fn stuck_sends_that_outnumber_the_queues_starve_nobody(t: &Fixture) -> Check {
    const STUCK: usize = 40;
    let builder = builder(t, t.mount().with_small_queues());
    let tiny = UringOptions::new().queue_entries(2, 4);
    let (server, stuck) = with_stuck(builder.uring(tiny), t, STUCK)?;
    let peers: Vec<_> = (0..10).map(|_| dial(&server)).collect::<Check<_>>()?;
    for (round, size) in [100, 300_000].into_iter().enumerate() {
        for (tag, peer) in peers.iter().enumerate() {
            exchange_frame(peer, tag + round, size)?;
        }
    }
    let in_flight = || server.stats().pollers.sends_in_flight;
    eventually("only the stuck sends are left", || in_flight() == STUCK as u64);
    let readers: Vec<_> = stuck
        .peers
        .into_iter()
        .map(|mut peer| on_thread(move || Ok(read_all((&mut peer).take(TOO_MUCH.len() as u64))?)))
        .collect();
    for reader in readers {
        assert!(reader.wait_for_all() == TOO_MUCH, "the stuck bytes are not what was sent");
    }
    for _ in 0..STUCK {
        assert!(!stuck.ended.recv_timeout(DEADLINE)?, "a flush whose bytes were taken failed");
    }
    for (tag, peer) in peers.iter().enumerate() {
        exchange_frame(peer, tag, 1000)?;
    }
    drop(peers);
    left_with(&server, 0);
    Ok(())
}

/// Its deadline is kept, and forced it ends with everything in the rings.
pub(crate) fn a_server_with_stuck_sends_can_be_shut_down(t: &Fixture) -> Check {
    const COUNT: usize = 20;
    let before = KernelThreadsBefore::now();
    let (server, stuck) = with_stuck(builder(t, crowded(t)), t, COUNT)?;
    let refused = server.shutdown(Duration::from_millis(30)).expect_err("all of them are busy");
    assert!(refused.is_timeout(), "{refused:?}");
    assert!(!before.started().is_empty(), "the kernel threads ended before the server");
    assert_eq!(server.shutdown_forced(Duration::from_millis(30))?, COUNT);
    stuck.assert_ended()?;
    assert_eq!((server.stats().cut, server.stats().open), (COUNT as u64, 0));
    before.assert_return();
    Ok(())
}

/// The last reference to a group goes, without a shutdown.
pub(crate) fn pollers_dropped_with_sends_in_flight_end(t: &Fixture) -> Check {
    const COUNT: usize = 10;
    for _ in 0..5 {
        let (before, rings) = (KernelThreadsBefore::now(), ring_count());
        let group = Pollers::builder().backend(crowded(t)).count(2).build()?;
        let dialer = Dialer::new().pollers(group.clone());
        let (mut peers, mut flushes) = (Vec::new(), Vec::new());
        for _ in 0..COUNT {
            let (one, peer) = tcp_pair()?;
            let mut conn = dialer.adopt(one.into())?;
            peers.push(peer);
            flushes.push(on_thread(move || {
                conn.write(&TOO_MUCH[..])?;
                Ok(blocking::wait(conn.flush()).expect_err("nobody reads"))
            }));
        }
        eventually("all are stuck", || group.stats().sends_in_flight == COUNT as u64);
        drop((dialer, group));
        for flush in flushes {
            let error = flush.wait();
            assert!(error.is_closed(), "{error:?}");
        }
        before.assert_return();
        eventually("the rings are closed", || ring_count() == rings);
        drop(peers);
    }
    Ok(())
}

/// A server under load, then nothing of it.
pub(crate) fn a_shutdown_leaves_no_kernel_thread_and_no_ring(t: &Fixture) -> Check {
    for pollers in [1, 3] {
        let (before, rings) = (KernelThreadsBefore::now(), ring_count());
        let server = t.server().pollers(pollers).on_request(echo_frame).bind("127.0.0.1:0")?;
        let server = server.spawn()?;
        let peers: Vec<_> = (0..30).map(|_| dial(&server)).collect::<Check<_>>()?;
        for (tag, peer) in peers.iter().enumerate() {
            exchange_frame(peer, tag, 3000)?;
        }
        before.assert_started(server.stats().pollers.sqpoll_threads as usize);
        assert!(ring_count() >= rings + pollers, "there are no rings");
        server.shutdown(DEADLINE)?;
        before.assert_return();
        eventually("the rings are closed", || ring_count() == rings);
        assert_eq!(server.stats().pollers.sqpoll_threads, 0, "it tells of threads that ended");
    }
    Ok(())
}

/// Each with its kernel threads, its rings, a connection, and bytes on their way.
pub(crate) fn groups_made_and_dropped_in_a_row_leave_nothing(t: &Fixture) -> Check {
    let (before, rings, open) = (KernelThreadsBefore::now(), ring_count(), fds().len());
    for round in 0..20 {
        let group = Pollers::builder().backend(t.mount().backend).count(2).build()?;
        let dialer = Dialer::new().pollers(group.clone());
        let (one, peer) = tcp_pair()?;
        let mut conn = dialer.adopt(one.into())?;
        conn.write(marked(round, 0, 10_000))?;
        blocking::wait(conn.flush())?;
        assert_marked(&read_exactly(&peer, 10_000)?, round, 0);
        match round % 4 {
            0 => group.shutdown()?,
            1 => drop(conn),
            // Submits without waiting.
            2 => {
                conn.write(marked(round, 10_000, 100_000))?;
                conn.submit()?;
            }
            _ => {}
        }
    }
    before.assert_return();
    eventually("the rings are closed", || ring_count() == rings);
    eventually("the descriptors are closed", || fds().len() == open);
    Ok(())
}

/// Kernel threads are of one group: another's end, and its descriptors, do not concern them.
pub(crate) fn a_group_that_ends_leaves_the_others_alone(t: &Fixture) -> Check {
    let first = t.server().on_request(echo_frame).bind("127.0.0.1:0")?.spawn()?;
    let second = t.spawn(t.server().on_request(echo_frame));
    let peers: Vec<_> = (0..20).map(|_| dial(&second)).collect::<Check<_>>()?;
    let others: Vec<_> = (0..20).map(|_| dial(&first)).collect::<Check<_>>()?;
    for (tag, (peer, other)) in peers.iter().zip(&others).enumerate() {
        exchange_frame(peer, tag, 3000)?;
        exchange_frame(other, tag, 3000)?;
    }
    for (tag, mut peer) in peers.iter().enumerate() {
        peer.write_all(&frame(tag, 30_000))?;
    }
    drop(others);
    first.shutdown(DEADLINE)?;
    for (tag, peer) in peers.iter().enumerate() {
        expect_frame(peer, tag, 30_000)?;
    }
    let third = t.spawn(t.server().on_request(echo_frame));
    for (tag, peer) in peers.iter().enumerate() {
        exchange_frame(&dial(&third)?, tag, 3000)?;
        exchange_frame(peer, tag, 3000)?;
    }
    let_kernel_threads_sleep();
    for (tag, peer) in peers.iter().enumerate() {
        exchange_frame(peer, tag, 100)?;
    }
    Ok(())
}
