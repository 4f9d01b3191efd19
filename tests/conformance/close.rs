//! Closing: from either side, from any thread, at any moment, once.

use std::io::Write;
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Barrier};
use std::thread;

use ringpoll::buffer::Reader;
use ringpoll::{Connection, Detached, Error, Handle, Result};

use crate::harness::*;

macro_rules! cases {
    ($tests:ident, $mount:ident) => {
        $tests! { $mount, close:
            every_method_after_a_close_reports_closed
            the_peers_close_turns_is_active_false_without_a_read
            a_reset_turns_is_active_false_without_a_read
            a_close_wakes_a_waiting_read
            a_close_wakes_a_waiting_flush
            a_close_wakes_both_halves
            many_threads_closing_close_once
            a_close_never_hits_an_fd_of_somebody_else
            the_peers_close_is_eof
            a_reset_is_an_error_that_is_closed
            a_detached_socket_works_and_brings_its_unread_bytes
            detaching_does_not_close_and_flushes_nothing_away
            close_callbacks_run_last_in_first_out_with_the_fd_valid
            a_close_callback_added_after_the_close_runs_at_once
            unread_input_at_close_leaves_slices_alone
            unflushed_bytes_are_dropped_by_a_close
            an_abort_resets_the_peer_and_drops_unsent_output
            an_abort_after_a_close_does_not_wait_for_the_peer
            a_half_closed_peer_still_gets_the_full_answer
            handle_calls_after_the_close_are_harmless
            closing_inside_a_close_callback_is_harmless
            a_handle_that_is_kept_keeps_no_memory
        }
    };
}
pub(crate) use cases;

/// Runs `$call` and fails unless it reports a closed connection.
macro_rules! assert_closed {
    ($call:expr) => {
        match $call {
            Err(error) => assert!(error.is_closed(), "{}: {error:?}", stringify!($call)),
            Ok(_) => panic!("{}: worked on a closed connection", stringify!($call)),
        }
    };
}

pub(crate) fn every_method_after_a_close_reports_closed(t: &Fixture) -> Check {
    let (peer, done) = t.drive(|mut conn| async move {
        conn.close();
        assert_closed!(conn.write(vec![1; 10]));
        assert_closed!(conn.write(vec![1; 10_000]));
        assert_closed!(conn.write_copy(b"late"));
        assert_closed!(conn.reserve(10).map(|_| ()));
        assert_closed!(conn.commit(1));
        assert_closed!(conn.insert(&b"late"[..], 0));
        assert_closed!(conn.append(ringpoll::LinkBuffer::new()));
        assert_closed!(conn.submit());
        assert_closed!(conn.flush().await);
        assert_closed!(conn.shutdown_write().await);
        assert_closed!(conn.next(1).await);
        assert_closed!(conn.peek(1).await);
        assert_closed!(conn.skip(1).await);
        assert_closed!(conn.until(b'\n').await);
        assert_closed!(conn.read(&mut [0]).await);
        assert_closed!(conn.readable().await);
        assert_closed!(conn.read_exact(&mut [0]).await);
        assert_closed!(conn.read_byte().await);
        assert_closed!(conn.slice(1).await);
        assert!(conn.try_next(1).is_none());
        assert!(conn.is_closed() && !conn.is_active());
        Ok(())
    })?;
    done.wait();
    assert_ended(&peer);
    Ok(())
}

/// A handle of a connection whose owner waits in `next(1)`, the peer, and the error that ends it.
fn reading(t: &Fixture) -> Check<(Handle, TcpStream, Outcome<Error>)> {
    let (sends, sent) = outcome();
    let (peer, ended) = t.drive(|mut conn| async move {
        tell(sends, Ok((*conn).clone()));
        Ok(conn.next(1).await.expect_err("nothing is ever sent"))
    })?;
    Ok((sent.wait(), peer, ended))
}

/// A connection handed out of its handler to the test, and the peer.
fn handed_out(t: &Fixture) -> Check<(Connection, TcpStream)> {
    let (peer, conn) = t.drive(|conn| async move { Ok(conn) })?;
    Ok((conn.wait(), peer))
}

