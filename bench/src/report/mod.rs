//! A comparison for people (tables on the terminal, one HTML page) and for programs (JSON).

mod page;
mod plot;
mod table;
mod text;

use std::fs;
use std::path::{Path, PathBuf};

pub(crate) use self::table::print;
use crate::compare::model::Report;
use crate::error::{Failure, Result};

/// Writes `compare.json` and `compare.html` into a directory; returns their paths.
pub(crate) fn write(report: &Report, dir: &Path) -> Result<[PathBuf; 2]> {
    let json =
        serde_json::to_string_pretty(report).map_err(Failure::at("write the report as JSON"))?;
    let files = [("compare.json", json), ("compare.html", page::render(report)?)];
    fs::create_dir_all(dir).map_err(Failure::at(format!("create {}", dir.display())))?;
    let [json, html] = files.map(|(name, text)| {
        let path = dir.join(name);
        let written = fs::write(&path, text);
        written.map_err(Failure::at(format!("write {}", path.display()))).map(|()| path)
    });
    Ok([json?, html?])
}
