//! `SyncStream` against a ringpoll server, through `std`'s traits only.

use std::io::{BufRead, ErrorKind, Read, Write};
use std::thread;
use std::time::Duration;

use ringpoll::{Connection, Result, Server, ServerHandle};
use ringpoll_compat::SyncStream;

#[test]
fn what_is_written_comes_back() -> Result<()> {
    let (server, mut stream) = connected(echo)?;
    for message in ["a", "hello", ""] {
        stream.write_all(message.as_bytes())?;
        stream.flush()?;
        let mut reply = vec![0; message.len()];
        stream.read_exact(&mut reply)?;
        assert_eq!(reply, message.as_bytes());
    }
    end(server, stream)
}

#[test]
fn lines_come_back_as_lines() -> Result<()> {
    let (server, mut stream) = connected(echo)?;
    for index in 0..1000 {
        writeln!(stream, "line {index}")?;
    }
    stream.flush()?;
    for index in 0..1000 {
        let mut line = String::new();
        stream.read_line(&mut line)?;
        assert_eq!(line, format!("line {index}\n"));
    }
    end(server, stream)
}

#[test]
fn read_takes_what_fill_buf_has_shown_first() -> Result<()> {
    let (server, mut stream) = connected(echo)?;
    stream.write_all(b"abcdef")?;
    stream.flush()?;
    while stream.fill_buf()?.is_empty() {}
    stream.consume(1);
    let mut rest = [0; 5];
    stream.read_exact(&mut rest)?;
    assert_eq!(&rest, b"bcdef");
    end(server, stream)
}

#[test]
fn what_was_shown_and_not_consumed_is_handed_back() -> Result<()> {
    let (server, mut stream) = connected(echo)?;
    stream.write_all(b"abcdef")?;
    stream.flush()?;
    assert!(stream.fill_buf()?.starts_with(b"a"));
    stream.consume(1);
    let (mut connection, front) = stream.into_parts();
    let rest = connection.next(5 - front.len())?;
    assert_eq!([&front[..], &rest[..]].concat(), b"bcdef");
    drop(connection);
    server.shutdown(DEADLINE)
}

#[test]
fn nothing_leaves_before_flush_and_everything_after() -> Result<()> {
    let (server, mut stream) = connected(echo)?;
    stream.write_all(b"abc")?;
    assert_eq!(stream.get_ref().stats().sent_bytes, 0);
    assert_eq!(stream.get_ref().pending_len(), 3);
    stream.flush()?;
    assert_eq!(stream.get_ref().stats().sent_bytes, 3);
    assert_eq!(stream.get_ref().pending_len(), 0);
    end(server, stream)
}

#[test]
fn a_copy_larger_than_the_output_needs_no_flush_on_the_way() -> Result<()> {
    let (server, mut stream) = connected(count_to_the_end)?;
    let bytes = std::io::copy(&mut std::io::repeat(7).take(LARGE_BYTES), &mut stream)?;
    assert_eq!(bytes, LARGE_BYTES);
    assert!(stream.get_ref().pending_len() <= 2 * SyncStream::OUTPUT_BYTES_MAX);
    stream.flush()?;
    stream.get_mut().shutdown_write()?;
    let mut reply = String::new();
    stream.read_to_string(&mut reply)?;
    assert_eq!(reply, LARGE_BYTES.to_string());
    end(server, stream)
}

#[test]
fn the_end_of_the_stream_reads_as_zero() -> Result<()> {
    let (server, mut stream) = connected(echo)?;
    stream.write_all(b"bye")?;
    stream.flush()?;
    stream.get_mut().shutdown_write()?;
    let mut reply = Vec::new();
    stream.read_to_end(&mut reply)?;
    assert_eq!(reply, b"bye");
    assert_eq!(stream.read(&mut [0; 8])?, 0);
    assert!(stream.fill_buf()?.is_empty());
    end(server, stream)
}

