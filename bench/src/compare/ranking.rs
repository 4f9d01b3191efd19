//! Who is faster, and when nobody can say.
//!
//! The rule: a candidate is faster than another one where their intervals do not overlap. The
//! interval of a candidate is the least and the greatest of its rounds, each divided by the median
//! of all candidates in that round, so that what slows the host for a while slows nobody in
//! particular. A place is one more than the number of candidates that are faster. Where the host
//! was too noisy, or the rounds are too few, there are no places.

use serde::Serialize;

use crate::compare::model::{CellReport, Figure, Row, Spread};

/// All candidates under one kind of traffic, by one figure.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Ranking {
    pub(crate) figure: Figure,
    /// Why nobody has a place, where that is so.
    pub(crate) refused: Option<String>,
    /// The best first.
    pub(crate) places: Vec<Place>,
}

#[derive(Clone, Debug, Serialize)]
pub(crate) struct Place {
    pub(crate) candidate: String,
    /// Those of the same place, or with intervals that overlap, cannot be told apart.
    pub(crate) place: Option<usize>,
    /// Over the median candidate of each round.
    pub(crate) relative: Spread,
}

/// What two candidates are to each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Against {
    Faster,
    Slower,
    /// Their intervals overlap.
    NotTold,
}

impl Ranking {
    /// `None` where fewer than two candidates have the figure, or it is the same for all.
    pub(crate) fn of(report: &CellReport, figure: Figure) -> Option<Ranking> {
        if figure == Figure::RequestsPerSecond && report.cell.rate.is_some() {
            return None;
        }
        let medians = round_medians(&report.rows, figure);
        let relative = |row: &Row| {
            let rounds = row.rounds.iter().filter_map(|round| {
                let (_, median) = medians.iter().find(|(index, _)| *index == round.index)?;
                Some(figure.of(round)? / median).filter(|value| value.is_finite())
            });
            let rounds: Vec<_> = rounds.collect();
            let spread = Spread::of(rounds.iter().copied())?;
            Some((row.candidate.clone(), rounds.len(), spread))
        };
        let mut all: Vec<_> = report.rows.iter().filter_map(relative).collect();
        if all.len() < 2 {
            return None;
        }
        let refused = too_few(&all).or_else(|| too_noisy(report)).or_else(|| too_wide(&all));
        all.sort_by(|(_, _, a), (_, _, b)| {
            let order = a.median.total_cmp(&b.median);
            if figure.more_is_better() { order.reverse() } else { order }
        });
        let place = |(candidate, _, relative): &(String, usize, Spread)| {
            let better = all.iter().filter(|(_, _, other)| is_faster(figure, *other, *relative));
            let place = refused.is_none().then(|| better.count() + 1);
            Place { candidate: candidate.clone(), place, relative: *relative }
        };
        let places = all.iter().map(place).collect();
        Some(Ranking { figure, refused, places })
    }

    /// `None` where one of the two has no place.
    pub(crate) fn against(&self, candidate: &str, other: &str) -> Option<Against> {
        let placed = |one: &&Place| one.place.is_some();
        let of = |name: &str| self.places.iter().filter(placed).find(|one| one.candidate == name);
        let (ours, theirs) = (of(candidate)?.relative, of(other)?.relative);
        Some(if is_faster(self.figure, ours, theirs) {
            Against::Faster
        } else if is_faster(self.figure, theirs, ours) {
            Against::Slower
        } else {
            Against::NotTold
        })
    }
}

/// What the rankings of many kinds of traffic say together: a sentence for each of `pairs`, a
/// candidate and another one, that can be told apart.
pub(crate) fn findings(cells: &[CellReport], pairs: &[(String, String)]) -> Vec<String> {
    let mut findings = Vec::new();
    for (candidate, other) in pairs {
        let told = TOLD.iter().filter_map(|figure| told(cells, candidate, other, *figure));
        let told: Vec<_> = told.collect();
        if !told.is_empty() {
            findings.push(format!("{candidate} against {other}: {}.", told.join("; ")));
        }
    }
    findings
}

/// Where there are no places: a sentence for each reason.
pub(crate) fn refusals(cells: &[CellReport]) -> Vec<String> {
    let refused = cells.iter().flat_map(|report| {
        let refused = report.rankings.iter().filter_map(|ranking| ranking.refused.as_ref());
        refused.map(|why| (why, report.cell.name.as_str()))
    });
    let mut groups: Vec<(&String, Vec<&str>)> = Vec::new();
    for (why, name) in refused {
        match groups.iter_mut().find(|(known, _)| *known == why) {
            Some((_, names)) if names.contains(&name) => {}
            Some((_, names)) => names.push(name),
            None => groups.push((why, vec![name])),
        }
    }
    let line =
        |(why, names): (&String, Vec<&str>)| format!("No places: {why} ({}).", names.join("; "));
    groups.into_iter().map(line).collect()
}

