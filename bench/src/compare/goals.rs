//! The goals of this project, each with the figure that meets or misses it.

use ringpoll::Backend;

use crate::cli::CompareScenario;
use crate::compare::candidate::Candidate;
use crate::compare::model::{CellReport, Figure, Goal, IdleRow, Row, Spread};
use crate::compare::plan::{Cell, Question};
use crate::load::HttpLoad;

/// What the goals of our other backends are held against.
pub(crate) const OUR_EPOLL: &str = "ringpoll epoll inline";
const OUR_URING: &str = "ringpoll uring inline";
/// The placement that chooses.
const OUR_AUTO: &str = "ringpoll uring auto";
/// Those that give each CPU a runtime of its own.
const PER_CPU: [&str; 3] = ["tokio-per-cpu", "monoio", "compio"];

/// The one that chooses among its presets.
const PLAIN_SQPOLL: &str = "sqpoll";
/// A kernel thread takes what their receive rings are given, so a poller that spins calls nobody.
const RECEIVED_BY_KERNEL: [&str; 4] = ["uring-2", "uring-4", "sqpoll-config1", "sqpoll-shared"];

/// Every goal this run has figures for, and those it has not.
pub(crate) fn judge(candidates: &[Candidate], cells: &[CellReport], idle: &[IdleRow]) -> Vec<Goal> {
    let mut goals = Vec::new();
    // What serving costs is judged where nothing else is the question.
    let is_judged =
        |cell: &Cell| matches!(cell.scenario, CompareScenario::Echo | CompareScenario::Idle);
    for candidate in candidates {
        let Some(backend) = candidate.judged_backend() else { continue };
        let name = candidate.to_string();
        for report in cells.iter().filter(|one| is_judged(&one.cell) && one.cell.idle == 0) {
            let judged = Judged { name: &name, report };
            match backend {
                Backend::Epoll => goals.extend(judged.on_epoll()),
                Backend::Uring => goals.extend(judged.on_uring(candidates)),
                Backend::Sqpoll(_) => goals.extend(judged.on_sqpoll(backend, candidates)),
                // What a flush on another thread gains depends on the program; it is only
                // reported.
                _ => {}
            }
        }
        goals.extend(beside_idle(&name, cells));
        goals.extend(at_rest(&name, idle));
    }
    goals.extend(cells.iter().flat_map(placing));
    goals.extend(cells.iter().flat_map(example_programs));
    goals.extend(cells.iter().filter(|one| is_of_calls(&one.cell)).flat_map(calling));
    goals
}

/// The example programs on our backends, beside the same programs on tokio.
fn example_programs(report: &CellReport) -> Vec<Goal> {
    let Some(load) = report.cell.http else { return Vec::new() };
    let (rate, tokio) = (Figure::RequestsPerCpuSecond, format!("{} tokio", load.program()));
    let each = match load {
        HttpLoad::Text | HttpLoad::Json | HttpLoad::TextHttp2 => 1.0,
        HttpLoad::Unary => 1.1,
        HttpLoad::Download | HttpLoad::Upload => 0.95,
    };
    let mut goals = Vec::new();
    for judged in ours_in(report, &format!("{} ringpoll ", load.program())) {
        goals.push(judged.over(&tokio, rate, AtLeast(each)));
        if load == HttpLoad::Unary {
            goals.push(judged.over(&tokio, Figure::P99, AtMost(1.0)));
        }
    }
    if matches!(load, HttpLoad::Text | HttpLoad::Json) {
        let ratio = |judged: &Judged<'_>| {
            let rows = report.row(judged.name).zip(report.row(&tokio));
            rows.and_then(|(ours, theirs)| ours.over(theirs, rate)).map_or(0.0, |it| it.median)
        };
        let ours = ours_in(report, &format!("{} ringpoll ", load.program())).into_iter();
        let better = ours.max_by(|a, b| ratio(a).total_cmp(&ratio(b)));
        goals.extend(better.map(|judged| judged.over(&tokio, rate, AtLeast(1.1))));
    }
    goals
}

fn is_of_calls(cell: &Cell) -> bool {
    cell.scenario == CompareScenario::Calls
}

