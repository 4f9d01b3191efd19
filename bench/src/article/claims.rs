//! What the article reports, and whether it is seen here.
//!
//! Everything is a ratio to the epoll server of the same rounds. The article does not say which
//! latency it means. With one request in flight on each connection the mean follows from the
//! throughput, so its claims are held against P99.

use std::ops::RangeInclusive;

use ringpoll::Backend;
use serde::Serialize;

use crate::compare::model::{CellReport, Figure, Row, Spread};

/// One figure of one server, beside what the article says about it.
#[derive(Debug, Serialize)]
pub(crate) struct Claim {
    pub(crate) cell: String,
    pub(crate) candidate: String,
    pub(crate) figure: Figure,
    /// The ratio to epoll that the article reports.
    pub(crate) article: &'static str,
    /// The ratio here; `None`: not measured.
    pub(crate) found: Option<Spread>,
    pub(crate) seen: Option<bool>,
}

/// The figures that an experiment is about.
pub(crate) fn figures(experiment: u32) -> &'static [Figure] {
    match experiment {
        1 => &[Figure::RequestsPerSecond, Figure::P50, Figure::P99],
        2 => &[Figure::RequestsPerSecond, Figure::RequestsPerCpuSecond, Figure::P50, Figure::P99],
        _ => {
            &[Figure::RequestsPerSecond, Figure::P99, Figure::P9999, Figure::SystemCallsPerRequest]
        }
    }
}

/// The server that all ratios are to.
pub(crate) fn epoll(report: &CellReport) -> Option<&Row> {
    report.rows.iter().find(|row| row.server.backend() == Some(Backend::Epoll))
}

/// All that the article says about an experiment.
pub(crate) fn judge(experiment: u32, cells: &[CellReport]) -> Vec<Claim> {
    let rows = cells.iter().flat_map(|report| report.rows.iter().map(move |row| (report, row)));
    let each = rows.flat_map(|(report, row)| {
        figures(experiment).iter().map(move |figure| (report, row, *figure))
    });
    each.filter_map(|(report, row, figure)| {
        let reported = REPORTED.iter().find(|one| one.is_about(experiment, report, row, figure))?;
        let found = epoll(report).and_then(|epoll| row.over(epoll, figure));
        Some(Claim {
            cell: report.cell.name.clone(),
            candidate: row.candidate.clone(),
            figure,
            article: reported.ratio,
            found,
            seen: found.map(|found| reported.seen.contains(&found.median)),
        })
    })
    .collect()
}

/// A sentence of the article as a ratio to epoll.
struct Reported {
    experiment: u32,
    backends: &'static [&'static str],
    connections: RangeInclusive<u32>,
    /// Whether it is about pollers that never sleep, and not about all.
    is_of_polling: bool,
    figure: Figure,
    ratio: &'static str,
    /// At least as much of a gain, or of a loss, as is reported.
    seen: RangeInclusive<f64>,
}

impl Reported {
    const fn of(
        experiment: u32,
        backends: &'static [&'static str],
        figure: Figure,
        ratio: &'static str,
        seen: RangeInclusive<f64>,
    ) -> Reported {
        let connections = 1..=u32::MAX;
        Reported { experiment, backends, connections, is_of_polling: false, figure, ratio, seen }
    }

    const fn at(self, connections: RangeInclusive<u32>) -> Reported {
        Reported { connections, ..self }
    }

    const fn of_polling(self) -> Reported {
        Reported { is_of_polling: true, ..self }
    }

    fn is_about(&self, experiment: u32, report: &CellReport, row: &Row, figure: Figure) -> bool {
        let backend = row.server.backend().map(|backend| backend.to_string());
        (self.experiment, self.figure) == (experiment, figure)
            && backend.is_some_and(|name| self.backends.contains(&name.as_str()))
            && self.connections.contains(&report.cell.connections)
            && (row.server.never_sleeps() || !self.is_of_polling)
    }
}

/// The first one that is about a figure counts.
const REPORTED: &[Reported] = &[
    // Steady throughput, and more than a tenth of latency lost, in a ping-pong of one thread.
    Reported::of(1, &["uring"], Figure::RequestsPerSecond, "≈ 1", LEVEL),
    Reported::of(1, &["uring"], Figure::P99, "> 1.1", TENTH_MORE),
    Reported::of(2, &["uring-2"], Figure::RequestsPerSecond, "1.10–1.15", TENTH_MORE).at(MANY),
    Reported::of(2, &["uring-4"], Figure::RequestsPerSecond, "≈ 1", LEVEL).at(MANY),
    Reported::of(2, &["uring-2"], Figure::P99, "0.80–0.90", 0.0..=0.9).at(MANY),
    Reported::of(2, &["uring-4"], Figure::P99, "0.60–0.70", 0.0..=0.7).at(MANY),
    // Polling in vain takes CPUs from few connections.
    Reported::of(2, SEND_THREADS, Figure::RequestsPerCpuSecond, "< 1", LESS).at(100..=100),
    Reported::of(2, &["hybrid"], Figure::P99, "≈ 1", LEVEL),
    Reported::of(3, CONFIGS, Figure::RequestsPerSecond, "1.10–1.15", TENTH_MORE),
    Reported::of(3, CONFIGS, Figure::P99, "0.60–0.80", 0.0..=0.8),
    Reported::of(3, CONFIGS, Figure::P9999, "0.80–0.90, in some", 0.0..=0.9),
    // None where poller and kernel both poll; the poller of config 2 enters the kernel to receive.
    Reported::of(3, &["sqpoll-config1"], Figure::SystemCallsPerRequest, "0", NONE).of_polling(),
    // Up to 15 times fewer.
    Reported::of(3, CONFIGS, Figure::SystemCallsPerRequest, "< 1, down to 0.07", LESS),
];

