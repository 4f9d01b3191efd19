//! Futures beside the handlers of a connection: where they run, and that they count.

use std::future::pending;
use std::io::Write;
use std::net::TcpStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use ringpoll::{Connection, Error, Mux, Result, ServerHandle};
use tokio::sync::Semaphore;

use crate::harness::*;

macro_rules! cases {
    ($tests:ident, $mount:ident) => {
        $tests! { $mount, spawning:
            spawned_futures_run_where_handlers_run
            requests_of_one_connection_are_served_side_by_side
            a_spawned_future_that_panics_or_fails_takes_nothing_down
            a_handle_spawns_from_any_thread_even_when_its_connection_is_gone
            a_shutdown_waits_for_what_was_spawned
            a_forced_shutdown_gives_up_what_was_spawned
            a_forced_shutdown_drops_what_nobody_will_wake
            a_connection_that_only_waits_for_messages_is_idle
            a_dialled_connection_has_nowhere_to_spawn
        }
    };
}
pub(crate) use cases;

/// The kind of thread that this is.
fn kind() -> String {
    let name = thread::current().name().unwrap_or_default().to_owned();
    name.trim_end_matches(|c: char| c.is_ascii_digit()).to_owned()
}

pub(crate) fn spawned_futures_run_where_handlers_run(t: &Fixture) -> Check {
    let (report, kinds) = channel();
    let server = t.spawn(t.server().on_request(move |mut conn| {
        let report = report.clone();
        async move {
            conn.next(1).await?;
            let handlers = kind();
            conn.spawn(async move {
                report.send((handlers, kind())).map_err(Error::other)?;
                // Also after a wait.
                tokio::task::yield_now().await;
                report.send((kind(), kind())).map_err(Error::other)
            })
        }
    }));
    let mut peer = dial(&server)?;
    peer.write_all(b"?")?;
    for _ in 0..2 {
        let (handlers, spawned) = kinds.recv_timeout(DEADLINE)?;
        match t.mount().placement {
            // It chooses anew for each of them.
            Placement::Auto => assert!(spawned.starts_with("ringpoll-"), "{spawned}"),
            _ => assert_eq!(spawned, handlers),
        }
    }
    eventually("it has ended", || server.stats().spawned == 0);
    Ok(())
}

/// Serves requests of one byte side by side: `w` waits for a permit, `g` gives one, `p` panics, `f`
/// fails; all others are sent back at once.
async fn serve(conn: Connection, permits: Arc<Semaphore>) -> Result<()> {
    let (mut reader, writer) = conn.split();
    let (mux, driver) = Mux::new(writer);
    reader.spawn(driver)?;
    while reader.readable().await? > 0 {
        let request = reader.next(1).await?;
        let (mux, permits) = (mux.clone(), Arc::clone(&permits));
        reader.spawn(async move {
            match request[0] {
                b'w' => permits.acquire().await.map_err(Error::other)?.forget(),
                b'g' => permits.add_permits(1),
                b'p' => panic!("{ON_PURPOSE}"),
                b'f' => return Err(Error::other("on purpose")),
                _ => {}
            }
            mux.send(request).await
        })?;
    }
    Ok(())
}

/// What a server has reported.
type Reported = Arc<Mutex<Vec<String>>>;

/// A server of such requests, what it reports of failures, and a client.
fn serving(t: &Fixture) -> Check<(ServerHandle, Reported, TcpStream)> {
    let permits = Arc::new(Semaphore::new(0));
    let reported = Reported::default();
    let reports = Arc::clone(&reported);
    let builder = t.server().on_error(move |_, error| {
        reports.lock().expect("nobody panics here").push(error.to_string());
    });
    let server = t.spawn(builder.on_connect(move |conn| serve(conn, Arc::clone(&permits))));
    let peer = dial(&server)?;
    Ok((server, reported, peer))
}

