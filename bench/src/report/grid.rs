//! A table of a page.

use askama::Template;

/// The first column names the rows.
#[derive(Template)]
#[template(path = "table.html")]
pub(super) struct Grid {
    /// Of the style sheet; empty: figures.
    pub(super) kind: &'static str,
    pub(super) caption: String,
    pub(super) head: Vec<String>,
    pub(super) rows: Vec<Vec<String>>,
}

impl Grid {
    pub(super) fn figures<S: ToString>(
        caption: impl Into<String>,
        head: &[S],
        rows: Vec<Vec<String>>,
    ) -> Grid {
        let head = head.iter().map(S::to_string).collect();
        Grid { kind: "figures", caption: caption.into(), head, rows }
    }

    /// With columns of sentences.
    pub(super) fn words<S: ToString>(
        caption: impl Into<String>,
        head: &[S],
        rows: Vec<Vec<String>>,
    ) -> Grid {
        Grid { kind: "words", ..Grid::figures(caption, head, rows) }
    }

    /// Names and what is said of them.
    pub(super) fn facts(caption: impl Into<String>, facts: Vec<(&'static str, String)>) -> Grid {
        let rows = facts.into_iter().map(|(name, value)| vec![name.to_owned(), value]).collect();
        Grid { kind: "words facts", caption: caption.into(), head: Vec::new(), rows }
    }

    /// Of a column.
    fn name(&self, index: &usize) -> &str {
        self.head.get(*index).map_or("", String::as_str)
    }

    /// Of a verdict, what the style sheet calls it.
    fn class(column: &str) -> &'static str {
        match column {
            "met" | "better" | "seen" => "good",
            "missed" | "worse" | "not seen" => "bad",
            seen if seen.ends_with(": seen") => "good",
            missed if missed.ends_with(": not seen") => "bad",
            _ => "",
        }
    }
}
