//! The program as its users meet it: exit codes, single lines, right answers. No test depends on
//! how fast the host is.

#![allow(clippy::unwrap_used)]

mod rpc;

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use ringpoll::RingTier;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

const PROGRAM: &str = env!("CARGO_BIN_EXE_ringpoll-bench");
/// Far beyond what anything here takes; whatever reaches it hangs.
const DEADLINE: Duration = Duration::from_secs(60);

#[test]
fn an_unknown_backend_is_refused_with_the_known_ones() {
    let line = refused(&["serve", "--addr", "127.0.0.1:0", "--backend", "kqueue"]);
    assert!(line.contains("kqueue") && line.contains("epoll"), "{line}");
    refused(&["compare", "--backends", "epoll,kqueue"]);
    refused(&["compare", "--peers", "tokio,nobody"]);
    refused(&["peer", "nobody", "--addr", "127.0.0.1:0"]);
}

#[test]
fn what_this_build_does_not_have_is_refused() {
    let line = refused(&["serve", "--addr", "127.0.0.1:0", "--scenario", "mux"]);
    assert!(line.contains("--scenario"), "{line}");
}

#[test]
fn settings_that_a_backend_does_not_have_are_refused() {
    const RINGS: [&[&str]; 6] = [
        &["--ring-buffers", "64,4"],
        &["--ring-tier", "coop"],
        &["--bundles"],
        &["--incremental"],
        &["--zero-copy", "16k"],
        &["--napi-us", "50"],
    ];
    const KERNEL_THREADS: [&[&str]; 7] = [
        &["--send-rings", "4"],
        &["--sqpoll-threads", "2"],
        &["--sqpoll-idle-ms", "2"],
        &["--sqpoll-cpus", "0"],
        &["--send-entries", "64"],
        &["--sqpoll-seed", "7"],
        &["--sqpoll-nice", "3"],
    ];
    let on = |backend, settings: &'static [&'static [&'static str]]| {
        settings.iter().map(move |setting| (backend, *setting))
    };
    let wrong = on("epoll", &RINGS).chain(
        ["auto", "epoll", "uring", "hybrid"].into_iter().flat_map(|one| on(one, &KERNEL_THREADS)),
    );
    for (backend, setting) in wrong {
        let serve = ["serve", "--addr", "127.0.0.1:0", "--backend", backend];
        let line = refused(&[&serve[..], setting].concat());
        assert!(line.contains(&format!("{}: backend {backend} has", setting[0])), "{line}");
    }
}

#[test]
fn bad_input_is_refused_in_one_line() {
    for args in [
        &["serve"][..],
        &["serve", "--addr", "127.0.0.1"],
        &["serve", "--addr", "127.0.0.1:99999"],
        &["serve", "--addr", "127.0.0.1:0", "--placement", "pool:0"],
        &["serve", "--addr", "127.0.0.1:0", "--pollers", "0"],
        &["serve", "--addr", "127.0.0.1:0", "--poll", "sometimes"],
        &["serve", "--addr", "127.0.0.1:0", "--poller-cpus", "3-1"],
        &["serve", "--addr", "127.0.0.1:0", "--scenario", "chess"],
        &["serve", "--addr", "127.0.0.1:0", "--ring-buffers", "64"],
        &["serve", "--addr", "127.0.0.1:0", "--ring-tier", "best"],
        &["serve", "--addr", "127.0.0.1:0", "--backend", "sqpoll", "--send-rings", "-1"],
        &["serve", "--addr", "127.0.0.1:0", "--backend", "sqpoll", "--sqpoll-idle-ms", "1.5"],
        &["serve", "--addr", "127.0.0.1:0", "--backend", "sqpoll", "--sqpoll-cpus", "1-0"],
        &["serve", "--addr", "127.0.0.1:0", "--scenario", "heavy", "--work-us", "long"],
        &["compare", "--serve-arg", "--bundle"],
        &["compare", "--scenario", "chess"],
        &["compare", "--rate", "1000"],
        &["compare", "--scenario", "heavy", "--rate", "0"],
        &["compare", "--scenario", "heavy", "--depth", "2"],
        &["compare", "--scenario", "heavy", "--connections", "10"],
        &["compare", "--scenario", "heavy", "--peers", "tokio-ws,nobody"],
        &["peer", "tokio", "--addr", "nowhere"],
        &["peer", "monoio", "--addr", "127.0.0.1:0", "--scenario", "chess"],
        &["peer", "tokio-ws", "--addr", "127.0.0.1:0", "--unpinned"],
        &["peer", "compio", "--addr", "127.0.0.1:0", "--scenario", "proxy"],
        &["peer", "tokio", "--addr", "127.0.0.1:0", "--direct-fds"],
        &["peer", "bare-ring", "--addr", "127.0.0.1:0", "--congestion", "prayer"],
        &["load", "--connections", "1", "--size", "1", "--duration", "1s"],
        &["compare", "--server-cpus", "1000"],
        &["compare", "--rounds", "0"],
        &["compare", "--connections", "10,x"],
        &["article", "--requests", "0"],
        &["article", "--poll", "sometimes"],
        &["article", "--sqpoll-cpus", "1000"],
        &["article", "--connections", "0"],
        &["dance"],
    ] {
        refused(args);
    }
}

