//! The command `expertile`: what padding costs, one layer run and checked, every stage timed, what this machine offers.
//!
//! One module per subcommand; this file only parses, dispatches, and turns an error into one line and an exit code:
//! 2 for bad input, 1 for a check that failed. A signal ends it as signals do (`signals`).

mod bench;
mod check;
mod device;
mod doctor;
mod error;
mod format;
mod layer;
mod machine;
mod memory;
mod output;
mod plan;
mod plot;
mod preset;
mod progress;
mod router;
mod signals;
mod stages;
mod weights;

use clap::error::ErrorKind;
use clap::{Parser, Subcommand};
use error::Error;
use std::path::Path;
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
    signals::watch();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        // Help is long and has colours; only its reader's closed pipe is no error.
        Err(error) if !error.use_stderr() => {
            return match error.print() {
                Err(source) if source.kind() != std::io::ErrorKind::BrokenPipe => {
                    report(&Error::write(Path::new("the output"), source))
                }
                _ => ExitCode::SUCCESS,
            };
        }
        Err(error) if error.kind() == NO_COMMAND => error.exit(),
        Err(error) => return report(&Error::Usage(complaint(&error.to_string()))),
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
    output::tell(&format!("error: {line}"));
    error.exit_code()
}

/// The complaint itself out of clap's page: its first paragraph, without the usage that follows.
fn complaint(page: &str) -> String {
    let complaint = page.split("\n\n").next().unwrap_or_default();
    let words: Vec<&str> = complaint.split_whitespace().collect();
    words.join(" ").trim_start_matches("error: ").to_owned()
}
