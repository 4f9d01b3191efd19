//! Large writes, which go from the writer's memory to the kernel.

use std::future::poll_fn;
use std::io::{ErrorKind, IoSlice, Read};
use std::net::{TcpListener, TcpStream};
use std::pin::Pin;
use std::task::Poll;

use ringpoll_compat::TokioStream;
use tokio::io::{AsyncWrite, AsyncWriteExt};

use crate::harness::{Check, Fixture, pattern, wait_until};

macro_rules! cases {
    ($tests:ident, $mount:ident) => {
        $tests! { $mount, direct:
            a_large_write_is_in_the_kernel_before_any_flush
            a_large_write_takes_gathered_bytes_along
            a_slow_peer_gets_every_byte_in_order
            a_peer_that_reads_nothing_costs_the_bound_and_the_socket_s_buffer
            writes_fail_after_a_reset
            what_was_only_written_is_sent_when_its_stream_or_half_is_dropped
        }
    };
}
pub(crate) use cases;

const SEND_BUFFER_BYTES: usize = 32 << 10;
/// So many bytes leave without a copy.
const LARGE: usize = 32 << 10;

/// A stream with a small socket buffer, and its peer.
async fn pair(t: &Fixture) -> Check<(TokioStream, TcpStream)> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let dialer = t.dialer().socket_buffers(0, SEND_BUFFER_BYTES);
    let conn = dialer.connect(&listener.local_addr()?.to_string()).await?;
    Ok((TokioStream::from(conn), listener.accept()?.0))
}

pub(crate) async fn a_large_write_is_in_the_kernel_before_any_flush(t: &mut Fixture) -> Check {
    let (mut stream, mut peer) = pair(t).await?;
    let bytes = pattern(LARGE);
    let pieces = [IoSlice::new(&bytes[..100]), IoSlice::new(&[]), IoSlice::new(&bytes[100..])];
    assert_eq!(stream.write_vectored(&pieces).await?, LARGE);
    let conn = stream.get_ref();
    assert_eq!((conn.pending_len(), conn.stats().sent_bytes), (0, LARGE as u64));
    let mut got = vec![0; LARGE];
    peer.read_exact(&mut got)?;
    assert!(got == bytes, "other bytes");
    Ok(())
}

pub(crate) async fn a_large_write_takes_gathered_bytes_along(t: &mut Fixture) -> Check {
    let (mut stream, mut peer) = pair(t).await?;
    let bytes = pattern(1 + LARGE);
    stream.write_all(&bytes[..1]).await?;
    let conn = stream.get_ref();
    assert_eq!((conn.pending_len(), conn.stats().sent_bytes), (1, 0));
    stream.write_all(&bytes[1..]).await?;
    assert_eq!(stream.get_ref().pending_len(), 0);
    let mut got = vec![0; bytes.len()];
    peer.read_exact(&mut got)?;
    assert!(got == bytes, "other bytes");
    Ok(())
}

pub(crate) async fn a_slow_peer_gets_every_byte_in_order(t: &mut Fixture) -> Check {
    const TOTAL: usize = 4 << 20;
    let (mut stream, mut peer) = pair(t).await?;
    let reads = tokio::task::spawn_blocking(move || {
        let (mut got, mut buffer) = (Vec::new(), [0; 3000]);
        loop {
            match peer.read(&mut buffer)? {
                0 => return Ok::<_, std::io::Error>(got),
                count => got.extend_from_slice(&buffer[..count]),
            }
            std::thread::yield_now();
        }
    });
    let bytes = pattern(TOTAL);
    let handle = stream.get_ref().handle();
    let (mut written, mut round) = (0, 0);
    while written < TOTAL {
        // The first two need no copy, but the second is larger than the socket's buffer.
        let count = [LARGE, 300_000, 100, 5000, 70_000][round % 5].min(TOTAL - written);
        let pieces: Vec<_> =
            bytes[written..written + count].chunks(7001).map(IoSlice::new).collect();
        written += stream.write_vectored(&pieces).await?;
        round += 1;
        if round % 5 == 0 {
            stream.flush().await?;
            wait_until(|| handle.stats().unsent_bytes == 0).await;
        }
    }
    stream.shutdown().await?;
    assert!(reads.await?? == bytes, "not the bytes in order");
    Ok(())
}

