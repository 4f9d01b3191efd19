//! Where handlers run when the library chooses: they move, and nothing is lost or reordered.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use ringpoll::{Connection, PollMode, ServerHandle};

use crate::harness::*;

macro_rules! cases {
    ($tests:ident, $mount:ident) => {
        $tests! { $mount, placement:
            handlers_move_when_their_cost_changes_and_nothing_is_lost
            only_the_library_s_own_choice_is_explained
            a_handler_is_called_where_it_runs
            threads_that_never_sleep_wake_nobody
            workers_do_what_a_poller_that_is_held_up_has_not_come_to
            workers_serve_while_a_close_callback_blocks_their_poller
            what_was_flushed_before_a_poller_is_held_up_leaves_without_it
            tasks_that_wake_while_their_poller_is_held_up_go_on_elsewhere
            a_long_round_is_taken_over_as_a_whole
            what_cannot_move_is_left_to_its_poller
            what_ends_with_its_output_ends_although_its_poller_is_held_up
        }
    };
}
pub(crate) use cases;

fn is_inline(server: &ServerHandle) -> bool {
    server.stats().auto.expect("the library chooses").is_inline
}

/// Counts up on one connection until told to stop; how far it came.
fn count_up(server: &ServerHandle, stop: &AtomicBool) -> Check<u64> {
    let mut peer = dial(server)?;
    let mut count = 0_u64;
    // One number in flight: handlers that are cheap even in a debug build keep no poller busy.
    while !stop.load(Ordering::Relaxed) {
        peer.write_all(&count.to_be_bytes())?;
        let mut number = [0; 8];
        peer.read_exact(&mut number)?;
        assert_eq!(u64::from_be_bytes(number), count, "lost or out of order");
        count += 1;
    }
    Ok(count)
}

struct StopsAtEnd<'a>(&'a AtomicBool);

impl Drop for StopsAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Cheap handlers on the poller, costly ones on workers, and back.
pub(crate) fn handlers_move_when_their_cost_changes_and_nothing_is_lost(t: &Fixture) -> Check {
    let cost_us = Arc::new(AtomicU64::new(0));
    let burns = Arc::clone(&cost_us);
    let server = t.spawn(t.server().on_request(move |mut conn| {
        let burn = Duration::from_micros(burns.load(Ordering::Relaxed));
        async move {
            while conn.len() >= 8 {
                let number = conn.next(8).await?;
                let begun = Instant::now();
                while begun.elapsed() < burn {
                    std::hint::spin_loop();
                }
                conn.write(number)?;
            }
            conn.flush().await?;
            // A number may have come in part.
            if !conn.is_empty() { conn.peek(8).await.map(drop) } else { Ok(()) }
        }
    }));
    let stop = AtomicBool::new(false);
    let counted = thread::scope(|scope| {
        let clients: Vec<_> = (0..2).map(|_| scope.spawn(|| count_up(&server, &stop))).collect();
        // A case that fails must not wait for its clients for ever.
        let _stops = StopsAtEnd(&stop);
        for round in 0..3 {
            cost_us.store(500, Ordering::Relaxed);
            let what = format!("costly handlers leave the poller, round {round}");
            eventually(&what, || !is_inline(&server));
            cost_us.store(0, Ordering::Relaxed);
            let what = format!("cheap handlers come back, round {round}");
            eventually(&what, || is_inline(&server));
        }
        stop.store(true, Ordering::Relaxed);
        let counted = clients.into_iter().map(|client| client.join().expect("does not panic"));
        counted.sum::<Check<u64>>()
    })?;
    let stats = server.stats();
    assert!(counted > 0 && stats.handler_errors == 0, "{counted}, {stats:?}");
    assert!(stats.auto.expect("the library chooses").flips >= 6);
    Ok(())
}

pub(crate) fn only_the_library_s_own_choice_is_explained(t: &Fixture) -> Check {
    let has_one_cpu = thread::available_parallelism()?.get() == 1;
    for placement in [Placement::Inline, Placement::Pool { workers: 1 }] {
        let server = t.spawn(t.server().placement(placement).on_request(echo));
        let chooses = has_one_cpu && placement != Placement::Inline;
        assert_eq!(server.stats().auto.is_some(), chooses);
        assert_eq!(server.stats().placement, placement);
    }
    let server = t.echo_server();
    let auto = server.stats().auto.expect("the library chooses");
    assert!(auto.is_inline && auto.wake_ns > 0 && auto.flips == 0, "{auto:?}");
    assert_eq!(server.stats().placement, Placement::Auto);
    Ok(())
}

