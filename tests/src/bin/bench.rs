//! `make bench`: Vireo's speed and size beside QEMU's.
//!
//!     bench [--runs N] [--nested-runs N] [--wall] [--quick] [--only GROUP,…]
//!
//! Results are printed and written to `target/bench/latest.json` and `latest.svg`.
//! A missed target is no failure.
//!
//! In the nested machine the same program times the monitors, as its agent.

use std::path::Path;
use std::process::ExitCode;

use ::tests::bench::{self, Settings};
use anyhow::Result;
use clap::Parser;

/// Measures Vireo beside QEMU, in the same run and in turns.
#[derive(Debug, Parser)]
#[command(name = "bench")]
struct Args {
    /// Values for each monitor and measure on this machine's own KVM; 7, or 3 with --quick
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    runs: Option<u16>,
    /// The same in the nested machine, by the real clock
    #[arg(long, value_name = "N", default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..))]
    nested_runs: u32,
    /// How many machines are cloned of one template; 100, or 4 with --quick
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=4096))]
    clones: Option<u32>,
    /// Measure the network, the balloon and the consoles in the nested machine by the real clock too, not only by
    /// instructions; it takes half an hour
    #[arg(long)]
    wall: bool,
    /// Only see that everything works: few and short runs, nothing nested
    #[arg(long)]
    quick: bool,
    /// Only these groups of measures; of images also single ones by how their names begin, as image.convert
    #[arg(long, value_name = "GROUP", value_delimiter = ',', value_parser = group)]
    only: Vec<String>,
}

/// A group, or the beginning of a measure's name.
fn group(text: &str) -> Result<String, String> {
    let known = bench::GROUPS;
    if known.contains(&text) || text.starts_with("image.") {
        Ok(text.to_owned())
    } else {
        Err(format!("the groups are {}", known.join(", ")))
    }
}

fn main() -> ExitCode {
    match work() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn work() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    if let [mode, kit, port] = words.as_slice()
        && mode == bench::NESTED_MODE
    {
        return bench::measure_inside(Path::new(kit), Path::new(port));
    }
    let args = Args::parse();
    let directory = bench::directory();
    std::fs::create_dir_all(&directory)?;
    bench::run(&Settings {
        runs: usize::from(args.runs.unwrap_or(if args.quick { 3 } else { 7 })),
        nested_runs: args.nested_runs,
        clones: args.clones.unwrap_or(if args.quick { 4 } else { 100 }),
        wall: args.wall,
        quick: args.quick,
        only: args.only,
        directory,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_named_and_others_refused() {
        let args = |words: &[&str]| Args::try_parse_from(words);
        let nested = args(&["bench", "--only", "nested-net,image.check", "--wall"]).unwrap();
        assert_eq!(nested.only, ["nested-net", "image.check"]);
        assert!(nested.wall);
        let quick = args(&["bench", "--quick"]).unwrap();
        assert!(quick.quick && !quick.wall && quick.only.is_empty());
        let error = args(&["bench", "--only", "nested"]).unwrap_err();
        assert!(error.to_string().contains("nested-console"), "{error}");
    }
}
