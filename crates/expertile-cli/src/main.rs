//! The command `expertile`: what padding costs, one layer run and checked, every stage timed, what this machine offers.
//!
//! One module per subcommand; this file only parses, dispatches, and turns an error into one line and an exit code:
//! 2 for bad input, 1 for a check that failed.

mod bench;
mod check;
mod device;
mod doctor;
mod error;
mod format;
mod layer;
mod machine;
mod output;
mod plan;
mod plot;
mod preset;
mod progress;
mod router;
mod stages;
mod weights;

use clap::error::ErrorKind;
use clap::{Parser, Subcommand};
use error::Error;
use std::process::ExitCode;

/// The expert half of a Mixture-of-Experts layer: plan it, run it, time it.
#[derive(Debug, Parser)]
#[command(name = "expertile", version, max_term_width = 110)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Plan(plan::Args),
    Layer(layer::Args),
    Bench(bench::Args),
    Doctor(doctor::Args),
}

/// Clap answers this with the whole help, as it should.
const NO_COMMAND: ErrorKind = ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) if !error.use_stderr() || error.kind() == NO_COMMAND => error.exit(),
        Err(error) => return report(&Error::Usage(one_line(&error.to_string()))),
    };
    let result = match cli.command {
        Command::Plan(args) => plan::run(&args),
        Command::Layer(args) => layer::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Doctor(args) => doctor::run(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => report(&error),
    }
}

/// Prints `error: ...` on one line, causes included.
fn report(error: &Error) -> ExitCode {
    let mut line = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(source) = cause {
        line = format!("{line}: {source}");
        cause = source.source();
    }
    eprintln!("error: {line}");
    error.exit_code()
}

/// The complaint itself out of clap's page: its first paragraph, without the usage that follows.
fn one_line(page: &str) -> String {
    let complaint = page.split("\n\n").next().unwrap_or_default();
    let words: Vec<&str> = complaint.split_whitespace().collect();
    words.join(" ").trim_start_matches("error: ").to_owned()
}
