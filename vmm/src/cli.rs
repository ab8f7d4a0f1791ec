//! The command line of `vireo`.
//!
//! The verbs and the machine's own flags are declared as structs; a flag for
//! each device model is added from the registry. Text becomes plain
//! arguments, those become a [`crate::config::VmConfig`] that keeps all rules, and only
//! then is anything opened.
//!
//! # Exit codes
//!
//! | code | meaning |
//! |---|---|
//! | 0 | done; the guest powered itself off or was stopped |
//! | 1 | failure, or a fault in Vireo itself; `vireo image` has [codes](image) of its own |
//! | 2 | wrong usage: nothing was done |
//! | 3 | the guest's kernel panicked |
//! | 4 | the guest's processor shut down (triple fault) |
//! | 5 | KVM could not go on |
//! | 6 | the guest did not power off in time and was ended |
//! | 7 | the guest did not feed its watchdog in time |
//! | 159 | a thread of the monitor was refused a system call ([`crate::sandbox`]) |
//!
//! A failure is one line on standard error, "vireo: what failed: why: mend".

mod clone;
mod confine;
mod definition;
mod detach;
mod documents;
mod image;
mod log;
mod manager;
mod message;
mod receive;
mod remote;
mod restore;
mod run;
mod serve;
mod table;
mod target;
mod usage;

use std::ffi::OsString;
use std::io::{self, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use api::ExitReason;
use clap::error::ErrorKind;
use clap::{ArgMatches, Args, Command, CommandFactory, FromArgMatches, Parser, Subcommand};
use virtio::models::{BuildError, MODELS, Model};

use crate::monitor::Inherited;
use crate::opener::Opener;

/// Failure of what was asked.
const FAILURE: u8 = 1;
/// Wrong usage.
const USAGE: u8 = 2;

const EXIT_CODES: &str = "\
Exit codes:
  0  done; the guest powered itself off or was stopped
  1  failure
  2  wrong usage: nothing was done
  3  the guest's kernel panicked
  4  the guest's processor shut down (triple fault)
  5  KVM could not go on with the guest
  6  the guest did not power off in time after a signal
  7  the guest did not feed its watchdog in time
  159  a thread of the monitor was refused a system call";

const EXAMPLES: &str = "\
Examples:
  vireo doctor
      See what this machine offers and lacks.
  vireo run --kernel vmlinuz --initramfs initrd.img
      Boot a kernel with a console on this terminal; Ctrl-a x leaves.
  vireo run --help
      Every flag of a machine.
  vireo --api-socket PATH …
      Without a verb: the flags of run, as managers of Cloud Hypervisor give them.";

/// A virtual machine monitor for Linux KVM: one process runs one machine.
#[derive(Debug, Parser)]
#[command(
    name = "vireo",
    version,
    max_term_width = 100,
    propagate_version = true,
    after_help = format!("{EXAMPLES}\n\n{EXIT_CODES}")
)]
struct Cli {
    /// Log more: -v information, -vv debugging, -vvv everything.
    ///
    /// The log goes to standard error. Without this flag the variable VIREO_LOG gives a level
    /// (error, warn, info, debug, trace) or a filter such as 'warn,vmm=debug'.
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    verbose: u8,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Boot a machine and run it until it ends
    #[command(after_help = format!("{}\n\n{EXIT_CODES}", run::EXAMPLES))]
    Run(Box<run::RunArgs>),
    /// Wait for machines that clients create and boot over a control socket
    #[command(after_help = format!("{}\n\n{EXIT_CODES}", serve::EXAMPLES))]
    Serve(serve::ServeArgs),
    /// Wait for a machine that another monitor gives, and run it until it ends
    ///
    /// The other one gives it with 'vireo migrate'. What the flags do not say of it is as it is there: its disks, networks and
    /// consoles are looked for under the same names.
    #[command(after_help = format!("{}\n\n{EXIT_CODES}", receive::EXAMPLES))]
    Receive(Box<receive::ReceiveArgs>),
    #[command(flatten)]
    Remote(remote::Verb),
    /// Start machines of a template, which share its memory and begin with its disks
    ///
    /// Each runs in a process of its own, has a name, a UUID and MAC addresses of its own, and what it writes to its disks apart. The
    /// command returns when all run; if one does not, none does, and nothing of them is left. Ctrl-C does the same.
    #[command(after_help = clone::EXAMPLES)]
    Clone(clone::CloneArgs),
    /// Keep a machine that a file describes, under a name
    #[command(after_help = definition::DEFINE_EXAMPLES)]
    Define(definition::DefineArgs),
    /// Change a definition in $VISUAL or $EDITOR; one that makes no sense is not taken
    #[command(after_help = definition::EDIT_EXAMPLES)]
    Edit(definition::NameArgs),
    /// Tell whether a file or definition describes a machine that could be started
    ///
    /// Kernel and disks must be there; nothing is started or locked. The exit code is 0 when it could be, 2 for what
    /// makes no sense, and 1 for what cannot be had.
    #[command(after_help = definition::VALIDATE_EXAMPLES)]
    Validate(definition::ValidateArgs),
    /// Forget a definition; a machine that runs goes on
    #[command(after_help = definition::UNDEFINE_EXAMPLES)]
    Undefine(definition::NameArgs),
    /// Show what this host offers and lacks, each with its mend
    ///
    /// The exit code is 0 where machines can run, and 1 where not.
    #[command(after_help = DOCTOR_EXAMPLES)]
    Doctor(DoctorArgs),
    /// Make, examine, copy and repair disk images
    #[command(after_help = image::EXAMPLES)]
    Image {
        #[command(subcommand)]
        verb: image::Verb,
    },
    /// Print the completions of a shell
    #[command(after_help = COMPLETIONS_EXAMPLES)]
    Completions {
        /// Which shell
        shell: clap_complete::Shell,
    },
    /// Write the manual pages into a directory
    #[command(after_help = MAN_EXAMPLES)]
    Man {
        /// An existing directory
        #[arg(value_name = "DIR")]
        directory: PathBuf,
    },
}

