//! The examples, run as built programs and tested over TCP.
//!
//! Every wait has a deadline, and every program ends with its test.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
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
    let proxy = Example::start("proxy", &["--addr", "127.0.0.1:0", "--upstream", &upstream]);
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
    let proxy = Example::start("proxy", &["--addr", "127.0.0.1:0", "--upstream", &upstream]);
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
    let proxy = Example::start("proxy", &["--addr", "127.0.0.1:0", "--upstream", &upstream]);
    let mut peer = connect(proxy.address());
    assert_eq!(peer.read(&mut [0; 1]).expect("an end, not a timeout"), 0);
}

#[test]
fn proxy_without_its_arguments_says_what_it_needs() {
    let mut example = Example::start("proxy", &["--addr", "127.0.0.1:0"]);
    assert_eq!(example.exit_code(), Some(1));
}

#[test]
fn kv_answers_commands_however_they_arrive() {
    let commands = b"*3\r\n$3\r\nSET\r\n$3\r\nkey\r\n$7\r\na\r\nb\r\nc\r\n\
        *2\r\n$3\r\nget\r\n$3\r\nkey\r\n\r\nEXISTS key none\r\n*0\r\nGET none\r\nPING\r\n";
    let answers = "+OK\r\n$7\r\na\r\nb\r\nc\r\n:1\r\n$-1\r\n+PONG\r\n";
    for runtime in ["ringpoll", "tokio"] {
        let example = Example::start("kv", &["--addr", "127.0.0.1:0", "--runtime", runtime]);
        let addr = example.address();
        for cut in (0..commands.len()).step_by(7) {
            let mut peer = connect(addr);
            peer.set_nodelay(true).expect("a tcp socket");
            peer.write_all(&commands[..cut]).expect("the server reads");
            // The first answer shows that the server has read the first part.
            let first = if cut > 40 { read_exact(&mut peer, 5) } else { Vec::new() };
            let rest = exchange(peer, commands[cut..].to_vec());
            let got = [first, rest].concat();
            assert_eq!(String::from_utf8_lossy(&got), answers, "{runtime}, cut at {cut}");
        }
    }
}

#[test]
fn kv_answers_bad_input_with_one_error_and_closes() {
    for runtime in ["ringpoll", "tokio"] {
        let example = Example::start("kv", &["--addr", "127.0.0.1:0", "--runtime", runtime]);
        let addr = example.address();
        let too_long = [b"x".repeat(70_000), b"\n".to_vec()].concat();
        let bad: [&[u8]; 6] =
            [b"*1\r\n!", b"*x\r\n", b"*-1\r\n", b"*1\r\n$99999999\r\n", b"*9999999\r\n", &too_long];
        for bad in bad {
            let mut peer = connect(addr);
            peer.write_all(&[b"PING\r\n", bad].concat()).expect("the server reads");
            let mut answer = String::new();
            // Its own end is not awaited: the server closes by itself.
            peer.read_to_string(&mut answer).expect("an end, not a timeout");
            let error = answer.strip_prefix("+PONG\r\n-ERR Protocol error");
            let is_one =
                error.is_some_and(|error| error.ends_with("\r\n") && error.lines().count() == 1);
            assert!(is_one, "{runtime}: {answer:?}");
        }
        assert_eq!(exchange(connect(addr), b"PING\r\n".to_vec()), b"+PONG\r\n");
    }
}

#[test]
fn chat_sends_each_line_to_all_others() {
    let example = Example::start("chat", &["--addr", "127.0.0.1:0"]);
    let addr = example.address();
    let mut peers: Vec<TcpStream> = (0..3).map(|_| connect(addr)).collect();
    // A client takes part when it gets a line of another one.
    let mut pinging = peers[0].try_clone().expect("a second descriptor");
    let all_take_part = Arc::new(AtomicBool::new(false));
    let stop = Arc::clone(&all_take_part);
    let pings = thread::spawn(move || {
        while !stop.load(Ordering::Relaxed) {
            pinging.write_all(b"ping\n").expect("the server reads");
            thread::sleep(Duration::from_millis(1));
        }
    });
    for peer in &mut peers[1..] {
        assert_eq!(read_exact(peer, 5), b"ping\n");
    }
    all_take_part.store(true, Ordering::Relaxed);
    pings.join().expect("no panic");
    peers[0].write_all(b"a line\nhalf").expect("the server reads");
    for peer in &mut peers[1..] {
        let mut lines = BufReader::new(peer).lines().map_while(Result::ok);
        assert!(lines.any(|line| line == "a line"));
    }
    // Nothing that the first client has said comes back to it.
    peers[1].write_all(b"an answer\n").expect("the server reads");
    assert_eq!(read_exact(&mut peers[0], 10), b"an answer\n");
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