/// Our clients of calls, beside the one on tokio.
fn calling(report: &CellReport) -> Vec<Goal> {
    let mut goals = Vec::new();
    for judged in ours_in(report, "client ringpoll ") {
        goals.push(judged.over("client tokio", Figure::RequestsPerCpuSecond, AtLeast(2.0)));
        goals.push(judged.calls(AtMost(0.1)));
        goals.extend(judged.calls_by_perf(None, AtMost(0.1)));
    }
    goals
}

/// The rows whose names begin with `prefix`.
fn ours_in<'a>(report: &'a CellReport, prefix: &str) -> Vec<Judged<'a>> {
    let names = report.rows.iter().map(|row| row.candidate.as_str());
    let names = names.filter(|name| name.starts_with(prefix));
    names.map(|name| Judged { name, report }).collect()
}

/// The placement that chooses, under one kind of traffic of the scenario heavy.
fn placing(report: &CellReport) -> Vec<Goal> {
    let judged = Judged { name: OUR_AUTO, report };
    match report.cell.question {
        Question::Cost | Question::AllLong => Vec::new(),
        Question::FewHeavy => {
            let figure = Figure::CheapP99;
            let least = |row: &&Row| row.spread(figure).map_or(f64::MAX, |spread| spread.median);
            let best = PER_CPU.iter().filter_map(|name| report.row(name));
            let best = best.min_by(|a, b| least(a).total_cmp(&least(b)));
            let best = best.map_or(PER_CPU[0], |row| row.candidate.as_str());
            vec![
                judged.over(best, figure, AtMost(0.35)),
                judged.over("tokio-ws", figure, AtMost(1.0)),
            ]
        }
        Question::AllHeavy => {
            vec![judged.over("tokio-ws", Figure::RequestsPerSecond, AtLeast(1.0))]
        }
        Question::AllCheap => {
            vec![judged.over(OUR_URING, Figure::RequestsPerCpuSecond, AtLeast(0.97))]
        }
        Question::Fairness => {
            let tail = report.row(OUR_AUTO).and_then(|row| row.spread(Figure::Tail));
            let what = format!("{}: {OUR_AUTO}, {}", report.cell.name, Figure::Tail);
            vec![AtMost(2.0).goal(what, tail)]
        }
    }
}

/// One of our servers under one kind of traffic.
struct Judged<'a> {
    name: &'a str,
    report: &'a CellReport,
}

