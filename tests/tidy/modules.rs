//! The library's module tree, as its `mod` declarations draw it, and what each module imports.

use std::collections::BTreeMap;

use crate::source::{Project, Source, identifier, inline_modules, means_test, paths, words};

/// One file of the library.
pub(crate) struct Module<'a> {
    pub(crate) source: &'a Source,
    /// Empty for `lib.rs`, else for example `["sys", "epoll"]`.
    pub(crate) path: Vec<String>,
    pub(crate) unsafe_lint: Lint,
    /// Declared under `#[cfg(test)]`, or below such a module.
    is_test: bool,
}

/// What a file's own attributes and those on its way down from `lib.rs` say about `unsafe`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Lint {
    Allowed,
    Denied,
    Forbidden,
}

pub(crate) struct Tree<'a> {
    pub(crate) modules: Vec<Module<'a>>,
    /// Declarations without a file.
    pub(crate) findings: Vec<String>,
    /// What a module's `use` declarations bring in: module → name → full path.
    imports: BTreeMap<Vec<String>, BTreeMap<String, Vec<String>>>,
}

impl<'a> Tree<'a> {
    pub(crate) fn of(project: &'a Project, root: &str) -> Tree<'a> {
        let mut tree = Tree { modules: Vec::new(), findings: Vec::new(), imports: BTreeMap::new() };
        if let Some(source) = project.source(root) {
            tree.add(project, source, Vec::new(), Lint::Allowed, false);
        }
        for index in 0..tree.modules.len() {
            tree.note_imports(index);
        }
        tree
    }

    pub(crate) fn has(&self, path: &[String]) -> bool {
        self.modules.iter().any(|module| module.path == path)
    }

    /// Files that exist for tests only, by their declarations.
    pub(crate) fn test_files(&self) -> Vec<String> {
        let tests = self.modules.iter().filter(|module| module.is_test);
        tests.map(|module| module.source.path.clone()).collect()
    }

    /// Every path into the library that `module` names, re-exports followed to where the name
    /// comes from.
    pub(crate) fn uses(&self, module: &Module<'_>) -> Vec<(usize, Vec<String>)> {
        paths(module.source)
            .into_iter()
            .filter_map(|(offset, path)| Some((offset, self.absolute(module, offset, path)?)))
            .map(|(offset, path)| (offset, self.origin(path)))
            .collect()
    }

    fn add(
        &mut self,
        project: &'a Project,
        source: &'a Source,
        path: Vec<String>,
        inherited: Lint,
        is_test: bool,
    ) {
        let unsafe_lint = lint_after(inherited, &source.code, "#![");
        for declaration in declarations(source) {
            let mut child_path = path.clone();
            child_path.push(declaration.name.clone());
            let files = declaration.files(source);
            match files.iter().find_map(|file| project.source(file)) {
                Some(child) => {
                    let lint = lint_after(unsafe_lint, declaration.header, "#[");
                    let is_test = is_test || declaration.is_test();
                    self.add(project, child, child_path, lint, is_test);
                }
                None => self.findings.push(source.finding(
                    declaration.offset,
                    format_args!("`mod {}` has no file", declaration.name),
                )),
            }
        }
        self.modules.push(Module { source, path, unsafe_lint, is_test });
    }

    fn note_imports(&mut self, index: usize) {
        let module = &self.modules[index];
        let mut names = BTreeMap::new();
        for (offset, path) in paths(module.source) {
            if let Some(path) = self.absolute(module, offset, path)
                && let Some(name) = path.last().filter(|name| *name != "*")
            {
                names.insert(name.clone(), path);
            }
        }
        self.imports.insert(module.path.clone(), names);
    }

    /// The path from the root of the crate; `None` for a path into another crate.
    fn absolute(
        &self,
        module: &Module<'_>,
        offset: usize,
        path: Vec<String>,
    ) -> Option<Vec<String>> {
        let mut here = module.path.clone();
        for (name, range) in inline_modules(&module.source.code) {
            if range.contains(&offset) {
                here.push(name);
            }
        }
        let mut rest = path.as_slice();
        match rest.first()?.as_str() {
            "crate" => (here, rest) = (Vec::new(), &rest[1..]),
            "self" => rest = &rest[1..],
            "super" => {}
            name => {
                let mut child = module.path.clone();
                child.push(name.to_string());
                if !self.has(&child) {
                    return None;
                }
                here = module.path.clone();
            }
        }
        while rest.first().is_some_and(|name| name == "super") {
            here.pop();
            rest = &rest[1..];
        }
        here.extend_from_slice(rest);
        Some(here)
    }

    /// Follows re-exports; a chain of them is short, so a few steps end it.
    fn origin(&self, mut path: Vec<String>) -> Vec<String> {
        for _ in 0..RE_EXPORTS_MAX {
            let step = (0..path.len()).find_map(|at| {
                let from = self.imports.get(&path[..at])?.get(&path[at])?;
                let is_child = self.has(&path[..=at]);
                (!is_child && from[..] != path[..=at])
                    .then(|| [from.as_slice(), &path[at + 1..]].concat())
            });
            match step {
                Some(next) => path = next,
                None => break,
            }
        }
        path
    }
}

struct Declaration<'a> {
    offset: usize,
    name: String,
    /// The attributes and the visibility before `mod`.
    header: &'a str,
    /// The value of `#[path = "…"]`.
    file: Option<&'a str>,
}

