//! The servers that are compared.

use std::fmt;

use clap::Parser;
use ringpoll::{Backend, Placement};

use crate::cli::{Cli, Command, CompareArgs, CompareScenario, ServeArgs};
use crate::compare::caller::{self, Caller};
use crate::compare::example::{self, Example};
use crate::compare::external::External;
use crate::compare::plan::{Cell, Pinned};
use crate::compare::remote::Remote;
use crate::compare::scenario::{self, Usual};
use crate::error::{Failure, Result};
use crate::peers::Peer;
use crate::probe::{BACKEND_VARIABLE, TIER_VARIABLE};
use crate::rpc::Protocol;
use crate::serve;

/// A server to measure, or a client.
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
    External(External),
    Remote(Remote),
    Example(Example),
    Caller(Caller),
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

    /// Who talks to the kernel; `None` in a peer.
    pub(crate) fn backend(&self) -> Option<Backend> {
        match self {
            Candidate::Ringpoll { backend, .. } => Some(*backend),
            Candidate::Remote(remote) => Some(remote.backend),
            Candidate::Example(example) => example.backend,
            Candidate::Caller(caller) => caller.backend(),
            Candidate::Peer(_) | Candidate::External(_) => None,
        }
    }

    /// Whether its pollers were told never to sleep.
    pub(crate) fn never_sleeps(&self) -> bool {
        match self {
            Candidate::Ringpoll { spinning, extra, .. } => {
                *spinning || extra.iter().any(|arg| arg == "--poll=always")
            }
            Candidate::Remote(remote) => remote.never_sleeps,
            Candidate::Peer(_)
            | Candidate::External(_)
            | Candidate::Example(_)
            | Candidate::Caller(_) => false,
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

    /// Whether it is ours, and chooses where handlers run.
    pub(crate) fn is_auto(&self) -> bool {
        matches!(self, Candidate::Ringpoll { placement: Placement::Auto, .. })
    }

    /// Whether the candidate is worth measuring under this traffic.
    pub(crate) fn suits(&self, cell: &Cell) -> bool {
        match self {
            Candidate::Caller(_) => cell.scenario == CompareScenario::Calls,
            Candidate::Ringpoll { spinning: true, .. }
                if cell.scenario != CompareScenario::Echo =>
            {
                false
            }
            // Where kernel threads poll too, system calls are what it shows: none.
            Candidate::Ringpoll { spinning: true, backend: Backend::Sqpoll(_), .. } => {
                (cell.connections, cell.depth, cell.idle) == (100, 1, 0)
            }
            Candidate::Ringpoll { spinning, .. } => !spinning || cell.is_ping_pong(),
            Candidate::Peer(peer) => scenario::suits_peer(*peer, cell),
            // It forwards to nobody that is known here, and speaks no framework's language.
            Candidate::External(_) => {
                cell.scenario != CompareScenario::Proxy && cell.protocol == Protocol::Frames
            }
            Candidate::Remote(_) => true,
            Candidate::Example(example) => example.suits(cell),
        }
    }

    /// Whether it is worth watching with nothing to do.
    pub(crate) fn suits_idle(&self) -> bool {
        match self {
            Candidate::Ringpoll { spinning, .. } => !spinning,
            Candidate::Peer(peer) => {
                !matches!(peer, Peer::TokioFramed | Peer::BareRing64k)
                    && peer.protocol() == Protocol::Frames
            }
            Candidate::External(external) => external.pid.is_some(),
            Candidate::Remote(_) | Candidate::Example(_) | Candidate::Caller(_) => false,
        }
    }

    /// The CPUs it is started on.
    pub(crate) fn cpus(&self, pinned: &Pinned) -> Vec<usize> {
        let Pinned { server_cpus, sqpoll_cpus, client_cpus } = pinned;
        match self {
            // A poller that never sleeps leaves its CPU to nobody under a real-time policy, not to
            // the thread that stops the server either. That one may use the client's.
            Candidate::Ringpoll { spinning: true, .. } => {
                [&server_cpus[..], sqpoll_cpus, client_cpus].concat()
            }
            Candidate::Ringpoll { backend, .. } if is_sqpoll(*backend) => {
                [&server_cpus[..], sqpoll_cpus].concat()
            }
            _ => server_cpus.clone(),
        }
    }

    /// The command line that starts it, without where it listens.
    pub(crate) fn args(&self, frame_max: u32, pinned: Option<&Pinned>) -> Vec<String> {
        let mut args = match self {
            Candidate::Ringpoll { backend, .. } => {
                vec!["serve".to_owned(), format!("--backend={backend}")]
            }
            Candidate::Peer(peer) => vec!["peer".to_owned(), peer.to_string()],
            Candidate::External(_) | Candidate::Remote(_) | Candidate::Example(_) => {
                return Vec::new();
            }
            Candidate::Caller(caller) => return caller.args(),
        };
        args.extend([
            format!("--die-with={}", std::process::id()),
            format!("--frame-max={frame_max}"),
        ]);
        if let Candidate::Ringpoll { backend, placement, spinning, extra } = self {
            args.extend(thread_args(*backend, *placement, *spinning, pinned));
            args.extend(extra.iter().cloned());
        }
        args
    }
}

/// Which threads serve, and where: what is started on more CPUs than the server's keeps to those.
fn thread_args(
    backend: Backend,
    placement: Placement,
    spinning: bool,
    pinned: Option<&Pinned>,
) -> Vec<String> {
    let poll = spinning.then(|| "--poll=always".to_owned());
    let placed = |placement| poll.into_iter().chain([format!("--placement={placement}")]);
    let has_sqpoll_cpus = |pinned: &&Pinned| is_sqpoll(backend) && !pinned.sqpoll_cpus.is_empty();
    let Some(pinned) = pinned.filter(|pinned| spinning || has_sqpoll_cpus(pinned)) else {
        return placed(placement).collect();
    };
    let count = pinned.server_cpus.len();
    let cpus = list(&pinned.server_cpus);
    let placement = match placement {
        Placement::Pool { workers: 0 } => Placement::Pool { workers: count },
        other => other,
    };
    let mut args: Vec<_> = placed(placement).collect();
    args.extend([format!("--poller-cpus={cpus}"), format!("--worker-cpus={cpus}")]);
    if spinning {
        args.push(format!("--pollers={count}"));
    }
    if is_sqpoll(backend) {
        // Without CPUs of their own they stay beside the poller, off the client's.
        let own = Some(&pinned.sqpoll_cpus).filter(|cpus| !cpus.is_empty());
        args.push(format!("--sqpoll-cpus={}", own.map_or(cpus, |own| list(own))));
    }
    args
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
            Candidate::External(external) => f.write_str(&external.name),
            Candidate::Remote(remote) => remote.fmt(f),
            Candidate::Example(example) => example.fmt(f),
            Candidate::Caller(caller) => caller.fmt(f),
        }
    }
}

