//! One measurement: start a candidate, load it, watch its process, stop it.

use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use rustix::process::{Pid, Signal, kill_process};
use rustix::time::{ClockId, clock_gettime};
use serde_json::Value;

use crate::cli::CompareScenario;
use crate::compare::caller;
use crate::compare::candidate::Candidate;
use crate::compare::child::{Said, Server};
use crate::compare::model::{Curve, IdleRow, Rest, Round};
use crate::compare::plan::{Cell, Pinned, Settings};
use crate::error::{Failure, Result};
use crate::host::cpu::Ticks;
use crate::host::process::{CpuUse, ended_children_ns, resident_bytes};
use crate::load::{Latency, Observer, Outcome, Plan, dial, engine};
use crate::peers::Peer;
use crate::rpc::Protocol;
use crate::stats::Stats;
use crate::wire::Template;

/// A candidate under one kind of traffic, once; and what its server warned of.
pub(crate) fn round(
    candidate: &Candidate,
    cell: &Cell,
    settings: &Settings,
    index: u32,
) -> Result<(Round, Vec<String>)> {
    if let Candidate::Caller(caller) = candidate {
        return caller::round(*caller, cell, settings, index);
    }
    let started = Started::new(candidate, cell, settings)?;
    let server = &started.server;
    let mut watch = Watch::new(&started, candidate.is_ours(), settings.cpus_in_use(cell));
    let outcome = match checked(load(cell, server.addr(), settings, &mut watch)) {
        Ok(outcome) => outcome,
        Err(failure) => return Err(started.server.explain(failure)),
    };
    let seen = watch.seen?;
    let mut said = started.stop()?;
    said.reports.extend(seen.reports);
    if cell.rate.is_some_and(|rate| outcome.fell_behind(rate)) {
        said.warnings.push(FELL_BEHIND.to_owned());
    }
    let server = seen.server;
    let counted = Counted::new(&said, outcome.requests, outcome.requests_ever);
    let elapsed_s = outcome.elapsed.as_secs_f64();
    let latency = outcome.latency_us();
    let clean = Latency::of(&outcome.clean.latency);
    let heavy_requests = outcome.heavy_requests();
    // Where nothing is heavy it would be the same figure twice.
    let cheap = |histogram| Latency::of(histogram).filter(|_| heavy_requests > 0);
    let round = Round {
        index,
        requests: outcome.requests,
        elapsed_s,
        rps: outcome.rps(),
        per_cpu_s: server.map(|server| outcome.requests as f64 * 1e9 / server.ns.max(1) as f64),
        server_cpus_busy: server.map(|server| server.ns as f64 / 1e9 / elapsed_s),
        sqpoll_cpus_busy: server.map(|server| server.sqpoll_ns as f64 / 1e9 / elapsed_s),
        client_cpus_busy: seen.client_ns as f64 / 1e9 / elapsed_s,
        p50_us: latency.p50,
        p90_us: latency.p90,
        p99_us: latency.p99,
        p999_us: latency.p999,
        p9999_us: (outcome.requests >= P9999_REQUESTS).then_some(latency.p9999),
        max_us: latency.max,
        latency_curve: latency_curve(&outcome.latency),
        clean_p50_us: clean.map(|clean| clean.p50),
        clean_p99_us: clean.map(|clean| clean.p99),
        windows: outcome.clean.windows,
        windows_left_out: outcome.clean.windows_left_out,
        cheap_p99_us: cheap(&outcome.cheap_latency).map(|cheap| cheap.p99),
        clean_cheap_p99_us: cheap(&outcome.clean.cheap_latency).map(|cheap| cheap.p99),
        heavy_requests,
        steal_percent: seen.steal_percent,
        others_percent: seen.others_percent,
        rss_bytes: server.map(|server| server.rss_bytes),
        system_calls_per_request: counted.per_request("system_calls"),
        completions_per_wait: counted.over("ring_completions", "wait_calls"),
        sqpoll_work_share: counted.over("sqpoll_work_us", "sqpoll_cpu_us"),
    };
    Ok((round, said.warnings))
}

