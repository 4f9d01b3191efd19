//! Kinds of traffic that differ in one thing only, drawn over that.

use super::plot::{self, Chart, Line, Scale};
use super::text::{self, few, short};
use crate::compare::model::{CellReport, Row, Summary};
use crate::compare::plan::Cell;

/// What kinds of traffic may differ in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Axis {
    Connections,
    PayloadBytes,
    OfferedRate,
}

/// At least two kinds of traffic, in the order of what they differ in.
pub(super) struct Sweep<'a> {
    pub(super) axis: Axis,
    pub(super) cells: Vec<&'a CellReport>,
}

/// A drawing and what it shows.
pub(super) struct Plot {
    pub(super) title: String,
    pub(super) svg: String,
}

/// All that there are.
pub(super) fn sweeps(cells: &[CellReport]) -> Vec<Sweep<'_>> {
    let mut found: Vec<Sweep<'_>> = Vec::new();
    for axis in Axis::ALL {
        let mut groups: Vec<(Cell, Vec<&CellReport>)> = Vec::new();
        for report in cells {
            let Some(rest) = axis.rest(&report.cell) else { continue };
            match groups.iter_mut().find(|(known, _)| *known == rest) {
                Some((_, group)) => group.push(report),
                None => groups.push((rest, vec![report])),
            }
        }
        for (_, mut cells) in groups {
            cells.sort_by(|a, b| axis.value(&a.cell).total_cmp(&axis.value(&b.cell)));
            cells.dedup_by_key(|report| axis.value(&report.cell));
            if cells.len() > 1 {
                found.push(Sweep { axis, cells });
            }
        }
    }
    found
}

impl Axis {
    const ALL: [Axis; 3] = [Axis::Connections, Axis::PayloadBytes, Axis::OfferedRate];

    /// The traffic without what the axis is; `None` where it has no place on the axis.
    fn rest(self, cell: &Cell) -> Option<Cell> {
        // Names differ anyway, and steps are what the same work took at the moment of counting.
        let mut rest = Cell { name: String::new(), work_steps: None, ..cell.clone() };
        match self {
            Axis::Connections => rest.connections = 0,
            Axis::PayloadBytes => rest.payload_bytes = 0,
            Axis::OfferedRate => rest.rate = Some(cell.rate.map(|_| 0.0)?),
        }
        Some(rest)
    }

    fn value(self, cell: &Cell) -> f64 {
        match self {
            Axis::Connections => f64::from(cell.connections),
            Axis::PayloadBytes => f64::from(cell.payload_bytes),
            Axis::OfferedRate => cell.rate.unwrap_or_default(),
        }
    }

    fn name(self) -> &'static str {
        match self {
            Axis::Connections => "connections",
            Axis::PayloadBytes => "payload",
            Axis::OfferedRate => "requests/s offered",
        }
    }

    fn show(self, value: f64) -> String {
        match self {
            Axis::Connections => format!("{value:.0}"),
            Axis::PayloadBytes => text::bytes(value),
            Axis::OfferedRate => axis_short(value),
        }
    }

    fn scale(self, values: &[f64]) -> Scale {
        match self {
            Axis::Connections | Axis::PayloadBytes => {
                Scale::measured(values, |value| self.show(value))
            }
            Axis::OfferedRate => {
                let max = values.iter().copied().fold(0.0, f64::max);
                Scale::linear(max, |value| self.show(value))
            }
        }
    }
}

/// A figure of a row, and how it is drawn.
struct Measure {
    title: &'static str,
    is_logarithmic: bool,
    of: fn(&Row, &Summary) -> Option<f64>,
    show: fn(f64) -> String,
}

