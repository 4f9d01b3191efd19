//! What a comparison found, in the shape of its JSON file.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::compare::candidate::Candidate;
use crate::compare::plan::{Cell, Settings};
use crate::compare::ranking::Ranking;
use crate::host::Host;

/// Everything.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    /// Who wrote the file.
    pub(crate) program: &'static str,
    /// The command that was run.
    pub(crate) command_line: String,
    pub(crate) host: Host,
    pub(crate) settings: Settings,
    /// Every name, in the order of the rows; a row may be missing where it says nothing.
    pub(crate) candidates: Vec<String>,
    /// The same, with their versions and settings.
    pub(crate) servers: Vec<ServerInfo>,
    /// What came out, a sentence each.
    pub(crate) findings: Vec<String>,
    pub(crate) cells: Vec<CellReport>,
    pub(crate) idle: Vec<IdleRow>,
    pub(crate) goals: Vec<Goal>,
    /// What a reader must know to read the figures right.
    pub(crate) notes: Vec<String>,
    pub(crate) elapsed_s: f64,
}

impl Report {
    /// The number of a candidate, which is the same in all tables and drawings.
    pub(crate) fn series(&self, candidate: &str) -> usize {
        self.candidates.iter().position(|name| name == candidate).unwrap_or(0)
    }
}

/// All candidates under one kind of traffic.
#[derive(Debug, Serialize)]
pub(crate) struct CellReport {
    pub(crate) cell: Cell,
    pub(crate) rows: Vec<Row>,
    /// One for each figure that candidates are ranked by, once they are measured.
    pub(crate) rankings: Vec<Ranking>,
}

/// One candidate under one kind of traffic.
#[derive(Debug, Serialize)]
pub(crate) struct Row {
    pub(crate) candidate: String,
    #[serde(skip)]
    pub(crate) server: Candidate,
    pub(crate) rounds: Vec<Round>,
    /// Why there are fewer rounds than the others have.
    pub(crate) failure: Option<String>,
    /// What its servers warned of, each once.
    pub(crate) warnings: Vec<String>,
    pub(crate) summary: Option<Summary>,
    /// Requests per CPU-second over those of the peer, of the same rounds.
    pub(crate) over_tokio: Option<Spread>,
    pub(crate) over_bare: Option<Spread>,
    pub(crate) over_framed: Option<Spread>,
    /// The bare ring whose buffers suit this traffic.
    pub(crate) over_bare_ring: Option<Spread>,
    /// Our own server on epoll, inline.
    pub(crate) over_epoll: Option<Spread>,
    /// The first row, which comparisons of settings are held against.
    pub(crate) over_first: Option<Spread>,
    /// Median latency over tokio's, of the same rounds.
    pub(crate) p50_over_tokio: Option<Spread>,
    /// System calls per request counted from outside, connection set-up included.
    pub(crate) system_calls_by_perf: Option<f64>,
}

/// One candidate measured once.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Round {
    /// Which round; rounds of the same number ran within seconds of each other.
    pub(crate) index: u32,
    pub(crate) requests: u64,
    pub(crate) elapsed_s: f64,
    pub(crate) rps: f64,
    /// Requests per second of the server's CPU time, all its threads. What a server uses is only
    /// known of a process on this host, here and below.
    pub(crate) per_cpu_s: Option<f64>,
    /// CPUs the server and the client kept busy.
    pub(crate) server_cpus_busy: Option<f64>,
    /// Of the server's, those on which the kernel polled its rings.
    pub(crate) sqpoll_cpus_busy: Option<f64>,
    pub(crate) client_cpus_busy: f64,
    pub(crate) p50_us: f64,
    pub(crate) p90_us: f64,
    pub(crate) p99_us: f64,
    pub(crate) p999_us: f64,
    /// `None` of too few requests to have one.
    pub(crate) p9999_us: Option<f64>,
    pub(crate) max_us: f64,
    pub(crate) latency_curve: Curve,
    /// Of the windows in which no CPU was seen stolen; `None` where there were none.
    pub(crate) clean_p50_us: Option<f64>,
    pub(crate) clean_p99_us: Option<f64>,
    pub(crate) windows: u64,
    pub(crate) windows_left_out: u64,
    /// Of the requests that asked for no work, where others did.
    pub(crate) cheap_p99_us: Option<f64>,
    pub(crate) clean_cheap_p99_us: Option<f64>,
    pub(crate) heavy_requests: u64,
    /// Time a hypervisor took from the CPUs in use, in percent.
    pub(crate) steal_percent: f64,
    /// Time of those CPUs that went to other processes, in percent.
    pub(crate) others_percent: Option<f64>,
    pub(crate) rss_bytes: Option<u64>,
    /// By the server's own count: ours in the measured window, a peer over its whole life.
    pub(crate) system_calls_per_request: Option<f64>,
    /// What one visit to the kernel brought back; `None` without a ring.
    pub(crate) completions_per_wait: Option<f64>,
    /// Of the time of the threads that poll, the part in which they worked, by the server's own
    /// count; `None` without such threads.
    pub(crate) sqpoll_work_share: Option<f64>,
}

