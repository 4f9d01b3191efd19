//! The drawings of the pages, as SVG text.
//!
//! Colours are placeholders: the pages' style sheet matches them by attribute and gives them what
//! suits light, dark or paper (`ink` and `faint` for text and lines, `series` for the candidates).
//! It dashes the lines of the second set of colours and dots those of the third. A candidate has
//! the same colour and the same marker everywhere on a page.

mod bars;
mod lines;

use askama::filters::{Escaper, Html};
use plotters::prelude::*;

pub(super) use self::bars::{Bar, bars};
pub(super) use self::lines::{Chart, Line, Scale, lines};

/// A drawing failed; the page says so instead of showing it.
type Drawn = Result<(), Box<dyn std::error::Error>>;
type Area<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;

/// The line and marker of a candidate, for a legend.
pub(super) fn swatch(index: usize) -> String {
    let mut svg = String::new();
    let (width, height) = SWATCH;
    let middle = height as i32 / 2;
    let drawn = (|| -> Drawn {
        let area = SVGBackend::with_string(&mut svg, SWATCH).into_drawing_area();
        let line = [(0, middle), (width as i32, middle)];
        area.draw(&PathElement::new(line, series(index).stroke_width(2)))?;
        for (corners, color) in marker(index) {
            let at = EmptyElement::at((width as i32 / 2, middle));
            area.draw(&(at + Polygon::new(corners, color.filled())))?;
        }
        area.present()?;
        Ok(())
    })();
    match drawn {
        // It says nothing that the name beside it does not.
        Ok(()) => svg.replacen("<svg ", "<svg aria-hidden=\"true\" class=\"swatch\" ", 1),
        Err(error) => failed(&*error),
    }
}

/// Draws shapes, with a title and a description for those who cannot see them.
fn draw(
    (width, height): (u32, u32),
    title: &str,
    description: &str,
    shapes: impl FnOnce(&Area<'_>) -> Drawn,
) -> String {
    let mut svg = String::new();
    let area = SVGBackend::with_string(&mut svg, (width, height)).into_drawing_area();
    let drawn = shapes(&area).and_then(|()| Ok(area.present()?));
    drop(area);
    if let Err(error) = drawn {
        return failed(&*error);
    }
    let Some(end) = svg.find('>') else { return svg };
    let (open, rest) = svg.split_at(end);
    let words = [("title", title), ("desc", description)]
        .map(|(tag, text)| format!("<{tag}>{}</{tag}>", escaped(text)))
        .concat();
    format!("{open} role=\"img\">{words}{}", &rest[1..])
}

/// What stands at a point of a candidate's line: corners around it, filled with a colour, the
/// second ones over the first. Hollow in the second set of colours.
fn marker(index: usize) -> Vec<(Vec<(i32, i32)>, RGBColor)> {
    let set = index % COLORS / SHAPES.len();
    let is_hollow = set == 1;
    // The same colour has another shape in each set.
    let shape = (index + [0, 3, 2][set]) % SHAPES.len();
    let corners = |radius: f64| {
        let corner =
            |(x, y): &(f64, f64)| ((x * radius).round() as i32, (y * radius).round() as i32);
        SHAPES[shape].iter().map(corner).collect()
    };
    let mut parts = vec![(corners(5.0), series(index))];
    if is_hollow {
        parts.push((corners(2.5), PANEL));
    }
    parts
}

fn escaped(text: &str) -> String {
    let mut into = String::new();
    // Because writing to a string cannot fail.
    let _ = Html.write_escaped_str(&mut into, text);
    into
}

fn failed(error: &dyn std::error::Error) -> String {
    format!("<p>not drawn: {}</p>", escaped(&error.to_string()))
}

fn series(index: usize) -> RGBColor {
    RGBColor(3, (index % COLORS) as u8, 0)
}

/// Three sets: solid, dashed and dotted. `templates/style.css` has the colours of one, `--s0` and
/// on.
pub(super) const COLORS: usize = 3 * SHAPES.len();
const INK: RGBColor = RGBColor(1, 1, 1);
const FAINT: RGBColor = RGBColor(2, 2, 2);
const PANEL: RGBColor = RGBColor(4, 4, 4);
/// What a phone shows at nearly its own size.
const WIDTH: u32 = 360;
const SWATCH: (u32, u32) = (28, 14);
/// Pixels, times the 1.24 that this library divides by on its way to SVG's font size.
const FONT: f64 = 13.0 * 1.24;
const SMALL_FONT: f64 = 12.0 * 1.24;
/// Corners around the middle, in radii.
const SHAPES: [&[(f64, f64)]; 6] = [
    // Nearly a circle.
    &[
        (1.0, 0.4),
        (0.4, 1.0),
        (-0.4, 1.0),
        (-1.0, 0.4),
        (-1.0, -0.4),
        (-0.4, -1.0),
        (0.4, -1.0),
        (1.0, -0.4),
    ],
    &[(0.9, 0.9), (-0.9, 0.9), (-0.9, -0.9), (0.9, -0.9)],
    &[(0.0, -1.2), (1.2, 1.0), (-1.2, 1.0)],
    &[(0.0, -1.3), (1.3, 0.0), (0.0, 1.3), (-1.3, 0.0)],
    &[(0.0, 1.2), (1.2, -1.0), (-1.2, -1.0)],
    &[(-1.2, -0.6), (1.2, -0.6), (1.2, 0.6), (-1.2, 0.6)],
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_candidates_have_the_same_colour_and_marker() {
        // What a reader tells apart: the colour, the shape, whether it is hollow.
        let look = |index: usize| {
            let parts = marker(index);
            (index % SHAPES.len(), parts[0].0.clone(), parts.len())
        };
        for index in 0..COLORS {
            for other in 0..index {
                assert_ne!(look(index), look(other), "{index} and {other}");
            }
        }
        assert_eq!(look(COLORS), look(0));
    }
}
