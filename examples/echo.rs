// cargo run --release --example echo -- 127.0.0.1:8972
//! Sends back what arrives. Without an address it takes a free port and prints it.

use ringpoll::{Connection, Result, Server};

fn main() -> Result<()> {
    let addr = std::env::args().nth(1).unwrap_or_else(|| "127.0.0.1:0".to_string());
    let server = Server::builder()
        .on_request(echo)
        .on_error(|peer, error| eprintln!("{}: {error}", peer.peer_addr()))
        .bind(&addr)?;
    println!("listening on {}", server.local_addr());
    server.serve()
}

/// Runs whenever a connection has input, once at a time per connection, and again while input is
/// left. The bytes move from the reader to the writer; none is copied.
async fn echo(mut conn: Connection) -> Result<()> {
    let ready = conn.readable().await?;
    let bytes = conn.slice(ready).await?;
    conn.append(bytes)?;
    // Returns when the kernel has every byte: a peer that does not read its answers stops its own
    // handler here, and its input stops at the watermark.
    conn.flush().await
}
