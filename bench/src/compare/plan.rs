//! Under what traffic, for how long, and on which CPUs the candidates are measured.

use std::net::SocketAddr;
use std::time::Duration;

use serde::Serialize;

use crate::cli::{CompareArgs, CompareScenario, CpuArgs, CpuList, SEED};
use crate::error::{Failure, Result};
use crate::host::cpu;
use crate::load::{OPEN_DEPTH_MAX, Plan};
use crate::work::Work;

/// One kind of traffic.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Cell {
    pub(crate) name: String,
    pub(crate) connections: u32,
    pub(crate) depth: u32,
    pub(crate) idle: u32,
    pub(crate) payload_bytes: u32,
    pub(crate) question: Question,
    /// Open loop: requests per second, the same for every candidate.
    pub(crate) rate: Option<f64>,
    /// The share of requests that ask for work, and how much that is.
    pub(crate) heavy_percent: f64,
    pub(crate) work_us: u32,
    /// The same as a count: one for all servers, so that they do the same work.
    pub(crate) work_steps: Option<u64>,
}

/// What a kind of traffic is there to answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Question {
    /// What serving costs: the cells of the scenario echo.
    Cost,
    /// How long cheap requests wait for a few heavy ones.
    FewHeavy,
    /// How much gets done where all of them compute.
    AllHeavy,
    /// What a choice of placement costs where there is nothing to choose.
    AllCheap,
    /// Whether a thousand connections get their turn.
    Fairness,
}

impl Cell {
    pub(crate) fn new(connections: u32, depth: u32, idle: u32, payload_bytes: u32) -> Cell {
        let silent = if idle == 0 { String::new() } else { format!(" + {idle} idle") };
        Cell {
            name: format!("{connections} × {depth}{silent}"),
            connections,
            depth,
            idle,
            payload_bytes,
            question: Question::Cost,
            rate: None,
            heavy_percent: 0.0,
            work_us: 0,
            work_steps: None,
        }
    }

    /// A kind of traffic of the scenario heavy.
    pub(crate) fn heavy(question: Question, payload_bytes: u32) -> Cell {
        let (name, connections, heavy_percent, work_us) = match question {
            Question::FewHeavy => ("heavy: 1 % of requests burn 1 ms", 100, 1.0, 1000),
            Question::AllHeavy => ("heavy: all requests burn 20 µs", 100, 100.0, 20),
            Question::Cost | Question::AllCheap => ("100 × 1, nothing heavy", 100, 0.0, 0),
            Question::Fairness => ("1000 × 1, nothing heavy", 1000, 0.0, 0),
        };
        let work = Duration::from_micros(work_us.into());
        Cell {
            name: name.to_owned(),
            question,
            heavy_percent,
            work_us,
            work_steps: (work_us > 0).then(|| Work::calibrate(work).steps),
            ..Cell::new(connections, 1, 0, payload_bytes)
        }
    }

    /// One request at a time in all: nothing but latency.
    pub(crate) fn is_ping_pong(&self) -> bool {
        (self.connections, self.depth, self.idle) == (1, 1, 0)
    }

    /// What the server must be told about this traffic.
    pub(crate) fn server_args(&self) -> Vec<String> {
        match self.work_steps {
            Some(steps) => vec!["--scenario=heavy".to_owned(), format!("--work-steps={steps}")],
            None => Vec::new(),
        }
    }

    pub(crate) fn plan(&self, addr: SocketAddr, settings: &Settings) -> Result<Plan> {
        Ok(Plan {
            protocol: crate::rpc::Protocol::Frames,
            addrs: vec![addr],
            connections: self.connections,
            idle: self.idle,
            payload_bytes: self.payload_bytes,
            // In an open loop a bound: what does not fit waits, and its latency counts.
            depth: if self.rate.is_some() { OPEN_DEPTH_MAX } else { self.depth },
            rate: self.rate,
            heavy_percent: self.heavy_percent,
            seed: SEED,
            watched_cpus: settings.cpus_in_use()?,
            warmup: Duration::from_secs_f64(settings.warmup_s),
            duration: Duration::from_secs_f64(settings.duration_s),
            requests_max: settings.requests_max,
            timeout: settings.timeout(),
        })
    }
}

/// How it is measured.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Settings {
    pub(crate) quick: bool,
    pub(crate) rounds: u32,
    pub(crate) duration_s: f64,
    pub(crate) warmup_s: f64,
    /// So many replies end a measurement sooner.
    pub(crate) requests_max: Option<u64>,
    /// No measurement starts later than this; `None` is no bound.
    pub(crate) time_max_s: Option<f64>,
    /// `None`: nothing is pinned.
    pub(crate) pinned: Option<Pinned>,
    pub(crate) frame_max: u32,
    pub(crate) program_version: &'static str,
}

#[derive(Clone, Debug, Serialize)]
pub(crate) struct Pinned {
    pub(crate) server_cpus: Vec<usize>,
    /// Of the kernel's threads that poll a server's rings; empty: beside the server.
    pub(crate) sqpoll_cpus: Vec<usize>,
    pub(crate) client_cpus: Vec<usize>,
}

