//! hyper on both ends of a connection.

use std::convert::Infallible;
use std::future::{Future, poll_fn};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::Poll;
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::client::conn::http1 as client;
use hyper::server::conn::http1 as server;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use ringpoll::ServerHandle;
use ringpoll_compat::TokioStream;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::harness::{Check, Fixture, pattern, wait_until};

macro_rules! cases {
    ($tests:ident, $mount:ident) => {
        $tests! { $mount, http:
            one_connection_answers_many_requests
            a_handler_of_requests_may_serve_http
            large_bodies_go_both_ways
            pipelined_requests_are_answered_in_order
            clients_that_leave_with_the_whole_response_are_no_errors
            a_response_is_over_before_its_client_can_have_left
        }
    };
}
pub(crate) use cases;

/// Answers with the path and the body, after a look at tokio's clock.
async fn answer(request: Request<Incoming>) -> Result<Response<Full<Bytes>>, hyper::Error> {
    tokio::time::sleep(Duration::from_millis(1)).await;
    let mut reply = request.uri().path().as_bytes().to_vec();
    reply.extend_from_slice(&request.into_body().collect().await?.to_bytes());
    Ok(Response::new(Full::from(reply)))
}

async fn serve(stream: TokioStream) -> Check {
    let service = service_fn(answer);
    Ok(server::Builder::new().serve_connection(TokioIo::new(stream), service).await?)
}

/// A client's requests, one after the other, on one connection.
struct Client {
    requests: client::SendRequest<Full<Bytes>>,
    driver: tokio::task::JoinHandle<hyper::Result<()>>,
}

impl Client {
    async fn on(stream: TokioStream) -> Check<Client> {
        let (requests, connection) = client::handshake(TokioIo::new(stream)).await?;
        Ok(Client { requests, driver: tokio::spawn(connection) })
    }

    async fn ask(&mut self, method: Method, path: &str, body: Vec<u8>) -> Check<Bytes> {
        self.requests.ready().await?;
        let request = Request::builder().method(method).uri(path).header("host", "test");
        let response = self.requests.send_request(request.body(Full::from(body))?).await?;
        assert_eq!(response.status(), StatusCode::OK);
        Ok(response.into_body().collect().await?.to_bytes())
    }

    async fn end(self) -> Check {
        drop(self.requests);
        Ok(self.driver.await??)
    }
}

async fn asks_ten_times(t: &Fixture, server: &ServerHandle) -> Check {
    let mut client = Client::on(t.dial(server).await?).await?;
    for index in 0..10 {
        let path = format!("/{index}");
        assert_eq!(client.ask(Method::GET, &path, Vec::new()).await?, path.as_bytes());
        let body = format!("body {index}").into_bytes();
        let expected = [path.as_bytes(), &body].concat();
        assert_eq!(client.ask(Method::POST, &path, body).await?, expected);
    }
    assert_eq!(server.stats().open, 1, "the connection is kept");
    client.end().await
}

pub(crate) async fn one_connection_answers_many_requests(t: &mut Fixture) -> Check {
    let server = t.serve(serve)?;
    asks_ten_times(t, &server).await?;
    assert_eq!(server.stats().handler_runs, 1);
    Ok(())
}

pub(crate) async fn a_handler_of_requests_may_serve_http(t: &mut Fixture) -> Check {
    let builder = t.builder().on_request(|conn| async move {
        serve(TokioStream::from(conn)).await.map_err(ringpoll::Error::other)
    });
    let server = t.spawn(builder)?;
    asks_ten_times(t, &server).await?;
    assert_eq!(server.stats().handler_runs, 1);
    Ok(())
}

pub(crate) async fn large_bodies_go_both_ways(t: &mut Fixture) -> Check {
    let server = t.serve(serve)?;
    let mut client = Client::on(t.dial(&server).await?).await?;
    for size in [100_000, 3_000_000, 1] {
        let got = client.ask(Method::PUT, "/", pattern(size)).await?;
        assert!(got[0] == b'/' && got[1..] == pattern(size), "not the body of {size} bytes");
    }
    client.end().await
}

pub(crate) async fn pipelined_requests_are_answered_in_order(t: &mut Fixture) -> Check {
    const REQUESTS: usize = 50;
    let server = t.serve(async |stream| {
        let service = service_fn(|request: Request<Incoming>| async move {
            Ok::<_, Infallible>(Response::new(format!("<{}>", request.uri().path())))
        });
        let builder = server::Builder::new();
        Ok(builder.serve_connection(TokioIo::new(stream), service).await?)
    })?;
    let mut stream = t.dial(&server).await?;
    for index in 0..REQUESTS {
        let last = if index + 1 == REQUESTS { "connection: close\r\n" } else { "" };
        let request = format!("GET /{index} HTTP/1.1\r\nhost: test\r\n{last}\r\n");
        stream.write_all(request.as_bytes()).await?;
    }
    let mut answers = String::new();
    stream.read_to_string(&mut answers).await?;
    let mut rest = answers.as_str();
    for index in 0..REQUESTS {
        let answer = format!("</{index}>");
        let at = rest.find(&answer).unwrap_or_else(|| panic!("no {answer} in {rest:?}"));
        rest = &rest[at + answer.len()..];
    }
    Ok(())
}

