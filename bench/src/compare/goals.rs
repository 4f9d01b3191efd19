//! The goals of this project, each with the figure that meets or misses it.

use crate::compare::model::{CellReport, Goal, IdleRow, Row, Spread};
use crate::compare::plan::{Candidate, Cell};

/// Every goal this run has figures for, and those it has not.
pub(crate) fn judge(candidates: &[Candidate], cells: &[CellReport], idle: &[IdleRow]) -> Vec<Goal> {
    let names =
        candidates.iter().filter(|candidate| candidate.is_inline()).map(Candidate::to_string);
    names.flat_map(|name| judge_one(&name, cells, idle)).collect()
}

fn judge_one(name: &str, cells: &[CellReport], idle: &[IdleRow]) -> Vec<Goal> {
    let mut goals = Vec::new();
    for report in cells.iter().filter(|report| report.cell.idle == 0) {
        let row = report.rows.iter().find(|row| row.candidate == name);
        for (peer, ratio, wanted) in peers_of(&report.cell, row) {
            let what = format!("{}: {name} / {peer}, requests per CPU-second", report.cell.name);
            goals.push(at_least(what, wanted, ratio));
        }
        if report.cell.depth == 1 {
            let p50 = row.and_then(|row| row.p50_over_tokio);
            let met = p50.map(|p50| p50.median <= 1.0);
            let what = format!("{}: {name} / tokio, P50", report.cell.name);
            goals.push(Goal { what, wanted: "≤ 1".into(), value: p50, met });
        }
    }
    goals.extend(beside_idle(name, cells));
    if let Some(row) = idle.iter().find(|row| row.candidate == name) {
        let bytes = [row.silent_bytes, row.used_bytes].into_iter().flatten().reduce(f64::max);
        let what = format!("{name}: resident bytes per idle connection, of {}", row.connections);
        goals.push(at_most(what, IDLE_BYTES_MAX, bytes));
        let what = format!("{name}: times an idle server runs, so system calls it may have made");
        goals.push(at_most(what, 0.0, row.rest.map(|rest| rest.runs as f64)));
    }
    goals
}

/// The peers a kind of traffic is held against: name, ratio found, ratio wanted.
fn peers_of(cell: &Cell, row: Option<&Row>) -> Vec<(&'static str, Option<Spread>, f64)> {
    let over_tokio = row.and_then(|row| row.over_tokio);
    let over_bare = row.and_then(|row| row.over_bare);
    let over_framed = row.and_then(|row| row.over_framed);
    match cell.depth {
        1 => vec![("tokio", over_tokio, 1.0), ("bare-epoll", over_bare, 0.93)],
        64 => vec![("tokio-framed", over_framed, 1.4), ("bare-epoll", over_bare, 0.85)],
        _ => Vec::new(),
    }
}

/// The same traffic with and without idle connections beside it.
fn beside_idle(name: &str, cells: &[CellReport]) -> Option<Goal> {
    let with = cells.iter().find(|report| report.cell.idle > 0)?;
    let same = |cell: &Cell| {
        cell.idle == 0 && (cell.connections, cell.depth) == (with.cell.connections, with.cell.depth)
    };
    let without = cells.iter().find(|report| same(&report.cell))?;
    let row_of = |report: &'_ CellReport| report.rows.iter().position(|row| row.candidate == name);
    let (with_index, without_index) = (row_of(with)?, row_of(without)?);
    let ratio = with.rows[with_index].over(&without.rows[without_index]);
    let what =
        format!("{} / {}: {name}, requests per CPU-second", with.cell.name, without.cell.name);
    Some(at_least(what, 0.97, ratio))
}

fn at_least(what: String, wanted: f64, value: Option<Spread>) -> Goal {
    let met = value.map(|value| value.median >= wanted);
    Goal { what, wanted: format!("≥ {wanted}"), value, met }
}

fn at_most(what: String, wanted: f64, value: Option<f64>) -> Goal {
    let value = Spread::of(value);
    let met = value.map(|value| value.median <= wanted);
    Goal { what, wanted: format!("≤ {wanted}"), value, met }
}

const IDLE_BYTES_MAX: f64 = 1024.0;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compare::model::tests::{round, row};
    use ringpoll::{Backend, Placement};

    fn cell(name: &str, connections: u32, depth: u32, idle: u32) -> Cell {
        Cell { name: name.into(), connections, depth, idle, payload_bytes: 1024 }
    }

    #[test]
    fn each_goal_is_met_missed_or_not_measured() {
        let ours = Candidate::Ringpoll(Backend::Epoll, Placement::Inline);
        let name = ours.to_string();
        let mut first = row(&name, vec![round(0, 100.0)]);
        first.over_tokio = Spread::of([0.99, 1.01, 1.05]);
        let busy = CellReport { cell: cell("100 × 1", 100, 1, 0), rows: vec![first] };
        let beside = CellReport {
            cell: cell("idle", 100, 1, 400),
            rows: vec![row(&name, vec![round(0, 90.0)])],
        };
        let goals = judge(&[ours], &[busy, beside], &[]);
        let met: Vec<_> = goals.iter().map(|goal| goal.met).collect();
        assert_eq!(met, [Some(true), None, None, Some(false)]);
    }
}
