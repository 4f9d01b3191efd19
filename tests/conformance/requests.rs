//! Requests: the handler runs whenever there is input, one run at a time, and none is forgotten.

use std::future::{Future, poll_fn};
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::Poll;

use ringpoll::{Connection, Handle, Result};
use tokio::sync::Semaphore;

use crate::harness::*;

macro_rules! cases {
    ($tests:ident, $mount:ident) => {
        $tests! { $mount, requests:
            ten_thousand_messages_arrive_exactly
            a_hundred_connections_that_send_and_close_lose_nothing
            ten_connections_that_send_five_thousand_bytes_and_close_lose_nothing
            pipelined_requests_are_answered_in_order
            the_handler_runs_until_the_input_is_drained_after_the_peer_closed
            handlers_of_one_connection_never_overlap_and_no_wake_up_is_lost
            bytes_that_arrive_as_the_handler_returns_are_handled
            a_handler_begins_with_all_that_has_arrived
            a_connection_closed_before_its_handler_begins_is_not_served
            a_handler_that_consumes_nothing_runs_once_per_arrival
            a_handler_that_consumes_nothing_after_the_peer_closed_ends_the_connection
            bytes_that_arrive_during_a_wait_that_is_given_up_are_handled
            bytes_that_end_a_wait_that_is_given_up_are_handled
            a_connection_may_move_to_a_spawned_task
            the_next_run_waits_for_both_halves
            the_next_run_waits_for_the_future_although_the_connection_is_back
            a_connection_kept_by_another_thread_delays_the_next_run
            unflushed_bytes_survive_until_a_later_run
            dropping_the_connection_in_a_handler_does_not_close_it
            many_connections_with_random_schedules_stay_apart
        }
    };
}
pub(crate) use cases;

/// How long the stress tests go on.
const ROUNDS: usize = if cfg!(debug_assertions) { 1000 } else { 10_000 };

pub(crate) fn ten_thousand_messages_arrive_exactly(t: &Fixture) -> Check {
    let total = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&total);
    let server = t.spawn(t.server().on_request(move |mut conn| {
        let total = Arc::clone(&counted);
        async move {
            let count = conn.readable().await?;
            let bytes = conn.next(count).await?;
            assert_pattern(&bytes, total.fetch_add(count, Ordering::Relaxed));
            Ok(())
        }
    }));
    let mut peer = dial(&server)?;
    for index in 0..10_000 {
        peer.write_all(&pattern(index * 256, 256))?;
    }
    eventually("all bytes arrive", || total.load(Ordering::Relaxed) == 2_560_000);
    Ok(())
}

pub(crate) fn a_hundred_connections_that_send_and_close_lose_nothing(t: &Fixture) -> Check {
    send_and_close(t, 100, 1024)
}

pub(crate) fn ten_connections_that_send_five_thousand_bytes_and_close_lose_nothing(
    t: &Fixture,
) -> Check {
    send_and_close(t, 10, 5000)
}

fn send_and_close(t: &Fixture, connections: usize, bytes: usize) -> Check {
    let total = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&total);
    let server = t.spawn(t.server().on_request(move |mut conn| {
        let total = Arc::clone(&counted);
        async move {
            let count = conn.readable().await?;
            conn.skip(count).await?;
            total.fetch_add(count, Ordering::Relaxed);
            Ok(())
        }
    }));
    for _ in 0..connections {
        dial(&server)?.write_all(&pattern(0, bytes))?;
    }
    eventually("all bytes arrive", || total.load(Ordering::Relaxed) == connections * bytes);
    eventually("all connections close", || server.stats().open == 0);
    assert_eq!(server.stats().accepted, connections as u64);
    Ok(())
}

pub(crate) fn pipelined_requests_are_answered_in_order(t: &Fixture) -> Check {
    const DEPTH: u32 = 64;
    const ROUNDS: u32 = 50;
    let server = t.spawn(t.server().on_request(|mut conn| async move {
        let request = conn.next(64).await?;
        conn.write_copy(&request)?;
        conn.flush().await
    }));
    let clients: Vec<_> = (0..4)
        .map(|client: u32| {
            let addr = addr_of(&server);
            on_thread(move || {
                let mut peer = connect(addr)?;
                let request = |number: u32| {
                    let mut bytes = pattern(number as usize, 64);
                    bytes[..4].copy_from_slice(&number.to_be_bytes());
                    bytes[4] = client as u8;
                    bytes
                };
                for number in 0..DEPTH {
                    peer.write_all(&request(number))?;
                }
                for number in 0..DEPTH * ROUNDS {
                    assert_eq!(read_exactly(&peer, 64)?, request(number));
                    if number + DEPTH < DEPTH * ROUNDS {
                        peer.write_all(&request(number + DEPTH))?;
                    }
                }
                Ok(())
            })
        })
        .collect();
    for client in clients {
        client.wait_for_all();
    }
    Ok(())
}

