//! `--restore`: a machine that begins as a snapshot says.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Deserialize;
use serde_json::Value;
use virtio::schema::{Field, FieldKind};

use crate::config::VmConfig;
use crate::config::flag::{self, FlagTable};
use crate::machine::saved::Saved;
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
];

/// What the flag says.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RestoreFlag {
    source_url: String,
    #[serde(default = "yes")]
    resume: bool,
}

fn yes() -> bool {
    true
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
pub(super) fn open(text: &str, opener: &Arc<Opener>) -> anyhow::Result<Restored> {
    let table = FlagTable {
        flag: "--restore",
        fields: FIELDS,
        shorthand: Some("source_url"),
    };
    let keys = flag::parse(&table, text)?;
    let RestoreFlag { source_url, resume } = serde_json::from_value(Value::Object(keys))?;
    let path = source_url.strip_prefix("file://").unwrap_or(&source_url);
    let directory: PathBuf = std::path::absolute(Path::new(path))?;
    let saved = Saved::open(&directory, opener)?;
    Ok(Restored {
        config: saved.config.clone(),
        saved: (saved, resume),
    })
}
