//! `read_buf`: a reader that receives from the socket straight into the memory of its user.

use std::future::poll_fn;
use std::io::Write;
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::Poll;
use std::time::Duration;

use ringpoll::{Backend, Connection, Error, Result};

use crate::harness::*;

macro_rules! cases {
    ($tests:ident, $mount:ident) => {
        $tests! { $mount, direct:
            a_stream_comes_whole_into_memory_of_the_user
            all_kinds_of_reads_take_one_stream_in_order
            buffers_without_room_and_small_ones_are_taken_as_they_are
            small_messages_after_a_stream_come_through_the_poller
            the_end_is_an_end_and_a_reset_is_an_error
            a_wait_ends_with_its_timeout_and_continues_after_it
            a_close_ends_the_wait
            the_next_run_gets_what_a_direct_reader_left
            one_stream_does_not_hold_up_its_poller
            a_half_reads_as_the_connection_does
            a_writing_half_that_goes_disturbs_no_reader
            a_read_that_is_dropped_waits_no_longer
            a_poll_that_is_given_up_loses_nothing
            urgent_bytes_stop_no_stream
        }
    };
}
pub(crate) use cases;

const ROOM: usize = 128 << 10;
const STREAM_BYTES: usize = 8 << 20;

/// Sends on a thread of its own. Ends the stream afterwards.
fn send(peer: &TcpStream, bytes: Vec<u8>) -> Check<Outcome<()>> {
    let mut peer = peer.try_clone()?;
    Ok(on_thread(move || {
        peer.write_all(&bytes)?;
        Ok(peer.shutdown(Shutdown::Write)?)
    }))
}

/// Reads to the end of the stream with much room. Returns all bytes.
async fn read_to_end(conn: &mut Connection) -> Result<Vec<u8>> {
    let mut all = Vec::new();
    let mut buffer = Vec::with_capacity(ROOM);
    while conn.read_buf(&mut buffer).await? > 0 {
        all.append(&mut buffer);
        buffer.reserve(ROOM);
    }
    Ok(all)
}

/// Reads with much room until `bytes` have come, as many as the peer sends.
async fn read_directly(conn: &mut Connection, bytes: usize) -> Result<Vec<u8>> {
    let (mut all, mut buffer) = (Vec::new(), Vec::with_capacity(ROOM));
    while all.len() < bytes {
        if conn.read_buf(&mut buffer).await? == 0 {
            return Err(Error::other("the stream has ended early"));
        }
        all.append(&mut buffer);
    }
    Ok(all)
}

/// Whether readers of this mount receive by themselves.
fn has_direct_reads(t: &Fixture) -> bool {
    !matches!(t.mount().backend, Backend::Sqpoll(_))
}

/// A stream so long that its reader receives by itself has come. Kernel threads receive without
/// the reader.
#[track_caller]
fn assert_was_direct(t: &Fixture) {
    let count = t.stats().direct_receives;
    assert_eq!(count > 0, has_direct_reads(t), "{count} direct receives");
}

pub(crate) fn a_stream_comes_whole_into_memory_of_the_user(t: &Fixture) -> Check {
    let (peer, read) = t.drive(|mut conn| async move { Ok(read_to_end(&mut conn).await?) })?;
    let sent = send(&peer, pattern(3, STREAM_BYTES))?;
    let all = read.wait();
    sent.wait();
    assert_eq!(all.len(), STREAM_BYTES);
    assert_pattern(&all, 3);
    assert_was_direct(t);
    assert_eq!(t.stats().received_bytes, STREAM_BYTES as u64);
    Ok(())
}

pub(crate) fn all_kinds_of_reads_take_one_stream_in_order(t: &Fixture) -> Check {
    let mut random = t.random();
    let (peer, read) = t.drive(move |mut conn| async move {
        let (mut at, mut buffer) = (0, Vec::new());
        loop {
            let left = STREAM_BYTES - at;
            let kind = random.within(0..8);
            at += match kind {
                // Directly, for a while: this kind is half of all.
                0..4 => {
                    buffer.reserve(random.within(1..2 * ROOM));
                    conn.read_buf(&mut buffer).await?
                }
                4 => {
                    let bytes = random.within(1..ROOM).min(left);
                    buffer.extend_from_slice(&conn.next(bytes).await?);
                    bytes
                }
                5 => {
                    let found = conn.readable().await?.min(random.within(1..ROOM));
                    buffer.extend(conn.try_next(found).as_deref().unwrap_or_default());
                    found
                }
                6 => {
                    let mut small = [0; 100];
                    let bytes = conn.read(&mut small).await?;
                    buffer.extend_from_slice(&small[..bytes]);
                    bytes
                }
                _ => {
                    let bytes = random.within(1..4 * ROOM).min(left);
                    buffer.extend_from_slice(&conn.read_to_vec(bytes).await?);
                    bytes
                }
            };
            assert_pattern(&buffer, at - buffer.len());
            buffer = Vec::new();
            if at == STREAM_BYTES {
                break;
            }
        }
        assert_eq!(conn.read_buf(&mut buffer).await?, 0, "more than was sent");
        Ok(())
    })?;
    let sent = send(&peer, pattern(0, STREAM_BYTES))?;
    read.wait();
    sent.wait();
    Ok(())
}

