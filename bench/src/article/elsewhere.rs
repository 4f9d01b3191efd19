//! Servers that somebody has started on another host, and which experiments they are for.

use std::net::SocketAddr;

use ringpoll::{Backend, Placement, PollMode};

use crate::article::Experiment;
use crate::cli::{ArticleArgs, ServerAddr};
use crate::compare::candidate::Candidate;
use crate::compare::model::Row;
use crate::compare::remote::{ASK_PATIENCE, Remote};
use crate::error::{Failure, Result};
use crate::load::dial;
use crate::stats::{self, About};

/// A server that was found, and what it tells of itself.
struct Found {
    remote: Remote,
    about: Option<About>,
}

/// Replaces the servers of all experiments by those of `--addr`, and leaves out what has none.
/// Returns what a reader must know of it.
pub(crate) fn take(args: &ArticleArgs, experiments: &mut Vec<Experiment>) -> Result<Vec<String>> {
    let mut found: Vec<Found> = Vec::new();
    for server in &args.addr {
        let one = find(server, args.placement).map_err(Failure::at(format!("--addr {server}")))?;
        let same = |other: &&Found| is_same(&one.remote, &other.remote);
        if let Some(other) = found.iter().find(same) {
            return Err(Failure::new(format!(
                "--addr {server}: {} is there already",
                other.remote
            )));
        }
        if !experiments.iter().any(|one_of| has_place(one_of, &one.remote)) {
            let Remote { backend, placement, .. } = one.remote;
            return Err(Failure::new(format!(
                "--addr {server}: {backend} {placement} is in no experiment: {}",
                wanted(experiments)
            )));
        }
        found.push(one);
    }
    let mut notes: Vec<String> = found.iter().map(note).collect();
    for experiment in experiments.iter_mut() {
        let missing = replace(experiment, &found);
        if !missing.is_empty() {
            let what = if experiment.cells.is_empty() { "left out, " } else { "" };
            let (number, missing) = (experiment.number, missing.join(", "));
            notes.push(format!("Experiment {number}: {what}without {missing}."));
        }
    }
    experiments.retain(|experiment| !experiment.cells.is_empty());
    Ok(notes)
}

fn find(server: &ServerAddr, assumed: Placement) -> Result<Found> {
    let Some((backend, placement)) = server.named else {
        return find_telling(&server.addrs);
    };
    let addr = dial::reachable(&server.addrs)?;
    let placement = placement.unwrap_or(assumed);
    let remote = Remote { backend, placement, never_sleeps: false, addr, stats: None };
    Ok(Found { remote, about: None })
}

fn find_telling(addrs: &[SocketAddr]) -> Result<Found> {
    let (stats_addr, stats) = stats::ask(addrs, ASK_PATIENCE)?;
    let about = stats.about;
    let named =
        |what: &'static str| move |error: ringpoll::Error| Failure::new(format!("{what}: {error}"));
    let remote = Remote {
        backend: about.backend.parse().map_err(named("its backend"))?,
        placement: about.placement.parse().map_err(named("its placement"))?,
        never_sleeps: about.poll == PollMode::Always.to_string(),
        addr: dial::reachable(&[SocketAddr::new(stats_addr.ip(), about.addr.port())])?,
        stats: Some(stats_addr),
    };
    Ok(Found { remote, about: Some(about) })
}

/// Puts the servers that were found in the places of an experiment; returns who is missing.
fn replace(experiment: &mut Experiment, found: &[Found]) -> Vec<String> {
    let mut missing = Vec::new();
    for report in &mut experiment.cells {
        missing.clear();
        report.rows = std::mem::take(&mut report.rows)
            .into_iter()
            .filter_map(|row| match found.iter().find(|one| is_for(&row.server, &one.remote)) {
                Some(one) => Some(Row::new(&Candidate::Remote(one.remote.clone()))),
                None => {
                    missing.push(row.candidate);
                    None
                }
            })
            .collect();
    }
    experiment.cells.retain(|report| !report.rows.is_empty());
    missing
}

fn has_place(experiment: &Experiment, remote: &Remote) -> bool {
    let mut rows = experiment.cells.iter().flat_map(|report| &report.rows);
    rows.any(|row| is_for(&row.server, remote))
}

fn is_for(place: &Candidate, remote: &Remote) -> bool {
    match place {
        Candidate::Ringpoll { backend, placement, .. } => {
            is_like((*backend, *placement), (remote.backend, remote.placement))
        }
        _ => false,
    }
}

