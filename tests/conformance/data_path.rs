//! Reading: bytes arrive whole, in order, once, and short reads lose nothing.

use std::io::Write;
use std::net::Shutdown;
use std::thread;

use ringpoll::buffer::Reader;

use crate::harness::*;

macro_rules! cases {
    ($tests:ident, $mount:ident) => {
        $tests! { $mount, data_path:
            a_thousand_exact_reads_return_the_stream_in_order
            a_peek_does_not_consume
            bytes_that_came_before_the_close_satisfy_a_blocked_read
            half_a_message_waits_for_the_other_half
            small_reads_of_a_megabyte_keep_memory_bounded
            blocks_of_large_messages_are_kept_and_freed_when_no_more_come
            reads_of_nothing_succeed_at_once
            until_includes_the_delimiter_wherever_it_falls
            until_at_the_end_of_the_stream_returns_what_there_is
            every_reader_method_sees_the_same_stream
            a_failed_read_leaves_short_data_buffered
            a_string_that_is_not_utf8_is_removed
            the_end_of_the_stream_is_eof_every_time
            try_next_and_try_peek_take_only_what_is_buffered
            try_next_sees_what_has_arrived_since_the_last_wait
            readable_waits_for_the_first_byte_and_is_zero_at_the_end
            dropping_a_waiting_read_loses_no_byte
            slices_outlive_the_connection_on_another_thread
            a_read_larger_than_the_high_watermark_completes
            counters_match_the_bytes_that_moved
            bytes_sent_one_at_a_time_arrive_in_order
        }
    };
}
pub(crate) use cases;

pub(crate) fn a_thousand_exact_reads_return_the_stream_in_order(t: &Fixture) -> Check {
    let (mut peer, read) = t.drive(|mut conn| async move {
        for index in 0..1000 {
            assert_pattern(&conn.next(256).await?, index * 256);
        }
        Ok(())
    })?;
    peer.write_all(&pattern(0, 256_000))?;
    read.wait();
    Ok(())
}

pub(crate) fn a_peek_does_not_consume(t: &Fixture) -> Check {
    let (mut peer, read) = t.drive(|mut conn| async move {
        let head = conn.peek(16).await?;
        assert!(conn.len() >= 16, "a peek took bytes: {} left", conn.len());
        let again = conn.peek(16).await?;
        assert_eq!(head[..], again[..]);
        let whole = conn.next(64).await?;
        assert_eq!(head[..], whole[..16]);
        assert_pattern(&whole, 0);
        Ok(())
    })?;
    // In two pieces, so that the peek meets one block and the read may meet two.
    peer.write_all(&pattern(0, 20))?;
    peer.write_all(&pattern(20, 44))?;
    read.wait();
    Ok(())
}

pub(crate) fn bytes_that_came_before_the_close_satisfy_a_blocked_read(t: &Fixture) -> Check {
    let (waits, waiting) = outcome();
    let (mut peer, read) = t.drive(|mut conn| async move {
        tell(waits, Ok(()));
        assert_pattern(&conn.next(256).await?, 0);
        let end = conn.next(1).await.expect_err("the stream has ended");
        assert!(end.is_eof() && end.is_closed(), "{end:?}");
        Ok(())
    })?;
    waiting.wait();
    peer.write_all(&pattern(0, 256))?;
    drop(peer);
    read.wait();
    Ok(())
}

pub(crate) fn half_a_message_waits_for_the_other_half(t: &Fixture) -> Check {
    let (sends, sent) = outcome();
    let (mut peer, read) = t.drive(|mut conn| async move {
        tell(sends, Ok((*conn).clone()));
        assert_pattern(&conn.next(256).await?, 0);
        Ok(())
    })?;
    let handle = sent.wait();
    peer.write_all(&pattern(0, 128))?;
    eventually("the first half is buffered", || handle.stats().unread_bytes == 128);
    read.assert_pending();
    peer.write_all(&pattern(128, 128))?;
    read.wait();
    Ok(())
}