pub(crate) fn requests_of_one_connection_are_served_side_by_side(t: &Fixture) -> Check {
    let (server, reported, mut peer) = serving(t)?;
    for _ in 0..20 {
        // Served one after the other, the first would wait for ever.
        peer.write_all(b"wwe")?;
        assert_eq!(read_exactly(&peer, 1)?, b"e");
        peer.write_all(b"gg")?;
        let mut replies = read_exactly(&peer, 4)?;
        replies.sort_unstable();
        assert_eq!(replies, b"ggww");
    }
    drop(peer);
    eventually("it ends with its peer", || server.stats().open == 0);
    // A future ends a little later than its reply is sent.
    eventually("all futures have ended", || server.stats().spawned == 0);
    assert!(reported.lock().expect("nobody panics here").is_empty());
    Ok(())
}

pub(crate) fn a_spawned_future_that_panics_or_fails_takes_nothing_down(t: &Fixture) -> Check {
    let (server, reported, mut peer) = serving(t)?;
    peer.write_all(b"pfp")?;
    eventually("all are reported", || reported.lock().expect("nobody panics here").len() == 3);
    // The connection, the mux and the threads are as they were.
    assert_eq!(exchange(&peer, b"e")?, b"e");
    assert_eq!(exchange(&dial(&server)?, b"e")?, b"e");
    let stats = server.stats();
    assert_eq!((stats.handler_panics, stats.handler_errors), (2, 1));
    let mut reported = reported.lock().expect("nobody panics here").clone();
    reported.sort();
    let panicked = format!("spawned future panicked: {ON_PURPOSE}");
    assert_eq!(reported, ["on purpose", &panicked, &panicked]);
    Ok(())
}

pub(crate) fn a_handle_spawns_from_any_thread_even_when_its_connection_is_gone(
    t: &Fixture,
) -> Check {
    let (sender, handles) = channel();
    let builder =
        t.server().on_prepare(move |handle| sender.send(handle.clone()).map_err(Error::other));
    let server = t.spawn(builder.on_request(echo));
    let peer = dial(&server)?;
    assert_eq!(exchange(&peer, b"here")?, b"here");
    let handle = handles.recv_timeout(DEADLINE)?;
    for is_gone in [false, true] {
        let (report, ran) = outcome();
        handle.spawn(async move {
            tell(report, Ok(()));
            Ok(())
        })?;
        ran.wait();
        if !is_gone {
            peer.shutdown(std::net::Shutdown::Both)?;
            eventually("it is gone", || server.stats().open == 0);
        }
    }
    Ok(())
}

/// A server that has spawned a future which waits for the returned permits, for a connection that
/// is gone; how many such futures have come to their end.
fn waiting(t: &Fixture) -> Check<(ServerHandle, Arc<Semaphore>, Arc<AtomicUsize>)> {
    let (permits, ended) = (Arc::new(Semaphore::new(0)), Arc::new(AtomicUsize::new(0)));
    let (waits, counts) = (Arc::clone(&permits), Arc::clone(&ended));
    let server = t.spawn(t.server().on_request(move |mut conn| {
        let (permits, ended) = (Arc::clone(&waits), Arc::clone(&counts));
        async move {
            conn.next(1).await?;
            conn.spawn(async move {
                permits.acquire().await.map_err(Error::other)?.forget();
                ended.fetch_add(1, Ordering::SeqCst);
                Ok(())
            })?;
            conn.write_copy(b"!")?;
            conn.flush().await
        }
    }));
    let peer = dial(&server)?;
    assert_eq!(exchange(&peer, b"?")?, b"!");
    drop(peer);
    eventually("the connection is gone", || server.stats().open == 0);
    assert_eq!(server.stats().spawned, 1);
    Ok((server, permits, ended))
}

