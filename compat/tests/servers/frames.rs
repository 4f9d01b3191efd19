//! Frames of WebSockets (RFC 6455) from a raw socket, also those that no client library sends.

use axum::Router;
use axum::extract::ws::{CloseFrame, Message, WebSocket, WebSocketUpgrade};
use axum::routing::any;
use ringpoll::Backend;
use ringpoll_compat::axum::serve;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::Error;

use crate::apps::ANY;
use crate::harness::{Check, Served, pattern};

macro_rules! cases {
    ($tests:ident, $backend:ident) => {
        $tests! { $backend, frames:
            pings_are_answered_with_their_payload
            a_character_may_be_split_between_fragments_around_a_ping
            frames_may_come_byte_by_byte
            violations_end_the_connection_with_their_code
            valid_codes_of_a_close_are_echoed_and_others_are_errors
        }
    };
}
pub(crate) use cases;

const TEXT: u8 = 0x1;
const BINARY: u8 = 0x2;
const CLOSE: u8 = 0x8;
const PING: u8 = 0x9;
const PONG: u8 = 0xa;
/// The bit of a message's last frame.
const LAST: u8 = 0x80;
const RESERVED_BIT: u8 = 0x40;

const MESSAGE_BYTES_MAX: usize = 1000;

/// Echoes messages. Answers an error of the protocol with the code that RFC 6455, section 7.4.1,
/// names for it.
async fn echo(mut socket: WebSocket) {
    while let Some(message) = socket.recv().await {
        let answer = match message {
            Ok(message @ (Message::Text(_) | Message::Binary(_))) => message,
            Ok(_) => continue,
            Err(error) => match error.into_inner().downcast_ref::<Error>().and_then(code_of) {
                Some(code) => Message::Close(Some(CloseFrame { code, reason: "".into() })),
                None => return,
            },
        };
        if socket.send(answer).await.is_err() {
            return;
        }
    }
}

fn code_of(error: &Error) -> Option<u16> {
    match error {
        Error::Protocol(_) => Some(1002),
        Error::Utf8(_) => Some(1007),
        Error::Capacity(_) => Some(1009),
        _ => None,
    }
}

fn serve_echo(backend: Backend) -> Check<Served> {
    let upgrade = |upgrade: WebSocketUpgrade| async {
        upgrade.max_message_size(MESSAGE_BYTES_MAX).on_upgrade(echo)
    };
    Served::new(backend, serve(ANY, Router::new().route("/", any(upgrade))))
}

/// A client after the handshake.
struct Client(TcpStream);

impl Client {
    async fn new(served: &Served) -> Check<Client> {
        let mut stream = TcpStream::connect(served.addr).await?;
        stream.set_nodelay(true)?;
        let request = "GET / HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: websocket\r\n\
                       sec-websocket-version: 13\r\n\
                       sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";
        stream.write_all(request.as_bytes()).await?;
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(stream.read_u8().await?);
        }
        let head = String::from_utf8(head)?.to_lowercase();
        assert!(head.starts_with("http/1.1 101"), "{head}");
        // The example of RFC 6455, section 1.3.
        let accept = "sec-websocket-accept: s3pplmbitxaq9kygzzhzrbk+xoo=";
        assert!(head.contains(accept), "{head}");
        Ok(Client(stream))
    }

    async fn send(&mut self, frames: &[u8]) -> Check {
        Ok(self.0.write_all(frames).await?)
    }

    /// The first byte of the next frame, and its payload.
    async fn receive(&mut self) -> Check<(u8, Vec<u8>)> {
        let first = self.0.read_u8().await?;
        let count = match self.0.read_u8().await? {
            126 => usize::from(self.0.read_u16().await?),
            // A set first bit would be that of a masked frame, which no server sends.
            short => usize::from(short),
        };
        let mut payload = vec![0; count];
        self.0.read_exact(&mut payload).await?;
        Ok((first, payload))
    }

    /// Expects that the server closes with `code`, and ends the stream.
    async fn ends_with(mut self, code: u16, why: &str) -> Check {
        let closed = self.receive().await?;
        assert_eq!(closed, (LAST | CLOSE, code.to_be_bytes().to_vec()), "{why}");
        assert_eq!(self.0.read(&mut [0]).await?, 0, "{why}: the stream ends");
        Ok(())
    }
}

/// A masked frame, as a client has to send it.
fn frame(first: u8, payload: &[u8]) -> Vec<u8> {
    const MASK: [u8; 4] = [0x37, 0xfa, 0x21, 0x3d];
    let mut frame = vec![first];
    match u8::try_from(payload.len()) {
        Ok(count @ 0..126) => frame.push(0x80 | count),
        _ => {
            let count = u16::try_from(payload.len()).expect("a short payload");
            frame.push(0x80 | 126);
            frame.extend_from_slice(&count.to_be_bytes());
        }
    }
    frame.extend_from_slice(&MASK);
    frame.extend(payload.iter().zip(MASK.iter().cycle()).map(|(byte, mask)| byte ^ mask));
    frame
}

