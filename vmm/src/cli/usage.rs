//! Usage lines of the verbs that are for one machine.

use std::fmt::Write as _;

use clap::{Arg, ArgAction, Command};

/// Of each verb that takes a machine's name, or its socket instead, a line for either. The parser's own line would have
/// the words that are then one less as words that may be left out, or be repeated.
pub(super) fn with_lines(command: Command) -> Command {
    let path = command.get_name().to_owned();
    with_lines_below(command, &path)
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

/// The words of a verb, with the machine's name before them.
fn words(command: &Command) -> Option<Vec<String>> {
    let of_machines = command
        .get_arguments()
        .any(|argument| argument.get_id() == "api_socket");
    let mut positionals = command.get_positionals();
    let first = positionals.next().filter(|_| of_machines)?;
    let names = first.get_value_names()?.iter();
    Some(names.map(ToString::to_string).collect())
}

fn with_line(command: Command, path: &str, words: &[String]) -> Command {
    let mut start = format!("{path} [OPTIONS]");
    for argument in one_of(&command) {
        let value = argument.get_value_names().unwrap_or_default().join(" ");
        let flag = argument.get_long().unwrap_or_default();
        // A text can always be written to.
        let _ = write!(start, " [--{flag} {value}]");
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
            argument.action(ArgAction::Set)
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
        let mut command = crate::cli::command(virtio::models::MODELS);
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
}
