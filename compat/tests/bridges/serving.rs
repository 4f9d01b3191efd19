//! Framed requests that a service answers, from peers that send plain bytes.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use ringpoll::{Connection, Error, Result, WritePart};
use ringpoll_compat::tower::{Codec, LengthPrefixed, serve_tower};
use tokio::sync::{Notify, Semaphore};
use tower::limit::GlobalConcurrencyLimitLayer;
use tower::{Layer, Service, service_fn};

use crate::harness::{Check, DEADLINE, Fixture, pattern, settled, wait_until};

macro_rules! cases {
    ($tests:ident, $backend:ident) => {
        $tests! { $backend, serving:
            answers_come_in_the_order_of_the_requests
            frames_of_any_size_and_in_pieces_come_back
            requests_in_progress_are_bounded
            a_service_that_is_not_ready_holds_back_its_own_connection
            an_idle_connection_holds_no_place_of_the_service
            a_panicking_service_closes_its_own_connection_only
            a_call_that_panics_later_closes_its_own_connection_only
            an_error_of_the_service_comes_after_the_answers_before_it
            a_service_that_fails_to_become_ready_ends_its_connection
            garbage_is_one_error_after_the_answers_before_it
            a_frame_that_is_no_message_is_one_error
            a_frame_that_the_end_cuts_off_is_one_error
            requests_before_a_half_close_are_answered
            answers_wait_for_a_peer_that_does_not_read
            a_frame_that_never_becomes_whole_times_out
            the_read_timeout_is_not_for_a_service_that_computes
            a_shutdown_ends_connections_without_a_request
        }
    };
}
pub(crate) use cases;

/// How many requests of a connection are in progress at most.
const PIPELINED_MAX: usize = 64;

fn codec() -> LengthPrefixed {
    LengthPrefixed::new()
}

pub(crate) async fn echo(message: Bytes) -> Result<Bytes, Infallible> {
    Ok(message)
}

fn frame(message: &[u8]) -> Vec<u8> {
    let mut frame = (message.len() as u32).to_be_bytes().to_vec();
    frame.extend_from_slice(message);
    frame
}

async fn send(conn: &mut Connection, messages: &[&str]) -> Check {
    messages.iter().try_for_each(|message| conn.write_copy(&frame(message.as_bytes())))?;
    Ok(conn.flush().await?)
}

async fn receive(conn: &mut Connection) -> Check<String> {
    let length = conn.next(4).await?;
    let length = u32::from_be_bytes(length[..].try_into()?);
    Ok(conn.read_string(length as usize).await?)
}

async fn expect(conn: &mut Connection, messages: &[&str]) -> Check {
    for message in messages {
        assert_eq!(receive(conn).await?, *message);
    }
    Ok(())
}

/// Expects that the server ends the connection, in order or by a reset.
async fn expect_end(conn: &mut Connection) {
    match conn.readable().await {
        Ok(bytes) => assert_eq!(bytes, 0, "an answer too many"),
        Err(error) => assert!(error.is_closed(), "{error}"),
    }
}

/// The first call ends after the second one.
pub(crate) async fn answers_come_in_the_order_of_the_requests(t: &mut Fixture) -> Check {
    let second_is_done = Arc::new(Notify::new());
    let service = service_fn(move |message: Bytes| {
        let second_is_done = Arc::clone(&second_is_done);
        async move {
            match &message[..] {
                b"first" => second_is_done.notified().await,
                b"second" => second_is_done.notify_one(),
                _ => {}
            }
            Ok::<_, Infallible>(message)
        }
    });
    let server = t.spawn(t.builder().on_connect(serve_tower(service, codec())))?;
    let mut conn = t.connect(&server).await?;
    send(&mut conn, &["zeroth", "first", "second", "third"]).await?;
    expect(&mut conn, &["zeroth", "first", "second", "third"]).await
}