impl Settings {
    pub(crate) fn new(
        args: &CompareArgs,
        pinned: Option<Pinned>,
        measurements_per_round: usize,
    ) -> Settings {
        let rounds = args.rounds.unwrap_or(if args.quick { 3 } else { 5 });
        let duration = args.duration.unwrap_or_else(|| {
            if !args.quick {
                return Duration::from_secs(2);
            }
            let share = QUICK_ROUNDS_S / (measurements_per_round.max(1) as f64 * f64::from(rounds));
            Duration::from_secs_f64((share - QUICK_OVERHEAD_S).clamp(0.1, 0.6))
        });
        Settings {
            quick: args.quick,
            rounds,
            duration_s: duration.as_secs_f64(),
            warmup_s: warmup_s(duration),
            requests_max: None,
            time_max_s: args.quick.then_some(QUICK_MAX_S),
            pinned,
            frame_max: args.frame_max.0,
            program_version: env!("CARGO_PKG_VERSION"),
        }
    }

    /// Who runs where.
    pub(crate) fn cpus(&self) -> String {
        match &self.pinned {
            Some(Pinned { server_cpus, sqpoll_cpus, client_cpus }) => {
                let sqpoll = match &sqpoll_cpus[..] {
                    [] => String::new(),
                    cpus => format!(", SQPOLL threads on CPU {cpus:?}"),
                };
                format!("Servers on CPU {server_cpus:?}{sqpoll}, client on CPU {client_cpus:?}.")
            }
            None => "Nothing is pinned: servers and client compete for the same CPUs.".to_owned(),
        }
    }

    pub(crate) fn timeout(&self) -> Duration {
        if self.quick { Duration::from_secs(3) } else { Duration::from_secs(10) }
    }

    /// The CPUs whose stolen time matters.
    pub(crate) fn cpus_in_use(&self) -> Result<Vec<usize>> {
        match &self.pinned {
            Some(pinned) => {
                let Pinned { server_cpus, sqpoll_cpus, client_cpus } = pinned;
                Ok([&server_cpus[..], sqpoll_cpus, client_cpus].concat())
            }
            None => cpu::allowed(),
        }
    }
}

pub(crate) fn cells(args: &CompareArgs) -> Vec<Cell> {
    let bytes = args.size.0;
    if args.scenario == CompareScenario::Heavy {
        let questions =
            [Question::FewHeavy, Question::AllHeavy, Question::AllCheap, Question::Fairness];
        return questions.map(|question| Cell::heavy(question, bytes)).into();
    }
    let depth = args.depth.unwrap_or(1);
    let usual = if args.quick { QUICK_CONNECTIONS } else { CONNECTIONS };
    let connections = args.connections.as_deref().unwrap_or(usual);
    let mut cells: Vec<Cell> =
        connections.iter().map(|connections| Cell::new(*connections, depth, 0, bytes)).collect();
    if args.depth.is_none() {
        cells.push(Cell::new(4, 64, 0, bytes));
    }
    if args.idle > 0 {
        // Most connections of a real server are idle: four fifths here. Beside the same traffic
        // without them.
        if !cells.iter().any(|cell| (cell.connections, cell.depth) == (ACTIVE_BESIDE_IDLE, 1)) {
            cells.push(Cell::new(ACTIVE_BESIDE_IDLE, 1, 0, bytes));
        }
        cells.push(Cell::new(ACTIVE_BESIDE_IDLE, 1, ACTIVE_BESIDE_IDLE * 4, bytes));
    }
    cells
}

/// Server and client on CPUs of their own, where there are two. In the scenario heavy every server
/// has all CPUs, unless others are asked for: how it spreads work over them is the question.
pub(crate) fn pinned(args: &CpuArgs, scenario: CompareScenario) -> Result<Option<Pinned>> {
    let allowed = cpu::allowed()?;
    args.check(&allowed)?;
    let shared = scenario == CompareScenario::Heavy
        && args.server_cpus.is_none()
        && args.client_cpus.is_none();
    if allowed.len() < 2 || shared {
        return Ok(None);
    }
    let first_but = |taken: &[usize]| -> Vec<usize> {
        allowed.iter().copied().find(|cpu| !taken.contains(cpu)).into_iter().collect()
    };
    let list = |list: &Option<CpuList>| list.as_ref().map(|list| list.0.clone());
    let client_cpus = list(&args.client_cpus);
    let server_cpus = list(&args.server_cpus)
        .unwrap_or_else(|| first_but(client_cpus.as_deref().unwrap_or_default()));
    let client_cpus = client_cpus.unwrap_or_else(|| first_but(&server_cpus));
    Pinned { server_cpus, sqpoll_cpus: Vec::new(), client_cpus }.checked().map(Some)
}

impl Pinned {
    pub(crate) fn checked(self) -> Result<Pinned> {
        if self.server_cpus.is_empty() || self.client_cpus.is_empty() {
            return Err(Failure::new(
                "--server-cpus, --client-cpus: no CPU is left for the other side",
            ));
        }
        Ok(self)
    }
}

/// Traffic before a measurement of that length.
pub(crate) fn warmup_s(duration: Duration) -> f64 {
    (duration.as_secs_f64() / 5.0).min(0.3)
}

/// No measurement of `--quick` starts later than this. One takes a second; a server that stalls
/// takes three more, one that does not stop eight.
const QUICK_MAX_S: f64 = 72.0;
/// Of the 90 seconds of `--quick`, those for the rounds; the rest is for the idle rows, the report,
/// and bad luck.
const QUICK_ROUNDS_S: f64 = 48.0;
/// Starting, connecting, warming up, draining and stopping, per measurement.
const QUICK_OVERHEAD_S: f64 = 0.3;
const ACTIVE_BESIDE_IDLE: u32 = 100;
const CONNECTIONS: &[u32] = &[1, 10, 100, 1000];
const QUICK_CONNECTIONS: &[u32] = &[1, 100, 1000];
