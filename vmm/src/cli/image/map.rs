//! `vireo image map`.

use std::fmt::Write as _;
use std::path::PathBuf;

use anyhow::bail;
use block::ops::{Control, ImageInfo, Status, chain, map};
use block::{Cache, Format};
use clap::Args;

use super::info::Output;
use super::source::{self, Sharing, Use, find_format};
use crate::cli::print;
use crate::opener::Opener;

pub(super) const EXAMPLES: &str = "\
Examples:
  vireo image map overlay.qcow2
  vireo image map --output json disk.img | jq 'map(select(.data).length) | add'";

/// How much text is gathered before it is printed, in bytes.
const CHUNK: usize = 64 << 10;

#[derive(Debug, Args)]
pub(in crate::cli) struct MapArgs {
    /// Format of the image: raw or qcow2; without it, what it looks like
    #[arg(short, long, value_name = "FMT", value_parser = source::format)]
    format: Option<Format>,

    /// Where to begin
    #[arg(short, long, value_name = "OFFSET", default_value = "0", value_parser = source::size)]
    start_offset: u64,

    /// How many bytes to tell of; all without it
    #[arg(short = 'l', long, value_name = "LEN", value_parser = source::size)]
    max_length: Option<u64>,

    /// How to print: human (data only) or json (all)
    #[arg(long, value_name = "HOW", value_enum, default_value = "human")]
    output: Output,

    #[command(flatten)]
    sharing: Sharing,

    /// The image
    #[arg(value_name = "FILE")]
    file: PathBuf,
}

impl MapArgs {
    pub(super) fn run(self, opener: &Opener) -> anyhow::Result<u8> {
        let format = find_format(&self.file, self.format, Use::Read, opener)?;
        let image = self.sharing.open(
            &self.file,
            Some(format),
            Use::Read,
            Cache::Writeback,
            opener,
        )?;
        let policy = self.sharing.backing_policy;
        let images = chain(&self.file, opener, format, policy, false)?;
        let start = self.start_offset.min(image.size());
        let end = match self.max_length {
            Some(len) => start.saturating_add(len).min(image.size()),
            None => image.size(),
        };
        let mut list = List {
            output: self.output,
            images: &images,
            text: String::new(),
            first: true,
            trouble: None,
        };
        list.begin();
        map(&*image, start..end, &Control::none(), |found| {
            list.add(&found);
        })?;
        list.end()?;
        Ok(0)
    }
}

struct List<'a> {
    output: Output,
    images: &'a [ImageInfo],
    text: String,
    first: bool,
    trouble: Option<anyhow::Error>,
}

impl List<'_> {
    fn begin(&mut self) {
        self.text.push_str(match self.output {
            Output::Human => "Offset          Length          Mapped to       File\n",
            Output::Json => "[",
        });
    }

    fn add(&mut self, found: &Status) {
        if self.trouble.is_some() {
            return;
        }
        let added = match self.output {
            Output::Human => self.add_text(found),
            Output::Json => {
                self.add_json(found);
                Ok(())
            }
        };
        let flushed = added.and_then(|()| {
            if self.text.len() > CHUNK {
                print(std::mem::take(&mut self.text).as_bytes())
            } else {
                Ok(())
            }
        });
        self.trouble = flushed.err();
    }

    fn add_text(&mut self, found: &Status) -> anyhow::Result<()> {
        if !found.data || found.zero {
            return Ok(());
        }
        let Some(host) = found.host else {
            bail!(
                "the image has compressed clusters, which are at no one offset: use --output json"
            );
        };
        let image = self.images.get(found.depth);
        let file = image.map(|image| {
            let data = image
                .qcow2
                .as_ref()
                .and_then(|qcow2| qcow2.data_file.as_ref());
            match data {
                Some(name) => image.path.with_file_name(name),
                None => image.path.clone(),
            }
        });
        let file = file.unwrap_or_default();
        let hex = |number: u64| {
            if number == 0 {
                "0".to_owned()
            } else {
                format!("{number:#x}")
            }
        };
        // Writing to a string cannot fail.
        let _ = writeln!(
            self.text,
            "{:<15} {:<15} {:<15} {}",
            hex(found.start),
            hex(found.len),
            hex(host),
            file.display()
        );
        Ok(())
    }

    fn add_json(&mut self, found: &Status) {
        let Status {
            start,
            len,
            depth,
            present,
            zero,
            data,
            compressed,
            host,
        } = found;
        if !std::mem::take(&mut self.first) {
            self.text.push_str(",\n");
        }
        let _ = write!(
            self.text,
            "{{ \"start\": {start}, \"length\": {len}, \"depth\": {depth}, \"present\": {present}, \
             \"zero\": {zero}, \"data\": {data}, \"compressed\": {compressed}"
        );
        if let Some(host) = host {
            let _ = write!(self.text, ", \"offset\": {host}");
        }
        self.text.push('}');
    }

    fn end(mut self) -> anyhow::Result<()> {
        if let Some(error) = self.trouble.take() {
            print(self.text.as_bytes())?;
            return Err(error);
        }
        if self.output == Output::Json {
            self.text.push_str("]\n");
        }
        print(self.text.as_bytes())
    }
}
