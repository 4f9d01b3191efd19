//! `article --commands`: what to type on two hosts.

use std::fmt::Write;

use crate::article::Experiment;
use crate::compare::candidate::Candidate;

/// A line for each server of the experiments, and one for the client of them all.
pub(crate) fn print(host: &str, experiments: &[Experiment]) {
    print!("{}", text(host, experiments));
}

fn text(host: &str, experiments: &[Experiment]) -> String {
    let any = if host.starts_with('[') { "[::]" } else { "0.0.0.0" };
    let mut servers = String::new();
    let mut client = "ringpoll-bench article".to_owned();
    for (args, port) in servers_of(experiments).iter().zip(FIRST_PORT..) {
        let told = port + STATS_PORTS;
        // Nothing fails that is written to a string.
        let _ = writeln!(
            servers,
            "ringpoll-bench serve {} --addr={any}:{port} --stats={any}:{told} &",
            args.join(" ")
        );
        let _ = write!(client, " --addr={host}:{told}");
    }
    format!("# On {host}:\n{servers}wait\n# On the client's host:\n{client}\n")
}

/// How each server is started, once where several experiments have the same.
fn servers_of(experiments: &[Experiment]) -> Vec<Vec<String>> {
    let mut all = Vec::new();
    for row in experiments.iter().flat_map(|one| &one.cells).flat_map(|report| &report.rows) {
        if let Candidate::Ringpoll { backend, placement, extra, .. } = &row.server {
            let mut args = vec![format!("--backend={backend}"), format!("--placement={placement}")];
            args.extend(extra.iter().cloned());
            if !all.contains(&args) {
                all.push(args);
            }
        }
    }
    all
}

const FIRST_PORT: u16 = 9000;
/// Where a server tells of itself, beyond where it serves.
const STATS_PORTS: u16 = 100;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::article::experiments;
    use crate::cli::{ArticleArgs, Cli, Command};
    use clap::Parser;

    #[test]
    fn every_server_has_a_command_that_this_program_takes() {
        let said = text("server", &experiments::plan(&parse("article --poll always").unwrap()));
        let serve: Vec<_> = said.lines().filter_map(|line| line.strip_suffix(" &")).collect();
        assert_eq!(serve.len(), 10, "{said}");
        for line in &serve {
            assert!(Cli::try_parse_from(line.split(' ')).is_ok(), "{line}");
        }
        assert!(serve[0].contains("serve --backend=epoll --placement=inline --addr=0.0.0.0:9000"));
        let uring_4 = serve.iter().find(|line| line.contains("uring-4")).unwrap();
        assert!(uring_4.contains("pool --send-rings=20 --poll=always"), "{uring_4}");
        let client = said.lines().last().unwrap();
        assert_eq!(client.matches(" --addr=server:91").count(), 10, "{client}");
        // What it stands for is not asked here.
        let client = client.replace("=server:", "=127.0.0.1:");
        let client = parse(client.trim_start_matches("ringpoll-bench ")).unwrap();
        assert_eq!((client.addr.len(), client.addr[9].addrs[0].port()), (10, 9109));
    }

    #[test]
    fn a_host_is_one_word_without_a_port() {
        for host in ["server", "10.0.0.7", "a.b-c.d", "[fe80::1]"] {
            assert!(parse(&format!("article --commands {host}")).is_some(), "{host}");
        }
        for wrong in ["server:80", "fe80::1", "$(reboot)", ";", "[a", "a]"] {
            assert!(parse(&format!("article --commands {wrong}")).is_none(), "{wrong}");
        }
        let said = text("[fe80::1]", &experiments::plan(&parse("article").unwrap()));
        assert!(said.contains("--addr=[::]:9000 --stats=[::]:9100 &"), "{said}");
        assert!(said.contains("article --addr=[fe80::1]:9100 "), "{said}");
    }

    fn parse(line: &str) -> Option<ArticleArgs> {
        let args = ["ringpoll-bench"].into_iter().chain(line.split(' '));
        match Cli::try_parse_from(args).ok()?.command {
            Command::Article(args) => Some(args),
            _ => None,
        }
    }
}
