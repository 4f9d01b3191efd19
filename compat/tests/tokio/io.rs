//! Plain reads and writes, and the helpers of tokio.

use std::future::poll_fn;
use std::io::{ErrorKind, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use ringpoll::ServerHandle;
use ringpoll_compat::TokioStream;
use tokio::io::{
    AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader, copy,
    copy_bidirectional, copy_buf,
};
use tokio::sync::Notify;

use crate::harness::{Check, Fixture, pattern};

macro_rules! cases {
    ($tests:ident, $mount:ident) => {
        $tests! { $mount, io:
            copy_between_owned_halves_echoes
            copy_of_what_is_buffered_echoes
            copy_bidirectional_forwards_and_half_closes
            halves_of_tokio_s_own_split_work_from_two_tasks
            lines_come_from_the_stream_itself
            a_buffered_reader_on_top_changes_nothing
            what_was_shown_and_not_consumed_is_handed_back
            a_vectored_write_takes_every_piece
            a_question_that_was_not_flushed_is_sent_before_the_answer_is_awaited
            writes_wait_for_a_peer_that_does_not_read
            a_writing_half_has_its_streams_bound_or_its_own
            peers_that_do_not_read_cost_no_more_than_the_bound_each
            a_flush_does_not_wait_for_the_peer_and_a_shutdown_does
            what_was_flushed_and_shut_down_outlives_the_stream
            a_connection_that_failed_fails_writes_flushes_and_shutdowns
            reads_that_are_given_up_lose_nothing
            timeouts_are_timed_out_and_lose_nothing
            a_stream_that_was_closed_is_not_connected
        }
    };
}
pub(crate) use cases;

const SIZE: usize = 1 << 20;

async fn echo(stream: TokioStream) -> Check {
    let (mut reader, mut writer) = stream.into_split();
    copy(&mut reader, &mut writer).await?;
    Ok(writer.shutdown().await?)
}

/// Answers with the number of bytes, once the peer has ended its stream.
async fn count_to_the_end(mut stream: TokioStream) -> Check {
    let count = copy(&mut stream, &mut tokio::io::sink()).await?;
    stream.write_all(count.to_string().as_bytes()).await?;
    Ok(stream.shutdown().await?)
}

/// Sends the pattern, ends the stream, and demands the pattern back; both at once.
async fn exchange(
    mut reader: impl AsyncRead + Send + Unpin + 'static,
    mut writer: impl AsyncWrite + Send + Unpin + 'static,
) -> Check {
    let writing = tokio::spawn(async move {
        writer.write_all(&pattern(SIZE)).await?;
        writer.shutdown().await
    });
    let reading = tokio::spawn(async move {
        let mut got = Vec::new();
        reader.read_to_end(&mut got).await?;
        Ok::<_, std::io::Error>(got)
    });
    writing.await??;
    assert!(reading.await?? == pattern(SIZE), "not what was sent");
    Ok(())
}

pub(crate) async fn copy_between_owned_halves_echoes(t: &mut Fixture) -> Check {
    let server = t.serve(echo)?;
    for _ in 0..3 {
        let (reader, writer) = t.dial(&server).await?.into_split();
        exchange(reader, writer).await?;
    }
    Ok(())
}

pub(crate) async fn copy_of_what_is_buffered_echoes(t: &mut Fixture) -> Check {
    let server = t.serve(async |stream| {
        let (mut reader, mut writer) = stream.into_split();
        copy_buf(&mut reader, &mut writer).await?;
        Ok(writer.shutdown().await?)
    })?;
    let (reader, writer) = t.dial(&server).await?.into_split();
    exchange(reader, writer).await
}

/// A proxy: the upstream answers after the client's end, which therefore has to get through.
pub(crate) async fn copy_bidirectional_forwards_and_half_closes(t: &mut Fixture) -> Check {
    let behind = t.serve(count_to_the_end)?;
    let (dialer, addr) = (t.dialer(), behind.local_addr().to_string());
    let proxy = t.serve(move |mut client| {
        let (dialer, addr) = (dialer.clone(), addr.clone());
        async move {
            let mut upstream = TokioStream::from(dialer.connect(&addr).await?);
            let (up, down) = copy_bidirectional(&mut client, &mut upstream).await?;
            assert_eq!((up, down), (SIZE as u64, SIZE.to_string().len() as u64));
            Ok(())
        }
    })?;
    let mut stream = t.dial(&proxy).await?;
    stream.write_all(&pattern(SIZE)).await?;
    stream.shutdown().await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    assert_eq!(answer, SIZE.to_string());
    Ok(())
}

pub(crate) async fn halves_of_tokio_s_own_split_work_from_two_tasks(t: &mut Fixture) -> Check {
    let server = t.serve(async |stream| {
        let (mut reader, mut writer) = tokio::io::split(stream);
        copy(&mut reader, &mut writer).await?;
        Ok(writer.shutdown().await?)
    })?;
    let (reader, writer) = tokio::io::split(t.dial(&server).await?);
    exchange(reader, writer).await
}

pub(crate) async fn lines_come_from_the_stream_itself(t: &mut Fixture) -> Check {
    let server = t.serve(async |stream| {
        let (reader, mut writer) = stream.into_split();
        let mut lines = reader.lines();
        while let Some(line) = lines.next_line().await? {
            writer.write_all(format!("<{line}>\n").as_bytes()).await?;
        }
        Ok(writer.shutdown().await?)
    })?;
    let (reader, mut writer) = t.dial(&server).await?.into_split();
    let long = "x".repeat(100_000);
    for index in 0..500 {
        writer.write_all(format!("line {index}\n").as_bytes()).await?;
    }
    writer.write_all(format!("{long}\nthe end").as_bytes()).await?;
    writer.shutdown().await?;
    let mut lines = reader.lines();
    for index in 0..500 {
        assert_eq!(lines.next_line().await?, Some(format!("<line {index}>")));
    }
    assert_eq!(lines.next_line().await?, Some(format!("<{long}>")));
    assert_eq!(lines.next_line().await?.as_deref(), Some("<the end>"));
    assert_eq!(lines.next_line().await?, None);
    Ok(())
}

pub(crate) async fn a_buffered_reader_on_top_changes_nothing(t: &mut Fixture) -> Check {
    let server = t.serve(echo)?;
    let (reader, mut writer) = t.dial(&server).await?.into_split();
    writer.write_all(b"one\ntwo\n").await?;
    writer.shutdown().await?;
    let mut lines = BufReader::new(reader).lines();
    assert_eq!(lines.next_line().await?.as_deref(), Some("one"));
    assert_eq!(lines.next_line().await?.as_deref(), Some("two"));
    assert_eq!(lines.next_line().await?, None);
    Ok(())
}

pub(crate) async fn what_was_shown_and_not_consumed_is_handed_back(t: &mut Fixture) -> Check {
    let server = t.serve(echo)?;
    let mut stream = t.dial(&server).await?;
    stream.write_all(b"abcdef").await?;
    stream.flush().await?;
    while stream.fill_buf().await?.len() < 6 {
        tokio::task::yield_now().await;
    }
    stream.consume(1);
    assert_eq!(stream.fill_buf().await?, b"bcdef");
    let mut two = [0; 2];
    stream.read_exact(&mut two).await?;
    assert_eq!(&two, b"bc");
    assert_eq!(stream.into_inner().next(3).await?, "def");
    Ok(())
}

pub(crate) async fn a_vectored_write_takes_every_piece(t: &mut Fixture) -> Check {
    let server = t.serve(count_to_the_end)?;
    let mut stream = t.dial(&server).await?;
    assert!(stream.is_write_vectored());
    let bytes = pattern(200_000);
    let pieces: Vec<_> = bytes.chunks(777).map(IoSlice::new).collect();
    assert_eq!(stream.write_vectored(&pieces).await?, bytes.len());
    assert_eq!(stream.write_vectored(&[IoSlice::new(b""); 2]).await?, 0);
    // More than a block's worth leaves by itself.
    assert_eq!(stream.get_ref().pending_len(), 0);
    stream.write_all(b"!").await?;
    assert_eq!(stream.get_ref().pending_len(), 1);
    stream.shutdown().await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    assert_eq!(answer, (bytes.len() + 1).to_string());
    Ok(())
}

pub(crate) async fn a_question_that_was_not_flushed_is_sent_before_the_answer_is_awaited(
    t: &mut Fixture,
) -> Check {
    let server = t.serve(async |mut stream| {
        let mut question = [0; 8];
        while stream.read_exact(&mut question).await.is_ok() {
            stream.write_all(&question).await?;
        }
        Ok(())
    })?;
    let mut stream = t.dial(&server).await?;
    for round in 0_u64..50 {
        stream.write_all(&round.to_be_bytes()).await?;
        assert_eq!(stream.read_u64().await?, round);
    }
    Ok(())
}

pub(crate) async fn writes_wait_for_a_peer_that_does_not_read(t: &mut Fixture) -> Check {
    // More than the limit, what the server receives for a handler that does not read, and the
    // buffers of the kernel: so writes have to wait.
    const TOTAL: usize = 4 << 20;
    const LIMIT: usize = 1 << 20;
    // What the stream is told, if anything; what its connection is; which of them counts.
    let settings = [
        (None, 200_000, 200_000),
        (None, LIMIT, TokioStream::OUTPUT_BYTES_MAX),
        (Some(30_000), LIMIT, 30_000),
        (Some(0), LIMIT, LIMIT),
        (Some(usize::MAX), LIMIT, LIMIT),
    ];
    for (told, limit, bound) in settings {
        let (server, gate) = gated(t)?;
        let dialer = t.dialer().output_bytes_max(limit).socket_buffers(0, SEND_BUFFER_BYTES);
        let conn = dialer.connect(&server.local_addr().to_string()).await?;
        let stream = TokioStream::from(conn);
        let mut stream = match told {
            Some(bytes) => stream.with_output_bytes_max(bytes),
            None => stream,
        };
        // Larger ones are not gathered.
        let piece = pattern(20_000);
        let (mut sent, mut peak) = (0, 0);
        while sent < TOTAL {
            let part = &piece[..piece.len().min(TOTAL - sent)];
            sent += poll_fn(|cx| {
                let polled = Pin::new(&mut stream).poll_write(cx, part);
                if polled.is_pending() && peak >= bound / 2 {
                    // One more would have to wait as well; now there is reason to read.
                    gate.notify_one();
                }
                polled
            })
            .await?;
            let conn = stream.get_ref();
            peak = peak.max(conn.stats().unsent_bytes as usize + conn.pending_len());
        }
        assert!((bound / 2..=bound).contains(&peak), "{peak} bytes wait of {bound}");
        stream.shutdown().await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        assert_eq!(answer, TOTAL.to_string());
    }
    Ok(())
}

pub(crate) async fn a_writing_half_has_its_streams_bound_or_its_own(t: &mut Fixture) -> Check {
    const FEW: usize = 30_000;
    const MORE: usize = 100_000;
    let (server, gate) = gated(t)?;
    let dialer = t.dialer().socket_buffers(0, SEND_BUFFER_BYTES);
    let conn = dialer.connect(&server.local_addr().to_string()).await?;
    let stream = TokioStream::from(conn).with_output_bytes_max(FEW);
    let (mut reader, mut writer) = stream.into_split();
    let mut taken = 0;
    for bound in [FEW, MORE] {
        taken += fill(&mut writer).await?;
        let conn = writer.get_ref();
        let waiting = conn.stats().unsent_bytes as usize + conn.pending_len();
        assert!((bound / 2..=bound).contains(&waiting), "{waiting} bytes wait of {bound}");
        writer = writer.with_output_bytes_max(MORE);
    }
    gate.notify_one();
    writer.shutdown().await?;
    let mut answer = String::new();
    reader.read_to_string(&mut answer).await?;
    assert_eq!(answer, taken.to_string());
    Ok(())
}

/// Far less than a stream keeps.
const SEND_BUFFER_BYTES: usize = 8 << 10;

/// A stream that tells, of its last write, whether it had to wait.
struct Watched {
    stream: TokioStream,
    waits: Arc<AtomicBool>,
}

impl AsyncWrite for Watched {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        let this = self.get_mut();
        let polled = Pin::new(&mut this.stream).poll_write(cx, bytes);
        let conn = this.stream.get_ref();
        let waiting = conn.stats().unsent_bytes as usize + conn.pending_len();
        assert!(waiting <= BOUND, "{waiting} bytes wait for the peer");
        this.waits.store(polled.is_pending(), Ordering::Release);
        polled
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
}

/// What a stream keeps for a peer that does not read, unless it is told otherwise.
const BOUND: usize = TokioStream::OUTPUT_BYTES_MAX;

pub(crate) async fn peers_that_do_not_read_cost_no_more_than_the_bound_each(
    t: &mut Fixture,
) -> Check {
    const PEERS: usize = 20;
    // A part of one block for each peer, and what its handler reads into.
    const SLACK: usize = 64 << 10;
    let (sends, mut copies) = tokio::sync::mpsc::unbounded_channel();
    let builder = t.builder().socket_buffers(0, 64 << 10).on_connect(move |conn| {
        let (handle, waits) = ((*conn).clone(), Arc::<AtomicBool>::default());
        let mut watched = Watched { stream: conn.into(), waits: Arc::clone(&waits) };
        sends.send((handle, waits)).expect("the case goes on");
        async move {
            let copied = copy(&mut tokio::io::repeat(7), &mut watched).await;
            copied.expect_err("the peer has gone");
            Ok(())
        }
    });
    let server = t.spawn(builder)?;
    let (mut peers, mut known) = (Vec::new(), Vec::new());
    for _ in 0..PEERS {
        peers.push(std::net::TcpStream::connect(server.local_addr().to_string())?);
        known.push(copies.recv().await.expect("the server goes on"));
    }
    let mut seen = (0, 0);
    // The kernel has taken what it takes once nothing moves between so many looks.
    while seen.1 < 100 {
        tokio::time::sleep(Duration::from_millis(1)).await;
        assert!(known.iter().all(|(handle, _)| handle.is_active()), "a copy has ended");
        let all_wait = known.iter().all(|(_, waits)| waits.load(Ordering::Acquire));
        let sent = known.iter().map(|(handle, _)| handle.stats().sent_bytes).sum::<u64>();
        seen = (sent, if all_wait && sent == seen.0 { seen.1 + 1 } else { 0 });
    }
    let unsent = known.iter().map(|(handle, _)| handle.stats().unsent_bytes).sum::<u64>();
    assert!(unsent <= (PEERS * BOUND) as u64, "{unsent} bytes wait for {PEERS} peers");
    let block_bytes = server.stats().pollers.block_bytes;
    assert!(block_bytes <= (PEERS * (BOUND + SLACK)) as u64, "{block_bytes} bytes of blocks");
    drop(peers);
    // That all of it is given back is looked at afterwards.
    Ok(())
}

/// A peer that reads once the gate opens, and then answers with the number of bytes.
fn gated(t: &mut Fixture) -> Check<(ServerHandle, Arc<Notify>)> {
    let gate = Arc::new(Notify::new());
    let opened = Arc::clone(&gate);
    let server = t.serve(move |stream| {
        let gate = Arc::clone(&opened);
        async move {
            gate.notified().await;
            count_to_the_end(stream).await
        }
    })?;
    Ok((server, gate))
}

/// Writes until the kernel has taken what it takes for a peer that does not read, and writes have
/// to wait; returns how many bytes were taken.
async fn fill(writer: &mut (impl AsyncWrite + Unpin)) -> Check<usize> {
    let (piece, mut taken, mut waits) = (pattern(10_000), 0, 0);
    // The poller, and the kernel's buffers that grow, make room again after a first wait.
    while waits < 50 {
        match poll_fn(|cx| Poll::Ready(Pin::new(&mut *writer).poll_write(cx, &piece))).await {
            Poll::Ready(count) => (taken, waits) = (taken + count?, 0),
            Poll::Pending => waits += 1,
        }
        assert!(taken < 1 << 30, "the kernel took {taken} bytes that nobody read");
        if waits > 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        // The budget of a task makes writes wait as well.
        tokio::task::yield_now().await;
    }
    Ok(taken)
}

pub(crate) async fn a_flush_does_not_wait_for_the_peer_and_a_shutdown_does(
    t: &mut Fixture,
) -> Check {
    let (server, gate) = gated(t)?;
    let mut stream = t.dial(&server).await?;
    let taken = fill(&mut stream).await?;
    for _ in 0..2 {
        let flushed = poll_fn(|cx| Poll::Ready(Pin::new(&mut stream).poll_flush(cx))).await;
        assert!(matches!(flushed, Poll::Ready(Ok(()))), "{flushed:?}");
        assert_eq!(stream.get_ref().pending_len(), 0);
    }
    assert!(stream.get_ref().stats().unsent_bytes > 0, "it has all been sent");
    let ended = poll_fn(|cx| Poll::Ready(Pin::new(&mut stream).poll_shutdown(cx))).await;
    assert!(ended.is_pending(), "{ended:?}");
    gate.notify_one();
    stream.shutdown().await?;
    assert_eq!(stream.get_ref().stats().unsent_bytes, 0);
    stream.flush().await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    assert_eq!(answer, taken.to_string());
    Ok(())
}

pub(crate) async fn what_was_flushed_and_shut_down_outlives_the_stream(t: &mut Fixture) -> Check {
    let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
    let dialer = t.dialer().socket_buffers(0, SEND_BUFFER_BYTES);
    let mut stream = TokioStream::from(dialer.connect(&listener.local_addr()?.to_string()).await?);
    let (mut peer, _) = listener.accept()?;
    let reading = tokio::task::spawn_blocking(move || {
        let mut got = Vec::new();
        std::io::Read::read_to_end(&mut peer, &mut got).map(|_| got)
    });
    stream.write_all(&pattern(SIZE)).await?;
    stream.flush().await?;
    stream.shutdown().await?;
    drop(stream);
    assert!(reading.await?? == pattern(SIZE), "not what was sent");
    Ok(())
}

pub(crate) async fn a_connection_that_failed_fails_writes_flushes_and_shutdowns(
    t: &mut Fixture,
) -> Check {
    let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
    for splits in [false, true] {
        let conn = t.dialer().connect(&listener.local_addr()?.to_string()).await?;
        let mut stream = TokioStream::from(conn);
        let peer = listener.accept()?;
        fill(&mut stream).await?;
        stream.flush().await?;
        // With bytes that it has not read: a reset.
        drop(peer);
        let mut writer: Pin<Box<dyn AsyncWrite + Send>> = match splits {
            true => Box::pin(stream.into_split().1),
            false => Box::pin(stream),
        };
        while writer.flush().await.is_ok() {
            tokio::task::yield_now().await;
        }
        for _ in 0..2 {
            writer.flush().await.expect_err("bytes are lost");
            writer.write(b"x").await.expect_err("nothing leaves any more");
            writer.shutdown().await.expect_err("bytes are lost");
        }
    }
    Ok(())
}

pub(crate) async fn reads_that_are_given_up_lose_nothing(t: &mut Fixture) -> Check {
    let server = t.serve(echo)?;
    let (mut reader, mut writer) = t.dial(&server).await?.into_split();
    let writing = tokio::spawn(async move {
        for piece in pattern(SIZE).chunks(10_000) {
            writer.write_all(piece).await?;
            writer.flush().await?;
        }
        writer.shutdown().await
    });
    let (mut got, mut given_up, mut buffer) = (Vec::new(), 0, [0; 3000]);
    loop {
        let read = tokio::select! {
            biased;
            read = reader.read(&mut buffer) => Some(read?),
            () = tokio::task::yield_now() => None,
        };
        match read {
            Some(0) => break,
            Some(count) => got.extend_from_slice(&buffer[..count]),
            None => given_up += 1,
        }
    }
    assert!(given_up > 0 && got == pattern(SIZE), "{} bytes, {given_up} given up", got.len());
    Ok(writing.await??)
}

pub(crate) async fn timeouts_are_timed_out_and_lose_nothing(t: &mut Fixture) -> Check {
    const SHORT: Duration = Duration::from_millis(30);
    let gate = Arc::new(Notify::new());
    let opened = Arc::clone(&gate);
    let server = t.serve(move |stream| {
        let gate = Arc::clone(&opened);
        async move {
            gate.notified().await;
            echo(stream).await
        }
    })?;
    // More than the kernel's buffers can grow to hold, so that a shutdown has to wait.
    let mut stream = t.dial(&server).await?.with_output_bytes_max(16 << 20);
    stream.get_ref().set_read_timeout(Some(SHORT));
    stream.get_ref().set_write_timeout(Some(SHORT));
    for _ in 0..2 {
        let asked = Instant::now();
        let error = stream.read_u8().await.expect_err("nothing is sent");
        assert_eq!(error.kind(), ErrorKind::TimedOut);
        let error = stream.fill_buf().await.expect_err("nothing is sent");
        assert_eq!(error.kind(), ErrorKind::TimedOut);
        assert!(asked.elapsed() >= 2 * SHORT, "early, after {:?}", asked.elapsed());
    }
    // Pieces of 1 MiB are given to the kernel as it has room. Pieces of 16 KiB are gathered up to
    // the bound, so that a shutdown has 16 MiB to wait for.
    let mut bytes = Vec::new();
    for (size, gathered) in [(1 << 20, false), (16 << 10, true), (1 << 20, true)] {
        let piece = pattern(size);
        let error = loop {
            match stream.write(&piece).await {
                Ok(count) => bytes.extend_from_slice(&piece[..count]),
                Err(error) => break error,
            }
        };
        assert_eq!(error.kind(), ErrorKind::TimedOut);
        stream.flush().await?;
        if gathered {
            let error = stream.shutdown().await.expect_err("nobody reads");
            assert_eq!(error.kind(), ErrorKind::TimedOut);
        }
    }

    stream.get_ref().set_read_timeout(None);
    stream.get_ref().set_write_timeout(None);
    gate.notify_one();
    let (mut reader, mut writer) = stream.into_split();
    let flushing = tokio::spawn(async move { writer.shutdown().await.map(|()| writer) });
    let mut got = Vec::new();
    reader.read_to_end(&mut got).await?;
    assert!(got == bytes, "not what was sent");
    drop(flushing.await??);
    Ok(())
}

pub(crate) async fn a_stream_that_was_closed_is_not_connected(t: &mut Fixture) -> Check {
    let server = t.serve(echo)?;
    let (mut reader, mut writer) = t.dial(&server).await?.into_split();
    let handle = (**reader.get_ref()).clone();
    let mut byte = [0];
    {
        let mut read = std::pin::pin!(reader.read(&mut byte));
        let waits = poll_fn(|cx| Poll::Ready(read.as_mut().poll(cx).is_pending())).await;
        assert!(waits);
        handle.close();
        assert_eq!(read.await.expect_err("closed").kind(), ErrorKind::NotConnected);
    }
    for _ in 0..2 {
        let error = writer.write_all(b"x").await.expect_err("closed");
        assert_eq!(error.kind(), ErrorKind::NotConnected);
        assert_eq!(writer.flush().await.expect_err("closed").kind(), ErrorKind::NotConnected);
    }
    Ok(())
}
