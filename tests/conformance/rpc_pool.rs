//! `rpc::Pool`: callers get usable connections in order, within the bounds, and nothing stays.

use std::future::Future;
use std::io::Write;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use ringpoll::rpc::{Pool, PoolBuilder, Pooled};
use ringpoll::{Connection, Dialer, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::harness::*;

macro_rules! cases {
    ($tests:ident, $mount:ident) => {
        $tests! { $mount, rpc_pool:
            the_connection_that_was_given_back_last_is_used_first
            callers_wait_in_order_while_all_connections_are_open
            a_caller_that_leaves_passes_its_turn_on
            a_checkout_ends_at_its_deadline
            a_limit_of_zero_takes_only_an_idle_connection
            a_failed_dial_fails_only_its_own_caller
            a_hook_that_panics_frees_its_place
            only_a_clean_connection_is_used_again
            what_a_caller_has_set_is_reset
            a_taken_connection_is_not_counted
            idle_connections_of_a_server_that_restarts_are_replaced_unnoticed
            a_connection_with_a_late_answer_is_not_used_again
            idle_connections_expire_without_a_caller
            old_connections_are_closed
            the_warm_minimum_returns_after_kills_and_ends_with_forget
            warm_dials_that_fail_are_counted_and_end_with_the_pool
            the_warm_minimum_outlives_a_server_that_used_the_pool
            closing_fails_callers_and_closes_what_comes_back
            a_shutdown_waits_for_what_is_checked_out
            dropping_the_last_clone_closes_the_pool
            random_callers_keep_within_the_bounds
        }
    };
}
pub(crate) use cases;

/// A pool whose idle connections stay, and a listener for its other ends.
fn pooled(t: &Fixture, set: impl Fn(PoolBuilder) -> PoolBuilder) -> Check<(Pool, Listening)> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let address = listener.local_addr()?.to_string();
    Ok((builder(t, set).build(), Listening { listener, address }))
}

fn builder(t: &Fixture, set: impl Fn(PoolBuilder) -> PoolBuilder) -> PoolBuilder {
    let builder = Pool::builder().dialer(t.dialer());
    set(builder.idle_lifetime(Duration::ZERO).checkout_timeout(DEADLINE))
}

struct Listening {
    listener: TcpListener,
    address: String,
}

impl Listening {
    /// The other end of the next connection that was dialled.
    fn accept(&self) -> Check<TcpStream> {
        let (stream, _) = self.listener.accept()?;
        bound(&stream)?;
        Ok(stream)
    }
}

/// Polls once, with a waker that does nothing.
fn poll_now<F: Future>(future: Pin<&mut F>) -> Option<F::Output> {
    match future.poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(output) => Some(output),
        Poll::Pending => None,
    }
}

fn checkout(pool: &Pool, address: &str) -> Check<Pooled> {
    block_on(async { Ok(pool.checkout(address).await?) })
}

/// Sends `bytes` and gets them back.
async fn call(conn: &mut Connection, bytes: &[u8]) -> Result<()> {
    conn.write_copy(bytes)?;
    conn.flush().await?;
    assert_eq!(conn.next(bytes.len()).await?[..], *bytes);
    Ok(())
}

#[track_caller]
fn nothing_stays(t: &Fixture, pool: &Pool) {
    eventually("no address is known", || pool.stats().addresses == 0);
    pool.close();
    eventually("no timer is set", || t.timers() == 0);
}

pub(crate) fn the_connection_that_was_given_back_last_is_used_first(t: &Fixture) -> Check {
    let (pool, server) = pooled(t, |pool| pool)?;
    let ids = |conns: &[Pooled]| conns.iter().map(|conn| conn.id()).collect::<Vec<_>>();
    let mut conns = Vec::new();
    for _ in 0..3 {
        conns.push(checkout(&pool, &server.address)?);
    }
    assert!(conns.iter().all(|conn| !conn.is_reused()));
    let mut wanted = ids(&conns);
    wanted.reverse();
    conns.into_iter().for_each(Pooled::give_back);
    assert_eq!((pool.stats().idle, pool.stats().checked_out), (3, 0));
    let mut again = Vec::new();
    for _ in 0..3 {
        again.push(checkout(&pool, &server.address)?);
    }
    assert_eq!(ids(&again), wanted);
    assert!(again.iter().all(Pooled::is_reused));
    let stats = pool.stats();
    assert_eq!((stats.dials, stats.reused, stats.checked_out), (3, 3, 3));
    Ok(())
}

