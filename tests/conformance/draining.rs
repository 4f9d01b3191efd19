//! Handlers and futures that wait for the shutdown of their server, on every placement.

use std::future::Future;
use std::io::Write;
use std::net::TcpStream;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::task::{Context, Wake, Waker};
use std::time::{Duration, Instant};

use ringpoll::{Connection, Error, Handle, Result, ServerHandle};

use crate::harness::*;

macro_rules! cases {
    ($tests:ident, $mount:ident) => {
        $tests! { $mount, draining:
            a_handler_that_waits_for_the_shutdown_ends_its_connection
            a_handler_asks_whether_the_shutdown_has_begun
            a_spawned_future_is_told_of_the_shutdown_after_its_connection_has_gone
            futures_that_stop_waiting_for_the_shutdown_leave_no_waker
            wakers_of_the_shutdown_may_panic_and_call_anything
            listeners_stop_before_handlers_hear_of_the_shutdown
            idle_connections_end_before_handlers_hear_of_the_shutdown
            requests_that_came_before_the_shutdown_are_answered
            a_shutdown_ends_listeners_that_start_meanwhile
            a_connection_without_a_server_waits_for_no_shutdown
            a_handler_that_awaits_the_shutdown_of_its_server_gets_it_at_the_deadline
            a_handler_that_forces_the_shutdown_of_its_server_ends_it
        }
    };
}
pub(crate) use cases;

const SHORT: Duration = Duration::from_millis(50);

/// Echoes bytes until the shutdown, then says `bye`.
async fn serve_until_shutdown(mut conn: Connection) -> Result<()> {
    let mut shutdown = conn.shutdown_begun();
    loop {
        tokio::select! {
            byte = conn.next(1) => {
                conn.write(byte?)?;
                conn.flush().await?;
            }
            () = &mut shutdown => {
                assert!(conn.is_shutting_down());
                conn.write_copy(b"bye")?;
                return conn.flush().await;
            }
        }
    }
}

pub(crate) fn a_handler_that_waits_for_the_shutdown_ends_its_connection(t: &Fixture) -> Check {
    for is_request in [false, true] {
        let builder = t.server();
        let server = t.spawn(match is_request {
            true => builder.on_request(serve_until_shutdown),
            false => builder.on_connect(serve_until_shutdown),
        });
        let peers = (0..20).map(|_| dial(&server)).collect::<Check<Vec<_>>>()?;
        for peer in &peers {
            assert_eq!(exchange(peer, b"one")?, b"one");
            assert_eq!(exchange(peer, b"two")?, b"two");
        }
        server.shutdown(DEADLINE)?;
        for peer in &peers {
            assert_eq!(read_all(peer)?, b"bye");
        }
        assert_eq!((server.stats().cut, server.stats().handler_errors), (0, 0));
    }
    Ok(())
}

pub(crate) fn a_handler_asks_whether_the_shutdown_has_begun(t: &Fixture) -> Check {
    let server = t.spawn(t.server().on_connect(|mut conn| async move {
        for _ in 0..2 {
            conn.next(1).await?;
            conn.write(if conn.is_shutting_down() { "ends" } else { "goes on" })?;
            conn.flush().await?;
        }
        Ok(())
    }));
    let mut peer = dial(&server)?;
    peer.write_all(b"?")?;
    assert_eq!(read_exactly(&peer, 7)?, b"goes on");
    assert!(!server.is_shutting_down());
    let error = server.shutdown(SHORT).expect_err("the handler waits for a byte");
    assert!(error.is_timeout() && server.is_shutting_down(), "{error:?}");
    peer.write_all(b"?")?;
    assert_eq!(read_all(&peer)?, b"ends");
    Ok(server.shutdown(DEADLINE)?)
}

/// A server whose handlers hand out their handles.
fn exposing(t: &Fixture) -> (ServerHandle, Receiver<Handle>) {
    let (prepared, handles) = channel();
    let builder = t.server().on_prepare(move |handle| {
        // Fails for connections after the end of the test.
        prepared.send(handle.clone()).map_err(Error::other)
    });
    (t.spawn(builder.on_request(echo)), handles)
}

pub(crate) fn a_spawned_future_is_told_of_the_shutdown_after_its_connection_has_gone(
    t: &Fixture,
) -> Check {
    let (server, handles) = exposing(t);
    let peer = dial(&server)?;
    let handle = handles.recv_timeout(DEADLINE)?;
    let told = Arc::new(AtomicUsize::new(0));
    for _ in 0..3 {
        let (told, shutdown) = (Arc::clone(&told), handle.shutdown_begun());
        handle.spawn(async move {
            shutdown.await;
            told.fetch_add(1, Ordering::SeqCst);
            Ok(())
        })?;
    }
    drop(peer);
    eventually("the connection has gone", || server.stats().open == 0);
    assert_eq!((server.stats().spawned, told.load(Ordering::SeqCst)), (3, 0));
    server.shutdown(DEADLINE)?;
    assert_eq!((server.stats().spawned, told.load(Ordering::SeqCst)), (0, 3));
    Ok(())
}

