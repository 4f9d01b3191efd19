//! How served applications end.

use std::any::Any;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::routing::get;
use http_body_util::BodyExt;
use ringpoll::Backend;
use ringpoll_compat::axum::serve;
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio::sync::{Notify, Semaphore};

use crate::apps::ANY;
use crate::clients::{Client, tls};
use crate::harness::{Check, DEADLINE, Identity, Served, wait_until};

macro_rules! cases {
    ($tests:ident, $backend:ident) => {
        $tests! { $backend, ends:
            a_graceful_end_answers_what_has_begun_and_closes_what_is_idle
            a_graceful_end_does_not_wait_for_silent_peers
            a_handle_ends_a_server_as_gracefully
            requests_that_do_not_end_are_cut_in_the_end
            a_server_that_is_dropped_ends
        }
    };
}
pub(crate) use cases;

/// An application whose `/` answers when it may.
struct Gate {
    begun: Notify,
    may_answer: Semaphore,
}

impl Gate {
    fn app() -> (Arc<Gate>, Router) {
        let gate = Arc::new(Gate { begun: Notify::new(), may_answer: Semaphore::new(0) });
        let of_handler = Arc::clone(&gate);
        let answer = move || {
            let gate = Arc::clone(&of_handler);
            async move {
                gate.begun.notify_one();
                gate.may_answer.acquire().await.expect("never closed").forget();
                "answered"
            }
        };
        let app = Router::new().route("/gate", get(answer)).route("/", get(|| async { "hello" }));
        (gate, app)
    }
}

/// A client whose request has begun and is not answered.
async fn busy(gate: &Gate, mut client: Client) -> tokio::task::JoinHandle<Check<String>> {
    let asks = tokio::spawn(async move {
        let response = client.send("GET", "/gate", Vec::new()).await?;
        let body = response.into_body().collect().await?.to_bytes();
        Ok(String::from_utf8(body.to_vec())?)
    });
    gate.begun.notified().await;
    asks
}

pub(crate) async fn a_graceful_end_answers_what_has_begun_and_closes_what_is_idle(
    backend: Backend,
) -> Check {
    let (gate, app) = Gate::app();
    let served = Served::new(backend, serve(ANY, app).shutdown_timeout(DEADLINE))?;
    let (addr, server) = (served.addr, served.server.clone());
    let mut silent = TcpStream::connect(addr).await?;
    let mut idle = Client::of_each_version(addr).await?;
    for client in &mut idle {
        assert_eq!(client.get("/").await?, "hello");
    }
    let mut waiting = Vec::new();
    for client in Client::of_each_version(addr).await? {
        waiting.push(busy(&gate, client).await);
    }
    assert_eq!(server.stats().open, 5);

    let ended = served.stop();
    assert_eq!(silent.read(&mut [0]).await?, 0, "a connection without a byte is idle");
    for client in idle {
        client.driver.await??;
    }
    wait_until(|| server.stats().open == 2).await;
    // A worker may close a connection before the poller has closed the listener.
    while TcpStream::connect(addr).await.is_ok() {}
    assert!(!ended.is_finished(), "it waits for requests");
    gate.may_answer.add_permits(2);
    for asks in waiting {
        assert_eq!(asks.await??, "answered");
    }
    ended.await??;
    assert_eq!(server.stats().cut, 0);
    Ok(())
}

pub(crate) async fn a_graceful_end_does_not_wait_for_silent_peers(backend: Backend) -> Check {
    let identity = Identity::new()?;
    let app = || serve(ANY, Router::new()).shutdown_timeout(DEADLINE);
    let apps = [
        (app(), None),
        (app().http1_only(), None),
        (app().http2_only(), None),
        (app().rustls(identity.server()?), Some("h2")),
        (app().rustls(identity.server()?), Some("http/1.1")),
    ];
    for (app, protocol) in apps {
        let served = Served::new(backend, app)?;
        let server = served.server.clone();
        let silent: Box<dyn Any + Send> = match protocol {
            None => Box::new(TcpStream::connect(served.addr).await?),
            Some(name) => Box::new(tls(served.addr, &identity.client(&[name])?).await?),
        };
        wait_until(|| server.stats().open == 1).await;
        // The server's side of the handshake ends meanwhile.
        tokio::time::sleep(Duration::from_millis(20)).await;
        let ended = tokio::time::timeout(DEADLINE / 4, served.stop()).await;
        ended.map_err(|_| format!("it waits for a silent peer of {protocol:?}"))???;
        assert_eq!(server.stats().cut, 0);
        drop(silent);
    }
    Ok(())
}

pub(crate) async fn a_handle_ends_a_server_as_gracefully(backend: Backend) -> Check {
    let (gate, app) = Gate::app();
    let served = Served::new(backend, serve(ANY, app))?;
    let mut idle = Client::http1(served.addr).await?;
    assert_eq!(idle.get("/").await?, "hello");
    let waiting = busy(&gate, Client::http1(served.addr).await?).await;
    let server = served.server.clone();
    let ends = tokio::task::spawn_blocking(move || server.shutdown(DEADLINE));
    idle.driver.await??;
    gate.may_answer.add_permits(1);
    assert_eq!(waiting.await??, "answered");
    ends.await??;
    served.end().await
}

pub(crate) async fn requests_that_do_not_end_are_cut_in_the_end(backend: Backend) -> Check {
    let (gate, app) = Gate::app();
    let limit = Duration::from_millis(50);
    let served = Served::new(backend, serve(ANY, app).shutdown_timeout(limit))?;
    let server = served.server.clone();
    let waiting = busy(&gate, Client::http1(served.addr).await?).await;
    let begun = Instant::now();
    served.stop().await??;
    assert!(begun.elapsed() >= limit, "only {:?}", begun.elapsed());
    waiting.await?.expect_err("the connection was cut");
    assert_eq!(server.stats().cut, 1);
    Ok(())
}

pub(crate) async fn a_server_that_is_dropped_ends(backend: Backend) -> Check {
    let (gate, app) = Gate::app();
    let served = Served::new(backend, serve(ANY, app))?;
    let (addr, server) = (served.addr, served.server.clone());
    let waiting = busy(&gate, Client::http1(addr).await?).await;
    served.abandon();
    waiting.await?.expect_err("the connection was cut");
    tokio::task::spawn_blocking(move || server.wait()).await??;
    TcpStream::connect(addr).await.expect_err("nothing listens");
    Ok(())
}
