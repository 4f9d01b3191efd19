//! Events: prepare, connect, request, disconnect and close, in this order, each once.

use std::io::Write;
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};

use ringpoll::{Error, Handle};
use tokio::sync::{Notify, Semaphore};

use crate::harness::*;

macro_rules! cases {
    ($tests:ident, $mount:ident) => {
        $tests! { $mount, events:
            a_thousand_ping_pongs_inside_on_connect
            on_connect_may_greet_before_the_peer_speaks
            one_task_per_connection_serves_until_the_peer_leaves
            on_request_never_starts_before_on_connect_ends
            on_request_waits_for_a_connection_that_on_connect_gave_to_a_task
            on_disconnect_cancels_a_hundred_running_handlers
            a_close_during_on_connect_ends_the_connection
            on_disconnect_waits_for_on_connect
            on_disconnect_is_for_the_peer_only
            a_close_callback_may_be_added_in_any_handler
            a_close_in_on_connect_is_eof_at_the_client
            a_close_callback_waits_for_the_running_handler
            events_of_ten_connections_come_in_order_each_once
            a_request_sent_right_before_the_close_reaches_the_handler
            on_prepare_sets_the_state_that_handlers_see
            a_reset_is_a_disconnect
        }
    };
}
pub(crate) use cases;

pub(crate) fn a_thousand_ping_pongs_inside_on_connect(t: &Fixture) -> Check {
    let (peer, played) = t.drive(|mut conn| async move {
        for _ in 0..1024 {
            let ball = conn.next(5).await?;
            conn.write(ball)?;
            conn.flush().await?;
        }
        Ok(())
    })?;
    for _ in 0..1024 {
        assert_eq!(exchange(&peer, b"hello")?, b"hello");
    }
    played.wait();
    Ok(())
}

pub(crate) fn on_connect_may_greet_before_the_peer_speaks(t: &Fixture) -> Check {
    let server = t.spawn(t.server().on_request(echo).on_connect(|mut conn| async move {
        conn.write_copy(b"220 ready")?;
        conn.flush().await
    }));
    for _ in 0..10 {
        let peer = dial(&server)?;
        assert_eq!(read_exactly(&peer, 9)?, b"220 ready");
        assert_eq!(exchange(&peer, b"ehlo")?, b"ehlo");
    }
    Ok(())
}

/// on_connect that loops until EOF, without any on_request.
pub(crate) fn one_task_per_connection_serves_until_the_peer_leaves(t: &Fixture) -> Check {
    let server = t.spawn(t.server().on_connect(|mut conn| async move {
        loop {
            let count = conn.readable().await?;
            if count == 0 {
                return Ok(());
            }
            let bytes = conn.next(count).await?;
            conn.write(bytes)?;
            conn.flush().await?;
        }
    }));
    let peers: Vec<_> = (0..20).map(|_| dial(&server)).collect::<Check<_>>()?;
    for round in 0..20 {
        for peer in &peers {
            assert_pattern(&exchange(peer, &pattern(round, 500))?, round);
        }
    }
    drop(peers);
    eventually("the connections close", || server.stats().open == 0);
    assert_eq!(server.stats().handler_errors, 0);
    Ok(())
}

/// Data that came meanwhile triggers the handler afterwards.
pub(crate) fn on_request_never_starts_before_on_connect_ends(t: &Fixture) -> Check {
    let gate = Arc::new(Semaphore::new(0));
    let (log, seen) = channel();
    let server = t.spawn(
        t.server()
            .on_connect({
                let (gate, log) = (Arc::clone(&gate), log.clone());
                move |conn| {
                    let (gate, log) = (Arc::clone(&gate), log.clone());
                    async move {
                        log.send(("connect begins", Some((*conn).clone())))
                            .map_err(Error::other)?;
                        let _ = gate.acquire().await.expect("the gate stays");
                        log.send(("connect ends", None)).map_err(Error::other)
                    }
                }
            })
            .on_request(move |conn| {
                log.send(("request", None)).expect("the test listens");
                echo(conn)
            }),
    );
    let mut peer = dial(&server)?;
    peer.write_all(b"early")?;
    let (first, handle) = seen.recv_timeout(DEADLINE)?;
    let handle = handle.expect("sent by on_connect");
    eventually("the request is buffered", || handle.stats().unread_bytes == 5);
    gate.add_permits(1);
    assert_eq!(read_exactly(&peer, 5)?, b"early");
    let rest: Vec<_> = seen.try_iter().map(|(event, _)| event).collect();
    assert_eq!((first, &rest[..]), ("connect begins", &["connect ends", "request"][..]));
    Ok(())
}

