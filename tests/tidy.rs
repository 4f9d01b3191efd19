//! The layout of the project, checked: which module imports which, where `unsafe` stands, how long
//! files and functions are, and which commands the README promises. The rules are the tables below.
//! `tidy/rules.rs` applies them, and its tests show that each rule can fail.

#[path = "tidy/modules.rs"]
mod modules;
#[path = "tidy/rules.rs"]
mod rules;
#[path = "tidy/source.rs"]
mod source;

use std::path::Path;

use rules::{ImportTable, Sizes};
use source::Project;

/// Which module may import which. `lib.rs` holds the re-exports and is not checked. A name that a
/// module re-exports counts as a name of the module that defines it.
///
/// A module that calls one above it declares a trait, which the upper module implements:
/// `sys::Sink` and `task::Watched` (implemented by `poller`), `poller::Endpoint` and `task::Start`
/// (by `connection`), `poller::Accept`, `poller::Watcher` and `connection::Hooks` (by `server`).
const IMPORTS: ImportTable = ImportTable {
    leaves: &[
        "sync",
        "error",
        "config",
        "address",
        "threads",
        "counters",
        "random",
        "clock",
        "spin",
        "user_code",
    ],
    modules: &[
        ("sync", &[]),
        ("error", &[]),
        ("config", &["error"]),
        ("address", &["error"]),
        ("threads", &["error"]),
        ("counters", &[]),
        ("random", &[]),
        ("clock", &[]),
        ("spin", &["config"]),
        ("user_code", &[]),
        ("buffer", &[]),
        ("task", &[]),
        ("sys", &["buffer::block", "buffer::pool", "buffer::chain"]),
        ("poller", &["sys", "buffer", "task"]),
        // The last four are types in the signatures of `poller::Endpoint`.
        (
            "connection",
            &[
                "poller",
                "buffer",
                "task",
                "sys::socket",
                "sys::Token",
                "sys::Flow",
                "sys::Outlet",
                "sys::Received",
                "sys::Completion",
            ],
        ),
        ("pollers", &["connection", "poller"]),
        (
            "server",
            &[
                "pollers",
                "connection",
                "poller",
                "task",
                "sys::socket",
                "sys::time_slice",
                "sys::usage",
            ],
        ),
        ("dial", &["pollers", "connection", "poller", "task", "sys::socket"]),
        ("mux", &["connection", "buffer", "task"]),
        ("copy", &["connection"]),
        ("rpc", &["buffer", "connection", "dial", "poller", "task"]),
        ("blocking", &["connection", "buffer", "dial"]),
    ],
};

/// Where `unsafe` may stand. Every other file of the library, its bridges and its bench program
/// forbids it. The bench program has a minimal io_uring loop of its own, for comparison.
const UNSAFE: [&str; 3] = ["src/sys/", "src/buffer/block.rs", "bench/src/peers/ring.rs"];

const SIZES: Sizes = Sizes { file_lines_max: 500, function_lines_max: 70, columns_max: 100 };

/// The first commands of the README, in this order. The second runs the tests.
const FIRST_COMMANDS: [&str; 2] =
    ["cargo run --release -p ringpoll-bench -- compare --quick", "cargo test --workspace"];

#[test]
fn every_module_imports_only_what_the_table_allows() {
    holds(|project| rules::imports(project, &IMPORTS));
}

#[test]
fn every_declaration_has_its_file_and_every_file_its_declaration() {
    holds(rules::module_files);
}

#[test]
fn no_file_of_the_library_is_compiled_twice() {
    holds(rules::borrowed_files);
}

#[test]
fn unsafe_stands_where_it_may_and_is_forbidden_elsewhere() {
    holds(|project| rules::unsafe_code(project, &UNSAFE));
}

#[test]
fn every_unsafe_block_says_why_it_is_sound() {
    holds(rules::safety_comments);
}

#[test]
fn files_functions_and_lines_fit() {
    holds(|project| rules::sizes(project, &SIZES));
}

#[test]
fn nothing_is_left_unfinished() {
    holds(rules::unfinished);
}

#[test]
fn every_file_begins_with_its_docs() {
    holds(rules::module_docs);
}

#[test]
fn every_example_begins_with_its_command() {
    holds(rules::example_commands);
}

#[test]
fn the_first_page_and_the_check_begin_with_the_promised_commands() {
    let [_, test_command] = FIRST_COMMANDS;
    holds(|project| rules::first_commands(project, &FIRST_COMMANDS, test_command));
}

fn holds(rule: impl Fn(&Project) -> Vec<String>) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let project = Project::load(root).expect("the sources are readable text");
    assert!(project.source("src/lib.rs").is_some(), "no sources below {}", root.display());
    let findings = rule(&project);
    assert!(findings.is_empty(), "{} findings:\n{}\n", findings.len(), findings.join("\n"));
}
