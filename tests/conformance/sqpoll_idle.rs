//! Kernel threads that sleep and wake: no operation waits for a sleeping one, an idle one takes no
//! CPU time, and while there is work no thread makes a system call.

use std::io::Write;
use std::net::TcpStream;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use ringpoll::{
    Backend, Connection, Dialer, Error, PollMode, PollerStats, Pollers, Result, ServerBuilder,
    SqpollOptions, blocking,
};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use crate::harness::*;

macro_rules! cases {
    ($tests:ident, $mount:ident) => {
        $tests! { $mount, sqpoll_idle:
            requests_that_come_while_everything_sleeps_are_answered
            a_blocking_flush_wakes_a_sleeping_kernel_thread
            a_flush_of_a_task_wakes_a_sleeping_kernel_thread
            a_flush_of_a_worker_wakes_a_sleeping_kernel_thread
            a_flush_on_a_poller_wakes_a_sleeping_kernel_thread
            flushes_while_a_kernel_thread_falls_asleep_are_delivered
            flushes_of_many_threads_wake_a_sleeping_kernel_thread
            a_kernel_thread_polls_for_as_long_as_it_was_told
            an_idle_server_takes_no_cpu
            a_busy_server_makes_no_system_calls
            sends_that_need_no_poller_make_no_system_calls
        }
    };
}
pub(crate) use cases;

/// Kernel threads that sleep as soon as they may.
fn drowsy(t: &Fixture) -> SqpollOptions {
    t.sqpoll().idle(Duration::from_millis(1))
}

/// Kernel threads that do not sleep while a test looks.
fn awake(t: &Fixture) -> SqpollOptions {
    t.sqpoll().idle(DEADLINE)
}

fn builder(t: &Fixture, options: SqpollOptions) -> ServerBuilder {
    t.server().backend(Backend::Sqpoll(options)).pollers(1)
}

pub(crate) fn requests_that_come_while_everything_sleeps_are_answered(t: &Fixture) -> Check {
    let server = t.spawn(builder(t, drowsy(t)).on_request(echo_frame));
    let peers: Vec<_> = (0..4).map(|_| dial(&server)).collect::<Check<_>>()?;
    for round in 0..10 {
        for (tag, peer) in peers.iter().enumerate() {
            let_kernel_threads_sleep();
            exchange_frame(peer, tag + round, [10, 5000][round % 2])?;
        }
    }
    let stats = server.stats().pollers;
    // One that receives is woken by the data, and still polls when the answer comes.
    assert!(t.mount().is_shared() || stats.sqpoll_wake_calls >= 40, "nobody was woken: {stats:?}");
    Ok(())
}

/// Has a connection flush one byte at a time, from wherever its task runs.
struct Flusher {
    peer: TcpStream,
    demands: UnboundedSender<u8>,
    flushed: Receiver<()>,
}

/// Flushes each byte that is demanded, and tells.
async fn flush_on_demand(
    mut conn: Connection,
    mut demands: UnboundedReceiver<u8>,
    tell: std::sync::mpsc::Sender<()>,
) -> Result<()> {
    while let Some(byte) = demands.recv().await {
        conn.write_copy(&[byte])?;
        conn.flush().await?;
        tell.send(()).map_err(Error::other)?;
    }
    Ok(())
}

impl Flusher {
    /// `place` gets the bytes to flush and reports each flush; it returns the peer of the
    /// connection.
    fn new(
        place: impl FnOnce(UnboundedReceiver<u8>, std::sync::mpsc::Sender<()>) -> Check<TcpStream>,
    ) -> Check<Flusher> {
        let (demands, demanded) = unbounded_channel();
        let (tell, flushed) = channel();
        Ok(Flusher { peer: place(demanded, tell)?, demands, flushed })
    }