pub(crate) fn callers_wait_in_order_while_all_connections_are_open(t: &Fixture) -> Check {
    let (pool, server) = pooled(t, |pool| pool.connections_max(1))?;
    let mut held = checkout(&pool, &server.address)?;
    let order = Arc::<Mutex<Vec<usize>>>::default();
    let mut callers = Vec::new();
    for number in 0..6 {
        let (waits, address, order) = (pool.clone(), server.address.clone(), Arc::clone(&order));
        callers.push(on_task(async move {
            let conn = waits.checkout(&address).await?;
            order.lock().expect("no test panics here").push(number);
            match number % 2 {
                0 => conn.give_back(),
                _ => drop(conn), // the next caller dials
            }
            Ok(())
        }));
        eventually("it waits", || pool.stats().waiting == number + 1);
    }
    held.write_copy(b"x")?;
    assert_eq!(pool.stats().dials, 1);
    drop(held);
    callers.iter().for_each(Outcome::wait);
    assert_eq!(*order.lock().expect("no test panics here"), [0, 1, 2, 3, 4, 5]);
    assert_eq!((pool.stats().dials, pool.stats().reused), (4, 3));
    Ok(())
}

pub(crate) fn a_caller_that_leaves_passes_its_turn_on(t: &Fixture) -> Check {
    let (pool, server) = pooled(t, |pool| pool.connections_max(1))?;
    let held = checkout(&pool, &server.address)?;
    drop(pool.checkout(&server.address)); // never polled
    let mut waits = Box::pin(pool.checkout(&server.address));
    let mut granted = Box::pin(pool.checkout(&server.address));
    let mut last = Box::pin(pool.checkout(&server.address));
    for caller in [&mut waits, &mut granted, &mut last] {
        assert!(poll_now(caller.as_mut()).is_none());
    }
    assert_eq!(pool.stats().waiting, 3);
    drop(waits);
    held.give_back();
    assert!(poll_now(last.as_mut()).is_none(), "out of turn");
    assert!(poll_now(pin!(pool.checkout(&server.address))).is_none(), "out of turn");
    // The connection was for this caller.
    drop(granted);
    let conn = poll_now(last.as_mut()).expect("its turn")?;
    assert!(conn.is_reused());
    drop((conn, last));
    // A dial that is dropped frees its place.
    let deaf = DeafListener::new()?;
    let address = deaf.addr.to_string();
    let mut dials = Box::pin(pool.checkout(&address));
    assert!(poll_now(dials.as_mut()).is_none());
    let mut next = Box::pin(pool.checkout(&address));
    assert!(poll_now(next.as_mut()).is_none());
    assert_eq!((pool.stats().dialing, pool.stats().waiting), (1, 1));
    drop(dials);
    assert!(poll_now(next.as_mut()).is_none());
    assert_eq!((pool.stats().dialing, pool.stats().waiting), (1, 0));
    drop(next);
    nothing_stays(t, &pool);
    Ok(())
}

pub(crate) fn a_checkout_ends_at_its_deadline(t: &Fixture) -> Check {
    let (pool, server) = pooled(t, |pool| pool.connections_max(1))?;
    let held = checkout(&pool, &server.address)?;
    let deaf = DeafListener::new()?;
    let limit = Duration::from_millis(50);
    for address in [server.address.clone(), deaf.addr.to_string()] {
        let began = Instant::now();
        let waited = block_on(async { Ok(pool.checkout_within(&address, limit).await) })?;
        let error = waited.expect_err("there is no connection");
        assert!(began.elapsed() >= limit, "early, after {:?}", began.elapsed());
        assert!(error.is_checkout_timeout() && error.is_timeout(), "{error:?}");
        assert!(!error.is_dial_timeout() && error.to_string().contains(&address), "{error:?}");
    }
    let stats = pool.stats();
    assert_eq!((stats.timeouts, stats.dial_failures, stats.waiting), (2, 1, 0));
    drop(held);
    nothing_stays(t, &pool);
    Ok(())
}

pub(crate) fn a_limit_of_zero_takes_only_an_idle_connection(t: &Fixture) -> Check {
    let (pool, server) = pooled(t, |pool| pool)?;
    let take = || {
        let taken = poll_now(pin!(pool.checkout_within(&server.address, Duration::ZERO)));
        taken.expect("does not wait")
    };
    assert!(take().expect_err("nothing is idle").is_checkout_timeout());
    checkout(&pool, &server.address)?.give_back();
    let conn = take()?;
    assert!(take().expect_err("nothing is idle").is_checkout_timeout());
    drop(conn);
    Ok(())
}

