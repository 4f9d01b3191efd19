//! Rust sources as text: comments and literals blanked, test code marked, paths expanded.
//!
//! No parser: the project is formatted by rustfmt, so a byte scan that knows comments, literals
//! and brackets is enough, and it keeps this test free of dependencies.

use std::fs;
use std::io;
use std::ops::Range;
use std::path::Path;

use crate::modules::{CRATES, Tree};

/// The files under test, with paths relative to the repository, `/` between the parts.
pub(crate) struct Project {
    pub(crate) sources: Vec<Source>,
    /// What is not Rust: documentation, manifests, scripts.
    pub(crate) texts: Vec<(String, String)>,
}

impl Project {
    pub(crate) fn load(root: &Path) -> io::Result<Project> {
        let mut files = Vec::new();
        collect(root, root, &mut files)?;
        files.sort();
        Ok(Project::new(files))
    }

    pub(crate) fn new(files: Vec<(String, String)>) -> Project {
        let (rust, texts) = files.into_iter().partition(|(path, _)| path.ends_with(".rs"));
        let rust: Vec<(String, String)> = rust;
        let sources = rust.into_iter().map(|(path, text)| Source::new(path, text)).collect();
        let mut project = Project { sources, texts };
        let trees = CRATES.iter().map(|root| Tree::of(&project, root));
        let test_files: Vec<String> = trees.flat_map(|tree| tree.test_files()).collect();
        for source in project.sources.iter_mut().filter(|source| test_files.contains(&source.path))
        {
            source.test_lines.fill(true);
        }
        project
    }

    pub(crate) fn source(&self, path: &str) -> Option<&Source> {
        self.sources.iter().find(|source| source.path == path)
    }

    pub(crate) fn text(&self, path: &str) -> Option<&str> {
        self.texts.iter().find(|(name, _)| name == path).map(|(_, text)| text.as_str())
    }
}

/// One Rust file, three ways: as written, as code only, and which lines are tests.
pub(crate) struct Source {
    pub(crate) path: String,
    pub(crate) text: String,
    /// As long as `text`, with comments and the insides of literals replaced by spaces.
    pub(crate) code: String,
    test_lines: Vec<bool>,
}

impl Source {
    pub(crate) fn new(path: String, text: String) -> Source {
        let code = blank(&text);
        let mut source = Source { path, test_lines: Vec::new(), text, code };
        source.test_lines = vec![false; source.text.lines().count() + 1];
        for range in test_ranges(&source.code) {
            let (first, last) = (source.line_of(range.start), source.line_of(range.end));
            source.test_lines[first - 1..last].fill(true);
        }
        source
    }

    /// The line a byte is on, counted from 1.
    pub(crate) fn line_of(&self, offset: usize) -> usize {
        1 + self.text.as_bytes()[..offset.min(self.text.len())]
            .iter()
            .filter(|&&byte| byte == b'\n')
            .count()
    }

    pub(crate) fn is_test_line(&self, line: usize) -> bool {
        self.test_lines.get(line - 1).copied().unwrap_or(false)
    }

    /// Where `word` stands in the code, as a whole word.
    pub(crate) fn words(&self, word: &str) -> Vec<usize> {
        words(&self.code, word).collect()
    }

    pub(crate) fn finding(&self, offset: usize, message: impl std::fmt::Display) -> String {
        format!("{}:{}: {message}", self.path, self.line_of(offset))
    }
}

/// Where `word` stands, not as a part of a longer word.
pub(crate) fn words<'a>(text: &'a str, word: &'a str) -> impl Iterator<Item = usize> + 'a {
    let joins = |left: Option<char>, right: Option<char>| {
        left.is_some_and(is_word) && right.is_some_and(is_word)
    };
    text.match_indices(word).map(|(offset, _)| offset).filter(move |&offset| {
        let (before, after) = (&text[..offset], &text[offset + word.len()..]);
        !joins(before.chars().next_back(), word.chars().next())
            && !joins(word.chars().next_back(), after.chars().next())
    })
}

