// cargo run --release --example mux_rpc
//! Concurrent calls over shared connections. The server runs the requests of a connection side by
//! side and answers in the order of completion. The program ends by itself.
//!
//!   request and answer  length: u32 (of the rest) · number: u32 · body

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use ringpoll::rpc::{Client, LengthPrefixed, serve_calls};
use ringpoll::{Error, Handle, Result, Server, Slice, blocking};
use tokio::sync::watch;

fn main() -> Result<()> {
    let value = Arc::new(watch::Sender::new(None));
    let handler = move |request, _: Handle| answer(request, Arc::clone(&value));
    let server = Server::builder()
        .on_connect(serve_calls(LengthPrefixed::new(), handler))
        .bind("127.0.0.1:0")?
        .spawn()?;

    let client = Client::builder(LengthPrefixed::new())
        .call_timeout(Duration::from_secs(5))
        .connect(&server.local_addr().to_string())?;
    thread::scope(|scope| {
        // This call is answered after another call has stored the value. So it succeeds only if the
        // server runs both concurrently.
        let get = scope.spawn(|| call(&client, "get"));
        let echo = |thread| {
            let client = &client;
            scope.spawn(move || (0..100).try_for_each(|number| echo(client, thread, number)))
        };
        let echoes: Vec<_> = (0..8).map(echo).collect();
        for echo in echoes {
            echo.join().expect("does not panic")?;
        }
        println!("client: 800 calls came back");
        call(&client, "put hello")?;
        println!("client: got {}", get.join().expect("does not panic")?);
        Ok::<(), Error>(())
    })?;
    blocking::wait(client.close());
    println!("client: done");
    server.shutdown(Duration::from_secs(5))
}

async fn answer(request: Slice, value: Arc<watch::Sender<Option<String>>>) -> Result<Slice> {
    if let Some(new) = request.strip_prefix(b"put ") {
        value.send_replace(Some(String::from_utf8_lossy(new).into_owned()));
        return Ok(Slice::new());
    }
    if request != b"get" {
        return Ok(request);
    }
    let mut changes = value.subscribe();
    let found = changes.wait_for(Option::is_some).await.map_err(Error::other)?;
    Ok(Slice::from(found.clone().unwrap_or_default()))
}

fn call(client: &Client<LengthPrefixed>, request: &str) -> Result<String> {
    let answer = blocking::wait(client.call(Slice::from(request.to_owned())))?;
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

fn echo(client: &Client<LengthPrefixed>, thread: usize, number: usize) -> Result<()> {
    let request = format!("call {number} of thread {thread}");
    let answer = call(client, &request)?;
    match answer == request {
        true => Ok(()),
        false => Err(Error::other(format!("asked {request:?}, got {answer:?}"))),
    }
}