/// Loads a server with a kind of traffic.
fn load(
    cell: &Cell,
    addr: SocketAddr,
    settings: &Settings,
    observer: &mut dyn Observer,
) -> Result<Outcome> {
    match cell.http {
        Some(http) => {
            let duration = Duration::from_secs_f64(settings.duration_s);
            http.run(addr, duration, settings.timeout(), observer)
        }
        None => engine::run(&cell.plan(addr, settings), observer),
    }
}

/// A candidate, and before it what it forwards to.
struct Started {
    server: Server,
    upstream: Option<Server>,
}

impl Started {
    fn new(candidate: &Candidate, cell: &Cell, settings: &Settings) -> Result<Started> {
        let pinned = settings.pinned_for(cell);
        let mut upstream = None;
        if cell.scenario == CompareScenario::Proxy {
            // On the client's CPUs: the proxy's own are for the proxy.
            let aside = pinned
                .map(|pinned| Pinned { server_cpus: pinned.client_cpus.clone(), ..pinned.clone() });
            upstream = Some(Server::start(&UPSTREAM, &[], settings, aside.as_ref())?);
        }
        let mut args = cell.server_args(upstream.as_ref().map(Server::addr));
        // A peer has but one.
        if candidate.is_ours() && cell.protocol != Protocol::Frames {
            args.push(format!("--protocol={}", cell.protocol));
        }
        let server = Server::start(candidate, &args, settings, pinned)?;
        Ok(Started { server, upstream })
    }

    fn stop(self) -> Result<Said> {
        let said = self.server.stop()?;
        self.upstream.map_or(Ok(()), |upstream| upstream.stop().map(drop))?;
        Ok(said)
    }
}

/// Without the quantiles that would be those of the slowest request alone.
fn latency_curve(latency: &Histogram<u64>) -> Curve {
    let has = |percent: &&f64| latency.len() as f64 * (100.0 - **percent) >= 99.9;
    let at = |percent: &f64| (*percent, latency.value_at_quantile(percent / 100.0) as f64 / 1e3);
    let max = (!latency.is_empty()).then(|| (100.0, latency.max() as f64 / 1e3));
    CURVE_PERCENTS.iter().filter(has).map(at).chain(max).collect()
}

/// How many requests per second a candidate answers at most under a kind of traffic, measured for
/// a moment.
pub(crate) fn capacity(candidate: &Candidate, cell: &Cell, settings: &Settings) -> Result<f64> {
    let started = Started::new(candidate, cell, settings)?;
    let closed = Cell { rate: None, ..cell.clone() };
    let plan = Plan { duration: CAPACITY_TIME, ..closed.plan(started.server.addr(), settings) };
    match checked(engine::run(&plan, &mut ())) {
        Ok(outcome) => started.stop().map(|_| outcome.rps()),
        Err(failure) => Err(started.server.explain(failure)),
    }
}

/// What a server counted by itself: in the measured window where it told, else in its whole life.
struct Counted<'a> {
    opened: &'a Value,
    closed: &'a Value,
    requests: u64,
}