/// Not only its future: a handler may compute before it returns one.
pub(crate) fn a_handler_is_called_where_it_runs(t: &Fixture) -> Check {
    let name = || thread::current().name().unwrap_or_default().to_owned();
    for (placement, threads) in
        [(Placement::Inline, "ringpoll-p"), (Placement::Pool { workers: 1 }, "ringpoll-w")]
    {
        let server = t.spawn(t.server().placement(placement).on_request(move |mut conn| {
            let called_on = name();
            async move {
                conn.next(1).await?;
                conn.write_copy(format!("{called_on} {}", name()).as_bytes())?;
                conn.flush().await
            }
        }));
        let mut peer = dial(&server)?;
        peer.write_all(b"?")?;
        let mut told = [0; 2 * "ringpoll-p0".len() + 1];
        peer.read_exact(&mut told)?;
        let told = str::from_utf8(&told)?;
        assert!(told.split(' ').all(|on| on.starts_with(threads)), "{placement}: {told}");
        assert!(told.split(' ').is_sorted_by(|one, other| one == other), "{placement}: {told}");
    }
    Ok(())
}

/// A request goes from a poller to a worker and back without the system calls of a wake-up.
pub(crate) fn threads_that_never_sleep_wake_nobody(t: &Fixture) -> Check {
    let pool = Placement::Pool { workers: 1 };
    let builder = t.server().pollers(1).placement(pool).poll_mode(PollMode::Always);
    let server = t.spawn(builder.on_request(echo));
    let mut peer = dial(&server)?;
    let mut ask = |count| -> Check {
        for _ in 0..count {
            peer.write_all(b"ping")?;
            let mut told = [0; 4];
            peer.read_exact(&mut told)?;
            assert_eq!(told, *b"ping");
        }
        Ok(())
    };
    ask(1)?;
    let wakes_before = server.stats().pollers.wake_calls;
    ask(100)?;
    let stats = server.stats();
    assert_eq!(stats.pollers.wake_calls, wakes_before, "{stats:?}");
    assert!(stats.auto.is_none(), "handlers stay on the workers");
    Ok(())
}

/// Where threads stand until they are let go on.
struct Stop {
    arrived: Mutex<Sender<()>>,
    leave: Mutex<Receiver<()>>,
}

/// The other side of a [`Stop`].
struct StopKeeper {
    arrived: Receiver<()>,
    leave: Sender<()>,
}

impl Stop {
    fn new() -> (Arc<Stop>, StopKeeper) {
        let ((arrive, arrived), (leave, left)) = (channel(), channel());
        let stop = Stop { arrived: Mutex::new(arrive), leave: Mutex::new(left) };
        (Arc::new(stop), StopKeeper { arrived, leave })
    }

    /// Blocks this thread; not for ever, where the test has failed meanwhile.
    fn stand(&self) {
        let arrive = self.arrived.lock().expect("nobody panics here").send(());
        let leave = self.leave.lock().expect("nobody panics here");
        let _ = arrive.map(|()| leave.recv_timeout(2 * DEADLINE));
    }
}

/// Why nothing is sure to be ready together.
fn no_rounds(t: &Fixture) -> Option<&'static str> {
    let alone = t.mount().receives_behind_pollers();
    alone.then_some("a kernel thread receives and sends, in its own time")
}

