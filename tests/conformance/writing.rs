//! Writing: nothing leaves before it is submitted, everything submitted leaves in order.

use std::io::Write;
use std::net::TcpStream;

use bytes::BufMut;
use ringpoll::buffer::{LinkBuffer, Writer};
use ringpoll::{Connection, Slice};

use crate::harness::*;

macro_rules! cases {
    ($tests:ident, $mount:ident) => {
        $tests! { $mount, writing:
            a_flush_waits_for_a_peer_that_does_not_read_and_then_drains
            closing_ends_a_flush_that_waits
            messages_of_every_size_come_back_equal
            large_messages_ping_pong
            what_was_flushed_before_the_close_arrives_whole
            nothing_leaves_before_it_is_submitted
            submit_sends_without_being_awaited
            reserved_bytes_are_zero_and_commit_keeps_the_first
            what_is_put_into_a_reserved_buf_is_written_and_nothing_else
            committing_more_than_was_reserved_is_invalid
            insert_places_bytes_inside_the_reservation
            inserting_beyond_the_reservation_is_invalid
            large_writes_by_reference_leave_the_slice_usable
            append_moves_a_link_buffer_in_order
            every_writer_method_keeps_the_order
            shutdown_write_sends_everything_and_then_fin
            halves_work_on_two_tasks_at_once
            dropping_a_waiting_flush_loses_no_byte
            two_directions_at_once_do_not_block_each_other
        }
    };
}
pub(crate) use cases;

/// Sizes are large in release builds, and smaller where the code is slow.
const FLUSHES: usize = 129;
const FLUSH_BYTES: usize = if cfg!(debug_assertions) { 128 << 10 } else { 2 << 20 };
const MESSAGE_BYTES_MAX: usize = if cfg!(debug_assertions) { 8 << 20 } else { 128 << 20 };

pub(crate) fn a_flush_waits_for_a_peer_that_does_not_read_and_then_drains(t: &Fixture) -> Check {
    let (sends, sent) = outcome();
    let (peer, wrote) = t.drive(|mut conn| async move {
        tell(sends, Ok((*conn).clone()));
        for index in 0..FLUSHES {
            conn.write(pattern(index * FLUSH_BYTES, FLUSH_BYTES))?;
            conn.flush().await?;
            assert_eq!(conn.stats().unsent_bytes, 0, "flush returned before the kernel had all");
        }
        Ok(())
    })?;
    let handle = sent.wait();
    eventually("a flush waits", || handle.stats().unsent_bytes > 0);
    wrote.assert_pending();
    let mut at = 0;
    while at < FLUSHES * FLUSH_BYTES {
        assert_pattern(&read_exactly(&peer, FLUSH_BYTES)?, at);
        at += FLUSH_BYTES;
    }
    wrote.wait();
    Ok(())
}

pub(crate) fn closing_ends_a_flush_that_waits(t: &Fixture) -> Check {
    let (sends, sent) = outcome();
    let (peer, wrote) = t.drive(|mut conn| async move {
        tell(sends, Ok((*conn).clone()));
        loop {
            // The close may come between two flushes.
            if let Err(error) = conn.write(pattern(0, FLUSH_BYTES)) {
                return Ok(error);
            }
            if let Err(error) = conn.flush().await {
                return Ok(error);
            }
        }
    })?;
    let handle = sent.wait();
    eventually("a flush waits", || handle.stats().unsent_bytes > 0);
    wrote.assert_pending();
    handle.close();
    let error = wrote.wait();
    assert!(error.is_closed() && !error.is_eof(), "{error:?}");
    // What the kernel had already may still be read; then the stream is over.
    let _ = read_all(&peer);
    Ok(())
}

