//! The manual keeps up with the program: flags, keys, exit codes and the
//! machine's addresses are in it, and its links lead somewhere.

#![expect(clippy::unwrap_used, reason = "a test ends at what it did not expect")]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use vmm::layout::{memory, port};

fn workspace() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

fn page(name: &str) -> String {
    fs::read_to_string(workspace().join("resources/manual").join(name)).unwrap()
}

/// All pages of the manual in one.
fn manual() -> String {
    let directory = workspace().join("resources/manual");
    let entries = fs::read_dir(directory).unwrap();
    let texts = entries.map(|entry| fs::read_to_string(entry.unwrap().path()).unwrap());
    texts.collect()
}

fn help(arguments: &[&str]) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_vireo"))
        .args(arguments)
        .output()
        .unwrap();
    String::from_utf8(output.stdout).unwrap()
}

/// Every word of `text` that is a long flag, dashes included.
fn flags(text: &str) -> BTreeSet<String> {
    text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '-'))
        .filter(|word| word.len() > 2 && word.starts_with("--"))
        .map(|word| word.trim_end_matches('-').to_owned())
        .filter(|word| word.len() > 2)
        .collect()
}

/// The first cells of a page's tables.
fn first_cells(page: &str) -> impl Iterator<Item = &str> {
    page.lines()
        .filter_map(|line| line.strip_prefix("| "))
        .filter_map(|line| line.split(" | ").next())
}

/// What a help text defines: the flags at the beginning of its lines, and the
/// keys of those, which are lines such as `size=SIZE: how much`.
fn defined(help: &str) -> (BTreeSet<String>, BTreeSet<String>) {
    let mut found = (BTreeSet::new(), BTreeSet::new());
    let help = help.split("\nExamples:").next().unwrap();
    for line in help.lines().map(str::trim_start) {
        if line.starts_with('-') {
            let name = line.split("  ").next().unwrap();
            found.0.extend(flags(name));
        } else if let Some((key, rest)) = line.split_once('=')
            && rest.contains(": ")
            && key.chars().all(|c| c.is_ascii_lowercase() || c == '_')
        {
            found.1.insert(key.to_owned());
        }
    }
    found
}

#[test]
fn every_flag_of_run_is_in_the_manuals_table_and_every_one_there_exists() {
    let (defined, _) = defined(&help(&["run", "--help"]));
    assert!(defined.contains("--kernel") && defined.contains("--disk"));
    let page = page("running.md");
    let told: BTreeSet<String> = first_cells(&page).flat_map(flags).collect();
    assert_eq!(told, defined);
}

#[test]
fn every_key_of_a_flag_is_in_a_table_of_the_manual() {
    let (_, keys) = defined(&help(&["run", "--help"]));
    // A file's place is no key of a table: it has a row of another kind.
    let keys: BTreeSet<_> = keys.into_iter().filter(|key| key != "file").collect();
    assert!(keys.contains("hugepage_size") && keys.contains("num_queues"));
    let manual = manual();
    for key in keys {
        let quoted = format!("`{key}");
        assert!(
            first_cells(&manual).any(|cell| cell.contains(&quoted)),
            "{key} is in no table"
        );
    }
}

#[test]
fn every_verb_and_every_exit_code_is_in_the_manual() {
    let help = help(&["--help"]);
    let verbs = help.split("Commands:\n").nth(1).unwrap();
    let verbs = verbs.split("\n\n").next().unwrap();
    let manual = manual();
    for verb in verbs.lines().filter_map(|l| l.split_whitespace().next()) {
        let told = manual.contains(&format!("vireo {verb}")) || verb == "help";
        assert!(told, "{verb}");
    }
    let codes = help.split("Exit codes:\n").nth(1).unwrap();
    let page = page("lifecycle.md");
    for line in codes.lines() {
        let (code, meaning) = line.trim().split_once("  ").unwrap();
        let row = format!("| {code} | {meaning}");
        assert!(page.contains(&row), "{row}");
    }
}