/// Connection pools ask `is_active` before they lend a connection out.
pub(crate) fn the_peers_close_turns_is_active_false_without_a_read(t: &Fixture) -> Check {
    let (conn, peer) = handed_out(t)?;
    assert!(conn.is_active() && !conn.is_closed());
    drop(peer);
    eventually("the close is noticed", || !conn.is_active());
    let (conn, mut peer) = handed_out(t)?;
    peer.write_all(b"unread")?;
    drop(peer);
    eventually("the close behind unread bytes is noticed", || !conn.is_active());
    assert_eq!(conn.stats().unread_bytes, 6);
    Ok(())
}

/// The same for a reset.
pub(crate) fn a_reset_turns_is_active_false_without_a_read(t: &Fixture) -> Check {
    let (conn, peer) = handed_out(t)?;
    reset(peer)?;
    eventually("the reset is noticed", || !conn.is_active());
    Ok(())
}

pub(crate) fn a_close_wakes_a_waiting_read(t: &Fixture) -> Check {
    let (handle, peer, ended) = reading(t)?;
    ended.assert_pending();
    handle.close();
    let error = ended.wait();
    assert!(error.is_closed() && !error.is_eof(), "{error:?}");
    assert_ended(&peer);
    Ok(())
}

pub(crate) fn a_close_wakes_a_waiting_flush(t: &Fixture) -> Check {
    let (sends, sent) = outcome();
    let (peer, ended) = t.drive(|mut conn| async move {
        // More than the kernel takes, so that it is the flush that waits.
        conn.write(vec![7; 16 << 20])?;
        tell(sends, Ok((*conn).clone()));
        Ok(conn.flush().await.expect_err("nobody reads"))
    })?;
    let handle = sent.wait();
    eventually("the flush waits", || handle.stats().unsent_bytes > 0);
    ended.assert_pending();
    handle.close();
    let error = ended.wait();
    assert!(error.is_closed(), "{error:?}");
    eventually("its memory is free", || t.stats().blocks == 0);
    drop(peer);
    Ok(())
}

/// A close wakes reads and flushes alike.
pub(crate) fn a_close_wakes_both_halves(t: &Fixture) -> Check {
    let (conn, peer) = handed_out(t)?;
    let handle = (*conn).clone();
    let (mut reader, mut writer) = conn.split();
    let read = runtime().spawn(async move { reader.next(1).await.map(|_| ()) });
    let write = runtime().spawn(async move {
        loop {
            writer.write(vec![7; 1 << 20])?;
            writer.flush().await?;
        }
    });
    eventually("the flush waits", || handle.stats().unsent_bytes > 0);
    handle.close();
    let (read, write): (_, Result<()>) = block_on(async { Ok((read.await?, write.await?)) })?;
    assert_closed!(read);
    assert_closed!(write);
    drop(peer);
    Ok(())
}

pub(crate) fn many_threads_closing_close_once(t: &Fixture) -> Check {
    for _ in 0..20 {
        let (handle, peer, ended) = reading(t)?;
        let count = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&count);
        handle.on_close(move |_| {
            counted.fetch_add(1, Ordering::SeqCst);
        });
        let start = Barrier::new(8);
        thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    start.wait();
                    handle.close();
                });
            }
        });
        assert!(handle.is_closed());
        assert!(ended.wait().is_closed());
        assert_ended(&peer);
        eventually("the callback runs", || count.load(Ordering::SeqCst) == 1);
        handle.close();
        assert_eq!(count.load(Ordering::SeqCst), 1, "the callback ran again");
    }
    Ok(())
}

/// The fd is closed once: a second close would hit a number that is in use again.
pub(crate) fn a_close_never_hits_an_fd_of_somebody_else(t: &Fixture) -> Check {
    for _ in 0..50 {
        let (conn, peer) = t.client()?;
        let handle = (*conn).clone();
        let closing = handle.clone();
        let closers = [closing.clone(), closing].map(|handle| {
            on_thread(move || {
                handle.close();
                Ok(())
            })
        });
        drop(conn);
        // New files take the numbers that become free while the others close.
        let files: Vec<_> =
            (0..20).map(|_| tempfile::tempfile()).collect::<std::io::Result<_>>()?;
        for closer in closers {
            closer.wait();
        }
        handle.close();
        assert_ended(&peer);
        for file in &files {
            assert!(file.metadata().is_ok(), "fd {} was closed under us", file.as_raw_fd());
        }
    }
    Ok(())
}

