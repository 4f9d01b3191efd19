//! Calls to servers that misbehave: every call ends with its own answer or an error, and nothing is
//! left.
//!
//! `RINGPOLL_CHAOS_SECONDS` is the time for each backend. The default is short; minutes are for a
//! release build.

use std::env;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use ringpoll::rpc::{CallErrorKind, Client, LengthPrefixed, serve_calls};
use ringpoll::{Handle, Slice};
use rustix::process::{Pid, Signal, kill_process};

use crate::harness::*;

macro_rules! cases {
    ($tests:ident, $mount:ident) => {
        $tests! { $mount, rpc_chaos:
            every_call_to_servers_that_misbehave_ends
            calls_to_a_process_that_is_stopped_end_at_their_deadlines
        }
    };
}
pub(crate) use cases;

const SECONDS: u64 = 5;

const CALLERS: u64 = 64;

/// How often the servers are killed and started again.
const LIFE: Duration = Duration::from_millis(300);

/// How long there is no server then.
const AWAY: Duration = Duration::from_millis(30);

#[derive(Default)]
struct Seen {
    answers: AtomicU64,
    deadlines: AtomicU64,
    lost: AtomicU64,
    unconnected: AtomicU64,
    dropped: AtomicU64,
    /// Calls that ended more than a second after their deadline. Only counted: a busy host is slow.
    late: AtomicU64,
}

pub(crate) fn every_call_to_servers_that_misbehave_ends(t: &Fixture) -> Check {
    let seconds = env::var("RINGPOLL_CHAOS_SECONDS")
        .map_or(SECONDS, |text| text.parse().expect("RINGPOLL_CHAOS_SECONDS is a number"));
    let until = Instant::now() + Duration::from_secs(seconds);
    let first = Played::new()?;
    let addr = first.addr;
    let mut random = t.random();
    let servers = random.fork();
    let servers = on_thread(move || kill_and_restart(first, addr, servers, until));
    let client = client_builder(t).connections(4).outstanding_max(48);
    let client = client
        .backoff(Duration::from_millis(1), Duration::from_millis(20))
        .connect(&addr.to_string())?;
    let seen = Arc::<Seen>::default();
    let callers: Vec<_> = (0..CALLERS)
        .map(|caller| {
            let (client, seen, random) = (client.clone(), Arc::clone(&seen), random.fork());
            on_task(async move { call_until(caller, client, &seen, random, until).await })
        })
        .collect();
    while Instant::now() < until {
        still_runs();
        thread::park_timeout(Duration::from_millis(100));
    }
    callers.iter().for_each(Outcome::wait);
    servers.wait();
    let stats = client.stats();
    say(&format!("chaos on {}: {stats:?}, {seen}", t.mount().backend));
    assert_eq!((stats.outstanding, stats.waiting), (0, 0));
    let ends = [&seen.answers, &seen.deadlines, &seen.lost, &seen.dropped];
    assert!(ends.iter().all(|count| count.load(Ordering::Relaxed) > 0), "{seen}");
    assert!(stats.discarded_answers > 0 && stats.lost_connections > 0, "{stats:?}");
    block_on(async {
        client.close().await;
        Ok(())
    })?;
    assert_eq!(client.stats().connections, 0);
    drop(client);
    // A connection that closes with unsent bytes has a timer until that is due. Calls have none.
    let connections = stats.dials - stats.failed_dials;
    let timers = || t.clients().stats().timers;
    eventually("no timer of a call is left", || timers() <= connections);
    Ok(())
}

