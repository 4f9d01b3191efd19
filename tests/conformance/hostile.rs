//! Hostile peers: each is closed with a typed error, and no other connection notices.

use std::io::Write;
use std::net::{Shutdown, TcpStream};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::Duration;

use ringpoll::{Error, ServerBuilder, ServerHandle};

use crate::harness::*;

macro_rules! cases {
    ($tests:ident, $mount:ident) => {
        $tests! { $mount, hostile:
            a_frame_beyond_the_limit_closes_only_the_offender
            every_read_that_names_a_length_is_limited
            a_line_without_an_end_is_limited
            a_truncated_frame_is_reported_as_eof
            garbage_closes_only_those_who_send_it
            a_peer_that_never_reads_is_timed_out
            a_peer_that_sends_a_byte_at_a_time_is_timed_out
            a_peer_that_says_nothing_is_closed_when_idle
            a_thousand_connects_and_resets_leave_nothing
            resets_in_the_middle_of_an_answer_leave_nothing
            half_closed_and_silent_peers_leave_nothing
            a_crowd_of_every_kind_disturbs_nobody
        }
    };
}
pub(crate) use cases;

const FRAME_BYTES_MAX: usize = 64 << 10;
const SHORT: Duration = Duration::from_millis(100);

/// What on_error was told, in a form that can be sent.
#[derive(Debug, PartialEq, Eq, Clone, Copy)]
enum Told {
    Limit,
    Eof,
    ReadTimeout,
    WriteTimeout,
    Closed,
    Other,
}

fn kind(error: &Error) -> Told {
    match () {
        () if error.is_limit() => Told::Limit,
        () if error.is_eof() => Told::Eof,
        () if error.is_read_timeout() => Told::ReadTimeout,
        () if error.is_write_timeout() => Told::WriteTimeout,
        () if error.is_closed() => Told::Closed,
        () => Told::Other,
    }
}

/// A frame server under attack, what it reports, and a client in good standing.
struct Target {
    server: ServerHandle,
    told: Receiver<Told>,
    bystander: TcpStream,
}

impl Target {
    fn new(t: &Fixture, tune: impl FnOnce(ServerBuilder) -> ServerBuilder) -> Check<Target> {
        let (report, told) = channel();
        let builder = t.server().read_bytes_max(FRAME_BYTES_MAX).on_request(echo_frame);
        let server = t.spawn(tune(builder).on_error(move |_, error| {
            report.send(kind(error)).expect("the test listens");
        }));
        let target = Target { bystander: dial(&server)?, server, told };
        target.assert_serves()?;
        Ok(target)
    }

    /// The bystander is served as ever.
    fn assert_serves(&self) -> Check {
        let frame = frame(1000);
        assert!(exchange(&self.bystander, &frame)? == frame, "the bystander got something else");
        Ok(())
    }

    /// Checks that `offender` was reported as `wanted` and is closed, and no other connection is.
    fn assert_closed_for(&self, offender: &TcpStream, wanted: Told) -> Check {
        assert_eq!(self.told.recv_timeout(DEADLINE)?, wanted);
        assert_ended(offender);
        self.assert_serves()?;
        eventually("only the bystander is left", || self.server.stats().open == 1);
        Ok(())
    }
}

fn frame(length: usize) -> Vec<u8> {
    let mut bytes = (length as u32).to_be_bytes().to_vec();
    bytes.extend(pattern(0, length));
    bytes
}

/// A frame longer than the limit.
pub(crate) fn a_frame_beyond_the_limit_closes_only_the_offender(t: &Fixture) -> Check {
    let target = Target::new(t, |builder| builder)?;
    for length in [FRAME_BYTES_MAX as u32 - 3, 1 << 30, u32::MAX] {
        let mut offender = dial(&target.server)?;
        offender.write_all(&length.to_be_bytes())?;
        target.assert_closed_for(&offender, Told::Limit)?;
    }
    let largest = frame(FRAME_BYTES_MAX - 4);
    assert!(exchange(&target.bystander, &largest)? == largest, "the largest frame is refused");
    Ok(())
}