pub(crate) fn small_reads_of_a_megabyte_keep_memory_bounded(t: &Fixture) -> Check {
    const TOTAL: usize = 1 << 20;
    let (step, steps) = std::sync::mpsc::sync_channel(0);
    let (mut peer, read) = t.drive(move |mut conn| async move {
        for index in 0..TOTAL / 1024 {
            assert_pattern(&conn.next(1024).await?, index * 1024);
            // The test measures memory at this moment; the send never waits for it.
            let _ = step.try_send(());
        }
        Ok(())
    })?;
    let writer = on_thread(move || {
        peer.write_all(&pattern(0, TOTAL))?;
        Ok(peer)
    });
    let mut block_bytes_peak = 0;
    while steps.recv_timeout(DEADLINE).is_ok() {
        block_bytes_peak = block_bytes_peak.max(t.stats().block_bytes);
    }
    read.wait();
    drop(writer.wait());
    assert!(block_bytes_peak <= 4 << 20, "{block_bytes_peak} bytes of blocks for 1 MB");
    Ok(())
}

pub(crate) fn blocks_of_large_messages_are_kept_and_freed_when_no_more_come(t: &Fixture) -> Check {
    const BYTES: usize = 4 << 20;
    // Small free blocks stay, but the blocks of one such message are more than those.
    const SMALL_BYTES_MAX: usize = BYTES / 2;
    let server = t.spawn(t.server().on_request(|mut conn| async move {
        let message = conn.next(BYTES).await?;
        conn.write_copy(&message)?;
        drop(message);
        conn.flush().await
    }));
    let peer = dial(&server)?;
    let kept_bytes = || server.stats().pollers.free_block_bytes as usize;
    // The blocks may be freed between an exchange and the look, if this thread is held up.
    eventually("blocks are kept", || {
        let got = exchange(&peer, &pattern(0, BYTES)).expect("an echo");
        assert_pattern(&got, 0);
        kept_bytes() >= BYTES
    });
    // The connection stays open, and is idle.
    eventually("the large blocks are freed", || kept_bytes() < SMALL_BYTES_MAX);
    Ok(())
}

/// With a length of zero nothing waits and nothing fails.
pub(crate) fn reads_of_nothing_succeed_at_once(t: &Fixture) -> Check {
    let (peer, read) = t.drive(|mut conn| async move {
        assert!(conn.next(0).await?.is_empty());
        assert!(conn.peek(0).await?.is_empty());
        conn.skip(0).await?;
        assert_eq!(conn.read(&mut []).await?, 0);
        conn.read_exact(&mut []).await?;
        assert_eq!(conn.read_string(0).await?, "");
        assert!(conn.read_to_vec(0).await?.is_empty());
        assert_eq!(conn.slice(0).await?.len(), 0);
        conn.write(&[])?;
        conn.write_copy(&[])?;
        assert_eq!(conn.reserve(0)?.len(), 0);
        conn.commit(0)?;
        conn.submit()?;
        conn.flush().await?;
        assert_eq!((conn.len(), conn.pending_len()), (0, 0));
        Ok(())
    })?;
    read.wait();
    drop(peer);
    Ok(())
}

/// Delimiters at the start, inside, at the end of an arrival, and alone in the next one.
pub(crate) fn until_includes_the_delimiter_wherever_it_falls(t: &Fixture) -> Check {
    let (sends, sent) = outcome();
    let (mut peer, read) = t.drive(|mut conn| async move {
        tell(sends, Ok((*conn).clone()));
        assert_eq!(conn.until(b'\n').await?[..], b"\n"[..]);
        assert_eq!(conn.until(b'\n').await?[..], b"one\n"[..]);
        assert_eq!(conn.until(b'\n').await?[..], b"two three\n"[..]);
        assert_eq!(conn.until(b'\n').await?[..], [b"x".repeat(70_000), b"\n".to_vec()].concat());
        assert_eq!(conn.next(4).await?[..], b"tail"[..]);
        Ok(())
    })?;
    let handle = sent.wait();
    peer.write_all(b"\none\ntwo")?;
    eventually("only half a line is left", || handle.stats().unread_bytes == 3);
    peer.write_all(b" three\n")?;
    peer.write_all(&b"x".repeat(70_000))?;
    eventually("the long line waits for its end", || handle.stats().unread_bytes == 70_000);
    read.assert_pending();
    peer.write_all(b"\ntail")?;
    read.wait();
    Ok(())
}

