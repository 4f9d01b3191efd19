//! Bars that lie under each other, each with its name and figure above it.

use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::{Area, Drawn, FONT, INK, WIDTH, draw, series};
use crate::compare::model::Spread;

pub(in crate::report) struct Bar<'a> {
    pub(in crate::report) series: usize,
    pub(in crate::report) name: &'a str,
    /// As long as the median, with a line from the least to the greatest round.
    pub(in crate::report) value: Spread,
}

pub(in crate::report) fn bars(
    title: &str,
    bars: &[Bar<'_>],
    show: impl Fn(f64) -> String,
) -> String {
    let max = bars.iter().map(|bar| bar.value.max).fold(f64::MIN_POSITIVE, f64::max);
    let height = TOP + LINE * bars.len() as i32;
    let figures = bars.iter().map(|bar| format!("{}: {}", bar.name, show(bar.value.median)));
    let description = figures.collect::<Vec<_>>().join("; ");
    draw((WIDTH, height as u32), title, &description, |area| {
        for (line, bar) in bars.iter().enumerate() {
            let top = TOP + LINE * line as i32;
            let at = |value: f64| (value / max * f64::from(BAR_WIDTH)) as i32;
            let Spread { median, min, max } = bar.value;
            label(area, top, &shortened(bar.name), &show(median))?;
            let corners = [(0, top + 18), (at(median).max(1), top + 30)];
            area.draw(&Rectangle::new(corners, series(bar.series).filled()))?;
            whisker(area, (at(min), at(max)), top + 24)?;
        }
        Ok(())
    })
}

fn label(area: &Area<'_>, y: i32, name: &str, figure: &str) -> Drawn {
    let style = ("sans-serif", FONT).into_font().color(&INK);
    area.draw(&Text::new(name.to_owned(), (0, y), style.clone()))?;
    let right = style.pos(Pos::new(HPos::Right, VPos::Top));
    area.draw(&Text::new(figure.to_owned(), (WIDTH as i32 - 2, y), right))?;
    Ok(())
}

fn whisker(area: &Area<'_>, (from, to): (i32, i32), y: i32) -> Drawn {
    if from == to {
        return Ok(());
    }
    let ends = [from, to].map(|x| [(x, y - 4), (x, y + 4)]);
    for line in [[(from, y), (to, y)], ends[0], ends[1]] {
        area.draw(&PathElement::new(line, INK.stroke_width(1)))?;
    }
    Ok(())
}

/// What fits beside a figure; the table has the whole name.
fn shortened(name: &str) -> String {
    if name.chars().count() <= NAME_CHARS_MAX {
        return name.to_owned();
    }
    name.chars().take(NAME_CHARS_MAX - 1).chain(['…']).collect()
}

const BAR_WIDTH: i32 = WIDTH as i32 - 6;
const TOP: i32 = 4;
const LINE: i32 = 40;
const NAME_CHARS_MAX: usize = 38;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_drawing_says_in_words_what_it_shows() {
        let bar = |name| Bar { series: 7, name, value: Spread { median: 5.0, min: 4.0, max: 6.0 } };
        let svg = bars("what <it> is", &[bar("a & b")], |value| format!("{value}"));
        assert!(svg.contains("role=\"img\"") && svg.contains("viewBox"), "{svg}");
        assert!(svg.contains("<title>what &#60;it&#62; is</title>"), "{svg}");
        assert!(svg.contains("<desc>a &#38; b: 5</desc>"), "{svg}");
        assert!(svg.contains("#030700"), "the colour of the seventh: {svg}");
    }

    #[test]
    fn a_name_too_long_for_its_line_is_shortened() {
        assert_eq!(shortened("tokio"), "tokio");
        let long = shortened(&"µ".repeat(50));
        assert_eq!(long.chars().count(), NAME_CHARS_MAX);
        assert!(long.ends_with('…'));
    }
}