#[test]
fn a_bad_load_is_refused_in_one_line() {
    for (addr, extra) in [
        ("127.0.0.1:1", &["--connections", "0"][..]),
        ("127.0.0.1:1", &["--size", "many"]),
        ("127.0.0.1:1", &["--duration", "0s"]),
        ("127.0.0.1:1", &["--rate", "-3"]),
        ("127.0.0.1:1", &["--heavy-share", "100.5"]),
        ("127.0.0.1:1", &["--heavy-share", "-1"]),
        ("127.0.0.1:1", &["--heavy-share", "NaN"]),
        ("127.0.0.1:1", &["--heavy-share", "few"]),
        ("127.0.0.1:1", &["--heavy-share", "1", "--size", "0"]),
        ("127.0.0.1:1", &["--steal-cpus", "1-0"]),
        ("nowhere", &[]),
        (":80", &[]),
        ("127.0.0.1:http", &[]),
    ] {
        refused(&load(&addr, extra));
    }
}

#[test]
fn more_connections_than_descriptors_are_refused_with_the_number() {
    let line =
        refused(&load(&"127.0.0.1:1", &["--connections", "1000000", "--idle", "1000000000"]));
    assert!(line.contains("1001000") && line.contains("limit is"), "{line}");
}

#[test]
fn a_port_in_use_is_refused() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = taken.local_addr().unwrap().to_string();
    let line = refused(&["serve", "--addr", &addr]);
    assert!(line.contains(&addr), "{line}");
    refused(&["peer", "tokio", "--addr", &addr]);
    refused(&["peer", "bare-epoll", "--addr", &addr]);
    for peer in ["bare-ring", "tokio-ws", "tokio-per-cpu", "monoio", "compio"] {
        refused(&["peer", peer, "--addr", &addr]);
    }
}

#[test]
fn an_unreachable_server_is_refused() {
    let addr = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let line = refused(&load(&addr, &[]));
    assert!(line.contains(&addr.to_string()) && line.contains("refused"), "{line}");
}

#[test]
fn a_server_that_dies_half_way_ends_the_load() {
    let addr = scripted(|mut stream| {
        let mut frame = [0; 4 + 64];
        for _ in 0..50 {
            stream.read_exact(&mut frame).unwrap();
            stream.write_all(&frame).unwrap();
        }
    });
    for extra in [&[][..], &["--rate", "1000", "--heavy-share", "10"]] {
        let args = [&["--connections", "3", "--duration", "1m"][..], extra].concat();
        let line = refused(&load(&addr, &args));
        assert!(line.contains("every connection is lost"), "{line}");
    }
}

#[test]
fn a_server_that_never_answers_ends_the_load() {
    let addr = scripted(|mut stream| {
        // Until the client gives up.
        let _ = stream.read_to_end(&mut Vec::new());
    });
    for extra in
        [&["--duration", "1m"][..], &["--duration", "10ms"], &["--rate", "100", "--duration", "1m"]]
    {
        let line = refused(&load(&addr, &[extra, &["--timeout", "200ms"]].concat()));
        assert!(line.contains("stopped answering"), "{line}");
    }
}

#[test]
fn a_wrong_reply_is_found() {
    for wrong_byte in [0, 3, 5, 4 + 63] {
        let addr = scripted(move |mut stream| {
            let mut frame = [0; 4 + 64];
            while stream.read_exact(&mut frame).is_ok() {
                frame[wrong_byte] ^= 0x80;
                if stream.write_all(&frame).is_err() {
                    return;
                }
            }
        });
        let line = refused(&load(&addr, &[]));
        assert!(line.contains("wrong reply"), "byte {wrong_byte}: {line}");
    }
}

