//! Flushing in odd ways: given up half way, beside other waits, for another connection, from
//! changing threads, and into every kind of end. Order and content hold through all of them.

use std::future::{Future, poll_fn};
use std::io::Write;
use std::net::TcpStream;
use std::pin::pin;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::task::Poll;
use std::thread;
use std::time::Duration;

use ringpoll::{Error, Result, WriteHalf};
use tokio::sync::{Mutex, oneshot};

use crate::harness::*;

macro_rules! cases {
    ($tests:ident, $mount:ident) => {
        $tests! { $mount, flushing:
            a_flush_given_up_half_way_may_be_called_again
            a_flush_of_nothing_waits_for_what_was_submitted_before
            a_flush_and_a_read_may_wait_in_one_future
            a_handler_may_flush_its_own_connection_and_another_at_once
            a_handler_may_flush_connections_of_every_poller
            a_handler_that_wakes_itself_and_then_flushes_answers
            a_panic_after_a_flush_loses_nothing_that_was_flushed
            every_end_of_a_connection_ends_the_flush_that_waits
            a_close_right_after_the_flush_began_ends_it
            a_forced_shutdown_ends_every_flush_that_waits
            a_writer_that_changes_threads_keeps_the_order
            runs_that_submit_and_runs_that_flush_keep_the_order
        }
    };
}
pub(crate) use cases;

/// More than the kernel takes for a peer that does not read.
static TOO_MUCH: [u8; 8 << 20] = [7; 8 << 20];

