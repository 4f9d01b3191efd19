//! Blocking connections, for plain threads.

use std::net::TcpListener;
use std::thread;
use std::time::{Duration, Instant};

use ringpoll::blocking;
use ringpoll::buffer::{LinkBuffer, Reader, Writer};
use ringpoll::{Placement, Result};

use crate::harness::*;

macro_rules! cases {
    ($tests:ident, $mount:ident) => {
        $tests! { $mount, blocking:
            the_blocking_twin_reads_and_writes
            a_blocking_connection_is_a_reader_and_a_writer
            a_blocking_read_waits_and_times_out
            a_close_from_another_thread_wakes_a_blocking_read
            a_blocking_flush_waits_for_the_peer
            a_blocking_call_on_a_poller_thread_is_unsupported
            many_threads_with_blocking_connections_do_not_mix
            a_refused_blocking_connect_is_an_error
            wait_runs_any_future_on_this_thread
            dropping_a_blocking_connection_closes_it
        }
    };
}
pub(crate) use cases;

fn dial_blocking(t: &Fixture, server: &ringpoll::ServerHandle) -> Result<blocking::Connection> {
    blocking::connect_with(&t.dialer(), &addr_of(server).to_string())
}

/// Every method once.
pub(crate) fn the_blocking_twin_reads_and_writes(t: &Fixture) -> Check {
    let server = t.echo_server();
    let mut conn = dial_blocking(t, &server)?;
    conn.write(pattern(0, 100_000))?;
    conn.flush()?;
    assert_pattern(&conn.next(10_000)?, 0);
    assert_pattern(&conn.peek(10)?, 10_000);
    conn.skip(10)?;
    let mut some = [0; 90];
    conn.read_exact(&mut some)?;
    assert_pattern(&some, 10_010);
    assert_pattern(&conn.read_to_vec(9_900)?, 10_100);
    assert_pattern(&[conn.read_byte()?], 20_000);
    assert_eq!(conn.slice(79_999)?.len(), 79_999);
    conn.write_copy(b"line one\nrest")?;
    conn.reserve(4)?.copy_from_slice(b"!???");
    conn.commit(1)?;
    conn.submit()?;
    assert_eq!(conn.until(b'\n')?[..], b"line one\n"[..]);
    assert_eq!(conn.read_string(5)?, "rest!");
    conn.write_copy(b"x")?;
    conn.flush()?;
    assert_eq!(conn.readable()?, 1);
    assert_eq!(conn.len(), 1);
    assert_eq!(conn.try_next(1).expect("buffered")[..], *b"x");
    conn.shutdown_write()?;
    assert_eq!(conn.read(&mut [0])?, 0);
    assert_eq!(conn.stats().received_bytes, 100_015);
    Ok(())
}

/// Generic code does the same with a connection to an echo server as with a buffer.
pub(crate) fn a_blocking_connection_is_a_reader_and_a_writer(t: &Fixture) -> Check {
    fn exchange(stream: &mut (impl Reader + Writer)) -> Result<()> {
        stream.reserve(8)?.copy_from_slice(b"head????");
        stream.insert("ing ", 4)?;
        stream.commit(8)?;
        stream.write("\u{e9} ")?;
        stream.write_copy(b"\xff\xff line\n")?;
        let mut rest = LinkBuffer::new();
        rest.write_copy(b"0123456789")?;
        stream.append(rest)?;
        let bytes = stream.pending_len();
        stream.flush()?;
        assert_eq!(stream.pending_len(), 0);

        assert_eq!(stream.peek(bytes)?.len(), bytes);
        assert_eq!(stream.len(), bytes);
        assert_eq!(stream.next(8)?, "heading ");
        assert_eq!(stream.read_string(3)?, "\u{e9} ");
        assert!(stream.read_string(2).expect_err("not UTF-8").is_invalid());
        assert_eq!(stream.until(b'\n')?, " line\n");
        assert_eq!(stream.slice(2)?.next(2)?, "01");
        stream.skip(2)?;
        assert_eq!(stream.read_byte()?, b'4');
        assert_eq!(stream.read_to_vec(2)?, b"56");
        let mut two = [0; 2];
        stream.read_exact(&mut two)?;
        assert_eq!(two, *b"78");
        assert_eq!(stream.read(&mut [0; 8])?, 1);
        assert!(stream.is_empty());
        Ok(())
    }
    exchange(&mut LinkBuffer::new())?;
    let server = t.echo_server();
    exchange(&mut dial_blocking(t, &server)?)?;
    Ok(())
}

/// Timeouts work without a runtime.
pub(crate) fn a_blocking_read_waits_and_times_out(t: &Fixture) -> Check {
    let server = t.echo_server();
    let mut conn = dial_blocking(t, &server)?;
    let timeout = Duration::from_millis(50);
    conn.set_read_timeout(Some(timeout));
    let start = Instant::now();
    let error = conn.next(1).expect_err("nothing comes");
    assert!(error.is_read_timeout(), "{error:?}");
    assert!(start.elapsed() >= timeout, "early, after {:?}", start.elapsed());
    conn.write_copy(b"still fine")?;
    conn.flush()?;
    conn.set_read_timeout(Some(DEADLINE));
    assert_eq!(conn.next(10)?[..], b"still fine"[..]);
    Ok(())
}

