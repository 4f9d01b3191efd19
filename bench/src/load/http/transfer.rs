//! Large bodies, one after the other, each on a connection of its own.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use super::outcome;
use crate::error::{Failure, Result};
use crate::load::{Observer, Outcome, histogram};

/// Transfers of `mib` MiB each until the time is up, and at least one. A request is a MiB.
pub(super) fn repeat(
    mib: u64,
    duration: Duration,
    observer: &mut dyn Observer,
    mut transfer: impl FnMut() -> Result<()>,
) -> Result<Outcome> {
    let mut latency = histogram()?;
    observer.on_window_open();
    let started = Instant::now();
    loop {
        let begun = started.elapsed();
        transfer()?;
        let ended = started.elapsed();
        latency.saturating_record((ended - begun).as_nanos() as u64);
        if ended >= duration {
            break;
        }
    }
    let elapsed = started.elapsed();
    observer.on_window_close();
    let moved = latency.len() * mib;
    outcome(moved, moved << 20, elapsed, latency)
}

/// Reads the answer of `/big/MIB`, whose body is chunked, to its end.
pub(super) fn download(addr: SocketAddr, mib: u64, timeout: Duration) -> Result<()> {
    let failed = || Failure::at(format!("read /big/{mib}"));
    let mut stream = dial(addr, timeout)?;
    let request = format!("GET /big/{mib} HTTP/1.1\r\nhost: {addr}\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).map_err(failed())?;
    let mut status = [0; STATUS.len()];
    stream.read_exact(&mut status).map_err(failed())?;
    let mut piece = vec![0; PIECE_BYTES];
    let (mut bytes, mut end) = (0, Vec::new());
    loop {
        let count = stream.read(&mut piece).map_err(failed())?;
        if count == 0 {
            break;
        }
        bytes += count as u64;
        end.extend_from_slice(&piece[count.saturating_sub(LAST_CHUNK.len())..count]);
        end.drain(..end.len().saturating_sub(LAST_CHUNK.len()));
    }
    if status != *STATUS || bytes < mib << 20 || end != LAST_CHUNK {
        let status = String::from_utf8_lossy(&status);
        let what = format!("{status:?} and {bytes} bytes are not the body");
        return Err(Failure::new(format!("read /big/{mib}: {what}")));
    }
    Ok(())
}

/// Sends a body of known length to `/upload`, which answers with that length.
pub(super) fn upload(addr: SocketAddr, mib: u64, timeout: Duration) -> Result<()> {
    let failed = || Failure::at(format!("send {mib} MiB to /upload"));
    let bytes = mib << 20;
    let mut stream = dial(addr, timeout)?;
    let head = format!(
        "POST /upload HTTP/1.1\r\nhost: {addr}\r\nconnection: close\r\ncontent-length: {bytes}\r\n\
         \r\n"
    );
    stream.write_all(head.as_bytes()).map_err(failed())?;
    let piece = vec![b'x'; PIECE_BYTES];
    for _ in 0..bytes / PIECE_BYTES as u64 {
        stream.write_all(&piece).map_err(failed())?;
    }
    let mut answer = Vec::new();
    stream.take(ANSWER_BYTES_MAX).read_to_end(&mut answer).map_err(failed())?;
    if !answer.starts_with(STATUS) || !answer.ends_with(format!("\n{bytes} bytes").as_bytes()) {
        let answer = String::from_utf8_lossy(&answer);
        return Err(Failure::new(format!("send {mib} MiB to /upload: the answer is {answer:?}")));
    }
    Ok(())
}

fn dial(addr: SocketAddr, timeout: Duration) -> Result<TcpStream> {
    let failed = || Failure::at(format!("connect {addr}"));
    let stream = TcpStream::connect_timeout(&addr, timeout).map_err(failed())?;
    stream.set_read_timeout(Some(timeout)).map_err(failed())?;
    stream.set_write_timeout(Some(timeout)).map_err(failed())?;
    Ok(stream)
}

const STATUS: &[u8; 12] = b"HTTP/1.1 200";
/// The end of a chunk, and the chunk that ends the body.
const LAST_CHUNK: &[u8] = b"\r\n0\r\n\r\n";
/// A divisor of a MiB.
const PIECE_BYTES: usize = 256 << 10;
const ANSWER_BYTES_MAX: u64 = 4096;

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    const PATIENCE: Duration = Duration::from_secs(20);

    #[test]
    fn a_download_is_the_whole_body_or_a_failure() {
        let body = vec![b'x'; 1 << 20];
        let chunked = |end: &str| {
            let head = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n100000\r\n";
            [head.as_bytes(), &body, end.as_bytes()].concat()
        };
        let asked = |answer: Vec<u8>| {
            let addr = answering(0, answer);
            download(addr, 1, PATIENCE)
        };
        assert!(asked(chunked("\r\n0\r\n\r\n")).is_ok());
        assert!(asked(chunked("\r\n0\r\n")).is_err());
        assert!(asked(b"HTTP/1.1 200 OK\r\n\r\n5\r\nshort\r\n0\r\n\r\n".to_vec()).is_err());
        let refused = [&b"HTTP/1.1 404 No\r\n\r\n"[..], &chunked("\r\n0\r\n\r\n")[..]].concat();
        assert!(asked(refused).is_err());
    }

    #[test]
    fn an_upload_is_answered_with_its_length() {
        let answered = |answer: &str| {
            let addr = answering(1 << 20, answer.as_bytes().to_vec());
            upload(addr, 1, PATIENCE)
        };
        assert!(answered("HTTP/1.1 200 OK\r\n\r\n1048576 bytes").is_ok());
        assert!(answered("HTTP/1.1 200 OK\r\n\r\n1048575 bytes").is_err());
        assert!(answered("HTTP/1.1 500 No\r\n\r\n1048576 bytes").is_err());
    }

    #[test]
    fn a_transfer_counts_as_its_mebibytes() {
        let found = repeat(8, Duration::ZERO, &mut (), || Ok(())).unwrap();
        assert_eq!((found.requests, found.bytes, found.latency.len()), (8, 8 << 20, 1));
        assert!(repeat(8, Duration::ZERO, &mut (), || Err(Failure::new("no"))).is_err());
    }

    /// A server of one connection. It reads a head and so many bytes after it, and answers.
    fn answering(body_bytes: usize, answer: Vec<u8>) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut input = Vec::new();
            let mut piece = [0; 4096];
            let missing = |input: &[u8]| {
                let head = input.windows(4).position(|end| end == b"\r\n\r\n");
                head.is_none_or(|head| input.len() < head + 4 + body_bytes)
            };
            while missing(&input) {
                let count = stream.read(&mut piece).unwrap();
                assert!(count > 0, "the request ended early");
                input.extend_from_slice(&piece[..count]);
            }
            stream.write_all(&answer).unwrap();
        });
        addr
    }
}
