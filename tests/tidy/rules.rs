//! The checks. Each takes the project and returns one line for each finding. The tests below show
//! that each check can fail.

use crate::modules::{CRATES, Lint, Tree, join};
use crate::source::{Project, Source, closing, identifier, item_block, words};

/// Each module, and the paths that it may import. All modules may import the leaves.
pub(crate) struct ImportTable {
    pub(crate) leaves: &'static [&'static str],
    pub(crate) modules: &'static [(&'static str, &'static [&'static str])],
}

pub(crate) fn imports(project: &Project, table: &ImportTable) -> Vec<String> {
    let tree = Tree::of(project, "src/lib.rs");
    let mut findings = Vec::new();
    for module in tree.modules.iter().filter(|module| !module.path.is_empty()) {
        let owner = module.path[0].as_str();
        let Some((_, allowed)) = table.modules.iter().find(|(name, _)| *name == owner) else {
            findings.push(module.source.finding(0, format_args!("`{owner}` is not in the table")));
            continue;
        };
        for (offset, path) in tree.uses(module) {
            let is_leaf = |name: &str| table.leaves.contains(&name);
            let is_free = path
                .first()
                .is_some_and(|first| first == owner || (!is_leaf(owner) && is_leaf(first)));
            let path = path.join("::");
            if !is_free && !allowed.iter().any(|prefix| is_within(&path, prefix)) {
                let message = format!("`{owner}` imports `{path}`; it may import {allowed:?}");
                findings.push(module.source.finding(offset, message));
            }
        }
    }
    findings
}

/// Each declared module has a file, and each file is declared.
pub(crate) fn module_files(project: &Project) -> Vec<String> {
    let mut findings = Vec::new();
    for root in CRATES {
        let tree = Tree::of(project, root);
        findings.extend(tree.findings.iter().cloned());
        let folder = module_folder(root);
        for source in project.sources.iter().filter(|source| source.path.starts_with(&folder)) {
            if !tree.modules.iter().any(|module| std::ptr::eq(module.source, source)) {
                findings.push(source.finding(0, "no `mod` leads to this file"));
            }
        }
    }
    findings
}

/// Code outside the library uses its public API: no other crate compiles a file of `src/`. The
/// library itself may include a file of `tests/` that tests and fuzzers share.
pub(crate) fn borrowed_files(project: &Project) -> Vec<String> {
    let mut findings = Vec::new();
    for source in &project.sources {
        let folder = source.path.rsplit_once('/').map_or("", |(folder, _)| folder);
        for marker in ["#[path", "include!"] {
            for (offset, _) in source.code.match_indices(marker) {
                let value = source.text[offset..].split('"').nth(1).unwrap_or("");
                let target = join(folder, value);
                let is_library = source.path.starts_with("src/");
                if is_library && !target.starts_with("tests/") {
                    findings.push(source.finding(offset, format_args!("`{target}` by its path")));
                }
                if !is_library && target.starts_with("src/") {
                    findings.push(source.finding(offset, format_args!("`{target}` is private")));
                }
            }
        }
    }
    findings
}

/// `unsafe` stands only where it may, and every other file forbids it by a lint.
pub(crate) fn unsafe_code(project: &Project, may_be_in: &[&str]) -> Vec<String> {
    let is_allowed = |path: &str| may_be_in.iter().any(|place| path.starts_with(place));
    let mut findings = Vec::new();
    let trees: Vec<Tree<'_>> = CRATES.iter().map(|root| Tree::of(project, root)).collect();
    let modules = trees.iter().flat_map(|tree| &tree.modules);
    for module in modules.filter(|module| !is_allowed(&module.source.path)) {
        for offset in module.source.words("unsafe") {
            findings.push(module.source.finding(offset, "`unsafe` does not belong here"));
        }
        // A child cannot undo `forbid`, so what lies above unsafe code can only deny it.
        let is_above = |place: &&str| place.starts_with(&module_folder(&module.source.path));
        let (wanted, lint) = match may_be_in.iter().any(is_above) {
            true => (Lint::Denied, "deny"),
            false => (Lint::Forbidden, "forbid"),
        };
        if module.unsafe_lint < wanted {
            findings.push(module.source.finding(0, format_args!("needs `{lint}(unsafe_code)`")));
        }
    }
    findings
}