pub(crate) fn a_failed_dial_fails_only_its_own_caller(t: &Fixture) -> Check {
    let dials = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&dials);
    // The second dial fails.
    let dialer = t.dialer().before_connect(move |_| match counted.fetch_add(1, Ordering::SeqCst) {
        1 => Err(std::io::ErrorKind::PermissionDenied.into()),
        _ => Ok(()),
    });
    let (pool, server) = pooled(t, |pool| pool.dialer(dialer.clone()).connections_max(1))?;
    let held = checkout(&pool, &server.address)?;
    let mut callers = Vec::new();
    for _ in 0..3 {
        let (pool, address) = (pool.clone(), server.address.clone());
        callers.push(on_task(async move { Ok(pool.checkout(&address).await.map(drop)) }));
    }
    eventually("all wait", || pool.stats().waiting == 3);
    drop(held);
    let failed = callers.iter().filter(|caller| caller.wait().is_err()).count();
    assert_eq!((failed, pool.stats().dial_failures, pool.stats().dials), (1, 1, 4));
    Ok(())
}

pub(crate) fn a_hook_that_panics_frees_its_place(t: &Fixture) -> Check {
    let dials = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&dials);
    let dialer = t.dialer().before_connect(move |_| {
        assert!(counted.fetch_add(1, Ordering::SeqCst) > 0, "a hook {ON_PURPOSE}");
        Ok(())
    });
    let (pool, server) = pooled(t, |pool| pool.dialer(dialer.clone()).connections_max(1))?;
    let (first, address) = (pool.clone(), server.address.clone());
    let panicked = runtime().spawn(async move { first.checkout(&address).await.map(drop) });
    let panicked = block_on(async { Ok(panicked.await) })?;
    assert!(panicked.is_err_and(|error| error.is_panic()));
    assert_eq!(pool.stats().addresses, 0);
    checkout(&pool, &server.address)?.give_back();
    Ok(())
}

pub(crate) fn only_a_clean_connection_is_used_again(t: &Fixture) -> Check {
    let (pool, server) = pooled(t, |pool| pool)?;
    let spoil = |spoil: &mut dyn FnMut(&mut Pooled, &mut TcpStream) -> Check| -> Check<TcpStream> {
        let mut conn = checkout(&pool, &server.address)?;
        let mut peer = server.accept()?;
        assert!(!conn.is_reused(), "an unclean connection was used again");
        spoil(&mut conn, &mut peer)?;
        conn.give_back();
        assert_eq!((pool.stats().idle, pool.stats().addresses), (0, 0));
        Ok(peer)
    };
    assert_eof(spoil(&mut |conn, _| Ok(conn.write_copy(b"not submitted")?))?);
    assert_ended(spoil(&mut |conn, peer| {
        peer.write_all(b"unread")?;
        eventually("the bytes are here", || conn.len() == 6);
        Ok(())
    })?);
    assert_ended(spoil(&mut |conn, peer| {
        peer.write_all(b"unread")?;
        // In the reader, not in the inbox.
        block_on(async {
            conn.peek(6).await?;
            Ok(())
        })
    })?);
    assert_eof(spoil(&mut |conn, _| block_on(async { Ok(conn.shutdown_write().await?) }))?);
    assert_eof(spoil(&mut |conn, _| {
        conn.close();
        Ok(())
    })?);
    assert_ended(spoil(&mut |conn, peer| {
        peer.shutdown(std::net::Shutdown::Write)?;
        eventually("the end is here", || !conn.is_active());
        Ok(())
    })?);
    let peer = spoil(&mut |conn, _| {
        conn.write(pattern(0, 32 << 20))?;
        Ok(conn.submit()?) // more than the kernel takes
    })?;
    let error = read_all(peer).expect_err("a part looks like the whole");
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    // Another connection in its place.
    let (foreign, _peer) = t.client()?;
    let mut foreign = Some(foreign);
    let own = spoil(&mut |conn, _| {
        drop(std::mem::replace(&mut **conn, foreign.take().expect("once")));
        Ok(())
    })?;
    assert_eof(own);
    // Dropped without being given back.
    drop(checkout(&pool, &server.address)?);
    assert_eof(server.accept()?);
    let stats = pool.stats();
    assert_eq!((stats.reused, stats.checked_out, stats.dials), (0, 0, 9));
    Ok(())
}

