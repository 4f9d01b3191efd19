//! What a comparison comes to, a row for each kind of traffic: the best of ours beside the best
//! other library.

use std::cmp::Ordering;

use crate::compare::caller::Caller;
use crate::compare::candidate::Candidate;
use crate::compare::model::{CellReport, Figure, Row};
use crate::compare::plan::Question;
use crate::compare::ranking::Against;
use crate::peers::Peer;

use super::text;

pub(super) const HEAD: [&str; 6] =
    ["traffic", "compared by", "best of ringpoll", "best other", "ratio", "ringpoll is"];

/// How [`rows`] judges, for the reader.
pub(super) const RULE: &str = "\
    “100 × 1” is traffic on 100 connections with one request in flight on each. Under each kind of \
    traffic the best server of ringpoll stands beside the best of the other libraries, by the \
    median of their rounds. The ratio is taken round by round, of rounds that ran within seconds \
    of each other, and shown as median (least–greatest). One server is better than another one \
    where their intervals do not overlap: the least and the greatest of its rounds, each over the \
    median server of that round. Where the host was too noisy, or there are fewer than three \
    rounds, nobody is ranked.";

/// Without the kinds of traffic under which there are not two to compare.
pub(super) fn rows<'a>(cells: impl IntoIterator<Item = &'a CellReport>) -> Vec<Vec<String>> {
    cells.into_iter().filter_map(row).collect()
}

fn row(report: &CellReport) -> Option<Vec<String>> {
    let figure = match report.cell.question {
        Question::FewHeavy => Figure::CheapP99,
        _ => Figure::RequestsPerCpuSecond,
    };
    let ours = best(report, figure, |row| is_on_ringpoll(&row.server))?;
    let other = best(report, figure, |row| is_library(&row.server))?;
    let ratio = ours.over(other, figure)?;
    let named = |row: &Row| {
        let median = row.spread(figure)?.median;
        // The column says whose it is.
        let name = row.candidate.strip_prefix("ringpoll ").unwrap_or(&row.candidate);
        Some(format!("{name}: {}", text::short(median)))
    };
    let ranking = report.rankings.iter().find(|ranking| ranking.figure == figure)?;
    let verdict = match ranking.against(&ours.candidate, &other.candidate) {
        Some(Against::Faster) => "better",
        Some(Against::Slower) => "worse",
        Some(Against::NotTold) => "not distinguishable",
        None => "not ranked: too noisy",
    };
    Some(vec![
        report.cell.name.clone(),
        match figure {
            Figure::RequestsPerCpuSecond => "requests/CPU-s".to_owned(),
            other => format!("{other}, µs"),
        },
        named(ours)?,
        named(other)?,
        text::ratio(Some(ratio)),
        verdict.to_owned(),
    ])
}

fn best(report: &CellReport, figure: Figure, is_one: impl Fn(&Row) -> bool) -> Option<&Row> {
    let median = |row: &&Row| row.spread(figure).map(|spread| spread.median);
    let rows = report.rows.iter().filter(|row| is_one(row) && median(row).is_some());
    rows.max_by(|a, b| {
        let order = median(a).partial_cmp(&median(b)).unwrap_or(Ordering::Equal);
        if less_is_better(figure) { order.reverse() } else { order }
    })
}

fn is_on_ringpoll(server: &Candidate) -> bool {
    match server {
        Candidate::Example(example) => example.backend.is_some(),
        Candidate::Caller(caller) => caller.backend().is_some(),
        other => other.is_ours(),
    }
}

/// The bare ones are no choice a user has.
fn is_library(server: &Candidate) -> bool {
    let bare = [Peer::BareEpoll, Peer::BareRing, Peer::BareRing64k];
    match server {
        Candidate::Peer(peer) => !bare.contains(peer),
        Candidate::Example(example) => example.backend.is_none(),
        // The server of another one differs, so their calls cost the clients other things.
        Candidate::Caller(caller) => *caller == Caller::Tokio,
        _ => false,
    }
}

fn less_is_better(figure: Figure) -> bool {
    !figure.more_is_better()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compare::model::Round;
    use crate::compare::model::tests::{round, row as model_row};
    use crate::compare::plan::Cell;
    use crate::compare::ranking::Ranking;

    #[test]
    fn the_best_of_ours_stands_beside_the_best_library() {
        let rounds = |rates: [f64; 3]| (0..).zip(rates).map(|(index, rate)| round(index, rate));
        let ours = |name, rates| model_row(name, rounds(rates).collect());
        let peer = |name: &str, rates| {
            let server = Candidate::Peer(name.parse().unwrap());
            Row { server, ..model_row(name, rounds(rates).collect()) }
        };
        let rows_of = |best: [f64; 3]| {
            let rows = vec![
                ours("slow", [50.0, 50.0, 50.0]),
                ours("quick", best),
                peer("tokio", [100.0, 100.0, 110.0]),
                peer("tokio-framed", [10.0, 10.0, 10.0]),
                peer("bare-epoll", [900.0, 900.0, 900.0]),
            ];
            rows_for(rows)
        };
        let better = rows_of([120.0, 130.0, 140.0]);
        assert_eq!(better[0][2..4], ["quick: 130", "tokio: 100"]);
        assert_eq!(better[0][5], "better");
        assert_eq!(rows_of([120.0, 90.0, 140.0])[0][5], "not distinguishable");
        assert_eq!(rows_of([90.0, 90.0, 90.0])[0][5], "worse");
        assert!(rows_for(vec![ours("alone", [1.0, 1.0, 1.0])]).is_empty());
    }

    #[test]
    fn less_latency_is_better() {
        let cheap = |us| {
            (0..3).map(move |index| Round { clean_cheap_p99_us: Some(us), ..round(index, 1.0) })
        };
        let cell = Cell { question: Question::FewHeavy, ..Cell::new(1, 1, 0, 1) };
        let rows = vec![model_row("a", cheap(9.0).collect()), model_row("b", cheap(7.0).collect())];
        let least = best(&CellReport::new(cell, rows), Figure::CheapP99, |_| true)
            .map(|row| row.candidate.clone());
        assert_eq!(least.as_deref(), Some("b"));
    }

    fn rows_for(rows: Vec<Row>) -> Vec<Vec<String>> {
        let mut report = CellReport::new(Cell::new(1, 1, 0, 1), rows);
        report.rankings.extend(Ranking::of(&report, Figure::RequestsPerCpuSecond));
        super::rows([&report])
    }
}
