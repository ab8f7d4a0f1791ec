//! `--restore`: a machine that begins as a snapshot says.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use api::wire::MemoryRestoreMode;
use serde::Deserialize;
use serde_json::Value;
use virtio::schema::{Field, FieldKind};

use crate::config::flag::{self, FlagTable};
use crate::config::{MemoryConfig, VmConfig};
use crate::machine::saved::{RestoreWay, Saved};
use crate::opener::Opener;

/// The keys of the flag.
pub(super) const FIELDS: &[Field] = &[
    Field {
        name: "source_url",
        kind: FieldKind::Text,
        required: true,
        help: "directory of the snapshot, as file://DIR or a path",
    },
    Field {
        name: "resume",
        kind: FieldKind::Switch,
        required: false,
        help: "off: the guest stays paused; default on",
    },
    Field {
        name: "memory_restore_mode",
        kind: FieldKind::Choice(&["mmap", "ondemand", "copy"]),
        required: false,
        help: "how memory comes: mmap maps the file, ondemand reads and checks what is touched, copy all of it; default mmap where memory allows it",
    },
    Field {
        name: "prefault",
        kind: FieldKind::Switch,
        required: false,
        help: "on: all of memory is there before the guest goes on; default off",
    },
];

/// What the flag says.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RestoreFlag {
    source_url: String,
    #[serde(default = "yes")]
    resume: bool,
    memory_restore_mode: Option<Mode>,
    #[serde(default)]
    prefault: bool,
}

/// The words of `memory_restore_mode`.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Mode {
    Mmap,
    OnDemand,
    Copy,
}

fn yes() -> bool {
    true
}

/// Why the snapshot's machine is not begun.
pub(super) enum Refused {
    /// The flag is wrong.
    Flag(anyhow::Error),
    /// The snapshot is.
    Snapshot(anyhow::Error),
}

/// A snapshot that is opened, and what is to be done with it.
pub(super) struct Restored {
    /// The machine as it was.
    pub config: VmConfig,
    /// The rest.
    pub saved: (Saved, bool),
}

/// Opens what `text` names.
///
/// # Errors
///
/// What is wrong with the flag or with the snapshot.
pub(super) fn open(text: &str, opener: &Arc<Opener>) -> Result<Restored, Refused> {
    let table = FlagTable {
        flag: "--restore",
        fields: FIELDS,
        shorthand: Some("source_url"),
    };
    let keys = flag::parse(&table, text).map_err(|error| Refused::Flag(error.into()))?;
    let read = serde_json::from_value(Value::Object(keys));
    let RestoreFlag {
        source_url,
        resume,
        memory_restore_mode,
        prefault,
    } = read.map_err(|error| Refused::Flag(error.into()))?;
    let path = source_url.strip_prefix("file://").unwrap_or(&source_url);
    let directory = std::path::absolute(Path::new(path));
    let directory: PathBuf = directory.map_err(|error| Refused::Flag(error.into()))?;
    let saved = Saved::open(&directory, opener);
    let mut saved = saved.map_err(|error| Refused::Snapshot(error.into()))?;
    saved.ask(RestoreWay {
        memory: memory_restore_mode.map(|mode| match mode {
            Mode::Mmap => MemoryRestoreMode::Mmap,
            Mode::OnDemand => MemoryRestoreMode::OnDemand,
            Mode::Copy => MemoryRestoreMode::Copy,
        }),
        prefault,
    });
    Ok(Restored {
        config: saved.config.clone(),
        saved: (saved, resume),
    })
}