pub(crate) fn messages_of_every_size_come_back_equal(t: &Fixture) -> Check {
    let tuning = Tuning { read_bytes_max: MESSAGE_BYTES_MAX, ..Tuning::default() };
    let (mut peer, echoed) = t.drive_tuned(tuning, |mut conn| async move {
        loop {
            let size = u32::from_be_bytes(conn.next(4).await?[..].try_into()?) as usize;
            if size == 0 {
                return Ok(());
            }
            let message = conn.next(size).await?;
            assert_eq!(message.len(), size);
            conn.write(message)?;
            conn.flush().await?;
        }
    })?;
    let mut size = MESSAGE_BYTES_MAX;
    while size > 0 {
        let message = pattern(size, size);
        peer.write_all(&(size as u32).to_be_bytes())?;
        peer.write_all(&message)?;
        assert!(read_exactly(&peer, size)? == message, "{size} bytes came back different");
        size /= 2;
    }
    peer.write_all(&0_u32.to_be_bytes())?;
    echoed.wait();
    Ok(())
}

pub(crate) fn large_messages_ping_pong(t: &Fixture) -> Check {
    const SIZE: usize = 16 << 10;
    const ROUNDS: usize = 200;
    let (peer, echoed) = t.drive(|mut conn| async move {
        for _ in 0..ROUNDS {
            let message = conn.next(SIZE).await?;
            conn.write_copy(&message)?;
            conn.flush().await?;
        }
        Ok(())
    })?;
    for round in 0..ROUNDS {
        assert_pattern(&exchange(&peer, &pattern(round, SIZE))?, round);
    }
    echoed.wait();
    Ok(())
}

/// Ok from flush and an immediate close lose nothing.
pub(crate) fn what_was_flushed_before_the_close_arrives_whole(t: &Fixture) -> Check {
    for size in [1, 27_260, 300_000] {
        let (peer, wrote) = t.drive(move |mut conn| async move {
            conn.write(pattern(0, size))?;
            conn.flush().await?;
            conn.close();
            Ok(())
        })?;
        wrote.wait();
        let got = read_all(&peer)?;
        assert_eq!(got.len(), size);
        assert_pattern(&got, 0);
    }
    Ok(())
}

/// Invisible until submit or flush.
pub(crate) fn nothing_leaves_before_it_is_submitted(t: &Fixture) -> Check {
    let (mut peer, wrote) = t.drive(|mut conn| async move {
        conn.write_copy(b"held ")?;
        conn.write(&b"back"[..])?;
        assert_eq!(conn.pending_len(), 9);
        // Waiting for the peer gives a poller that would send too early every chance to.
        assert_eq!(conn.read_byte().await?, b'?');
        let stats = conn.stats();
        assert_eq!((conn.pending_len(), stats.sent_bytes), (9, 0));
        conn.flush().await?;
        assert_eq!(conn.pending_len(), 0);
        Ok(())
    })?;
    peer.write_all(b"?")?;
    assert_eq!(read_exactly(&peer, 9)?, b"held back");
    wrote.wait();
    Ok(())
}

/// `submit` hands over without waiting, and what follows keeps its place.
pub(crate) fn submit_sends_without_being_awaited(t: &Fixture) -> Check {
    let (mut peer, wrote) = t.drive(|mut conn| async move {
        conn.write_copy(&pattern(0, 1000))?;
        conn.submit()?;
        assert_eq!(conn.pending_len(), 0);
        assert_eq!(conn.read_byte().await?, b'!');
        conn.write_copy(&pattern(1000, 1000))?;
        conn.submit()?;
        conn.write_copy(&pattern(2000, 1000))?;
        conn.flush().await?;
        Ok(())
    })?;
    assert_pattern(&read_exactly(&peer, 1000)?, 0);
    peer.write_all(b"!")?;
    assert_pattern(&read_exactly(&peer, 2000)?, 1000);
    wrote.wait();
    Ok(())
}

