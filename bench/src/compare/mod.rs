//! `compare`: ringpoll and others side by side, in one run on one host.
//!
//! Every measurement starts a fresh process, so none inherits another's memory. Rounds interleave
//! the candidates and rotate their order, so that whatever the host does meanwhile happens to all
//! of them.

mod candidate;
mod child;
mod goals;
mod measure;
pub(crate) mod model;
pub(crate) mod plan;
mod progress;

use std::time::{Duration, Instant};

use crate::cli::CompareArgs;
use crate::compare::candidate::Candidate;
use crate::compare::model::{CellReport, Figure, IdleRow, Report, Row, Summary};
use crate::compare::plan::{Cell, Settings};
use crate::compare::progress::Progress;
use crate::error::{Failure, Result};
use crate::host::{self, Host};
use crate::{load, report};

/// The subcommand.
pub(crate) fn run(args: &CompareArgs) -> Result<()> {
    candidate::refuse_switches()?;
    // Before the minutes of measuring, not after them.
    std::fs::create_dir_all(&args.out)
        .map_err(Failure::at(format!("create {}", args.out.display())))?;
    let mut comparison = Comparison::new(args)?;
    comparison.run(args);
    let found = comparison.report()?;
    report::print(&found);
    let written = report::write(&found, &args.out)?;
    written.iter().for_each(|path| println!("wrote {}", path.display()));
    Ok(())
}

struct Comparison {
    started: Instant,
    host: Host,
    settings: Settings,
    candidates: Vec<Candidate>,
    cells: Vec<CellReport>,
    idle: Vec<IdleRow>,
    notes: Vec<String>,
    progress: Progress,
}

impl Comparison {
    fn new(args: &CompareArgs) -> Result<Comparison> {
        let pinned = plan::pinned(args)?;
        let candidates = candidate::candidates(args, pinned.is_some())?;
        let cells = plan::cells(args);
        let rows =
            |cell: &Cell| candidates.iter().filter(|one| one.suits(cell)).map(Row::new).collect();
        let cells: Vec<_> =
            cells.into_iter().map(|cell| CellReport { rows: rows(&cell), cell }).collect();
        let measurements: usize = cells.iter().map(|report| report.rows.len()).sum();
        let settings = Settings::new(args, pinned, measurements);
        let mut notes = Vec::new();
        match &settings.pinned {
            Some(pinned) => notes.push(format!(
                "Servers on CPU {:?}, client on CPU {:?}.",
                pinned.server_cpus, pinned.client_cpus
            )),
            None => notes.push(
                "One CPU for server and client: nothing is pinned, and both compete for it.".into(),
            ),
        }
        let passes = settings.rounds as usize + usize::from(args.perf);
        let steps = measurements * passes + candidates.len();
        Ok(Comparison {
            started: Instant::now(),
            host: Host::read()?,
            progress: Progress::new(steps as u64),
            settings,
            candidates,
            cells,
            idle: Vec::new(),
            notes,
        })
    }

    fn run(&mut self, args: &CompareArgs) {
        self.notes.iter().for_each(|note| self.progress.say(note));
        if args.idle > 0 {
            self.watch_idle(args.idle, args.idle_window);
        }
        for index in 0..self.settings.rounds {
            if !self.round(index) {
                self.notes.push(format!(
                    "Stopped in round {} of {}: the time was up.",
                    index + 1,
                    self.settings.rounds
                ));
                break;
            }
        }
        if args.perf {
            self.count_system_calls();
        }
        self.progress.finish();
    }

    /// Measures every candidate in every cell once. `false`: the time is up.
    fn round(&mut self, index: u32) -> bool {
        for cell_index in 0..self.cells.len() {
            let count = self.cells[cell_index].rows.len();
            for turn in 0..count {
                if self.time_is_up() {
                    return false;
                }
                // Rotated, so that no candidate always follows the same one.
                let which = (turn + index as usize + cell_index) % count;
                self.measure(cell_index, which, index);
                self.progress.step();
            }
            let name = &self.cells[cell_index].cell.name;
            if !self.progress.is_bar() {
                self.progress.say(&format!(
                    "round {} of {}: {name}",
                    index + 1,
                    self.settings.rounds
                ));
            }
        }
        true
    }

