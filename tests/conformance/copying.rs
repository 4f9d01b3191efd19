//! `copy_bidirectional`: bytes come whole, ends are passed on as ends, and failures as resets.

use std::io::{self, Write};
use std::net::{Shutdown, TcpStream};
use std::time::Duration;

use ringpoll::{Copied, CopyError, CopySide, Handle, copy_bidirectional};

use crate::harness::*;

macro_rules! cases {
    ($tests:ident, $mount:ident) => {
        $tests! { $mount, copying:
            both_directions_come_whole_and_are_counted
            a_half_close_is_passed_on_and_the_other_direction_continues
            bytes_buffered_or_written_before_are_moved_first
            a_reset_of_one_side_resets_the_other
            a_reset_after_the_end_of_the_stream_fails_the_other_direction
            a_receiver_that_does_not_read_stops_its_sender
            a_read_timeout_names_its_side_and_resets_both
            dropping_the_future_resets_both_peers
        }
    };
}
pub(crate) use cases;

const LARGE_BYTES: usize = 3 << 20;

type Ended = Outcome<Result<Copied, CopyError>>;

/// Two peers, and the copy between their connections.
fn copied(t: &Fixture) -> Check<(TcpStream, TcpStream, Ended, [Handle; 2])> {
    let (mut b, peer_b) = t.client()?;
    let (sends, sent) = outcome();
    let (peer_a, ended) = t.drive(move |mut a| async move {
        tell(sends, Ok([a.handle(), b.handle()]));
        Ok(copy_bidirectional(&mut a, &mut b).await)
    })?;
    Ok((peer_a, peer_b, ended, sent.wait()))
}

/// Writes a pattern on a thread of its own, and ends the stream.
fn sending(stream: &TcpStream, offset: usize, bytes: usize) -> Check<Outcome<()>> {
    let mut stream = stream.try_clone()?;
    Ok(on_thread(move || {
        stream.write_all(&pattern(offset, bytes))?;
        Ok(stream.shutdown(Shutdown::Write)?)
    }))
}

/// The peer's stream was reset, and did not end.
#[track_caller]
fn assert_reset(mut stream: &TcpStream) {
    let ended = io::copy(&mut stream, &mut io::sink());
    let error = ended.expect_err("a failure looks like the end of the stream");
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset, "{error}");
}

pub(crate) fn both_directions_come_whole_and_are_counted(t: &Fixture) -> Check {
    let (a, b, ended, _) = copied(t)?;
    let (from_a, from_b) = (sending(&a, 0, LARGE_BYTES)?, sending(&b, 7, 2 * LARGE_BYTES)?);
    let at_b = on_thread(move || Ok(read_all(b)?));
    assert_pattern(&read_all(a)?, 7);
    let at_b = at_b.wait();
    assert_eq!(at_b.len(), LARGE_BYTES);
    assert_pattern(&at_b, 0);
    from_a.wait();
    from_b.wait();
    let copied = ended.wait().expect("both streams have ended");
    let counts = (copied.a_to_b_bytes, copied.b_to_a_bytes);
    assert_eq!(counts, (LARGE_BYTES as u64, 2 * LARGE_BYTES as u64));
    Ok(())
}

pub(crate) fn a_half_close_is_passed_on_and_the_other_direction_continues(t: &Fixture) -> Check {
    let (mut a, mut b, ended, _) = copied(t)?;
    a.write_all(b"question")?;
    a.shutdown(Shutdown::Write)?;
    assert_eq!(read_all(&b)?, b"question");
    ended.assert_pending();
    b.write_all(b"answer")?;
    assert_eq!(read_exactly(&a, 6)?, b"answer");
    ended.assert_pending();
    b.shutdown(Shutdown::Write)?;
    assert_eof(&a);
    assert!(ended.wait().is_ok());
    Ok(())
}

pub(crate) fn bytes_buffered_or_written_before_are_moved_first(t: &Fixture) -> Check {
    let (mut b, mut peer_b) = t.client()?;
    let (mut peer_a, ended) = t.drive(move |mut a| async move {
        assert_eq!(a.peek(5).await?[..], b"early"[..]);
        a.write("to a, ")?;
        b.write("to b, ")?;
        Ok(copy_bidirectional(&mut a, &mut b).await?)
    })?;
    peer_a.write_all(b"early")?;
    // Neither peer sends more before it has these bytes.
    assert_eq!(read_exactly(&peer_b, 11)?, b"to b, early");
    assert_eq!(read_exactly(&peer_a, 6)?, b"to a, ");
    peer_b.write_all(b"late")?;
    peer_b.shutdown(Shutdown::Write)?;
    assert_eq!(read_all(&peer_a)?, b"late");
    peer_a.shutdown(Shutdown::Write)?;
    let copied = ended.wait();
    assert_eq!((copied.a_to_b_bytes, copied.b_to_a_bytes), (5, 4));
    Ok(())
}

