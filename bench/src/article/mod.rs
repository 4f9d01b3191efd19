//! `article`: the experiments of the article that this project implements, with its claims beside
//! the figures.
//!
//! Measured by the rounds of `compare`. `experiments` says what is measured, `claims` what the
//! article reports, `limits` what this host cannot show.

pub(crate) mod claims;
mod experiments;
mod limits;

use serde::Serialize;

pub(crate) use self::claims::Claim;
use crate::cli::ArticleArgs;
use crate::compare::candidate;
use crate::compare::model::CellReport;
use crate::compare::plan::Settings;
use crate::compare::rounds::Rounds;
use crate::compare::servers;
use crate::error::Result;
use crate::host::{Host, cpu};
use crate::report;

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
    candidate::refuse_switches()?;
    // Before the minutes of measuring, not after them.
    report::refuse_foreign(&args.out, "article")?;
    let found = measure(args)?;
    report::print_article(&found);
    let written = report::write_article(&found, &args.out)?;
    written.iter().for_each(|path| println!("wrote {}", path.display()));
    Ok(())
}

fn measure(args: &ArticleArgs) -> Result<Report> {
    let host = Host::read()?;
    let pinned = experiments::pinned(args, &cpu::allowed()?)?;
    let mut experiments = experiments::plan(args);
    let cell_counts: Vec<_> = experiments.iter().map(|one| one.cells.len()).collect();
    let cells: Vec<_> = experiments.iter_mut().flat_map(|one| one.cells.drain(..)).collect();
    let measurements = cells.iter().map(|report| report.rows.len()).sum();
    let mut rounds = Rounds::new(experiments::settings(args, pinned, measurements), cells, 0);
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
