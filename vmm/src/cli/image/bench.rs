//! `vireo image bench`.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, bail};
use block::ops::{Bench, Control, bench};
use block::{Aio, Cache, Disk, Format, open_disk};
use clap::Args;

use super::interrupt;
use super::source::{self, Sharing, Use, find_format};
use crate::cli::print;
use crate::opener::Opener;

pub(super) const EXAMPLES: &str = "\
Examples:
  vireo image bench -c 100000 -d 32 -t none disk.img
  vireo image bench -w -s 64k -S 64k --flush-interval 1000 scratch.img";

#[derive(Debug, Args)]
pub(in crate::cli) struct BenchArgs {
    /// How many requests
    #[arg(short, long, value_name = "N", default_value = "75000")]
    count: u64,

    /// How many at once
    #[arg(short, long, value_name = "N", default_value = "64")]
    depth: u32,

    /// Format of the image: raw or qcow2; without it, what it looks like
    #[arg(short, long, value_name = "FMT", value_parser = source::format)]
    format: Option<Format>,

    /// Flush after this many writes
    #[arg(long, value_name = "N", default_value = "0")]
    flush_interval: u64,

    /// Send more requests while a flush is under way
    #[arg(long)]
    no_drain: bool,

    /// What moves the data: threads or io_uring
    #[arg(short = 'i', long, value_name = "ENGINE", value_parser = source::engine)]
    aio: Option<Aio>,

    /// As -t none
    #[arg(short, long)]
    nocache: bool,

    /// Where to begin
    #[arg(short, long, value_name = "OFFSET", default_value = "0", value_parser = source::size)]
    offset: u64,

    /// Byte that is written
    #[arg(long, value_name = "BYTE", default_value = "0")]
    pattern: u8,

    /// Print no headline
    #[arg(short, long)]
    quiet: bool,

    /// Size of each request
    #[arg(short = 's', long, value_name = "SIZE", default_value = "4k", value_parser = source::size)]
    buffer_size: u64,

    /// From one request to the next; the size of a request without it
    #[arg(short = 'S', long, value_name = "SIZE", value_parser = source::size)]
    step_size: Option<u64>,

    /// Cache mode
    #[arg(short = 't', long, value_name = "MODE", default_value = "writeback", value_parser = source::cache)]
    cache: Cache,

    /// Write; what the image holds is lost
    #[arg(short, long)]
    write: bool,

    #[command(flatten)]
    sharing: Sharing,

    /// The image
    #[arg(value_name = "FILE")]
    file: PathBuf,
}

impl BenchArgs {
    pub(super) fn run(self, opener: &Opener) -> anyhow::Result<u8> {
        if self.flush_interval > 0 && !self.write {
            bail!("--flush-interval is for writes: say -w");
        }
        if self.flush_interval > 0 && self.flush_interval < u64::from(self.depth) {
            bail!(
                "--flush-interval must be at least the depth, {}",
                self.depth
            );
        }
        if self.write {
            self.sharing.writing()?;
        }
        let size = usize::try_from(self.buffer_size)?;
        let how = Bench {
            count: self.count,
            depth: self.depth,
            size,
            offset: self.offset,
            step: self.step_size.unwrap_or(self.buffer_size),
            write: self.write.then_some(self.pattern),
            flush_interval: self.flush_interval,
            drain: !self.no_drain,
        };
        let disk = self.disk(opener)?;
        if !self.quiet {
            print(self.headline(&how).as_bytes())?;
        }
        let control = Control {
            progress: &|_, _| {},
            cancel: interrupt::flag()?,
        };
        let time = bench(&*disk, &how, &control)
            .with_context(|| format!("{}: the requests failed", self.file.display()))?;
        print(format!("Run completed in {:.3} seconds.\n", time.as_secs_f64()).as_bytes())?;
        Ok(0)
    }

    fn disk(&self, opener: &Opener) -> anyhow::Result<Arc<dyn Disk>> {
        let purpose = if self.write { Use::Write } else { Use::Read };
        let format = find_format(&self.file, self.format, purpose, opener)?;
        let cache = if self.nocache {
            Cache::None
        } else {
            self.cache
        };
        let mut options = self.sharing.options(format, purpose, cache);
        options.disk.aio = self.aio.unwrap_or_default();
        Ok(open_disk(&self.file, opener, &options)?)
    }

    fn headline(&self, how: &Bench) -> String {
        let kind = if self.write { "write" } else { "read" };
        let mut text = format!(
            "Sending {} {kind} requests, {} bytes each, {} in parallel (starting at offset {}, step size {})\n",
            how.count, how.size, how.depth, how.offset, how.step
        );
        if how.flush_interval > 0 {
            text += &format!("Sending flush every {} requests\n", how.flush_interval);
        }
        text
    }
}
