//! The callers, and the measured time.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use tokio::sync::mpsc::{self, Receiver, Sender};

use super::Line;
use super::clients::Echo;
use crate::cli::CallsArgs;
use crate::error::{Failure, Result};
use crate::host::cpu::{self, Ticks};
use crate::host::process::{CpuUse, resident_bytes};
use crate::load::{Latency, histogram};
use crate::wire::Template;

/// What all requests have in common.
#[derive(Clone)]
pub(super) struct Bodies(Arc<[u8]>);

impl Bodies {
    pub(super) fn new(bytes: u32) -> Bodies {
        Bodies(Template::new(bytes).payload().into())
    }

    /// The request of a caller with this number.
    pub(super) fn request(&self, caller: u64, sequence: u64) -> Vec<u8> {
        let mut request = self.0.to_vec();
        request[..FRONT_BYTES].copy_from_slice(&front(caller, sequence));
        request
    }

    /// Whether `answer` is that of this request.
    pub(super) fn is_answer(&self, answer: &[u8], caller: u64, sequence: u64) -> bool {
        answer.len() == self.0.len()
            && answer[..FRONT_BYTES] == front(caller, sequence)
            && answer[FRONT_BYTES..] == self.0[FRONT_BYTES..]
    }
}

fn front(caller: u64, sequence: u64) -> [u8; FRONT_BYTES] {
    let mut front = [0; FRONT_BYTES];
    front[..FRONT_BYTES / 2].copy_from_slice(&caller.to_be_bytes());
    front[FRONT_BYTES / 2..].copy_from_slice(&sequence.to_be_bytes());
    front
}

/// What the callers share.
struct Callers {
    phase: AtomicU8,
    found: Mutex<Found>,
}

/// Waits until all clones of a sender are dropped: each caller holds one.
async fn all_dropped(sender: Sender<()>, mut receiver: Receiver<()>) {
    drop(sender);
    // Nothing is sent.
    let _ = receiver.recv().await;
}

struct Found {
    calls: u64,
    calls_ever: u64,
    latency: Histogram<u64>,
    failure: Option<Failure>,
}

impl Callers {
    fn found(&self) -> MutexGuard<'_, Found> {
        self.found.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, phase: u8) {
        self.phase.store(phase, Ordering::Relaxed);
    }
}

/// Makes one call after the other.
async fn call_on<E: Echo>(callers: Arc<Callers>, client: E, bodies: Bodies, caller: u64) {
    for sequence in 0.. {
        let request = bodies.request(caller, sequence);
        let begun = Instant::now();
        let answer = client.echo(request).await;
        let latency = begun.elapsed();
        let wrong = match answer {
            Ok(answer) if bodies.is_answer(answer.as_ref(), caller, sequence) => None,
            Ok(_) => Some(Failure::new("the answer is not that of the request")),
            Err(failure) => Some(failure),
        };
        let phase = callers.phase.load(Ordering::Relaxed);
        let mut found = callers.found();
        if let Some(failure) = wrong {
            found.failure.get_or_insert(failure);
            return;
        }
        found.calls_ever += 1;
        if phase == MEASURING {
            found.calls += 1;
            found.latency.saturating_record(latency.as_nanos() as u64);
        }
        if phase == ENDING {
            return;
        }
    }
}

/// The clocks at one moment.
struct Clocks {
    at: Instant,
    client: CpuUse,
    server: Option<CpuUse>,
    ticks: Ticks,
    system_calls: Option<u64>,
}

impl Clocks {
    fn read(args: &CallsArgs, client: &impl Echo, cpus: &[usize]) -> Result<Clocks> {
        Ok(Clocks {
            server: args.server_pid.map(CpuUse::read).transpose()?,
            ticks: Ticks::read(cpus),
            system_calls: client.system_calls(),
            at: Instant::now(),
            client: CpuUse::read(std::process::id())?,
        })
    }
}

