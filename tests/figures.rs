//! Figures in the documents come from published measurements: each figure with a spread stands in a
//! report under docs/reports.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};

#[test]
fn every_figure_with_a_spread_stands_in_a_report() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let reports: String = files(&root.join("docs/reports")).iter().map(|path| read(path)).collect();
    let known = spreads(&reports);
    assert!(known.len() > 100, "{} figures in all reports", known.len());
    let mut documents = vec![root.join("README.md")];
    documents.extend(
        files(&root.join("docs"))
            .into_iter()
            .filter(|path| !path.starts_with(root.join("docs/reports"))),
    );
    let mut wrong = Vec::new();
    for path in documents {
        for spread in spreads(&read(&path)) {
            if !known.contains(&spread) {
                wrong.push(format!("{}: {spread}", path.strip_prefix(root).unwrap().display()));
            }
        }
    }
    assert!(wrong.is_empty(), "in no report:\n{}", wrong.join("\n"));
}

#[test]
fn a_spread_is_a_figure_with_the_least_and_the_greatest_behind_it() {
    let found =
        spreads("| 1.05 (0.9–1.10) | not (this) nor 3 (4) but −20…; 112.3k (99k–1.2M), 2 (1-3)");
    assert_eq!(found, ["1.05 (0.9–1.10)", "112.3k (99k–1.2M)"]);
}

/// Every `median (least–greatest)`.
fn spreads(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    for (at, _) in text.match_indices(" (") {
        let before = text[..at].rsplit(|c: char| !is_of_figure(c)).next().unwrap();
        let Some((inside, _)) = text[at + 2..].split_once(')') else { continue };
        let Some((least, greatest)) = inside.split_once('–') else { continue };
        if [before, least, greatest].into_iter().all(is_figure) {
            found.push(format!("{before} ({inside})"));
        }
    }
    found
}

fn is_figure(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_digit()) && text.chars().all(is_of_figure)
}

fn is_of_figure(c: char) -> bool {
    c.is_ascii_digit() || ".kM".contains(c)
}

/// The Markdown files in a directory and those below it.
fn files(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files(&path));
        } else if path.extension().is_some_and(|extension| extension == "md") {
            found.push(path);
        }
    }
    found
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}