pub(crate) fn the_peers_close_is_eof(t: &Fixture) -> Check {
    let (_, peer, ended) = reading(t)?;
    drop(peer);
    let error = ended.wait();
    assert!(error.is_eof() && error.is_closed() && !error.is_timeout(), "{error:?}");
    Ok(())
}

/// A reset is not an orderly end: it must not look like EOF.
pub(crate) fn a_reset_is_an_error_that_is_closed(t: &Fixture) -> Check {
    let (_, peer, ended) = reading(t)?;
    reset(peer)?;
    let error = ended.wait();
    assert!(error.is_closed() && !error.is_eof(), "{error:?}");
    assert_eq!(error.raw_os_error(), Some(libc::ECONNRESET), "{error:?}");
    Ok(())
}

pub(crate) fn a_detached_socket_works_and_brings_its_unread_bytes(t: &Fixture) -> Check {
    let (sends, sent) = outcome();
    let (mut peer, detached) = t.drive(|mut conn| async move {
        conn.next(5).await?;
        conn.peek(7).await?;
        tell(sends, Ok((*conn).clone()));
        Ok(conn.detach().await?)
    })?;
    peer.write_all(b"taken unread!")?;
    let Detached { fd, mut unread, .. } = detached.wait();
    let handle = sent.wait();
    let mut plain = TcpStream::from(fd);
    plain.set_nonblocking(false)?;
    bound(&plain)?;
    // What had arrived is in the buffer, what had not is in the socket; nothing is in neither.
    let mut got = vec![0; unread.len()];
    assert_eq!(Reader::read(&mut unread, &mut got)?, got.len());
    assert!(got.len() >= 7, "the peeked bytes are lost");
    got.extend(read_exactly(&plain, 8 - got.len())?);
    assert_eq!(got, b" unread!");
    peer.write_all(b"ping")?;
    assert_eq!(read_exactly(&plain, 4)?, b"ping");
    plain.write_all(b"pong")?;
    assert_eq!(read_exactly(&peer, 4)?, b"pong");
    handle.close();
    assert_eq!(exchange_back(&plain, &peer)?, b"still open");
    Ok(())
}

fn exchange_back(mut from: &TcpStream, to: &TcpStream) -> Check<Vec<u8>> {
    from.write_all(b"still open")?;
    Ok(read_exactly(to, 10)?)
}

/// Output that was submitted before the detach is not cut off.
pub(crate) fn detaching_does_not_close_and_flushes_nothing_away(t: &Fixture) -> Check {
    const SIZE: usize = 8 << 20;
    let (peer, detached) = t.drive(|mut conn| async move {
        conn.write(pattern(0, SIZE))?;
        conn.submit()?;
        Ok(conn.detach().await?)
    })?;
    assert_pattern(&read_exactly(&peer, SIZE)?, 0);
    let Detached { fd, unread, .. } = detached.wait();
    assert_eq!(unread.len(), 0);
    let plain = TcpStream::from(fd);
    plain.set_nonblocking(false)?;
    assert_eq!(exchange_back(&plain, &peer)?, b"still open");
    Ok(())
}

pub(crate) fn close_callbacks_run_last_in_first_out_with_the_fd_valid(t: &Fixture) -> Check {
    let (handle, peer, ended) = reading(t)?;
    let (log, seen) = channel();
    for index in 0..3 {
        let log = log.clone();
        handle.on_close(move |handle| {
            let named = handle.with_fd(|fd| rustix::net::getsockname(fd).is_ok());
            let valid = named.unwrap_or(false) && handle.local_addr().is_ok();
            log.send((index, valid)).expect("the test listens");
        });
    }
    drop(peer);
    assert!(ended.wait().is_eof());
    // A client's connection closes when it is dropped, a server's when its peer is gone: both now.
    let calls: Vec<_> =
        (0..3).map(|_| seen.recv_timeout(DEADLINE)).collect::<std::result::Result<_, _>>()?;
    let order: Vec<_> = calls.iter().map(|(index, _)| *index).collect();
    assert_eq!(order, [2, 1, 0]);
    assert!(calls.iter().all(|(_, valid)| *valid), "the fd was not valid in a callback: {calls:?}");
    Ok(())
}