const DOCTOR_EXAMPLES: &str = "\
Examples:
  vireo doctor
  vireo doctor --json | jq .hardware_virtualization
  vireo doctor --cpu-baseline > first.toml
      And on the second host, for what both have:
  vireo doctor --cpu-baseline first.toml > both.toml";

const COMPLETIONS_EXAMPLES: &str = "\
Examples:
  vireo completions bash > ~/.local/share/bash-completion/completions/vireo
  vireo completions zsh > ~/.zfunc/_vireo";

const MAN_EXAMPLES: &str = "\
Examples:
  vireo man /usr/local/share/man/man1";

#[derive(Debug, Args)]
struct DoctorArgs {
    /// Print JSON, for programs: see 'usable' and 'hardware_virtualization'
    #[arg(long)]
    json: bool,
    /// Print the CPU features of this host as a file for --cpus baseline=, as far as all FILEs have them too
    #[arg(long, value_name = "FILE", num_args = 0.., conflicts_with = "json")]
    cpu_baseline: Option<Vec<PathBuf>>,
}

/// Why a verb did not do what it was to do.
enum Failure {
    /// The user asked for what makes no sense.
    Usage(anyhow::Error),
    /// It was tried and failed.
    Failed(anyhow::Error),
}

/// Wrong usage that is found behind the parser of arguments.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Misuse(String);

/// The whole program: reads the arguments of this process and gives its exit code.
#[must_use]
pub fn main() -> ExitCode {
    message::install_panic_hook();
    ExitCode::from(contained(|| execute(std::env::args_os().collect())))
}

/// The exit code of what `work` does, for a fault of ours too: that has been told of, and on its way here sockets, locks and files
/// were given up.
fn contained(work: impl FnOnce() -> u8) -> u8 {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or(FAILURE)
}

/// What the command line asks for.
struct Start {
    verbose: u8,
    /// Where the log goes, if not to standard error.
    log_file: Option<PathBuf>,
    /// What the process was started with for the monitor.
    descriptors: serve::Numbers,
    /// Does it, and gives the exit code.
    work: Box<dyn FnOnce(Arc<Opener>, Inherited) -> Result<u8, Failure>>,
}

fn parse(arguments: &[OsString]) -> Result<Start, clap::Error> {
    if manager::is_meant(arguments) {
        return manager::parse(arguments);
    }
    let matches = command(MODELS).try_get_matches_from(arguments);
    let matches = matches.map_err(|error| with_words(error, arguments))?;
    let cli = Cli::from_arg_matches(&matches)?;
    let (log_file, descriptors) = match &cli.verb {
        Verb::Run(arguments) => (
            arguments.log_file(),
            arguments.numbers(matches.subcommand_matches("run").unwrap_or(&matches)),
        ),
        Verb::Serve(arguments) => (arguments.log_file(), arguments.numbers()),
        Verb::Receive(arguments) => (arguments.log_file(), arguments.numbers()),
        Verb::Remote(remote::Verb::Migrate(arguments)) => (None, arguments.numbers()),
        _ => (None, serve::Numbers::default()),
    };
    Ok(Start {
        verbose: cli.verbose,
        log_file: log_file.map(Path::to_owned),
        descriptors,
        work: Box::new(move |opener, inherited| dispatch(cli.verb, &matches, opener, inherited)),
    })
}

