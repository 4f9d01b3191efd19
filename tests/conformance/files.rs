//! `send_file`: a range of a file comes whole and in order, or its connection is reset.

use std::fs::File;
use std::io::{self, Write};
use std::net::{Shutdown, TcpStream};
use std::ops::Range;
use std::sync::Arc;

use ringpoll::Connection;

use crate::harness::*;

macro_rules! cases {
    ($tests:ident, $mount:ident) => {
        $tests! { $mount, files:
            ranges_come_whole_between_other_bytes
            every_type_with_a_writer_sends_files
            a_peer_that_reads_late_gets_the_whole_file
            a_range_that_the_file_does_not_have_is_refused
            a_reset_fails_the_call
            a_reset_that_the_call_gets_is_no_end_of_the_stream
            a_close_while_the_peer_does_not_read_fails_the_call
            a_file_that_becomes_shorter_resets_the_connection
            dropping_the_future_resets_the_connection
        }
    };
}
pub(crate) use cases;

/// More than the kernel holds for a peer that has never read.
const LARGE_BYTES: usize = 1 << 20;

/// A file without a name that holds [`pattern`].
fn file_of(bytes: usize) -> Check<Arc<File>> {
    let mut file = tempfile::tempfile()?;
    file.write_all(&pattern(0, bytes))?;
    Ok(Arc::new(file))
}

pub(crate) fn ranges_come_whole_between_other_bytes(t: &Fixture) -> Check {
    const BYTES: u64 = 5 << 20;
    let ranges: [Range<u64>; 7] = [
        0..BYTES,
        3..3,
        BYTES - 1..BYTES,
        7..7 + (64 << 10),
        7..8 + (64 << 10),
        1000..100_000,
        1..BYTES - 1,
    ];
    let file = file_of(BYTES as usize)?;
    let (sent, read) = (
        ranges.clone(),
        t.drive(move |mut conn| async move {
            for range in ranges {
                conn.write("<")?;
                let before = conn.stats().sent_bytes;
                conn.send_file(Arc::clone(&file), range.clone()).await?;
                let (stats, bytes) = (conn.stats(), range.end - range.start);
                assert_eq!((stats.sent_bytes - before, stats.unsent_bytes), (bytes + 1, 0));
                conn.write(">")?;
                conn.flush().await?;
            }
            Ok(())
        })?,
    );
    let (peer, done) = read;
    for range in sent {
        let bytes = (range.end - range.start) as usize;
        assert_eq!(read_exactly(&peer, 1)?, b"<");
        assert_pattern(&read_exactly(&peer, bytes)?, range.start as usize);
        assert_eq!(read_exactly(&peer, 1)?, b">");
    }
    done.wait();
    Ok(())
}

pub(crate) fn every_type_with_a_writer_sends_files(t: &Fixture) -> Check {
    const BYTES: usize = 200_000;
    let file = file_of(BYTES)?;
    let (peer, done) = t.drive(move |mut conn| async move {
        let range = 0..BYTES as u64;
        let (_, mut writer) = conn.parts();
        writer.send_file(file.try_clone()?, range.clone()).await?;
        let (_reader, mut writer) = conn.split();
        writer.send_file(file, range).await?;
        Ok(writer.shutdown_write().await?)
    })?;
    let bytes = read_all(&peer)?;
    assert_pattern(&bytes[..BYTES], 0);
    assert_pattern(&bytes[BYTES..], 0);
    assert_eq!(bytes.len(), 2 * BYTES);
    done.wait();
    Ok(())
}

/// Sends a large file to a peer that does not read, and returns when the kernel takes no more.
fn stuck<T: Send + 'static>(
    t: &Fixture,
    file: &Arc<File>,
    then: impl FnOnce(Connection, ringpoll::Result<()>) -> Check<T> + Send + 'static,
) -> Check<(TcpStream, Outcome<T>, ringpoll::Handle)> {
    let (sends, sent) = outcome();
    let file = Arc::clone(file);
    let (peer, done) = t.drive(move |mut conn| async move {
        shrink_send_buffer(&conn)?;
        tell(sends, Ok(conn.handle()));
        let sent = conn.send_file(file, 0..LARGE_BYTES as u64).await;
        then(conn, sent)
    })?;
    let handle = sent.wait();
    eventually("the socket is full", || handle.stats().unsent_bytes > 0);
    Ok((peer, done, handle))
}

pub(crate) fn a_peer_that_reads_late_gets_the_whole_file(t: &Fixture) -> Check {
    let file = file_of(LARGE_BYTES)?;
    let (peer, done, handle) = stuck(t, &file, |_, sent| Ok(sent?))?;
    assert!(handle.stats().unsent_bytes <= 64 << 10);
    done.assert_pending();
    let bytes = read_exactly(&peer, LARGE_BYTES)?;
    assert_pattern(&bytes, 0);
    done.wait();
    assert_ended(&peer);
    Ok(())
}