pub(crate) async fn frames_of_any_size_and_in_pieces_come_back(t: &mut Fixture) -> Check {
    let server = t.spawn(t.builder().on_connect(serve_tower(service_fn(echo), codec())))?;
    let mut conn = t.connect(&server).await?;
    for size in [0, 1, 4000, 4096, 4097, 65_536, 1_000_000] {
        let sent = frame(&pattern(size));
        let cut = sent.len() / 3;
        for piece in [&sent[..2], &sent[2..2 + cut], &sent[2 + cut..]] {
            conn.write_copy(piece)?;
            conn.flush().await?;
            tokio::task::yield_now().await;
        }
        assert!(conn.next(sent.len()).await? == sent, "not the frame of {size} bytes");
    }
    Ok(())
}

pub(crate) async fn requests_in_progress_are_bounded(t: &mut Fixture) -> Check {
    const REQUESTS: usize = 300;
    let (begun, gate) = (Arc::new(AtomicUsize::new(0)), Arc::new(Semaphore::new(0)));
    let (counted, opened) = (Arc::clone(&begun), Arc::clone(&gate));
    let service = service_fn(move |message: Bytes| {
        counted.fetch_add(1, Ordering::SeqCst);
        let opened = Arc::clone(&opened);
        async move {
            opened.acquire().await?.forget();
            Ok::<_, tokio::sync::AcquireError>(message)
        }
    });
    let server = t.spawn(t.builder().on_connect(serve_tower(service, codec())))?;
    let mut conn = t.connect(&server).await?;
    for index in 0..REQUESTS {
        conn.write_copy(&frame(index.to_string().as_bytes()))?;
    }
    conn.flush().await?;
    wait_until(|| begun.load(Ordering::SeqCst) >= PIPELINED_MAX).await;
    assert_eq!(settled(|| begun.load(Ordering::SeqCst)).await, PIPELINED_MAX);
    gate.add_permits(REQUESTS);
    for index in 0..REQUESTS {
        assert_eq!(receive(&mut conn).await?, index.to_string());
    }
    Ok(())
}

/// Counts the calls that run at the same time.
#[derive(Clone, Default)]
struct Counting {
    present: Arc<AtomicUsize>,
    peak: Arc<AtomicUsize>,
}

impl Service<Bytes> for Counting {
    type Response = Bytes;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Bytes, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, message: Bytes) -> Self::Future {
        let Counting { present, peak } = self.clone();
        Box::pin(async move {
            let now = present.fetch_add(1, Ordering::SeqCst) + 1;
            peak.fetch_max(now, Ordering::SeqCst);
            for _ in 0..3 {
                tokio::task::yield_now().await;
            }
            present.fetch_sub(1, Ordering::SeqCst);
            Ok(message)
        })
    }
}

pub(crate) async fn a_service_that_is_not_ready_holds_back_its_own_connection(
    t: &mut Fixture,
) -> Check {
    let counting = Counting::default();
    let service = GlobalConcurrencyLimitLayer::new(2).layer(counting.clone());
    let server = t.spawn(t.builder().on_connect(serve_tower(service, codec())))?;
    let mut conns = [t.connect(&server).await?, t.connect(&server).await?];
    let messages = ["a", "b", "c", "d", "e", "f"];
    for conn in &mut conns {
        send(conn, &messages).await?;
    }
    for conn in &mut conns {
        expect(conn, &messages).await?;
    }
    let peak = counting.peak.load(Ordering::SeqCst);
    assert!((1..=2).contains(&peak), "{peak} at a time");
    Ok(())
}

pub(crate) async fn an_idle_connection_holds_no_place_of_the_service(t: &mut Fixture) -> Check {
    let service = GlobalConcurrencyLimitLayer::new(1).layer(service_fn(echo));
    let server = t.spawn(t.builder().on_connect(serve_tower(service, codec())))?;
    let mut idle = t.connect(&server).await?;
    send(&mut idle, &["one"]).await?;
    expect(&mut idle, &["one"]).await?;
    let mut other = t.connect(&server).await?;
    send(&mut other, &["two"]).await?;
    expect(&mut other, &["two"]).await
}

