//! What the program is made of is written down.

use std::collections::BTreeSet;
use std::fs;

use tests::places::workspace;
use tests::supply;

use crate::report;

const PAGE: &str = "resources/supply/README.md";

#[test]
fn every_crate_of_the_program_has_its_reason() {
    let page = fs::read_to_string(workspace().join(PAGE)).unwrap();
    let named: BTreeSet<&str> = page
        .lines()
        .filter(|line| line.starts_with("| `"))
        .filter_map(|line| line.split('|').nth(1))
        .flat_map(|cell| cell.split('`').skip(1).step_by(2))
        .collect();
    let crates: BTreeSet<_> = supply::crates()
        .unwrap()
        .into_iter()
        .map(|(name, _)| name)
        .collect();
    let mut broken: Vec<String> = crates
        .iter()
        .filter(|name| !named.contains(name.as_str()))
        .map(|name| format!("{PAGE} says nothing of {name}"))
        .collect();
    let gone = named.iter().filter(|name| !crates.contains(**name));
    broken.extend(gone.map(|name| format!("{PAGE}: {name} is not in the program")));
    report("every crate of the program has its reason", broken);
}
