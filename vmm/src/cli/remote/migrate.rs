//! `vireo migrate`: gives a machine to another monitor, and shows how far that is.

mod follow;

use std::num::NonZero;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

use api::wire::{
    CopyStorage, MigrationCompression, MigrationInfo, MigrationMemoryMode,
    MigrationTimeoutStrategy, SendMigrationData,
};
use clap::builder::PossibleValuesParser;
use clap::{Args, ValueEnum};
use indicatif::HumanBytes;
use migration::transport::precopy::PRESETS;

use super::super::Misuse;
use super::super::serve::Numbers;
use super::super::target::SocketFlag;
use super::migration::{bytes, millis, nonzero, refused, seconds, time};
use super::watch::Watch;
use super::{print, print_json};
use crate::migrate::link::Place;
use crate::monitor::Inherited;

use self::follow::NotMoved;

pub(super) const EXAMPLES: &str = "\
Examples:
  vireo receive web tcp:0.0.0.0:4444 --tls /etc/vireo/tls
      On the other host, first.
  vireo migrate web tcp:other.example:4444 --tls /etc/vireo/tls
  vireo migrate web unix:/run/web.migration --max-downtime 100ms --detach
      Then: vireo migrate-status web";

#[derive(Debug, Args)]
pub(in crate::cli) struct MigrateArgs {
    /// Name of the machine, and where another monitor waits for it: tcp:HOST:PORT, unix:PATH, exec:COMMAND, or fd:NUMBER, a stream
    /// socket that is connected to it and the verb was started with
    #[arg(value_names = ["NAME", "DEST"], num_args = 1..=2, required = true)]
    words: Vec<String>,
    #[command(flatten)]
    socket: SocketFlag,
    /// Parameters that belong together, of which other flags replace single ones
    #[arg(long, value_name = "NAME", value_parser = preset())]
    preset: Option<String>,
    /// The most bytes in a second, with K, M, G or T; 0: no limit
    #[arg(long, value_name = "SIZE", value_parser = bytes, allow_negative_numbers = true)]
    bandwidth: Option<u64>,
    /// The longest pause of the guest, with ms or s; default 300ms
    #[arg(long, value_name = "TIME", value_parser = nonzero_millis, allow_negative_numbers = true)]
    max_downtime: Option<NonZero<u64>>,
    /// The longest time in all, with s, m or h; default 1h
    #[arg(long, value_name = "TIME", value_parser = nonzero_seconds, allow_negative_numbers = true)]
    timeout: Option<NonZero<u64>>,
    /// What becomes of one that takes longer: it ends, or switches however long the pause; default cancel
    #[arg(long, value_name = "WHAT")]
    timeout_strategy: Option<Late>,
    /// End it after so long without progress, with s, m or h
    #[arg(long, value_name = "TIME", value_parser = nonzero_seconds, allow_negative_numbers = true)]
    stall: Option<NonZero<u64>>,
    /// Over how many connections memory goes, 1 to 64, with tcp: alone; default 1
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=64), allow_negative_numbers = true)]
    streams: Option<u32>,
    /// Compress pages
    #[arg(long, value_name = "HOW")]
    compress: Option<Compress>,
    /// Keep SIZE of pages as they were sent, and send only what has changed of them
    #[arg(long, value_name = "SIZE", value_parser = nonzero_bytes, allow_negative_numbers = true)]
    delta: Option<NonZero<u64>>,
    /// Do not slow a guest that writes faster than its memory can be sent
    #[arg(long)]
    no_throttle: bool,
    /// Do not ask the guest, through its balloon, for pages that it does not use and that need not go
    #[arg(long)]
    no_free_page_hints: bool,
    /// Directory with ca-cert.pem, client-cert.pem and client-key.pem, for TLS
    #[arg(long, value_name = "DIR")]
    tls: Option<PathBuf>,
    /// Send memory over a network in the clear
    #[arg(long)]
    insecure: bool,
    /// Let the guest go before the rest of its memory, where that does not fit into the pause
    #[arg(long)]
    postcopy: bool,
    /// Hand memory over to a monitor of this host instead of copying it
    #[arg(long)]
    local: bool,
    /// Copy disks too: all that they hold, or what their own images hold
    #[arg(long, value_name = "WHAT")]
    copy_storage: Option<Storage>,
    /// Return when it has begun
    #[arg(long)]
    detach: bool,
    /// Print JSON, for programs, and no progress
    #[arg(long)]
    json: bool,
    /// What is at fd:.
    #[arg(skip)]
    connection: Option<OwnedFd>,
}

/// What becomes of a migration that takes too long.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(super) enum Late {
    Cancel,
    Ignore,
}