    /// Flushes a byte while all kernel threads sleep. Returns how many of them were woken.
    fn flush_once(&self, byte: u8, stats: impl Fn() -> PollerStats) -> Check<u64> {
        let_kernel_threads_sleep();
        let before = stats();
        self.demands.send(byte)?;
        assert_eq!(read_exactly(&self.peer, 1)?, [byte]);
        self.flushed.recv_timeout(DEADLINE)?;
        Ok(stats().sqpoll_wake_calls - before.sqpoll_wake_calls)
    }
}

/// How many sleeps each kind of flusher is to interrupt.
const SLEEPS: u8 = 10;

/// The flusher on a handler of a server with `placement`.
fn in_a_handler(t: &Fixture, placement: Placement) -> Check<u64> {
    let next = Arc::new(std::sync::Mutex::new(None));
    let placed = Arc::clone(&next);
    let builder = builder(t, drowsy(t)).placement(placement);
    let server = t.spawn(builder.on_connect(move |conn| {
        let parts = placed.lock().expect("nobody panics here").take();
        let (demanded, tell) = parts.expect("one connection comes");
        flush_on_demand(conn, demanded, tell)
    }));
    let flusher = Flusher::new(|demanded, tell| {
        *next.lock().expect("nobody panics here") = Some((demanded, tell));
        dial(&server)
    })?;
    (0..SLEEPS).map(|byte| flusher.flush_once(byte, || server.stats().pollers)).sum()
}

/// From a thread that runs no task.
pub(crate) fn a_blocking_flush_wakes_a_sleeping_kernel_thread(t: &Fixture) -> Check {
    let (conn, peer) = t.client()?;
    let mut conn = blocking::Connection::new(conn);
    for byte in 0..SLEEPS {
        let_kernel_threads_sleep();
        let before = t.clients().stats();
        conn.write_copy(&[byte])?;
        conn.flush()?;
        assert_eq!(read_exactly(&peer, 1)?, [byte]);
        let after = t.clients().stats();
        assert!(after.sqpoll_wake_calls > before.sqpoll_wake_calls, "nobody was woken: {after:?}");
    }
    Ok(())
}

/// From a task of the user's runtime.
pub(crate) fn a_flush_of_a_task_wakes_a_sleeping_kernel_thread(t: &Fixture) -> Check {
    let flusher = Flusher::new(|demanded, tell| {
        let (conn, peer) = t.client()?;
        runtime().spawn(flush_on_demand(conn, demanded, tell));
        Ok(peer)
    })?;
    for byte in 0..SLEEPS {
        let woken = flusher.flush_once(byte, || t.clients().stats())?;
        assert!(woken > 0, "nobody was woken: {:?}", t.clients().stats());
    }
    Ok(())
}

/// From a worker of the library.
pub(crate) fn a_flush_of_a_worker_wakes_a_sleeping_kernel_thread(t: &Fixture) -> Check {
    let woken = in_a_handler(t, Placement::Pool { workers: 2 })?;
    assert!(woken >= SLEEPS.into(), "of {SLEEPS} flushes {woken} have woken anybody");
    Ok(())
}

/// From the poller, which was woken first (by the kernel thread, if that thread receives).
pub(crate) fn a_flush_on_a_poller_wakes_a_sleeping_kernel_thread(t: &Fixture) -> Check {
    let woken = in_a_handler(t, Placement::Inline)?;
    assert!(
        t.mount().is_shared() || woken >= SLEEPS.into(),
        "of {SLEEPS} flushes {woken} have woken anybody"
    );
    Ok(())
}

