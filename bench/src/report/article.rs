//! The article's experiments, on the terminal and as a page.

use std::io::Write;

use askama::Template;

use super::grid::Grid;
use super::legend::Legend;
use super::sweep::{self, Plot};
use super::text::{self, NOTHING};
use super::{host, page, plot, table};
use crate::article::{Claim, Experiment, Report, claims};
use crate::compare::model::{CellReport, Figure, Row, Spread, Summary};
use crate::compare::servers;
use crate::error::{Failure, Result};

/// Prints the whole report. A reader that closed the pipe has seen enough.
pub(crate) fn print(report: &Report) {
    let mut text = format!("\n{HOW_TO_READ}\n\n");
    for experiment in &report.experiments {
        let (head, rows) = short_grid(experiment);
        text += &format!("Experiment {}. {}\n", experiment.number, experiment.title);
        text += &format!("{}\n", table::table(&head, rows.into_iter()));
        let head = ["what the article says of", "conns", "figure", "article", "here", "verdict"];
        let rows = experiment.claims.iter().map(|claim| claim_row(experiment, claim));
        text += &format!("{}\n\n", table::table(&head, rows));
    }
    text += "What this host cannot show:\n";
    for line in &report.limits {
        text += &format!("* {line}\n");
    }
    text += "\n";
    for line in remarks(report) {
        text += &format!("{line}\n");
    }
    let settings = &report.settings;
    text += &format!(
        "{} of {} claims seen. {} rounds of {:.2} s; median (least–greatest), ratios to epoll of \
         the same rounds; {:.0} s in all\n",
        seen_count(report),
        judged_count(report),
        settings.rounds,
        settings.duration_s,
        report.elapsed_s
    );
    let _ = std::io::stdout().write_all(text.as_bytes());
}

pub(super) fn render(report: &Report) -> Result<String> {
    let Report { settings, .. } = report;
    let page = Page {
        version: settings.program_version,
        colors: plot::COLORS,
        what: WHAT,
        where_and_how: host::in_short(&report.host, settings),
        seen_count: seen_count(report),
        judged_count: judged_count(report),
        in_short: in_short(report),
        claims: claims_table(report),
        limits: &report.limits,
        experiments: report.experiments.iter().map(view).collect(),
        servers: servers(report),
        run: Grid::facts("The run", host::run(settings, &report.command_line, report.elapsed_s)),
        host: Grid::facts("The host", host::facts(&report.host)),
        mitigations: host::mitigations(&report.host),
        notes: remarks(report),
    };
    page.render().map_err(Failure::at("write the report as HTML"))
}

#[derive(Template)]
#[template(path = "article.html")]
struct Page<'a> {
    version: &'static str,
    colors: usize,
    what: &'static str,
    where_and_how: String,
    seen_count: usize,
    judged_count: usize,
    in_short: Grid,
    claims: Grid,
    limits: &'a [String],
    experiments: Vec<View>,
    servers: Grid,
    run: Grid,
    host: Grid,
    mitigations: Grid,
    notes: Vec<String>,
}

struct View {
    number: u32,
    title: &'static str,
    legend: Legend,
    plots: Vec<Plot>,
    table: Grid,
}

fn view(experiment: &Experiment) -> View {
    let names = names(experiment);
    let indexed: Vec<_> = names.iter().map(String::as_str).enumerate().collect();
    let sweeps = sweep::sweeps(&experiment.cells);
    let over_connections = sweeps.iter().flat_map(|sweep| sweep.plots(&names));
    // Of one number of connections there is no line over them, but one over percentiles.
    let last = experiment.cells.iter().max_by_key(|report| report.cell.connections);
    let curves = last.and_then(|report| page::curves(&names, report));
    let (head, rows) = grid(experiment);
    View {
        number: experiment.number,
        title: experiment.title,
        plots: over_connections.chain(curves).collect(),
        legend: Legend::of(indexed),
        table: Grid::figures(format!("Experiment {}", experiment.number), &head, rows),
    }
}

