//! Applications of axum that answer.

use std::net::SocketAddr;
use std::time::Duration;

use axum::body::Bytes;
use axum::extract::{ConnectInfo, DefaultBodyLimit};
use axum::response::IntoResponse;
use axum::routing::{get, post};
use axum::{Router, routing::MethodRouter};
use ringpoll::{Backend, PeerAddr};
use ringpoll_compat::axum::{Listener, Peer, serve};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::oneshot;

use crate::clients::{Client, tls};
use crate::harness::{Check, Identity, Served, pattern, wait_until};

macro_rules! cases {
    ($tests:ident, $backend:ident) => {
        $tests! { $backend, apps:
            both_versions_are_served_on_one_port
            a_preface_may_come_byte_by_byte
            handlers_use_the_timers_and_tasks_of_tokio
            handlers_know_their_peer
            large_bodies_go_both_ways
            tls_takes_one_call_and_serves_both_versions
            the_server_of_axum_takes_a_listener
            a_listener_with_tls_offers_what_its_configuration_says
        }
    };
}
pub(crate) use cases;

pub(crate) const ANY: &str = "127.0.0.1:0";

fn hello() -> Router {
    Router::new().route("/", get(|| async { "hello" }))
}

pub(crate) async fn both_versions_are_served_on_one_port(backend: Backend) -> Check {
    let served = Served::new(backend, serve(ANY, hello()))?;
    for mut client in Client::of_each_version(served.addr).await? {
        for _ in 0..3 {
            assert_eq!(client.get("/").await?, "hello");
        }
    }
    wait_until(|| served.server.stats().open == 0).await;
    assert_eq!(served.server.stats().accepted, 2);
    served.end().await?;

    // A method router is an application as well.
    let only: MethodRouter = get(|| async { "only" });
    let served = Served::new(backend, serve(ANY, only).http1_only())?;
    assert_eq!(Client::http1(served.addr).await?.get("/").await?, "only");
    served.end().await
}

