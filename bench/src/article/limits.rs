//! What the figures of this host cannot say about the article's.

use crate::article::Experiment;
use crate::compare::measure::P9999_REQUESTS;
use crate::compare::model::{Round, Row};
use crate::compare::network::Network;
use crate::compare::plan::{Pinned, Settings};
use crate::host::Host;

/// A sentence each, the gravest first.
pub(crate) fn limits(host: &Host, settings: &Settings, experiments: &[Experiment]) -> Vec<String> {
    let rows: Vec<&Row> = experiments
        .iter()
        .flat_map(|experiment| &experiment.cells)
        .flat_map(|report| &report.rows)
        .filter(|row| !row.rounds.is_empty())
        .collect();
    let is_elsewhere = matches!(settings.network, Network::Elsewhere);
    let all = [
        (!is_elsewhere).then(|| cpus(settings.pinned.as_ref())),
        host.cpu_quota.filter(|_| !is_elsewhere).map(|cpus| {
            format!(
                "The control group grants {cpus:.2} CPUs of time, and threads that poll in vain \
                 use it up."
            )
        }),
        Some(network(&settings.network)),
        busy_client(&rows),
        disturbed(&rows),
        short(settings, &rows),
        few_requests(&rows),
    ];
    all.into_iter().flatten().collect()
}

fn cpus(pinned: Option<&Pinned>) -> String {
    let Some(Pinned { server_cpus, sqpoll_cpus, .. }) = pinned else {
        return format!(
            "One CPU for server, SQPOLL threads and client: they wait for each other, up to a \
             scheduler tick at each hop. {ARTICLE_CPUS}"
        );
    };
    let server = match server_cpus.len() {
        1 => "The server has 1 CPU".to_owned(),
        count => format!("The server has {count} CPUs"),
    };
    let is_shared = sqpoll_cpus.iter().any(|cpu| server_cpus.contains(cpu));
    match sqpoll_cpus.len() {
        own @ 1.. if !is_shared => {
            format!(
                "{server}, its SQPOLL threads {own} more, which epoll does not have. {ARTICLE_CPUS}"
            )
        }
        _ => format!(
            "{server}, which pollers and handlers share with its SQPOLL threads: 5 of uring-4, 3 \
             of uring-2 and config 1, 2 of config 2. Threads that share a CPU wait for each other, \
             up to a scheduler tick at each hop. {ARTICLE_CPUS}"
        ),
    }
}

fn network(network: &Network) -> String {
    let between = match network {
        Network::Loopback => "Client and server are on one host and talk over loopback",
        Network::Veth(_) => {
            "Client and server are on one host, in two network namespaces joined by a veth pair: \
             measured over virtual cards"
        }
        Network::Elsewhere => {
            return format!(
                "The servers were not started for each measurement: one that was measured before \
                 may have grown, and those that wait take CPUs if they never sleep. How many CPUs \
                 they have, and what lies between the hosts, is for whoever started them to know. \
                 {ARTICLE_CPUS} {ONE_THREAD}"
            );
        }
    };
    format!(
        "{between}, where a send does the receiver's work too: no network card, no interrupts with \
         CPUs of their own. {ONE_THREAD}"
    )
}

fn busy_client(rows: &[&Row]) -> Option<String> {
    let is_busy = |row: &&&Row| {
        row.summary.as_ref().is_some_and(|one| one.client_cpus_busy.median >= CLIENT_BUSY)
    };
    let count = rows.iter().filter(is_busy).count();
    let of = rows.len();
    (count > 0).then(|| {
        format!(
            "The client was busy all the time in {count} of {of} rows: there requests/s is its \
             limit, not the server's, and requests per CPU say more."
        )
    })
}

fn disturbed(rows: &[&Row]) -> Option<String> {
    let worst =
        |of: fn(&Round) -> f64| rows.iter().flat_map(|row| &row.rounds).map(of).fold(0.0, f64::max);
    let stolen = worst(|round| round.steal_percent);
    let others = worst(|round| round.others_percent.unwrap_or(0.0));
    let taken = [
        (stolen, format!("a hypervisor up to {stolen:.1} %")),
        (others, format!("other processes up to {others:.0} %")),
    ];
    let taken = taken.into_iter().filter(|(percent, _)| *percent > DISTURBED_PERCENT);
    let taken = taken.map(|(_, who)| who).collect::<Vec<_>>().join(", ");
    (!taken.is_empty()).then(|| {
        format!(
            "Of the CPUs in use, some rounds lost time: {taken}. P99 and P99.99 of such rounds are \
             the host's."
        )
    })
}

