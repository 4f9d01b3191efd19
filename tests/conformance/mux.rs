//! Many producers, one connection: messages stay whole and in order, no accepted message is lost,
//! and every waiting call returns the result of the driver.

use std::net::TcpStream;
use std::sync::mpsc::channel;

use ringpoll::buffer::Writer as _;
use ringpoll::{Connection, Handle, LinkBuffer, Mux, MuxDriver, ReadHalf, TrySendError};

use crate::harness::*;

macro_rules! cases {
    ($tests:ident, $mount:ident) => {
        $tests! { $mount, mux:
            four_producers_of_eleven_bytes_arrive_whole
            a_second_close_fails
            a_close_of_an_empty_queue_returns
            every_producer_of_a_connection_that_dies_is_told
            a_driver_that_waits_notices_that_its_connection_is_closed
            a_close_returns_only_after_the_last_flush
            the_bytes_of_many_producers_stay_intact
            messages_of_every_kind_are_whole
            what_was_written_before_goes_first
            everything_that_waits_leaves_with_one_flush
            a_producer_waits_for_room_and_may_give_up
            a_message_that_must_not_wait_comes_back
            a_mux_has_the_handle_of_its_connection
            a_flush_covers_what_was_accepted_before_it
            a_driver_ends_with_its_last_producer
            a_driver_that_is_dropped_submits_what_was_accepted
        }
    };
}
pub(crate) use cases;

/// More than the kernel takes for a peer that does not read.
static TOO_MUCH: [u8; 8 << 20] = [7; 8 << 20];

/// What the documentation says waits at most.
const WAITING_BYTES_MAX: usize = 1 << 20;

/// Runs the driver where handlers run, or on a task where there is no server; how it ended.
fn start(conn: &Handle, driver: MuxDriver) -> Outcome<ringpoll::Result<()>> {
    let (report, ended) = outcome();
    let driven = async move {
        tell(report, Ok(driver.await));
        Ok(())
    };
    if conn.spawn(std::future::ready(Ok(()))).is_ok() {
        conn.spawn(driven).expect("a server's connection");
    } else {
        runtime().spawn(driven);
    }
    ended
}

/// A mux at one end of a connection, its driver running; and the plain socket at the other end.
struct Muxed {
    mux: Mux,
    ended: Outcome<ringpoll::Result<()>>,
    handle: Handle,
    peer: TcpStream,
}

/// What a connection is made of, for tests that put it together themselves.
struct Parts {
    mux: Mux,
    driver: MuxDriver,
    /// Without it a connection of a client is closed with its writer.
    reader: ReadHalf,
    peer: TcpStream,
}

fn parts(t: &Fixture) -> Check<Parts> {
    parts_after(t, Ok)
}

fn parts_after(
    t: &Fixture,
    before: impl FnOnce(Connection) -> Check<Connection> + Send + 'static,
) -> Check<Parts> {
    let (sender, receiver) = channel();
    let (peer, begun) = t.drive(|conn| async move {
        let (reader, writer) = before(conn)?.split();
        let (mux, driver) = Mux::new(writer);
        Ok(sender.send((mux, driver, reader))?)
    })?;
    begun.wait();
    let (mux, driver, reader) = receiver.recv()?;
    Ok(Parts { mux, driver, reader, peer })
}

fn muxed(t: &Fixture) -> Check<Muxed> {
    let Parts { mux, driver, reader, peer } = parts(t)?;
    let handle = (*reader).clone();
    let ended = start(&handle, driver);
    // The writer alone keeps the connection.
    drop(reader);
    Ok(Muxed { mux, ended, handle, peer })
}

pub(crate) fn four_producers_of_eleven_bytes_arrive_whole(t: &Fixture) -> Check {
    let Muxed { mux, ended, peer, .. } = muxed(t)?;
    let producers: Vec<_> = (0..4)
        .map(|_| {
            let mux = mux.clone();
            on_task(async move {
                for _ in 0..4 {
                    mux.send(b"hello world").await?;
                }
                Ok(())
            })
        })
        .collect();
    producers.iter().for_each(Outcome::wait);
    block_on(async { Ok(mux.close().await?) })?;
    ended.wait()?;
    assert_eq!(read_all(&peer)?, b"hello world".repeat(16));
    Ok(())
}

