//! Timeouts: never early, never missed, and a moved deadline wakes the waiting task.

use std::io::Write;
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use ringpoll::{Error, Handle};

use crate::harness::*;

macro_rules! cases {
    ($tests:ident, $mount:ident) => {
        $tests! { $mount, timeouts:
            a_write_times_out_against_a_slow_reader
            a_read_times_out_against_a_slow_writer
            a_past_deadline_fails_at_once_and_is_cleared_by_none
            a_deadline_fires_when_it_is_due_and_again_at_once
            exchanges_in_time_do_not_pile_up_timers
            a_connection_that_timed_out_closes_cleanly
            a_wait_that_is_moved_ends_at_its_new_time
            a_new_timeout_clears_the_deadline
            a_deadline_overrides_a_timeout
            an_idle_connection_closes_and_a_busy_one_does_not
            moving_a_deadline_closer_wakes_a_waiting_read
            moving_a_deadline_away_keeps_a_waiting_read
            moving_a_write_deadline_wakes_a_waiting_flush
            a_slow_peer_that_takes_bytes_is_not_cut_by_the_stall_timeout
            a_peer_that_takes_nothing_is_cut_by_the_stall_timeout
            a_stall_timeout_wakes_a_waiting_flush_and_deadlines_still_hold
            stall_timeouts_of_the_server_and_dialer_apply
            buffered_data_wins_over_an_expired_deadline
            a_read_deadline_leaves_writes_alone
            one_deadline_covers_both_directions
            a_read_may_go_on_after_a_timeout
            the_longest_times_mean_for_ever
            settings_of_the_server_and_dialer_apply
            a_timeout_that_a_handler_returns_closes_and_is_reported
            a_request_that_trickles_in_is_cut_at_the_request_timeout
            each_request_has_the_request_timeout_for_itself
            a_slow_answer_is_not_cut_by_the_request_timeout
            the_earlier_of_deadline_and_request_timeout_ends_a_wait
        }
    };
}
pub(crate) use cases;

const SHORT: Duration = Duration::from_millis(50);
/// The contract says 20 ms; a loaded host is granted far more.
const LATE: Duration = Duration::from_millis(500);
/// One of so many tries has to be in time.
const TRIES: usize = 4;

/// Repeats `step` of 1 KB at 10 KB/s until it fails or the returned flag is set.
fn slowly(
    mut step: impl FnMut() -> std::io::Result<()> + Send + 'static,
) -> (Arc<AtomicBool>, Outcome<()>) {
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = Arc::clone(&stop);
    let stepping = on_thread(move || {
        while !stopped.load(Ordering::Relaxed) && step().is_ok() {
            thread::park_timeout(Duration::from_millis(100));
        }
        Ok(())
    });
    (stop, stepping)
}

pub(crate) fn a_write_times_out_against_a_slow_reader(t: &Fixture) -> Check {
    let (peer, timed_out) = t.drive(|mut conn| async move {
        conn.set_write_timeout(Some(SHORT));
        let start = Instant::now();
        loop {
            conn.write(vec![1; 1 << 20])?;
            let flush = Instant::now();
            if let Err(error) = conn.flush().await {
                assert!(flush.elapsed() >= SHORT, "early, after {:?}", flush.elapsed());
                conn.close();
                return Ok(error);
            }
            assert!(start.elapsed() < DEADLINE, "megabytes fit into a peer that reads 10 KB/s");
        }
    })?;
    let (stop, reading) = slowly(move || read_exactly(&peer, 1024).map(drop));
    let error = timed_out.wait();
    assert!(error.is_write_timeout() && error.is_timeout(), "{error:?}");
    assert!(!error.is_read_timeout() && !error.is_closed(), "{error:?}");
    stop.store(true, Ordering::Relaxed);
    reading.wait();
    Ok(())
}