/// The bytes before the end come with the error, and are consumed.
pub(crate) fn until_at_the_end_of_the_stream_returns_what_there_is(t: &Fixture) -> Check {
    let (mut peer, read) = t.drive(|mut conn| async move {
        assert_eq!(conn.until(b';').await?[..], b"first;"[..]);
        let end = conn.until(b';').await.expect_err("no delimiter is left");
        assert!(end.is_eof(), "{end:?}");
        assert_eq!(end.partial().map(|bytes| &bytes[..]), Some(&b"second"[..]));
        assert_eq!(conn.read(&mut [0; 8]).await?, 0);
        Ok(())
    })?;
    peer.write_all(b"first;second")?;
    peer.shutdown(Shutdown::Write)?;
    read.wait();
    Ok(())
}

/// Every way to read, mixed, against the position in the stream.
pub(crate) fn every_reader_method_sees_the_same_stream(t: &Fixture) -> Check {
    const ROUNDS: usize = 300;
    let mut random = t.random();
    let mut sender_random = t.random();
    let (mut peer, read) = t.drive(move |mut conn| async move {
        let mut at = 0;
        for _ in 0..ROUNDS {
            let count = random.within(1..3000);
            let bytes = match random.within(0..8) {
                0 => conn.next(count).await?.to_vec(),
                1 => {
                    let peeked = conn.peek(count).await?.to_vec();
                    conn.skip(count).await?;
                    peeked
                }
                2 => {
                    let mut buffer = vec![0; count];
                    let got = conn.read(&mut buffer).await?;
                    assert!(got > 0, "a read before the end returned nothing");
                    buffer.truncate(got);
                    buffer
                }
                3 => {
                    let mut buffer = vec![0; count];
                    conn.read_exact(&mut buffer).await?;
                    buffer
                }
                4 => vec![conn.read_byte().await?],
                5 => conn.read_to_vec(count).await?,
                6 => conn.slice(count).await?.next(count)?.to_vec(),
                _ => conn.try_next(1).map(|slice| slice.to_vec()).unwrap_or_default(),
            };
            assert_pattern(&bytes, at);
            at += bytes.len();
        }
        loop {
            let count = conn.readable().await?;
            if count == 0 {
                return Ok(at);
            }
            assert_pattern(&conn.next(count).await?, at);
            at += count;
        }
    })?;
    let mut sent = 0;
    while sent < ROUNDS * 3000 {
        let count = sender_random.within(1..5000);
        peer.write_all(&pattern(sent, count))?;
        sent += count;
    }
    peer.shutdown(Shutdown::Write)?;
    assert_eq!(read.wait(), sent);
    Ok(())
}

/// After an error, short data stays buffered.
pub(crate) fn a_failed_read_leaves_short_data_buffered(t: &Fixture) -> Check {
    let (mut peer, read) = t.drive(|mut conn| async move {
        assert!(conn.next(100).await.expect_err("40 bytes come").is_eof());
        assert_eq!(conn.len(), 40);
        assert!(conn.peek(41).await.expect_err("40 bytes came").is_eof());
        assert!(conn.skip(41).await.expect_err("40 bytes came").is_eof());
        assert!(conn.read_exact(&mut [0; 41]).await.expect_err("40 bytes came").is_eof());
        assert!(conn.read_to_vec(41).await.expect_err("40 bytes came").is_eof());
        assert!(conn.read_string(41).await.expect_err("40 bytes came").is_eof());
        assert!(conn.slice(41).await.expect_err("40 bytes came").is_eof());
        assert_eq!(conn.len(), 40);
        assert_pattern(&conn.next(40).await?, 0);
        Ok(())
    })?;
    peer.write_all(&pattern(0, 40))?;
    peer.shutdown(Shutdown::Write)?;
    read.wait();
    Ok(())
}

