// cargo run --release --example echo -- 127.0.0.1:8972
//! Sends every received byte back. Without an address it binds to a free port and prints it.

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

/// Runs when a connection has input, and again while input is left; one run at a time for each
/// connection. The bytes move from the reader to the writer by reference.
async fn echo(mut conn: Connection) -> Result<()> {
    let ready = conn.readable().await?;
    let bytes = conn.slice(ready).await?;
    conn.append(bytes)?;
    // Returns when the kernel has every byte. If a peer does not read its answers, its handler
    // waits at this line, and reception from it pauses at the high watermark.
    conn.flush().await
}
