// cargo run --release -p ringpoll-compat --example axum_app -- --addr 127.0.0.1:8080
//! An axum application on ringpoll, or on tokio with `--runtime tokio`. It differs in one line.
//!
//! `/` answers with text, `/json` with JSON, `/big/MIB` with a stream of so many MiB, `/upload`
//! with the number of bytes that were sent, and `/ws` is a WebSocket that echoes.

use std::convert::Infallible;
use std::error::Error;
use std::io::{Write, stdout};

use axum::body::{Body, Bytes};
use axum::extract::Path;
use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::routing::{get, post};
use axum::serve::ListenerExt;
use axum::{Json, Router};
use futures_util::{StreamExt, stream};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let addr = option("--addr").unwrap_or_else(|| "127.0.0.1:0".to_string());
    let app = Router::new()
        .route("/", get(|| async { "hello, world" }))
        .route("/json", get(|| async { Json(Greeting { message: "hello, world" }) }))
        .route("/big/{mib}", get(big))
        .route("/upload", post(upload))
        .route("/ws", get(|upgrade: WebSocketUpgrade| async { upgrade.on_upgrade(echo) }));

    match option("--runtime").as_deref() {
        None | Some("ringpoll") => {
            let server = ringpoll_compat::axum::serve(&addr, app)
                .with_graceful_shutdown(stopped()?)
                .bind()?;
            println!("listening on {}", server.local_addr());
            stdout().flush()?;
            server.await?;
        }
        Some("tokio") => {
            let listener = TcpListener::bind(&addr).await?;
            println!("listening on {}", listener.local_addr()?);
            stdout().flush()?;
            // ringpoll sets this option by itself.
            let listener = listener.tap_io(|stream| {
                let _ = stream.set_nodelay(true); // fails if the peer has gone
            });
            axum::serve(listener, app).with_graceful_shutdown(stopped()?).await?;
        }
        Some(other) => return Err(format!("--runtime {other}: use ringpoll or tokio").into()),
    }
    Ok(())
}

#[derive(serde::Serialize)]
struct Greeting {
    message: &'static str,
}

/// The body is made while it is sent: the memory for it does not depend on its size.
async fn big(Path(mib): Path<usize>) -> Body {
    static PIECE: [u8; 64 << 10] = [b'x'; 64 << 10];
    let pieces = stream::repeat(Bytes::from_static(&PIECE)).take(mib << 4);
    Body::from_stream(pieces.map(Ok::<_, Infallible>))
}

async fn upload(body: Body) -> Result<String, String> {
    let mut pieces = body.into_data_stream();
    let mut bytes = 0;
    while let Some(piece) = pieces.next().await {
        bytes += piece.map_err(|error| error.to_string())?.len();
    }
    Ok(format!("{bytes} bytes"))
}

async fn echo(mut socket: WebSocket) {
    while let Some(Ok(message)) = socket.recv().await {
        let answer = match message {
            Message::Text(_) | Message::Binary(_) => socket.send(message).await,
            // axum answers pings and closes by itself.
            _ => Ok(()),
        };
        if answer.is_err() {
            return;
        }
    }
}

/// Completes when the process is asked to end.
fn stopped() -> std::io::Result<impl Future<Output = ()> + Send> {
    let (mut interrupt, mut terminate) =
        (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    Ok(async move {
        tokio::select! {
            _ = interrupt.recv() => (),
            _ = terminate.recv() => (),
        }
    })
}

/// The value behind the argument `name`.
fn option(name: &str) -> Option<String> {
    std::env::args().skip_while(|argument| argument != name).nth(1)
}
