//! What was measured, for people (tables on the terminal, one HTML page) and for programs (JSON).

mod article;
mod files;
mod glance;
mod grid;
mod host;
mod legend;
mod page;
mod plot;
mod sweep;
mod table;
mod text;

use std::path::{Path, PathBuf};

use serde::Serialize;

pub(crate) use self::article::print as print_article;
pub(crate) use self::files::refuse_foreign;
pub(crate) use self::table::print;
use crate::article::Report as Article;
use crate::compare::model::Report;
use crate::error::{Failure, Result};

/// Writes `compare.json` and `compare.html` into a directory; returns their paths.
pub(crate) fn write(report: &Report, dir: &Path) -> Result<[PathBuf; 2]> {
    write_as("compare", report, page::render(report)?, dir)
}

/// Writes `article.json` and `article.html` into a directory; returns their paths.
pub(crate) fn write_article(report: &Article, dir: &Path) -> Result<[PathBuf; 2]> {
    write_as("article", report, article::render(report)?, dir)
}

fn write_as(name: &str, report: &impl Serialize, html: String, dir: &Path) -> Result<[PathBuf; 2]> {
    let json =
        serde_json::to_string_pretty(report).map_err(Failure::at("write the report as JSON"))?;
    files::write_all(dir, name, [("json", json), ("html", html)])
}

/// Who wrote a file, in the file.
pub(crate) const PROGRAM: &str = "ringpoll-bench";