/// The candidates of every scenario, each once: ours first, then the peers in the order they were
/// named, then the servers of others.
pub(crate) fn candidates(
    args: &CompareArgs,
    pinned: bool,
    external: &[External],
) -> Result<Vec<Candidate>> {
    let mut all: Vec<Candidate> = Vec::new();
    for scenario in &args.scenario.0 {
        let more = of_scenario(args, *scenario, pinned, external)?;
        all.extend(more.into_iter().filter(|one| !all.contains(one)).collect::<Vec<_>>());
    }
    let has_extra =
        |one: &Candidate| matches!(one, Candidate::Ringpoll { extra, .. } if !extra.is_empty());
    if !args.serve_arg.is_empty() && !all.iter().any(has_extra) {
        let extra = args.serve_arg.join(" ");
        return Err(Failure::new(format!("--serve-arg {extra}: no backend here takes it")));
    }
    Ok(all)
}

/// Those that a scenario compares. Without CPUs of its own, a server that never sleeps would only
/// stand in the client's way.
pub(crate) fn of_scenario(
    args: &CompareArgs,
    scenario: CompareScenario,
    pinned: bool,
    external: &[External],
) -> Result<Vec<Candidate>> {
    let usual = Usual::of(scenario);
    if scenario == CompareScenario::Http {
        return Ok(example::candidates(args, &usual));
    }
    if scenario == CompareScenario::Calls {
        return Ok(caller::candidates(args, &usual));
    }
    let mut all: Vec<Candidate> = Vec::new();
    let mut add = |candidate: Candidate| {
        if !all.contains(&candidate) {
            all.push(candidate);
        }
    };
    for backend in args.backends.as_deref().unwrap_or(usual.backends) {
        let placements = scenario::placements(scenario, *backend, args.quick);
        for placement in args.placements.as_deref().unwrap_or(placements) {
            add(Candidate::ours(*backend, *placement));
            let may_spin = scenario == CompareScenario::Echo
                && (*backend == Backend::Uring || is_sqpoll(*backend));
            if may_spin && *placement == Placement::Inline && pinned {
                add(Candidate::spinning(*backend));
            }
            if takes(*backend, &args.serve_arg)? && *backend != Backend::Epoll {
                add(Candidate::Ringpoll {
                    backend: *backend,
                    placement: *placement,
                    spinning: false,
                    extra: args.serve_arg.clone(),
                });
            }
        }
    }
    args.also.iter().map(|line| also(line)).try_for_each(|one| one.map(&mut add))?;
    let peers = args.peers.as_ref().map_or(usual.peers, |peers| &peers.0);
    peers.iter().for_each(|peer| add(Candidate::Peer(*peer)));
    external.iter().for_each(|server| add(Candidate::External(server.clone())));
    Ok(all)
}