pub(crate) fn a_shutdown_waits_for_what_was_spawned(t: &Fixture) -> Check {
    let (server, permits, ended) = waiting(t)?;
    let error = server.shutdown(Duration::from_millis(50)).expect_err("it waits");
    assert!(error.is_timeout() && error.to_string().contains("1 spawned"), "{error}");
    let ending = {
        let server = server.clone();
        on_thread(move || Ok(server.shutdown(DEADLINE)?))
    };
    ending.assert_pending();
    permits.add_permits(1);
    ending.wait();
    assert_eq!(ended.load(Ordering::SeqCst), 1);
    assert_eq!(server.stats().spawned, 0);
    Ok(())
}

pub(crate) fn a_forced_shutdown_gives_up_what_was_spawned(t: &Fixture) -> Check {
    let (server, permits, ended) = waiting(t)?;
    server.shutdown_forced(Duration::ZERO)?;
    permits.add_permits(1);
    eventually("it is gone", || server.stats().spawned == 0);
    // A runtime outlives the server, and what runs there goes on. Other threads may be on their way
    // out, or out.
    let goes_on = t.mount().placement == Placement::Tokio;
    assert!(!goes_on || ended.load(Ordering::SeqCst) == 1);
    Ok(())
}

/// A future whose waker nobody has, such as `pending`, is not lost: it holds its connection until
/// the server ends.
pub(crate) fn a_forced_shutdown_drops_what_nobody_will_wake(t: &Fixture) -> Check {
    if t.mount().placement == Placement::Tokio {
        return skip("what nobody will wake", "a runtime outlives the server, and so do its tasks");
    }
    let dropped = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&dropped);
    let server = t.spawn(t.server().on_request(move |mut conn| {
        let (spawned, run) = (Counts(Arc::clone(&counted)), Counts(Arc::clone(&counted)));
        async move {
            conn.next(1).await?;
            conn.spawn(async move {
                let _spawned = spawned;
                pending().await
            })?;
            conn.write("!")?;
            conn.flush().await?;
            let _run = run;
            pending().await
        }
    }));
    let peer = dial(&server)?;
    assert_eq!(exchange(&peer, b"?")?, b"!");
    thread::sleep(Duration::from_millis(50));
    assert_eq!((server.stats().open, server.stats().spawned), (1, 1));
    assert_eq!(dropped.load(Ordering::SeqCst), 0);
    server.shutdown_forced(Duration::ZERO)?;
    assert_eq!(dropped.load(Ordering::SeqCst), 2);
    assert_eq!((server.stats().open, server.stats().spawned), (0, 0));
    assert_ended(&peer);
    Ok(())
}

/// Counts how often it is dropped.
struct Counts(Arc<AtomicUsize>);

impl Drop for Counts {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

/// A driver that waits is no handler that computes, awaited or spawned.
pub(crate) fn a_connection_that_only_waits_for_messages_is_idle(t: &Fixture) -> Check {
    for is_spawned in [false, true] {
        let (sender, muxes) = channel();
        let builder = t.server().idle_timeout(Duration::from_millis(30));
        let server = t.spawn(builder.on_connect(move |conn| {
            let (mut reader, writer) = conn.split();
            let (mux, driver) = Mux::new(writer);
            let sent = sender.send(mux).map_err(Error::other);
            async move {
                sent?;
                if !is_spawned {
                    return driver.await;
                }
                reader.spawn(driver)?;
                reader.readable().await.map(drop)
            }
        }));
        let peer = dial(&server)?;
        let mux = muxes.recv_timeout(DEADLINE)?;
        assert_eq!(read_all(&peer)?, b"");
        eventually("its driver has noticed", || server.stats().open == 0);
        let error = block_on(async { Ok(mux.close().await) })?.expect_err("it was closed");
        assert!(error.is_closed(), "{error:?}");
    }
    Ok(())
}

pub(crate) fn a_dialled_connection_has_nowhere_to_spawn(t: &Fixture) -> Check {
    let (conn, _peer) = t.client()?;
    let error = conn.spawn(async { Ok(()) }).expect_err("there is no server");
    assert!(error.is_unsupported(), "{error:?}");
    Ok(())
}