pub(crate) fn the_handler_runs_until_the_input_is_drained_after_the_peer_closed(
    t: &Fixture,
) -> Check {
    const MESSAGES: usize = 100;
    let (runs, at) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let gate = Arc::new(Semaphore::new(0));
    let (began, first_run) = std::sync::mpsc::channel();
    let server = t.spawn(t.server().on_request({
        let (runs, at, gate) = (Arc::clone(&runs), Arc::clone(&at), Arc::clone(&gate));
        move |mut conn| {
            let (runs, at, gate) = (Arc::clone(&runs), Arc::clone(&at), Arc::clone(&gate));
            let began = began.clone();
            async move {
                if runs.fetch_add(1, Ordering::Relaxed) == 0 {
                    began.send((*conn).clone()).map_err(ringpoll::Error::other)?;
                }
                // The first run waits until the peer is known to be gone.
                let _ = gate.acquire().await.expect("the gate stays");
                let message = conn.next(100).await?;
                assert_pattern(&message, at.fetch_add(100, Ordering::Relaxed));
                Ok(())
            }
        }
    }));
    let mut peer = dial(&server)?;
    peer.write_all(&pattern(0, MESSAGES * 100))?;
    drop(peer);
    let handle = first_run.recv_timeout(DEADLINE)?;
    eventually("all has arrived", || handle.stats().unread_bytes == 100 * MESSAGES as u64);
    eventually("the end is noticed", || !handle.is_active());
    gate.add_permits(1);
    eventually("the input is drained", || at.load(Ordering::Relaxed) == MESSAGES * 100);
    eventually("then the connection closes", || server.stats().open == 0);
    assert_eq!(runs.load(Ordering::Relaxed), MESSAGES);
    assert_eq!(server.stats().handler_errors, 0);
    Ok(())
}

/// Every chunk is echoed although runs end at random points of the stream.
pub(crate) fn handlers_of_one_connection_never_overlap_and_no_wake_up_is_lost(
    t: &Fixture,
) -> Check {
    let runs = t.random();
    let server = t.spawn(
        t.server()
            .on_prepare(|handle| {
                handle.set_context(AtomicBool::new(false));
                Ok(())
            })
            .on_request(move |conn| {
                let random = Random::new(runs.clone().next() ^ conn.stats().received_bytes);
                echo_a_part(conn, random)
            }),
    );
    let clients: Vec<_> = (0..4)
        .map(|_| {
            let (peer, mut random) = (dial(&server), t.random());
            on_thread(move || {
                let mut peer = peer?;
                for _ in 0..ROUNDS {
                    // One write, or several that race with the end of a run.
                    let chunks: Vec<_> = (0..random.within(1..4))
                        .map(|_| pattern(random.within(0..1000), random.within(1..300)))
                        .collect();
                    for chunk in &chunks {
                        peer.write_all(chunk)?;
                        spin(&mut random);
                    }
                    let sent = chunks.concat();
                    assert!(read_exactly(&peer, sent.len())? == sent, "echoed something else");
                }
                Ok(())
            })
        })
        .collect();
    for client in clients {
        client.wait_for_all();
    }
    Ok(())
}

/// Echoes a random part of what is buffered, and fails when another run is at it as well.
async fn echo_a_part(mut conn: Connection, mut random: Random) -> Result<()> {
    let running = conn.context::<AtomicBool>().expect("set before the first run");
    assert!(!running.swap(true, Ordering::SeqCst), "two handlers run at once");
    let buffered = conn.readable().await?;
    if buffered > 0 {
        let part = random.within(0..buffered) + 1;
        let bytes = conn.next(part).await?;
        conn.write_copy(&bytes)?;
        conn.flush().await?;
    }
    assert!(running.swap(false, Ordering::SeqCst), "another handler ended meanwhile");
    Ok(())
}