/// A response of 3 MiB in pieces, chunked.
type Streamed = StreamBody<stream::Iter<std::vec::IntoIter<Result<Frame<Bytes>, Infallible>>>>;

async fn stream_pieces(_: Request<Incoming>) -> Result<Response<Streamed>, Infallible> {
    let pieces = (0..PIECES).map(|_| Ok(Frame::data(Bytes::from_static(&PIECE))));
    Ok(Response::new(StreamBody::new(stream::iter(pieces.collect::<Vec<_>>()))))
}

const PIECES: usize = 96;
/// Far less than hyper hands over at once.
const SEND_BUFFER_BYTES: usize = 32 << 10;
static PIECE: [u8; 32 << 10] = [b'x'; 32 << 10];

/// Asks for such a response and reads it to its last byte. Tells `progress` how far it is.
fn read_pieces(peer: &mut TcpStream, last: bool, progress: &Progress) -> std::io::Result<()> {
    const END: &[u8] = b"\r\n0\r\n\r\n";
    let fields = if last { "host: test\r\nconnection: close" } else { "host: test" };
    write!(peer, "GET / HTTP/1.1\r\n{fields}\r\n\r\n")?;
    let (mut got, mut buffer) = (Vec::new(), vec![0; 64 << 10]);
    while !got.ends_with(END) {
        let count = peer.read(&mut buffer)?;
        assert!(count > 0, "cut short after {} bytes", got.len());
        got.extend_from_slice(&buffer[..count]);
        progress.is_whole.store(got.ends_with(END), Ordering::Release);
        progress.bytes.store(got.len() as u64, Ordering::Release);
    }
    let body = got.iter().filter(|&&byte| byte == b'x').count();
    assert_eq!(body, PIECES * PIECE.len());
    Ok(())
}

/// What a client has of its response.
#[derive(Default)]
struct Progress {
    bytes: AtomicU64,
    is_whole: AtomicBool,
}

pub(crate) async fn clients_that_leave_with_the_whole_response_are_no_errors(
    t: &mut Fixture,
) -> Check {
    const CLIENTS: usize = 8;
    const ROUNDS: usize = 2;
    let builder = t.builder().socket_buffers(0, SEND_BUFFER_BYTES).on_connect(|conn| async move {
        let (stream, service) = (TokioIo::new(TokioStream::from(conn)), service_fn(stream_pieces));
        let served = server::Builder::new().serve_connection(stream, service).await;
        served.map_err(ringpoll::Error::other)
    });
    let server = t.spawn(builder)?;
    for round in 0..ROUNDS {
        let leave = |_| {
            let addr = server.local_addr().to_string();
            tokio::task::spawn_blocking(move || {
                read_pieces(&mut TcpStream::connect(addr)?, round % 2 == 0, &Progress::default())
            })
        };
        for client in (0..CLIENTS).map(leave).collect::<Vec<_>>() {
            client.await??;
        }
    }
    // That no handler has failed is looked at afterwards.
    Ok(())
}

/// Each time hyper is polled, the client has read everything that was handed over before, and has
/// left if that was all: so nothing of the response may still be waited for then.
pub(crate) async fn a_response_is_over_before_its_client_can_have_left(t: &mut Fixture) -> Check {
    for last in [false, true] {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let dialer = t.dialer().socket_buffers(0, SEND_BUFFER_BYTES);
        let conn = dialer.connect(&listener.local_addr()?.to_string()).await?;
        let handle = (*conn).clone();
        let (mut peer, _) = listener.accept()?;
        let progress = Arc::<Progress>::default();
        let tells = Arc::clone(&progress);
        let client = tokio::task::spawn_blocking(move || read_pieces(&mut peer, last, &tells));
        let stream = TokioIo::new(TokioStream::from(conn));
        let serves = server::Builder::new().serve_connection(stream, service_fn(stream_pieces));
        let mut serves = std::pin::pin!(serves);
        loop {
            let polled = poll_fn(|cx| Poll::Ready(serves.as_mut().poll(cx))).await;
            if let Poll::Ready(served) = polled {
                served?;
                break;
            }
            wait_until(|| {
                let stats = handle.stats();
                let read_bytes = progress.bytes.load(Ordering::Acquire);
                (stats.unsent_bytes, stats.sent_bytes) == (0, read_bytes)
            })
            .await;
            if progress.is_whole.load(Ordering::Acquire) {
                wait_until(|| !handle.is_active()).await;
            }
        }
        client.await??;
    }
    Ok(())
}
