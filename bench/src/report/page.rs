//! The HTML page: everything inline, so that one file can be mailed.

use askama::Template;

use super::{plot, text};
use crate::compare::model::{CellReport, Report};
use crate::compare::plan::Settings;
use crate::error::{Failure, Result};
use crate::host::Host;
use crate::load::WINDOW;

#[derive(Template)]
#[template(path = "report.html")]
struct Page<'a> {
    legend: &'a [String],
    colors: usize,
    over_connections: Option<String>,
    cells: Vec<CellView<'a>>,
    idle_head: &'a [&'a str],
    idle: Vec<Vec<String>>,
    idle_plot: String,
    goals: Vec<GoalView>,
    window_ms: u128,
    met_count: usize,
    judged_count: usize,
    host: Vec<(&'static str, String)>,
    notes: Vec<String>,
}

struct CellView<'a> {
    name: &'a str,
    what: String,
    rates: String,
    latencies: String,
    head: Vec<&'static str>,
    rows: Vec<Vec<String>>,
}

struct GoalView {
    columns: Vec<String>,
    verdict: &'static str,
}

pub(super) fn render(report: &Report) -> Result<String> {
    let judged = report.goals.iter().filter_map(|goal| goal.met);
    let page = Page {
        legend: &report.candidates,
        colors: plot::COLORS,
        over_connections: plot::over_connections(&report.candidates, &report.cells, |summary| {
            summary.per_cpu_s
        }),
        cells: report.cells.iter().map(|cell| view(report, cell)).collect(),
        idle_head: &text::IDLE_HEAD,
        idle: report.idle.iter().map(text::idle).collect(),
        idle_plot: plot::idle_bytes(report),
        goals: report
            .goals
            .iter()
            .map(|goal| GoalView { columns: text::goal(goal), verdict: text::verdict(goal) })
            .collect(),
        window_ms: WINDOW.as_millis(),
        met_count: judged.clone().filter(|met| *met).count(),
        judged_count: judged.count(),
        host: host(&report.host, &report.settings, report.elapsed_s),
        notes: [&report.notes[..], &text::remarks(report.cells.iter(), &report.idle)].concat(),
    };
    page.render().map_err(Failure::at("write the report as HTML"))
}

fn view<'a>(report: &Report, cell: &'a CellReport) -> CellView<'a> {
    let (head, rows) = text::grid(cell);
    let traffic = &cell.cell;
    let idle = if traffic.idle == 0 {
        String::new()
    } else {
        format!(", {} silent ones beside them", traffic.idle)
    };
    let pace = match traffic.rate {
        None => format!("{} in flight on each", traffic.depth),
        Some(rate) => format!("{rate:.0} requests/s offered to each server"),
    };
    CellView {
        name: &traffic.name,
        what: format!(
            "{} connections, {pace}{idle}; {} bytes each way",
            traffic.connections, traffic.payload_bytes
        ),
        rates: plot::rates(report, cell),
        latencies: plot::latencies(report, cell),
        head,
        rows,
    }
}

/// Where and how it was measured.
pub(super) fn host(
    host: &Host,
    settings: &Settings,
    elapsed_s: f64,
) -> Vec<(&'static str, String)> {
    let optional = |value: Option<String>| value.unwrap_or_else(|| "unknown".into());
    vec![
        ("kernel", host.kernel.clone()),
        ("CPU", host.cpu_model.clone()),
        (
            "CPUs",
            format!(
                "{} of {} allowed. {}",
                host.cpus_allowed.len(),
                host.cpus_online,
                settings.cpus()
            ),
        ),
        ("CPU quota", host.cpu_quota.map_or("none".into(), |cpus| format!("{cpus:.2} CPUs"))),
        ("congestion control", optional(host.congestion_control.clone())),
        ("somaxconn", optional(host.somaxconn.map(|count| count.to_string()))),
        (
            "rounds",
            format!(
                "{} × {:.2} s after {:.2} s of warm-up, candidates interleaved and \
                 rotated; {:.0} s in all",
                settings.rounds, settings.duration_s, settings.warmup_s, elapsed_s
            ),
        ),
        ("ringpoll-bench", settings.program_version.to_owned()),
    ]
}