pub(crate) fn is_word(character: char) -> bool {
    character.is_alphanumeric() || character == '_'
}

/// The identifier that starts after white space at `offset`, and where it ends.
pub(crate) fn identifier(code: &str, offset: usize) -> Option<(&str, usize)> {
    let start = offset + (code[offset..].len() - code[offset..].trim_start().len());
    let rest = &code[start..];
    let length = rest.find(|character| !is_word(character)).unwrap_or(rest.len());
    (length > 0).then(|| (&rest[..length], start + length))
}

/// Where the bracket that opens at `open` is closed.
pub(crate) fn closing(code: &str, open: usize) -> Option<usize> {
    let mut depth = 0usize;
    for (offset, byte) in code.bytes().enumerate().skip(open) {
        match byte {
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => depth = depth.checked_sub(1)?,
            _ => {}
        }
        if depth == 0 {
            return Some(offset);
        }
    }
    None
}

/// Where the item that starts at `start` opens its block, or ends without one. `separators` end
/// it as well: a field or a match arm ends with its comma or with the brace around it.
pub(crate) fn item_block(code: &str, start: usize, separators: &[u8]) -> Option<usize> {
    let mut depth = 0usize;
    for (offset, byte) in code.bytes().enumerate().skip(start) {
        match byte {
            b'(' | b'[' => depth += 1,
            b')' | b']' => depth = depth.checked_sub(1)?,
            b'{' | b';' if depth == 0 => return Some(offset),
            _ if depth == 0 && separators.contains(&byte) => return Some(offset),
            _ => {}
        }
    }
    None
}

/// Inline modules (`mod name { … }`) with what they span.
pub(crate) fn inline_modules(code: &str) -> Vec<(String, Range<usize>)> {
    words(code, "mod")
        .filter_map(|offset| {
            let (name, end) = identifier(code, offset + "mod".len())?;
            let open = end + code[end..].find(|character: char| !character.is_whitespace())?;
            let close = code[open..].starts_with('{').then(|| closing(code, open))??;
            Some((name.to_string(), open..close))
        })
        .collect()
}

/// Every path the code takes from `crate`, `self`, `super` or a `use`, one entry a leaf.
pub(crate) fn paths(source: &Source) -> Vec<(usize, Vec<String>)> {
    let mut found = Vec::new();
    for offset in source.words("use") {
        use_tree(&source.code, offset + "use".len(), &[], &mut found);
    }
    for root in ["crate", "self", "super"] {
        for offset in source.words(root) {
            let before = source.code[..offset].trim_end();
            let starts_here = !before.ends_with("::") && !before.ends_with("use");
            if starts_here && source.code[offset + root.len()..].starts_with("::") {
                use_tree(&source.code, offset, &[], &mut found);
            }
        }
    }
    found
}

/// Reads `a::b::{c, d as e}` from `offset`, appends its leaves, returns where it ends.
fn use_tree(
    code: &str,
    mut offset: usize,
    prefix: &[String],
    found: &mut Vec<(usize, Vec<String>)>,
) -> usize {
    let mut path = prefix.to_vec();
    loop {
        offset += code[offset..].len() - code[offset..].trim_start().len();
        let rest = &code[offset..];
        if rest.starts_with('{') {
            let close = closing(code, offset).unwrap_or(code.len());
            offset += 1;
            while offset < close {
                offset = use_tree(code, offset, &path, found);
                offset += code[offset..close].find(',').map_or(close - offset, |comma| comma + 1);
            }
            return close;
        }
        if rest.starts_with('*') {
            path.push("*".to_string());
            found.push((offset, path));
            return offset + 1;
        }
        // Nothing stands between a trailing comma and its brace.
        let Some((name, end)) = identifier(code, offset) else { return offset };
        let is_plain_self = name == "self" && !path.is_empty();
        if !is_plain_self {
            path.push(name.to_string());
        }
        let after = code[end..].trim_start();
        offset = end;
        if !after.starts_with("::") {
            found.push((offset, path));
            return offset;
        }
        offset = code.len() - after.len() + "::".len();
    }
}

