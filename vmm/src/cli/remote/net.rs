//! `vireo net`.

use anyhow::Context;
use api::wire::{
    self, DeviceState, LinkState, NetMirror, NetMirrorFile, RateLimiterConfig, VmUpdateNet,
};
use clap::{Args, Subcommand};
use serde::Serialize;
use serde_json::{Map, Value};
use virtio::limit::{self, RateLimits};
use virtio::models::MODELS;
use virtio::models::net::{MODEL, RX_KEYS, TX_KEYS};
use virtio::schema::{Field, FieldKind};

use super::super::Misuse;
use super::super::table::table;
use super::super::target::{Remote, SocketFlag};
use super::device::{self, Noun};
use super::show::ShowArgs;
use super::{print, print_json, removal, word};
use crate::config::DeviceConfig;
use crate::config::file::make_device_paths_absolute;
use crate::config::flag::{self, FlagError, FlagTable};
use crate::config::wire::rate_limiter;

pub(super) const EXAMPLES: &str = "\
Examples:
  vireo net list web
  vireo net add web tap=vmtap0,id=lan
  vireo net update web lan link=down
  vireo net remove web lan";
const LIST_EXAMPLES: &str = "\
Examples:
  vireo net list web
  vireo net list web --json | jq -r '.[].mac'";
const REMOVE_EXAMPLES: &str = "\
Examples:
  vireo net remove web lan
  vireo net remove web lan --timeout 0
      Ask the guest for it, and do not wait.";
const ADD_EXAMPLES: &str = "\
Examples:
  vireo net add web tap=vmtap0
  vireo net add web ip=10.0.0.1,mask=255.255.255.0,id=lan
      The keys are those of 'vireo run --net', and of all devices: id= and addr=.";
const UPDATE_EXAMPLES: &str = "\
Examples:
  vireo net update web lan link=down
  vireo net update web lan bw_size=100M,bw_refill_time=1000
      At most 100 MiB in a second, in each direction.
  vireo net update web lan tx_ops_size=1000,tx_ops_refill_time=100
      At most 10,000 frames in a second from the guest.
  vireo net update web lan limits=off
  vireo net update web lan mirror_file=lan.pcap,mirror_size=64M
      Copies of all frames to a capture file; mirror=off ends it.";

const NOUN: Noun = Noun {
    full: "network card",
    short: "card",
};
const LIMITS: &str = "limits";
const MIRROR: &str = "mirror";
const MIRROR_TAP: &str = "mirror_tap";
const MIRROR_FILE: &str = "mirror_file";
const MIRROR_SIZE: &str = "mirror_size";
const LINK: &str = "link";

#[derive(Debug, Subcommand)]
pub(in crate::cli) enum Verb {
    /// List the network cards of a machine
    #[command(after_help = LIST_EXAMPLES)]
    List(ShowArgs),
    /// Add a network card
    #[command(after_help = ADD_EXAMPLES, visible_alias = "attach")]
    Add(AddArgs),
    /// Have the guest give a network card up, and wait until it has
    #[command(after_help = REMOVE_EXAMPLES, visible_alias = "detach")]
    Remove(RemoveArgs),
    /// Change the link, the limits or the mirror of a network card
    #[command(after_help = UPDATE_EXAMPLES)]
    Update(UpdateArgs),
}

