//! The tables on the terminal.

use std::io::{IsTerminal, Write};

use comfy_table::presets::UTF8_FULL_CONDENSED;
use comfy_table::{CellAlignment, ContentArrangement, Table};

use super::text;
use crate::compare::model::Report;
use crate::load::WINDOW;

/// Prints the whole report. A reader that closed the pipe has seen enough.
pub(crate) fn print(report: &Report) {
    let mut text = String::new();
    for cell in &report.cells {
        let (head, rows) = text::grid(cell);
        text += &format!("{}{}\n", cell.cell.name, text::unit(&cell.cell));
        text += &format!("{}\n\n", table(&head, rows.into_iter()));
    }
    if !report.idle.is_empty() {
        text += &format!("{}\n\n", table(&text::IDLE_HEAD, report.idle.iter().map(text::idle)));
    }
    if !report.goals.is_empty() {
        text += &format!("{}\n\n", table(&text::GOAL_HEAD, report.goals.iter().map(text::goal)));
    }
    report.findings.iter().for_each(|line| text += &format!("{line}\n"));
    text += "\n";
    for line in report.notes.iter().chain(&text::remarks(report.cells.iter(), &report.idle)) {
        text += &format!("{line}\n");
    }
    text += &format!(
        "{} rounds of {:.2} s; median (least–greatest); steal and others: the worst round's; \
         clean: without the windows of {} ms in which a CPU was seen stolen; {:.0} s in all\n",
        report.settings.rounds,
        report.settings.duration_s,
        WINDOW.as_millis(),
        report.elapsed_s
    );
    let _ = std::io::stdout().write_all(text.as_bytes());
}

/// The first column is words, the others figures.
pub(super) fn table<S: AsRef<str>>(head: &[S], rows: impl Iterator<Item = Vec<String>>) -> Table {
    let mut table = Table::new();
    table.load_style(UTF8_FULL_CONDENSED).set_header(head.iter().map(AsRef::as_ref)).add_rows(rows);
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