#[test]
fn one_lost_connection_is_an_error_but_not_the_end() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    thread::spawn(move || {
        for (number, stream) in listener.incoming().enumerate() {
            let mut stream = stream.unwrap();
            thread::spawn(move || {
                let mut frame = [0; 4 + 64];
                while number != 1 && stream.read_exact(&mut frame).is_ok() {
                    if stream.write_all(&frame).is_err() {
                        return;
                    }
                }
            });
        }
    });
    let output = run(&load(&addr, &["--connections", "3", "--json"]));
    assert_eq!(output.status.code(), Some(2));
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(found["errors"], 1);
    assert!(found["requests"].as_u64().unwrap() > 0);
    assert!(text(&output.stderr).contains("1 errors"), "{}", text(&output.stderr));
}

#[test]
fn every_server_answers_every_byte_right() {
    for server in servers() {
        let server = Server::start(&server);
        for extra in [
            &["--size", "0", "--connections", "3", "--depth", "20"][..],
            &["--size", "7"],
            &["--size", "1k", "--connections", "20", "--depth", "16"],
            &["--size", "300k", "--connections", "3", "--depth", "4"],
            &["--size", "2M", "--connections", "2"],
            &["--size", "1k", "--connections", "5", "--rate", "2000", "--idle", "30"],
        ] {
            let output = run(&load(&server.addr, &[extra, &["--json"]].concat()));
            assert!(output.status.success(), "{extra:?}: {}", text(&output.stderr));
            check_line(&output.stdout);
        }
        server.stop(Signal::TERM);
    }
}

#[test]
fn marked_requests_are_worked_for_and_no_others() {
    for scenario in ["echo", "heavy"] {
        for server in heavy_servers() {
            let server =
                Server::start(&[&server[..], &["--scenario", scenario, "--work-us", "3"]].concat());
            let mut stream = connect(&server.addr);
            // The mark is the first bit; one payload has no room for it.
            let marked = [&[0x80][..], &[0x80; 300], &[0xff, 0, 0]];
            let cheap = [&[][..], &[0x7f; 300], &[0, 0x80, 0x80], &[1], &[0x40; 9]];
            for payload in marked.iter().chain(&cheap) {
                let asked = frame(payload);
                stream.write_all(&asked).unwrap();
                let mut reply = vec![0; asked.len()];
                stream.read_exact(&mut reply).unwrap();
                assert!(reply == asked, "{}", server.line);
            }
            // A pipeline of all of them.
            let frames: Vec<u8> =
                marked.iter().chain(&cheap).flat_map(|payload| frame(payload)).collect();
            stream.write_all(&frames).unwrap();
            let mut replies = vec![0; frames.len()];
            stream.read_exact(&mut replies).unwrap();
            assert!(replies == frames, "{}", server.line);
            drop(stream);
            let line = server.line.clone();
            let wanted = if scenario == "heavy" { 2 * marked.len() } else { 0 };
            assert_eq!(server.stop(Signal::TERM)["work_runs"], wanted, "{line}, {scenario}");
        }
    }
}

#[test]
fn the_share_of_heavy_requests_is_what_was_asked_for() {
    for server in heavy_servers() {
        let start =
            || Server::start(&[&server[..], &["--scenario", "heavy", "--work-us", "2"]].concat());
        // Everything, nothing, and a part; with a few bytes, with many, and in an open loop.
        for (share, extra) in [
            ("0", &["--size", "1k"][..]),
            ("100", &["--size", "1k", "--connections", "7"]),
            ("100", &["--size", "1"]),
            ("40", &["--size", "1k", "--connections", "20", "--depth", "4"]),
            ("40", &["--size", "5", "--rate", "2000", "--connections", "5"]),
        ] {
            let server = start();
            let args = [extra, &["--heavy-share", share, "--json"]].concat();
            let output = run(&load(&server.addr, &args));
            assert!(output.status.success(), "{args:?}: {}", text(&output.stderr));
            let found = check_line(&output.stdout);
            let line = server.line.clone();
            let worked = server.stop(Signal::TERM)["work_runs"].as_u64().unwrap();
            let [requests, heavy] =
                ["requests", "heavy_requests"].map(|name| found[name].as_u64().unwrap());
            // The server has seen the requests before and after the measured window too.
            assert!(worked >= heavy, "{line}: {worked}, {found}");
            match share {
                "0" => assert_eq!((heavy, worked), (0, 0), "{line}: {found}"),
                "100" => {
                    assert!(heavy == requests && worked >= requests, "{line}: {worked}, {found}");
                    assert!(found["cheap_latency_us"].is_null(), "{found}");
                }
                // A choice at random: one that never or always falls on the same side is none.
                _ if requests >= 100 => {
                    assert!((1..requests).contains(&heavy), "{line}: {found}");
                    assert!(found["cheap_latency_us"]["p99"].as_f64() > Some(0.0), "{found}");
                }
                _ => {}
            }
        }
    }
}