/// The next read begins behind the string, whether the string was valid or not.
pub(crate) fn a_string_that_is_not_utf8_is_removed(t: &Fixture) -> Check {
    let (mut peer, read) = t.drive(|mut conn| async move {
        assert!(conn.read_string(2).await.expect_err("not UTF-8").is_invalid());
        assert_eq!(conn.read_string(2).await?, "ok");
        Ok(())
    })?;
    peer.write_all(b"\xff\xffok")?;
    read.wait();
    Ok(())
}

/// EOF is an error for an exact read and zero for `read`, as often as one asks.
pub(crate) fn the_end_of_the_stream_is_eof_every_time(t: &Fixture) -> Check {
    let (peer, read) = t.drive(|mut conn| async move {
        for _ in 0..3 {
            assert_eq!(conn.read(&mut [0; 8]).await?, 0);
            assert_eq!(conn.readable().await?, 0);
            let end = conn.next(1).await.expect_err("the stream has ended");
            assert!(end.is_eof() && end.is_closed(), "{end:?}");
            assert!(conn.read_byte().await.expect_err("the stream has ended").is_eof());
        }
        Ok(())
    })?;
    peer.shutdown(Shutdown::Write)?;
    read.wait();
    Ok(())
}

/// The sync reads never wait and take all or nothing.
pub(crate) fn try_next_and_try_peek_take_only_what_is_buffered(t: &Fixture) -> Check {
    let (mut peer, read) = t.drive(|mut conn| async move {
        assert!(conn.is_empty() || conn.len() <= 10);
        conn.peek(10).await?;
        assert!(conn.try_next(11).is_none());
        assert!(conn.try_peek(11).is_none());
        assert_pattern(&conn.try_peek(10).expect("10 bytes are buffered"), 0);
        assert_pattern(&conn.try_next(4).expect("10 bytes are buffered"), 0);
        assert_eq!(conn.len(), 6);
        assert_pattern(&conn.try_next(6).expect("6 bytes are buffered"), 4);
        assert!(conn.is_empty());
        assert!(conn.try_next(1).is_none());
        Ok(())
    })?;
    peer.write_all(&pattern(0, 10))?;
    read.wait();
    Ok(())
}

/// Bytes that arrive while no read waits are buffered, and the sync reads see them as well.
pub(crate) fn try_next_sees_what_has_arrived_since_the_last_wait(t: &Fixture) -> Check {
    let (mut peer, handed) = t.drive(|conn| async move { Ok(conn) })?;
    let mut conn = handed.wait();
    peer.write_all(&pattern(0, 10))?;
    eventually("ten bytes are buffered", || conn.len() == 10);
    assert_pattern(&conn.try_peek(4).expect("10 bytes are buffered"), 0);
    assert_pattern(&conn.try_next(4).expect("10 bytes are buffered"), 0);
    peer.write_all(&pattern(10, 5))?;
    eventually("five more are buffered", || conn.len() == 11);
    assert_pattern(&conn.try_next(11).expect("11 bytes are buffered"), 4);
    Ok(())
}

/// `readable` consumes nothing.
pub(crate) fn readable_waits_for_the_first_byte_and_is_zero_at_the_end(t: &Fixture) -> Check {
    let (sends, sent) = outcome();
    let (mut peer, read) = t.drive(|mut conn| async move {
        tell(sends, Ok(()));
        assert_eq!(conn.readable().await?, 1);
        assert_eq!(conn.readable().await?, 1);
        assert_eq!(conn.next(1).await?[..], [7]);
        assert_eq!(conn.readable().await?, 0);
        Ok(())
    })?;
    sent.wait();
    read.assert_pending();
    peer.write_all(&[7])?;
    peer.shutdown(Shutdown::Write)?;
    read.wait();
    Ok(())
}

/// Dropping a future never loses data: reads are polled once and dropped, at random.
pub(crate) fn dropping_a_waiting_read_loses_no_byte(t: &Fixture) -> Check {
    const TOTAL: usize = 200_000;
    let mut random = t.random();
    let mut sender_random = t.random();
    let (mut peer, read) = t.drive(move |mut conn| async move {
        let mut at = 0;
        while at < TOTAL {
            let count = random.within(1..5000).min(TOTAL - at);
            if random.one_in(2) {
                // Polled once, waiting or not, and dropped.
                let _ = poll_once(conn.peek(count)).await;
            }
            let first = poll_once(conn.next(count)).await;
            let bytes = match first {
                Some(bytes) => bytes?,
                None => conn.next(count).await?,
            };
            assert_pattern(&bytes, at);
            at += count;
        }
        Ok(())
    })?;
    let mut at = 0;
    while at < TOTAL {
        let count = sender_random.within(1..7000).min(TOTAL - at);
        peer.write_all(&pattern(at, count))?;
        at += count;
        thread::yield_now();
    }
    read.wait();
    Ok(())
}

