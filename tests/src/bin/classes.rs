//! Tells where each class of tests ran.
//!
//!     classes forget          before a run
//!     classes check [full]    after it; fails when a class ran nowhere

use std::process::ExitCode;

use tests::suite;

const CLASSES: &[&str] = &[
    "native",
    "bad-input",
    "taps",
    "recorded-ch-remote",
    "recorded-kata",
    "recorded-libvirt",
    "web-console",
    "linux-6.12-cloud",
    "linux-6.1-cloud",
];
const MORE_CLASSES: &[&str] = &[
    "linux-6.12-cloud-more",
    "linux-6.12-generic",
    "linux-6.1-generic",
];

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let result = match words.as_slice() {
        ["forget"] => suite::forget_notes(),
        ["check"] => suite::ledger(CLASSES),
        ["check", "full"] => suite::ledger(MORE_CLASSES),
        _ => {
            eprintln!("usage: classes forget | check [full]");
            return ExitCode::from(2);
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("classes: {error:#}");
            ExitCode::FAILURE
        }
    }
}