/// What two rows are compared by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Figure {
    RequestsPerSecond,
    RequestsPerCpuSecond,
    P50,
    P99,
    P9999,
    /// Without the windows that are left out.
    CleanP99,
    /// Of cheap requests beside heavy ones, without the windows that are left out.
    CheapP99,
    /// P99 over P50 of the same round, without the windows that are left out.
    Tail,
    SystemCallsPerRequest,
}

impl Figure {
    pub(crate) fn of(self, round: &Round) -> Option<f64> {
        match self {
            Figure::RequestsPerSecond => Some(round.rps),
            Figure::RequestsPerCpuSecond => round.per_cpu_s,
            Figure::P50 => Some(round.p50_us),
            Figure::P99 => Some(round.p99_us),
            Figure::P9999 => round.p9999_us,
            Figure::CleanP99 => round.clean_p99_us,
            Figure::CheapP99 => round.clean_cheap_p99_us,
            Figure::Tail => Some(round.clean_p99_us? / round.clean_p50_us?),
            Figure::SystemCallsPerRequest => round.system_calls_per_request,
        }
    }
}

impl Figure {
    pub(crate) fn more_is_better(self) -> bool {
        matches!(self, Figure::RequestsPerSecond | Figure::RequestsPerCpuSecond)
    }
}

impl fmt::Display for Figure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Figure::RequestsPerSecond => "requests/s",
            Figure::RequestsPerCpuSecond => "requests per CPU-second",
            Figure::P50 => "P50",
            Figure::P99 => "P99",
            Figure::P9999 => "P99.99",
            Figure::CleanP99 => "clean P99",
            Figure::CheapP99 => "P99 of cheap requests",
            Figure::Tail => "P99 / P50",
            Figure::SystemCallsPerRequest => "system calls per request",
        })
    }
}

/// All rounds of a row.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Summary {
    pub(crate) rps: Spread,
    pub(crate) per_cpu_s: Option<Spread>,
    pub(crate) p50_us: Spread,
    pub(crate) p90_us: Spread,
    pub(crate) p99_us: Spread,
    pub(crate) p999_us: Spread,
    pub(crate) p9999_us: Option<Spread>,
    pub(crate) max_us: Spread,
    /// The median over the rounds at each quantile that all of them have.
    pub(crate) latency_curve: Curve,
    pub(crate) clean_p99_us: Option<Spread>,
    pub(crate) cheap_p99_us: Option<Spread>,
    pub(crate) clean_cheap_p99_us: Option<Spread>,
    /// Of all rounds together.
    pub(crate) windows: u64,
    pub(crate) windows_left_out: u64,
    pub(crate) server_cpus_busy: Option<Spread>,
    pub(crate) sqpoll_cpus_busy: Option<Spread>,
    pub(crate) client_cpus_busy: Spread,
    pub(crate) steal_percent: Spread,
    pub(crate) others_percent: Option<Spread>,
    pub(crate) rss_bytes: Option<Spread>,
    pub(crate) system_calls_per_request: Option<Spread>,
    /// Of the server's CPU time, what the kernel's threads took that poll its rings; `None` where
    /// there are none.
    pub(crate) sqpoll_percent: Option<Spread>,
    /// Of that time, the part in which they worked.
    pub(crate) sqpoll_work_percent: Option<Spread>,
}

/// Percent and microseconds: which share of the requests was answered within which time. The last
/// one is the slowest request.
pub(crate) type Curve = Vec<(f64, f64)>;

/// A server that is compared, for a reader of its figures.
#[derive(Debug, Serialize)]
pub(crate) struct ServerInfo {
    pub(crate) candidate: String,
    pub(crate) version: String,
    pub(crate) settings: String,
    pub(crate) command_line: String,
}

/// Median, least and greatest.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(crate) struct Spread {
    pub(crate) median: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
}

/// Memory and rest of one candidate with many silent connections.
#[derive(Debug, Serialize)]
pub(crate) struct IdleRow {
    pub(crate) candidate: String,
    pub(crate) connections: u32,
    pub(crate) failure: Option<String>,
    /// Resident bytes per connection that never sent anything.
    pub(crate) silent_bytes: Option<f64>,
    /// The same after each has had one request answered.
    pub(crate) used_bytes: Option<f64>,
    pub(crate) rest: Option<Rest>,
}