pub(crate) fn what_is_put_into_a_reserved_buf_is_written_and_nothing_else(t: &Fixture) -> Check {
    let (peer, wrote) = t.drive(|mut conn| async move {
        // Dirty memory first, so that bytes of a recycled block would show.
        conn.write_copy(&[0xff; 4000])?;
        conn.flush().await?;
        conn.reserve(5)?.copy_from_slice(b"first");
        let mut room = conn.reserve_buf(4000)?;
        room.put_u16(0x2121);
        room.put_slice(b"put");
        assert_eq!(room.remaining_mut(), 4000 - 5);
        assert_eq!(conn.pending_len(), 5 + 5);
        assert!(conn.commit(1).is_err(), "nothing is left to commit");
        conn.reserve(4)?.copy_from_slice(b"endx");
        conn.commit(3)?;
        assert_eq!(conn.reserve_buf(0)?.remaining_mut(), 0);
        let mut full = conn.reserve_buf(2)?;
        let overfill = move || full.put_slice(b"abc");
        assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(overfill)).is_err());
        let large = pattern(0, 100_000);
        conn.reserve_buf(large.len())?.put_slice(&large);
        conn.flush().await?;
        conn.close();
        assert!(conn.reserve_buf(1).is_err_and(|error| error.is_closed()));
        Ok(())
    })?;
    wrote.wait();
    let got = read_all(&peer)?;
    assert_eq!(got[4000..4013], b"first!!putend"[..]);
    assert_eq!(got.len(), 4013 + 100_000);
    assert_pattern(&got[4013..], 0);
    Ok(())
}

/// A commit covers all that was reserved since the last one.
pub(crate) fn reserved_bytes_are_zero_and_commit_keeps_the_first(t: &Fixture) -> Check {
    let (peer, wrote) = t.drive(|mut conn| async move {
        // Dirty memory first, so that a recycled block would show.
        conn.write_copy(&[0xff; 4000])?;
        conn.flush().await?;
        let area = conn.reserve(4000)?;
        assert!(area.iter().all(|byte| *byte == 0), "reserved memory holds old bytes");
        area[..4].copy_from_slice(b"keep");
        conn.commit(4)?;
        conn.reserve(6)?.copy_from_slice(b"first-");
        conn.reserve(9)?.copy_from_slice(b"secondcut");
        assert_eq!(conn.pending_len(), 4 + 15);
        conn.commit(12)?;
        assert_eq!(conn.pending_len(), 4 + 12);
        // Without a commit a reservation counts as written.
        conn.reserve(3)?.copy_from_slice(b"end");
        conn.flush().await?;
        conn.close();
        Ok(())
    })?;
    wrote.wait();
    let got = read_all(&peer)?;
    assert_eq!(got[4000..], b"keepfirst-secondend"[..]);
    Ok(())
}

pub(crate) fn committing_more_than_was_reserved_is_invalid(t: &Fixture) -> Check {
    let (peer, wrote) = t.drive(|mut conn| async move {
        conn.reserve(4)?.copy_from_slice(b"four");
        let error = conn.commit(5).expect_err("only 4 are reserved");
        assert!(error.is_invalid(), "{error:?}");
        conn.commit(4)?;
        let error = conn.commit(1).expect_err("nothing is reserved any more");
        assert!(error.is_invalid(), "{error:?}");
        conn.flush().await?;
        conn.close();
        Ok(())
    })?;
    wrote.wait();
    assert_eq!(read_all(&peer)?, b"four");
    Ok(())
}

pub(crate) fn insert_places_bytes_inside_the_reservation(t: &Fixture) -> Check {
    let (peer, wrote) = t.drive(|mut conn| async move {
        conn.write_copy(b"<")?;
        conn.reserve(8)?.copy_from_slice(b"headtail");
        conn.insert(b"-MIDDLE-", 4)?;
        conn.write_copy(b">")?;
        assert_eq!(conn.pending_len(), 1 + 8 + 8 + 1);
        // The inserted bytes are large enough to go by reference.
        conn.reserve(2)?.copy_from_slice(b"ab");
        conn.insert(pattern(0, 10_000), 1)?;
        conn.flush().await?;
        conn.close();
        Ok(())
    })?;
    wrote.wait();
    let got = read_all(&peer)?;
    assert_eq!(got[..18], b"<head-MIDDLE-tail>"[..]);
    assert_eq!((got[18], got[got.len() - 1]), (b'a', b'b'));
    assert_pattern(&got[19..got.len() - 1], 0);
    assert_eq!(got.len(), 18 + 2 + 10_000);
    Ok(())
}