#[test]
fn every_server_answers_frames_that_come_in_pieces() {
    for server in servers() {
        let server = Server::start(&server);
        let mut stream = connect(&server.addr);
        let frames: Vec<u8> =
            [&b""[..], b"a", &[7; 3000]].iter().flat_map(|payload| frame(payload)).collect();
        for piece in frames.chunks(frames.len() / 40) {
            stream.write_all(piece).unwrap();
            stream.flush().unwrap();
        }
        let mut replies = vec![0; frames.len()];
        stream.read_exact(&mut replies).unwrap();
        assert!(replies == frames);
        drop(stream);
        server.stop(Signal::TERM);
    }
}

#[test]
fn a_frame_above_the_limit_closes_its_connection_only() {
    for mut server in servers() {
        server.extend(["--frame-max", "1k"]);
        let server = Server::start(&server);
        let mut other = connect(&server.addr);
        let mut stream = connect(&server.addr);
        stream.write_all(&1025_u32.to_be_bytes()).unwrap();
        // Closed or reset, but no byte of an answer.
        assert_eq!(stream.read(&mut [0; 1]).unwrap_or(0), 0);
        let largest = frame(&[9; 1024]);
        other.write_all(&largest).unwrap();
        let mut reply = vec![0; largest.len()];
        other.read_exact(&mut reply).unwrap();
        assert!(reply == largest);
        drop(other);
        server.stop(Signal::TERM);
    }
}

#[test]
fn a_server_prints_one_line_when_ready_and_one_at_its_end() {
    for signal in [Signal::INT, Signal::TERM] {
        let args = [
            "serve",
            "--addr",
            "127.0.0.1:0",
            "--backend",
            "epoll",
            "--placement",
            "pool:2",
            "--pollers",
            "1",
        ];
        let server = Server::start(&args);
        assert_eq!(
            server.line,
            format!("listening on {} backend=epoll placement=pool:2 pollers=1", server.addr)
        );
        let mut stream = connect(&server.addr);
        stream.write_all(&frame(b"hello")).unwrap();
        stream.read_exact(&mut [0; 9]).unwrap();
        let counters = server.stop(signal);
        assert_eq!(counters["accepted"], 1);
        assert_eq!(counters["received_bytes"], 9);
        assert_eq!(counters["sent_bytes"], 9);
        assert!(counters["system_calls"].as_u64().unwrap() >= 3, "{counters}");
    }
}

#[test]
fn a_server_whose_kernel_threads_poll_tells_which_preset_and_what_they_took() {
    if !ringpoll::capabilities().sqpoll {
        println!("not here: {}", ringpoll::capabilities().sqpoll_reason);
        return;
    }
    let serve = ["serve", "--addr", "127.0.0.1:0", "--pollers", "1", "--backend"];
    for (name, threads) in [("sqpoll-shared", 1), ("sqpoll-config2", 2), ("sqpoll-config1", 3)] {
        let mut server = Server::start(&[&serve[..], &[name]].concat());
        assert!(server.line.contains(&format!("backend={name} ")), "{}", server.line);
        let mut stream = connect(&server.addr);
        let deadline = Instant::now() + DEADLINE;
        // Where the kernel counts in ticks, one request may be less than it sees.
        let counters = loop {
            stream.write_all(&frame(b"hello")).unwrap();
            stream.read_exact(&mut [0; 9]).unwrap();
            let counters = server.counters();
            if counters["sqpoll_cpu_us"].as_u64() > Some(0) {
                break counters;
            }
            assert!(Instant::now() < deadline, "{name}: {counters}");
        };
        assert_eq!(counters["sqpoll_threads"], threads, "{name}: {counters}");
        assert!(counters["full_send_rings"] == 0 && counters["send_contentions"] == 0);
        server.stop(Signal::TERM);
    }
    // Which one it chooses depends on the CPUs, but it is one of the presets.
    let server = Server::start(&[&serve[..], &["sqpoll"]].concat());
    assert!(!server.line.contains("backend=sqpoll "), "{}", server.line);
    server.stop(Signal::TERM);
    for (setting, wrong) in
        [("--send-rings", "0"), ("--sqpoll-threads", "0"), ("--sqpoll-idle-ms", "0")]
    {
        refused(&[&serve[..], &["sqpoll-config1", setting, wrong]].concat());
    }
    refused(&[&serve[..], &["sqpoll-shared", "--sqpoll-cpus", "1000"]].concat());
}