const SEND_THREADS: &[&str] = &["uring-2", "uring-4"];
const CONFIGS: &[&str] = &["sqpoll-config1", "sqpoll-config2"];
/// From how many connections up the article reports a gain.
const MANY: RangeInclusive<u32> = 200..=u32::MAX;
const TENTH_MORE: RangeInclusive<f64> = 1.1..=f64::INFINITY;
/// What is neither a gain nor a loss.
const LEVEL: RangeInclusive<f64> = 0.95..=1.05;
const LESS: RangeInclusive<f64> = 0.0..=1.0 - f64::EPSILON;
const NONE: RangeInclusive<f64> = 0.0..=0.001;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::article::experiments;
    use crate::cli::{Cli, Command};
    use crate::compare::model::Round;
    use crate::compare::model::tests::round;
    use clap::Parser;

    #[test]
    fn a_claim_stands_beside_the_ratio_to_epoll() {
        let claims = judged(2, &["--connections", "200"], |server, round| match server {
            "uring-2" => Round { rps: 112.0, p99_us: 95.0, ..round },
            "uring-4" => Round { rps: 106.0, p99_us: 69.0, ..round },
            _ => Round { rps: 100.0, p99_us: 100.0, ..round },
        });
        assert_eq!(
            lines(&claims),
            [
                "200, uring-2, requests/s: 1.10–1.15, Some(true)",
                "200, uring-2, P99: 0.80–0.90, Some(false)",
                "200, uring-4, requests/s: ≈ 1, Some(false)",
                "200, uring-4, P99: 0.60–0.70, Some(true)",
                "200, hybrid, P99: ≈ 1, Some(true)",
            ]
        );
        assert_eq!(claims[0].found.map(|found| found.median), Some(1.12));
    }

    #[test]
    fn a_claim_about_some_connections_is_about_no_others() {
        let at = |connections| {
            let claims = judged(2, &["--connections", connections], |_, round| round);
            claims.iter().map(|claim| claim.figure).collect::<Vec<_>>()
        };
        assert_eq!(at("199"), [Figure::P99]);
        let rate = Figure::RequestsPerCpuSecond;
        assert_eq!(at("100"), [rate, rate, Figure::P99]);
        assert_eq!(at("200").len(), 5);
    }

    #[test]
    fn a_ping_pong_is_claimed_to_lose_latency_only() {
        let claims = judged(1, &[], |server, round| match server {
            "uring" => Round { p99_us: 90.0, ..round },
            _ => Round { p99_us: 100.0, ..round },
        });
        assert_eq!(
            lines(&claims),
            ["1, uring, requests/s: ≈ 1, Some(true)", "1, uring, P99: > 1.1, Some(false)",]
        );
    }

    #[test]
    fn no_calls_are_claimed_where_all_sides_poll_and_fewer_elsewhere() {
        let calls = |extra: &[&str]| {
            let args = [&["--connections", "10"][..], extra].concat();
            let claims = judged(3, &args, |server, round| {
                let calls = if server.contains("config") { 0.01 } else { 2.0 };
                Round { system_calls_per_request: Some(calls), ..round }
            });
            let calls = claims.iter().filter(|one| one.figure == Figure::SystemCallsPerRequest);
            calls.map(|claim| (claim.article, claim.seen)).collect::<Vec<_>>()
        };
        let fewer = ("< 1, down to 0.07", Some(true));
        assert_eq!(calls(&[]), [fewer, fewer]);
        assert_eq!(calls(&["--poll", "never"]), [fewer, fewer]);
        assert_eq!(calls(&["--poll", "always"]), [("0", Some(false)), fewer]);
    }

    #[test]
    fn what_was_not_measured_is_neither_seen_nor_missed() {
        let claims =
            judged(3, &["--connections", "10"], |_, round| Round { p9999_us: None, ..round });
        assert_eq!(claims.len(), 8);
        for claim in claims {
            let measured = !matches!(claim.figure, Figure::P9999 | Figure::SystemCallsPerRequest);
            assert_eq!(claim.seen.is_some(), measured, "{claim:?}");
        }
    }

    /// The claims of an experiment of which every server has one round.
    fn judged(
        experiment: u32,
        args: &[&str],
        measured: impl Fn(&str, Round) -> Round,
    ) -> Vec<Claim> {
        let args = [&["ringpoll-bench", "article"][..], args].concat();
        let Command::Article(args) = Cli::try_parse_from(args).unwrap().command else {
            unreachable!("it was asked for the article")
        };
        let mut all = experiments::plan(&args);
        let cells = &mut all[experiment as usize - 1].cells;
        for row in cells.iter_mut().flat_map(|report| &mut report.rows) {
            let backend = row.server.backend().unwrap().to_string();
            row.rounds.push(measured(&backend, round(0, 100.0)));
        }
        judge(experiment, cells)
    }

    /// Connections, server, figure: what the article says, whether it is so.
    fn lines(claims: &[Claim]) -> Vec<String> {
        let line = |claim: &Claim| {
            let Claim { cell, candidate, figure, article, seen, .. } = claim;
            let connections = cell.split([',', '×']).nth(1).unwrap().trim();
            let server = candidate.split(' ').nth(1).unwrap();
            format!("{connections}, {server}, {figure}: {article}, {seen:?}")
        };
        claims.iter().map(line).collect()
    }
}