pub(crate) fn a_reset_of_one_side_resets_the_other(t: &Fixture) -> Check {
    for failing in [CopySide::A, CopySide::B] {
        let (a, b, ended, _) = copied(t)?;
        let (mut fails, mut stays) = if failing == CopySide::A { (a, b) } else { (b, a) };
        fails.write_all(b"a part")?;
        assert_eq!(read_exactly(&stays, 6)?, b"a part");
        stays.write_all(b"unread")?;
        reset(fails)?;
        assert_reset(&stays);
        let failed = ended.wait().expect_err("one side was reset");
        assert_eq!(failed.side, failing, "{failed}");
        assert!(failed.error.is_closed(), "{failed}");
        let there = match failing {
            CopySide::A => failed.copied.a_to_b_bytes,
            CopySide::B => failed.copied.b_to_a_bytes,
        };
        assert_eq!(there, 6);
    }
    Ok(())
}

/// `b` has ended its stream in order, so only what `a` sends shows that `b` has gone.
pub(crate) fn a_reset_after_the_end_of_the_stream_fails_the_other_direction(t: &Fixture) -> Check {
    let (mut a, b, ended, _) = copied(t)?;
    b.shutdown(Shutdown::Write)?;
    assert_eof(&a);
    reset(b)?;
    // Nobody receives these bytes.
    while a.write_all(&[0; 1024]).is_ok() {}
    let failed = ended.wait().expect_err("b was reset");
    assert_eq!(failed.side, CopySide::B, "{failed}");
    Ok(())
}

pub(crate) fn a_receiver_that_does_not_read_stops_its_sender(t: &Fixture) -> Check {
    const MORE_THAN_FITS: usize = 32 << 20;
    let (a, b, ended, [conn_a, conn_b]) = copied(t)?;
    let sent = sending(&a, 0, MORE_THAN_FITS)?;
    let mut moved = 0;
    // The kernel has taken nothing more for a while.
    let is_stuck = || {
        let before = std::mem::replace(&mut moved, conn_b.stats().sent_bytes);
        std::thread::sleep(Duration::from_millis(50));
        moved > 0 && before == moved
    };
    eventually("the sender is stopped", is_stuck);
    let (unread, unsent) = (conn_a.stats().unread_bytes, conn_b.stats().unsent_bytes);
    // The high watermark, and the bytes of receives that were under way.
    assert!(unread <= 3 << 20, "{unread} bytes are unread");
    assert!(unsent <= 256 << 10, "{unsent} bytes are unsent");
    sent.assert_pending();
    let bytes = read_all(&b)?;
    assert_eq!(bytes.len(), MORE_THAN_FITS);
    assert_pattern(&bytes, 0);
    b.shutdown(Shutdown::Write)?;
    sent.wait();
    assert_eof(&a);
    assert!(ended.wait().is_ok());
    Ok(())
}

pub(crate) fn a_read_timeout_names_its_side_and_resets_both(t: &Fixture) -> Check {
    let (mut a, b, ended, [_, conn_b]) = copied(t)?;
    a.write_all(b"x")?;
    assert_eq!(read_exactly(&b, 1)?, b"x");
    conn_b.set_read_timeout(Some(Duration::from_millis(30)));
    let failed = ended.wait().expect_err("b sends nothing");
    assert!(failed.side == CopySide::B && failed.error.is_read_timeout(), "{failed}");
    assert_reset(&a);
    assert_reset(&b);
    Ok(())
}

pub(crate) fn dropping_the_future_resets_both_peers(t: &Fixture) -> Check {
    let (mut b, peer_b) = t.client()?;
    let (mut peer_a, dropped) = t.drive(move |mut a| async move {
        a.peek(1).await?;
        assert!(poll_once(copy_bidirectional(&mut a, &mut b)).await.is_none());
        assert!(a.is_closed() && b.is_closed());
        Ok(())
    })?;
    peer_a.write_all(b"x")?;
    dropped.wait();
    assert_reset(&peer_a);
    assert_reset(&peer_b);
    Ok(())
}