/// What the parser says; help comes of the command line as it is shown, which names the words of verbs.
fn with_words(error: clap::Error, arguments: &[OsString]) -> clap::Error {
    if error.kind() != ErrorKind::DisplayHelp {
        return error;
    }
    match shown(MODELS).try_get_matches_from(arguments) {
        Err(help) if help.kind() == ErrorKind::DisplayHelp => help,
        // Before it was asked for there are options between words.
        _ => error,
    }
}

fn execute(arguments: Vec<OsString>) -> u8 {
    let start = match parse(&arguments) {
        Ok(start) => start,
        Err(error) => {
            let usage = image::usage_code(&arguments).unwrap_or(USAGE);
            return refuse(&error, &arguments, usage);
        }
    };
    let opener = Arc::new(Opener::new());
    // Before anything is opened: the log's file gets a number too.
    let inherited = start.descriptors.take();
    let result = inherited
        .map_err(|error| Failure::Usage(error.into()))
        .and_then(|inherited| {
            log::start(start.verbose, start.log_file.as_deref(), &opener).map_err(judge)?;
            Ok(inherited)
        })
        .and_then(|inherited| (start.work)(opener, inherited));
    match result {
        Ok(code) => code,
        Err(Failure::Usage(error)) => {
            message::report(&format!("{error:#}"));
            USAGE
        }
        Err(Failure::Failed(error)) => {
            let mend = crate::error::mend(error.root_cause());
            let mend = mend.map_or_else(String::new, |mend| format!(": {mend}"));
            message::report(&format!("{error:#}{mend}"));
            FAILURE
        }
    }
}

/// The program and the verbs that these arguments give it, as far as there are any.
fn verb_in(arguments: &[OsString]) -> String {
    let mut names = "vireo".to_owned();
    let mut command = &command(MODELS);
    for argument in arguments.iter().skip(1) {
        if let Some(verb) = command.find_subcommand(argument) {
            names = format!("{names} {}", verb.get_name());
            command = verb;
        }
    }
    names
}

/// Prints the help or version that was asked for, or what is wrong with the arguments.
fn refuse(error: &clap::Error, arguments: &[OsString], usage: u8) -> u8 {
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => match error.print() {
            Err(cause) if cause.kind() != io::ErrorKind::BrokenPipe => {
                message::report(&format!("cannot write to standard output: {cause}"));
                FAILURE
            }
            _ => 0,
        },
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            // Nothing is left to tell of a failure to write to standard error.
            let _ = error.print();
            usage
        }
        _ => {
            message::report(&message::from_clap(error, &verb_in(arguments)));
            usage
        }
    }
}

fn dispatch(
    verb: Verb,
    matches: &ArgMatches,
    opener: Arc<Opener>,
    inherited: Inherited,
) -> Result<u8, Failure> {
    match verb {
        Verb::Run(mut arguments) => {
            arguments.inherit(inherited);
            let matches = matches.subcommand_matches("run").unwrap_or(matches);
            run::execute(*arguments, matches, opener)
        }
        Verb::Receive(arguments) => {
            let matches = matches.subcommand_matches("receive").unwrap_or(matches);
            receive::execute(&arguments, matches, opener, inherited.connection)
        }
        Verb::Remote(remote::Verb::Migrate(mut arguments)) => {
            arguments.inherit(inherited);
            ask(remote::Verb::Migrate(arguments), opener)
        }
        Verb::Remote(verb) => ask(verb, opener),
        Verb::Serve(mut arguments) => {
            arguments.inherit(inherited);
            arguments.execute(opener)
        }
        Verb::Clone(arguments) => clone::execute(arguments, opener),
        Verb::Define(arguments) => definition::define(arguments, &opener),
        Verb::Edit(arguments) => definition::edit(&arguments, &opener),
        Verb::Validate(arguments) => definition::validate(&arguments, &opener),
        Verb::Undefine(arguments) => definition::undefine(&arguments),
        Verb::Doctor(arguments) => doctor(&arguments, &opener).map_err(Failure::Failed),
        Verb::Image { verb } => Ok(image::run(verb, &opener)),
        Verb::Completions { shell } => {
            print(&documents::completions(shown(MODELS), shell)).map_err(Failure::Failed)?;
            Ok(0)
        }
        Verb::Man { directory } => {
            documents::write_manual(shown(MODELS), &directory, &opener).map_err(Failure::Failed)?;
            Ok(0)
        }
    }
}

