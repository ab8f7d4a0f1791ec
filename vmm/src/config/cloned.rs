//! The machine of a template, as one of several that run beside each other: what of it only one machine can have becomes another, or
//! is refused by name before anything starts.
//!
//! | what | becomes |
//! |---|---|
//! | name, UUID, MACs | its own ([`super::restored`]) |
//! | disks | those that are given |
//! | taps that Vireo makes by a pattern | one more |
//! | other taps | those that are given |
//! | sockets and files of consoles, ports, screen, socket device and mirrors | the same path with `.` and the name behind it |
//! | the terminal, a debugger | none |

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use api::wire::RestoreIdentity;
use serde_json::{Map, Value};

use super::network::is_card;
use super::restored::{self, KeepError, Renewal};
use super::vsock::is_vsock;
use super::{DebugconConfig, SerialConfig, SinkConfig, VmConfig};

/// What stands for the number of a clone in the name of a tap.
pub const NUMBER: &str = "{n}";

const TAP: &str = "tap";

/// What a machine of a template has for itself.
#[derive(Debug, Default)]
pub struct Own<'a> {
    /// Its name.
    pub name: &'a str,
    /// Which of them it is.
    pub number: u32,
    /// The taps of cards, by the cards' ids; [`NUMBER`] in them becomes its number.
    pub taps: Option<&'a BTreeMap<String, String>>,
    /// The disks that it writes to, with the keys that say what they are.
    pub disks: &'a [(String, Map<String, Value>)],
}

/// Why there cannot be several machines of one template.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CloneError {
    /// A card is plugged into what one machine can have.
    #[error(
        "card {id:?} is at {key} {value}, which one machine can have: give each clone one with --tap {id}=NAME{NUMBER}"
    )]
    Tap {
        /// The card.
        id: String,
        /// What it is plugged into.
        key: &'static str,
        /// Which one.
        value: String,
    },
    /// Its copies go to a tap.
    #[error(
        "card {id:?} has mirror_tap {value}, which one machine can have: a template's cards have none"
    )]
    Mirror {
        /// The card.
        id: String,
        /// The tap.
        value: String,
    },
    /// A tap is given to what is no card.
    #[error("--tap {id}=…: the template has no card {id:?}{}", known(cards))]
    NoCard {
        /// What was given.
        id: String,
        /// The cards that there are.
        cards: Vec<String>,
    },
    /// Several would have one tap.
    #[error("--tap {id}={value}: each clone has to have its own: put {NUMBER} into the name")]
    OneTap {
        /// The card.
        id: String,
        /// The name.
        value: String,
    },
    /// Viewers connect to a port.
    #[error(
        "the screen is at {address} ({key}), where one machine can be: clones need a template whose screen is at unix:PATH"
    )]
    Screen {
        /// `vnc` or `web`.
        key: &'static str,
        /// Where.
        address: String,
    },
    /// It cannot be restored at all.
    #[error(transparent)]
    Keep(#[from] KeepError),
}

fn known(cards: &[String]) -> String {
    if cards.is_empty() {
        return String::new();
    }
    format!(", but {}", cards.join(", "))
}

/// That `taps` are for cards of `template`, and make `count` machines as many different ones.
///
/// # Errors
///
/// [`CloneError::NoCard`] and [`CloneError::OneTap`].
pub fn check_taps(
    template: &VmConfig,
    taps: &BTreeMap<String, String>,
    count: u32,
) -> Result<(), CloneError> {
    let cards = template.devices.iter().filter(|d| is_card(&d.kind));
    let cards: BTreeSet<&String> = cards.map(|card| &card.id).collect();
    for (id, value) in taps {
        if !cards.contains(id) {
            return Err(CloneError::NoCard {
                id: id.clone(),
                cards: cards.into_iter().cloned().collect(),
            });
        }
        if count > 1 && !value.contains(NUMBER) && !value.contains("%d") {
            return Err(CloneError::OneTap {
                id: id.clone(),
                value: value.clone(),
            });
        }
    }
    Ok(())
}