pub(crate) fn buffers_without_room_and_small_ones_are_taken_as_they_are(t: &Fixture) -> Check {
    let (mut peer, read) = t.drive(|mut conn| async move {
        let mut nothing: &mut [u8] = &mut [];
        assert_eq!(conn.read_buf(&mut nothing).await?, 0);
        let mut small = [0; 10];
        let mut room = &mut small[..];
        assert_eq!(conn.readable().await?, 26);
        assert_eq!(conn.read_buf(&mut room).await?, 10);
        assert!(room.is_empty(), "a slice shrinks to the rest of its room");
        assert_eq!(&small, b"abcdefghij");
        let mut rest = Vec::with_capacity(ROOM);
        assert_eq!(conn.read_buf(&mut rest).await?, 16);
        Ok(rest)
    })?;
    peer.write_all(b"abcdefghijklmnopqrstuvwxyz")?;
    assert_eq!(read.wait(), b"klmnopqrstuvwxyz");
    assert_eq!(t.stats().direct_receives, 0);
    Ok(())
}

pub(crate) fn small_messages_after_a_stream_come_through_the_poller(t: &Fixture) -> Check {
    let (mut peer, read) = t.drive(|mut conn| async move {
        let mut at = read_directly(&mut conn, STREAM_BYTES).await?.len();
        let mut buffer = Vec::with_capacity(ROOM);
        loop {
            conn.write_copy(b"!")?;
            conn.flush().await?;
            if conn.read_buf(&mut buffer).await? == 0 {
                return Ok(at);
            }
            assert_pattern(&buffer, at);
            at += buffer.len();
            buffer.clear();
        }
    })?;
    peer.write_all(&pattern(0, STREAM_BYTES))?;
    // A reader that finds each message at once goes on by itself. So it gets the time to wait.
    let mut sent = STREAM_BYTES;
    let mut some = |messages: usize| -> Check<u64> {
        for _ in 0..messages {
            read_exactly(&peer, 1)?;
            std::thread::sleep(Duration::from_millis(1));
            peer.write_all(&pattern(sent, 10))?;
            sent += 10;
        }
        Ok(t.stats().direct_receives)
    };
    let mut before = some(5)?;
    let settles =
        (0..100).any(|_| some(10).is_ok_and(|now| std::mem::replace(&mut before, now) == now));
    assert!(settles, "small messages are received directly: {before}");
    peer.shutdown(Shutdown::Write)?;
    assert_eq!(read.wait(), sent);
    Ok(())
}

pub(crate) fn the_end_is_an_end_and_a_reset_is_an_error(t: &Fixture) -> Check {
    let (peer, read) = t.drive(|mut conn| async move {
        let bytes = read_to_end(&mut conn).await?.len();
        let again = conn.read_buf(&mut Vec::with_capacity(ROOM)).await?;
        Ok((bytes, again))
    })?;
    send(&peer, pattern(0, STREAM_BYTES))?.wait();
    assert_eq!(read.wait(), (STREAM_BYTES, 0));

    let (mut peer, read) = t.drive(|mut conn| async move {
        read_directly(&mut conn, STREAM_BYTES).await?;
        conn.write_copy(b"!")?;
        conn.flush().await?;
        let error = read_to_end(&mut conn).await.expect_err("the peer resets");
        let written = async {
            conn.write_copy(b"?")?;
            conn.flush().await
        };
        Ok((error.raw_os_error(), written.await.is_err()))
    })?;
    peer.write_all(&pattern(0, STREAM_BYTES))?;
    read_exactly(&peer, 1)?;
    reset(peer)?;
    assert_eq!(read.wait(), (Some(libc::ECONNRESET), true));
    Ok(())
}

