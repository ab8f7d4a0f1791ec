//! The manual's table of attacks names tests that there are.

use std::collections::BTreeSet;
use std::fs;

use tests::places::workspace;

use crate::report;
use crate::source::{Source, sources};

const PAGE: &str = "resources/manual/attacks.md";
/// The table only ever gets longer.
const FEWEST: usize = 91;

#[test]
fn every_known_attack_has_tests_that_there_are() {
    let page = fs::read_to_string(workspace().join(PAGE)).unwrap();
    let sources = sources(&workspace());
    let mut broken = Vec::new();
    let mut rows = 0;
    for (number, line) in page.lines().enumerate() {
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        let [_, known, _, against, tests, _] = cells.as_slice() else {
            continue;
        };
        if *known == "known as" || known.starts_with("---") {
            continue;
        }
        rows += 1;
        let at = format!("{PAGE}:{}", number + 1);
        let named: BTreeSet<&str> = tests
            .split('`')
            .filter(|part| part.contains("::"))
            .collect();
        if named.is_empty() || against.is_empty() {
            broken.push(format!("{at}: no test, or nothing that stands against it"));
        }
        let missing = named.iter().filter(|test| !exists(test, &sources));
        broken.extend(missing.map(|test| format!("{at}: there is no test {test}")));
    }
    assert!(rows >= FEWEST, "{rows} rows");
    report("every attack of the table has its tests", broken);
}

/// Whether `path::name` is a function behind `#[test]`, or one of proptest's, in that file.
fn exists(test: &str, sources: &[Source]) -> bool {
    let Some((path, name)) = test.split_once("::") else {
        return false;
    };
    let Some(source) = sources.iter().find(|source| source.path == path) else {
        return false;
    };
    let lines: Vec<&str> = source.code.lines().map(str::trim).collect();
    lines.iter().enumerate().any(|(at, line)| {
        line.strip_prefix("fn ")
            .and_then(|rest| rest.strip_prefix(name))
            .is_some_and(|rest| rest.starts_with('('))
            && lines[..at]
                .iter()
                .rev()
                .take_while(|before| before.starts_with("#[") || before.is_empty())
                .any(|before| *before == "#[test]")
    })
}
