//! Figures as people read them; shared by the terminal's table and the page.

use crate::cli::CompareScenario;
use crate::compare::model::{CellReport, Goal, IdleRow, Row, Spread};
use crate::compare::plan::Cell;

pub(super) const ROW_HEAD: [&str; 20] = [
    "candidate",
    "requests/s",
    "per CPU-second",
    "P50 µs",
    "P99 µs",
    "clean P99 µs",
    "cheap P99 µs",
    "clean cheap P99 µs",
    "windows left out",
    "steal %",
    "others %",
    "calls/request",
    "SQPOLL % of CPU",
    "of it at work %",
    "RSS MiB",
    "/ tokio",
    "/ tokio-framed",
    "/ bare-epoll",
    "/ bare-ring",
    "/ our epoll",
];

pub(super) const IDLE_HEAD: [&str; 6] = [
    "candidate",
    "idle connections",
    "bytes each, silent",
    "bytes each, after a request",
    "CPU at rest",
    "runs at rest",
];

pub(super) const GOAL_HEAD: [&str; 4] = ["goal", "wanted", "found", ""];

/// A table: what its columns are called, and its rows.
pub(super) type Grid = (Vec<&'static str>, Vec<Vec<String>>);

/// What the numbers in the name of a kind of traffic are.
pub(super) fn unit(cell: &Cell) -> &'static str {
    match cell.scenario {
        CompareScenario::Heavy => "",
        CompareScenario::Rates => " of what the slowest takes, open loop, 100 connections",
        _ => " (connections × depth)",
    }
}

/// The rows of one kind of traffic, without the columns that are empty for all of them.
pub(super) fn grid(report: &CellReport) -> Grid {
    let rows: Vec<_> = report.rows.iter().map(row).collect();
    let is_kept = |column: &usize| rows.iter().any(|row| row[*column] != NOTHING);
    let kept: Vec<usize> = (0..ROW_HEAD.len()).filter(is_kept).collect();
    let keep = |row: &Vec<String>| kept.iter().map(|column| row[*column].clone()).collect();
    (kept.iter().map(|column| ROW_HEAD[*column]).collect(), rows.iter().map(keep).collect())
}

fn row(row: &Row) -> Vec<String> {
    let mut columns = vec![row.candidate.clone()];
    if let Some(summary) = &row.summary {
        columns.extend([
            short(summary.rps.median),
            summary.per_cpu_s.map_or(NOTHING.to_owned(), |rate| spread(rate, short)),
            format!("{:.0}", summary.p50_us.median),
            spread(summary.p99_us, whole),
            optional(summary.clean_p99_us),
            optional(summary.cheap_p99_us),
            optional(summary.clean_cheap_p99_us),
            format!("{} of {}", summary.windows_left_out, summary.windows),
            // The worst round: a median would hide the one that was disturbed.
            format!("{:.1}", summary.steal_percent.max),
            summary
                .others_percent
                .map_or(NOTHING.to_owned(), |others| format!("{:.0}", others.max)),
            calls(row),
            percent(summary.sqpoll_percent),
            percent(summary.sqpoll_work_percent),
            summary.rss_bytes.map_or(NOTHING.to_owned(), |bytes| {
                format!("{:.1}", bytes.median / f64::from(1 << 20))
            }),
            ratio(row.over_tokio),
            ratio(row.over_framed),
            ratio(row.over_bare),
            ratio(row.over_bare_ring),
            ratio(row.over_epoll),
        ]);
    } else {
        columns.push(missing(row).to_owned());
    }
    columns.resize(ROW_HEAD.len(), NOTHING.to_owned());
    columns
}

/// Why a row has no figures.
pub(super) fn missing(row: &Row) -> &'static str {
    if row.failure.is_some() { "failed" } else { "not measured" }
}

/// What the columns have no room for: why rows failed, what servers warned of. What concerns a
/// candidate everywhere is said once.
pub(super) fn remarks<'a>(
    cells: impl Iterator<Item = &'a CellReport> + Clone,
    idle: &'a [IdleRow],
) -> Vec<String> {
    let rows =
        cells.flat_map(|CellReport { cell, rows, .. }| rows.iter().map(move |row| (cell, row)));
    let failed = rows.clone().filter_map(|(cell, row)| {
        let count = row.rounds.len();
        let what = format!("failed after {count} rounds: {}", row.failure.as_ref()?);
        Some((row.candidate.as_str(), what, cell.name.as_str()))
    });
    let idle = idle.iter().filter_map(|row| {
        let what = format!("failed after 0 rounds: {}", row.failure.as_ref()?);
        Some((row.candidate.as_str(), what, "idle connections"))
    });
    let warned = rows.flat_map(|(cell, row)| {
        let what = row.warnings.iter().map(|warning| format!("warning: {warning}"));
        what.map(|what| (row.candidate.as_str(), what, cell.name.as_str()))
    });
    let mut groups: Vec<(_, Vec<&str>)> = Vec::new();
    for (candidate, what, place) in failed.chain(idle).chain(warned) {
        let key = (candidate, what);
        match groups.iter_mut().find(|(known, _)| *known == key) {
            Some((_, places)) => places.push(place),
            None => groups.push((key, vec![place])),
        }
    }
    let line = |((candidate, what), places): (_, Vec<&str>)| {
        format!("{candidate}: {what} ({})", places.join("; "))
    };
    groups.into_iter().map(line).collect()
}

