//! The command `kore-vljepa`: a trained model from its exported files, as `mamba3-jepa` offers it from a checkpoint.
//!
//! Exit status: 0 done, 1 `verify` found a difference above the bound, 2 an error of the user's, 130 after Ctrl-C, 143
//! after SIGTERM and 129 after SIGHUP (as shells count signals), 141 when the reader of a pipe has gone.

mod agent;
mod args;
mod ask;
mod bench;
mod classify;
mod confusion;
mod contact_sheet;
mod embed;
mod images;
mod inspect;
#[cfg(unix)]
mod interrupt;
mod memory;
mod output;
mod search;
mod survey;
mod verify;

use std::io;
use std::process::ExitCode;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Parser, Subcommand};

use output::Failure;

const USER_ERROR: u8 = 2;
const CLOSED_PIPE: u8 = 141; // 128 + SIGPIPE, as a shell reports it

/// Ask a trained Mamba3-JEPA model about images, from the files that `mamba3-jepa export` wrote.
#[derive(Parser)]
#[command(name = "kore-vljepa", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Ask(ask::Ask),
    Agent(agent::Agent),
    Embed(embed::Embed),
    Search(search::Search),
    Classify(classify::Classify),
    Inspect(inspect::Inspect),
    Verify(verify::Verify),
    Memory(memory::Memory),
    Bench(bench::Bench),
}

impl Command {
    fn run(self) -> Result<ExitCode, Failure> {
        match self {
            Command::Ask(command) => command.run()?,
            Command::Agent(command) => command.run()?,
            Command::Embed(command) => command.run()?,
            Command::Search(command) => command.run()?,
            Command::Classify(command) => command.run()?,
            Command::Inspect(command) => command.run()?,
            Command::Verify(command) => return command.run(),
            Command::Memory(command) => command.run()?,
            Command::Bench(command) => command.run()?,
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn main() -> ExitCode {
    #[cfg(unix)]
    if let Err(error) = interrupt::leave_nothing_behind() {
        output::print_warning(&format!("an interrupt may leave an unfinished file or a running tool: {error}"));
    }
    match Cli::try_parse_from(args::with_hyphens(std::env::args_os())) {
        Ok(cli) => cli.command.run().unwrap_or_else(|failure| match failure {
            Failure::User(message) => {
                output::print_error(&message);
                USER_ERROR.into()
            }
            Failure::ClosedPipe => CLOSED_PIPE.into(),
        }),
        Err(usage) => said(&usage),
    }
}

/// Prints help, the version, or what is wrong with the arguments.
fn said(usage: &clap::Error) -> ExitCode {
    if usage.kind() == ErrorKind::ValueValidation {
        // its first line names the flag and says all there is to say
        let text = usage.to_string();
        output::print_error(text.lines().next().unwrap_or_default().trim_start_matches("error: "));
        return USER_ERROR.into();
    }
    if usage.kind() == ErrorKind::ArgumentConflict
        && let Some(ContextValue::String(option)) = usage.get(ContextKind::InvalidArg)
    {
        // no option excludes another: this one is in conflict with itself
        let flag = option.split(' ').next().unwrap_or_default();
        output::print_error(&format!("{flag} is given twice, and only one value counts: leave one of them out"));
        return USER_ERROR.into();
    }
    match usage.print() {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => CLOSED_PIPE.into(),
        _ if usage.use_stderr() => USER_ERROR.into(),
        _ => ExitCode::SUCCESS,
    }
}
