//! The framed client, against servers that are framed services and against others.

use std::future::poll_fn;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::Poll;
use std::time::Duration;

use bytes::Bytes;
use ringpoll::{Connection, ServerHandle};
use ringpoll_compat::tower::{ClientError, FramedClient, LengthPrefixed, serve_tower};
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tower::{Service, ServiceExt, service_fn};

use crate::harness::{Check, Fixture, settled, wait_until};
use crate::serving::echo;

macro_rules! cases {
    ($tests:ident, $backend:ident) => {
        $tests! { $backend, client:
            many_callers_get_their_own_answers
            requests_are_sent_without_waiting_for_answers
            a_dropped_call_takes_no_answer_from_the_next
            all_calls_fail_alike_when_the_server_ends
            an_answer_without_a_request_ends_the_connection
            garbage_fails_every_call_with_one_error
            a_message_that_is_too_long_fails_alone
            a_server_that_does_not_answer_holds_callers_back
            a_server_that_does_not_answer_in_time_fails_the_calls
            the_read_timeout_is_not_for_an_idle_client
            the_end_of_the_driver_fails_the_calls
            a_failed_driver_that_is_kept_holds_no_calls
            a_call_fails_that_was_ready_before_the_driver_ended
            an_idle_client_sees_the_end_of_the_server_after_a_read_timeout
        }
    };
}
pub(crate) use cases;

type Client = FramedClient<LengthPrefixed>;
type Driver = JoinHandle<Result<(), ClientError>>;

fn client_of(conn: Connection) -> (Client, Driver) {
    let (client, driver) = FramedClient::new(conn, LengthPrefixed::new());
    (client, tokio::spawn(driver))
}

async fn call(client: &mut Client, message: &str) -> Result<Bytes, ClientError> {
    client.ready().await?.call(Bytes::copy_from_slice(message.as_bytes())).await
}

/// A server that passes each connection to `serve`.
fn serve<H, F>(t: &mut Fixture, serve: H) -> Check<ServerHandle>
where
    H: Fn(Connection) -> F + Send + Sync + 'static,
    F: Future<Output = ringpoll::Result<()>> + Send + 'static,
{
    t.spawn(t.builder().on_connect(serve))
}

/// Reads everything, and answers nothing.
async fn swallow(mut conn: Connection) -> ringpoll::Result<()> {
    while let bytes @ 1.. = conn.readable().await? {
        conn.skip(bytes).await?;
    }
    Ok(())
}

pub(crate) async fn many_callers_get_their_own_answers(t: &mut Fixture) -> Check {
    let handler = serve_tower(service_fn(echo), LengthPrefixed::new());
    let server = t.spawn(t.builder().on_connect(handler))?;
    let (client, driver) = client_of(t.connect(&server).await?);
    let callers: Vec<_> = (0..20)
        .map(|caller| {
            let mut client = client.clone();
            tokio::spawn(async move {
                for round in 0..100 {
                    let message = format!("{caller}/{round}");
                    assert_eq!(call(&mut client, &message).await?, message);
                }
                Ok::<_, ClientError>(())
            })
        })
        .collect();
    for caller in callers {
        caller.await??;
    }
    drop(client);
    Ok(driver.await??)
}

/// The server answers when it has all requests.
pub(crate) async fn requests_are_sent_without_waiting_for_answers(t: &mut Fixture) -> Check {
    let server = serve(t, async |mut conn: Connection| {
        let all = conn.next(10 * 5).await?;
        conn.write(all)?;
        conn.flush().await?;
        swallow(conn).await
    })?;
    let (mut client, driver) = client_of(t.connect(&server).await?);
    let mut answers = Vec::new();
    for digit in b'0'..=b'9' {
        let answer = client.ready().await?.call(Bytes::copy_from_slice(&[digit]));
        answers.push((digit, answer));
    }
    for (digit, answer) in answers {
        assert_eq!(answer.await?[..], [digit]);
    }
    drop(client);
    Ok(driver.await??)
}

pub(crate) async fn a_dropped_call_takes_no_answer_from_the_next(t: &mut Fixture) -> Check {
    let calls = Arc::new(AtomicUsize::new(0));
    let gate = Arc::new(Notify::new());
    let (counted, opened) = (Arc::clone(&calls), Arc::clone(&gate));
    let service = service_fn(move |message: Bytes| {
        counted.fetch_add(1, Ordering::SeqCst);
        let opened = Arc::clone(&opened);
        async move {
            if &message[..] == b"first" {
                opened.notified().await;
            }
            Ok::<_, std::convert::Infallible>(message)
        }
    });
    let handler = serve_tower(service, LengthPrefixed::new());
    let server = t.spawn(t.builder().on_connect(handler))?;
    let (mut client, driver) = client_of(t.connect(&server).await?);
    let first = client.ready().await?.call(Bytes::from("first"));
    wait_until(|| calls.load(Ordering::SeqCst) == 1).await;
    drop(first);
    let second = client.ready().await?.call(Bytes::from("second"));
    gate.notify_one();
    assert_eq!(second.await?, "second");
    drop(client);
    Ok(driver.await??)
}

