//! The log, on standard error.

use std::io::{self, IsTerminal};

use anyhow::Context;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::Layer;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

/// The variable that gives a level or a filter where `-v` does not.
const VARIABLE: &str = "VIREO_LOG";

/// Starts the log; warnings and errors only unless asked for more.
pub(super) fn start(verbosity: u8) -> anyhow::Result<()> {
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
            .with_context(|| {
                format!(
                    "{VARIABLE}: give error, warn, info, debug, trace, or a filter such as \
                     warn,vmm=debug"
                )
            })?,
    };
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal())
        .compact();
    tracing_subscriber::registry()
        .with(lines.with_filter(targets))
        .init();
    Ok(())
}