/// The moment between the last check of the kernel thread and its sleep.
pub(crate) fn flushes_while_a_kernel_thread_falls_asleep_are_delivered(t: &Fixture) -> Check {
    const ROUNDS: usize = if cfg!(debug_assertions) { 300 } else { 3000 };
    let group = Pollers::builder().backend(Backend::Sqpoll(drowsy(t))).count(1).build()?;
    let (one, peer) = tcp_pair()?;
    let mut conn =
        blocking::Connection::new(Dialer::new().pollers(group.clone()).adopt(one.into())?);
    let mut random = t.random();
    for round in 0..ROUNDS {
        conn.write(marked(7, 8 * round, 8))?;
        conn.flush()?;
        assert_marked(&read_exactly(&peer, 8)?, 7, 8 * round);
        // Around the time that it polls in vain: at times it sleeps, at times it is about to.
        let pause = Duration::from_micros(random.within(500..6000) as u64);
        let until = Instant::now() + pause;
        while Instant::now() < until {
            std::hint::spin_loop();
        }
    }
    let woken = group.stats().sqpoll_wake_calls;
    assert!(woken > 0, "it never slept");
    drop(conn);
    end_empty(&group)
}

/// One of the producers wakes the kernel thread, and none relies on a wake-up that has not
/// happened.
pub(crate) fn flushes_of_many_threads_wake_a_sleeping_kernel_thread(t: &Fixture) -> Check {
    const THREADS: usize = 4;
    const ROUNDS: usize = 40;
    let group = Pollers::builder().backend(Backend::Sqpoll(drowsy(t))).count(1).build()?;
    let dialer = Dialer::new().pollers(group.clone());
    let start = Arc::new(Barrier::new(THREADS + 1));
    let mut peers = Vec::new();
    let mut threads = Vec::new();
    for id in 0..THREADS as u32 {
        let (one, peer) = tcp_pair()?;
        let mut conn = blocking::Connection::new(dialer.adopt(one.into())?);
        let start = Arc::clone(&start);
        threads.push(on_thread(move || {
            for round in 0..ROUNDS {
                start.wait();
                conn.write(marked(id, 8 * round, 8))?;
                conn.flush()?;
            }
            Ok(())
        }));
        peers.push((id, peer));
    }
    for round in 0..ROUNDS {
        let_kernel_threads_sleep();
        start.wait();
        for (id, peer) in &peers {
            assert_marked(&read_exactly(peer, 8)?, *id, 8 * round);
        }
    }
    for thread in threads {
        thread.wait();
    }
    end_empty(&group)
}

/// The idle time is the one that was asked for, and no shorter.
pub(crate) fn a_kernel_thread_polls_for_as_long_as_it_was_told(t: &Fixture) -> Check {
    let group = Pollers::builder().backend(Backend::Sqpoll(awake(t))).count(1).build()?;
    let (one, peer) = tcp_pair()?;
    let mut conn =
        blocking::Connection::new(Dialer::new().pollers(group.clone()).adopt(one.into())?);
    conn.write_copy(b"!")?;
    conn.flush()?;
    assert_eq!(read_exactly(&peer, 1)?, b"!");
    let before = group.stats().sqpoll_wake_calls;
    for byte in 0..10 {
        // Several times longer than without the setting.
        holds_within(Duration::from_millis(30), || false);
        conn.write_copy(&[byte])?;
        conn.flush()?;
        assert_eq!(read_exactly(&peer, 1)?, [byte]);
    }
    assert_eq!(group.stats().sqpoll_wake_calls, before, "it slept before its time");
    drop(conn);
    end_empty(&group)
}

