//! Promises about ends and timeouts of a connection: submitted bytes arrive, and the resources of
//! dropped futures are released.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::thread;
use std::time::Duration;

use ringpoll::{Connection, Dialer, Error, Handle, Pollers, ReadHalf};
use rustix::net::{SendFlags, sockopt};
use tokio::sync::Semaphore;

use crate::harness::*;

macro_rules! cases {
    ($tests:ident, $mount:ident) => {
        $tests! { $mount, promises:
            a_transfer_that_moves_is_never_idle
            a_transfer_to_a_half_closed_peer_is_never_idle
            a_peer_that_takes_nothing_is_idle
            a_slow_transfer_outlives_the_linger_time
            detaching_given_up_in_its_flush_closes_the_socket
            detaching_given_up_in_its_removal_closes_the_socket
            a_failed_flush_in_detach_closes_the_connection
            close_callbacks_of_a_detached_connection_have_a_valid_fd
            submitted_before_a_close_is_sent
            a_reset_that_a_send_gets_is_no_end_of_the_stream
            a_lost_peer_that_a_send_notices_is_no_end_of_the_stream
            a_unix_stream_that_takes_no_more_still_ends_in_order
            a_peer_that_never_reads_keeps_no_closed_connection
            urgent_data_hangs_nobody
        }
    };
}
pub(crate) use cases;

const SHORT: Duration = Duration::from_millis(50);
const IDLE: Duration = Duration::from_millis(300);
/// More than the kernel takes for a peer that does not read.
static TOO_MUCH: [u8; 16 << 20] = [7; 16 << 20];

/// Reads `total` bytes of the test stream, a chunk at a time.
fn read_slowly(peer: &TcpStream, total: usize, chunk: usize, pause: Duration) -> Check {
    let mut at = 0;
    while at < total {
        let count = chunk.min(total - at);
        let bytes = read_exactly(peer, count);
        let bytes = bytes.map_err(|error| Failure::new(format_args!("cut at {at}: {error}")))?;
        assert_pattern(&bytes, at);
        at += count;
        thread::park_timeout(pause);
    }
    Ok(())
}

/// Keeps the kernel from taking much for this peer. Below two segments of the loopback, of 64 KiB
/// each, a window opens only by a timer.
fn hold_little(peer: &TcpStream) -> Check {
    Ok(sockopt::set_socket_recv_buffer_size(peer, 128 << 10)?)
}

/// Reads to the end of the stream; how many bytes came, and whether it was a clean end.
fn read_to_end(mut peer: &TcpStream) -> Check<(usize, bool)> {
    let (mut buffer, mut bytes) = (vec![0; 64 << 10], 0);
    loop {
        match peer.read(&mut buffer) {
            Ok(0) => return Ok((bytes, true)),
            Ok(count) => bytes += count,
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return Ok((bytes, false)),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => {
                return Err(Failure::new(format_args!("no end after {bytes} bytes: {error}")));
            }
        }
    }
}

fn is_gone(handle: &Handle) -> bool {
    handle.with_fd(|_| ()).is_err()
}

/// Sends 8 MiB to a peer that takes seconds for it, with an idle timeout far below that.
fn transfer_slowly(t: &Fixture, half_closes: bool) -> Check {
    const TOTAL: usize = 8 << 20;
    /// The kernel's own timers may hold a byte for a fifth of a second, and a busy host for longer.
    const IDLE: Duration = Duration::from_secs(1);
    let (mut peer, done) = t.drive(move |mut conn| async move {
        conn.next(1).await?;
        if half_closes {
            assert!(conn.next(1).await.expect_err("half-closed").is_eof());
        }
        conn.set_idle_timeout(Some(IDLE));
        conn.write(pattern(0, TOTAL))?;
        conn.flush().await?;
        Ok(())
    })?;
    hold_little(&peer)?;
    peer.write_all(b"?")?;
    if half_closes {
        peer.shutdown(Shutdown::Write)?;
    }
    read_slowly(&peer, TOTAL, 64 << 10, Duration::from_millis(25))?;
    done.wait();
    assert_eof(&peer);
    Ok(())
}

/// Also while the bytes that move are the kernel's, before the flush ends and after it.
pub(crate) fn a_transfer_that_moves_is_never_idle(t: &Fixture) -> Check {
    transfer_slowly(t, false)
}

