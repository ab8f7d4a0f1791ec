//! `vireo migrate-status`, `migrate-cancel`, `migrate-set` and `migrate-resolve`.

use std::num::NonZero;

use api::ErrorKind;
use api::client::ClientError;
use api::wire::{MigrationDirection, MigrationInfo, MigrationResolution, VmMigrationSet};
use clap::Args;
use indicatif::HumanBytes;

use super::super::Misuse;
use super::super::table::facts;
use super::super::target::{Remote, Target};
use super::lifecycle::PlainArgs;
use super::migrate::Late;
use super::show::ShowArgs;
use super::{print, print_json, size, word};
use crate::config::flag::{ValueError, parse_bytes, parse_number, parse_switch};

pub(super) const STATUS_EXAMPLES: &str = "\
Examples:
  vireo migrate-status web
  vireo migrate-status web --json | jq .remaining";
pub(super) const CANCEL_EXAMPLES: &str = "\
Examples:
  vireo migrate-cancel web";
pub(super) const SET_EXAMPLES: &str = "\
Examples:
  vireo migrate-set web --bandwidth 100M --max-downtime 500ms
  vireo migrate-set web --bandwidth 0
      No limit.";
pub(super) const RESOLVE_EXAMPLES: &str = "\
Examples:
  vireo migrate-resolve web --abandon
      It runs at the destination.
  vireo migrate-resolve web --resume
      The destination is off for good: it never runs there.";

#[derive(Debug, Args)]
#[group(
    id = "what",
    required = true,
    multiple = true,
    args = ["bandwidth", "max_downtime", "timeout", "timeout_strategy", "throttle", "postcopy"]
)]
pub(in crate::cli) struct SetArgs {
    #[command(flatten)]
    target: Target,
    /// The most bytes in a second, with K, M, G or T; 0: no limit
    #[arg(long, value_name = "SIZE", value_parser = bytes, allow_negative_numbers = true)]
    bandwidth: Option<u64>,
    /// The longest pause of the guest, with ms or s
    #[arg(long, value_name = "TIME", value_parser = nonzero_millis, allow_negative_numbers = true)]
    max_downtime: Option<NonZero<u64>>,
    /// The longest time in all, with s, m or h
    #[arg(long, value_name = "TIME", value_parser = nonzero_seconds, allow_negative_numbers = true)]
    timeout: Option<NonZero<u64>>,
    /// What becomes of one that takes longer: it ends, or switches however long the pause
    #[arg(long, value_name = "WHAT")]
    timeout_strategy: Option<Late>,
    /// Slow the guest where it writes faster than its memory can be sent: on, off
    #[arg(long, value_name = "SWITCH", value_parser = parse_switch)]
    throttle: Option<bool>,
    /// Let the guest go before the rest of its memory, where it was begun with --postcopy
    #[arg(long)]
    postcopy: bool,
}

impl SetArgs {
    fn request(&self) -> VmMigrationSet {
        VmMigrationSet {
            bandwidth: self.bandwidth,
            downtime_ms: self.max_downtime,
            timeout_s: self.timeout,
            timeout_strategy: self.timeout_strategy.map(Into::into),
            throttle: self.throttle,
            postcopy: self.postcopy,
        }
    }
}

#[derive(Debug, Args)]
#[group(id = "what", required = true, multiple = false, args = ["resume", "abandon"])]
pub(in crate::cli) struct ResolveArgs {
    #[command(flatten)]
    target: Target,
    /// Let the guest go on here: it neither runs at the destination nor ever will
    #[arg(long)]
    resume: bool,
    /// End the guest here: it runs at the destination, or is not wanted
    #[arg(long)]
    abandon: bool,
}

fn nonzero_millis(text: &str) -> Result<NonZero<u64>, String> {
    nonzero(millis(text)?)
}

fn nonzero_seconds(text: &str) -> Result<NonZero<u64>, String> {
    nonzero(seconds(text)?)
}

/// A number of bytes, with K, M, G or T.
pub(super) fn bytes(text: &str) -> Result<u64, String> {
    parse_bytes(text).map_err(|error| error.to_string())
}

/// What is none of what it could be.
pub(in crate::cli) fn nonzero(number: u64) -> Result<NonZero<u64>, String> {
    NonZero::new(number).ok_or_else(|| "it is to be more than 0".to_owned())
}

/// A time, in milliseconds.
pub(super) fn millis(text: &str) -> Result<u64, String> {
    let end = text.find(|c: char| !c.is_ascii_digit());
    let (digits, unit) = text.split_at(end.unwrap_or(text.len()));
    let each = match unit {
        "ms" => 1,
        "s" => 1000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => return Err("give a time with its unit, as in 300ms, 240s, 5m or 1h".to_owned()),
    };
    let number = parse_number(digits).map_err(|error| error.to_string())?;
    let too_long = || ValueError::NumberOverflow.to_string();
    number.checked_mul(each).ok_or_else(too_long)
}

