//! `vireo image measure`.

use std::path::PathBuf;

use anyhow::{Context, bail};
use block::ops::{Control, Measured, measure};
use block::{Cache, Format};
use clap::Args;
use serde_json::json;

use super::creation::{self, Creation};
use super::info::Output;
use super::source::{self, Sharing};
use super::{describe, interrupt};
use crate::cli::print;
use crate::opener::Opener;

pub(super) const EXAMPLES: &str = "\
Examples:
  vireo image measure -O qcow2 --size 100G
  vireo image measure -O qcow2 -o cluster_size=2M disk.img";

#[derive(Debug, Args)]
pub(in crate::cli) struct MeasureArgs {
    /// Format of the new image: raw or qcow2
    #[arg(short = 'O', long, value_name = "FMT", default_value = "raw", value_parser = source::format)]
    target_format: Format,

    /// Options of that format, key=value,…; -o help lists them
    #[arg(short, long, value_name = "OPTIONS")]
    options: Vec<String>,

    /// Size of an empty disk, instead of a file
    #[arg(long, value_name = "SIZE", value_parser = source::size)]
    size: Option<u64>,

    /// Format of the file: raw or qcow2; without it, what it looks like
    #[arg(short, long, value_name = "FMT", value_parser = source::format)]
    format: Option<Format>,

    /// The file as this snapshot within it has it
    #[arg(short = 'l', long, value_name = "SNAPSHOT")]
    snapshot: Option<String>,

    /// How to print: human or json
    #[arg(long, value_name = "HOW", value_enum, default_value = "human")]
    output: Output,

    #[command(flatten)]
    sharing: Sharing,

    /// The image that would be copied
    #[arg(value_name = "FILE")]
    file: Option<PathBuf>,
}

impl MeasureArgs {
    pub(super) fn run(self, opener: &Opener) -> anyhow::Result<u8> {
        if let Some(help) = creation::help(self.target_format, &self.options) {
            print(help.as_bytes())?;
            return Ok(0);
        }
        let mut new = Creation::new(self.target_format, &self.options)?;
        let source = match (&self.file, self.size) {
            (Some(_), Some(_)) => bail!("give a file or --size, not both"),
            (None, None) => bail!("give a file or --size"),
            (None, _) if self.snapshot.is_some() => bail!("-l is for a file"),
            (None, size) => {
                new.size = size;
                None
            }
            (Some(file), None) => {
                let (cache, snapshot) = (Cache::Writeback, self.snapshot.as_deref());
                let opened =
                    self.sharing
                        .open_source(file, self.format, cache, snapshot, opener)?;
                Some(opened)
            }
        };
        let mut options = new.options.clone();
        options.size = new.size.unwrap_or(0);
        options.backing = new.backing.map(|name| (name, Some("raw".to_owned())));
        let control = Control {
            progress: &|_, _| {},
            cancel: interrupt::flag()?,
        };
        let found = measure(source.as_deref(), self.target_format, &options, &control)
            .context("cannot measure")?;
        print(self.tell(&found).as_bytes())?;
        Ok(0)
    }

    fn tell(&self, found: &Measured) -> String {
        if self.output == Output::Human {
            let bitmaps = found
                .bitmaps
                .map_or_else(String::new, |size| format!("bitmaps size: {size}\n"));
            return format!(
                "required size: {}\nfully allocated size: {}\n{bitmaps}",
                found.required, found.fully_allocated
            );
        }
        let mut all = json!({
            "required": found.required,
            "fully-allocated": found.fully_allocated,
        });
        if let (Some(map), Some(size)) = (all.as_object_mut(), found.bitmaps) {
            map.insert("bitmaps".to_owned(), size.into());
        }
        describe::to_json(&all) + "\n"
    }
}
