//! Peers and handlers that misbehave.

use std::convert::Infallible;
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use axum::extract::Request;
use axum::routing::{get, post};
use ringpoll::Backend;
use ringpoll_compat::axum::serve;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};

use crate::apps::ANY;
use crate::clients::{Client, tls};
use crate::harness::{Check, Identity, Served, pattern, wait_until};

macro_rules! cases {
    ($tests:ident, $backend:ident) => {
        $tests! { $backend, faults:
            garbage_ends_its_own_connection
            a_head_that_never_ends_is_cut
            a_kept_connection_without_requests_ends
            a_slow_answer_is_not_cut_as_a_late_head
            a_long_answer_is_not_cut_while_it_is_sent
            an_upload_is_not_cut_although_its_answer_is_complete
            a_peer_that_sends_no_preface_of_http2_is_cut
            a_panicking_handler_ends_its_own_connection_or_stream
            a_slow_reader_costs_a_bounded_amount_of_memory
        }
    };
}
pub(crate) use cases;

/// Socket buffers that are small beside the bodies here.
const BUFFER_BYTES: usize = 32 << 10;

fn app() -> Router {
    let panics = || async {
        if true {
            panic!("this handler panics")
        }
    };
    Router::new().route("/", get(|| async { "hello" })).route("/panic", get(panics))
}

pub(crate) async fn garbage_ends_its_own_connection(backend: Backend) -> Check {
    let served = Served::new(backend, serve(ANY, app()))?;
    let mut good = Client::http1(served.addr).await?;
    assert_eq!(good.get("/").await?, "hello");
    let pieces: [&[u8]; 4] = [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 a handshake of TLS",
        b"no request at all\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\nthese are no frames of HTTP/2, and many bytes of them",
        &pattern(300_000),
    ];
    for garbage in pieces {
        let mut stream = TcpStream::connect(served.addr).await?;
        // Fails if the server has closed before it took everything.
        let _ = stream.write_all(garbage).await;
        let mut answer = Vec::new();
        // Fails if the server has closed with bytes unread.
        let _ = stream.read_to_end(&mut answer).await;
        assert!(answer.len() < 1000, "{} bytes in answer to garbage", answer.len());
    }
    wait_until(|| served.server.stats().open == 1).await;
    assert_eq!(good.get("/").await?, "hello");
    assert_eq!(served.server.stats().handler_panics, 0);
    served.stop().await??;
    Ok(())
}

pub(crate) async fn a_head_that_never_ends_is_cut(backend: Backend) -> Check {
    let limit = Duration::from_millis(60);
    let served = Served::new(backend, serve(ANY, app()).header_timeout(limit))?;
    for beginning in ["", "P", "PRI * HT", "GET / HTTP/1.1\r\nhost: a"] {
        let begun = Instant::now();
        let mut stream = TcpStream::connect(served.addr).await?;
        stream.write_all(beginning.as_bytes()).await?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await?;
        assert!(begun.elapsed() >= limit, "{beginning:?} after {:?}", begun.elapsed());
    }
    wait_until(|| served.server.stats().open == 0).await;
    served.end().await
}

pub(crate) async fn a_kept_connection_without_requests_ends(backend: Backend) -> Check {
    let limit = Duration::from_millis(60);
    let served = Served::new(backend, serve(ANY, app()).header_timeout(limit))?;
    let mut client = Client::http1(served.addr).await?;
    assert_eq!(client.get("/").await?, "hello");
    client.driver.await??;
    served.end().await
}

/// The time for a head does not count while a request is answered, and begins anew after it.
pub(crate) async fn a_slow_answer_is_not_cut_as_a_late_head(backend: Backend) -> Check {
    const LIMIT: Duration = Duration::from_millis(60);
    let slow = || async {
        tokio::time::sleep(2 * LIMIT).await;
        let pieces = futures_util::stream::iter(["a", "b", "c"]);
        Body::from_stream(futures_util::StreamExt::then(pieces, |piece| async move {
            tokio::time::sleep(LIMIT).await;
            Ok::<_, Infallible>(piece)
        }))
    };
    let app = Router::new().route("/slow", get(slow));
    let served = Served::new(backend, serve(ANY, app).header_timeout(LIMIT))?;
    let mut client = Client::http1(served.addr).await?;
    for _ in 0..2 {
        assert_eq!(client.get("/slow").await?, "abc");
    }
    client.driver.await??;
    served.end().await
}

/// hyper has the whole body at once, and the peer takes several times the limit to read it.
pub(crate) async fn a_long_answer_is_not_cut_while_it_is_sent(backend: Backend) -> Check {
    const LIMIT: Duration = Duration::from_millis(100);
    const BODY_BYTES: usize = 2 << 20;
    let app = Router::new().route("/", get(|| async { pattern(BODY_BYTES) }));
    let app = serve(ANY, app).header_timeout(LIMIT);
    let app = app.server(|server| server.socket_buffers(0, BUFFER_BYTES));
    let served = Served::new(backend, app)?;
    let socket = TcpSocket::new_v4()?;
    socket.set_recv_buffer_size(BUFFER_BYTES as u32)?;
    let mut stream = socket.connect(served.addr).await?;
    stream.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await?;
    let mut answer = vec![0; 2 * BODY_BYTES / 3];
    for part in answer.chunks_mut(BODY_BYTES / 3) {
        tokio::time::sleep(3 * LIMIT).await;
        stream.read_exact(part).await?;
    }
    // The limit ends the connection, because the peer sends no further request.
    stream.read_to_end(&mut answer).await?;
    assert!(answer.ends_with(&pattern(BODY_BYTES)), "{} bytes", answer.len());
    served.end().await
}