pub(crate) async fn all_calls_fail_alike_when_the_server_ends(t: &mut Fixture) -> Check {
    let server = serve(t, async |mut conn: Connection| {
        conn.next(3 * 5).await?;
        Ok(())
    })?;
    let (mut client, driver) = client_of(t.connect(&server).await?);
    let mut answers = Vec::new();
    for _ in 0..3 {
        answers.push(client.ready().await?.call(Bytes::from("x")));
    }
    let reason = driver.await?.expect_err("the connection has ended");
    assert!(reason.is_closed(), "{reason}");
    for answer in answers {
        assert_eq!(answer.await.expect_err("no answer").to_string(), reason.to_string());
    }
    let error = call(&mut client.clone(), "x").await.expect_err("closed");
    assert_eq!(error.to_string(), reason.to_string());
    Ok(())
}

pub(crate) async fn an_answer_without_a_request_ends_the_connection(t: &mut Fixture) -> Check {
    let server = serve(t, async |mut conn: Connection| {
        conn.write("\0\0\0\x02hi")?;
        conn.flush().await?;
        swallow(conn).await.or(Ok(()))
    })?;
    let (mut client, driver) = client_of(t.connect(&server).await?);
    let reason = driver.await?.expect_err("nobody has asked");
    assert!(reason.to_string().contains("without a request"), "{reason}");
    assert!(call(&mut client, "x").await.is_err());
    Ok(())
}

pub(crate) async fn garbage_fails_every_call_with_one_error(t: &mut Fixture) -> Check {
    let server = serve(t, async |mut conn: Connection| {
        conn.next(2 * 5).await?;
        conn.write("\0\0\0\x01x")?;
        conn.write(&[0xff; 100])?;
        conn.flush().await?;
        swallow(conn).await.or(Ok(()))
    })?;
    let (mut client, driver) = client_of(t.connect(&server).await?);
    let first = client.ready().await?.call(Bytes::from("x"));
    let second = client.ready().await?.call(Bytes::from("x"));
    assert_eq!(first.await?, "x");
    assert!(second.await.expect_err("garbage").is_limit());
    assert!(driver.await?.expect_err("garbage").is_limit());
    assert!(call(&mut client, "x").await.expect_err("garbage").is_limit());
    Ok(())
}

pub(crate) async fn a_message_that_is_too_long_fails_alone(t: &mut Fixture) -> Check {
    let codec = LengthPrefixed::new().with_message_bytes_max(5);
    let server = t.spawn(t.builder().on_connect(serve_tower(service_fn(echo), codec)))?;
    let (mut client, driver) = FramedClient::new(t.connect(&server).await?, codec);
    let driver = tokio::spawn(driver);
    let long = client.ready().await?.call(Bytes::from("longer"));
    let short = client.ready().await?.call(Bytes::from("short"));
    assert!(long.await.expect_err("too long").to_string().contains("limit is 5"));
    assert_eq!(short.await?, "short");
    drop(client);
    Ok(driver.await??)
}

pub(crate) async fn a_server_that_does_not_answer_holds_callers_back(t: &mut Fixture) -> Check {
    let server = serve(t, swallow)?;
    let (mut client, driver) = client_of(t.connect(&server).await?);
    let accepted = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&accepted);
    let calling = tokio::spawn(async move {
        let mut answers = Vec::new();
        while let Ok(ready) = client.ready().await {
            answers.push(ready.call(Bytes::from("x")));
            counted.fetch_add(1, Ordering::SeqCst);
        }
    });
    // 64 are sent, and 64 wait in the queue.
    wait_until(|| accepted.load(Ordering::SeqCst) >= 128).await;
    assert_eq!(settled(|| accepted.load(Ordering::SeqCst)).await, 128);
    driver.abort();
    Ok(calling.await?)
}

pub(crate) async fn a_server_that_does_not_answer_in_time_fails_the_calls(
    t: &mut Fixture,
) -> Check {
    let server = serve(t, swallow)?;
    let conn = t.connect(&server).await?;
    conn.set_read_timeout(Some(Duration::from_millis(50)));
    let (mut client, driver) = client_of(conn);
    assert!(call(&mut client, "x").await.expect_err("no answer").is_read_timeout());
    assert!(driver.await?.expect_err("no answer").is_read_timeout());
    Ok(())
}