impl From<Late> for MigrationTimeoutStrategy {
    fn from(late: Late) -> Self {
        match late {
            Late::Cancel => Self::Cancel,
            Late::Ignore => Self::Ignore,
        }
    }
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Compress {
    Zstd,
    Lz4,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Storage {
    All,
    Inc,
}

fn preset() -> PossibleValuesParser {
    PRESETS.map(|(name, _)| name).into()
}

fn nonzero_bytes(text: &str) -> Result<NonZero<u64>, String> {
    nonzero(bytes(text)?)
}

fn nonzero_millis(text: &str) -> Result<NonZero<u64>, String> {
    nonzero(millis(text)?)
}

fn nonzero_seconds(text: &str) -> Result<NonZero<u64>, String> {
    nonzero(seconds(text)?)
}

/// The destination as the monitor, which may be in another directory, finds it.
fn destination(text: &str) -> anyhow::Result<String> {
    let place = Place::parse(text);
    let place = place.map_err(|error| Misuse(format!("DEST {error}")))?;
    Ok(match place {
        Place::Unix(path) => Place::Unix(std::path::absolute(path)?).to_string(),
        place => place.to_string(),
    })
}

impl MigrateArgs {
    /// The descriptor that is named.
    pub(in crate::cli) fn numbers(&self) -> Numbers {
        Numbers::of_place(self.words.last().map(String::as_str))
    }

    /// Gives it the descriptor.
    pub(in crate::cli) fn inherit(&mut self, inherited: Inherited) {
        self.connection = inherited.connection;
    }

    fn request(&self, destination: &str) -> anyhow::Result<SendMigrationData> {
        let tls_dir = self.tls.as_ref().map(std::path::absolute).transpose()?;
        Ok(SendMigrationData {
            destination_url: self::destination(destination)?,
            local: self.local,
            preserve_source: false,
            downtime_ms: self.max_downtime,
            timeout_s: self.timeout,
            timeout_strategy: self.timeout_strategy.map(Into::into),
            connections: self.streams,
            tls_dir,
            memory_mode: if self.postcopy {
                MigrationMemoryMode::Postcopy
            } else {
                MigrationMemoryMode::Precopy
            },
            preset: self.preset.clone(),
            bandwidth: self.bandwidth,
            stall_s: self.stall,
            throttle: self.no_throttle.then_some(false),
            compression: match self.compress {
                None => MigrationCompression::None,
                Some(Compress::Zstd) => MigrationCompression::Zstd,
                Some(Compress::Lz4) => MigrationCompression::Lz4,
            },
            delta_cache: self.delta,
            insecure: self.insecure,
            copy_storage: self.copy_storage.map(|storage| match storage {
                Storage::All => CopyStorage::All,
                Storage::Inc => CopyStorage::Inc,
            }),
            free_page_hints: self.no_free_page_hints.then_some(false),
        })
    }
}

pub(super) fn migrate(arguments: MigrateArgs) -> anyhow::Result<()> {
    let json = arguments.json;
    begin(arguments).inspect_err(|error| {
        if json && !error.is::<Misuse>() {
            // What cannot be written is told all the same, on the other way.
            let _unwritten = tell_failure(error);
        }
    })
}

/// The reason as programs read it.
fn tell_failure(error: &anyhow::Error) -> anyhow::Result<()> {
    let why = format!("{error:#}");
    let Some(NotMoved { info, .. }) = error.downcast_ref() else {
        return print_json(&serde_json::json!({ "error": why }));
    };
    print_json(&MigrationInfo {
        error: info.error.clone().or(Some(why)),
        ..*info.clone()
    })
}

fn begin(mut arguments: MigrateArgs) -> anyhow::Result<()> {
    let words = std::mem::take(&mut arguments.words);
    let (mut remote, [destination]) = arguments.socket.connect_and_split(words, ["DEST"])?;
    let request = arguments.request(&destination)?;
    // Before it begins: what becomes of it is not missed.
    let mut watch = Watch::of(&remote).map_err(|error| remote.failed(error))?;
    let begun = match arguments.connection.take() {
        Some(connection) => remote
            .client
            .send_migration_over(&request, connection.as_fd()),
        None => remote.client.send_migration(&request),
    };
    begun.map_err(|error| refused(&remote, error))?;
    if arguments.detach {
        if arguments.json {
            let info = remote.client.migration();
            return print_json(&info.map_err(|error| remote.failed(error))?);
        }
        let text = format!(
            "it has begun: 'vireo migrate-status {}' tells how far it is\n",
            remote.named()
        );
        return print(&text);
    }
    let info = follow::follow(&mut remote, &mut watch, arguments.json)?;
    if arguments.json {
        return print_json(&info);
    }
    print(&format!("{} {}\n", remote.who, report(&info)))
}

/// What people hear of one that has come to its end.
fn report(info: &MigrationInfo) -> String {
    let mut text = format!("runs at {}", info.peer);
    text.push_str(&format!(
        ": {} of memory, {} sent in {} {} and {}; {} pages, {} of zeros",
        HumanBytes(info.memory),
        HumanBytes(info.bytes),
        info.rounds,
        if info.rounds == 1 { "round" } else { "rounds" },
        time(info.elapsed_us),
        info.pages,
        info.zero_pages,
    ));
    if info.delta_pages > 0 {
        text.push_str(&format!(", {} as differences", info.delta_pages));
    }
    if info.free_pages > 0 {
        text.push_str(&format!(
            ", {} left out that the guest does not use",
            info.free_pages
        ));
    }
    match info.downtime_us {
        Some(pause) => text.push_str(&format!("; the guest stood for {}", time(pause))),
        None => text.push_str("; how long the guest stood was not heard"),
    }
    text
}

#[cfg(test)]
mod tests {
    use api::wire::MigrationPhase;
    use clap::{Parser, error::ErrorKind};

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        arguments: MigrateArgs,
    }

    fn request(words: &[&str]) -> SendMigrationData {
        let line = [&["migrate", "web", "unix:/s"], words].concat();
        let line = Line::try_parse_from(line).unwrap();
        line.arguments.request("unix:/s").unwrap()
    }

    #[test]
    fn flags_become_fields_and_what_is_not_given_is_left_to_the_monitor() {
        let plain = serde_json::to_value(request(&[])).unwrap();
        assert_eq!(
            plain,
            serde_json::json!({
                "destination_url": "unix:/s", "memory_mode": "Precopy", "compression": "none",
            })
        );
        let full = request(&[
            "--preset",
            "datacentre",
            "--bandwidth",
            "52M",
            "--max-downtime",
            "1s",
            "--timeout",
            "1h",
            "--timeout-strategy",
            "ignore",
            "--stall",
            "240s",
            "--streams",
            "64",
            "--compress",
            "lz4",
            "--delta",
            "64M",
            "--no-throttle",
            "--tls",
            "/tls",
            "--insecure",
            "--postcopy",
            "--local",
            "--copy-storage",
            "inc",
            "--no-free-page-hints",
        ]);
        assert_eq!(
            serde_json::to_value(full).unwrap(),
            serde_json::json!({
                "destination_url": "unix:/s", "local": true, "downtime_ms": 1000, "timeout_s": 3600,
                "timeout_strategy": "Ignore", "connections": 64, "tls_dir": "/tls",
                "memory_mode": "Postcopy", "preset": "datacentre", "bandwidth": 52 << 20,
                "stall_s": 240, "throttle": false, "compression": "lz4", "delta_cache": 64 << 20,
                "insecure": true, "copy_storage": "inc", "free_page_hints": false,
            })
        );
    }

    #[test]
    fn values_that_make_no_sense_are_refused() {
        for words in [
            ["--streams", "0"],
            ["--streams", "65"],
            ["--preset", "slow"],
            ["--bandwidth", "-1"],
            ["--max-downtime", "0ms"],
            ["--max-downtime", "300"],
            ["--timeout", "1500ms"],
            ["--timeout-strategy", "wait"],
            ["--compress", "gzip"],
            ["--copy-storage", "some"],
        ] {
            let line = [&["migrate", "web", "unix:/s"], &words[..]].concat();
            let error = Line::try_parse_from(line).unwrap_err();
            let expected = [ErrorKind::ValueValidation, ErrorKind::InvalidValue];
            assert!(expected.contains(&error.kind()), "{words:?}: {error}");
        }
    }

    #[test]
    fn a_destination_means_the_same_in_every_directory() {
        let here = std::env::current_dir().unwrap();
        for (text, wanted) in [
            ("tcp:h:1", "tcp:h:1".to_owned()),
            ("unix:/s", "unix:/s".to_owned()),
            ("unix:s", format!("unix:{}/s", here.display())),
            ("exec:ssh h 'a b'", "exec:ssh h 'a b'".to_owned()),
        ] {
            assert_eq!(destination(text).unwrap(), wanted);
        }
        for wrong in ["", "h:1", "/s", "tcp:h", "http://h:1"] {
            let told = destination(wrong).unwrap_err();
            assert!(told.is::<Misuse>(), "{told}");
        }
    }

    #[test]
    fn the_end_is_told_with_what_it_has_cost() {
        let info = MigrationInfo {
            peer: "unix:/s".to_owned(),
            phase: MigrationPhase::Completed,
            memory: 512 << 20,
            bytes: 3 << 19,
            rounds: 4,
            pages: 131_072,
            zero_pages: 9,
            elapsed_us: 3_210_000,
            downtime_us: Some(12_345),
            ..MigrationInfo::default()
        };
        assert_eq!(
            report(&info),
            "runs at unix:/s: 512.00 MiB of memory, 1.50 MiB sent in 4 rounds and 3.2 s; 131072 pages, 9 of zeros; \
             the guest stood for 12.3 ms"
        );
        let unheard = MigrationInfo {
            downtime_us: None,
            delta_pages: 5,
            free_pages: 7,
            rounds: 1,
            ..info
        };
        let told = report(&unheard);
        assert!(told.contains("in 1 round and"), "{told}");
        assert!(
            told.ends_with(
                "of zeros, 5 as differences, 7 left out that the guest does not use; how long the guest stood was not heard"
            ),
            "{told}"
        );
    }
}