#[test]
fn what_the_library_warns_of_is_one_line_each() {
    if !ringpoll::capabilities().sqpoll {
        println!("not here: {}", ringpoll::capabilities().sqpoll_reason);
        return;
    }
    let args = ["--backend", "sqpoll-config1", "--sqpoll-threads", "64", "--send-rings", "64"];
    let mut child = program()
        .args(["serve", "--addr", "127.0.0.1:0"])
        .args(args)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let stderr = collect(child.stderr.take().unwrap());
    // Held until the end, when it prints once more.
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    stdout.read_line(&mut String::new()).unwrap();
    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    let ended = wait(&mut child).expect("the server hangs");
    let said = text(&stderr.join().unwrap());
    assert!(ended.success(), "{ended}: {said}");
    let first = said.lines().next().unwrap_or_default();
    assert!(first.starts_with(" WARN sqpoll-config1: 65 kernel threads"), "{said:?}");
    assert!(said.lines().all(|line| line.starts_with(" WARN ")), "{said:?}");
}

#[test]
fn a_server_tells_its_counters_when_asked_and_goes_on() {
    let mut server = Server::start(&["serve", "--addr", "127.0.0.1:0", "--backend", "epoll"]);
    let mut stream = connect(&server.addr);
    for round in 1..=3 {
        stream.write_all(&frame(b"hello")).unwrap();
        stream.read_exact(&mut [0; 9]).unwrap();
        let counters = server.counters();
        assert_eq!(counters["received_bytes"], 9 * round);
        assert_eq!(counters["connections"], 1);
    }
    drop(stream);
    assert_eq!(server.stop(Signal::TERM)["sent_bytes"], 27);
}

#[test]
fn probe_tells_what_is_offered() {
    let output = run(&["probe"]);
    assert!(output.status.success());
    let said = text(&output.stdout);
    for what in [
        "kernel:",
        "cpus allowed:",
        "fd limit:",
        "somaxconn:",
        "ring reason:",
        "sqpoll reason:",
        "incremental buffers:",
        "because:",
    ] {
        assert!(said.contains(what), "{what} is not in {said}");
    }
    let value = |name: &str| {
        let line = said.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.trim_start_matches(':').trim().to_owned()
    };
    let auto = if value("ring tier") == "none" { "epoll" } else { "uring" };
    let sqpoll = if ringpoll::capabilities().sqpoll { "yes" } else { "no" };
    assert_eq!((value("auto takes").as_str(), value("sqpoll").as_str()), (auto, sqpoll));
    let available = value("backends available");
    for (name, offered) in [("uring", auto == "uring"), ("sqpoll", sqpoll == "yes")] {
        assert_eq!(available.contains(&format!("; not {name}")), !offered, "{available}");
        assert!(available.contains(name), "{available}");
    }
}

#[test]
fn an_operators_switch_is_obeyed_or_refused_but_never_silent() {
    let output = run_with(&["probe"], &[("RINGPOLL_BACKEND", "epoll")]);
    let said = text(&output.stdout);
    assert!(output.status.success() && said.contains("RINGPOLL_BACKEND=epoll says so"), "{said}");
    for variable in ["RINGPOLL_BACKEND", "RINGPOLL_URING_TIER"] {
        for command in ["compare", "article"] {
            let output = run_with(&[command, "--quick"], &[(variable, "epoll")]);
            let error = text(&output.stderr);
            assert_eq!((output.status.code(), error.lines().count()), (Some(2), 1), "{error}");
            assert!(error.contains(variable), "{error}");
        }
    }
}

