//! hyper on a stream itself, with the executor, the timer and the connector of this crate.

use std::convert::Infallible;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::client::legacy::Client;
use hyper_util::rt::{TokioExecutor, TokioIo};
use ringpoll::{Error, ServerHandle};
use ringpoll_compat::{HyperConnector, HyperExecutor, HyperTimer, TokioStream};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::Notify;

use crate::harness::{Check, Fixture, pattern, wait_until};

macro_rules! cases {
    ($tests:ident, $mount:ident) => {
        $tests! { $mount, hyper:
            expected_and_chunked_bodies_arrive_with_their_trailers
            a_client_that_leaves_cancels_the_service
            a_client_that_has_ended_its_side_gets_its_answer
            an_upgraded_connection_is_a_stream_of_bytes
            streams_of_http2_are_answered_at_the_same_time
            a_header_that_does_not_come_times_out
            clients_that_leave_with_their_streamed_answer_are_no_errors
            the_connector_keeps_its_connection
            a_server_built_in_a_runtime_has_its_context
        }
    };
}
pub(crate) use cases;

/// Answers with the body and the trailers.
async fn echo(request: Request<Incoming>) -> Result<Response<Full<Bytes>>, hyper::Error> {
    let collected = request.into_body().collect().await?;
    let trailer = collected.trailers().and_then(|fields| fields.get("sum")).cloned();
    let mut reply = collected.to_bytes().to_vec();
    reply.extend_from_slice(trailer.as_ref().map_or(b"", |value| value.as_bytes()));
    Ok(Response::new(Full::from(reply)))
}

async fn serve_echo(stream: TokioStream) -> Check {
    Ok(http1::Builder::new().serve_connection(stream, service_fn(echo)).await?)
}

fn peer_of(server: &ServerHandle) -> std::io::Result<TcpStream> {
    TcpStream::connect(server.local_addr().to_string())
}

/// Runs what blocks on a thread of its own.
async fn off<T: Send + 'static>(
    code: impl FnOnce() -> std::io::Result<T> + Send + 'static,
) -> Check<T> {
    Ok(tokio::task::spawn_blocking(code).await??)
}

fn read_to(peer: &mut TcpStream, end: &[u8]) -> std::io::Result<String> {
    let (mut got, mut byte) = (Vec::new(), [0]);
    while !got.ends_with(end) {
        peer.read_exact(&mut byte)?;
        got.push(byte[0]);
    }
    Ok(String::from_utf8_lossy(&got).into_owned())
}

pub(crate) async fn expected_and_chunked_bodies_arrive_with_their_trailers(
    t: &mut Fixture,
) -> Check {
    let server = t.serve(serve_echo)?;
    let mut peer = peer_of(&server)?;
    off(move || {
        write!(
            peer,
            "POST / HTTP/1.1\r\nhost: test\r\nexpect: 100-continue\r\ntrailer: sum\r\n\
             transfer-encoding: chunked\r\n\r\n"
        )?;
        assert_eq!(read_to(&mut peer, b"\r\n\r\n")?, "HTTP/1.1 100 Continue\r\n\r\n");
        peer.write_all(b"3\r\nabc\r\n")?;
        peer.write_all(b"2\r\nde\r\n0\r\nsum: 5\r\n\r\n")?;
        assert!(read_to(&mut peer, b"abcde5")?.starts_with("HTTP/1.1 200"));
        Ok(())
    })
    .await
}

pub(crate) async fn a_client_that_leaves_cancels_the_service(t: &mut Fixture) -> Check {
    struct Tells(Arc<Notify>);
    impl Drop for Tells {
        fn drop(&mut self) {
            self.0.notify_one();
        }
    }
    let (begun, dropped) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let (begins, drops) = (Arc::clone(&begun), Arc::clone(&dropped));
    let server = t.serve(move |stream| {
        let (begins, drops) = (Arc::clone(&begins), Arc::clone(&drops));
        async move {
            let compute = service_fn(move |_: Request<Incoming>| {
                let tells = Tells(Arc::clone(&drops));
                begins.notify_one();
                async move {
                    std::future::pending::<()>().await;
                    drop(tells);
                    Ok::<_, Infallible>(Response::new(String::new()))
                }
            });
            // How the connection ended does not matter here.
            let _ = http1::Builder::new().serve_connection(stream, compute).await;
            Ok(())
        }
    })?;
    let mut peer = peer_of(&server)?;
    peer.write_all(b"GET / HTTP/1.1\r\nhost: test\r\n\r\n")?;
    begun.notified().await;
    drop(peer);
    dropped.notified().await;
    Ok(())
}

