//! The log, on standard error or in a file.

use std::io::{self, IsTerminal};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Arc;

use anyhow::Context;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::Layer;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::fmt::writer::BoxMakeWriter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use super::Misuse;
use crate::notice;
use crate::opener::Opener;
use crate::sandbox;

/// The variable that gives a level or a filter where `-v` does not.
const VARIABLE: &str = "VIREO_LOG";

/// Starts the log; warnings and errors only unless asked for more. What a full disk or a reader
/// does not take at once is lost, and nobody hears of it.
///
/// # Errors
///
/// [`Misuse`] for a filter that is none, and why the file cannot be written.
pub(super) fn start(verbosity: u8, file: Option<&Path>, opener: &Opener) -> anyhow::Result<()> {
    let level = match verbosity {
        0 => LevelFilter::WARN,
        1 => LevelFilter::INFO,
        2 => LevelFilter::DEBUG,
        _ => LevelFilter::TRACE,
    };
    let filter = std::env::var_os(VARIABLE).filter(|text| verbosity == 0 && !text.is_empty());
    let targets = match filter {
        None => Targets::new().with_default(level),
        Some(text) => text
            .to_str()
            .context("it is not UTF-8")
            .and_then(|text| text.parse::<Targets>().map_err(anyhow::Error::from))
            .map_err(|error| {
                Misuse(format!(
                    "{VARIABLE}: give error, warn, info, debug, trace, or a filter such as \
                     warn,vmm=debug: {error:#}"
                ))
            })?,
    };
    let (writer, colours) = match file {
        None => (BoxMakeWriter::new(notice::log), io::stderr().is_terminal()),
        Some(path) => {
            let file = opener.append_output(path).context("--log-file")?;
            let file = Arc::new(file);
            // It lives as long as the log, which is as long as the process.
            sandbox::log_to(file.as_raw_fd());
            (BoxMakeWriter::new(file), false)
        }
    };
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(writer)
        .with_ansi(colours)
        .compact();
    tracing_subscriber::registry()
        .with(lines.with_filter(targets))
        .init();
    Ok(())
}