fn spin(random: &mut Random) {
    for _ in 0..random.within(1..2000) {
        std::hint::spin_loop();
    }
}

/// The narrowest case of a lost wake-up: one byte, one run, again and again.
pub(crate) fn bytes_that_arrive_as_the_handler_returns_are_handled(t: &Fixture) -> Check {
    let server = t.spawn(t.server().on_request(|mut conn| async move {
        let byte = conn.next(1).await?;
        conn.write(byte)?;
        conn.submit()
    }));
    let peer = dial(&server)?;
    let mut random = t.random();
    for round in 0..5 * ROUNDS {
        (&peer).write_all(&[round as u8])?;
        spin(&mut random);
        // The second byte of a pair often meets a run that is just about to end.
        (&peer).write_all(&[round as u8 ^ 1])?;
        assert_eq!(read_exactly(&peer, 2)?, [round as u8, round as u8 ^ 1]);
    }
    Ok(())
}

/// More than one receive brings.
pub(crate) fn a_handler_begins_with_all_that_has_arrived(t: &Fixture) -> Check {
    let gate = Gate::new();
    let halts = Arc::clone(&gate);
    let server = t.spawn(t.gated_server().on_request(move |mut conn| {
        let gate = Arc::clone(&halts);
        async move {
            if conn.peek(1).await?[0] == HALT {
                return gate.echo_frame(conn).await;
            }
            let count = conn.readable().await?;
            conn.skip(count).await?;
            conn.write_copy(&(count as u32).to_be_bytes())?;
            conn.flush().await
        }
    }));
    let mut peer = dial(&server)?;
    gate.hold(&server, || Ok(peer.write_all(&[1; 10_000])?))?;
    assert_eq!(read_exactly(&peer, 4)?, 10_000u32.to_be_bytes());
    Ok(())
}

/// Both have sent a request when the first handler begins, and it closes the other connection.
pub(crate) fn a_connection_closed_before_its_handler_begins_is_not_served(t: &Fixture) -> Check {
    let (gate, handles) = (Gate::new(), Arc::new(Mutex::new(Vec::<Handle>::new())));
    let served = Arc::new(AtomicUsize::new(0));
    let (halts, others, count) = (Arc::clone(&gate), Arc::clone(&handles), Arc::clone(&served));
    let server = t.spawn(t.gated_server().on_request(move |mut conn| {
        let (gate, others, count) = (Arc::clone(&halts), Arc::clone(&others), Arc::clone(&count));
        async move {
            if conn.peek(1).await?[0] == HALT {
                return gate.echo_frame(conn).await;
            }
            if conn.next(1).await?[0] == REGISTER {
                others.lock().expect("nobody panics here").push(conn.handle());
            } else {
                count.fetch_add(1, Ordering::Relaxed);
                let own = conn.peer_addr();
                let others = others.lock().expect("nobody panics here");
                others.iter().filter(|handle| handle.peer_addr() != own).for_each(Handle::close);
            }
            conn.write_copy(b"!")?;
            conn.flush().await
        }
    }));
    let peers = [dial(&server)?, dial(&server)?];
    for mut peer in &peers {
        peer.write_all(&[REGISTER])?;
        read_exactly(peer, 1)?;
    }
    gate.hold(&server, || peers.iter().try_for_each(|mut peer| Ok(peer.write_all(b"?")?)))?;
    let mut answers: Vec<_> = peers.iter().map(|mut peer| peer.read(&mut [0]).ok()).collect();
    answers.sort();
    assert!(matches!(answers[..], [None | Some(0), Some(1)]), "{answers:?}");
    assert_eq!(served.load(Ordering::Relaxed), 1);
    // They keep the server's handlers, which keep them.
    handles.lock().expect("nobody panics here").clear();
    Ok(())
}

/// Asks the handler to remember the connection.
const REGISTER: u8 = b'r';

