//! The traits of futures.

use std::future::poll_fn;
use std::io::ErrorKind;
use std::pin::Pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use bytes::Bytes;
use futures_util::io::copy;
use futures_util::{AsyncBufReadExt, AsyncReadExt, AsyncWrite, AsyncWriteExt, Sink};
use futures_util::{SinkExt, StreamExt};
use ringpoll::{Connection, Result, ServerHandle, Slice};
use ringpoll_compat::{ByteSink, FuturesStream, SliceStream};
use tokio::sync::Notify;

use crate::harness::{Check, Fixture, pattern};

macro_rules! cases {
    ($tests:ident, $backend:ident) => {
        $tests! { $backend, futures:
            copy_between_halves_of_a_split_echoes
            lines_come_from_the_stream_itself
            a_question_that_was_not_flushed_is_sent_before_the_answer_is_awaited
            writes_wait_at_the_bound_for_a_peer_that_does_not_read
            what_was_shown_and_not_consumed_is_handed_back
            a_timeout_is_timed_out_and_loses_nothing
            slices_forwarded_to_a_sink_echo
            a_sink_waits_at_its_bound_for_a_peer_that_does_not_read
            a_closed_sink_ends_its_side_only
            slices_end_after_an_error_but_not_after_a_timeout
        }
    };
}
pub(crate) use cases;

const SIZE: usize = 1 << 20;

async fn echo(conn: Connection) -> Result<()> {
    let (reader, mut writer) = FuturesStream::from(conn).split();
    copy(reader, &mut writer).await?;
    Ok(writer.close().await?)
}

pub(crate) async fn copy_between_halves_of_a_split_echoes(t: &mut Fixture) -> Check {
    let server = t.spawn(t.builder().on_connect(echo))?;
    let (mut reader, mut writer) = FuturesStream::from(t.connect(&server).await?).split();
    let writing = tokio::spawn(async move {
        writer.write_all(&pattern(SIZE)).await?;
        writer.close().await
    });
    let mut got = Vec::new();
    reader.read_to_end(&mut got).await?;
    writing.await??;
    assert!(got == pattern(SIZE), "not what was sent");
    Ok(())
}

pub(crate) async fn lines_come_from_the_stream_itself(t: &mut Fixture) -> Check {
    let server = t.spawn(t.builder().on_connect(echo))?;
    let mut stream = FuturesStream::from(t.connect(&server).await?);
    let long = "x".repeat(100_000);
    stream.write_all(format!("one\n{long}\nthe end").as_bytes()).await?;
    stream.close().await?;
    let mut lines = stream.lines();
    assert_eq!(lines.next().await.transpose()?.as_deref(), Some("one"));
    assert_eq!(lines.next().await.transpose()?, Some(long));
    assert_eq!(lines.next().await.transpose()?.as_deref(), Some("the end"));
    assert!(lines.next().await.is_none());
    Ok(())
}

pub(crate) async fn a_question_that_was_not_flushed_is_sent_before_the_answer_is_awaited(
    t: &mut Fixture,
) -> Check {
    let server = t.spawn(t.builder().on_connect(async |conn| {
        let mut stream = FuturesStream::from(conn);
        let mut question = [0; 8];
        while stream.read_exact(&mut question).await.is_ok() {
            stream.write_all(&question).await?;
        }
        Ok(())
    }))?;
    let mut stream = FuturesStream::from(t.connect(&server).await?);
    let mut answer = [0; 8];
    for round in 0_u64..50 {
        stream.write_all(&round.to_be_bytes()).await?;
        stream.read_exact(&mut answer).await?;
        assert_eq!(u64::from_be_bytes(answer), round);
    }
    Ok(())
}

/// A server that reads only after the notification, then answers with the number of bytes.
fn gated(t: &mut Fixture) -> Check<(ServerHandle, Arc<Notify>)> {
    let gate = Arc::new(Notify::new());
    let opened = Arc::clone(&gate);
    let builder = t.builder().input_watermarks(1024, 4096).on_connect(move |mut conn| {
        let opened = Arc::clone(&opened);
        async move {
            opened.notified().await;
            let mut count = 0;
            while let bytes @ 1.. = conn.readable().await? {
                conn.skip(bytes).await?;
                count += bytes;
            }
            conn.write_copy(count.to_string().as_bytes())?;
            conn.flush().await
        }
    });
    Ok((t.spawn(builder)?, gate))
}

const BOUND: usize = 30_000;

pub(crate) async fn writes_wait_at_the_bound_for_a_peer_that_does_not_read(
    t: &mut Fixture,
) -> Check {
    let (server, gate) = gated(t)?;
    let conn = t.connect(&server).await?;
    let mut stream = FuturesStream::from(conn).with_output_bytes_max(BOUND);
    let piece = pattern(7000);
    let mut sent = 0;
    poll_fn(|cx| {
        while let Poll::Ready(taken) = Pin::new(&mut stream).poll_write(cx, &piece) {
            sent += taken.expect("open");
            let conn = stream.get_ref();
            let unsent = conn.stats().unsent_bytes as usize + conn.pending_len();
            assert!(unsent <= BOUND, "{unsent} bytes");
        }
        // The kernel may still take bytes. Nothing is read, so it stops.
        if stream.get_ref().stats().unsent_bytes as usize >= BOUND - piece.len() {
            return Poll::Ready(());
        }
        Poll::Pending
    })
    .await;
    gate.notify_one();
    stream.close().await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    assert_eq!(answer, sent.to_string());
    Ok(())
}

