// cargo run --release --example proxy -- 127.0.0.1:8080 127.0.0.1:8972
//! A TCP proxy: what comes in on LISTEN goes to UPSTREAM and back. The bytes stay in the blocks
//! they were received into; only references to them move from one connection to the other.

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use ringpoll::{Connection, Dialer, Error, ReadHalf, Result, Server, WriteHalf};

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let (Some(listen), Some(upstream)) = (args.next(), args.next()) else {
        return Err(Error::other("usage: proxy LISTEN UPSTREAM"));
    };
    let upstream: Arc<str> = upstream.into();
    let server = Server::builder()
        .on_connect(move |client| relay(client, Arc::clone(&upstream)))
        .on_error(|peer, error| eprintln!("{}: {error}", peer.peer_addr()))
        .bind(&listen)?;
    println!("listening on {}", server.local_addr());
    server.serve()
}

/// One client's whole life. It ends when both directions have ended; an error in one of them
/// drops both connections, and dropping closes them.
async fn relay(client: Connection, upstream: Arc<str>) -> Result<()> {
    let upstream = Dialer::new().timeout(DIAL_TIMEOUT).connect(&upstream).await?;
    let (from_client, to_client) = client.split();
    let (from_upstream, to_upstream) = upstream.split();
    both(forward(from_client, to_upstream), forward(from_upstream, to_client)).await
}

/// Moves bytes one way until the sender is done, then says so to the receiver. The other
/// direction goes on: a client may end its request and still read the answer.
async fn forward(mut from: ReadHalf, mut to: WriteHalf) -> Result<()> {
    loop {
        // No byte is ready only at the end of the stream.
        let ready = from.readable().await?;
        if ready == 0 {
            return to.shutdown_write().await;
        }
        let bytes = from.slice(ready.min(CHUNK_BYTES_MAX)).await?;
        to.append(bytes)?;
        // Waiting here is the back-pressure: nothing more is taken from `from` until `to` has
        // taken this, so a slow receiver slows its sender down and memory stays flat.
        to.flush().await?;
    }
}

/// Runs two futures side by side, until both have ended or one has failed.
async fn both(
    one: impl Future<Output = Result<()>>,
    other: impl Future<Output = Result<()>>,
) -> Result<()> {
    let (mut one, mut other) = (pin!(one), pin!(other));
    let (mut one_ended, mut other_ended) = (false, false);
    poll_fn(|context| {
        if !one_ended && let Poll::Ready(result) = one.as_mut().poll(context) {
            result?;
            one_ended = true;
        }
        if !other_ended && let Poll::Ready(result) = other.as_mut().poll(context) {
            result?;
            other_ended = true;
        }
        if one_ended && other_ended { Poll::Ready(Ok(())) } else { Poll::Pending }
    })
    .await
}

const DIAL_TIMEOUT: Duration = Duration::from_secs(5);

/// What one turn moves at most, so that a fast sender cannot fill the output in one go.
const CHUNK_BYTES_MAX: usize = 256 * 1024;
