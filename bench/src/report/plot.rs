//! The drawings of the page, as SVG text.
//!
//! Colours are placeholders: the page's style sheet matches them by attribute and gives them what
//! suits light or dark (`ink` and `faint` for text and lines, `series` for the candidates).

use plotters::coord::Shift;
use plotters::prelude::*;

use super::text::short;
use crate::cli::CompareScenario;
use crate::compare::model::{CellReport, IdleRow, Report, Row, Spread, Summary};
use crate::compare::plan::Cell;

/// A drawing failed; the page says so instead of showing it.
type Drawn = Result<(), Box<dyn std::error::Error>>;
type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// Requests per CPU-second: a bar per candidate, a line from the least to the greatest round.
pub(super) fn rates(report: &Report, cell: &CellReport) -> String {
    let bar = |(row, summary): (&'_ Row, &'_ Summary)| {
        Some((report.series(&row.candidate), row.candidate.clone(), summary.per_cpu_s?))
    };
    let rows: Vec<_> = with_summary(&cell.rows).filter_map(bar).collect();
    bars(&rows, short)
}

/// Resident bytes per idle connection that has had one request.
pub(super) fn idle_bytes(report: &Report) -> String {
    let bar = |row: &IdleRow| {
        let used = Spread::of(row.used_bytes)?;
        Some((report.series(&row.candidate), row.candidate.clone(), used))
    };
    let rows: Vec<_> = report.idle.iter().filter_map(bar).collect();
    bars(&rows, |bytes| format!("{} B", short(bytes)))
}

/// From P50 (dot) to P99 (ring), with the P99 of the best and the worst round.
pub(super) fn latencies(report: &Report, cell: &CellReport) -> String {
    let rows: Vec<_> = with_summary(&cell.rows).collect();
    let max = rows.iter().map(|(_, summary)| summary.p99_us.max).fold(1.0, f64::max);
    draw(rows.len(), |area| {
        for (line, (row, summary)) in rows.iter().enumerate() {
            let y = TOP + LINE * line as i32 + 24;
            let at = |us: f64| (us / max * f64::from(BAR_WIDTH)) as i32 + 6;
            let (p50, p99) = (summary.p50_us, summary.p99_us);
            label(
                area,
                line,
                &row.candidate,
                &format!("{:.0} / {:.0} µs", p50.median, p99.median),
            )?;
            let color = series(report.series(&row.candidate));
            whisker(area, (at(p99.min), at(p99.max)), y, 9)?;
            let line = [(at(p50.median), y), (at(p99.median), y)];
            area.draw(&PathElement::new(line, color.stroke_width(3)))?;
            area.draw(&Circle::new((at(p50.median), y), 5, color.filled()))?;
            area.draw(&Circle::new((at(p99.median), y), 5, color.stroke_width(2)))?;
        }
        Ok(())
    })
}

/// A figure over the number of connections, for rows of one request in flight. `candidates` are
/// those of the legend.
pub(super) fn over_connections(
    candidates: &[String],
    cells: &[CellReport],
    figure: fn(&Summary) -> Option<Spread>,
) -> Option<String> {
    // Others of the same number of connections are another kind of traffic.
    let is_point =
        |cell: &Cell| (cell.idle, cell.depth, cell.scenario) == (0, 1, CompareScenario::Echo);
    let cells: Vec<_> = cells.iter().filter(|report| is_point(&report.cell)).collect();
    let lines: Vec<(usize, Vec<(f64, f64)>)> = (candidates.iter().enumerate())
        .map(|(index, candidate)| {
            let point = |cell: &&CellReport| {
                let summary = cell.row(candidate)?.summary.as_ref()?;
                Some((f64::from(cell.cell.connections), figure(summary)?.median))
            };
            let mut points: Vec<_> = cells.iter().filter_map(point).collect();
            points.sort_by(|a, b| a.0.total_cmp(&b.0));
            (index, points)
        })
        .collect();
    let xs = || lines.iter().flat_map(|(_, points)| points).map(|point| point.0);
    let (left, right) = (xs().reduce(f64::min)?, xs().reduce(f64::max)?);
    let top =
        lines.iter().flat_map(|(_, points)| points).map(|point| point.1).reduce(f64::max)? * 1.1;
    if left >= right {
        return None;
    }
    let mut svg = String::new();
    let drawn =
        draw_lines(SVGBackend::with_string(&mut svg, (WIDTH, 300)), &lines, left..right, top);
    Some(drawn.map_or_else(|error| failed(&*error), |()| svg))
}

