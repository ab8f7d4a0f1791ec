//! `vireo image io`.

use std::io::{BufRead, IsTerminal, Write};
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context;
use block::ops::info;
use block::ops::io::Session;
use block::{Aio, Cache, Discard, Format, Image, open_image, open_queued};
use clap::Args;

use super::describe;
use super::source::{self, Sharing, Use, close, find_format};
use crate::opener::Opener;

/// The longest line that is read, in bytes.
const LINE: u64 = 64 << 10;

pub(super) const EXAMPLES: &str = "\
Examples:
  vireo image io -c 'write -P 0xaa 0 64k' -c 'read -P 0xaa 0 64k' disk.qcow2
  vireo image io -r -c map disk.qcow2
  vireo image io -c help disk.img
  vireo image io disk.qcow2 < commands

Exit codes:
  0  all commands succeeded
  1  one failed; wrong usage";

#[derive(Debug, Args)]
pub(in crate::cli) struct IoArgs {
    /// Command to run; may be repeated. Without any, they are read from standard input
    #[arg(short = 'c', long = "cmd", value_name = "COMMAND")]
    commands: Vec<String>,

    /// Format of the image: raw or qcow2; without it, what it looks like
    #[arg(short, long, value_name = "FMT", value_parser = source::format)]
    format: Option<Format>,

    /// Open it for reading only
    #[arg(short, long)]
    read_only: bool,

    /// As -t none
    #[arg(short, long)]
    nocache: bool,

    /// Cache mode
    #[arg(short = 't', long, value_name = "MODE", default_value = "writeback", value_parser = source::cache)]
    cache: Cache,

    /// Move data as a machine does, through a queue with this engine: threads or io_uring
    ///
    /// Offsets and lengths are whole sectors then. Without it, calls that wait are used.
    #[arg(short = 'i', long, value_name = "ENGINE", value_parser = source::engine)]
    aio: Option<Aio>,

    /// What a discard does: ignore or unmap
    #[arg(short, long, value_name = "WHAT", default_value = "ignore", value_parser = discard)]
    discard: Discard,

    #[command(flatten)]
    sharing: Sharing,

    /// The image
    #[arg(value_name = "FILE")]
    file: PathBuf,
}

fn discard(text: &str) -> Result<Discard, String> {
    match text {
        "ignore" | "off" => Ok(Discard::Ignore),
        "unmap" | "on" => Ok(Discard::Unmap),
        _ => Err("a discard can be ignore or unmap".to_owned()),
    }
}

impl IoArgs {
    pub(super) fn run(self, opener: &Opener) -> anyhow::Result<u8> {
        let purpose = if self.read_only {
            Use::Read
        } else {
            Use::Write
        };
        if !self.read_only {
            self.sharing.writing()?;
        }
        let format = find_format(&self.file, self.format, purpose, opener)?;
        let cache = if self.nocache {
            Cache::None
        } else {
            self.cache
        };
        let mut options = self.sharing.options(format, purpose, cache);
        options.disk.discard = self.discard;
        let image = match self.aio {
            None => open_image(&self.file, opener, &options)?,
            Some(aio) => {
                options.disk.aio = aio;
                open_queued(&self.file, opener, &options)?
            }
        };
        let about = || {
            info(&self.file, opener, format, false)
                .ok()
                .and_then(|info| info.qcow2)
                .map_or_else(String::new, |qcow2| describe::specific_text(&qcow2))
        };
        let all_done = self.converse(&image, &about).context("cannot talk")?;
        if self.read_only {
            drop(image);
        } else {
            close(image, &self.file)?;
        }
        Ok(u8::from(!all_done))
    }

    /// Runs all commands; whether all succeeded.
    fn converse(
        &self,
        image: &Arc<dyn Image>,
        about: &dyn Fn() -> String,
    ) -> std::io::Result<bool> {
        let mut out = std::io::stdout().lock();
        let mut errors = std::io::stderr();
        let mut session = Session::new(&**image, &mut out, &mut errors, about);
        let mut all_done = true;
        for command in &self.commands {
            if session.is_done() {
                break;
            }
            all_done &= session.run(command)?;
        }
        if !self.commands.is_empty() {
            return Ok(all_done);
        }
        let mut input = std::io::stdin().lock();
        let prompts = std::io::stdin().is_terminal();
        while !session.is_done() {
            if prompts {
                write!(std::io::stderr(), "io> ")?;
            }
            let mut line = String::new();
            if std::io::Read::take(&mut input, LINE).read_line(&mut line)? == 0 {
                break;
            }
            all_done &= session.run(&line)?;
        }
        Ok(all_done)
    }
}