/// Wakes itself and waits, so many times: the poller gets as many turns.
async fn turns(mut count: usize) {
    poll_fn(|cx| {
        if count == 0 {
            return Poll::Ready(());
        }
        count -= 1;
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

/// What `first` returns, or `None` if `second` ends before it; the other is dropped where it is.
async fn first_of<F: Future>(first: F, second: impl Future) -> Option<F::Output> {
    let (mut first, mut second) = (pin!(first), pin!(second));
    poll_fn(|cx| match first.as_mut().poll(cx) {
        Poll::Ready(value) => Poll::Ready(Some(value)),
        Poll::Pending => second.as_mut().poll(cx).map(|_| None),
    })
    .await
}

/// Reads the test stream to its end in pieces of random size, and returns its length.
fn read_stream(peer: &TcpStream, mut random: Random) -> Check<usize> {
    let mut at = 0;
    loop {
        let mut bytes = vec![0; random.within(1..100_000)];
        let count = std::io::Read::read(&mut &*peer, &mut bytes)?;
        if count == 0 {
            return Ok(at);
        }
        assert_pattern(&bytes[..count], at);
        at += count;
    }
}

/// The first of two ends, the flush is dropped, more is written, and it is called again.
pub(crate) fn a_flush_given_up_half_way_may_be_called_again(t: &Fixture) -> Check {
    const TOTAL: usize = 6 << 20;
    let mut random = t.random();
    // The peer reads from then on; a fast one might leave no flush to be given up.
    let (first, first_given_up) = outcome();
    let (peer, wrote) = t.drive(move |mut conn| async move {
        let (mut at, mut first) = (0, Some(first));
        while at < TOTAL || first.is_some() {
            let count = random.within(1..400_000);
            conn.write(pattern(at, count))?;
            at += count;
            match first_of(conn.flush(), turns(random.within(0..4))).await {
                Some(done) => done?,
                None => {
                    if let Some(first) = first.take() {
                        tell(first, Ok(()));
                    }
                }
            }
            if first.is_none() && random.one_in(10) {
                conn.flush().await?;
                assert_eq!((conn.pending_len(), conn.stats().unsent_bytes), (0, 0));
            }
        }
        conn.flush().await?;
        conn.close();
        Ok(at)
    })?;
    first_given_up.wait();
    let got = read_stream(&peer, t.random())?;
    assert_eq!(got, wrote.wait());
    Ok(())
}

/// "Until the kernel has every byte": also those of an earlier submit.
pub(crate) fn a_flush_of_nothing_waits_for_what_was_submitted_before(t: &Fixture) -> Check {
    let (sends, sent) = outcome();
    let (peer, wrote) = t.drive(|mut conn| async move {
        conn.write(pattern(0, TOO_MUCH.len()))?;
        conn.submit()?;
        tell(sends, Ok((*conn).clone()));
        conn.flush().await?;
        assert_eq!(conn.stats().unsent_bytes, 0, "flush returned before the kernel had all");
        conn.close();
        Ok(())
    })?;
    let handle = sent.wait();
    assert!(handle.stats().unsent_bytes > 0, "the kernel has taken all of it at once");
    wrote.assert_pending();
    assert_eq!(read_stream(&peer, t.random())?, TOO_MUCH.len());
    wrote.wait();
    Ok(())
}

/// Both halves in one task: the read must not eat the flush's wake-up, nor the other way round.
pub(crate) fn a_flush_and_a_read_may_wait_in_one_future(t: &Fixture) -> Check {
    const ROUNDS: usize = 40;
    const OUT: usize = 300_000;
    const IN: usize = 200_000;
    let (mut peer, done) = t.drive(|conn| async move {
        let (mut reader, mut writer) = conn.split();
        for round in 0..ROUNDS {
            writer.write(pattern(round * OUT, OUT))?;
            let (flushed, read) = tokio::join!(writer.flush(), reader.next(IN));
            flushed?;
            assert_pattern(&read?, round * IN);
        }
        Ok(())
    })?;
    let reads = peer.try_clone()?;
    let reading = on_thread(move || {
        for round in 0..ROUNDS {
            assert_pattern(&read_exactly(&reads, OUT)?, round * OUT);
        }
        Ok(())
    });
    for round in 0..ROUNDS {
        peer.write_all(&pattern(round * IN, IN))?;
    }
    reading.wait();
    done.wait();
    Ok(())
}

/// A proxy: what came in goes to the upstream and back to the client, by two flushes at once.
pub(crate) fn a_handler_may_flush_its_own_connection_and_another_at_once(t: &Fixture) -> Check {
    const SIZE: usize = 100_000;
    let upstream = t.spawn(t.server().on_request(echo_frame));
    let addr = addr_of(&upstream).to_string();
    let proxy = t.spawn(t.server().on_request(move |mut conn| {
        let addr = addr.clone();
        async move {
            let frame = conn.next(4 + SIZE).await?;
            let mut upstream = ringpoll::connect(&addr).await?;
            upstream.write(frame.clone())?;
            conn.write(frame)?;
            let (there, back) = tokio::join!(upstream.flush(), conn.flush());
            there.and(back)?;
            let answer = upstream.next(4 + SIZE).await?;
            conn.write(answer)?;
            conn.flush().await
        }
    }));
    let clients: Vec<_> = (0..3)
        .map(|tag| {
            let peer = dial(&proxy)?;
            Ok(on_thread(move || {
                for round in 0..10 {
                    exchange_frame(&peer, tag * 10 + round, SIZE)?;
                    expect_frame(&peer, tag * 10 + round, SIZE)?;
                }
                Ok(())
            }))
        })
        .collect::<Check<_>>()?;
    for client in clients {
        client.wait_for_all();
    }
    Ok(())
}

/// A chat: all clients receive the words of each client, in order, on every poller.
pub(crate) fn a_handler_may_flush_connections_of_every_poller(t: &Fixture) -> Check {
    const CLIENTS: usize = 6;
    const WORDS: usize = 20;
    const WORD: usize = 1000;
    let ears = Arc::new(Mutex::new(Vec::<WriteHalf>::new()));
    let all = Arc::clone(&ears);
    let server = t.spawn(t.server().pollers(3).on_connect(move |conn| {
        let ears = Arc::clone(&all);
        async move {
            let (mut reader, writer) = conn.split();
            ears.lock().await.push(writer);
            loop {
                let word = match reader.next(WORD).await {
                    Err(error) if error.is_eof() => return Ok(()),
                    word => word?,
                };
                for ear in ears.lock().await.iter_mut() {
                    ear.write(word.clone())?;
                    ear.flush().await?;
                }
            }
        }
    }));
    let peers: Vec<_> = (0..CLIENTS).map(|_| dial(&server)).collect::<Check<_>>()?;
    eventually("all listen", || ears.try_lock().is_ok_and(|ears| ears.len() == CLIENTS));
    let talkers: Vec<_> = peers.iter().map(TcpStream::try_clone).collect::<std::io::Result<_>>()?;
    let talking: Vec<_> = (0_u8..)
        .zip(talkers)
        .map(|(tag, mut peer)| {
            on_thread(move || {
                (0..WORDS).try_for_each(|word| {
                    Ok(peer.write_all(&[[tag, word as u8]; WORD / 2].concat())?)
                })
            })
        })
        .collect();
    for peer in &peers {
        let mut heard = [0; CLIENTS];
        for _ in 0..CLIENTS * WORDS {
            let word = read_exactly(peer, WORD)?;
            assert!(word.chunks(2).all(|pair| pair == &word[..2]), "two words are mixed");
            let count = &mut heard[usize::from(word[0])];
            assert_eq!(usize::from(word[1]), *count, "a word of {} out of order", word[0]);
            *count += 1;
        }
    }
    for talker in talking {
        talker.wait_for_all();
    }
    drop(peers);
    eventually("nobody speaks", || ears.try_lock().map(|mut ears| ears.clear()).is_ok());
    Ok(())
}

/// The first time with the waker of the first poll, later with that of the task.
pub(crate) fn a_handler_that_wakes_itself_and_then_flushes_answers(t: &Fixture) -> Check {
    let server = t.spawn(t.server().on_request(|mut conn| async move {
        turns(1).await;
        let count = conn.readable().await?;
        turns(count % 3).await;
        let bytes = conn.next(count).await?;
        conn.write(bytes)?;
        let given_up = first_of(conn.flush(), turns(1)).await;
        turns(1).await;
        match given_up {
            Some(done) => done,
            None => conn.flush().await,
        }
    }));
    let peers: Vec<_> = (0..20).map(|_| dial(&server)).collect::<Check<_>>()?;
    for round in 0..20 {
        for mut peer in &peers {
            peer.write_all(&pattern(round, 100 + round))?;
        }
        for peer in &peers {
            assert_pattern(&read_exactly(peer, 100 + round)?, round);
        }
    }
    Ok(())
}

/// With bytes on their way.
pub(crate) fn a_panic_after_a_flush_loses_nothing_that_was_flushed(t: &Fixture) -> Check {
    let (report, reports) = channel();
    let builder = t.server().on_request(|mut conn| async move {
        let size = u32::from_be_bytes(conn.next(4).await?[..4].try_into().expect("four bytes"));
        conn.write(pattern(0, size as usize))?;
        conn.flush().await?;
        assert!(size % 2 == 0, "odd {ON_PURPOSE}");
        Ok(())
    });
    let server = t.spawn(builder.on_error(move |_, error| {
        report.send(error.is_panicked()).expect("the test listens");
    }));
    let mut bystander = dial(&server)?;
    for size in [1_u32, 101, 5001, 70_001, 2_000_001] {
        let mut victim = dial(&server)?;
        victim.write_all(&size.to_be_bytes())?;
        let got = read_all(&victim)?;
        assert_eq!(got.len(), size as usize);
        assert_pattern(&got, 0);
        assert!(reports.recv_timeout(DEADLINE)?, "something else than a panic was reported");
        bystander.write_all(&2_u32.to_be_bytes())?;
        assert_pattern(&read_exactly(&bystander, 2)?, 0);
    }
    assert_eq!(server.stats().handler_panics, 5);
    Ok(())
}

/// How a connection ends whose flush waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    ClosedByAnotherThread,
    TimedOut,
    ResetByThePeer,
    LeftByThePeer,
}

/// A close, and every other end: the flush ends with the error that fits, and its memory is free.
pub(crate) fn every_end_of_a_connection_ends_the_flush_that_waits(t: &Fixture) -> Check {
    for end in [End::ClosedByAnotherThread, End::TimedOut, End::ResetByThePeer, End::LeftByThePeer]
    {
        for _ in 0..5 {
            let (sends, sent) = outcome();
            let (peer, flushed) = t.drive(|mut conn| async move {
                tell(sends, Ok((*conn).clone()));
                conn.write(&TOO_MUCH[..])?;
                let error = conn.flush().await.expect_err("nobody reads");
                conn.close();
                Ok(error)
            })?;
            let handle = sent.wait();
            eventually("the flush waits", || handle.stats().unsent_bytes > 0);
            flushed.assert_pending();
            let mut peer = Some(peer);
            match end {
                End::ClosedByAnotherThread => handle.close(),
                End::TimedOut => handle.set_write_timeout(Some(Duration::from_millis(20))),
                End::ResetByThePeer => reset(peer.take().expect("it is there"))?,
                End::LeftByThePeer => drop(peer.take()),
            }
            let error = flushed.wait();
            let is_right = match end {
                End::TimedOut => error.is_write_timeout() && !error.is_closed(),
                _ => error.is_closed() && !error.is_eof() && !error.is_timeout(),
            };
            assert!(is_right, "{end:?}: {error:?}");
        }
        eventually("its memory is free", || t.stats().blocks == 0);
    }
    Ok(())
}

/// The close comes from another thread while the send is being made ready, submitted or retried.
pub(crate) fn a_close_right_after_the_flush_began_ends_it(t: &Fixture) -> Check {
    let mut random = t.random();
    for _ in 0..60 {
        let (sends, sent) = outcome();
        let (peer, flushed) = t.drive(|mut conn| async move {
            tell(sends, Ok((*conn).clone()));
            loop {
                let written = conn.write(pattern(conn.stats().sent_bytes as usize, 100_000));
                if let Err(error) = written.and(conn.flush().await) {
                    return Ok(error);
                }
            }
        })?;
        let handle = sent.wait();
        let spins = random.within(1..50_000);
        let closer = on_thread(move || {
            for _ in 0..spins {
                std::hint::spin_loop();
            }
            handle.close();
            Ok(())
        });
        // A reset ends the stream where data was cut off; what came before it is in order.
        let mut at = 0;
        while let Ok(bytes) = read_exactly(&peer, 1000) {
            assert_pattern(&bytes, at);
            at += bytes.len();
        }
        let error = flushed.wait();
        assert!(error.is_closed() && !error.is_eof(), "{error:?}");
        closer.wait();
    }
    Ok(())
}

/// Fix row 13 where the handlers are flushing.
pub(crate) fn a_forced_shutdown_ends_every_flush_that_waits(t: &Fixture) -> Check {
    const COUNT: usize = 10;
    let (report, reports) = channel();
    let server = t.spawn(t.server().on_request(move |mut conn| {
        let report = report.clone();
        async move {
            conn.next(1).await?;
            conn.write(&TOO_MUCH[..])?;
            report.send(conn.flush().await.map_err(|error| error.is_closed())).map_err(Error::other)
        }
    }));
    let peers: Vec<_> = (0..COUNT).map(|_| dial(&server)).collect::<Check<_>>()?;
    for mut peer in &peers {
        shrink_receive_buffer(peer)?;
        peer.write_all(b"?")?;
    }
    eventually("all flushes wait", || server.stats().pollers.sends_in_flight == COUNT as u64);
    assert_eq!(server.shutdown_forced(Duration::from_millis(20))?, COUNT);
    for _ in 0..COUNT {
        assert_eq!(reports.recv_timeout(DEADLINE)?, Err(true), "a flush ended as something else");
    }
    assert_eq!((server.stats().cut, server.stats().open), (COUNT as u64, 0));
    eventually("their memory is free", || server.stats().pollers.blocks == 0);
    drop(peers);
    Ok(())
}

/// Flushes alternate between the poller and another thread, with sends of both in flight.
pub(crate) fn a_writer_that_changes_threads_keeps_the_order(t: &Fixture) -> Check {
    const ROUNDS: usize = 400;
    const MAX: usize = 60_000;
    type Turn = (WriteHalf, usize, oneshot::Sender<(WriteHalf, usize)>);
    let (mut here, mut there) = (t.random(), t.random());
    let (turn, turns_there) = channel::<Turn>();
    let other = thread::spawn(move || -> Result<()> {
        while let Ok((mut writer, at, back)) = turns_there.recv() {
            let count = there.within(1..MAX);
            writer.write(pattern(at, count))?;
            match there.within(0..3) {
                0 => ringpoll::blocking::wait(writer.flush())?,
                1 => writer.submit()?,
                _ => {}
            }
            // A handler that failed takes nothing back.
            drop(back.send((writer, at + count)));
        }
        Ok(())
    });
    let (peer, wrote) = t.drive(move |conn| async move {
        let (_reader, mut writer) = conn.split();
        let mut at = 0;
        for _ in 0..ROUNDS {
            let count = here.within(1..MAX);
            writer.write(pattern(at, count))?;
            match here.within(0..4) {
                0 => writer.flush().await?,
                1 => writer.submit()?,
                2 => drop(poll_once(writer.flush()).await),
                _ => {}
            }
            let (back, taken_back) = oneshot::channel();
            turn.send((writer, at + count, back))?;
            (writer, at) = taken_back.await?;
        }
        writer.flush().await?;
        writer.close();
        Ok(at)
    })?;
    let got = read_stream(&peer, t.random())?;
    assert_eq!(got, wrote.wait());
    let ended = other.join().expect("the other thread does not panic");
    assert!(ended.is_ok(), "{ended:?}");
    Ok(())
}

/// Unflushed and submitted bytes survive between runs, in their place.
pub(crate) fn runs_that_submit_and_runs_that_flush_keep_the_order(t: &Fixture) -> Check {
    const FRAMES: usize = 400;
    let server = t.spawn(t.server().on_request(|mut conn| async move {
        let head = conn.peek(4).await?;
        let size = u32::from_be_bytes(head[..4].try_into().expect("four bytes")) as usize;
        let frame = conn.next(4 + size).await?;
        conn.write(frame)?;
        match size % 4 {
            0 => Ok(()),
            1 => conn.submit(),
            2 => poll_once(conn.flush()).await.unwrap_or(Ok(())),
            _ => conn.flush().await,
        }
    }));
    let mut random = t.random();
    let peer = dial(&server)?;
    let mut sizes: Vec<_> = (0..FRAMES).map(|_| random.within(0..9000)).collect();
    // The last run flushes.
    sizes.push(3);
    let sending = {
        let (mut peer, sizes) = (peer.try_clone()?, sizes.clone());
        on_thread(move || {
            let frames = sizes.iter().enumerate().map(|(tag, size)| frame(tag, *size));
            frames.into_iter().try_for_each(|frame| Ok(peer.write_all(&frame)?))
        })
    };
    for (tag, size) in sizes.into_iter().enumerate() {
        expect_frame(&peer, tag, size)?;
    }
    sending.wait();
    Ok(())
}
