//! `serve --stats`: what a server tells of itself to whoever measures it from another host.
//!
//! Whoever connects to that address gets one line of JSON, and the connection ends. `listen` is the
//! server's side, a thread of its own; `ask` is the other side, and ends when its patience does.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::cli::resolve;
use crate::error::{Failure, Result};
use crate::host::cpu::Ticks;
use crate::host::process::CpuUse;

/// The line.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Stats {
    pub(crate) about: About,
    /// CPU time of all threads of the process, and of those that poll for it.
    pub(crate) cpu: CpuUse,
    pub(crate) rss_bytes: u64,
    /// Of the CPUs it may use.
    pub(crate) ticks: Ticks,
    pub(crate) counters: Value,
}

/// What stays as it is while a server runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct About {
    pub(crate) program_version: String,
    /// Where it serves; the host may have other addresses.
    pub(crate) addr: SocketAddr,
    pub(crate) backend: String,
    pub(crate) placement: String,
    pub(crate) poll: String,
    pub(crate) kernel: String,
    pub(crate) cpus_allowed: Vec<usize>,
}

/// Tells everybody who connects to `addr`, as long as the process lives; returns where that is.
pub(crate) fn listen(
    addr: &str,
    stats: impl Fn() -> Result<Stats> + Send + 'static,
) -> Result<SocketAddr> {
    let failed = |error: io::Error| Failure::new(format!("--stats: bind {addr}: {error}"));
    let listener = TcpListener::bind(&resolve(addr)?[..]).map_err(failed)?;
    let bound = listener.local_addr().map_err(failed)?;
    let tell_all = move || {
        for stream in listener.incoming() {
            match stream {
                // Who did not wait for the answer does not need it.
                Ok(stream) => drop(tell(stream, stats())),
                // Out of descriptors, most likely: not to be tried again at once.
                Err(_) => std::thread::sleep(ACCEPT_PAUSE),
            }
        }
    };
    let thread = std::thread::Builder::new().name("stats".to_owned());
    thread.spawn(tell_all).map_err(Failure::at("start a thread"))?;
    Ok(bound)
}

fn tell(mut stream: TcpStream, stats: Result<Stats>) -> Result<()> {
    stream.set_write_timeout(Some(TELL_PATIENCE)).map_err(Failure::at("write timeout"))?;
    let line = serde_json::to_string(&stats?).map_err(Failure::at("write the stats as JSON"))?;
    stream.write_all(format!("{line}\n").as_bytes()).map_err(Failure::at("write the stats"))
}

/// What the server at the first of these addresses says that answers at all, and which one that
/// is.
pub(crate) fn ask(addrs: &[SocketAddr], patience: Duration) -> Result<(SocketAddr, Stats)> {
    let mut failure = Failure::new("no address");
    for addr in addrs {
        match TcpStream::connect_timeout(addr, patience) {
            Ok(stream) => {
                let stats = read(stream, patience);
                return stats.map(|stats| (*addr, stats)).map_err(Failure::at(addr));
            }
            Err(error) => failure = Failure::new(format!("connect {addr}: {error}")),
        }
    }
    Err(failure)
}

fn read(mut stream: TcpStream, patience: Duration) -> Result<Stats> {
    let deadline = Instant::now() + patience;
    let late = || Failure::new(format!("no line as of serve --stats in {patience:?}"));
    let (mut line, mut chunk) = (Vec::new(), [0; 4096]);
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(late());
        }
        stream.set_read_timeout(Some(left)).map_err(Failure::at("read timeout"))?;
        match stream.read(&mut chunk) {
            Ok(0) => break,
            Ok(bytes) => line.extend_from_slice(&chunk[..bytes]),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Err(late()),
            Err(error) => return Err(Failure::new(format!("read: {error}"))),
        }
        if line.len() > LINE_BYTES_MAX {
            return Err(Failure::new("not the line of serve --stats: it is too long"));
        }
    }
    serde_json::from_slice(&line).map_err(Failure::at("not the line of serve --stats"))
}

const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
const TELL_PATIENCE: Duration = Duration::from_secs(1);
/// Many times what it has.
const LINE_BYTES_MAX: usize = 64 << 10;

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const PATIENCE: Duration = Duration::from_secs(20);

    #[test]
    fn whoever_connects_gets_what_there_is_to_tell() {
        let addr = listen("127.0.0.1:0", || Ok(some())).unwrap();
        for _ in 0..2 {
            let (of, stats) = ask(&[addr], PATIENCE).unwrap();
            assert_eq!((of, &stats.about, stats.rss_bytes), (addr, &some().about, 17));
            assert_eq!(stats.counters["system_calls"], 3);
        }
        // Somebody who does not stay is no reason to stop.
        drop(TcpStream::connect(addr).unwrap());
        assert!(ask(&[addr], PATIENCE).is_ok());
    }

    #[test]
    fn an_answer_that_does_not_come_or_is_none_is_a_failure() {
        let silent = TcpListener::bind("127.0.0.1:0").unwrap();
        let said = ask(&[silent.local_addr().unwrap()], Duration::from_millis(30)).unwrap_err();
        assert!(said.to_string().contains("no line as of serve --stats in 30ms"), "{said}");
        let failing = listen("127.0.0.1:0", || Err(Failure::new("gone"))).unwrap();
        assert!(ask(&[failing], PATIENCE).unwrap_err().to_string().contains("not the line"));
        let long = || Ok(Stats { counters: "x".repeat(LINE_BYTES_MAX).into(), ..some() });
        let long = listen("127.0.0.1:0", long).unwrap();
        assert!(ask(&[long], PATIENCE).unwrap_err().to_string().contains("too long"));
        assert!(ask(&[], PATIENCE).is_err());
    }

    fn some() -> Stats {
        Stats {
            about: About {
                program_version: "1.2.3".into(),
                addr: SocketAddr::from(([0, 0, 0, 0], 80)),
                backend: "epoll".into(),
                placement: "inline".into(),
                poll: "adaptive".into(),
                kernel: "6.1".into(),
                cpus_allowed: vec![0, 1],
            },
            cpu: CpuUse::default(),
            rss_bytes: 17,
            ticks: Ticks::default(),
            counters: json!({ "system_calls": 3 }),
        }
    }
}
