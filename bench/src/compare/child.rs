//! A candidate that can be loaded: a process of its own, or a server that somebody else started.

use std::io::{BufRead, BufReader, Read};
use std::net::SocketAddr;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::compare::candidate::Candidate;
use crate::compare::external::External;
use crate::compare::plan::{Pinned, Settings};
use crate::compare::remote::Remote;
use crate::error::{Failure, Result};
use crate::host::cpu;
use crate::load::dial;
use crate::stats::Stats;

/// A server that listens.
pub(crate) enum Server {
    Started(Started),
    /// Not ours to start or to stop.
    External(External),
    /// Nor is that one, but it may tell of itself.
    Remote(Remote),
}

impl Server {
    /// Starts a candidate on the server's CPUs and waits until it listens; one that is external
    /// does already. `args` is what the traffic asks of it.
    pub(crate) fn start(
        candidate: &Candidate,
        args: &[String],
        settings: &Settings,
        pinned: Option<&Pinned>,
    ) -> Result<Server> {
        match candidate {
            Candidate::External(external) => Ok(Server::External(external.clone())),
            Candidate::Remote(remote) => {
                // A host that is gone is waited for once, and not as long as a slow server.
                dial::reachable(&[remote.addr])?;
                Ok(Server::Remote(remote.clone()))
            }
            _ => Started::new(candidate, args, settings, pinned).map(Server::Started),
        }
    }

    pub(crate) fn addr(&self) -> SocketAddr {
        match self {
            Server::Started(started) => started.addr,
            Server::External(external) => external.addr,
            Server::Remote(remote) => remote.addr,
        }
    }

    /// `None` of a server whose process is not known, or not on this host.
    pub(crate) fn pid(&self) -> Option<u32> {
        match self {
            Server::Started(started) => Some(started.child.id()),
            Server::External(external) => external.pid,
            Server::Remote(_) => None,
        }
    }

    /// What a server on another host tells of itself now; `None` of all others.
    pub(crate) fn told(&self) -> Result<Option<Stats>> {
        match self {
            Server::Remote(remote) => remote.told(),
            Server::Started(_) | Server::External(_) => Ok(None),
        }
    }

    /// Has it print its counters. They are in what [`stop`](Server::stop) returns: to wait for them
    /// now would be time without requests.
    pub(crate) fn ask_report(&self) {
        if let Server::Started(started) = self {
            // A server that is gone is noticed by whoever loads it.
            let _ = kill_process(Pid::from_child(&started.child), Signal::USR1);
        }
    }

    /// Stops what was started, as an operator would.
    pub(crate) fn stop(self) -> Result<Said> {
        match self {
            Server::Started(started) => started.stop(),
            Server::External(_) | Server::Remote(_) => Ok(Said::default()),
        }
    }

    /// What a failed run really died of: the server's own end, if it has ended.
    pub(crate) fn explain(self, failure: Failure) -> Failure {
        match self {
            Server::Started(started) => started.explain(failure),
            Server::External(_) | Server::Remote(_) => failure,
        }
    }
}

/// A process of this program, or of an example. Dropping it kills the process.
pub(crate) struct Started {
    child: Child,
    addr: SocketAddr,
    /// Whether it prints counters when it is stopped.
    counts: bool,
    lines: Receiver<String>,
    stderr: Option<JoinHandle<String>>,
}

impl Started {
    fn new(
        candidate: &Candidate,
        args: &[String],
        settings: &Settings,
        pinned: Option<&Pinned>,
    ) -> Result<Started> {
        let mut command = command(candidate, args, settings, pinned)?;
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        // An interrupt from the keyboard goes to a process group, and is for this process alone.
        command.process_group(0);
        // A child inherits the affinity of the thread that starts it.
        let all = &settings.cpus_allowed;
        cpu::pin(&pinned.map_or_else(|| all.clone(), |pinned| candidate.cpus(pinned)))?;
        let spawned = settings.network.among_servers(|| command.spawn());
        cpu::pin(pinned.map_or(all, |pinned| &pinned.client_cpus))?;
        let mut child = spawned?.map_err(Failure::at(format!("start {candidate}")))?;
        let (sender, lines) = channel();
        if let Some(stdout) = child.stdout.take() {
            std::thread::spawn(move || {
                let lines = BufReader::new(stdout).lines().map_while(|line| line.ok());
                // The receiver is gone when the server is no longer of interest.
                lines.take_while(|line| sender.send(line.clone()).is_ok()).for_each(drop);
            });
        }
        let stderr =
            child.stderr.take().map(|stderr| std::thread::spawn(move || read_some(stderr)));
        let unspecified = SocketAddr::from(([0, 0, 0, 0], 0));
        let counts = !matches!(candidate, Candidate::Example(_));
        let mut server = Started { child, addr: unspecified, counts, lines, stderr };
        server.addr = server.wait_until_ready(settings.timeout())?;
        Ok(server)
    }