/// An idle server with idle connections, watched for a while.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct Rest {
    pub(crate) window_s: f64,
    pub(crate) cpu_us: f64,
    /// How often one of its threads was put on a CPU. Zero proves that none made a system call.
    pub(crate) runs: u64,
}

/// A figure this project means to reach.
#[derive(Debug, Serialize)]
pub(crate) struct Goal {
    pub(crate) what: String,
    pub(crate) wanted: String,
    /// `None`: not measured in this run.
    pub(crate) value: Option<Spread>,
    pub(crate) met: Option<bool>,
}

impl Spread {
    /// `None` of nothing.
    pub(crate) fn of(values: impl IntoIterator<Item = f64>) -> Option<Spread> {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        let (min, max) = (*values.first()?, *values.last()?);
        let middle = values.len() / 2;
        let median = if values.len() % 2 == 1 {
            values[middle]
        } else {
            (values[middle - 1] + values[middle]) / 2.0
        };
        Some(Spread { median, min, max })
    }
}

impl Summary {
    pub(crate) fn of(rounds: &[Round]) -> Option<Summary> {
        let spread = |value: fn(&Round) -> f64| Spread::of(rounds.iter().map(value));
        let some = |value: fn(&Round) -> Option<f64>| Spread::of(rounds.iter().filter_map(value));
        Some(Summary {
            rps: spread(|round| round.rps)?,
            per_cpu_s: some(|round| round.per_cpu_s),
            p50_us: spread(|round| round.p50_us)?,
            p90_us: spread(|round| round.p90_us)?,
            p99_us: spread(|round| round.p99_us)?,
            p999_us: spread(|round| round.p999_us)?,
            p9999_us: some(|round| round.p9999_us),
            max_us: spread(|round| round.max_us)?,
            latency_curve: median_curve(rounds),
            clean_p99_us: some(|round| round.clean_p99_us),
            cheap_p99_us: some(|round| round.cheap_p99_us),
            clean_cheap_p99_us: some(|round| round.clean_cheap_p99_us),
            windows: rounds.iter().map(|round| round.windows).sum(),
            windows_left_out: rounds.iter().map(|round| round.windows_left_out).sum(),
            server_cpus_busy: some(|round| round.server_cpus_busy),
            sqpoll_cpus_busy: some(|round| round.sqpoll_cpus_busy),
            client_cpus_busy: spread(|round| round.client_cpus_busy)?,
            steal_percent: spread(|round| round.steal_percent)?,
            others_percent: some(|round| round.others_percent),
            rss_bytes: some(|round| round.rss_bytes.map(|bytes| bytes as f64)),
            system_calls_per_request: some(|round| round.system_calls_per_request),
            sqpoll_percent: some(|round| {
                let polling = round.sqpoll_cpus_busy.filter(|cpus| *cpus > 0.0)?;
                Some(polling / round.server_cpus_busy? * 100.0)
            }),
            sqpoll_work_percent: some(|round| round.sqpoll_work_share.map(|share| share * 100.0)),
        })
    }
}

/// A quantile that a round had too few requests for would shift the median there.
fn median_curve(rounds: &[Round]) -> Curve {
    let Some(first) = rounds.first() else { return Curve::new() };
    let at = |round: &Round, percent: f64| {
        round.latency_curve.iter().find(|point| point.0 == percent).map(|point| point.1)
    };
    let median = |&(percent, _): &(f64, f64)| {
        let of_all: Option<Vec<f64>> = rounds.iter().map(|round| at(round, percent)).collect();
        Some((percent, Spread::of(of_all?)?.median))
    };
    first.latency_curve.iter().filter_map(median).collect()
}

impl Row {
    pub(crate) fn new(candidate: &Candidate) -> Row {
        Row {
            candidate: candidate.to_string(),
            server: candidate.clone(),
            rounds: Vec::new(),
            failure: None,
            warnings: Vec::new(),
            summary: None,
            over_tokio: None,
            over_bare: None,
            over_framed: None,
            over_bare_ring: None,
            over_epoll: None,
            over_first: None,
            p50_over_tokio: None,
            system_calls_by_perf: None,
        }
    }

    pub(crate) fn add(&mut self, round: Round, warnings: Vec<String>) {
        self.rounds.push(round);
        for warning in warnings {
            if !self.warnings.contains(&warning) {
                self.warnings.push(warning);
            }
        }
    }

    /// A figure of all its rounds.
    pub(crate) fn spread(&self, figure: Figure) -> Option<Spread> {
        Spread::of(self.rounds.iter().filter_map(|round| figure.of(round)))
    }

