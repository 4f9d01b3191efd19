//! Races: what must hold when two sides act at the same moment.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::sync::Barrier;
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant};

use ringpoll::Error;

use crate::harness::*;

macro_rules! cases {
    ($tests:ident, $mount:ident) => {
        $tests! { $mount, races:
            random_closes_against_traffic_leave_nothing
            a_borrowed_fd_stays_open_while_it_is_used
            handle_calls_from_many_threads_race_with_the_close
            writing_to_a_peer_that_is_gone_ends_in_a_closed_error
            a_half_kept_elsewhere_learns_that_its_handler_failed
            deadlines_moved_by_many_threads_neither_fire_early_nor_get_lost
            submits_that_race_with_the_attachment_keep_their_order
        }
    };
}
pub(crate) use cases;

/// Fix row 1: closes, from both sides and at random moments, against reads and flushes.
pub(crate) fn random_closes_against_traffic_leave_nothing(t: &Fixture) -> Check {
    let mut random = t.random();
    for _ in 0..100 {
        let (sends, sent) = outcome();
        let (mut peer, ended) = t.drive(|mut conn| async move {
            tell(sends, Ok((*conn).clone()));
            loop {
                // Every end must be a closed error. A wrong byte is detected at this place only.
                let step = async {
                    let bytes = conn.next(1000).await?;
                    assert_pattern(&bytes, 0);
                    conn.write(bytes)?;
                    conn.flush().await
                };
                if let Err(error) = step.await {
                    assert!(error.is_closed(), "{error:?}");
                    return Ok(());
                }
            }
        })?;
        let handle = sent.wait();
        let (spins, how) = (random.within(1..20_000), random.within(0..4));
        let closer = on_thread(move || {
            for _ in 0..spins {
                std::hint::spin_loop();
            }
            if how < 2 {
                handle.close();
            }
            Ok(())
        });
        for _ in 0..random.within(1..20) {
            if peer.write_all(&pattern(0, 1000)).is_err() || peer.read(&mut [0; 700]).is_err() {
                break;
            }
        }
        match how {
            2 => reset(peer)?,
            _ => drop(peer),
        }
        closer.wait();
        ended.wait();
    }
    Ok(())
}

/// A `BorrowedFd` stays valid while it is borrowed, even if the connection is closed meanwhile.
pub(crate) fn a_borrowed_fd_stays_open_while_it_is_used(t: &Fixture) -> Check {
    let (peer, handed) = t.drive(|conn| async move { Ok(conn) })?;
    let conn = handed.wait();
    let name = conn.local_addr()?.as_inet();
    let handle = (*conn).clone();
    let (closed, when_closed) = channel();
    let (borrows, borrowed) = outcome();
    let using = on_thread(move || {
        handle.with_fd(|fd| {
            tell(borrows, Ok(()));
            when_closed.recv_timeout(DEADLINE)?;
            let name = rustix::net::getsockname(fd)?;
            Ok(std::net::SocketAddr::try_from(name)?)
        })?
    });
    borrowed.wait();
    conn.close();
    drop(conn);
    assert_ended(&peer);
    // Whatever takes the number of a closed fd would be seen instead.
    let files: Vec<_> = (0..10).map(|_| tempfile::tempfile()).collect::<std::io::Result<_>>()?;
    closed.send(())?;
    assert_eq!(Some(using.wait()), name);
    drop(files);
    Ok(())
}

/// Every method of a handle, from four threads, while the connection lives and ends.
pub(crate) fn handle_calls_from_many_threads_race_with_the_close(t: &Fixture) -> Check {
    let mut random = t.random();
    for _ in 0..20 {
        let (peer, handed) = t.drive(|conn| async move { Ok(conn) })?;
        let conn = handed.wait();
        let start = Barrier::new(5);
        let spins = random.within(1..5000);
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    start.wait();
                    for round in 0..50_u32 {
                        conn.set_read_deadline(Some(Instant::now() + DEADLINE));
                        conn.set_write_timeout(Some(DEADLINE));
                        conn.set_idle_timeout(Some(DEADLINE));
                        conn.on_close(|_| {});
                        conn.set_context(round);
                        assert!(conn.context::<u32>().is_some());
                        // Either is right; what it must not be is another socket's.
                        if let Ok(addr) = conn.local_addr() {
                            assert_eq!(addr.as_inet(), peer.peer_addr().ok());
                        }
                        assert_eq!(conn.stats().unsent_bytes, 0);
                    }
                });
            }
            start.wait();
            for _ in 0..spins {
                std::hint::spin_loop();
            }
            conn.close();
        });
        drop(conn);
        assert_ended(&peer);
    }
    Ok(())
}