/// At the latest moment it runs on the caller, before `on_close` returns.
pub(crate) fn a_close_callback_added_after_the_close_runs_at_once(t: &Fixture) -> Check {
    let (handle, peer, ended) = reading(t)?;
    handle.close();
    ended.wait();
    assert_ended(&peer);
    eventually("the fd is gone", || handle.with_fd(|_| ()).is_err());
    let caller = thread::current().id();
    let (log, seen) = channel();
    handle.on_close(move |_| log.send(thread::current().id()).expect("the test listens"));
    assert_eq!(seen.try_recv()?, caller);
    Ok(())
}

/// A block with unread bytes is not reused while a slice of it exists.
pub(crate) fn unread_input_at_close_leaves_slices_alone(t: &Fixture) -> Check {
    let mut held = Vec::new();
    for round in 0..10 {
        let (mut peer, slice) = t.drive(|mut conn| async move {
            let slice = conn.next(1000).await?;
            conn.peek(1).await?;
            conn.close();
            Ok(slice)
        })?;
        peer.write_all(&pattern(round * 7, 5000))?;
        held.push(slice.wait());
        assert_ended(&peer);
    }
    // Sends other bytes through the blocks that were returned.
    let server = t.echo_server();
    for _ in 0..10 {
        exchange(&dial(&server)?, &[0xee; 5000])?;
    }
    for (round, slice) in held.iter().enumerate() {
        assert_pattern(slice, round * 7);
    }
    Ok(())
}

/// Close drops what was not flushed.
pub(crate) fn unflushed_bytes_are_dropped_by_a_close(t: &Fixture) -> Check {
    let (peer, done) = t.drive(|mut conn| async move {
        conn.write_copy(b"kept")?;
        conn.flush().await?;
        conn.write_copy(b"dropped")?;
        conn.close();
        Ok(())
    })?;
    done.wait();
    assert_eq!(read_all(&peer)?, b"kept");
    Ok(())
}

pub(crate) fn a_half_closed_peer_still_gets_the_full_answer(t: &Fixture) -> Check {
    const ANSWER: usize = 8 << 20;
    let (mut peer, done) = t.drive(|mut conn| async move {
        assert_eq!(conn.until(b'\n').await?[..], b"all of it\n"[..]);
        assert_eq!(conn.read(&mut [0; 8]).await?, 0);
        // EPOLLRDHUP has long been reported; the write side is still open.
        for at in (0..ANSWER).step_by(1 << 16) {
            conn.write(pattern(at, 1 << 16))?;
            conn.flush().await?;
        }
        Ok(())
    })?;
    peer.write_all(b"all of it\n")?;
    peer.shutdown(Shutdown::Write)?;
    let answer = read_all(&peer)?;
    assert_eq!(answer.len(), ANSWER);
    assert_pattern(&answer, 0);
    done.wait();
    Ok(())
}

/// A handle outlives its connection, and says so.
pub(crate) fn handle_calls_after_the_close_are_harmless(t: &Fixture) -> Check {
    let (handle, peer, ended) = reading(t)?;
    let addr = handle.peer_addr();
    assert_eq!(addr.as_inet(), Some(peer.local_addr()?));
    assert_eq!(handle.local_addr()?.as_inet(), Some(peer.peer_addr()?));
    handle.close();
    ended.wait();
    assert_ended(&peer);
    eventually("the fd is gone", || handle.with_fd(|_| ()).is_err());
    handle.close();
    assert!(handle.is_closed() && !handle.is_active());
    assert_eq!(handle.peer_addr(), addr);
    handle.set_read_timeout(Some(DEADLINE));
    handle.set_deadline(None);
    handle.set_context(5_u8);
    assert_eq!(handle.context::<u8>().as_deref(), Some(&5));
    assert_closed!(handle.with_fd(|_| ()));
    Ok(())
}

