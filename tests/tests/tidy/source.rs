//! Rust sources as the rules see them.

use std::fs;
use std::path::{Path, PathBuf};

/// One file, with strings, characters and comments blanked out in `code`.
pub struct Source {
    /// Path from the workspace's top.
    pub path: String,
    pub text: String,
    /// The same length and lines as `text`.
    pub code: String,
}

/// A function with a body.
#[derive(Debug, PartialEq, Eq)]
pub struct Function {
    pub name: String,
    /// From 1.
    pub line: usize,
    /// Lines between its braces.
    pub length: usize,
}

/// Every file of the workspace that a person writes, with its path from the top.
pub fn files(top: &Path) -> Vec<(String, PathBuf)> {
    let mut found = Vec::new();
    walk(top, top, &mut found);
    found.sort();
    found
}

fn walk(top: &Path, directory: &Path, found: &mut Vec<(String, PathBuf)>) {
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        let relative = path
            .strip_prefix(top)
            .unwrap()
            .to_string_lossy()
            .into_owned();
        if path.is_symlink() || relative == "target" || relative.ends_with(".git") {
            continue;
        }
        if path.is_dir() {
            walk(top, &path, found);
        } else {
            found.push((relative, path));
        }
    }
}

/// Every Rust file of the workspace.
pub fn sources(top: &Path) -> Vec<Source> {
    files(top)
        .into_iter()
        .filter(|(relative, _)| relative.ends_with(".rs"))
        .map(|(relative, path)| Source::new(relative, fs::read_to_string(path).unwrap()))
        .collect()
}

impl Source {
    pub fn new(path: String, text: String) -> Self {
        let code = blank(&text);
        Self { path, text, code }
    }

    /// Whether the whole file is test code.
    pub fn is_test(&self) -> bool {
        self.path.contains("/tests/") || self.path.ends_with("/tests.rs")
    }

    /// The line, from 0, on which tests begin: `#[cfg(test)]` with a body.
    pub fn tests_begin(&self) -> Option<usize> {
        let lines: Vec<&str> = self.code.lines().collect();
        (0..lines.len()).find(|&at| {
            lines[at].trim() == "#[cfg(test)]"
                && lines
                    .get(at + 1)
                    .is_some_and(|next| next.trim_end().ends_with('{'))
                && lines[at + 1].contains("mod ")
        })
    }

    /// Whether a path in the code begins with this crate; in the code of tests
    /// only where `in_tests` says so.
    pub fn names(&self, crate_name: &str, in_tests: bool) -> bool {
        let for_tests = self.is_test() || self.path.contains("/benches/");
        // All of the crate `tests` is for tests.
        if for_tests && !in_tests && !self.path.starts_with("tests/") {
            return false;
        }
        let end = if in_tests { None } else { self.tests_begin() };
        let inside = |c: char| c.is_alphanumeric() || c == '_' || c == ':';
        self.code
            .lines()
            .take(end.unwrap_or(usize::MAX))
            .any(|line| {
                line.match_indices(crate_name).any(|(at, word)| {
                    let rest = &line[at + word.len()..];
                    !line[..at].ends_with(inside) && rest.starts_with("::")
                })
            })
    }

    /// The modules it declares in other files: `mod name;`, or as a word of
    /// the registry `models! { … }`.
    pub fn declared_modules(&self) -> Vec<String> {
        let plain = self.code.lines().filter_map(|line| {
            let line = line.trim().strip_suffix(';')?;
            let name = line.split_whitespace().last()?;
            let before = line.strip_suffix(name)?.trim_end();
            (before == "mod" || before.ends_with(" mod")).then(|| name.to_owned())
        });
        let registry = self
            .code
            .split_once("\nmodels! {")
            .map_or("", |(_, rest)| rest);
        let words = registry
            .split('}')
            .next()
            .unwrap_or("")
            .split([',', ' ', '\n']);
        plain
            .chain(words.filter(|word| !word.is_empty()).map(str::to_owned))
            .collect()
    }

    pub fn functions(&self) -> Vec<Function> {
        let bytes = self.code.as_bytes();
        let mut functions = Vec::new();
        for (at, _) in self.code.match_indices("fn ") {
            if at > 0 && (bytes[at - 1].is_ascii_alphanumeric() || bytes[at - 1] == b'_') {
                continue;
            }
            let name: String = self.code[at + 3..]
                .chars()
                .take_while(|c| c.is_alphanumeric() || *c == '_')
                .collect();
            if let Some((open, close)) = body(bytes, at).filter(|_| !name.is_empty()) {
                let line = 1 + newlines(&bytes[..at]);
                let length = newlines(&bytes[open..close]).saturating_sub(1);
                functions.push(Function { name, line, length });
            }
        }
        functions
    }
}

fn newlines(bytes: &[u8]) -> usize {
    bytes.iter().filter(|&&byte| byte == b'\n').count()
}