/// EPIPE or ECONNRESET, and no SIGPIPE.
pub(crate) fn writing_to_a_peer_that_is_gone_ends_in_a_closed_error(t: &Fixture) -> Check {
    for by_reset in [false, true] {
        let (peer, handed) = t.drive(|conn| async move { Ok(conn) })?;
        let mut conn = handed.wait();
        if by_reset {
            reset(peer)?;
        } else {
            drop(peer);
        }
        let error = block_on(async {
            loop {
                // The first bytes after a close may still be taken by the kernel.
                let written = conn.write_copy(b"anybody there?");
                if let Err(error) = written.and(conn.flush().await) {
                    return Ok(error);
                }
                tokio::task::yield_now().await;
            }
        })?;
        assert!(error.is_closed() && !error.is_timeout(), "{error:?}");
    }
    Ok(())
}

/// A task still holds half of the connection.
pub(crate) fn a_half_kept_elsewhere_learns_that_its_handler_failed(t: &Fixture) -> Check {
    let (report, learned) = channel();
    let server = t.spawn(t.server().on_request(move |conn| {
        let report = report.clone();
        async move {
            let (mut reader, writer) = conn.split();
            reader.next(1).await?;
            runtime().spawn(async move {
                let error = reader.next(1).await.expect_err("the connection is closed");
                report.send(error).map_err(Failure::from)
            });
            drop(writer);
            Err(Error::other("told to fail"))
        }
    }));
    let mut peer = dial(&server)?;
    peer.write_all(b"x")?;
    let error = learned.recv_timeout(DEADLINE)?;
    assert!(error.is_closed() && !error.is_eof(), "{error:?}");
    assert_ended(&peer);
    Ok(())
}

/// The deadline that was set last counts.
pub(crate) fn deadlines_moved_by_many_threads_neither_fire_early_nor_get_lost(
    t: &Fixture,
) -> Check {
    for _ in 0..10 {
        let (sends, sent) = outcome();
        let (peer, ended) = t.drive(|mut conn| async move {
            tell(sends, Ok((*conn).clone()));
            let error = conn.next(1).await.expect_err("nothing comes");
            Ok((error, Instant::now()))
        })?;
        let handle = sent.wait();
        thread::scope(|scope| {
            for thread in 1..4_u32 {
                let handle = &handle;
                scope.spawn(move || {
                    for round in 0..200_u32 {
                        let far = DEADLINE * (1 + (round * thread) % 7);
                        handle.set_read_deadline(Some(Instant::now() + far));
                    }
                });
            }
        });
        ended.assert_pending();
        let last = Instant::now() + DEADLINE / 500;
        handle.set_read_deadline(Some(last));
        let (error, at) = ended.wait();
        assert!(error.is_read_timeout(), "{error:?}");
        assert!(at >= last, "early by {:?}", last - at);
        peer.shutdown(Shutdown::Both)?;
    }
    Ok(())
}

/// An adopted connection can be written to before its poller has given it a slot.
pub(crate) fn submits_that_race_with_the_attachment_keep_their_order(t: &Fixture) -> Check {
    const ROUNDS: usize = 2000;
    // The kernel takes the front of a piece, so all others have to wait.
    const PIECE: usize = 100_000;
    let bytes = pattern(0, 3 * PIECE);
    let mut random = t.random();
    for _ in 0..ROUNDS {
        let (ours, theirs) = tcp_pair()?;
        let mut conn = t.dialer().adopt(ours.into())?;
        shrink_send_buffer(&conn)?;
        // The poller wakes up meanwhile.
        let (begun, pause) = (Instant::now(), Duration::from_micros(random.within(0..80) as u64));
        while begun.elapsed() < pause {
            std::hint::spin_loop();
        }
        for piece in bytes.chunks(PIECE) {
            conn.write_copy(piece)?;
            conn.submit()?;
        }
        conn.close();
        assert!(read_all(&theirs)? == bytes, "the stream is not what was submitted");
    }
    Ok(())
}
