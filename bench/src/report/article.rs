//! The article's experiments, on the terminal and as a page.

use std::io::Write;

use askama::Template;

use super::text::{self, NOTHING};
use super::{page, plot, table};
use crate::article::{Claim, Experiment, Report, claims};
use crate::compare::model::{CellReport, Figure, Row, Spread, Summary};
use crate::error::{Failure, Result};

/// Prints the whole report. A reader that closed the pipe has seen enough.
pub(crate) fn print(report: &Report) {
    let mut text = String::new();
    for experiment in &report.experiments {
        let (head, rows) = grid(experiment);
        text += &format!("Experiment {}. {}\n", experiment.number, experiment.title);
        text += &format!("{}\n\n", table::table(&head, rows.into_iter()));
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
    let page = Page {
        colors: plot::COLORS,
        seen_count: seen_count(report),
        judged_count: judged_count(report),
        limits: &report.limits,
        experiments: report.experiments.iter().map(view).collect(),
        host: page::host(&report.host, &report.settings, report.elapsed_s),
        notes: remarks(report),
    };
    page.render().map_err(Failure::at("write the report as HTML"))
}

#[derive(Template)]
#[template(path = "article.html")]
struct Page<'a> {
    colors: usize,
    seen_count: usize,
    judged_count: usize,
    limits: &'a [String],
    experiments: Vec<View>,
    host: Vec<(&'static str, String)>,
    notes: Vec<String>,
}

struct View {
    number: u32,
    title: &'static str,
    legend: Vec<String>,
    plots: Vec<(&'static str, String)>,
    head: Vec<String>,
    rows: Vec<Vec<String>>,
}

fn view(experiment: &Experiment) -> View {
    let legend = legend(experiment);
    let plot =
        |name, figure| Some((name, plot::over_connections(&legend, &experiment.cells, figure)?));
    let plots = [
        plot("Requests/s over connections", |summary| Some(summary.rps)),
        plot("P99 over connections, µs", |summary| Some(summary.p99_us)),
    ];
    let (head, rows) = grid(experiment);
    View {
        number: experiment.number,
        title: experiment.title,
        plots: plots.into_iter().flatten().collect(),
        legend,
        head,
        rows,
    }
}

/// The servers of an experiment, which are the same for all numbers of connections.
fn legend(experiment: &Experiment) -> Vec<String> {
    let rows = experiment.cells.iter().take(1).flat_map(|report| &report.rows);
    rows.map(|row| row.candidate.clone()).collect()
}

/// A table: what its columns are called, and its rows. Beside each figure its ratio to epoll and,
/// where the article says anything, what it says.
fn grid(experiment: &Experiment) -> (Vec<String>, Vec<Vec<String>>) {
    let figures = claims::figures(experiment.number);
    let mut head = vec!["candidate".to_owned(), "connections".to_owned()];
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
    let ratio = claims::epoll(report).and_then(|epoll| row.over(epoll, figure));
    let mut columns = vec![value.unwrap_or(NOTHING.to_owned()), text::ratio(ratio)];
    let mut of_figure = experiment.claims.iter().filter(|one| one.figure == figure).peekable();
    if of_figure.peek().is_some() {
        let claim =
            of_figure.find(|one| one.cell == report.cell.name && one.candidate == row.candidate);
        columns.push(claim.map_or(NOTHING.to_owned(), beside));
    }
    columns
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compare::candidate::Candidate;
    use crate::compare::model::tests::{round, row as model_row};
    use crate::compare::model::{Round, Spread};
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
    }

    fn ours(backend: Backend) -> Candidate {
        Candidate::ours(backend, Placement::Inline)
    }
}