/// A server of ours by its arguments. Refused before the minutes of measuring, not after them.
fn also(line: &str) -> Result<Candidate> {
    let wrong = |why: String| Failure::new(format!("--also {line:?}: {why}"));
    let mut words = line.split_whitespace().map(str::to_owned);
    let backend = words.next().ok_or_else(|| wrong("no backend".to_owned()))?;
    let mut extra: Vec<_> = words.collect();
    let args = serve_args(&backend, &extra).map_err(|why| wrong(why.to_string()))?;
    serve::refuse_missing(&args).map_err(|why| wrong(why.to_string()))?;
    // It is part of the name already.
    extra.retain(|arg| !arg.starts_with("--placement"));
    let is_chosen = line.contains("--placement");
    let placement = if is_chosen { args.placement } else { Placement::Inline };
    Ok(Candidate::Ringpoll { backend: args.backend, placement, spinning: false, extra })
}

fn serve_args(backend: &str, extra: &[String]) -> Result<ServeArgs> {
    let fixed = ["ringpoll-bench", "serve", "--addr=127.0.0.1:0"].map(str::to_owned);
    let line = fixed.into_iter().chain([format!("--backend={backend}")]);
    let cli = Cli::try_parse_from(line.chain(extra.iter().cloned()))
        .map_err(|error| Failure::new(crate::first_paragraph(&error)))?;
    match cli.command {
        Command::Serve(args) => Ok(args),
        _ => Err(Failure::new("not an argument of serve")),
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

/// Whether there are more arguments for `serve`, and it takes them with this backend. Found out
/// before the minutes of measuring, not after them.
fn takes(backend: Backend, extra: &[String]) -> Result<bool> {
    let args = serve_args(&backend.to_string(), extra)
        .map_err(|why| Failure::new(format!("--serve-arg: {why}")))?;
    Ok(!extra.is_empty() && serve::refuse_missing(&args).is_ok())
}

fn is_sqpoll(backend: Backend) -> bool {
    matches!(backend, Backend::Sqpoll(_))
}

/// CPU numbers as `serve` takes them.
fn list(cpus: &[usize]) -> String {
    cpus.iter().map(usize::to_string).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compare::plan::Question;

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
    fn what_places_handlers_is_compared_with_what_does_not() {
        assert_eq!(
            names(&["--scenario", "heavy"]),
            [
                "ringpoll uring auto",
                "ringpoll uring inline",
                "ringpoll uring pool",
                "tokio-ws",
                "tokio-per-cpu",
                "monoio",
                "compio",
            ]
        );
        let cell = Cell::heavy(Question::Fairness, 1);
        assert!(!Candidate::spinning(Backend::Uring).suits(&cell));
        assert!(Candidate::Peer(Peer::TokioFramed).suits(&cell));
    }

    #[test]
    fn arguments_for_serve_are_measured_beside_the_servers_without_them() {
        let args = ["--peers", "", "--placements", "inline", "--serve-arg", "--bundles"];
        assert_eq!(
            names(&[&args[..], &["--backends", "epoll,hybrid"]].concat()),
            ["ringpoll epoll inline", "ringpoll hybrid inline", "ringpoll hybrid inline --bundles"]
        );
        for wrong in ["--bundle", "--ring-buffers=1", "--send-rings=2"] {
            let args = [&args[..4], &["--serve-arg", wrong]].concat();
            assert!(candidates(&parse(&args), true, &[]).is_err(), "{wrong}");
        }
        let args = [&args[..4], &["--backends", "uring,sqpoll-config2", "--serve-arg"]].concat();
        let all =
            candidates(&parse(&[&args[..], &["--send-rings=2"]].concat()), false, &[]).unwrap();
        assert_eq!(
            all.iter().map(Candidate::to_string).collect::<Vec<_>>(),
            [
                "ringpoll uring inline",
                "ringpoll sqpoll-config2 inline",
                "ringpoll sqpoll-config2 inline --send-rings=2"
            ]
        );
    }

    #[test]
    fn one_more_server_is_named_by_its_arguments() {
        let base = ["--backends", "uring", "--placements", "inline", "--peers", "", "--idle", "0"];
        let also = |lines: &[&str]| {
            let lines = lines.iter().flat_map(|line| ["--also", *line]);
            names(&base.iter().copied().chain(lines).collect::<Vec<_>>())
        };
        assert_eq!(
            also(&["sqpoll-config2 --send-rings=1", "uring --placement=pool:2", "epoll"])[2..],
            [
                "ringpoll sqpoll-config2 inline --send-rings=1",
                "ringpoll uring pool:2",
                "ringpoll epoll inline"
            ]
        );
        for wrong in ["", "kqueue", "uring --send-rings=1", "epoll --nonsense"] {
            let args = [&base[..], &["--also", wrong]].concat();
            assert!(candidates(&parse(&args), true, &[]).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_limit_is_measured_where_it_is_one() {
        let all = candidates(&parse(&[]), true, &[]).unwrap();
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

    #[test]
    fn where_the_kernel_polls_a_spinning_poller_shows_that_no_call_is_left() {
        let all = names(&["--backends", "sqpoll-shared", "--placements", "inline", "--peers", ""]);
        assert_eq!(
            all,
            ["ringpoll sqpoll-shared inline", "ringpoll sqpoll-shared inline spinning"]
        );
        let backend = "sqpoll-shared".parse().unwrap();
        let suits = |connections, depth, idle| {
            Candidate::spinning(backend).suits(&Cell::new(connections, depth, idle, 1024))
        };
        assert!(suits(100, 1, 0) && !suits(1, 1, 0) && !suits(100, 1, 400) && !suits(4, 64, 0));
        let pinned = Pinned { server_cpus: vec![0, 2], sqpoll_cpus: vec![], client_cpus: vec![1] };
        let spinning = Candidate::spinning(backend);
        let args = spinning.args(1, Some(&pinned));
        for wanted in ["--poll=always", "--poller-cpus=0,2", "--sqpoll-cpus=0,2", "--pollers=2"] {
            assert!(args.iter().any(|arg| arg == wanted), "{wanted} is not in {args:?}");
        }
        assert_eq!(spinning.cpus(&pinned), [0, 2, 1]);
    }

    #[test]
    fn kernel_threads_with_cpus_of_their_own_leave_the_server_what_the_others_have() {
        let pinned =
            Pinned { server_cpus: vec![0, 1], sqpoll_cpus: vec![2, 3], client_cpus: vec![4] };
        let pool = Placement::Pool { workers: 0 };
        let sqpoll = Candidate::ours("sqpoll-config1".parse().unwrap(), pool);
        let args = sqpoll.args(1, Some(&pinned)).join(" ");
        assert!(args.contains("--placement=pool:2 --poller-cpus=0,1 --worker-cpus=0,1"), "{args}");
        assert!(args.contains("--sqpoll-cpus=2,3") && !args.contains("--pollers"), "{args}");
        assert_eq!(sqpoll.cpus(&pinned), [0, 1, 2, 3]);
        let epoll = Candidate::ours(Backend::Epoll, pool);
        assert!(!epoll.args(1, Some(&pinned)).join(" ").contains("-cpus="));
        assert_eq!(epoll.cpus(&pinned), [0, 1]);
    }

    fn names(extra: &[&str]) -> Vec<String> {
        candidates(&parse(extra), true, &[]).unwrap().iter().map(Candidate::to_string).collect()
    }

    fn parse(extra: &[&str]) -> CompareArgs {
        let args = [&["ringpoll-bench", "compare"][..], extra].concat();
        match Cli::try_parse_from(args).unwrap().command {
            Command::Compare(args) => args,
            _ => unreachable!("it was asked for a comparison"),
        }
    }
}