fn is_same(one: &Remote, other: &Remote) -> bool {
    is_like((one.backend, one.placement), (other.backend, other.placement))
}

/// Whether two servers are the same to an experiment, whatever the number of their threads.
fn is_like(one: (Backend, Placement), other: (Backend, Placement)) -> bool {
    let kinds = [one.1, other.1].map(|placement| std::mem::discriminant(&placement));
    one.0.to_string() == other.0.to_string() && kinds[0] == kinds[1]
}

/// All servers that an experiment has, each once.
fn wanted(experiments: &[Experiment]) -> String {
    let rows = experiments.iter().flat_map(|one| &one.cells).flat_map(|report| &report.rows);
    let mut names: Vec<String> = Vec::new();
    for row in rows {
        if let Candidate::Ringpoll { backend, placement, .. } = &row.server {
            let name = format!("{backend} {placement}");
            if !names.contains(&name) {
                names.push(name);
            }
        }
    }
    names.join(", ")
}

fn note(found: &Found) -> String {
    let remote = &found.remote;
    let Some(About { program_version: version, kernel, cpus_allowed, .. }) = &found.about else {
        return format!(
            "{remote}: tells nothing of itself, so neither CPU time nor system calls are known."
        );
    };
    let own = env!("CARGO_PKG_VERSION");
    let differs =
        if version == own { String::new() } else { format!(", where the client's is {own}") };
    format!("{remote}: version {version}{differs}, kernel {kernel}, may use CPU {cpus_allowed:?}.")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::article::experiments;
    use crate::cli::{Cli, Command};
    use clap::Parser;

    #[test]
    fn servers_take_the_places_they_are_for_and_the_rest_is_left_out() {
        let found = [found("epoll", "pool:8"), found("uring-2", "pool"), found("hybrid", "inline")];
        let mut all = experiments::plan(&parse(&["--connections", "2,3"]));
        let missing: Vec<_> = all.iter_mut().map(|one| replace(one, &found)).collect();
        assert!(all[0].cells.is_empty(), "both of its servers are inline");
        let names = |experiment: &Experiment| -> Vec<Vec<String>> {
            let rows = |cell: &crate::compare::model::CellReport| {
                cell.rows.iter().map(|row| row.candidate.clone()).collect()
            };
            experiment.cells.iter().map(rows).collect()
        };
        let [epoll, uring] =
            ["epoll pool:8", "uring-2 pool"].map(|name| format!("ringpoll {name} at 127.0.0.1:1"));
        assert_eq!(names(&all[1]), [[epoll.clone(), uring.clone()], [epoll.clone(), uring]]);
        assert_eq!(names(&all[2]), [[epoll.clone()], [epoll]]);
        assert_eq!(missing[0], ["ringpoll epoll inline", "ringpoll uring inline"]);
        assert_eq!(missing[1].len(), 2, "{missing:?}");
        assert_eq!(missing[2].len(), 4, "{missing:?}");
    }

    #[test]
    fn a_server_is_in_an_experiment_by_its_backend_and_where_its_handlers_run() {
        let all = experiments::plan(&parse(&[]));
        let places = |backend, placement| {
            let of = |one: &&Experiment| has_place(one, &found(backend, placement).remote);
            all.iter().filter(of).map(|one| one.number).collect::<Vec<_>>()
        };
        assert_eq!(places("epoll", "inline"), [1]);
        assert_eq!(places("epoll", "pool"), [2, 3]);
        assert_eq!(places("uring", "pool:2"), [3]);
        assert_eq!(places("uring-4", "pool"), [2]);
        assert_eq!(places("sqpoll-config1", "pool"), [3]);
        assert!(places("uring-4", "inline").is_empty() && places("epoll", "auto").is_empty());
        let all = wanted(&all);
        assert!(all.starts_with("epoll inline, uring inline, epoll pool, uring-2 pool"), "{all}");
    }

    fn found(backend: &str, placement: &str) -> Found {
        let remote = Remote {
            backend: backend.parse().unwrap(),
            placement: placement.parse().unwrap(),
            never_sleeps: false,
            addr: SocketAddr::from(([127, 0, 0, 1], 1)),
            stats: None,
        };
        Found { remote, about: None }
    }

    fn parse(extra: &[&str]) -> ArticleArgs {
        let args = [&["ringpoll-bench", "article"][..], extra].concat();
        match Cli::try_parse_from(args).unwrap().command {
            Command::Article(args) => args,
            _ => unreachable!("it was asked for the article"),
        }
    }
}
