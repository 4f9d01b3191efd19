//! Many dials that cannot succeed, each cancelled at a random moment: to an address that drops
//! every SYN, to names with several such addresses, and to names that nobody resolves. Nothing may
//! be left of them, and threads and memory stay bounded meanwhile.
//!
//! `RINGPOLL_CANCELLED_DIALS` is the number of dials for each backend. The default takes less than
//! a second; a hundred thousand take some seconds.

#[path = "conformance/harness/mod.rs"]
mod harness;

use std::env;
use std::future::{Future, pending};
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use harness::*;
use ringpoll::{Dialer, Resolve};

/// What a test of everything can afford.
const DIALS: usize = 2_000;

/// Dials at the same time.
const TASKS: usize = 128;

/// Names that are looked up at the same time, as the documentation of `Dialer::connect` says.
const LOOKUPS_MAX: usize = 64;

/// How much more memory may be resident at the end than after the first tenth of the dials. One
/// hundred bytes that each of a hundred thousand dials leaves are more.
const GROWTH_BYTES_MAX: usize = 8 << 20;

#[test]
fn cancelled_dials_leave_no_thread_no_timer_no_descriptor_and_no_memory() {
    for backend in [Backend::Epoll, Backend::Uring] {
        let mount = Mount { backend, placement: Placement::Auto, side: Side::Client };
        run(mount, &format!("cancelled_dials::{backend}"), cancel);
    }
}

fn dials_wanted() -> usize {
    match env::var("RINGPOLL_CANCELLED_DIALS") {
        Ok(text) => text.parse().expect("RINGPOLL_CANCELLED_DIALS is a number"),
        Err(_) => DIALS,
    }
}

/// Resolves a name that begins with "many" to silent addresses, and never answers for others.
struct Silent {
    addrs: Vec<SocketAddr>,
}

impl Resolve for Silent {
    fn resolve(
        &self,
        host: &str,
        _port: u16,
    ) -> Pin<Box<dyn Future<Output = io::Result<Vec<SocketAddr>>> + Send>> {
        let addrs = host.starts_with("many").then(|| self.addrs.clone());
        Box::pin(async move {
            match addrs {
                Some(addrs) => Ok(addrs),
                None => pending().await,
            }
        })
    }
}

/// What is dialled.
struct Targets {
    system: Dialer,
    silent: Dialer,
    deaf: String,
    /// The resolver of the system refuses a label of more than 63 bytes without asking a server.
    unresolvable: String,
}

impl Targets {
    fn new(t: &Fixture, deaf: &DeafListener) -> Targets {
        let resolver = Silent { addrs: vec![deaf.addr; 3] };
        let silent = t.dialer().attempt_delay(Duration::from_millis(10)).resolver(resolver);
        Targets {
            system: t.dialer(),
            silent,
            deaf: deaf.addr.to_string(),
            unresolvable: format!("{}.invalid:80", "x".repeat(64)),
        }
    }

    fn pick(&self, random: &mut Random) -> (Dialer, &str) {
        let (dialer, addr) = match random.within(0..4) {
            0 => (&self.system, self.deaf.as_str()),
            1 => (&self.system, self.unresolvable.as_str()),
            2 => (&self.silent, "never.test:80"),
            _ => (&self.silent, "many.test:80"),
        };
        (
            limited(
                limited(dialer.clone(), random, Dialer::timeout),
                random,
                Dialer::attempt_timeout,
            ),
            addr,
        )
    }
}

/// Sets no time limit, a short one, or one that the dial does not reach.
fn limited(
    dialer: Dialer,
    random: &mut Random,
    limit: impl Fn(Dialer, Duration) -> Dialer,
) -> Dialer {
    match random.within(0..3) {
        0 => dialer,
        1 => limit(dialer, Duration::from_millis(random.within(1..20) as u64)),
        _ => limit(dialer, Duration::from_secs(1000)),
    }
}

/// Dials, and gives up after a random time or a random number of polls.
async fn dial_and_cancel(targets: &Targets, random: &mut Random) {
    let (dialer, addr) = targets.pick(random);
    let dial = dialer.connect(addr);
    let dialled = match random.within(0..4) {
        0 => poll_once(dial).await,
        _ => {
            let patience = Duration::from_micros(random.within(0..30_000) as u64);
            tokio::time::timeout(patience, dial).await.ok()
        }
    };
    assert!(dialled.is_none_or(|dialled| dialled.is_err()), "{addr}: somebody answered");
}

fn cancel(t: &Fixture) -> Check {
    let deaf = DeafListener::new()?;
    let targets = Arc::new(Targets::new(t, &deaf));
    let (dials, begun) = (dials_wanted(), Instant::now());
    let (fds_before, threads_before) = (fds().len(), thread_count());
    let mut threads_max = 0;
    run_dials(t, &targets, dials / 10, &mut threads_max);
    let rss_before = rss_bytes();
    run_dials(t, &targets, dials - dials / 10, &mut threads_max);
    let ended = Instant::now();
    let is_clean = || {
        let stats = t.clients().stats();
        (stats.timers, stats.connections, fds().len()) == (0, 0, fds_before)
    };
    eventually("neither timer nor connection nor descriptor is left", is_clean);
    let (rss, clean_after) = (rss_bytes(), ended.elapsed());
    say(&format!(
        "{}: {dials} dials in {:.1} s, look-up threads at most {threads_max}, RSS {} KiB before \
         and {} KiB after, clean {} ms after the last dial",
        t.mount().backend,
        (ended - begun).as_secs_f64(),
        rss_before >> 10,
        rss >> 10,
        clean_after.as_millis(),
    ));
    assert!(threads_max <= LOOKUPS_MAX, "{threads_max} threads look names up");
    assert!(thread_count() <= threads_before, "{threads_before} before:\n{}", threads());
    assert!(rss <= rss_before + GROWTH_BYTES_MAX, "RSS {rss_before} before, {rss} after");
    Ok(())
}

/// Runs dials on [`TASKS`] tasks, and measures threads meanwhile.
fn run_dials(t: &Fixture, targets: &Arc<Targets>, dials: usize, threads_max: &mut usize) {
    let left = Arc::new(AtomicUsize::new(dials));
    let tasks: Vec<_> = (0..TASKS)
        .map(|_| {
            let (targets, left, mut random) = (Arc::clone(targets), Arc::clone(&left), t.random());
            let takes = move || {
                left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1))
            };
            on_task(async move {
                while takes().is_ok() {
                    dial_and_cancel(&targets, &mut random).await;
                }
                Ok(())
            })
        })
        .collect();
    let is_over = || {
        still_runs();
        *threads_max = (*threads_max).max(unblock_thread_count());
        left.load(Ordering::SeqCst) == 0
    };
    holds_within(Duration::from_secs(600), is_over);
    tasks.iter().for_each(Outcome::wait);
}
