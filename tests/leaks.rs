//! Leaks: every end of a connection releases all its resources.
//!
//! The harness checks fds, blocks, sends in flight and connections after every test. These tests
//! end many connections in random ways, and check the memory of the process as well.

#[path = "conformance/harness/mod.rs"]
mod harness;

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr};
use std::time::Duration;

use harness::*;
use ringpoll::{Backend, Connection, Error, Result, ServerHandle};

/// The tests below, once for each backend, with handlers on the pollers and on a pool.
macro_rules! mount {
    ($($backend:ident: $value:expr;)+) => {
        $(
            mod $backend {
                use super::*;

                const AUTO: Mount =
                    Mount { backend: $value, placement: Placement::Auto, side: Side::Server };
                const POOL: Mount = Mount { placement: Placement::Pool { workers: 2 }, ..AUTO };

                cases! { AUTO:
                    a_thousand_connections_ended_in_random_ways_leave_nothing
                    repeated_cycles_of_connections_do_not_grow_memory
                    repeated_cycles_of_dials_do_not_grow_memory
                    repeated_cycles_of_servers_leave_no_thread_and_no_fd
                }

                mod pool {
                    use super::*;

                    cases! { POOL:
                        a_thousand_connections_ended_in_random_ways_leave_nothing
                        repeated_cycles_of_connections_do_not_grow_memory
                        repeated_cycles_of_servers_leave_no_thread_and_no_fd
                    }
                }
            }
        )+
    };
}

macro_rules! cases {
    ($mount:ident: $($name:ident)+) => {
        $(
            #[test]
            fn $name() {
                let name = concat!(module_path!(), "::", stringify!($name));
                run($mount, name, crate::$name);
            }
        )+
    };
}

mount! {
    epoll: Backend::Epoll;
    uring: Backend::Uring;
    hybrid: Backend::Hybrid;
    sqpoll_shared: SHARED;
    sqpoll_config2: CONFIG2;
}

mod unblock {
    use super::*;

    const POOL: Mount = Mount {
        backend: Backend::Auto,
        placement: Placement::Pool { workers: 2 },
        side: Side::Server,
    };

    cases! { POOL: threads_for_synchronous_code_end_when_they_idle }
}

/// What a request's first byte asks the handler to do.
const REQUESTS: &[u8] = b"ecpftkdshx";

/// Static, so that the allocator's habits with large pieces do not blur the measurement.
static ANSWER: &[u8] = &[b'x'; 8 << 20];

/// For what is to time out.
const SHORT: Duration = Duration::from_millis(20);

/// Obeys requests of 100 bytes: the ways in which a server lets go of a connection.
async fn obey(mut conn: Connection) -> Result<()> {
    let request = conn.next(100).await?;
    match request[0] {
        b'c' => conn.close(),
        b'p' => panic!("told to {ON_PURPOSE}"),
        b'f' => return Err(Error::other("told to fail")),
        // Times out: the second half never comes.
        b't' => drop(conn.next(1 << 20).await?),
        // Kept by a task after the handler has returned.
        b'k' => drop(runtime().spawn(async move { conn.readable().await })),
        b'd' => drop(conn.detach().await?),
        b's' => {
            let (reader, mut writer) = conn.split();
            drop(reader);
            writer.write(request)?;
            writer.flush().await?;
        }
        b'h' => conn.shutdown_write().await?,
        // More than the kernel takes: the flush waits for a reader, or for the end.
        b'x' => {
            // Only here: on a busy host a short answer may take its time as well.
            conn.set_write_timeout(Some(SHORT));
            conn.write(ANSWER)?;
            conn.flush().await?;
        }
        _ => {
            conn.write(request)?;
            conn.flush().await?;
        }
    }
    Ok(())
}

fn obedient_server(t: &Fixture) -> ServerHandle {
    t.spawn(t.server().read_timeout(SHORT).on_request(obey))
}

/// One connection: used, and ended in a random way by one side or both.
fn live_once(addr: SocketAddr, random: &mut Random) -> Check {
    let mut peer = connect(addr)?;
    for _ in 0..random.within(0..3) {
        let mut request = vec![b'e'; 100];
        assert_eq!(exchange(&peer, &request)?, request);
        if random.one_in(4) {
            request[0] = REQUESTS[random.within(0..REQUESTS.len())];
            // From here on the server may close at any moment.
            let _ = peer.write_all(&request);
            break;
        }
    }
    match random.within(0..6) {
        0 => reset(peer)?,
        1 => peer.shutdown(Shutdown::Write)?,
        2 => {
            // There may be nothing to read.
            peer.set_read_timeout(Some(Duration::from_millis(5)))?;
            let _ = peer.read(&mut [0; 10]);
        }
        3 => drop(peer.write_all(&[b'e'; 57])),
        4 => peer.shutdown(Shutdown::Both)?,
        _ => {}
    }
    Ok(())
}