    /// A figure over another row's, round by round: what slows the host for a while slows both.
    pub(crate) fn over(&self, other: &Row, figure: Figure) -> Option<Spread> {
        Spread::of(self.rounds.iter().filter_map(|round| {
            let same = other.rounds.iter().find(|theirs| theirs.index == round.index)?;
            Some(figure.of(round)? / figure.of(same)?)
        }))
    }
}

impl CellReport {
    /// Not measured yet.
    pub(crate) fn new(cell: Cell, rows: Vec<Row>) -> CellReport {
        CellReport { cell, rows, rankings: Vec::new() }
    }

    pub(crate) fn row(&self, candidate: &str) -> Option<&Row> {
        self.rows.iter().find(|row| row.candidate == candidate)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn round(index: u32, per_cpu_s: f64) -> Round {
        Round {
            index,
            requests: 1,
            elapsed_s: 1.0,
            rps: per_cpu_s,
            per_cpu_s: Some(per_cpu_s),
            server_cpus_busy: Some(1.0),
            sqpoll_cpus_busy: Some(0.0),
            client_cpus_busy: 1.0,
            p50_us: 1.0,
            p90_us: 1.5,
            p99_us: 2.0,
            p999_us: 3.0,
            p9999_us: Some(3.5),
            max_us: 4.0,
            latency_curve: vec![(50.0, 1.0), (99.0, 2.0), (100.0, 4.0)],
            clean_p50_us: Some(1.0),
            clean_p99_us: Some(1.5),
            windows: 40,
            windows_left_out: 1,
            cheap_p99_us: None,
            clean_cheap_p99_us: None,
            heavy_requests: 0,
            steal_percent: 0.0,
            others_percent: Some(0.0),
            rss_bytes: Some(4096),
            system_calls_per_request: None,
            completions_per_wait: None,
            sqpoll_work_share: None,
        }
    }

    pub(crate) fn row(candidate: &str, rounds: Vec<Round>) -> Row {
        Row {
            candidate: candidate.into(),
            server: Candidate::ours(Default::default(), Default::default()),
            summary: Summary::of(&rounds),
            rounds,
            failure: None,
            warnings: Vec::new(),
            over_tokio: None,
            over_bare: None,
            over_framed: None,
            over_bare_ring: None,
            over_epoll: None,
            over_first: None,
            p50_over_tokio: None,
            system_calls_by_perf: None,
        }
    }

    #[test]
    fn a_median_is_the_middle() {
        assert_eq!(Spread::of([3.0, 1.0, 2.0]), Some(Spread { median: 2.0, min: 1.0, max: 3.0 }));
        assert_eq!(Spread::of([4.0, 1.0]), Some(Spread { median: 2.5, min: 1.0, max: 4.0 }));
        assert_eq!(Spread::of([]), None);
    }

    #[test]
    fn a_curve_is_the_median_where_all_rounds_have_the_quantile() {
        let with = |curve: &[(f64, f64)]| Round { latency_curve: curve.into(), ..round(0, 1.0) };
        let rounds = [
            with(&[(50.0, 1.0), (99.0, 10.0), (99.9, 70.0), (100.0, 80.0)]),
            with(&[(50.0, 2.0), (99.0, 30.0), (100.0, 90.0)]),
            with(&[(50.0, 9.0), (99.0, 20.0), (99.9, 50.0), (100.0, 70.0)]),
        ];
        let curve = Summary::of(&rounds).unwrap().latency_curve;
        assert_eq!(curve, [(50.0, 2.0), (99.0, 20.0), (100.0, 80.0)]);
    }

    #[test]
    fn threads_that_poll_have_a_share_of_the_servers_time_where_there_are_any() {
        let polled =
            Round { sqpoll_cpus_busy: Some(0.25), sqpoll_work_share: Some(0.5), ..round(0, 1.0) };
        let summary = Summary::of(&[polled]).unwrap();
        assert_eq!(summary.sqpoll_percent.map(|percent| percent.median), Some(25.0));
        assert_eq!(summary.sqpoll_work_percent.map(|percent| percent.median), Some(50.0));
        assert!(Summary::of(&[round(0, 1.0)]).unwrap().sqpoll_percent.is_none());
    }

    #[test]
    fn a_ratio_compares_rounds_of_the_same_number() {
        let ours = row("a", vec![round(0, 10.0), round(1, 30.0), round(2, 7.0)]);
        let theirs = row("b", vec![round(0, 10.0), round(1, 20.0)]);
        let rate = Figure::RequestsPerCpuSecond;
        assert_eq!(ours.over(&theirs, rate), Some(Spread { median: 1.25, min: 1.0, max: 1.5 }));
        assert_eq!(ours.over(&row("c", vec![]), rate), None);
        assert_eq!(ours.over(&theirs, Figure::SystemCallsPerRequest), None);
    }
}