pub(crate) async fn a_client_that_has_ended_its_side_gets_its_answer(t: &mut Fixture) -> Check {
    let server = t.serve(async |stream: TokioStream| {
        let timer = HyperTimer::new(stream.get_ref().handle());
        let slow = service_fn(move |_: Request<Incoming>| {
            let pause = hyper::rt::Timer::sleep(&timer, Duration::from_millis(20));
            async move {
                pause.await;
                Ok::<_, Infallible>(Response::new("answer".to_string()))
            }
        });
        let mut http = http1::Builder::new();
        Ok(http.half_close(true).serve_connection(stream, slow).await?)
    })?;
    let mut peer = peer_of(&server)?;
    off(move || {
        peer.write_all(b"GET / HTTP/1.1\r\nhost: test\r\n\r\n")?;
        peer.shutdown(Shutdown::Write)?;
        let mut got = String::new();
        peer.read_to_string(&mut got)?;
        assert!(got.ends_with("answer"), "{got:?}");
        Ok(())
    })
    .await
}

pub(crate) async fn an_upgraded_connection_is_a_stream_of_bytes(t: &mut Fixture) -> Check {
    let server = t.serve(async |stream: TokioStream| {
        let handle = stream.get_ref().handle();
        let upgrade = service_fn(move |mut request: Request<Incoming>| {
            let upgraded = hyper::upgrade::on(&mut request);
            let echoes = handle.spawn(async move {
                let upgraded = upgraded.await.map_err(Error::other)?;
                let (mut reader, mut writer) = tokio::io::split(TokioIo::new(upgraded));
                tokio::io::copy(&mut reader, &mut writer).await.map_err(Error::other)?;
                writer.shutdown().await.map_err(Error::other)
            });
            async move {
                echoes?;
                let response = Response::builder().status(StatusCode::SWITCHING_PROTOCOLS);
                let response = response.header("upgrade", "echo").header("connection", "upgrade");
                response.body(String::new()).map_err(Error::other)
            }
        });
        let served = http1::Builder::new().serve_connection(stream, upgrade).with_upgrades();
        Ok(served.await?)
    })?;
    let mut peer = peer_of(&server)?;
    off(move || {
        // What follows the request belongs to the new protocol.
        let request =
            "GET / HTTP/1.1\r\nhost: test\r\nconnection: upgrade\r\nupgrade: echo\r\n\r\n";
        write!(peer, "{request}early ")?;
        assert!(read_to(&mut peer, b"\r\n\r\n")?.starts_with("HTTP/1.1 101"));
        peer.write_all(b"late")?;
        peer.shutdown(Shutdown::Write)?;
        let mut got = String::new();
        peer.read_to_string(&mut got)?;
        assert_eq!(got, "early late");
        Ok(())
    })
    .await
}

pub(crate) async fn streams_of_http2_are_answered_at_the_same_time(t: &mut Fixture) -> Check {
    const STREAMS: usize = 20;
    let all = Arc::new(tokio::sync::Barrier::new(STREAMS));
    let server = t.serve(move |stream| {
        let all = Arc::clone(&all);
        async move {
            let handle = stream.get_ref().handle();
            let mut http = http2::Builder::new(HyperExecutor::new(handle.clone()));
            http.timer(HyperTimer::new(handle));
            let meet = service_fn(move |request| {
                let all = Arc::clone(&all);
                async move {
                    all.wait().await;
                    echo(request).await
                }
            });
            Ok(http.serve_connection(stream, meet).await?)
        }
    })?;
    let stream = t.dial(&server).await?;
    let executor = HyperExecutor::new(stream.get_ref().handle());
    let (requests, connection) = hyper::client::conn::http2::handshake(executor, stream).await?;
    let driver = tokio::spawn(connection);
    let ask = |index: usize| {
        let mut requests = requests.clone();
        tokio::spawn(async move {
            let body = pattern(index * 3000);
            let request = Request::post("http://test/").body(Full::<Bytes>::from(body.clone()))?;
            let response = requests.send_request(request).await?;
            assert!(response.into_body().collect().await?.to_bytes() == body, "another body");
            Check::Ok(())
        })
    };
    for answer in (0..STREAMS).map(ask).collect::<Vec<_>>() {
        answer.await??;
    }
    drop(requests);
    Ok(driver.await??)
}

