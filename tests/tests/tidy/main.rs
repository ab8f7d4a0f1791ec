//! The repository's rules. A rule that only a document states decays.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod attacks;
mod doors;
mod source;
mod supply;
mod unsafe_list;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::Value;
use source::{Source, files, sources};
use tests::places::workspace;

/// What each crate may depend on within the workspace.
const ARROWS: &[(&str, &[&str])] = &[
    ("api", &["threads"]),
    ("block", &["threads"]),
    ("devices", &["migration", "threads"]),
    ("migration", &[]),
    ("net", &["threads"]),
    ("tests", &["api"]),
    ("threads", &[]),
    (
        "virtio",
        &["devices", "migration", "block", "net", "threads"],
    ),
    (
        "vmm",
        &[
            "api",
            "block",
            "devices",
            "migration",
            "net",
            "threads",
            "virtio",
        ],
    ),
];

/// Crates from outside, and the only crates that may name them.
const RESERVED: &[(&str, &[&str])] = &[
    ("kvm-bindings", &["vmm"]),
    ("kvm-ioctls", &["vmm"]),
    ("linux-loader", &["vmm"]),
    ("vm-allocator", &["vmm"]),
    ("acpi_tables", &["vmm", "devices"]),
    ("virtio-queue", &["virtio"]),
    ("virtio-bindings", &["virtio"]),
    ("vm-memory", &["virtio", "vmm"]),
    ("io-uring", &["block"]),
];

const FILE_LINES: usize = 800;
const INLINE_TEST_LINES: usize = 300;
const FUNCTION_LINES: usize = 70;

/// Functions that were longer when this rule came, and how long they may be.
/// The list only ever gets shorter.
const LONG_FUNCTIONS: &[(&str, &str, usize)] = &[];

/// Fails with one line for each broken rule.
fn report(rule: &str, mut broken: Vec<String>) {
    broken.sort();
    broken.dedup();
    assert!(broken.is_empty(), "{rule}:\n  {}", broken.join("\n  "));
}

#[test]
fn crates_depend_along_the_arrows_only() {
    let packages = packages();
    let names: BTreeSet<&str> = packages.keys().map(String::as_str).collect();
    let known: BTreeSet<&str> = ARROWS.iter().map(|(name, _)| *name).collect();
    assert_eq!(
        names, known,
        "the workspace's crates and the table of arrows differ"
    );
    let mut broken = Vec::new();
    for (name, dependencies) in &packages {
        let allowed = ARROWS.iter().find(|(from, _)| from == name).unwrap().1;
        for dependency in dependencies {
            if known.contains(dependency.as_str()) && !allowed.contains(&dependency.as_str()) {
                broken.push(format!("{name} depends on {dependency}"));
            }
            let reserved = RESERVED.iter().find(|(to, _)| to == dependency);
            if reserved.is_some_and(|(_, users)| !users.contains(&name.as_str())) {
                broken.push(format!(
                    "{name} depends on {dependency}, which is not its business"
                ));
            }
        }
    }
    report(
        "crates depend on each other as CONTRIBUTING.md says",
        broken,
    );
}

/// Each crate's dependencies, those of its tests aside.
fn packages() -> BTreeMap<String, Vec<String>> {
    let names = |package: &Value| {
        list(&package["dependencies"])
            .iter()
            .filter(|dependency| dependency["kind"].as_str() != Some("dev"))
            .map(|dependency| text(&dependency["name"]))
            .collect()
    };
    list(&metadata()["packages"])
        .iter()
        .map(|package| (text(&package["name"]), names(package)))
        .collect()
}

/// What Cargo knows of the workspace's own packages.
fn metadata() -> Value {
    let output = Command::new(env!("CARGO"))
        .args([
            "metadata",
            "--no-deps",
            "--offline",
            "--format-version",
            "1",
        ])
        .current_dir(workspace())
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    serde_json::from_slice(&output.stdout).unwrap()
}

fn list(value: &Value) -> Vec<Value> {
    value.as_array().unwrap().clone()
}

fn text(value: &Value) -> String {
    value.as_str().unwrap().to_owned()
}

#[test]
fn every_dependency_is_named_by_the_sources_that_it_is_for() {
    let sources = sources(&workspace());
    let mut broken = Vec::new();
    for package in list(&metadata()["packages"]) {
        let name = text(&package["name"]);
        let within = format!("{name}/");
        let own: Vec<&Source> = sources
            .iter()
            .filter(|source| source.path.starts_with(&within))
            .collect();
        for dependency in list(&package["dependencies"]) {
            let crate_name = text(match &dependency["rename"] {
                Value::Null => &dependency["name"],
                rename => rename,
            })
            .replace('-', "_");
            // What only tests name is a dependency of tests.
            let for_tests = dependency["kind"].as_str() == Some("dev");
            if !own
                .iter()
                .any(|source| source.names(&crate_name, for_tests))
            {
                let what = if for_tests {
                    "nothing"
                } else {
                    "only tests, or nothing,"
                };
                broken.push(format!("{name}/Cargo.toml: {what} names {crate_name}"));
            }
        }
    }
    report("take dependencies out that nothing names", broken);
}

