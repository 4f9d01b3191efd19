//! The rounds of a comparison: each measures every candidate under every kind of traffic once.
//!
//! Every measurement starts a fresh process, so none inherits another's memory. Rounds interleave
//! the candidates and rotate their order, so that whatever the host does meanwhile happens to all
//! of them.

use std::time::{Duration, Instant};

use crate::compare::measure;
use crate::compare::model::{CellReport, Summary};
use crate::compare::plan::Settings;
use crate::compare::progress::Progress;
use crate::compare::ranking::{FIGURES, Ranking};
use crate::signals;

pub(crate) struct Rounds {
    started: Instant,
    pub(crate) settings: Settings,
    pub(crate) cells: Vec<CellReport>,
    /// What a reader must know to read the figures right.
    pub(crate) notes: Vec<String>,
    pub(crate) progress: Progress,
}

impl Rounds {
    /// `other_steps`: what is measured beside the rounds, for the progress shown.
    pub(crate) fn new(settings: Settings, cells: Vec<CellReport>, other_steps: usize) -> Rounds {
        let measurements: usize = cells.iter().map(|report| report.rows.len()).sum();
        let steps = measurements * settings.rounds as usize + other_steps;
        let mut rounds = Rounds {
            started: Instant::now(),
            progress: Progress::new(steps as u64),
            notes: Vec::new(),
            settings,
            cells,
        };
        rounds.note(rounds.settings.cpus());
        rounds
    }

    /// All rounds, or as many as there is time for; then the figures of each row.
    pub(crate) fn run(&mut self) {
        let count = self.settings.rounds;
        if let Some(stopped) = (0..count).find(|index| !self.round(*index)) {
            let round = stopped + 1;
            let why = if signals::is_interrupted() { "interrupted" } else { "the time was up" };
            self.note(format!("Stopped in round {round} of {count}: {why}."));
        }
        for row in self.cells.iter_mut().flat_map(|report| &mut report.rows) {
            row.summary = Summary::of(&row.rounds);
        }
        for report in &mut self.cells {
            let rankings = FIGURES.iter().filter_map(|figure| Ranking::of(report, *figure));
            report.rankings = rankings.collect();
        }
        if self.cells.iter().all(|report| report.rows.iter().all(|row| row.rounds.is_empty())) {
            self.notes.push("No candidate could be measured.".into());
        }
    }

    pub(crate) fn note(&mut self, note: String) {
        self.progress.say(&note);
        self.notes.push(note);
    }

    pub(crate) fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }

    /// Whether no measurement may start any more.
    pub(crate) fn time_is_up(&self) -> bool {
        signals::is_interrupted()
            || self.settings.time_max_s.is_some_and(|max| self.elapsed().as_secs_f64() >= max)
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
            let count = self.settings.rounds;
            self.progress.say_done(&format!("round {} of {count}: {name}", index + 1));
        }
        true
    }

    fn measure(&mut self, cell_index: usize, which: usize, index: u32) {
        let CellReport { cell, rows, .. } = &mut self.cells[cell_index];
        let row = &mut rows[which];
        let candidate = &row.server;
        if row.failure.is_some() {
            return;
        }
        self.progress.show(&format!("round {}, {}: {candidate}", index + 1, cell.name));
        match measure::round(candidate, cell, &self.settings, index) {
            Ok((round, warnings)) => row.add(round, warnings),
            // What was cut short says nothing of the candidate.
            Err(_) if signals::is_interrupted() => {}
            Err(failure) => {
                self.progress.say(&format!("{}, {candidate}: {failure}", cell.name));
                row.failure = Some(failure.to_string());
            }
        }
    }
}