pub(crate) fn a_second_close_fails(t: &Fixture) -> Check {
    let Muxed { mux, ended, peer, .. } = muxed(t)?;
    block_on(async {
        mux.send("all").await?;
        mux.clone().close().await?;
        for error in [mux.close().await, mux.send("more").await, mux.clone().close().await] {
            let error = error.expect_err("it is closed");
            assert!(error.is_closed() && !error.is_eof(), "{error:?}");
        }
        // What was accepted was flushed, so there is nothing to complain of.
        Ok(mux.flush().await?)
    })?;
    ended.wait()?;
    assert_eq!(read_all(&peer)?, b"all");
    Ok(())
}

pub(crate) fn a_close_of_an_empty_queue_returns(t: &Fixture) -> Check {
    let Muxed { mux, ended, peer, .. } = muxed(t)?;
    block_on(async { Ok(mux.close().await?) })?;
    ended.wait()?;
    assert_eof(&peer);
    Ok(())
}

pub(crate) fn every_producer_of_a_connection_that_dies_is_told(t: &Fixture) -> Check {
    for is_reset in [true, false] {
        let Muxed { mux, ended, handle, peer } = muxed(t)?;
        let producers: Vec<_> = (0..4)
            .map(|producer| {
                let mux = mux.clone();
                on_task(async move {
                    loop {
                        // By reference and by copy.
                        let sent = mux.send(vec![producer; 100 + 5000 * usize::from(producer)]);
                        if let Err(error) = sent.await {
                            return Ok(error);
                        }
                    }
                })
            })
            .collect();
        read_exactly(&peer, 100_000)?;
        if is_reset {
            reset(peer)?;
        } else {
            handle.close();
        }
        for producer in producers {
            let error = producer.wait();
            assert!(error.is_closed(), "{error:?}");
        }
        let error = ended.wait().expect_err("it died");
        assert!(error.is_closed(), "{error:?}");
        block_on(async {
            for outcome in [mux.send("late").await, mux.close().await] {
                let error = outcome.expect_err("it died");
                assert!(error.is_closed(), "{error:?}");
            }
            Ok(())
        })?;
    }
    Ok(())
}

pub(crate) fn a_driver_that_waits_notices_that_its_connection_is_closed(t: &Fixture) -> Check {
    for is_reset in [true, false] {
        let Muxed { mux, ended, handle, peer } = muxed(t)?;
        block_on(async {
            mux.send("first").await?;
            Ok(mux.flush().await?)
        })?;
        assert_eq!(read_exactly(&peer, 5)?, b"first");
        if is_reset {
            reset(peer)?;
        } else {
            handle.close();
        }
        let error = ended.wait().expect_err("nobody sends, and it ends all the same");
        assert!(error.is_closed(), "{error:?}");
    }
    Ok(())
}

pub(crate) fn a_close_returns_only_after_the_last_flush(t: &Fixture) -> Check {
    let Muxed { mux, ended, handle, peer } = muxed(t)?;
    let closing = on_task(async move {
        mux.send(&TOO_MUCH).await?;
        mux.close().await?;
        Ok(handle.stats().sent_bytes)
    });
    assert_eq!(read_exactly(&peer, 1)?, [7]);
    closing.assert_pending();
    assert_eq!(read_all(&peer)?.len(), TOO_MUCH.len() - 1);
    assert_eq!(closing.wait(), TOO_MUCH.len() as u64);
    ended.wait()?;
    Ok(())
}

