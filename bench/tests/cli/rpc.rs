//! The protocols of RPC frameworks: servers that speak them, and the load generator's clients.

use std::net::{Shutdown, SocketAddr};

use super::*;

#[test]
fn a_protocol_that_is_not_there_is_refused() {
    for args in [
        &["serve", "--addr", "127.0.0.1:0", "--protocol", "smtp"][..],
        &["serve", "--addr", "127.0.0.1:0", "--protocol", "grpc", "--scenario", "proxy"],
        &["serve", "--addr", "127.0.0.1:0", "--protocol", "thrift", "--scenario", "proxy"],
        &["peer", "tonic", "--addr", "127.0.0.1:0", "--scenario", "proxy"],
        &["peer", "tonic", "--addr", "127.0.0.1:0", "--unpinned"],
        &["peer", "volo-thrift", "--addr", "127.0.0.1:0", "--direct-fds"],
        // No row would have them.
        &["compare", "--peers", "tokio,tonic"],
        &["compare", "--scenario", "rpc", "--peers", "volo-thrift,tokio"],
    ] {
        refused(args);
    }
    let line = refused(&load(&"127.0.0.1:1", &["--protocol", "smtp"]));
    assert!(line.contains("smtp") && line.contains("grpc"), "{line}");
    let line = refused(&load(&"127.0.0.1:1", &["--protocol", "grpc", "--depth", "1025"]));
    assert!(line.contains("1025") && line.contains("1024"), "{line}");
}

#[test]
fn a_port_in_use_is_refused_by_servers_of_rpc() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = taken.local_addr().unwrap().to_string();
    refused(&["serve", "--protocol", "grpc", "--addr", &addr]);
    refused(&["peer", "tonic", "--addr", &addr]);
    refused(&["peer", "volo-thrift", "--addr", &addr]);
}

#[test]
fn every_server_of_rpc_answers_every_byte_right() {
    for (protocol, server) in servers_of_rpc() {
        let server = Server::start(&server);
        for extra in [
            &["--size", "0", "--connections", "3", "--depth", "20"][..],
            &["--size", "7"],
            &["--size", "1k", "--connections", "20", "--depth", "16"],
            &["--size", "300k", "--connections", "3", "--depth", "4"],
            &["--size", "2M", "--connections", "2"],
            &["--size", "1k", "--connections", "5", "--rate", "1000", "--idle", "30"],
        ] {
            let args = [extra, &["--protocol", protocol, "--json"]].concat();
            let output = run(&load(&server.addr, &args));
            let error = text(&output.stderr);
            // An open loop may tell besides that the host is slow.
            let fell_behind = error.contains("a queue that grows");
            assert!(output.status.success(), "{}: {args:?}: {error}", server.line);
            assert!(error.is_empty() || fell_behind, "{error}");
            check_line(&output.stdout, &args);
        }
        let line = server.line.clone();
        let counters = server.stop(Signal::TERM);
        assert_eq!(counters["accepted"], 3 + 1 + 20 + 3 + 2 + 35, "{line}: {counters}");
        // Those of ours count more.
        for errors in ["handler_errors", "handler_panics"] {
            assert!(counters[errors].is_null() || counters[errors] == 0, "{line}: {counters}");
        }
    }
}

#[test]
fn marked_calls_are_worked_for_and_no_others() {
    for (protocol, server) in servers_of_rpc() {
        for (scenario, share) in
            [("echo", "100"), ("heavy", "0"), ("heavy", "100"), ("heavy", "40")]
        {
            let server =
                Server::start(&[&server[..], &["--scenario", scenario, "--work-us", "2"]].concat());
            let args = ["--protocol", protocol, "--heavy-share", share, "--depth", "4", "--json"];
            let output = run(&load(&server.addr, &args));
            assert!(output.status.success(), "{args:?}: {}", text(&output.stderr));
            let found = check_line(&output.stdout, &args);
            let line = server.line.clone();
            let worked = server.stop(Signal::TERM)["work_runs"].as_u64().unwrap();
            let [requests, heavy] =
                ["requests", "heavy_requests"].map(|name| found[name].as_u64().unwrap());
            match (scenario, share) {
                ("echo", _) => assert_eq!((worked, heavy), (0, requests), "{line}"),
                (_, "0") => assert_eq!((worked, heavy), (0, 0), "{line}"),
                // It has seen the requests before and after the measured window too.
                (_, "100") => assert!(heavy == requests && worked >= heavy, "{line}: {worked}"),
                // A choice at random: one that never or always falls on the same side is none.
                _ if requests >= 100 => assert!((1..requests).contains(&heavy), "{line}: {found}"),
                _ => assert!(worked >= heavy, "{line}: {worked}, {found}"),
            }
        }
    }
}