/// Nothing changes then.
pub(crate) fn inserting_beyond_the_reservation_is_invalid(t: &Fixture) -> Check {
    let (peer, wrote) = t.drive(|mut conn| async move {
        conn.reserve(4)?.copy_from_slice(b"four");
        let error = conn.insert(&b"x"[..], 5).expect_err("only 4 are reserved");
        assert!(error.is_invalid(), "{error:?}");
        assert_eq!(conn.pending_len(), 4);
        conn.flush().await?;
        conn.close();
        Ok(())
    })?;
    wrote.wait();
    assert_eq!(read_all(&peer)?, b"four");
    Ok(())
}

/// The same slice may be written many times and stays readable.
pub(crate) fn large_writes_by_reference_leave_the_slice_usable(t: &Fixture) -> Check {
    let (peer, wrote) = t.drive(|mut conn| async move {
        let slice = Slice::from(pattern(0, 50_000));
        for _ in 0..20 {
            conn.write(slice.clone())?;
        }
        conn.flush().await?;
        assert_pattern(&slice, 0);
        conn.close();
        Ok(())
    })?;
    for _ in 0..20 {
        assert_pattern(&read_exactly(&peer, 50_000)?, 0);
    }
    assert_eof(&peer);
    wrote.wait();
    Ok(())
}

/// Of a link buffer, the flushed bytes come first.
pub(crate) fn append_moves_a_link_buffer_in_order(t: &Fixture) -> Check {
    let (mut peer, wrote) = t.drive(|mut conn| async move {
        let mut buffer = LinkBuffer::new();
        Writer::write(&mut buffer, pattern(3, 9000))?;
        buffer.write_copy(&pattern(9003, 10))?;
        Writer::flush(&mut buffer)?;
        buffer.write_copy(&pattern(9013, 87))?;
        conn.write_copy(&pattern(0, 3))?;
        conn.append(buffer)?;
        assert_eq!(conn.pending_len(), 9100);
        // Zero-copy proxying: what was read is appended as it is.
        let read = conn.slice(6000).await?;
        conn.append(read)?;
        conn.flush().await?;
        Ok(())
    })?;
    peer.write_all(&pattern(9100, 6000))?;
    assert_pattern(&read_exactly(&peer, 15_100)?, 0);
    wrote.wait();
    Ok(())
}

/// Every way to write, mixed, against the position in the stream.
pub(crate) fn every_writer_method_keeps_the_order(t: &Fixture) -> Check {
    const ROUNDS: usize = 500;
    let mut random = t.random();
    let (peer, wrote) = t.drive(move |mut conn| async move {
        let mut at = 0;
        for _ in 0..ROUNDS {
            let count = random.within(1..6000);
            write_somehow(&mut conn, &mut random, at, count).await?;
            at += count;
            match random.within(0..4) {
                0 => conn.flush().await?,
                // The bound on waiting output is not what this test is about.
                1 if conn.submit().is_err() => conn.flush().await?,
                _ => {}
            }
        }
        conn.shutdown_write().await?;
        Ok(at)
    })?;
    let got = read_all(&peer)?;
    assert_pattern(&got, 0);
    assert_eq!(got.len(), wrote.wait());
    Ok(())
}

async fn write_somehow(
    conn: &mut Connection,
    random: &mut Random,
    at: usize,
    count: usize,
) -> ringpoll::Result<()> {
    let bytes = pattern(at, count);
    match random.within(0..5) {
        0 => conn.write(bytes),
        1 => conn.write_copy(&bytes),
        2 => {
            let surplus = random.within(0..100);
            conn.reserve(count + surplus)?[..count].copy_from_slice(&bytes);
            conn.commit(count)
        }
        3 => {
            let split = random.within(0..count).max(1);
            let tail = (count - split) / 2;
            let area = conn.reserve(split + tail)?;
            area[..split].copy_from_slice(&bytes[..split]);
            area[split..].copy_from_slice(&bytes[count - tail..]);
            conn.insert(bytes[split..count - tail].to_vec(), tail)?;
            // Ends the reservation, so that a later commit does not reach back into it.
            conn.flush().await
        }
        _ => {
            let mut buffer = LinkBuffer::new();
            Writer::write(&mut buffer, bytes)?;
            conn.append(buffer)
        }
    }
}

