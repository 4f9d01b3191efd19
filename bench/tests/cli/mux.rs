//! Requests of one connection side by side: `serve` and `peer --scenario mux`, `load --unordered`.

use std::io::{Read, Write};
use std::net::SocketAddr;

use rustix::process::Signal;

use crate::harness::*;

#[test]
fn a_peer_without_a_task_for_each_request_refuses_the_scenario_mux() {
    for peer in ["tokio-framed", "tokio-per-cpu", "monoio", "compio", "bare-epoll", "bare-ring"] {
        let line = refused(&["peer", peer, "--addr", "127.0.0.1:0", "--scenario", "mux"]);
        assert!(line.contains("mux") && line.contains(peer), "{line}");
    }
}

#[test]
fn replies_out_of_order_are_right_only_where_that_is_asked_for() {
    // Answers four at a time, the last one first.
    let addr = scripted(|mut stream| {
        let mut frames = [[0; 4 + 64]; 4];
        while frames.iter_mut().all(|frame| stream.read_exact(frame).is_ok()) {
            if frames.iter().rev().any(|frame| stream.write_all(frame).is_err()) {
                return;
            }
        }
    });
    let line = refused(&load(&addr, &["--depth", "4"]));
    assert!(line.contains("wrong reply"), "{line}");
    let addr = reversing();
    let args = ["--depth", "4", "--unordered", "--json"];
    let output = run(&load(&addr, &args));
    assert!(output.status.success(), "{}", text(&output.stderr));
    check_line(&output.stdout, &args);
}

/// A server that answers what has come, the last request first.
fn reversing() -> SocketAddr {
    scripted(|mut stream| {
        let mut input = vec![0; 64 << 10];
        let mut bytes = 0;
        while let Ok(count @ 1..) = stream.read(&mut input[bytes..]) {
            bytes += count;
            let whole = bytes / (4 + 64) * (4 + 64);
            let frames = input[..whole].chunks(4 + 64).rev().flatten().copied();
            if stream.write_all(&frames.collect::<Vec<u8>>()).is_err() {
                return;
            }
            input.copy_within(whole..bytes, 0);
            bytes -= whole;
        }
    })
}

#[test]
fn a_reply_that_comes_twice_or_to_nobody_is_found() {
    for (twice, wanted) in [(true, "sent twice"), (false, "never asked for")] {
        let addr = scripted(move |mut stream| {
            let mut frame = [0; 4 + 64];
            while stream.read_exact(&mut frame).is_ok() {
                let first = frame;
                // Far beyond the last number of this connection.
                frame[4 + 5] ^= if twice { 0 } else { 0x40 };
                if stream.write_all(&[first, frame].concat()).is_err() {
                    return;
                }
            }
        });
        let line = refused(&load(&addr, &["--unordered", "--depth", "8"]));
        assert!(line.contains(wanted), "{line}");
    }
    // Nothing is open when the second one comes.
    let addr = scripted(|mut stream| {
        let mut frame = [0; 4 + 64];
        while stream.read_exact(&mut frame).is_ok() {
            if stream.write_all(&[frame, frame].concat()).is_err() {
                return;
            }
        }
    });
    let line = refused(&load(&addr, &["--unordered"]));
    assert!(line.contains("nobody asked for") || line.contains("sent twice"), "{line}");
}

#[test]
fn every_server_of_the_scenario_mux_answers_every_byte_right() {
    for server in mux_servers() {
        let server = Server::start(&[&server[..], &["--scenario", "mux"]].concat());
        for extra in [
            &["--size", "8", "--connections", "3", "--depth", "20"][..],
            &["--size", "1k", "--connections", "20", "--depth", "16"],
            &["--size", "1k", "--depth", "2000"],
            &["--size", "300k", "--connections", "3", "--depth", "4"],
            &["--size", "1k", "--connections", "5", "--rate", "2000"],
        ] {
            let args = [extra, &["--unordered", "--json"]].concat();
            let output = run(&load(&server.addr, &args));
            let line = &server.line;
            assert!(output.status.success(), "{line}, {extra:?}: {}", text(&output.stderr));
            check_line(&output.stdout, &args);
        }
        // One after the other they are in order, and may be of any size and come in pieces.
        let mut stream = connect(&server.addr);
        for asked in [&b""[..], b"a", &[7; 300_000]].map(frame) {
            for piece in asked.chunks(asked.len().div_ceil(3)) {
                stream.write_all(piece).unwrap();
            }
            let mut reply = vec![0; asked.len()];
            stream.read_exact(&mut reply).unwrap();
            assert!(reply == asked, "{}", server.line);
        }
        stream.write_all(&(64_u32 << 20).to_be_bytes()).unwrap();
        assert_eq!(stream.read(&mut [0; 1]).unwrap_or(0), 0, "a frame above the limit");
        drop(stream);
        server.stop(Signal::TERM);
    }
}

/// The servers that have the scenario mux.
fn mux_servers() -> Vec<Vec<&'static str>> {
    let mut servers = vec![vec!["peer", "tokio"], vec!["peer", "tokio-ws"]];
    for backend in ["epoll", "auto"] {
        for placement in ["auto", "inline", "pool:2"] {
            servers.push(vec!["serve", "--backend", backend, "--placement", placement]);
        }
    }
    servers.iter_mut().for_each(|server| server.extend(["--addr", "127.0.0.1:0"]));
    servers
}