/// `count` lives, `at_once` of them at a time.
fn live(t: &Fixture, server: &ServerHandle, count: usize, at_once: usize) {
    let threads: Vec<_> = (0..at_once)
        .map(|_| {
            let (addr, mut random) = (addr_of(server), t.random());
            on_thread(move || (0..count / at_once).try_for_each(|_| live_once(addr, &mut random)))
        })
        .collect();
    for thread in threads {
        thread.wait_for_all();
    }
}

fn a_thousand_connections_ended_in_random_ways_leave_nothing(t: &Fixture) -> Check {
    let server = obedient_server(t);
    live(t, &server, 1000, 4);
    eventually("all are gone", || server.stats().open == 0);
    Ok(())
}

/// The growth of this process's memory while `cycle` runs again and again, after it has run in.
fn growth(cycles: usize, mut cycle: impl FnMut() -> Check) -> Check<usize> {
    // Pools fill, the allocator makes its arenas, backtraces are cached: that is no leak.
    for _ in 0..3 {
        cycle()?;
    }
    let before = rss_bytes();
    for _ in 0..cycles {
        cycle()?;
    }
    Ok(rss_bytes().saturating_sub(before))
}

fn repeated_cycles_of_connections_do_not_grow_memory(t: &Fixture) -> Check {
    let server = obedient_server(t);
    let grown = growth(8, || {
        live(t, &server, 500, 4);
        eventually("all are gone", || server.stats().open == 0);
        Ok(())
    })?;
    // 4000 connections: a kilobyte that each leaves behind would show.
    assert!(grown < 4 << 20, "{grown} bytes more after 4000 connections");
    Ok(())
}

fn repeated_cycles_of_dials_do_not_grow_memory(t: &Fixture) -> Check {
    let server = t.echo_server();
    let deaf = DeafListener::new()?;
    let (addr, deaf) = (addr_of(&server).to_string(), deaf.addr.to_string());
    let dialer = t.dialer();
    let mut random = t.random();
    let grown = growth(8, || {
        block_on(async {
            for _ in 0..100 {
                let mut conn = dialer.connect(&addr).await?;
                conn.write(pattern(0, 5000))?;
                match random.within(0..4) {
                    0 => conn.close(),
                    1 => drop(conn.detach().await?),
                    2 => drop(conn.split()),
                    _ => {
                        conn.flush().await?;
                        assert_pattern(&conn.next(5000).await?, 0);
                    }
                }
                // One that is given up.
                drop(poll_once(dialer.connect(&deaf)).await);
            }
            Ok(())
        })?;
        eventually("all are gone", || t.clients().stats().connections == 0);
        Ok(())
    })?;
    assert!(grown < 4 << 20, "{grown} bytes more after 1600 dials");
    Ok(())
}

fn repeated_cycles_of_servers_leave_no_thread_and_no_fd(t: &Fixture) -> Check {
    let threads = thread_count();
    let open = fds().len();
    let grown = growth(8, || {
        for _ in 0..5 {
            let server = t.server().on_request(echo).bind("127.0.0.1:0")?.spawn()?;
            let peer = connect(addr_of(&server))?;
            assert_eq!(exchange(&peer, b"hello")?, b"hello");
            server.shutdown(DEADLINE)?;
        }
        Ok(())
    })?;
    // The test runner itself may come by with a thread.
    eventually("the threads are gone", || thread_count() <= threads + 1);
    eventually("the fds are closed", || fds().len() == open);
    assert!(grown < 8 << 20, "{grown} bytes more after 40 servers");
    Ok(())
}

fn threads_for_synchronous_code_end_when_they_idle(t: &Fixture) -> Check {
    const CALLS: usize = 20;
    let latch = Latch::new();
    let blocks = std::sync::Arc::clone(&latch);
    let server = t.spawn(t.server().on_request(move |conn| {
        let latch = std::sync::Arc::clone(&blocks);
        async move {
            ringpoll::unblock(move || latch.pass()).await?;
            echo(conn).await
        }
    }));
    let peers = (0..CALLS).map(|_| dial(&server)).collect::<Check<Vec<_>>>()?;
    for mut peer in &peers {
        peer.write_all(b"?")?;
    }
    eventually("all calls run", || latch.count() == CALLS);
    assert_eq!(unblock_thread_count(), CALLS);
    latch.open();
    for peer in &peers {
        assert_eq!(read_exactly(peer, 1)?, b"?");
    }
    eventually("no thread is left", || unblock_thread_count() == 0);
    Ok(())
}
