//! Shutdown: new connections are refused, idle ones close, busy ones end, and threads end.

use std::io::Write;
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use ringpoll::{Pollers, ServerHandle};
use tokio::sync::Semaphore;

use crate::harness::*;

macro_rules! cases {
    ($tests:ident, $mount:ident) => {
        $tests! { $mount, shutdown:
            shutdown_closes_idle_connections_at_once
            shutdown_reports_busy_handlers_and_succeeds_when_they_end
            shutdown_lets_a_running_handler_send_its_answer
            silent_clients_do_not_hold_up_a_shutdown
            shutdown_waits_for_submitted_output_and_then_closes
            a_shutdown_amid_newcomers_ends
            shutting_down_twice_is_fine
            a_shutdown_may_wait_for_ever
            a_forced_shutdown_cuts_what_is_left_and_counts_it
            after_shutdown_the_port_and_the_threads_are_gone
            shutting_down_a_poller_group_closes_its_connections
            a_server_whose_pollers_were_shut_down_leaves_nothing
            a_poller_group_that_was_shut_down_takes_no_connections
            connections_made_while_their_group_shuts_down_end
            a_shutdown_may_be_awaited
            a_forced_shutdown_may_be_awaited
            an_awaited_shutdown_that_is_given_up_leaves_no_thread
            an_awaited_shutdown_keeps_its_deadline_without_pollers
        }
    };
}
pub(crate) use cases;

pub(crate) fn shutdown_closes_idle_connections_at_once(t: &Fixture) -> Check {
    let server = t.echo_server();
    let used = dial(&server)?;
    assert_eq!(exchange(&used, b"hello")?, b"hello");
    let unused = dial(&server)?;
    eventually("both are accepted", || server.stats().open == 2);
    server.shutdown(DEADLINE)?;
    assert_eof(&used);
    assert_eof(&unused);
    assert_eq!(server.stats().open, 0);
    assert_eq!(server.stats().cut, 0, "an idle connection is closed, not cut");
    Ok(())
}

/// A server whose handlers wait for the returned gate before they answer, and `count` clients.
fn gated(t: &Fixture, count: usize) -> Check<(ServerHandle, Arc<Semaphore>, Vec<TcpStream>)> {
    let (gate, running) = (Arc::new(Semaphore::new(0)), Arc::new(AtomicUsize::new(0)));
    let (opened, counted) = (Arc::clone(&gate), Arc::clone(&running));
    let server = t.spawn(t.server().on_request(move |mut conn| {
        let (gate, running) = (Arc::clone(&opened), Arc::clone(&counted));
        async move {
            conn.next(1).await?;
            running.fetch_add(1, Ordering::SeqCst);
            let _ = gate.acquire().await.expect("the gate stays");
            conn.write_copy(b"answer")?;
            conn.flush().await
        }
    }));
    let peers: Vec<_> = (0..count).map(|_| dial(&server)).collect::<Check<_>>()?;
    for mut peer in &peers {
        peer.write_all(b"?")?;
    }
    eventually("all handlers wait", || running.load(Ordering::SeqCst) == count);
    Ok((server, gate, peers))
}

pub(crate) fn shutdown_reports_busy_handlers_and_succeeds_when_they_end(t: &Fixture) -> Check {
    let (server, gate, peers) = gated(t, 10)?;
    let start = Instant::now();
    let limit = Duration::from_millis(50);
    let error = server.shutdown(limit).expect_err("10 handlers are busy");
    assert!(start.elapsed() >= limit, "gave up early, after {:?}", start.elapsed());
    assert!(error.is_timeout(), "{error:?}");
    assert!(error.to_string().contains("10"), "does not name the busy count: {error}");
    assert!(TcpStream::connect(addr_of(&server)).is_err(), "still accepts");
    gate.add_permits(10);
    server.shutdown(DEADLINE)?;
    for peer in peers {
        assert_eq!(read_all(&peer)?, b"answer");
    }
    assert_eq!(server.stats().cut, 0);
    Ok(())
}

