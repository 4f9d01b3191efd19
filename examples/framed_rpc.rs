// cargo run --release --example framed_rpc
//! A request/response protocol, with server and client in one file. It shows calls that succeed,
//! and requests that are unknown, unanswered or too large. The program ends by itself.
//!
//!   request   length: u32 (big-endian, of the rest) · kind: u8   · body
//!   response  length: u32 (big-endian, of the rest) · status: u8 · body

use std::time::Duration;

use ringpoll::{Connection, Dialer, Error, Result, Server, Slice};

fn main() -> Result<()> {
    let server = Server::builder()
        .on_request(answer)
        .on_error(|_, error| println!("server: closed a connection: {error}"))
        // Ends the handler of a peer that stops in the middle of a frame.
        .read_timeout(Duration::from_secs(5))
        // Ends the handler of a peer that does not read its answers.
        .write_timeout(Duration::from_secs(5))
        // Closes the connection of a peer that sends and receives nothing.
        .idle_timeout(Duration::from_secs(60))
        .connections_max(10_000)
        .bind("127.0.0.1:0")?
        .spawn()?;

    // Any executor can drive a connection. `wait` drives it on the calling thread.
    ringpoll::blocking::wait(client(&server.local_addr().to_string()))?;

    // Stops accepting, closes idle connections, waits for the busy ones until the deadline.
    server.shutdown(Duration::from_secs(5))
}

// ---- server ----

/// Answers one frame. Runs again while input is left, so a client may send many frames at once. An
/// error closes this connection only.
async fn answer(mut conn: Connection) -> Result<()> {
    let request = read_frame(&mut conn).await?;
    let body = request.slice(1..);
    match request[0] {
        UPPERCASE => write_frame(&mut conn, OK, body.to_ascii_uppercase())?,
        // A body of more than 4 KiB is sent by reference, from the block that received it.
        ECHO => write_frame(&mut conn, OK, body)?,
        FORGET => return Ok(()),
        kind => write_frame(&mut conn, FAILED, format!("unknown kind {:?}", kind as char))?,
    }
    conn.flush().await
}

// ---- client ----

async fn client(addr: &str) -> Result<()> {
    let dialer = Dialer::new().timeout(Duration::from_secs(1)).read_timeout(CALL_TIMEOUT);
    let mut conn = dialer.connect(addr).await?;

    let reply = call(&mut conn, UPPERCASE, "hello").await?;
    println!("client: {}", String::from_utf8_lossy(&reply));

    let large = vec![7; 100_000];
    let reply = call(&mut conn, ECHO, large.clone()).await?;
    println!("client: {} bytes came back, equal: {}", reply.len(), reply == large);

    // The server reports this failure as an answer, so the connection can serve the next call.
    match call(&mut conn, b'?', "").await {
        Ok(_) => return Err(Error::other("an unknown request was answered")),
        Err(error) => println!("client: {error}"),
    }

    // The client would take a late answer for the answer to its next call. So it drops the
    // connection after a timeout, which closes it.
    conn.set_read_timeout(Some(Duration::from_millis(100)));
    match call(&mut conn, FORGET, "").await {
        Err(error) if error.is_read_timeout() => println!("client: {error}"),
        other => return Err(Error::other(format!("expected a timeout, got {other:?}"))),
    }
    drop(conn);

    // A length beyond the limit ends the connection. The server allocates no memory for it.
    let mut conn = dialer.connect(addr).await?;
    conn.write_copy(&u32::MAX.to_be_bytes())?;
    conn.flush().await?;
    match read_frame(&mut conn).await {
        Err(error) if error.is_closed() => println!("client: {error}"),
        other => return Err(Error::other(format!("expected the end, got {other:?}"))),
    }
    println!("client: done");
    Ok(())
}

/// Sends one request and waits for its response, up to the connection's read timeout.
async fn call(conn: &mut Connection, kind: u8, body: impl Into<Slice>) -> Result<Slice> {
    write_frame(conn, kind, body)?;
    conn.flush().await?;
    let response = read_frame(conn).await?;
    let body = response.slice(1..);
    match response[0] {
        OK => Ok(body),
        _ => Err(Error::other(format!("server: {}", String::from_utf8_lossy(&body)))),
    }
}

// ---- frames, in both directions ----

/// A frame without its length. The bytes are not copied, unless they span two blocks.
async fn read_frame(conn: &mut Connection) -> Result<Slice> {
    // A peek leaves the header unread, so a timeout before the end of the body loses no byte.
    let mut header = [0; HEADER_BYTES];
    header.copy_from_slice(&conn.peek(HEADER_BYTES).await?);
    let length = u32::from_be_bytes(header) as usize;
    if length == 0 || length > FRAME_BYTES_MAX {
        return Err(Error::other(format!("a frame of {length} bytes, 1 MiB at most")));
    }
    let frame = conn.next(HEADER_BYTES + length).await?;
    Ok(frame.slice(HEADER_BYTES..))
}

/// Writes a frame, which `flush` sends. A body of more than 4 KiB is written by reference.
fn write_frame(conn: &mut Connection, tag: u8, body: impl Into<Slice>) -> Result<()> {
    let body = body.into();
    let length = u32::try_from(1 + body.len()).map_err(Error::other)?;
    let head = conn.reserve(HEADER_BYTES + 1)?;
    head[..HEADER_BYTES].copy_from_slice(&length.to_be_bytes());
    head[HEADER_BYTES] = tag;
    conn.write(body)
}

const HEADER_BYTES: usize = 4;
const FRAME_BYTES_MAX: usize = 1024 * 1024;
const CALL_TIMEOUT: Duration = Duration::from_secs(5);

// Requests.
const UPPERCASE: u8 = b'U';
const ECHO: u8 = b'E';
const FORGET: u8 = b'F';

// Responses.
const OK: u8 = 0;
const FAILED: u8 = 1;
