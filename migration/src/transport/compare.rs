//! Whether a machine can be had at the destination: what both sides say of themselves, compared before any memory moves.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

/// The most facts of one side.
pub const FACTS: usize = 4096;
/// The longest name or value of a fact that is shown, in bytes.
const SHOWN: usize = 200;

/// How a fact of the source is compared with that of the destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Rule {
    /// The values are the same.
    Same,
    /// The destination has each of the source's words, which are divided by blanks.
    Words,
    /// The destination has at least the source's number.
    Least,
    /// It is told and not compared.
    Told,
    /// Both have the same words, which are divided by blanks, in any order.
    Set,
}

/// Something that is to fit: the machine's type, CPUID, a device, how memory is backed.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Fact {
    /// What it is of, for example `cpuid.7.0.ebx` or `disk0.access`. Once in a list.
    pub name: String,
    /// What it is.
    pub value: String,
    /// How it has to fit.
    pub rule: Rule,
}

impl Fact {
    /// A fact with this rule.
    #[must_use]
    pub fn new(name: &str, value: impl Into<String>, rule: Rule) -> Self {
        Self {
            name: name.to_owned(),
            value: value.into(),
            rule,
        }
    }
}

/// Something that does not fit.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Difference {
    /// What it is of.
    pub name: String,
    /// What the source has, if it has; of [`Rule::Set`], where the destination has more, only what the destination has not.
    pub source: Option<String>,
    /// What the destination has, if it has; of words, those that it lacks are in [`Difference::lacks`]. Of [`Rule::Set`], where it has more, only that.
    pub destination: Option<String>,
    /// The words of the source that the destination does not have, where it has none beside the source's or may have them.
    pub lacks: Vec<String>,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = shown(&self.name);
        if !self.lacks.is_empty() {
            let lacks = self.lacks.join(" ");
            return write!(f, "{name}: the destination lacks {}", shown(&lacks));
        }
        match (&self.source, &self.destination) {
            (Some(here), Some(there)) => write!(
                f,
                "{name}: {} at the source, {} at the destination",
                shown(here),
                shown(there)
            ),
            (Some(here), None) => {
                write!(
                    f,
                    "{name}: {} at the source, nothing at the destination",
                    shown(here)
                )
            }
            (None, Some(there)) => {
                write!(
                    f,
                    "{name}: nothing at the source, {} at the destination",
                    shown(there)
                )
            }
            (None, None) => write!(f, "{name}"),
        }
    }
}

/// Text of a peer for one line of a message.
fn shown(text: &str) -> String {
    let mut end = text.len().min(SHOWN);
    while !text.is_char_boundary(end) {
        end = end.saturating_sub(1);
    }
    let (head, rest) = text.split_at(end);
    let plain = |c: char| if c.is_control() { '?' } else { c };
    let mut shown: String = head.chars().map(plain).collect();
    if !rest.is_empty() {
        shown.push('…');
    }
    shown
}

/// All differences between what the source has and what the destination has, in the order of their names. Empty where the machine can be had.
///
/// The source's rule counts for facts that both have. A fact that one side alone has is a difference, unless it is only told.
#[must_use]
pub fn compare(source: &[Fact], destination: &[Fact]) -> Vec<Difference> {
    let mut differences = Vec::new();
    let here = by_name(source, &mut differences);
    let there = by_name(destination, &mut differences);
    for (name, fact) in &here {
        let other = there.get(name);
        let lacks = match (fact.rule, other) {
            (Rule::Told, _) => continue,
            (Rule::Words | Rule::Set, Some(other)) => lacking(&fact.value, &other.value),
            _ => Vec::new(),
        };
        let more = match (fact.rule, other) {
            (Rule::Set, Some(other)) => lacking(&other.value, &fact.value),
            _ => Vec::new(),
        };
        let fits = match (fact.rule, other) {
            (Rule::Same, Some(other)) => fact.value == other.value,
            (Rule::Words, Some(_)) => lacks.is_empty(),
            (Rule::Set, Some(_)) => lacks.is_empty() && more.is_empty(),
            (Rule::Least, Some(other)) => {
                let number = |fact: &Fact| fact.value.parse::<u64>().ok();
                number(fact).zip(number(other)).is_some_and(|(a, b)| a <= b)
            }
            _ => false,
        };
        if !more.is_empty() {
            // What both have is of no interest.
            let words = |words: Vec<String>| Some(words.join(" ")).filter(|text| !text.is_empty());
            differences.push(Difference {
                name: (*name).to_owned(),
                source: words(lacks),
                destination: words(more),
                lacks: Vec::new(),
            });
        } else if !fits {
            differences.push(Difference {
                name: (*name).to_owned(),
                source: Some(fact.value.clone()),
                destination: other.map(|other| other.value.clone()),
                lacks,
            });
        }
    }
    let alone =
        |(name, fact): &(&&str, &&Fact)| !here.contains_key(**name) && fact.rule != Rule::Told;
    differences.extend(there.iter().filter(alone).map(|(name, fact)| Difference {
        name: (*name).to_owned(),
        source: None,
        destination: Some(fact.value.clone()),
        lacks: Vec::new(),
    }));
    differences.sort_by(|a, b| a.name.cmp(&b.name));
    differences
}