pub(crate) fn the_bytes_of_many_producers_stay_intact(t: &Fixture) -> Check {
    const PRODUCERS: usize = 8;
    const MESSAGES: usize = 200;
    let Muxed { mux, ended, peer, .. } = muxed(t)?;
    let producers: Vec<_> = (0..PRODUCERS)
        .map(|tag| {
            let (mux, mut random) = (mux.clone(), t.random());
            on_task(async move {
                let mut at = 0;
                for _ in 0..MESSAGES {
                    // Some are copied, some go by reference.
                    let size = random.within(1..10_000);
                    let mut message = (tag as u32).to_be_bytes().to_vec();
                    message.extend((size as u32).to_be_bytes());
                    message.extend(pattern(own(tag, at), size));
                    mux.send(message).await?;
                    at += size;
                }
                Ok(at)
            })
        })
        .collect();
    let mut seen = [(0, 0); PRODUCERS];
    for _ in 0..PRODUCERS * MESSAGES {
        let head = read_exactly(&peer, 8)?;
        let [tag, size] = [&head[..4], &head[4..]]
            .map(|word| u32::from_be_bytes(word.try_into().expect("four bytes")) as usize);
        let (messages, at) = &mut seen[tag];
        assert_pattern(&read_exactly(&peer, size)?, own(tag, *at));
        *messages += 1;
        *at += size;
    }
    for (producer, (messages, at)) in producers.iter().zip(seen) {
        assert_eq!((producer.wait(), MESSAGES), (at, messages));
    }
    block_on(async { Ok(mux.close().await?) })?;
    ended.wait()?;
    assert_eof(&peer);
    Ok(())
}

pub(crate) fn messages_of_every_kind_are_whole(t: &Fixture) -> Check {
    let Muxed { mux, peer, .. } = muxed(t)?;
    block_on(async {
        mux.send("static").await?;
        mux.send("").await?;
        mux.send_copy(&pattern(0, 10_000)).await?;
        mux.send(bytes::Bytes::from(pattern(10_000, 5000))).await?;
        let mut message = LinkBuffer::new();
        message.write("in ")?;
        message.flush()?;
        message.write(pattern(15_000, 6000))?;
        message.write(" pieces")?;
        mux.send_buffer(message).await?;
        Ok(mux.close().await?)
    })?;
    let mut wanted = b"static".to_vec();
    wanted.extend(pattern(0, 15_000));
    wanted.extend(b"in ");
    wanted.extend(pattern(15_000, 6000));
    wanted.extend(b" pieces");
    assert!(read_all(&peer)? == wanted);
    Ok(())
}

pub(crate) fn what_was_written_before_goes_first(t: &Fixture) -> Check {
    for is_used in [true, false] {
        let Parts { mux, driver, reader, peer } = parts_after(t, |mut conn| {
            conn.write("hello ")?;
            Ok(conn)
        })?;
        let ended = start(&reader, driver);
        block_on(async {
            if is_used {
                mux.send("world").await?;
            }
            Ok(mux.close().await?)
        })?;
        ended.wait()?;
        drop(reader);
        assert_eq!(read_all(&peer)?, if is_used { &b"hello world"[..] } else { b"hello " });
    }
    Ok(())
}

pub(crate) fn everything_that_waits_leaves_with_one_flush(t: &Fixture) -> Check {
    if !matches!(t.mount().backend, Backend::Epoll | Backend::Hybrid) {
        let reason = "a flush is no system call";
        return skip("everything_that_waits_leaves_with_one_flush", reason);
    }
    let Parts { mux, driver, reader, peer } = parts(t)?;
    block_on(async {
        for _ in 0..1000 {
            mux.send("hello world").await?;
        }
        Ok(())
    })?;
    let calls = || t.send_calls();
    let before = calls();
    let ended = start(&reader, driver);
    block_on(async { Ok(mux.close().await?) })?;
    ended.wait()?;
    assert_eq!(calls() - before, 1);
    drop(reader);
    assert_eq!(read_all(&peer)?.len(), 11_000);
    Ok(())
}

pub(crate) fn a_producer_waits_for_room_and_may_give_up(t: &Fixture) -> Check {
    let Parts { mux, driver, reader, peer } = parts(t)?;
    let waits = block_on(async {
        mux.send(&TOO_MUCH[..WAITING_BYTES_MAX]).await?;
        assert!(poll_once(mux.send("given up")).await.is_none(), "nobody has made room");
        let mux = mux.clone();
        let waits = on_task(async move { Ok(mux.send("waited").await?) });
        Ok(waits)
    })?;
    waits.assert_pending();
    let ended = start(&reader, driver);
    let bytes = read_exactly(&peer, WAITING_BYTES_MAX + 6)?;
    assert_eq!(&bytes[WAITING_BYTES_MAX..], b"waited");
    waits.wait();
    block_on(async { Ok(mux.close().await?) })?;
    ended.wait()?;
    drop(reader);
    assert_eof(&peer);
    Ok(())
}

