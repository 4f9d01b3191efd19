//! Layers of tower over the client of calls, as they are.

use std::future::{Ready, ready};
use std::io::ErrorKind;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use ringpoll::rpc::{CallError, CallErrorKind, Client, LengthPrefixed, serve_calls};
use ringpoll::{Handle, ServerHandle, Slice};
use ringpoll_compat::tower::CallService;
use tokio::sync::Semaphore;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tower::balance::p2c::Balance;
use tower::discover::Change;
use tower::hedge::{self, Hedge};
use tower::load::{CompleteOnResponse, PendingRequests};
use tower::load_shed::error::Overloaded;
use tower::retry::{self, Retry};
use tower::timeout::error::Elapsed;
use tower::{BoxError, Service, ServiceBuilder, ServiceExt};

use crate::harness::{Check, Fixture, wait_until};

macro_rules! cases {
    ($tests:ident, $backend:ident) => {
        $tests! { $backend, layers:
            a_hedged_call_is_answered_although_its_first_request_is_not
            a_call_beyond_the_limit_is_shed_at_once
            a_call_that_its_layer_times_out_leaves_its_place
            servers_that_are_discovered_and_removed_take_their_share
            only_calls_that_are_safe_to_repeat_are_retried
        }
    };
}
pub(crate) use cases;

type Calls = Client<LengthPrefixed>;

/// A server of calls that counts them.
struct Served {
    server: ServerHandle,
    count: Arc<AtomicUsize>,
    /// Calls that are held wait for its end.
    gate: Arc<Semaphore>,
}

/// Serves calls by their number, from 0 on. Calls for which `holds` is true get no answer.
fn serve(t: &mut Fixture, holds: fn(usize) -> bool) -> Check<Served> {
    let (count, gate) = (Arc::new(AtomicUsize::new(0)), Arc::new(Semaphore::new(0)));
    let (calls, end) = (Arc::clone(&count), Arc::clone(&gate));
    let serve_call = move |request: Slice, _: Handle| {
        let is_held = holds(calls.fetch_add(1, Ordering::Relaxed));
        let end = Arc::clone(&end);
        async move {
            if is_held {
                end.acquire().await.expect_err("it only ends");
            }
            Ok(request)
        }
    };
    let builder = t.builder().on_connect(serve_calls(LengthPrefixed::new(), serve_call));
    Ok(Served { server: t.spawn(builder)?, count, gate })
}

impl Served {
    fn client(&self, t: &Fixture) -> Check<Calls> {
        let builder = Client::builder(LengthPrefixed::new()).dialer(t.dialer());
        Ok(builder.connect(&self.server.local_addr().to_string())?)
    }

    fn count(&self) -> usize {
        self.count.load(Ordering::Relaxed)
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.gate.close();
    }
}

/// A request that is sent a second time if its answer takes long.
#[derive(Clone)]
struct Always;

impl hedge::Policy<Slice> for Always {
    fn clone_request(&self, request: &Slice) -> Option<Slice> {
        Some(request.clone())
    }

    fn can_retry(&self, _: &Slice) -> bool {
        true
    }
}

pub(crate) async fn a_hedged_call_is_answered_although_its_first_request_is_not(
    t: &mut Fixture,
) -> Check {
    let served = serve(t, |number| number == 0)?;
    let client = served.client(t)?;
    let service = CallService::new(client.clone());
    let period = Duration::from_secs(60);
    let mut hedged = Hedge::new_with_mock_latencies(service, Always, 1, 0.9, period, &[5, 5, 5, 5]);
    let answer = hedged.ready().await?.call(Slice::from("hello")).await?;
    assert_eq!(answer, "hello");
    assert_eq!(served.count(), 2);
    // The first request was dropped with its future.
    assert_eq!(client.stats().outstanding, 0);
    client.close().await;
    Ok(())
}

pub(crate) async fn a_call_beyond_the_limit_is_shed_at_once(t: &mut Fixture) -> Check {
    let served = serve(t, |_| true)?;
    let client = served.client(t)?;
    let service = ServiceBuilder::new()
        .load_shed()
        .concurrency_limit(2)
        .service(CallService::new(client.clone()));
    let calls: Vec<_> =
        (0..2).map(|_| tokio::spawn(service.clone().oneshot(Slice::from("held")))).collect();
    wait_until(|| served.count() == 2).await;
    let error = service.clone().oneshot(Slice::from("shed")).await.expect_err("a third call");
    assert!(error.is::<Overloaded>(), "{error:?}");
    assert_eq!(client.stats().calls, 2);
    client.abort();
    for call in calls {
        let error = call.await?.expect_err("the client has ended");
        let kind = error.downcast_ref::<CallError>().map(CallError::kind);
        assert_eq!(kind, Some(CallErrorKind::Closed), "{error:?}");
    }
    drop(served);
    let error = t.error().await;
    assert!(error.contains("reset"), "the answers have no receiver: {error}");
    Ok(())
}

