//! Usage lines of the verbs that are for one machine, and how their words are read.
//!
//! Such a verb has one argument that takes all its words, as the first is the machine's name only where no socket is given.
//! It declares how many there are beside the socket. [`with_lines`] makes of it what help, manual pages and completions
//! show, and [`apart`] what is parsed: options may stand between the words.

use std::fmt::Write as _;

use clap::{Arg, ArgAction, Command};

/// Of each verb that takes a machine's name, or its socket instead, a line for either. The parser's own line would have
/// the words that are then one less as words that may be left out, or be repeated.
pub(super) fn with_lines(command: Command) -> Command {
    let path = command.get_name().to_owned();
    with_lines_below(command, &path)
}

/// The verbs for one machine as they are parsed: each word is an argument for itself, with options before and behind it.
/// How many there are checks [`super::target::SocketFlag`], which knows whether the name is among them.
pub(super) fn apart(command: Command) -> Command {
    let command = match words(&command) {
        Some(words) if words.len() > 1 => command.mut_args(|argument| {
            if argument.is_positional() {
                let argument = argument.action(ArgAction::Append).num_args(1);
                argument.required(false).value_name("WORD")
            } else {
                argument
            }
        }),
        _ => command,
    };
    command.mut_subcommands(apart)
}

fn with_lines_below(command: Command, path: &str) -> Command {
    let command = match words(&command) {
        Some(words) => with_line(command, path, &words),
        None => command,
    };
    command.mut_subcommands(|verb| {
        let path = format!("{path} {}", verb.get_name());
        with_lines_below(verb, &path)
    })
}

/// The words of a verb, with the machine's name before them, and with brackets those that may be left out.
fn words(command: &Command) -> Option<Vec<String>> {
    let of_machines = command
        .get_arguments()
        .any(|argument| argument.get_id() == "api_socket");
    let mut positionals = command.get_positionals();
    let first = positionals.next().filter(|_| of_machines)?;
    let names = first.get_value_names()?;
    let (least, most) = beside_name(first);
    let word = |(index, name): (usize, &clap::builder::Str)| match () {
        () if index == 0 || index < least => name.to_string(),
        () if index + 1 == names.len() && most > names.len() => format!("[{name}]..."),
        () => format!("[{name}]"),
    };
    Some(names.iter().enumerate().map(word).collect())
}

/// The least and the most words where the machine's name is among them: the argument declares the least without it.
fn beside_name(words: &Arg) -> (usize, usize) {
    let declared = words.get_num_args().unwrap_or_else(|| 1.into());
    (
        declared.min_values().saturating_add(1),
        declared.max_values(),
    )
}

fn with_line(command: Command, path: &str, words: &[String]) -> Command {
    let mut start = format!("{path} [OPTIONS]");
    for argument in one_of(&command) {
        let names = argument.get_value_names().unwrap_or_default();
        let names = names
            .iter()
            .filter(|_| argument.get_action().takes_values());
        let value: String = names.map(|name| format!(" {name}")).collect();
        let flag = argument.get_long().unwrap_or_default();
        // A text can always be written to.
        let _ = write!(start, " [--{flag}{value}]");
    }
    let all = words.join(" ");
    let others = words.get(1..).unwrap_or_default().join(" ");
    let line = format!("{start} {all}\n       {start} --api-socket PATH {others}");
    let command = command.override_usage(line.trim_end().to_owned());
    if words.len() == 1 {
        return command;
    }
    command.mut_args(|argument| {
        if argument.is_positional() {
            let (least, most) = beside_name(&argument);
            let argument = argument.action(ArgAction::Set).required(true);
            argument.num_args(least..=most)
        } else {
            argument
        }
    })
}

/// The flags of which a verb wants one at least.
fn one_of(command: &Command) -> impl Iterator<Item = &Arg> {
    let groups = command.get_groups().filter(|group| group.is_required_set());
    let ids: Vec<_> = groups.flat_map(|group| group.get_args().cloned()).collect();
    let arguments = command.get_arguments();
    arguments.filter(move |argument| ids.contains(argument.get_id()))
}