#[test]
fn enough_time_without_a_reply_ends_a_load_of_any_protocol() {
    let addr = scripted(|mut stream| {
        // Until the client gives up.
        let _ = stream.read_to_end(&mut Vec::new());
    });
    for protocol in PROTOCOLS {
        for extra in [
            &["--duration", "1m"][..],
            &["--duration", "10ms", "--depth", "3"],
            &["--rate", "100", "--duration", "1m"],
        ] {
            let args = [extra, &["--protocol", protocol, "--timeout", "200ms"]].concat();
            let line = refused(&load(&addr, &args));
            assert!(line.contains("stopped answering"), "{args:?}: {line}");
        }
    }
}

#[test]
fn a_server_of_rpc_that_dies_half_way_ends_the_load() {
    for (protocol, server) in servers_of_rpc() {
        let server = Server::start(&server);
        let addr = between(&server.addr, |_, bytes| bytes.len() < 20_000);
        for extra in [&["--depth", "3"][..], &["--rate", "1000", "--heavy-share", "10"]] {
            let args =
                [&["--protocol", protocol, "--connections", "3", "--duration", "1m"][..], extra];
            let line = refused(&load(&addr, &args.concat()));
            assert!(line.contains("every connection is lost after "), "{protocol}: {line}");
            assert!(!line.contains("after 0 replies"), "{protocol}: {line}");
        }
    }
}

#[test]
fn one_lost_connection_of_rpc_is_an_error_but_not_the_end() {
    for (protocol, server) in servers_of_rpc() {
        let server = Server::start(&server);
        let addr = between(&server.addr, |number, _| number != 1);
        let args = ["--protocol", protocol, "--connections", "3", "--depth", "5", "--json"];
        let output = run(&load(&addr, &args));
        assert_eq!(output.status.code(), Some(2));
        let found: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(found["errors"], 1, "{}: {}", server.line, text(&output.stderr));
        assert!(found["requests"].as_u64().unwrap() > 0);
    }
}

#[test]
fn a_wrong_reply_to_a_call_is_found() {
    for (protocol, server) in servers_of_rpc() {
        let server = Server::start(&server);
        // In the middle of a payload, whatever the protocol puts around it.
        let addr = between(&server.addr, |_, bytes| {
            if let Some(byte) = bytes.get_mut(100_000) {
                *byte ^= 0x10;
            }
            true
        });
        let line = refused(&load(&addr, &["--protocol", protocol, "--size", "300k"]));
        assert!(line.contains("wrong reply"), "{}: {line}", server.line);
    }
}

#[test]
fn a_server_of_another_protocol_ends_the_load() {
    let servers = [("frames", vec!["peer", "tokio", "--addr", "127.0.0.1:0"])];
    for (spoken, server) in servers.into_iter().chain(servers_of_rpc()) {
        let server = Server::start(&server);
        for protocol in PROTOCOLS.into_iter().filter(|protocol| *protocol != spoken) {
            // A length that one side waits for may be none to the other.
            let args = ["--protocol", protocol, "--timeout", "500ms", "--duration", "1m"];
            let line = refused(&load(&server.addr, &args));
            let ended = ["every connection is lost", "stopped answering", "not one reply"];
            assert!(ended.iter().any(|end| line.contains(end)), "{}: {line}", server.line);
        }
    }
}

#[test]
fn a_call_above_the_limit_is_an_error_of_its_connection() {
    for (protocol, mut server) in servers_of_rpc() {
        server.extend(["--frame-max", "1k"]);
        let server = Server::start(&server);
        let line = refused(&load(&server.addr, &["--protocol", protocol, "--size", "2k"]));
        assert!(line.contains("every connection is lost"), "{}: {line}", server.line);
        let output = run(&load(&server.addr, &["--protocol", protocol, "--size", "1k"]));
        assert!(output.status.success(), "{}: {}", server.line, text(&output.stderr));
    }
}

