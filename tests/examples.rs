//! The examples, run as built programs and tested over TCP.
//!
//! Every wait has a deadline, and every program ends with its test.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

#[test]
fn framed_rpc_runs_to_its_end() {
    let mut example = Example::start("framed_rpc", &[]);
    let lines: Vec<String> = std::iter::from_fn(|| example.line()).collect();
    assert_eq!(example.exit_code(), Some(0), "printed {lines:#?}");
    assert!(lines.contains(&"client: HELLO".to_string()), "printed {lines:#?}");
    assert!(lines.contains(&"client: done".to_string()), "printed {lines:#?}");
}

#[test]
fn mux_rpc_runs_to_its_end() {
    let mut example = Example::start("mux_rpc", &[]);
    let lines: Vec<String> = std::iter::from_fn(|| example.line()).collect();
    assert_eq!(example.exit_code(), Some(0), "printed {lines:#?}");
    assert!(lines.contains(&"client: got hello".to_string()), "printed {lines:#?}");
    assert!(lines.contains(&"client: done".to_string()), "printed {lines:#?}");
}

#[test]
fn echo_sends_everything_back() {
    let example = Example::start("echo", &["127.0.0.1:0"]);
    let mut peer = connect(example.address());
    for message in ["a", "bc", "def"] {
        peer.write_all(message.as_bytes()).expect("the server reads");
        assert_eq!(read_exact(&mut peer, message.len()), message.as_bytes());
    }
    assert_eq!(exchange(peer, pattern(LARGE_BYTES)), pattern(LARGE_BYTES));
}

#[test]
fn echo_serves_connections_side_by_side() {
    let example = Example::start("echo", &["127.0.0.1:0"]);
    let addr = example.address();
    let mut peers: Vec<TcpStream> = (0..16).map(|_| connect(addr)).collect();
    for (index, peer) in peers.iter_mut().enumerate() {
        peer.write_all(&[index as u8; 100]).expect("the server reads");
    }
    for (index, peer) in peers.iter_mut().enumerate().rev() {
        assert_eq!(read_exact(peer, 100), [index as u8; 100]);
    }
}

#[test]
fn proxy_carries_both_directions_at_once() {
    let echo = Example::start("echo", &["127.0.0.1:0"]);
    let upstream = echo.address().to_string();
    let proxy = Example::start("proxy", &["127.0.0.1:0", &upstream]);
    let bytes = pattern(LARGE_BYTES);
    assert_eq!(exchange(connect(proxy.address()), bytes.clone()), bytes);
}

#[test]
fn proxy_forwards_the_end_of_a_stream_and_still_carries_the_answer() {
    // Answers only when the request has ended.
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let upstream = listener.local_addr().expect("a bound address").to_string();
    let answering = thread::spawn(move || -> io::Result<usize> {
        let (mut stream, _) = listener.accept()?;
        stream.set_read_timeout(Some(DEADLINE))?;
        let mut request = Vec::new();
        stream.read_to_end(&mut request)?;
        stream.write_all(&request)?;
        stream.write_all(b" and goodbye")?;
        Ok(request.len())
    });
    let proxy = Example::start("proxy", &["127.0.0.1:0", &upstream]);
    let mut peer = connect(proxy.address());
    peer.write_all(b"hello").expect("the proxy reads");
    peer.shutdown(Shutdown::Write).expect("the write side is open");
    let mut answer = String::new();
    peer.read_to_string(&mut answer).expect("the answer ends in time");
    assert_eq!(answer, "hello and goodbye");
    assert_eq!(answering.join().expect("no panic").expect("no error"), 5);
}

#[test]
fn proxy_closes_its_client_when_the_upstream_refuses() {
    // Bound and dropped, so no server listens on it.
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let upstream = listener.local_addr().expect("a bound address").to_string();
    drop(listener);
    let proxy = Example::start("proxy", &["127.0.0.1:0", &upstream]);
    let mut peer = connect(proxy.address());
    assert_eq!(peer.read(&mut [0; 1]).expect("an end, not a timeout"), 0);
}

#[test]
fn proxy_without_its_arguments_says_what_it_needs() {
    let mut example = Example::start("proxy", &["127.0.0.1:0"]);
    assert_eq!(example.exit_code(), Some(1));
}

/// A running example, killed when dropped.
struct Example {
    name: &'static str,
    child: Child,
    lines: mpsc::Receiver<String>,
}

impl Example {
    fn start(name: &'static str, arguments: &[&str]) -> Example {
        let mut child = Command::new(program(name))
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{name}: {error}; `cargo build --examples` makes it"));
        let stdout = child.stdout.take().expect("stdout is piped");
        let (sender, lines) = mpsc::channel();
        // Ends with the program, or when the test has ended.
        thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        Example { name, child, lines }
    }

    /// The next line it prints; `None` at its end.
    fn line(&self) -> Option<String> {
        match self.lines.recv_timeout(DEADLINE) {
            Ok(line) => Some(line),
            Err(mpsc::RecvTimeoutError::Disconnected) => None,
            Err(mpsc::RecvTimeoutError::Timeout) => {
                panic!("{}: silent for {DEADLINE:?}", self.name)
            }
        }
    }

    /// Where it listens, from the first line it prints.
    fn address(&self) -> SocketAddr {
        let line = self.line().unwrap_or_else(|| panic!("{}: ended at once", self.name));
        let addr = line.strip_prefix("listening on ").and_then(|addr| addr.parse().ok());
        addr.unwrap_or_else(|| panic!("{}: printed {line:?}", self.name))
    }

    /// What it exits with, once it has closed its output.
    fn exit_code(&mut self) -> Option<i32> {
        while self.line().is_some() {}
        self.child.wait().expect("it was started").code()
    }
}

impl Drop for Example {
    fn drop(&mut self) {
        // Fails for one that has ended, which is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// `target/PROFILE/examples/NAME`; this test is `target/PROFILE/deps/examples-HASH`.
fn program(name: &str) -> PathBuf {
    let test = std::env::current_exe().expect("a running test has a path");
    let profile = test.parent().and_then(|deps| deps.parent()).expect("cargo's layout");
    profile.join("examples").join(name)
}

fn connect(addr: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect_timeout(&addr, DEADLINE).expect("it listens");
    stream.set_read_timeout(Some(DEADLINE)).expect("a positive timeout");
    stream.set_write_timeout(Some(DEADLINE)).expect("a positive timeout");
    stream
}

fn read_exact(peer: &mut TcpStream, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    peer.read_exact(&mut bytes).expect("the answer comes in time");
    bytes
}

/// Writes `bytes` while reading, ends its side, and returns all that came until the peer's end.
fn exchange(mut peer: TcpStream, bytes: Vec<u8>) -> Vec<u8> {
    let mut writer = peer.try_clone().expect("a second descriptor");
    let writing = thread::spawn(move || -> io::Result<()> {
        writer.write_all(&bytes)?;
        writer.shutdown(Shutdown::Write)
    });
    let mut answer = Vec::new();
    peer.read_to_end(&mut answer).expect("the answer ends in time");
    writing.join().expect("no panic").expect("everything is taken in time");
    answer
}

/// Bytes without a short period, so that a lost or moved block shows.
fn pattern(count: usize) -> Vec<u8> {
    (0..count).map(|index| (index ^ (index >> 8) ^ (index >> 16)) as u8).collect()
}

const LARGE_BYTES: usize = 8 * 1024 * 1024;
const DEADLINE: Duration = Duration::from_secs(20);
