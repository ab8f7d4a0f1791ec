//! `vireo image check`. Its exit codes: 0 nothing is wrong (any more), 1 it could not be checked, 2 corruptions,
//! 3 leaked clusters, 63 the format has no checks.

use std::fmt::Write as _;
use std::path::PathBuf;

use block::ops::{CheckImageError, check};
use block::{Cache, CheckReport, Finding, Format, Repair, Severity};
use clap::Args;
use serde_json::{Map, Value};

use super::describe;
use super::info::Output;
use super::source::{self, Sharing, Use, find_format};
use crate::cli::{message, print};
use crate::opener::Opener;

/// The exit code for formats without checks.
const UNCHECKED: u8 = 63;

/// How many findings are printed.
const TOLD: u64 = 1000;

pub(super) const EXAMPLES: &str = "\
Examples:
  vireo image check disk.qcow2
  vireo image check -r leaks disk.qcow2
  vireo image check --output json disk.qcow2 | jq .leaks

Exit codes:
  0   nothing is wrong, or not any more
  1   the image cannot be checked; wrong usage
  2   corruptions: data is in danger
  3   leaked clusters: space is lost, data is safe
  63  the format has no checks";

#[derive(Debug, Args)]
pub(in crate::cli) struct CheckArgs {
    /// Format of the image: raw or qcow2; without it, what it looks like
    #[arg(short, long, value_name = "FMT", value_parser = source::format)]
    format: Option<Format>,

    /// Repair: leaks, or all that can be; nobody else may use the image then
    #[arg(short, long, value_name = "WHAT", value_parser = repair)]
    repair: Option<Repair>,

    /// Cache mode; checks use the host's cache whatever it is
    #[arg(short = 'T', long, value_name = "MODE", default_value = "writeback", value_parser = source::cache)]
    cache: Cache,

    /// How to print: human or json
    #[arg(long, value_name = "HOW", value_enum, default_value = "human")]
    output: Output,

    /// Print nothing but what is wrong
    #[arg(short, long)]
    quiet: bool,

    #[command(flatten)]
    sharing: Sharing,

    /// The image
    #[arg(value_name = "FILE")]
    file: PathBuf,
}

fn repair(text: &str) -> Result<Repair, String> {
    match text {
        "leaks" => Ok(Repair::Leaks),
        "all" => Ok(Repair::All),
        _ => Err("what can be repaired is leaks, or all".to_owned()),
    }
}

impl CheckArgs {
    pub(super) fn run(self, opener: &Opener) -> anyhow::Result<u8> {
        // Tables are read in order and once.
        let Self { cache: _, .. } = self;
        if self.repair.is_some() {
            self.sharing.writing()?;
        }
        let format = find_format(&self.file, self.format, Use::Read, opener)?;
        let mut told = 0;
        let mut sink = |finding: Finding| {
            told += 1;
            if told <= TOLD {
                message::note(&line(&finding));
            }
        };
        let lock = !self.sharing.force_share;
        let report = match check(&self.file, opener, format, self.repair, lock, &mut sink) {
            Err(error @ CheckImageError::Raw { .. }) => {
                message::report(&error.to_string());
                return Ok(UNCHECKED);
            }
            other => other?,
        };
        if told > TOLD {
            message::note(&format!("… and {} more", told - TOLD));
        }
        if !self.quiet {
            let text = match self.output {
                Output::Human => text(&report),
                Output::Json => self.json(&report, format),
            };
            print(text.as_bytes())?;
        }
        Ok(exit_code(&report))
    }

    fn json(&self, report: &CheckReport, format: Format) -> String {
        let mut map = Map::new();
        map.insert("filename".to_owned(), self.file.to_string_lossy().into());
        map.insert("format".to_owned(), format.name().into());
        map.insert("check-errors".to_owned(), report.check_errors.into());
        for (key, number) in [
            ("image-end-offset", report.image_end_offset),
            ("corruptions", report.corruptions),
            ("leaks", report.leaks),
            ("corruptions-fixed", report.corruptions_fixed),
            ("leaks-fixed", report.leaks_fixed),
            ("total-clusters", report.total_clusters),
            ("allocated-clusters", report.allocated_clusters),
            ("fragmented-clusters", report.fragmented_clusters),
            ("compressed-clusters", report.compressed_clusters),
        ] {
            if number != 0 {
                map.insert(key.to_owned(), number.into());
            }
        }
        describe::to_json(&Value::Object(map)) + "\n"
    }
}

fn line(finding: &Finding) -> String {
    let kind = match finding.severity {
        Severity::Leak => "leak",
        Severity::Corruption => "corruption",
        Severity::Repaired => "repaired",
    };
    format!("{kind}: {}", finding.message)
}

fn exit_code(report: &CheckReport) -> u8 {
    if report.check_errors != 0 {
        1
    } else if report.corruptions != 0 {
        2
    } else if report.leaks != 0 {
        3
    } else {
        0
    }
}

#[expect(clippy::cast_precision_loss, reason = "two decimals are shown")]
fn percent(part: u64, whole: u64) -> f64 {
    part as f64 * 100.0 / whole as f64
}

fn text(report: &CheckReport) -> String {
    let mut text = String::new();
    if report.leaks_fixed != 0 || report.corruptions_fixed != 0 {
        text += &format!(
            "The following inconsistencies were found and repaired:\n\n    {} leaked clusters\n    \
             {} corruptions\n\nDouble checking the fixed image now...\n",
            report.leaks_fixed, report.corruptions_fixed
        );
    }
    if report.corruptions == 0 && report.leaks == 0 && report.check_errors == 0 {
        text += "No errors were found on the image.\n";
    }
    // Writing to a string cannot fail.
    if report.corruptions != 0 {
        let _ = writeln!(
            text,
            "\n{} errors were found on the image.\nData may be corrupted, or further writes to the \
             image may corrupt it.",
            report.corruptions
        );
    }
    if report.leaks != 0 {
        let _ = writeln!(
            text,
            "\n{} leaked clusters were found on the image.\nThis means waste of disk space, but no \
             harm to data.",
            report.leaks
        );
    }
    if report.check_errors != 0 {
        let _ = writeln!(
            text,
            "\n{} internal errors have occurred during the check.",
            report.check_errors
        );
    }
    let (total, allocated) = (report.total_clusters, report.allocated_clusters);
    if total != 0 && allocated != 0 {
        let _ = writeln!(
            text,
            "{allocated}/{total} = {:.2}% allocated, {:.2}% fragmented, {:.2}% compressed clusters",
            percent(allocated, total),
            percent(report.fragmented_clusters, allocated),
            percent(report.compressed_clusters, allocated)
        );
    }
    if report.image_end_offset != 0 {
        let _ = writeln!(text, "Image end offset: {}", report.image_end_offset);
    }
    text
}