pub(crate) fn a_handler_that_consumes_nothing_runs_once_per_arrival(t: &Fixture) -> Check {
    let server = t.spawn(t.server().pollers(1).on_request(|mut conn| async move {
        match conn.peek(1).await?[0] {
            b'e' => echo(conn).await,
            _ => Ok(()),
        }
    }));
    let mut idler = dial(&server)?;
    let other = dial(&server)?;
    for arrivals in 1..=3 {
        idler.write_all(b"x")?;
        // Echoes of a neighbour on the same poller: time for a spin to show.
        for _ in 0..50 {
            assert_eq!(exchange(&other, b"e")?, b"e");
        }
        let echoed = 50 * arrivals;
        eventually("each arrival starts a run", || {
            server.stats().handler_runs >= echoed + arrivals
        });
        let runs = server.stats().handler_runs;
        // One arrival may be seen as two where the run overlaps it, but never as many.
        assert!(runs <= echoed + 2 * arrivals, "{runs} runs for {} arrivals", echoed + arrivals);
    }
    idler.shutdown(Shutdown::Both)?;
    Ok(())
}

/// After the peer's end no run will read those bytes, so the connection is over.
pub(crate) fn a_handler_that_consumes_nothing_after_the_peer_closed_ends_the_connection(
    t: &Fixture,
) -> Check {
    let server = t.spawn(t.server().on_request(|_conn| async { Ok(()) }));
    let mut peer = dial(&server)?;
    peer.write_all(b"unread")?;
    eventually("the handler runs", || server.stats().handler_runs >= 1);
    assert_eq!(server.stats().open, 1);
    drop(peer);
    eventually("the connection closes", || server.stats().open == 0);
    assert!(server.stats().handler_runs <= 3, "{:?}", server.stats());
    Ok(())
}

async fn echo_eleven(mut conn: Connection) -> Result<()> {
    let all = conn.next(11).await?;
    conn.write(all)?;
    conn.flush().await
}

/// The bytes are too few for the waiting read, so they wake no task. They must still be handled.
pub(crate) fn bytes_that_arrive_during_a_wait_that_is_given_up_are_handled(t: &Fixture) -> Check {
    let gives_up = Arc::new(Semaphore::new(0));
    let (permits, runs) = (Arc::clone(&gives_up), Arc::new(AtomicUsize::new(0)));
    let counts = Arc::clone(&runs);
    let received = Arc::new(AtomicUsize::new(0));
    let hears = Arc::clone(&received);
    let server = t.spawn(t.server().on_request(move |mut conn| {
        let (permits, hears) = (Arc::clone(&permits), Arc::clone(&hears));
        let run = counts.fetch_add(1, Ordering::SeqCst);
        async move {
            if run > 0 {
                return echo_eleven(conn).await;
            }
            let handle = conn.handle();
            std::thread::spawn(move || {
                while hears.load(Ordering::SeqCst) < 11 && handle.is_active() {
                    hears.store(handle.stats().received_bytes as usize, Ordering::SeqCst);
                    std::thread::yield_now();
                }
            });
            tokio::select! {
                read = conn.next(100) => drop(read?),
                _ = permits.acquire() => {}
            }
            Ok(())
        }
    }));
    let mut peer = dial(&server)?;
    peer.write_all(&[7])?;
    eventually("a run waits", || runs.load(Ordering::SeqCst) == 1);
    peer.write_all(&[7; 10])?;
    eventually("all is received", || received.load(Ordering::SeqCst) == 11);
    gives_up.add_permits(1);
    peer.read_exact(&mut [0; 11])?;
    Ok(())
}

/// The handler is woken because all bytes have come, and does not look at its read again.
pub(crate) fn bytes_that_end_a_wait_that_is_given_up_are_handled(t: &Fixture) -> Check {
    let runs = Arc::new(AtomicUsize::new(0));
    let counts = Arc::clone(&runs);
    let server = t.spawn(t.server().on_request(move |mut conn| {
        let run = counts.fetch_add(1, Ordering::SeqCst);
        async move {
            if run > 0 {
                return echo_eleven(conn).await;
            }
            let handle = conn.handle();
            let mut read = Box::pin(conn.next(11));
            poll_fn(|cx| {
                if handle.stats().received_bytes == 11 {
                    return Poll::Ready(());
                }
                assert!(read.as_mut().poll(cx).is_pending());
                Poll::Pending
            })
            .await;
            Ok(())
        }
    }));
    let mut peer = dial(&server)?;
    peer.write_all(&[7])?;
    eventually("a run waits", || runs.load(Ordering::SeqCst) == 1);
    peer.write_all(&[7; 10])?;
    peer.read_exact(&mut [0; 11])?;
    Ok(())
}

