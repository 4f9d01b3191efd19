//! WebSockets of axum, with tungstenite as the client.

use axum::Router;
use axum::extract::ws::{CloseFrame, Message, WebSocket, WebSocketUpgrade};
use axum::routing::any;
use futures_util::{SinkExt, StreamExt};
use ringpoll::Backend;
use ringpoll_compat::axum::serve;
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio_tungstenite::tungstenite::Message as Sent;
use tokio_tungstenite::tungstenite::protocol::CloseFrame as SentClose;
use tokio_tungstenite::tungstenite::protocol::frame::Frame;
use tokio_tungstenite::tungstenite::protocol::frame::coding::{CloseCode, Data, OpCode};
use tokio_tungstenite::{WebSocketStream, client_async};

use crate::apps::ANY;
use crate::harness::{Check, Served, pattern};

macro_rules! cases {
    ($tests:ident, $backend:ident) => {
        $tests! { $backend, websocket:
            messages_pings_and_fragments_are_answered
            codes_of_a_close_go_both_ways
        }
    };
}
pub(crate) use cases;

/// Echoes messages. Ends with code 1001 when it is told `bye`, and reports the code that it gets.
fn app() -> (Router, mpsc::UnboundedReceiver<Option<u16>>) {
    let (report, reports) = mpsc::unbounded_channel();
    let echo = move |mut socket: WebSocket| {
        let report = report.clone();
        async move {
            while let Some(Ok(message)) = socket.recv().await {
                let answer = match message {
                    Message::Text(text) if text == "bye" => {
                        Message::Close(Some(CloseFrame { code: 1001, reason: "away".into() }))
                    }
                    Message::Text(_) | Message::Binary(_) => message,
                    Message::Close(frame) => {
                        // Fails if the case has ended.
                        let _ = report.send(frame.map(|frame| frame.code));
                        continue;
                    }
                    Message::Ping(_) | Message::Pong(_) => continue,
                };
                if socket.send(answer).await.is_err() {
                    return;
                }
            }
        }
    };
    let upgrade = move |upgrade: WebSocketUpgrade| {
        let echo = echo.clone();
        async move { upgrade.on_upgrade(echo) }
    };
    (Router::new().route("/", any(upgrade)), reports)
}

async fn connect(served: &Served) -> Check<WebSocketStream<TcpStream>> {
    let stream = TcpStream::connect(served.addr).await?;
    Ok(client_async("ws://localhost/", stream).await?.0)
}

async fn receive(socket: &mut WebSocketStream<TcpStream>) -> Check<Sent> {
    Ok(socket.next().await.ok_or("the stream has ended")??)
}

pub(crate) async fn messages_pings_and_fragments_are_answered(backend: Backend) -> Check {
    let (app, _reports) = app();
    let served = Served::new(backend, serve(ANY, app))?;
    let mut socket = connect(&served).await?;
    for size in [0, 1, 125, 126, 70_000, 1_000_000] {
        socket.send(Sent::binary(pattern(size))).await?;
        assert!(receive(&mut socket).await? == Sent::binary(pattern(size)), "{size} bytes");
    }
    socket.send(Sent::Ping("are you there".into())).await?;
    assert_eq!(receive(&mut socket).await?, Sent::Pong("are you there".into()));

    let part = |text: &'static str, code, is_last| {
        Sent::Frame(Frame::message(text, OpCode::Data(code), is_last))
    };
    socket.send(part("in ", Data::Text, false)).await?;
    socket.send(part("three ", Data::Continue, false)).await?;
    // A ping may come between the fragments of a message (RFC 6455, section 5.4).
    socket.send(Sent::Ping("between".into())).await?;
    socket.send(part("pieces", Data::Continue, true)).await?;
    assert_eq!(receive(&mut socket).await?, Sent::Pong("between".into()));
    assert_eq!(receive(&mut socket).await?, Sent::text("in three pieces"));
    drop(socket);
    served.end().await
}

pub(crate) async fn codes_of_a_close_go_both_ways(backend: Backend) -> Check {
    let (app, mut reports) = app();
    let served = Served::new(backend, serve(ANY, app))?;
    let mut socket = connect(&served).await?;
    let close = SentClose { code: CloseCode::Library(4321), reason: "enough".into() };
    socket.close(Some(close)).await?;
    assert_eq!(reports.recv().await, Some(Some(4321)));
    match receive(&mut socket).await? {
        Sent::Close(Some(frame)) => assert_eq!(u16::from(frame.code), 4321),
        other => panic!("{other:?} in answer to a close"),
    }
    assert!(socket.next().await.is_none(), "the stream ends");

    let mut socket = connect(&served).await?;
    socket.send(Sent::text("bye")).await?;
    match receive(&mut socket).await? {
        Sent::Close(Some(frame)) => assert_eq!((frame.code, &*frame.reason), (1001.into(), "away")),
        other => panic!("{other:?} in answer to bye"),
    }
    drop(socket);
    served.end().await
}