impl Judged<'_> {
    fn on_epoll(&self) -> Vec<Goal> {
        let rate = Figure::RequestsPerCpuSecond;
        match (self.report.cell.connections, self.report.cell.depth) {
            // One connection alone waits for wake-ups, whoever serves it.
            (1, 1) => Vec::new(),
            (_, 1) => vec![
                self.over("tokio", rate, AtLeast(1.0)),
                self.over("bare-epoll", rate, AtLeast(0.93)),
                self.over("tokio", Figure::P50, AtMost(1.0)),
            ],
            (_, 64) => vec![
                self.over("tokio-framed", rate, AtLeast(1.4)),
                self.over("bare-epoll", rate, AtLeast(0.85)),
            ],
            _ => Vec::new(),
        }
    }

    fn on_uring(&self, candidates: &[Candidate]) -> Vec<Goal> {
        let (rate, calls) = (Figure::RequestsPerCpuSecond, Figure::SystemCallsPerRequest);
        match (self.report.cell.connections, self.report.cell.depth) {
            (1, 1) => {
                let mut goals = vec![self.over(OUR_EPOLL, Figure::P50, AtMost(1.05))];
                let spinning = Candidate::spinning(Backend::Uring);
                if candidates.contains(&spinning) {
                    let judged = Judged { name: &spinning.to_string(), ..*self };
                    goals.push(judged.over(OUR_EPOLL, Figure::P50, AtMost(0.6)));
                }
                goals
            }
            (connections @ 100.., 1) => {
                let mut goals = vec![
                    self.over(OUR_EPOLL, rate, AtLeast(1.03)),
                    self.over("tokio", rate, AtLeast(1.05)),
                    self.over("bare-ring", rate, AtLeast(0.95)),
                    self.over(OUR_EPOLL, Figure::P50, AtMost(1.0)),
                ];
                if connections == 100 {
                    goals.push(self.over(OUR_EPOLL, calls, AtMost(1.0 / 6.0)));
                    goals.extend(self.calls_by_perf(Some(OUR_EPOLL), AtMost(1.0 / 6.0)));
                }
                goals
            }
            (_, 64) => {
                let mut goals = vec![
                    self.over(OUR_EPOLL, rate, AtLeast(1.0)),
                    self.over("tokio-framed", rate, AtLeast(1.4)),
                    self.calls(AtMost(0.05)),
                ];
                goals.extend(self.calls_by_perf(None, AtMost(0.05)));
                goals
            }
            _ => Vec::new(),
        }
    }

    /// The kernel's threads have the server's CPUs, so a request costs what polling takes too.
    fn on_sqpoll(&self, backend: Backend, candidates: &[Candidate]) -> Vec<Goal> {
        let (rate, calls) = (Figure::RequestsPerCpuSecond, Figure::SystemCallsPerRequest);
        let (connections, depth) = (self.report.cell.connections, self.report.cell.depth);
        let mut goals = Vec::new();
        // The presets are held against `uring` in what they are for, calls; which of them pays
        // depends on the CPUs, and choosing that is the job of plain `sqpoll`.
        let is_chosen = backend.to_string() == PLAIN_SQPOLL;
        let least = match (connections, depth) {
            (1, 1) => Some(1.0),
            (10, 1) => Some(0.4),
            (100.., 1) => Some(0.8),
            _ => None,
        };
        if let Some(least) = least.filter(|_| is_chosen) {
            goals.push(self.over(OUR_URING, rate, AtLeast(least)));
        }
        if (connections, depth) == (100, 1) {
            goals.push(self.over(OUR_EPOLL, calls, AtMost(1.0 / 6.0)));
            let spinning = Candidate::spinning(backend);
            if candidates.contains(&spinning) {
                let judged = Judged { name: &spinning.to_string(), ..*self };
                goals.push(if RECEIVED_BY_KERNEL.contains(&backend.to_string().as_str()) {
                    judged.calls(AtMost(0.001))
                } else {
                    judged.over(OUR_EPOLL, calls, AtMost(1.0 / 6.0))
                });
            }
        }
        goals
    }

    /// A figure over that of another server, of the same rounds.
    fn over(&self, other: &str, figure: Figure, wanted: Wanted) -> Goal {
        let row = self.report.row(self.name).zip(self.report.row(other));
        let value = row.and_then(|(ours, theirs)| ours.over(theirs, figure));
        let what = format!("{}: {} / {other}, {figure}", self.report.cell.name, self.name);
        wanted.goal(what, value)
    }

    fn calls(&self, wanted: Wanted) -> Goal {
        let summary = self.report.row(self.name).and_then(|row| row.summary.as_ref());
        let value = summary.and_then(|summary| summary.system_calls_per_request);
        let what = format!("{}: {}, system calls per request", self.report.cell.name, self.name);
        wanted.goal(what, value)
    }

    /// Counted from outside, where this run has done that for anyone.
    fn calls_by_perf(&self, other: Option<&str>, wanted: Wanted) -> Option<Goal> {
        self.report.rows.iter().find_map(|row| row.system_calls_by_perf)?;
        let counted = |name: &str| self.report.row(name)?.system_calls_by_perf;
        let value = match other {
            Some(other) => counted(self.name).zip(counted(other)).map(|(ours, other)| ours / other),
            None => counted(self.name),
        };
        let over = other.map_or(String::new(), |other| format!(" / {other}"));
        let cell = &self.report.cell.name;
        let what = format!("{cell}: {}{over}, system calls per request by perf", self.name);
        Some(wanted.goal(what, Spread::of(value)))
    }
}

