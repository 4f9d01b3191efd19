//! Plain reads and writes, and what tokio makes of them.

use std::future::poll_fn;
use std::io::{ErrorKind, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

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
    let bytes = pattern(300_000);
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
    const BOUND: usize = 200_000;
    const TOTAL: usize = 24 << 20;
    let gate = Arc::new(Notify::new());
    let opened = Arc::clone(&gate);
    let server = t.serve(move |stream| {
        let gate = Arc::clone(&opened);
        async move {
            gate.notified().await;
            count_to_the_end(stream).await
        }
    })?;
    let dialer = t.dialer().output_bytes_max(BOUND);
    let conn = dialer.connect(&server.local_addr().to_string()).await?;
    let mut stream = TokioStream::from(conn);
    let piece = pattern(50_000);
    let (mut sent, mut waited) = (0, 0);
    while sent < TOTAL {
        let part = &piece[..piece.len().min(TOTAL - sent)];
        sent += poll_fn(|cx| {
            let polled = Pin::new(&mut stream).poll_write(cx, part);
            if polled.is_pending() {
                waited += 1;
                // One more would have to wait as well; now there is reason to read.
                gate.notify_one();
            }
            polled
        })
        .await?;
        let conn = stream.get_ref();
        let waiting = conn.stats().unsent_bytes as usize + conn.pending_len();
        assert!(waiting <= BOUND, "{waiting} bytes wait for the peer");
    }
    assert!(waited > 0, "the kernel took {TOTAL} bytes that nobody read");
    stream.shutdown().await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    assert_eq!(answer, TOTAL.to_string());
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
    let mut stream = t.dial(&server).await?;
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
    let bytes = pattern(24 << 20);
    assert_eq!(stream.write(&bytes).await?, bytes.len());
    let error = stream.flush().await.expect_err("nobody reads");
    assert_eq!(error.kind(), ErrorKind::TimedOut);

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