#[test]
fn every_verb_of_image_is_in_the_manuals_table_with_flags_that_exist() {
    let page = page("images.md");
    let help_text = help(&["image", "--help"]);
    let verbs = help_text.split("Commands:\n").nth(1).unwrap();
    let verbs = verbs.split("\n\n").next().unwrap();
    let verbs = verbs.lines().filter_map(|l| l.split_whitespace().next());
    for verb in verbs.filter(|&verb| verb != "help") {
        let start = format!("`{verb} ");
        let row = first_cells(&page).find(|cell| cell.starts_with(&start));
        let row = row.unwrap_or_else(|| panic!("{verb} is in no table"));
        let (defined, _) = defined(&help(&["image", verb, "--help"]));
        for flag in flags(row) {
            assert!(defined.contains(&flag), "{verb} has no {flag}");
        }
    }
    // The options of new images.
    let options = help(&["image", "create", "-f", "qcow2", "-o", "help"]);
    for line in options.lines().skip(1) {
        let key = format!("`{}`", line.trim().split('=').next().unwrap());
        assert!(first_cells(&page).any(|cell| cell.contains(&key)), "{key}");
    }
}

#[test]
fn every_preset_of_a_migration_and_every_flag_is_in_the_manual() {
    let page = page("migration.md");
    for (name, about) in migration::transport::precopy::PRESETS {
        let row = format!("| `{name}` | {about} |");
        assert!(page.contains(&row), "{row}");
    }
    let (defined, _) = defined(&help(&["migrate", "--help"]));
    let told = flags(&page);
    let of_all_verbs = ["--api-socket", "--verbose", "--help", "--version", "--json"];
    for flag in defined
        .iter()
        .filter(|f| !of_all_verbs.contains(&f.as_str()))
    {
        assert!(told.contains(flag), "{flag}");
    }
}

#[test]
fn addresses_and_ports_of_the_machine_are_in_the_manual() {
    let page = page("machine.md");
    let ports = [
        port::COM1,
        port::I8042,
        port::RTC,
        port::DEBUGCON,
        port::PVPANIC,
        port::SLEEP_CONTROL,
        port::GED_EVENTS,
        port::PCI_HOTPLUG,
        port::PCI_CONFIG,
        port::RESET,
    ];
    let addresses = [
        memory::LOW_RAM_END,
        memory::HIGH_RAM_START,
        memory::PCI_MMIO32_START + memory::PCI_MMIO32_LEN,
        memory::ECAM_START,
        memory::ECAM_START + memory::ECAM_LEN,
        memory::IOAPIC,
        memory::LAPIC,
        memory::KVM_IDENTITY_MAP,
        memory::EBDA_START,
        memory::ACPI_START,
        memory::HIMEM_START,
        memory::RESET_VECTOR,
    ];
    for place in ports.map(u64::from).into_iter().chain(addresses) {
        let written = format!("0x{place:X}");
        let whole = |rest: &str| !rest.starts_with(|c: char| c.is_ascii_hexdigit());
        let told = page.split(&written).skip(1).any(whole);
        assert!(told, "{written} is not in machine.md");
    }
}

/// Every document of the repository.
fn documents() -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut waiting = vec![workspace().to_owned()];
    while let Some(directory) = waiting.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy();
            if name == "target" || name.starts_with('.') {
                continue;
            }
            if path.is_dir() {
                waiting.push(path);
            } else if name.ends_with(".md") {
                found.push(path);
            }
        }
    }
    found
}

/// A heading as a link names it: small letters, dashes for spaces, no other signs.
fn anchor(heading: &str) -> String {
    let kept = heading
        .chars()
        .filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
    kept.flat_map(char::to_lowercase)
        .map(|c| if c == ' ' { '-' } else { c })
        .collect()
}

#[test]
fn every_link_within_the_documents_leads_somewhere() {
    let mut broken = Vec::new();
    for document in documents() {
        let text = fs::read_to_string(&document).unwrap();
        for link in text.split("](").skip(1) {
            let link = link.split(')').next().unwrap();
            if link.contains("://") {
                continue;
            }
            let (path, heading) = link.split_once('#').unwrap_or((link, ""));
            let target = match path {
                "" => document.clone(),
                path => document.parent().unwrap().join(path),
            };
            let found = target.exists()
                && (heading.is_empty()
                    || fs::read_to_string(&target).is_ok_and(|text| {
                        text.lines()
                            .filter(|line| line.starts_with('#'))
                            .any(|line| anchor(line.trim_start_matches('#').trim()) == heading)
                    }));
            if !found {
                broken.push(format!("{}: {link}", document.display()));
            }
        }
    }
    assert!(broken.is_empty(), "{}", broken.join("\n"));
}