/// Busy connections are waited for, and end as soon as they are idle.
pub(crate) fn shutdown_lets_a_running_handler_send_its_answer(t: &Fixture) -> Check {
    let (server, gate, peers) = gated(t, 3)?;
    let ending = {
        let server = server.clone();
        on_thread(move || Ok(server.shutdown(DEADLINE)?))
    };
    eventually("accepting stops", || TcpStream::connect(addr_of(&server)).is_err());
    ending.assert_pending();
    gate.add_permits(10);
    ending.wait();
    for peer in peers {
        assert_eq!(read_all(&peer)?, b"answer");
    }
    Ok(())
}

/// A connection is not idle while output is on its way, and is once it has left.
pub(crate) fn shutdown_waits_for_submitted_output_and_then_closes(t: &Fixture) -> Check {
    const SIZE: usize = 8 << 20;
    let server = t.spawn(t.server().on_request(|mut conn| async move {
        conn.next(1).await?;
        conn.write(pattern(0, SIZE))?;
        // Not awaited: the handler is done long before the output is.
        conn.submit()
    }));
    let mut peer = dial(&server)?;
    peer.write_all(b"?")?;
    eventually("the output is stuck", || server.stats().pollers.sends_in_flight == 1);
    let error = server.shutdown(Duration::from_millis(50)).expect_err("output is on its way");
    assert!(error.is_timeout(), "{error:?}");
    let ending = {
        let server = server.clone();
        on_thread(move || Ok(server.shutdown(DEADLINE)?))
    };
    let answer = read_all(&peer)?;
    assert_eq!(answer.len(), SIZE);
    assert_pattern(&answer, 0);
    ending.wait();
    assert_eq!(server.stats().cut, 0);
    Ok(())
}

pub(crate) fn silent_clients_do_not_hold_up_a_shutdown(t: &Fixture) -> Check {
    let server = t.echo_server();
    let peers: Vec<_> = (0..20).map(|_| dial(&server)).collect::<Check<_>>()?;
    for peer in peers.iter().step_by(2) {
        assert_eq!(exchange(peer, b"talk")?, b"talk");
    }
    eventually("all are accepted", || server.stats().open == 20);
    server.shutdown(DEADLINE)?;
    for peer in &peers {
        assert_ended(peer);
    }
    Ok(())
}

/// A connection that is being accepted at that moment is closed like the others, not forgotten.
pub(crate) fn a_shutdown_amid_newcomers_ends(t: &Fixture) -> Check {
    /// Of each thread: more would be a test of how many can be closed at once.
    const NEWCOMERS_MAX: usize = 1000;
    let mut random = t.random();
    for _ in 0..if cfg!(debug_assertions) { 50 } else { 200 } {
        let server = t.server().on_request(echo).bind("127.0.0.1:0")?.spawn()?;
        let newcomers = [(); 2].map(|()| {
            let addr = addr_of(&server);
            on_thread(move || {
                // Kept open until the server closes them.
                let mut peers = Vec::new();
                while peers.len() < NEWCOMERS_MAX
                    && let Ok(peer) = TcpStream::connect(addr)
                {
                    peers.push(peer);
                }
                Ok(peers)
            })
        });
        for _ in 0..random.within(1..100_000) {
            std::hint::spin_loop();
        }
        server.shutdown(DEADLINE)?;
        for peers in newcomers {
            peers.wait();
        }
    }
    Ok(())
}

/// Also from several threads at once.
pub(crate) fn shutting_down_twice_is_fine(t: &Fixture) -> Check {
    let server = t.echo_server();
    let peer = dial(&server)?;
    exchange(&peer, b"hello")?;
    let enders: Vec<_> = (0..4)
        .map(|_| {
            let server = server.clone();
            on_thread(move || Ok(server.shutdown(DEADLINE)?))
        })
        .collect();
    for ender in enders {
        ender.wait();
    }
    server.shutdown(Duration::ZERO)?;
    assert_eq!(server.shutdown_forced(Duration::ZERO)?, 0);
    Ok(())
}