pub(crate) fn a_flush_covers_what_was_accepted_before_it(t: &Fixture) -> Check {
    let Muxed { mux, ended, handle, peer } = muxed(t)?;
    let reading = on_thread(move || Ok(read_all(&peer)?.len()));
    block_on(async {
        let mut sent = 0;
        for bytes in [1, 10_000, 1_000_000] {
            mux.send(&TOO_MUCH[..bytes]).await?;
            mux.flush().await?;
            sent += bytes as u64;
            assert_eq!(handle.stats().sent_bytes, sent);
        }
        assert!(poll_once(mux.flush()).await.is_some(), "there is nothing to wait for");
        Ok(mux.close().await?)
    })?;
    ended.wait()?;
    assert_eq!(reading.wait(), 1_010_001);
    Ok(())
}

pub(crate) fn a_driver_ends_with_its_last_producer(t: &Fixture) -> Check {
    let Muxed { mux, ended, peer, .. } = muxed(t)?;
    let other = mux.clone();
    block_on(async {
        mux.send("one ").await?;
        drop(mux);
        Ok(other.send("other").await?)
    })?;
    ended.assert_pending();
    drop(other);
    ended.wait()?;
    assert_eq!(read_all(&peer)?, b"one other");
    Ok(())
}

pub(crate) fn a_driver_that_is_dropped_submits_what_was_accepted(t: &Fixture) -> Check {
    let Parts { mux, mut driver, reader, peer } = parts(t)?;
    let waits = block_on(async {
        // It has looked, and waits.
        assert!(poll_once(&mut driver).await.is_none());
        mux.send("accepted").await?;
        let mux = mux.clone();
        Ok(on_task(async move { Ok(mux.flush().await) }))
    })?;
    drop(driver);
    assert!(waits.wait().is_err_and(|error| error.is_closed()));
    assert_eq!(read_exactly(&peer, 8)?, b"accepted");
    block_on(async {
        for outcome in [mux.send("late").await, mux.close().await] {
            assert!(outcome.is_err_and(|error| error.is_closed()));
        }
        Ok(())
    })?;
    drop(reader);
    assert_eof(&peer);
    Ok(())
}

pub(crate) fn a_message_that_must_not_wait_comes_back(t: &Fixture) -> Check {
    let Parts { mux, driver, reader, peer } = parts(t)?;
    // The driver takes nothing yet.
    let mut accepted = 0;
    let refused = loop {
        let message = pattern(accepted, 10_000);
        match mux.try_send(message) {
            Ok(()) => accepted += 10_000,
            Err(error) => break error,
        }
        assert!(accepted <= WAITING_BYTES_MAX + 10_000, "{accepted} bytes wait");
    };
    assert!(accepted >= WAITING_BYTES_MAX, "refused after {accepted} bytes");
    assert!(refused.is_full(), "{refused:?}");
    assert!(refused.to_string().contains("10000 bytes"), "{refused}");
    let message = refused.into_message();
    assert_pattern(message.as_ref(), accepted);
    assert!(ringpoll::Error::from(TrySendError::Full(message.clone())).is_limit());
    let ended = start(&reader, driver);
    block_on(async {
        mux.send(message).await?;
        Ok(mux.close().await?)
    })?;
    ended.wait()?;
    let error = mux.try_send("late").expect_err("it is closed");
    assert!(!error.is_full(), "{error:?}");
    assert!(ringpoll::Error::from(error).is_closed());
    drop(reader);
    let all = read_all(&peer)?;
    assert_eq!(all.len(), accepted + 10_000);
    assert_pattern(&all, 0);
    Ok(())
}

/// Its connection may hold the mux, and both end.
pub(crate) fn a_mux_has_the_handle_of_its_connection(t: &Fixture) -> Check {
    let Muxed { mux, ended, handle, peer } = muxed(t)?;
    let own = mux.handle().expect("the driver runs");
    assert_eq!((own.id(), own.peer_addr()), (handle.id(), handle.peer_addr()));
    handle.set_context(mux.clone());
    own.close();
    assert!(ended.wait().is_err_and(|error| error.is_closed()));
    assert_ended(&peer);
    drop((own, handle));
    eventually("the connection has gone", || mux.handle().is_none());
    Ok(())
}
