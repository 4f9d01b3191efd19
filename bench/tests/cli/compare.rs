//! `compare`: what it writes, and that nothing a candidate does ends it.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::Stdio;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::harness::*;

#[test]
fn a_comparison_ends_with_json_and_one_page() {
    let out = fresh_dir("compare");
    let dir = out.to_str().unwrap();
    let output = run(&[
        &[
            "compare",
            "--connections",
            "2",
            "--rounds",
            "2",
            "--duration",
            "30ms",
            "--backends",
            "epoll,auto",
            "--placements",
            "inline,pool",
            "--serve-arg=--poll=never",
            "--peers",
            "tokio,tokio-ws,bare-epoll",
        ][..],
        &["--idle", "20", "--idle-window", "20ms", "--out", dir],
    ]
    .concat());
    assert!(output.status.success(), "{}", text(&output.stderr));
    let found: Value =
        serde_json::from_slice(&fs::read(out.join("compare.json")).unwrap()).unwrap();
    let cells = found["cells"].as_array().unwrap();
    let names: Vec<_> = cells.iter().map(|cell| cell["cell"]["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["2 × 1", "4 × 64", "100 × 1", "100 × 1 + 400 idle"]);
    for row in cells.iter().flat_map(|cell| cell["rows"].as_array().unwrap()) {
        assert_eq!(row["failure"], Value::Null);
        assert_eq!(row["rounds"].as_array().unwrap().len(), 2, "{row}");
        assert!(row["summary"]["rps"]["median"].as_f64().unwrap() > 0.0);
    }
    let candidates = found["candidates"].as_array().unwrap();
    assert!(candidates.contains(&"ringpoll auto inline --poll=never".into()), "{candidates:?}");
    assert_eq!(found["idle"].as_array().unwrap().len(), candidates.len());
    assert!(found["goals"].as_array().unwrap().len() >= 8);
    let page = fs::read_to_string(out.join("compare.html")).unwrap();
    assert!(page.contains("<svg") && page.contains("ringpoll epoll inline"));
    let links = page.replace("http://www.w3.org/2000/svg", "");
    assert!(
        !links.contains("http") && !links.contains("<script"),
        "the page is not self-contained"
    );
    assert!(text(&output.stdout).contains("ringpoll epoll pool"));
}

#[test]
fn http_servers_that_are_missing_are_named_in_one_line() {
    let line = refused(&["compare", "--scenario", "http", "--examples", "/nowhere"]);
    for wanted in ["GET /json", "gRPC unary", "/nowhere/axum_app is missing"] {
        assert!(line.contains(wanted), "{wanted} is not in {line}");
    }
}

#[test]
fn the_scenario_heavy_is_compared_at_one_rate_for_all() {
    let out = fresh_dir("heavy");
    let output = run(&[
        &["compare", "--scenario", "heavy", "--rounds", "2", "--duration", "60ms"][..],
        &["--backends", "auto", "--peers", "tokio-ws,tokio-per-cpu", "--rate", "1500"],
        &["--out", out.to_str().unwrap()],
    ]
    .concat());
    assert!(output.status.success(), "{}", text(&output.stderr));
    let found: Value =
        serde_json::from_slice(&fs::read(out.join("compare.json")).unwrap()).unwrap();
    let cells = found["cells"].as_array().unwrap();
    let questions: Vec<_> =
        cells.iter().map(|cell| cell["cell"]["question"].as_str().unwrap()).collect();
    assert_eq!(questions, ["few_heavy", "all_heavy", "all_long", "all_cheap", "fairness"]);
    let mut cheap = 0;
    for cell in cells {
        let few = cell["cell"]["question"] == "few_heavy";
        assert_eq!(cell["cell"]["rate"].as_f64(), few.then_some(1500.0), "{cell}");
        let rows = cell["rows"].as_array().unwrap();
        assert_eq!(rows.len(), 5, "{cell}");
        for row in rows {
            assert_eq!(row["failure"], Value::Null, "{row}");
            let rounds = row["rounds"].as_array().unwrap();
            assert_eq!(rounds.len(), 2, "{row}");
            let heavy = |round: &Value| round["heavy_requests"].as_u64().unwrap();
            let requests = |round: &Value| round["requests"].as_u64().unwrap();
            match cell["cell"]["question"].as_str().unwrap() {
                "all_heavy" | "all_long" => {
                    assert!(rounds.iter().all(|one| heavy(one) == requests(one)))
                }
                "few_heavy" => {
                    cheap += rounds.iter().map(|one| requests(one) - heavy(one)).sum::<u64>()
                }
                _ => assert!(rounds.iter().all(|one| heavy(one) == 0)),
            }
            assert!(row["summary"]["windows"].as_u64() >= Some(2), "{row}");
        }
    }
    assert!(cheap > 0, "every request of few was heavy");
    assert_eq!(found["goals"].as_array().unwrap().len(), 5);
    let page = fs::read_to_string(out.join("compare.html")).unwrap();
    assert!(page.contains("1500 requests/s offered to each server"));
    let said = text(&output.stdout);
    for wanted in ["tokio-ws: tokio 1.", "windows left out", "1500 requests/s offered to each"] {
        assert!(said.contains(wanted), "{wanted} is not in {said}");
    }
}

#[test]
fn the_rate_is_found_where_none_is_given() {
    let out = fresh_dir("rate");
    let output = run(&[
        &["compare", "--scenario", "heavy", "--rounds", "1", "--duration", "30ms"][..],
        &["--backends", "epoll", "--placements", "inline", "--peers", "tokio-ws"],
        &["--out", out.to_str().unwrap()],
    ]
    .concat());
    assert!(output.status.success(), "{}", text(&output.stderr));
    let found: Value =
        serde_json::from_slice(&fs::read(out.join("compare.json")).unwrap()).unwrap();
    let rate = found["cells"][0]["cell"]["rate"].as_f64();
    assert!(rate > Some(0.0), "{rate:?}");
    assert!(text(&output.stdout).contains(&format!("{:.0} requests/s offered", rate.unwrap())));
}

#[test]
fn a_candidate_that_fails_is_a_row_that_says_so() {
    let out = fresh_dir("failing");
    let dir = out.to_str().unwrap();
    let output = run(&[
        &["compare", "--quick", "--connections", "2", "--size", "4k", "--frame-max", "1k"][..],
        &["--idle", "0", "--depth", "1", "--out", dir, "--peers", "tokio,bare-epoll"],
        &["--backends", "epoll"],
    ]
    .concat());
    assert!(output.status.success(), "{}", text(&output.stderr));
    let found: Value =
        serde_json::from_slice(&fs::read(out.join("compare.json")).unwrap()).unwrap();
    let rows = found["cells"][0]["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 3);
    for row in rows {
        assert!(row["failure"].as_str().unwrap().contains("connection"), "{row}");
    }
    assert!(text(&output.stdout).contains("failed after 0 rounds"));
}

#[test]
fn a_candidate_that_cannot_start_does_not_end_the_comparison() {
    let out = fresh_dir("unstartable");
    let output = run(&[
        &["compare", "--connections", "1,2", "--depth", "1", "--rounds", "2"][..],
        &["--duration", "20ms", "--idle", "10", "--idle-window", "10ms", "--peers", ""],
        // No buffer at all is what the library refuses when the server starts.
        &["--backends", "auto", "--placements", "inline", "--serve-arg=--ring-buffers=0,1"],
        &["--out", out.to_str().unwrap()],
    ]
    .concat());
    assert!(output.status.success(), "{}", text(&output.stderr));
    let said = text(&output.stdout);
    let lines: Vec<_> = said.lines().filter(|line| line.contains("failed after")).collect();
    // Once, however often it was tried.
    assert_eq!(lines.len(), 1, "{said}");
    assert!(lines[0].contains("--ring-buffers=0,1") && lines[0].contains("1 × 1; 2 × 1"), "{said}");
    let found: Value =
        serde_json::from_slice(&fs::read(out.join("compare.json")).unwrap()).unwrap();
    for cell in found["cells"].as_array().unwrap() {
        assert_eq!(cell["rows"][0]["rounds"].as_array().unwrap().len(), 2, "{cell}");
        assert!(cell["rows"][1]["failure"].as_str().unwrap().contains("receive buffers"), "{cell}");
    }
}

#[test]
fn a_report_that_cannot_be_written_is_refused_before_measuring() {
    let file = fresh_dir("file").join("taken");
    fs::write(&file, "").unwrap();
    let line = refused(&["compare", "--out", file.to_str().unwrap()]);
    assert!(line.contains("taken"), "{line}");
}

#[test]
fn a_server_by_address_joins_a_comparison_with_what_its_process_uses() {
    let known = Server::start(&["peer", "tokio", "--addr", "127.0.0.1:0"]);
    let unknown = Server::start(&["peer", "bare-epoll", "--addr", "127.0.0.1:0"]);
    let out = fresh_dir("external");
    let (first, second) = (format!("first={}", known.addr), format!("second={}", unknown.addr));
    let output =
        run(
            &[
                &[
                    "compare",
                    "--scenario",
                    "echo,idle,rates",
                    "--connections",
                    "2",
                    "--rounds",
                    "2",
                ][..],
                &[
                    "--duration",
                    "30ms",
                    "--idle",
                    "20",
                    "--idle-window",
                    "20ms",
                    "--backends",
                    "epoll",
                ],
                &["--placements", "inline", "--peers", "", "--peer", &first, "--peer", &second],
                &["--peer-pid", &known.child.id().to_string(), "--out", out.to_str().unwrap()],
            ]
            .concat(),
        );
    assert!(output.status.success(), "{}", text(&output.stderr));
    let found = report(&out);
    for cell in found["cells"].as_array().unwrap() {
        let rows = cell["rows"].as_array().unwrap();
        let names: Vec<_> = rows.iter().map(|row| row["candidate"].as_str().unwrap()).collect();
        assert_eq!(names, ["ringpoll epoll inline", "first", "second"]);
        for row in rows {
            assert_eq!(row["failure"], Value::Null, "{row}");
            let is_known = row["candidate"] != "second";
            assert_eq!(row["summary"]["per_cpu_s"].is_object(), is_known, "{row}");
            assert_eq!(row["summary"]["rss_bytes"].is_object(), is_known, "{row}");
        }
    }
    let idle = found["idle"].as_array().unwrap();
    assert_eq!(idle.len(), 2, "{idle:?}");
    assert!(idle.iter().all(|row| row["failure"].is_null()), "{idle:?}");
    // They go on serving afterwards.
    known.stop(Signal::TERM);
    unknown.stop(Signal::TERM);
}

#[test]
fn a_server_by_address_that_is_not_there_is_refused() {
    let server = Server::start(&["peer", "tokio", "--addr", "127.0.0.1:0"]);
    let pid = server.child.id().to_string();
    let named = format!("other={}", server.addr);
    let gone = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let gone = format!("gone={gone}");
    for (args, wanted) in [
        (vec!["--peer", &gone], "gone"),
        (vec!["--peer", "nowhere"], "nowhere"),
        (vec!["--peer", "tokio=127.0.0.1:1"], "tokio"),
        (vec!["--peer", &named, "--peer", &named], "twice"),
        (vec!["--peer-pid", &pid], "1 for 0"),
        (vec!["--peer", &named, "--peer-pid", "4194305"], "4194305"),
        (vec!["--against", "/dev/null"], "/dev/null"),
        (vec!["--against", "nowhere.json"], "nowhere.json"),
        (vec!["--scenario", "echoes"], "echoes"),
        (vec!["--rate", "5"], "heavy"),
        (vec!["--scenario", "heavy", "--connections", "5"], "echo"),
        (vec!["--server-cpus", "900"], "900"),
    ] {
        let line = refused(&[&["compare"], &args[..]].concat());
        assert!(line.contains(wanted), "{args:?}: {line}");
    }
}

#[test]
fn an_interrupt_keeps_what_was_measured() {
    let out = fresh_dir("interrupted");
    let args = ["compare", "--connections", "2", "--depth", "1", "--rounds", "1000"];
    let more = ["--duration", "20ms", "--idle", "0", "--backends", "epoll", "--peers", ""];
    let mut child = program()
        .args(args)
        .args(more)
        .args(["--placements", "inline", "--out", out.to_str().unwrap()])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    while !line.starts_with("round 2 of 1000") {
        line.clear();
        assert!(said.read_line(&mut line).unwrap() > 0, "it ended too soon");
    }
    let rest = collect(said);
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    let status = wait(&mut child).expect("the comparison hangs");
    assert_eq!(status.code(), Some(130));
    assert!(text(&rest.join().unwrap()).contains("interrupted"));
    let found = report(&out);
    let row = &found["cells"][0]["rows"][0];
    let rounds = row["rounds"].as_array().unwrap().len();
    assert!((2..1000).contains(&rounds), "{rounds}");
    assert!(row["failure"].is_null() && row["summary"].is_object(), "{row}");
    assert!(found["notes"].to_string().contains("interrupted"), "{}", found["notes"]);
}

#[test]
fn sizes_and_streams_are_rows() {
    let out = fresh_dir("sizes");
    let output = run(&[
        &["compare", "--scenario", "stream,sizes", "--rounds", "1", "--duration", "20ms"][..],
        &["--backends", "epoll", "--peers", "tokio", "--out", out.to_str().unwrap()],
    ]
    .concat());
    assert!(output.status.success(), "{}", text(&output.stderr));
    let found = report(&out);
    let cells = found["cells"].as_array().unwrap();
    let bytes: Vec<_> =
        cells.iter().map(|cell| cell["cell"]["payload_bytes"].as_u64().unwrap()).collect();
    assert_eq!(bytes, [65536, 262144, 1048576, 64, 1024, 4096, 16384, 65536]);
    for row in cells.iter().flat_map(|cell| cell["rows"].as_array().unwrap()) {
        assert!(row["failure"].is_null(), "{row}");
    }
    assert_eq!(found["idle"].as_array().unwrap().len(), 0);
}

#[test]
fn a_second_run_is_held_against_the_first() {
    let out = fresh_dir("against");
    let dir = out.to_str().unwrap();
    let args = ["compare", "--scenario", "echo", "--connections", "2", "--depth", "1"];
    let more = ["--rounds", "3", "--duration", "20ms", "--backends", "epoll", "--peers", "tokio"];
    let first = [&args[..], &more, &["--out", dir]].concat();
    assert!(run(&first).status.success());
    let earlier = out.join("compare.json");
    let output = run(&[&first[..], &["--against", earlier.to_str().unwrap()]].concat());
    assert!(output.status.success(), "{}", text(&output.stderr));
    let notes = report(&out)["notes"].to_string();
    assert!(notes.contains(" of 3 rows overlap"), "{notes}");
}

fn report(dir: &Path) -> Value {
    serde_json::from_slice(&fs::read(dir.join("compare.json")).unwrap()).unwrap()
}
