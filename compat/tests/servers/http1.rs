//! HTTP/1.1 (RFC 9110 and RFC 9112) from a raw socket.

use std::convert::Infallible;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Path, Request};
use axum::http::HeaderMap;
use axum::response::{IntoResponse, Response};
use axum::routing::{any, get, post};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use ringpoll::Backend;
use ringpoll_compat::axum::serve;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::apps::ANY;
use crate::harness::{Check, Served, pattern, wait_until};
use crate::probe::Probe;

macro_rules! cases {
    ($tests:ident, $backend:ident) => {
        $tests! { $backend, http1:
            a_body_is_asked_for_only_where_it_is_read
            chunks_arrive_with_their_trailers_wherever_they_are_cut
            an_answer_has_trailers_for_those_that_accept_them
            sixteen_requests_in_one_segment_are_answered_in_order
            a_reset_drops_the_future_of_a_handler
            a_reset_drops_a_body_that_is_being_streamed
            a_client_that_ends_its_side_gets_the_whole_answer
        }
    };
}
pub(crate) use cases;

/// The body, and the field `sum` of its trailers.
async fn echo(request: Request) -> String {
    let body = request.into_body().collect().await.expect("a whole body");
    let sum = body.trailers().and_then(|fields| fields.get("sum")).cloned();
    let sum = sum.map_or(String::new(), |sum| sum.to_str().expect("text").to_owned());
    format!("<{}|{sum}>", String::from_utf8_lossy(&body.to_bytes()))
}

/// A body of one chunk, with trailers.
async fn with_trailers() -> Response {
    let mut fields = HeaderMap::new();
    fields.insert("sum", "5".parse().expect("a value"));
    let frames = [Frame::data(Bytes::from_static(b"abcde")), Frame::trailers(fields)];
    let frames = frames.map(Ok::<_, Infallible>);
    let body = Body::new(StreamBody::new(futures_util::stream::iter(frames)));
    ([("trailer", "sum")], body).into_response()
}

fn app() -> Router {
    Router::new()
        .route("/echo", post(echo))
        .route("/refuse", any(|| async { "refused" }))
        .route("/trailers", get(with_trailers))
        .route(
            "/number/{number}",
            any(|Path(number): Path<usize>| async move { format!("<{number}>") }),
        )
}

/// Sends `request`, and returns everything that comes until the end of the stream.
async fn exchange(served: &Served, request: &str) -> Check<String> {
    let mut stream = TcpStream::connect(served.addr).await?;
    stream.write_all(request.as_bytes()).await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    Ok(answer)
}

/// Reads up to and including `end`.
async fn read_to(stream: &mut TcpStream, end: &str) -> Check<String> {
    let mut got = Vec::new();
    while !got.ends_with(end.as_bytes()) {
        got.push(stream.read_u8().await?);
    }
    Ok(String::from_utf8(got)?)
}

pub(crate) async fn a_body_is_asked_for_only_where_it_is_read(backend: Backend) -> Check {
    let served = Served::new(backend, serve(ANY, app()))?;
    let head = |path| {
        format!(
            "POST {path} HTTP/1.1\r\nhost: a\r\nexpect: 100-continue\r\ncontent-length: 3\r\n\r\n"
        )
    };
    let mut stream = TcpStream::connect(served.addr).await?;
    stream.write_all(head("/echo").as_bytes()).await?;
    assert_eq!(read_to(&mut stream, "\r\n\r\n").await?, "HTTP/1.1 100 Continue\r\n\r\n");
    stream.write_all(b"abc").await?;
    let answer = read_to(&mut stream, "<abc|>").await?;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");

    // The final status comes at once, and the client need not send its body.
    let mut stream = TcpStream::connect(served.addr).await?;
    stream.write_all(head("/refuse").as_bytes()).await?;
    let answer = read_to(&mut stream, "refused").await?;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    drop(stream);
    wait_until(|| served.server.stats().open == 0).await;
    served.end().await
}

pub(crate) async fn chunks_arrive_with_their_trailers_wherever_they_are_cut(
    backend: Backend,
) -> Check {
    let served = Served::new(backend, serve(ANY, app()))?;
    let mut stream = TcpStream::connect(served.addr).await?;
    stream.set_nodelay(true)?;
    let head =
        "POST /echo HTTP/1.1\r\nhost: a\r\ntrailer: sum\r\ntransfer-encoding: chunked\r\n\r\n";
    let body = "3\r\nabc\r\nA;name=value\r\ndefghijklm\r\n0\r\nsum: 13\r\n\r\n";
    for cut in 0..body.len() {
        stream.write_all(format!("{head}{}", &body[..cut]).as_bytes()).await?;
        tokio::task::yield_now().await;
        stream.write_all(&body.as_bytes()[cut..]).await?;
        let answer = read_to(&mut stream, ">").await?;
        assert!(answer.ends_with("\r\n\r\n<abcdefghijklm|13>"), "cut at {cut}: {answer}");
    }
    drop(stream);
    served.end().await
}