pub(crate) fn what_a_caller_has_set_is_reset(t: &Fixture) -> Check {
    let dialer = t.dialer().read_timeout(DEADLINE);
    let (pool, server) = pooled(t, |pool| pool.dialer(dialer.clone()))?;
    let mut conn = checkout(&pool, &server.address)?;
    let mut peer = server.accept()?;
    conn.set_deadline(Some(Instant::now()));
    conn.set_idle_timeout(Some(Duration::from_millis(20)));
    conn.set_context(7u32);
    let mut cx = Context::from_waker(Waker::noop());
    assert!(conn.poll_readable(&mut cx).is_ready(), "the deadline has passed");
    conn.give_back();
    let mut conn = checkout(&pool, &server.address)?;
    assert!(conn.is_reused());
    assert_eq!(conn.context::<u32>().as_deref(), Some(&7));
    // The read would fail at once, or with the idle timeout.
    let reads = on_task(async move {
        assert_eq!(conn.next(4).await?[..], b"late"[..]);
        conn.give_back();
        Ok(())
    });
    let began = Instant::now();
    eventually("the idle timeout would be over", || began.elapsed().as_millis() > 60);
    reads.assert_pending();
    peer.write_all(b"late")?;
    reads.wait();
    Ok(())
}

pub(crate) fn a_taken_connection_is_not_counted(t: &Fixture) -> Check {
    let (pool, server) = pooled(t, |pool| pool.connections_max(1))?;
    let mut taken = checkout(&pool, &server.address)?.take();
    assert_eq!(pool.stats().addresses, 0);
    let other = checkout(&pool, &server.address)?;
    let mut peer = server.accept()?;
    drop(other);
    block_on(async { Ok(pool.shutdown(DEADLINE).await?) })?;
    peer.write_all(b"open")?;
    block_on(async {
        assert_eq!(taken.next(4).await?[..], b"open"[..]);
        Ok(())
    })
}

pub(crate) fn idle_connections_of_a_server_that_restarts_are_replaced_unnoticed(
    t: &Fixture,
) -> Check {
    const CALLS: usize = 8;
    let mut server = t.echo_server();
    let address = addr_of(&server).to_string();
    let pool = builder(t, |pool| pool.connections_max(CALLS)).build();
    let calls = || -> Check<Vec<ringpoll::Handle>> {
        let mut calls = Vec::new();
        for number in 0..CALLS {
            let (pool, address) = (pool.clone(), address.clone());
            calls.push(on_task(async move {
                let mut conn = pool.checkout(&address).await?;
                call(&mut conn, &pattern(number, 1000)).await?;
                Ok(conn)
            }));
        }
        // All are open at once before the first is given back.
        let conns: Vec<Pooled> = calls.iter().map(Outcome::wait).collect();
        let handles = conns.iter().map(|conn| conn.handle()).collect();
        conns.into_iter().for_each(Pooled::give_back);
        Ok(handles)
    };
    for restarts in 1..=3 {
        let handles = calls()?;
        assert_eq!(pool.stats().idle, CALLS);
        eventually("idle connections hold no memory", || t.clients().stats().blocks == 0);
        server.shutdown(DEADLINE)?;
        let know = || handles.iter().all(|handle| !handle.is_active());
        eventually("the ends are here", know);
        server = t.spawn_bound(t.server().on_request(echo).bind(&address)?);
        calls()?;
        assert_eq!(pool.stats().dead, (restarts * CALLS) as u64);
    }
    assert_eq!(pool.stats().dial_failures, 0);
    Ok(())
}

pub(crate) fn a_connection_with_a_late_answer_is_not_used_again(t: &Fixture) -> Check {
    let (pool, server) = pooled(t, |pool| pool.connections_max(1))?;
    let conn = checkout(&pool, &server.address)?;
    let mut peer = server.accept()?;
    let handle = conn.handle();
    conn.give_back();
    peer.write_all(b"late")?;
    // The keeper may find them first, and close the connection.
    let is_spoilt = || handle.stats().unread_bytes == 4 || handle.is_closed();
    eventually("the bytes are here", is_spoilt);
    let conn = checkout(&pool, &server.address)?;
    assert!(!conn.is_reused() && conn.is_empty());
    assert_ended(peer);
    assert_eq!((pool.stats().dead, pool.stats().dials), (1, 2));
    Ok(())
}