pub(crate) async fn a_call_that_its_layer_times_out_leaves_its_place(t: &mut Fixture) -> Check {
    let served = serve(t, |number| number == 0)?;
    let client = served.client(t)?;
    let mut service = ServiceBuilder::new()
        .timeout(Duration::from_millis(50))
        .service(CallService::new(client.clone()));
    let error = service.ready().await?.call(Slice::from("held")).await.expect_err("no answer");
    assert!(error.is::<Elapsed>(), "{error:?}");
    assert_eq!(client.stats().outstanding, 0);
    // A call without the layer, since a busy host may answer after 50 ms.
    assert_eq!(client.call(Slice::from("next")).await?, "next");
    assert_eq!(client.stats().dials, 1, "the connection stays");
    client.close().await;
    Ok(())
}

pub(crate) async fn servers_that_are_discovered_and_removed_take_their_share(
    t: &mut Fixture,
) -> Check {
    let (first, second) = (serve(t, |_| false)?, serve(t, |_| false)?);
    let clients = [first.client(t)?, second.client(t)?];
    let (changes, discovered) = tokio::sync::mpsc::unbounded_channel();
    let mut balance = Balance::new(UnboundedReceiverStream::new(discovered));
    let insert = |key: usize| {
        let service = CallService::new(clients[key].clone());
        let service = PendingRequests::new(service, CompleteOnResponse::default());
        changes.send(Ok::<_, BoxError>(Change::Insert(key, service))).map_err(|_| "no balancer")
    };

    insert(0)?;
    call(&mut balance, 10).await?;
    assert_eq!((first.count(), second.count()), (10, 0));
    insert(1)?;
    while second.count() == 0 {
        call(&mut balance, 1).await?;
    }
    changes.send(Ok(Change::Remove(0))).map_err(|_| "no balancer")?;
    balance.ready().await?;
    let before = (first.count(), second.count());
    call(&mut balance, 10).await?;
    assert_eq!((first.count(), second.count()), (before.0, before.1 + 10));
    for client in &clients {
        client.close().await;
    }
    Ok(())
}

async fn call<S>(service: &mut S, count: usize) -> Result<(), BoxError>
where
    S: Service<Slice, Response = Slice, Error = BoxError>,
{
    for number in 0..count {
        let request = number.to_string();
        let answer = service.ready().await?.call(Slice::from(request.clone())).await?;
        assert_eq!(answer, request.as_bytes());
    }
    Ok(())
}

/// Repeats a call once, if its request cannot have been executed.
#[derive(Clone)]
struct IfUnsent {
    attempts: Arc<AtomicUsize>,
}

impl retry::Policy<Slice, Slice, CallError> for IfUnsent {
    type Future = Ready<()>;

    fn retry(&mut self, _: &mut Slice, result: &mut Result<Slice, CallError>) -> Option<Ready<()>> {
        let attempt = self.attempts.fetch_add(1, Ordering::Relaxed) + 1;
        let is_safe = result.as_ref().is_err_and(|error| !error.may_have_been_executed());
        (is_safe && attempt == 1).then(|| ready(()))
    }

    fn clone_request(&mut self, request: &Slice) -> Option<Slice> {
        Some(request.clone())
    }
}

pub(crate) async fn only_calls_that_are_safe_to_repeat_are_retried(t: &mut Fixture) -> Check {
    // Nobody listens: no byte of the request is sent.
    let closed = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.to_string();
    let client = Client::builder(LengthPrefixed::new()).dialer(t.dialer()).connect(&closed)?;
    let (attempts, error) = retried(client).await;
    assert_eq!((attempts, error.kind()), (2, CallErrorKind::CannotConnect), "{error:?}");
    let refused = std::io::Error::from(ringpoll::Error::from(error));
    assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);

    // The server has the request.
    let served = serve(t, |_| true)?;
    let builder = Client::builder(LengthPrefixed::new())
        .dialer(t.dialer())
        .call_timeout(Duration::from_millis(200));
    let client = builder.connect(&served.server.local_addr().to_string())?;
    client.ready().await?;
    let (attempts, error) = retried(client).await;
    assert_eq!((attempts, error.kind()), (1, CallErrorKind::Deadline), "{error:?}");
    Ok(())
}

/// A call that fails. Returns how often it was attempted, and the last error.
async fn retried(client: Calls) -> (usize, CallError) {
    let attempts = Arc::new(AtomicUsize::new(0));
    let policy = IfUnsent { attempts: Arc::clone(&attempts) };
    let retry = Retry::new(policy, CallService::new(client.clone()));
    let error = retry.oneshot(Slice::from("hello")).await.expect_err("no answer");
    client.close().await;
    (attempts.load(Ordering::Relaxed), error)
}
