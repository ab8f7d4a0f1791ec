//! The manifest: what makes a directory a snapshot.
//!
//! # Contract
//!
//! * A JSON document. [`VERSION`] is its own; sections have versions of theirs. Until 1.0 is tagged it is 0.N, and another
//!   N is refused.
//! * It names the snapshot's files, which lie beside it, with their lengths; it is written last. A directory without
//!   it holds no snapshot, whatever else is there.
//! * Names are plain: a file that is somewhere else cannot be named.

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// The name of the manifest in its directory.
pub const NAME: &str = "manifest.json";
/// The version that this build writes and reads.
pub const VERSION: &str = "0.2";
/// The longest manifest that is read, in bytes.
pub const LIMIT: u64 = 4 << 20;

/// Why a manifest was refused.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// It is no JSON, or has not the fields.
    #[error("it is not the manifest of a snapshot")]
    Json(#[source] serde_json::Error),
    /// It is JSON of somebody else.
    #[error("it is not the manifest of a snapshot: it has no vireo_snapshot")]
    Foreign,
    /// Another release has written it.
    #[error("the snapshot is of format {found}; this release reads {VERSION}")]
    Version {
        /// What was found.
        found: String,
    },
    /// A name that is no plain file's.
    #[error("{name:?} is not the name of a file beside the manifest")]
    Name {
        /// The name.
        name: String,
    },
    /// A parent that is named by other rules than [`is_parent_place`]'s.
    #[error(
        "{directory:?} is no place of a parent: '../NAME' beside it, or an absolute path without '..'"
    )]
    Parent {
        /// What was found.
        directory: String,
    },
    /// An id or a checksum is no such.
    #[error("{found:?} is not {digits} hexadecimal digits")]
    Digits {
        /// What was found.
        found: String,
        /// How many there are to be.
        digits: usize,
    },
    /// The machine type is not one that this build makes.
    #[error("the snapshot is of machine type {found}; this release makes {wanted}")]
    Machine {
        /// What was found.
        found: String,
        /// What there is.
        wanted: String,
    },
}

/// One of the snapshot's files.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileEntry {
    /// Its name in the directory.
    pub file: String,
    /// Its length.
    pub bytes: u64,
}

/// The snapshot that has what this one has not, because it was the same when both were taken.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Parent {
    /// Its id.
    pub id: String,
    /// Its directory: `../NAME` where it lies beside this one's, or an absolute path.
    pub directory: String,
    /// What [`checksum`] says of its manifest.
    pub checksum: String,
}

/// A disk that a template was made with, whose image stays as it was.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SealedDisk {
    /// Its id.
    pub id: String,
    /// Its image, as an absolute path.
    pub path: String,
    /// The length of the image's file; 0 for a block device.
    pub bytes: u64,
    /// When the file was last written to, in nanoseconds since 1970; 0 for a block device.
    pub modified: i64,
}

/// What makes a snapshot a template: machines are cloned of it, and nothing of it is written to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sealed {
    /// The disks that the guest could write to.
    pub disks: Vec<SealedDisk>,
}

/// The CRC-32 of a manifest's bytes as 8 hexadecimal digits, by which a child knows its parent again.
#[must_use]
pub fn checksum(manifest: &[u8]) -> String {
    format!("{:08x}", crc32fast::hash(manifest))
}

/// What makes a directory a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// [`VERSION`].
    pub vireo_snapshot: String,
    /// What tells this snapshot from all others: 32 hexadecimal digits.
    pub id: String,
    /// The machine type.
    pub machine: String,
    /// The machine's description, as a file has it that `vireo run --config` reads.
    pub config: Value,
    /// The sections of all units.
    pub state: FileEntry,
    /// Guest memory.
    pub memory: FileEntry,
    /// What else has to be there; absent where this snapshot holds everything.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<Parent>,
    /// Whether it is a template.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub template: Option<Sealed>,
}

impl Manifest {
    /// Reads a manifest of a machine of type `machine`. The bytes are not trusted.
    ///
    /// # Errors
    ///
    /// [`ManifestError`]; the version is looked at before anything else.
    pub fn parse(bytes: &[u8], machine: &str) -> Result<Self, ManifestError> {
        let value: Value = serde_json::from_slice(bytes).map_err(ManifestError::Json)?;
        let version = value.get("vireo_snapshot").and_then(Value::as_str);
        match version {
            None => return Err(ManifestError::Foreign),
            Some(VERSION) => (),
            Some(found) => {
                let found = found.chars().take(16).collect();
                return Err(ManifestError::Version { found });
            }
        }
        let manifest: Self = serde_json::from_value(value).map_err(ManifestError::Json)?;
        for entry in [&manifest.state, &manifest.memory] {
            if !is_plain(&entry.file) {
                let name = entry.file.chars().take(256).collect();
                return Err(ManifestError::Name { name });
            }
        }
        check_digits(&manifest.id, 32)?;
        if let Some(parent) = &manifest.parent {
            check_digits(&parent.id, 32)?;
            check_digits(&parent.checksum, 8)?;
            if !is_parent_place(&parent.directory) {
                let directory = parent.directory.chars().take(256).collect();
                return Err(ManifestError::Parent { directory });
            }
        }
        if manifest.machine != machine {
            return Err(ManifestError::Machine {
                found: manifest.machine.chars().take(64).collect(),
                wanted: machine.to_owned(),
            });
        }
        Ok(manifest)
    }