pub(crate) fn a_close_from_another_thread_wakes_a_blocking_read(t: &Fixture) -> Check {
    let server = t.echo_server();
    let mut conn = dial_blocking(t, &server)?;
    let handle = (*conn).clone();
    let (starts, started) = outcome();
    let reading = on_thread(move || {
        tell(starts, Ok(()));
        Ok(conn.next(1).expect_err("nothing comes"))
    });
    started.wait();
    handle.close();
    let error = reading.wait();
    assert!(error.is_closed() && !error.is_eof(), "{error:?}");
    Ok(())
}

pub(crate) fn a_blocking_flush_waits_for_the_peer(t: &Fixture) -> Check {
    const SIZE: usize = 16 << 20;
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let addr = listener.local_addr()?.to_string();
    let mut conn = blocking::connect_with(&t.dialer(), &addr)?;
    let (peer, _) = listener.accept()?;
    bound(&peer)?;
    let handle = (*conn).clone();
    let writing = on_thread(move || {
        conn.write(pattern(0, SIZE))?;
        conn.flush()?;
        Ok(conn)
    });
    eventually("the flush waits", || handle.stats().unsent_bytes > 0);
    writing.assert_pending();
    assert_pattern(&read_exactly(&peer, SIZE)?, 0);
    drop(writing.wait());
    Ok(())
}

/// A poller that waits for itself would wait for ever.
pub(crate) fn a_blocking_call_on_a_poller_thread_is_unsupported(t: &Fixture) -> Check {
    let upstream = t.echo_server();
    let addr = addr_of(&upstream).to_string();
    let (report, reported) = std::sync::mpsc::channel();
    let (prepare_addr, prepare_report) = (addr.clone(), report.clone());
    let server = t.spawn(
        t.server()
            .placement(Placement::Inline)
            .on_prepare(move |_| {
                let error = blocking::connect(&prepare_addr).err();
                prepare_report.send(error).map_err(ringpoll::Error::other)
            })
            .on_request(move |conn| {
                report.send(blocking::connect(&addr).err()).expect("the test listens");
                echo(conn)
            }),
    );
    let peer = dial(&server)?;
    assert_eq!(exchange(&peer, b"hello")?, b"hello");
    for wherefrom in ["on_prepare", "an inline handler"] {
        let error = reported.recv_timeout(DEADLINE)?;
        let error = error.unwrap_or_else(|| panic!("{wherefrom} blocked its poller"));
        assert!(error.is_unsupported(), "{wherefrom}: {error:?}");
    }
    Ok(())
}

/// Each thread has its own connection.
pub(crate) fn many_threads_with_blocking_connections_do_not_mix(t: &Fixture) -> Check {
    let server = t.echo_server();
    thread::scope(|scope| {
        let threads: Vec<_> = (0..16)
            .map(|index| {
                let server = &server;
                scope.spawn(move || -> Check {
                    let mut conn = dial_blocking(t, server)?;
                    for round in 0..50 {
                        let at = index * 1000 + round;
                        conn.write(pattern(at, 700))?;
                        conn.flush()?;
                        assert_pattern(&conn.next(700)?, at);
                    }
                    Ok(())
                })
            })
            .collect();
        threads.into_iter().try_for_each(|thread| {
            thread.join().unwrap_or_else(|_| Err(Failure::new("a thread panicked")))
        })
    })
}

pub(crate) fn a_refused_blocking_connect_is_an_error(_: &Fixture) -> Check {
    let vacant = TcpListener::bind("127.0.0.1:0")?.local_addr()?.to_string();
    let error = blocking::connect(&vacant).expect_err("nobody listens");
    assert_eq!(error.raw_os_error(), Some(libc::ECONNREFUSED), "{error:?}");
    Ok(())
}

/// `wait` needs no runtime; wake-ups from elsewhere reach it.
pub(crate) fn wait_runs_any_future_on_this_thread(_: &Fixture) -> Check {
    let here = thread::current().id();
    let (send, receive) = tokio::sync::oneshot::channel();
    let sending = on_thread(move || send.send(5).map_err(|_| Failure::new("nobody waits")));
    let value = blocking::wait(async move {
        assert_eq!(thread::current().id(), here);
        receive.await
    })?;
    assert_eq!(value, 5);
    sending.wait();
    assert_eq!(blocking::wait(async { blocking_free().await }), 7);
    Ok(())
}

async fn blocking_free() -> usize {
    for _ in 0..3 {
        tokio::task::yield_now().await;
    }
    7
}

/// As for the async one.
pub(crate) fn dropping_a_blocking_connection_closes_it(t: &Fixture) -> Check {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let addr = listener.local_addr()?.to_string();
    let conn = blocking::connect_with(&t.dialer(), &addr)?;
    let (peer, _) = listener.accept()?;
    bound(&peer)?;
    assert!(conn.is_active());
    drop(conn);
    assert_eof(&peer);
    Ok(())
}
