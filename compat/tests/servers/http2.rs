//! HTTP/2 (RFC 9113), with frames from a raw socket where a client library would hide them.

use std::convert::Infallible;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::Request;
use axum::http::HeaderMap;
use axum::routing::{get, post};
use futures_util::stream;
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use hyper_util::rt::{TokioExecutor, TokioIo};
use ringpoll::Backend;
use ringpoll_compat::axum::serve;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::apps::ANY;
use crate::harness::{Check, DEADLINE, Served};
use crate::probe::Probe;

macro_rules! cases {
    ($tests:ident, $backend:ident) => {
        $tests! { $backend, http2:
            trailers_go_both_ways
            a_reset_stream_drops_its_handler_and_no_other
            a_graceful_end_says_goaway_and_answers_what_has_begun
        }
    };
}
pub(crate) use cases;

fn with_trailer(data: &'static str, value: &'static str) -> Body {
    let mut fields = HeaderMap::new();
    fields.insert("sum", value.parse().expect("a value"));
    let frames = [Frame::data(Bytes::from_static(data.as_bytes())), Frame::trailers(fields)];
    Body::new(StreamBody::new(stream::iter(frames.map(Ok::<_, Infallible>))))
}

/// The data and the trailer of a body.
async fn collect<B>(body: B) -> Result<(Bytes, Option<String>), B::Error>
where
    B: hyper::body::Body<Data = Bytes>,
{
    let body = body.collect().await?;
    let sum = body.trailers().and_then(|fields| fields.get("sum"));
    let sum = sum.map(|sum| sum.to_str().expect("text").to_owned());
    Ok((body.to_bytes(), sum))
}

pub(crate) async fn trailers_go_both_ways(backend: Backend) -> Check {
    let answer = |request: Request| async {
        let got = collect(request.into_body()).await.expect("a whole body");
        assert_eq!(got, (Bytes::from_static(b"question"), Some("8".to_owned())));
        with_trailer("answer", "6")
    };
    let served = Served::new(backend, serve(ANY, Router::new().route("/", post(answer))))?;
    let stream = TokioIo::new(TcpStream::connect(served.addr).await?);
    let handshake = hyper::client::conn::http2::handshake(TokioExecutor::new(), stream);
    let (mut requests, connection) = handshake.await?;
    let driver = tokio::spawn(connection);
    let request = Request::post("http://localhost/").body(with_trailer("question", "8"))?;
    let got = collect(requests.send_request(request).await?.into_body()).await?;
    assert_eq!(got, (Bytes::from_static(b"answer"), Some("6".to_owned())));
    drop(requests);
    driver.await??;
    served.end().await
}

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;

const END_STREAM: u8 = 0x1;
const END_HEADERS: u8 = 0x4;
const ACK: u8 = 0x1;

const CANCEL: u32 = 8;

struct Received {
    kind: u8,
    flags: u8,
    stream: u32,
    payload: Vec<u8>,
}

/// A client that has sent the preface.
struct Client(TcpStream);

impl Client {
    async fn new(served: &Served) -> Check<Client> {
        let mut client = Client(TcpStream::connect(served.addr).await?);
        client.0.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await?;
        client.send(SETTINGS, 0, 0, &[]).await?;
        Ok(client)
    }