pub(crate) fn a_read_times_out_against_a_slow_writer(t: &Fixture) -> Check {
    let (mut peer, timed_out) = t.drive(|mut conn| async move {
        conn.set_read_timeout(Some(SHORT));
        let start = Instant::now();
        let error = conn.next(10 << 10).await.expect_err("a second's worth of bytes");
        assert!(start.elapsed() >= SHORT, "early, after {:?}", start.elapsed());
        conn.close();
        Ok(error)
    })?;
    let (stop, writing) = slowly(move || peer.write_all(&[1; 1024]));
    let error = timed_out.wait();
    assert!(error.is_read_timeout() && error.is_timeout(), "{error:?}");
    assert!(!error.is_write_timeout() && !error.is_closed(), "{error:?}");
    stop.store(true, Ordering::Relaxed);
    writing.wait();
    Ok(())
}

pub(crate) fn a_past_deadline_fails_at_once_and_is_cleared_by_none(t: &Fixture) -> Check {
    let (mut peer, done) = t.drive(|mut conn| async move {
        conn.set_read_deadline(Some(Instant::now() - SHORT));
        let mut took = Vec::new();
        for _ in 0..TRIES {
            let start = Instant::now();
            assert!(conn.next(1).await.expect_err("past").is_read_timeout());
            took.push(start.elapsed());
        }
        assert_once_in_time(&took);
        conn.write_copy(b"go")?;
        conn.flush().await?;
        conn.set_read_deadline(None);
        assert_eq!(conn.next(4).await?[..], b"went"[..]);
        Ok(())
    })?;
    assert_eq!(read_exactly(&peer, 2)?, b"go");
    peer.write_all(b"went")?;
    done.wait();
    Ok(())
}

pub(crate) fn a_deadline_fires_when_it_is_due_and_again_at_once(t: &Fixture) -> Check {
    let (peer, done) = t.drive(|mut conn| async move {
        let (mut late, mut again) = (Vec::new(), Vec::new());
        for _ in 0..TRIES {
            let deadline = Instant::now() + SHORT;
            conn.set_read_deadline(Some(deadline));
            let error = conn.next(1).await.expect_err("nothing comes");
            assert!(error.is_read_timeout(), "{error:?}");
            let now = Instant::now();
            assert!(now >= deadline, "early by {:?}", deadline - now);
            late.push(now - deadline);
            assert!(conn.next(1).await.expect_err("still past").is_read_timeout());
            again.push(now.elapsed());
        }
        assert_once_in_time(&late);
        assert_once_in_time(&again);
        Ok(())
    })?;
    done.wait();
    drop(peer);
    Ok(())
}

pub(crate) fn a_wait_that_is_moved_ends_at_its_new_time(t: &Fixture) -> Check {
    let (peer, done) = t.drive(|conn| async move {
        let mut wait = conn.handle().sleep_until(Instant::now() + SHORT);
        assert!(poll_once(&mut wait).await.is_none(), "it waits at the poller");
        // Later: the poller wakes the task at the old time, which must not end the wait.
        let later = Instant::now() + 3 * SHORT;
        wait.reset(later);
        (&mut wait).await;
        assert!(Instant::now() >= later);
        // Again, after its end; then closer.
        wait.reset(Instant::now() + 10 * DEADLINE);
        assert!(poll_once(&mut wait).await.is_none(), "it begins again");
        let closer = Instant::now() + SHORT;
        wait.reset(closer);
        (&mut wait).await;
        assert!(Instant::now() >= closer);
        wait.reset(Instant::now());
        assert!(poll_once(&mut wait).await.is_some(), "the time has come");
        Ok(())
    })?;
    done.wait();
    drop(peer);
    Ok(())
}

/// A busy host may delay one try, but not each of several.
fn assert_once_in_time(delays: &[Duration]) {
    let best = delays.iter().min().expect("at least one try");
    assert!(*best < LATE, "late by {delays:?}");
}