/// Replaces comments and the insides of literals by spaces; line breaks stay.
fn blank(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut code = bytes.to_vec();
    let mut at = 0;
    while at < bytes.len() {
        let Some(end) = comment_or_literal_end(text, at) else {
            at += 1;
            continue;
        };
        for byte in &mut code[at..end] {
            if *byte != b'\n' {
                *byte = b' ';
            }
        }
        at = end;
    }
    String::from_utf8(code)
        .expect("whole comments and literals are replaced, so no character splits")
}

/// Where the comment or literal that starts at `at` ends; `None` when none starts there.
fn comment_or_literal_end(text: &str, at: usize) -> Option<usize> {
    let rest = &text.as_bytes()[at..];
    let before = text.as_bytes()[..at].last().copied().unwrap_or(b' ');
    match rest {
        [b'/', b'/', ..] => Some(at + rest.iter().position(|&b| b == b'\n').unwrap_or(rest.len())),
        [b'/', b'*', ..] => Some(at + block_comment_length(rest)),
        [b'"', ..] => Some(at + string_length(rest)),
        [b'r', b'"' | b'#', ..] if !is_word(before.into()) || matches!(before, b'b' | b'c') => {
            raw_string_length(rest).map(|length| at + length)
        }
        [b'\'', b'\\', ..] => {
            let close = rest.iter().skip(3).position(|&byte| byte == b'\'')?;
            Some(at + 3 + close + 1)
        }
        [b'\'', ..] => {
            let character = text[at + 1..].chars().next()?;
            let close = at + 1 + character.len_utf8();
            text.as_bytes().get(close).filter(|&&byte| byte == b'\'').map(|_| close + 1)
        }
        _ => None,
    }
}

fn block_comment_length(rest: &[u8]) -> usize {
    let (mut depth, mut at) = (0usize, 0);
    while at < rest.len() {
        match &rest[at..] {
            [b'/', b'*', ..] => (depth, at) = (depth + 1, at + 2),
            [b'*', b'/', ..] => (depth, at) = (depth - 1, at + 2),
            _ => at += 1,
        }
        if depth == 0 {
            break;
        }
    }
    at
}

fn string_length(rest: &[u8]) -> usize {
    let mut at = 1;
    while at < rest.len() && rest[at] != b'"' {
        at += if rest[at] == b'\\' { 2 } else { 1 };
    }
    (at + 1).min(rest.len())
}

fn raw_string_length(rest: &[u8]) -> Option<usize> {
    let hashes = rest[1..].iter().take_while(|&&byte| byte == b'#').count();
    let open = 1 + hashes;
    if rest.get(open) != Some(&b'"') {
        return None;
    }
    let end: Vec<u8> = [b'"'].into_iter().chain(std::iter::repeat_n(b'#', hashes)).collect();
    let close = rest[open + 1..].windows(end.len()).position(|window| window == end);
    Some(close.map_or(rest.len(), |close| open + 1 + close + end.len()))
}

/// What stands under `#[cfg(test)]`, alone or inside `all(…)`, and under a file's `#![cfg(test)]`.
fn test_ranges(code: &str) -> Vec<Range<usize>> {
    let mut ranges = Vec::new();
    let everything = 0..code.len();
    for (offset, marker) in code.match_indices("#[cfg(").chain(code.match_indices("#![cfg(")) {
        let Some(end) = closing(code, offset + marker.len() - 1) else { continue };
        if !means_test(&code[offset..end]) {
            continue;
        }
        if marker.starts_with("#!") {
            return vec![everything];
        }
        let Some(bracket) = code[end..].find(']') else { continue };
        ranges.push(offset..item_end(code, end + bracket + 1));
    }
    ranges
}