/// The servers of an experiment, which are the same for all numbers of connections.
fn names(experiment: &Experiment) -> Vec<String> {
    let rows = experiment.cells.iter().take(1).flat_map(|report| &report.rows);
    rows.map(|row| row.candidate.clone()).collect()
}

/// How many claims of each experiment were seen.
fn in_short(report: &Report) -> Grid {
    let rows = report.experiments.iter().map(|one| {
        let with = |seen| one.claims.iter().filter(|claim| claim.seen == seen).count().to_string();
        let name = format!("{}. {}", one.number, one.title);
        vec![name, with(Some(true)), with(Some(false)), with(None)]
    });
    let head = ["experiment", "claims seen", "not seen", "not measured"];
    Grid::words("The article's claims on this host", &head, rows.collect())
}

/// What the article says beside what was found, claim by claim.
fn claims_table(report: &Report) -> Grid {
    let of = |experiment: &Experiment| -> Vec<Vec<String>> {
        let row = |claim| {
            let mut row = claim_row(experiment, claim);
            row.insert(1, experiment.number.to_string());
            row
        };
        experiment.claims.iter().map(row).collect()
    };
    let rows = report.experiments.iter().flat_map(of).collect();
    let head = [
        "server",
        "experiment",
        "connections",
        "figure, over epoll's",
        "article",
        "here",
        "verdict",
    ];
    Grid::words("The article's claims beside our figures", &head, rows)
}

/// The server, connections, the figure, the article's ratio to epoll, ours, whether it is seen.
fn claim_row(experiment: &Experiment, claim: &Claim) -> Vec<String> {
    let cell = experiment.cells.iter().find(|report| report.cell.name == claim.cell);
    vec![
        claim.candidate.clone(),
        cell.map_or(NOTHING.to_owned(), |report| report.cell.connections.to_string()),
        name(claim.figure),
        claim.article.to_owned(),
        text::ratio(claim.found),
        verdict(claim).to_owned(),
    ]
}

fn verdict(claim: &Claim) -> &'static str {
    match claim.seen {
        Some(true) => "seen",
        Some(false) => "not seen",
        None => "not measured",
    }
}

fn servers(report: &Report) -> Grid {
    let mut rows: Vec<Vec<String>> = Vec::new();
    let cells = report.experiments.iter().flat_map(|experiment| &experiment.cells);
    for row in cells.flat_map(|report| &report.rows) {
        if rows.iter().all(|known| known[0] != row.candidate) {
            rows.push(page::server(&servers::info(&row.server, &report.settings)));
        }
    }
    Grid::words("Who is compared", &page::SERVER_HEAD, rows)
}

/// A table: what its columns are called, and its rows. Beside each figure its ratio to epoll and,
/// where the article says anything, what it says.
fn grid(experiment: &Experiment) -> (Vec<String>, Vec<Vec<String>>) {
    let figures = claims::figures(experiment.number);
    let mut head = vec!["server".to_owned(), "connections".to_owned()];
    for figure in figures {
        head.extend([name(*figure), "/ epoll".to_owned()]);
        if experiment.claims.iter().any(|claim| claim.figure == *figure) {
            head.push("article".to_owned());
        }
    }
    head.extend(["server CPUs busy", "of it SQPOLL", "client CPUs busy"].map(str::to_owned));
    let cells = experiment.cells.iter();
    let rows = cells.flat_map(|report| report.rows.iter().map(move |row| (report, row)));
    let rows =
        rows.map(|(report, row)| {
            let mut columns = vec![row.candidate.clone(), report.cell.connections.to_string()];
            match &row.summary {
                Some(summary) => {
                    columns.extend(figures.iter().flat_map(|figure| {
                        figure_columns(experiment, report, row, summary, *figure)
                    }));
                    columns.extend(cpu_columns(summary));
                }
                None => columns.push(text::missing(row).to_owned()),
            }
            columns.resize(head.len(), NOTHING.to_owned());
            columns
        });
    let rows = rows.collect();
    (head, rows)
}