/// A timeout per wait is armed and disarmed all the time.
pub(crate) fn exchanges_in_time_do_not_pile_up_timers(t: &Fixture) -> Check {
    let (peer, done) = t.drive(|mut conn| async move {
        conn.set_read_timeout(Some(DEADLINE));
        conn.set_write_timeout(Some(DEADLINE));
        for _ in 0..500 {
            let ball = conn.next(4).await?;
            conn.write(ball)?;
            conn.flush().await?;
        }
        Ok(())
    })?;
    for _ in 0..500 {
        assert_eq!(exchange(&peer, b"ball")?, b"ball");
    }
    done.wait();
    // The connection's own timer at the most, not one for each wait that was satisfied.
    assert!(t.timers() <= 2, "{} timers for one connection", t.timers());
    drop(peer);
    Ok(())
}

pub(crate) fn a_connection_that_timed_out_closes_cleanly(t: &Fixture) -> Check {
    let (mut peer, done) = t.drive(|mut conn| async move {
        conn.set_read_timeout(Some(SHORT));
        assert!(conn.next(10).await.expect_err("4 bytes come").is_read_timeout());
        conn.write_copy(b"sorry")?;
        conn.flush().await?;
        let _ = conn.next(4).await?;
        conn.close();
        Ok((*conn).clone())
    })?;
    peer.write_all(b"half")?;
    assert_eq!(read_all(&peer)?, b"sorry");
    assert!(done.wait().is_closed());
    Ok(())
}

pub(crate) fn a_new_timeout_clears_the_deadline(t: &Fixture) -> Check {
    let (mut peer, done) = t.drive(|mut conn| async move {
        conn.set_read_deadline(Some(Instant::now() - SHORT));
        assert!(conn.next(1).await.expect_err("past").is_read_timeout());
        conn.set_read_timeout(Some(DEADLINE));
        conn.write_copy(b"go")?;
        conn.flush().await?;
        assert_eq!(conn.next(4).await?[..], b"went"[..]);
        // The same for writes: with the deadline in force this flush would have to fail.
        conn.set_write_deadline(Some(Instant::now() - SHORT));
        conn.set_write_timeout(Some(DEADLINE));
        conn.write(pattern(0, 16 << 20))?;
        conn.flush().await?;
        Ok(())
    })?;
    assert_eq!(read_exactly(&peer, 2)?, b"go");
    peer.write_all(b"went")?;
    assert_pattern(&read_exactly(&peer, 16 << 20)?, 0);
    done.wait();
    Ok(())
}

/// Keep row: a deadline overrides a timeout.
pub(crate) fn a_deadline_overrides_a_timeout(t: &Fixture) -> Check {
    let (peer, done) = t.drive(|mut conn| async move {
        conn.set_read_timeout(Some(Duration::from_millis(1)));
        let deadline = Instant::now() + 3 * SHORT;
        conn.set_read_deadline(Some(deadline));
        assert!(conn.next(1).await.expect_err("nothing comes").is_read_timeout());
        assert!(Instant::now() >= deadline, "the shorter timeout fired");
        Ok(())
    })?;
    done.wait();
    drop(peer);
    Ok(())
}

pub(crate) fn an_idle_connection_closes_and_a_busy_one_does_not(t: &Fixture) -> Check {
    let idle_time = 6 * SHORT;
    let server = t.spawn(t.server().idle_timeout(idle_time).on_request(echo));
    let (idle, busy) = (dial(&server)?, dial(&server)?);
    let ended = on_thread(move || {
        let spoke = Instant::now();
        exchange(&idle, b"hello")?;
        assert_ended(&idle);
        Ok(spoke.elapsed())
    });
    let start = Instant::now();
    let mut spoke = start;
    while start.elapsed() < 3 * idle_time {
        let answer = exchange(&busy, b"busy");
        if answer.is_err() && spoke.elapsed() >= idle_time {
            return skip("the busy half of this test", "the host stopped us for too long");
        }
        assert_eq!(answer?, b"busy");
        spoke = Instant::now();
        thread::park_timeout(Duration::from_millis(10));
    }
    let after = ended.wait();
    assert!(after >= idle_time, "closed early, after {after:?}");
    eventually("the busy one is idle now, and closes", || server.stats().open == 0);
    assert_ended(&busy);
    Ok(())
}

