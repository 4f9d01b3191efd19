// cargo run --release --example proxy -- --addr 127.0.0.1:8080 --upstream 127.0.0.1:8972
//! A TCP proxy: it forwards connections to an upstream server, in both directions. Bytes stay in
//! the blocks that received them; only references move from one connection to the other.

use std::sync::Arc;
use std::time::Duration;

use ringpoll::{Connection, Dialer, Error, Result, Server, copy_bidirectional};

fn main() -> Result<()> {
    let (mut addr, mut upstream) = (None, None);
    let mut args = std::env::args().skip(1);
    while let Some(name) = args.next() {
        match name.as_str() {
            "--addr" => addr = args.next(),
            "--upstream" => upstream = args.next(),
            _ => return Err(usage()),
        }
    }
    let upstream: Arc<str> = upstream.ok_or_else(usage)?.into();
    let server = Server::builder()
        .on_connect(move |client| relay(client, Arc::clone(&upstream)))
        .on_error(|peer, error| eprintln!("{}: {error}", peer.peer_addr()))
        .bind(&addr.ok_or_else(usage)?)?;
    println!("listening on {}", server.local_addr());
    server.serve()
}

/// Serves one client until both directions have ended. A client may end its request and still read
/// the answer. An error in one direction aborts both connections.
async fn relay(mut client: Connection, upstream: Arc<str>) -> Result<()> {
    let mut upstream = Dialer::new().timeout(DIAL_TIMEOUT).connect(&upstream).await?;
    copy_bidirectional(&mut client, &mut upstream).await?;
    Ok(())
}

fn usage() -> Error {
    Error::other("usage: proxy --addr HOST:PORT --upstream HOST:PORT")
}

const DIAL_TIMEOUT: Duration = Duration::from_secs(5);
