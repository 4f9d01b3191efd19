//! What was measured, for people (tables on the terminal, one HTML page) and for programs (JSON).

mod article;
mod files;
mod glance;
mod grid;
mod host;
mod legend;
mod markdown;
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

/// Writes `compare.json`, `compare.html` and `compare.md` into a directory; returns their paths.
pub(crate) fn write(report: &Report, dir: &Path) -> Result<Vec<PathBuf>> {
    let page = ("html", page::render(report)?);
    write_as("compare", report, vec![page, ("md", markdown::render(report))], dir)
}

/// Writes `article.json` and `article.html` into a directory; returns their paths.
pub(crate) fn write_article(report: &Article, dir: &Path) -> Result<Vec<PathBuf>> {
    write_as("article", report, vec![("html", article::render(report)?)], dir)
}

fn write_as(
    name: &str,
    report: &impl Serialize,
    mut files: Vec<(&'static str, String)>,
    dir: &Path,
) -> Result<Vec<PathBuf>> {
    let json =
        serde_json::to_string_pretty(report).map_err(Failure::at("write the report as JSON"))?;
    files.insert(0, ("json", json));
    files::write_all(dir, name, files)
}

/// Who wrote a file, in the file.
pub(crate) const PROGRAM: &str = "ringpoll-bench";