pub(crate) fn a_transfer_to_a_half_closed_peer_is_never_idle(t: &Fixture) -> Check {
    transfer_slowly(t, true)
}

/// A cut is a reset: a clean end would pass for the whole.
pub(crate) fn a_peer_that_takes_nothing_is_idle(t: &Fixture) -> Check {
    let (peer, ended) = t.drive(|mut conn| async move {
        conn.set_idle_timeout(Some(IDLE));
        conn.write(&TOO_MUCH[..])?;
        let handle = conn.handle();
        Ok((handle, conn.flush().await))
    })?;
    let (handle, flushed) = ended.wait();
    let error = flushed.expect_err("nobody reads");
    assert!(error.is_closed(), "{error:?}");
    eventually("its descriptor is closed", || is_gone(&handle));
    let (bytes, is_clean) = read_to_end(&peer)?;
    assert!(bytes < TOO_MUCH.len(), "everything came");
    assert!(!is_clean, "a clean end after {bytes} bytes of {}", TOO_MUCH.len());
    Ok(())
}

/// Takes longer than the linger time, so only when asked for, and with one backend.
pub(crate) fn a_slow_transfer_outlives_the_linger_time(t: &Fixture) -> Check {
    const TOTAL: usize = 16 << 20;
    const CHUNK: usize = 64 << 10;
    /// Of the reading.
    const TIME: Duration = Duration::from_secs(35);
    let is_nightly = std::env::var_os("RINGPOLL_NIGHTLY").is_some_and(|value| value == "1");
    let is_mounted = t.mount().backend == Backend::Epoll && t.mount().side == Side::Server;
    if !is_nightly || !is_mounted {
        return skip("a slow transfer", "it takes 35 s: RINGPOLL_NIGHTLY=1, epoll");
    }
    let mut readings = Vec::new();
    for half_closes in [false, true] {
        let (peer, done) = t.drive(move |mut conn| async move {
            if half_closes {
                assert!(conn.next(1).await.expect_err("half-closed").is_eof());
            }
            conn.write(pattern(0, TOTAL))?;
            conn.submit()?;
            Ok(())
        })?;
        hold_little(&peer)?;
        if half_closes {
            peer.shutdown(Shutdown::Write)?;
        }
        done.wait();
        readings.push(on_thread(move || {
            read_slowly(&peer, TOTAL, CHUNK, TIME / (TOTAL / CHUNK) as u32)?;
            assert_eof(&peer);
            Ok(())
        }));
    }
    readings.iter().for_each(Outcome::wait_for_all);
    Ok(())
}

/// Blocks the clients' poller in a close callback, until the returned sender is dropped, or for
/// `at_most`.
fn hold_clients(t: &Fixture, at_most: Duration) -> Check<Sender<()>> {
    let (conn, _peer) = t.client()?;
    let (release, released) = channel::<()>();
    let (report, held) = channel();
    conn.on_close(move |_| {
        report.send(()).expect("the test listens");
        // Ends by the drop of its sender, or by its time limit.
        let _ = released.recv_timeout(at_most);
    });
    drop(conn);
    held.recv_timeout(DEADLINE)?;
    Ok(release)
}

/// Begins to detach and drops the future, while a handle is kept.
fn give_up_detaching(t: &Fixture, output: &'static [u8]) -> Check {
    const ROUNDS: usize = 1000;
    let mut given_up = 0;
    for _ in 0..ROUNDS {
        // A poller that is held cannot be faster than one poll.
        let held = match t.mount().side {
            Side::Client => Some(hold_clients(t, DEADLINE / 4)?),
            Side::Server => None,
        };
        let (peer, done) = t.drive(move |mut conn| async move {
            let handle = conn.handle();
            if !output.is_empty() {
                conn.write(output)?;
            }
            let is_given_up = poll_once(conn.detach()).await.is_none();
            Ok((handle, is_given_up))
        })?;
        let (handle, is_given_up) = done.wait();
        drop(held);
        read_to_end(&peer)?;
        assert!(holds_within(DEADLINE, || is_gone(&handle)), "its descriptor stays open");
        given_up += usize::from(is_given_up);
        if given_up == 3 {
            return Ok(());
        }
    }
    // Of a server, a poller may be faster than one poll, but not so often.
    assert!(given_up > 0, "each of {ROUNDS} was detached in one poll");
    Ok(())
}