/// A machine of `template`, and what it has to be told of itself.
///
/// # Errors
///
/// [`CloneError`].
pub fn of(template: &VmConfig, own: &Own<'_>) -> Result<(VmConfig, Renewal), CloneError> {
    let mut config = template.clone();
    config.name = Some(own.name.to_owned());
    let beside = |path: &Path| beside(path, own.name);
    for console in config.consoles_mut() {
        let SerialConfig::Sinks(sinks) = console else {
            continue;
        };
        for sink in sinks {
            match sink {
                SinkConfig::Tty => *sink = SinkConfig::Null,
                SinkConfig::File(file) => file.path = beside(&file.path),
                SinkConfig::Socket(socket) => socket.path = beside(&socket.path),
                SinkConfig::Pty | SinkConfig::Null => (),
            }
        }
    }
    for port in &mut config.ports {
        for path in [&mut port.socket, &mut port.file].into_iter().flatten() {
            *path = beside(path);
        }
    }
    config.debugcon = match &config.debugcon {
        DebugconConfig::File(path) => DebugconConfig::File(beside(path)),
        DebugconConfig::Off | DebugconConfig::Stdio => DebugconConfig::Off,
    };
    // It would wait for somebody before the first instruction.
    config.gdb = None;
    screen(&mut config, own.name)?;
    devices(&mut config, own)?;
    let renewal = restored::settle(template, &mut config, RestoreIdentity::New)?;
    Ok((config, renewal))
}

/// The path of what a machine called `name` has in the place of what is at `path`.
fn beside(path: &Path, name: &str) -> PathBuf {
    let mut text: OsString = path.as_os_str().to_owned();
    text.push(".");
    text.push(name);
    PathBuf::from(text)
}

fn screen(config: &mut VmConfig, name: &str) -> Result<(), CloneError> {
    let Some(display) = &mut config.display else {
        return Ok(());
    };
    let vnc = display.vnc.as_mut().map(|vnc| &mut vnc.address);
    let web = display.web.as_mut().map(|web| &mut web.address);
    for (key, address) in [("vnc", vnc), ("web", web)] {
        let Some(address) = address else {
            continue;
        };
        if !address.starts_with("unix:") {
            let address = address.clone();
            return Err(CloneError::Screen { key, address });
        }
        *address = format!("{address}.{name}");
    }
    Ok(())
}

fn devices(config: &mut VmConfig, own: &Own<'_>) -> Result<(), CloneError> {
    for device in &mut config.devices {
        let (vsock, card) = (is_vsock(device), is_card(&device.kind));
        let Value::Object(keys) = &mut device.config else {
            continue;
        };
        if let Some((_, disk)) = own.disks.iter().find(|(id, _)| *id == device.id) {
            // What was said of the template's image.
            for key in ["lease", "write_threshold", "lock"] {
                keys.remove(key);
            }
            keys.extend(disk.clone());
        }
        if vsock {
            rename(keys, "socket", own.name);
        }
        if card {
            plug(keys, &device.id, own)?;
            rename(keys, "mirror_file", own.name);
        }
    }
    Ok(())
}

/// Has a path among the keys be this machine's.
fn rename(keys: &mut Map<String, Value>, key: &str, name: &str) {
    if let Some(Value::String(path)) = keys.get_mut(key) {
        *path = format!("{path}.{name}");
    }
}