pub(crate) async fn pings_are_answered_with_their_payload(backend: Backend) -> Check {
    let served = serve_echo(backend)?;
    let mut client = Client::new(&served).await?;
    for size in [0, 1, 125] {
        client.send(&frame(LAST | PING, &pattern(size))).await?;
        assert_eq!(client.receive().await?, (LAST | PONG, pattern(size)));
    }
    // A pong that nobody has asked for has no answer (section 5.5.3).
    client.send(&frame(LAST | PONG, b"unasked")).await?;
    client.send(&frame(LAST | BINARY, b"next")).await?;
    assert_eq!(client.receive().await?, (LAST | BINARY, b"next".to_vec()));
    drop(client);
    served.end().await
}

pub(crate) async fn a_character_may_be_split_between_fragments_around_a_ping(
    backend: Backend,
) -> Check {
    let served = serve_echo(backend)?;
    let mut client = Client::new(&served).await?;
    let text = "κόσμε 😀".as_bytes();
    for at in 0..=text.len() {
        client.send(&frame(TEXT, &text[..at])).await?;
        client.send(&frame(LAST | PING, b"between")).await?;
        client.send(&frame(0, b"")).await?;
        client.send(&frame(LAST, &text[at..])).await?;
        assert_eq!(client.receive().await?, (LAST | PONG, b"between".to_vec()));
        assert_eq!(client.receive().await?, (LAST | TEXT, text.to_vec()), "split at {at}");
    }
    drop(client);
    served.end().await
}

pub(crate) async fn frames_may_come_byte_by_byte(backend: Backend) -> Check {
    let served = serve_echo(backend)?;
    let mut client = Client::new(&served).await?;
    let bytes = pattern(300);
    let frames = [frame(BINARY, &bytes[..150]), frame(LAST, &bytes[150..])].concat();
    for byte in frames {
        client.send(&[byte]).await?;
        tokio::task::yield_now().await;
    }
    assert_eq!(client.receive().await?, (LAST | BINARY, bytes));
    drop(client);
    served.end().await
}

pub(crate) async fn violations_end_the_connection_with_their_code(backend: Backend) -> Check {
    let half = [b'x'; MESSAGE_BYTES_MAX / 2 + 1];
    let violations = [
        ("not masked", vec![LAST | TEXT, 2, b'h', b'i'], 1002),
        ("a reserved bit", frame(LAST | RESERVED_BIT | TEXT, b"hi"), 1002),
        ("a reserved kind of message", frame(LAST | 0x3, b"hi"), 1002),
        ("a reserved kind of control", frame(LAST | 0xb, b"hi"), 1002),
        ("nothing to continue", frame(LAST, b"hi"), 1002),
        ("a message in another", [frame(TEXT, b"a"), frame(LAST | TEXT, b"b")].concat(), 1002),
        ("a long ping", frame(LAST | PING, &pattern(126)), 1002),
        ("a fragmented ping", frame(PING, b"hi"), 1002),
        ("half a code", frame(LAST | CLOSE, &[3]), 1002),
        ("no UTF-8", frame(LAST | TEXT, b"\xce\xba\xff"), 1007),
        ("no UTF-8 at the end", [frame(TEXT, b"a"), frame(LAST, b"\xf0\x9f")].concat(), 1007),
        ("too large", [frame(BINARY, &half), frame(LAST, &half)].concat(), 1009),
    ];
    let served = serve_echo(backend)?;
    for (why, frames, code) in violations {
        let mut client = Client::new(&served).await?;
        client.send(&frames).await?;
        client.ends_with(code, why).await?;
    }
    served.end().await
}

pub(crate) async fn valid_codes_of_a_close_are_echoed_and_others_are_errors(
    backend: Backend,
) -> Check {
    let served = serve_echo(backend)?;
    for code in [1000_u16, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 3000, 3999, 4000, 4999] {
        let mut client = Client::new(&served).await?;
        client.send(&frame(LAST | CLOSE, &code.to_be_bytes())).await?;
        client.ends_with(code, "a valid code").await?;
    }
    // Section 7.4: these codes must not be sent.
    for code in [0_u16, 999, 1004, 1005, 1006, 1015, 1016, 2999, 5000] {
        let mut client = Client::new(&served).await?;
        client.send(&frame(LAST | CLOSE, &code.to_be_bytes())).await?;
        let (first, payload) = client.receive().await?;
        let answered = (first, u16::from_be_bytes([payload[0], payload[1]]));
        assert_eq!(answered, (LAST | CLOSE, 1002), "{code}");
        assert_eq!(client.0.read(&mut [0]).await?, 0, "{code}: the stream ends");
    }
    let mut client = Client::new(&served).await?;
    client.send(&frame(LAST | CLOSE, b"")).await?;
    assert_eq!(client.receive().await?, (LAST | CLOSE, Vec::new()), "no code");
    assert_eq!(client.0.read(&mut [0]).await?, 0);
    served.end().await
}
