//! The example programs of `ringpoll-compat`, each on a backend of ringpoll and on tokio.

use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::Command;

use ringpoll::Backend;

use crate::cli::CompareArgs;
use crate::compare::candidate::Candidate;
use crate::compare::plan::Cell;
use crate::compare::scenario::Usual;
use crate::load::HttpLoad;
use crate::probe::BACKEND_VARIABLE;

/// A server that is a program of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Example {
    program: &'static str,
    path: PathBuf,
    /// `None`: on tokio.
    pub(crate) backend: Option<Backend>,
}

impl Example {
    pub(crate) fn suits(&self, cell: &Cell) -> bool {
        cell.http.is_some_and(|load| load.program() == self.program)
    }

    /// What starts it.
    pub(crate) fn command(&self, ip: IpAddr) -> Command {
        let mut command = Command::new(&self.path);
        command.args(["--addr", &format!("{ip}:0"), "--runtime", self.runtime()]);
        if let Some(backend) = self.backend {
            command.env(BACKEND_VARIABLE, backend.to_string());
        }
        command
    }

    /// The same for a reader.
    pub(crate) fn command_line(&self) -> String {
        let variable = self.backend.map(|backend| format!("{BACKEND_VARIABLE}={backend} "));
        let (program, runtime) = (self.program, self.runtime());
        format!("{}{program} --runtime {runtime}", variable.unwrap_or_default())
    }

    fn runtime(&self) -> &'static str {
        if self.backend.is_some() { "ringpoll" } else { "tokio" }
    }
}

impl fmt::Display for Example {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.backend {
            Some(backend) => write!(f, "{} ringpoll {backend}", self.program),
            None => write!(f, "{} tokio", self.program),
        }
    }
}

/// The servers of the scenario http whose programs are there.
pub(crate) fn candidates(args: &CompareArgs, usual: &Usual) -> Vec<Candidate> {
    let mut all = Vec::new();
    let backends = args.backends.as_deref().unwrap_or(usual.backends);
    for load in HttpLoad::ALL {
        let (program, path) = (load.program(), args.examples_dir().join(load.program()));
        if !path.is_file() {
            continue;
        }
        for backend in backends.iter().copied().map(Some).chain([None]) {
            let one = Candidate::Example(Example { program, path: path.clone(), backend });
            if !all.contains(&one) {
                all.push(one);
            }
        }
    }
    all
}

/// The kinds of traffic that can be measured here, and a line for each program that others miss.
pub(crate) fn measurable(cells: Vec<Cell>, examples: &Path) -> (Vec<Cell>, Vec<String>) {
    let mut kept = Vec::new();
    let mut missing: Vec<(String, Vec<String>)> = Vec::new();
    for cell in cells {
        let Some(program) = cell.http.and_then(|load| missing_program(load, examples)) else {
            kept.push(cell);
            continue;
        };
        match missing.iter_mut().find(|(known, _)| *known == program) {
            Some((_, names)) => names.push(cell.name),
            None => missing.push((program, vec![cell.name])),
        }
    }
    let line = |(program, names): (String, Vec<String>)| {
        format!("Not measured: {}; {program} is missing.", names.join(", "))
    };
    (kept, missing.into_iter().map(line).collect())
}

fn missing_program(load: HttpLoad, examples: &Path) -> Option<String> {
    let path = examples.join(load.program());
    if !path.is_file() {
        return Some(path.display().to_string());
    }
    let tool = load.tool()?;
    let places = std::env::var_os("PATH").unwrap_or_default();
    let is_there = std::env::split_paths(&places).any(|place| place.join(tool).is_file());
    (!is_there).then(|| tool.to_owned())
}

/// What others are held against.
pub(crate) const ON_TOKIO: [&str; 2] = ["axum_app tokio", "grpc_greeter tokio"];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Cli, Command as Asked};
    use crate::compare::{candidate, scenario};
    use clap::Parser;
    use std::fs;

    #[test]
    fn each_program_is_measured_on_both_backends_and_on_tokio() {
        let dir = programs("both", &["axum_app", "grpc_greeter"]);
        let args = asked(&dir, &[]);
        assert_eq!(
            names(&args),
            [
                "axum_app ringpoll epoll",
                "axum_app ringpoll uring",
                "axum_app tokio",
                "grpc_greeter ringpoll epoll",
                "grpc_greeter ringpoll uring",
                "grpc_greeter tokio",
            ]
        );
        assert!(ON_TOKIO.iter().all(|name| names(&args).iter().any(|one| one == name)));
        let cells = scenario::cells(&args);
        assert_eq!(cells.len(), HttpLoad::ALL.len());
        for cell in cells {
            let all = candidate::candidates(&args, true, &[]).unwrap();
            assert_eq!(all.iter().filter(|one| one.suits(&cell)).count(), 3, "{}", cell.name);
        }
        let one = names(&asked(&dir, &["--backends", "uring"]));
        assert_eq!(one[..2], ["axum_app ringpoll uring", "axum_app tokio"]);
    }

    #[test]
    fn a_program_that_is_missing_is_named_with_the_rows_it_takes_along() {
        let dir = programs("one", &["axum_app"]);
        let args = asked(&dir, &[]);
        assert!(names(&args).iter().all(|name| name.starts_with("axum_app")));
        let (kept, lines) = measurable(scenario::cells(&args), &dir);
        assert!(kept.iter().all(|cell| cell.http != Some(HttpLoad::Unary)));
        let wanted = format!(
            "Not measured: http: gRPC unary; {} is missing.",
            dir.join("grpc_greeter").display()
        );
        assert!(lines.contains(&wanted), "{lines:?}");
    }

    #[test]
    fn a_server_is_told_its_runtime_and_its_backend() {
        let on = |backend| Example { program: "axum_app", path: "/x/axum_app".into(), backend };
        let ip = IpAddr::from([127, 0, 0, 1]);
        let uring = on(Some(Backend::Uring));
        assert_eq!(uring.command_line(), "RINGPOLL_BACKEND=uring axum_app --runtime ringpoll");
        let command = uring.command(ip);
        let args: Vec<_> = command.get_args().collect();
        assert_eq!(args, ["--addr", "127.0.0.1:0", "--runtime", "ringpoll"]);
        assert_eq!(command.get_envs().count(), 1);
        assert_eq!(on(None).command(ip).get_envs().count(), 0);
        assert_eq!(on(None).command_line(), "axum_app --runtime tokio");
    }

    fn names(args: &CompareArgs) -> Vec<String> {
        let all = candidate::candidates(args, true, &[]).unwrap();
        all.iter().map(Candidate::to_string).collect()
    }

    fn asked(dir: &Path, more: &[&str]) -> CompareArgs {
        let dir = dir.to_str().unwrap();
        let line = ["ringpoll-bench", "compare", "--scenario", "http", "--examples", dir];
        match Cli::try_parse_from(line.iter().chain(more)).unwrap().command {
            Asked::Compare(args) => args,
            _ => unreachable!("it was asked for a comparison"),
        }
    }

    /// A directory with programs of these names.
    fn programs(name: &str, files: &[&str]) -> PathBuf {
        let name = format!("ringpoll-bench-examples-{}-{name}", std::process::id());
        let dir = std::env::temp_dir().join(name);
        fs::create_dir_all(&dir).unwrap();
        files.iter().for_each(|file| fs::write(dir.join(file), "").unwrap());
        dir
    }
}
