//! `article --addr` and `serve --stats`: servers that somebody else has started.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::Path;
use std::process::Output;

use rustix::process::Signal;
use serde_json::Value;

use crate::harness::*;

#[test]
fn servers_elsewhere_are_measured_by_what_they_tell() {
    if ringpoll::capabilities().tier.is_none() {
        return println!("left out: no io_uring");
    }
    let [epoll, quiet] = ["epoll", "hybrid"].map(|backend| telling(backend, "pool"));
    let polling = telling("uring", "pool");
    let hybrid = format!("hybrid={}", quiet.addr);
    let out = fresh_dir("article-elsewhere");
    let output = article(&[stats_addr(&epoll), &hybrid, stats_addr(&polling)], &out, "30ms");
    assert!(output.status.success(), "{}", text(&output.stderr));
    let found = article_report(&out);
    assert_eq!(found["settings"]["network"], "elsewhere");
    let numbers: Vec<_> = found["experiments"].as_array().unwrap().iter().collect();
    assert_eq!(numbers.len(), 2, "the first one has inline servers only");
    for row in article_rows(&found) {
        assert_eq!(row["failure"], Value::Null, "{row}");
        let tells = !row["candidate"].as_str().unwrap().contains("hybrid");
        for figure in ["per_cpu_s", "server_cpus_busy", "rss_bytes", "system_calls_per_request"] {
            assert_eq!(row["rounds"][0][figure].is_number(), tells, "{figure}: {row}");
        }
    }
    let claims = found["experiments"][0]["claims"].as_array().unwrap();
    let hybrid = claims.iter().find(|one| one["figure"] == "p99").unwrap();
    assert!(hybrid["found"]["median"].is_number() && hybrid["article"] == "≈ 1", "{hybrid}");
    let said = text(&output.stdout);
    for wanted in [
        "Experiment 1: left out, without ringpoll epoll inline, ringpoll uring inline.",
        &format!("ringpoll hybrid pool at {}: tells nothing of itself", quiet.addr),
        "The servers were not started for each measurement",
        "Client on CPU",
    ] {
        assert!(said.contains(wanted), "{wanted} is not in {said}");
    }
    // It was asked, so it counted: those who are not measured are left alone.
    let counters = epoll.stop(Signal::TERM);
    assert!(counters["handler_runs"].as_u64() > Some(0), "{counters}");
    let counters = polling.stop(Signal::TERM);
    assert_eq!((&counters["cut"], &counters["handler_errors"]), (&0.into(), &0.into()));
}

#[test]
fn a_server_elsewhere_that_dies_is_a_row_that_says_so() {
    let mut dying = telling("epoll", "pool");
    let addr = stats_addr(&dying).to_owned();
    let out = fresh_dir("article-dying");
    // It ends only by the death of the server.
    let running = {
        let (addr, out) = (addr.clone(), out.clone());
        std::thread::spawn(move || article(&[&addr], &out, "10m"))
    };
    until(|| (ask(&addr)["counters"]["handler_runs"].as_u64() > Some(100)).then_some(()));
    dying.child.kill().unwrap();
    let output = running.join().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    let found = article_report(&out);
    assert_eq!(article_rows(&found).count(), 2);
    for row in article_rows(&found) {
        let failure = row["failure"].as_str().unwrap();
        assert!(failure.contains("connect") || failure.contains("lost"), "{failure}");
    }
    assert!(text(&output.stdout).contains("failed after 0 rounds"));
}

#[test]
fn one_bad_server_elsewhere_does_not_end_the_others() {
    let epoll = telling("epoll", "pool");
    let broken = scripted(|mut stream| drop(stream.read(&mut [0; 16])));
    let out = fresh_dir("article-broken");
    let broken = format!("uring={broken}");
    let output = article(&[stats_addr(&epoll), &broken], &out, "30ms");
    assert!(output.status.success(), "{}", text(&output.stderr));
    let found = article_report(&out);
    let rows = found["experiments"][1]["cells"][0]["rows"].as_array().unwrap();
    assert_eq!((&rows[0]["failure"], rows.len()), (&Value::Null, 2));
    assert!(rows[1]["failure"].as_str().unwrap().contains("connection"), "{}", rows[1]);
}

