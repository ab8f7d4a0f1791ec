//! `vireo rng`.

use api::wire::{RateLimiterConfig, VmUpdateRng};
use clap::{Args, Subcommand};
use serde_json::Value;
use virtio::limit::{self, RateLimits};
use virtio::schema::{Field, FieldKind};

use super::super::Misuse;
use super::super::target::SocketFlag;
use crate::config::flag::{self, FlagError, FlagTable};
use crate::config::wire::rate_limiter;

pub(super) const EXAMPLES: &str = "\
Examples:
  vireo rng update web _rng0 bw_size=64K,bw_refill_time=1000
  vireo rng update web _rng0 limits=off";
const UPDATE_EXAMPLES: &str = "\
Examples:
  vireo rng update web _rng0 bw_size=64K,bw_refill_time=1000
      At most 64 KiB in a second.
  vireo rng update web _rng0 limits=off";

const FLAG: &str = "rng update";
const LIMITS: &str = "limits";

/// The keys of `vireo rng update`.
const UPDATE_FIELDS: &[Field] = &[
    Field {
        name: LIMITS,
        kind: FieldKind::Choice(&["off"]),
        required: false,
        help: "lifts the limits",
    },
    limit::FIELDS[0],
    limit::FIELDS[1],
    limit::FIELDS[2],
    limit::FIELDS[3],
    limit::FIELDS[4],
    limit::FIELDS[5],
];

#[derive(Debug, Subcommand)]
pub(in crate::cli) enum Verb {
    /// Change the limits of a source of random numbers
    #[command(after_help = UPDATE_EXAMPLES)]
    Update(UpdateArgs),
}

#[derive(Debug, Args)]
pub(in crate::cli) struct UpdateArgs {
    /// Name of the machine, id of the source ('vireo devices' tells), and the limits
    #[arg(value_names = ["NAME", "RNG", "key=value,…"], num_args = 2..=3, required = true)]
    words: Vec<String>,
    #[command(flatten)]
    socket: SocketFlag,
}

pub(super) fn run(verb: Verb) -> anyhow::Result<()> {
    let Verb::Update(UpdateArgs { words, socket }) = verb;
    let (mut remote, [id, text]) = socket.connect_and_split(words, ["RNG", "key=value,…"])?;
    let rate_limiter_config = limits(&text)?;
    let updated = remote.client.update_rng(&VmUpdateRng {
        id,
        rate_limiter_config,
    });
    updated.map_err(|error| remote.failed(error))
}

/// The limits in the text of `vireo rng update`.
fn limits(text: &str) -> Result<RateLimiterConfig, Misuse> {
    let table = FlagTable {
        flag: FLAG,
        fields: UPDATE_FIELDS,
        shorthand: None,
    };
    let misuse = |error: FlagError| Misuse(crate::error::chain(&error));
    let keys = flag::parse(&table, text).map_err(misuse)?;
    let limits = RateLimits::from_keys(limit::KEYS, |key| keys.get(key).and_then(Value::as_u64));
    let limits = limits.map_err(|error| misuse(FlagError::of_limits(FLAG, error)))?;
    match (keys.contains_key(LIMITS), rate_limiter(limits)) {
        (false, Some(limits)) => Ok(limits),
        (true, None) => Ok(RateLimiterConfig::default()),
        (true, Some(_)) => Err(Misuse(format!(
            "{FLAG}: limits=off and other limits: give either"
        ))),
        (false, None) => Err(Misuse(format!(
            "{FLAG}: nothing is to change: give key=value"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_given_by_their_keys_or_lifted() {
        let bandwidth = limits("bw_size=64K,bw_refill_time=1000").unwrap().bandwidth;
        let bucket = bandwidth.unwrap();
        assert_eq!((bucket.size, bucket.refill_time), (64 << 10, 1000));
        assert_eq!(limits("limits=off").unwrap(), RateLimiterConfig::default());
        for (wrong, part) in [
            ("", "nothing is to change"),
            ("bw_size=1", "bw_refill_time"),
            ("limits=off,ops_size=1,ops_refill_time=1", "give either"),
            ("src=/dev/null", "src"),
        ] {
            let told = limits(wrong).unwrap_err().0;
            assert!(told.contains(part), "{wrong}: {told}");
        }
    }
}