/// A fact that is there twice is a difference by itself, if they are not the same.
fn by_name<'a>(
    facts: &'a [Fact],
    differences: &mut Vec<Difference>,
) -> BTreeMap<&'a str, &'a Fact> {
    let mut all: BTreeMap<&str, &Fact> = BTreeMap::new();
    for fact in facts {
        let before = all.insert(&fact.name, fact);
        if before.is_some_and(|before| before != fact) {
            differences.push(Difference {
                name: format!("{} is told twice", fact.name),
                source: None,
                destination: None,
                lacks: Vec::new(),
            });
        }
    }
    all
}

fn lacking(wanted: &str, there: &str) -> Vec<String> {
    let there: std::collections::BTreeSet<&str> = there.split_whitespace().collect();
    let missing = wanted
        .split_whitespace()
        .filter(|word| !there.contains(word));
    missing.map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(source: &[Fact], destination: &[Fact]) -> Vec<String> {
        let all = compare(source, destination);
        all.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn what_fits_has_no_differences() {
        let facts = [
            Fact::new("machine", "vireo-dev", Rule::Same),
            Fact::new("cpu.flags", "sse avx", Rule::Words),
            Fact::new("memory", "1024", Rule::Least),
            Fact::new("version", "0.1.0", Rule::Told),
        ];
        let other = [
            Fact::new("machine", "vireo-dev", Rule::Same),
            Fact::new("cpu.flags", "avx avx2 sse", Rule::Words),
            Fact::new("memory", "2048", Rule::Least),
            Fact::new("host", "b", Rule::Told),
        ];
        assert_eq!(said(&facts, &other), [""; 0]);
        // It is one-sided.
        assert_eq!(said(&other, &facts).len(), 2);
    }

    #[test]
    fn every_difference_is_told_and_none_twice() {
        let source = [
            Fact::new("machine", "vireo-dev", Rule::Same),
            Fact::new("cpu.flags", "sse avx512f amx", Rule::Words),
            Fact::new("memory", "4096", Rule::Least),
            Fact::new("disk0", "raw", Rule::Same),
        ];
        let destination = [
            Fact::new("machine", "vireo-1.0", Rule::Same),
            Fact::new("cpu.flags", "sse", Rule::Words),
            Fact::new("memory", "many", Rule::Least),
            Fact::new("net0", "tap", Rule::Same),
        ];
        assert_eq!(
            said(&source, &destination),
            [
                "cpu.flags: the destination lacks avx512f amx",
                "disk0: raw at the source, nothing at the destination",
                "machine: vireo-dev at the source, vireo-1.0 at the destination",
                "memory: 4096 at the source, many at the destination",
                "net0: nothing at the source, tap at the destination",
            ]
        );
    }

    #[test]
    fn of_words_that_are_to_be_the_same_those_are_told_that_one_side_has() {
        let told = |source: &str, destination: &str| {
            let fact = |value: &str| [Fact::new("cpuid", value, Rule::Set)];
            said(&fact(source), &fact(destination))
        };
        assert_eq!(told("sse avx", "avx  sse"), [""; 0]);
        assert_eq!(told("", ""), [""; 0]);
        assert_eq!(
            told("sse avx fma", "sse"),
            ["cpuid: the destination lacks avx fma"]
        );
        assert_eq!(
            told("sse", "sse avx"),
            ["cpuid: nothing at the source, avx at the destination"]
        );
        assert_eq!(
            told("sse avx", "sse fma"),
            ["cpuid: avx at the source, fma at the destination"]
        );
    }

    #[test]
    fn a_peer_cannot_hide_a_fact_behind_another_or_fill_the_screen() {
        let twice = [
            Fact::new("machine", "a", Rule::Same),
            Fact::new("machine", "b", Rule::Same),
        ];
        let told = said(&twice, &twice[1..]);
        assert_eq!(told, ["machine is told twice"]);
        let long = [Fact::new("x\n\u{1b}[2J", "é".repeat(1000), Rule::Same)];
        let told = said(&long, &[]);
        assert!(
            told[0].len() < 400 && !told[0].contains(char::is_control),
            "{}",
            told[0]
        );
    }
}
