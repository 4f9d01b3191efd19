//! wrk and h2load, as they are installed: how they are started, and what they print.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use hdrhistogram::Histogram;

use super::{CONNECTIONS, STREAMS, outcome};
use crate::error::{Failure, Result};
use crate::load::{Observer, Outcome, histogram};

/// GET requests over HTTP/1.1.
pub(super) fn wrk(
    addr: SocketAddr,
    path: &str,
    duration: Duration,
    observer: &mut dyn Observer,
) -> Result<Outcome> {
    let script = Scratch::new("wrk.lua", include_bytes!("wrk.lua"))?;
    let mut command = Command::new(WRK);
    command.args(["-t1", &format!("-c{CONNECTIONS}"), &format!("-d{}s", whole_s(duration))]);
    command.arg("-s").arg(&script.0).arg(format!("http://{addr}{path}"));
    from_wrk(&printed(command, observer)?)
}

/// GET requests over HTTP/2.
pub(super) fn h2load(
    addr: SocketAddr,
    path: &str,
    duration: Duration,
    observer: &mut dyn Observer,
) -> Result<Outcome> {
    run_h2load(addr, path, &[], duration, observer)
}

/// Calls of the example `grpc_greeter`.
pub(super) fn unary(
    addr: SocketAddr,
    duration: Duration,
    observer: &mut dyn Observer,
) -> Result<Outcome> {
    let body = Scratch::new("hello", HELLO)?;
    let data = format!("--data={}", body.0.display());
    let headers = ["--header=content-type: application/grpc", "--header=te: trailers"];
    let outcome = run_h2load(addr, GREET, &[&data, headers[0], headers[1]], duration, observer)?;
    // The status of a failed call is in its trailers, which h2load does not read. A failed call
    // has no message.
    if outcome.bytes < outcome.requests * GREETING_BYTES {
        let Outcome { requests, bytes, .. } = outcome;
        return Err(Failure::new(format!("{requests} calls were answered with {bytes} bytes")));
    }
    Ok(outcome)
}

fn run_h2load(
    addr: SocketAddr,
    path: &str,
    more: &[&str],
    duration: Duration,
    observer: &mut dyn Observer,
) -> Result<Outcome> {
    // The latencies that h2load prints have no percentiles.
    let log = Scratch::new("h2load.log", &[])?;
    let mut command = Command::new(H2LOAD);
    command.args([format!("-c{CONNECTIONS}"), format!("-m{STREAMS}"), "-t1".to_owned()]);
    command.args([format!("-D{}", whole_s(duration))]).args(more);
    command.arg(format!("--log-file={}", log.0.display()));
    command.arg(format!("http://{addr}{path}"));
    let printed = printed(command, observer)?;
    let lines = BufReader::new(File::open(&log.0).map_err(Failure::at("read h2load's log"))?);
    from_h2load(&printed, latencies_of(lines)?)
}