pub(super) async fn run<E: Echo>(args: &CallsArgs, client: E) -> Result<Line> {
    let latency = histogram()?;
    let found = Found { calls: 0, calls_ever: 0, latency, failure: None };
    let callers = Arc::new(Callers { phase: AtomicU8::new(WARMING_UP), found: Mutex::new(found) });
    let bodies = Bodies::new(args.size.0);
    let (running, ended) = mpsc::channel(1);
    for caller in 0..args.callers {
        let calls = call_on(Arc::clone(&callers), client.clone(), bodies.clone(), caller.into());
        let running = running.clone();
        client.spawn(async move {
            calls.await;
            drop(running);
        });
    }
    let cpus = args.steal_cpus.as_ref().map_or_else(cpu::online, |list| list.0.clone());
    let warmup = args.warmup.unwrap_or((args.duration / 5).min(WARMUP_MAX));
    tokio::time::sleep(warmup).await;
    let opened = Clocks::read(args, &client, &cpus)?;
    callers.set(MEASURING);
    tokio::time::sleep(args.duration).await;
    callers.set(ENDING);
    let closed = Clocks::read(args, &client, &cpus)?;
    let rss_bytes = resident_bytes(std::process::id())?;
    if tokio::time::timeout(END_PATIENCE, all_dropped(running, ended)).await.is_err() {
        return Err(Failure::new(format!("calls without an answer after {END_PATIENCE:?}")));
    }
    let mut found = callers.found();
    match found.failure.take() {
        Some(failure) => Err(failure),
        None if found.calls == 0 => Err(Failure::new("not one answer in the measured time")),
        None => Ok(line(&found, &opened, &closed, rss_bytes)),
    }
}

fn line(found: &Found, opened: &Clocks, closed: &Clocks, rss_bytes: u64) -> Line {
    let calls = found.calls as f64;
    let elapsed_s = (closed.at - opened.at).as_secs_f64();
    let client_ns = closed.client.ns_since(opened.client);
    let server_ns = closed.server.zip(opened.server).map(|(now, then)| now.ns_since(then));
    let system_calls = closed.system_calls.zip(opened.system_calls);
    let others = |server_ns| closed.ticks.others_percent_since(opened.ticks, client_ns + server_ns);
    Line {
        calls: found.calls,
        calls_ever: found.calls_ever,
        elapsed_s,
        calls_per_s: calls / elapsed_s,
        cpu_us_per_call: client_ns as f64 / 1e3 / calls,
        calls_per_cpu_s: calls * 1e9 / client_ns.max(1) as f64,
        client_cpus_busy: client_ns as f64 / 1e9 / elapsed_s,
        server_cpus_busy: server_ns.map(|ns| ns as f64 / 1e9 / elapsed_s),
        latency_us: Latency::of(&found.latency).unwrap_or_default(),
        system_calls_per_call: system_calls.map(|(now, then)| (now - then) as f64 / calls),
        rss_bytes,
        steal_percent: closed.ticks.stolen_percent_since(opened.ticks),
        others_percent: server_ns.map(others),
    }
}

/// The number of the caller, and that of its call.
pub(super) const FRONT_BYTES: usize = 16;
const WARMUP_MAX: Duration = Duration::from_millis(300);
const END_PATIENCE: Duration = Duration::from_secs(10);
/// The phases of a measurement.
const WARMING_UP: u8 = 0;
const MEASURING: u8 = 1;
const ENDING: u8 = 2;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_that_of_one_request_only() {
        let bodies = Bodies::new(64);
        let request = bodies.request(3, 5);
        assert!(bodies.is_answer(&request, 3, 5));
        assert!(!bodies.is_answer(&request, 3, 6) && !bodies.is_answer(&request, 4, 5));
        assert!(!bodies.is_answer(&request[..63], 3, 5));
        for index in [0, FRONT_BYTES, 63] {
            let mut wrong = request.clone();
            wrong[index] ^= 1;
            assert!(!bodies.is_answer(&wrong, 3, 5), "{index}");
        }
    }
}