/// Panics at once, or in the future of the call.
fn panicking(
    at_once: bool,
) -> impl Service<
    Bytes,
    Response = Bytes,
    Error = Infallible,
    Future = impl Future<Output = Result<Bytes, Infallible>> + Send,
> + Clone
+ Send
+ Sync {
    service_fn(move |message: Bytes| {
        let is_bad = &message[..] == b"bad";
        assert!(!(is_bad && at_once), "expected");
        async move {
            tokio::task::yield_now().await;
            assert!(!is_bad, "expected");
            Ok::<_, Infallible>(message)
        }
    })
}

async fn one_of_two_panics(t: &mut Fixture, at_once: bool) -> Check {
    let service = panicking(at_once);
    let server = t.spawn(t.builder().on_connect(serve_tower(service, codec())))?;
    let mut other = t.connect(&server).await?;
    send(&mut other, &["before"]).await?;
    expect(&mut other, &["before"]).await?;
    let mut conn = t.connect(&server).await?;
    send(&mut conn, &["bad", "never"]).await?;
    expect_end(&mut conn).await;
    assert!(t.error().await.contains("expected"));
    send(&mut other, &["after"]).await?;
    expect(&mut other, &["after"]).await?;
    assert_eq!(server.stats().handler_panics, 1);
    Ok(())
}

pub(crate) async fn a_panicking_service_closes_its_own_connection_only(t: &mut Fixture) -> Check {
    one_of_two_panics(t, true).await
}

pub(crate) async fn a_call_that_panics_later_closes_its_own_connection_only(
    t: &mut Fixture,
) -> Check {
    one_of_two_panics(t, false).await
}

pub(crate) async fn an_error_of_the_service_comes_after_the_answers_before_it(
    t: &mut Fixture,
) -> Check {
    let service = service_fn(async |message: Bytes| match &message[..] {
        b"bad" => Err("refused on purpose"),
        _ => Ok(message),
    });
    let server = t.spawn(t.builder().on_connect(serve_tower(service, codec())))?;
    let mut conn = t.connect(&server).await?;
    send(&mut conn, &["one", "two", "bad"]).await?;
    expect(&mut conn, &["one", "two"]).await?;
    expect_end(&mut conn).await;
    assert!(t.error().await.contains("refused on purpose"));
    assert_eq!(server.stats().handler_errors, 1);
    Ok(())
}

/// Is ready a number of times, then fails.
#[derive(Clone)]
struct WearsOut(usize);

impl Service<Bytes> for WearsOut {
    type Response = Bytes;
    type Error = &'static str;
    type Future = std::future::Ready<Result<Bytes, &'static str>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), &'static str>> {
        Poll::Ready(if self.0 == 0 { Err("worn out") } else { Ok(()) })
    }

    fn call(&mut self, message: Bytes) -> Self::Future {
        self.0 -= 1;
        std::future::ready(Ok(message))
    }
}

pub(crate) async fn a_service_that_fails_to_become_ready_ends_its_connection(
    t: &mut Fixture,
) -> Check {
    let server = t.spawn(t.builder().on_connect(serve_tower(WearsOut(2), codec())))?;
    for _ in 0..2 {
        let mut conn = t.connect(&server).await?;
        send(&mut conn, &["one", "two", "three"]).await?;
        expect(&mut conn, &["one", "two"]).await?;
        expect_end(&mut conn).await;
        assert!(t.error().await.contains("worn out"));
    }
    Ok(())
}