/// `read_bytes_max` holds for next, peek, skip and the rest.
pub(crate) fn every_read_that_names_a_length_is_limited(t: &Fixture) -> Check {
    let tuning = Tuning { read_bytes_max: 1000, ..Tuning::default() };
    let (mut peer, done) = t.drive_tuned(tuning, |mut conn| async move {
        assert!(conn.next(1001).await.expect_err("beyond the limit").is_limit());
        assert!(conn.peek(1001).await.expect_err("beyond the limit").is_limit());
        assert!(conn.skip(1001).await.expect_err("beyond the limit").is_limit());
        assert!(conn.slice(1001).await.expect_err("beyond the limit").is_limit());
        assert!(conn.read_to_vec(1001).await.expect_err("beyond the limit").is_limit());
        assert!(conn.read_string(1001).await.expect_err("beyond the limit").is_limit());
        assert!(conn.next(usize::MAX).await.expect_err("beyond the limit").is_limit());
        // Nothing was consumed, and the connection still works.
        assert_pattern(&conn.next(1000).await?, 0);
        Ok(())
    })?;
    peer.write_all(&pattern(0, 1000))?;
    done.wait();
    Ok(())
}

/// `until` has no length, so its search is limited.
pub(crate) fn a_line_without_an_end_is_limited(t: &Fixture) -> Check {
    let tuning = Tuning { read_bytes_max: 10_000, ..Tuning::default() };
    let (mut peer, done) = t.drive_tuned(tuning, |mut conn| async move {
        let error = conn.until(b'\n').await.expect_err("no line ends");
        conn.close();
        Ok(error)
    })?;
    // The other side may close before all is sent.
    let _ = peer.write_all(&[b'x'; 1 << 20]);
    let error = done.wait();
    assert!(error.is_limit(), "{error:?}");
    Ok(())
}

/// A truncated frame.
pub(crate) fn a_truncated_frame_is_reported_as_eof(t: &Fixture) -> Check {
    let target = Target::new(t, |builder| builder)?;
    for cut in [1, 3, 4, 5, 103] {
        let mut offender = dial(&target.server)?;
        offender.write_all(&frame(100)[..cut])?;
        offender.shutdown(Shutdown::Write)?;
        target.assert_closed_for(&offender, Told::Eof)?;
    }
    Ok(())
}

/// Random bytes; most of them read as an absurd length.
pub(crate) fn garbage_closes_only_those_who_send_it(t: &Fixture) -> Check {
    let target = Target::new(t, |builder| builder)?;
    let mut random = t.random();
    for _ in 0..50 {
        let mut offender = dial(&target.server)?;
        let bytes: Vec<_> = (0..random.within(1..5000)).map(|_| random.next() as u8).collect();
        // The server may close before all is sent.
        let _ = offender.write_all(&bytes);
        let _ = offender.shutdown(Shutdown::Write);
        let told = target.told.recv_timeout(DEADLINE)?;
        assert!(matches!(told, Told::Limit | Told::Eof), "{told:?}");
        target.assert_serves()?;
    }
    eventually("only the bystander is left", || target.server.stats().open == 1);
    Ok(())
}

/// Asks for answers and does not take them.
pub(crate) fn a_peer_that_never_reads_is_timed_out(t: &Fixture) -> Check {
    let target = Target::new(t, |builder| builder.write_timeout(SHORT))?;
    let offender = dial(&target.server)?;
    shrink_receive_buffer(&offender)?;
    let mut asks = offender.try_clone()?;
    let asking = on_thread(move || {
        while asks.write_all(&frame(FRAME_BYTES_MAX - 4)).is_ok() {}
        Ok(())
    });
    assert_eq!(target.told.recv_timeout(DEADLINE)?, Told::WriteTimeout);
    asking.wait();
    drop(offender);
    target.assert_serves()?;
    eventually("only the bystander is left", || target.server.stats().open == 1);
    eventually("no block is left", || target.server.stats().pollers.blocks == 0);
    Ok(())
}

/// A timeout is for the whole wait: a trickle of bytes does not stretch it.
pub(crate) fn a_peer_that_sends_a_byte_at_a_time_is_timed_out(t: &Fixture) -> Check {
    let target = Target::new(t, |builder| builder.read_timeout(2 * SHORT))?;
    let offender = dial(&target.server)?;
    let mut trickles = offender.try_clone()?;
    let trickling = on_thread(move || {
        for byte in frame(10_000) {
            if trickles.write_all(&[byte]).is_err() {
                return Ok(());
            }
            thread::park_timeout(SHORT / 5);
        }
        Err(Failure::new("a frame of 10000 bytes was accepted at 50 bytes a second"))
    });
    assert_eq!(target.told.recv_timeout(DEADLINE)?, Told::ReadTimeout);
    trickling.wait();
    target.assert_serves()?;
    drop(offender);
    eventually("only the bystander is left", || target.server.stats().open == 1);
    Ok(())
}

