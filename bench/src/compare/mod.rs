//! `compare`: ringpoll and others side by side, in one run on one host.
//!
//! `rounds` is the machinery, which `article` shares; the rest says what is compared with what.

pub(crate) mod candidate;
mod child;
mod goals;
pub(crate) mod measure;
pub(crate) mod model;
pub(crate) mod plan;
mod progress;
pub(crate) mod rounds;
pub(crate) mod servers;

use std::time::Duration;

use crate::cli::{CompareArgs, CompareScenario};
use crate::compare::candidate::Candidate;
use crate::compare::model::{CellReport, Figure, IdleRow, Report, Row};
use crate::compare::plan::{Cell, Question, Settings};
use crate::compare::rounds::Rounds;
use crate::error::Result;
use crate::host::{self, Host};
use crate::{load, report};

/// The subcommand.
pub(crate) fn run(args: &CompareArgs) -> Result<()> {
    candidate::refuse_switches()?;
    args.check()?;
    // Before the minutes of measuring, not after them.
    report::refuse_foreign(&args.out, "compare")?;
    let mut comparison = Comparison::new(args)?;
    comparison.run(args);
    let found = comparison.report();
    report::print(&found);
    let written = report::write(&found, &args.out)?;
    written.iter().for_each(|path| println!("wrote {}", path.display()));
    Ok(())
}

struct Comparison {
    host: Host,
    candidates: Vec<Candidate>,
    rounds: Rounds,
    idle: Vec<IdleRow>,
}

impl Comparison {
    fn new(args: &CompareArgs) -> Result<Comparison> {
        let pinned = plan::pinned(&args.cpus, args.scenario)?;
        let candidates = candidate::candidates(args, pinned.is_some())?;
        let cells = plan::cells(args);
        let rows =
            |cell: &Cell| candidates.iter().filter(|one| one.suits(cell)).map(Row::new).collect();
        let cells: Vec<_> =
            cells.into_iter().map(|cell| CellReport { rows: rows(&cell), cell }).collect();
        let measurements: usize = cells.iter().map(|report| report.rows.len()).sum();
        let settings = Settings::new(args, pinned, measurements);
        let by_perf = if args.perf { measurements } else { 0 };
        Ok(Comparison {
            host: Host::read()?,
            rounds: Rounds::new(settings, cells, candidates.len() + by_perf),
            candidates,
            idle: Vec::new(),
        })
    }

    fn run(&mut self, args: &CompareArgs) {
        match args.scenario {
            CompareScenario::Echo if args.idle > 0 => self.watch_idle(args.idle, args.idle_window),
            CompareScenario::Echo => {}
            CompareScenario::Heavy => self.settle_rate(args.rate),
        }
        self.rounds.run();
        if args.perf {
            self.count_system_calls();
        }
        self.rounds.progress.finish();
    }

    /// The open loop offers every candidate the same: half of what the slowest one takes, so that
    /// none of them has a queue that grows.
    fn settle_rate(&mut self, wanted: Option<f64>) {
        let Rounds { settings, progress, cells, .. } = &mut self.rounds;
        let Some(report) = cells.iter_mut().find(|one| one.cell.question == Question::FewHeavy)
        else {
            return;
        };
        let mut slowest: Option<(f64, String)> = None;
        for row in report.rows.iter().filter(|_| wanted.is_none()) {
            progress.show(&format!("how much it takes, {}: {}", report.cell.name, row.server));
            // One that cannot be measured says so in its row.
            let Ok(rps) = measure::capacity(&row.server, &report.cell, settings) else { continue };
            if slowest.as_ref().is_none_or(|(least, _)| rps < *least) {
                slowest = Some((rps, row.candidate.clone()));
            }
        }
        let (rate, why) = match (wanted, slowest) {
            (Some(rate), _) => (rate, "as asked for".to_owned()),
            (None, Some((rps, name))) => {
                (rounded(rps / 2.0), format!("half of the {rps:.0} that {name} takes"))
            }
            (None, None) => return,
        };
        report.cell.rate = Some(rate);
        let note = format!("{}: {rate:.0} requests/s offered to each, {why}.", report.cell.name);
        self.rounds.note(note);
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
            if !candidate.suits_idle() {
                progress.step();
                continue;
            }
            progress.show(&format!("{connections} idle connections: {candidate}"));
            // In a hurry only our own servers are watched doing nothing.
            let watched = candidate.is_ours() || !settings.quick;
            let row = measure::idle(candidate, connections, watched.then_some(window), settings);
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
            let CellReport { cell, rows } = &mut cells[cell_index];
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
        let Rounds { settings, mut cells, notes, .. } = self.rounds;
        cells.iter_mut().for_each(|report| set_ratios(&mut report.rows));
        Report {
            program: report::PROGRAM,
            command_line: servers::own_command_line(),
            servers: self.candidates.iter().map(|one| servers::info(one, &settings)).collect(),
            findings: Vec::new(),
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
        let rate = |names| over(names, Figure::RequestsPerCpuSecond);
        let (over_tokio, over_framed) = (rate(&["tokio"]), rate(&["tokio-framed"]));
        // Only one of the two rings is measured under one kind of traffic.
        let over_bare_ring = rate(&["bare-ring", "bare-ring-64k"]);
        let (over_bare, over_epoll) = (rate(&["bare-epoll"]), rate(&[goals::OUR_EPOLL]));
        let p50_over_tokio = over(&["tokio"], Figure::P50);
        let row = &mut rows[index];
        (row.over_tokio, row.over_framed) = (over_tokio, over_framed);
        (row.over_bare, row.over_bare_ring) = (over_bare, over_bare_ring);
        (row.over_epoll, row.p50_over_tokio) = (over_epoll, p50_over_tokio);
    }
}