/// The same traffic with and without idle connections beside it.
fn beside_idle(name: &str, cells: &[CellReport]) -> Option<Goal> {
    let with = cells.iter().find(|report| report.cell.idle > 0)?;
    let without = cells.iter().find(|report| {
        let (cell, same) = (&report.cell, &with.cell);
        cell.idle == 0 && (cell.connections, cell.depth) == (same.connections, same.depth)
    })?;
    let ratio = with.row(name)?.over(without.row(name)?, Figure::RequestsPerCpuSecond);
    let what =
        format!("{} / {}: {name}, requests per CPU-second", with.cell.name, without.cell.name);
    Some(AtLeast(0.97).goal(what, ratio))
}

/// Memory of connections with nothing to say, and a server that rests with them.
fn at_rest(name: &str, idle: &[IdleRow]) -> Vec<Goal> {
    let Some(row) = idle.iter().find(|row| row.candidate == name) else { return Vec::new() };
    let bytes = [row.silent_bytes, row.used_bytes].into_iter().flatten().reduce(f64::max);
    let what = format!("{name}: resident bytes per idle connection, of {}", row.connections);
    let memory = AtMost(IDLE_BYTES_MAX).goal(what, Spread::of(bytes));
    let what = format!("{name}: times an idle server runs, so system calls it may have made");
    let runs = row.rest.map(|rest| rest.runs as f64);
    vec![memory, AtMost(0.0).goal(what, Spread::of(runs))]
}

#[derive(Clone, Copy)]
enum Wanted {
    AtLeast(f64),
    AtMost(f64),
}
use Wanted::{AtLeast, AtMost};

impl Wanted {
    fn goal(self, what: String, value: Option<Spread>) -> Goal {
        let (sign, bound) = match self {
            AtLeast(bound) => ("≥", bound),
            AtMost(bound) => ("≤", bound),
        };
        let met = value.map(|value| match self {
            AtLeast(bound) => value.median >= bound,
            AtMost(bound) => value.median <= bound,
        });
        // Three digits are enough, also for a sixth.
        let wanted = format!("{sign} {}", (bound * 1e3).round() / 1e3);
        Goal { what, wanted, value, met }
    }
}