/// In which kinds of traffic a candidate is better or worse than another one; `None` where they are
/// not compared.
fn told(cells: &[CellReport], candidate: &str, other: &str, figure: Figure) -> Option<String> {
    let told = cells.iter().filter_map(|report| {
        let ranking = report.rankings.iter().find(|one| one.figure == figure)?;
        Some((report.cell.name.as_str(), ranking.against(candidate, other)?))
    });
    let told: Vec<_> = told.collect();
    let of = |wanted| -> Vec<_> {
        told.iter().filter(|(_, against)| *against == wanted).map(|(name, _)| *name).collect()
    };
    let (better, worse) = (of(Against::Faster), of(Against::Slower));
    let named = |names: &[&str]| {
        let names: Vec<_> = names.iter().map(|name| format!("\u{201c}{name}\u{201d}")).collect();
        names.join(", ")
    };
    let count = told.len();
    let what = match (&better[..], &worse[..]) {
        ([], []) => return None,
        (better, []) => format!("better in {} (of {count} rows)", named(better)),
        ([], worse) => format!("worse in {} (of {count} rows)", named(worse)),
        (better, worse) => {
            let (better, worse) = (named(better), named(worse));
            format!("better in {better}, worse in {worse} (of {count} rows)")
        }
    };
    Some(format!("{figure} {what}"))
}

/// The median of all candidates, of each round that all of them have.
fn round_medians(rows: &[Row], figure: Figure) -> Vec<(u32, f64)> {
    let has_any = |row: &&Row| row.rounds.iter().any(|round| figure.of(round).is_some());
    let rows: Vec<_> = rows.iter().filter(has_any).collect();
    let Some(first) = rows.first() else { return Vec::new() };
    let median = |index: u32| {
        let of = |row: &&Row| {
            let round = row.rounds.iter().find(|round| round.index == index)?;
            figure.of(round)
        };
        let values: Vec<f64> = rows.iter().filter_map(of).collect();
        if values.len() < rows.len() {
            return None;
        }
        Spread::of(values).map(|spread| (index, spread.median))
    };
    first.rounds.iter().filter_map(|round| median(round.index)).collect()
}

fn is_faster(figure: Figure, one: Spread, other: Spread) -> bool {
    if figure.more_is_better() { one.min > other.max } else { one.max < other.min }
}

fn too_few(all: &[(String, usize, Spread)]) -> Option<String> {
    let least = all.iter().map(|(_, count, _)| *count).min()?;
    (least < ROUNDS_MIN).then(|| format!("{ROUNDS_MIN} common rounds are the least"))
}

/// Of the host, whatever the figure.
fn too_noisy(report: &CellReport) -> Option<String> {
    let summaries = || report.rows.iter().filter_map(|row| row.summary.as_ref());
    let windows: u64 = summaries().map(|summary| summary.windows).sum();
    let left_out: u64 = summaries().map(|summary| summary.windows_left_out).sum();
    if windows > 0 && left_out as f64 > windows as f64 * STOLEN_MAX {
        return Some(format!(
            "the host took CPUs away in more than {:.0} % of the windows",
            STOLEN_MAX * 100.0
        ));
    }
    let others = summaries().filter_map(|summary| summary.others_percent);
    let typical = Spread::of(others.map(|percent| percent.median))?.median;
    (typical > OTHERS_PERCENT_MAX).then(|| {
        format!("other processes took more than {OTHERS_PERCENT_MAX} % of the CPUs in use")
    })
}

/// Rounds of one candidate that differ as much as two candidates seldom do.
fn too_wide(all: &[(String, usize, Spread)]) -> Option<String> {
    let widths = all.iter().map(|(_, _, spread)| (spread.max - spread.min) / spread.median);
    let typical = Spread::of(widths)?.median;
    (typical > WIDTH_MAX)
        .then(|| format!("the rounds of one server differ by more than {:.0} %", WIDTH_MAX * 100.0))
}

/// What is told in words.
const TOLD: [Figure; 2] = [Figure::RequestsPerCpuSecond, Figure::CleanP99];
/// What candidates are ranked by.
pub(crate) const FIGURES: [Figure; 4] =
    [Figure::RequestsPerCpuSecond, Figure::RequestsPerSecond, Figure::CleanP99, Figure::CheapP99];