/// The folder of a file's submodules, with its `/`.
fn module_folder(path: &str) -> String {
    let (folder, file) = path.rsplit_once('/').unwrap_or(("", path));
    match file {
        "lib.rs" | "main.rs" | "mod.rs" => format!("{folder}/"),
        _ => format!("{folder}/{}/", file.trim_end_matches(".rs")),
    }
}

/// Every unsafe block and impl has a `SAFETY` comment at its statement.
pub(crate) fn safety_comments(project: &Project) -> Vec<String> {
    let mut findings = Vec::new();
    for source in &project.sources {
        for offset in source.words("unsafe") {
            let next = source.code[offset + "unsafe".len()..].trim_start();
            let needs_one = ["{", "impl", "extern"].iter().any(|start| next.starts_with(start));
            // `unsafe extern "C" fn` is a signature; the block that calls it carries the comment.
            let block = next.find('{').unwrap_or(next.len());
            let is_signature =
                next.starts_with("extern") && words(&next[..block], "fn").next().is_some();
            if needs_one && !is_signature && !has_safety_comment(source, offset) {
                findings.push(source.finding(offset, "`unsafe` without a SAFETY comment"));
            }
        }
    }
    findings
}

fn has_safety_comment(source: &Source, offset: usize) -> bool {
    let line = source.line_of(offset);
    let text: Vec<&str> = source.text.lines().collect();
    let code: Vec<&str> = source.code.lines().collect();
    if text[line - 1].contains("SAFETY:") {
        return true;
    }
    for index in (0..line - 1).rev() {
        let code = code[index].trim();
        let is_comment = code.is_empty() && !text[index].trim().is_empty();
        if is_comment && text[index].contains("SAFETY:") {
            return true;
        }
        let ends_before = code.ends_with([';', '{', '}', ',']) || text[index].trim().is_empty();
        if !is_comment && ends_before {
            return false;
        }
    }
    false
}

/// Lines of a file (tests aside), of a function, columns of a line.
pub(crate) struct Sizes {
    pub(crate) file_lines_max: usize,
    pub(crate) function_lines_max: usize,
    pub(crate) columns_max: usize,
}

pub(crate) fn sizes(project: &Project, sizes: &Sizes) -> Vec<String> {
    let mut findings = Vec::new();
    for source in &project.sources {
        findings.extend(wide_lines(source, sizes.columns_max));
        if is_test_file(&source.path) {
            continue;
        }
        let line_count = source.text.lines().count();
        let count = (1..=line_count).filter(|&line| !source.is_test_line(line)).count();
        if count > sizes.file_lines_max {
            findings.push(source.finding(0, format_args!("{count} lines")));
        }
        for (offset, name, count) in functions(source) {
            if count > sizes.function_lines_max && !source.is_test_line(source.line_of(offset)) {
                findings.push(source.finding(offset, format_args!("fn {name}: {count} lines")));
            }
        }
    }
    findings
}

fn wide_lines(source: &Source, columns_max: usize) -> Vec<String> {
    let mut findings = Vec::new();
    for (index, line) in source.text.lines().enumerate() {
        let columns = line.chars().count();
        if columns > columns_max && !line.contains("://") {
            findings.push(format!("{}:{}: {columns} columns", source.path, index + 1));
        }
    }
    findings
}

fn functions(source: &Source) -> Vec<(usize, String, usize)> {
    let code = &source.code;
    source
        .words("fn")
        .into_iter()
        .filter_map(|offset| {
            let (name, end) = identifier(code, offset + "fn".len())?;
            let open = item_block(code, end, b"")?;
            let close = code[open..].starts_with('{').then(|| closing(code, open))??;
            let count = source.line_of(close) - source.line_of(offset) + 1;
            Some((offset, name.to_string(), count))
        })
        .collect()
}

/// Marks of unfinished code, and `unwrap` where `expect` should state the invariant.
pub(crate) fn unfinished(project: &Project) -> Vec<String> {
    let mut findings = Vec::new();
    for source in project.sources.iter().filter(|source| is_shipped(&source.path)) {
        let marks = ["TODO", "FIXME", "XXX"].map(|word| (word, &source.text));
        let calls = ["todo!", "unimplemented!", ".unwrap()"].map(|call| (call, &source.code));
        for (what, text) in marks.into_iter().chain(calls) {
            for (offset, _) in text.match_indices(what) {
                if !source.is_test_line(source.line_of(offset)) {
                    findings
                        .push(source.finding(offset, format_args!("`{what}` outside of a test")));
                }
            }
        }
    }
    findings
}

