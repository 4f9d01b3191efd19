//! `compare`: ringpoll and others side by side, in one run on one host.
//!
//! `rounds` is the machinery, which `article` shares; the rest says what is compared with what.

mod against;
pub(crate) mod caller;
pub(crate) mod candidate;
mod child;
mod example;
mod external;
mod goals;
pub(crate) mod measure;
pub(crate) mod model;
pub(crate) mod network;
pub(crate) mod plan;
mod progress;
pub(crate) mod ranking;
pub(crate) mod remote;
pub(crate) mod rounds;
mod scenario;
pub(crate) mod servers;

use std::time::Duration;

use crate::cli::{CompareArgs, CompareScenario};
use crate::compare::against::Earlier;
use crate::compare::candidate::Candidate;
use crate::compare::model::{CellReport, Figure, IdleRow, Report, Row};
use crate::compare::plan::{Cpus, Question, Settings};
use crate::compare::progress::Progress;
use crate::compare::rounds::Rounds;
use crate::error::{Failure, Result};
use crate::host::{self, Host};
use crate::{load, report, signals};

/// The subcommand.
pub(crate) fn run(args: &CompareArgs) -> Result<()> {
    candidate::refuse_switches()?;
    args.check()?;
    let earlier = args.against.as_deref().map(|path| Earlier::read(path).map(|read| (read, path)));
    let earlier = earlier.transpose()?;
    let mut comparison = Comparison::new(args)?;
    signals::keep_going()?;
    comparison.run(args);
    let mut found = comparison.report();
    if let Some((earlier, path)) = earlier {
        found.notes.extend(earlier.findings(&found.cells, path));
    }
    report::print(&found);
    let written = report::write(&found, &args.out)?;
    written.iter().for_each(|path| println!("wrote {}", path.display()));
    signals::check()
}

struct Comparison {
    host: Host,
    candidates: Vec<Candidate>,
    rounds: Rounds,
    idle: Vec<IdleRow>,
}

impl Comparison {
    fn new(args: &CompareArgs) -> Result<Comparison> {
        let cpus = Cpus::new(&args.cpus)?;
        let external = external::find(&args.peer, &args.peer_pid)?;
        let pinned = cpus.pinned.is_some();
        let candidates = candidate::candidates(args, pinned, &external)?;
        let mut cells = Vec::new();
        let (measurable, missing) =
            example::measurable(scenario::cells(args), &args.examples_dir());
        if measurable.is_empty() && !args.has_idle_rows() && !missing.is_empty() {
            return Err(Failure::new(missing.join(" ")));
        }
        for cell in measurable {
            load::reserve_fds(cell.connections, cell.idle)?;
            let those = candidate::of_scenario(args, cell.scenario, pinned, &external)?;
            let rows = those.iter().filter(|one| one.suits(&cell)).map(Row::new).collect();
            cells.push(CellReport::new(cell, rows));
        }
        let has_rows =
            |name: &String| cells.iter().any(|report: &CellReport| report.row(name).is_some());
        let named = args.peers.iter().flat_map(|peers| &peers.0).map(ToString::to_string);
        let is_measured = |name: &String| has_rows(name) || has_rows(&caller::name(name));
        if let Some(peer) = named.into_iter().find(|name| !is_measured(name)) {
            let message = format!("--peers {peer}: nothing that is measured here suits it");
            return Err(Failure::new(message));
        }
        // Before the minutes of measuring, not after them; and only once nothing else is refused.
        report::refuse_foreign(&args.out, "compare")?;
        let measurements: usize = cells.iter().map(|report| report.rows.len()).sum();
        let settings = Settings::new(args, cpus, measurements);
        let by_perf = if args.perf { measurements } else { 0 };
        let idle_steps = if args.has_idle_rows() { candidates.len() } else { 0 };
        let mut comparison = Comparison {
            host: Host::read()?,
            rounds: Rounds::new(settings, cells, idle_steps + by_perf),
            candidates,
            idle: Vec::new(),
        };
        missing.into_iter().for_each(|line| comparison.rounds.note(line));
        comparison.note_sharing();
        Ok(comparison)
    }

