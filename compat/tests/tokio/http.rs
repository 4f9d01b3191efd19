//! hyper on both ends of a connection.

use std::convert::Infallible;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1 as client;
use hyper::server::conn::http1 as server;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use ringpoll::ServerHandle;
use ringpoll_compat::TokioStream;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::harness::{Check, Fixture, pattern};

macro_rules! cases {
    ($tests:ident, $mount:ident) => {
        $tests! { $mount, http:
            one_connection_answers_many_requests
            a_handler_of_requests_may_serve_http
            large_bodies_go_both_ways
            pipelined_requests_are_answered_in_order
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