    fn measure(&mut self, cell_index: usize, which: usize, index: u32) {
        let CellReport { cell, rows } = &mut self.cells[cell_index];
        let row = &mut rows[which];
        let candidate = &row.server;
        if row.failure.is_some() {
            return;
        }
        self.progress.show(&format!("round {}, {}: {candidate}", index + 1, cell.name));
        match measure::round(candidate, cell, &self.settings, index) {
            Ok((round, warnings)) => row.add(round, warnings),
            Err(failure) => {
                self.progress.say(&format!("{}, {candidate}: {failure}", cell.name));
                row.failure = Some(failure.to_string());
            }
        }
    }

    fn watch_idle(&mut self, wanted: u32, window: Duration) {
        let fds = host::fds_up_to(load::fds_needed(wanted, 0));
        let connections = u64::from(wanted).min(fds.saturating_sub(load::fds_needed(0, 0))) as u32;
        if connections < wanted {
            self.note(format!(
                "{connections} idle connections instead of {wanted}: \
                 {fds} file descriptors are allowed."
            ));
        }
        for candidate in &self.candidates {
            if !candidate.suits_idle() {
                self.progress.step();
                continue;
            }
            self.progress.show(&format!("{connections} idle connections: {candidate}"));
            // In a hurry only our own servers are watched doing nothing.
            let watched = candidate.is_ours() || !self.settings.quick;
            let row =
                measure::idle(candidate, connections, watched.then_some(window), &self.settings);
            if let Some(failure) = &row.failure {
                self.progress.say(&format!("idle connections, {candidate}: {failure}"));
            }
            self.idle.push(row);
            self.progress.step();
        }
    }

    fn count_system_calls(&mut self) {
        let deadline = self.settings.quick.then(|| self.started + QUICK_MAX);
        for CellReport { cell, rows } in &mut self.cells {
            if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                self.notes.push(format!("perf, {}: not counted, the time was up.", cell.name));
                continue;
            }
            for row in rows {
                self.progress.step();
                if row.failure.is_some() {
                    continue;
                }
                let candidate = &row.server;
                self.progress.show(&format!("perf, {}: {candidate}", cell.name));
                match measure::system_calls_by_perf(candidate, cell, &self.settings) {
                    Ok(calls) => row.system_calls_by_perf = Some(calls),
                    Err(failure) => {
                        self.notes.push(format!("perf, {}, {candidate}: {failure}", cell.name));
                    }
                }
            }
        }
    }

    fn note(&mut self, note: String) {
        self.progress.say(&note);
        self.notes.push(note);
    }

    fn time_is_up(&self) -> bool {
        self.settings.quick && self.started.elapsed() >= QUICK_MAX
    }

    fn report(mut self) -> Result<Report> {
        for CellReport { rows, .. } in &mut self.cells {
            summarize(rows);
        }
        if self.cells.iter().all(|report| report.rows.iter().all(|row| row.rounds.is_empty())) {
            self.notes.push("No candidate could be measured.".into());
        }
        Ok(Report {
            goals: goals::judge(&self.candidates, &self.cells, &self.idle),
            candidates: self.candidates.iter().map(Candidate::to_string).collect(),
            host: self.host,
            settings: self.settings,
            cells: self.cells,
            idle: self.idle,
            notes: self.notes,
            elapsed_s: self.started.elapsed().as_secs_f64(),
        })
    }
}

fn summarize(rows: &mut [Row]) {
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
        row.summary = Summary::of(&row.rounds);
        (row.over_tokio, row.over_framed) = (over_tokio, over_framed);
        (row.over_bare, row.over_bare_ring) = (over_bare, over_bare_ring);
        (row.over_epoll, row.p50_over_tokio) = (over_epoll, p50_over_tokio);
    }
}

/// No measurement of `--quick` starts later than this. One takes a second; a server that stalls
/// takes three more, one that does not stop eight.
const QUICK_MAX: Duration = Duration::from_secs(72);