    fn run(&mut self, args: &CompareArgs) {
        if args.has_idle_rows() {
            self.watch_idle(args.idle, args.idle_window);
        }
        self.settle_rates(args.rate);
        self.rounds.run();
        if args.perf {
            self.count_system_calls();
        }
        self.rounds.progress.finish();
    }

    /// Which kinds of traffic have no CPUs of their own for the client.
    fn note_sharing(&mut self) {
        let sharing = self.rounds.cells.iter().filter(|report| report.cell.shares_cpus);
        let sharing: Vec<_> = sharing.map(|report| report.cell.name.as_str()).collect();
        if !sharing.is_empty() && self.rounds.settings.pinned.is_some() {
            let cpus = &self.rounds.settings.cpus_allowed;
            let note = format!("Servers and client share CPU {cpus:?}: {}.", sharing.join("; "));
            self.rounds.notes.push(note);
        }
    }

    /// An open loop offers every candidate the same: a share of what the slowest one takes, so that
    /// none of them has a queue that grows. `few_heavy` is for where somebody has said how much.
    fn settle_rates(&mut self, few_heavy: Option<f64>) {
        let mut notes = Vec::new();
        // Kinds of traffic that differ only in what is offered have the same slowest candidate.
        let mut known: Option<(CompareScenario, Option<(f64, String)>)> = None;
        let Rounds { settings, progress, cells, .. } = &mut self.rounds;
        for report in cells {
            let Some(percent) = report.cell.load_percent else { continue };
            let (scenario, name) = (report.cell.scenario, report.cell.name.clone());
            let asked = few_heavy.filter(|_| report.cell.question == Question::FewHeavy);
            if asked.is_none() && known.as_ref().is_none_or(|(of, _)| *of != scenario) {
                known = Some((scenario, slowest(report, settings, progress)));
            }
            let (rate, why) =
                match (asked, known.as_ref().and_then(|(_, slowest)| slowest.as_ref())) {
                    (Some(rate), _) => (rate, "as asked for".to_owned()),
                    (None, Some((rps, slowest))) => (
                        rounded(rps * f64::from(percent) / 100.0),
                        format!("{percent} % of the {rps:.0} that {slowest} takes"),
                    ),
                    (None, None) => continue,
                };
            report.cell.rate = Some(rate);
            notes.push(format!("{name}: {rate:.0} requests/s offered to each, {why}."));
        }
        notes.into_iter().for_each(|note| self.rounds.note(note));
    }

    fn watch_idle(&mut self, wanted: u32, window: Duration) {
        let fds = host::fds_up_to(load::fds_needed(wanted, 0));
        let connections = u64::from(wanted).min(fds.saturating_sub(load::fds_needed(0, 0))) as u32;
        if connections < wanted {
            self.rounds.note(format!(
                "{connections} idle connections instead of {wanted}: \
                 {fds} file descriptors are allowed."
            ));
        }
        let Rounds { settings, progress, .. } = &self.rounds;
        for candidate in &self.candidates {
            if !candidate.suits_idle() || signals::is_interrupted() {
                progress.step();
                continue;
            }
            progress.show(&format!("{connections} idle connections: {candidate}"));
            // In a hurry only our own servers are watched doing nothing.
            let watched = candidate.is_ours() || !settings.quick;
            let row = measure::idle(candidate, connections, watched.then_some(window), settings);
            if signals::is_interrupted() {
                continue;
            }
            if let Some(failure) = &row.failure {
                progress.say(&format!("idle connections, {candidate}: {failure}"));
            }
            self.idle.push(row);
            progress.step();
        }
    }