pub(crate) fn a_range_that_the_file_does_not_have_is_refused(t: &Fixture) -> Check {
    let file = file_of(100)?;
    let (peer, done) = t.drive(move |mut conn| async move {
        conn.write("head")?;
        #[allow(clippy::reversed_empty_ranges)]
        for range in [50..101, 0..u64::MAX, 1 << 40..1 << 41, 3..2] {
            let error = conn.send_file(Arc::clone(&file), range).await.expect_err("no such range");
            assert!(error.is_invalid(), "{error}");
        }
        conn.send_file(file, 0..100).await?;
        Ok(conn.shutdown_write().await?)
    })?;
    let bytes = read_all(&peer)?;
    assert_eq!(bytes[..4], b"head"[..]);
    assert_pattern(&bytes[4..], 0);
    assert_eq!(bytes.len(), 104);
    peer.shutdown(Shutdown::Write)?;
    done.wait();
    Ok(())
}

pub(crate) fn a_reset_fails_the_call(t: &Fixture) -> Check {
    let file = file_of(LARGE_BYTES)?;
    let (peer, done, _) = stuck(t, &file, |conn, sent| {
        assert!(sent.expect_err("the peer has reset").is_closed());
        assert!(conn.is_closed());
        Ok(())
    })?;
    reset(peer)?;
    done.wait();
    Ok(())
}

/// The kernel reports a reset once. The thread that sends the file may get it.
pub(crate) fn a_reset_that_the_call_gets_is_no_end_of_the_stream(t: &Fixture) -> Check {
    const BYTES: usize = 16 << 20;
    let file = file_of(BYTES)?;
    for round in 0..100 {
        let file = Arc::clone(&file);
        let (peer, ended) = t.drive(move |conn| async move {
            let (mut reader, mut writer) = conn.split();
            let read = reader.readable();
            let sent = writer.send_file(file, 0..BYTES as u64);
            Ok(tokio::join!(read, sent).0)
        })?;
        read_exactly(&peer, 1 << (8 + round % 12))?;
        reset(peer)?;
        let read = ended.wait();
        assert!(read.is_err(), "round {round}: the reset looks like an end");
    }
    Ok(())
}

pub(crate) fn a_close_while_the_peer_does_not_read_fails_the_call(t: &Fixture) -> Check {
    let file = file_of(LARGE_BYTES)?;
    let (peer, done, handle) = stuck(t, &file, |_, sent| {
        assert!(sent.expect_err("closed").is_closed());
        Ok(())
    })?;
    handle.close();
    done.wait();
    assert_cut_off(&peer);
    Ok(())
}

pub(crate) fn a_file_that_becomes_shorter_resets_the_connection(t: &Fixture) -> Check {
    let file = file_of(LARGE_BYTES)?;
    let (peer, done, _) = stuck(t, &file, |conn, sent| {
        let error = sent.expect_err("the file has become shorter");
        assert_eq!(error.io_kind(), io::ErrorKind::UnexpectedEof, "{error}");
        assert!(conn.is_closed());
        Ok(())
    })?;
    file.set_len(LARGE_BYTES as u64 - 1)?;
    assert_cut_off(&peer);
    done.wait();
    Ok(())
}

pub(crate) fn dropping_the_future_resets_the_connection(t: &Fixture) -> Check {
    let file = file_of(LARGE_BYTES)?;
    let (mut peer, dropped) = t.drive(move |mut conn| async move {
        // A reset that arrives at once would fail the dial.
        conn.skip(1).await?;
        shrink_send_buffer(&conn)?;
        let handle = conn.handle();
        let mut sending = Box::pin(conn.send_file(file, 0..LARGE_BYTES as u64));
        std::future::poll_fn(|cx| {
            assert!(sending.as_mut().poll(cx).is_pending());
            match handle.stats().sent_bytes {
                0 => std::task::Poll::Pending,
                _ => std::task::Poll::Ready(()),
            }
        })
        .await;
        drop(sending);
        assert!(conn.is_closed());
        Ok(())
    })?;
    peer.write_all(b"!")?;
    dropped.wait();
    assert_cut_off(&peer);
    Ok(())
}

/// The stream was reset before the whole file had come.
#[track_caller]
fn assert_cut_off(mut peer: &TcpStream) {
    let ended = io::copy(&mut peer, &mut io::sink());
    let error = ended.expect_err("a part of the file looks like the whole");
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset, "{error}");
}