/// A file begins with its module docs.
pub(crate) fn module_docs(project: &Project) -> Vec<String> {
    let mut findings = Vec::new();
    for source in project.sources.iter().filter(|source| is_shipped(&source.path)) {
        if !source.text.starts_with("//!") {
            findings.push(source.finding(0, "does not begin with its module docs (`//!`)"));
        }
    }
    findings
}

/// The first line of an example is the command that runs it.
pub(crate) fn example_commands(project: &Project) -> Vec<String> {
    let mut findings = Vec::new();
    for source in &project.sources {
        let Some(file) = source.path.strip_prefix("examples/") else { continue };
        let name = file.trim_end_matches(".rs").trim_end_matches("/main");
        let line = source.text.lines().next().unwrap_or("");
        let mut parts = line.split_whitespace().skip_while(|part| *part != "--example").skip(1);
        if !line.starts_with("// cargo run ") || parts.next() != Some(name) {
            let message = format!("does not begin with `// cargo run … --example {name}`");
            findings.push(source.finding(0, message));
        }
    }
    findings
}

/// The README opens with exactly these commands, and the check on every change begins with
/// `test_command`, one of them.
pub(crate) fn first_commands(
    project: &Project,
    commands: &[&str],
    test_command: &str,
) -> Vec<String> {
    let mut findings = Vec::new();
    let readme = project.text("README.md").unwrap_or("");
    let found: Vec<&str> = shell_lines(readme).take(commands.len()).collect();
    if found != commands {
        findings.push(format!("README.md: opens with {found:?} instead of {commands:?}"));
    }
    let script = project.text(".ci/run").unwrap_or("");
    let mut lines = script.lines().map(str::trim).filter(|line| !line.starts_with('#'));
    match lines.find(|line| words(line, "cargo").next().is_some()) {
        Some(line) if line.ends_with(test_command) => {}
        line => findings.push(format!(".ci/run: begins with {line:?} instead of {test_command:?}")),
    }
    findings
}

/// The lines inside of fenced blocks, until the first block that is not for a shell.
fn shell_lines(markdown: &str) -> impl Iterator<Item = &str> {
    let fences = markdown.split("\n```").skip(1).step_by(2);
    let shell = fences.map_while(|block| {
        let (language, body) = block.split_once('\n')?;
        ["sh", "bash", "console", ""].contains(&language.trim()).then_some(body)
    });
    shell
        .flat_map(str::lines)
        .map(|line| line.trim().trim_start_matches("$ "))
        .filter(|line| !line.is_empty())
}

/// Code that users run: the library, its bridges, the bench program; not their tests.
fn is_shipped(path: &str) -> bool {
    CRATES.iter().any(|root| path.starts_with(&module_folder(root))) && !is_test_file(path)
}

fn is_test_file(path: &str) -> bool {
    path.ends_with("/tests.rs") || path.starts_with("tests/") || path.contains("/tests/")
}

