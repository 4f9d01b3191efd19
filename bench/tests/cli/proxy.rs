//! The scenario proxy: bytes go to another server and back.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener};

use rustix::process::Signal;

use crate::harness::*;

#[test]
fn every_proxy_forwards_every_byte() {
    for proxy in proxies() {
        let upstream = Server::start(&["peer", "bare-epoll", "--addr", "127.0.0.1:0"]);
        let server = start(&proxy, &upstream.addr);
        for (connections, size, depth) in [("20", "100", "4"), ("3", "300k", "2")] {
            let extra = ["--connections", connections, "--size", size, "--depth", depth, "--json"];
            let output = run(&load(&server.addr, &extra));
            assert!(output.status.success(), "{proxy:?}: {}", text(&output.stderr));
            check_line(&output.stdout, &extra);
        }
        server.stop(Signal::TERM);
        upstream.stop(Signal::TERM);
    }
}

#[test]
fn the_end_of_one_side_reaches_the_other_and_the_answer_still_comes_back() {
    for proxy in proxies() {
        let upstream = scripted(|mut stream| {
            let mut all = Vec::new();
            stream.read_to_end(&mut all).unwrap();
            // The client may have given up on a test that failed.
            let _ = stream.write_all(&[&all[..], b"!"].concat());
        });
        let server = start(&proxy, &upstream.to_string());
        let mut client = connect(&server.addr);
        client.write_all(b"hello").unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        let mut answer = String::new();
        client.read_to_string(&mut answer).unwrap();
        assert_eq!(answer, "hello!", "{proxy:?}");
        server.stop(Signal::TERM);
    }
}

#[test]
fn without_an_upstream_a_client_is_closed_and_the_others_are_served() {
    for proxy in proxies() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = listener.local_addr().unwrap();
        let server = start(&proxy, &addr.to_string());
        drop(listener);
        let mut client = connect(&server.addr);
        let ended = client.read(&mut [0; 1]);
        assert!(!matches!(ended, Ok(1)), "{proxy:?}: {ended:?}");
        // It comes back.
        let listener = TcpListener::bind(addr).unwrap();
        let mut client = connect(&server.addr);
        client.write_all(b"x").unwrap();
        let (mut there, _) = listener.accept().unwrap();
        let mut byte = [0];
        there.read_exact(&mut byte).unwrap();
        assert_eq!(&byte, b"x", "{proxy:?}");
        // It dies half way, and so does the client's connection.
        drop(there);
        let ended = client.read(&mut byte);
        assert!(!matches!(ended, Ok(1)), "{proxy:?}: {ended:?}");
        drop(client);
        server.stop(Signal::TERM);
    }
}

#[test]
fn an_upstream_is_refused_where_it_cannot_be() {
    let serve = ["serve", "--addr", "127.0.0.1:0"];
    for (args, wanted) in [
        (&["--upstream", "127.0.0.1:1"][..], "scenario proxy"),
        (&["--scenario", "proxy", "--upstream", "nowhere"], "no port"),
    ] {
        let line = refused(&[&serve[..], args].concat());
        assert!(line.contains(wanted), "{args:?}: {line}");
    }
    let peer = ["--addr", "127.0.0.1:0", "--scenario", "proxy"];
    let line = refused(&[&["peer", "tokio"][..], &peer].concat());
    assert!(line.contains("--upstream"), "{line}");
    let line = refused(&[&["peer", "monoio"][..], &peer, &["--upstream", "127.0.0.1:1"]].concat());
    assert!(line.contains("does not forward"), "{line}");
}

#[test]
fn proxies_and_multiplexed_servers_are_rows() {
    let out = fresh_dir("proxy");
    let output = run(&[
        &["compare", "--scenario", "proxy,mux", "--rounds", "1", "--duration", "30ms"][..],
        &["--out", out.to_str().unwrap()],
    ]
    .concat());
    assert!(output.status.success(), "{}", text(&output.stderr));
    let found = std::fs::read(out.join("compare.json")).unwrap();
    let found: serde_json::Value = serde_json::from_slice(&found).unwrap();
    let rows = found["cells"].as_array().unwrap().iter().map(|cell| {
        let rows = cell["rows"].as_array().unwrap();
        assert!(rows.iter().all(|row| row["failure"].is_null()), "{cell}");
        rows.len()
    });
    assert_eq!(rows.collect::<Vec<_>>(), [4, 4, 6]);
}

fn proxies() -> Vec<Vec<&'static str>> {
    let ours = ["epoll", "auto"].into_iter().flat_map(|backend| {
        ["inline", "pool"]
            .map(|placement| vec!["serve", "--backend", backend, "--placement", placement])
    });
    let peers = ["tokio", "tokio-ws", "bare-epoll"].map(|peer| vec!["peer", peer]);
    ours.chain(peers).collect()
}

fn start(proxy: &[&str], upstream: &str) -> Server {
    let rest = ["--addr", "127.0.0.1:0", "--scenario", "proxy", "--upstream", upstream];
    Server::start(&[proxy, &rest].concat())
}