#[test]
fn help_is_no_error() {
    for args in [
        &["--help"][..],
        &["--version"],
        &["serve", "--help"],
        &["load", "--help"],
        &["compare", "--help"],
        &["article", "--help"],
    ] {
        let output = run(args);
        assert!(output.status.success() && output.stderr.is_empty(), "{args:?}");
    }
}

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
    assert_eq!(questions, ["few_heavy", "all_heavy", "all_cheap", "fairness"]);
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
                "all_heavy" => assert!(rounds.iter().all(|one| heavy(one) == requests(one))),
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
fn the_article_ends_with_its_claims_beside_the_figures() {
    let out = fresh_dir("article");
    // A number of requests that nobody waits for: the time ends it.
    let output = run(&[
        &["article", "--connections", "2", "--rounds", "1", "--duration", "40ms"][..],
        &["--requests", "50M", "--out", out.to_str().unwrap()],
    ]
    .concat());
    assert!(output.status.success(), "{}", text(&output.stderr));
    let found: Value =
        serde_json::from_slice(&fs::read(out.join("article.json")).unwrap()).unwrap();
    let experiments = found["experiments"].as_array().unwrap();
    let counts = experiments.iter().map(|one| {
        let cells = one["cells"].as_array().unwrap();
        assert_eq!(cells.len(), 1, "{one}");
        (cells[0]["rows"].as_array().unwrap().len(), one["claims"].as_array().unwrap().len())
    });
    assert_eq!(counts.collect::<Vec<_>>(), [(2, 2), (4, 1), (5, 8)]);
    if ringpoll::capabilities().sqpoll {
        let rows = experiments.iter().flat_map(|one| one["cells"][0]["rows"].as_array().unwrap());
        rows.for_each(|row| assert_eq!(row["failure"], Value::Null, "{row}"));
        let config1 = &experiments[2]["cells"][0]["rows"][1];
        assert!(config1["summary"]["sqpoll_cpus_busy"]["median"].as_f64() > Some(0.0), "{config1}");
        assert!(config1["rounds"][0]["sqpoll_work_share"].as_f64() <= Some(1.0), "{config1}");
    }
    let limits = found["limits"].as_array().unwrap();
    assert!(limits.iter().any(|line| line.as_str().unwrap().contains("loopback")), "{limits:?}");
    let page = fs::read_to_string(out.join("article.html")).unwrap();
    let links = page.replace("http://www.w3.org/2000/svg", "");
    assert!(!links.contains("http") && !links.contains("<script") && !links.contains("{%"));
    let said = text(&output.stdout);
    for wanted in ["Experiment 3.", "sqpoll-config1", "What this host cannot show", "claims seen"] {
        assert!(said.contains(wanted), "{wanted} is not in {said}");
    }
}

#[test]
fn enough_requests_end_a_measurement_before_its_time() {
    let out = fresh_dir("counted");
    let output = run(&[
        &["article", "--connections", "2", "--rounds", "1", "--duration", "10m"][..],
        &["--requests", "20", "--out", out.to_str().unwrap()],
    ]
    .concat());
    assert!(output.status.success(), "{}", text(&output.stderr));
    let found: Value =
        serde_json::from_slice(&fs::read(out.join("article.json")).unwrap()).unwrap();
    let rows = found["experiments"][2]["cells"][0]["rows"].as_array().unwrap();
    let epoll = &rows[0]["rounds"][0];
    assert!(epoll["requests"].as_u64() >= Some(20), "{epoll}");
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

/// Every way to serve that this program has.
fn servers() -> Vec<Vec<&'static str>> {
    let epoll = [
        &["serve", "--backend", "epoll", "--placement", "inline"][..],
        &["serve", "--backend", "epoll", "--placement", "pool", "--pollers", "2"],
        &["serve", "--placement", "inline", "--scenario", "proxy", "--poll", "never"],
        &["serve", "--placement", "pool", "--scenario", "heavy", "--work-us", "5"],
        &["peer", "tokio"],
        &["peer", "tokio-framed"],
        &["peer", "tokio-ws"],
        &["peer", "tokio-per-cpu"],
        &["peer", "tokio-per-cpu", "--unpinned"],
        &["peer", "bare-epoll"],
    ];
    let rings = [
        &["serve", "--backend", "uring", "--placement", "inline"][..],
        &["serve", "--backend", "uring", "--placement", "pool", "--ring-buffers", "4,1"],
        &["serve", "--backend", "uring", "--bundles", "--incremental", "--zero-copy", "16k"],
        &["serve", "--backend", "hybrid", "--placement", "inline", "--ring-tier", "coop"],
        &["peer", "monoio"],
        &["peer", "compio"],
        &["peer", "bare-ring"],
        &["peer", "bare-ring-64k"],
        &["peer", "bare-ring", "--direct-fds", "--rcvbuf", "64k", "--sndbuf", "64k"],
    ];
    let kernel_threads = [
        &["serve", "--backend", "sqpoll", "--placement", "inline"][..],
        &["serve", "--backend", "sqpoll-shared", "--placement", "pool", "--send-rings", "2"],
        &["serve", "--backend", "sqpoll-config1", "--send-rings", "2", "--sqpoll-threads", "1"],
        &["serve", "--backend", "sqpoll-config2", "--sqpoll-idle-ms", "1", "--sqpoll-seed", "7"],
        &["serve", "--backend", "uring-2", "--send-entries", "1", "--ring-buffers", "4,1"],
    ];
    let offered = ringpoll::capabilities();
    if !offered.sqpoll {
        println!("left out: {}: {kernel_threads:?}", offered.sqpoll_reason);
    }
    let kernel_threads = kernel_threads.iter().filter(|_| offered.sqpoll);
    let tier = offered.tier;
    if tier != Some(RingTier::Defer) {
        println!("left out for a ring of tier {tier:?}: {rings:?}");
    }
    let rings = rings.iter().filter(|_| tier == Some(RingTier::Defer));
    let all = epoll.iter().chain(rings).chain(kernel_threads);
    all.map(|args| [args, &["--addr", "127.0.0.1:0"][..]].concat()).collect()
}