impl<'a> Counted<'a> {
    fn new(said: &'a Said, requests: u64, requests_ever: u64) -> Counted<'a> {
        match &said.reports[..] {
            [opened, closed] => Counted { opened, closed, requests },
            _ => Counted { opened: &Value::Null, closed: &said.last, requests: requests_ever },
        }
    }

    fn count(&self, name: &str) -> Option<f64> {
        let before = self.opened[name].as_u64().unwrap_or(0);
        Some(self.closed[name].as_u64()?.saturating_sub(before) as f64)
    }

    fn per_request(&self, name: &str) -> Option<f64> {
        Some(self.count(name)? / self.requests as f64)
    }

    /// `None` of nothing.
    fn over(&self, name: &str, other: &str) -> Option<f64> {
        let other = self.count(other).filter(|count| *count > 0.0)?;
        Some(self.count(name)? / other)
    }
}

/// System calls per request, counted by the kernel. Counting costs time, so such a run is good for
/// nothing else.
pub(crate) fn system_calls_by_perf(
    candidate: &Candidate,
    cell: &Cell,
    settings: &Settings,
) -> Result<f64> {
    if let Candidate::Caller(caller) = candidate {
        return caller::system_calls_by_perf(*caller, cell, settings);
    }
    let Started { server, upstream: _upstream } = Started::new(candidate, cell, settings)?;
    let pid = server.pid().ok_or_else(|| Failure::new("its process is not known"))?;
    let perf = Perf::attach(pid)?;
    let outcome = checked(load(cell, server.addr(), settings, &mut ()));
    let calls = perf.detach();
    match outcome {
        Ok(outcome) => Ok(calls? as f64 / outcome.requests_ever as f64),
        Err(failure) => Err(server.explain(failure)),
    }
}

/// Memory per idle connection, and whether an idle server rests.
pub(crate) fn idle(
    candidate: &Candidate,
    connections: u32,
    window: Option<Duration>,
    settings: &Settings,
) -> IdleRow {
    let mut row = IdleRow {
        candidate: candidate.to_string(),
        connections,
        failure: None,
        silent_bytes: None,
        used_bytes: None,
        rest: None,
    };
    if let Err(failure) = watch_idle(candidate, window, settings, &mut row) {
        row.failure = Some(failure.to_string());
    }
    row
}

fn watch_idle(
    candidate: &Candidate,
    window: Option<Duration>,
    settings: &Settings,
    row: &mut IdleRow,
) -> Result<()> {
    let server = Server::start(candidate, &[], settings, settings.pinned.as_ref())?;
    let pid = server.pid().ok_or_else(|| Failure::new("its process is not known"))?;
    let timeout = settings.timeout();
    let template = Template::new(IDLE_PAYLOAD_BYTES);
    let mut fds = Vec::new();
    let mut watched = || -> Result<()> {
        // One connection first: what a server sets up once is not the price of a connection.
        dial::open(server.addr(), 1, timeout, &mut fds)?;
        dial::ping_each(&fds, &template, timeout)?;
        let before = settled_bytes(pid)?;
        let count = row.connections as usize;
        dial::open(server.addr(), count, timeout, &mut fds)?;
        let per_connection = |bytes: u64| bytes.saturating_sub(before) as f64 / count as f64;
        row.silent_bytes = Some(per_connection(settled_bytes(pid)?));
        dial::ping_each(&fds, &template, timeout)?;
        row.used_bytes = Some(per_connection(settled_bytes(pid)?));
        if let Some(window) = window {
            let start = CpuUse::read(pid)?;
            std::thread::sleep(window);
            let end = CpuUse::read(pid)?;
            row.rest = Some(Rest {
                window_s: window.as_secs_f64(),
                cpu_us: end.ns_since(start) as f64 / 1e3,
                runs: end.runs_since(start),
            });
        }
        Ok(())
    };
    match watched() {
        Ok(()) => server.stop().map(drop),
        Err(failure) => Err(server.explain(failure)),
    }
}

/// Resident memory once it has stopped changing: connections are accepted after they are connected.
fn settled_bytes(pid: u32) -> Result<u64> {
    let deadline = Instant::now() + SETTLE_MAX;
    let mut bytes = resident_bytes(pid)?;
    loop {
        std::thread::sleep(SETTLE_PAUSE);
        let next = resident_bytes(pid)?;
        if next == bytes || Instant::now() >= deadline {
            return Ok(next);
        }
        bytes = next;
    }
}

/// A comparison is of right answers only.
fn checked(outcome: Result<Outcome>) -> Result<Outcome> {
    let outcome = outcome?;
    match &outcome.first_error {
        None if outcome.requests == 0 => Err(Failure::new("not one reply in the measured window")),
        None => Ok(outcome),
        Some(first) => Err(Failure::new(format!("{} errors, the first: {first}", outcome.errors))),
    }
}

/// Reads the clocks of both sides when the window opens and closes.
struct Watch<'a> {
    server: &'a Server,
    /// What it forwards to is not one of the others.
    upstream: Option<&'a Server>,
    /// Whether it tells its counters when asked.
    reports: bool,
    cpus: Vec<usize>,
    opened: Result<Opened>,
    seen: Result<Seen>,
}

