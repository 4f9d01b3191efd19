// cargo run --release -p ringpoll-compat --example balance
//! Calls balanced over three servers, with the balancer and the retries of `tower`. While calls
//! run, one server becomes slow, one stops, and it comes back. The program prints what its callers
//! notice, and ends by itself.
//!
//! ```text
//!                          ┌ PeakEwma → Eject → CallService → server 1
//! Retry → Buffer → Balance ┼ PeakEwma → Eject → CallService → server 2
//!                          └ PeakEwma → Eject → CallService → server 3
//! ```

use std::error::Error as StdError;
use std::future::{Ready, ready};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use ringpoll::rpc::{Client, LengthPrefixed, serve_calls};
use ringpoll::{Handle, Result, Server, ServerHandle, Slice};
use ringpoll_compat::tower::{CallService, EjectLayer};
use tower::balance::p2c::Balance;
use tower::buffer::Buffer;
use tower::discover::ServiceList;
use tower::load::{CompleteOnResponse, PeakEwma};
use tower::retry::{Policy, Retry};
use tower::{BoxError, Layer, Service, ServiceExt};

const CALLERS: u64 = 32;
const PHASE: Duration = Duration::from_secs(3);
/// What a server takes for an answer, unless it is slow.
const LATENCY: Duration = Duration::from_millis(5);
/// How long one attempt may take. It makes a slow server one that fails, so it is ejected.
const ATTEMPT_TIMEOUT: Duration = Duration::from_millis(25);
/// The first ejection of a server, and the longest one. After it, one call probes the server.
const EJECTION: Duration = Duration::from_millis(200);
const EJECTION_MAX: Duration = Duration::from_secs(1);

#[tokio::main]
async fn main() -> std::result::Result<(), Box<dyn StdError + Send + Sync>> {
    let mut servers = [Backend::start()?, Backend::start()?, Backend::start()?];

    let alone = phase("servers 1 and 2", &servers, &balanced(&servers[..2])?).await?;
    let three = balanced(&servers)?;
    phase("servers 1, 2 and 3", &servers, &three).await?;
    servers[2].set_latency(10 * LATENCY);
    let beside = phase("server 3 is slow", &servers, &three).await?;
    let ratio = beside.as_secs_f64() / alone.as_secs_f64();
    println!("P99 with the slow server: {ratio:.2} times that without it");

    servers[2].set_latency(LATENCY);
    servers[0].stop().await?;
    phase("server 1 has stopped", &servers, &three).await?;
    servers[0].restart()?;
    phase("server 1 comes back", &servers, &three).await?;
    for server in &mut servers {
        server.stop().await?;
    }
    Ok(())
}

// ---- the balanced client ----

/// A client of all `servers`. Clones share the balancer.
fn balanced(servers: &[Backend]) -> Result<impl Calls> {
    let services = servers.iter().map(|server| {
        let client = Client::builder(LengthPrefixed::new())
            .call_timeout(ATTEMPT_TIMEOUT)
            .connect(&server.addr)?;
        // Three failures in a row are no chance.
        let eject = EjectLayer::new(3, EJECTION).longest(EJECTION_MAX);
        let service = eject.layer(CallService::new(client));
        let decay_ns = Duration::from_secs(1).as_nanos() as f64;
        Ok(PeakEwma::new(service, LATENCY, decay_ns, CompleteOnResponse::default()))
    });
    let services = services.collect::<Result<Vec<_>>>()?;
    let balance = Balance::new(ServiceList::new::<Slice>(services));
    Ok(Retry::new(Again { left: 3 }, Buffer::new(balance, CALLERS as usize)))
}

trait Calls:
    Service<Slice, Response = Slice, Error = BoxError, Future: Send> + Clone + Send + 'static
{
}
impl<S> Calls for S where
    S: Service<Slice, Response = Slice, Error = BoxError, Future: Send> + Clone + Send + 'static
{
}

/// Repeats every failed call on another server, since these calls change nothing. Others are safe
/// to repeat where `CallError::may_have_been_executed` is `false`.
#[derive(Clone)]
struct Again {
    left: u32,
}