pub(crate) fn idle_connections_expire_without_a_caller(t: &Fixture) -> Check {
    let lifetime = Duration::from_millis(20);
    let (pool, server) = pooled(t, |pool| pool.idle_lifetime(lifetime).connections_max(200))?;
    let count = 150; // more than are closed in one look
    let mut conns = Vec::new();
    for _ in 0..count {
        conns.push((checkout(&pool, &server.address)?, server.accept()?));
    }
    let (kept, _peer) = conns.pop().expect("there are many");
    let (conns, peers): (Vec<Pooled>, Vec<TcpStream>) = conns.into_iter().unzip();
    conns.into_iter().for_each(Pooled::give_back);
    peers.iter().for_each(assert_eof);
    let stats = pool.stats();
    assert_eq!((stats.idle, stats.expired, stats.checked_out), (0, count - 1, 1));
    assert!(kept.is_active(), "it is in use");
    drop(kept);
    nothing_stays(t, &pool);
    Ok(())
}

pub(crate) fn old_connections_are_closed(t: &Fixture) -> Check {
    let lifetime = Duration::from_millis(50);
    let (pool, server) = pooled(t, |pool| pool.lifetime(lifetime))?;
    let began = Instant::now();
    let (idle, used) = (checkout(&pool, &server.address)?, checkout(&pool, &server.address)?);
    let peers = [server.accept()?, server.accept()?];
    idle.give_back();
    eventually("both are old", || began.elapsed() > 2 * lifetime);
    assert!(used.is_active());
    used.give_back();
    peers.iter().for_each(assert_eof);
    assert_eq!(pool.stats().expired, 2);
    nothing_stays(t, &pool);
    Ok(())
}

pub(crate) fn the_warm_minimum_returns_after_kills_and_ends_with_forget(t: &Fixture) -> Check {
    let (pool, server) = pooled(t, |pool| pool.idle_min(3).connections_max(5))?;
    pool.warm(&server.address);
    let are_idle = |dials| (pool.stats().idle, pool.stats().dials) == (3, dials);
    for round in 1..=3 {
        eventually("three are idle", || are_idle(3 * round));
        for _ in 0..3 {
            reset(server.accept()?)?;
        }
    }
    eventually("three are idle", || are_idle(12));
    // The three that are checked out are replaced, as far as there is room.
    let mut conns = Vec::new();
    for _ in 0..3 {
        conns.push(checkout(&pool, &server.address)?);
    }
    eventually("two are idle", || pool.stats().idle == 2);
    conns.into_iter().for_each(Pooled::give_back);
    assert_eq!((pool.stats().dead, pool.stats().idle), (9, 5));
    pool.forget(&server.address);
    for _ in 0..5 {
        assert_eof(server.accept()?);
    }
    nothing_stays(t, &pool);
    Ok(())
}

pub(crate) fn warm_dials_that_fail_are_counted_and_end_with_the_pool(t: &Fixture) -> Check {
    let vacant: SocketAddr = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?;
    let pool = builder(t, |pool| pool.idle_min(1)).build();
    pool.warm(&vacant.to_string());
    pool.warm("no address");
    eventually("dials fail", || pool.stats().dial_failures >= 3);
    eventually("an invalid address is given up", || pool.stats().addresses == 1);
    pool.close();
    nothing_stays(t, &pool);
    let dialer = t.dialer().before_connect(|_| panic!("a hook {ON_PURPOSE}"));
    let pool = builder(t, |pool| pool.dialer(dialer.clone()).idle_min(1)).build();
    pool.warm(&vacant.to_string());
    eventually("a panic counts", || pool.stats().dial_failures >= 2);
    pool.close();
    nothing_stays(t, &pool);
    Ok(())
}

pub(crate) fn the_warm_minimum_outlives_a_server_that_used_the_pool(t: &Fixture) -> Check {
    let upstream = Played::new()?;
    let pool = Pool::builder().idle_min(1).build();
    let (used, address) = (pool.clone(), upstream.addr.to_string());
    let server = t.spawn(t.server().on_connect(move |mut conn: Connection| {
        let (pool, address) = (used.clone(), address.clone());
        async move {
            conn.next(1).await?;
            pool.checkout(&address).await?.give_back();
            conn.write_copy(b"!")?;
            conn.flush().await
        }
    }));
    let client = dial(&server)?;
    assert_eq!(exchange(&client, b"?")?.len(), 1);
    let first = upstream.accept()?;
    server.shutdown(DEADLINE)?;
    drop(first);
    let second = upstream.accept()?;
    pool.close();
    assert_eof(&second.0);
    Ok(())
}