pub(crate) async fn a_peer_that_reads_nothing_costs_the_bound_and_the_socket_s_buffer(
    t: &mut Fixture,
) -> Check {
    let (mut stream, peer) = pair(t).await?;
    let bytes = pattern(1 << 20);
    let mut written = 0;
    // The kernel may take bytes as long as it likes: the stream then waits a second time.
    for _ in 0..2 {
        while let Some(count) = poll_fn(|cx| {
            let polled = Pin::new(&mut stream).poll_write(cx, &bytes);
            Poll::Ready(match polled {
                Poll::Ready(done) => Some(done),
                Poll::Pending => None,
            })
        })
        .await
        {
            written += count? as u64;
            let conn = stream.get_ref();
            let stats = conn.stats();
            let kept = stats.unsent_bytes as usize + conn.pending_len();
            assert!(kept <= TokioStream::OUTPUT_BYTES_MAX, "{kept} bytes are kept");
            assert_eq!(written, stats.sent_bytes + kept as u64);
        }
        let handle = stream.get_ref().handle();
        let mut seen = (0, 0);
        wait_until(|| {
            let sent = handle.stats().sent_bytes;
            seen = (sent, if sent == seen.0 { seen.1 + 1 } else { 0 });
            seen.1 == 50
        })
        .await;
    }
    drop(peer);
    Ok(())
}

pub(crate) async fn writes_fail_after_a_reset(t: &mut Fixture) -> Check {
    let (mut stream, peer) = pair(t).await?;
    stream.write_all(b"unread").await?;
    stream.flush().await?;
    let bytes = pattern(LARGE);
    let handle = stream.get_ref().handle();
    wait_until(|| handle.stats().unsent_bytes == 0).await;
    // The unread bytes make a reset of it.
    drop(peer);
    wait_until(|| !handle.is_active()).await;
    for _ in 0..2 {
        let error = loop {
            if let Err(error) = stream.write_all(&bytes).await {
                break error;
            }
        };
        let expected = [ErrorKind::BrokenPipe, ErrorKind::ConnectionReset];
        assert!(expected.contains(&error.kind()), "{error:?}");
    }
    assert!(stream.write_vectored(&[IoSlice::new(b"small")]).await.is_err());
    Ok(())
}

/// As with a socket of tokio, where a write that has returned is in the kernel.
pub(crate) async fn what_was_only_written_is_sent_when_its_stream_or_half_is_dropped(
    t: &mut Fixture,
) -> Check {
    const FEW: usize = 1000;
    let received = async |mut peer: TcpStream| -> Check<Vec<u8>> {
        let mut got = Vec::new();
        let reading = move || peer.read_to_end(&mut got).map(|_| got);
        Ok(tokio::task::spawn_blocking(reading).await??)
    };
    let (mut stream, peer) = pair(t).await?;
    stream.write_all(&pattern(FEW)).await?;
    assert_eq!(stream.get_ref().pending_len(), FEW, "nothing has submitted them");
    drop(stream);
    assert!(received(peer).await? == pattern(FEW), "dropped as a stream");

    let (stream, peer) = pair(t).await?;
    let (reader, mut writer) = stream.into_split();
    writer.write_all(&pattern(FEW)).await?;
    assert_eq!(writer.get_ref().pending_len(), FEW, "nothing has submitted them");
    drop(writer);
    drop(reader);
    assert!(received(peer).await? == pattern(FEW), "dropped as halves");

    // The caller of `into_inner` decides, as with any connection.
    let (mut stream, peer) = pair(t).await?;
    stream.write_all(&pattern(FEW)).await?;
    let conn = stream.into_inner();
    assert_eq!(conn.pending_len(), FEW);
    drop(conn);
    assert!(received(peer).await?.is_empty(), "a connection submits nothing");
    Ok(())
}