    async fn send(&mut self, kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Check {
        let count = u32::try_from(payload.len())?.to_be_bytes();
        let mut frame = vec![count[1], count[2], count[3], kind, flags];
        frame.extend_from_slice(&stream.to_be_bytes());
        frame.extend_from_slice(payload);
        Ok(self.0.write_all(&frame).await?)
    }

    /// Asks for `/`. The fields are those of HPACK's static table (RFC 7541, appendix A).
    async fn get(&mut self, stream: u32) -> Check {
        const METHOD_GET: u8 = 0x82;
        const PATH_ROOT: u8 = 0x84;
        const SCHEME_HTTP: u8 = 0x86;
        // A literal value of the field `:authority`, not indexed, of one byte.
        const AUTHORITY: [u8; 3] = [0x01, 1, b'a'];
        let fields = [&[METHOD_GET, SCHEME_HTTP, PATH_ROOT][..], &AUTHORITY].concat();
        self.send(HEADERS, END_STREAM | END_HEADERS, stream, &fields).await
    }

    /// The next frame that is not about settings; `None` at the end of the stream. Answers pings.
    async fn receive(&mut self) -> Check<Option<Received>> {
        loop {
            let mut head = [0; 9];
            if self.0.read(&mut head[..1]).await? == 0 {
                return Ok(None);
            }
            self.0.read_exact(&mut head[1..]).await?;
            let count = u32::from_be_bytes([0, head[0], head[1], head[2]]);
            let stream = u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
            let mut payload = vec![0; count as usize];
            self.0.read_exact(&mut payload).await?;
            match head[3] {
                SETTINGS if head[4] & ACK == 0 => self.send(SETTINGS, ACK, 0, &[]).await?,
                PING if head[4] & ACK == 0 => self.send(PING, ACK, 0, &payload).await?,
                kind @ (DATA | HEADERS | RST_STREAM | GOAWAY) => {
                    return Ok(Some(Received { kind, flags: head[4], stream, payload }));
                }
                _ => {}
            }
        }
    }

    /// Reads until the end of `stream`, which has to carry `answered`. Returns the frames of the
    /// connection that came before.
    async fn is_answered(&mut self, stream: u32) -> Check<Vec<Received>> {
        let (mut body, mut others) = (Vec::new(), Vec::new());
        while let Some(frame) = self.receive().await? {
            match frame.stream {
                0 => others.push(frame),
                of => {
                    assert_eq!(of, stream, "a frame of kind {}", frame.kind);
                    if frame.kind == DATA {
                        body.extend_from_slice(&frame.payload);
                    }
                    if frame.flags & END_STREAM != 0 {
                        break;
                    }
                }
            }
        }
        assert_eq!(body, b"answered");
        Ok(others)
    }
}

pub(crate) async fn a_reset_stream_drops_its_handler_and_no_other(backend: Backend) -> Check {
    let probe = Probe::default();
    let app = Router::new().route("/", get(probe.handler()));
    let served = Served::new(backend, serve(ANY, app))?;
    let mut client = Client::new(&served).await?;
    for stream in [1, 3] {
        client.get(stream).await?;
        probe.begun().await;
    }
    client.send(RST_STREAM, 0, 1, &CANCEL.to_be_bytes()).await?;
    probe.dropped().await;
    // Only the handler of the other stream waits for it.
    probe.release();
    client.is_answered(3).await?;
    client.get(5).await?;
    probe.release();
    client.is_answered(5).await?;
    drop(client);
    served.end().await
}

pub(crate) async fn a_graceful_end_says_goaway_and_answers_what_has_begun(
    backend: Backend,
) -> Check {
    let probe = Probe::default();
    let app = Router::new().route("/", get(probe.handler()));
    let served = Served::new(backend, serve(ANY, app).shutdown_timeout(DEADLINE))?;
    let mut client = Client::new(&served).await?;
    client.get(1).await?;
    probe.begun().await;
    let server = served.server.clone();
    let ended = served.stop();
    let first = client.receive().await?.ok_or("the connection has ended")?;
    assert_eq!((first.kind, first.stream), (GOAWAY, 0), "before the request is answered");
    probe.release();
    let mut goaways = vec![first];
    goaways.extend(client.is_answered(1).await?);
    while let Some(frame) = client.receive().await? {
        goaways.push(frame);
    }
    for goaway in &goaways {
        assert_eq!((goaway.kind, &goaway.payload[4..8]), (GOAWAY, &[0; 4][..]), "NO_ERROR");
    }
    let last = &goaways.last().expect("one was read").payload[..4];
    assert_eq!(last, 1_u32.to_be_bytes(), "the last stream that is answered");
    ended.await??;
    assert_eq!(server.stats().cut, 0);
    Ok(())
}