/// Within a second of the last request, and from then on.
pub(crate) fn an_idle_server_takes_no_cpu(t: &Fixture) -> Check {
    /// Of the whole process, in a second: a twentieth of a CPU.
    const TICKS_MAX: u64 = 5;
    const SECOND: Duration = Duration::from_secs(1);
    // Of default settings, as an idle server is.
    let options = match t.sqpoll() {
        _ if t.mount().is_shared() => t.sqpoll(),
        own => own.idle(Duration::from_millis(2)),
    };
    let server = t.spawn(t.server().backend(Backend::Sqpoll(options)).on_request(echo_frame));
    let peers: Vec<_> = (0..20).map(|_| dial(&server)).collect::<Check<_>>()?;
    for round in 0..20 {
        for (tag, mut peer) in peers.iter().enumerate() {
            peer.write_all(&frame(tag + round, 1000))?;
        }
        for (tag, peer) in peers.iter().enumerate() {
            expect_frame(peer, tag + round, 1000)?;
        }
    }
    // What is asked for is nothing, so there is no event to wait for.
    holds_within(SECOND, || false);
    let (ticks, told) = (cpu_ticks(), server.stats().pollers.sqpoll_cpu_us);
    holds_within(SECOND, || false);
    let ticks = cpu_ticks() - ticks;
    assert!(ticks <= TICKS_MAX, "{ticks} ticks of CPU in a second of doing nothing");
    let polled = server.stats().pollers.sqpoll_cpu_us - told;
    assert_eq!(polled, 0, "kernel threads polled for {polled} µs");
    for (tag, peer) in peers.iter().enumerate() {
        exchange_frame(peer, tag, 1000)?;
    }
    Ok(())
}

/// Rounds in which every one of `peers` sends a frame of `size` and has it answered.
fn rounds(peers: &[TcpStream], rounds: usize, size: usize) -> Check {
    let frames: Vec<_> = (0..peers.len()).map(|tag| frame(tag, size)).collect();
    for _ in 0..rounds {
        for (mut peer, frame) in peers.iter().zip(&frames) {
            peer.write_all(frame)?;
        }
        for (tag, peer) in peers.iter().enumerate() {
            expect_frame(peer, tag, size)?;
        }
    }
    Ok(())
}

pub(crate) fn a_busy_server_makes_no_system_calls(t: &Fixture) -> Check {
    const PEERS: usize = 100;
    const ROUNDS: usize = 200;
    const CALLS_MAX: u64 = 20;
    let builder = builder(t, awake(t)).placement(Placement::Inline).poll_mode(PollMode::Always);
    let server = t.spawn(builder.on_request(echo_frame));
    let peers: Vec<_> = (0..PEERS).map(|_| dial(&server)).collect::<Check<_>>()?;
    rounds(&peers, 20, 100)?;
    let before = server.stats();
    rounds(&peers, ROUNDS, 100)?;
    let after = server.stats();
    let waits = after.pollers.wait_calls - before.pollers.wait_calls;
    let mut calls = after.pollers.system_calls() - before.pollers.system_calls();
    if !t.mount().receives_behind_pollers() {
        // It asks the kernel for what has come; everything else is the kernel thread's work.
        calls -= waits;
    }
    let requests = PEERS * ROUNDS;
    assert!(
        calls <= CALLS_MAX,
        "{calls} system calls for {requests} requests, from {before:?} to {after:?}"
    );
    // One thread of the test, which never waits for itself.
    assert_eq!(after.pollers.send_contentions, 0);
    Ok(())
}

/// For a thread that only sends.
pub(crate) fn sends_that_need_no_poller_make_no_system_calls(t: &Fixture) -> Check {
    const SENDS: usize = 2000;
    const CALLS_MAX: u64 = 20;
    let builder = Pollers::builder().backend(Backend::Sqpoll(awake(t))).count(1);
    let group = builder.poll_mode(PollMode::Always).build()?;
    let (one, peer) = tcp_pair()?;
    let mut conn =
        blocking::Connection::new(Dialer::new().pollers(group.clone()).adopt(one.into())?);
    let mut send = |count: usize| -> Check<PollerStats> {
        for _ in 0..count {
            conn.write_copy(b"12345678")?;
            conn.flush()?;
        }
        assert_eq!(read_exactly(&peer, 8 * count)?, b"12345678".repeat(count));
        Ok(group.stats())
    };
    let (before, after) = (send(100)?, send(SENDS)?);
    let mut calls = after.system_calls() - before.system_calls();
    if !t.mount().receives_behind_pollers() {
        calls -= after.wait_calls - before.wait_calls;
    }
    assert!(calls <= CALLS_MAX, "{calls} system calls for {SENDS} sends: {after:?}");
    drop(conn);
    end_empty(&group)
}