/// A server with one poller, whose peers have all sent a request when it comes to look; and its
/// `nth` handler from then on, counted from 0, stands at the stop that is returned.
fn crowd(t: &Fixture, nth: i64) -> Check<(ServerHandle, StopKeeper, Vec<TcpStream>)> {
    const NEVER: i64 = i64::MAX;
    let ((before, keeper_before), (stop, keeper)) = (Stop::new(), Stop::new());
    let stops_newcomers = Arc::new(AtomicBool::new(false));
    let until = Arc::new(AtomicI64::new(NEVER));
    let (stops, counts) = (Arc::clone(&stops_newcomers), Arc::clone(&until));
    let builder = t.server().pollers(1).on_prepare(move |_| {
        if stops.load(Ordering::SeqCst) {
            before.stand();
        }
        Ok(())
    });
    let server = t.spawn(builder.on_request(move |mut conn| {
        let (stop, counts) = (Arc::clone(&stop), Arc::clone(&counts));
        async move {
            let number = conn.next(8).await?;
            if counts.load(Ordering::SeqCst) != NEVER && counts.fetch_sub(1, Ordering::SeqCst) == 0
            {
                stop.stand();
            }
            conn.write(number)?;
            conn.flush().await
        }
    }));
    let mut peers = (0..16).map(|_| dial(&server)).collect::<Check<Vec<_>>>()?;
    for peer in &mut peers {
        peer.write_all(&[1; 8])?;
        peer.read_exact(&mut [0; 8])?;
    }
    assert!(is_inline(&server), "cheap handlers run on the poller");
    stops_newcomers.store(true, Ordering::SeqCst);
    let newcomer = dial(&server)?;
    keeper_before.arrived.recv_timeout(DEADLINE)?;
    stops_newcomers.store(false, Ordering::SeqCst);
    until.store(nth, Ordering::SeqCst);
    for peer in &mut peers {
        peer.write_all(&[2; 8])?;
        peer.set_nonblocking(true)?;
    }
    keeper_before.leave.send(())?;
    keeper.arrived.recv_timeout(DEADLINE)?;
    drop(newcomer);
    Ok((server, keeper, peers))
}

/// Waits until all but one have their reply; that one's stands at the stop.
fn all_but_one_are_served(keeper: &StopKeeper, mut peers: Vec<TcpStream>) -> Check {
    eventually("everybody else is served", || {
        peers.retain_mut(|peer| peer.read_exact(&mut [0; 8]).is_err());
        peers.len() == 1
    });
    keeper.leave.send(())?;
    peers[0].set_nonblocking(false)?;
    Ok(peers[0].read_exact(&mut [0; 8])?)
}

pub(crate) fn workers_do_what_a_poller_that_is_held_up_has_not_come_to(t: &Fixture) -> Check {
    if let Some(reason) = no_rounds(t) {
        return skip("workers_do_what_a_poller_that_is_held_up_has_not_come_to", reason);
    }
    let (server, keeper, peers) = crowd(t, 0)?;
    let others = peers.len() as u64 - 1;
    all_but_one_are_served(&keeper, peers)?;
    assert_eq!(server.stats().pollers.moved_runs, others);
    Ok(())
}

/// One pass brings the end of a connection, whose callback does not return, and requests.
pub(crate) fn workers_serve_while_a_close_callback_blocks_their_poller(t: &Fixture) -> Check {
    if let Some(reason) = no_rounds(t) {
        return skip("workers_serve_while_a_close_callback_blocks_their_poller", reason);
    }
    let ((before, keeper_before), (stop, keeper)) = (Stop::new(), Stop::new());
    let stops_newcomers = Arc::new(AtomicBool::new(false));
    let stops = Arc::clone(&stops_newcomers);
    let (prepared, handles) = channel();
    let builder = t.server().pollers(1).on_prepare(move |handle| {
        // Fails for connections after the end of the test.
        let _ = prepared.send(handle.clone());
        if stops.load(Ordering::SeqCst) {
            before.stand();
        }
        Ok(())
    });
    let server = t.spawn(builder.on_request(echo));
    let closed = dial(&server)?;
    assert_eq!(exchange(&closed, b"?")?, b"?");
    let handle = handles.recv_timeout(DEADLINE)?;
    let mut peers = (0..8).map(|_| dial(&server)).collect::<Check<Vec<_>>>()?;
    for peer in &peers {
        assert_eq!(exchange(peer, b"?")?, b"?");
    }
    stops_newcomers.store(true, Ordering::SeqCst);
    let _newcomer = dial(&server)?;
    keeper_before.arrived.recv_timeout(DEADLINE)?;
    stops_newcomers.store(false, Ordering::SeqCst);
    handle.on_close(move |_| stop.stand());
    handle.close();
    for peer in &mut peers {
        peer.write_all(b"?")?;
    }
    keeper_before.leave.send(())?;
    keeper.arrived.recv_timeout(DEADLINE)?;
    for peer in &mut peers {
        peer.read_exact(&mut [0; 1])?;
    }
    Ok(keeper.leave.send(())?)
}

