//! Payloads of every size: what lies in one block, what lies in many, and what no socket buffer
//! holds, so that client and server both find theirs full.

use std::collections::BTreeSet;

use rustix::process::Signal;

use crate::harness::*;
use crate::servers;

#[test]
fn every_server_echoes_payloads_of_every_size() {
    const SIZES: [&str; 7] = ["0", "1", "64", "16k", "64k", "256k", "1m"];
    let checked: BTreeSet<Vec<&str>> = servers().into_iter().chain(placed()).collect();
    for args in checked {
        let server = Server::start(&args);
        for (size, depth) in SIZES.into_iter().flat_map(|size| [(size, "1"), (size, "4")]) {
            // A connection that gets no answer for that long is an error.
            let limits = ["--depth", depth, "--connections", "3", "--timeout", "10s", "--json"];
            let what = ["--size", size, "--duration", "30ms", "--warmup", "0ms"];
            let output = run(&load(&server.addr, &[&limits[..], &what].concat()));
            let said = text(&output.stdout);
            let error = text(&output.stderr);
            assert!(output.status.success(), "{args:?}, {size} x {depth}: {said}{error}");
            let found: serde_json::Value = serde_json::from_str(&said).unwrap();
            assert_eq!(found["errors"], 0, "{args:?}, {size} x {depth}: {said}");
            assert!(found["requests"].as_u64() > Some(0), "{args:?}, {size} x {depth}: {said}");
        }
        server.stop(Signal::TERM);
    }
}

/// The backends this host has, with handlers on the pollers and on workers.
fn placed() -> Vec<Vec<&'static str>> {
    let offered = ringpoll::capabilities();
    let mut backends = vec!["epoll"];
    if offered.tier.is_some() {
        backends.extend(["uring", "hybrid"]);
    }
    if offered.sqpoll {
        backends.push("sqpoll-shared");
    }
    let placements = ["inline", "pool"];
    let both = backends.into_iter().flat_map(|backend| placements.map(|place| (backend, place)));
    both.map(|(backend, placement)| {
        vec!["serve", "--backend", backend, "--placement", placement, "--addr", "127.0.0.1:0"]
    })
    .collect()
}