fn draw_lines(
    backend: SVGBackend<'_>,
    lines: &[(usize, Vec<(f64, f64)>)],
    across: std::ops::Range<f64>,
    top: f64,
) -> Drawn {
    let area = backend.into_drawing_area();
    // Of more than a decade the powers of ten: more labels would lie on each other.
    let x_labels = if across.end > across.start * 10.0 { 5 } else { 10 };
    let mut chart = ChartBuilder::on(&area)
        .margin(12)
        // Half of the last label stands beyond the axis.
        .margin_right(28)
        .x_label_area_size(36)
        .y_label_area_size(52)
        .build_cartesian_2d(across.log_scale(), 0.0..top)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .bold_line_style(FAINT)
        .light_line_style(TRANSPARENT)
        .axis_style(INK)
        .label_style(("sans-serif", FONT).into_font().color(&INK))
        .x_labels(x_labels)
        .x_desc("connections")
        .y_labels(6)
        .x_label_formatter(&|x| format!("{x:.0}"))
        .y_label_formatter(&|y| short(*y).replace(".0k", "k"))
        .draw()?;
    for (index, points) in lines {
        let color = series(*index);
        chart.draw_series(LineSeries::new(points.iter().copied(), color.stroke_width(2)))?;
        chart.draw_series(points.iter().map(|point| Circle::new(*point, 4, color.filled())))?;
    }
    area.present()?;
    Ok(())
}

/// Which candidate, its name, its figure.
type Bar = (usize, String, Spread);

fn bars(rows: &[Bar], show: impl Fn(f64) -> String) -> String {
    let max = rows.iter().map(|(_, _, spread)| spread.max).fold(f64::MIN_POSITIVE, f64::max);
    draw(rows.len(), |area| {
        for (line, (index, name, spread)) in rows.iter().enumerate() {
            let y = TOP + LINE * line as i32 + 18;
            let at = |value: f64| (value / max * f64::from(BAR_WIDTH)) as i32;
            label(area, line, name, &show(spread.median))?;
            let corners = [(0, y), (at(spread.median).max(1), y + 12)];
            area.draw(&Rectangle::new(corners, series(*index).filled()))?;
            whisker(area, (at(spread.min), at(spread.max)), y + 6, 7)?;
        }
        Ok(())
    })
}

/// Lines of text and shape, one under the other.
fn draw(line_count: usize, shapes: impl Fn(&Area<'_>) -> Drawn) -> String {
    let mut svg = String::new();
    let height = TOP + LINE * line_count as i32;
    let area = SVGBackend::with_string(&mut svg, (WIDTH, height as u32)).into_drawing_area();
    let drawn = shapes(&area).and_then(|()| Ok(area.present()?));
    drop(area);
    drawn.map_or_else(|error| failed(&*error), |()| svg)
}

fn label(area: &Area<'_>, line: usize, name: &str, figure: &str) -> Drawn {
    let y = TOP + LINE * line as i32;
    let style = ("sans-serif", FONT).into_font().color(&INK);
    area.draw(&Text::new(name.to_owned(), (0, y), style.clone()))?;
    let right = style.pos(plotters::style::text_anchor::Pos::new(
        plotters::style::text_anchor::HPos::Right,
        plotters::style::text_anchor::VPos::Top,
    ));
    area.draw(&Text::new(figure.to_owned(), (WIDTH as i32 - 4, y), right))?;
    Ok(())
}

fn whisker(area: &Area<'_>, (from, to): (i32, i32), y: i32, height: i32) -> Drawn {
    if from == to {
        return Ok(());
    }
    let half = height / 2;
    for line in [
        [(from, y), (to, y)],
        [(from, y - half), (from, y + half)],
        [(to, y - half), (to, y + half)],
    ] {
        area.draw(&PathElement::new(line, INK.stroke_width(1)))?;
    }
    Ok(())
}

fn with_summary(rows: &[Row]) -> impl Iterator<Item = (&Row, &Summary)> {
    rows.iter().filter_map(|row| Some((row, row.summary.as_ref()?)))
}

fn failed(error: &dyn std::error::Error) -> String {
    format!("<p>not drawn: {}</p>", error.to_string().replace(['<', '&'], "?"))
}

fn series(index: usize) -> RGBColor {
    RGBColor(3, (index % COLORS) as u8, 0)
}

/// `templates/report.html` has as many, `--s0` and on.
pub(super) const COLORS: usize = 12;
const INK: RGBColor = RGBColor(1, 1, 1);
const FAINT: RGBColor = RGBColor(2, 2, 2);
/// Narrow enough that the text is readable when a phone shows it at full width.
const WIDTH: u32 = 420;
/// Pixels, times the 1.24 that this library divides by on its way to SVG's font size.
const FONT: f64 = 13.0 * 1.24;
const BAR_WIDTH: i32 = 404;
const TOP: i32 = 4;
const LINE: i32 = 42;
