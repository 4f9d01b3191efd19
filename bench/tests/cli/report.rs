//! The files of a report as their readers meet them: whole or not there, and nobody else's lost.
//! No test depends on how fast the host is.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use crate::harness::*;

#[test]
fn a_file_of_somebody_else_is_refused_before_measuring_and_left_as_it_is() {
    for command in ["compare", "article"] {
        for (extension, foreign) in [
            ("json", r#"{"cells": [1, 2], "host": "mine"}"#),
            ("json", ""),
            ("json", r#"{"program": "another", "host": 1, "settings": 2, "cells": 3}"#),
            ("html", "<title>my page about ringpoll-bench</title>"),
        ] {
            let out = fresh_dir(&format!("foreign-{command}"));
            let file = out.join(command).with_extension(extension);
            fs::write(&file, foreign).unwrap();
            let line = refused(&[command, "--out", out.to_str().unwrap()]);
            assert!(line.contains(file.to_str().unwrap()), "{line}");
            assert_eq!(fs::read_to_string(&file).unwrap(), foreign);
            assert_eq!(names(&out).len(), 1, "nothing is left beside it");
        }
    }
}

#[test]
fn what_is_no_regular_file_is_refused() {
    let out = fresh_dir("irregular");
    std::os::unix::fs::symlink("/dev/full", out.join("compare.json")).unwrap();
    let line = refused(&["compare", "--out", out.to_str().unwrap()]);
    assert!(line.contains("not a regular file"), "{line}");
    let out = fresh_dir("irregular-dir");
    fs::create_dir(out.join("article.html")).unwrap();
    let line = refused(&["article", "--out", out.to_str().unwrap()]);
    assert!(line.contains("not a regular file"), "{line}");
}

#[test]
fn a_directory_nobody_may_write_to_is_refused_before_measuring() {
    // Not even root creates a file there.
    let line = refused(&["compare", "--out", "/proc/self"]);
    assert!(line.contains("/proc/self"), "{line}");
    refused(&["article", "--out", "/proc/self"]);
}

#[test]
fn a_report_replaces_an_older_one_and_says_who_wrote_it() {
    let out = fresh_dir("replaced");
    // As they were before there was a marker.
    let old = json!({ "host": {}, "settings": {}, "cells": [] }).to_string();
    fs::write(out.join("compare.json"), old).unwrap();
    fs::write(out.join("compare.html"), "<title>ringpoll-bench compare</title>").unwrap();
    for _ in 0..2 {
        let output = run(&short_compare(&out));
        assert!(output.status.success(), "{}", text(&output.stderr));
    }
    assert_eq!(names(&out), ["compare.html", "compare.json", "compare.md"]);
    let found: Value =
        serde_json::from_slice(&fs::read(out.join("compare.json")).unwrap()).unwrap();
    assert_eq!(found["program"], "ringpoll-bench");
    let command_line = found["command_line"].as_str().unwrap();
    assert!(command_line.starts_with("ringpoll-bench compare --connections 1,2"), "{command_line}");
    let page = fs::read_to_string(out.join("compare.html")).unwrap();
    assert!(page.contains("<meta name=\"generator\" content=\"ringpoll-bench "), "no marker");
}

#[test]
fn a_report_that_does_not_fit_on_the_disk_leaves_the_one_before() {
    let out = fresh_dir("full");
    let old = json!({ "program": "ringpoll-bench" }).to_string();
    fs::write(out.join("compare.json"), &old).unwrap();
    let mut shell = Command::new("sh");
    // A file that may not grow beyond this fails like one on a full disk, and not by the signal.
    shell.args(["-c", "trap '' XFSZ; ulimit -f 2; exec \"$0\" \"$@\"", PROGRAM]);
    let output = shell.args(short_compare(&out)).output().unwrap();
    let error = text(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{error}");
    let lines: Vec<_> = error.lines().filter(|line| line.contains("ringpoll-bench: ")).collect();
    assert_eq!(lines.len(), 1, "{error}");
    assert!(lines[0].contains("write ") && lines[0].contains("compare.json"), "{error}");
    assert_eq!(fs::read_to_string(out.join("compare.json")).unwrap(), old);
    assert_eq!(names(&out), ["compare.json"]);
}

#[test]
fn a_page_stands_alone_and_has_every_figure_in_words_too() {
    let out = fresh_dir("page");
    let output = run(&short_compare(&out));
    assert!(output.status.success(), "{}", text(&output.stderr));
    let page = fs::read_to_string(out.join("compare.html")).unwrap();
    let links = page.replace("http://www.w3.org/2000/svg", "");
    for foreign in ["http", "<script", "<link", "src=", "url(", "@import", "{%", "{{"] {
        assert!(!links.contains(foreign), "{foreign} is in the page");
    }
    for wanted in [
        "Latency by percentile",
        "Requests per CPU-second of the server",
        "System calls per request",
        "P90 µs",
        "P99.9 µs",
        "CPU flaws",
        "clock source",
        "io_uring features",
        "ringpoll-bench peer tokio",
        "ringpoll-bench compare --connections 1,2",
    ] {
        assert!(page.contains(wanted), "{wanted} is not in the page");
    }
    let count = |what: &str| page.matches(what).count();
    assert_eq!(count("role=\"img\""), count("<desc>"));
    // Each table has a caption, each drawing of a row a title.
    assert_eq!(count("<table"), count("<caption>"));
    assert_eq!(count("<figure"), count("role=\"img\"><title>"));
    assert!(count("<figure") >= 10, "{} drawings", count("<figure"));
    assert_eq!(count("<th"), count("<thead") + count("<th scope="));
}

#[test]
fn every_round_has_a_curve_and_every_row_its_median() {
    let out = fresh_dir("curve");
    let output = run(&short_compare(&out));
    assert!(output.status.success(), "{}", text(&output.stderr));
    let found: Value =
        serde_json::from_slice(&fs::read(out.join("compare.json")).unwrap()).unwrap();
    let cells = found["cells"].as_array().unwrap();
    for row in cells.iter().flat_map(|cell| cell["rows"].as_array().unwrap()) {
        let summary = &row["summary"];
        let curves = row["rounds"].as_array().unwrap().iter().chain([summary]);
        for one in curves {
            let curve: Vec<(f64, f64)> =
                serde_json::from_value(one["latency_curve"].clone()).unwrap();
            assert!(curve.len() >= 2, "{one}");
            assert!(curve.is_sorted_by(|a, b| a.0 < b.0 && a.1 <= b.1), "{curve:?}");
            assert_eq!(curve.last().unwrap().0, 100.0);
        }
        for figure in ["p50_us", "p90_us", "p99_us", "p999_us"] {
            assert!(summary[figure]["median"].as_f64() > Some(0.0), "{figure} of {summary}");
        }
    }
    let host = &found["host"];
    assert!(host["memory_bytes"].as_u64() > Some(0), "{host}");
    assert_eq!(host["rings"]["sqpoll"], ringpoll::capabilities().sqpoll);
    let servers = found["servers"].as_array().unwrap();
    assert_eq!(servers.len(), found["candidates"].as_array().unwrap().len());
}

/// Two numbers of connections, so that there is a line over them.
fn short_compare(out: &Path) -> Vec<String> {
    let fixed = [
        &["compare", "--connections", "1,2", "--depth", "1", "--rounds", "2"][..],
        &["--duration", "20ms", "--idle", "10", "--idle-window", "10ms", "--backends", "epoll"],
        &["--placements", "inline", "--peers", "tokio,bare-epoll", "--out"],
    ];
    let args = fixed.concat().into_iter().map(str::to_owned);
    args.chain([out.to_str().unwrap().to_owned()]).collect()
}

fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).unwrap();
    let mut names: Vec<_> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}