/// Connects and waits.
pub(crate) fn a_peer_that_says_nothing_is_closed_when_idle(t: &Fixture) -> Check {
    let target = Target::new(t, |builder| builder.idle_timeout(SHORT))?;
    let silent: Vec<_> = (0..20).map(|_| dial(&target.server)).collect::<Check<_>>()?;
    for peer in &silent {
        assert_ended(peer);
    }
    eventually("all are closed", || target.server.stats().open == 0);
    assert_eq!(target.server.stats().accepted, 21);
    Ok(())
}

/// SO_LINGER 0: a port scanner at full speed.
pub(crate) fn a_thousand_connects_and_resets_leave_nothing(t: &Fixture) -> Check {
    let target = Target::new(t, |builder| builder)?;
    for round in 0..1000 {
        reset(dial(&target.server)?)?;
        if round % 100 == 0 {
            target.assert_serves()?;
        }
    }
    target.assert_serves()?;
    eventually("only the bystander is left", || target.server.stats().open == 1);
    Ok(())
}

/// The flush is under way when the reset arrives.
pub(crate) fn resets_in_the_middle_of_an_answer_leave_nothing(t: &Fixture) -> Check {
    let target = Target::new(t, |builder| builder)?;
    let mut random = t.random();
    for _ in 0..100 {
        let mut offender = dial(&target.server)?;
        for _ in 0..random.within(1..10) {
            offender.write_all(&frame(30_000))?;
        }
        read_exactly(&offender, random.within(1..30_000))?;
        reset(offender)?;
    }
    target.assert_serves()?;
    eventually("only the bystander is left", || target.server.stats().open == 1);
    eventually("no block is left", || target.server.stats().pollers.blocks == 0);
    while let Ok(told) = target.told.try_recv() {
        assert!(matches!(told, Told::Closed | Told::Eof), "{told:?}");
    }
    Ok(())
}

/// FIN first, then nothing; and FIN at once.
pub(crate) fn half_closed_and_silent_peers_leave_nothing(t: &Fixture) -> Check {
    let target = Target::new(t, |builder| builder)?;
    let mut peers = Vec::new();
    for _ in 0..100 {
        let peer = dial(&target.server)?;
        peer.shutdown(Shutdown::Write)?;
        peers.push(peer);
    }
    for peer in &peers {
        assert_eof(peer);
    }
    eventually("only the bystander is left", || target.server.stats().open == 1);
    assert!(target.told.try_recv().is_err(), "an orderly close is no error");
    Ok(())
}

/// All of them at once, at random.
pub(crate) fn a_crowd_of_every_kind_disturbs_nobody(t: &Fixture) -> Check {
    let target = Target::new(t, |builder| builder.read_timeout(DEADLINE).write_timeout(SHORT))?;
    let crowd: Vec<_> = (0..3)
        .map(|_| {
            let (addr, mut random) = (addr_of(&target.server), t.random());
            on_thread(move || {
                for _ in 0..100 {
                    let mut peer = connect(addr)?;
                    // Whoever is closed by the server meanwhile has got what it deserves.
                    let _ = match random.within(0..6) {
                        0 => peer.write_all(&u32::MAX.to_be_bytes()),
                        1 => peer.write_all(&frame(500)[..random.within(1..504)]),
                        2 => exchange(&peer, &frame(random.within(1..2000))).map(drop),
                        3 => peer.shutdown(Shutdown::Write),
                        4 => peer.write_all(&pattern(random.within(0..250), 100)),
                        _ => Ok(()),
                    };
                    if random.one_in(2) {
                        reset(peer)?;
                    }
                }
                Ok(())
            })
        })
        .collect();
    for _ in 0..100 {
        target.assert_serves()?;
    }
    for thread in crowd {
        thread.wait();
    }
    target.assert_serves()?;
    eventually("only the bystander is left", || target.server.stats().open == 1);
    Ok(())
}
