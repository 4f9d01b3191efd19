//! Lines over an axis, one per candidate.

use plotters::coord::ranged1d::{KeyPointHint, NoDefaultFormatting, ValueFormatter};
use plotters::prelude::*;

use super::{Drawn, FAINT, INK, SMALL_FONT, WIDTH, draw, marker, series};

pub(in crate::report) struct Line<'a> {
    pub(in crate::report) series: usize,
    pub(in crate::report) name: &'a str,
    pub(in crate::report) points: Vec<(f64, f64)>,
}

pub(in crate::report) struct Chart {
    pub(in crate::report) title: String,
    pub(in crate::report) x: Scale,
    pub(in crate::report) y: Scale,
    /// What the axis across is.
    pub(in crate::report) x_name: &'static str,
    /// Whether only points at the named places across have a marker, and not all.
    pub(in crate::report) marks_names_only: bool,
}

/// Where values lie on an axis, and which of them are named.
#[derive(Clone)]
pub(in crate::report) struct Scale {
    to_axis: fn(f64) -> f64,
    from: f64,
    to: f64,
    /// Values on the axis.
    ticks: Vec<(f64, String)>,
}

impl Scale {
    /// From zero up, with round numbers named.
    pub(in crate::report) fn linear(max: f64, show: impl Fn(f64) -> String) -> Scale {
        let top = if max > 0.0 { max * 1.08 } else { 1.0 };
        let step = round_step(top / TICKS_MAX as f64);
        let ticks = (0..=TICKS_MAX).map(|index| step * index as f64).filter(|tick| *tick <= top);
        let ticks = ticks.map(|tick| (tick, show(tick))).collect();
        Scale { to_axis: |value| value, from: 0.0, to: top, ticks }
    }

    /// Between two values, with those of one digit named.
    pub(in crate::report) fn logarithmic(
        (min, max): (f64, f64),
        show: impl Fn(f64) -> String,
    ) -> Scale {
        let min = min.max(LOG_MIN);
        let max = max.max(min);
        let (from, to) = ((min * 0.85).log10(), (max * 1.18).log10());
        let decades = from.floor() as i32..=to.ceil() as i32;
        let of = |digits: &'static [f64]| {
            let values = decades.clone().flat_map(move |decade| {
                digits.iter().map(move |digit| digit * 10_f64.powi(decade))
            });
            values.filter(|value| (from..=to).contains(&value.log10())).collect::<Vec<_>>()
        };
        let all = [&[1.0, 2.0, 3.0, 5.0, 7.0][..], &[1.0, 2.0, 5.0], &[1.0, 3.0], &[1.0]].map(of);
        let fitting = all.iter().find(|values| values.len() <= TICKS_MAX).or(all.last());
        let ticks = fitting.into_iter().flatten();
        let ticks = ticks.map(|value| (value.log10(), show(*value))).collect();
        Scale { to_axis, from, to, ticks }
    }

    /// The values that were measured, by their logarithm; those too close to the one before go
    /// without a name.
    pub(in crate::report) fn measured(values: &[f64], show: impl Fn(f64) -> String) -> Scale {
        let positive = values.iter().copied().filter(|value| *value > 0.0);
        let (min, max) = positive.fold((f64::MAX, LOG_MIN), |(min, max): (f64, f64), value| {
            (min.min(value), max.max(value))
        });
        let (from, to) = (min.min(max).log10(), max.log10());
        let margin = ((to - from) * 0.04).max(0.01);
        let apart = (to - from) * NAMES_APART;
        let mut ticks: Vec<(f64, String)> = Vec::new();
        for value in values {
            let at = value.log10();
            if ticks.last().is_none_or(|(before, _)| at - before >= apart) {
                ticks.push((at, show(*value)));
            }
        }
        Scale { to_axis, from: from - margin, to: to + margin, ticks }
    }

    /// Percentiles, each nine as far from the one before: P90, P99, P99.9.
    pub(in crate::report) fn nines(min_percent: f64, max_percent: f64) -> Scale {
        let (from, to) = (nines(min_percent), nines(max_percent));
        let named = [(50.0, "P50"), (90.0, "P90"), (99.0, "P99"), (99.9, "P99.9")];
        let named = named.into_iter().chain([(99.99, "P99.99")]);
        let ticks = named.filter(|(percent, _)| *percent <= max_percent + PERCENT_ERROR);
        let ticks = ticks.map(|(percent, name)| (nines(percent), name.to_owned())).collect();
        let margin = (to - from) * 0.03;
        Scale { to_axis: nines, from: from - margin, to: to + margin, ticks }
    }

    fn is_named(&self, at: f64) -> bool {
        self.ticks.iter().any(|tick| tick.0 == at)
    }

    fn place(&self, value: f64) -> f64 {
        (self.to_axis)(value)
    }
}

/// Of places on the axis: `to_axis` is applied before.
impl Ranged for Scale {
    type FormatOption = NoDefaultFormatting;
    type ValueType = f64;

    fn map(&self, at: &f64, limit: (i32, i32)) -> i32 {
        // Zero on a logarithmic axis lies at its end.
        let share = ((at - self.from) / (self.to - self.from)).clamp(0.0, 1.0);
        limit.0 + (share * f64::from(limit.1 - limit.0)).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, _hint: Hint) -> Vec<f64> {
        self.ticks.iter().map(|(at, _)| *at).collect()
    }

    fn range(&self) -> std::ops::Range<f64> {
        self.from..self.to
    }
}