#[derive(Debug, Args)]
pub(in crate::cli) struct AddArgs {
    /// Name of the machine, and what 'vireo run --net' takes
    #[arg(value_names = ["NAME", "key=value,…"], num_args = 1..=2, required = true)]
    words: Vec<String>,
    #[command(flatten)]
    socket: SocketFlag,
    /// Print JSON, for programs
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
pub(in crate::cli) struct RemoveArgs {
    /// Name of the machine, and id of the card
    #[arg(value_names = ["NAME", "CARD"], num_args = 1..=2, required = true)]
    words: Vec<String>,
    #[command(flatten)]
    socket: SocketFlag,
    /// Seconds that the guest has to give it up; 0: do not wait
    #[arg(long, value_name = "SECONDS", default_value_t = removal::TIMEOUT, allow_negative_numbers = true)]
    timeout: u64,
}

#[derive(Debug, Args)]
pub(in crate::cli) struct UpdateArgs {
    /// Name of the machine, id of the card, and what is to be different
    #[arg(value_names = ["NAME", "CARD", "key=value,…"], num_args = 2..=3, required = true)]
    words: Vec<String>,
    #[command(flatten)]
    socket: SocketFlag,
}

pub(super) fn run(verb: Verb) -> anyhow::Result<()> {
    match verb {
        Verb::List(arguments) => list(&arguments),
        Verb::Add(arguments) => add(arguments),
        Verb::Remove(arguments) => remove(arguments),
        Verb::Update(arguments) => update(arguments),
    }
}

/// A line of `vireo net list`.
#[derive(Debug, Serialize)]
struct Row {
    id: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    bdf: Option<String>,
    state: DeviceState,
    #[serde(skip_serializing_if = "Option::is_none")]
    mac: Option<String>,
    pairs: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    tap: Option<String>,
    /// The socket of what is behind it instead of a tap.
    #[serde(skip_serializing_if = "Option::is_none")]
    socket: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    link: Option<LinkState>,
}

/// The cards of the description, with what the machine says of them.
fn cards(remote: &mut Remote) -> anyhow::Result<Vec<Row>> {
    let (config, devices) = device::described(remote)?;
    Ok(rows(config.net.unwrap_or_default(), &devices))
}

fn rows(nets: Vec<wire::NetConfig>, devices: &[wire::DeviceInfo]) -> Vec<Row> {
    let row = |net: wire::NetConfig| {
        let id = net.id.unwrap_or_default();
        let device = devices.iter().find(|device| device.id == id);
        Row {
            bdf: device.and_then(|device| device.bdf.clone()),
            state: device.map_or(DeviceState::Configured, |device| device.state),
            mac: net.mac,
            pairs: net.num_queues / 2,
            link: device.and_then(|device| device.link),
            tap: net.tap,
            socket: net.socket.or(net.vhost_socket),
            id,
        }
    };
    nets.into_iter().map(row).collect()
}

fn list(arguments: &ShowArgs) -> anyhow::Result<()> {
    let mut remote = arguments.target.connect()?;
    let rows = cards(&mut remote)?;
    if arguments.json {
        return print_json(&rows);
    }
    let or_dash = |text: &Option<String>| text.clone().unwrap_or_else(|| "-".to_owned());
    let cells = |row: &Row| {
        vec![
            row.id.clone(),
            or_dash(&row.bdf),
            word(&row.state),
            or_dash(&row.mac),
            row.pairs.to_string(),
            row.link.map_or_else(|| "-".to_owned(), |link| word(&link)),
            or_dash(row.tap.as_ref().map_or(&row.socket, |_| &row.tap)),
        ]
    };
    let rows: Vec<_> = rows.iter().map(cells).collect();
    print(&table(
        &["ID", "ADDRESS", "STATE", "MAC", "QUEUES", "LINK", "NETWORK"],
        &rows,
    ))
}

/// What `vm.add-virtio` takes for the text of `--net`.
fn described(text: &str) -> anyhow::Result<wire::VirtioConfig> {
    let mut device = DeviceConfig::from_flag(&MODEL, "net", text)
        .map_err(|error| Misuse(crate::error::chain(&error)))?;
    let directory = std::env::current_dir().context("the working directory is gone")?;
    make_device_paths_absolute(&mut device, &directory, MODELS);
    let card = device::request(device, &NOUN)?;
    if card.config.contains_key("fd") {
        let reason = "net: fd: a running monitor has other descriptors: name the tap, or use vm.add-net of the control socket";
        return Err(Misuse(reason.to_owned()).into());
    }
    Ok(card)
}

fn add(arguments: AddArgs) -> anyhow::Result<()> {
    let (mut remote, [text]) = arguments
        .socket
        .connect_and_split(arguments.words, ["key=value,…"])?;
    let last = |config: wire::VmConfig| config.net?.pop()?.id;
    device::add(&mut remote, &described(&text)?, arguments.json, &NOUN, last)
}

fn remove(arguments: RemoveArgs) -> anyhow::Result<()> {
    let (mut remote, [id]) = arguments
        .socket
        .connect_and_split(arguments.words, ["CARD"])?;
    let known = cards(&mut remote)?;
    device::check_known(&remote, &id, &NOUN, known.iter().map(|row| row.id.as_str()))?;
    removal::of(&mut remote, &id, &NOUN, arguments.timeout)
}

/// The keys of `vireo net update`: those of limits and mirrors among the model's, and three more.
fn update_fields() -> Vec<Field> {
    let own = [
        Field {
            name: LINK,
            kind: FieldKind::Choice(&["up", "down"]),
            required: false,
            help: "whether the cable is in",
        },
        Field {
            name: LIMITS,
            kind: FieldKind::Choice(&["off"]),
            required: false,
            help: "lifts the limits",
        },
        Field {
            name: MIRROR,
            kind: FieldKind::Choice(&["off"]),
            required: false,
            help: "ends the mirror",
        },
    ];
    let parts = ["bw_", "ops_", "mirror_"];
    let is_changed = |field: &&Field| parts.iter().any(|part| field.name.contains(part));
    let shared = MODEL.fields.iter().filter(is_changed).copied();
    own.into_iter().chain(shared).collect()
}

/// The mirror that the keys say, if they say one.
fn mirror(keys: &Map<String, Value>) -> anyhow::Result<Option<NetMirror>> {
    let text = |key| keys.get(key).and_then(Value::as_str);
    let size = keys.get(MIRROR_SIZE).and_then(Value::as_u64);
    let said = [MIRROR, MIRROR_TAP, MIRROR_FILE].map(text);
    Ok(match (said, size) {
        ([None, None, None], None) => None,
        ([Some(_), None, None], None) => Some(NetMirror::Off),
        ([None, Some(tap), None], None) => Some(NetMirror::Tap(tap.to_owned())),
        ([None, None, Some(file)], size) => {
            let path = std::path::absolute(file)
                .with_context(|| format!("net update: {MIRROR_FILE}={file}"))?;
            Some(NetMirror::File(NetMirrorFile { path, size }))
        }
        _ => {
            let reason = "net update: give one of mirror=off, mirror_tap and mirror_file, and mirror_size with a file";
            return Err(Misuse(reason.to_owned()).into());
        }
    })
}

/// What `vm.update-net` takes for the text of `vireo net update`.
fn changed(id: String, text: &str) -> anyhow::Result<VmUpdateNet> {
    let flag = "net update";
    let fields = update_fields();
    let table = FlagTable {
        flag,
        fields: &fields,
        shorthand: None,
    };
    let misuse = |error: FlagError| Misuse(crate::error::chain(&error));
    let keys = flag::parse(&table, text).map_err(misuse)?;
    if keys.is_empty() {
        return Err(Misuse(format!("{flag}: nothing is to change: give key=value")).into());
    }
    let limits = |names| {
        let limits = RateLimits::from_keys(names, |key| keys.get(key).and_then(Value::as_u64));
        let limits = limits.map_err(|error| misuse(FlagError::of_limits(flag, error)));
        limits.map(rate_limiter)
    };
    let (both, rx, tx) = (limits(limit::KEYS)?, limits(RX_KEYS)?, limits(TX_KEYS)?);
    let lifted = keys.contains_key(LIMITS);
    if lifted && (both.is_some() || rx.is_some() || tx.is_some()) {
        return Err(Misuse(format!("{flag}: limits=off and other limits: give either")).into());
    }
    let link = keys.get(LINK).and_then(Value::as_str);
    Ok(VmUpdateNet {
        id,
        mirror: mirror(&keys)?,
        link: link.map(|link| {
            if link == "up" {
                LinkState::Up
            } else {
                LinkState::Down
            }
        }),
        rate_limiter_config: both.or(lifted.then(RateLimiterConfig::default)),
        rx_rate_limiter_config: rx,
        tx_rate_limiter_config: tx,
    })
}

fn update(arguments: UpdateArgs) -> anyhow::Result<()> {
    let (mut remote, [id, text]) = arguments
        .socket
        .connect_and_split(arguments.words, ["CARD", "key=value,…"])?;
    let updated = remote.client.update_net(&changed(id, &text)?);
    updated.map_err(|error| remote.failed(error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_card_is_described_by_the_keys_of_its_flag_without_descriptors() {
        let card = described("tap=vmtap0,id=lan,addr=7,queues=2").unwrap();
        assert_eq!(
            (card.kind.as_str(), card.id.as_deref()),
            ("net", Some("lan"))
        );
        assert_eq!(
            (card.address, &card.config["queues"]),
            (Some(7), &Value::from(2))
        );
        for wrong in ["fd=3", "tpa=x", "tap=a,addr=32", "offload_tso=perhaps"] {
            let error = described(wrong).unwrap_err();
            assert!(error.is::<Misuse>(), "{wrong}: {error}");
        }
    }

    #[test]
    fn a_change_says_what_is_different_and_nothing_else() {
        let change = |text: &str| changed("n".to_owned(), text);
        let down = change("link=down").unwrap();
        assert_eq!(
            (down.link, down.rate_limiter_config),
            (Some(LinkState::Down), None)
        );
        let limited =
            change("bw_size=1M,bw_refill_time=100,tx_ops_size=5,tx_ops_refill_time=1").unwrap();
        let both = limited.rate_limiter_config.unwrap().bandwidth.unwrap();
        assert_eq!((both.size, both.refill_time), (1 << 20, 100));
        assert_eq!(limited.tx_rate_limiter_config.unwrap().ops.unwrap().size, 5);
        assert_eq!((limited.link, limited.rx_rate_limiter_config), (None, None));
        let lifted = change("limits=off").unwrap().rate_limiter_config;
        assert_eq!(lifted, Some(RateLimiterConfig::default()));
        let endless = change("rx_bw_size=1M,rx_bw_refill_time=0").unwrap_err();
        assert!(
            endless
                .to_string()
                .contains("rx_bw_refill_time=0: no bucket"),
            "{endless}"
        );
        let half = change("tx_ops_size=1").unwrap_err().to_string();
        assert!(half.contains("tx_ops_refill_time"), "{half}");
        for wrong in [
            "",
            "rx_bw_size=1M",
            "link=on",
            "mtu=1500",
            "limits=off,ops_size=1,ops_refill_time=1",
        ] {
            let error = change(wrong).unwrap_err();
            assert!(error.is::<Misuse>(), "{wrong}: {error}");
        }
    }

    #[test]
    fn a_mirror_is_one_place_or_none_and_its_file_is_absolute() {
        let mirror = |text: &str| changed("n".to_owned(), text).map(|change| change.mirror);
        assert_eq!(mirror("link=up").unwrap(), None);
        assert_eq!(mirror("mirror=off").unwrap(), Some(NetMirror::Off));
        let tap = NetMirror::Tap("mon0".to_owned());
        assert_eq!(mirror("mirror_tap=mon0").unwrap(), Some(tap));
        let file = NetMirror::File(NetMirrorFile {
            path: std::env::current_dir().unwrap().join("a.pcap"),
            size: Some(1 << 20),
        });
        assert_eq!(
            mirror("mirror_file=a.pcap,mirror_size=1M").unwrap(),
            Some(file)
        );
        for wrong in [
            "mirror=on",
            "mirror_size=1M",
            "mirror=off,mirror_tap=mon0",
            "mirror_tap=mon0,mirror_size=1M",
            "mirror_tap=mon0,mirror_file=a.pcap",
        ] {
            let error = mirror(wrong).unwrap_err();
            assert!(error.is::<Misuse>(), "{wrong}: {error}");
        }
    }

    #[test]
    fn cards_are_listed_with_what_the_machine_says_of_them() {
        let nets = serde_json::from_str(
            r#"[{"id":"a","tap":"t","mac":"02:00:00:00:00:01","num_queues":4},{"id":"b","socket":"/p"}]"#,
        );
        let devices: Vec<wire::DeviceInfo> = serde_json::from_str(
            r#"[{"id":"a","kind":"net","bdf":"0000:00:01.0","state":"active","link":"down"}]"#,
        )
        .unwrap();
        let rows = rows(nets.unwrap(), &devices);
        let told: Vec<_> = rows
            .iter()
            .map(|row| (row.id.as_str(), row.bdf.is_some(), row.state, row.pairs))
            .collect();
        let expected = [
            ("a", true, DeviceState::Active, 2),
            ("b", false, DeviceState::Configured, 1),
        ];
        assert_eq!(told, expected);
        let more: Vec<_> = rows
            .iter()
            .map(|row| (row.link, row.tap.as_deref(), row.socket.as_deref()))
            .collect();
        let expected = [
            (Some(LinkState::Down), Some("t"), None),
            (None, None, Some("/p")),
        ];
        assert_eq!(more, expected);
    }
}