/// The error that ended a wait, and when.
type Ended = (Error, Instant);

/// A connection that waits in `next(1)`, its peer, and the error with the time it came.
fn waiting(t: &Fixture) -> Check<(Handle, TcpStream, Outcome<Ended>)> {
    let (sends, sent) = outcome();
    let (peer, ended) = t.drive(|mut conn| async move {
        conn.set_read_deadline(Some(Instant::now() + DEADLINE));
        tell(sends, Ok((*conn).clone()));
        let error = conn.next(1).await.expect_err("nothing comes");
        Ok((error, Instant::now()))
    })?;
    Ok((sent.wait(), peer, ended))
}

pub(crate) fn moving_a_deadline_closer_wakes_a_waiting_read(t: &Fixture) -> Check {
    let (handle, peer, ended) = waiting(t)?;
    let deadline = Instant::now() + SHORT;
    handle.set_read_deadline(Some(deadline));
    let (error, at) = ended.wait();
    assert!(error.is_read_timeout(), "{error:?}");
    // Far before the deadline that was in force when the wait began.
    assert!(at >= deadline && at - deadline < DEADLINE / 2);
    drop(peer);
    let (handle, peer, ended) = waiting(t)?;
    handle.set_read_deadline(Some(Instant::now() - SHORT));
    assert!(ended.wait().0.is_read_timeout());
    drop(peer);
    // A timeout set from outside counts as well.
    let (handle, peer, ended) = waiting(t)?;
    handle.set_read_timeout(Some(SHORT));
    assert!(ended.wait().0.is_read_timeout());
    drop(peer);
    Ok(())
}

/// The opposite order.
pub(crate) fn moving_a_deadline_away_keeps_a_waiting_read(t: &Fixture) -> Check {
    let (handle, peer, ended) = waiting(t)?;
    let first = Instant::now() + 2 * SHORT;
    handle.set_read_deadline(Some(first));
    let last = first + 4 * SHORT;
    handle.set_read_deadline(Some(last));
    let (error, at) = ended.wait();
    assert!(error.is_read_timeout(), "{error:?}");
    assert!(at >= last, "fired at the old deadline");
    drop(peer);
    let (handle, peer, ended) = waiting(t)?;
    handle.set_read_deadline(None);
    drop(peer);
    assert!(ended.wait().0.is_eof());
    drop(handle);
    Ok(())
}

/// The same for writes.
pub(crate) fn moving_a_write_deadline_wakes_a_waiting_flush(t: &Fixture) -> Check {
    let (sends, sent) = outcome();
    let (peer, ended) = t.drive(|mut conn| async move {
        tell(sends, Ok((*conn).clone()));
        loop {
            conn.write(vec![1; 1 << 20])?;
            if let Err(error) = conn.flush().await {
                conn.close();
                return Ok((error, Instant::now()));
            }
        }
    })?;
    let handle = sent.wait();
    eventually("the flush waits", || handle.stats().unsent_bytes > 0);
    ended.assert_pending();
    let deadline = Instant::now() + SHORT;
    handle.set_write_deadline(Some(deadline));
    let (error, at) = ended.wait();
    assert!(error.is_write_timeout(), "{error:?}");
    assert!(at >= deadline);
    drop(peer);
    Ok(())
}

