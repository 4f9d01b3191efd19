//! The benchmark program of `ringpoll`: `probe`, `serve`, `load`, `calls`, `compare`
//! and `article`.
//!
//! Bad input and a world that does not play along end as one line on standard error and exit code
//! 2.

// One module is allowed to: `peers/ring.rs`.
#![deny(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used))]

#[forbid(unsafe_code)]
mod article;
#[forbid(unsafe_code)]
mod calls;
#[forbid(unsafe_code)]
mod cli;
#[forbid(unsafe_code)]
mod compare;
#[forbid(unsafe_code)]
mod error;
#[forbid(unsafe_code)]
mod host;
#[forbid(unsafe_code)]
mod load;
mod peers;
#[forbid(unsafe_code)]
mod probe;
#[forbid(unsafe_code)]
mod report;
#[forbid(unsafe_code)]
mod rpc;
#[forbid(unsafe_code)]
mod serve;
#[forbid(unsafe_code)]
mod service;
#[forbid(unsafe_code)]
mod signals;
#[forbid(unsafe_code)]
mod stats;
#[forbid(unsafe_code)]
mod wire;
#[forbid(unsafe_code)]
mod work;

use std::process::ExitCode;

use clap::Parser;
use clap::error::ErrorKind;

use crate::cli::{Cli, Command};
use crate::error::Failure;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return refuse(&error),
    };
    let done = match cli.command {
        Command::Probe => probe::run(),
        Command::Serve(args) => serve::run(args),
        Command::Load(args) => load::run(&args),
        Command::Calls(args) => calls::run(&args),
        Command::Peer(args) => peers::run(&args),
        Command::Compare(args) => compare::run(&args),
        Command::Article(args) => article::run(&args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("ringpoll-bench: {failure}");
            ExitCode::from(if signals::is_interrupted() {
                signals::EXIT_INTERRUPTED
            } else {
                EXIT_REFUSED
            })
        }
    }
}

/// Help goes out as it is; a mistake as the one paragraph that names it, without the usage that
/// follows.
fn refuse(error: &clap::Error) -> ExitCode {
    if let ErrorKind::DisplayHelp | ErrorKind::DisplayVersion = error.kind() {
        print!("{error}");
        return ExitCode::SUCCESS;
    }
    if error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        eprint!("{error}");
        return ExitCode::from(EXIT_REFUSED);
    }
    eprintln!("ringpoll-bench: {}", Failure::new(first_paragraph(error)));
    ExitCode::from(EXIT_REFUSED)
}

/// What is wrong with a command line.
fn first_paragraph(error: &clap::Error) -> String {
    let text = error.to_string();
    let paragraph = text.split("\n\n").next().unwrap_or_default();
    paragraph.strip_prefix("error: ").unwrap_or(paragraph).to_owned()
}

const EXIT_REFUSED: u8 = 2;
