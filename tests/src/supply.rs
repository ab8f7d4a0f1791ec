//! What the program is built from, as cargo knows it.

use std::collections::BTreeSet;
use std::process::Command;

use anyhow::{Result, ensure};

use crate::places::workspace;

/// What the program is built for.
pub const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Names and versions of all crates from outside that are needed to build the program.
///
/// # Errors
///
/// Cargo's.
pub fn crates() -> Result<BTreeSet<(String, String)>> {
    let words = [
        "tree",
        "-p",
        "vmm",
        "-e",
        "normal,build",
        "--prefix",
        "none",
        "--no-dedupe",
        "--target",
        TARGET,
    ];
    let tree = cargo(&words)?;
    // Our own are told with their directory.
    let lines = tree.lines().filter(|line| !line.contains(" (/"));
    let pairs = lines.filter_map(|line| {
        let mut words = line.split_whitespace();
        let name = words.next()?.to_owned();
        Some((name, words.next()?.trim_start_matches('v').to_owned()))
    });
    Ok(pairs.collect())
}

/// What cargo prints for this workspace, without asking anybody.
///
/// # Errors
///
/// What it says where it fails.
pub fn cargo(words: &[&str]) -> Result<String> {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned());
    let output = Command::new(cargo)
        .args(words)
        .args(["--offline", "--locked"])
        .current_dir(workspace())
        .output()?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "cargo {}: {error}",
        words.join(" ")
    );
    Ok(String::from_utf8(output.stdout)?)
}