/// The same where the connection outlives on_connect's future.
pub(crate) fn on_request_waits_for_a_connection_that_on_connect_gave_to_a_task(
    t: &Fixture,
) -> Check {
    let (keep, kept) = channel();
    let requests = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&requests);
    let server = t.spawn(
        t.server()
            .on_connect(move |conn| {
                let sent = keep.send(conn).map_err(Error::other);
                async move { sent }
            })
            .on_request(move |conn| {
                counted.fetch_add(1, Ordering::SeqCst);
                echo(conn)
            }),
    );
    let mut peer = dial(&server)?;
    peer.write_all(b"early")?;
    let conn = kept.recv_timeout(DEADLINE)?;
    eventually("the request is buffered", || conn.stats().unread_bytes == 5);
    assert_eq!(requests.load(Ordering::SeqCst), 0, "on_request began beside on_connect");
    drop(conn);
    assert_eq!(read_exactly(&peer, 5)?, b"early");
    Ok(())
}

/// on_disconnect runs beside the handler, which is how a handler learns to stop.
pub(crate) fn on_disconnect_cancels_a_hundred_running_handlers(t: &Fixture) -> Check {
    const COUNT: usize = 100;
    let (running, cancelled) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let server = t.spawn(
        t.server()
            .on_prepare(|handle| {
                handle.set_context(Notify::new());
                Ok(())
            })
            .on_request({
                let (running, cancelled) = (Arc::clone(&running), Arc::clone(&cancelled));
                move |mut conn| {
                    let (running, cancelled) = (Arc::clone(&running), Arc::clone(&cancelled));
                    async move {
                        conn.next(4).await?;
                        let cancel = conn.context::<Notify>().expect("set in on_prepare");
                        running.fetch_add(1, Ordering::SeqCst);
                        cancel.notified().await;
                        cancelled.fetch_add(1, Ordering::SeqCst);
                        Ok(())
                    }
                }
            })
            .on_disconnect(|handle| {
                assert!(!handle.is_active());
                handle.context::<Notify>().expect("set in on_prepare").notify_one();
            }),
    );
    let peers: Vec<_> = (0..COUNT).map(|_| dial(&server)).collect::<Check<_>>()?;
    for mut peer in &peers {
        peer.write_all(b"wait")?;
    }
    eventually("all handlers wait", || running.load(Ordering::SeqCst) == COUNT);
    assert_eq!(cancelled.load(Ordering::SeqCst), 0);
    drop(peers);
    eventually("all are cancelled", || cancelled.load(Ordering::SeqCst) == COUNT);
    Ok(())
}

/// The server closes from another thread while on_connect waits.
pub(crate) fn a_close_during_on_connect_ends_the_connection(t: &Fixture) -> Check {
    let (sends, sent) = outcome();
    let (peer, waited) = t.drive(|mut conn| async move {
        tell(sends, Ok((*conn).clone()));
        Ok(conn.next(1).await.expect_err("nothing is ever sent"))
    })?;
    sent.wait().close();
    let error = waited.wait();
    assert!(error.is_closed() && !error.is_eof(), "{error:?}");
    assert_ended(&peer);
    Ok(())
}

/// The peer closes: the disconnect is reported after on_connect, and once.
pub(crate) fn on_disconnect_waits_for_on_connect(t: &Fixture) -> Check {
    let gate = Arc::new(Semaphore::new(0));
    let (log, seen) = channel();
    let disconnects = log.clone();
    let opened = Arc::clone(&gate);
    let server = t.spawn(
        t.server()
            .on_connect(move |conn| {
                let (gate, log) = (Arc::clone(&opened), log.clone());
                async move {
                    log.send(("begins", (*conn).clone())).map_err(Error::other)?;
                    let _ = gate.acquire().await.expect("the gate stays");
                    log.send(("ends", (*conn).clone())).map_err(Error::other)
                }
            })
            .on_disconnect(move |handle| {
                disconnects.send(("disconnect", handle.clone())).expect("the test listens");
            }),
    );
    let peer = dial(&server)?;
    let (_, handle) = seen.recv_timeout(DEADLINE)?;
    drop(peer);
    eventually("the close is noticed", || !handle.is_active());
    gate.add_permits(1);
    eventually("the connection closes", || server.stats().open == 0);
    let mut order: Vec<_> = Vec::new();
    eventually("both events", || {
        order.extend(seen.try_iter().map(|(event, _)| event));
        order.len() >= 2
    });
    assert_eq!(order, ["ends", "disconnect"]);
    Ok(())
}

