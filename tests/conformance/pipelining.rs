//! `submit_before_read`: a read that has to wait submits the written bytes first.

use std::future::poll_fn;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::task::Poll;
use std::time::Duration;

use ringpoll::Connection;
use ringpoll::buffer::u32_be_length;

use crate::harness::*;

macro_rules! cases {
    ($tests:ident, $mount:ident) => {
        $tests! { $mount, pipelining:
            every_read_that_waits_submits_first
            answers_to_requests_that_came_together_are_sent_together
            a_read_that_finds_the_end_of_the_stream_has_submitted
            without_the_setting_a_read_submits_nothing
            a_read_waits_for_room_if_the_output_is_full
            a_read_behind_a_full_output_has_the_write_timeout
            a_peer_that_has_reset_fails_the_read
        }
    };
}
pub(crate) use cases;

const SUBMITS: Tuning = Tuning {
    submit_before_read: true,
    input_watermarks: (0, 0),
    output_bytes_max: 0,
    read_bytes_max: 0,
};

pub(crate) fn every_read_that_waits_submits_first(t: &Fixture) -> Check {
    let (mut peer, read) = t.drive_tuned(SUBMITS, |mut conn| async move {
        conn.write("0")?;
        conn.next(1).await?;
        conn.write("1")?;
        conn.peek(1).await?;
        conn.skip(1).await?;
        conn.write("2")?;
        conn.until(b'2').await?;
        conn.write("3")?;
        conn.read(&mut [0]).await?;
        conn.write("4")?;
        conn.read_exact(&mut [0]).await?;
        conn.write("5")?;
        let bytes = conn.readable().await?;
        conn.slice(bytes).await?;
        conn.write("6")?;
        poll_fn(|cx| conn.poll_readable(cx)).await?;
        conn.skip(1).await?;
        conn.write("7")?;
        conn.frames(1, |_: &[u8]| Ok(Some(1))).next().await?;
        conn.write("8")?;
        let mut frames = conn.frames(1, |_: &[u8]| Ok(Some(1)));
        poll_fn(|cx| frames.poll_next(cx).map_ok(|frame| assert!(frame.is_some()))).await?;
        Ok(())
    })?;
    for digit in b"012345678" {
        assert_eq!(read_exactly(&peer, 1)?, [*digit]);
        peer.write_all(&[*digit])?;
    }
    read.wait();
    Ok(())
}

pub(crate) fn answers_to_requests_that_came_together_are_sent_together(t: &Fixture) -> Check {
    const COUNT: usize = 200;
    let (mut peer, echoed) = t.drive_tuned(SUBMITS, |mut conn| async move {
        while conn.readable().await? > 0 {
            let line = conn.until(b'\n').await?;
            conn.write(line)?;
        }
        conn.flush().await?;
        Ok(())
    })?;
    let lines = "a line\n".repeat(COUNT);
    let before = t.send_calls();
    assert_eq!(exchange(&peer, lines.as_bytes())?, lines.as_bytes());
    let calls = t.send_calls() - before;
    assert!(calls <= 4, "{calls} send calls for {COUNT} lines");
    peer.flush()?;
    peer.shutdown(Shutdown::Write)?;
    echoed.wait();
    Ok(())
}

pub(crate) fn a_read_that_finds_the_end_of_the_stream_has_submitted(t: &Fixture) -> Check {
    let (peer, read) = t.drive_tuned(SUBMITS, |mut conn| async move {
        assert_eq!(conn.readable().await?, 0);
        conn.write("answer")?;
        assert_eq!(conn.readable().await?, 0);
        assert_eq!(conn.pending_len(), 0);
        Ok(())
    })?;
    peer.shutdown(Shutdown::Write)?;
    read.wait();
    assert_eq!(read_all(&peer)?, b"answer");
    Ok(())
}

pub(crate) fn without_the_setting_a_read_submits_nothing(t: &Fixture) -> Check {
    let (peer, read) = t.drive(|mut conn| async move {
        conn.write("kept")?;
        assert!(poll_once(conn.next(1)).await.is_none());
        assert!(poll_once(poll_fn(|cx| conn.poll_readable(cx))).await.is_none());
        assert_eq!(conn.pending_len(), 4);
        Ok(conn.flush().await?)
    })?;
    read.wait();
    assert_eq!(read_exactly(&peer, 4)?, b"kept");
    Ok(())
}

/// Fills the kernel's buffers, and the output up to its bound, then writes a last byte.
async fn fill(conn: &mut Connection) -> Check {
    conn.set_write_timeout(Some(Duration::from_millis(100)));
    while conn.flush().await.is_ok() {
        conn.write(vec![0; OUTPUT_BYTES])?;
    }
    conn.set_write_timeout(None);
    while conn.submit().is_ok() {
        conn.write(vec![0; OUTPUT_BYTES])?;
    }
    Ok(conn.write("!")?)
}

const OUTPUT_BYTES: usize = 64 << 10;
const SMALL_OUTPUT: Tuning = Tuning { output_bytes_max: OUTPUT_BYTES, ..SUBMITS };

pub(crate) fn a_read_waits_for_room_if_the_output_is_full(t: &Fixture) -> Check {
    let (report, filled) = outcome();
    let (mut peer, read) = t.drive_tuned(SMALL_OUTPUT, |mut conn| async move {
        fill(&mut conn).await?;
        let written = conn.stats().sent_bytes + conn.stats().unsent_bytes;
        let total = written as usize + conn.pending_len();
        assert!(poll_once(conn.next(1)).await.is_none());
        assert!(conn.pending_len() > 0, "more than the bound was submitted");
        tell(report, Ok(()));
        conn.next(1).await?;
        Ok(total)
    })?;
    filled.wait();
    // The body waits for this byte until the other end has read all output.
    let (mut received, mut buffer) = (Vec::new(), vec![0; OUTPUT_BYTES]);
    while received.last() != Some(&b'!') {
        let bytes = peer.read(&mut buffer)?;
        assert!(bytes > 0, "the stream has ended");
        received.extend_from_slice(&buffer[..bytes]);
    }
    peer.write_all(b"x")?;
    assert_eq!(received.len(), read.wait());
    Ok(())
}

pub(crate) fn a_read_behind_a_full_output_has_the_write_timeout(t: &Fixture) -> Check {
    let (peer, read) = t.drive_tuned(SMALL_OUTPUT, |mut conn| async move {
        fill(&mut conn).await?;
        conn.set_write_timeout(Some(Duration::from_millis(30)));
        let error = conn.next(1).await.expect_err("the peer reads nothing");
        assert!(error.is_write_timeout(), "{error}");
        let error = poll_fn(|cx| conn.poll_readable(cx)).await.expect_err("as before");
        assert!(error.is_write_timeout(), "{error}");
        conn.abort();
        Ok(())
    })?;
    read.wait();
    drop(peer);
    Ok(())
}

pub(crate) fn a_peer_that_has_reset_fails_the_read(t: &Fixture) -> Check {
    let (mut peer, read) = t.drive_tuned(SUBMITS, |mut conn| async move {
        let mut frames = conn.frames(1024, u32_be_length);
        frames.next().await?;
        drop(frames);
        let handle = conn.handle();
        poll_fn(|cx| match handle.is_active() {
            true => {
                cx.waker().wake_by_ref();
                Poll::Pending
            }
            false => Poll::Ready(()),
        })
        .await;
        conn.write("lost")?;
        let error = conn.next(1).await.expect_err("the peer has reset");
        assert!(error.is_closed(), "{error}");
        Ok(())
    })?;
    peer.write_all(&[0; 4])?;
    reset(peer)?;
    read.wait();
    Ok(())
}
