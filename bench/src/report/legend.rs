//! Which line is whose.

use askama::Template;

use super::plot;

#[derive(Template)]
#[template(path = "legend.html")]
pub(super) struct Legend {
    /// The number that gives the colour, and the name.
    names: Vec<(usize, String)>,
}

impl Legend {
    pub(super) fn of(names: Vec<(usize, &str)>) -> Legend {
        let names = names.into_iter().map(|(index, name)| (index, name.to_owned())).collect();
        Legend { names }
    }

    fn swatch(index: &usize) -> String {
        plot::swatch(*index)
    }
}