    /// The document.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        // Its keys are strings and its numbers integers: it always has a text.
        serde_json::to_vec_pretty(self).unwrap_or_default()
    }
}

/// Whether a name is one of a file in a directory, and of nothing else.
fn is_plain(name: &str) -> bool {
    let fine = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_');
    (1..=128).contains(&name.len())
        && name.bytes().all(fine)
        && !name.starts_with('.')
        && name != NAME
}

/// Whether a parent may be said to lie there: `../NAME`, or an absolute path of plain components. What a path of the
/// second kind leads to is the business of who restores: the manifest there is compared with what the child knows of it.
#[must_use]
pub fn is_parent_place(directory: &str) -> bool {
    let component = |name: &str| !matches!(name, "" | "." | "..") && !name.contains('\0');
    match directory.strip_prefix("../") {
        Some(name) => component(name) && !name.contains('/') && name.len() <= 255,
        None => {
            let path = directory.strip_prefix('/');
            directory.len() <= 4096 && path.is_some_and(|path| path.split('/').all(component))
        }
    }
}

fn check_digits(found: &str, digits: usize) -> Result<(), ManifestError> {
    let hexadecimal = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
    if found.len() == digits && found.bytes().all(hexadecimal) {
        return Ok(());
    }
    let found = found.chars().take(64).collect();
    Err(ManifestError::Digits { found, digits })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest() -> Manifest {
        let entry = |file: &str| FileEntry {
            file: file.to_owned(),
            bytes: 7,
        };
        Manifest {
            vireo_snapshot: VERSION.to_owned(),
            id: "0".repeat(32),
            machine: "m".to_owned(),
            config: serde_json::json!({"cpus": {"boot_vcpus": 1}}),
            state: entry("0.state"),
            memory: entry("0.memory"),
            parent: Some(Parent {
                id: "1".repeat(32),
                directory: "../first".to_owned(),
                checksum: checksum(b"{}"),
            }),
            template: Some(Sealed {
                disks: vec![SealedDisk {
                    id: "d".to_owned(),
                    path: "/disk".to_owned(),
                    bytes: 512,
                    modified: -1,
                }],
            }),
        }
    }

    #[test]
    fn what_is_written_is_read() {
        let bytes = manifest().to_bytes();
        assert_eq!(Manifest::parse(&bytes, "m").unwrap(), manifest());
        let whole = Manifest {
            parent: None,
            ..manifest()
        };
        let bytes = whole.to_bytes();
        assert!(!String::from_utf8_lossy(&bytes).contains("parent"));
        assert_eq!(Manifest::parse(&bytes, "m").unwrap(), whole);
    }

    #[test]
    fn a_parent_lies_beside_or_at_an_absolute_path_and_nowhere_else() {
        for (place, fine) in [
            ("../first", true),
            ("../a b", true),
            ("/srv/snapshots/first", true),
            ("first", false),
            ("..", false),
            ("../", false),
            ("../..", false),
            ("../a/b", false),
            ("../../a", false),
            ("/", false),
            ("/srv/../etc", false),
            ("/srv//a", false),
            ("/srv/a/", false),
            ("/a\0b", false),
            ("", false),
        ] {
            assert_eq!(is_parent_place(place), fine, "{place:?}");
        }
        assert!(!is_parent_place(&format!("../{}", "a".repeat(256))));
        assert!(!is_parent_place(&format!("/{}", "a".repeat(4096))));
    }

    #[test]
    fn what_is_foreign_newer_or_of_another_machine_is_refused_by_name() {
        let text = String::from_utf8(manifest().to_bytes()).unwrap();
        for (found, replaced, word) in [
            ("vireo_snapshot", "other_snapshot", "no vireo_snapshot"),
            ("\"0.2\"", "\"0.1\"", "format 0.1"),
            ("\"m\"", "\"n\"", "machine type n"),
            ("\"id\"", "\"more\"", "manifest of a snapshot"),
            ("\"id\": \"00", "\"id\": \"0", "not 32 hexadecimal"),
            ("\"id\": \"11", "\"id\": \"1G", "not 32 hexadecimal"),
            ("\"checksum\": \"", "\"checksum\": \"0", "not 8 hexadecimal"),
            ("../first", "../../first", "\"../../first\" is no place"),
            ("0.memory", "../memory", "\"../memory\""),
            ("0.memory", ".memory", "\".memory\""),
            ("0.state", "a/b", "\"a/b\""),
            ("0.state", "", "\"\""),
            ("0.state", NAME, "manifest.json"),
        ] {
            let text = text.replacen(found, replaced, 1);
            let error = Manifest::parse(text.as_bytes(), "m").unwrap_err();
            assert!(error.to_string().contains(word), "{error}");
        }
        for bytes in [&b""[..], b"{", b"null", b"[]", b"\xff"] {
            assert!(Manifest::parse(bytes, "m").is_err());
        }
    }

    #[test]
    fn no_damage_to_a_manifest_is_more_than_an_error() {
        let bytes = manifest().to_bytes();
        for end in 0..bytes.len() {
            assert!(Manifest::parse(&bytes[..end], "m").is_err());
        }
    }
}
