//! What the user reads when something fails: one line on standard error.

use std::borrow::Cow;
use std::io::Write;
use std::panic;

/// Prints a failure. What could move the cursor or break the line is escaped.
pub(super) fn report(text: &str) {
    let line = format!("vireo: {}\n", one_line(text));
    // Nothing is left to tell of a failure to write to standard error.
    let _ = std::io::stderr().lock().write_all(line.as_bytes());
}

/// Prints a remark about what is worked on.
pub(super) fn note(text: &str) {
    let line = format!("{}\n", one_line(text));
    // As in `report`.
    let _ = std::io::stderr().lock().write_all(line.as_bytes());
}

/// Prints a warning, as [`report`] does failures.
pub(super) fn warn(text: &str) {
    report(&format!("warning: {text}"));
}

/// The text with control characters escaped.
pub(super) fn one_line(text: &str) -> String {
    text.chars()
        .flat_map(|c| {
            let (escaped, plain) = if c.is_control() {
                (Some(c.escape_default()), None)
            } else {
                (None, Some(c))
            };
            escaped.into_iter().flatten().chain(plain)
        })
        .collect()
}

/// What the parser says in several lines, in one: the fault, then hints, then
/// where to read on: at the program and verb of its usage line, or `command`
/// where it gives none.
pub(super) fn from_clap(error: &clap::Error, command: &str) -> String {
    let text = error.to_string();
    let body = text.split("\nUsage:").next().unwrap_or(&text);
    let body = body.split("\nFor more information").next().unwrap_or(body);
    let mut line = String::new();
    for part in body.lines().map(str::trim).filter(|part| !part.is_empty()) {
        let part = part.strip_prefix("error: ").unwrap_or(part);
        let part = part.strip_prefix("tip: ").unwrap_or(part);
        // No number that a verb takes is below zero, and a flag that there is not is seldom meant as a word.
        let word = part.strip_prefix("to pass '-");
        if word.is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit() || c == '-')) {
            continue;
        }
        let part = in_own_words(part);
        let separator = match line.chars().last() {
            None => "",
            Some(':') => " ",
            Some(_) => ": ",
        };
        line.push_str(separator);
        line.push_str(&part);
    }
    let command = command_in(&text).unwrap_or_else(|| command.to_owned());
    format!("{line}: see '{command} --help'")
}

/// A fault with the mend in place of what the standard library says of numbers.
fn in_own_words(fault: &str) -> Cow<'_, str> {
    if let Some(choices) = fault.strip_prefix("[possible values: ") {
        return Cow::Owned(format!("give one of {}", choices.trim_end_matches(']')));
    }
    for (said, told) in [
        (
            "invalid digit found in string",
            "give a whole number, 0 or more",
        ),
        (
            "cannot parse integer from empty string",
            "give a whole number, 0 or more",
        ),
        (
            "number too large to fit in target type",
            "the number is too large",
        ),
    ] {
        if let Some(fault) = fault.strip_suffix(said) {
            return Cow::Owned(format!("{fault}{told}"));
        }
    }
    Cow::Borrowed(fault)
}

/// The program and verb in the parser's usage line, if it has one.
fn command_in(text: &str) -> Option<String> {
    let (_, usage) = text.split_once("Usage: ")?;
    let words = usage.lines().next().unwrap_or_default().split(' ');
    let plain = |word: &&str| word.starts_with(|c: char| c.is_ascii_alphanumeric());
    Some(words.take_while(plain).collect::<Vec<_>>().join(" "))
}

/// A fault in Vireo itself is told in one line too, without a backtrace.
pub(super) fn install_panic_hook() {
    panic::set_hook(Box::new(|info| {
        let payload = info.payload();
        let what = payload
            .downcast_ref::<&str>()
            .copied()
            .or_else(|| payload.downcast_ref::<String>().map(String::as_str))
            .unwrap_or("no reason was given");
        let place = info.location().map_or_else(String::new, |place| {
            format!(" at {}:{}", place.file(), place.line())
        });
        report(&format!(
            "fault in Vireo itself{place}: {what}: please report it"
        ));
    }));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_stays_on_its_line() {
        assert_eq!(one_line("a\nb\x1b[2Jc é"), r"a\nb\u{1b}[2Jc é");
    }

    #[test]
    fn the_parsers_message_is_one_line_with_its_hint() {
        let command = clap::Command::new("t").arg(clap::Arg::new("kernel").long("kernel"));
        let error = command
            .try_get_matches_from(["t", "--kernl=x"])
            .unwrap_err();
        assert_eq!(
            from_clap(&error, "vireo"),
            "unexpected argument '--kernl' found: a similar argument exists: '--kernel': see \
             't --help'"
        );
    }

    #[test]
    fn a_number_below_zero_or_a_flag_is_not_advised_and_a_file_of_such_a_name_is() {
        for (word, advised) in [("-1", false), ("--json", false), ("-x", true)] {
            let file = clap::Arg::new("file");
            let command = clap::Command::new("t").arg(file);
            let error = command.try_get_matches_from(["t", word]).unwrap_err();
            let told = from_clap(&error, "t");
            assert_eq!(told.contains(&format!("'-- {word}'")), advised, "{told}");
        }
    }

    #[test]
    fn choices_are_a_mend() {
        let word = clap::Arg::new("n").long("n").value_parser(["a", "b"]);
        let command = clap::Command::new("t").arg(word);
        let error = command.try_get_matches_from(["t", "--n=x"]).unwrap_err();
        let told = from_clap(&error, "t");
        assert!(
            told.contains("for '--n <n>': give one of a, b: see"),
            "{told}"
        );
    }

    #[test]
    fn a_wrong_value_leads_to_the_help_of_its_verb() {
        let number = clap::Arg::new("n")
            .long("n")
            .value_parser(clap::value_parser!(u8));
        let error = clap::Command::new("t")
            .arg(number)
            .try_get_matches_from(["t", "--n=x"])
            .unwrap_err();
        let message = from_clap(&error, "t run");
        assert!(
            message.ends_with(": give a whole number, 0 or more: see 't run --help'"),
            "{message}"
        );
    }

    #[test]
    fn a_missing_argument_is_named_on_the_same_line() {
        let command = clap::Command::new("t").arg(
            clap::Arg::new("kernel")
                .long("kernel")
                .value_name("PATH")
                .required(true),
        );
        let message = from_clap(&command.try_get_matches_from(["t"]).unwrap_err(), "vireo");
        assert!(
            message.contains("not provided: --kernel <PATH>: see"),
            "{message}"
        );
    }
}
