//! The servers that are compared.

use std::fmt;

use clap::Parser;
use ringpoll::{Backend, Placement};

use crate::cli::{Cli, CompareArgs};
use crate::compare::plan::{Cell, Pinned};
use crate::error::{Failure, Result};
use crate::peers::Peer;
use crate::probe::{BACKEND_VARIABLE, TIER_VARIABLE};

/// A server to measure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Candidate {
    Ringpoll {
        backend: Backend,
        placement: Placement,
        /// Never sleeps: what one connection gains from a CPU of its own.
        spinning: bool,
        /// More arguments of `serve`.
        extra: Vec<String>,
    },
    Peer(Peer),
}

impl Candidate {
    pub(crate) fn ours(backend: Backend, placement: Placement) -> Candidate {
        Candidate::Ringpoll { backend, placement, spinning: false, extra: Vec::new() }
    }

    pub(crate) fn spinning(backend: Backend) -> Candidate {
        Candidate::Ringpoll {
            backend,
            placement: Placement::Inline,
            spinning: true,
            extra: Vec::new(),
        }
    }

    pub(crate) fn is_ours(&self) -> bool {
        matches!(self, Candidate::Ringpoll { .. })
    }

    /// The backend of a server the goals are about: ours, as it comes, with handlers on the poller.
    pub(crate) fn judged_backend(&self) -> Option<Backend> {
        match self {
            Candidate::Ringpoll { backend, placement, spinning: false, extra } => {
                (*placement == Placement::Inline && extra.is_empty()).then_some(*backend)
            }
            _ => None,
        }
    }

    /// Whether the candidate is worth measuring under this traffic.
    pub(crate) fn suits(&self, cell: &Cell) -> bool {
        match self {
            Candidate::Ringpoll { spinning, .. } => !spinning || cell.is_ping_pong(),
            // They only say something about pipelined requests. One at a time, the first is the
            // other tokio server with one system call more, the second has too few buffers.
            Candidate::Peer(Peer::TokioFramed | Peer::BareRing64k) => cell.depth > 1,
            // Small buffers are a handicap, and no limit, where requests are pipelined.
            Candidate::Peer(Peer::BareRing) => cell.depth == 1,
            Candidate::Peer(_) => true,
        }
    }

    /// Whether it is worth watching with nothing to do.
    pub(crate) fn suits_idle(&self) -> bool {
        match self {
            Candidate::Ringpoll { spinning, .. } => !spinning,
            Candidate::Peer(peer) => !matches!(peer, Peer::TokioFramed | Peer::BareRing64k),
        }
    }

    /// The CPUs it is started on.
    pub(crate) fn cpus(&self, pinned: &Pinned) -> Vec<usize> {
        match self {
            // A poller that never sleeps leaves its CPU to nobody under a real-time policy, not to
            // the thread that stops the server either. That one may use the client's.
            Candidate::Ringpoll { spinning: true, .. } => {
                [&pinned.server_cpus[..], &pinned.client_cpus[..]].concat()
            }
            _ => pinned.server_cpus.clone(),
        }
    }

    /// The command line that starts it on a port of the kernel's choice.
    pub(crate) fn args(&self, frame_max: u32, pinned: Option<&Pinned>) -> Vec<String> {
        let mut args = match self {
            Candidate::Ringpoll { backend, placement, .. } => vec![
                "serve".to_owned(),
                format!("--backend={backend}"),
                format!("--placement={placement}"),
            ],
            Candidate::Peer(peer) => vec!["peer".to_owned(), peer.to_string()],
        };
        args.extend([
            "--addr=127.0.0.1:0".to_owned(),
            format!("--die-with={}", std::process::id()),
            format!("--frame-max={frame_max}"),
        ]);
        if let Candidate::Ringpoll { spinning, extra, .. } = self {
            if *spinning {
                args.push("--poll=always".to_owned());
                args.extend(pinned.into_iter().flat_map(|pinned| {
                    let cpus: Vec<_> = pinned.server_cpus.iter().map(usize::to_string).collect();
                    [
                        format!("--pollers={}", cpus.len()),
                        format!("--poller-cpus={}", cpus.join(",")),
                    ]
                }));
            }
            args.extend(extra.iter().cloned());
        }
        args
    }
}

impl fmt::Display for Candidate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Candidate::Ringpoll { backend, placement, spinning, extra } => {
                write!(f, "ringpoll {backend} {placement}")?;
                if *spinning {
                    f.write_str(" spinning")?;
                }
                extra.iter().try_for_each(|arg| write!(f, " {arg}"))
            }
            Candidate::Peer(peer) => peer.fmt(f),
        }
    }
}