/// Sees that `config`, which flags have changed, is still of the machine that was `saved`: what is replaced of it keeps its place.
///
/// # Errors
///
/// Names the flag that changes what the guest has seen.
pub(super) fn keep(saved: &VmConfig, config: &mut VmConfig) -> anyhow::Result<()> {
    let keeps = |flag: &str, what: &str| {
        anyhow::anyhow!("{flag}: a machine that is restored keeps its {what}: leave the flag out")
    };
    let of_memory = |m: &MemoryConfig| (m.size, m.hotplug_size, m.hotplug_method);
    let mut passed = saved.passed_cards();
    // What a flag describes anew has no slot yet.
    if let Some((card, descriptors)) = passed.find(|(card, _)| config.devices.contains(card)) {
        let id = &card.id;
        anyhow::bail!(
            "--restore: card {id:?} had descriptors that were passed to another process (fd={descriptors}): \
             give --net id={id},… with some of this one, or with a tap"
        );
    }
    if of_memory(&saved.memory) != of_memory(&config.memory) {
        return Err(keeps("--memory", &format!("{} bytes", saved.memory.size)));
    }
    if saved.cpus != config.cpus {
        return Err(keeps("--cpus", "processors"));
    }
    let fixed = |config: &VmConfig| (config.pvpanic, config.watchdog, config.display.is_some());
    if fixed(saved) != fixed(config) {
        return Err(keeps("--pvpanic, --watchdog, --display", "devices"));
    }
    for device in &mut config.devices {
        let flag = format!("--{} (id {:?})", device.kind, device.id);
        let Some(before) = saved.devices.iter().find(|other| other.id == device.id) else {
            let ids: Vec<&str> = saved.devices.iter().map(|d| d.id.as_str()).collect();
            anyhow::bail!(
                "{flag}: the snapshot has no such device, but {}: give id= of the one to replace",
                ids.join(", ")
            );
        };
        if before.kind != device.kind {
            anyhow::bail!("{flag}: the snapshot's is of kind {}", before.kind);
        }
        match (device.address, before.address) {
            (Some(wanted), Some(slot)) if wanted != slot => {
                anyhow::bail!(
                    "{flag}: addr={wanted}: the snapshot has it in slot {slot}: leave addr out"
                );
            }
            (_, slot) => device.address = slot,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use virtio::models::MODELS;

    use super::*;

    fn machine() -> VmConfig {
        let mut config: VmConfig = serde_json::from_value(json!({
            "payload": { "kernel": "/k" },
            "devices": [
                { "kind": "blk", "id": "d", "address": 4, "config": { "path": "/d" } },
                { "kind": "rng", "id": "r", "address": 2 },
            ],
        }))
        .unwrap();
        config.complete(MODELS);
        config
    }

    #[test]
    fn a_device_that_replaces_another_keeps_its_place() {
        let saved = machine();
        let mut config = machine();
        config.devices[0].address = None;
        config.devices[0].config = json!({ "path": "/copy" });
        keep(&saved, &mut config).unwrap();
        assert_eq!(config.devices[0].address, Some(4));
    }

    #[test]
    fn a_card_of_another_process_s_descriptors_has_to_be_described_anew() {
        let machine = || {
            let mut config = machine();
            let cards = ["a", "b"].map(|id| {
                let card = json!({ "kind": "net", "id": id, "config": { "fd": "12" } });
                serde_json::from_value(card).unwrap()
            });
            config.devices.extend(cards);
            config.complete(MODELS);
            config
        };
        let described = |id: &str| {
            let card = json!({ "kind": "net", "id": id, "config": { "fd": "12" } });
            serde_json::from_value(card).unwrap()
        };
        let saved = machine();
        let mut config = saved.clone();
        for (place, id) in [(2, "a"), (3, "b")] {
            let told = keep(&saved, &mut config).unwrap_err().to_string();
            for part in [
                format!("card {id:?}"),
                "fd=12".to_owned(),
                format!("--net id={id}"),
            ] {
                assert!(told.contains(&part), "{told}");
            }
            config.devices[place] = described(id);
        }
        keep(&saved, &mut config).unwrap();
    }

    #[test]
    fn what_the_guest_has_seen_is_kept_and_the_flag_that_changes_it_named() {
        type Change = fn(&mut VmConfig);
        let changes: [(Change, &str); 6] = [
            (
                |c| c.memory.size *= 2,
                "--memory: a machine that is restored keeps",
            ),
            (|c| c.cpus.boot = 2, "--cpus: a machine"),
            (|c| c.watchdog = true, "--watchdog"),
            (|c| c.devices[0].address = Some(9), "slot 4: leave addr out"),
            (
                |c| c.devices[0].id = "e".to_owned(),
                "no such device, but d, r",
            ),
            (|c| c.devices[1].kind = "blk".to_owned(), "of kind rng"),
        ];
        for (change, words) in changes {
            let mut config = machine();
            change(&mut config);
            let told = keep(&machine(), &mut config).unwrap_err().to_string();
            assert!(told.contains(words), "{told}");
        }
    }
}
