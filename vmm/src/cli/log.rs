//! The log, on standard error.

use std::io::{self, IsTerminal};

use anyhow::Context;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::EnvFilter;

/// The variable that gives a level or a filter where `-v` does not.
const VARIABLE: &str = "VIREO_LOG";

/// Starts the log; warnings and errors only unless asked for more.
///
/// A filter costs time to build, so there is none in the ordinary case.
pub(super) fn start(verbosity: u8) -> anyhow::Result<()> {
    let builder = tracing_subscriber::fmt()
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal())
        .compact();
    let level = match verbosity {
        0 => LevelFilter::WARN,
        1 => LevelFilter::INFO,
        2 => LevelFilter::DEBUG,
        _ => LevelFilter::TRACE,
    };
    let filter = std::env::var_os(VARIABLE).filter(|text| verbosity == 0 && !text.is_empty());
    let Some(filter) = filter else {
        builder.with_max_level(level).init();
        return Ok(());
    };
    let filter = filter
        .to_str()
        .context("it is not UTF-8")
        .and_then(|text| EnvFilter::try_new(text).map_err(anyhow::Error::from))
        .with_context(|| {
            format!("{VARIABLE}: give error, warn, info, debug, trace, or a filter such as warn,vmm=debug")
        })?;
    builder.with_env_filter(filter).init();
    Ok(())
}