pub(crate) fn what_was_flushed_before_a_poller_is_held_up_leaves_without_it(t: &Fixture) -> Check {
    if let Some(reason) = no_rounds(t) {
        return skip("what_was_flushed_before_a_poller_is_held_up_leaves_without_it", reason);
    }
    let (server, keeper, peers) = crowd(t, 15)?;
    all_but_one_are_served(&keeper, peers)?;
    assert_eq!(server.stats().pollers.moved_runs, 0);
    Ok(())
}

pub(crate) fn tasks_that_wake_while_their_poller_is_held_up_go_on_elsewhere(t: &Fixture) -> Check {
    let (stop, keeper) = Stop::new();
    let permits = Arc::new(tokio::sync::Semaphore::new(0));
    let (waits, waiting) = (Arc::clone(&permits), Arc::new(AtomicU64::new(0)));
    let counts = Arc::clone(&waiting);
    let server = t.spawn(t.server().pollers(1).on_request(move |mut conn| {
        let (stop, permits, counts) = (Arc::clone(&stop), Arc::clone(&waits), Arc::clone(&counts));
        async move {
            let what = conn.next(1).await?;
            if what[0] == b'w' {
                counts.fetch_add(1, Ordering::SeqCst);
                permits.acquire().await.expect("never closed").forget();
            } else {
                stop.stand();
            }
            conn.write(what)?;
            conn.flush().await
        }
    }));
    let mut waiters = (0..4).map(|_| dial(&server)).collect::<Check<Vec<_>>>()?;
    for waiter in &mut waiters {
        waiter.write_all(b"w")?;
    }
    eventually("all wait", || waiting.load(Ordering::SeqCst) == 4);
    let mut blocker = dial(&server)?;
    blocker.write_all(b"b")?;
    keeper.arrived.recv_timeout(DEADLINE)?;
    permits.add_permits(4);
    for waiter in &mut waiters {
        waiter.read_exact(&mut [0])?;
    }
    keeper.leave.send(())?;
    blocker.read_exact(&mut [0])?;
    assert!(server.stats().pollers.moved_runs > 0);
    Ok(())
}

/// Handlers that wait for one another: for `w` until one is sent `s`, which wakes all of them in
/// the order in which they came. The first one stands at the stop then.
struct Sleepers {
    stop: Arc<Stop>,
    permits: tokio::sync::Semaphore,
    count: AtomicU64,
    is_first: AtomicBool,
}

impl Sleepers {
    fn new() -> (Arc<Sleepers>, StopKeeper) {
        let (stop, keeper) = Stop::new();
        let permits = tokio::sync::Semaphore::new(0);
        let (count, is_first) = (AtomicU64::new(0), AtomicBool::new(true));
        (Arc::new(Sleepers { stop, permits, count, is_first }), keeper)
    }

    async fn answer(self: Arc<Self>, mut conn: Connection) -> ringpoll::Result<()> {
        if conn.next(1).await?[0] == b'w' {
            self.count.fetch_add(1, Ordering::SeqCst);
            self.permits.acquire().await.expect("never closed").forget();
            if self.is_first.swap(false, Ordering::SeqCst) {
                self.stop.stand();
            }
        } else {
            // On the poller, which comes to those that it wakes when it is through with this.
            self.permits.add_permits(self.count.load(Ordering::SeqCst) as usize);
        }
        conn.write_copy(&[7; 8])?;
        conn.flush().await
    }

    /// One more that waits.
    fn lull(&self, server: &ServerHandle) -> Check<TcpStream> {
        let before = self.count.load(Ordering::SeqCst);
        let mut peer = dial(server)?;
        peer.write_all(b"w")?;
        eventually("it waits", || self.count.load(Ordering::SeqCst) > before);
        Ok(peer)
    }

    /// Wakes them; the first one has come to the stop.
    fn wake(server: &ServerHandle, keeper: &StopKeeper) -> Check<TcpStream> {
        let mut starter = dial(server)?;
        starter.write_all(b"s")?;
        keeper.arrived.recv_timeout(DEADLINE)?;
        Ok(starter)
    }
}