pub(crate) fn closing_fails_callers_and_closes_what_comes_back(t: &Fixture) -> Check {
    let (pool, server) = pooled(t, |pool| pool.connections_max(2))?;
    let (one, other) = (checkout(&pool, &server.address)?, checkout(&pool, &server.address)?);
    let peers = [server.accept()?, server.accept()?];
    let deaf = DeafListener::new()?;
    let call = |address: &str| {
        let (pool, address) = (pool.clone(), address.to_owned());
        on_task(async move { Ok(pool.checkout(&address).await.map(drop)) })
    };
    let (waits, dials) = (call(&server.address), call(&deaf.addr.to_string()));
    let busy = || (pool.stats().waiting, pool.stats().dialing) == (1, 1);
    eventually("one waits and one dials", busy);
    pool.close();
    for caller in [waits, dials, call(&server.address)] {
        let error = caller.wait().expect_err("the pool is closed");
        assert!(error.is_closed() && !error.is_timeout(), "{error:?}");
    }
    assert!(one.is_active() && other.is_active());
    one.give_back();
    assert_eof(&peers[0]);
    drop(other);
    assert_eof(&peers[1]);
    pool.close();
    nothing_stays(t, &pool);
    Ok(())
}

pub(crate) fn a_shutdown_waits_for_what_is_checked_out(t: &Fixture) -> Check {
    let (pool, server) = pooled(t, |pool| pool)?;
    let conns = [checkout(&pool, &server.address)?, checkout(&pool, &server.address)?];
    checkout(&pool, &server.address)?.give_back();
    let late = block_on(async { Ok(pool.shutdown(Duration::from_millis(20)).await) })?;
    let error = late.expect_err("two are checked out");
    assert!(error.is_timeout() && error.to_string().contains("2 connections"), "{error:?}");
    let waits = pool.clone();
    let shutdown = on_task(async move { Ok(waits.shutdown(DEADLINE).await?) });
    for conn in conns {
        shutdown.assert_pending();
        conn.give_back();
    }
    shutdown.wait();
    for _ in 0..3 {
        assert_eof(server.accept()?);
    }
    nothing_stays(t, &pool);
    Ok(())
}

pub(crate) fn dropping_the_last_clone_closes_the_pool(t: &Fixture) -> Check {
    let (pool, server) = pooled(t, |pool| pool)?;
    let conn = checkout(&pool, &server.address)?;
    checkout(&pool, &server.address)?.give_back();
    let peers = [server.accept()?, server.accept()?];
    drop(pool.clone());
    assert_eq!(pool.stats().checked_out, 1);
    drop(pool);
    assert_eof(&peers[1]);
    conn.give_back();
    assert_eof(&peers[0]);
    eventually("no timer is set", || t.timers() == 0);
    Ok(())
}

/// The sockets that a dialer has made, to count those that are open.
#[derive(Default)]
struct Sockets {
    all: Mutex<Vec<OwnedFd>>,
    most: AtomicUsize,
}

impl Sockets {
    /// A dialer that counts the open sockets before each connect.
    fn counting(self: &Arc<Self>, dialer: Dialer) -> Dialer {
        let sockets = Arc::clone(self);
        dialer.before_connect(move |fd| {
            let mut all = sockets.all.lock().expect("no test panics here");
            let open = all.iter().filter(|fd| is_open(fd)).count();
            sockets.most.fetch_max(open + 1, Ordering::SeqCst);
            all.push(fd.try_clone_to_owned()?);
            Ok(())
        })
    }
}

/// Whether the socket connects or is connected, and this side has not ended it: the kernel reports
/// POLLHUP of a socket that is shut down in both directions, and of one that is not connected.
fn is_open(fd: &OwnedFd) -> bool {
    let mut polled = [PollFd::new(fd, PollFlags::IN)];
    let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut polled, Some(&zero)).is_ok() && !polled[0].revents().contains(PollFlags::HUP)
}

const CALLERS: usize = 24;
const CALLS: usize = 60;
const OPEN_MAX: usize = 5;