/// Where the braces of the function at `at` are; a declaration has none.
fn body(code: &[u8], at: usize) -> Option<(usize, usize)> {
    let mut nesting = 0_i32;
    let mut open = None;
    for (offset, byte) in code[at..].iter().enumerate() {
        match byte {
            // An array type in the signature holds a semicolon too.
            b'(' | b'[' if open.is_none() => nesting += 1,
            b')' | b']' if open.is_none() => nesting -= 1,
            b';' if open.is_none() && nesting == 0 => return None,
            b'{' if open.is_none() => {
                open = Some(at + offset);
                nesting = 1;
            }
            b'{' => nesting += 1,
            b'}' => {
                nesting -= 1;
                if let Some(open) = open.filter(|_| nesting == 0) {
                    return Some((open, at + offset));
                }
            }
            _ => {}
        }
    }
    None
}

/// Replaces what strings, characters and comments hold with blanks.
fn blank(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let length = literal_length(rest, out.chars().last());
        if length == 0 {
            out.push(first);
            rest = &rest[first.len_utf8()..];
        } else {
            out.extend(
                rest[..length]
                    .chars()
                    .map(|c| if c == '\n' { '\n' } else { ' ' }),
            );
            rest = &rest[length..];
        }
    }
    out
}

/// The length of the comment or literal that `rest` begins with, or 0.
fn literal_length(rest: &str, before: Option<char>) -> usize {
    let in_word = before.is_some_and(|c| c.is_alphanumeric() || c == '_');
    if rest.starts_with("//") {
        return rest.find('\n').unwrap_or(rest.len());
    }
    if rest.starts_with("/*") {
        return block_comment(rest);
    }
    let raw = rest
        .strip_prefix("br")
        .or_else(|| rest.strip_prefix('r'))
        .filter(|_| !in_word);
    if let Some(raw) = raw {
        let hashes = raw.len() - raw.trim_start_matches('#').len();
        if raw[hashes..].starts_with('"') {
            let prefix = rest.len() - raw.len() + hashes + 1;
            let end = format!("\"{}", "#".repeat(hashes));
            return rest[prefix..]
                .find(&end)
                .map_or(rest.len(), |at| prefix + at + end.len());
        }
    }
    if rest.starts_with('"') {
        return quoted(rest, '"');
    }
    // A lifetime has no closing quote right after its first character.
    if rest.starts_with("'\\") || rest.chars().nth(2) == Some('\'') && rest.starts_with('\'') {
        return quoted(rest, '\'');
    }
    0
}

fn quoted(rest: &str, quote: char) -> usize {
    let mut escaped = false;
    for (at, c) in rest.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            c if c == quote => return at + 1,
            _ => {}
        }
    }
    rest.len()
}

fn block_comment(rest: &str) -> usize {
    let mut nesting = 0;
    let mut at = 0;
    while at < rest.len() {
        if rest[at..].starts_with("/*") {
            nesting += 1;
            at += 2;
        } else if rest[at..].starts_with("*/") {
            nesting -= 1;
            at += 2;
            if nesting == 0 {
                return at;
            }
        } else {
            at += rest[at..].chars().next().map_or(1, char::len_utf8);
        }
    }
    rest.len()
}

#[test]
fn literals_and_comments_do_not_count_as_code() {
    let text = "fn a() {\n    let x = \"}\"; // }\n    let y = '}';\n    let z = r#\"}\"}\"#;\n    /* } /* } */ */\n    b::<'static>(\"\\\"}\");\n}\n";
    let source = Source::new("x.rs".into(), text.into());
    assert_eq!(
        source.functions(),
        [Function {
            name: "a".into(),
            line: 1,
            length: 5
        }]
    );
}

#[test]
fn declarations_and_array_types_are_no_bodies() {
    let text = "trait T {\n    fn a(x: [u8; 4]) -> u8;\n    fn b(x: [u8; 4])\n    where\n        Self: Sized,\n    {\n        1;\n    }\n}\n";
    let source = Source::new("x.rs".into(), text.into());
    assert_eq!(
        source.functions(),
        [Function {
            name: "b".into(),
            line: 3,
            length: 1
        }]
    );
}

#[test]
fn modules_and_the_start_of_tests_are_found() {
    let text = "mod a;\npub(crate) mod b;\nmod c {\n}\n// mod d;\n#[cfg(test)]\nmod tests;\nmodels! {\n    e,\n    f\n}\n#[cfg(test)]\nmod tests {\n}\n";
    let source = Source::new("x.rs".into(), text.into());
    assert_eq!(source.declared_modules(), ["a", "b", "tests", "e", "f"]);
    assert_eq!(source.tests_begin(), Some(11));
}

#[test]
fn a_crate_is_named_where_a_path_begins_with_it() {
    let text = "use net::Mac;\nuse std::time::Duration;\n// libc::c_int\nmy_serde::x();\n#[cfg(test)]\nmod tests {\n    use tempfile::tempdir;\n}\n";
    let source = Source::new("a/src/lib.rs".into(), text.into());
    assert!(source.names("net", false));
    assert!(source.names("tempfile", true) && !source.names("tempfile", false));
    for other in ["time", "libc", "serde", "ne"] {
        assert!(!source.names(other, true), "{other}");
    }
}