/// A slice is ref-counted, may go to another thread, and keeps its bytes after the close.
pub(crate) fn slices_outlive_the_connection_on_another_thread(t: &Fixture) -> Check {
    let (mut peer, read) = t.drive(|mut conn| async move {
        let mut slices = Vec::new();
        for size in [1, 100, 5000, 70_000, 3] {
            slices.push(conn.next(size).await?);
        }
        conn.close();
        Ok(slices)
    })?;
    peer.write_all(&pattern(0, 75_104))?;
    let slices = read.wait();
    assert_ended(&peer);
    let checked = on_thread(move || {
        let mut at = 0;
        for slice in slices {
            assert_pattern(&slice, at);
            at += slice.len();
        }
        Ok(at)
    });
    assert_eq!(checked.wait(), 75_104);
    Ok(())
}

/// A demand for more than the watermark must raise it, or the reader would wait for ever.
pub(crate) fn a_read_larger_than_the_high_watermark_completes(t: &Fixture) -> Check {
    const SIZE: usize = 1 << 20;
    let tuning = Tuning { input_watermarks: (4096, 16_384), ..Tuning::default() };
    let (mut peer, read) = t.drive_tuned(tuning, |mut conn| async move {
        assert_pattern(&conn.peek(SIZE).await?, 0);
        assert_pattern(&conn.next(SIZE).await?, 0);
        let line = conn.until(b'!').await?;
        assert_eq!(line.len(), 100_001);
        Ok(())
    })?;
    peer.write_all(&pattern(0, SIZE))?;
    peer.write_all(&[b'.'; 100_000])?;
    peer.write_all(b"!")?;
    read.wait();
    Ok(())
}

/// `ConnectionStats` count what moved.
pub(crate) fn counters_match_the_bytes_that_moved(t: &Fixture) -> Check {
    let (mut peer, read) = t.drive(|mut conn| async move {
        conn.next(1000).await?;
        conn.write(pattern(0, 300))?;
        conn.flush().await?;
        conn.peek(234).await?;
        let stats = conn.stats();
        assert_eq!((stats.received_bytes, stats.sent_bytes, stats.unsent_bytes), (1234, 300, 0));
        // What the reader has taken to itself may be counted late, never early.
        assert!((234..=1234).contains(&stats.unread_bytes), "{stats:?}");
        Ok(())
    })?;
    peer.write_all(&pattern(0, 1234))?;
    read.wait();
    assert_pattern(&read_exactly(&peer, 300)?, 0);
    eventually("its poller counted the same", || {
        let stats = t.stats();
        (stats.received_bytes, stats.sent_bytes) == (1234, 300)
    });
    Ok(())
}

/// A peer that sends a byte at a time costs no byte, and not a block per byte.
pub(crate) fn bytes_sent_one_at_a_time_arrive_in_order(t: &Fixture) -> Check {
    const COUNT: usize = 2000;
    let (sends, sent) = outcome();
    let (mut peer, read) = t.drive(|mut conn| async move {
        tell(sends, Ok((*conn).clone()));
        assert_pattern(&conn.next(COUNT + 1).await?, 0);
        Ok(())
    })?;
    let handle = sent.wait();
    for byte in pattern(0, COUNT) {
        peer.write_all(&[byte])?;
    }
    eventually("all but one byte are buffered", || handle.stats().unread_bytes == COUNT as u64);
    let blocks = t.stats().blocks;
    assert!(blocks <= 16, "{blocks} blocks hold {COUNT} bytes");
    read.assert_pending();
    peer.write_all(&pattern(COUNT, 1))?;
    read.wait();
    Ok(())
}
