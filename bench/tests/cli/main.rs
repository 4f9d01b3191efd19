//! The program as its users meet it: exit codes, single lines, right answers. No test depends on
//! how fast the host is.

#![allow(clippy::unwrap_used)]

mod article;
mod calls;
mod compare;
mod harness;
mod hosts;
mod mux;
mod namespaces;
mod proxy;
mod report;
mod rpc;
mod sizes;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::process::Stdio;
use std::thread;
use std::time::Instant;

use ringpoll::RingTier;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::harness::*;

#[test]
fn an_unknown_backend_is_refused_with_the_known_ones() {
    let line = refused(&["serve", "--addr", "127.0.0.1:0", "--backend", "kqueue"]);
    assert!(line.contains("kqueue") && line.contains("epoll"), "{line}");
    refused(&["compare", "--backends", "epoll,kqueue"]);
    refused(&["compare", "--peers", "tokio,nobody"]);
    refused(&["peer", "nobody", "--addr", "127.0.0.1:0"]);
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
        &["compare", "--scenario", "heavy", "--examples", "/nowhere"],
        &["compare", "--scenario", "http", "--peers", "tokio"],
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
        &["article", "--server-cpus", "0-1000000"],
        &["article", "--server-cpus", ""],
        &["article", "--sqpoll-cpus", "0,"],
        &["article", "--server-cpus", "0", "--client-cpus", "0"],
        &["article", "--sqpoll-cpus", "0", "--client-cpus", "0"],
        &["article", "--connections", "0"],
        &["calls", "--addr", "127.0.0.1:1"],
        &["calls", "--client", "chess", "--addr", "127.0.0.1:1"],
        &["calls", "--client", "tokio", "--addr", "127.0.0.1:1", "--size", "15"],
        &["calls", "--client", "tonic", "--addr", "127.0.0.1:1", "--outstanding", "2"],
        &["compare", "--scenario", "calls", "--peers", "bare-epoll"],
        &["peer", "tokio", "--addr", "127.0.0.1:0", "--scenario", "calls"],
        &["serve", "--addr", "127.0.0.1:0", "--hold", "2"],
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
        ("127.0.0.1:1", &["--unordered", "--size", "7"]),
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
            check_line(&output.stdout, extra);
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
            let found = check_line(&output.stdout, &args);
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
