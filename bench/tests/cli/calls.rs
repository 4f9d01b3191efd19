//! The command `calls`: clients whose calls are right, and mistakes in one line.

use rustix::process::Signal;
use serde_json::Value;

use crate::harness::*;

#[test]
fn each_client_measures_its_calls() {
    let ours = ["serve", "--addr", "127.0.0.1:0", "--scenario", "calls"];
    let tonic = ["peer", "tonic", "--addr", "127.0.0.1:0"];
    let cases: [(&[&str], &[&str]); 4] = [
        (&ours, &["ringpoll", "--backend", "epoll"]),
        (&ours, &["ringpoll", "--runtime", "current-thread"]),
        (&ours, &["tokio", "--call-timeout", "20s"]),
        (&tonic, &["tonic"]),
    ];
    for (server, client) in cases {
        let server = Server::start(server);
        let addr = server.addr.to_string();
        let traffic = ["--callers", "8", "--connections", "2", "--duration", "50ms", "--json"];
        let args = [&["calls", "--addr", &addr, "--client"], client, &traffic].concat();
        let output = run(&args);
        assert!(output.status.success(), "{client:?}: {}", text(&output.stderr));
        let found: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert!(found["calls"].as_u64().unwrap() > 0, "{found}");
        assert!(found["calls_ever"].as_u64() >= found["calls"].as_u64(), "{found}");
        assert!(found["cpu_us_per_call"].as_f64().unwrap() > 0.0, "{found}");
        server.stop(Signal::TERM);
    }
}

#[test]
fn calls_that_are_outstanding_together_are_each_answered() {
    for client in ["ringpoll", "tokio"] {
        let args = ["serve", "--addr", "127.0.0.1:0", "--scenario", "calls", "--hold", "500"];
        let server = Server::start(&args);
        let addr = server.addr.to_string();
        let args = ["calls", "--client", client, "--addr", &addr, "--outstanding", "500"];
        let output = run(&args);
        assert!(output.status.success(), "{client}: {}", text(&output.stderr));
        let found: Value = serde_json::from_slice(&output.stdout).unwrap();
        for wave in found["waves"].as_array().unwrap() {
            assert_eq!(wave["right_answers"], 500, "{found}");
        }
        if client == "ringpoll" {
            assert_eq!(
                (&found["client_answers"], &found["discarded_answers"]),
                (&1500.into(), &0.into())
            );
        }
        server.stop(Signal::TERM);
    }
}

#[test]
fn a_client_without_its_server_says_so() {
    for client in ["ringpoll", "tokio", "tonic"] {
        let line = refused(&["calls", "--client", client, "--addr", "127.0.0.1:1"]);
        assert!(line.contains("127.0.0.1:1"), "{line}");
    }
}