pub(crate) fn a_wait_ends_with_its_timeout_and_continues_after_it(t: &Fixture) -> Check {
    let (mut peer, read) = t.drive(|mut conn| async move {
        read_directly(&mut conn, STREAM_BYTES).await?;
        conn.set_read_timeout(Some(Duration::from_millis(20)));
        let mut rest = Vec::with_capacity(ROOM);
        let error = conn.read_buf(&mut rest).await.expect_err("the peer is silent");
        assert!(error.is_timeout(), "{error}");
        conn.set_read_timeout(None);
        conn.write_copy(b"!")?;
        conn.flush().await?;
        conn.read_buf(&mut rest).await?;
        Ok(rest)
    })?;
    peer.write_all(&pattern(0, STREAM_BYTES))?;
    read_exactly(&peer, 1)?;
    peer.write_all(b"late")?;
    assert_eq!(read.wait(), b"late");
    Ok(())
}

pub(crate) fn a_close_ends_the_wait(t: &Fixture) -> Check {
    let (tells, told) = outcome();
    let (mut peer, read) = t.drive(move |mut conn| async move {
        read_directly(&mut conn, STREAM_BYTES).await?;
        tell(tells, Ok(conn.handle()));
        let error = conn.read_buf(&mut Vec::with_capacity(ROOM)).await.expect_err("closed");
        Ok(error.is_closed())
    })?;
    peer.write_all(&pattern(0, STREAM_BYTES))?;
    let handle = told.wait();
    read.assert_pending();
    handle.close();
    assert!(read.wait());
    assert_ended(&peer);
    Ok(())
}

/// Each run reads a part of the stream directly.
pub(crate) fn the_next_run_gets_what_a_direct_reader_left(t: &Fixture) -> Check {
    let at = Arc::new(AtomicU64::new(0));
    let seen = Arc::clone(&at);
    let server = t.spawn(t.server().on_request(move |mut conn| {
        let seen = Arc::clone(&seen);
        async move {
            let before = seen.load(Ordering::SeqCst) as usize;
            let some =
                read_directly(&mut conn, (STREAM_BYTES - before).min(STREAM_BYTES / 3)).await?;
            assert_pattern(&some, before);
            seen.fetch_add(some.len() as u64, Ordering::SeqCst);
            Ok(())
        }
    }));
    let mut peer = dial(&server)?;
    peer.write_all(&pattern(0, STREAM_BYTES))?;
    eventually("all is read", || at.load(Ordering::SeqCst) == STREAM_BYTES as u64);
    assert_was_direct(t);
    assert_eq!(server.stats().handler_errors, 0);
    Ok(())
}

pub(crate) fn one_stream_does_not_hold_up_its_poller(t: &Fixture) -> Check {
    let server = t.spawn(t.server().pollers(1).on_connect(|mut conn| async move {
        let mut buffer = Vec::with_capacity(ROOM);
        loop {
            let bytes = conn.read_buf(&mut buffer).await?;
            if bytes == 0 {
                return Ok(());
            }
            if bytes == 1 {
                conn.write_copy(b"!")?;
                conn.flush().await?;
            }
            buffer.clear();
        }
    }));
    let mut stream = dial(&server)?;
    let stops = stream.try_clone()?;
    let floods = on_thread(move || {
        let bytes = pattern(0, 1 << 20);
        while stream.write_all(&bytes).is_ok() {}
        Ok(())
    });
    let other = dial(&server)?;
    for _ in 0..100 {
        assert_eq!(exchange(&other, b"?")?, b"!");
    }
    stops.shutdown(Shutdown::Both)?;
    floods.wait();
    Ok(())
}

pub(crate) fn a_half_reads_as_the_connection_does(t: &Fixture) -> Check {
    let (peer, read) = t.drive(|conn| async move {
        let (mut reader, mut writer) = conn.split();
        let (mut all, mut buffer) = (0, Vec::with_capacity(ROOM));
        while reader.read_buf(&mut buffer).await? > 0 {
            assert_pattern(&buffer, all);
            all += buffer.len();
            buffer.clear();
        }
        writer.write_copy(b"end")?;
        writer.flush().await?;
        Ok(all)
    })?;
    let sent = send(&peer, pattern(0, STREAM_BYTES))?;
    assert_eq!(read.wait(), STREAM_BYTES);
    sent.wait();
    assert_eq!(read_exactly(&peer, 3)?, b"end");
    assert_was_direct(t);
    Ok(())
}

