//! This run beside an earlier one: whether it says the same.

use std::fs;
use std::path::Path;

use serde::Deserialize;

use crate::compare::model::{CellReport, Figure, Spread};
use crate::error::{Failure, Result};

/// The part of an earlier report that can be compared: what each candidate did, over the median one
/// of its round, which does not depend on how fast the host was.
#[derive(Debug, Deserialize)]
pub(crate) struct Earlier {
    cells: Vec<EarlierCell>,
}

#[derive(Debug, Deserialize)]
struct EarlierCell {
    cell: Named,
    rankings: Vec<EarlierRanking>,
}

#[derive(Debug, Deserialize)]
struct Named {
    name: String,
}

#[derive(Debug, Deserialize)]
struct EarlierRanking {
    figure: Figure,
    places: Vec<EarlierPlace>,
}

#[derive(Debug, Deserialize)]
struct EarlierPlace {
    candidate: String,
    relative: Spread,
}

impl Earlier {
    pub(crate) fn read(path: &Path) -> Result<Earlier> {
        let at = || format!("--against {}", path.display());
        let text = fs::read_to_string(path).map_err(Failure::at(at()))?;
        serde_json::from_str(&text)
            .map_err(|error| Failure::new(format!("{}: not a report of `compare`: {error}", at())))
    }

    /// In how many rows the two runs agree, and in which they do not: their intervals have nothing
    /// in common.
    pub(crate) fn findings(&self, cells: &[CellReport], path: &Path) -> Vec<String> {
        let mut findings = Vec::new();
        for figure in FIGURES {
            let pairs = self.pairs(cells, figure);
            let apart: Vec<_> = pairs
                .iter()
                .filter(|(_, now, then)| now.min > then.max || now.max < then.min)
                .map(|(name, now, then)| {
                    format!("{name}: {:.2}, then {:.2}", now.median, then.median)
                })
                .collect();
            let count = pairs.len();
            let (agree, path) = (count - apart.len(), path.display());
            let mut line = format!(
                "Against {path}, {figure}: the intervals of {agree} of {count} rows overlap."
            );
            if !apart.is_empty() {
                line += &format!(" Not those of {}.", apart.join("; "));
            }
            findings.push(line);
        }
        findings
    }

    fn pairs(&self, cells: &[CellReport], figure: Figure) -> Vec<(String, Spread, Spread)> {
        let mut pairs = Vec::new();
        for report in cells {
            let name = &report.cell.name;
            let earlier = self.cells.iter().find(|one| one.cell.name == *name);
            let then = earlier.and_then(|one| one.rankings.iter().find(|one| one.figure == figure));
            let now = report.rankings.iter().find(|one| one.figure == figure);
            let (Some(now), Some(then)) = (now, then) else { continue };
            for place in &now.places {
                let same = then.places.iter().find(|one| one.candidate == place.candidate);
                if let Some(same) = same {
                    let row = format!("{} at \u{201c}{name}\u{201d}", place.candidate);
                    pairs.push((row, place.relative, same.relative));
                }
            }
        }
        pairs
    }
}

/// What a second run shall agree on.
const FIGURES: [Figure; 2] = [Figure::RequestsPerCpuSecond, Figure::CleanP99];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compare::model::tests::{round, row};
    use crate::compare::plan::Cell;
    use crate::compare::ranking::Ranking;

    #[test]
    fn two_runs_agree_where_their_intervals_overlap() {
        let run = |a: f64| {
            let rows = [("a", a), ("b", 10.0), ("c", 10.0)]
                .map(|(name, rate)| row(name, (0..3).map(|index| round(index, rate)).collect()));
            let mut report = CellReport::new(Cell::new(1, 1, 0, 1), rows.into());
            report.rankings.extend(Ranking::of(&report, Figure::RequestsPerCpuSecond));
            vec![report]
        };
        let text = serde_json::json!({ "cells": run(10.0) }).to_string();
        let earlier: Earlier = serde_json::from_str(&text).unwrap();
        let path = Path::new("then.json");
        let same = earlier.findings(&run(10.0), path);
        assert!(same[0].ends_with("the intervals of 3 of 3 rows overlap."), "{same:?}");
        let other = earlier.findings(&run(12.0), path);
        assert!(
            other[0].contains("2 of 3") && other[0].contains("a at \u{201c}1 × 1"),
            "{other:?}"
        );
    }
}