/// The same as narrow as a terminal: each figure with the median of its ratio.
fn short_grid(experiment: &Experiment) -> (Vec<String>, Vec<Vec<String>>) {
    let figures = claims::figures(experiment.number);
    let mut head = vec!["server".to_owned(), "conns".to_owned()];
    head.extend(figures.iter().map(|figure| name(*figure)));
    let mut rows = Vec::new();
    for report in &experiment.cells {
        for row in &report.rows {
            let mut columns = vec![row.candidate.clone(), report.cell.connections.to_string()];
            match &row.summary {
                Some(summary) => columns.extend(figures.iter().map(|figure| {
                    let value = value(row, summary, *figure);
                    match over_epoll(report, row, *figure) {
                        Some(ratio) => format!("{value} ({})", text::few(ratio.median)),
                        None => value,
                    }
                })),
                None => columns.push(text::missing(row).to_owned()),
            }
            columns.resize(head.len(), NOTHING.to_owned());
            rows.push(columns);
        }
    }
    (head, rows)
}

fn name(figure: Figure) -> String {
    match figure {
        Figure::RequestsPerCpuSecond => "per 1 % CPU".to_owned(),
        Figure::P50 | Figure::P99 | Figure::P9999 | Figure::CleanP99 | Figure::CheapP99 => {
            format!("{figure} µs")
        }
        Figure::SystemCallsPerRequest => "calls/request".to_owned(),
        Figure::RequestsPerSecond | Figure::Tail => figure.to_string(),
    }
}

fn figure_columns(
    experiment: &Experiment,
    report: &CellReport,
    row: &Row,
    summary: &Summary,
    figure: Figure,
) -> Vec<String> {
    let ratio = over_epoll(report, row, figure);
    let mut columns = vec![value(row, summary, figure), text::ratio(ratio)];
    let mut of_figure = experiment.claims.iter().filter(|one| one.figure == figure).peekable();
    if of_figure.peek().is_some() {
        let claim =
            of_figure.find(|one| one.cell == report.cell.name && one.candidate == row.candidate);
        columns.push(claim.map_or(NOTHING.to_owned(), beside));
    }
    columns
}

fn value(row: &Row, summary: &Summary, figure: Figure) -> String {
    let value = match figure {
        Figure::RequestsPerSecond => Some(text::short(summary.rps.median)),
        Figure::RequestsPerCpuSecond => {
            summary.per_cpu_s.map(|rate| text::short(rate.median / 100.0))
        }
        Figure::P50 => Some(text::short(summary.p50_us.median)),
        Figure::P99 => Some(text::short(summary.p99_us.median)),
        Figure::P9999 => summary.p9999_us.map(|us| text::short(us.median)),
        Figure::CleanP99 | Figure::CheapP99 | Figure::Tail => {
            row.spread(figure).map(|one| text::few(one.median))
        }
        Figure::SystemCallsPerRequest => {
            summary.system_calls_per_request.map(|calls| text::few(calls.median))
        }
    };
    value.unwrap_or(NOTHING.to_owned())
}

fn over_epoll(report: &CellReport, row: &Row, figure: Figure) -> Option<Spread> {
    row.over(claims::epoll(report)?, figure)
}

/// What the article says, and whether it is so here.
fn beside(claim: &Claim) -> String {
    match claim.seen {
        Some(true) => format!("{}: seen", claim.article),
        Some(false) => format!("{}: not seen", claim.article),
        None => claim.article.to_owned(),
    }
}

fn cpu_columns(summary: &Summary) -> [String; 3] {
    let busy = |cpus: Option<Spread>| match cpus.map(|cpus| cpus.median) {
        Some(cpus) if cpus > 0.0 => format!("{cpus:.2}"),
        _ => NOTHING.to_owned(),
    };
    [summary.server_cpus_busy, summary.sqpoll_cpus_busy, Some(summary.client_cpus_busy)].map(busy)
}