#[test]
fn files_and_functions_have_bounded_length() {
    let mut broken = Vec::new();
    for source in sources(&workspace()) {
        let lines = source.text.lines().count();
        let before_tests = source.tests_begin().unwrap_or(lines);
        if !source.is_test() && before_tests > FILE_LINES {
            broken.push(format!(
                "{}: {before_tests} lines, at most {FILE_LINES}",
                source.path
            ));
        }
        if lines - before_tests > INLINE_TEST_LINES {
            let tests = source.path.trim_end_matches(".rs");
            broken.push(format!(
                "{}: {} lines of tests, at most {INLINE_TEST_LINES}: move them to {tests}/tests.rs",
                source.path,
                lines - before_tests
            ));
        }
        for function in source.functions() {
            let allowed = LONG_FUNCTIONS
                .iter()
                .find(|(path, name, _)| *path == source.path && *name == function.name)
                .map_or(FUNCTION_LINES, |(_, _, length)| *length);
            if function.length > allowed {
                broken.push(format!(
                    "{}:{}: {} has {} lines, at most {allowed}",
                    source.path, function.line, function.name, function.length
                ));
            }
        }
    }
    report("short files and functions", broken);
}

#[test]
fn the_list_of_long_functions_only_gets_shorter() {
    let sources = sources(&workspace());
    let broken = LONG_FUNCTIONS
        .iter()
        .filter(|(path, name, length)| {
            let found = sources
                .iter()
                .filter(|source| source.path == *path)
                .flat_map(Source::functions);
            !found
                .into_iter()
                .any(|function| function.name == *name && function.length == *length)
        })
        .map(|(path, name, length)| format!("{path}: {name} no longer has {length} lines"))
        .collect();
    report(
        "take mended functions off the list, or lower their number",
        broken,
    );
}

#[test]
fn modules_are_named_by_what_they_provide() {
    let vague = ["util", "utils", "common", "misc", "helper", "helpers"];
    let broken = sources(&workspace())
        .iter()
        .filter(|source| {
            source
                .path
                .trim_end_matches(".rs")
                .split('/')
                .any(|part| vague.contains(&part))
        })
        .map(|source| source.path.clone())
        .collect();
    report("no module is called util, common, misc or helpers", broken);
}

#[test]
fn nothing_is_left_to_do_without_an_issue() {
    let words = [
        concat!("TO", "DO"),
        concat!("FIX", "ME"),
        concat!("XX", "X:"),
    ];
    let mut broken = Vec::new();
    for source in sources(&workspace()) {
        for (number, line) in source.text.lines().enumerate() {
            if words.iter().any(|word| line.contains(word)) && !line.contains("(#") {
                broken.push(format!("{}:{}: {}", source.path, number + 1, line.trim()));
            }
        }
    }
    report("what is left to do names its issue, as (#12)", broken);
}

#[test]
fn every_source_file_is_part_of_a_crate() {
    let sources = sources(&workspace());
    let known: BTreeMap<&str, &Source> = sources
        .iter()
        .map(|source| (source.path.as_str(), source))
        .collect();
    let mut reached = BTreeSet::new();
    let mut waiting: Vec<String> = known
        .keys()
        .filter(|path| is_root(path))
        .map(|path| (*path).to_owned())
        .collect();
    while let Some(path) = waiting.pop() {
        let Some(source) = known.get(path.as_str()) else {
            continue;
        };
        if !reached.insert(path.clone()) {
            continue;
        }
        let directory = module_directory(&path);
        for module in source.declared_modules() {
            waiting.push(format!("{directory}/{module}.rs"));
            waiting.push(format!("{directory}/{module}/mod.rs"));
        }
    }
    let broken = known
        .keys()
        .filter(|path| !reached.contains(**path))
        .map(|path| (*path).to_owned())
        .collect();
    report("these files belong to no crate", broken);
}

/// Whether Cargo compiles the file by itself.
fn is_root(path: &str) -> bool {
    let parts: Vec<&str> = path.split('/').collect();
    match parts.as_slice() {
        [_, "src", "lib.rs" | "main.rs"] | [_, "build.rs"] => true,
        [_, "src", "bin", _] | [_, "tests" | "benches" | "examples", _] => true,
        [_, "src", "bin", _, "main.rs"] | [_, "tests" | "benches" | "examples", _, "main.rs"] => {
            true
        }
        // Fuzzers are packages of their own, outside the workspace.
        [_, "fuzz", ..] => true,
        _ => false,
    }
}

