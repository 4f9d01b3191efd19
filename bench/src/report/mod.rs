//! What was measured, for people (tables on the terminal, one HTML page) and for programs (JSON).

mod article;
mod markdown;
mod page;
mod plot;
mod table;
mod text;

use std::fs;
use std::path::{Path, PathBuf};

use serde::Serialize;

pub(crate) use self::article::print as print_article;
pub(crate) use self::table::print;
use crate::article::Report as Article;
use crate::compare::model::Report;
use crate::error::{Failure, Result};

/// Writes `compare.json`, `compare.html` and `compare.md` into a directory; returns their paths.
pub(crate) fn write(report: &Report, dir: &Path) -> Result<Vec<PathBuf>> {
    let [json, html] = write_as("compare", report, page::render(report)?, dir)?;
    let path = dir.join("compare.md");
    fs::write(&path, markdown::render(report))
        .map_err(Failure::at(format!("write {}", path.display())))?;
    Ok(vec![json, html, path])
}

/// Writes `article.json` and `article.html` into a directory; returns their paths.
pub(crate) fn write_article(report: &Article, dir: &Path) -> Result<[PathBuf; 2]> {
    write_as("article", report, article::render(report)?, dir)
}

fn write_as(name: &str, report: &impl Serialize, html: String, dir: &Path) -> Result<[PathBuf; 2]> {
    let json =
        serde_json::to_string_pretty(report).map_err(Failure::at("write the report as JSON"))?;
    fs::create_dir_all(dir).map_err(Failure::at(format!("create {}", dir.display())))?;
    let [json, html] = [("json", json), ("html", html)].map(|(extension, text)| {
        let path = dir.join(name).with_extension(extension);
        let written = fs::write(&path, text);
        written.map_err(Failure::at(format!("write {}", path.display()))).map(|()| path)
    });
    Ok([json?, html?])
}