/// Our own close is no disconnect.
pub(crate) fn on_disconnect_is_for_the_peer_only(t: &Fixture) -> Check {
    let count = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&count);
    let server = t.spawn(
        t.server()
            .on_request(|mut conn| async move {
                if conn.read_byte().await? == b'q' {
                    conn.close();
                }
                Ok(())
            })
            .on_disconnect(move |_| {
                counted.fetch_add(1, Ordering::SeqCst);
            }),
    );
    let mut closed = dial(&server)?;
    closed.write_all(b"q")?;
    assert_ended(&closed);
    drop(closed);
    eventually("the first is gone", || server.stats().open == 0);
    assert_eq!(count.load(Ordering::SeqCst), 0, "our own close was told as a disconnect");
    let mut leaves = dial(&server)?;
    leaves.write_all(b"x")?;
    drop(leaves);
    eventually("the second is told", || count.load(Ordering::SeqCst) == 1);
    eventually("the second is gone", || server.stats().open == 0);
    assert_eq!(count.load(Ordering::SeqCst), 1);
    Ok(())
}

/// Callbacks are added on prepare, connect and request. They run last in, first out.
pub(crate) fn a_close_callback_may_be_added_in_any_handler(t: &Fixture) -> Check {
    let (log, seen) = channel();
    let add = move |handle: &Handle, name: &'static str| {
        let log = log.clone();
        handle.on_close(move |_| log.send(name).expect("the test listens"));
    };
    let (on_prepare, on_connect) = (add.clone(), add.clone());
    let server = t.spawn(
        t.server()
            .on_prepare(move |handle| {
                on_prepare(handle, "prepare");
                Ok(())
            })
            .on_connect(move |conn| {
                on_connect(&conn, "connect");
                async { Ok(()) }
            })
            .on_request(move |conn| {
                add(&conn, "request");
                echo(conn)
            }),
    );
    let peer = dial(&server)?;
    exchange(&peer, b"hello")?;
    assert!(seen.try_recv().is_err(), "a callback ran before the close");
    drop(peer);
    let order: Vec<_> =
        (0..3).map(|_| seen.recv_timeout(DEADLINE)).collect::<std::result::Result<_, _>>()?;
    assert_eq!(order, ["request", "connect", "prepare"]);
    Ok(())
}

pub(crate) fn a_close_in_on_connect_is_eof_at_the_client(t: &Fixture) -> Check {
    let requests = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&requests);
    let server = t.spawn(
        t.server()
            .on_connect(|conn| async move {
                conn.close();
                Ok(())
            })
            .on_request(move |_| {
                counted.fetch_add(1, Ordering::SeqCst);
                async { Ok(()) }
            }),
    );
    for _ in 0..10 {
        assert_eof(&dial(&server)?);
    }
    eventually("all are closed", || server.stats().open == 0);
    assert_eq!(requests.load(Ordering::SeqCst), 0);
    Ok(())
}

type Log = Arc<Mutex<Vec<(u64, &'static str)>>>;

fn note(log: &Log, handle: &Handle, event: &'static str) {
    log.lock().expect("no holder panics").push((handle.id(), event));
}

pub(crate) fn events_of_ten_connections_come_in_order_each_once(t: &Fixture) -> Check {
    let log = Log::default();
    let [prepared, connected, requested, disconnected] = [(); 4].map(|()| Arc::clone(&log));
    let server = t.spawn(
        t.server()
            .on_prepare(move |handle| {
                note(&prepared, handle, "prepare");
                let log = Arc::clone(&prepared);
                handle.on_close(move |handle| note(&log, handle, "close"));
                Ok(())
            })
            .on_connect(move |conn| {
                note(&connected, &conn, "connect");
                async { Ok(()) }
            })
            .on_request(move |conn| {
                note(&requested, &conn, "request");
                echo(conn)
            })
            .on_disconnect(move |handle| note(&disconnected, handle, "disconnect")),
    );
    let peers: Vec<_> = (0..10).map(|_| dial(&server)).collect::<Check<_>>()?;
    for peer in &peers {
        assert_eq!(exchange(peer, b"life")?, b"life");
    }
    drop(peers);
    let closes = || {
        let log = log.lock().expect("no holder panics");
        log.iter().filter(|(_, event)| *event == "close").count()
    };
    eventually("all are closed", || closes() == 10);
    let log = log.lock().expect("no holder panics");
    let mut ids: Vec<_> = log.iter().map(|(id, _)| *id).collect();
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), 10, "an id was used twice");
    for id in ids {
        let life: Vec<_> =
            log.iter().filter(|(of, _)| *of == id).map(|(_, event)| *event).collect();
        assert_eq!(life, ["prepare", "connect", "request", "disconnect", "close"]);
    }
    let stats = server.stats();
    assert_eq!((stats.accepted, stats.open, stats.handler_errors), (10, 0, 0));
    Ok(())
}