    fn stop(mut self) -> Result<Said> {
        if !self.counts {
            return Ok(Said::default());
        }
        let pid = Pid::from_child(&self.child);
        kill_process(pid, Signal::TERM).map_err(Failure::at("stop the server"))?;
        let Some(status) = self.wait_for_exit(STOP_PATIENCE) else {
            return Err(Failure::new(format!("the server did not stop in {STOP_PATIENCE:?}")));
        };
        if !status.success() {
            return Err(self.death(status));
        }
        let parse = |line: String| {
            serde_json::from_str(&line).map_err(Failure::at(format!("counters {line:?}")))
        };
        let mut counters: Vec<Value> = self.lines.iter().map(parse).collect::<Result<_>>()?;
        let last = counters.pop().ok_or_else(|| Failure::new("the server printed no counters"))?;
        let warnings = warnings(&self.complaints());
        Ok(Said { reports: counters, last, warnings })
    }

    fn explain(mut self, failure: Failure) -> Failure {
        match self.wait_for_exit(EXPLAIN_PATIENCE) {
            Some(status) => self.death(status),
            None => failure,
        }
    }

    fn wait_until_ready(&mut self, patience: Duration) -> Result<SocketAddr> {
        let Ok(line) = self.lines.recv_timeout(patience) else {
            return match self.wait_for_exit(EXPLAIN_PATIENCE) {
                Some(status) => Err(self.death(status)),
                None => Err(Failure::new(format!("the server did not listen in {patience:?}"))),
            };
        };
        let addr = line
            .strip_prefix("listening on ")
            .and_then(|rest| rest.split(' ').next()?.parse().ok());
        addr.ok_or_else(|| Failure::new(format!("the server printed {line:?}")))
    }

    fn wait_for_exit(&mut self, patience: Duration) -> Option<ExitStatus> {
        let deadline = Instant::now() + patience;
        loop {
            match self.child.try_wait() {
                Ok(Some(status)) => return Some(status),
                Ok(None) if Instant::now() < deadline => std::thread::sleep(POLL_PAUSE),
                Ok(None) | Err(_) => return None,
            }
        }
    }

    /// Everything on its standard error. Ends when the process has.
    fn complaints(&mut self) -> String {
        self.stderr.take().and_then(|reader| reader.join().ok()).unwrap_or_default()
    }

    fn death(&mut self, status: ExitStatus) -> Failure {
        let complaints = self.complaints();
        let said = cause(&complaints).unwrap_or("nothing on standard error");
        Failure::new(format!("the server died, {status}: {said}"))
    }
}

/// What starts a candidate, on a port of the kernel's choice.
fn command(
    candidate: &Candidate,
    args: &[String],
    settings: &Settings,
    pinned: Option<&Pinned>,
) -> Result<Command> {
    let ip = settings.network.server_ip();
    if let Candidate::Example(example) = candidate {
        return Ok(example.command(ip));
    }
    let program = std::env::current_exe().map_err(Failure::at("find this program"))?;
    let mut command = Command::new(program);
    command.args(candidate.args(settings.frame_max, pinned)).args(args);
    command.arg(format!("--addr={ip}:0"));
    Ok(command)
}

/// What a server printed between its start and its end; nothing of one that is external.
#[derive(Default)]
pub(crate) struct Said {
    /// Its counters, each time it was asked for them.
    pub(crate) reports: Vec<Value>,
    /// Its counters at the end.
    pub(crate) last: Value,
    /// What the library warned of.
    pub(crate) warnings: Vec<String>,
}

impl Drop for Started {
    fn drop(&mut self) {
        // Both fail only for a process that has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What a server warned of on its standard error.
fn warnings(complaints: &str) -> Vec<String> {
    let warnings = complaints.lines().filter_map(|line| line.trim().strip_prefix(WARNING));
    warnings.map(|warning| warning.trim().to_owned()).collect()
}

/// What a server died of, which is not what it warned of before, unless it says nothing else.
fn cause(complaints: &str) -> Option<&str> {
    let mut lines = complaints.lines().map(str::trim).filter(|line| !line.is_empty());
    let first = lines.clone().next();
    lines.find(|line| !line.starts_with(WARNING)).or(first)
}

/// The beginning of what a process complains about; the rest is read and dropped so that it never
/// blocks.
fn read_some(mut stderr: impl Read) -> String {
    let mut said = Vec::new();
    let mut chunk = [0; 4096];
    while let Ok(bytes @ 1..) = stderr.read(&mut chunk) {
        let room = STDERR_BYTES_MAX.saturating_sub(said.len());
        said.extend_from_slice(&chunk[..bytes.min(room)]);
    }
    String::from_utf8_lossy(&said).into_owned()
}

const STOP_PATIENCE: Duration = Duration::from_secs(8);
const EXPLAIN_PATIENCE: Duration = Duration::from_millis(200);
const POLL_PAUSE: Duration = Duration::from_millis(2);
const STDERR_BYTES_MAX: usize = 16 << 10;
/// How a line begins that the library warns with.
const WARNING: &str = "WARN ";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_does_not_die_of_what_it_warned_of() {
        let complaints = "\n WARN few CPUs\nringpoll-bench: serve: no\n WARN more\n";
        assert_eq!(cause(complaints), Some("ringpoll-bench: serve: no"));
        assert_eq!(warnings(complaints), ["few CPUs", "more"]);
        assert_eq!(cause(" WARN few CPUs\n"), Some("WARN few CPUs"));
        assert_eq!((cause(" \n"), warnings("killed").len()), (None, 0));
    }
}