/// More than a poller queues at once.
pub(crate) fn a_long_round_is_taken_over_as_a_whole(t: &Fixture) -> Check {
    let (sleepers, keeper) = Sleepers::new();
    let all = Arc::clone(&sleepers);
    let builder = t.server().pollers(1);
    let server = t.spawn(builder.on_request(move |conn| Arc::clone(&all).answer(conn)));
    let peers = (0..100).map(|_| sleepers.lull(&server)).collect::<Check<Vec<_>>>()?;
    let mut starter = Sleepers::wake(&server, &keeper)?;
    for peer in &peers {
        peer.set_nonblocking(true)?;
    }
    all_but_one_are_served(&keeper, peers)?;
    Ok(starter.read_exact(&mut [0; 8])?)
}

/// Handlers of another server, which run on the pollers they share with this one and nowhere else.
pub(crate) fn what_cannot_move_is_left_to_its_poller(t: &Fixture) -> Check {
    let (sleepers, keeper) = Sleepers::new();
    let (ours, theirs) = (Arc::clone(&sleepers), Arc::clone(&sleepers));
    let builder = t.server().pollers(1);
    let moves = t.spawn(builder.on_request(move |conn| Arc::clone(&ours).answer(conn)));
    let builder = t.server().placement(Placement::Inline).use_pollers(moves.pollers());
    let stays = t.spawn(builder.on_request(move |conn| Arc::clone(&theirs).answer(conn)));
    let mut first = sleepers.lull(&moves)?;
    let mut others = [sleepers.lull(&stays)?, sleepers.lull(&moves)?, sleepers.lull(&stays)?];
    let mut starter = Sleepers::wake(&moves, &keeper)?;
    // Workers have taken over what was behind the first one.
    others[1].read_exact(&mut [0; 8])?;
    for waits in [&others[0], &others[2]] {
        waits.set_nonblocking(true)?;
        let mut waits = waits;
        assert!(waits.read(&mut [0; 8]).is_err(), "its poller stands");
        waits.set_nonblocking(false)?;
    }
    keeper.leave.send(())?;
    first.read_exact(&mut [0; 8])?;
    others[0].read_exact(&mut [0; 8])?;
    others[2].read_exact(&mut [0; 8])?;
    Ok(starter.read_exact(&mut [0; 8])?)
}

/// Connections that close once their output is sent, which others do for a poller that is held up.
pub(crate) fn what_ends_with_its_output_ends_although_its_poller_is_held_up(t: &Fixture) -> Check {
    if let Some(reason) = no_rounds(t) {
        return skip("what_ends_with_its_output_ends_although_its_poller_is_held_up", reason);
    }
    const PEERS: i64 = 16;
    let ((before, keeper_before), (stop, keeper)) = (Stop::new(), Stop::new());
    let is_first = AtomicBool::new(true);
    let left = Arc::new(AtomicI64::new(PEERS));
    let builder = t.server().pollers(1).on_prepare(move |_| {
        if is_first.swap(false, Ordering::SeqCst) {
            before.stand();
        }
        Ok(())
    });
    // No handler for requests: a connection ends with this one.
    let server = t.spawn(builder.on_connect(move |mut conn| {
        let (stop, left) = (Arc::clone(&stop), Arc::clone(&left));
        async move {
            // The first one has let the others come.
            if left.fetch_sub(1, Ordering::SeqCst) == 0 {
                stop.stand();
            }
            conn.write_copy(b"bye")?;
            conn.submit()
        }
    }));
    let newcomer = dial(&server)?;
    keeper_before.arrived.recv_timeout(DEADLINE)?;
    let mut peers = (0..PEERS).map(|_| dial(&server)).collect::<Check<Vec<_>>>()?;
    keeper_before.leave.send(())?;
    keeper.arrived.recv_timeout(DEADLINE)?;
    for peer in &mut peers {
        peer.set_nonblocking(true)?;
    }
    eventually("everybody else gets all, and the end", || {
        peers.retain_mut(|peer| {
            let mut answer = [0; 4];
            match peer.read(&mut answer) {
                Ok(0) => return false,
                Ok(bytes) => assert_eq!(&answer[..bytes], b"bye"),
                Err(_) => {}
            }
            true
        });
        peers.len() == 1
    });
    keeper.leave.send(())?;
    peers[0].set_nonblocking(false)?;
    peers[0].read_exact(&mut [0; 3])?;
    drop(newcomer);
    Ok(())
}