/// The servers that have the scenarios echo and heavy both: all but those with a scenario of their
/// own. One of ours for each place where handlers run is enough.
fn heavy_servers() -> Vec<Vec<&'static str>> {
    let peers = servers().into_iter().filter(|args| args[0] == "peer");
    let ours = ["auto", "inline", "pool"]
        .map(|placement| vec!["serve", "--placement", placement, "--addr", "127.0.0.1:0"]);
    ours.into_iter().chain(peers).collect()
}

/// The program, without switches that happen to be set where these tests run.
fn program() -> Command {
    let mut program = Command::new(PROGRAM);
    program.env_remove("RINGPOLL_BACKEND").env_remove("RINGPOLL_URING_TIER");
    program
}

fn run(args: &[impl AsRef<str>]) -> Output {
    run_with(args, &[])
}

/// Runs the program to its end, which must come by itself.
fn run_with(args: &[impl AsRef<str>], variables: &[(&str, &str)]) -> Output {
    let args: Vec<_> = args.iter().map(AsRef::as_ref).collect();
    let mut child = program()
        .args(&args)
        .envs(variables.iter().copied())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let stdout = collect(child.stdout.take().unwrap());
    let stderr = collect(child.stderr.take().unwrap());
    let status = wait(&mut child).unwrap_or_else(|| panic!("{args:?} hangs"));
    Output { status, stdout: stdout.join().unwrap(), stderr: stderr.join().unwrap() }
}

/// Runs the program, which must refuse: exit code 2, one line on standard error, nothing on
/// standard output.
fn refused(args: &[impl AsRef<str>]) -> String {
    let output = run(args);
    let args: Vec<_> = args.iter().map(AsRef::as_ref).collect();
    let (out, error) = (text(&output.stdout), text(&output.stderr));
    assert_eq!(output.status.code(), Some(2), "{args:?}: {error}");
    assert_eq!(error.lines().count(), 1, "{args:?}: {error}");
    assert!(error.starts_with("ringpoll-bench: "), "{args:?}: {error}");
    assert_eq!(out, "", "{args:?}");
    error
}

/// A `load` with short defaults; what `extra` names again replaces them.
fn load(addr: &impl ToString, extra: &[&str]) -> Vec<String> {
    let defaults =
        [("--connections", "1"), ("--size", "64"), ("--duration", "100ms"), ("--warmup", "10ms")];
    let mut args = vec!["load".to_owned(), "--addr".to_owned(), addr.to_string()];
    for (flag, value) in defaults {
        if !extra.contains(&flag) {
            args.extend([flag.to_owned(), value.to_owned()]);
        }
    }
    args.extend(extra.iter().map(|arg| (*arg).to_owned()));
    args
}