pub(crate) async fn an_upload_is_not_cut_although_its_answer_is_complete(
    backend: Backend,
) -> Check {
    const LIMIT: Duration = Duration::from_millis(100);
    let (tell, mut told) = tokio::sync::mpsc::channel(1);
    let answer = move |request: Request| async move {
        tokio::spawn(async move {
            let got = axum::body::to_bytes(request.into_body(), 100).await;
            tell.send(got.map_err(|error| error.to_string())).await
        });
        "<taken>"
    };
    let app = Router::new().route("/", post(answer));
    let served = Served::new(backend, serve(ANY, app).header_timeout(LIMIT))?;
    let mut stream = TcpStream::connect(served.addr).await?;
    stream.write_all(b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 6\r\n\r\n123").await?;
    while stream.read_u8().await? != b'>' {}
    tokio::time::sleep(3 * LIMIT).await;
    stream.write_all(b"456").await?;
    assert_eq!(told.recv().await.expect("the task ends")?, "123456");
    assert_eq!(stream.read(&mut [0]).await?, 0, "the limit ends the connection");
    served.end().await
}

pub(crate) async fn a_peer_that_sends_no_preface_of_http2_is_cut(backend: Backend) -> Check {
    const LIMIT: Duration = Duration::from_millis(60);
    for beginning in ["", "PRI * HT"] {
        let begun = Instant::now();
        let plain = serve(ANY, app()).http2_only().header_timeout(LIMIT);
        let served = Served::new(backend, plain)?;
        let mut stream = TcpStream::connect(served.addr).await?;
        stream.write_all(beginning.as_bytes()).await?;
        stream.read_to_end(&mut Vec::new()).await?;
        assert!(begun.elapsed() >= LIMIT, "{beginning:?} after {:?}", begun.elapsed());
        served.end().await?;

        let identity = Identity::new()?;
        let secure = serve(ANY, app()).rustls(identity.server()?).header_timeout(LIMIT);
        let served = Served::new(backend, secure)?;
        let begun = Instant::now();
        let mut stream = tls(served.addr, &identity.client(&["h2"])?).await?;
        // These fail if the server has closed, because it gives no notice of TLS.
        let _ = stream.write_all(beginning.as_bytes()).await;
        let _ = stream.read_to_end(&mut Vec::new()).await;
        assert!(begun.elapsed() >= LIMIT, "{beginning:?} after {:?}", begun.elapsed());
        wait_until(|| served.server.stats().open == 0).await;
        served.end().await?;
    }
    Ok(())
}

pub(crate) async fn a_panicking_handler_ends_its_own_connection_or_stream(
    backend: Backend,
) -> Check {
    let served = Served::new(backend, serve(ANY, app()))?;
    let [mut one, mut two] = Client::of_each_version(served.addr).await?;
    let mut good = Client::http1(served.addr).await?;
    assert_eq!(good.get("/").await?, "hello");
    one.send("GET", "/panic", Vec::new()).await.expect_err("its connection has ended");
    two.send("GET", "/panic", Vec::new()).await.expect_err("its stream was reset");
    assert_eq!(two.get("/").await?, "hello", "on the same connection");
    assert_eq!(good.get("/").await?, "hello");
    wait_until(|| served.server.stats().handler_panics == 2).await;
    served.stop().await??;
    Ok(())
}

pub(crate) async fn a_slow_reader_costs_a_bounded_amount_of_memory(backend: Backend) -> Check {
    const BODY_BYTES: usize = 64 << 20;
    const BOUND_BYTES: usize = 100_000;
    static PIECE: [u8; 32 << 10] = [b'x'; 32 << 10];
    let endless = || async {
        let pieces = futures_util::stream::iter(0..BODY_BYTES / PIECE.len());
        let pieces = futures_util::StreamExt::map(pieces, |_| {
            Ok::<_, std::convert::Infallible>(axum::body::Bytes::from_static(&PIECE))
        });
        axum::body::Body::from_stream(pieces)
    };
    let (tell, told) = std::sync::mpsc::channel();
    let app = serve(ANY, Router::new().route("/", get(endless)))
        .output_bytes_max(BOUND_BYTES)
        .server(|server| {
            server.socket_buffers(0, BUFFER_BYTES).on_prepare(move |conn| {
                drop(tell.send(conn.clone()));
                Ok(())
            })
        });
    let served = Served::new(backend, app)?;
    let mut stream = TcpStream::connect(served.addr).await?;
    stream.write_all(b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").await?;
    let conn = tokio::task::spawn_blocking(move || told.recv()).await??;
    let (mut got, mut buffer) = (0, vec![0; 64 << 10]);
    loop {
        let unsent = conn.stats().unsent_bytes as usize;
        // A piece may be accepted whole when there is room for its first byte.
        assert!(unsent <= BOUND_BYTES + PIECE.len(), "{unsent} unsent bytes");
        let count = stream.read(&mut buffer).await?;
        if count == 0 {
            break;
        }
        got += count;
    }
    assert!(got > BODY_BYTES, "{got} bytes");
    served.end().await
}
