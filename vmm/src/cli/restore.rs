//! `--restore`: a machine that begins as a snapshot says.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use api::wire::{MemoryRestoreMode, RestoreIdentity};
use serde::Deserialize;
use serde_json::Value;
use virtio::schema::{Field, FieldKind};

use super::Failure;
use crate::config::VmConfig;
use crate::config::flag::{self, FlagTable};
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
    Field {
        name: "identity",
        kind: FieldKind::Choice(&["same", "new"]),
        required: false,
        help: "new: a copy with a UUID and MACs of its own, where no flag gives them, and the time of now; default same",
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
    #[serde(default)]
    identity: RestoreIdentity,
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

impl From<Refused> for Failure {
    fn from(refused: Refused) -> Self {
        match refused {
            Refused::Flag(error) => Self::Usage(error),
            Refused::Snapshot(error) => Self::Failed(error),
        }
    }
}

/// A snapshot that is opened, and what is to be done with it.
pub(super) struct Restored {
    /// The machine as it was.
    pub config: VmConfig,
    /// The rest.
    pub saved: (Saved, bool),
    /// Whether it is to be another machine.
    pub identity: RestoreIdentity,
}

/// What is wrong with the flag, where that does not name it.
fn wrong(error: impl Into<anyhow::Error>) -> Refused {
    Refused::Flag(error.into().context("--restore"))
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
        identity,
    } = read.map_err(wrong)?;
    let path = source_url.strip_prefix("file://").unwrap_or(&source_url);
    let directory = std::path::absolute(Path::new(path));
    let directory: PathBuf = directory.map_err(wrong)?;
    let saved = Saved::open(&directory, opener);
    let mut saved = saved.map_err(|error| Refused::Snapshot(error.into()))?;
    saved.ask(RestoreWay {
        memory: memory_restore_mode.map(|mode| match mode {
            Mode::Mmap => MemoryRestoreMode::Mmap,
            Mode::OnDemand => MemoryRestoreMode::OnDemand,
            Mode::Copy => MemoryRestoreMode::Copy,
        }),
        prefault,
        ..RestoreWay::default()
    });
    Ok(Restored {
        config: saved.config.clone(),
        saved: (saved, resume),
        identity,
    })
}