/// The handler's future ends, the run does not: its connection lives on a task.
pub(crate) fn a_connection_may_move_to_a_spawned_task(t: &Fixture) -> Check {
    let running = Arc::new(AtomicUsize::new(0));
    let server = t.spawn(t.server().on_request(move |mut conn| {
        let running = Arc::clone(&running);
        async move {
            runtime().spawn(async move {
                assert_eq!(running.fetch_add(1, Ordering::SeqCst), 0, "two runs at once");
                let message = conn.next(10).await?;
                tokio::time::sleep(std::time::Duration::from_millis(1)).await;
                conn.write_copy(&message)?;
                conn.flush().await?;
                running.fetch_sub(1, Ordering::SeqCst);
                Ok::<_, Failure>(())
            });
            Ok(())
        }
    }));
    let mut peer = dial(&server)?;
    peer.write_all(&pattern(0, 500))?;
    assert_pattern(&read_exactly(&peer, 500)?, 0);
    eventually("fifty runs are counted", || server.stats().handler_runs == 50);
    Ok(())
}

/// A run is over when both halves are back.
pub(crate) fn the_next_run_waits_for_both_halves(t: &Fixture) -> Check {
    let runs = Arc::new(AtomicUsize::new(0));
    let (keep, kept) = std::sync::mpsc::channel();
    let counted = Arc::clone(&runs);
    let server = t.spawn(t.server().on_request(move |conn| {
        counted.fetch_add(1, Ordering::SeqCst);
        let keep = keep.clone();
        async move {
            let (mut reader, writer) = conn.split();
            reader.next(1).await?;
            keep.send((reader, writer)).map_err(ringpoll::Error::other)
        }
    }));
    let mut peer = dial(&server)?;
    peer.write_all(b"12")?;
    let (reader, writer) = kept.recv_timeout(DEADLINE)?;
    assert_stays_at(t, &runs, 1)?;
    drop(writer);
    assert_stays_at(t, &runs, 1)?;
    drop(reader);
    let (reader, writer) = kept.recv_timeout(DEADLINE)?;
    // In the other order this time.
    drop(reader);
    peer.write_all(b"3")?;
    assert_stays_at(t, &runs, 2)?;
    drop(writer);
    drop(kept.recv_timeout(DEADLINE)?);
    assert_eq!(runs.load(Ordering::SeqCst), 3);
    Ok(())
}

/// The other order: the connection is back, the handler is not.
pub(crate) fn the_next_run_waits_for_the_future_although_the_connection_is_back(
    t: &Fixture,
) -> Check {
    let runs = Arc::new(AtomicUsize::new(0));
    let gate = Arc::new(Semaphore::new(0));
    let (counted, opened) = (Arc::clone(&runs), Arc::clone(&gate));
    let server = t.spawn(t.server().on_request(move |mut conn| {
        counted.fetch_add(1, Ordering::SeqCst);
        let gate = Arc::clone(&opened);
        async move {
            conn.next(1).await?;
            drop(conn);
            gate.acquire().await.expect("the gate stays").forget();
            Ok(())
        }
    }));
    // It comes back with a byte that is unread, and with none, while one is still to come.
    for (first, later) in [(&b"12"[..], &b""[..]), (b"1", b"2")] {
        runs.store(0, Ordering::SeqCst);
        let mut peer = dial(&server)?;
        peer.write_all(first)?;
        eventually("the first run", || runs.load(Ordering::SeqCst) == 1);
        assert_stays_at(t, &runs, 1)?;
        peer.write_all(later)?;
        assert_stays_at(t, &runs, 1)?;
        gate.add_permits(1);
        eventually("the second run", || runs.load(Ordering::SeqCst) == 2);
        gate.add_permits(1);
    }
    Ok(())
}

/// Fails when a run begins that must not; echoes elsewhere give it the time.
fn assert_stays_at(t: &Fixture, runs: &AtomicUsize, count: usize) -> Check {
    let bystander = t.echo_server();
    for _ in 0..4 {
        let peer = dial(&bystander)?;
        for _ in 0..20 {
            exchange(&peer, b"?")?;
        }
    }
    assert_eq!(runs.load(Ordering::SeqCst), count, "a run began before the last one ended");
    Ok(())
}