pub(crate) fn detaching_given_up_in_its_flush_closes_the_socket(t: &Fixture) -> Check {
    give_up_detaching(t, &TOO_MUCH)
}

pub(crate) fn detaching_given_up_in_its_removal_closes_the_socket(t: &Fixture) -> Check {
    give_up_detaching(t, b"")
}

/// As its documentation says; while its handler still runs.
pub(crate) fn a_failed_flush_in_detach_closes_the_connection(t: &Fixture) -> Check {
    let permits = Arc::new(Semaphore::new(0));
    let stays = Arc::clone(&permits);
    let (report, failed) = outcome();
    let (peer, done) = t.drive(|mut conn| async move {
        conn.set_write_timeout(Some(SHORT));
        conn.write(&TOO_MUCH[..])?;
        let handle = conn.handle();
        let error = conn.detach().await.expect_err("nobody reads");
        tell(report, Ok((handle, error)));
        stays.acquire().await?.forget();
        Ok(())
    })?;
    let (handle, error) = failed.wait();
    assert!(error.is_write_timeout(), "{error:?}");
    let is_closed = holds_within(DEADLINE, || handle.is_closed());
    permits.add_permits(1);
    done.wait();
    assert!(is_closed, "it is not closed while its handler runs");
    drop(peer);
    eventually("its descriptor is closed", || is_gone(&handle));
    Ok(())
}

pub(crate) fn close_callbacks_of_a_detached_connection_have_a_valid_fd(t: &Fixture) -> Check {
    for round in 0..20 {
        let (peer, done) = t.drive(|conn| async move {
            let (report, seen) = channel();
            conn.on_close(move |handle| {
                report.send(handle.with_fd(|_| ()).is_ok()).expect("the test listens");
            });
            Ok((conn.detach().await?, seen))
        })?;
        let (detached, seen) = done.wait();
        assert!(seen.recv_timeout(DEADLINE)?, "no descriptor in a callback, round {round}");
        drop(detached);
        assert_eof(&peer);
    }
    Ok(())
}

/// All of it, and then a clean end; what was only written is not sent.
pub(crate) fn submitted_before_a_close_is_sent(t: &Fixture) -> Check {
    /// Pieces, and bytes of each.
    const SHAPES: [(usize, usize); 5] =
        [(1, 1 << 10), (100, 1 << 10), (1, 1 << 20), (3, 1 << 20), (8, 1 << 20)];
    for round in 0..50 {
        let (count, bytes) = SHAPES[round % SHAPES.len()];
        let (peer, done) = t.drive(move |mut conn| async move {
            for index in 0..count {
                conn.write(pattern(index * bytes, bytes))?;
            }
            conn.submit()?;
            conn.write_copy(b"only written")?;
            conn.close();
            assert!(conn.is_closed());
            Ok(())
        })?;
        let (mut at, mut buffer) = (0, vec![0; 256 << 10]);
        let wanted = count * bytes;
        loop {
            let got = (&peer).read(&mut buffer);
            let end = |what| Failure::new(format_args!("round {round}, {at} of {wanted}: {what}"));
            match got {
                Ok(0) if at == wanted => break,
                Ok(0) => return Err(end("a clean end too early".to_owned())),
                Ok(more) => assert_pattern(&buffer[..more], at),
                Err(ref error) if error.kind() == ErrorKind::Interrupted => {}
                Err(ref error) => return Err(end(error.to_string())),
            }
            at += got.unwrap_or_default();
        }
        done.wait();
    }
    Ok(())
}

/// This side sees the connection closed at once. A shutdown without a wait ends it.
/// Reads to the end. `false`: the stream has ended in order.
async fn fails(mut reader: ReadHalf) -> bool {
    loop {
        match reader.readable().await {
            Ok(0) => return false,
            Ok(bytes) => reader.skip(bytes).await.expect("they are there"),
            Err(_) => return true,
        }
    }
}

/// The kernel reports a reset once. Sends and receives are under way when it comes, and either may
/// get it.
pub(crate) fn a_reset_that_a_send_gets_is_no_end_of_the_stream(t: &Fixture) -> Check {
    for round in 0..200 {
        let (peer, ended) = t.drive(|conn: Connection| async move {
            let (reader, mut writer) = conn.split();
            let writes = async {
                while writer.write_copy(&TOO_MUCH[..64 << 10]).is_ok() {
                    if writer.flush().await.is_err() {
                        break;
                    }
                }
            };
            Ok(tokio::join!(writes, fails(reader)).1)
        })?;
        read_exactly(&peer, 1 << (8 + round % 10))?;
        reset(peer)?;
        assert!(ended.wait(), "round {round}: the reset looks like an end");
    }
    Ok(())
}