/// Keep row: data already buffered wins.
pub(crate) fn buffered_data_wins_over_an_expired_deadline(t: &Fixture) -> Check {
    let (mut peer, done) = t.drive(|mut conn| async move {
        conn.peek(10).await?;
        conn.set_deadline(Some(Instant::now() - SHORT));
        assert_pattern(&conn.peek(10).await?, 0);
        assert_pattern(&conn.next(4).await?, 0);
        conn.skip(1).await?;
        assert_eq!(conn.readable().await?, 5);
        let mut rest = [0; 8];
        assert_eq!(conn.read(&mut rest).await?, 5);
        assert_pattern(&rest[..5], 5);
        assert!(conn.next(1).await.expect_err("past").is_read_timeout());
        Ok(())
    })?;
    peer.write_all(&pattern(0, 10))?;
    done.wait();
    Ok(())
}

/// Each direction has its own.
pub(crate) fn a_read_deadline_leaves_writes_alone(t: &Fixture) -> Check {
    let (peer, done) = t.drive(|mut conn| async move {
        conn.set_read_deadline(Some(Instant::now() - SHORT));
        conn.set_read_timeout(Some(Duration::from_millis(1)));
        conn.write(pattern(0, 16 << 20))?;
        conn.flush().await?;
        Ok(())
    })?;
    // The flush waits for longer than any of the read limits before it gets its way.
    holds_within(SHORT, || false);
    assert_pattern(&read_exactly(&peer, 16 << 20)?, 0);
    done.wait();
    Ok(())
}

/// `set_deadline`.
pub(crate) fn one_deadline_covers_both_directions(t: &Fixture) -> Check {
    let (peer, done) = t.drive(|mut conn| async move {
        let deadline = Instant::now() + SHORT;
        conn.set_deadline(Some(deadline));
        let error = loop {
            conn.write(vec![1; 1 << 20])?;
            if let Err(error) = conn.flush().await {
                break error;
            }
        };
        assert!(error.is_write_timeout(), "{error:?}");
        assert!(Instant::now() >= deadline, "early");
        assert!(conn.next(1).await.expect_err("past").is_read_timeout());
        conn.close();
        Ok(())
    })?;
    done.wait();
    drop(peer);
    Ok(())
}

/// A timeout is no end: short data stays, and the rest may still come.
pub(crate) fn a_read_may_go_on_after_a_timeout(t: &Fixture) -> Check {
    let (mut peer, done) = t.drive(|mut conn| async move {
        conn.set_read_timeout(Some(SHORT));
        assert!(conn.next(100).await.expect_err("60 bytes come").is_read_timeout());
        conn.set_read_timeout(None);
        conn.write_copy(b"more")?;
        conn.flush().await?;
        assert_pattern(&conn.next(100).await?, 0);
        Ok(())
    })?;
    peer.write_all(&pattern(0, 60))?;
    assert_eq!(read_exactly(&peer, 4)?, b"more");
    peer.write_all(&pattern(60, 40))?;
    done.wait();
    Ok(())
}

/// No arithmetic overflows, and zero is none.
pub(crate) fn the_longest_times_mean_for_ever(t: &Fixture) -> Check {
    let (mut peer, done) = t.drive(|mut conn| async move {
        for timeout in [Some(Duration::MAX), Some(Duration::ZERO), None] {
            conn.set_read_timeout(timeout);
            conn.set_write_timeout(timeout);
            conn.set_idle_timeout(timeout);
            let ball = conn.next(4).await?;
            conn.write(ball)?;
            conn.flush().await?;
        }
        conn.set_deadline(Instant::now().checked_add(Duration::from_secs(1 << 34)));
        assert_eq!(conn.next(4).await?[..], b"last"[..]);
        Ok(())
    })?;
    for _ in 0..3 {
        holds_within(Duration::from_millis(5), || false);
        assert_eq!(exchange(&peer, b"ball")?, b"ball");
    }
    peer.write_all(b"last")?;
    done.wait();
    let server = t.echo_server();
    let dialer = t.dialer().timeout(Duration::MAX).read_timeout(Duration::ZERO);
    block_on(async { Ok(dialer.connect(&addr_of(&server).to_string()).await.map(drop)?) })
}