pub(crate) async fn an_answer_has_trailers_for_those_that_accept_them(backend: Backend) -> Check {
    let served = Served::new(backend, serve(ANY, app()))?;
    for (accepts, end) in [("te: trailers\r\n", "0\r\nsum: 5\r\n\r\n"), ("", "0\r\n\r\n")] {
        let request =
            format!("GET /trailers HTTP/1.1\r\nhost: a\r\n{accepts}connection: close\r\n\r\n");
        let answer = exchange(&served, &request).await?;
        assert!(answer.ends_with(&format!("\r\n\r\n5\r\nabcde\r\n{end}")), "{answer}");
    }
    served.end().await
}

pub(crate) async fn sixteen_requests_in_one_segment_are_answered_in_order(
    backend: Backend,
) -> Check {
    const REQUESTS: usize = 16;
    let served = Served::new(backend, serve(ANY, app()))?;
    let request = |number| {
        let (method, body) = if number % 2 == 0 { ("GET", "") } else { ("POST", "body") };
        let last = if number + 1 == REQUESTS { "connection: close\r\n" } else { "" };
        let count = body.len();
        format!(
            "{method} /number/{number} HTTP/1.1\r\nhost: a\r\n{last}content-length: {count}\r\n\r\n\
             {body}"
        )
    };
    let requests = (0..REQUESTS).map(request).collect::<String>();
    let mut answers = exchange(&served, &requests).await?;
    for number in 0..REQUESTS {
        let (answer, rest) = answers.split_once('>').ok_or("an answer is missing")?;
        assert!(answer.starts_with("HTTP/1.1 200"), "{number}: {answer}");
        assert!(answer.ends_with(&format!("\r\n\r\n<{number}")), "{number}: {answer}");
        answers = rest.to_owned();
    }
    assert_eq!(answers, "");
    served.end().await
}

pub(crate) async fn a_reset_drops_the_future_of_a_handler(backend: Backend) -> Check {
    let probe = Probe::default();
    let app = Router::new().route("/", get(probe.handler()));
    let served = Served::new(backend, serve(ANY, app))?;
    let mut stream = TcpStream::connect(served.addr).await?;
    stream.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await?;
    probe.begun().await;
    stream.set_zero_linger()?;
    drop(stream);
    probe.dropped().await;
    wait_until(|| served.server.stats().open == 0).await;
    served.end().await
}

pub(crate) async fn a_reset_drops_a_body_that_is_being_streamed(backend: Backend) -> Check {
    let probe = Probe::default();
    let tells = probe.clone();
    let endless = move || {
        let guard = tells.guard();
        async move {
            let pieces = futures_util::stream::repeat_with(move || {
                let _ = &guard;
                Ok::<_, Infallible>(Bytes::from_static(b"a piece of a body without an end"))
            });
            Body::from_stream(pieces)
        }
    };
    let served = Served::new(backend, serve(ANY, Router::new().route("/", get(endless))))?;
    let mut stream = TcpStream::connect(served.addr).await?;
    stream.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await?;
    stream.read_exact(&mut [0; 10_000]).await?;
    stream.set_zero_linger()?;
    drop(stream);
    probe.dropped().await;
    wait_until(|| served.server.stats().open == 0).await;
    served.end().await
}

/// hyper closes for an end of the client's side unless half-close is enabled.
pub(crate) async fn a_client_that_ends_its_side_gets_the_whole_answer(backend: Backend) -> Check {
    const BODY_BYTES: usize = 3_000_000;
    let probe = Probe::default();
    let waits = probe.clone();
    let app = Router::new().route(
        "/",
        get(move || async move {
            waits.guard().until_released().await;
            pattern(BODY_BYTES)
        }),
    );
    let app = serve(ANY, app).http1(|http| {
        http.half_close(true);
    });
    let served = Served::new(backend, app)?;
    let mut stream = TcpStream::connect(served.addr).await?;
    stream.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await?;
    probe.begun().await;
    stream.shutdown().await?;
    probe.release();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await?;
    assert!(answer.starts_with(b"HTTP/1.1 200"));
    assert!(answer.ends_with(&pattern(BODY_BYTES)), "{} bytes", answer.len());
    served.end().await
}
