//! Figures as people read them; shared by the terminal's table and the page.

use crate::cli::CompareScenario;
use crate::compare::model::{CellReport, Goal, IdleRow, Row, Spread, Summary};
use crate::compare::plan::Cell;

pub(super) const IDLE_HEAD: [&str; 6] = [
    "server",
    "idle connections",
    "bytes each, silent",
    "bytes each, after a request",
    "CPU at rest",
    "runs at rest",
];

pub(super) const GOAL_HEAD: [&str; 4] = ["goal", "wanted", "found", "verdict"];

/// A table: what its columns are called, and its rows.
pub(super) type Grid = (Vec<&'static str>, Vec<Vec<String>>);

/// Which figures a table has.
#[derive(Clone, Copy)]
pub(super) enum Columns {
    /// On the page: what rows are compared by.
    Main,
    /// On the page: what tells whether those figures can be trusted, and what they come from.
    More,
    /// What fits on a terminal.
    Terminal,
}

struct Column {
    name: &'static str,
    of: fn(&Row, &Summary) -> String,
}

/// The rows of one kind of traffic, without the columns that are empty for all of them.
pub(super) fn grid(report: &CellReport, which: Columns) -> Grid {
    let all = match which {
        Columns::Main => MAIN,
        Columns::More => MORE,
        Columns::Terminal => TERMINAL,
    };
    let of = |row: &Row, column: &Column| match &row.summary {
        Some(summary) => (column.of)(row, summary),
        None => NOTHING.to_owned(),
    };
    let is_kept = |column: &&Column| report.rows.iter().any(|row| of(row, column) != NOTHING);
    let kept: Vec<&Column> = all.iter().filter(is_kept).collect();
    let head = ["server"].into_iter().chain(kept.iter().map(|column| column.name)).collect();
    let row = |row: &Row| {
        let mut columns = vec![row.candidate.clone()];
        match row.summary {
            Some(_) => columns.extend(kept.iter().map(|column| of(row, column))),
            None => columns.push(missing(row).to_owned()),
        }
        columns.resize(columns.len().max(kept.len() + 1), NOTHING.to_owned());
        columns
    };
    let mut grid: Grid = (head, report.rows.iter().map(row).collect());
    // Where nothing at all was measured, the reason still needs its column.
    if kept.is_empty() {
        grid.0.push("");
    }
    grid
}

const RPS: Column = Column { name: "requests/s", of: |_, found| short(found.rps.median) };
const PER_CPU: Column = Column {
    name: "per CPU-second",
    of: |_, found| optional_as(found.per_cpu_s, |one| spread(one, short)),
};
const P50: Column = Column { name: "P50 µs", of: |_, found| whole(found.p50_us.median) };
const P9999: Column = Column {
    name: "P99.99 µs",
    of: |_, found| found.p9999_us.map_or(NOTHING.to_owned(), |us| whole(us.median)),
};
const CALLS: Column = Column { name: "calls/request", of: |row, _| calls(row) };
const CHEAP: Column =
    Column { name: "clean cheap P99 µs", of: |_, found| optional(found.clean_cheap_p99_us) };
const OVER_TOKIO: Column = Column { name: "/ tokio", of: |row, _| ratio(row.over_tokio) };

const MAIN: &[Column] = &[
    RPS,
    PER_CPU,
    P50,
    Column { name: "P90 µs", of: |_, found| whole(found.p90_us.median) },
    Column { name: "P99 µs", of: |_, found| spread(found.p99_us, whole) },
    Column { name: "P99.9 µs", of: |_, found| whole(found.p999_us.median) },
    P9999,
    CHEAP,
    CALLS,
    OVER_TOKIO,
    Column { name: "/ tokio-framed", of: |row, _| ratio(row.over_framed) },
    Column { name: "/ bare-epoll", of: |row, _| ratio(row.over_bare) },
    Column { name: "/ bare-ring", of: |row, _| ratio(row.over_bare_ring) },
    Column { name: "/ our epoll", of: |row, _| ratio(row.over_epoll) },
];

const MORE: &[Column] = &[
    Column { name: "/ first row", of: |row, _| ratio(row.over_first) },
    Column { name: "slowest µs", of: |_, found| whole(found.max_us.median) },
    Column { name: "clean P99 µs", of: |_, found| optional(found.clean_p99_us) },
    Column { name: "cheap P99 µs", of: |_, found| optional(found.cheap_p99_us) },
    Column {
        name: "windows left out",
        of: |_, found| format!("{} of {}", found.windows_left_out, found.windows),
    },
    // The worst round: a median would hide the one that was disturbed.
    Column { name: "steal %", of: |_, found| format!("{:.1}", found.steal_percent.max) },
    Column {
        name: "others %",
        of: |_, found| optional_as(found.others_percent, |one| whole(one.max)),
    },
    Column {
        name: "server CPUs busy",
        of: |_, found| optional_as(found.server_cpus_busy, |one| few(one.median)),
    },
    Column { name: "client CPUs busy", of: |_, found| few(found.client_cpus_busy.median) },
    Column { name: "SQPOLL % of CPU", of: |_, found| percent(found.sqpoll_percent) },
    Column { name: "of it at work %", of: |_, found| percent(found.sqpoll_work_percent) },
    Column {
        name: "RSS MiB",
        of: |_, found| {
            optional_as(found.rss_bytes, |one| format!("{:.1}", one.median / f64::from(1 << 20)))
        },
    },
];

const TERMINAL: &[Column] = &[
    Column { name: "req/s", ..RPS },
    Column { name: "per CPU-s", of: |_, found| optional_as(found.per_cpu_s, plus_minus) },
    P50,
    Column { name: "P99 µs", of: |_, found| whole(found.p99_us.median) },
    P9999,
    CHEAP,
    Column { name: "calls/req", ..CALLS },
    OVER_TOKIO,
];

/// A kind of traffic in words.
pub(super) fn traffic(cell: &Cell) -> String {
    if let Some(load) = cell.http {
        return load.traffic().to_owned();
    }
    if cell.scenario == CompareScenario::Calls {
        return format!(
            "{} callers share {} connections, one call in flight of each; {} bytes each way. CPU \
             time, memory and system calls are those of the clients",
            cell.connections * cell.depth,
            cell.connections,
            cell.payload_bytes
        );
    }
    let idle = match cell.idle {
        0 => String::new(),
        idle => format!(", {idle} silent ones beside them"),
    };
    let pace = match cell.rate {
        None => format!("{} in flight on each", cell.depth),
        Some(rate) => format!("{rate:.0} requests/s offered to each server"),
    };
    let plural = if cell.connections == 1 { "" } else { "s" };
    format!(
        "{} connection{plural}, {pace}{idle}; {} bytes each way",
        cell.connections, cell.payload_bytes
    )
}

/// Bytes as a power of two says it best.
pub(super) fn bytes(value: f64) -> String {
    let unit = |value: f64, unit: &str| match value {
        whole if whole.fract() == 0.0 => format!("{whole:.0} {unit}"),
        other => format!("{other:.1} {unit}"),
    };
    match value {
        1_048_576.0.. => unit(value / 1_048_576.0, "MiB"),
        1024.0.. => unit(value / 1024.0, "KiB"),
        _ => unit(value, "B"),
    }
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

/// The median, and half of what the rounds lie apart.
fn plus_minus(spread: Spread) -> String {
    let half = (spread.max - spread.min) / 2.0 / spread.median.max(f64::MIN_POSITIVE);
    format!("{} ±{:.0} %", short(spread.median), half * 100.0)
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
    optional_as(value, |value| spread(value, whole))
}

fn optional_as(value: Option<Spread>, show: impl Fn(Spread) -> String) -> String {
    value.map_or(NOTHING.to_owned(), show)
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
        let report = CellReport::new(Cell::new(1, 1, 0, 1), rows);
        for which in [Columns::Main, Columns::More, Columns::Terminal] {
            let (head, rows) = grid(&report, which);
            assert!(!head.contains(&"/ bare-ring"), "{head:?}");
            assert!(rows.iter().all(|row| row.len() == head.len()), "{rows:?}");
            assert_eq!(rows[0][1], "not measured");
        }
        let (head, rows) = grid(&report, Columns::Main);
        let percentiles = ["P50 µs", "P90 µs", "P99 µs", "P99.9 µs", "P99.99 µs", "/ tokio"];
        assert!(percentiles.iter().all(|name| head.contains(name)), "{head:?}");
        assert_eq!(rows[1].last().map(String::as_str), Some("1.50"));
    }

    #[test]
    fn where_nothing_was_measured_every_row_says_so() {
        let rows = vec![model_row("a", vec![]), model_row("b", vec![])];
        let (head, rows) = grid(&CellReport::new(Cell::new(1, 1, 0, 1), rows), Columns::Main);
        assert_eq!(head.len(), 2);
        assert!(rows.iter().all(|row| row[1] == "not measured" && row.len() == 2), "{rows:?}");
    }

    #[test]
    fn a_size_is_told_in_the_unit_that_suits_it() {
        let sizes = [64.0, 1024.0, 65536.0, 1_048_576.0, 1536.0].map(bytes);
        assert_eq!(sizes, ["64 B", "1 KiB", "64 KiB", "1 MiB", "1.5 KiB"]);
    }

    #[test]
    fn figures_are_short_and_show_their_spread() {
        let value = Spread { median: 123_456.0, min: 99.0, max: 1_234_567.0 };
        assert_eq!(spread(value, short), "123.5k (99–1.23M)");
        let apart = Spread { median: 2000.0, min: 1900.0, max: 2300.0 };
        assert_eq!(plus_minus(apart), "2.0k ±10 %");
        let steady = Spread { median: 5.0, min: 5.0, max: 5.0 };
        assert_eq!(spread(steady, short), "5");
    }
}