/// Rounds that time has ended before they had the requests that were asked for.
fn short(settings: &Settings, rows: &[&Row]) -> Option<String> {
    let wanted = settings.requests_max?;
    let count =
        rows.iter().filter(|row| row.rounds.iter().any(|round| round.requests < wanted)).count();
    let (of, bound_s) = (rows.len(), settings.duration_s);
    (count > 0).then(|| {
        format!("In {count} of {of} rows {bound_s} s were over before {wanted} requests were.")
    })
}

fn few_requests(rows: &[&Row]) -> Option<String> {
    let lacks = |row: &&&Row| row.rounds.iter().any(|round| round.p9999_us.is_none());
    let count = rows.iter().filter(lacks).count();
    let of = rows.len();
    (count > 0).then(|| {
        format!(
            "{count} of {of} rows have rounds of less than {P9999_REQUESTS} requests, which have \
             no P99.99."
        )
    })
}

const ARTICLE_CPUS: &str = "The article's server had 16 CPUs for the application, 3 for SQPOLL \
                            threads and 11 for the interrupts of the network card.";
const ONE_THREAD: &str = "The client is one thread.";
/// A thread that sleeps now and then is not the limit.
const CLIENT_BUSY: f64 = 0.95;
const DISTURBED_PERCENT: f64 = 1.0;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compare::model::CellReport;
    use crate::compare::model::tests::{round, row};
    use crate::compare::plan::Cell;

    #[test]
    fn few_cpus_are_named_first() {
        let said = |server: &[usize], sqpoll: &[usize]| {
            let pinned = Pinned {
                server_cpus: server.to_vec(),
                sqpoll_cpus: sqpoll.to_vec(),
                client_cpus: vec![9],
            };
            cpus(Some(&pinned))
        };
        assert!(cpus(None).starts_with("One CPU"));
        assert!(said(&[0], &[]).contains("1 CPU, which pollers and handlers share"));
        assert!(said(&[0, 1], &[1]).contains("2 CPUs, which pollers"));
        assert!(said(&[0, 1], &[2, 3, 4]).contains("2 CPUs, its SQPOLL threads 3 more"));
    }

    #[test]
    fn what_disturbed_or_bounded_the_figures_is_said() {
        let quiet = || round(0, 1.0);
        let said = |round: Round, requests_max| {
            let rows = [row("a", vec![quiet(), round]), row("b", vec![quiet()])];
            let cell = CellReport::new(Cell::new(1, 1, 0, 1), rows.into());
            let experiment = Experiment { number: 1, title: "", cells: vec![cell], claims: vec![] };
            let settings = Settings { requests_max, ..settings() };
            limits(&Host::read().unwrap(), &settings, &[experiment]).join("\n")
        };
        let calm = |round: Round| Round { client_cpus_busy: 0.5, ..round };
        let usual = said(calm(quiet()), None);
        assert!(usual.contains("loopback") && !usual.contains("hypervisor"), "{usual}");
        assert!(usual.contains("busy all the time in 1 of 2 rows"), "{usual}");
        let stolen = said(Round { steal_percent: 3.25, ..quiet() }, None);
        assert!(stolen.contains("up to 3.2 %") || stolen.contains("up to 3.3 %"), "{stolen}");
        assert!(said(quiet(), Some(2)).contains("In 2 of 2 rows 1 s were over before 2 requests"));
        assert!(!said(quiet(), Some(1)).contains("were over"));
        let few = said(Round { p9999_us: None, ..quiet() }, None);
        assert!(few.contains("1 of 2 rows have rounds of less than 10000"), "{few}");
    }

    fn settings() -> Settings {
        Settings {
            quick: false,
            rounds: 2,
            duration_s: 1.0,
            warmup_s: 0.0,
            requests_max: None,
            time_max_s: None,
            pinned: None,
            cpus_allowed: vec![0],
            network: Network::Loopback,
            frame_max: 1,
            program_version: "",
        }
    }
}