/// Plugs a card into what is this machine's.
fn plug(keys: &mut Map<String, Value>, id: &str, own: &Own<'_>) -> Result<(), CloneError> {
    let text = |keys: &Map<String, Value>, key| {
        let value = keys.get(key).and_then(Value::as_str);
        value.map(str::to_owned)
    };
    if let Some(value) = text(keys, "mirror_tap") {
        let id = id.to_owned();
        return Err(CloneError::Mirror { id, value });
    }
    if let Some(tap) = own.taps.and_then(|taps| taps.get(id)) {
        for key in ["fd", "socket"] {
            keys.remove(key);
        }
        let tap = tap.replace(NUMBER, &own.number.to_string());
        keys.insert(TAP.to_owned(), Value::String(tap));
        return Ok(());
    }
    for key in [TAP, "fd", "socket"] {
        let value = text(keys, key);
        if let Some(value) = value.filter(|value| key != TAP || !value.contains("%d")) {
            let id = id.to_owned();
            return Err(CloneError::Tap { id, key, value });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use virtio::models::MODELS;

    use super::*;
    use crate::config::HostLimits;

    fn template(more: &Value) -> VmConfig {
        let mut whole = json!({ "payload": { "kernel": "/k" }, "name": "web" });
        whole
            .as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        let mut config: VmConfig = serde_json::from_value(whole).unwrap();
        config.complete(MODELS);
        config.validate(MODELS, &HostLimits::read()).unwrap();
        config
    }

    fn cloned(template: &VmConfig, number: u32) -> VmConfig {
        let name = format!("c-{number}");
        let own = Own {
            name: &name,
            number,
            ..Own::default()
        };
        let (config, _) = of(template, &own).unwrap();
        config.validate(MODELS, &HostLimits::read()).unwrap();
        config
    }

    #[test]
    fn what_one_machine_can_have_is_another_in_each() {
        let template = template(&json!({
            "serial": ["tty", { "file": "/log" }],
            "console": { "socket": "/hvc" },
            "ports": [{ "name": "a", "socket": "/a" }, { "name": "b", "pty": true }],
            "debugcon": { "file": "/e9" },
            "gdb": { "unix": "/gdb" },
            "display": { "vnc": { "address": "unix:/vnc" }, "web": { "address": "unix:/web" } },
            "devices": [
                { "kind": "net", "id": "n", "config": { "mirror_file": "/pcap" } },
                { "kind": "vsock", "id": "v", "config": { "cid": 3, "socket": "/v" } },
            ],
        }));
        let [one, two] = [1, 2].map(|number| cloned(&template, number));
        let text = serde_json::to_string(&one).unwrap();
        for path in ["/log", "/hvc", "/a", "/e9", "/vnc", "/web", "/pcap", "/v"] {
            assert!(text.contains(&format!("{path}.c-1\"")), "{path}: {text}");
        }
        assert_eq!(one.gdb, None);
        assert_eq!(one.name.as_deref(), Some("c-1"));
        assert!(!one.serial.sinks().contains(&SinkConfig::Tty));
        assert_eq!(one.serial.sinks().len(), 2);
        let mac = |config: &VmConfig| config.devices[0].network().unwrap().mac.unwrap();
        let mut macs = [mac(&template), mac(&one), mac(&two)];
        macs.sort();
        assert!(macs[0] != macs[1] && macs[1] != macs[2]);
        assert!(one.smbios.uuid.is_some() && one.smbios.uuid != two.smbios.uuid);
    }

    #[test]
    fn taps_are_made_or_given_or_asked_for() {
        let card = |config: Value| {
            template(&json!({ "devices": [{ "kind": "net", "id": "n", "config": config }] }))
        };
        let tap = |config: &VmConfig| config.devices[0].network().unwrap().tap;
        assert_eq!(tap(&cloned(&card(json!({})), 1)), None);
        let pattern = card(json!({ "tap": "x%d" }));
        assert_eq!(tap(&cloned(&pattern, 1)).as_deref(), Some("x%d"));
        let named = card(json!({ "tap": "tap0" }));
        let own = |taps| Own {
            name: "c-7",
            number: 7,
            taps,
            ..Own::default()
        };
        let told = of(&named, &own(None)).unwrap_err().to_string();
        assert!(
            told.contains("tap tap0") && told.contains("--tap n=NAME{n}"),
            "{told}"
        );
        let taps = BTreeMap::from([("n".to_owned(), "t{n}".to_owned())]);
        let (config, renewal) = of(&named, &own(Some(&taps))).unwrap();
        assert_eq!(tap(&config).as_deref(), Some("t7"));
        assert!(renewal.cards.contains("n") && renewal.clock);
        check_taps(&named, &taps, 9).unwrap();
        let same = BTreeMap::from([("n".to_owned(), "t".to_owned())]);
        check_taps(&named, &same, 1).unwrap();
        let told = check_taps(&named, &same, 2).unwrap_err().to_string();
        assert!(told.contains("put {n} into"), "{told}");
        let other = BTreeMap::from([("m".to_owned(), "t{n}".to_owned())]);
        let told = check_taps(&named, &other, 2).unwrap_err().to_string();
        assert!(told.contains("no card \"m\", but n"), "{told}");
        let mirror = card(json!({ "mirror_tap": "m0" }));
        let told = of(&mirror, &own(None)).unwrap_err().to_string();
        assert!(told.contains("mirror_tap m0"), "{told}");
    }

    #[test]
    fn a_screen_at_a_port_is_refused() {
        let template = template(&json!({ "display": { "vnc": { "address": ":5900" } } }));
        let own = Own {
            name: "c-1",
            number: 1,
            ..Own::default()
        };
        let told = of(&template, &own).unwrap_err().to_string();
        assert!(told.contains(":5900 (vnc)"), "{told}");
    }

    #[test]
    fn disks_are_those_that_are_given_and_keep_what_the_guest_sees() {
        let template = template(&json!({ "devices": [
            { "kind": "blk", "id": "d", "config": { "path": "/d", "serial": "s", "write_threshold": 7 } },
            { "kind": "blk", "id": "r", "config": { "path": "/r", "readonly": true } },
        ] }));
        let keys = json!({ "path": "/o", "format": "qcow2", "backing": "any" });
        let disks = [("d".to_owned(), keys.as_object().unwrap().clone())];
        let own = Own {
            name: "c-1",
            number: 1,
            disks: &disks,
            ..Own::default()
        };
        let (config, _) = of(&template, &own).unwrap();
        let disk = config.disk("d").unwrap();
        assert_eq!(disk.path, Path::new("/o"));
        assert_eq!(
            (disk.serial.as_deref(), disk.write_threshold),
            (Some("s"), None)
        );
        assert_eq!(config.disk("r").unwrap().path, Path::new("/r"));
    }
}