fn remarks(report: &Report) -> Vec<String> {
    let cells = report.experiments.iter().flat_map(|experiment| &experiment.cells);
    [&report.notes[..], &text::remarks(cells, &[])].concat()
}

fn judged(report: &Report) -> impl Iterator<Item = bool> {
    report.experiments.iter().flat_map(|one| &one.claims).filter_map(|claim| claim.seen)
}

fn judged_count(report: &Report) -> usize {
    judged(report).count()
}

fn seen_count(report: &Report) -> usize {
    judged(report).filter(|seen| *seen).count()
}

const HOW_TO_READ: &str = "\
How to read: each line is a server, each figure the median of its rounds, and in brackets how much
it is of epoll's in the same rounds. Of latency (P50, P99: so many percent of the requests were
answered within so many microseconds) and calls below 1 is better, of all others above 1.
The second table of each experiment has the article's ratios to epoll beside ours, with the least
and the greatest round: seen is what gains, or loses, at least as much as the article says.
More figures, plots, and all about this host are on the HTML page.";

const WHAT: &str = "\
    The authors of the network library Netpoll published an article on what io_uring gains over \
    epoll, and by how much each of several ways to use it gains or loses. Here the same ways to \
    use it, as ringpoll has them, did the same work on this host, so that each of the article's \
    claims stands beside a figure.";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compare::candidate::Candidate;
    use crate::compare::model::Round;
    use crate::compare::model::tests::{round, row as model_row};
    use crate::compare::plan::Cell;
    use ringpoll::{Backend, Placement};

    #[test]
    fn what_the_article_says_stands_beside_the_figure_it_is_about() {
        let epoll = model_row("epoll", vec![round(0, 100.0)]);
        let epoll = Row { server: ours(Backend::Epoll), ..epoll };
        let uring = model_row("uring", vec![Round { p99_us: 1.0, ..round(0, 40.0) }]);
        let uring = Row { server: ours(Backend::Uring), ..uring };
        let cell = Cell::new(1, 1, 0, 1);
        let claim = Claim {
            cell: cell.name.clone(),
            candidate: "uring".into(),
            figure: Figure::P99,
            article: "> 1.1",
            found: Spread::of([0.5]),
            seen: Some(false),
        };
        let failed = Row { failure: Some("died".into()), ..model_row("failed", vec![]) };
        let cells = vec![CellReport::new(cell, vec![epoll, uring, failed])];
        let experiment = Experiment { number: 1, title: "", cells, claims: vec![claim] };
        let (head, rows) = grid(&experiment);
        assert!(rows.iter().all(|row| row.len() == head.len()), "{head:?} {rows:?}");
        let said: Vec<_> = head.iter().filter(|name| *name == "article").collect();
        assert_eq!(said.len(), 1, "only one figure has a claim: {head:?}");
        let p99 = head.iter().position(|name| name == "P99 µs").unwrap();
        assert_eq!(rows[0][p99..p99 + 3], ["2", "1.00", "–"]);
        assert_eq!(rows[1][p99..p99 + 3], ["1", "0.50", "> 1.1: not seen"]);
        assert_eq!(rows[1][2..4], ["40", "0.40"]);
        assert_eq!(rows[2][..3], ["failed", "1", "failed"]);
        let (head, rows) = short_grid(&experiment);
        assert!(rows.iter().all(|row| row.len() == head.len()), "{head:?} {rows:?}");
        assert_eq!(rows[1][..3], ["uring", "1", "40 (0.40)"]);
        assert_eq!(rows[2][..3], ["failed", "1", "failed"]);
        let claim = claim_row(&experiment, &experiment.claims[0]);
        assert_eq!(claim, ["uring", "1", "P99 µs", "> 1.1", "0.50", "not seen"]);
    }

    fn ours(backend: Backend) -> Candidate {
        Candidate::ours(backend, Placement::Inline)
    }
}