/// The peer takes nothing for longer than the user timeout of TCP, and the kernel gives it up.
pub(crate) fn a_lost_peer_that_a_send_notices_is_no_end_of_the_stream(t: &Fixture) -> Check {
    let (_peer, ended) = t.drive(|conn: Connection| async move {
        conn.handle().with_fd(|fd| sockopt::set_tcp_user_timeout(fd, 300)).map(|set| set.ok())?;
        let (reader, mut writer) = conn.split();
        writer.write(&TOO_MUCH[..])?;
        let (flushed, fails) = tokio::join!(writer.flush(), fails(reader));
        assert!(flushed.is_err());
        Ok(fails)
    })?;
    assert!(ended.wait(), "the failure looks like an end");
    Ok(())
}

/// The peer of a Unix socket ends its receiving side in the middle of a send, then its stream.
pub(crate) fn a_unix_stream_that_takes_no_more_still_ends_in_order(t: &Fixture) -> Check {
    let (ours, mut peer) = UnixStream::pair()?;
    let conn = t.dialer().adopt(ours.into())?;
    let ended = on_task(async move {
        let (reader, mut writer) = conn.split();
        writer.write(&TOO_MUCH[..])?;
        let (flushed, fails) = tokio::join!(writer.flush(), fails(reader));
        assert!(flushed.is_err());
        Ok(fails)
    });
    read_exactly(&peer, 1000)?;
    peer.shutdown(Shutdown::Read)?;
    peer.write_all(b"the rest")?;
    peer.shutdown(Shutdown::Write)?;
    assert!(!ended.wait(), "the end looks like a reset");
    Ok(())
}

pub(crate) fn a_peer_that_never_reads_keeps_no_closed_connection(t: &Fixture) -> Check {
    let close = |mut conn: Connection| async move {
        conn.write(&TOO_MUCH[..])?;
        conn.submit()?;
        conn.close();
        Ok::<_, Error>(conn.handle())
    };
    if t.mount().side == Side::Client {
        let group = Pollers::builder().backend(t.mount().backend).count(1).build()?;
        let (one, _peer) = tcp_pair()?;
        let conn = Dialer::new().pollers(group.clone()).adopt(one.into())?;
        let handle = block_on(async { Ok(close(conn).await?) })?;
        assert!(handle.is_closed());
        on_thread(move || Ok(group.shutdown()?)).wait();
        assert!(is_gone(&handle), "its descriptor outlives its pollers");
        return Ok(());
    }
    let (sender, closed) = channel();
    let server = t.spawn(t.server().on_connect(move |conn| {
        let sender = sender.clone();
        async move { sender.send(close(conn).await?).map_err(Error::other) }
    }));
    let _peer = dial(&server)?;
    let handle: Handle = closed.recv_timeout(DEADLINE)?;
    assert!(handle.is_closed());
    let ending = server.clone();
    on_thread(move || Ok(ending.shutdown_forced(Duration::ZERO)?)).wait();
    assert_eq!(server.stats().open, 0);
    assert!(is_gone(&handle), "its descriptor outlives its server");
    Ok(())
}

/// The urgent byte is not in the stream (`SO_OOBINLINE` is off), and a receive stops before it.
pub(crate) fn urgent_data_hangs_nobody(t: &Fixture) -> Check {
    if t.mount().receives_behind_pollers() {
        return skip("urgent data", "the kernel's thread may wait at its mark: docs/IO_URING.md");
    }
    for round in 0..20 {
        let (mut peer, done) = t.drive(move |mut conn| async move {
            assert_pattern(&conn.next(200).await?, round);
            conn.write_copy(b"answer")?;
            conn.flush().await?;
            Ok(())
        })?;
        peer.write_all(&pattern(round, 100))?;
        rustix::net::send(&peer, b"!", SendFlags::OOB)?;
        peer.write_all(&pattern(round + 100, 100))?;
        let answer = read_exactly(&peer, 6);
        let answer =
            answer.map_err(|error| Failure::new(format_args!("round {round}: {error}")))?;
        assert_eq!(answer, b"answer");
        done.wait();
    }
    Ok(())
}