pub(crate) async fn a_preface_may_come_byte_by_byte(backend: Backend) -> Check {
    const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    const EMPTY_SETTINGS: &[u8] = &[0, 0, 0, 4, 0, 0, 0, 0, 0];
    let served = Served::new(backend, serve(ANY, hello()))?;
    let mut stream = TcpStream::connect(served.addr).await?;
    stream.set_nodelay(true)?;
    for byte in PREFACE {
        stream.write_all(&[*byte]).await?;
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    stream.write_all(EMPTY_SETTINGS).await?;
    let mut head = [0; 9];
    stream.read_exact(&mut head).await?;
    assert_eq!(head[3], 4, "a frame of settings: {head:?}");
    drop(stream);

    // The beginning of both: `P` of the preface and of a request.
    let mut stream = TcpStream::connect(served.addr).await?;
    stream.write_all(b"P").await?;
    tokio::time::sleep(Duration::from_millis(5)).await;
    stream.write_all(b"OST / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    assert!(answer.starts_with("HTTP/1.1 405"), "{answer}");
    served.stop().await?.map_err(Into::into)
}

async fn sleeps() -> String {
    tokio::time::sleep(Duration::from_millis(5)).await;
    let spawned = tokio::spawn(async {
        tokio::time::sleep(Duration::from_millis(5)).await;
        "awake"
    });
    let blocked = tokio::task::spawn_blocking(|| "and back");
    format!("{} {}", spawned.await.expect("no panic"), blocked.await.expect("no panic"))
}

pub(crate) async fn handlers_use_the_timers_and_tasks_of_tokio(backend: Backend) -> Check {
    let app = Router::new().route("/", get(sleeps));
    let served = Served::new(backend, serve(ANY, app))?;
    for mut client in Client::of_each_version(served.addr).await? {
        assert_eq!(client.get("/").await?, "awake and back");
    }
    served.end().await
}

pub(crate) async fn handlers_know_their_peer(backend: Backend) -> Check {
    async fn peer(ConnectInfo(peer): ConnectInfo<Peer>) -> impl IntoResponse {
        let local = peer.local_addr().expect("the connection is open");
        format!("{} {local} {}", peer.addr(), peer.connection().is_active())
    }
    let ask = async |app, expect: fn(SocketAddr, SocketAddr) -> String| -> Check {
        let served = Served::new(backend, app)?;
        let stream = TcpStream::connect(served.addr).await?;
        let expected = expect(stream.local_addr()?, served.addr);
        assert_eq!(Client::http1_on(stream).await?.get("/").await?, expected);
        served.end().await
    };
    let app = Router::new().route("/", get(peer)).into_make_service_with_connect_info::<Peer>();
    ask(serve(ANY, app), |peer, local| format!("{peer} {local} true")).await?;

    let app = |ConnectInfo(peer): ConnectInfo<PeerAddr>| async move { peer.to_string() };
    let app = Router::new().route("/", get(app)).into_make_service_with_connect_info::<PeerAddr>();
    ask(serve(ANY, app), |peer, _| peer.to_string()).await?;

    let app = |ConnectInfo(peer): ConnectInfo<SocketAddr>| async move { peer.to_string() };
    let app = Router::new().route("/", get(app));
    let app = app.into_make_service_with_connect_info::<SocketAddr>();
    ask(serve(ANY, app), |peer, _| peer.to_string()).await
}

pub(crate) async fn large_bodies_go_both_ways(backend: Backend) -> Check {
    let app = Router::new()
        .route("/", post(|body: Bytes| async { body }))
        .layer(DefaultBodyLimit::disable());
    let served = Served::new(backend, serve(ANY, app))?;
    for mut client in Client::of_each_version(served.addr).await? {
        for size in [100_000, 3_000_000, 1] {
            let got = client.post("/", pattern(size)).await?;
            assert!(got == pattern(size), "not the body of {size} bytes");
        }
    }
    served.end().await
}

pub(crate) async fn tls_takes_one_call_and_serves_both_versions(backend: Backend) -> Check {
    let identity = Identity::new()?;
    let served = Served::new(backend, serve(ANY, hello()).rustls(identity.server()?))?;
    for (protocols, is_http2) in
        [(&["h2", "http/1.1"][..], true), (&["http/1.1"], false), (&[], false)]
    {
        let stream = tls(served.addr, &identity.client(protocols)?).await?;
        assert_eq!(stream.get_ref().1.alpn_protocol() == Some(b"h2"), is_http2);
        let mut client = match is_http2 {
            true => Client::http2_on(stream).await?,
            false => Client::http1_on(stream).await?,
        };
        assert_eq!(client.get("/").await?, "hello");
    }
    served.end().await
}

pub(crate) async fn the_server_of_axum_takes_a_listener(backend: Backend) -> Check {
    let listener = Listener::builder().server(|server| server.backend(backend).pollers(1));
    let listener = listener.bind(ANY)?;
    let (addr, handle) = (listener.local_addr().as_inet().expect("TCP"), listener.handle());
    let app = |ConnectInfo(peer): ConnectInfo<Peer>| async move { peer.addr().to_string() };
    let app = Router::new().route("/", get(app)).into_make_service_with_connect_info::<Peer>();
    let (stop, stopped) = oneshot::channel::<()>();
    let server = axum::serve(listener, app).with_graceful_shutdown(async { drop(stopped.await) });
    let server = tokio::spawn(server.into_future());
    let mut clients = Vec::new();
    for _ in 0..3 {
        let stream = TcpStream::connect(addr).await?;
        let local = stream.local_addr()?;
        let mut client = Client::http1_on(stream).await?;
        assert_eq!(client.get("/").await?, local.to_string());
        clients.push(client);
    }
    drop(stop);
    server.await??;
    for client in clients {
        client.driver.await??;
    }
    wait_until(|| handle.stats().open == 0).await;
    // The address is free when the server of the dropped listener has ended.
    tokio::task::spawn_blocking(move || handle.wait()).await??;
    TcpStream::connect(addr).await.expect_err("nothing listens");
    Ok(())
}

pub(crate) async fn a_listener_with_tls_offers_what_its_configuration_says(
    backend: Backend,
) -> Check {
    let identity = Identity::new()?;
    let mut config = identity.server()?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    let listener = Listener::builder().server(|server| server.backend(backend).pollers(1));
    let listener = listener.rustls(config).bind(ANY)?;
    let addr = listener.local_addr().as_inet().expect("TCP");
    let server = tokio::spawn(axum::serve(listener, hello()).into_future());
    let stream = tls(addr, &identity.client(&["h2", "http/1.1"])?).await?;
    assert_eq!(Client::http2_on(stream).await?.get("/").await?, "hello");
    server.abort();
    Ok(())
}
