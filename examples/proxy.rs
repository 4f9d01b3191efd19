// cargo run --release --example proxy -- 127.0.0.1:8080 127.0.0.1:8972
//! A TCP proxy: it forwards connections from LISTEN to UPSTREAM, in both directions. Bytes stay in
//! the blocks that received them; only references move from one connection to the other.

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

/// Serves one client until both directions have ended. An error in one of them drops both
/// connections, which closes them.
async fn relay(client: Connection, upstream: Arc<str>) -> Result<()> {
    let upstream = Dialer::new().timeout(DIAL_TIMEOUT).connect(&upstream).await?;
    let (from_client, to_client) = client.split();
    let (from_upstream, to_upstream) = upstream.split();
    both(forward(from_client, to_upstream), forward(from_upstream, to_client)).await
}

/// Moves bytes in one direction until the sender ends its stream, then ends the stream to the
/// receiver. The other direction continues: a client may end its request and still read the answer.
async fn forward(mut from: ReadHalf, mut to: WriteHalf) -> Result<()> {
    loop {
        // 0 bytes are ready only at the end of the stream.
        let ready = from.readable().await?;
        if ready == 0 {
            return to.shutdown_write().await;
        }
        let bytes = from.slice(ready.min(CHUNK_BYTES_MAX)).await?;
        to.append(bytes)?;
        // This wait is the back-pressure: no more bytes are read from `from` until the kernel has
        // accepted these, so a slow receiver slows its sender down, and memory stays bounded.
        to.flush().await?;
    }
}

/// Runs two futures concurrently, until both have ended or one has failed.
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

/// The largest number of bytes that are moved at once. It bounds the output of a fast sender.
const CHUNK_BYTES_MAX: usize = 256 * 1024;