/// The clocks when the window opened.
struct Opened {
    /// `None` of a server whose process is not known.
    server: Option<CpuUse>,
    upstream: Option<CpuUse>,
    /// What a server on another host told.
    told: Option<Stats>,
    ticks: Ticks,
    client_ns: u64,
}

struct Seen {
    server: Option<SeenServer>,
    client_ns: u64,
    steal_percent: f64,
    others_percent: Option<f64>,
    /// The counters of a server on another host when the window opened and when it closed.
    reports: Vec<Value>,
}

#[derive(Clone, Copy)]
struct SeenServer {
    ns: u64,
    sqpoll_ns: u64,
    rss_bytes: u64,
}

impl<'a> Watch<'a> {
    fn new(started: &'a Started, reports: bool, cpus: Vec<usize>) -> Watch<'a> {
        let seen = Err(Failure::new("the window never closed"));
        let opened = Err(Failure::new("the window never opened"));
        let (server, upstream) = (&started.server, started.upstream.as_ref());
        Watch { server, upstream, reports, cpus, opened, seen }
    }

    fn ask_report(&self) {
        if self.reports {
            self.server.ask_report();
        }
    }

    fn look(&self) -> Result<Seen> {
        let before = self.opened.as_ref().map_err(Clone::clone)?;
        let client_ns = own_cpu_ns().saturating_sub(before.client_ns);
        let ticks = Ticks::read(&self.cpus);
        if let (Some(earlier), Some(told)) = (&before.told, self.server.told()?) {
            return Ok(Seen::elsewhere(earlier, told, before.ticks, ticks, client_ns));
        }
        let server = match (self.server.pid(), before.server) {
            (Some(pid), Some(earlier)) => {
                let used = CpuUse::read(pid)?;
                Some(SeenServer::new(used, earlier, resident_bytes(pid)?))
            }
            _ => None,
        };
        let upstream = self.upstream.and_then(Server::pid).map(CpuUse::read).transpose()?;
        let upstream_ns = upstream.zip(before.upstream).map_or(0, |(now, then)| now.ns_since(then));
        let others = |server: SeenServer| {
            ticks.others_percent_since(before.ticks, server.ns + client_ns + upstream_ns)
        };
        Ok(Seen {
            server,
            client_ns,
            steal_percent: ticks.stolen_percent_since(before.ticks),
            others_percent: server.map(others),
            reports: Vec::new(),
        })
    }

    fn open(&self) -> Result<Opened> {
        Ok(Opened {
            server: self.server.pid().map(CpuUse::read).transpose()?,
            upstream: self.upstream.and_then(Server::pid).map(CpuUse::read).transpose()?,
            told: self.server.told()?,
            ticks: Ticks::read(&self.cpus),
            client_ns: own_cpu_ns(),
        })
    }
}

impl Seen {
    /// Of a server on another host, in words of its own. Both hosts may have CPUs stolen.
    fn elsewhere(
        earlier: &Stats,
        told: Stats,
        ticks_before: Ticks,
        ticks: Ticks,
        client_ns: u64,
    ) -> Seen {
        let stolen_there = told.ticks.stolen_percent_since(earlier.ticks);
        Seen {
            server: Some(SeenServer::new(told.cpu, earlier.cpu, told.rss_bytes)),
            client_ns,
            steal_percent: ticks.stolen_percent_since(ticks_before).max(stolen_there),
            others_percent: Some(ticks.others_percent_since(ticks_before, client_ns)),
            reports: vec![earlier.counters.clone(), told.counters],
        }
    }
}

impl SeenServer {
    fn new(used: CpuUse, earlier: CpuUse, rss_bytes: u64) -> SeenServer {
        let (ns, sqpoll_ns) = (used.ns_since(earlier), used.sqpoll_ns_since(earlier));
        SeenServer { ns, sqpoll_ns, rss_bytes }
    }
}

impl Observer for Watch<'_> {
    fn on_window_open(&mut self) {
        self.ask_report();
        self.opened = self.open();
    }

    fn on_window_close(&mut self) {
        self.seen = self.look();
        self.ask_report();
    }
}

/// Of this process, with the tools that it has run to their end.
fn own_cpu_ns() -> u64 {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64 + ended_children_ns()
}

