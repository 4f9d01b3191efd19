//! The tables as Markdown, for a reader of the repository.

use super::glance::{self, RULE};
use super::text::{self, Columns};
use crate::compare::model::{Report, ServerInfo};

/// Every table and every sentence of the report.
pub(super) fn render(report: &Report) -> String {
    let mut page = format!("{MARK}\n\n# Comparison\n\n`{}`\n\n", report.command_line);
    page += &format!(
        "{} rounds of {:.2} s on {}, Linux {}. Median (least–greatest).\n",
        report.settings.rounds,
        report.settings.duration_s,
        report.host.cpu_model,
        report.host.kernel
    );
    for cell in &report.cells {
        page += &format!("\n## {}\n\n{}.\n", cell.cell.name, text::traffic(&cell.cell));
        for columns in [Columns::Main, Columns::More] {
            let (head, rows) = text::grid(cell, columns);
            page += &format!("\n{}", table(&head, &rows));
        }
    }
    if !report.idle.is_empty() {
        let rows: Vec<_> = report.idle.iter().map(text::idle).collect();
        page += &format!("\n## Silent connections\n\n{}", table(&text::IDLE_HEAD, &rows));
    }
    if !report.goals.is_empty() {
        let rows: Vec<_> = report.goals.iter().map(text::goal).collect();
        page += &format!("\n## Goals\n\n{}", table(&text::GOAL_HEAD, &rows));
    }
    let glance = glance::rows(&report.cells);
    if !glance.is_empty() {
        page += &format!("\n## In short\n\n{}\n\n{}", RULE, table(&glance::HEAD, &glance));
    }
    page += &lines("Findings", &report.findings);
    let server = |one: &ServerInfo| format!("{}: {}: {}", one.candidate, one.version, one.settings);
    page += &lines("Servers", &report.servers.iter().map(server).collect::<Vec<_>>());
    let remarks = text::remarks(report.cells.iter(), &report.idle);
    page += &lines("Notes", &[&report.notes[..], &remarks].concat());
    page
}

/// In the first line, by which the file is known.
pub(super) const MARK: &str = "<!-- ringpoll-bench -->";

/// A heading and an item for each line; nothing of none.
fn lines(title: &str, lines: &[String]) -> String {
    if lines.is_empty() {
        return String::new();
    }
    let items: String = lines.iter().map(|line| format!("* {line}\n")).collect();
    format!("\n## {title}\n\n{items}")
}

fn table(head: &[&str], rows: &[Vec<String>]) -> String {
    let line = |columns: &[String]| format!("| {} |\n", columns.join(" | "));
    let escaped = |text: &str| text.replace('|', "\\|");
    let head: Vec<_> = head.iter().map(|name| escaped(name)).collect();
    let rule = format!("|{}\n", "---|".repeat(head.len()));
    let rows =
        rows.iter().map(|row| line(&row.iter().map(|column| escaped(column)).collect::<Vec<_>>()));
    line(&head) + &rule + &rows.collect::<String>()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_has_a_rule_below_its_head_and_no_stray_bars() {
        let rows = [vec!["x|y".to_owned(), "1".to_owned()]];
        assert_eq!(table(&["a", "b"], &rows), "| a | b |\n|---|---|\n| x\\|y | 1 |\n");
        assert_eq!(lines("None", &[]), "");
    }
}