fn check_line(stdout: &[u8]) -> Value {
    let found: Value = serde_json::from_slice(stdout).unwrap();
    let number = |value: &Value| value.as_f64().unwrap_or_else(|| panic!("no number in {found}"));
    assert_eq!(found["errors"], 0);
    assert!(number(&found["requests"]) > 0.0, "{found}");
    assert!(number(&found["elapsed_s"]) >= 0.1 && number(&found["rps"]) > 0.0, "{found}");
    assert!(number(&found["bytes"]) >= number(&found["requests"]) * 4.0, "{found}");
    let check_latency = |latency: &Value| {
        let quantiles = ["p50", "p90", "p99", "p999", "p9999", "max"];
        let quantiles = quantiles.map(|name| number(&latency[name]));
        assert!(quantiles.is_sorted() && quantiles[0] > 0.0, "{found}");
    };
    check_latency(&found["latency_us"]);
    let others = ["cheap_latency_us", "clean_latency_us", "clean_cheap_latency_us"];
    others.iter().filter(|name| !found[**name].is_null()).for_each(|name| {
        check_latency(&found[*name]);
    });
    assert!(number(&found["heavy_requests"]) <= number(&found["requests"]), "{found}");
    // A window more or less: the last one ends with the measurement.
    let (windows, left_out) = (number(&found["windows"]), number(&found["windows_left_out"]));
    assert!(windows >= 1.0 && left_out <= windows && number(&found["window_ms"]) > 0.0, "{found}");
    let clean = number(&found["clean_requests"]);
    assert!(clean <= number(&found["requests"]), "{found}");
    assert_eq!(clean > 0.0, !found["clean_latency_us"].is_null(), "{found}");
    // A gap of the warm-up takes what it delayed: all, where a reply takes as long as the window.
    if left_out == 0.0 && number(&found["latency_us"]["max"]) < number(&found["elapsed_s"]) * 5e5 {
        assert!(clean > 0.0, "{found}");
    }
    assert_eq!(found.as_object().unwrap().len(), 14);
    found
}

/// A server that runs `life` for every connection.
fn scripted(life: impl Fn(TcpStream) + Clone + Send + 'static) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let life = life.clone();
            thread::spawn(move || life(stream.unwrap()));
        }
    });
    addr
}

/// A server of this program as a process; killed when a test fails.
struct Server {
    child: Child,
    stdout: BufReader<ChildStdout>,
    line: String,
    addr: String,
}

impl Server {
    fn start(args: &[&str]) -> Server {
        let mut child = program().args(args).stdout(Stdio::piped()).spawn().unwrap();
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        stdout.read_line(&mut line).unwrap();
        let line = line.trim_end().to_owned();
        let addr =
            line.strip_prefix("listening on ").unwrap_or_else(|| panic!("{args:?}: {line:?}"));
        let addr = addr.split(' ').next().unwrap().to_owned();
        Server { child, stdout, line, addr }
    }

    /// Its counters now.
    fn counters(&mut self) -> Value {
        kill_process(Pid::from_child(&self.child), Signal::USR1).unwrap();
        let mut line = String::new();
        self.stdout.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }

    /// Its counters: the one line it prints at its end.
    fn stop(mut self, signal: Signal) -> Value {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
        let status = wait(&mut self.child).expect("the server hangs");
        assert!(status.success(), "{status}");
        let mut rest = String::new();
        self.stdout.read_to_string(&mut rest).unwrap();
        assert_eq!(rest.lines().count(), 1, "{rest}");
        serde_json::from_str(&rest).unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Both fail only for a process that has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn wait(child: &mut Child) -> Option<std::process::ExitStatus> {
    let deadline = Instant::now() + DEADLINE;
    while Instant::now() < deadline {
        if let Some(status) = child.try_wait().unwrap() {
            return Some(status);
        }
        thread::sleep(Duration::from_millis(2));
    }
    child.kill().unwrap();
    None
}

fn collect(mut stream: impl Read + Send + 'static) -> thread::JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).unwrap();
        bytes
    })
}

fn connect(addr: &str) -> TcpStream {
    let stream = TcpStream::connect(addr).unwrap();
    stream.set_nodelay(true).unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    stream
}

fn frame(payload: &[u8]) -> Vec<u8> {
    [&(payload.len() as u32).to_be_bytes()[..], payload].concat()
}

fn fresh_dir(name: &str) -> PathBuf {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    // There is none on the first run.
    let _ = fs::remove_dir_all(&dir);
    fs::create_dir_all(&dir).unwrap();
    dir
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
