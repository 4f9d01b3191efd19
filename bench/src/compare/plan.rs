//! Under what traffic, for how long, and on which CPUs the candidates are measured.

use std::net::SocketAddr;
use std::time::Duration;

use serde::Serialize;

use crate::cli::{CompareArgs, CompareScenario, CpuArgs, CpuList, SEED};
use crate::compare::network::Network;
use crate::error::{Failure, Result};
use crate::host::cpu;
use crate::load::{HttpLoad, OPEN_DEPTH_MAX, Plan};
use crate::rpc::Protocol;
use crate::work::Work;

/// One kind of traffic.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Cell {
    pub(crate) name: String,
    pub(crate) scenario: CompareScenario,
    pub(crate) connections: u32,
    pub(crate) depth: u32,
    pub(crate) idle: u32,
    pub(crate) payload_bytes: u32,
    pub(crate) protocol: Protocol,
    /// What an HTTP server is asked; `None` of the protocols of this program.
    pub(crate) http: Option<HttpLoad>,
    pub(crate) question: Question,
    /// Servers and client compete for all CPUs: how a server spreads work over them is the
    /// question.
    pub(crate) shares_cpus: bool,
    /// Open loop: requests per second, the same for every candidate.
    pub(crate) rate: Option<f64>,
    /// Of what the slowest candidate takes in a closed loop; it becomes the rate.
    pub(crate) load_percent: Option<u32>,
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
    /// What serving costs.
    Cost,
    /// How long cheap requests wait for a few heavy ones.
    FewHeavy,
    /// How much gets done where all of them compute.
    AllHeavy,
    /// The same where each computes for longer than it takes to move it.
    AllLong,
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
            scenario: CompareScenario::Echo,
            connections,
            depth,
            idle,
            payload_bytes,
            protocol: Protocol::Frames,
            http: None,
            question: Question::Cost,
            shares_cpus: false,
            rate: None,
            load_percent: None,
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
            Question::AllLong => ("heavy: all requests burn 100 µs", 100, 100.0, 100),
            Question::Cost | Question::AllCheap => ("100 × 1, nothing heavy", 100, 0.0, 0),
            Question::Fairness => ("1000 × 1, nothing heavy", 1000, 0.0, 0),
        };
        let work = Duration::from_micros(work_us.into());
        Cell {
            name: name.to_owned(),
            scenario: CompareScenario::Heavy,
            question,
            shares_cpus: true,
            load_percent: (question == Question::FewHeavy).then_some(50),
            heavy_percent,
            work_us,
            work_steps: (work_us > 0).then(|| Work::calibrate(work).steps),
            ..Cell::new(connections, 1, 0, payload_bytes)
        }
    }

    /// A kind of traffic of the scenario http.
    pub(crate) fn http(load: HttpLoad) -> Cell {
        let (connections, depth) = load.connections();
        Cell {
            name: format!("http: {}", load.name()),
            scenario: CompareScenario::Http,
            http: Some(load),
            ..Cell::new(connections, depth, 0, 0)
        }
    }

    /// One request at a time in all: nothing but latency.
    pub(crate) fn is_ping_pong(&self) -> bool {
        (self.connections, self.depth, self.idle) == (1, 1, 0)
    }

    /// What the server must be told about this traffic, and where a proxy forwards to.
    pub(crate) fn server_args(&self, upstream: Option<SocketAddr>) -> Vec<String> {
        let mut args = match (self.scenario, self.work_steps) {
            (CompareScenario::Mux, _) => vec!["--scenario=mux".to_owned()],
            (CompareScenario::Proxy, _) => vec!["--scenario=proxy".to_owned()],
            (_, Some(steps)) => {
                vec!["--scenario=heavy".to_owned(), format!("--work-steps={steps}")]
            }
            _ => Vec::new(),
        };
        args.extend(upstream.map(|addr| format!("--upstream={addr}")));
        args
    }

    pub(crate) fn plan(&self, addr: SocketAddr, settings: &Settings) -> Plan {
        Plan {
            protocol: self.protocol,
            addrs: vec![addr],
            connections: self.connections,
            idle: self.idle,
            payload_bytes: self.payload_bytes,
            // In an open loop a bound: what does not fit waits, and its latency counts.
            depth: if self.rate.is_some() { OPEN_DEPTH_MAX } else { self.depth },
            unordered: self.scenario == CompareScenario::Mux,
            rate: self.rate,
            heavy_percent: self.heavy_percent,
            seed: SEED,
            watched_cpus: settings.cpus_in_use(self),
            warmup: Duration::from_secs_f64(settings.warmup_s),
            duration: Duration::from_secs_f64(settings.duration_s),
            requests_max: settings.requests_max,
            timeout: settings.timeout(),
        }
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
    /// All that this process may use.
    pub(crate) cpus_allowed: Vec<usize>,
    pub(crate) network: Network,
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
    pub(crate) fn new(args: &CompareArgs, cpus: Cpus, measurements_per_round: usize) -> Settings {
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
            pinned: cpus.pinned,
            cpus_allowed: cpus.allowed,
            network: Network::default(),
            frame_max: args.frame_max.0,
            program_version: env!("CARGO_PKG_VERSION"),
        }
    }

    /// Who runs where.
    pub(crate) fn cpus(&self) -> String {
        if let Network::Elsewhere = self.network {
            let own = &self.cpus_allowed;
            return format!("Client on CPU {own:?}, servers where somebody has started them.");
        }
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

    /// Who runs where under a kind of traffic.
    pub(crate) fn pinned_for(&self, cell: &Cell) -> Option<&Pinned> {
        self.pinned.as_ref().filter(|_| !cell.shares_cpus)
    }

    /// The CPUs whose stolen time matters.
    pub(crate) fn cpus_in_use(&self, cell: &Cell) -> Vec<usize> {
        match self.pinned_for(cell) {
            Some(pinned) => {
                let Pinned { server_cpus, sqpoll_cpus, client_cpus } = pinned;
                [&server_cpus[..], sqpoll_cpus, client_cpus].concat()
            }
            None => self.cpus_allowed.clone(),
        }
    }
}

/// Where this process, and what it starts, may run.
pub(crate) struct Cpus {
    pub(crate) allowed: Vec<usize>,
    pub(crate) pinned: Option<Pinned>,
}

impl Cpus {
    /// Server and client on CPUs of their own, where there are two.
    pub(crate) fn new(args: &CpuArgs) -> Result<Cpus> {
        let allowed = cpu::allowed()?;
        args.check(&allowed)?;
        if allowed.len() < 2 {
            return Ok(Cpus { allowed, pinned: None });
        }
        let first_but = |taken: &[usize]| -> Vec<usize> {
            allowed.iter().copied().find(|cpu| !taken.contains(cpu)).into_iter().collect()
        };
        let list = |list: &Option<CpuList>| list.as_ref().map(|list| list.0.clone());
        let client_cpus = list(&args.client_cpus);
        let server_cpus = list(&args.server_cpus)
            .unwrap_or_else(|| first_but(client_cpus.as_deref().unwrap_or_default()));
        let client_cpus = client_cpus.unwrap_or_else(|| first_but(&server_cpus));
        let pinned = Pinned { server_cpus, sqpoll_cpus: Vec::new(), client_cpus }.checked()?;
        Ok(Cpus { allowed, pinned: Some(pinned) })
    }
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
