//! The HTML page of a comparison: everything inline, so that one file can be mailed.

use askama::Template;

use super::grid::Grid;
use super::legend::Legend;
use super::plot::{self, Bar, Chart, Line, Scale};
use super::sweep::{self, Plot};
use super::text::{self, Columns, short};
use super::{glance, host};
use crate::compare::model::{CellReport, Report, Row, ServerInfo, Spread, Summary};
use crate::error::{Failure, Result};
use crate::load::WINDOW;

#[derive(Template)]
#[template(path = "report.html")]
struct Page<'a> {
    version: &'static str,
    colors: usize,
    what: String,
    where_and_how: String,
    findings: &'a [String],
    glance: Option<Grid>,
    rule: &'static str,
    goals: Option<Grid>,
    met_count: usize,
    judged_count: usize,
    sweeps: Vec<SweepView>,
    cells: Vec<CellView<'a>>,
    idle: Option<Grid>,
    idle_plot: Option<Plot>,
    window_ms: u128,
    servers: Grid,
    run: Grid,
    host: Grid,
    mitigations: Grid,
    notes: Vec<String>,
}

struct SweepView {
    title: String,
    legend: Legend,
    plots: Vec<Plot>,
}

struct CellView<'a> {
    name: &'a str,
    what: String,
    legend: Legend,
    plots: Vec<Plot>,
    main: Grid,
    more: Grid,
}

pub(super) fn render(report: &Report) -> Result<String> {
    let judged = report.goals.iter().filter_map(|goal| goal.met);
    let glance = glance::rows(&report.cells);
    let page = Page {
        version: report.settings.program_version,
        colors: plot::COLORS,
        what: what(report),
        where_and_how: host::in_short(&report.host, &report.settings),
        findings: &report.findings,
        glance: (!glance.is_empty())
            .then(|| Grid::words("ringpoll beside other libraries", &glance::HEAD, glance)),
        rule: glance::RULE,
        goals: goals(report),
        met_count: judged.clone().filter(|met| *met).count(),
        judged_count: judged.count(),
        sweeps: sweeps(report),
        cells: report.cells.iter().map(|cell| view(report, cell)).collect(),
        idle: (!report.idle.is_empty()).then(|| {
            let rows = report.idle.iter().map(text::idle).collect();
            Grid::figures("Idle connections", &text::IDLE_HEAD, rows)
        }),
        idle_plot: idle_plot(report),
        window_ms: WINDOW.as_millis(),
        servers: servers(report),
        run: Grid::facts(
            "The run",
            host::run(&report.settings, &report.command_line, report.elapsed_s),
        ),
        host: Grid::facts("The host", host::facts(&report.host)),
        mitigations: host::mitigations(&report.host),
        notes: [&report.notes[..], &text::remarks(report.cells.iter(), &report.idle)].concat(),
    };
    page.render().map_err(Failure::at("write the report as HTML"))
}

fn what(report: &Report) -> String {
    let ours = report.servers.iter().filter(|one| one.version.starts_with("ringpoll ")).count();
    let mut others: Vec<&str> = report.servers.iter().map(|one| one.version.as_str()).collect();
    others.retain(|version| !version.starts_with("ringpoll "));
    // Those without a library last: they are named together.
    others.sort_unstable_by_key(|version| (*version == "no library", *version));
    others.dedup();
    let others = match &others[..] {
        [] => "no others".to_owned(),
        [rest @ .., "no library"] if !rest.is_empty() => {
            format!("{}, and servers without any library,", rest.join(", "))
        }
        others => others.join(", "),
    };
    let kinds = match report.cells.len() {
        1 => "one kind".to_owned(),
        count => format!("{count} kinds"),
    };
    format!(
        "ringpoll is a library for servers and clients on a network. Here {ours} of its \
         configurations and {others} did the same work, one after the other: a client sent \
         requests under {kinds} of traffic, the server answered, and it was measured how many \
         requests a server answers, how much CPU time that takes it, and how long a request waits."
    )
}

fn goals(report: &Report) -> Option<Grid> {
    let rows: Vec<_> = report.goals.iter().map(text::goal).collect();
    (!rows.is_empty()).then(|| Grid::words("The goals of this project", &text::GOAL_HEAD, rows))
}

fn servers(report: &Report) -> Grid {
    let rows = report.servers.iter();
    Grid::words("Who is compared", &SERVER_HEAD, rows.map(server).collect())
}

pub(super) const SERVER_HEAD: [&str; 4] = ["server", "version", "settings", "command line"];

pub(super) fn server(one: &ServerInfo) -> Vec<String> {
    [&one.candidate, &one.version, &one.settings, &one.command_line].map(String::clone).to_vec()
}

fn sweeps(report: &Report) -> Vec<SweepView> {
    let all = sweep::sweeps(&report.cells);
    let view = |one: &sweep::Sweep<'_>| SweepView {
        title: one.title(),
        legend: Legend::of(one.candidates(&report.candidates)),
        plots: one.plots(&report.candidates),
    };
    all.iter().map(view).filter(|view| !view.plots.is_empty()).collect()
}