const IDLE_BYTES_MAX: f64 = 1024.0;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compare::model::Round;
    use crate::compare::model::tests::{round, row};
    use crate::compare::plan::Cell;
    use ringpoll::Placement;

    const SPINNING: &str = "ringpoll uring inline spinning";

    #[test]
    fn each_goal_is_met_missed_or_not_measured() {
        let busy =
            report(Cell::new(100, 1, 0, 1024), vec![(OUR_EPOLL, 100.0, 1.0), ("tokio", 99.0, 1.0)]);
        let beside = report(Cell::new(100, 1, 400, 1024), vec![(OUR_EPOLL, 90.0, 1.0)]);
        let goals = judge(&[ours(Backend::Epoll)], &[busy, beside], &[]);
        assert_eq!(met(&goals), [Some(true), None, Some(true), Some(false)]);
    }

    #[test]
    fn io_uring_is_held_against_our_epoll_tokio_and_the_bare_ring() {
        let rows = vec![
            (OUR_EPOLL, 100.0, 10.0),
            (OUR_URING, 104.0, 9.9),
            ("tokio", 100.0, 10.0),
            ("bare-ring", 105.0, 9.0),
        ];
        let goals =
            judge(&[ours(Backend::Uring)], &[report(Cell::new(1000, 1, 0, 1024), rows)], &[]);
        let wanted: Vec<_> = goals.iter().map(|goal| goal.wanted.as_str()).collect();
        assert_eq!(wanted, ["≥ 1.03", "≥ 1.05", "≥ 0.95", "≤ 1"]);
        assert_eq!(met(&goals), [Some(true), Some(false), Some(true), Some(true)]);
    }

    #[test]
    fn one_connection_is_judged_by_its_latency_with_and_without_a_spinning_poller() {
        let rows = vec![(OUR_EPOLL, 1.0, 100.0), (OUR_URING, 1.0, 104.0), (SPINNING, 0.1, 61.0)];
        let cells = [report(Cell::new(1, 1, 0, 1024), rows)];
        let uring = ours(Backend::Uring);
        let with = [ours(Backend::Epoll), uring.clone(), Candidate::spinning(Backend::Uring)];
        assert_eq!(met(&judge(&with, &cells, &[])), [Some(true), Some(false)]);
        assert_eq!(met(&judge(&[uring], &cells, &[])), [Some(true)]);
    }

    #[test]
    fn example_programs_are_judged_each_and_the_better_one_by_more() {
        let of = |load, rows: &[(&str, f64, f64)]| {
            let goals = judge(&[], &[report(Cell::http(load), rows.to_vec())], &[]);
            (goals.iter().map(|goal| goal.wanted.clone()).collect::<Vec<_>>(), met(&goals))
        };
        let rows = [
            ("axum_app ringpoll epoll", 99.0, 1.0),
            ("axum_app ringpoll uring", 111.0, 1.0),
            ("axum_app tokio", 100.0, 1.0),
        ];
        let (wanted, met) = of(HttpLoad::Text, &rows);
        assert_eq!(wanted, ["≥ 1", "≥ 1", "≥ 1.1"]);
        assert_eq!(met, [Some(false), Some(true), Some(true)]);
        let (wanted, met) = of(HttpLoad::Download, &rows);
        assert_eq!((wanted, met), (vec!["≥ 0.95".to_owned(); 2], vec![Some(true); 2]));
    }

    #[test]
    fn system_calls_are_judged_inside_and_where_they_were_counted_outside() {
        let mut cell = report(
            Cell::new(4, 64, 0, 1024),
            vec![(OUR_EPOLL, 1.0, 1.0), (OUR_URING, 1.0, 1.0), ("tokio-framed", 0.5, 1.0)],
        );
        let inside = |cell: &CellReport| {
            met(&judge(&[ours(Backend::Uring)], std::slice::from_ref(cell), &[]))
        };
        set_calls(&mut cell, OUR_URING, 0.04);
        assert_eq!(inside(&cell), [Some(true), Some(true), Some(true)]);
        cell.rows[1].system_calls_by_perf = Some(0.06);
        assert_eq!(inside(&cell), [Some(true), Some(true), Some(true), Some(false)]);

        let mut cell =
            report(Cell::new(100, 1, 0, 1024), vec![(OUR_EPOLL, 1.0, 1.0), (OUR_URING, 1.0, 1.0)]);
        set_calls(&mut cell, OUR_EPOLL, 2.4);
        set_calls(&mut cell, OUR_URING, 0.41);
        let goals = judge(&[ours(Backend::Uring)], &[cell], &[]);
        let last = goals.last().unwrap();
        assert_eq!((last.wanted.as_str(), last.met), ("≤ 0.167", Some(false)));
    }

    #[test]
    fn kernel_threads_are_judged_by_what_they_cost_and_by_the_calls_they_save() {
        let sqpoll: Backend = "sqpoll".parse().unwrap();
        let name = ours(sqpoll).to_string();
        for (connections, rate, met_there) in
            [(1, 99.0, false), (10, 40.0, true), (50, 1.0, true), (1000, 79.0, false)]
        {
            let rows = vec![(OUR_URING, 100.0, 1.0), (&name, rate, 1.0)];
            let cell = report(Cell::new(connections, 1, 0, 1024), rows);
            let goals = judge(&[ours(sqpoll)], &[cell], &[]);
            assert_eq!(goals.iter().all(|goal| goal.met == Some(true)), met_there, "{goals:?}");
            assert_eq!(goals.len(), usize::from(connections != 50));
        }
    }

    #[test]
    fn a_spinning_poller_makes_no_call_where_the_kernel_receives_too() {
        for (name, calls, met_there) in [
            ("sqpoll-shared", 0.002, [Some(true), Some(false)]),
            ("sqpoll-config1", 0.001, [Some(true), Some(true)]),
            ("sqpoll-config2", 0.3, [Some(true), Some(true)]),
        ] {
            let backend: Backend = name.parse().unwrap();
            let both = [ours(backend), Candidate::spinning(backend)];
            let names = both.each_ref().map(Candidate::to_string);
            let rows = vec![(OUR_EPOLL, 1.0, 1.0), (&names[0], 1.0, 1.0), (&names[1], 1.0, 1.0)];
            let mut cell = report(Cell::new(100, 1, 0, 1024), rows);
            set_calls(&mut cell, OUR_EPOLL, 2.0);
            set_calls(&mut cell, &names[0], 0.3);
            set_calls(&mut cell, &names[1], calls);
            assert_eq!(met(&judge(&both, &[cell], &[])), met_there, "{name}");
        }
    }

    #[test]
    fn hybrid_and_servers_with_more_arguments_have_only_the_goals_that_all_have() {
        let hybrid = ours(Backend::Hybrid);
        let variant = Candidate::Ringpoll {
            backend: Backend::Uring,
            placement: Placement::Inline,
            spinning: false,
            extra: vec!["--bundles".to_owned()],
        };
        let (name, other) = (hybrid.to_string(), variant.to_string());
        let cells =
            [report(Cell::new(100, 1, 0, 1024), vec![(&name, 1.0, 1.0), (&other, 1.0, 1.0)])];
        let idle = [&name, &other].map(|name| IdleRow {
            candidate: name.clone(),
            connections: 10,
            failure: None,
            silent_bytes: Some(800.0),
            used_bytes: Some(1025.0),
            rest: None,
        });
        assert_eq!(met(&judge(&[hybrid, variant], &cells, &idle)), [Some(false), None]);
    }

    #[test]
    fn the_placement_that_chooses_is_held_against_the_best_of_those_that_do_not() {
        let cheap = |name: &str, us: f64| {
            row(name, vec![Round { clean_cheap_p99_us: Some(us), ..round(0, 1.0) }])
        };
        let rows = [(OUR_AUTO, 0.4), ("tokio-ws", 0.3), ("monoio", 1.0), ("compio", 1.2)];
        let few = rows.into_iter().map(|(name, us)| cheap(name, us)).collect();
        let few = CellReport::new(Cell::heavy(Question::FewHeavy, 1), few);
        let all = [(OUR_AUTO, 99.0, 1.0), (OUR_URING, 100.0, 1.0), ("tokio-ws", 98.0, 1.0)];
        let of = |question| report(Cell::heavy(question, 1), all.to_vec());
        let questions = [Question::AllHeavy, Question::AllCheap, Question::Fairness];
        let cells: Vec<_> = [few].into_iter().chain(questions.map(of)).collect();
        let goals = judge(&[], &cells, &[]);
        assert_eq!(
            met(&goals),
            [Some(false), Some(false), Some(true), Some(true), Some(true)],
            "{goals:?}"
        );
        assert!(goals[0].what.contains("/ monoio"), "{goals:?}");
        assert_eq!(goals[4].value.map(|tail| tail.median), Some(1.5));
    }

    #[test]
    fn the_servers_that_others_are_held_against_have_those_names() {
        assert_eq!(ours(Backend::Epoll).to_string(), OUR_EPOLL);
        assert_eq!(ours(Backend::Uring).to_string(), OUR_URING);
        assert_eq!(Candidate::ours(Backend::Uring, Placement::Auto).to_string(), OUR_AUTO);
        assert_eq!(Candidate::spinning(Backend::Uring).to_string(), SPINNING);
    }

    fn ours(backend: Backend) -> Candidate {
        Candidate::ours(backend, Placement::Inline)
    }

    fn met(goals: &[Goal]) -> Vec<Option<bool>> {
        goals.iter().map(|goal| goal.met).collect()
    }

    /// Rows of one round: name, requests per CPU-second, P50.
    fn report(cell: Cell, rows: Vec<(&str, f64, f64)>) -> CellReport {
        let rows = rows.into_iter().map(|(name, per_cpu_s, p50_us)| {
            row(name, vec![Round { p50_us, ..round(0, per_cpu_s) }])
        });
        CellReport::new(cell, rows.collect())
    }

    fn set_calls(report: &mut CellReport, name: &str, calls: f64) {
        let found = report.rows.iter_mut().find(|row| row.candidate == name).unwrap();
        let rounds = vec![Round { system_calls_per_request: Some(calls), ..round(0, 1.0) }];
        *found = row(name, rounds);
    }
}
