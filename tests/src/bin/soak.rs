//! Soaks the monitor for hours: `soak HOURS`; `make soak H=8`.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use tests::places;
use tests::soak::{Settings, run};

fn main() -> ExitCode {
    let hours = std::env::args().nth(1).and_then(|hours| hours.parse().ok());
    let Some(hours) = hours.filter(|hours: &f64| (0.0..10_000.0).contains(hours)) else {
        eprintln!("usage: soak HOURS, as a number such as 0.5");
        return ExitCode::from(2);
    };
    let vireo = std::env::var_os("VIREO")
        .map_or_else(|| places::target().join("release/vireo"), PathBuf::from);
    let settings = Settings {
        vireo,
        guests: places::target().join("guests"),
        time: Duration::from_secs_f64(hours * 3600.0),
    };
    match run(&settings) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("soak: {error:#}");
            ExitCode::FAILURE
        }
    }
}