pub(crate) async fn garbage_is_one_error_after_the_answers_before_it(t: &mut Fixture) -> Check {
    let codec = codec().with_message_bytes_max(1000);
    let server = t.spawn(t.builder().on_connect(serve_tower(service_fn(echo), codec)))?;
    for _ in 0..3 {
        let mut conn = t.connect(&server).await?;
        conn.write_copy(&frame(b"one"))?;
        conn.write_copy(&[0xff; 64])?;
        conn.flush().await?;
        // A connection that closes with unread input may be reset, and the answer lost with it.
        match receive(&mut conn).await {
            Ok(answer) => assert_eq!(answer, "one"),
            Err(error) => assert!(error.downcast::<Error>()?.is_closed()),
        }
        expect_end(&mut conn).await;
        let error = t.error().await;
        assert!(error.contains("limit is 1004"), "{error}");
    }
    let mut other = t.connect(&server).await?;
    send(&mut other, &["two"]).await?;
    expect(&mut other, &["two"]).await
}

/// Lines that hold a number.
struct Numbers;

impl Codec for Numbers {
    type In = u64;
    type Out = u64;

    fn frame_bytes_max(&self) -> usize {
        32
    }

    fn frame_bytes(&self, front: &[u8]) -> Result<Option<usize>> {
        Ok(front.iter().position(|&byte| byte == b'\n').map(|index| index + 1))
    }

    fn decode(&self, frame: &[u8]) -> Result<u64> {
        let line = std::str::from_utf8(frame).map_err(Error::other)?;
        line.trim_end().parse().map_err(|error| Error::other(format!("no number: {error}")))
    }

    fn encode(&self, message: u64, writer: &mut WritePart<'_>) -> Result<()> {
        writer.write_copy(format!("{message}\n").as_bytes())
    }
}

pub(crate) async fn a_frame_that_is_no_message_is_one_error(t: &mut Fixture) -> Check {
    let double = service_fn(async |number: u64| Ok::<_, Infallible>(number * 2));
    let server = t.spawn(t.builder().on_connect(serve_tower(double, Numbers)))?;
    let mut conn = t.connect(&server).await?;
    conn.write("20\n21\nx\n")?;
    conn.flush().await?;
    assert_eq!(conn.next(6).await?, "40\n42\n");
    expect_end(&mut conn).await;
    assert!(t.error().await.contains("no number"));
    Ok(())
}

pub(crate) async fn a_frame_that_the_end_cuts_off_is_one_error(t: &mut Fixture) -> Check {
    let server = t.spawn(t.builder().on_connect(serve_tower(service_fn(echo), codec())))?;
    let mut conn = t.connect(&server).await?;
    conn.write_copy(&frame(b"whole"))?;
    conn.write("\0\0\0\x05cut")?;
    conn.shutdown_write().await?;
    expect(&mut conn, &["whole"]).await?;
    expect_end(&mut conn).await;
    assert!(t.error().await.contains("Eof"));
    Ok(())
}

pub(crate) async fn requests_before_a_half_close_are_answered(t: &mut Fixture) -> Check {
    let gate = Arc::new(Semaphore::new(0));
    let opened = Arc::clone(&gate);
    let service = service_fn(move |message: Bytes| {
        let opened = Arc::clone(&opened);
        async move {
            opened.acquire().await?.forget();
            Ok::<_, tokio::sync::AcquireError>(message)
        }
    });
    let server = t.spawn(t.builder().on_connect(serve_tower(service, codec())))?;
    let mut conn = t.connect(&server).await?;
    send(&mut conn, &["one", "two", "three"]).await?;
    conn.shutdown_write().await?;
    gate.add_permits(3);
    expect(&mut conn, &["one", "two", "three"]).await?;
    assert_eq!(conn.readable().await?, 0);
    Ok(())
}