/// The writing half is dropped on another thread while the reading half receives.
pub(crate) fn a_writing_half_that_goes_disturbs_no_reader(t: &Fixture) -> Check {
    let mut random = t.random();
    for _ in 0..20 {
        let after = Duration::from_micros(random.within(0..2000) as u64);
        let (peer, read) = t.drive(move |conn| async move {
            let (mut reader, writer) = conn.split();
            let drops = on_thread(move || {
                std::thread::sleep(after);
                drop(writer);
                Ok(())
            });
            let (mut at, mut buffer) = (0, Vec::with_capacity(ROOM));
            while reader.read_buf(&mut buffer).await? > 0 {
                assert_pattern(&buffer, at);
                at += buffer.len();
                buffer.clear();
            }
            drops.wait();
            Ok(at)
        })?;
        let sent = send(&peer, pattern(0, STREAM_BYTES / 4))?;
        assert_eq!(read.wait(), STREAM_BYTES / 4);
        sent.wait();
    }
    Ok(())
}

/// A handler that stays registered as waiting for its peer would be cut as idle.
pub(crate) fn a_read_that_is_dropped_waits_no_longer(t: &Fixture) -> Check {
    let (mut peer, read) = t.drive(|mut conn| async move {
        read_directly(&mut conn, STREAM_BYTES).await?;
        let waker = Arc::new(AtomicU64::new(0));
        struct Counted(Arc<AtomicU64>);
        impl std::task::Wake for Counted {
            fn wake(self: Arc<Self>) {
                self.0.fetch_add(1, Ordering::SeqCst);
            }
        }
        let counted = Arc::new(Counted(Arc::clone(&waker)));
        {
            let mut buffer = Vec::with_capacity(ROOM);
            let mut read = Box::pin(conn.read_buf(&mut buffer));
            let waker = std::task::Waker::from(Arc::clone(&counted));
            let polled = read.as_mut().poll(&mut std::task::Context::from_waker(&waker));
            assert!(polled.is_pending());
        }
        assert_eq!(Arc::strong_count(&counted), 1, "a dropped read leaves its waker");
        conn.write_copy(b"!")?;
        conn.flush().await?;
        let mut rest = Vec::with_capacity(ROOM);
        conn.read_buf(&mut rest).await?;
        assert_eq!(waker.load(Ordering::SeqCst), 0);
        Ok(rest)
    })?;
    peer.write_all(&pattern(0, STREAM_BYTES))?;
    read_exactly(&peer, 1)?;
    peer.write_all(b"more")?;
    assert_eq!(read.wait(), b"more");
    Ok(())
}

/// The reader polls once, and reads by another method afterwards.
pub(crate) fn a_poll_that_is_given_up_loses_nothing(t: &Fixture) -> Check {
    let (peer, read) = t.drive(|mut conn| async move {
        let (mut at, mut buffer) = (0, Vec::with_capacity(ROOM));
        while at < STREAM_BYTES {
            let polled = poll_fn(|cx| Poll::Ready(conn.poll_read_buf(cx, &mut buffer))).await;
            match polled {
                Poll::Ready(bytes) => {
                    assert_ne!(bytes?, 0, "an early end");
                }
                Poll::Pending => buffer.push(conn.read_byte().await?),
            }
            assert_pattern(&buffer, at);
            at += buffer.len();
            buffer.clear();
        }
        Ok(at)
    })?;
    let sent = send(&peer, pattern(0, STREAM_BYTES))?;
    assert_eq!(read.wait(), STREAM_BYTES);
    sent.wait();
    Ok(())
}

/// A receive stops before an urgent byte. The byte itself is no part of the stream.
pub(crate) fn urgent_bytes_stop_no_stream(t: &Fixture) -> Check {
    if t.mount().receives_behind_pollers() {
        return skip("urgent data", "the kernel's thread may wait at its mark: docs/IO_URING.md");
    }
    const PIECE_BYTES: usize = 1 << 20;
    let (mut peer, read) = t.drive(|mut conn| async move {
        let mut at = 0;
        while at < STREAM_BYTES {
            let piece = read_directly(&mut conn, PIECE_BYTES).await?;
            assert_pattern(&piece, at);
            at += piece.len();
            conn.write_copy(b"!")?;
            conn.flush().await?;
        }
        Ok(at)
    })?;
    for piece in pattern(0, STREAM_BYTES).chunks(PIECE_BYTES) {
        let (before, after) = piece.split_at(PIECE_BYTES / 3);
        peer.write_all(before)?;
        rustix::net::send(&peer, b"u", rustix::net::SendFlags::OOB)?;
        peer.write_all(after)?;
        // Another urgent byte would make this one a part of the stream.
        read_exactly(&peer, 1)?;
    }
    assert_eq!(read.wait(), STREAM_BYTES);
    Ok(())
}