impl ValueFormatter<f64> for Scale {
    fn format(at: &f64) -> String {
        at.to_string()
    }

    fn format_ext(&self, at: &f64) -> String {
        self.ticks.iter().find(|tick| tick.0 == *at).map(|tick| tick.1.clone()).unwrap_or_default()
    }
}

pub(in crate::report) fn lines(chart: &Chart, lines: &[Line<'_>]) -> String {
    let names: Vec<_> = lines.iter().map(|line| line.name).collect();
    let description = format!("Over {}, a line for each of: {}", chart.x_name, names.join(", "));
    draw((WIDTH, HEIGHT), &chart.title, &description, |area| -> Drawn {
        let Chart { x, y, x_name, marks_names_only, .. } = chart;
        let mut drawn = ChartBuilder::on(area)
            .margin_top(10)
            .margin_left(2)
            // Half of the last name stands beyond the axis.
            .margin_right(24)
            .x_label_area_size(38)
            .y_label_area_size(52)
            .build_cartesian_2d(x.clone(), y.clone())?;
        drawn
            .configure_mesh()
            .bold_line_style(FAINT)
            .light_line_style(TRANSPARENT)
            .axis_style(INK)
            .label_style(("sans-serif", SMALL_FONT).into_font().color(&INK))
            .x_desc(*x_name)
            .draw()?;
        for line in lines {
            let points: Vec<_> =
                line.points.iter().map(|(at, up)| (x.place(*at), y.place(*up))).collect();
            let style = series(line.series).stroke_width(2);
            drawn.draw_series(LineSeries::new(points.iter().copied(), style))?;
            for (corners, color) in marker(line.series) {
                let mark =
                    |at| EmptyElement::at(at) + Polygon::new(corners.clone(), color.filled());
                let is_marked = |point: &(f64, f64)| !marks_names_only || x.is_named(point.0);
                drawn.draw_series(points.iter().copied().filter(is_marked).map(mark))?;
            }
        }
        Ok(())
    })
}

fn to_axis(value: f64) -> f64 {
    value.max(LOG_MIN).log10()
}

fn nines(percent: f64) -> f64 {
    -(1.0 - percent.min(PERCENT_MAX) / 100.0).log10()
}

/// 1, 2 or 5 of some power of ten, and at least as much.
fn round_step(least: f64) -> f64 {
    let unit = 10_f64.powf(least.log10().floor());
    let digit = [1.0, 2.0, 5.0].into_iter().find(|digit| digit * unit >= least);
    digit.unwrap_or(10.0) * unit
}

const HEIGHT: u32 = 270;
const TICKS_MAX: usize = 6;
/// Of the axis, what a name takes.
const NAMES_APART: f64 = 0.14;
/// Zero has no logarithm.
const LOG_MIN: f64 = 1e-6;
const PERCENT_MAX: f64 = 99.999;
const PERCENT_ERROR: f64 = 1e-9;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_nine_is_as_far_from_the_one_before() {
        let scale = Scale::nines(25.0, 99.99);
        let names: Vec<_> = scale.ticks.iter().map(|(_, name)| name.as_str()).collect();
        assert_eq!(names, ["P50", "P90", "P99", "P99.9", "P99.99"]);
        let at: Vec<_> = scale.ticks.iter().map(|(at, _)| *at).collect();
        assert!((at[2] - at[1] - 1.0).abs() < 1e-9 && (at[4] - at[3] - 1.0).abs() < 1e-9, "{at:?}");
        assert_eq!(Scale::nines(25.0, 99.0).ticks.len(), 3);
    }

    #[test]
    fn round_numbers_are_named_and_not_too_many() {
        let names = |scale: &Scale| -> Vec<String> {
            scale.ticks.iter().map(|(_, name)| name.clone()).collect()
        };
        let show = |value: f64| format!("{value:.0}");
        assert_eq!(names(&Scale::linear(950.0, show)), ["0", "200", "400", "600", "800", "1000"]);
        assert_eq!(names(&Scale::linear(0.0, |value| format!("{value:.1}")))[..2], ["0.0", "0.2"]);
        assert_eq!(names(&Scale::logarithmic((30.0, 500.0), show)), ["50", "100", "200", "500"]);
        assert_eq!(names(&Scale::logarithmic((40.0, 90.0), show)), ["50", "70", "100"]);
        let wide = names(&Scale::logarithmic((1.0, 1e6), show));
        assert!(wide.len() <= 7, "{wide:?}");
    }

    #[test]
    fn measured_values_are_named_where_there_is_room() {
        let scale = Scale::measured(&[1.0, 10.0, 11.0, 100.0, 1000.0], |value| format!("{value}"));
        let names: Vec<_> = scale.ticks.iter().map(|(_, name)| name.as_str()).collect();
        assert_eq!(names, ["1", "10", "100", "1000"]);
    }

    #[test]
    fn a_value_of_zero_is_drawn_at_the_bottom_of_a_logarithmic_axis() {
        let chart = Chart {
            title: "t".into(),
            x: Scale::measured(&[5.0], |value| format!("{value}")),
            y: Scale::logarithmic((0.0, 0.0), |value| format!("{value}")),
            x_name: "x",
            marks_names_only: false,
        };
        let svg = lines(&chart, &[Line { series: 0, name: "a", points: vec![(5.0, 0.0)] }]);
        assert!(svg.contains("<polygon") && !svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        let scale = Scale::logarithmic((0.5, 50.0), |value| format!("{value}"));
        assert_eq!(scale.map(&scale.place(0.0), (200, 10)), 200);
    }
}