/// Half-close by this side: FIN comes after the last byte, and reading continues.
pub(crate) fn shutdown_write_sends_everything_and_then_fin(t: &Fixture) -> Check {
    let (mut peer, wrote) = t.drive(|mut conn| async move {
        conn.write(pattern(0, 200_000))?;
        conn.shutdown_write().await?;
        let late = conn.write(pattern(0, 1));
        assert!(late.is_err() || conn.flush().await.is_err(), "wrote after the FIN");
        assert_eq!(conn.next(7).await?[..], b"goodbye"[..]);
        Ok(())
    })?;
    let got = read_all(&peer)?;
    assert_eq!(got.len(), 200_000);
    assert_pattern(&got, 0);
    peer.write_all(b"goodbye")?;
    wrote.wait();
    Ok(())
}

/// Reader and writer at the same time, each on a task of its own.
pub(crate) fn halves_work_on_two_tasks_at_once(t: &Fixture) -> Check {
    const TOTAL: usize = 2 << 20;
    let (peer, moved) = t.drive(|conn| async move {
        let (mut reader, mut writer) = conn.split();
        let write = runtime().spawn(async move {
            for at in (0..TOTAL).step_by(8192) {
                writer.write(pattern(at, 8192))?;
                writer.flush().await?;
            }
            Ok::<_, Failure>(())
        });
        for at in (0..TOTAL).step_by(4096) {
            assert_pattern(&reader.next(4096).await?, at);
        }
        write.await??;
        Ok(())
    })?;
    exchange_at_once(&peer, TOTAL)?;
    moved.wait();
    Ok(())
}

/// Sends and receives `total` bytes of the stream at the same time.
fn exchange_at_once(peer: &TcpStream, total: usize) -> Check {
    let mut sender = peer.try_clone()?;
    let sent = on_thread(move || Ok(sender.write_all(&pattern(0, total))?));
    assert_pattern(&read_exactly(peer, total)?, 0);
    sent.wait();
    Ok(())
}

/// A flush whose future was dropped still happens, once and in order.
pub(crate) fn dropping_a_waiting_flush_loses_no_byte(t: &Fixture) -> Check {
    const COUNT: usize = 100;
    let (peer, wrote) = t.drive(|mut conn| async move {
        for index in 0..COUNT {
            conn.write(pattern(index * FLUSH_BYTES, FLUSH_BYTES))?;
            if let Some(result) = poll_once(conn.flush()).await {
                result?;
            }
        }
        conn.flush().await?;
        conn.close();
        Ok(())
    })?;
    for index in 0..COUNT {
        assert_pattern(&read_exactly(&peer, FLUSH_BYTES)?, index * FLUSH_BYTES);
    }
    assert_eof(&peer);
    wrote.wait();
    Ok(())
}

/// A flush that waits for room does not keep input from being read by the other half.
pub(crate) fn two_directions_at_once_do_not_block_each_other(t: &Fixture) -> Check {
    let (mut peer, moved) = t.drive(|conn| async move {
        let (mut reader, mut writer) = conn.split();
        let write = runtime().spawn(async move {
            writer.write(pattern(0, 16 << 20))?;
            writer.flush().await?;
            Ok::<_, Failure>(())
        });
        assert_pattern(&reader.next(300_000).await?, 0);
        write.await??;
        Ok(())
    })?;
    // Read nothing until everything is sent: the other side's output is stuck meanwhile.
    peer.write_all(&pattern(0, 300_000))?;
    assert_pattern(&read_exactly(&peer, 16 << 20)?, 0);
    moved.wait();
    Ok(())
}