fn view<'a>(report: &Report, cell: &'a CellReport) -> CellView<'a> {
    let series = |row: &Row| report.series(&row.candidate);
    let grid = |caption: &str, columns| {
        let (head, rows) = text::grid(cell, columns);
        Grid::figures(format!("{}: {caption}", cell.cell.name), &head, rows)
    };
    let rates = bars(report, cell, |_, summary| summary.per_cpu_s);
    let calls = bars(report, cell, |row, summary| {
        summary.system_calls_per_request.or(Spread::of(row.system_calls_by_perf))
    });
    let plots = [
        draw_bars("Requests per CPU-second (more is better)", &rates, short),
        curves(&report.candidates, cell),
        draw_bars("System calls per request (less is better)", &calls, text::few),
    ];
    let measured = cell.rows.iter().filter(|row| row.summary.is_some());
    CellView {
        name: &cell.cell.name,
        what: text::traffic(&cell.cell),
        legend: Legend::of(measured.map(|row| (series(row), row.candidate.as_str())).collect()),
        plots: plots.into_iter().flatten().collect(),
        main: grid("what it comes to", Columns::Main),
        more: grid("what was seen beside it", Columns::More),
    }
}

fn bars<'a>(
    report: &Report,
    cell: &'a CellReport,
    figure: impl Fn(&Row, &Summary) -> Option<Spread>,
) -> Vec<Bar<'a>> {
    let bar = |row: &'a Row| {
        let value = figure(row, row.summary.as_ref()?)?;
        Some(Bar { series: report.series(&row.candidate), name: &row.candidate, value })
    };
    cell.rows.iter().filter_map(bar).collect()
}

fn draw_bars(title: &str, bars: &[Bar<'_>], show: impl Fn(f64) -> String) -> Option<Plot> {
    let title = title.to_owned();
    (!bars.is_empty()).then(|| Plot { svg: plot::bars(&title, bars, show), title })
}

/// How long so many percent of the requests took at most, a line for each candidate.
pub(super) fn curves(candidates: &[String], cell: &CellReport) -> Option<Plot> {
    let mut lines = Vec::new();
    for row in &cell.rows {
        let series = candidates.iter().position(|name| *name == row.candidate);
        let (Some(series), Some(summary)) = (series, &row.summary) else { continue };
        // The slowest request has no place on an axis of nines, and the quickest would press all
        // others together.
        let is_drawn = |point: &(f64, f64)| (CURVE_FROM..100.0).contains(&point.0);
        let points = summary.latency_curve.iter().copied().filter(is_drawn);
        lines.push(Line { series, name: &row.candidate, points: points.collect() });
    }
    lines.retain(|line| !line.points.is_empty());
    let points = || lines.iter().flat_map(|line| &line.points);
    let values = || points().map(|point| point.1);
    let bounds = (values().reduce(f64::min)?, values().reduce(f64::max)?);
    let title = "Latency by percentile, µs (less is better)".to_owned();
    let chart = Chart {
        title: title.clone(),
        x: Scale::nines(CURVE_FROM, points().map(|point| point.0).fold(50.0, f64::max)),
        y: Scale::logarithmic(bounds, sweep::axis_short),
        x_name: "of the requests",
        marks_names_only: true,
    };
    Some(Plot { svg: plot::lines(&chart, &lines), title })
}

fn idle_plot(report: &Report) -> Option<Plot> {
    let mut bars = Vec::new();
    for row in &report.idle {
        let Some(value) = Spread::of(row.used_bytes) else { continue };
        bars.push(Bar { series: report.series(&row.candidate), name: &row.candidate, value });
    }
    let title = "Bytes per connection after one request (less is better)";
    draw_bars(title, &bars, |bytes| format!("{} B", short(bytes)))
}

/// In percent.
const CURVE_FROM: f64 = 25.0;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Cli, Command};
    use crate::compare::model::tests::{round, row};
    use crate::compare::plan::{Cell, Cpus, Settings};
    use crate::host::Host;
    use clap::Parser;

    #[test]
    fn what_came_out_stands_first_and_every_text_is_escaped() {
        let mut report = empty();
        report.findings = vec!["a < b & c".to_owned()];
        let cell = Cell { name: "<i>1</i>".into(), ..Cell::new(1, 1, 0, 64) };
        let rows = vec![row("a", vec![round(0, 5.0)]), row("b", vec![])];
        report.cells = vec![CellReport::new(cell, rows)];
        report.candidates = vec!["a".to_owned(), "b".to_owned()];
        let page = render(&report).unwrap();
        let finding = page.find("<li>a &#60; b &#38; c</li>").unwrap();
        assert!(finding < page.find("<figure").unwrap());
        assert!(!page.contains("<i>1") && page.contains("&#60;i&#62;1"));
        assert_eq!(page.matches("not drawn").count(), 0);
        assert!(page.contains("<th scope=\"row\">b</th><td data-name=\"requests/s\">not measured"));
    }

    #[test]
    fn a_report_of_nothing_is_a_page_too() {
        let page = render(&empty()).unwrap();
        assert!(page.contains("</html>") && !page.contains("<figure"));
    }

    fn empty() -> Report {
        let cli = Cli::try_parse_from(["ringpoll-bench", "compare"]).unwrap();
        let Command::Compare(args) = cli.command else { unreachable!("it was asked for") };
        Report {
            program: crate::report::PROGRAM,
            command_line: String::new(),
            host: Host::read().unwrap(),
            settings: Settings::new(&args, Cpus { allowed: vec![0], pinned: None }, 1),
            candidates: Vec::new(),
            servers: Vec::new(),
            findings: Vec::new(),
            cells: Vec::new(),
            idle: Vec::new(),
            goals: Vec::new(),
            notes: Vec::new(),
            elapsed_s: 0.0,
        }
    }
}