/// `perf stat` counting the system calls of one process.
struct Perf(Child);

impl Perf {
    fn attach(pid: u32) -> Result<Perf> {
        let mut command = Command::new("perf");
        command.args(["stat", "-x", ",", "-e", SYSTEM_CALLS, "-p", &pid.to_string()]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let child = command.spawn().map_err(Failure::at("start perf"))?;
        // perf has no way to say that it is attached.
        std::thread::sleep(PERF_ATTACH);
        Ok(Perf(child))
    }

    fn detach(self) -> Result<u64> {
        // It may have ended by itself, with the server; then there is nothing to signal.
        let _ = kill_process(Pid::from_child(&self.0), Signal::INT);
        let output = self.0.wait_with_output().map_err(Failure::at("wait for perf"))?;
        counted_by_perf(&output.stderr)
    }
}

/// The system calls in what `perf stat` has printed.
pub(crate) fn counted_by_perf(said: &[u8]) -> Result<u64> {
    let said = String::from_utf8_lossy(said);
    let line = said.lines().find(|line| line.contains(SYSTEM_CALLS));
    let count = line.and_then(|line| line.split(',').next()?.parse().ok());
    count.ok_or_else(|| {
        Failure::new(format!("perf: {}", said.lines().next().unwrap_or("no output")))
    })
}

/// What perf calls the beginning of a system call.
pub(crate) const SYSTEM_CALLS: &str = "raw_syscalls:sys_enter";

/// What proxies forward to: the least of a server.
const UPSTREAM: Candidate = Candidate::Peer(Peer::BareEpoll);
/// Of fewer, the slowest one would be P99.99.
pub(crate) const P9999_REQUESTS: u64 = 10_000;
const CURVE_PERCENTS: [f64; 12] =
    [0.0, 10.0, 25.0, 50.0, 75.0, 90.0, 95.0, 99.0, 99.5, 99.9, 99.95, 99.99];
/// Of a server that cannot do what it is offered.
const FELL_BEHIND: &str =
    "answered less than it was offered: its latencies are those of a queue that grows";
const CAPACITY_TIME: Duration = Duration::from_millis(300);
const IDLE_PAYLOAD_BYTES: u32 = 1024;
const SETTLE_PAUSE: Duration = Duration::from_millis(100);
const SETTLE_MAX: Duration = Duration::from_secs(5);
const PERF_ATTACH: Duration = Duration::from_millis(400);

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_server_that_reports_is_counted_in_the_window_and_others_over_their_life() {
        let counters = |calls: u64, waits: u64| json!({ "system_calls": calls, "waits": waits });
        let mut said = Said {
            reports: vec![counters(100, 5), counters(140, 5)],
            last: counters(300, 30),
            warnings: Vec::new(),
        };
        let counted = Counted::new(&said, 20, 60);
        assert_eq!(counted.per_request("system_calls"), Some(2.0));
        assert_eq!(counted.over("system_calls", "waits"), None);
        assert_eq!(counted.per_request("unknown"), None);
        said.reports.pop();
        let counted = Counted::new(&said, 20, 60);
        assert_eq!(counted.per_request("system_calls"), Some(5.0));
        assert_eq!(counted.over("system_calls", "waits"), Some(10.0));
    }

    #[test]
    fn a_curve_has_no_quantiles_that_too_few_requests_stand_for() {
        let of = |count: u64| {
            let mut latency = Histogram::new(3).unwrap();
            (1..=count).for_each(|us| latency.record(us * 1000).unwrap());
            latency_curve(&latency)
        };
        let close = |point: (f64, f64), us: f64| (point.1 / us - 1.0).abs() < 0.002;
        assert_eq!(of(0), []);
        let few = of(100);
        assert_eq!(few[few.len() - 2].0, 99.0, "{few:?}");
        let many = of(10_000);
        assert_eq!(many.len(), CURVE_PERCENTS.len() + 1, "{many:?}");
        assert!(close(many[0], 1.0) && close(many[3], 5000.0), "{many:?}");
        assert!(close(many[11], 9999.0) && close(many[12], 10_000.0), "{many:?}");
    }
}