/// `Duration::MAX` is how one says that there is no deadline.
pub(crate) fn a_shutdown_may_wait_for_ever(t: &Fixture) -> Check {
    let (server, gate, peers) = gated(t, 2)?;
    let ending = {
        let server = server.clone();
        on_thread(move || Ok(server.shutdown(Duration::MAX)?))
    };
    eventually("accepting stops", || TcpStream::connect(addr_of(&server)).is_err());
    ending.assert_pending();
    gate.add_permits(2);
    ending.wait();
    assert_eq!(server.shutdown_forced(Duration::MAX)?, 0);
    for peer in peers {
        assert_eq!(read_all(&peer)?, b"answer");
    }
    Ok(())
}

/// Fix row 13.
pub(crate) fn a_forced_shutdown_cuts_what_is_left_and_counts_it(t: &Fixture) -> Check {
    let errors = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&errors);
    let server = t.spawn(t.server().on_request(move |mut conn| {
        let errors = Arc::clone(&counted);
        async move {
            conn.next(1).await?;
            // The rest of the request never comes.
            let error = conn.next(1000).await.expect_err("cut");
            assert!(error.is_closed() && !error.is_eof(), "{error:?}");
            errors.fetch_add(1, Ordering::SeqCst);
            Ok(())
        }
    }));
    let idle = dial(&server)?;
    let busy: Vec<_> = (0..3).map(|_| dial(&server)).collect::<Check<_>>()?;
    for mut peer in &busy {
        peer.write_all(b"?")?;
    }
    eventually("all have begun", || server.stats().pollers.received_bytes == 3);
    eventually("all are accepted", || server.stats().open == 4);
    let limit = Duration::from_millis(50);
    let start = Instant::now();
    assert_eq!(server.shutdown_forced(limit)?, 3);
    assert!(start.elapsed() >= limit, "cut early, after {:?}", start.elapsed());
    for peer in busy.iter().chain([&idle]) {
        assert_ended(peer);
    }
    assert_eq!((server.stats().cut, server.stats().open), (3, 0));
    eventually("the handlers were told", || errors.load(Ordering::SeqCst) == 3);
    Ok(())
}

/// After Ok from shutdown the poller threads are gone, and so is the listener.
pub(crate) fn after_shutdown_the_port_and_the_threads_are_gone(t: &Fixture) -> Check {
    let before = thread_count();
    let server = t.spawn(t.server().pollers(8).on_request(echo));
    let addr = addr_of(&server);
    assert!(thread_count() >= before + 7, "8 pollers are threads");
    for _ in 0..8 {
        exchange(&dial(&server)?, b"hello")?;
    }
    server.shutdown(DEADLINE)?;
    // The test runner itself may come by with a thread.
    let gone = holds_within(DEADLINE, || thread_count() <= before + 1);
    assert!(gone, "{before} threads before, now:\n{}", threads());
    assert!(TcpStream::connect(addr).is_err(), "still accepts");
    let again = t.spawn_bound(t.server().on_request(echo).bind(&addr.to_string())?);
    assert_eq!(exchange(&dial(&again)?, b"again")?, b"again");
    Ok(())
}

/// `Pollers::shutdown` closes everything and joins.
pub(crate) fn shutting_down_a_poller_group_closes_its_connections(t: &Fixture) -> Check {
    let group = Pollers::builder().backend(t.mount().backend).count(2).build()?;
    let (one, peer) = tcp_pair()?;
    let mut conn = ringpoll::Dialer::new().pollers(group.clone()).adopt(one.into())?;
    let reading = runtime().spawn(async move { conn.next(1).await });
    eventually("it is registered", || group.stats().connections == 1);
    group.shutdown()?;
    assert_ended(&peer);
    let error = block_on(async { Ok(reading.await?) })?.expect_err("closed");
    assert!(error.is_closed(), "{error:?}");
    Ok(())
}