impl Policy<Slice, Slice, BoxError> for Again {
    type Future = Ready<()>;

    fn retry(
        &mut self,
        _: &mut Slice,
        result: &mut std::result::Result<Slice, BoxError>,
    ) -> Option<Ready<()>> {
        if result.is_ok() || self.left == 0 {
            return None;
        }
        self.left -= 1;
        Some(ready(()))
    }

    fn clone_request(&mut self, request: &Slice) -> Option<Slice> {
        Some(request.clone())
    }
}

/// Calls from all callers at once, for [`PHASE`]. Returns the 99th percentile of the latencies.
async fn phase(
    name: &str,
    servers: &[Backend],
    calls: &impl Calls,
) -> std::result::Result<Duration, BoxError> {
    let before: Vec<_> = servers.iter().map(Backend::answered).collect();
    let callers: Vec<_> = (0..CALLERS).map(|id| tokio::spawn(call(id, calls.clone()))).collect();
    let (mut latencies, mut failed) = (Vec::new(), 0);
    for caller in callers {
        let (more, failures) = caller.await?;
        latencies.extend(more);
        failed += failures;
    }
    latencies.sort_unstable();
    let p99 = latencies[latencies.len() * 99 / 100];
    let answered: Vec<_> =
        servers.iter().zip(before).map(|(server, before)| server.answered() - before).collect();
    println!(
        "{name:<20} {} calls, {failed} failed, answered by {answered:?}, P50 {:.1?}, P99 {p99:.1?}",
        latencies.len(),
        latencies[latencies.len() / 2],
    );
    Ok(p99)
}

/// One caller. Returns the latencies of its answered calls, and how many calls have failed.
async fn call(id: u64, mut calls: impl Calls) -> (Vec<Duration>, u64) {
    let end = Instant::now() + PHASE;
    let (mut latencies, mut failed) = (Vec::new(), 0);
    for number in 0.. {
        let begun = Instant::now();
        if begun >= end {
            break;
        }
        let request = format!("call {number} of caller {id}");
        let answer = async { calls.ready().await?.call(Slice::from(request.clone())).await };
        match answer.await {
            Ok(answer) => {
                assert_eq!(answer, request.as_bytes(), "the answer of another call");
                latencies.push(begun.elapsed());
            }
            Err(_) => failed += 1,
        }
    }
    (latencies, failed)
}

// ---- servers ----

/// A server whose answers take a time that changes.
struct Backend {
    addr: String,
    latency_us: Arc<AtomicU64>,
    answered: Arc<AtomicU64>,
    running: Option<ServerHandle>,
}

impl Backend {
    fn start() -> Result<Backend> {
        let mut backend = Backend {
            addr: "127.0.0.1:0".to_string(),
            latency_us: Arc::default(),
            answered: Arc::default(),
            running: None,
        };
        backend.set_latency(LATENCY);
        backend.restart()?;
        Ok(backend)
    }

    /// Starts the server again, at the address that it had.
    fn restart(&mut self) -> Result<()> {
        let (latency_us, answered) = (Arc::clone(&self.latency_us), Arc::clone(&self.answered));
        let echo = move |request: Slice, handle: Handle| {
            let latency = Duration::from_micros(latency_us.load(Ordering::Relaxed));
            let answered = Arc::clone(&answered);
            async move {
                handle.sleep_until(Instant::now() + latency).await;
                answered.fetch_add(1, Ordering::Relaxed);
                Ok(request)
            }
        };
        let server = Server::builder()
            .on_connect(serve_calls(LengthPrefixed::new(), echo))
            .bind(&self.addr)?
            .spawn()?;
        self.addr = server.local_addr().to_string();
        self.running = Some(server);
        Ok(())
    }

    async fn stop(&mut self) -> Result<()> {
        match self.running.take() {
            Some(server) => server.shutdown_async(Duration::from_secs(1)).await,
            None => Ok(()),
        }
    }

    fn set_latency(&self, latency: Duration) {
        self.latency_us.store(latency.as_micros() as u64, Ordering::Relaxed);
    }

    fn answered(&self) -> u64 {
        self.answered.load(Ordering::Relaxed)
    }
}