/// The same for a whole connection that a thread holds on to.
pub(crate) fn a_connection_kept_by_another_thread_delays_the_next_run(t: &Fixture) -> Check {
    let runs = Arc::new(AtomicUsize::new(0));
    let (keep, kept) = std::sync::mpsc::channel::<Connection>();
    let counted = Arc::clone(&runs);
    let server = t.spawn(t.server().on_request(move |conn| {
        counted.fetch_add(1, Ordering::SeqCst);
        let keep = keep.clone();
        async move { keep.send(conn).map_err(ringpoll::Error::other) }
    }));
    let mut peer = dial(&server)?;
    peer.write_all(b"1")?;
    let mut conn = kept.recv_timeout(DEADLINE)?;
    peer.write_all(b"2")?;
    eventually("both bytes are buffered", || conn.stats().unread_bytes == 2);
    assert_stays_at(t, &runs, 1)?;
    assert_eq!(conn.try_next(1).expect("buffered")[..], *b"1");
    drop(conn);
    let mut conn = kept.recv_timeout(DEADLINE)?;
    assert_eq!(conn.try_next(1).expect("buffered")[..], *b"2");
    Ok(())
}

/// Written but not submitted bytes belong to the connection, not to the run.
pub(crate) fn unflushed_bytes_survive_until_a_later_run(t: &Fixture) -> Check {
    let runs = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&runs);
    let server = t.spawn(t.server().on_request(move |mut conn| {
        let runs = Arc::clone(&counted);
        async move {
            let byte = conn.next(1).await?;
            conn.write_copy(&byte)?;
            runs.fetch_add(1, Ordering::SeqCst);
            if byte[0] == b'.' { conn.flush().await } else { Ok(()) }
        }
    }));
    let mut peer = dial(&server)?;
    for (index, byte) in b"abc".iter().enumerate() {
        peer.write_all(&[*byte])?;
        eventually("a run per byte", || runs.load(Ordering::SeqCst) == index + 1);
    }
    assert_eq!(server.stats().pollers.sent_bytes, 0);
    peer.write_all(b".")?;
    assert_eq!(read_exactly(&peer, 4)?, b"abc.");
    Ok(())
}

/// In a server a dropped connection goes home.
pub(crate) fn dropping_the_connection_in_a_handler_does_not_close_it(t: &Fixture) -> Check {
    let server = t.spawn(
        t.server()
            .on_connect(|conn| async move {
                drop(conn);
                Ok(())
            })
            .on_request(|mut conn| async move {
                let byte = conn.next(1).await?;
                conn.write_copy(&byte)?;
                conn.flush().await?;
                drop(conn);
                Ok(())
            }),
    );
    let peer = dial(&server)?;
    for _ in 0..10 {
        assert_eq!(exchange(&peer, b"x")?, b"x");
    }
    assert_eq!(server.stats().accepted, 1);
    Ok(())
}

/// Connections do not mix their bytes, in any schedule.
pub(crate) fn many_connections_with_random_schedules_stay_apart(t: &Fixture) -> Check {
    let server = t.echo_server();
    let clients: Vec<_> = (0..4)
        .map(|_| {
            let (addr, mut random) = (addr_of(&server), t.random());
            on_thread(move || {
                let mut peers: Vec<(TcpStream, usize, usize)> = Vec::new();
                for _ in 0..16 {
                    let start = random.within(0..100_000);
                    peers.push((connect(addr)?, start, start));
                }
                for _ in 0..500 {
                    let index = random.within(0..peers.len());
                    let (peer, sent, got) = &mut peers[index];
                    // Never so much in flight that both sides would wait for each other.
                    if *sent - *got < 30_000 && random.one_in(2) {
                        let count = random.within(1..10_000);
                        peer.write_all(&pattern(*sent, count))?;
                        *sent += count;
                    } else {
                        assert_pattern(&read_exactly(&*peer, *sent - *got)?, *got);
                        *got = *sent;
                    }
                }
                for (peer, sent, got) in &peers {
                    peer.shutdown(Shutdown::Write)?;
                    assert_pattern(&read_exactly(peer, sent - got)?, *got);
                    assert_eof(peer);
                }
                Ok(())
            })
        })
        .collect();
    for client in clients {
        client.wait_for_all();
    }
    Ok(())
}