/// Makes calls, some of which are dropped before their end.
async fn call_until(
    caller: u64,
    client: Client<LengthPrefixed>,
    seen: &Seen,
    mut random: Random,
    until: Instant,
) -> Check {
    let mut number = 0;
    while Instant::now() < until {
        number += 1;
        let offset = (caller * 1_000_003 + number * 257) as usize;
        let mut request = format!("{caller}:{number};").into_bytes();
        request.extend(pattern(offset, random.within(0..3000)));
        let request = Slice::from(request);
        let timeout = Duration::from_millis(random.within(1..150) as u64);
        let deadline = Instant::now() + timeout;
        let mut call = client.call_within(request.clone(), timeout);
        if random.one_in(10) {
            let polls = random.within(1..4);
            for _ in 0..polls {
                if poll_once(&mut call).await.is_some() {
                    break;
                }
                tokio::task::yield_now().await;
            }
            drop(call);
            seen.dropped.fetch_add(1, Ordering::Relaxed);
            continue;
        }
        let count = match call.await {
            Ok(answer) => {
                assert!(answer == request, "a crossed answer: {answer:?} for {request:?}");
                &seen.answers
            }
            Err(error) => match error.kind() {
                CallErrorKind::Deadline => &seen.deadlines,
                CallErrorKind::ConnectionLost => &seen.lost,
                CallErrorKind::CannotConnect => {
                    assert!(!error.may_have_been_executed());
                    &seen.unconnected
                }
                _ => return Err(Failure::new(error)),
            },
        };
        count.fetch_add(1, Ordering::Relaxed);
        if deadline.elapsed() > Duration::from_secs(1) {
            seen.late.fetch_add(1, Ordering::Relaxed);
        }
    }
    Ok(())
}

/// Plays servers at one address, one after the other, each for a short time.
fn kill_and_restart(first: Played, addr: SocketAddr, mut random: Random, until: Instant) -> Check {
    let mut server = Some(first);
    while Instant::now() < until {
        let played = match server.take() {
            Some(first) => first,
            None => Played::at(addr)?,
        };
        let is_killed = Arc::new(AtomicBool::new(false));
        let end = (Instant::now() + LIFE).min(until);
        let mut lines: Vec<JoinHandle<()>> = Vec::new();
        while Instant::now() < end {
            if let Some(line) = played.try_accept()? {
                let (random, is_killed) = (random.fork(), Arc::clone(&is_killed));
                lines.push(thread::spawn(move || misbehave(line, random, &is_killed)));
            }
            lines.retain(|line| !line.is_finished());
            thread::park_timeout(Duration::from_millis(1));
        }
        drop(played);
        is_killed.store(true, Ordering::Relaxed);
        for line in lines {
            line.join().map_err(|_| Failure::new("a server panicked"))?;
        }
        thread::park_timeout(AWAY);
    }
    Ok(())
}

/// Answers at once, later, twice, never, or with bytes that are no answer; stops reading; closes.
fn misbehave(mut line: Line, mut random: Random, is_killed: &AtomicBool) {
    let mut held: Vec<(u32, Vec<u8>)> = Vec::new();
    while !is_killed.load(Ordering::Relaxed) {
        let (number, body) = match line.request_within(Duration::from_millis(20)) {
            Ok(Some(request)) => request,
            Ok(None) => {
                // The client waits: late answers.
                if held.drain(..).any(|(number, body)| line.answer(number, &body).is_err()) {
                    return;
                }
                continue;
            }
            Err(_) => return,
        };
        let sent = match random.within(0..1000) {
            0..600 => line.answer(number, &body),
            600..800 => {
                held.push((number, body));
                Ok(())
            }
            800..850 => line.answer(number, &body).and_then(|()| line.answer(number, &body)),
            850..930 => Ok(()),
            930..960 => line.answer(number ^ 0x8000_0000, &body),
            960..985 => {
                thread::park_timeout(Duration::from_millis(random.within(1..10) as u64));
                line.answer(number, &body)
            }
            985..990 => {
                // Stands for a process that is stopped.
                thread::park_timeout(Duration::from_millis(random.within(50..200) as u64));
                line.answer(number, &body)
            }
            990..993 => line.0.write_all(&[0, 0, 0, 1, 9, 9]),
            993..996 => {
                // A part of a frame. More bytes behind it could be taken for any answer.
                let _ = line.0.write_all(&[0, 0, 1, 0, 0, 0]);
                return;
            }
            996..998 => {
                let _ = reset(line.0);
                return;
            }
            _ => return,
        };
        if sent.is_err() {
            return;
        }
        if !held.is_empty() && random.one_in(4) {
            let index = random.within(0..held.len());
            let (number, body) = held.swap_remove(index);
            if line.answer(number, &body).is_err() {
                return;
            }
        }
    }
}