/// Ours first, then the peers, in the order they were named. Without CPUs of its own, a server that
/// never sleeps would only stand in the client's way.
pub(crate) fn candidates(args: &CompareArgs, pinned: bool) -> Result<Vec<Candidate>> {
    check_serve_args(&args.serve_arg)?;
    let mut all: Vec<Candidate> = Vec::new();
    let mut add = |candidate: Candidate| {
        if !all.contains(&candidate) {
            all.push(candidate);
        }
    };
    for backend in &args.backends {
        for placement in placements(args, *backend) {
            add(Candidate::ours(*backend, placement));
            if *backend == Backend::Uring && placement == Placement::Inline && pinned {
                add(Candidate::spinning(*backend));
            }
            if *backend != Backend::Epoll && !args.serve_arg.is_empty() {
                add(Candidate::Ringpoll {
                    backend: *backend,
                    placement,
                    spinning: false,
                    extra: args.serve_arg.clone(),
                });
            }
        }
    }
    args.peers.0.iter().for_each(|peer| add(Candidate::Peer(*peer)));
    Ok(all)
}

fn placements(args: &CompareArgs, backend: Backend) -> Vec<Placement> {
    match &args.placements {
        Some(placements) => placements.clone(),
        None if args.quick || backend == Backend::Hybrid => vec![Placement::Inline],
        None => vec![Placement::Inline, Placement::Pool { workers: 0 }],
    }
}

/// With such a switch set, rows of different names would be of one backend.
pub(crate) fn refuse_switches() -> Result<()> {
    let set = [BACKEND_VARIABLE, TIER_VARIABLE]
        .into_iter()
        .find(|variable| std::env::var_os(variable).is_some());
    match set {
        Some(variable) => Err(Failure::new(format!(
            "{variable} is set: it would replace what this comparison asks its servers for"
        ))),
        None => Ok(()),
    }
}

/// Before the minutes of measuring, not after them.
fn check_serve_args(extra: &[String]) -> Result<()> {
    let serve = ["ringpoll-bench", "serve", "--addr", "127.0.0.1:0"].map(str::to_owned);
    match Cli::try_parse_from(serve.into_iter().chain(extra.iter().cloned())) {
        Ok(_) => Ok(()),
        Err(error) => Err(Failure::new(format!("--serve-arg: {}", crate::first_paragraph(&error)))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::Command;

    #[test]
    fn all_backends_are_compared_inline_and_two_of_them_with_workers() {
        assert_eq!(
            names(&[]),
            [
                "ringpoll epoll inline",
                "ringpoll epoll pool",
                "ringpoll uring inline",
                "ringpoll uring inline spinning",
                "ringpoll uring pool",
                "ringpoll hybrid inline",
                "tokio",
                "tokio-framed",
                "bare-epoll",
                "bare-ring",
                "bare-ring-64k",
            ]
        );
        let quick = names(&["--quick", "--peers", ""]);
        assert!(quick.iter().all(|name| name.contains("inline")), "{quick:?}");
    }

    #[test]
    fn arguments_for_serve_are_measured_beside_the_servers_without_them() {
        let args = ["--peers", "", "--placements", "inline", "--serve-arg", "--bundles"];
        assert_eq!(
            names(&[&args[..], &["--backends", "epoll,hybrid"]].concat()),
            ["ringpoll epoll inline", "ringpoll hybrid inline", "ringpoll hybrid inline --bundles"]
        );
        assert!(check_serve_args(&["--bundle".to_owned()]).is_err());
        assert!(check_serve_args(&["--ring-buffers=1".to_owned()]).is_err());
    }

    #[test]
    fn a_limit_is_measured_where_it_is_one() {
        let all = candidates(&parse(&[]), true).unwrap();
        let suiting = |connections, depth| -> Vec<String> {
            let cell = Cell::new(connections, depth, 0, 1024);
            all.iter().filter(|one| one.suits(&cell)).map(Candidate::to_string).collect()
        };
        let has = |names: &[String], name: &str| names.iter().any(|one| one == name);
        let (one, many, deep) = (suiting(1, 1), suiting(100, 1), suiting(4, 64));
        assert!(has(&one, "ringpoll uring inline spinning"));
        assert!(!has(&many, "ringpoll uring inline spinning"));
        assert!(has(&many, "bare-ring") && !has(&many, "bare-ring-64k"));
        assert!(has(&deep, "bare-ring-64k") && !has(&deep, "bare-ring"));
    }

    fn names(extra: &[&str]) -> Vec<String> {
        candidates(&parse(extra), true).unwrap().iter().map(Candidate::to_string).collect()
    }

    fn parse(extra: &[&str]) -> CompareArgs {
        let args = [&["ringpoll-bench", "compare"][..], extra].concat();
        match Cli::try_parse_from(args).unwrap().command {
            Command::Compare(args) => args,
            _ => unreachable!("it was asked for a comparison"),
        }
    }
}