/// `read_timeout` and `idle_timeout` of the builders reach the connections.
pub(crate) fn settings_of_the_server_and_dialer_apply(t: &Fixture) -> Check {
    let (sends, sent) = std::sync::mpsc::channel();
    let server = t.spawn(t.server().read_timeout(SHORT).on_connect(move |mut conn| {
        let sends = sends.clone();
        async move {
            let start = Instant::now();
            let error = conn.next(1).await.expect_err("nothing comes");
            sends.send((error, start.elapsed())).map_err(Error::other)
        }
    }));
    let peer = dial(&server)?;
    let (error, after) = sent.recv_timeout(DEADLINE)?;
    assert!(error.is_read_timeout() && after >= SHORT, "{error:?} after {after:?}");
    drop(peer);
    let quiet = std::net::TcpListener::bind("127.0.0.1:0")?;
    let addr = quiet.local_addr()?.to_string();
    let dialer = t.dialer().read_timeout(SHORT).write_timeout(SHORT);
    block_on(async {
        let mut conn = dialer.connect(&addr).await?;
        let start = Instant::now();
        assert!(conn.next(1).await.expect_err("nothing comes").is_read_timeout());
        assert!(start.elapsed() >= SHORT, "early");
        let error = loop {
            conn.write(vec![1; 1 << 20])?;
            if let Err(error) = conn.flush().await {
                break error;
            }
        };
        assert!(error.is_write_timeout(), "{error:?}");
        let idle = t.dialer().idle_timeout(SHORT).connect(&addr).await?;
        eventually_async("the idle one closes", || idle.is_closed()).await
    })
}

/// The error is a timeout.
pub(crate) fn a_timeout_that_a_handler_returns_closes_and_is_reported(t: &Fixture) -> Check {
    let (report, reported) = std::sync::mpsc::channel();
    let server = t.spawn(
        t.server()
            .read_timeout(SHORT)
            .on_request(|mut conn| async move {
                let _ = conn.next(1000).await?;
                Ok(())
            })
            .on_error(move |_, error| {
                report
                    .send((error.is_read_timeout(), error.to_string()))
                    .expect("the test listens");
            }),
    );
    let mut peer = dial(&server)?;
    peer.write_all(b"not a thousand bytes")?;
    assert_ended(&peer);
    let (is_read_timeout, message) = reported.recv_timeout(DEADLINE)?;
    assert!(is_read_timeout, "{message}");
    Ok(())
}

/// Sends a byte each 20 ms until the connection ends.
fn trickle(mut peer: TcpStream) -> (Arc<AtomicBool>, Outcome<()>) {
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = Arc::clone(&stop);
    let sending = on_thread(move || {
        while !stopped.load(Ordering::Relaxed) && peer.write_all(b"x").is_ok() {
            thread::park_timeout(Duration::from_millis(20));
        }
        Ok(())
    });
    (stop, sending)
}

/// The read timeout alone would hold up neither of them.
pub(crate) fn a_request_that_trickles_in_is_cut_at_the_request_timeout(t: &Fixture) -> Check {
    const REQUEST: Duration = Duration::from_millis(300);
    for reads_lines in [true, false] {
        let (tell, told) = std::sync::mpsc::channel();
        let server = t.server().read_timeout(Duration::from_secs(5)).request_timeout(REQUEST);
        let server = t.spawn(server.on_request(move |mut conn| {
            let tell = tell.clone();
            async move {
                let start = Instant::now();
                let read = match reads_lines {
                    true => conn.until(b'\n').await,
                    false => conn.next(100_000).await,
                };
                let error = read.expect_err("it never comes whole");
                // One that goes on is told again.
                let again = conn.until(b'\n').await.expect_err("no time is left");
                let _ = tell.send((error, again, start.elapsed()));
                Err(Error::other("(given up on purpose)"))
            }
        }));
        let (stop, sending) = trickle(dial(&server)?);
        let (error, again, after) = told.recv_timeout(DEADLINE)?;
        assert!(error.is_read_timeout() && error.is_timeout(), "{error:?}");
        assert!(again.is_read_timeout(), "{again:?}");
        // Its time runs from before the handler is called.
        assert!(after >= REQUEST / 2, "early, after {after:?}");
        stop.store(true, Ordering::Relaxed);
        sending.wait();
    }
    Ok(())
}