pub(crate) async fn what_was_shown_and_not_consumed_is_handed_back(t: &mut Fixture) -> Check {
    let server = t.spawn(t.builder().on_connect(echo))?;
    let mut stream = FuturesStream::from(t.connect(&server).await?);
    stream.write_all(b"abcdef").await?;
    stream.flush().await?;
    while stream.fill_buf().await?.len() < 6 {
        tokio::task::yield_now().await;
    }
    stream.consume_unpin(1);
    assert_eq!(stream.fill_buf().await?, b"bcdef");
    let mut two = [0; 2];
    stream.read_exact(&mut two).await?;
    assert_eq!(&two, b"bc");
    assert_eq!(stream.into_inner().next(3).await?, "def");
    Ok(())
}

pub(crate) async fn a_timeout_is_timed_out_and_loses_nothing(t: &mut Fixture) -> Check {
    let server = t.spawn(t.builder().on_connect(echo))?;
    let mut stream = FuturesStream::from(t.connect(&server).await?);
    stream.get_ref().set_read_timeout(Some(Duration::from_millis(20)));
    let mut one = [0; 1];
    assert_eq!(stream.read(&mut one).await.expect_err("no data").kind(), ErrorKind::TimedOut);
    stream.get_ref().set_read_timeout(None);
    stream.write_all(b"x").await?;
    assert_eq!(stream.read(&mut one).await?, 1);
    assert_eq!(&one, b"x");
    Ok(())
}

pub(crate) async fn slices_forwarded_to_a_sink_echo(t: &mut Fixture) -> Check {
    let server = t.spawn(t.builder().on_connect(|conn| {
        let (reader, writer) = conn.split();
        SliceStream::new(reader).forward(ByteSink::new(writer))
    }))?;
    let (reader, writer) = t.connect(&server).await?.split();
    let sending = tokio::spawn(async move {
        let mut sink = ByteSink::new(writer);
        for piece in pattern(SIZE).chunks(10_001) {
            sink.feed(Bytes::copy_from_slice(piece)).await?;
        }
        SinkExt::<Bytes>::close(&mut sink).await
    });
    let mut got = Vec::new();
    let mut slices = SliceStream::new(reader);
    while let Some(slice) = slices.next().await {
        let slice = slice?;
        assert!(!slice.is_empty());
        got.extend_from_slice(&slice);
    }
    sending.await??;
    assert!(got == pattern(SIZE), "not what was sent");
    assert!(slices.next().await.is_none(), "the end stays");
    Ok(())
}

pub(crate) async fn a_sink_waits_at_its_bound_for_a_peer_that_does_not_read(
    t: &mut Fixture,
) -> Check {
    let (server, gate) = gated(t)?;
    let (mut reader, writer) = t.connect(&server).await?.split();
    let mut sink = ByteSink::new(writer).with_output_bytes_max(BOUND);
    let item = Bytes::from(pattern(7000));
    let mut sent = 0;
    poll_fn(|cx| {
        while let Poll::Ready(ready) = Sink::<Bytes>::poll_ready(Pin::new(&mut sink), cx) {
            ready.expect("open");
            Pin::new(&mut sink).start_send(item.clone()).expect("open");
            sent += item.len();
            let writer = sink.get_ref();
            let unsent = writer.stats().unsent_bytes as usize + writer.pending_len();
            assert!(unsent < BOUND + item.len(), "{unsent} bytes");
        }
        let unsent = sink.get_ref().stats().unsent_bytes as usize;
        if unsent >= BOUND { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
    gate.notify_one();
    SinkExt::<Bytes>::close(&mut sink).await?;
    reader.readable().await?;
    let digits = sent.to_string().len();
    assert_eq!(reader.next(digits).await?, sent.to_string());
    Ok(())
}

pub(crate) async fn a_closed_sink_ends_its_side_only(t: &mut Fixture) -> Check {
    let (server, gate) = gated(t)?;
    gate.notify_one();
    let (reader, writer) = t.connect(&server).await?.split();
    let mut sink = ByteSink::new(writer);
    sink.send(Slice::from("four")).await?;
    SinkExt::<Slice>::close(&mut sink).await?;
    assert!(sink.send(Slice::from("more")).await.is_err(), "this side has ended");
    let answer = SliceStream::new(reader).next().await.expect("an answer")?;
    assert_eq!(answer, "4");
    Ok(())
}

pub(crate) async fn slices_end_after_an_error_but_not_after_a_timeout(t: &mut Fixture) -> Check {
    let server = t.spawn(t.builder().on_connect(async |mut conn: Connection| {
        conn.next(1).await?;
        conn.abort();
        Ok(())
    }))?;
    let (reader, mut writer) = t.connect(&server).await?.split();
    let mut slices = SliceStream::new(reader);
    slices.get_ref().set_read_timeout(Some(Duration::from_millis(20)));
    for _ in 0..2 {
        let error = slices.next().await.expect("not the end").expect_err("no data");
        assert!(error.is_read_timeout());
    }
    slices.get_ref().set_read_timeout(None);
    writer.write("x")?;
    writer.flush().await?;
    let error = slices.next().await.expect("not the end").expect_err("a reset");
    assert!(error.is_closed() && !error.is_eof(), "{error}");
    assert!(slices.next().await.is_none());
    Ok(())
}
