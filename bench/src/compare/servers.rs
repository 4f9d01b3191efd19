//! Who is compared: versions, settings, and how to start the same server by hand.

use crate::compare::candidate::Candidate;
use crate::compare::external::External;
use crate::compare::model::ServerInfo;
use crate::compare::plan::Settings;
use crate::report::PROGRAM;

/// The same candidate may have more than one command line, by kind of traffic; this is the part
/// that they share.
pub(crate) fn info(candidate: &Candidate, settings: &Settings) -> ServerInfo {
    let (version, about) = match candidate {
        Candidate::Ringpoll { .. } => {
            (format!("ringpoll {}", settings.program_version), ours(candidate))
        }
        Candidate::Peer(peer) => (peer.version(), peer.settings().to_owned()),
        Candidate::External(server) => ("started by others".to_owned(), external(server)),
        Candidate::Remote(_) => (String::new(), "on another host".to_owned()),
        Candidate::Example(example) => ("an example program".to_owned(), example.command_line()),
        Candidate::Caller(caller) => (caller.version(), caller.settings().to_owned()),
    };
    let args = candidate.args(settings.frame_max, settings.pinned.as_ref()).into_iter();
    // The number of this process says nothing to anybody else.
    let args = args.filter(|arg| !arg.starts_with("--die-with="));
    let args: Vec<_> = args.collect();
    if args.is_empty() {
        let (candidate, command_line) = (candidate.to_string(), String::new());
        return ServerInfo { candidate, version, settings: about, command_line };
    }
    let command_line = [PROGRAM.to_owned()].into_iter().chain(args).collect::<Vec<_>>().join(" ");
    ServerInfo { candidate: candidate.to_string(), version, settings: about, command_line }
}

fn external(server: &External) -> String {
    let process = match server.pid {
        Some(pid) => format!("process {pid}"),
        None => "its process is not known, nor what it uses".to_owned(),
    };
    format!("at {}, on CPUs of their choice; {process}", server.addr)
}

fn ours(candidate: &Candidate) -> String {
    let Candidate::Ringpoll { backend, placement, extra, .. } = candidate else {
        return String::new();
    };
    let polls = if candidate.never_sleeps() { ", pollers never sleep" } else { "" };
    let extra = match &extra[..] {
        [] => String::new(),
        extra => format!(", {}", extra.join(" ")),
    };
    format!("backend {backend}, handlers placed {placement}{polls}{extra}")
}

/// The command line of this process, as a shell would take it.
pub(crate) fn own_command_line() -> String {
    let args = std::env::args_os().skip(1).map(|arg| quoted(&arg.to_string_lossy()));
    [PROGRAM.to_owned()].into_iter().chain(args).collect::<Vec<_>>().join(" ")
}

fn quoted(arg: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_=,./:%+@".contains(c);
    if !arg.is_empty() && arg.chars().all(is_plain) {
        return arg.to_owned();
    }
    format!("'{}'", arg.replace('\'', "'\\''"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Cli, Command};
    use crate::compare::plan::Cpus;
    use clap::Parser;
    use ringpoll::Backend;

    #[test]
    fn a_server_is_told_with_what_starts_it_and_without_this_process() {
        let cli = Cli::try_parse_from(["ringpoll-bench", "compare"]).unwrap();
        let Command::Compare(args) = cli.command else { unreachable!("it was asked for") };
        let cpus = Cpus { allowed: vec![0], pinned: None };
        let settings = Settings::new(&args, cpus, 1);
        let ours = info(&Candidate::spinning(Backend::Uring), &settings);
        assert!(ours.command_line.starts_with("ringpoll-bench serve --backend=uring "));
        assert!(!ours.command_line.contains("die-with"), "{}", ours.command_line);
        assert!(ours.settings.contains("never sleep"), "{}", ours.settings);
        let peer = info(&Candidate::Peer("tokio-ws".parse().unwrap()), &settings);
        assert!(peer.version.starts_with("tokio 1."), "{}", peer.version);
        assert!(peer.command_line.starts_with("ringpoll-bench peer tokio-ws "));
    }

    #[test]
    fn an_argument_that_a_shell_would_split_is_quoted() {
        assert_eq!(quoted("--out=a/b"), "--out=a/b");
        assert_eq!(quoted("it's"), r"'it'\''s'");
        assert_eq!(quoted(""), "''");
    }
}