pub(crate) fn means_test(condition: &str) -> bool {
    words(condition, "test").any(|offset| !condition[..offset].ends_with("not("))
}

/// Where the item after an attribute ends, further attributes included.
fn item_end(code: &str, mut start: usize) -> usize {
    loop {
        start += code[start..].len() - code[start..].trim_start().len();
        if !code[start..].starts_with("#[") {
            break;
        }
        start = closing(code, start + 1).map_or(code.len(), |end| end + 1);
    }
    let keyword = identifier(code, start).map_or("", |(name, _)| name);
    let separators: &[u8] = if ITEM_KEYWORDS.contains(&keyword) { b"" } else { b",}" };
    match item_block(code, start, separators) {
        Some(open) if code[open..].starts_with('{') => closing(code, open).unwrap_or(code.len()),
        Some(end) => end,
        None => code.len(),
    }
}

fn collect(root: &Path, folder: &Path, files: &mut Vec<(String, String)>) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let name = path.strip_prefix(root).expect("the walk starts at the root");
        let name = name.to_string_lossy().into_owned();
        if path.is_symlink() || GENERATED.contains(&name.as_str()) {
            continue;
        }
        if path.is_dir() {
            collect(root, &path, files)?;
        } else if READ.iter().any(|end| name.ends_with(end)) {
            files.push((name, fs::read_to_string(&path)?));
        }
    }
    Ok(())
}

/// What the walk reads, by how its name ends.
const READ: [&str; 5] = [".rs", ".md", ".toml", ".yml", ".ci/run"];

/// Folders the walk leaves out: made by git, by cargo or by a run.
const GENERATED: [&str; 7] =
    [".git", "target", "report", "fuzz/target", "fuzz/corpus", "fuzz/artifacts", "fuzz/coverage"];

/// How an item that may hold commas outside of brackets begins.
const ITEM_KEYWORDS: [&str; 16] = [
    "async", "const", "enum", "extern", "fn", "impl", "let", "mod", "pub", "static", "struct",
    "trait", "type", "union", "unsafe", "use",
];

#[cfg(test)]
mod tests {
    use super::*;

    fn source(text: &str) -> Source {
        Source::new("src/a.rs".to_string(), text.to_string())
    }

    #[test]
    fn comments_and_literals_are_blank_and_code_is_not() {
        let text =
            "a // unsafe\n/* x /* y */ z */ b \"q\\\"unsafe\" c r#\"d\"e\"# 'x' '\\'' '\"' f";
        let code = source(text).code;
        assert_eq!(code.len(), text.len());
        assert_eq!(code.split_whitespace().collect::<Vec<_>>(), ["a", "b", "c", "f"]);
    }

    #[test]
    fn a_lifetime_is_not_a_character() {
        let code = source("fn f<'a>(x: &'a str) -> &'static str { \"x\" }").code;
        assert!(code.contains("&'static str {"));
    }

    #[test]
    fn test_code_ends_where_its_item_ends() {
        let text =
            "fn a() {}\n#[cfg(test)]\nfn b() {\n}\nfn c() {}\n#[cfg(not(test))]\nfn d() {}\n";
        let source = source(text);
        let marked: Vec<usize> = (1..=7).filter(|&line| source.is_test_line(line)).collect();
        assert_eq!(marked, [2, 3, 4]);
    }

    #[test]
    fn a_use_tree_opens_into_its_leaves() {
        let source = source("use crate::{a::{self, B as C, d::*,}, e};\nfn f() { super::g::h(); }");
        let found: Vec<String> = paths(&source).iter().map(|(_, path)| path.join("::")).collect();
        assert_eq!(found, ["crate::a", "crate::a::B", "crate::a::d::*", "crate::e", "super::g::h"]);
    }
}