/// A request is a number and what the server does with it.
async fn misbehave(mut conn: Connection) -> Result<()> {
    let request = conn.next(9).await?;
    match request[8] {
        0 => conn.close(),
        1 => {
            let soon = Instant::now() + Duration::from_millis(2);
            conn.handle().sleep_until(soon).await;
            conn.write_copy(&request[..8])?;
        }
        // One answer too many.
        2 => conn.write_copy(&[&request[..8], &request[..8]].concat())?,
        // An answer, then the end, which the next caller may see first.
        4 => {
            conn.write_copy(&request[..8])?;
            conn.flush().await?;
            conn.close();
        }
        // A part of an answer, then the end.
        3 => {
            conn.write_copy(&request[..4])?;
            conn.flush().await?;
            conn.close();
        }
        _ => conn.write_copy(&request[..8])?,
    }
    if conn.is_closed() { Ok(()) } else { conn.flush().await }
}

/// One call of a caller that may leave at any time. `true`: it had its answer.
async fn stray(pool: &Pool, address: &str, number: u64, random: &mut Random) -> Check<bool> {
    let limit = match random.within(0..4) {
        0 => Duration::from_micros(random.within(0..500) as u64),
        _ => DEADLINE,
    };
    let checkout = pool.checkout_within(address, limit);
    let checked_out = match random.one_in(5) {
        true => poll_once(checkout).await,
        false => Some(checkout.await),
    };
    let mut conn = match checked_out {
        None => return Ok(false),
        Some(Err(error)) if error.is_checkout_timeout() && limit < DEADLINE => return Ok(false),
        Some(conn) => conn?,
    };
    assert!(conn.is_empty(), "bytes of another call");
    let asked = random.within(0..10) as u8;
    conn.write_copy(&[&number.to_be_bytes()[..], &[asked]].concat())?;
    let answer = async {
        conn.flush().await?;
        if asked == 2 {
            conn.peek(16).await?;
        }
        conn.next(8).await
    };
    let answer = match random.one_in(6) {
        true => poll_once(answer).await,
        false => Some(answer.await),
    };
    match answer {
        Some(Ok(answer)) => {
            assert_eq!(answer[..], number.to_be_bytes(), "the answer to another call");
            drop(answer);
            match random.within(0..8) {
                0 => drop(conn),
                1 => drop(conn.take()),
                _ => conn.give_back(),
            }
            Ok(true)
        }
        Some(Err(error)) => {
            assert!(error.is_closed(), "{error:?}");
            // Giving back is harmless: the connection has failed.
            conn.give_back();
            Ok(false)
        }
        None => Ok(false),
    }
}

/// No answer goes to another caller, at most `OPEN_MAX` connections are open, and every call ends.
pub(crate) fn random_callers_keep_within_the_bounds(t: &Fixture) -> Check {
    let server = t.spawn(t.server().on_request(misbehave));
    let address = addr_of(&server).to_string();
    let sockets = Arc::<Sockets>::default();
    let dialer = sockets.counting(t.dialer());
    let lifetimes = |pool: PoolBuilder| {
        let pool = pool.idle_lifetime(Duration::from_millis(3)).lifetime(Duration::from_millis(40));
        pool.dialer(dialer.clone()).connections_max(OPEN_MAX).idle_max(4).idle_min(2)
    };
    let pool = builder(t, lifetimes).build();
    let mut callers = Vec::new();
    for caller in 0..CALLERS {
        let (pool, address, mut random) = (pool.clone(), address.clone(), t.random());
        callers.push(on_task(async move {
            let mut answered = 0;
            for round in 0..CALLS {
                let number = (caller * CALLS + round) as u64;
                answered += usize::from(stray(&pool, &address, number, &mut random).await?);
                let stats = pool.stats();
                let open = stats.idle + stats.checked_out + stats.dialing;
                assert!(open <= OPEN_MAX, "{stats:?}");
            }
            Ok(answered)
        }));
    }
    let answered: usize = callers.iter().map(Outcome::wait_for_all).sum();
    assert!(answered > CALLERS * CALLS / 4, "only {answered} calls had an answer");
    let most = sockets.most.load(Ordering::SeqCst);
    assert!((2..=OPEN_MAX).contains(&most), "{most} connections were open");
    sockets.all.lock().expect("no test panics here").clear();
    block_on(async { Ok(pool.shutdown(DEADLINE).await?) })?;
    nothing_stays(t, &pool);
    Ok(())
}