fn is_within(path: &str, prefix: &str) -> bool {
    path.strip_prefix(prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with("::"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn project(files: &[(&str, &str)]) -> Project {
        let owned = files.iter().map(|(path, text)| (path.to_string(), text.to_string()));
        Project::new(owned.collect())
    }

    const TABLE: ImportTable = ImportTable {
        leaves: &["error"],
        modules: &[
            ("error", &[]),
            ("buffer", &[]),
            ("poller", &["buffer"]),
            ("top", &["sys::socket"]),
        ],
    };

    const TREE: (&str, &str) =
        ("src/lib.rs", "mod error; mod buffer; mod poller; pub use poller::P;");

    fn imports_of(buffer: &str, poller: &str) -> Vec<String> {
        let files =
            [TREE, ("src/error.rs", ""), ("src/buffer.rs", buffer), ("src/poller/mod.rs", poller)];
        imports(&project(&files), &TABLE)
    }

    #[test]
    fn an_import_against_the_table_is_found_however_it_is_written() {
        let downward = "use crate::{buffer::B, error::E};\nfn f() { crate::error::g(); }";
        assert_eq!(imports_of("", downward), [""; 0]);
        for upward in [
            "\nuse crate::poller::P;",
            "\nuse crate::P;",
            "\nuse super::poller;",
            "\nuse crate::{error::E, poller::{self, P}};",
            "\nfn f() { crate::poller::g(); }",
            "\nuse crate::*;",
            "\nmod inner { use super::super::poller; }",
        ] {
            let findings = imports_of(upward, "");
            assert!(!findings.is_empty(), "{upward} passes");
            assert!(findings[0].starts_with("src/buffer.rs:2: "), "{findings:?}");
        }
    }

    #[test]
    fn a_leaf_that_imports_and_a_module_without_a_row_are_found() {
        let leaf = [("src/lib.rs", "mod error; mod buffer;"), ("src/buffer.rs", "")];
        let leaf = [leaf[0], leaf[1], ("src/error.rs", "use crate::buffer::B;")];
        assert_eq!(imports(&project(&leaf), &TABLE).len(), 1);
        let unknown = [("src/lib.rs", "mod other;"), ("src/other.rs", "")];
        assert_eq!(imports(&project(&unknown), &TABLE).len(), 1);
    }

    #[test]
    fn a_row_for_one_file_of_a_module_does_not_open_its_neighbours() {
        let found = |text: &str| {
            let sys = ("src/sys/mod.rs", "pub(crate) mod socket; pub(crate) mod epoll;");
            let files = [
                ("src/lib.rs", "mod top; mod sys;"),
                ("src/top.rs", text),
                sys,
                ("src/sys/socket.rs", ""),
                ("src/sys/epoll.rs", ""),
            ];
            let findings = imports(&project(&files), &TABLE);
            findings.iter().filter(|finding| finding.starts_with("src/top.rs")).count()
        };
        assert_eq!(found("use crate::sys::socket::Listener;"), 0);
        assert_eq!(found("use crate::sys::epoll::Epoll;"), 1);
        assert_eq!(found("use crate::sys::socket_pair;"), 1);
    }

    #[test]
    fn a_library_file_compiled_a_second_time_is_found() {
        let found = |path: &str, text: &str| borrowed_files(&project(&[(path, text)])).len();
        assert_eq!(found("tests/a.rs", "#[path = \"../src/b.rs\"] mod b;"), 1);
        assert_eq!(found("bench/src/a.rs", "include!(\"../../src/b.rs\");"), 1);
        assert_eq!(found("src/a.rs", "#[path = \"../bench/b.rs\"] mod b;"), 1);
        assert_eq!(found("tests/a.rs", "#[path = \"tidy/b.rs\"] mod b;"), 0);
        assert_eq!(found("src/a.rs", "#[path = \"../tests/ops.rs\"] mod ops;"), 0);
    }

    #[test]
    fn unsafe_code_and_a_missing_lint_are_found() {
        let found = |lib: &str, a: &str| {
            let files = [("src/lib.rs", lib), ("src/a.rs", a), ("src/sys/mod.rs", "unsafe {}")];
            unsafe_code(&project(&files), &["src/sys/"])
        };
        let lib =
            "#![deny(unsafe_code)] #[forbid(unsafe_code)] mod a; #[allow(unsafe_code)] mod sys;";
        assert_eq!(found(lib, ""), [""; 0]);
        assert_eq!(
            found(&lib.replace("#[forbid(unsafe_code)]", ""), "#![forbid(unsafe_code)]"),
            [""; 0]
        );
        assert_eq!(found(lib, "\nunsafe {}"), ["src/a.rs:2: `unsafe` does not belong here"]);
        let bare = lib.replace("#[forbid(unsafe_code)]", "");
        assert_eq!(found(&bare, ""), ["src/a.rs:1: needs `forbid(unsafe_code)`"]);
        let open = lib.replace("#![deny(unsafe_code)]", "");
        assert_eq!(found(&open, ""), ["src/lib.rs:1: needs `deny(unsafe_code)`"]);
        let compat = [("compat/src/lib.rs", "//! Bridges.")];
        let finding = "compat/src/lib.rs:1: needs `forbid(unsafe_code)`";
        assert_eq!(unsafe_code(&project(&compat), &["src/sys/"]), [finding]);
    }

    #[test]
    fn a_file_without_a_declaration_and_a_declaration_without_a_file_are_found() {
        let files = [("src/lib.rs", "\nmod a;"), ("src/b.rs", ""), ("src/c/tests.rs", "")];
        assert_eq!(
            module_files(&project(&files)),
            [
                "src/lib.rs:2: `mod a` has no file",
                "src/b.rs:1: no `mod` leads to this file",
                "src/c/tests.rs:1: no `mod` leads to this file",
            ]
        );
    }

    #[test]
    fn an_unsafe_block_without_its_comment_is_found() {
        let found = |text: &str| safety_comments(&project(&[("src/sys/a.rs", text)])).len();
        assert_eq!(found("// SAFETY: a fact\n// in two lines.\nlet x =\n    unsafe { y() };\n"), 0);
        assert_eq!(found("// SAFETY: a fact.\n#[rustfmt::skip]\nunsafe impl Send for X {}\n"), 0);
        assert_eq!(found("unsafe fn f() {}\ntype F = unsafe extern \"C\" fn();\n"), 0);
        assert_eq!(found("let x = unsafe { y() };\n"), 1);
        assert_eq!(found("// SAFETY: a fact.\nlet x = 1;\nunsafe { y() };\n"), 1);
        assert_eq!(found("// SAFETY: a fact.\n\nunsafe impl Send for X {}\n"), 1);
    }

    #[test]
    fn what_is_too_long_or_too_wide_is_found() {
        let limits = Sizes { file_lines_max: 5, function_lines_max: 3, columns_max: 20 };
        let found = |text: &str| sizes(&project(&[("src/a.rs", text)]), &limits);
        assert_eq!(found("fn f() {\n}\n#[cfg(test)]\nmod t {\n\n\n\n}\n"), [""; 0]);
        assert_eq!(found("\n\n\n\n\n\n"), ["src/a.rs:1: 6 lines"]);
        assert_eq!(found("fn f(a: [u8; 3]) {\n\n\n}\n"), ["src/a.rs:1: fn f: 4 lines"]);
        assert_eq!(found("// 345678901234567890+\n"), ["src/a.rs:1: 22 columns"]);
        assert_eq!(found("// https://example.org/\n"), [""; 0]);
    }

    #[test]
    fn what_is_unfinished_is_found_outside_of_tests_only() {
        let found = |text: &str| unfinished(&project(&[("src/a.rs", text)])).len();
        for bad in ["// TODO", "/// FIXME", "todo!()", "unimplemented!()", "let x = y.unwrap();"] {
            assert_eq!(found(bad), 1, "{bad}");
            assert_eq!(found(&format!("#[cfg(test)]\nmod tests {{\n{bad}\n}}\n")), 0, "{bad}");
        }
        assert_eq!(found("/// `x.unwrap()` in an example\n"), 0);
        assert_eq!(unfinished(&project(&[("compat/tests/a.rs", "x.unwrap()")])), [""; 0]);
        let declared = ["#[cfg(test)]\nmod a;", "mod a;"].map(|lib| {
            unfinished(&project(&[("src/lib.rs", lib), ("src/a.rs", "x.unwrap()")])).len()
        });
        assert_eq!(declared, [0, 1]);
    }

    #[test]
    fn a_file_without_its_docs_is_found() {
        assert_eq!(module_docs(&project(&[("src/a.rs", "use std::io;\n//! late")])).len(), 1);
        assert_eq!(module_docs(&project(&[("src/a.rs", "//! What it owns.\n")])), [""; 0]);
    }

    #[test]
    fn an_example_without_its_command_is_found() {
        let found = |text: &str| example_commands(&project(&[("examples/echo.rs", text)])).len();
        assert_eq!(found("// cargo run --release --example echo -- 127.0.0.1:80\n"), 0);
        assert_eq!(found("// cargo run --example echoes\n"), 1);
        assert_eq!(found("//! An echo server.\n"), 1);
    }

    #[test]
    fn a_readme_or_a_script_that_begins_otherwise_is_found() {
        let found = |readme: &str, script: &str| {
            let files = [("README.md", readme), (".ci/run", script)];
            first_commands(&project(&files), &["cargo run", "cargo test"], "cargo test").len()
        };
        let readme = "# x\n\n```sh\ncargo run\n```\n\nthen\n\n```sh\ncargo test\n```\n";
        assert_eq!(
            found(readme, "#!/bin/bash\n# cargo fmt\nstage tests cargo test\ncargo fmt\n"),
            0
        );
        assert_eq!(found(readme, "cargo fmt\ncargo test\n"), 1);
        assert_eq!(found(&readme.replace("cargo test", "cargo test --all"), "cargo test"), 1);
        assert_eq!(found("```rust\nfn main() {}\n```\n\n```sh\ncargo run\n```", "cargo test"), 1);
    }
}