/// A time, in whole seconds.
pub(in crate::cli) fn seconds(text: &str) -> Result<u64, String> {
    match millis(text)? {
        whole if whole.is_multiple_of(1000) => Ok(whole / 1000),
        _ => Err("give whole seconds".to_owned()),
    }
}

/// A time in microseconds, for people.
pub(super) fn time(micros: u64) -> String {
    let tenths =
        |number: u64, unit: u64| format!("{}.{}", number / unit, number % unit * 10 / unit);
    let seconds = micros / 1_000_000;
    match seconds {
        0 => format!("{} ms", tenths(micros, 1000)),
        1..=119 => format!("{} s", tenths(micros, 1_000_000)),
        _ => format!("{} min {} s", seconds / 60, seconds % 60),
    }
}

pub(super) fn status(arguments: &ShowArgs) -> anyhow::Result<()> {
    let mut remote = arguments.target.connect()?;
    let info = remote.client.migration();
    let info = info.map_err(|error| remote.failed(error))?;
    if arguments.json {
        return print_json(&info);
    }
    print(&facts(&told(&info)))
}

pub(super) fn cancel(arguments: &PlainArgs) -> anyhow::Result<()> {
    let mut remote = arguments.target().connect()?;
    let cancelled = remote.client.cancel_migration();
    cancelled.map_err(|error| remote.failed(error))
}

pub(super) fn set(arguments: &SetArgs) -> anyhow::Result<()> {
    let mut remote = arguments.target.connect()?;
    let set = remote.client.set_migration(&arguments.request());
    set.map_err(|error| refused(&remote, error))
}

/// Why the monitor has refused a request of these verbs: what makes no sense is misuse, as what the parser finds.
pub(super) fn refused(remote: &Remote, error: ClientError) -> anyhow::Error {
    if error.kind() == Some(ErrorKind::Invalid) {
        return Misuse(format!("{}: {error}", remote.who)).into();
    }
    remote.failed(error)
}

pub(super) fn resolve(arguments: &ResolveArgs) -> anyhow::Result<()> {
    let mut remote = arguments.target.connect()?;
    let resolved = remote.client.resolve_migration(if arguments.resume {
        MigrationResolution::Resume
    } else {
        MigrationResolution::Abandon
    });
    resolved.map_err(|error| remote.failed(error))
}