struct Counts(AtomicUsize);

impl Wake for Counts {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

fn poll(mut future: impl Future<Output = ()> + Unpin, waker: &Waker) -> bool {
    Pin::new(&mut future).poll(&mut Context::from_waker(waker)).is_ready()
}

pub(crate) fn futures_that_stop_waiting_for_the_shutdown_leave_no_waker(t: &Fixture) -> Check {
    let (server, handles) = exposing(t);
    let _peer = dial(&server)?;
    let handle = handles.recv_timeout(DEADLINE)?;
    let counts = Arc::new(Counts(AtomicUsize::new(0)));
    let waker = Waker::from(Arc::clone(&counts));
    let idle = Arc::strong_count(&counts);
    for _ in 0..100 {
        let mut shutdowns = [handle.shutdown_begun(), server.shutdown_begun()];
        for shutdown in &mut shutdowns {
            assert!(!poll(&mut *shutdown, &waker) && !poll(shutdown, &waker));
        }
        assert_eq!(Arc::strong_count(&counts), idle + 2);
    }
    assert_eq!(Arc::strong_count(&counts), idle, "a dropped future leaves its waker");
    let mut left = server.shutdown_begun();
    assert!(!poll(&mut left, &waker));
    server.shutdown(DEADLINE)?;
    assert_eq!(counts.0.load(Ordering::SeqCst), 1);
    assert_eq!(Arc::strong_count(&counts), idle, "the shutdown leaves a waker");
    // Ready stays ready.
    assert!(poll(&mut left, &waker) && poll(&mut left, &waker));
    assert!(poll(handle.shutdown_begun(), &waker) && handle.is_shutting_down());
    Ok(())
}

/// A waker of the user: it panics, or calls the library again.
struct Calls(Box<dyn Fn() + Send + Sync>);

impl Wake for Calls {
    fn wake(self: Arc<Self>) {
        (self.0)();
    }
}

pub(crate) fn wakers_of_the_shutdown_may_panic_and_call_anything(t: &Fixture) -> Check {
    let (server, handles) = exposing(t);
    let peer = dial(&server)?;
    let handle = handles.recv_timeout(DEADLINE)?;
    let again = Arc::new(Mutex::new(None));
    let calls = {
        let (server, handle, again) = (server.clone(), handle.clone(), Arc::clone(&again));
        Calls(Box::new(move || {
            assert!(server.is_shutting_down() && handle.is_shutting_down());
            assert!(poll(handle.shutdown_begun(), Waker::noop()));
            let _ = server.stats();
            // Begins the shutdown once more, inside of the first one.
            let mut more = Box::pin(async { server.shutdown_async(Duration::ZERO).await.is_ok() });
            let _ = more.as_mut().poll(&mut Context::from_waker(Waker::noop()));
            handle.close();
            *again.lock().expect("nobody panics here") = Some(());
        }))
    };
    let panics = Calls(Box::new(|| panic!("{ON_PURPOSE}")));
    let counts = Arc::new(Counts(AtomicUsize::new(0)));
    let wakers =
        [Arc::new(panics).into(), Arc::new(calls).into(), Waker::from(Arc::clone(&counts))];
    let mut shutdowns = [(); 3].map(|()| handle.shutdown_begun());
    for (shutdown, waker) in shutdowns.iter_mut().zip(&wakers) {
        assert!(!poll(shutdown, waker));
    }
    server.shutdown(DEADLINE)?;
    assert_eq!(counts.0.load(Ordering::SeqCst), 1, "a panic took a wake-up from another future");
    assert!(again.lock().expect("nobody panics here").is_some());
    assert_ended(&peer);
    Ok(())
}

/// The shutdown calls the waker, so it cannot go on before the waker returns.
pub(crate) fn listeners_stop_before_handlers_hear_of_the_shutdown(t: &Fixture) -> Check {
    let (server, _handles) = exposing(t);
    let addr = addr_of(&server);
    let (stopped, seen) = channel();
    let waits = Calls(Box::new(move || {
        eventually("accepting stops", || TcpStream::connect(addr).is_err());
        let _ = stopped.send(());
    }));
    let mut begun = server.shutdown_begun();
    assert!(!poll(&mut begun, &Waker::from(Arc::new(waits))));
    server.shutdown(DEADLINE)?;
    seen.try_recv().expect("a handler heard of the shutdown while the server accepted");
    Ok(())
}

/// As above: the waker blocks the shutdown until an idle connection has ended.
pub(crate) fn idle_connections_end_before_handlers_hear_of_the_shutdown(t: &Fixture) -> Check {
    let (server, _handles) = exposing(t);
    let peer = dial(&server)?;
    eventually("the connection is open", || server.stats().open == 1);
    let (ended, seen) = channel();
    let waits = Calls(Box::new(move || {
        let _ = ended.send(read_all(&peer).is_ok_and(|bytes| bytes.is_empty()));
    }));
    let mut begun = server.shutdown_begun();
    assert!(!poll(&mut begun, &Waker::from(Arc::new(waits))));
    server.shutdown(DEADLINE)?;
    assert_eq!(seen.try_recv(), Ok(true), "an idle connection waits for the wakers of others");
    Ok(())
}

/// One handler holds up its poller. Meanwhile requests come on more connections than a poller looks
/// at in one round, and then the shutdown begins.
pub(crate) fn requests_that_came_before_the_shutdown_are_answered(t: &Fixture) -> Check {
    const PEERS: usize = 300;
    let (release, released) = channel();
    let released = Arc::new(Mutex::new(released));
    let (entered, has_entered) = channel();
    let server = t.spawn(t.server().pollers(1).on_request(move |mut conn| {
        let (released, entered) = (Arc::clone(&released), entered.clone());
        async move {
            let bytes = conn.next(1).await?;
            if &bytes[..] == b"!" {
                let _ = entered.send(());
                let _ = released.lock().expect("nobody panics here").recv_timeout(DEADLINE);
            }
            conn.write(bytes)?;
            conn.flush().await
        }
    }));
    let mut peers = (0..PEERS).map(|_| dial(&server)).collect::<Check<Vec<_>>>()?;
    for peer in &peers {
        assert_eq!(exchange(peer, b"?")?, b"?");
    }
    peers[0].write_all(b"!")?;
    has_entered.recv_timeout(DEADLINE)?;
    for peer in &mut peers[1..] {
        peer.write_all(b"?")?;
    }
    peers.iter().for_each(until_arrived);
    let begun = server.shutdown_begun();
    let ends = {
        let server = server.clone();
        std::thread::spawn(move || server.shutdown(DEADLINE))
    };
    block_on(async {
        begun.await;
        Ok(())
    })?;
    release.send(())?;
    ends.join().expect("does not panic")?;
    for (index, peer) in peers.iter().enumerate().skip(1) {
        assert_eq!(read_all(peer)?, b"?", "peer {index}");
    }
    assert_eq!(read_all(&peers[0])?, b"!");
    Ok(())
}

pub(crate) fn a_shutdown_ends_listeners_that_start_meanwhile(t: &Fixture) -> Check {
    for _ in 0..50 {
        let mut builder = t.server().on_request(|_| async { Ok(()) });
        for _ in 0..4 {
            builder = builder.listen("127.0.0.1:0")?;
        }
        let server = builder.build()?;
        let handle = server.handle();
        let ends = std::thread::spawn(move || handle.shutdown(DEADLINE));
        // The shutdown may come first: then the server does not start.
        let _ = server.spawn();
        ends.join().expect("does not panic")?;
    }
    Ok(())
}

pub(crate) fn a_connection_without_a_server_waits_for_no_shutdown(t: &Fixture) -> Check {
    let (conn, _peer) = t.client()?;
    let mut shutdown = conn.shutdown_begun();
    assert!(!conn.is_shutting_down() && !poll(&mut shutdown, Waker::noop()));
    conn.close();
    assert!(!conn.is_shutting_down() && !poll(&mut shutdown, Waker::noop()));
    Ok(())
}

/// The handler keeps its thread for other connections meanwhile.
pub(crate) fn a_handler_that_awaits_the_shutdown_of_its_server_gets_it_at_the_deadline(
    t: &Fixture,
) -> Check {
    let own = Arc::new(Mutex::new(None::<ServerHandle>));
    let asked = Arc::clone(&own);
    let server = t.spawn(t.server().pollers(1).on_request(move |mut conn| {
        let server = asked.lock().expect("nobody panics here").clone();
        async move {
            conn.next(1).await?;
            let (server, begun) = (server.expect("it is there before a client"), Instant::now());
            let error = server.shutdown_async(SHORT).await.expect_err("this handler is busy");
            assert!(error.is_timeout() && begun.elapsed() >= SHORT, "{error:?}");
            conn.write_copy(b"late")?;
            conn.flush().await
        }
    }));
    *own.lock().expect("nobody panics here") = Some(server.clone());
    let mut peer = dial(&server)?;
    peer.write_all(b"?")?;
    assert_eq!(read_all(&peer)?, b"late");
    own.lock().expect("nobody panics here").take();
    Ok(server.shutdown(DEADLINE)?)
}

/// The shutdown drops the handler that awaits it, and goes on.
pub(crate) fn a_handler_that_forces_the_shutdown_of_its_server_ends_it(t: &Fixture) -> Check {
    let own = Arc::new(Mutex::new(None::<ServerHandle>));
    let asked = Arc::clone(&own);
    let server = t.spawn(t.server().pollers(1).on_request(move |mut conn| {
        let server = asked.lock().expect("nobody panics here").take();
        async move {
            conn.next(1).await?;
            server.expect("one request").shutdown_forced_async(SHORT).await.map(drop)
        }
    }));
    *own.lock().expect("nobody panics here") = Some(server.clone());
    let mut peer = dial(&server)?;
    peer.write_all(b"?")?;
    eventually("it has ended", || server.has_ended());
    assert_ended(&peer);
    Ok(server.wait()?)
}
