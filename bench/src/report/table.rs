//! The tables on the terminal.

use std::io::{IsTerminal, Write};

use comfy_table::presets::UTF8_BORDERS_ONLY;
use comfy_table::{CellAlignment, ContentArrangement, Table};

use super::glance;
use super::text::{self, Columns};
use crate::compare::model::{CellReport, Report};
use crate::compare::plan::Question;
use crate::load::WINDOW;

/// Prints the whole report. A reader that closed the pipe has seen enough.
pub(crate) fn print(report: &Report) {
    let mut text = format!("\n{HOW_TO_READ}\n\n");
    for cell in &report.cells {
        let (head, rows) = text::grid(cell, Columns::Terminal);
        text += &format!("{}: {}\n", cell.cell.name, text::traffic(&cell.cell));
        text += &format!("{}\n", table(&head, rows.into_iter()));
        text += &format!("{}\n", disturbances(cell));
    }
    if !report.idle.is_empty() {
        text += "Idle connections: resident memory of the server for each, then a while at rest\n";
        text += &format!("{}\n\n", table(&text::IDLE_HEAD, report.idle.iter().map(text::idle)));
    }
    let glance = glance::rows(&report.cells);
    if !glance.is_empty() {
        text += "In short\n";
        text += &format!("{}\n\n", table(&glance::HEAD, glance.into_iter()));
    }
    if !report.goals.is_empty() {
        text += "The goals of this project\n";
        text += &format!("{}\n\n", table(&text::GOAL_HEAD, report.goals.iter().map(text::goal)));
    }
    for one in &report.servers {
        text += &format!("{}: {}: {}\n", one.candidate, one.version, one.settings);
    }
    for line in report.notes.iter().chain(&text::remarks(report.cells.iter(), &report.idle)) {
        text += &format!("{line}\n");
    }
    text += &format!(
        "{} rounds of {:.2} s, {:.0} s in all\n",
        report.settings.rounds, report.settings.duration_s, report.elapsed_s
    );
    let _ = std::io::stdout().write_all(text.as_bytes());
}

/// What the host did meanwhile, in the worst round of any row.
fn disturbances(report: &CellReport) -> String {
    let summaries = || report.rows.iter().filter_map(|row| row.summary.as_ref());
    let most = |values: &mut dyn Iterator<Item = f64>| values.fold(0.0, f64::max);
    let stolen = most(&mut summaries().map(|summary| summary.steal_percent.max));
    let others = most(
        &mut summaries().filter_map(|summary| summary.others_percent.map(|others| others.max)),
    );
    let count: u64 = summaries().map(|summary| summary.windows_left_out).sum();
    let all: u64 = summaries().map(|summary| summary.windows).sum();
    let clean = match report.cell.question {
        Question::FewHeavy => "; clean: without those; cheap: requests that asked for no work",
        _ => "",
    };
    format!(
        "  of the CPUs in use, the worst round lost {stolen:.1} % to a hypervisor and \
         {others:.0} % to other processes;\n  windows left out of {} ms in which a CPU was seen \
         stolen: {count} of {all}{clean}\n",
        WINDOW.as_millis()
    )
}

/// The first column is words, the others figures.
pub(super) fn table<S: AsRef<str>>(head: &[S], rows: impl Iterator<Item = Vec<String>>) -> Table {
    let mut table = Table::new();
    table.load_style(UTF8_BORDERS_ONLY).set_header(head.iter().map(AsRef::as_ref)).add_rows(rows);
    // A pipe has no width, and a table folded to a guessed one is hard to search.
    let folded = std::io::stdout().is_terminal();
    table.set_content_arrangement(if folded {
        ContentArrangement::Dynamic
    } else {
        ContentArrangement::Disabled
    });
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

const HOW_TO_READ: &str = "\
How to read: each line is a server. Every figure is the median of its rounds.
  req/s      requests answered per second; the client may be what bounds it
  per CPU-s  requests per second of CPU time that the server took: more is better. ± half of what
             the least and the greatest round lie apart
  P50 …      so many percent of the requests were answered within so many microseconds: less is
             better
  calls/req  system calls of the server per request: less is better
  / tokio    per CPU-s over that of tokio, round by round: above 1 is better than tokio. In
             brackets the least and the greatest
More columns, plots, and all about this host are on the HTML page.";
