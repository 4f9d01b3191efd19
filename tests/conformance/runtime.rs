//! Handlers that use tokio: its timers, tasks, files and sockets, wherever they are placed.

use std::io::{Read, Write};
use std::time::Duration;

use ringpoll::{Connection, Error, Server};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::harness::*;

macro_rules! cases {
    ($tests:ident, $mount:ident) => {
        $tests! { $mount, runtime:
            timers_and_tasks_work_in_handlers
            files_work_in_handlers
            a_client_on_tokio_works_in_a_handler
            on_connect_is_inside_the_runtime_as_well
            handlers_are_inside_the_runtime_that_their_server_is_built_in
            a_runtime_that_was_given_counts_and_not_the_one_around
            a_runtime_that_ends_ends_its_handlers_alone
        }
    };
}
pub(crate) use cases;

const ROUNDS: usize = 20;

/// A server whose handlers may use tokio.
pub(crate) fn inside(t: &Fixture) -> ringpoll::ServerBuilder {
    t.server().tokio(runtime().handle().clone())
}

/// Sends `b"ping"` and expects `b"pong"`, so many times on each of some connections.
pub(crate) fn plays(server: &ringpoll::ServerHandle, rounds: usize) -> Check {
    let mut peers = (0..8).map(|_| dial(server)).collect::<Check<Vec<_>>>()?;
    for _ in 0..rounds {
        for peer in &mut peers {
            peer.write_all(b"ping")?;
        }
        for peer in &mut peers {
            let mut answer = [0; 4];
            peer.read_exact(&mut answer)?;
            assert_eq!(answer, *b"pong");
        }
    }
    Ok(())
}

pub(crate) async fn pong(mut conn: Connection) -> ringpoll::Result<()> {
    assert_eq!(conn.next(4).await?[..], *b"ping");
    conn.write_copy(b"pong")?;
    conn.flush().await
}

pub(crate) fn timers_and_tasks_work_in_handlers(t: &Fixture) -> Check {
    let server = t.spawn(inside(t).on_request(|conn| async move {
        tokio::time::sleep(Duration::from_millis(1)).await;
        let slept = tokio::spawn(async {
            tokio::time::sleep(Duration::from_millis(1)).await;
            42
        });
        assert_eq!(slept.await.map_err(Error::other)?, 42);
        pong(conn).await
    }));
    plays(&server, ROUNDS)
}

pub(crate) fn files_work_in_handlers(t: &Fixture) -> Check {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("file");
    std::fs::write(&path, b"content")?;
    let server = t.spawn(inside(t).on_request(move |conn| {
        let path = path.clone();
        async move {
            assert_eq!(tokio::fs::read(&path).await.map_err(Error::other)?, b"content");
            pong(conn).await
        }
    }));
    plays(&server, ROUNDS)
}

pub(crate) fn a_client_on_tokio_works_in_a_handler(t: &Fixture) -> Check {
    let behind = t.echo_server();
    let addr = addr_of(&behind);
    let server = t.spawn(inside(t).on_request(move |conn| async move {
        let mut client = tokio::net::TcpStream::connect(addr).await.map_err(Error::other)?;
        client.write_all(b"through").await.map_err(Error::other)?;
        let mut answer = [0; 7];
        client.read_exact(&mut answer).await.map_err(Error::other)?;
        assert_eq!(answer, *b"through");
        pong(conn).await
    }));
    plays(&server, ROUNDS)
}

pub(crate) fn on_connect_is_inside_the_runtime_as_well(t: &Fixture) -> Check {
    let server = t.spawn(inside(t).on_connect(|mut conn| async move {
        while conn.peek(1).await.is_ok() {
            tokio::time::sleep(Duration::from_micros(100)).await;
            assert_eq!(conn.next(4).await?[..], *b"ping");
            conn.write_copy(b"pong")?;
            conn.flush().await?;
        }
        Ok(())
    }));
    plays(&server, ROUNDS)
}

/// So is what they spawn.
pub(crate) fn handlers_are_inside_the_runtime_that_their_server_is_built_in(t: &Fixture) -> Check {
    let builder = t.server().on_request(|conn| async move {
        tokio::time::sleep(Duration::from_millis(1)).await;
        let slept = tokio::spawn(async {
            tokio::time::sleep(Duration::from_millis(1)).await;
            42
        });
        assert_eq!(slept.await.map_err(Error::other)?, 42);
        let (tells, told) = tokio::sync::oneshot::channel();
        conn.spawn(async move {
            tokio::time::sleep(Duration::from_millis(1)).await;
            tells.send(tokio::spawn(async { 43 }).await).expect("its handler waits");
            Ok(())
        })?;
        let spawned = told.await.map_err(Error::other)?;
        assert_eq!(spawned.map_err(Error::other)?, 43);
        pong(conn).await
    });
    let server = {
        let _inside = runtime().enter();
        t.spawn(builder)
    };
    plays(&server, ROUNDS)
}

pub(crate) fn a_runtime_that_was_given_counts_and_not_the_one_around(t: &Fixture) -> Check {
    let mut other = tokio::runtime::Builder::new_multi_thread();
    let other = other.worker_threads(1).enable_all().build()?;
    let workers = |runtime: &tokio::runtime::Handle| runtime.metrics().num_workers();
    assert_ne!(workers(other.handle()), workers(runtime().handle()));
    let builder = t.server().tokio(other.handle().clone()).on_request(move |conn| async move {
        assert_eq!(workers(&tokio::runtime::Handle::current()), 1);
        pong(conn).await
    });
    let server = {
        let _inside = runtime().enter();
        t.spawn(builder)
    };
    plays(&server, ROUNDS)
}

/// What ran there is given up; the server goes on, and ends in time.
pub(crate) fn a_runtime_that_ends_ends_its_handlers_alone(t: &Fixture) -> Check {
    let mut other = tokio::runtime::Builder::new_multi_thread();
    let other = other.worker_threads(1).enable_all().build()?;
    let builder = t.server().tokio(other.handle().clone());
    let server = t.spawn(builder.on_request(|mut conn| async move {
        if conn.next(4).await?[..] == *b"wait" {
            // Elsewhere it ends with its peer.
            conn.next(1000).await?;
        }
        conn.write_copy(b"pong")?;
        conn.flush().await
    }));
    plays(&server, ROUNDS)?;
    let mut waits = dial(&server)?;
    waits.write_all(b"wait")?;
    eventually("it runs", || server.stats().pollers.received_bytes >= (8 * ROUNDS * 4 + 4) as u64);
    other.shutdown_timeout(DEADLINE);
    drop(waits);
    let error = Server::builder().placement(Placement::Tokio).on_request(echo).bind("127.0.0.1:0");
    assert!(error.is_err_and(|error| error.is_invalid()), "there is no runtime here");
    Ok(())
}
