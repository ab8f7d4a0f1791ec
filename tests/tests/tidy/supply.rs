//! What the program is made of is written down.

use std::collections::BTreeSet;
use std::fs;
use std::process::Command;

use tests::places::workspace;

use crate::report;

const PAGE: &str = "resources/supply/README.md";
const TARGET: &str = "x86_64-unknown-linux-gnu";

#[test]
fn every_crate_of_the_program_has_its_reason() {
    let page = fs::read_to_string(workspace().join(PAGE)).unwrap();
    let named: BTreeSet<&str> = page
        .lines()
        .filter(|line| line.starts_with("| `"))
        .filter_map(|line| line.split('|').nth(1))
        .flat_map(|cell| cell.split('`').skip(1).step_by(2))
        .collect();
    let crates = crates();
    let mut broken: Vec<String> = crates
        .iter()
        .filter(|name| !named.contains(name.as_str()))
        .map(|name| format!("{PAGE} says nothing of {name}"))
        .collect();
    let gone = named.iter().filter(|name| !crates.contains(**name));
    broken.extend(gone.map(|name| format!("{PAGE}: {name} is not in the program")));
    report("every crate of the program has its reason", broken);
}

/// The names of all crates from outside that the program is built from.
fn crates() -> BTreeSet<String> {
    let output = Command::new(env!("CARGO"))
        .args([
            "tree",
            "-p",
            "vmm",
            "-e",
            "normal,build",
            "--prefix",
            "none",
        ])
        .args(["--no-dedupe", "--offline", "--target", TARGET])
        .current_dir(workspace())
        .output()
        .unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{error}");
    let tree = String::from_utf8(output.stdout).unwrap();
    // Our own are told with their directory.
    let lines = tree.lines().filter(|line| !line.contains(" (/"));
    lines
        .filter_map(|line| line.split_whitespace().next())
        .map(str::to_owned)
        .collect()
}