/// Close is idempotent, also from inside its own callback.
pub(crate) fn closing_inside_a_close_callback_is_harmless(t: &Fixture) -> Check {
    let (handle, peer, ended) = reading(t)?;
    let (log, seen) = channel();
    handle.on_close(move |handle| {
        handle.close();
        log.send(handle.is_closed()).expect("the test listens");
    });
    handle.close();
    assert!(seen.recv_timeout(DEADLINE)?);
    ended.wait();
    assert_ended(&peer);
    Ok(())
}

/// A handle outlives its connection in many a registry; what was unread or unsent does not.
pub(crate) fn a_handle_that_is_kept_keeps_no_memory(t: &Fixture) -> Check {
    let mut handles = Vec::new();
    for keeps in 0..4 {
        let (sends, sent) = outcome();
        let (mut peer, done) = t.drive(move |mut conn| async move {
            tell(sends, Ok((*conn).clone()));
            let frame = conn.next(5000).await?;
            if keeps & 1 != 0 {
                // Part of what came is not read.
                conn.peek(1000).await?;
            }
            if keeps & 2 != 0 {
                // What is written is not sent, before the close or after it.
                conn.write(frame)?;
                conn.write_copy(b"and more")?;
            }
            conn.close();
            assert!(conn.flush().await.is_err_and(|error| error.is_closed()));
            Ok(())
        })?;
        peer.write_all(&pattern(0, 10_000))?;
        handles.push(sent.wait());
        done.wait();
        let is_free = holds_within(DEADLINE, || t.stats().blocks == 0);
        assert!(is_free, "{} blocks are kept, case {keeps}", t.stats().blocks);
    }
    Ok(())
}

/// More than the kernel takes for a peer that does not read.
const TOO_MUCH: usize = 32 << 20;

/// A connection with unsent output, and its peer.
fn with_unsent_output(t: &Fixture) -> Check<(Handle, TcpStream, Outcome<Error>)> {
    let (sends, sent) = outcome();
    let (peer, ended) = t.drive(|mut conn| async move {
        tell(sends, Ok((*conn).clone()));
        conn.write(pattern(0, TOO_MUCH))?;
        Ok(conn.flush().await.expect_err("the peer does not read"))
    })?;
    let handle: Handle = sent.wait();
    eventually("the output is stuck", || handle.stats().unsent_bytes > 0);
    Ok((handle, peer, ended))
}

/// Reads until the peer sees a reset. Returns how many bytes came before.
#[track_caller]
fn read_until_reset(mut peer: &TcpStream) -> usize {
    let mut rest = Vec::new();
    let error = std::io::Read::read_to_end(&mut peer, &mut rest).expect_err("a reset, not an end");
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "{error}");
    assert_pattern(&rest, 0);
    rest.len()
}

pub(crate) fn an_abort_resets_the_peer_and_drops_unsent_output(t: &Fixture) -> Check {
    let (handle, peer, ended) = with_unsent_output(t)?;
    handle.abort();
    handle.abort();
    let error = ended.wait();
    assert!(error.is_closed(), "{error:?}");
    assert!(handle.is_closed() && !handle.is_active());
    assert!(read_until_reset(&peer) < TOO_MUCH, "all was sent");
    eventually("the descriptor closes", || handle.with_fd(|_| ()).is_err());
    Ok(())
}

/// The close waits for the peer to take the output, and the abort ends that.
pub(crate) fn an_abort_after_a_close_does_not_wait_for_the_peer(t: &Fixture) -> Check {
    let (handle, peer, ended) = with_unsent_output(t)?;
    handle.close();
    assert!(ended.wait().is_closed());
    assert!(handle.with_fd(|_| ()).is_ok(), "output is unsent, and the descriptor has closed");
    handle.abort();
    eventually("the descriptor closes", || handle.with_fd(|_| ()).is_err());
    assert!(read_until_reset(&peer) < TOO_MUCH, "all was sent");
    Ok(())
}
