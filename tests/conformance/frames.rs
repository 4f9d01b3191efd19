//! Frames: lent whole however they arrive, consumed once, bounded, and refused when they are bad.

use std::future::Future;
use std::io::Write;
use std::net::Shutdown;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::pin;
use std::task::{Context, Waker};

use ringpoll::buffer::u32_be_length;
use ringpoll::{Connection, Error, blocking};

use crate::harness::*;

macro_rules! cases {
    ($tests:ident, $mount:ident) => {
        $tests! { $mount, frames:
            frames_cut_at_every_byte_come_back
            pipelined_frames_over_block_borders_come_back_in_order
            a_frame_larger_than_the_high_watermark_comes_whole
            a_frame_that_is_too_long_is_refused_before_it_has_come
            a_length_of_nothing_and_an_error_of_the_function_end_the_frames
            the_end_of_the_stream_between_frames_is_none
            the_end_of_the_stream_inside_a_frame_is_eof
            frames_that_were_not_lent_stay_buffered
            dropping_a_wait_for_a_frame_loses_no_byte
            halves_and_blocking_connections_lend_frames
            advance_consumes_what_is_buffered
        }
    };
}
pub(crate) use cases;

const FRAME_BYTES_MAX: usize = 64 << 10;

fn frame(payload: &[u8]) -> Vec<u8> {
    [&(payload.len() as u32).to_be_bytes()[..], payload].concat()
}

/// Sends every frame back until the end of the stream. One flush for all frames that have come.
async fn echo(mut conn: Connection) -> Check {
    let (mut reader, mut writer) = conn.parts();
    let mut frames = reader.frames(FRAME_BYTES_MAX, u32_be_length);
    loop {
        let mut next = frames.next().await?;
        if next.is_none() {
            return Ok(());
        }
        while let Some(frame) = next {
            writer.write_copy(frame)?;
            next = frames.try_next()?;
        }
        writer.flush().await?;
    }
}

pub(crate) fn frames_cut_at_every_byte_come_back(t: &Fixture) -> Check {
    let (sends, sent) = outcome();
    let (mut peer, echoed) = t.drive(|conn| async move {
        tell(sends, Ok(conn.handle()));
        echo(conn).await
    })?;
    let bytes = [frame(b""), frame(b"x"), frame(b"a frame"), frame(b"")].concat();
    let handle = sent.wait();
    for cut in 0..=bytes.len() {
        let received = handle.stats().received_bytes;
        peer.write_all(&bytes[..cut])?;
        let expected = received + cut as u64;
        eventually("the front has come", || handle.stats().received_bytes == expected);
        peer.write_all(&bytes[cut..])?;
        assert_eq!(read_exactly(&peer, bytes.len())?, bytes, "cut at {cut}");
    }
    peer.shutdown(Shutdown::Write)?;
    echoed.wait();
    Ok(())
}

pub(crate) fn pipelined_frames_over_block_borders_come_back_in_order(t: &Fixture) -> Check {
    const TOTAL: usize = 2 << 20;
    let (mut peer, echoed) = t.drive(echo)?;
    let mut bytes = Vec::new();
    for payload_bytes in [0, 1, 3, 100, 1024, 4092, 4093, 5000, 40_000].into_iter().cycle() {
        bytes.extend(frame(&pattern(bytes.len(), payload_bytes)));
        if bytes.len() >= TOTAL {
            break;
        }
    }
    let (mut sender, sent_bytes) = (peer.try_clone()?, bytes.clone());
    let sending = on_thread(move || {
        // Lengths that match no frame and no block.
        sent_bytes.chunks(7001).try_for_each(|chunk| sender.write_all(chunk))?;
        Ok(())
    });
    assert!(read_exactly(&peer, bytes.len())? == bytes, "other bytes came back");
    sending.wait();
    peer.flush()?;
    peer.shutdown(Shutdown::Write)?;
    echoed.wait();
    Ok(())
}

pub(crate) fn a_frame_larger_than_the_high_watermark_comes_whole(t: &Fixture) -> Check {
    const BYTES: usize = 4 << 20;
    let (mut peer, read) = t.drive(|mut conn| async move {
        let mut frames = conn.frames(2 * BYTES, u32_be_length);
        let frame = frames.next().await?.expect("the peer has not ended");
        assert_eq!(frame.len(), 4 + BYTES);
        assert_pattern(&frame[4..], 0);
        Ok(())
    })?;
    let sending = on_thread(move || {
        peer.write_all(&frame(&pattern(0, BYTES)))?;
        Ok(peer)
    });
    read.wait();
    drop(sending.wait());
    Ok(())
}

pub(crate) fn a_frame_that_is_too_long_is_refused_before_it_has_come(t: &Fixture) -> Check {
    let (mut peer, read) = t.drive(|mut conn| async move {
        let mut frames = conn.frames(1024, u32_be_length);
        assert_eq!(frames.next().await?, Some(&frame(b"good")[..]));
        for _ in 0..2 {
            let error = frames.next().await.expect_err("1025 bytes");
            let message = error.to_string();
            assert!(error.is_limit() && message.contains("1025 bytes: limit is 1024"), "{message}");
        }
        drop(frames);
        assert_eq!(conn.next(4).await?[..], 1021_u32.to_be_bytes());
        Ok(())
    })?;
    peer.write_all(&[&frame(b"good")[..], &1021_u32.to_be_bytes()].concat())?;
    read.wait();
    Ok(())
}