/// Runs a tool to its end, and tells when.
fn printed(mut command: Command, observer: &mut dyn Observer) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    command.stdin(Stdio::null());
    // An interrupt from the keyboard goes to a process group, and is for this process alone.
    command.process_group(0);
    observer.on_window_open();
    let output = command.output();
    observer.on_window_close();
    let output = output.map_err(Failure::at(format!("start {name}")))?;
    if !output.status.success() {
        let complaints = String::from_utf8_lossy(&output.stderr);
        let said = complaints.lines().next().unwrap_or("nothing on standard error");
        return Err(Failure::new(format!("{name} failed, {}: {said}", output.status)));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// What the script `wrk.lua` prints.
fn from_wrk(printed: &str) -> Result<Outcome> {
    let unclear = || Failure::new("wrk: its summary is not understood");
    let mut latency = histogram()?;
    let mut summary = None;
    for line in printed.lines() {
        let mut words = line.split_whitespace();
        let kind = words.next();
        if !matches!(kind, Some("summary" | "latency")) {
            continue;
        }
        let numbers: Vec<u64> = words.map_while(|word| word.parse().ok()).collect();
        match (kind, &numbers[..]) {
            (Some("summary"), &[us, requests, bytes, errors]) => {
                summary = Some((us, requests, bytes, errors));
            }
            (Some("latency"), &[us, count]) => {
                latency.saturating_record_n(us.saturating_mul(1000), count);
            }
            _ => return Err(unclear()),
        }
    }
    let (us, requests, bytes, errors) = summary.ok_or_else(unclear)?;
    if errors > 0 {
        return Err(Failure::new(format!("wrk: {errors} of {requests} requests failed")));
    }
    outcome(requests, bytes, Duration::from_micros(us), latency)
}

/// What h2load prints at its end, with the latencies of its log.
fn from_h2load(printed: &str, latency: Histogram<u64>) -> Result<Outcome> {
    let before = |line: &str, unit: &str| -> Option<f64> {
        let found = printed.lines().find(|found| found.starts_with(line))?;
        let (words, _) = found.split_once(unit)?;
        let word = words.split_whitespace().next_back()?;
        word.trim_matches(['(', ')']).parse().ok()
    };
    let of = |line: &str, unit: &str| {
        let missing = || Failure::new(format!("h2load: no {:?} in what it printed", unit.trim()));
        before(line, unit).ok_or_else(missing)
    };
    let requests = of("requests:", " succeeded")?;
    let wrong =
        of("requests:", " failed")? + of("requests:", " errored")? + of("requests:", " timeout")?;
    if wrong > 0.0 {
        return Err(Failure::new(format!("h2load: {wrong} requests failed, {requests} did not")));
    }
    let rate = of("finished in", " req/s")?;
    if rate <= 0.0 {
        return Err(Failure::new("h2load: not one reply"));
    }
    let elapsed = Duration::from_secs_f64(requests / rate);
    outcome(requests as u64, of("traffic:", " data")? as u64, elapsed, latency)
}

/// Of a log of h2load. Its columns are the start, the status, and the microseconds to the end.
fn latencies_of(log: impl BufRead) -> Result<Histogram<u64>> {
    let mut latency = histogram()?;
    for line in log.lines() {
        let line = line.map_err(Failure::at("read h2load's log"))?;
        let us = line.split('\t').nth(2).and_then(|us| us.parse::<u64>().ok());
        let us = us.ok_or_else(|| Failure::new(format!("h2load's log has the line {line:?}")))?;
        latency.saturating_record(us.saturating_mul(1000));
    }
    Ok(latency)
}

fn whole_s(duration: Duration) -> u64 {
    (duration.as_secs_f64().ceil() as u64).max(1)
}

/// A file for a tool. Dropping it removes the file.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str, content: &[u8]) -> Result<Scratch> {
        let name = format!("ringpoll-bench-{}-{name}", std::process::id());
        let path = std::env::temp_dir().join(name);
        // It exists only where a process of the same number was killed.
        let _ = fs::remove_file(&path);
        let open = OpenOptions::new().write(true).create_new(true).open(&path);
        let at = || Failure::at(format!("write {}", path.display()));
        let mut file = open.map_err(at())?;
        file.write_all(content).map_err(at())?;
        Ok(Scratch(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // A file that is gone already needs no removal.
        let _ = fs::remove_file(&self.0);
    }
}

pub(super) const WRK: &str = "wrk";
pub(super) const H2LOAD: &str = "h2load";
const GREET: &str = "/greeter.Greeter/Greet";
/// A message that is not compressed, its length, and a `Hello` with the name `ringpoll`.
const HELLO: &[u8] = b"\0\0\0\0\x0a\x0a\x08ringpoll";
/// The same of the answer, whose text is `hello, ringpoll`.
const GREETING_BYTES: u64 = 22;

#[cfg(test)]
mod tests {
    use super::*;

    const H2LOAD_PRINTS: &str = "\
Main benchmark duration is over for thread #0. Stopping all clients.

finished in 1.03s, 48296.00 req/s, 2.45MB/s
requests: 48296 total, 48808 started, 48296 done, 48296 succeeded, 0 failed, 0 errored, 0 timeout
status codes: 48296 2xx, 0 3xx, 0 4xx, 0 5xx
traffic: 2.45MB (2568008) total, 145.12KB (148600) headers (space savings 95.67%), \
1.01MB (1062512) data
                     min         max         mean         sd        +/- sd
time for request:     1.27ms     41.75ms      9.31ms      5.67ms    80.66%
";

    #[test]
    fn what_wrk_prints_becomes_a_count_and_latencies() {
        let printed = "Running 1s test @ http://127.0.0.1:1/\n  1 threads and 64 connections\n\
                       summary 1003384 89102 11494158 0\nlatency 97 1\nlatency 10829 3\n";
        let found = from_wrk(printed).unwrap();
        assert_eq!((found.requests, found.bytes, found.latency.len()), (89_102, 11_494_158, 4));
        assert_eq!(found.elapsed, Duration::from_micros(1_003_384));
        assert!((found.latency_us().max - 10_829.0).abs() < 20.0, "{:?}", found.latency_us());
    }

    #[test]
    fn errors_of_wrk_are_the_end_of_a_measurement() {
        assert!(from_wrk("summary 1 2 3 1\n").is_err());
        for unclear in ["", "summary 1 2 3\n", "summary 1 2 3 0\nlatency 97\n"] {
            assert!(from_wrk(unclear).is_err(), "{unclear:?}");
        }
    }

    #[test]
    fn what_h2load_prints_becomes_a_count_and_its_log_latencies() {
        let log = b"1795929861672729\t200\t1000\n1795929861672730\t200\t3000\n";
        let latency = latencies_of(&log[..]).unwrap();
        let found = from_h2load(H2LOAD_PRINTS, latency).unwrap();
        assert_eq!((found.requests, found.bytes), (48_296, 1_062_512));
        assert_eq!(found.bytes, found.requests * GREETING_BYTES);
        assert!((found.elapsed.as_secs_f64() - 1.0).abs() < 1e-9);
        assert!((found.latency_us().p99 - 3000.0).abs() < 5.0);
        assert!(latencies_of(&b"1795929861672729\t200\n"[..]).is_err());
    }

    #[test]
    fn errors_of_h2load_are_the_end_of_a_measurement() {
        for (right, wrong) in [("0 failed", "1 failed"), ("0 timeout", "7 timeout"), ("req/s", "")]
        {
            let printed = H2LOAD_PRINTS.replace(right, wrong);
            assert!(from_h2load(&printed, histogram().unwrap()).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_message_of_grpc_has_its_length() {
        assert_eq!(usize::from(HELLO[4]), HELLO.len() - 5);
        assert_eq!(GREETING_BYTES as usize, 5 + 2 + "hello, ringpoll".len());
    }

    #[test]
    fn tools_are_given_whole_seconds() {
        assert_eq!([1, 1000, 1001].map(Duration::from_millis).map(whole_s), [1, 1, 2]);
    }
}