impl Sweep<'_> {
    pub(super) fn title(&self) -> String {
        let first = &self.cells[0].cell;
        let what = match self.axis {
            Axis::Connections => "By number of connections",
            Axis::PayloadBytes => "By size of the payload",
            Axis::OfferedRate => "By offered rate",
        };
        let mut rest = Vec::new();
        if self.axis != Axis::Connections {
            rest.push(format!("{} connections", first.connections));
        }
        match first.rate {
            None => rest.push(format!("{} in flight on each", first.depth)),
            Some(rate) if self.axis != Axis::OfferedRate => {
                rest.push(format!("{} requests/s offered", short(rate)));
            }
            Some(_) => {}
        }
        if self.axis != Axis::PayloadBytes {
            rest.push(format!("{} each way", text::bytes(f64::from(first.payload_bytes))));
        }
        if first.idle > 0 {
            rest.push(format!("{} idle ones beside them", first.idle));
        }
        format!("{what}: {}", rest.join(", "))
    }

    /// The candidates that have figures in any of the cells, in the order of `all`.
    pub(super) fn candidates<'b>(&self, all: &'b [String]) -> Vec<(usize, &'b str)> {
        let has_figures = |name: &str| {
            let mut rows = self.cells.iter().filter_map(|report| report.row(name));
            rows.any(|row| row.summary.is_some())
        };
        let named = all.iter().enumerate().map(|(index, name)| (index, name.as_str()));
        named.filter(|(_, name)| has_figures(name)).collect()
    }

    /// `all` are the candidates of the page, whose place gives them their colour.
    pub(super) fn plots(&self, all: &[String]) -> Vec<Plot> {
        let measures = match self.axis {
            Axis::Connections | Axis::PayloadBytes => CLOSED_LOOP,
            Axis::OfferedRate => OPEN_LOOP,
        };
        measures.iter().filter_map(|measure| self.plot(all, measure)).collect()
    }

    fn plot(&self, all: &[String], measure: &Measure) -> Option<Plot> {
        let lines: Vec<_> = self
            .candidates(all)
            .into_iter()
            .map(|(series, name)| {
                let point = |report: &&CellReport| {
                    let row = report.row(name)?;
                    let value = (measure.of)(row, row.summary.as_ref()?)?;
                    Some((self.axis.value(&report.cell), value))
                };
                Line { series, name, points: self.cells.iter().filter_map(point).collect() }
            })
            .filter(|line| !line.points.is_empty())
            .collect();
        let values = || lines.iter().flat_map(|line| &line.points).map(|(_, value)| *value);
        let max = values().reduce(f64::max)?;
        // Where all else is some, none at all would stretch a logarithmic axis without end.
        let min = values().filter(|value| *value > 0.0).reduce(f64::min).unwrap_or(max);
        let places: Vec<_> =
            self.cells.iter().map(|report| self.axis.value(&report.cell)).collect();
        let title = measure.title.to_owned();
        let chart = Chart {
            title: title.clone(),
            x: self.axis.scale(&places),
            // From bytes to megabytes a figure changes so much that zero would be a waste of room.
            y: if measure.is_logarithmic || self.axis == Axis::PayloadBytes {
                Scale::logarithmic((min, max), measure.show)
            } else {
                Scale::linear(max, measure.show)
            },
            x_name: self.axis.name(),
            marks_names_only: false,
        };
        Some(Plot { title, svg: plot::lines(&chart, &lines) })
    }
}

/// As on an axis: a round number of thousands has no digit after the point.
pub(super) fn axis_short(value: f64) -> String {
    short(value).replace(".0k", "k").replace(".00M", "M")
}

const P50: Measure = Measure {
    title: "P50, µs (less is better)",
    is_logarithmic: true,
    of: |_, summary| Some(summary.p50_us.median),
    show: axis_short,
};
const P99: Measure = Measure {
    title: "P99, µs (less is better)",
    is_logarithmic: true,
    of: |_, summary| Some(summary.p99_us.median),
    show: axis_short,
};
const CLOSED_LOOP: &[Measure] = &[
    Measure {
        title: "Requests per CPU-second of the server (more is better)",
        is_logarithmic: false,
        of: |_, summary| summary.per_cpu_s.map(|rate| rate.median),
        show: axis_short,
    },
    Measure {
        title: "Requests/s (more is better)",
        is_logarithmic: false,
        of: |_, summary| Some(summary.rps.median),
        show: axis_short,
    },
    P99,
    Measure {
        title: "System calls per request (less is better)",
        is_logarithmic: true,
        of: |row, summary| {
            let counted = summary.system_calls_per_request.map(|calls| calls.median);
            counted.or(row.system_calls_by_perf)
        },
        show: |calls| if calls < 1e-3 { format!("{calls:.0e}") } else { few(calls) },
    },
];
const OPEN_LOOP: &[Measure] = &[P50, P99];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compare::model::tests::{round, row};

    #[test]
    fn traffic_that_differs_in_one_thing_is_drawn_over_it() {
        let of = |cell: Cell| CellReport::new(cell, vec![row("a", vec![round(0, 1.0)])]);
        let rate = |rate| Cell { rate: Some(rate), ..Cell::new(100, 1, 0, 512) };
        let cells = vec![
            of(Cell::new(100, 1, 0, 1024)),
            of(Cell::new(1, 1, 0, 1024)),
            of(Cell::new(4, 64, 0, 1024)),
            of(Cell::new(100, 1, 400, 1024)),
            of(Cell::new(100, 1, 0, 64)),
            of(rate(100.0)),
            of(rate(900.0)),
        ];
        let found = sweeps(&cells);
        let seen: Vec<_> = found
            .iter()
            .map(|sweep| {
                let values = sweep.cells.iter().map(|report| sweep.axis.value(&report.cell));
                (sweep.axis, values.collect::<Vec<_>>())
            })
            .collect();
        assert_eq!(
            seen,
            [
                (Axis::Connections, vec![1.0, 100.0]),
                (Axis::PayloadBytes, vec![64.0, 1024.0]),
                (Axis::OfferedRate, vec![100.0, 900.0]),
            ]
        );
        assert!(found[2].title().contains("100 connections"), "{}", found[2].title());
        let all = ["b".to_owned(), "a".to_owned()];
        assert_eq!(found[0].candidates(&all), [(1, "a")]);
        // Nobody counted system calls.
        let titles = |index: usize| found[index].plots(&all).len();
        assert_eq!((titles(0), titles(2)), (3, 2));
    }

    #[test]
    fn a_failed_row_is_no_point_and_an_empty_figure_no_plot() {
        let cells: Vec<_> = [1, 10]
            .map(|connections| {
                let rows = vec![row("a", vec![])];
                CellReport::new(Cell::new(connections, 1, 0, 64), rows)
            })
            .into();
        assert!(sweeps(&cells)[0].plots(&["a".to_owned()]).is_empty());
    }
}
