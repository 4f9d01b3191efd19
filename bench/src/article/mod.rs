//! `article`: the experiments of the article that this project implements, with its claims beside
//! the figures.
//!
//! Measured by the rounds of `compare`. `experiments` says what is measured, `claims` what the
//! article reports, `limits` what this host cannot show.

pub(crate) mod claims;
mod commands;
mod elsewhere;
mod experiments;
mod limits;

use serde::Serialize;

pub(crate) use self::claims::Claim;
use crate::cli::ArticleArgs;
use crate::compare::candidate;
use crate::compare::model::CellReport;
use crate::compare::network::Network;
use crate::compare::plan::Settings;
use crate::compare::rounds::Rounds;
use crate::compare::servers;
use crate::error::Result;
use crate::host::namespaces::Namespaces;
use crate::host::{Host, cpu};
use crate::{load, report, signals};

/// Everything, in the shape of its JSON file.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    /// Who wrote the file.
    pub(crate) program: &'static str,
    /// The command that was run.
    pub(crate) command_line: String,
    pub(crate) host: Host,
    pub(crate) settings: Settings,
    pub(crate) experiments: Vec<Experiment>,
    /// What these figures cannot say, and why.
    pub(crate) limits: Vec<String>,
    /// What else a reader must know to read the figures right.
    pub(crate) notes: Vec<String>,
    pub(crate) elapsed_s: f64,
}

/// One of the article's, repeated here.
#[derive(Debug, Serialize)]
pub(crate) struct Experiment {
    pub(crate) number: u32,
    pub(crate) title: &'static str,
    /// One per number of connections.
    pub(crate) cells: Vec<CellReport>,
    pub(crate) claims: Vec<Claim>,
}

/// The subcommand.
pub(crate) fn run(args: &ArticleArgs) -> Result<()> {
    if let Some(host) = &args.commands {
        commands::print(host, &experiments::plan(args));
        return Ok(());
    }
    candidate::refuse_switches()?;
    let found = measure(args)?;
    report::print_article(&found);
    let written = report::write_article(&found, &args.out)?;
    written.iter().for_each(|path| println!("wrote {}", path.display()));
    signals::check()
}

fn measure(args: &ArticleArgs) -> Result<Report> {
    let mut experiments = experiments::plan(args);
    let cpus = experiments::cpus(args, cpu::allowed()?)?;
    // Before there is anything to clean up.
    signals::keep_going()?;
    let mut servers = Vec::new();
    let network = if !args.addr.is_empty() {
        servers = elsewhere::take(args, &mut experiments)?;
        cpu::pin(&cpus.allowed)?;
        Network::Elsewhere
    } else if args.namespaces {
        Network::Veth(Namespaces::enter()?.into())
    } else {
        Network::Loopback
    };
    // After it: some of what a host says is a namespace's own.
    let host = Host::read()?;
    let cell_counts: Vec<_> = experiments.iter().map(|one| one.cells.len()).collect();
    let cells: Vec<_> = experiments.iter_mut().flat_map(|one| one.cells.drain(..)).collect();
    let measurements: usize = cells.iter().map(|report| report.rows.len()).sum();
    cells.iter().try_for_each(|report| load::reserve_fds(report.cell.connections, 0))?;
    // Before the minutes of measuring, not after them; and only once nothing else is refused.
    report::refuse_foreign(&args.out, "article")?;
    let settings = experiments::settings(args, cpus, network, measurements);
    let mut rounds = Rounds::new(settings, cells, 0);
    servers.into_iter().for_each(|note| rounds.note(note));
    if let Some(requests) = args.requests {
        let Settings { rounds: count, duration_s, .. } = rounds.settings;
        let all = measurements * count as usize;
        rounds.note(format!(
            "{all} measurements, each over after {requests} requests or {duration_s} s."
        ));
    }
    rounds.run();
    rounds.progress.finish();
    let elapsed_s = rounds.elapsed().as_secs_f64();
    let Rounds { settings, cells, notes, .. } = rounds;
    let mut cells = cells.into_iter();
    for (experiment, count) in experiments.iter_mut().zip(cell_counts) {
        experiment.cells = cells.by_ref().take(count).collect();
        experiment.claims = claims::judge(experiment.number, &experiment.cells);
    }
    let limits = limits::limits(&host, &settings, &experiments);
    Ok(Report {
        program: report::PROGRAM,
        command_line: servers::own_command_line(),
        host,
        settings,
        experiments,
        limits,
        notes,
        elapsed_s,
    })
}
