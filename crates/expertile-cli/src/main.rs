//! The command `expertile`: what padding costs, one layer run and checked, every stage timed, what this machine
//! offers.
//!
//! `commands` has one module per subcommand, `report` what they print. This file parses, dispatches, and turns an
//! error into one line and an exit code: 2 for bad input, 1 for a check that failed. A signal ends it as signals do
//! (`signals`).

mod call;
mod check;
mod commands;
mod device;
mod error;
mod machine;
mod memory;
mod output;
mod packed;
mod parts;
mod placement_file;
mod preset;
mod ranks;
mod report;
mod router;
mod signals;
mod weights;

use clap::error::ErrorKind;
use clap::{Parser, Subcommand};
use commands::{bench, doctor, layer, plan, quantize};
use error::Error;
use std::path::Path;
use std::process::ExitCode;

/// The expert half of a Mixture-of-Experts layer: plan it, run it, time it.
#[derive(Debug, Parser)]
#[command(name = "expertile", version, max_term_width = 110)]
#[command(after_help = "\
Examples:
  expertile layer --preset qwen3-30b-a3b --tokens 64 --check
  expertile plan --tokens 128 --topk 8 --experts 128
\nEvery command has its own --help, with examples.")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Plan(plan::Args),
    Layer(layer::Args),
    Bench(bench::Args),
    Quantize(quantize::Args),
    Doctor(doctor::Args),
}

/// Clap answers this with the whole help, as it should.
const NO_COMMAND: ErrorKind = ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand;

/// How long a rank other than the first waits before it ends with an error that all have.
const UNTIL_FIRST_RANK_HAS_PRINTED: std::time::Duration = std::time::Duration::from_millis(500);

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
        Command::Quantize(args) => quantize::run(&args),
        Command::Doctor(args) => doctor::run(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => report(&error),
    }
}

/// Prints `error: ...` on one line, causes included.
fn report(error: &Error) -> ExitCode {
    if let Error::Told = error {
        // mpiexec kills the other ranks when one fails: the first rank prints its error before that.
        std::thread::sleep(UNTIL_FIRST_RANK_HAS_PRINTED);
        return error.exit_code();
    }
    let mut line = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(source) = cause {
        line = format!("{line}: {source}");
        cause = source.source();
    }
    output::tell(&format!("error: {line}"));
    error.exit_code()
}

/// Clap's complaint as one line: its first paragraph and its tips, without the usage that follows.
fn complaint(page: &str) -> String {
    let one_line = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
    let first = one_line(page.split("\n\n").next().unwrap_or_default());
    let tips = page.lines().filter_map(|line| line.trim_start().strip_prefix("tip: ")).map(one_line);
    let tips: Vec<String> = tips.collect();
    let complaint = first.trim_start_matches("error: ");
    if tips.is_empty() { complaint.to_owned() } else { format!("{complaint} ({})", tips.join("; ")) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    /// A command's words, and its help.
    fn helps(words: &str, command: &clap::Command, all: &mut Vec<(String, String)>) {
        all.push((words.to_owned(), command.clone().render_long_help().to_string()));
        for command in command.get_subcommands().filter(|command| command.get_name() != "help") {
            helps(&format!("{words} {}", command.get_name()), command, all);
        }
    }

    #[test]
    fn every_help_ends_with_two_examples_that_parse() {
        let mut all = Vec::new();
        helps("expertile", &Cli::command(), &mut all);
        assert_eq!(all.len(), 10);
        for (words, help) in &all {
            let (_, examples) = help.split_once("Examples:\n").unwrap_or_else(|| panic!("{words}: {help}"));
            let examples: Vec<&str> =
                examples.lines().map(str::trim).filter(|line| line.starts_with("expertile")).collect();
            assert_eq!(examples.len(), 2, "{words}");
            for example in examples {
                assert!(example.starts_with(words), "{words}: {example}");
                if let Err(error) = Cli::try_parse_from(example.split_whitespace()) {
                    panic!("{example}: {error}");
                }
            }
        }
    }

    #[test]
    fn what_is_required_shows_in_the_usage() {
        let usage = |name: &str| {
            let mut command = Cli::command();
            command.find_subcommand_mut(name).unwrap().render_usage().to_string()
        };
        assert!(usage("plan").contains("plan --tokens <M> --topk <K> --experts <G> [OPTIONS]"), "{}", usage("plan"));
        assert!(usage("layer").contains("layer --preset <NAME> [OPTIONS]"), "{}", usage("layer"));
        assert!(usage("bench").contains("bench <COMMAND>"), "{}", usage("bench"));
    }

    #[test]
    fn suggestions_are_kept() {
        for (line, part) in [
            ("expertile plna", "unrecognized subcommand 'plna' (a similar subcommand exists: 'plan')"),
            ("expertile plan --token 4", "unexpected argument '--token' found (a similar argument exists: '--tokens')"),
            ("expertile layer --preset mixtral-8x7", "'mixtral-8x7b'"),
        ] {
            let error = Cli::try_parse_from(line.split_whitespace()).unwrap_err();
            let line = complaint(&error.to_string());
            assert!(line.contains(part) && !line.contains('\n'), "{line}");
        }
    }
}