/// Where the modules that the file declares are.
fn module_directory(path: &str) -> String {
    let (directory, name) = path.rsplit_once('/').unwrap_or(("", path));
    if is_root(path) || name == "mod.rs" {
        directory.to_owned()
    } else {
        format!("{directory}/{}", name.trim_end_matches(".rs"))
    }
}

#[test]
fn the_front_page_shows_both_commands_and_changes_are_kept() {
    let read = |name: &str| {
        fs::read_to_string(workspace().join(name)).unwrap_or_else(|_| panic!("{name} is missing"))
    };
    let readme = read("README.md");
    for command in ["make run", "make test"] {
        assert!(
            readme.contains(command),
            "README.md does not show `{command}`"
        );
    }
    assert!(
        read("CONTRIBUTING.md").contains("virtio"),
        "CONTRIBUTING.md does not tell how to add a device"
    );
    assert!(
        read("CHANGELOG.md").contains("## "),
        "CHANGELOG.md has no entry"
    );
}

#[test]
fn every_crate_says_what_it_is() {
    let mut broken = Vec::new();
    for (name, _) in ARROWS {
        let directory = workspace().join(name);
        let roots = ["src/lib.rs", "src/main.rs"].map(|root| directory.join(root));
        let documented = |path: &Path| {
            fs::read_to_string(path)
                .is_ok_and(|text| text.starts_with("//! ") && !text.starts_with("//! TEMP"))
        };
        if !roots
            .iter()
            .filter(|root| root.exists())
            .all(|root| documented(root))
        {
            broken.push(format!("{name}: lib.rs or main.rs does not begin with //!"));
        }
    }
    report("every crate says what it is", broken);
}

/// Files tell of the project, not of the machine on which they were written.
#[test]
fn no_file_names_a_place_outside_the_project() {
    let places = [
        concat!("/ho", "me/"),
        concat!("/ro", "ot/"),
        concat!("/wo", "rk/"),
        concat!("/Us", "ers/"),
        concat!("de", "b.debian.org"),
        concat!("index.", "crates", ".io"),
        concat!("static.", "crates", ".io"),
    ];
    let mut broken = Vec::new();
    for (relative, path) in files(&workspace()) {
        if relative == "Cargo.lock" {
            continue;
        }
        let Ok(text) = fs::read_to_string(path) else {
            continue;
        };
        for (number, line) in text.lines().enumerate() {
            for place in places.iter().filter(|place| begins(line, place)) {
                broken.push(format!("{relative}:{}: {place}", number + 1));
            }
        }
    }
    report("no file names a place outside the project", broken);
}

/// Whether a path in the line begins with `place`; a directory of the project may have its name.
fn begins(line: &str, place: &str) -> bool {
    line.match_indices(place).any(|(at, _)| {
        !line[..at].ends_with(|before: char| before.is_ascii_alphanumeric() || before == '_')
    })
}

/// A heuristic: the tests of the module that declares a saved type restore one.
/// Models and their transport are restored by the conformance suite, which runs over the registry.
#[test]
fn every_saved_state_is_restored_by_a_test() {
    let sources = sources(&workspace());
    let mut broken = Vec::new();
    for source in sources.iter().filter(|source| !source.is_test()) {
        let begin = source.tests_begin().unwrap_or(usize::MAX);
        let saved: Vec<&str> = source
            .code
            .lines()
            .take(begin)
            .filter_map(|line| line.trim().strip_prefix("impl SavedState for "))
            .collect();
        if saved.is_empty() || is_restored(source, &sources) {
            continue;
        }
        broken.push(format!(
            "{}: {}",
            source.path,
            saved.join(" ").replace(['{', '}'], "")
        ));
    }
    report("no test restores these saved states", broken);
}

fn is_restored(source: &Source, sources: &[Source]) -> bool {
    let restores = |text: &str| text.contains("restore") || text.contains("round_trip");
    if source.path.starts_with("virtio/src/") {
        return sources
            .iter()
            .any(|other| other.path.starts_with("virtio/tests/") && restores(&other.code));
    }
    let own: String = source
        .code
        .lines()
        .skip(source.tests_begin().unwrap_or(usize::MAX))
        .collect::<Vec<_>>()
        .join("\n");
    // The module's own tests, or those of the module that it is part of.
    let stem = source.path.trim_end_matches(".rs").trim_end_matches("/mod");
    let parent = stem.rsplit_once('/').map_or("", |(parent, _)| parent);
    let mut places = vec![format!("{stem}/tests")];
    if !parent.ends_with("/src") {
        places.push(format!("{parent}/tests"));
    }
    restores(&own)
        || sources.iter().any(|other| {
            places
                .iter()
                .any(|place| other.path.starts_with(place.as_str()))
                && restores(&other.code)
        })
}