/// What the source alone knows.
fn told_of_source(info: &MigrationInfo) -> [(&'static str, String); 6] {
    let limit = info.bandwidth;
    let limit = limit.map(|limit| format!("{}/s", HumanBytes(limit)));
    [
        ("Rounds", info.rounds.to_string()),
        ("Rate", format!("{}/s", HumanBytes(info.rate))),
        ("Guest writes", format!("{}/s", HumanBytes(info.dirty_rate))),
        ("Guest slowed by", format!("{}%", info.throttle)),
        ("Limit", limit.unwrap_or_else(|| "none".to_owned())),
        ("Longest pause", format!("{} ms", info.downtime_ms)),
    ]
}

/// What people hear of one.
fn told(info: &MigrationInfo) -> Vec<(&'static str, String)> {
    let sent = info.memory.saturating_sub(info.remaining);
    let percent = u128::from(sent).saturating_mul(100);
    let percent = percent.checked_div(info.memory.into()).unwrap_or(0);
    let mut told = vec![
        ("Job", info.job.clone()),
        ("Direction", word(&info.direction)),
        ("Peer", info.peer.clone()),
        ("Phase", word(&info.phase).replace('_', " ")),
    ];
    told.extend(info.error.clone().map(|error| ("Error", error)));
    told.extend([
        ("Memory", size(info.memory)),
        (
            "Left",
            format!("{} ({percent}% is there)", HumanBytes(info.remaining)),
        ),
        (
            "Pages",
            format!(
                "{}, {} of zeros, {} as differences; {} that the guest does not use",
                info.pages, info.zero_pages, info.delta_pages, info.free_pages
            ),
        ),
        ("Sent", HumanBytes(info.bytes).to_string()),
    ]);
    if info.direction == MigrationDirection::Outgoing {
        told.extend(told_of_source(info));
    }
    let pauses = [
        ("Expected pause", info.expected_downtime_us),
        ("Pause", info.downtime_us),
    ];
    told.extend(
        pauses
            .into_iter()
            .filter_map(|(name, pause)| Some((name, time(pause?)))),
    );
    told.push(("Time", time(info.elapsed_us)));
    told
}

#[cfg(test)]
mod tests {
    use api::wire::{MigrationPhase, MigrationTimeoutStrategy};
    use clap::Parser;

    use super::*;

    #[test]
    fn times_have_units() {
        for (text, wanted) in [
            ("300ms", Ok(300)),
            ("2s", Ok(2000)),
            ("5m", Ok(300_000)),
            ("1h", Ok(3_600_000)),
            ("0ms", Ok(0)),
            ("300", Err("unit")),
            ("", Err("unit")),
            ("ms", Err("")),
            ("-1s", Err("unit")),
            ("1.5s", Err("unit")),
            ("1d", Err("unit")),
            ("99999999999999999999s", Err("")),
            ("18446744073709551615h", Err("")),
        ] {
            match (millis(text), wanted) {
                (Ok(found), Ok(wanted)) => assert_eq!(found, wanted, "{text}"),
                (Err(told), Err(part)) => assert!(told.contains(part), "{text}: {told}"),
                (found, _) => panic!("{text}: {found:?}"),
            }
        }
        assert_eq!(seconds("2000ms"), Ok(2));
        assert!(seconds("1500ms").is_err());
        assert!(nonzero(0).is_err());
    }

    #[test]
    fn times_are_told_as_exactly_as_people_want_to_know() {
        for (micros, text) in [
            (0, "0.0 ms"),
            (12_345, "12.3 ms"),
            (999_999, "999.9 ms"),
            (1_000_000, "1.0 s"),
            (3_210_000, "3.2 s"),
            (125_000_000, "2 min 5 s"),
        ] {
            assert_eq!(time(micros), text);
        }
        assert!(time(u64::MAX).ends_with(" s"));
    }

    #[derive(Debug, Parser)]
    struct Set {
        #[command(flatten)]
        arguments: SetArgs,
    }

    #[derive(Debug, Parser)]
    struct Resolve {
        #[command(flatten)]
        arguments: ResolveArgs,
    }

    #[test]
    fn what_is_not_given_stays_as_it_is() {
        let set = |words: &[&str]| {
            let line = [&["migrate-set", "web"], words].concat();
            Set::try_parse_from(line).map(|set| set.arguments.request())
        };
        assert_eq!(
            set(&["--bandwidth", "0"]).unwrap(),
            VmMigrationSet {
                bandwidth: Some(0),
                ..VmMigrationSet::default()
            }
        );
        let all = set(&[
            "--bandwidth",
            "1M",
            "--max-downtime",
            "1s",
            "--timeout",
            "1m",
            "--timeout-strategy",
            "ignore",
            "--throttle",
            "off",
            "--postcopy",
        ]);
        assert_eq!(
            all.unwrap(),
            VmMigrationSet {
                bandwidth: Some(1 << 20),
                downtime_ms: NonZero::new(1000),
                timeout_s: NonZero::new(60),
                timeout_strategy: Some(MigrationTimeoutStrategy::Ignore),
                throttle: Some(false),
                postcopy: true,
            }
        );
        for wrong in [
            &[][..],
            &["--timeout", "0s"],
            &["--throttle", "maybe"],
            &["--bandwidth", "-1"],
        ] {
            set(wrong).unwrap_err();
        }
    }

    #[test]
    fn one_of_two_things_has_become_of_a_guest() {
        let resolve = |words: &[&str]| {
            let line = [&["migrate-resolve", "web"], words].concat();
            Resolve::try_parse_from(line).map(|resolve| resolve.arguments.resume)
        };
        assert!(resolve(&["--resume"]).unwrap());
        assert!(!resolve(&["--abandon"]).unwrap());
        resolve(&[]).unwrap_err();
        resolve(&["--resume", "--abandon"]).unwrap_err();
    }

    #[test]
    fn a_migration_is_told_with_what_is_known_of_it() {
        let mut info = MigrationInfo {
            job: "migration-1".to_owned(),
            direction: MigrationDirection::Outgoing,
            peer: "unix:/s".to_owned(),
            phase: MigrationPhase::InDoubt,
            memory: 1 << 30,
            remaining: 1 << 28,
            ..MigrationInfo::default()
        };
        let value = |info: &MigrationInfo, name: &str| {
            let told = told(info);
            let found = told.into_iter().find(|(known, _)| *known == name);
            found.map(|(_, value)| value)
        };
        assert_eq!(value(&info, "Phase").as_deref(), Some("in doubt"));
        let left = value(&info, "Left");
        assert_eq!(left.as_deref(), Some("256.00 MiB (75% is there)"));
        assert_eq!(value(&info, "Limit").as_deref(), Some("none"));
        assert_eq!((value(&info, "Error"), value(&info, "Pause")), (None, None));
        info.error = Some("why".to_owned());
        info.downtime_us = Some(1500);
        assert_eq!(value(&info, "Error").as_deref(), Some("why"));
        assert_eq!(value(&info, "Pause").as_deref(), Some("1.5 ms"));
        info.direction = MigrationDirection::Incoming;
        assert_eq!(value(&info, "Limit"), None);
        // Nothing is known yet.
        assert!(!told(&MigrationInfo::default()).is_empty());
    }
}