    fn count_system_calls(&mut self) {
        let mut notes = Vec::new();
        for cell_index in 0..self.rounds.cells.len() {
            let late = self.rounds.time_is_up();
            let Rounds { settings, progress, cells, .. } = &mut self.rounds;
            let CellReport { cell, rows, .. } = &mut cells[cell_index];
            if late {
                notes.push(format!("perf, {}: not counted, the time was up.", cell.name));
                continue;
            }
            for row in rows {
                progress.step();
                if row.failure.is_some() {
                    continue;
                }
                let candidate = &row.server;
                progress.show(&format!("perf, {}: {candidate}", cell.name));
                match measure::system_calls_by_perf(candidate, cell, settings) {
                    Ok(calls) => row.system_calls_by_perf = Some(calls),
                    Err(failure) => {
                        notes.push(format!("perf, {}, {candidate}: {failure}", cell.name));
                    }
                }
            }
        }
        self.rounds.notes.extend(notes);
    }

    fn report(self) -> Report {
        let elapsed_s = self.rounds.elapsed().as_secs_f64();
        let Rounds { settings, mut cells, mut notes, .. } = self.rounds;
        notes.extend(ranking::refusals(&cells));
        cells.iter_mut().for_each(|report| set_ratios(&mut report.rows));
        let pairs = pairs(&self.candidates);
        Report {
            findings: ranking::findings(&cells, &pairs),
            program: report::PROGRAM,
            command_line: servers::own_command_line(),
            servers: self.candidates.iter().map(|one| servers::info(one, &settings)).collect(),
            goals: goals::judge(&self.candidates, &cells, &self.idle),
            candidates: self.candidates.iter().map(Candidate::to_string).collect(),
            host: self.host,
            settings,
            cells,
            idle: self.idle,
            notes,
            elapsed_s,
        }
    }
}

/// Whose places are told in words: ours with handlers where they are cheapest, against each of the
/// others.
fn pairs(candidates: &[Candidate]) -> Vec<(String, String)> {
    let is_told = |one: &&Candidate| one.judged_backend().is_some() || one.is_auto();
    let others = || candidates.iter().filter(|one| !one.is_ours());
    let pairs = candidates
        .iter()
        .filter(is_told)
        .flat_map(|ours| others().map(move |other| (ours.to_string(), other.to_string())));
    pairs.collect()
}

/// Who answers the fewest requests per second, and how many. One that cannot be measured says so in
/// its row.
fn slowest(report: &CellReport, settings: &Settings, progress: &Progress) -> Option<(f64, String)> {
    let capacity = |row: &Row| {
        progress.show(&format!("how much it takes, {}: {}", report.cell.name, row.server));
        let rps = measure::capacity(&row.server, &report.cell, settings).ok()?;
        Some((rps, row.candidate.clone()))
    };
    report.rows.iter().filter_map(capacity).min_by(|a, b| a.0.total_cmp(&b.0))
}

/// Two digits: more would promise more than a moment can tell.
fn rounded(rate: f64) -> f64 {
    let unit = 10_f64.powf(rate.max(10.0).log10().floor() - 1.0);
    (rate / unit).floor() * unit
}

fn set_ratios(rows: &mut [Row]) {
    for index in 0..rows.len() {
        let over = |names: &[&str], figure| {
            let other = rows.iter().find(|row| names.contains(&row.candidate.as_str()))?;
            rows[index].over(other, figure)
        };
        let rate = |names: &[&str]| over(names, Figure::RequestsPerCpuSecond);
        // Only one of them is measured under one kind of traffic.
        let tokio = [&["tokio", caller::ON_TOKIO][..], &example::ON_TOKIO].concat();
        let (over_tokio, over_framed) = (rate(&tokio), rate(&["tokio-framed"]));
        // Only one of the two rings is measured under one kind of traffic.
        let over_bare_ring = rate(&["bare-ring", "bare-ring-64k"]);
        let (over_bare, over_epoll) = (rate(&["bare-epoll"]), rate(&[goals::OUR_EPOLL]));
        let over_first = rate(&[&rows[0].candidate]);
        let p50_over_tokio = over(&tokio, Figure::P50);
        let row = &mut rows[index];
        (row.over_tokio, row.over_framed) = (over_tokio, over_framed);
        (row.over_bare, row.over_bare_ring) = (over_bare, over_bare_ring);
        (row.over_epoll, row.over_first) = (over_epoll, over_first);
        row.p50_over_tokio = p50_over_tokio;
    }
}