/// The group ends before the server that uses it. The server itself is never shut down.
pub(crate) fn a_server_whose_pollers_were_shut_down_leaves_nothing(t: &Fixture) -> Check {
    let group = Pollers::builder().backend(t.mount().backend).count(2).build()?;
    let server = t.server().use_pollers(group.clone()).on_request(echo);
    let server = server.bind("127.0.0.1:0")?.spawn()?;
    let peer = dial(&server)?;
    assert_eq!(exchange(&peer, b"hello")?, b"hello");
    group.shutdown()?;
    assert_ended(&peer);
    // The descriptors of the group go with its last owner; the harness counts them.
    drop((group, server));
    Ok(())
}

/// No poller, no answer: an error, not a wait without end.
pub(crate) fn a_poller_group_that_was_shut_down_takes_no_connections(t: &Fixture) -> Check {
    let server = t.echo_server();
    let addr = addr_of(&server).to_string();
    let group = Pollers::builder().backend(t.mount().backend).count(1).build()?;
    group.shutdown()?;
    let dialer = ringpoll::Dialer::new().pollers(group);
    block_on(async {
        let error = dialer.connect(&addr).await.expect_err("the pollers are gone");
        assert!(error.is_closed(), "{error:?}");
        let (one, peer) = tcp_pair()?;
        if let Ok(mut conn) = dialer.adopt(one.into()) {
            let error = conn.next(1).await.expect_err("the pollers are gone");
            assert!(error.is_closed(), "{error:?}");
        }
        assert_ended(&peer);
        Ok(())
    })
}

/// The same where the connection is on its way to a poller that is about to end.
pub(crate) fn connections_made_while_their_group_shuts_down_end(t: &Fixture) -> Check {
    let mut random = t.random();
    for _ in 0..50 {
        let group = Pollers::builder().backend(t.mount().backend).count(1).build()?;
        let dialer = ringpoll::Dialer::new().pollers(group.clone());
        let making = on_thread(move || {
            let mut made = Vec::new();
            for _ in 0..20 {
                let (one, peer) = tcp_pair()?;
                if let Ok(conn) = dialer.adopt(one.into()) {
                    made.push((conn, peer));
                }
            }
            Ok(made)
        });
        for _ in 0..random.within(1..200_000) {
            std::hint::spin_loop();
        }
        group.shutdown()?;
        for (mut conn, _peer) in making.wait() {
            let error = block_on(async { Ok(conn.next(1).await) })?.expect_err("nothing is sent");
            assert!(error.is_closed(), "{error:?}");
        }
    }
    Ok(())
}

/// The same results as of the methods that block, and the threads are gone.
pub(crate) fn a_shutdown_may_be_awaited(t: &Fixture) -> Check {
    let before = thread_count();
    let (server, gate, peers) = gated(t, 10)?;
    let idle = dial(&server)?;
    eventually("all are accepted", || server.stats().open == 11);
    let limit = Duration::from_millis(200);
    block_on(async {
        let start = Instant::now();
        let error = server.shutdown_async(limit).await.expect_err("10 handlers are busy");
        assert!(start.elapsed() >= limit, "gave up early, after {:?}", start.elapsed());
        assert!(error.is_timeout() && error.to_string().contains("10"), "{error:?}");
        Ok(())
    })?;
    assert_eof(&idle);
    assert!(TcpStream::connect(addr_of(&server)).is_err(), "still accepts");
    let ending = {
        let server = server.clone();
        on_task(async move { Ok(server.shutdown_async(Duration::MAX).await?) })
    };
    ending.assert_pending();
    gate.add_permits(10);
    ending.wait();
    for peer in peers {
        assert_eq!(read_all(&peer)?, b"answer");
    }
    assert_eq!((server.stats().open, server.stats().cut), (0, 0));
    // The test runner itself may come by with a thread.
    let gone = holds_within(DEADLINE, || thread_count() <= before + 1);
    assert!(gone, "{before} threads before, now:\n{}", threads());
    block_on(async { Ok(server.shutdown_async(Duration::ZERO).await?) })?;
    Ok(server.wait()?)
}