pub(super) fn idle(row: &IdleRow) -> Vec<String> {
    let bytes =
        |bytes: Option<f64>| bytes.map_or(NOTHING.to_owned(), |bytes| format!("{bytes:.0}"));
    let mut columns = vec![row.candidate.clone(), row.connections.to_string()];
    columns.extend([bytes(row.silent_bytes), bytes(row.used_bytes)]);
    match (&row.rest, &row.failure) {
        (_, Some(_)) => columns.push("failed".to_owned()),
        (Some(rest), None) => {
            columns.push(format!("{:.0} µs in {:.1} s", rest.cpu_us, rest.window_s));
            columns.push(rest.runs.to_string());
        }
        (None, None) => {}
    }
    columns.resize(IDLE_HEAD.len(), NOTHING.to_owned());
    columns
}

pub(super) fn goal(goal: &Goal) -> Vec<String> {
    let found = goal.value.map_or(NOTHING.to_owned(), |value| spread(value, figure));
    vec![goal.what.clone(), goal.wanted.clone(), found, verdict(goal).to_owned()]
}

pub(super) fn verdict(goal: &Goal) -> &'static str {
    match goal.met {
        Some(true) => "met",
        Some(false) => "missed",
        None => "not measured",
    }
}

/// `123.4k (120.0k–125.1k)`; the brackets only where the rounds differ.
pub(super) fn spread(spread: Spread, show: impl Fn(f64) -> String) -> String {
    let (median, min, max) = (show(spread.median), show(spread.min), show(spread.max));
    if min == max { median } else { format!("{median} ({min}–{max})") }
}

/// Four digits at most, with the unit of a thousand or a million.
pub(super) fn short(value: f64) -> String {
    match value {
        1e6.. => format!("{:.2}M", value / 1e6),
        1e3.. => format!("{:.1}k", value / 1e3),
        _ => format!("{value:.0}"),
    }
}

fn whole(value: f64) -> String {
    format!("{value:.0}")
}

fn optional(value: Option<Spread>) -> String {
    value.map_or(NOTHING.to_owned(), |value| spread(value, whole))
}

fn figure(value: f64) -> String {
    if value >= 10.0 || value == 0.0 { format!("{value:.0}") } else { format!("{value:.3}") }
}

pub(super) fn ratio(value: Option<Spread>) -> String {
    value.map_or(NOTHING.to_owned(), |value| spread(value, few))
}

fn percent(value: Option<Spread>) -> String {
    value.map_or(NOTHING.to_owned(), |value| format!("{:.0}", value.median))
}

/// A small number. Below a tenth, two digits would be one.
pub(super) fn few(value: f64) -> String {
    if value < 0.1 { format!("{value:.3}") } else { format!("{value:.2}") }
}

fn calls(row: &Row) -> String {
    let counted = row.summary.as_ref().and_then(|summary| summary.system_calls_per_request);
    match (counted.map(|counted| few(counted.median)), row.system_calls_by_perf.map(few)) {
        (Some(counted), Some(perf)) => format!("{counted} (perf {perf})"),
        (Some(counted), None) => counted,
        (None, Some(perf)) => format!("perf {perf}"),
        (None, None) => NOTHING.to_owned(),
    }
}

/// A column without a figure.
pub(super) const NOTHING: &str = "–";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compare::model::tests::{round, row as model_row};

    #[test]
    fn columns_that_are_empty_for_all_are_left_out() {
        let mut second = model_row("b", vec![round(0, 2.0)]);
        second.over_tokio = Spread::of([1.5]);
        let rows = vec![model_row("a", vec![]), second];
        let (head, rows) = grid(&CellReport::new(Cell::new(1, 1, 0, 1), rows));
        assert!(head.contains(&"/ tokio") && !head.contains(&"/ bare-ring"), "{head:?}");
        assert!(rows.iter().all(|row| row.len() == head.len()), "{rows:?}");
        assert_eq!(rows[0][1], "not measured");
    }

    #[test]
    fn figures_are_short_and_show_their_spread() {
        let value = Spread { median: 123_456.0, min: 99.0, max: 1_234_567.0 };
        assert_eq!(spread(value, short), "123.5k (99–1.23M)");
        let steady = Spread { median: 5.0, min: 5.0, max: 5.0 };
        assert_eq!(spread(steady, short), "5");
    }
}