pub(crate) fn a_length_of_nothing_and_an_error_of_the_function_end_the_frames(
    t: &Fixture,
) -> Check {
    let (mut peer, read) = t.drive(|mut conn| async move {
        let mut frames = conn.frames(1024, |_: &[u8]| Ok(Some(0)));
        assert!(frames.next().await.expect_err("no progress").is_invalid());
        drop(frames);
        let mut frames = conn.frames(1024, |_: &[u8]| Err(Error::other("garbage")));
        assert_eq!(frames.next().await.expect_err("refused").to_string(), "garbage");
        drop(frames);
        // Without an end, no more than the limit is waited for.
        let mut frames = conn.frames(1024, |_: &[u8]| Ok(None));
        assert!(frames.next().await.expect_err("no end").is_limit());
        drop(frames);
        assert_pattern(&conn.next(1024).await?, 0);
        Ok(())
    })?;
    peer.write_all(&pattern(0, 1024))?;
    read.wait();
    Ok(())
}

pub(crate) fn the_end_of_the_stream_between_frames_is_none(t: &Fixture) -> Check {
    let (mut peer, read) = t.drive(|mut conn| async move {
        let mut frames = conn.frames(1024, u32_be_length);
        assert_eq!(frames.next().await?, Some(&frame(b"last")[..]));
        assert_eq!(frames.next().await?, None);
        assert_eq!(frames.next().await?, None);
        assert_eq!(frames.try_next()?, None);
        Ok(())
    })?;
    peer.write_all(&frame(b"last"))?;
    peer.shutdown(Shutdown::Write)?;
    read.wait();
    Ok(())
}

pub(crate) fn the_end_of_the_stream_inside_a_frame_is_eof(t: &Fixture) -> Check {
    for cut in [1, 4, 7] {
        let (mut peer, read) = t.drive(move |mut conn| async move {
            let mut frames = conn.frames(1024, u32_be_length);
            assert_eq!(frames.next().await?, Some(&frame(b"whole")[..]));
            assert!(frames.next().await.expect_err("cut off").is_eof());
            assert_eq!(frames.try_next()?, None);
            drop(frames);
            assert_eq!(conn.next(cut).await?[..], frame(b"part")[..cut]);
            Ok(())
        })?;
        peer.write_all(&[&frame(b"whole")[..], &frame(b"part")[..cut]].concat())?;
        peer.shutdown(Shutdown::Write)?;
        read.wait();
    }
    Ok(())
}

pub(crate) fn frames_that_were_not_lent_stay_buffered(t: &Fixture) -> Check {
    let (mut peer, read) = t.drive(|mut conn| async move {
        for payload in [&b"first"[..], b"second"] {
            let mut frames = conn.frames(1024, u32_be_length);
            assert_eq!(frames.next().await?, Some(&frame(payload)[..]));
        }
        drop(conn.frames(1024, u32_be_length));
        assert_eq!(conn.next(9).await?[..], frame(b"third"));
        Ok(())
    })?;
    peer.write_all(&[frame(b"first"), frame(b"second"), frame(b"third")].concat())?;
    read.wait();
    Ok(())
}

pub(crate) fn dropping_a_wait_for_a_frame_loses_no_byte(t: &Fixture) -> Check {
    let (waits, waiting) = outcome();
    let (mut peer, read) = t.drive(|mut conn| async move {
        conn.peek(6).await?;
        let mut frames = conn.frames(1024, u32_be_length);
        let polled = pin!(frames.next()).poll(&mut Context::from_waker(Waker::noop()));
        assert!(polled.is_pending());
        drop(frames);
        tell(waits, Ok(()));
        let mut frames = conn.frames(1024, u32_be_length);
        assert_eq!(frames.next().await?, Some(&frame(b"in two parts")[..]));
        Ok(())
    })?;
    let bytes = frame(b"in two parts");
    peer.write_all(&bytes[..6])?;
    waiting.wait();
    peer.write_all(&bytes[6..])?;
    read.wait();
    Ok(())
}

pub(crate) fn halves_and_blocking_connections_lend_frames(t: &Fixture) -> Check {
    let (peer, read) = t.drive(|conn| async move {
        let (mut reader, mut writer) = conn.split();
        let mut frames = reader.frames(1024, u32_be_length);
        while let Some(frame) = frames.next().await? {
            writer.write_copy(frame)?;
            writer.flush().await?;
        }
        Ok(())
    })?;
    let mut conn = blocking::Connection::new(t.dialer().adopt(peer.into())?);
    let (mut reader, mut writer) = conn.parts();
    writer.write_copy(&[frame(b"one"), frame(b"two")].concat())?;
    blocking::wait(writer.shutdown_write())?;
    let mut frames = reader.frames(1024, u32_be_length);
    assert_eq!(blocking::wait(frames.next())?, Some(&frame(b"one")[..]));
    drop(frames);
    let mut frames = conn.frames(1024, u32_be_length);
    assert_eq!(blocking::wait(frames.next())?, Some(&frame(b"two")[..]));
    assert_eq!(blocking::wait(frames.next())?, None);
    read.wait();
    Ok(())
}

pub(crate) fn advance_consumes_what_is_buffered(t: &Fixture) -> Check {
    let (mut peer, read) = t.drive(|mut conn| async move {
        conn.peek(100).await?;
        conn.advance(0);
        conn.advance(10);
        assert_pattern(conn.buffered(), 10);
        let over = catch_unwind(AssertUnwindSafe(|| conn.advance(91)));
        assert!(over.is_err(), "91 of 90 bytes were consumed");
        conn.advance(89);
        assert_pattern(conn.buffered(), 99);
        conn.advance(1);
        assert!(conn.is_empty() && conn.buffered().is_empty());
        Ok(())
    })?;
    peer.write_all(&pattern(0, 100))?;
    read.wait();
    Ok(())
}
