//! How these tests start the program, ask it, and wait for it.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

pub(crate) const PROGRAM: &str = env!("CARGO_BIN_EXE_ringpoll-bench");
/// Far beyond what anything here takes; whatever reaches it hangs.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

/// The program, without switches that happen to be set where these tests run.
pub(crate) fn program() -> Command {
    let mut program = Command::new(PROGRAM);
    program.env_remove("RINGPOLL_BACKEND").env_remove("RINGPOLL_URING_TIER");
    program
}

pub(crate) fn run(args: &[impl AsRef<str>]) -> Output {
    run_with(args, &[])
}

/// Runs the program to its end, which must come by itself.
pub(crate) fn run_with(args: &[impl AsRef<str>], variables: &[(&str, &str)]) -> Output {
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
pub(crate) fn refused(args: &[impl AsRef<str>]) -> String {
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
pub(crate) fn load(addr: &impl ToString, extra: &[&str]) -> Vec<String> {
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

/// Checks what a load of `args` prints with `--json`.
pub(crate) fn check_line(stdout: &[u8], args: &[&str]) -> Value {
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
    // What a gap of the warm-up delayed was asked for in the warm-up.
    if left_out == 0.0 {
        assert!(clean >= number(&found["requests"]) - most_under_way(args), "{found}");
    }
    assert_eq!(found.as_object().unwrap().len(), 14);
    found
}

/// Requests that a load of `args` may have under way when its measurement begins.
fn most_under_way(args: &[&str]) -> f64 {
    // An open loop may be behind by any number.
    if args.contains(&"--rate") {
        return f64::INFINITY;
    }
    let value = |flag| match args.iter().position(|arg| *arg == flag) {
        Some(at) => args[at + 1].parse().unwrap(),
        None => 1.0,
    };
    value("--connections") * value("--depth")
}

/// A server that runs `life` for every connection.
pub(crate) fn scripted(life: impl Fn(TcpStream) + Clone + Send + 'static) -> SocketAddr {
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
pub(crate) struct Server {
    pub(crate) child: Child,
    pub(crate) stdout: BufReader<ChildStdout>,
    pub(crate) line: String,
    pub(crate) addr: String,
}

impl Server {
    pub(crate) fn start(args: &[&str]) -> Server {
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
    pub(crate) fn counters(&mut self) -> Value {
        kill_process(Pid::from_child(&self.child), Signal::USR1).unwrap();
        let mut line = String::new();
        self.stdout.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }

    /// Its counters: the one line it prints at its end.
    pub(crate) fn stop(mut self, signal: Signal) -> Value {
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

pub(crate) fn wait(child: &mut Child) -> Option<std::process::ExitStatus> {
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

/// What comes to be before the deadline.
pub(crate) fn until<T>(look: impl Fn() -> Option<T>) -> T {
    let deadline = Instant::now() + DEADLINE;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "it never came to be");
        thread::sleep(Duration::from_millis(2));
    }
}

/// What an `article` has written there.
pub(crate) fn article_report(out: &Path) -> Value {
    serde_json::from_slice(&fs::read(out.join("article.json")).unwrap()).unwrap()
}

/// All rows of all its experiments.
pub(crate) fn article_rows(report: &Value) -> impl Iterator<Item = &Value> {
    let experiments = report["experiments"].as_array().unwrap();
    let cells = experiments.iter().flat_map(|one| one["cells"].as_array().unwrap());
    cells.flat_map(|cell| cell["rows"].as_array().unwrap())
}

pub(crate) fn collect(mut stream: impl Read + Send + 'static) -> thread::JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).unwrap();
        bytes
    })
}

pub(crate) fn connect(addr: &str) -> TcpStream {
    let stream = TcpStream::connect(addr).unwrap();
    stream.set_nodelay(true).unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    stream
}

pub(crate) fn frame(payload: &[u8]) -> Vec<u8> {
    [&(payload.len() as u32).to_be_bytes()[..], payload].concat()
}

pub(crate) fn fresh_dir(name: &str) -> PathBuf {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    // There is none on the first run.
    let _ = fs::remove_dir_all(&dir);
    fs::create_dir_all(&dir).unwrap();
    dir
}

pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