#[test]
fn a_read_timeout_is_timed_out_and_loses_nothing() -> Result<()> {
    let (server, mut stream) = connected(echo)?;
    stream.get_ref().set_read_timeout(Some(Duration::from_millis(30)));
    let error = stream.read(&mut [0; 8]).expect_err("nothing was sent");
    assert_eq!(error.kind(), ErrorKind::TimedOut);
    let error = stream.fill_buf().expect_err("nothing was sent");
    assert_eq!(error.kind(), ErrorKind::TimedOut);

    stream.get_ref().set_read_timeout(Some(DEADLINE));
    stream.write_all(b"later")?;
    stream.flush()?;
    let mut reply = [0; 5];
    stream.read_exact(&mut reply)?;
    assert_eq!(&reply, b"later");
    end(server, stream)
}

#[test]
fn a_write_timeout_is_timed_out() -> Result<()> {
    let (server, mut stream) = connected(read_nothing)?;
    stream.get_ref().set_write_timeout(Some(Duration::from_millis(50)));
    // More than the peer's input and the socket buffers hold, so that some flush has to wait.
    let error = std::io::copy(&mut std::io::repeat(7), &mut stream).expect_err("nobody reads");
    assert_eq!(error.kind(), ErrorKind::TimedOut);
    drop(stream);
    // The server keeps input that its handler left unread, so there is something to cut.
    server.shutdown_forced(Duration::from_millis(50)).map(|_| ())
}

#[test]
fn a_stream_of_our_own_that_was_closed_is_not_connected() -> Result<()> {
    let (server, mut stream) = connected(echo)?;
    stream.get_ref().close();
    let error = stream.write_all(b"x").and_then(|()| stream.flush()).expect_err("it is closed");
    assert_eq!(error.kind(), ErrorKind::NotConnected);
    end(server, stream)
}

#[test]
fn a_stream_moves_to_another_thread() -> Result<()> {
    let (server, mut stream) = connected(echo)?;
    let stream = thread::spawn(move || -> Result<SyncStream> {
        stream.write_all(b"abc")?;
        stream.flush()?;
        let mut reply = [0; 3];
        stream.read_exact(&mut reply)?;
        Ok(stream)
    });
    end(server, stream.join().expect("no panic")?)
}

/// A server with this handler, and a stream connected to it.
fn connected<H, F>(handler: H) -> Result<(ServerHandle, SyncStream)>
where
    H: Fn(Connection) -> F + Send + Sync + 'static,
    F: Future<Output = Result<()>> + Send + 'static,
{
    let server = Server::builder().on_request(handler).bind("127.0.0.1:0")?.spawn()?;
    let connection = ringpoll::blocking::connect(&server.local_addr().to_string())?;
    connection.set_read_timeout(Some(DEADLINE));
    connection.set_write_timeout(Some(DEADLINE));
    Ok((server, SyncStream::from(connection)))
}

fn end(server: ServerHandle, stream: SyncStream) -> Result<()> {
    drop(stream);
    server.shutdown(DEADLINE)
}

async fn echo(mut conn: Connection) -> Result<()> {
    let ready = conn.readable().await?;
    let bytes = conn.slice(ready).await?;
    conn.append(bytes)?;
    conn.flush().await
}

/// Answers with the number of bytes, once the peer has ended its stream.
async fn count_to_the_end(mut conn: Connection) -> Result<()> {
    let mut total = 0u64;
    loop {
        let ready = conn.readable().await?;
        if ready == 0 {
            break;
        }
        conn.skip(ready).await?;
        total += ready as u64;
    }
    conn.write(total.to_string())?;
    conn.flush().await
}

/// Leaves its input where it is.
async fn read_nothing(_: Connection) -> Result<()> {
    Ok(())
}

const LARGE_BYTES: u64 = 8 * 1024 * 1024;
const DEADLINE: Duration = Duration::from_secs(20);