pub(crate) async fn answers_wait_for_a_peer_that_does_not_read(t: &mut Fixture) -> Check {
    const REQUESTS: usize = 2000;
    const ANSWER_BYTES: usize = 10_000;
    let calls = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&calls);
    let service = service_fn(move |_: Bytes| {
        counted.fetch_add(1, Ordering::SeqCst);
        async { Ok::<_, Infallible>(Bytes::from(vec![7; ANSWER_BYTES])) }
    });
    let builder = t.builder().on_connect(serve_tower(service, codec()));
    let server = t.spawn(builder)?;
    let dialer = t.dialer().input_watermarks(1024, 4096).socket_buffers(8192, 0);
    let mut conn = dialer.connect(&server.local_addr().to_string()).await?;
    for _ in 0..REQUESTS {
        conn.write_copy(&frame(b""))?;
    }
    conn.flush().await?;
    // What the kernel buffers for both ends, the bound on output, and the calls in progress.
    let stopped = settled(|| calls.load(Ordering::SeqCst)).await;
    assert!(stopped < REQUESTS, "{stopped} answers for a peer that does not read");
    for _ in 0..REQUESTS {
        conn.skip(4 + ANSWER_BYTES).await?;
    }
    assert_eq!(calls.load(Ordering::SeqCst), REQUESTS);
    Ok(())
}

pub(crate) async fn a_frame_that_never_becomes_whole_times_out(t: &mut Fixture) -> Check {
    let builder = t.builder().read_timeout(Duration::from_millis(100));
    let server = t.spawn(builder.on_connect(serve_tower(service_fn(echo), codec())))?;
    let mut conn = t.connect(&server).await?;
    conn.write("\0\0\x01\0")?;
    // Bytes that come do not move the end of the wait.
    while conn.is_active() {
        conn.write("x")?;
        if conn.flush().await.is_err() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(t.error().await.contains("ReadTimeout"));
    Ok(())
}

pub(crate) async fn the_read_timeout_is_not_for_a_service_that_computes(t: &mut Fixture) -> Check {
    const TIMEOUT: Duration = Duration::from_millis(50);
    let gate = Arc::new(Notify::new());
    let opened = Arc::clone(&gate);
    let service = service_fn(move |message: Bytes| {
        let opened = Arc::clone(&opened);
        async move {
            opened.notified().await;
            Ok::<_, Infallible>(message)
        }
    });
    let builder = t.builder().read_timeout(TIMEOUT);
    let server = t.spawn(builder.on_connect(serve_tower(service, codec())))?;
    let mut conn = t.connect(&server).await?;
    for message in ["one", "two"] {
        send(&mut conn, &[message]).await?;
        tokio::time::sleep(TIMEOUT * 3).await;
        gate.notify_one();
        expect(&mut conn, &[message]).await?;
    }
    // It is for a peer that sends nothing.
    expect_end(&mut conn).await;
    assert!(t.error().await.contains("ReadTimeout"));
    Ok(())
}

pub(crate) async fn a_shutdown_ends_connections_without_a_request(t: &mut Fixture) -> Check {
    let (begun, gate) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let (begins, opened) = (Arc::clone(&begun), Arc::clone(&gate));
    let service = service_fn(move |message: Bytes| {
        let (begins, opened) = (Arc::clone(&begins), Arc::clone(&opened));
        async move {
            if &message[..] == b"slow" {
                begins.notify_one();
                opened.notified().await;
            }
            Ok::<_, Infallible>(message)
        }
    });
    let server = t.spawn(t.builder().on_connect(serve_tower(service, codec())))?;
    let (mut idle, mut busy) = (t.connect(&server).await?, t.connect(&server).await?);
    send(&mut idle, &["quick"]).await?;
    expect(&mut idle, &["quick"]).await?;
    send(&mut busy, &["slow"]).await?;
    begun.notified().await;
    let handle = server.clone();
    let shutdown = tokio::spawn(async move { handle.shutdown_async(DEADLINE).await });
    expect_end(&mut idle).await;
    assert!(!shutdown.is_finished(), "a request is in progress");
    gate.notify_one();
    expect(&mut busy, &["slow"]).await?;
    expect_end(&mut busy).await;
    shutdown.await??;
    assert!(server.has_ended());
    Ok(())
}