#[test]
fn stats_that_stop_coming_end_the_row_and_not_the_patience() {
    let epoll = telling("epoll", "inline");
    let first = ask(stats_addr(&epoll)).to_string();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap().to_string();
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(first.as_bytes()).unwrap();
        drop(stream);
        // Whoever asks again waits.
        let waiting: Vec<_> = listener.incoming().collect();
        drop(waiting);
    });
    let out = fresh_dir("article-silent");
    let output = article(&[&addr], &out, "30ms");
    assert!(output.status.success(), "{}", text(&output.stderr));
    let found = article_report(&out);
    let row = article_rows(&found).next().unwrap();
    assert!(row["failure"].as_str().unwrap().contains("no line as of serve --stats"), "{row}");
}

#[test]
fn an_address_without_a_server_is_refused() {
    let server = telling("epoll", "pool");
    let (addr, stats) = (server.addr.as_str(), stats_addr(&server));
    let out = fresh_dir("article-refused");
    let refused = |addrs: &[&str], more: &[&str]| {
        let given = addrs.iter().flat_map(|addr| ["--addr", addr]);
        let args = ["article", "--out", out.to_str().unwrap()];
        let args: Vec<_> = args.into_iter().chain(given).chain(more.iter().copied()).collect();
        crate::harness::refused(&args)
    };
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    for nobody in [free.to_string(), format!("epoll={free}")] {
        let line = refused(&[stats, &nobody], &[]);
        assert!(line.contains(&nobody) && line.contains("refused"), "{line}");
    }
    let line = refused(&[addr], &[]);
    assert!(line.contains(addr) && line.contains("no line as of serve --stats"), "{line}");
    let line = refused(&[&format!("hybrid/inline={addr}")], &[]);
    assert!(line.contains("hybrid inline is in no experiment: epoll inline, uring"), "{line}");
    let line = refused(&[stats, &format!("epoll={addr}")], &[]);
    assert!(line.contains("is there already"), "{line}");
    for wrong in ["nowhere", "epoll=nowhere", "kqueue=127.0.0.1:1", "epoll/there=127.0.0.1:1"] {
        let line = refused(&[wrong], &[]);
        assert!(line.contains(wrong), "{line}");
    }
    for useless in [&["--namespaces"][..], &["--poll", "always"], &["--server-cpus", "0"]] {
        let line = refused(&[stats], useless);
        assert!(line.contains(useless[0]) && line.contains("--addr"), "{line}");
    }
}

#[test]
fn commands_for_two_hosts_are_printed_and_nothing_else_is_done() {
    let output = run(&["article", "--commands", "server.example", "--out", "/dev/null/none"]);
    assert!(output.status.success() && output.stderr.is_empty(), "{}", text(&output.stderr));
    let said = text(&output.stdout);
    assert_eq!(said.matches("ringpoll-bench serve --backend=").count(), 10, "{said}");
    for wrong in ["a b", "host:80", ""] {
        refused(&["article", "--commands", wrong]);
    }
    refused(&["article", "--commands", "a", "--addr", "127.0.0.1:1"]);
}

#[test]
fn a_server_tells_where_it_tells_of_itself() {
    let server = telling("epoll", "inline");
    let found = ask(stats_addr(&server));
    let about = &found["about"];
    assert_eq!((&about["backend"], &about["placement"]), (&"epoll".into(), &"inline".into()));
    assert_eq!(about["addr"], server.addr);
    assert!(found["cpu"]["threads_ns"].as_u64() > Some(0), "{found}");
    assert!(found["counters"]["system_calls"].is_u64(), "{found}");
    let serve = |stats| ["serve", "--addr", "127.0.0.1:0", "--stats", stats];
    let line = refused(&serve(stats_addr(&server)));
    assert!(line.contains("--stats") && line.contains("in use"), "{line}");
    refused(&serve("127.0.0.1"));
}

/// A server that tells of itself.
fn telling(backend: &str, placement: &str) -> Server {
    let serve = ["serve", "--addr", "127.0.0.1:0", "--stats", "127.0.0.1:0"];
    let args = [&serve[..], &["--backend", backend, "--placement", placement]].concat();
    Server::start(&args)
}

/// Where it does.
fn stats_addr(server: &Server) -> &str {
    server.line.split(" stats=").nth(1).unwrap()
}

/// What it tells.
fn ask(addr: &str) -> Value {
    let mut line = String::new();
    connect(addr).read_to_string(&mut line).unwrap();
    serde_json::from_str(&line).unwrap()
}

/// A round of all experiments with these servers, as short as it says.
fn article(addrs: &[&str], out: &Path, duration: &str) -> Output {
    let given = addrs.iter().flat_map(|addr| ["--addr", addr]);
    let short = ["--connections", "2", "--rounds", "1", "--duration", duration];
    let args = ["article", "--out", out.to_str().unwrap()].into_iter().chain(short).chain(given);
    run(&args.collect::<Vec<_>>())
}