pub(crate) fn a_forced_shutdown_may_be_awaited(t: &Fixture) -> Check {
    let server = t.spawn(t.server().on_request(|mut conn| async move {
        // The rest of the request never comes.
        conn.next(1000).await.map(drop)
    }));
    let peers: Vec<_> = (0..3).map(|_| dial(&server)).collect::<Check<_>>()?;
    for mut peer in &peers {
        peer.write_all(b"?")?;
    }
    eventually("all have begun", || server.stats().pollers.received_bytes == 3);
    let (limit, start) = (Duration::from_millis(50), Instant::now());
    let cut = block_on(async { Ok(server.shutdown_forced_async(limit).await?) })?;
    assert!(start.elapsed() >= limit, "cut early, after {:?}", start.elapsed());
    assert_eq!((cut, server.stats().cut), (3, 3));
    for peer in &peers {
        assert_ended(peer);
    }
    let empty = t.echo_server();
    assert_eq!(block_on(async { Ok(empty.shutdown_forced_async(DEADLINE).await?) })?, 0);
    Ok(())
}

/// The server stays in its shutdown, and the next shutdown ends it.
pub(crate) fn an_awaited_shutdown_that_is_given_up_leaves_no_thread(t: &Fixture) -> Check {
    let (server, gate, peers) = gated(t, 2)?;
    let before = thread_count() + unblock_thread_count();
    block_on(async {
        for _ in 0..100 {
            assert!(poll_once(server.shutdown_async(DEADLINE)).await.is_none());
            assert!(poll_once(server.shutdown_forced_async(DEADLINE)).await.is_none());
        }
        Ok(())
    })?;
    let after = thread_count() + unblock_thread_count();
    assert!(after <= before, "{before} threads before, now:\n{}", threads());
    assert!(server.is_shutting_down());
    eventually("accepting stops", || TcpStream::connect(addr_of(&server)).is_err());
    assert_eq!((server.stats().open, server.stats().cut), (2, 0));
    gate.add_permits(2);
    for peer in peers {
        assert_eq!(read_all(&peer)?, b"answer");
    }
    block_on(async { Ok(server.shutdown_async(DEADLINE).await?) })?;
    assert_eq!(server.stats().pollers.connections, 0);
    Ok(())
}

/// No poller is there to wake the future at its deadline.
pub(crate) fn an_awaited_shutdown_keeps_its_deadline_without_pollers(t: &Fixture) -> Check {
    let group = Pollers::builder().backend(t.mount().backend).count(1).build()?;
    let gate = Arc::new(Semaphore::new(0));
    let (opened, running) = (Arc::clone(&gate), Arc::new(AtomicUsize::new(0)));
    let counted = Arc::clone(&running);
    let builder = t.server().use_pollers(group.clone()).on_request(move |mut conn| {
        let (gate, running) = (Arc::clone(&opened), Arc::clone(&counted));
        async move {
            conn.next(1).await?;
            running.fetch_add(1, Ordering::SeqCst);
            let _ = gate.acquire().await.expect("the gate stays");
            Ok(())
        }
    });
    let server = t.spawn(builder);
    let mut peer = dial(&server)?;
    peer.write_all(b"?")?;
    eventually("the handler waits", || running.load(Ordering::SeqCst) == 1);
    group.shutdown()?;
    let (limit, start) = (Duration::from_millis(200), Instant::now());
    let error = block_on(async { Ok(server.shutdown_async(limit).await) })?;
    assert!(error.is_err_and(|error| error.is_timeout()) && start.elapsed() >= limit);
    gate.add_permits(1);
    block_on(async { Ok(server.shutdown_async(DEADLINE).await?) })?;
    assert_ended(&peer);
    Ok(())
}
