//! Started without a verb: the command line with which Cloud Hypervisor's managers (Kata, libvirt's
//! driver and others) start it.
//!
//! The flags are those of `vireo run`, and those forms are taken too that only Cloud Hypervisor
//! has: several values after one flag, `--pvpanic` and `--watchdog` alone. With a kernel a machine is
//! booted; without one the monitor waits for clients, as `vireo serve` does.

use std::ffi::{OsStr, OsString};
use std::path::Path;

use clap::{ArgAction, ArgMatches, Command, CommandFactory, FromArgMatches, Parser};
use virtio::models::{MODELS, Model};

use super::{EXIT_CODES, Start, run};

/// The name under which a manager may have the program.
const NAME: &str = "cloud-hypervisor";
/// What the program is under that name, as managers read it: they compare it with the least that they work with.
/// It is the version whose requests the control socket answers.
const VERSION: &str = "v54.0.0";

const EXAMPLES: &str = "\
Examples:
  vireo --api-socket path=/run/vm.sock --event-monitor path=/run/vm.events
      A monitor without a machine; clients create and boot one over the socket.
  vireo --api-socket /run/vm.sock --kernel vmlinuz --cpus boot=2 --memory size=1G
      Boot a machine, as 'vireo run' does.";

/// Cloud Hypervisor's way of being started: the flags of 'vireo run', without a verb
#[derive(Debug, Parser)]
#[command(name = "vireo", max_term_width = 100, after_help = format!("{EXAMPLES}\n\n{EXIT_CODES}"))]
struct ManagerArgs {
    /// Log more: -v information, -vv debugging, -vvv everything
    #[arg(short, long, action = ArgAction::Count)]
    verbose: u8,

    #[command(flatten)]
    run: run::RunArgs,
}

/// Whether the program has been started in this way.
pub(super) fn is_meant(arguments: &[OsString]) -> bool {
    let mut words = arguments.iter();
    let program = words.next().map(Path::new).and_then(Path::file_name);
    if program == Some(OsStr::new(NAME)) {
        return true;
    }
    let verbosity = |word: &&OsString| {
        let word = word.to_string_lossy();
        let short = word.strip_prefix('-').unwrap_or_default();
        word == "--verbose" || (!short.is_empty() && short.chars().all(|c| c == 'v'))
    };
    let first = words.find(|word| !verbosity(word));
    first.is_some_and(|word| {
        let word = word.to_string_lossy();
        word.starts_with("--") && !["--", "--help", "--version"].contains(&&*word)
    })
}

/// What the arguments ask for.
///
/// # Errors
///
/// The parser's, which may be a request for help or version.
pub(super) fn parse(arguments: &[OsString]) -> Result<Start, clap::Error> {
    let program = arguments.first().map(Path::new).and_then(Path::file_name);
    let mut command = command(MODELS);
    if program == Some(OsStr::new(NAME)) {
        command = command.name(NAME).version(VERSION);
    }
    let matches = command.try_get_matches_from(arguments)?;
    let parsed = ManagerArgs::from_arg_matches(&matches)?;
    Ok(start(parsed, matches))
}

fn start(parsed: ManagerArgs, matches: ArgMatches) -> Start {
    Start {
        verbose: parsed.verbose,
        log_file: parsed.run.log_file().map(Path::to_owned),
        descriptors: parsed.run.numbers(&matches),
        work: Box::new(move |opener, inherited| {
            let mut parsed = parsed;
            parsed.run.inherit(inherited);
            if parsed.run.has_machine() {
                return run::execute(parsed.run, &matches, opener);
            }
            parsed.run.into_socket().serve(None, opener)
        }),
    }
}

/// The flags of `vireo run` with the liberties of Cloud Hypervisor.
fn command(models: &'static [Model]) -> Command {
    let version = concat!(env!("CARGO_PKG_VERSION"));
    let command = run::add_devices(ManagerArgs::command(), models, "Add").version(version);
    let many: Vec<String> = command
        .get_arguments()
        .filter(|argument| matches!(argument.get_action(), ArgAction::Append))
        .map(|argument| argument.get_id().to_string())
        .collect();
    many.into_iter()
        .fold(command, |command, id| {
            command.mut_arg(id, |argument| {
                let least = argument
                    .get_num_args()
                    .map_or(1, |count| count.min_values());
                argument.num_args(least..)
            })
        })
        .mut_args(|argument| {
            if !["pvpanic", "watchdog"].contains(&argument.get_id().as_str()) {
                return argument;
            }
            argument.num_args(0..=1).default_missing_value("on")
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<OsString> {
        text.split(' ').map(OsString::from).collect()
    }

    #[test]
    fn the_flags_of_managers_are_consistent() {
        command(MODELS).debug_assert();
    }

    #[test]
    fn a_flag_first_or_the_other_name_means_no_verb() {
        for text in [
            "vireo --api-socket fd=3",
            "/usr/bin/vireo -vv --kernel k",
            "vireo --verbose --kernel=k",
            "/opt/cloud-hypervisor",
            "cloud-hypervisor --version",
        ] {
            assert!(is_meant(&words(text)), "{text}");
        }
        for text in [
            "vireo",
            "vireo -v",
            "vireo run --kernel k",
            "vireo -v run",
            "vireo --help",
            "vireo --version",
            "vireo -h",
            "vireo nonsense",
        ] {
            assert!(!is_meant(&words(text)), "{text}");
        }
    }

    #[test]
    fn managers_read_a_version_that_they_work_with() {
        let told = parse(&words("cloud-hypervisor --version")).err().unwrap();
        assert_eq!(told.to_string(), "cloud-hypervisor v54.0.0\n");
        let told = parse(&words("vireo --kernel k --version")).err().unwrap();
        assert!(told.to_string().starts_with("vireo 0."), "{told}");
    }

    #[test]
    fn what_only_cloud_hypervisor_takes_is_taken() {
        let line = "cloud-hypervisor -v --api-socket path=/s --seccomp true --log-file /l --kernel k \
                    --disk path=/a path=/b --pvpanic --watchdog --console off --event-monitor fd=9";
        let start = parse(&words(line)).unwrap();
        assert_eq!((start.verbose, start.log_file), (1, Some("/l".into())));
        assert!(parse(&words("vireo --api-socket /s --seccomp false")).is_ok());
        for wrong in ["--seccomp maybe", "--event-monitor fd=x", "run"] {
            let line = format!("cloud-hypervisor --api-socket /s {wrong}");
            let told = parse(&words(&line)).err().unwrap().to_string();
            assert!(told.contains(wrong.split(' ').next().unwrap()), "{told}");
        }
    }
}
