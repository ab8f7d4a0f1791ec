//! `vireo screenshot`.

use std::path::Path;

use anyhow::Context;
use clap::Args;

use super::super::target::SocketFlag;
use super::print;
use crate::opener::Opener;

pub(super) const EXAMPLES: &str = "\
Examples:
  vireo screenshot web web.png
  vireo screenshot web - | display
  vireo screenshot --api-socket /tmp/vm.sock web.png";

/// Standard output.
const STDOUT: &str = "-";

#[derive(Debug, Args)]
pub(in crate::cli) struct ScreenshotArgs {
    /// Name of the machine, and the PNG file to write, or '-'; a file that is there is replaced
    #[arg(value_names = ["NAME", "FILE"], num_args = 1..=2, required = true)]
    words: Vec<String>,
    #[command(flatten)]
    socket: SocketFlag,
}

pub(super) fn screenshot(arguments: ScreenshotArgs, opener: &Opener) -> anyhow::Result<()> {
    let (mut remote, [file]) = arguments
        .socket
        .connect_and_split(arguments.words, ["FILE"])?;
    let picture = remote.client.screenshot();
    let picture = picture.map_err(|error| remote.failed(error))?;
    if file == STDOUT {
        return super::super::print(&picture);
    }
    opener
        .replace_file(Path::new(&file), &picture)
        .with_context(|| format!("FILE {file}"))?;
    print(&format!("{file} is written\n"))
}
