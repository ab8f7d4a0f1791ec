//! The arguments of commands.

use super::{Command, Failed};
use crate::ops::size::{SizeError, parse_size};

/// Options and the other arguments.
#[derive(Debug)]
pub(super) struct Flags<'a> {
    options: Vec<(char, Option<&'a str>)>,
    rest: Vec<&'a str>,
}

impl<'a> Flags<'a> {
    /// Takes options apart, wherever they stand. `known` lists their letters, each with a colon when it has
    /// a value.
    pub(super) fn parse(name: &str, known: &str, arguments: &[&'a str]) -> Result<Self, Failed> {
        let mut flags = Self {
            options: Vec::new(),
            rest: Vec::new(),
        };
        let mut left = arguments.iter();
        while let Some(&argument) = left.next() {
            let Some(letters) = argument.strip_prefix('-').filter(|rest| !rest.is_empty()) else {
                flags.rest.push(argument);
                continue;
            };
            for (at, letter) in letters.char_indices() {
                let place = known.find(letter).filter(|_| letter != ':');
                let Some(place) = place else {
                    return Err(Failed::Wrong(format!(
                        "{name}: invalid option -- '{letter}'"
                    )));
                };
                let valued = known
                    .get(place + letter.len_utf8()..)
                    .is_some_and(|k| k.starts_with(':'));
                if !valued {
                    flags.options.push((letter, None));
                    continue;
                }
                let value = match letters.get(at + letter.len_utf8()..).unwrap_or_default() {
                    "" => left.next().copied(),
                    value => Some(value),
                };
                if value.is_none() {
                    let text = format!("{name}: option requires an argument -- '{letter}'");
                    return Err(Failed::Wrong(text));
                }
                flags.options.push((letter, value));
                break;
            }
        }
        Ok(flags)
    }

    /// Whether an option is given.
    pub(super) fn has(&self, letter: char) -> bool {
        self.options.iter().any(|(given, _)| *given == letter)
    }

    /// The last value of an option.
    pub(super) fn value(&self, letter: char) -> Option<&'a str> {
        let mut options = self.options.iter().rev();
        options.find(|(given, _)| *given == letter)?.1
    }

    /// Refuses two options together.
    pub(super) fn exclude(&self, a: char, b: char, text: &str) -> Result<(), Failed> {
        if self.has(a) && self.has(b) {
            return Err(Failed::Answer(text.to_owned()));
        }
        Ok(())
    }

    /// Refuses an option without another.
    pub(super) fn need(&self, option: char, other: char, text: &str) -> Result<(), Failed> {
        if self.has(option) && !self.has(other) {
            return Err(Failed::Answer(text.to_owned()));
        }
        Ok(())
    }

    /// The other arguments as an offset and a length; where a command takes several lengths, their sum.
    pub(super) fn range(&self, command: &Command) -> Result<(u64, u64), Failed> {
        let wrong = || Failed::Answer(command.help());
        let (offset, lengths) = self.rest.split_first().ok_or_else(wrong)?;
        let several = command.usage.ends_with("[len..]");
        if lengths.is_empty() || (lengths.len() > 1 && !several) {
            return Err(wrong());
        }
        let offset = number(offset)?;
        let mut sum = 0_u64;
        for len in lengths {
            sum = sum.saturating_add(number(len)?);
        }
        Ok((offset, sum))
    }
}

/// A number with an optional suffix.
pub(super) fn number(text: &str) -> Result<u64, Failed> {
    parse_size(text).map_err(|error| {
        Failed::Answer(match error {
            SizeError::Invalid(text) => format!(
                "Parsing error: non-numeric argument, or extraneous/unrecognized suffix -- {text}"
            ),
            SizeError::TooLarge(text) => format!("Parsing error: argument too large -- {text}"),
        })
    })
}

/// A byte, decimal or hexadecimal.
pub(super) fn pattern(text: &str) -> Result<u8, Failed> {
    let hex = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X"));
    let byte = match hex {
        Some(digits) => u8::from_str_radix(digits, 16),
        None => text.parse(),
    };
    byte.map_err(|_| Failed::Answer(format!("{text} is not a valid pattern byte")))
}