impl Declaration<'_> {
    fn is_test(&self) -> bool {
        self.header.contains("#[cfg(") && means_test(self.header)
    }

    fn files(&self, parent: &Source) -> Vec<String> {
        let (folder, file) = parent.path.rsplit_once('/').unwrap_or(("", &parent.path));
        if let Some(path) = self.file {
            return vec![join(folder, path)];
        }
        let stem = file.trim_end_matches(".rs");
        let folder = match stem {
            "lib" | "main" | "mod" => folder.to_string(),
            _ => format!("{folder}/{stem}"),
        };
        vec![format!("{folder}/{}.rs", self.name), format!("{folder}/{}/mod.rs", self.name)]
    }
}

fn declarations(source: &Source) -> Vec<Declaration<'_>> {
    source
        .words("mod")
        .into_iter()
        .filter_map(|offset| {
            let (name, end) = identifier(&source.code, offset + "mod".len())?;
            source.code[end..].trim_start().starts_with(';').then_some(())?;
            let start = source.code[..offset].rfind([';', '{', '}']).map_or(0, |at| at + 1);
            Some(Declaration {
                offset,
                name: name.to_string(),
                header: &source.code[start..offset],
                file: path_attribute(&source.text[start..offset]),
            })
        })
        .collect()
}

fn path_attribute(header: &str) -> Option<&str> {
    let (_, rest) = header.split_once("#[path")?;
    rest.split('"').nth(1)
}

/// The level `unsafe_code` has after the attributes in `header`; what is forbidden stays so.
fn lint_after(inherited: Lint, header: &str, opening: &str) -> Lint {
    let mut lint = inherited;
    let levels = [("allow(", Lint::Allowed), ("deny(", Lint::Denied), ("forbid(", Lint::Forbidden)];
    for (level, meaning) in levels {
        let marker = format!("{opening}{level}");
        for (offset, _) in header.match_indices(&marker) {
            let end = header[offset..].find(')').map_or(header.len(), |end| offset + end);
            if lint != Lint::Forbidden && words(&header[offset..end], "unsafe_code").count() > 0 {
                lint = meaning;
            }
        }
    }
    lint
}

/// `folder` and a relative path, with its `..` resolved.
pub(crate) fn join(folder: &str, path: &str) -> String {
    let mut parts: Vec<&str> = folder.split('/').filter(|part| !part.is_empty()).collect();
    for part in path.split('/') {
        match part {
            "." | "" => {}
            ".." => {
                parts.pop();
            }
            _ => parts.push(part),
        }
    }
    parts.join("/")
}

/// The root files of what users run: the library, its bridges, the bench program.
pub(crate) const CRATES: [&str; 3] = ["src/lib.rs", "compat/src/lib.rs", "bench/src/main.rs"];

const RE_EXPORTS_MAX: usize = 8;

#[cfg(test)]
mod tests {
    use super::*;

    fn project(files: &[(&str, &str)]) -> Project {
        let owned = files.iter().map(|(path, text)| (path.to_string(), text.to_string()));
        Project::new(owned.collect())
    }

    fn used(project: &Project, file: &str) -> Vec<String> {
        let tree = Tree::of(project, "src/lib.rs");
        let module = tree.modules.iter().find(|module| module.source.path == file);
        let uses = tree.uses(module.expect("the file is part of the tree"));
        uses.iter().map(|(_, path)| path.join("::")).collect()
    }

    #[test]
    fn a_lint_reaches_the_modules_below_and_forbid_cannot_be_undone() {
        let project = project(&[
            ("src/lib.rs", "#![deny(unsafe_code)]\n#[forbid(unsafe_code)]\nmod a;\nmod b;"),
            ("src/a/mod.rs", "#[allow(unsafe_code)] mod c;"),
            ("src/a/c.rs", ""),
            ("src/b.rs", ""),
        ]);
        let tree = Tree::of(&project, "src/lib.rs");
        let lint = |path: &str| {
            let found = tree.modules.iter().find(|module| module.source.path == path);
            found.map(|module| module.unsafe_lint)
        };
        assert_eq!(lint("src/a/c.rs"), Some(Lint::Forbidden));
        assert_eq!(lint("src/b.rs"), Some(Lint::Denied));
    }

    #[test]
    fn a_declaration_without_a_file_is_found() {
        let project = project(&[("src/lib.rs", "mod a;")]);
        assert_eq!(
            Tree::of(&project, "src/lib.rs").findings,
            ["src/lib.rs:1: `mod a` has no file"]
        );
    }

    #[test]
    fn re_exports_are_followed_to_where_a_name_comes_from() {
        let project = project(&[
            ("src/lib.rs", "mod a; mod d; pub use a::Top;"),
            ("src/a/mod.rs", "mod b; pub(crate) use b::Deep; pub use self::b::Top;"),
            ("src/a/b.rs", ""),
            ("src/d.rs", "use crate::{Top, a::Deep};\nmod tests { use super::*; }"),
        ]);
        assert_eq!(used(&project, "src/d.rs"), ["a::b::Top", "a::b::Deep", "d::*"]);
    }
}