pub(crate) fn each_request_has_the_request_timeout_for_itself(t: &Fixture) -> Check {
    const REQUEST: Duration = Duration::from_millis(400);
    let server = t.spawn(t.server().request_timeout(REQUEST).on_request(|mut conn| async move {
        let line = conn.until(b'\n').await?;
        conn.write(line)?;
        conn.flush().await
    }));
    let mut peer = dial(&server)?;
    let start = Instant::now();
    while start.elapsed() < 3 * REQUEST {
        // In two parts, so that each waits.
        peer.write_all(b"he")?;
        eventually("the first part is read", || server.stats().pollers.received_bytes % 3 == 2);
        peer.write_all(b"\n")?;
        assert_eq!(read_exactly(&peer, 3)?, b"he\n");
    }
    Ok(())
}

/// Only waits for input are bounded: not the handler, nor its flush.
pub(crate) fn a_slow_answer_is_not_cut_by_the_request_timeout(t: &Fixture) -> Check {
    const REQUEST: Duration = Duration::from_millis(50);
    const ANSWER_BYTES: usize = 8 << 20;
    let server = t.spawn(t.server().request_timeout(REQUEST).on_request(|mut conn| async move {
        let request = conn.next(3).await?;
        ringpoll::unblock(|| thread::sleep(3 * REQUEST)).await?;
        // What has come is read without a wait.
        assert_eq!(conn.next(3).await?, request);
        conn.write(pattern(0, ANSWER_BYTES))?;
        conn.flush().await
    }));
    let mut peer = dial(&server)?;
    peer.write_all(b"onconc")?;
    thread::park_timeout(6 * REQUEST);
    assert_pattern(&read_exactly(&peer, ANSWER_BYTES)?, 0);
    assert_eq!(server.stats().handler_errors, 0);
    Ok(())
}

/// A deadline of the handler's own that is earlier ends the wait; a later one does not move it.
pub(crate) fn the_earlier_of_deadline_and_request_timeout_ends_a_wait(t: &Fixture) -> Check {
    let long = Duration::from_secs(1000);
    for (request, deadline) in [(SHORT, long), (long, SHORT)] {
        let (tell, told) = std::sync::mpsc::channel();
        let server = t.server().request_timeout(request).on_request(move |mut conn| {
            let tell = tell.clone();
            async move {
                conn.set_read_deadline(Some(Instant::now() + deadline));
                let _ = tell.send(conn.next(2).await);
                conn.close();
                Ok(())
            }
        });
        let server = t.spawn(server);
        let mut peer = dial(&server)?;
        peer.write_all(b"x")?;
        let error = told.recv_timeout(DEADLINE)?.expect_err("a byte is missing");
        assert!(error.is_read_timeout(), "{error:?}");
    }
    Ok(())
}

/// The flush takes several times the stall timeout, and the peer takes bytes all the time.
pub(crate) fn a_slow_peer_that_takes_bytes_is_not_cut_by_the_stall_timeout(t: &Fixture) -> Check {
    const STALL: Duration = Duration::from_millis(400);
    const SIZE: usize = 32 << 20;
    let (peer, took) = t.drive(|mut conn| async move {
        conn.set_write_stall_timeout(Some(STALL));
        conn.write(pattern(0, SIZE))?;
        let start = Instant::now();
        conn.flush().await?;
        Ok(start.elapsed())
    })?;
    let mut received = 0;
    while received < SIZE {
        let bytes = read_exactly(&peer, 256 << 10)?;
        assert_pattern(&bytes, received);
        received += bytes.len();
        thread::park_timeout(Duration::from_millis(20));
    }
    let took = took.wait();
    assert!(took > 2 * STALL, "the peer was not slow: {took:?}");
    Ok(())
}