pub(crate) async fn the_read_timeout_is_not_for_an_idle_client(t: &mut Fixture) -> Check {
    // Long enough for a busy host.
    const TIMEOUT: Duration = Duration::from_millis(800);
    let service = service_fn(async |message: Bytes| {
        tokio::time::sleep(TIMEOUT / 2).await;
        Ok::<_, std::convert::Infallible>(message)
    });
    let builder = t.builder().tokio(tokio::runtime::Handle::current());
    let server = t.spawn(builder.on_connect(serve_tower(service, LengthPrefixed::new())))?;
    let conn = t.connect(&server).await?;
    conn.set_read_timeout(Some(TIMEOUT));
    let (mut client, driver) = client_of(conn);
    for pause in [TIMEOUT * 3 / 4, TIMEOUT * 5 / 4] {
        tokio::time::sleep(pause).await;
        // The answer takes longer than what is left of the wait that began before the request.
        assert_eq!(call(&mut client, "x").await?, "x");
    }
    drop(client);
    Ok(driver.await??)
}

pub(crate) async fn the_end_of_the_driver_fails_the_calls(t: &mut Fixture) -> Check {
    let server = serve(t, swallow)?;
    let (mut client, mut driver) =
        FramedClient::new(t.connect(&server).await?, LengthPrefixed::new());
    let sent = client.ready().await?.call(Bytes::from("x"));
    poll_fn(|cx| {
        assert!(std::pin::Pin::new(&mut driver).poll(cx).is_pending());
        Poll::Ready(())
    })
    .await;
    let queued = client.ready().await?.call(Bytes::from("x"));
    drop(driver);
    for answer in [sent, queued] {
        assert!(answer.await.expect_err("no driver").is_closed());
    }
    assert!(client.ready().await.expect_err("no driver").is_closed());
    Ok(())
}

pub(crate) async fn a_failed_driver_that_is_kept_holds_no_calls(t: &mut Fixture) -> Check {
    let server = serve(t, async |mut conn: Connection| conn.skip(5).await)?;
    let (mut client, mut driver) =
        FramedClient::new(t.connect(&server).await?, LengthPrefixed::new());
    let mut answers = Vec::new();
    for _ in 0..64 {
        answers.push(client.ready().await?.call(Bytes::from("x")));
    }
    // The driver sends these, so there is room in the queue for one more.
    let polled = poll_fn(|cx| Poll::Ready(std::pin::Pin::new(&mut driver).poll(cx))).await;
    if polled.is_pending() {
        answers.push(client.ready().await?.call(Bytes::from("x")));
    }
    let reason = (&mut driver).await.expect_err("the server has closed");
    assert!(reason.is_closed(), "{reason}");
    for answer in answers {
        assert!(answer.await.expect_err("no answer").is_closed());
    }
    drop(driver);
    Ok(())
}

pub(crate) async fn a_call_fails_that_was_ready_before_the_driver_ended(t: &mut Fixture) -> Check {
    let server = serve(t, async |_| Ok(()))?;
    for is_kept in [true, false] {
        let (mut client, mut driver) =
            FramedClient::new(t.connect(&server).await?, LengthPrefixed::new());
        let ready = client.ready().await?;
        let reason = (&mut driver).await.expect_err("the server has closed");
        let kept = is_kept.then_some(driver);
        let error = ready.call(Bytes::from("x")).await.expect_err("no driver");
        assert_eq!(error.to_string(), reason.to_string());
        drop(kept);
    }
    Ok(())
}

pub(crate) async fn an_idle_client_sees_the_end_of_the_server_after_a_read_timeout(
    t: &mut Fixture,
) -> Check {
    const TIMEOUT: Duration = Duration::from_millis(30);
    let may_close = Arc::new(Notify::new());
    let told = Arc::clone(&may_close);
    let server = serve(t, move |conn| {
        let told = Arc::clone(&told);
        async move {
            let _open = conn;
            told.notified().await;
            Ok(())
        }
    })?;
    let conn = t.connect(&server).await?;
    conn.set_read_timeout(Some(TIMEOUT));
    let (_client, driver) = client_of(conn);
    tokio::time::sleep(4 * TIMEOUT).await;
    assert!(!driver.is_finished(), "the timeout is for answers");
    may_close.notify_one();
    assert!(driver.await?.expect_err("the server has closed").is_closed());
    Ok(())
}