#[cfg(test)]
mod tests {
    fn usage(verbs: &[&str]) -> String {
        let mut command = crate::cli::shown(virtio::models::MODELS);
        command.build();
        let mut verb = &mut command;
        for name in verbs {
            verb = verb.find_subcommand_mut(name).unwrap();
        }
        verb.render_usage().to_string()
    }

    #[test]
    fn verbs_for_one_machine_say_which_words_they_take() {
        for (verbs, words, others) in [
            (&["info"][..], " NAME", ""),
            (&["coredump"], " NAME FILE", " FILE"),
            (&["disk", "revert"], " NAME DISK [LAYER]", " DISK [LAYER]"),
            (&["send-key"], " NAME [KEYS]...", " [KEYS]..."),
            (
                &["disk", "update"],
                " NAME DISK key=value,…",
                " DISK key=value,…",
            ),
            (
                &["resize"],
                " [--cpus COUNT] [--memory SIZE] [--balloon SIZE] NAME",
                " [--cpus COUNT] [--memory SIZE] [--balloon SIZE]",
            ),
            (
                &["migrate-resolve"],
                " [--resume] [--abandon] NAME",
                " [--resume] [--abandon]",
            ),
            (&["migrate"], " NAME DEST", " DEST"),
        ] {
            let usage = usage(verbs);
            let verb = verbs.join(" ");
            let first = format!("Usage: vireo {verb} [OPTIONS]{words}");
            let (by_name, by_socket) = usage.split_once('\n').unwrap();
            assert_eq!(by_name, first);
            assert!(by_socket.contains(" --api-socket PATH"), "{by_socket}");
            let rest = by_socket.replace(" --api-socket PATH", "");
            assert!(
                rest.ends_with(&format!("vireo {verb} [OPTIONS]{others}")),
                "{rest}"
            );
        }
        assert!(!usage(&["run"]).contains('\n'));
    }

    #[test]
    fn options_stand_anywhere_between_the_words_of_a_verb() {
        for (line, words) in [
            (
                &["snapshot", "create", "web", "--pause", "dir"][..],
                &["web", "dir"][..],
            ),
            (
                &["net", "remove", "web", "--timeout", "1", "lan"],
                &["web", "lan"],
            ),
            (
                &["send-key", "web", "--id", "k", "a", "b"],
                &["web", "a", "b"],
            ),
            (
                &[
                    "disk", "backup", "web", "--format", "raw", "data", "--json", "x",
                ],
                &["web", "data", "x"],
            ),
            (
                &["disk", "revert", "--api-socket", "s", "data", "--reset"],
                &["data"],
            ),
        ] {
            let whole = [&["vireo"], line].concat();
            let matches = crate::cli::command(virtio::models::MODELS);
            let matches = matches.try_get_matches_from(whole).unwrap();
            let mut verb = &matches;
            while let Some((_, below)) = verb.subcommand() {
                verb = below;
            }
            let found: Vec<_> = verb.get_many::<String>("words").unwrap().collect();
            assert_eq!(found, words);
        }
    }

    #[test]
    fn help_tells_which_words_have_to_be_there() {
        let help = |line: &[&str]| {
            let line: Vec<_> = line.iter().map(std::ffi::OsString::from).collect();
            crate::cli::parse(&line).err().unwrap().to_string()
        };
        for (line, words) in [
            (
                &["vireo", "snapshot", "create", "--help"][..],
                " <NAME> <DIR>\n",
            ),
            (
                &["vireo", "disk", "revert", "-h"],
                " <NAME> <DISK> [LAYER] ",
            ),
            (&["vireo", "help", "send-key"], " <NAME> [KEYS]...\n"),
        ] {
            let help = help(line);
            assert!(help.contains(words), "{help}");
        }
    }
}
