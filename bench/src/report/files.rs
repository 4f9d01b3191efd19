//! The files of a report: what may be replaced, and how it is replaced.
//!
//! All files of a report are written beside their places first and moved there when all are
//! whole, so that a disk that fills up leaves what was there before.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::PROGRAM;
use crate::error::{Failure, Result};

/// Refuses a directory that cannot be written to, and one in which a file of somebody else has the
/// name of the report. Called before the minutes of measuring.
pub(crate) fn refuse_foreign(dir: &Path, stem: &str) -> Result<()> {
    fs::create_dir_all(dir).map_err(Failure::at(format!("create {}", dir.display())))?;
    for (extension, is_ours) in OURS {
        let path = dir.join(stem).with_extension(extension);
        let foreign = |why: &str| {
            Failure::new(format!(
                "{}: {why}, so it is not overwritten; move it or choose another --out",
                path.display()
            ))
        };
        match fs::metadata(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(Failure::at(format!("read {}", path.display()))(error)),
            Ok(found) if !found.is_file() => return Err(foreign("not a regular file")),
            Ok(_) => {}
        }
        let text = read_start(&path).map_err(Failure::at(format!("read {}", path.display())))?;
        if !is_ours(&text) {
            return Err(foreign("not a report of this program"));
        }
    }
    // What the permissions say is not all: a file system may be read-only.
    let trial = beside(dir, stem, "trial");
    create(&trial).map_err(Failure::at(format!("write to {}", dir.display())))?;
    fs::remove_file(&trial).map_err(Failure::at(format!("remove {}", trial.display())))
}

/// Writes files of one stem, named by extension: all of them, or none.
pub(super) fn write_all(
    dir: &Path,
    stem: &str,
    files: Vec<(&str, String)>,
) -> Result<Vec<PathBuf>> {
    let write = |(extension, text): (&str, String)| Pending::write(dir, stem, extension, &text);
    let pending: Vec<Pending> = files.into_iter().map(write).collect::<Result<_>>()?;
    pending.into_iter().map(Pending::finish).collect()
}

/// A whole file that is not in its place yet. Dropped there, it is gone.
struct Pending {
    beside: PathBuf,
    place: PathBuf,
}

impl Pending {
    fn write(dir: &Path, stem: &str, extension: &str, text: &str) -> Result<Pending> {
        let place = dir.join(stem).with_extension(extension);
        let failure = format!("write {}", place.display());
        let pending = Pending { beside: beside(dir, stem, extension), place };
        let written = create(&pending.beside).and_then(|mut file| {
            file.write_all(text.as_bytes())?;
            // Some file systems say only here that there was no room.
            file.sync_all()
        });
        written.map_err(Failure::at(failure)).map(|()| pending)
    }

    fn finish(self) -> Result<PathBuf> {
        fs::rename(&self.beside, &self.place)
            .map_err(Failure::at(format!("write {}", self.place.display())))?;
        Ok(self.place.clone())
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        // Because after `finish` there is none, and otherwise the failure is already told.
        let _ = fs::remove_file(&self.beside);
    }
}

/// In the same directory, so that it can be moved at once; hidden, and of this process.
fn beside(dir: &Path, stem: &str, extension: &str) -> PathBuf {
    dir.join(format!(".{stem}.{extension}.{}", std::process::id()))
}

fn create(path: &Path) -> io::Result<File> {
    OpenOptions::new().write(true).create_new(true).open(path)
}

/// A report says in its first bytes or in its structure what it is; what is longer than any report
/// is none.
fn read_start(path: &Path) -> io::Result<String> {
    let mut bytes = Vec::new();
    File::open(path)?.take(REPORT_BYTES_MAX).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn is_our_json(text: &str) -> bool {
    let Ok(Value::Object(report)) = serde_json::from_str(text) else { return false };
    match report.get("program") {
        Some(program) => program == PROGRAM,
        // Older ones are known by their shape.
        None => {
            let has = |key| report.contains_key(key);
            has("host") && has("settings") && (has("cells") || has("experiments"))
        }
    }
}

fn is_our_page(text: &str) -> bool {
    // The second is that of older ones.
    [format!("<meta name=\"generator\" content=\"{PROGRAM}"), format!("<title>{PROGRAM} ")]
        .iter()
        .any(|mark| text.contains(mark.as_str()))
}

/// Whether a text is one of ours.
type IsOurs = fn(&str) -> bool;

/// How each file of a report is known.
const OURS: [(&str, IsOurs); 3] = [
    ("json", is_our_json),
    ("html", is_our_page),
    ("md", |text| text.starts_with(super::markdown::MARK)),
];
const REPORT_BYTES_MAX: u64 = 256 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_is_known_by_its_marker_or_by_its_shape() {
        assert!(is_our_json(r#"{"program": "ringpoll-bench"}"#));
        assert!(is_our_json(r#"{"host": {}, "settings": {}, "cells": []}"#));
        assert!(is_our_json(r#"{"host": {}, "settings": {}, "experiments": []}"#));
        let foreign = r#"{"program": "other", "host": {}, "settings": {}, "cells": []}"#;
        for text in [foreign, "", "{}", "[]", r#"{"host": {}, "cells": []}"#, "{\"program\": "] {
            assert!(!is_our_json(text), "{text}");
        }
        assert!(is_our_page(r#"<meta name="generator" content="ringpoll-bench 0.1.0">"#));
        assert!(is_our_page("<title>ringpoll-bench compare</title>"));
        assert!(!is_our_page("<title>my notes on ringpoll-bench</title>"));
    }

    #[test]
    fn a_file_that_cannot_be_written_leaves_both_as_they_were() {
        let dir = std::env::temp_dir().join(format!("ringpoll-files-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("x.json"), "before").unwrap();
        // Stands where the second file would be written first.
        fs::create_dir(beside(&dir, "x", "html")).unwrap();
        let files = || vec![("json", "after".to_owned()), ("html", "page".to_owned())];
        let failure = write_all(&dir, "x", files()).unwrap_err().to_string();
        assert!(failure.contains("x.html"), "{failure}");
        assert_eq!(fs::read_to_string(dir.join("x.json")).unwrap(), "before");
        fs::remove_dir(beside(&dir, "x", "html")).unwrap();
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 1, "nothing is left beside");
        write_all(&dir, "x", files()).unwrap();
        assert_eq!(fs::read_to_string(dir.join("x.json")).unwrap(), "after");
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 2);
        fs::remove_dir_all(&dir).unwrap();
    }
}