#[test]
fn malformed_calls_close_their_connection_only() {
    let call = |field: &[u8]| {
        let message = [&[0x80, 1, 0, 1, 0, 0, 0, 4][..], b"echo", &[0, 0, 0, 9], field].concat();
        frame(&message)
    };
    let malformed = [
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\nthe rest is no frame of HTTP/2".to_vec(),
        b"GET / HTTP/1.1\r\nhost: test\r\n\r\n".to_vec(),
        // A payload longer than its frame, one of negative length, none, another field.
        call(&[12, 0, 1, 11, 0, 1, 0, 1, 0, 0, 7, 0, 0]),
        call(&[12, 0, 1, 11, 0, 1, 0xff, 0, 0, 0, 7, 0, 0]),
        call(&[0]),
        call(&[8, 0, 1, 0, 0, 0, 0, 0]),
    ];
    for (protocol, server) in servers_of_rpc() {
        let server = Server::start(&server);
        for bytes in &malformed {
            let mut stream = connect(&server.addr);
            // It may be closed before all is written.
            let _ = stream.write_all(bytes);
            let _ = stream.shutdown(Shutdown::Write);
            // Whatever it says, it ends.
            let _ = stream.read_to_end(&mut Vec::new());
        }
        let output = run(&load(&server.addr, &["--protocol", protocol]));
        assert!(output.status.success(), "{}: {}", server.line, text(&output.stderr));
        let line = server.line.clone();
        let counters = server.stop(Signal::TERM);
        assert!(counters["handler_panics"].as_u64().unwrap_or(0) == 0, "{line}: {counters}");
    }
}

/// Every server that speaks such a protocol, and the protocol.
fn servers_of_rpc() -> Vec<(&'static str, Vec<&'static str>)> {
    let rings = ringpoll::capabilities().tier == Some(RingTier::Defer);
    let mut servers =
        vec![("grpc", vec!["peer", "tonic"]), ("thrift", vec!["peer", "volo-thrift"])];
    for protocol in ["grpc", "thrift"] {
        for (backend, placement) in [("epoll", "inline"), ("epoll", "pool"), ("uring", "auto")] {
            if backend == "uring" && !rings {
                println!("left out for a ring of tier {:?}", ringpoll::capabilities().tier);
                continue;
            }
            let ours = ["serve", "--protocol", protocol, "--backend", backend];
            servers.push((protocol, [&ours[..], &["--placement", placement]].concat()));
        }
    }
    for (_, server) in &mut servers {
        server.extend(["--addr", "127.0.0.1:0"]);
    }
    servers
}

/// Passes bytes on between clients and a server, as long as `pass` wants. It is called with the
/// number of the connection and all that the server has said on it, to change what is new.
fn between(
    server: &str,
    pass: impl Fn(usize, &mut Vec<u8>) -> bool + Clone + Send + 'static,
) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    let server = server.to_owned();
    thread::spawn(move || {
        for (number, client) in listener.incoming().enumerate() {
            let (mut client, mut ours) = (client.unwrap(), connect(&server));
            let (mut asking, mut asked) = (client.try_clone().unwrap(), ours.try_clone().unwrap());
            thread::spawn(move || {
                // It ends with either of them.
                let _ = std::io::copy(&mut asking, &mut asked);
                let _ = asked.shutdown(Shutdown::Write);
            });
            let pass = pass.clone();
            thread::spawn(move || {
                let (mut said, mut chunk) = (Vec::new(), vec![0; 64 << 10]);
                while let Ok(bytes @ 1..) = ours.read(&mut chunk) {
                    let passed = said.len();
                    said.extend_from_slice(&chunk[..bytes]);
                    if !pass(number, &mut said) || client.write_all(&said[passed..]).is_err() {
                        break;
                    }
                }
                for stream in [&client, &ours] {
                    // The other side may have closed it.
                    let _ = stream.shutdown(Shutdown::Both);
                }
            });
        }
    });
    addr
}

const PROTOCOLS: [&str; 3] = ["frames", "grpc", "thrift"];

#[test]
fn frameworks_are_compared_each_in_its_language() {
    let out = fresh_dir("rpc");
    let output = run(&[
        &["compare", "--scenario", "rpc", "--rounds", "1", "--duration", "40ms"][..],
        &["--backends", "epoll", "--out", out.to_str().unwrap()],
    ]
    .concat());
    assert!(output.status.success(), "{}", text(&output.stderr));
    let found = std::fs::read(out.join("compare.json")).unwrap();
    let found: serde_json::Value = serde_json::from_slice(&found).unwrap();
    let rows: Vec<Vec<_>> = found["cells"]
        .as_array()
        .unwrap()
        .iter()
        .map(|cell| {
            let rows = cell["rows"].as_array().unwrap();
            assert!(rows.iter().all(|row| row["failure"].is_null()), "{cell}");
            rows.iter().map(|row| row["candidate"].as_str().unwrap()).collect()
        })
        .collect();
    let ours = "ringpoll epoll inline";
    assert_eq!(rows, [[ours, "tonic"], [ours, "tonic"], [ours, "volo-thrift"]]);
}