/// Close callbacks run after the running handler has returned, and only once it has.
pub(crate) fn a_close_callback_waits_for_the_running_handler(t: &Fixture) -> Check {
    let (log, seen) = channel();
    let ends = log.clone();
    let (sends, sent) = outcome();
    let gate = Arc::new(tokio::sync::Semaphore::new(0));
    let opened = Arc::clone(&gate);
    let (peer, ended) = t.drive(move |conn| async move {
        conn.on_close(move |_| log.send("closed").expect("the test listens"));
        tell(sends, Ok((*conn).clone()));
        let _ = opened.acquire().await?;
        ends.send("handler ends")?;
        drop(conn);
        Ok(())
    })?;
    let handle = sent.wait();
    handle.close();
    assert!(handle.is_closed());
    // Round trips elsewhere give the callback every chance to come too early.
    let bystander = t.echo_server();
    let other = dial(&bystander)?;
    for _ in 0..50 {
        exchange(&other, b"?")?;
    }
    assert!(seen.try_recv().is_err(), "the callback ran beside the handler");
    gate.add_permits(1);
    ended.wait();
    assert_eq!(seen.recv_timeout(DEADLINE)?, "handler ends");
    assert_eq!(seen.recv_timeout(DEADLINE)?, "closed");
    assert_ended(&peer);
    Ok(())
}

pub(crate) fn a_request_sent_right_before_the_close_reaches_the_handler(t: &Fixture) -> Check {
    let (log, seen) = channel();
    let server = t.spawn(t.server().on_request(move |mut conn| {
        let log = log.clone();
        async move { log.send(conn.next(7).await?.to_vec()).map_err(Error::other) }
    }));
    for index in 0..50 {
        let mut peer: TcpStream = dial(&server)?;
        peer.write_all(&pattern(index, 7))?;
        drop(peer);
        assert_pattern(&seen.recv_timeout(DEADLINE)?, index);
    }
    Ok(())
}

/// `on_prepare` sets the state of a connection.
pub(crate) fn on_prepare_sets_the_state_that_handlers_see(t: &Fixture) -> Check {
    struct Greeting(String);
    let server = t.spawn(
        t.server()
            .on_prepare(|handle| {
                assert!(handle.context::<Greeting>().is_none());
                handle.set_context(Greeting(format!("hello {}", handle.peer_addr())));
                Ok(())
            })
            .on_request(|mut conn| async move {
                conn.next(1).await?;
                assert!(conn.context::<String>().is_none(), "another type was never set");
                let greeting = conn.context::<Greeting>().expect("set in on_prepare");
                conn.write(greeting.0.clone())?;
                conn.flush().await
            }),
    );
    for _ in 0..3 {
        let mut peer = dial(&server)?;
        let wanted = format!("hello {}", peer.local_addr()?);
        peer.write_all(b"?")?;
        assert_eq!(read_exactly(&peer, wanted.len())?, wanted.as_bytes());
    }
    Ok(())
}

/// A reset ends the connection like a close, and is told as a disconnect.
pub(crate) fn a_reset_is_a_disconnect(t: &Fixture) -> Check {
    let (log, seen) = channel();
    let server = t.spawn(t.server().on_request(echo).on_disconnect(move |handle| {
        log.send(handle.id()).expect("the test listens");
    }));
    for _ in 0..5 {
        let peer = dial(&server)?;
        exchange(&peer, b"hello")?;
        reset(peer)?;
        seen.recv_timeout(DEADLINE)?;
        eventually("it is gone", || server.stats().open == 0);
    }
    let half = dial(&server)?;
    half.shutdown(Shutdown::Write)?;
    seen.recv_timeout(DEADLINE)?;
    assert_eof(&half);
    assert!(seen.try_recv().is_err(), "a disconnect was told twice");
    Ok(())
}