/// Does a verb for machines that run; `start` is also for those that are defined.
fn ask(verb: remote::Verb, opener: Arc<Opener>) -> Result<u8, Failure> {
    if let remote::Verb::Start(arguments) = &verb
        && let Some(name) = arguments.defined().map_err(judge)?
    {
        let line = ["vireo", "run", "--config", name, "--name", name, "--detach"];
        let start = parse(&line.map(OsString::from));
        let start = start.map_err(|error| Failure::Usage(error.into()))?;
        return (start.work)(opener, Inherited::default());
    }
    remote::run(verb, &opener).map_err(judge)
}

/// A value of a device's configuration that makes no sense is wrong usage,
/// though the model finds it and not the flag: nothing has been done by then.
fn judge(error: anyhow::Error) -> Failure {
    let is_usage = error.chain().any(|cause| {
        cause.is::<Misuse>()
            || matches!(
                cause.downcast_ref(),
                Some(BuildError::Field { .. } | BuildError::Config { .. })
            )
    });
    if is_usage {
        Failure::Usage(error)
    } else {
        Failure::Failed(error)
    }
}

/// The exit code that tells why a machine ended.
fn exit_code(reason: ExitReason) -> u8 {
    match reason {
        ExitReason::PowerOff | ExitReason::Reset | ExitReason::Stopped | ExitReason::Migrated => 0,
        ExitReason::GuestPanic => 3,
        ExitReason::TripleFault => 4,
        ExitReason::KvmError => 5,
        ExitReason::Unresponsive => 6,
        ExitReason::Watchdog => 7,
    }
}

fn doctor(arguments: &DoctorArgs, opener: &Opener) -> anyhow::Result<u8> {
    if let Some(others) = &arguments.cpu_baseline {
        let common = crate::doctor::cpu_baseline(opener, others)?;
        print(common.to_text().as_bytes())?;
        return Ok(0);
    }
    let report = crate::doctor::examine(opener);
    let text = if arguments.json {
        format!("{}\n", serde_json::to_string_pretty(&report)?)
    } else {
        report.to_string()
    };
    print(text.as_bytes())?;
    Ok(if report.usable { 0 } else { FAILURE })
}

/// Writes to standard output. A reader that has gone is no failure.
fn print(bytes: &[u8]) -> anyhow::Result<()> {
    let mut output = io::stdout().lock();
    match output.write_all(bytes).and_then(|()| output.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(anyhow::Error::new(error).context("cannot write to standard output"))
        }
        _ => Ok(()),
    }
}

/// The whole command line, with the flags of these models.
fn command(models: &'static [Model]) -> Command {
    usage::apart(shown(models))
}

/// The same as help, manual pages and completions show it.
fn shown(models: &'static [Model]) -> Command {
    let command = Cli::command();
    let verbs = [("run", "Add"), ("receive", "Have elsewhere, by its id=,")];
    let with = verbs.into_iter().fold(command, |all, (verb, does)| {
        all.mut_subcommand(verb, |command| run::add_devices(command, models, does))
    });
    usage::with_lines(with)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::device::tests::TEST_MODELS;

    #[test]
    fn a_fault_of_ours_ends_with_the_code_of_failures() {
        assert_eq!(contained(|| 6), 6);
        assert_eq!(contained(|| unreachable!()), FAILURE);
    }

    #[test]
    fn the_command_line_is_consistent_with_any_models() {
        command(MODELS).debug_assert();
        command(TEST_MODELS).debug_assert();
    }

    #[test]
    fn every_verb_and_every_flag_has_a_help_text_and_every_verb_examples() {
        fn check(command: &Command) {
            assert!(command.get_about().is_some(), "{}", command.get_name());
            let after = command.get_after_help().map(ToString::to_string);
            assert!(
                after.unwrap_or_default().contains("Examples:"),
                "{}",
                command.get_name()
            );
            for argument in command.get_arguments() {
                assert!(argument.get_help().is_some(), "{argument}");
            }
            command.get_subcommands().for_each(check);
        }
        check(&command(TEST_MODELS));
    }

    #[test]
    fn every_end_of_a_machine_has_its_exit_code() {
        for (reason, code) in [
            (ExitReason::PowerOff, 0),
            (ExitReason::Stopped, 0),
            (ExitReason::Reset, 0),
            (ExitReason::GuestPanic, 3),
            (ExitReason::TripleFault, 4),
            (ExitReason::KvmError, 5),
            (ExitReason::Unresponsive, 6),
        ] {
            assert_eq!(exit_code(reason), code);
        }
    }
}