/// With fewer, intervals that do not overlap happen by chance too often: of two equal candidates
/// in one of three cases with two rounds, one of ten with three, one of 126 with five.
const ROUNDS_MIN: usize = 3;
/// The share of windows with stolen time above which a comparison is one of the host's moments.
const STOLEN_MAX: f64 = 0.25;
const OTHERS_PERCENT_MAX: f64 = 10.0;
/// Of the typical candidate's interval, over its median.
const WIDTH_MAX: f64 = 0.5;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compare::model::Round;
    use crate::compare::model::tests::{round, row};
    use crate::compare::plan::Cell;

    const RATE: Figure = Figure::RequestsPerCpuSecond;

    #[test]
    fn intervals_that_do_not_overlap_make_a_place() {
        let ranking = ranked(&[
            ("a", &[10.0, 11.0, 10.5]),
            ("b", &[13.0, 14.0, 13.5]),
            ("c", &[12.0, 13.1, 12.9]),
        ]);
        let places: Vec<_> =
            ranking.places.iter().map(|one| (one.candidate.as_str(), one.place)).collect();
        assert_eq!(places, [("b", Some(1)), ("c", Some(2)), ("a", Some(3))]);
        assert_eq!(ranking.against("b", "a"), Some(Against::Faster));
        assert_eq!(ranking.against("a", "c"), Some(Against::Slower));
        assert_eq!(ranking.against("a", "nobody"), None);
    }

    #[test]
    fn what_happens_to_all_in_a_round_changes_no_place() {
        // The host was half as fast in the second round.
        let ranking = ranked(&[("a", &[100.0, 50.0, 100.0]), ("b", &[110.0, 55.0, 110.0])]);
        assert_eq!(ranking.against("b", "a"), Some(Against::Faster));
        let level = ranked(&[("a", &[100.0, 52.0, 99.0]), ("b", &[101.0, 51.0, 100.0])]);
        assert_eq!(level.against("b", "a"), Some(Against::NotTold));
        assert!(level.places.iter().all(|one| one.place == Some(1)), "{level:?}");
    }

    #[test]
    fn less_is_better_of_a_latency() {
        let of =
            |us| (0..3).map(move |index| Round { clean_p99_us: Some(us), ..round(index, 1.0) });
        let rows = vec![row("a", of(5.0).collect()), row("b", of(9.0).collect())];
        let ranking = Ranking::of(&report(rows), Figure::CleanP99).unwrap();
        assert_eq!(ranking.places[0].candidate, "a");
        assert_eq!(ranking.against("a", "b"), Some(Against::Faster));
    }

    #[test]
    fn a_noisy_host_and_few_rounds_make_no_places() {
        let refused = |rows| Ranking::of(&report(rows), RATE).unwrap().refused.unwrap_or_default();
        let rounds = |change: fn(Round) -> Round| -> Vec<Round> {
            (0..3).map(|index| change(round(index, 10.0))).collect()
        };
        let rows = |change| vec![row("a", rounds(change)), row("b", rounds(change))];
        assert_eq!(refused(rows(|round| round)), "");
        let stolen = refused(rows(|round| Round { windows_left_out: 11, ..round }));
        assert!(stolen.contains("took CPUs away"), "{stolen}");
        let others = refused(rows(|round| Round { others_percent: Some(11.0), ..round }));
        assert!(others.contains("other processes"), "{others}");
        let few = refused(vec![row("a", vec![round(0, 1.0)]), row("b", vec![round(0, 1.0)])]);
        assert!(few.contains("3 common rounds"), "{few}");
        let wide = [("a", &[10.0, 20.0, 40.0][..]), ("b", &[40.0, 20.0, 10.0])];
        assert!(ranked(&wide).refused.unwrap_or_default().contains("differ by more"));
        assert!(Ranking::of(&report(vec![row("a", rounds(|round| round))]), RATE).is_none());
    }

    #[test]
    fn findings_say_where_one_is_better_and_why_nobody_can_tell() {
        let pair = |a: f64, b: f64| {
            let rows = vec![
                row("a", (0..3).map(|index| round(index, a)).collect()),
                row("b", (0..3).map(|index| round(index, b)).collect()),
            ];
            let mut report = report(rows);
            report.rankings.extend(Ranking::of(&report, RATE));
            report
        };
        let mut noisy = pair(1.0, 1.0);
        noisy.rankings[0] =
            Ranking { figure: RATE, refused: Some("a storm".into()), places: Vec::new() };
        let cells = [pair(2.0, 1.0), pair(1.0, 1.0), noisy];
        let said = findings(&cells, &[("a".into(), "b".into())]);
        assert_eq!(said.len(), 1, "{said:?}");
        assert!(said[0].contains("better in \u{201c}1 × 1\u{201d} (of 2 rows)"), "{said:?}");
        let refused = refusals(&cells);
        assert!(refused.len() == 1 && refused[0].contains("a storm"), "{refused:?}");
    }

    fn ranked(rows: &[(&str, &[f64])]) -> Ranking {
        let rows = rows.iter().map(|(name, rates)| {
            row(name, rates.iter().zip(0..).map(|(rate, index)| round(index, *rate)).collect())
        });
        Ranking::of(&report(rows.collect()), RATE).unwrap()
    }

    fn report(rows: Vec<Row>) -> CellReport {
        CellReport::new(Cell::new(1, 1, 0, 1), rows)
    }
}