pub(crate) async fn a_header_that_does_not_come_times_out(t: &mut Fixture) -> Check {
    let server = t.serve(async |stream: TokioStream| {
        let mut http = http1::Builder::new();
        http.timer(HyperTimer::new(stream.get_ref().handle()));
        http.header_read_timeout(Duration::from_millis(50));
        let served = http.serve_connection(stream, service_fn(echo)).await;
        let error = served.expect_err("the header does not come");
        assert!(error.is_timeout(), "{error:?}");
        Ok(())
    })?;
    let mut peer = peer_of(&server)?;
    peer.write_all(b"GET / HTTP/1.1\r\n")?;
    off(move || peer.read_to_end(&mut Vec::new()).map(|_| ())).await
}

/// `RINGPOLL_CLIENTS` sets how many clients there are.
pub(crate) async fn clients_that_leave_with_their_streamed_answer_are_no_errors(
    t: &mut Fixture,
) -> Check {
    const CLIENTS: usize = 200;
    const PIECES: usize = 8;
    const END: &[u8] = b"\r\n0\r\n\r\n";
    static PIECE: [u8; 32 << 10] = [b'x'; 32 << 10];
    let clients = std::env::var("RINGPOLL_CLIENTS").map_or(Ok(CLIENTS), |text| text.parse())?;
    let builder = t.builder().socket_buffers(0, 32 << 10).on_connect(|conn| async move {
        let large = service_fn(|_: Request<Incoming>| async {
            let pieces = futures_util::stream::iter(0..PIECES);
            let pieces =
                pieces.map(|_| Ok::<_, Infallible>(Frame::data(Bytes::from_static(&PIECE))));
            Ok::<_, Infallible>(Response::new(StreamBody::new(pieces)))
        });
        let stream = TokioStream::from(conn);
        http1::Builder::new().serve_connection(stream, large).await.map_err(Error::other)
    });
    let server = t.spawn(builder)?;
    let addr = server.local_addr().to_string();
    off(move || {
        let mut buffer = vec![0; 64 << 10];
        for _ in 0..clients {
            let mut peer = TcpStream::connect(&addr)?;
            peer.write_all(b"GET / HTTP/1.1\r\nhost: test\r\n\r\n")?;
            let mut got = Vec::new();
            while !got.ends_with(END) {
                let count = peer.read(&mut buffer)?;
                assert!(count > 0, "cut short after {} bytes", got.len());
                got.extend_from_slice(&buffer[..count]);
            }
            assert!(got.len() > PIECES * PIECE.len(), "{} bytes", got.len());
        }
        Ok(())
    })
    .await?;
    assert_eq!(server.stats().accepted, clients as u64);
    // That no handler has failed is looked at afterwards.
    Ok(())
}

pub(crate) async fn the_connector_keeps_its_connection(t: &mut Fixture) -> Check {
    const REQUESTS: u64 = 50;
    let server = t.serve(serve_echo)?;
    let connector = HyperConnector::new(t.dialer());
    let client = Client::builder(TokioExecutor::new()).build::<_, Full<Bytes>>(connector);
    for index in 0..REQUESTS {
        let body = index.to_string();
        let uri = format!("http://{}/", server.local_addr());
        let response = client.request(Request::post(&uri).body(Full::from(body.clone()))?).await?;
        assert_eq!(response.into_body().collect().await?.to_bytes(), body);
    }
    // The client dials anew for a request that is faster than the return of the connection.
    let accepted = server.stats().accepted;
    assert!(accepted < REQUESTS, "{accepted} connections");
    drop(client);
    wait_until(|| server.stats().open == 0).await;
    Ok(())
}

/// A server without `ServerBuilder::tokio`.
pub(crate) async fn a_server_built_in_a_runtime_has_its_context(t: &mut Fixture) -> Check {
    async fn sleeps() {
        tokio::time::sleep(Duration::from_millis(1)).await;
        tokio::spawn(async {}).await.expect("an empty task");
    }
    let builder = t.builder_without_runtime().on_request(|mut conn| async move {
        let byte = conn.read_byte().await?;
        sleeps().await;
        let (done, is_done) = tokio::sync::oneshot::channel();
        conn.handle().spawn(async move {
            sleeps().await;
            let _ = done.send(byte);
            Ok(())
        })?;
        conn.write_copy(&[is_done.await.map_err(Error::other)?])?;
        conn.flush().await
    });
    let server = t.spawn(builder)?;
    let mut stream = t.dial(&server).await?;
    for byte in 0..3 {
        stream.write_all(&[byte]).await?;
        assert_eq!(stream.read_u8().await?, byte);
    }
    Ok(())
}
