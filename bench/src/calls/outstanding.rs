//! Many calls that are outstanding at the same time: the memory that they take, and that each has
//! its answer once.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde::Serialize;
use tokio::task::JoinSet;

use super::clients::Echo;
use super::load::Bodies;
use crate::cli::CallsArgs;
use crate::error::{Failure, Result};
use crate::host::process::resident_bytes;

/// The JSON object of `calls --outstanding`.
#[derive(Debug, Serialize)]
pub(super) struct Found {
    calls: u32,
    /// Memory of this process before the first call.
    rss_bytes_before: u64,
    /// The same number of calls again and again: memory that stays allocated is used again.
    waves: Vec<Wave>,
    /// Answers by the client's own count; `None` of a client that does not count.
    client_answers: Option<u64>,
    /// Answers without a call, by the same count.
    discarded_answers: Option<u64>,
}

#[derive(Debug, Serialize)]
struct Wave {
    /// Answers that were those of their requests. Each call counts once.
    right_answers: u64,
    /// The most calls that were seen outstanding, by the client's count.
    outstanding_max: Option<usize>,
    /// The most memory that was seen.
    rss_bytes_peak: u64,
    /// After the last answer.
    rss_bytes_after: u64,
    elapsed_s: f64,
}

/// Makes `count` calls at once, a task each, and waits for all answers; a few times.
pub(super) async fn run<E: Echo>(args: &CallsArgs, client: E, count: u32) -> Result<Found> {
    let bodies = Bodies::new(args.size.0);
    let rss_bytes_before = resident_bytes(std::process::id())?;
    let mut waves = Vec::new();
    for sequence in 0..args.waves.into() {
        waves.push(wave(&client, &bodies, count, sequence).await?);
    }
    let counts = client.counts();
    Ok(Found {
        calls: count,
        rss_bytes_before,
        waves,
        client_answers: counts.map(|counts| counts.answers),
        discarded_answers: counts.map(|counts| counts.discarded),
    })
}

async fn wave<E: Echo>(client: &E, bodies: &Bodies, count: u32, sequence: u64) -> Result<Wave> {
    let pid = std::process::id();
    let begun = Instant::now();
    let right = Arc::new(AtomicU64::new(0));
    let mut tasks = JoinSet::new();
    for caller in 0..u64::from(count) {
        let (client, bodies, right) = (client.clone(), bodies.clone(), Arc::clone(&right));
        tasks.spawn(async move {
            let answer = client.echo(bodies.request(caller, sequence)).await?;
            if !bodies.is_answer(answer.as_ref(), caller, sequence) {
                return Err(Failure::new("the answer is not that of the request"));
            }
            right.fetch_add(1, Ordering::Relaxed);
            Ok(())
        });
    }
    let (mut rss_bytes_peak, mut outstanding_max) = (0, None);
    let mut looks = tokio::time::interval(LOOK_PAUSE);
    loop {
        tokio::select! {
            ended = tasks.join_next() => match ended {
                Some(ended) => ended.map_err(Failure::at("a caller"))??,
                None => break,
            },
            _ = looks.tick() => {
                rss_bytes_peak = rss_bytes_peak.max(resident_bytes(pid)?);
                let outstanding = client.counts().map(|counts| counts.outstanding);
                outstanding_max = outstanding_max.max(outstanding);
                if begun.elapsed() > PATIENCE {
                    return Err(Failure::new(format!("calls without an answer in {PATIENCE:?}")));
                }
            }
        }
    }
    Ok(Wave {
        right_answers: right.load(Ordering::Relaxed),
        outstanding_max,
        rss_bytes_peak,
        rss_bytes_after: resident_bytes(pid)?,
        elapsed_s: begun.elapsed().as_secs_f64(),
    })
}

/// Between two looks at the memory.
const LOOK_PAUSE: Duration = Duration::from_millis(10);
const PATIENCE: Duration = Duration::from_secs(60);