/// Set for a process that serves calls for this test.
const CHILD: &str = "RINGPOLL_CHAOS_CHILD";

/// What such a process prints before its address.
const SERVES: &str = "serves ";

/// Kills its process when it is dropped.
struct Served(Child);

impl Served {
    /// Starts this test in a process of its own, which serves. Returns its address as well.
    fn start() -> Check<(Served, String)> {
        let test = thread::current().name().unwrap_or_default().to_owned();
        let mut command = Command::new(env::current_exe()?);
        command.args([&test, "--exact", "--nocapture"]).env(CHILD, "1");
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut served = Served(command.spawn()?);
        let output = served.0.stdout.take().ok_or_else(|| Failure::new("no output"))?;
        for line in BufReader::new(output).lines() {
            if let Some((_, addr)) = line?.split_once(SERVES) {
                let addr = addr.to_owned();
                return Ok((served, addr));
            }
        }
        Err(Failure::new("the process does not serve"))
    }

    fn signal(&self, signal: Signal) -> Check {
        Ok(kill_process(Pid::from_child(&self.0), signal)?)
    }

    /// Returns when every thread has stopped: one that still runs may answer.
    fn stop(&self) -> Check {
        self.signal(Signal::STOP)?;
        let tasks = format!("/proc/{}/task", self.0.id());
        let has_stopped = |task: std::fs::DirEntry| {
            let stat = std::fs::read_to_string(task.path().join("stat")).unwrap_or_default();
            // The state comes after the name, which is in parentheses.
            stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('T'))
        };
        eventually("the process stops", || {
            std::fs::read_dir(&tasks).is_ok_and(|all| all.flatten().all(has_stopped))
        });
        Ok(())
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub(crate) fn calls_to_a_process_that_is_stopped_end_at_their_deadlines(t: &Fixture) -> Check {
    if env::var_os(CHILD).is_some() {
        let handler = |request: Slice, _: Handle| async { Ok(request) };
        let server = t.spawn(t.server().on_connect(serve_calls(LengthPrefixed::new(), handler)));
        println!("{SERVES}{}", addr_of(&server));
        // Until the test ends, or kills this process.
        io::stdin().read_to_end(&mut Vec::new())?;
        return Ok(());
    }
    let (served, addr) = Served::start()?;
    let client = client_builder(t).connections(2).connect(&addr)?;
    block_on(async {
        assert_eq!(client.call(body("runs")).await?, "runs");
        served.stop()?;
        for _ in 0..10 {
            let call = client.call_within(body("stopped"), Duration::from_millis(5));
            let error = call.await.expect_err("no answer");
            assert_eq!(error.kind(), CallErrorKind::Deadline);
        }
        served.signal(Signal::CONT)?;
        assert_eq!(client.call(body("goes on")).await?, "goes on");
        eventually("late answers are dropped", || client.stats().discarded_answers > 0);
        served.stop()?;
        let mut call = client.call_within(body("killed"), Duration::ZERO);
        assert!(poll_once(&mut call).await.is_none());
        served.signal(Signal::KILL)?;
        let error = call.await.expect_err("no answer");
        let ends = [CallErrorKind::ConnectionLost, CallErrorKind::CannotConnect];
        assert!(ends.contains(&error.kind()), "{error:?}");
        client.close().await;
        Ok(())
    })
}

impl std::fmt::Display for Seen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let of = |count: &AtomicU64| count.load(Ordering::Relaxed);
        write!(
            f,
            "{} answers, {} deadlines, {} lost, {} without a connection, {} dropped, {} late",
            of(&self.answers),
            of(&self.deadlines),
            of(&self.lost),
            of(&self.unconnected),
            of(&self.dropped),
            of(&self.late)
        )
    }
}
