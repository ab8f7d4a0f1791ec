//! Where the program has unsafe code is written down, with the reason of each place.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;

use tests::places::workspace;

use crate::report;
use crate::source::{Source, sources};

const PAGE: &str = "resources/supply/unsafe.md";
const HEAD: &str = "# Unsafe code

`make unsafe-list` writes this page, and a test compares it with the sources. `unsafe_code` is denied in all crates; an exception is an attribute with its reason,
and the proof is the `SAFETY` comment at the block. A number says how many attributes of a file have that reason. Tests are not here.
";

/// The reasons for which `source` is excepted from the rule, outside its tests.
fn reasons(source: &Source) -> Vec<String> {
    let lines = source.text.lines().count();
    let end = source.tests_begin().unwrap_or(lines);
    let mut found = Vec::new();
    let mut begins = 0;
    for (at, line) in source.text.split_inclusive('\n').enumerate() {
        let begin = begins;
        begins += line.len();
        let is_attribute = ["#[", "#!["]
            .iter()
            .any(|b| line.trim_start().starts_with(b));
        if !is_attribute || at >= end {
            continue;
        }
        let attribute = source.text[begin..].split(")]").next().unwrap_or_default();
        if attribute.contains("unsafe_code") {
            let reason = attribute.split_once("reason = \"");
            let reason = reason.and_then(|(_, rest)| rest.rsplit_once('"'));
            found.push(reason.map_or_else(|| "no reason".to_owned(), |(text, _)| text.to_owned()));
        }
    }
    found
}

/// The page as the sources have it.
fn page() -> String {
    let mut page = HEAD.to_owned();
    let mut all: BTreeMap<String, Vec<(String, Vec<String>)>> = BTreeMap::new();
    for source in sources(&workspace()) {
        let (part, _) = source.path.split_once('/').unwrap_or_default();
        let is_program = !source.is_test() && source.path.contains("/src/");
        let found = if is_program {
            reasons(&source)
        } else {
            Vec::new()
        };
        if !found.is_empty() && part != "tests" {
            let of_part = all.entry(part.to_owned()).or_default();
            of_part.push((source.path, found));
        }
    }
    for (part, files) in &all {
        let count: usize = files.iter().map(|(_, found)| found.len()).sum();
        write!(
            page,
            "\n## {part}: {count}\n\n| file | reasons |\n|---|---|\n"
        )
        .unwrap();
        for (path, found) in files {
            let mut counted: BTreeMap<&str, usize> = BTreeMap::new();
            for reason in found {
                *counted.entry(reason).or_default() += 1;
            }
            let told = counted.into_iter().map(|(reason, count)| match count {
                1 => reason.to_owned(),
                _ => format!("{reason} ({count})"),
            });
            let told: Vec<String> = told.collect();
            writeln!(page, "| `{path}` | {} |", told.join("; ")).unwrap();
        }
    }
    page
}

#[test]
fn every_exception_for_unsafe_code_is_on_its_page_with_its_reason() {
    let (path, wanted) = (workspace().join(PAGE), page());
    if std::env::var_os("WRITE_UNSAFE_LIST").is_some() {
        fs::write(&path, &wanted).unwrap();
    }
    let found = fs::read_to_string(&path).unwrap_or_default();
    let mut broken = Vec::new();
    if found != wanted {
        let differs = |(found, wanted): &(&str, &str)| found != wanted;
        let line = found.lines().zip(wanted.lines()).find(differs);
        broken.push(format!(
            "{PAGE} is not what the sources say: make unsafe-list: {line:?}"
        ));
    }
    if wanted.contains("no reason") {
        broken.push("an exception has no reason".to_owned());
    }
    report("every exception for unsafe code is told of", broken);
}

#[test]
fn an_exception_is_found_in_one_line_and_in_several_and_not_in_tests() {
    let text = "#[expect(unsafe_code, reason = \"one\")]\nfn a() {}\n#[expect(\n    unsafe_code,\n    dead_code,\n    \
                reason = \"two (of them)\"\n)]\nfn b() {}\n#[allow(unsafe_code)]\nfn c() {}\n#[cfg(test)]\nmod tests \
                {\n    #[expect(unsafe_code, reason = \"three\")]\n    fn d() {}\n}\n";
    let source = Source::new("vmm/src/a.rs".to_owned(), text.to_owned());
    assert_eq!(reasons(&source), ["one", "two (of them)", "no reason"]);
}
