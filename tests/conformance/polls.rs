//! The poll methods: given up at any time, timed like their async twins, woken by every end.

use std::future::poll_fn;
use std::io::{IoSlice, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::time::{Duration, Instant};

use ringpoll::{Connection, Error, Handle, Result};

use crate::harness::*;

macro_rules! cases {
    ($tests:ident, $mount:ident) => {
        $tests! { $mount, polls:
            reads_that_are_given_up_lose_nothing
            a_read_that_was_given_up_lets_no_more_input_in
            writes_and_flushes_that_are_given_up_keep_the_order
            a_flush_covers_what_was_written_between_its_polls
            writes_wait_for_room_and_go_on_with_it
            room_is_within_the_callers_bound_and_the_connections
            vectored_writes_of_any_size_keep_the_order_and_the_bound
            a_flush_within_a_bound_leaves_that_much_to_the_poller
            lost_bytes_are_told_by_flushes_that_did_not_wait_for_them
            a_write_timeout_ends_a_wait_for_room
            a_write_timeout_ends_a_flush_however_often_it_is_polled
            a_read_timeout_ends_a_wait_however_often_it_is_polled
            bytes_that_came_end_a_wait_that_was_given_up
            moving_a_deadline_wakes_both_sides
            a_close_wakes_both_sides
            the_peers_end_is_zero_bytes
            ending_the_stream_may_be_repeated
            every_poll_after_a_close_reports_closed
            the_last_waker_is_woken_and_no_other_is_kept
            parts_that_go_forget_who_polled_them
            a_handler_may_wait_for_its_output_and_for_more
        }
    };
}
pub(crate) use cases;

const SHORT: Duration = Duration::from_millis(50);

/// More than the kernel takes for a peer that does not read.
static TOO_MUCH: [u8; 8 << 20] = [7; 8 << 20];

async fn readable(conn: &mut Connection) -> Result<usize> {
    poll_fn(|cx| conn.poll_readable(cx)).await
}

async fn writable(conn: &mut Connection) -> Result<usize> {
    poll_fn(|cx| conn.poll_writable(cx)).await
}

async fn flushed(conn: &mut Connection) -> Result<()> {
    poll_fn(|cx| conn.poll_flush(cx)).await
}

/// Lets others run until `at`.
async fn turns_until(at: Instant) {
    poll_fn(|cx| {
        if Instant::now() >= at {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

/// Polls again and again until it is ready.
async fn polled_often<T>(mut poll: impl FnMut(&mut Context<'_>) -> Poll<T>) -> T {
    poll_fn(|cx| {
        cx.waker().wake_by_ref();
        poll(cx)
    })
    .await
}

/// A connection whose owner is the test, not a handler, and the peer.
fn held(t: &Fixture, tuning: Tuning) -> Check<(Connection, TcpStream)> {
    let (peer, conn) = t.drive_tuned(tuning, |conn| async move { Ok(conn) })?;
    Ok((conn.wait(), peer))
}

/// Between other reads, of any kind.
pub(crate) fn reads_that_are_given_up_lose_nothing(t: &Fixture) -> Check {
    const TOTAL: usize = 2 << 20;
    let mut random = t.random();
    let (mut peer, read) = t.drive(move |mut conn| async move {
        let (mut at, mut given_up) = (0, 0);
        loop {
            if poll_once(readable(&mut conn)).await.is_none() {
                given_up += 1;
            }
            // After the last byte there is nothing to read, so one at least was given up.
            if at == TOTAL {
                break;
            }
            let wanted = random.within(1..20_000).min(TOTAL - at);
            match random.within(0..4) {
                0 => assert_pattern(&conn.next(wanted).await?, at),
                1 => {
                    assert_pattern(&conn.peek(wanted).await?, at);
                    conn.skip(wanted).await?;
                }
                2 => {
                    // Given up with a registration for more than one byte.
                    if poll_once(conn.peek(wanted)).await.is_none() {
                        conn.write_copy(b".")?;
                    }
                    readable(&mut conn).await?;
                    assert_pattern(&conn.next(1).await?, at);
                    at += 1;
                    continue;
                }
                _ => {
                    let count = readable(&mut conn).await?.min(wanted);
                    let front = conn.buffered().len().min(count);
                    assert_pattern(&conn.buffered()[..front], at);
                    assert_pattern(&conn.try_next(count).expect("they are here"), at);
                    at += count;
                    continue;
                }
            }
            at += wanted;
        }
        assert!(given_up > 0);
        Ok(at)
    })?;
    let mut random = t.random();
    let mut at = 0;
    while at < TOTAL {
        let count = random.within(1..40_000).min(TOTAL - at);
        peer.write_all(&pattern(at, count))?;
        at += count;
    }
    assert_eq!(read.wait_for_all(), TOTAL);
    Ok(())
}

/// The registration of a poll that is never polled again.
pub(crate) fn a_read_that_was_given_up_lets_no_more_input_in(t: &Fixture) -> Check {
    const HIGH: usize = 64 << 10;
    const TOTAL: usize = 8 << 20;
    let tuning = Tuning { input_watermarks: (HIGH / 4, HIGH), ..Tuning::default() };
    let (mut conn, mut peer) = held(t, tuning)?;
    assert!(block_on(async { Ok(poll_once(readable(&mut conn)).await.is_none()) })?);
    let writer = on_thread(move || {
        peer.write_all(&pattern(0, TOTAL))?;
        Ok(peer)
    });
    eventually("input fills up", || conn.stats().unread_bytes >= HIGH as u64);
    // After a hundred round trips on another connection, the poller has received all it will.
    let bystander = dial(&t.echo_server())?;
    for _ in 0..100 {
        exchange(&bystander, b"?")?;
    }
    let unread = conn.stats().unread_bytes as usize;
    assert!(unread < 3 * HIGH, "{unread} bytes are buffered above a watermark of {HIGH}");
    writer.assert_pending();
    // A read that wants more than the mark still gets it.
    block_on(async {
        assert_pattern(&conn.next(4 * HIGH).await?, 0);
        conn.skip(TOTAL - 4 * HIGH).await?;
        Ok(())
    })?;
    drop(writer.wait());
    Ok(())
}

pub(crate) fn writes_and_flushes_that_are_given_up_keep_the_order(t: &Fixture) -> Check {
    const TOTAL: usize = 3 << 20;
    let mut random = t.random();
    let tuning = Tuning { output_bytes_max: 300_000, ..Tuning::default() };
    let (peer, wrote) = t.drive_tuned(tuning, move |mut conn| async move {
        // So that some of it always has to wait.
        shrink_send_buffer(&conn)?;
        let (mut at, mut given_up) = (0, 0);
        while at < TOTAL || given_up == 0 {
            let done = match random.within(0..3) {
                0 => poll_once(flushed(&mut conn)).await.map(|done| done.map(|()| 0)),
                1 => poll_once(conn.flush()).await.map(|done| done.map(|()| 0)),
                _ => poll_once(writable(&mut conn)).await,
            };
            match done {
                Some(done) => drop(done?),
                None => given_up += 1,
            }
            let room = writable(&mut conn).await?;
            let count = random.within(1..200_000).min(room);
            conn.write(pattern(at, count))?;
            at += count;
            if random.one_in(8) {
                flushed(&mut conn).await?;
                assert_eq!((conn.pending_len(), conn.stats().unsent_bytes), (0, 0));
            }
        }
        poll_fn(|cx| conn.poll_shutdown_write(cx)).await?;
        Ok(at)
    })?;
    let got = read_all(&peer)?;
    assert_pattern(&got, 0);
    assert_eq!(got.len(), wrote.wait());
    Ok(())
}

pub(crate) fn a_flush_covers_what_was_written_between_its_polls(t: &Fixture) -> Check {
    let (tells, told) = outcome();
    let (peer, wrote) = t.drive(|mut conn| async move {
        conn.write(&TOO_MUCH[..])?;
        assert!(poll_once(flushed(&mut conn)).await.is_none(), "the kernel took all of it");
        conn.write(&TOO_MUCH[..])?;
        tell(tells, Ok(()));
        flushed(&mut conn).await?;
        assert_eq!((conn.pending_len(), conn.stats().unsent_bytes), (0, 0));
        conn.close();
        Ok(())
    })?;
    told.wait();
    assert_eq!(read_all(&peer)?.len(), 2 * TOO_MUCH.len());
    wrote.wait();
    Ok(())
}

pub(crate) fn writes_wait_for_room_and_go_on_with_it(t: &Fixture) -> Check {
    const BOUND: usize = 100_000;
    const TOTAL: usize = 16 << 20;
    let tuning = Tuning { output_bytes_max: BOUND, ..Tuning::default() };
    let (sends, sent) = outcome();
    let (peer, wrote) = t.drive_tuned(tuning, |mut conn| async move {
        tell(sends, Ok((*conn).clone()));
        let mut at = 0;
        while at < TOTAL {
            let room = writable(&mut conn).await?;
            assert!((1..=BOUND).contains(&room), "room for {room} bytes of {BOUND}");
            let count = room.min(7777).min(TOTAL - at);
            conn.write_copy(&pattern(at, count))?;
            at += count;
            let waiting = conn.stats().unsent_bytes as usize + conn.pending_len();
            assert!(waiting <= BOUND, "{waiting} bytes wait for the peer");
        }
        flushed(&mut conn).await?;
        conn.close();
        Ok(())
    })?;
    let handle = sent.wait();
    eventually("it is full", || handle.stats().unsent_bytes >= (BOUND - 7777) as u64);
    wrote.assert_pending();
    let got = read_all(&peer)?;
    assert_pattern(&got, 0);
    assert_eq!(got.len(), TOTAL);
    wrote.wait();
    Ok(())
}

pub(crate) fn room_is_within_the_callers_bound_and_the_connections(t: &Fixture) -> Check {
    const LIMIT: usize = 100_000;
    let tuning = Tuning { output_bytes_max: LIMIT, ..Tuning::default() };
    let (mut conn, peer) = held(t, tuning)?;
    let mut at = 0;
    for within in [LIMIT / 10, usize::MAX, 0] {
        let bound = within.clamp(1, LIMIT);
        while let Some(room) = block_on(async {
            Ok(poll_once(poll_fn(|cx| conn.poll_writable_within(cx, within))).await.transpose()?)
        })? {
            assert!((1..=bound).contains(&room), "room for {room} bytes of {bound}");
            conn.write(pattern(at, room))?;
            at += room;
            let waiting = conn.stats().unsent_bytes as usize + conn.pending_len();
            assert!(waiting <= bound, "{waiting} bytes wait for the peer, of {bound}");
        }
    }
    let reading = on_thread(move || Ok(read_all(&peer)?));
    block_on(async { Ok(poll_fn(|cx| conn.poll_shutdown_write(cx)).await?) })?;
    let got = reading.wait();
    assert_pattern(&got, 0);
    assert_eq!(got.len(), at);
    Ok(())
}

pub(crate) fn vectored_writes_of_any_size_keep_the_order_and_the_bound(t: &Fixture) -> Check {
    const LIMIT: usize = 100_000;
    let tuning = Tuning { output_bytes_max: LIMIT, ..Tuning::default() };
    let (mut conn, peer) = held(t, tuning)?;
    let mut at = 0;
    // Just large enough to be sent without a copy, gathered, and more than the limit.
    for size in [32 << 10, 100, 300_000].into_iter().cycle() {
        let bytes = pattern(at, size);
        let pieces: Vec<_> = bytes.chunks(7001).map(IoSlice::new).collect();
        let polled = block_on(async {
            let write = poll_fn(|cx| conn.poll_write_vectored_within(cx, &pieces, usize::MAX));
            Ok(poll_once(write).await.transpose()?)
        })?;
        let Some(count) = polled else { break };
        assert!((1..=size).contains(&count), "{count} bytes of {size} are written");
        at += count;
        let waiting = conn.stats().unsent_bytes as usize + conn.pending_len();
        assert!(waiting <= LIMIT, "{waiting} bytes wait for the peer");
    }
    let reading = on_thread(move || Ok(read_all(&peer)?));
    block_on(async { Ok(poll_fn(|cx| conn.poll_shutdown_write(cx)).await?) })?;
    let got = reading.wait();
    assert_pattern(&got, 0);
    assert_eq!(got.len(), at);
    Ok(())
}

pub(crate) fn a_flush_within_a_bound_leaves_that_much_to_the_poller(t: &Fixture) -> Check {
    const PART: usize = TOO_MUCH.len();
    let (mut conn, peer) = held(t, Tuning::default())?;
    for _ in 0..3 {
        conn.write(&TOO_MUCH[..])?;
    }
    let first = flushed_within(&mut conn, 3 * PART)?;
    assert!(first.is_some(), "all of it may be left to the poller");
    // More than a flush sends by itself: the poller has begun with the first three parts, which a
    // ring counts when all of them are sent.
    read_exactly(&peer, PART)?;
    for _ in 0..2 {
        conn.write(&TOO_MUCH[..])?;
    }
    assert!(flushed_within(&mut conn, 2 * PART)?.is_none(), "the kernel took what nobody reads");
    let reading = on_thread(move || {
        // No more than that has to move for the flush to be over.
        read_exactly(&peer, 2 * PART)?;
        Ok(peer)
    });
    block_on(async { Ok(poll_fn(|cx| conn.poll_flush_within(cx, 2 * PART)).await?) })?;
    let peer = reading.wait();
    let unsent = conn.stats().unsent_bytes as usize;
    assert!((1..=2 * PART).contains(&unsent), "{unsent} bytes are unsent");
    let reading = on_thread(move || Ok(read_all(&peer)?.len()));
    block_on(async { Ok(poll_fn(|cx| conn.poll_shutdown_write(cx)).await?) })?;
    assert_eq!(reading.wait(), 2 * PART);
    Ok(())
}

/// One poll, which hands over what is written in any case.
fn flushed_within(conn: &mut Connection, bytes: usize) -> Check<Option<()>> {
    let polled = block_on(async {
        Ok(poll_once(poll_fn(|cx| conn.poll_flush_within(cx, bytes))).await.transpose()?)
    });
    assert_eq!(conn.pending_len(), 0);
    polled
}

pub(crate) fn lost_bytes_are_told_by_flushes_that_did_not_wait_for_them(t: &Fixture) -> Check {
    let (mut conn, peer) = held(t, Tuning::default())?;
    conn.write(&TOO_MUCH[..])?;
    block_on(async { Ok(poll_fn(|cx| conn.poll_flush_within(cx, TOO_MUCH.len())).await?) })?;
    // It has read nothing of what the kernel took: a reset.
    drop(peer);
    eventually("it is reset", || conn.submit().is_err());
    for _ in 0..2 {
        let lost = block_on(async {
            Ok(poll_once(poll_fn(|cx| conn.poll_flush_within(cx, usize::MAX))).await)
        })?;
        assert!(lost.expect("it does not wait").is_err());
        assert!(block_on(async { Ok(conn.flush().await.is_err()) })?);
    }
    Ok(())
}

pub(crate) fn a_write_timeout_ends_a_wait_for_room(t: &Fixture) -> Check {
    const BOUND: usize = 100_000;
    let tuning = Tuning { output_bytes_max: BOUND, ..Tuning::default() };
    let (tells, told) = outcome();
    let (peer, wrote) = t.drive_tuned(tuning, |mut conn| async move {
        conn.set_write_timeout(Some(SHORT));
        let mut at = 0;
        for _ in 0..2 {
            let error = loop {
                let asked = Instant::now();
                match writable(&mut conn).await {
                    Ok(room) => conn.write(pattern(at, room)).map(|()| at += room)?,
                    Err(error) => {
                        assert!(asked.elapsed() >= SHORT, "early, after {:?}", asked.elapsed());
                        break error;
                    }
                }
            };
            assert!(error.is_write_timeout(), "{error:?}");
        }
        conn.set_write_timeout(None);
        tell(tells, Ok(()));
        flushed(&mut conn).await?;
        conn.close();
        Ok(at)
    })?;
    told.wait();
    let got = read_all(&peer)?;
    assert_pattern(&got, 0);
    assert_eq!(got.len(), wrote.wait());
    Ok(())
}

pub(crate) fn a_write_timeout_ends_a_flush_however_often_it_is_polled(t: &Fixture) -> Check {
    let (peer, ended) = t.drive(|mut conn| async move {
        conn.set_write_timeout(Some(SHORT));
        conn.write(&TOO_MUCH[..])?;
        for _ in 0..2 {
            let asked = Instant::now();
            let error = polled_often(|cx| conn.poll_flush(cx)).await.expect_err("nobody reads");
            assert!(error.is_write_timeout(), "{error:?}");
            assert!(asked.elapsed() >= SHORT, "early, after {:?}", asked.elapsed());
        }
        conn.set_write_timeout(None);
        Ok(conn)
    })?;
    let mut conn = ended.wait();
    let reading = on_thread(move || Ok(read_all(&peer)?.len()));
    block_on(async { Ok(poll_fn(|cx| conn.poll_shutdown_write(cx)).await?) })?;
    assert_eq!(reading.wait(), TOO_MUCH.len());
    Ok(())
}

pub(crate) fn a_read_timeout_ends_a_wait_however_often_it_is_polled(t: &Fixture) -> Check {
    let (mut peer, ended) = t.drive(|mut conn| async move {
        conn.set_read_timeout(Some(SHORT));
        for _ in 0..2 {
            let asked = Instant::now();
            let error = polled_often(|cx| conn.poll_readable(cx)).await.expect_err("nothing comes");
            assert!(error.is_read_timeout(), "{error:?}");
            assert!(asked.elapsed() >= SHORT, "early, after {:?}", asked.elapsed());
        }
        // By its timer alone as well.
        assert!(readable(&mut conn).await.expect_err("nothing comes").is_read_timeout());
        conn.set_read_timeout(None);
        Ok(conn)
    })?;
    let mut conn = ended.wait();
    peer.write_all(b"late")?;
    block_on(async {
        assert!(readable(&mut conn).await? > 0);
        assert_eq!(conn.next(4).await?[..], *b"late");
        Ok(())
    })
}

/// Bytes that any method takes end the wait. The next wait begins anew.
pub(crate) fn bytes_that_came_end_a_wait_that_was_given_up(t: &Fixture) -> Check {
    let (mut peer, done) = t.drive(|mut conn| async move {
        for round in 0..4 {
            conn.set_read_timeout(Some(SHORT));
            let asked = Instant::now();
            assert!(poll_once(readable(&mut conn)).await.is_none(), "nothing was asked for");
            conn.write_copy(b"?")?;
            conn.flush().await?;
            turns_until(asked + SHORT).await;
            conn.set_read_timeout(Some(DEADLINE));
            match round % 2 {
                0 => assert_eq!(conn.next(1).await?[..], *b"!"),
                _ => {
                    while conn.is_empty() {
                        turns_until(Instant::now()).await;
                    }
                    assert_eq!(conn.try_next(1).expect("it is here")[..], *b"!");
                }
            }
            conn.set_read_timeout(Some(SHORT));
            let asked = Instant::now();
            assert!(readable(&mut conn).await.expect_err("nothing comes").is_read_timeout());
            assert!(asked.elapsed() >= SHORT, "early, after {:?}", asked.elapsed());
        }
        Ok(())
    })?;
    for _ in 0..4 {
        assert_eq!(read_exactly(&peer, 1)?, b"?");
        peer.write_all(b"!")?;
    }
    done.wait();
    Ok(())
}

/// How a read and a write ended.
type Ended = (Error, Error);

/// A connection of which both sides wait, far from their deadline, the peer, and how both end.
fn waiting(t: &Fixture, for_room: bool) -> Check<(Handle, TcpStream, Outcome<Ended>)> {
    let tuning = Tuning { output_bytes_max: TOO_MUCH.len(), ..Tuning::default() };
    let (sends, sent) = outcome();
    let (peer, ended) = t.drive_tuned(tuning, move |mut conn| async move {
        conn.set_deadline(Some(Instant::now() + DEADLINE));
        tell(sends, Ok((*conn).clone()));
        for _ in 0..2 {
            conn.write(&TOO_MUCH[..])?;
        }
        let (mut reader, mut writer) = conn.split();
        let reads = poll_fn(|cx| reader.poll_readable(cx));
        let writes = poll_fn(|cx| match for_room {
            true => writer.poll_writable(cx).map_ok(drop),
            false => writer.poll_flush(cx),
        });
        let (read, wrote) = tokio::join!(reads, writes);
        Ok((read.expect_err("nothing comes"), wrote.expect_err("nobody reads")))
    })?;
    let handle = sent.wait();
    // The reader is polled first.
    eventually("both wait", || handle.stats().unsent_bytes >= TOO_MUCH.len() as u64);
    Ok((handle, peer, ended))
}

pub(crate) fn moving_a_deadline_wakes_both_sides(t: &Fixture) -> Check {
    for for_room in [false, true] {
        let (handle, peer, ended) = waiting(t, for_room)?;
        let deadline = Instant::now() + SHORT;
        handle.set_deadline(Some(deadline));
        let (read, wrote) = ended.wait();
        assert!(read.is_read_timeout() && wrote.is_write_timeout(), "{read:?}, {wrote:?}");
        assert!(Instant::now() >= deadline, "early");
        handle.close();
        drop(peer);
    }
    Ok(())
}

pub(crate) fn a_close_wakes_both_sides(t: &Fixture) -> Check {
    for for_room in [false, true] {
        let (handle, peer, ended) = waiting(t, for_room)?;
        handle.close();
        let (read, wrote) = ended.wait();
        assert!(read.is_closed() && wrote.is_closed(), "{read:?}, {wrote:?}");
        drop(peer);
    }
    Ok(())
}

pub(crate) fn the_peers_end_is_zero_bytes(t: &Fixture) -> Check {
    let (mut peer, done) = t.drive(|mut conn| async move {
        let mut got = Vec::new();
        loop {
            match readable(&mut conn).await? {
                0 => break,
                count => got.extend_from_slice(&conn.next(count).await?),
            }
        }
        assert_eq!(got, b"bye");
        assert_eq!(readable(&mut conn).await?, 0);
        conn.write_copy(b"bye")?;
        poll_fn(|cx| conn.poll_shutdown_write(cx)).await?;
        Ok(())
    })?;
    peer.write_all(b"bye")?;
    peer.shutdown(std::net::Shutdown::Write)?;
    assert_eq!(read_all(&peer)?, b"bye");
    done.wait();
    Ok(())
}

pub(crate) fn ending_the_stream_may_be_repeated(t: &Fixture) -> Check {
    let (mut peer, done) = t.drive(|mut conn| async move {
        conn.write(pattern(0, 200_000))?;
        for _ in 0..2 {
            poll_fn(|cx| conn.poll_shutdown_write(cx)).await?;
            flushed(&mut conn).await?;
            conn.shutdown_write().await?;
        }
        assert!(writable(&mut conn).await.expect_err("it has ended").is_closed());
        assert_eq!(conn.next(7).await?[..], *b"goodbye");
        conn.write_copy(b"late")?;
        assert!(flushed(&mut conn).await.expect_err("it has ended").is_closed());
        Ok(())
    })?;
    let got = read_all(&peer)?;
    assert_pattern(&got, 0);
    assert_eq!(got.len(), 200_000);
    peer.write_all(b"goodbye")?;
    done.wait();
    Ok(())
}

pub(crate) fn every_poll_after_a_close_reports_closed(t: &Fixture) -> Check {
    let (peer, done) = t.drive(|mut conn| async move {
        conn.close();
        assert!(readable(&mut conn).await.expect_err("closed").is_closed());
        assert!(writable(&mut conn).await.expect_err("closed").is_closed());
        assert!(flushed(&mut conn).await.expect_err("closed").is_closed());
        let ended = poll_fn(|cx| conn.poll_shutdown_write(cx)).await;
        assert!(ended.expect_err("closed").is_closed());
        Ok(())
    })?;
    done.wait();
    assert_ended(&peer);
    Ok(())
}

/// A waker that tells whether it was used, and how many there are of it.
#[derive(Default)]
struct Notice(AtomicBool);

impl Wake for Notice {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::Release);
    }
}

struct Noticing {
    notice: Arc<Notice>,
    waker: Waker,
}

impl Noticing {
    fn new() -> Noticing {
        let notice = Arc::<Notice>::default();
        Noticing { waker: Waker::from(Arc::clone(&notice)), notice }
    }

    fn cx(&self) -> Context<'_> {
        Context::from_waker(&self.waker)
    }

    fn is_woken(&self) -> bool {
        self.notice.0.load(Ordering::Acquire)
    }

    fn is_kept(&self) -> bool {
        Arc::strong_count(&self.notice) > 2
    }
}

pub(crate) fn the_last_waker_is_woken_and_no_other_is_kept(t: &Fixture) -> Check {
    let (mut conn, mut peer) = held(t, Tuning::default())?;
    let (first, last) = (Noticing::new(), Noticing::new());
    for who in [&first, &last] {
        assert!(conn.poll_readable(&mut who.cx()).is_pending());
        assert!(who.is_kept());
    }
    assert!(!first.is_kept());
    peer.write_all(b"x")?;
    eventually("the last one is woken", || last.is_woken());
    assert!(!first.is_woken() && !last.is_kept());

    let (first, last) = (Noticing::new(), Noticing::new());
    conn.write(&TOO_MUCH[..])?;
    for who in [&first, &last] {
        assert!(conn.poll_flush(&mut who.cx()).is_pending());
        assert!(who.is_kept());
    }
    assert!(!first.is_kept());
    assert_eq!(read_exactly(&peer, TOO_MUCH.len())?.len(), TOO_MUCH.len());
    eventually("the last one is woken", || last.is_woken());
    assert!(!first.is_woken());
    assert!(conn.poll_flush(&mut last.cx()).is_ready());
    Ok(())
}

pub(crate) fn parts_that_go_forget_who_polled_them(t: &Fixture) -> Check {
    let (conn, peer) = held(t, Tuning::default())?;
    let (mut reader, mut writer) = conn.split();
    let who = Noticing::new();
    assert!(reader.poll_readable(&mut who.cx()).is_pending() && who.is_kept());
    drop(reader);
    assert!(!who.is_kept() && !who.is_woken());
    writer.write_copy(b"still here")?;
    block_on(async { Ok(poll_fn(|cx| writer.poll_shutdown_write(cx)).await?) })?;
    assert_eq!(read_all(&peer)?, b"still here");

    let (mut conn, peer) = held(t, Tuning::default())?;
    assert!(conn.poll_readable(&mut who.cx()).is_pending() && who.is_kept());
    drop(conn);
    assert!(!who.is_kept());
    assert_ended(&peer);
    Ok(())
}

/// Its flush needs no task, its wait for input does: either may be registered when it is polled.
pub(crate) fn a_handler_may_wait_for_its_output_and_for_more(t: &Fixture) -> Check {
    const SIZE: usize = 2 << 20;
    let server = t.spawn(t.server().on_request(|mut conn| async move {
        let count = readable(&mut conn).await?;
        let bytes = conn.next(count).await?;
        conn.write(bytes)?;
        poll_fn(|cx| {
            let flushed = conn.poll_flush(cx);
            if flushed.is_pending() && conn.poll_readable(cx)?.is_ready() {
                // More input is for the next run; only the flush is waited for.
                assert!(!conn.is_empty() || !conn.is_active());
            }
            flushed
        })
        .await
    }));
    let clients: Vec<_> = (0..3)
        .map(|_| {
            let mut peer = dial(&server)?;
            let reads = peer.try_clone()?;
            Ok((
                on_thread(move || {
                    assert_pattern(&read_exactly(reads, SIZE)?, 0);
                    Ok(())
                }),
                on_thread(move || Ok(peer.write_all(&pattern(0, SIZE))?)),
            ))
        })
        .collect::<Check<_>>()?;
    for (reading, writing) in clients {
        reading.wait_for_all();
        writing.wait_for_all();
    }
    Ok(())
}