/// Fills what the kernel holds for a peer that does not read; then the flush fails, and fails
/// again.
pub(crate) fn a_peer_that_takes_nothing_is_cut_by_the_stall_timeout(t: &Fixture) -> Check {
    let (peer, ended) = t.drive(|mut conn| async move {
        conn.set_write_stall_timeout(Some(SHORT));
        conn.write(vec![1; 32 << 20])?;
        for _ in 0..3 {
            let start = Instant::now();
            let error = conn.flush().await.expect_err("the peer does not read");
            let after = start.elapsed();
            assert!(error.is_write_timeout() && error.is_timeout(), "{error:?}");
            assert!(error.to_string().contains("no byte for 50ms"), "{error}");
            assert!(after >= SHORT, "early, after {after:?}");
        }
        conn.set_write_stall_timeout(None);
        let deadline = Instant::now() + 4 * SHORT;
        conn.set_write_deadline(Some(deadline));
        assert!(conn.flush().await.expect_err("the deadline").is_write_timeout());
        assert!(Instant::now() >= deadline, "cut without a stall timeout");
        conn.abort();
        Ok(())
    })?;
    ended.wait();
    drop(peer);
    Ok(())
}

pub(crate) fn a_stall_timeout_wakes_a_waiting_flush_and_deadlines_still_hold(t: &Fixture) -> Check {
    type Set = fn(&Handle);
    let stall: Set = |handle| handle.set_write_stall_timeout(Some(SHORT));
    let deadline: Set = |handle| {
        handle.set_write_stall_timeout(Some(DEADLINE));
        handle.set_write_deadline(Some(Instant::now() + SHORT));
    };
    for set in [stall, deadline] {
        let (sends, sent) = outcome();
        let (peer, ended) = t.drive(|mut conn| async move {
            tell(sends, Ok((*conn).clone()));
            conn.write(vec![1; 32 << 20])?;
            let error = conn.flush().await.expect_err("the peer does not read");
            conn.abort();
            Ok(error)
        })?;
        let handle: Handle = sent.wait();
        eventually("the flush waits", || handle.stats().unsent_bytes > 0);
        ended.assert_pending();
        set(&handle);
        let error = ended.wait();
        assert!(error.is_write_timeout(), "{error:?}");
        drop(peer);
    }
    Ok(())
}

pub(crate) fn stall_timeouts_of_the_server_and_dialer_apply(t: &Fixture) -> Check {
    let (report, reported) = std::sync::mpsc::channel();
    let builder = t.server().write_stall_timeout(SHORT).on_error(move |_, error| {
        report.send(error.is_write_timeout()).expect("the test listens");
    });
    let server = t.spawn(builder.on_connect(|mut conn| async move {
        conn.write(vec![1; 32 << 20])?;
        conn.flush().await
    }));
    let peer = dial(&server)?;
    assert!(reported.recv_timeout(DEADLINE)?, "not a write timeout");
    // The peer cannot mistake the part that it gets for the whole.
    assert!(read_all(&peer).is_err(), "the connection ended without a reset");
    let quiet = std::net::TcpListener::bind("127.0.0.1:0")?;
    let dialer = t.dialer().write_stall_timeout(SHORT);
    block_on(async {
        let mut conn = dialer.connect(&quiet.local_addr()?.to_string()).await?;
        conn.write(vec![1; 32 << 20])?;
        assert!(conn.flush().await.is_err_and(|error| error.is_write_timeout()));
        conn.abort();
        Ok(())
    })
}
