//! The snapshots that a snapshot needs: its parent, of whose memory it holds what has changed since, that one's parent, and so on.
//!
//! # Contract
//!
//! * A child knows the id of its parent and the checksum of its manifest. What is missing, altered or another snapshot is refused by
//!   name, and so are circles and more than [`DEEPEST`] snapshots.
//! * Of a parent only memory is needed. It must be of memory in the same places as the child's.
//! * Nothing that a manifest says is trusted.

use std::fs::File;
use std::path::{Path, PathBuf};

use migration::pages::{Layer, Layers};
use migration::{RestoreError, SectionSet};

use super::manifest::{FileEntry, Manifest, NAME, Parent, checksum};
use super::saved::{RestoreFailure, STATE, read_manifest};
use super::snapshot::take_index;
use crate::opener::Opener;

/// The most snapshots that one restores from.
pub const DEEPEST: usize = 64;

/// Why the snapshots that one needs are not as it needs them.
#[derive(Debug, thiserror::Error)]
pub enum ChainError {
    /// The parent is not there or cannot be read.
    #[error("{} needs the snapshot {id} in {}", child.display(), directory.display())]
    Missing {
        /// The child's manifest.
        child: PathBuf,
        /// The parent's id.
        id: String,
        /// Where it is said to be.
        directory: PathBuf,
        /// What is wrong there.
        #[source]
        source: Box<RestoreFailure>,
    },
    /// There is another one.
    #[error(
        "{} needs the snapshot {wanted} in {}, where {found} is: put the right one there",
        child.display(), directory.display()
    )]
    Other {
        /// The child's manifest.
        child: PathBuf,
        /// The parent's id.
        wanted: String,
        /// Where it is said to be.
        directory: PathBuf,
        /// The id of what is there.
        found: String,
    },
    /// It is the one, but it has been changed.
    #[error(
        "{} has been altered since {} was made: its checksum is {found}, not {stated}",
        parent.display(), child.display()
    )]
    Altered {
        /// The child's manifest.
        child: PathBuf,
        /// The parent's.
        parent: PathBuf,
        /// What the child says.
        stated: String,
        /// What it is.
        found: String,
    },
    /// One of them needs itself.
    #[error("{} needs itself: the snapshot {id} is among those that {id} needs", child.display())]
    Circle {
        /// The manifest that names one which was there already.
        child: PathBuf,
        /// Which one.
        id: String,
    },
    /// There are too many.
    #[error(
        "{} needs more than {DEEPEST} snapshots: make one of them whole with 'vireo snapshot flatten'",
        child.display()
    )]
    Deep {
        /// The manifest.
        child: PathBuf,
    },
}

/// A snapshot whose manifest has been read.
pub struct Link {
    /// Where it lies.
    pub directory: PathBuf,
    /// What it says.
    pub manifest: Manifest,
    /// The [`checksum`] of its bytes.
    pub checksum: String,
}

/// The directory that `parent`, of a manifest in `directory`, lies in.
#[must_use]
pub fn parent_directory(directory: &Path, parent: &Parent, opener: &Opener) -> PathBuf {
    let place = &parent.directory;
    // Where the child is, not where a symbolic link to it is.
    let above = opener.canonical(directory).ok();
    let above = above.as_deref().and_then(Path::parent);
    match above.zip(place.strip_prefix("../")) {
        Some((above, name)) => above.join(name),
        // An absolute one replaces it.
        None => directory.join(place),
    }
}

/// Reads the manifests of all snapshots that the one in `directory` needs, itself the first.
///
/// # Errors
///
/// [`RestoreFailure`] of the first, [`ChainError`] of the others.
pub fn follow(directory: &Path, opener: &Opener) -> Result<Vec<Link>, RestoreFailure> {
    let (manifest, bytes) = read_manifest(directory, opener)?;
    let mut links = vec![Link {
        directory: directory.to_owned(),
        manifest,
        checksum: checksum(&bytes),
    }];
    while let Some(next) = next_of(&links, opener) {
        links.push(next.map_err(RestoreFailure::Chain)?);
        if links.len() > DEEPEST {
            let child = directory.join(NAME);
            return Err(RestoreFailure::Chain(ChainError::Deep { child }));
        }
    }
    Ok(links)
}

/// The parent of the last of `links`, if it has one.
fn next_of(links: &[Link], opener: &Opener) -> Option<Result<Link, ChainError>> {
    let link = links.last()?;
    let parent = link.manifest.parent.as_ref()?;
    if links.iter().any(|other| other.manifest.id == parent.id) {
        return Some(Err(ChainError::Circle {
            child: link.directory.join(NAME),
            id: parent.id.clone(),
        }));
    }
    Some(read_parent(link, parent, opener))
}

/// The `parent` of `link`, as that knows it.
fn read_parent(link: &Link, parent: &Parent, opener: &Opener) -> Result<Link, ChainError> {
    let child = link.directory.join(NAME);
    let directory = parent_directory(&link.directory, parent, opener);
    let (manifest, bytes) = match read_manifest(&directory, opener) {
        Ok(read) => read,
        Err(source) => {
            return Err(ChainError::Missing {
                child,
                id: parent.id.clone(),
                directory,
                source: Box::new(source),
            });
        }
    };
    if manifest.id != parent.id {
        return Err(ChainError::Other {
            child,
            wanted: parent.id.clone(),
            directory,
            found: manifest.id,
        });
    }
    let found = checksum(&bytes);
    if found != parent.checksum {
        return Err(ChainError::Altered {
            child,
            parent: directory.join(NAME),
            stated: parent.checksum.clone(),
            found,
        });
    }
    Ok(Link {
        directory,
        manifest,
        checksum: found,
    })
}

/// Opens what all of `links` have of memory with `ranges`. `set` is what the first has of state, which loses its index.
///
/// # Errors
///
/// [`RestoreFailure`].
pub fn open_memory(
    links: &[Link],
    set: &mut SectionSet,
    ranges: &[(u64, u64)],
    opener: &Opener,
) -> Result<Layers, RestoreFailure> {
    let state_failed = |directory: &Path, source: RestoreError| RestoreFailure::State {
        path: directory.to_owned(),
        source,
    };
    let mut layers = Vec::new();
    let mut own = Some(set);
    for link in links {
        let directory = &link.directory;
        let (path, file, len) = open_file(directory, &link.manifest.memory, opener)?;
        let index = match own.take() {
            Some(set) => take_index(set, ranges, len),
            None => take_index(&mut read_state(link, opener)?, ranges, len),
        };
        let index = index.map_err(|source| state_failed(directory, source))?;
        layers.push(Layer { path, index, file });
    }
    let oldest = links.last().map(|link| link.directory.as_path());
    Layers::new(layers).map_err(|source| state_failed(oldest.unwrap_or(Path::new("")), source))
}

/// Reads the sections of a snapshot, whose checksums are compared.
///
/// # Errors
///
/// [`RestoreFailure`].
pub fn read_state(link: &Link, opener: &Opener) -> Result<SectionSet, RestoreFailure> {
    let state = link.directory.join(&link.manifest.state.file);
    let bytes = opener.read_document(&state, STATE);
    let bytes = bytes.map_err(|source| RestoreFailure::Open {
        directory: link.directory.clone(),
        source,
    })?;
    check_length(&state, bytes.len() as u64, link.manifest.state.bytes)?;
    SectionSet::from_bytes(&bytes).map_err(|source| RestoreFailure::State {
        path: state,
        source,
    })
}

/// Opens a file of a snapshot, which has the length that the manifest says.
fn open_file(
    directory: &Path,
    entry: &FileEntry,
    opener: &Opener,
) -> Result<(PathBuf, File, u64), RestoreFailure> {
    let path = directory.join(&entry.file);
    let file = opener.open_input(&path);
    let file = file.map_err(|source| RestoreFailure::Open {
        directory: directory.to_owned(),
        source,
    })?;
    let facts = file.metadata().map_err(|source| RestoreFailure::Memory {
        path: path.clone(),
        source: migration::pages::PagesError::Read { offset: 0, source },
    })?;
    check_length(&path, facts.len(), entry.bytes)?;
    Ok((path, file, facts.len()))
}

fn check_length(path: &Path, found: u64, stated: u64) -> Result<(), RestoreFailure> {
    if found == stated {
        return Ok(());
    }
    Err(RestoreFailure::Length {
        path: path.to_owned(),
        found,
        stated,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::manifest::VERSION;
    use crate::machine::saved::machine_type;

    /// Writes a manifest whose id ends so, and gives what a child knows of it.
    fn put(directory: &Path, number: u32, parent: Option<Parent>) -> Parent {
        let id = format!("{number:032x}");
        let place = directory.join(format!("s{number}"));
        std::fs::create_dir_all(&place).unwrap();
        let entry = |file: &str| FileEntry {
            file: file.to_owned(),
            bytes: 0,
        };
        let manifest = Manifest {
            vireo_snapshot: VERSION.to_owned(),
            id: id.clone(),
            machine: machine_type().to_owned(),
            config: serde_json::json!({}),
            state: entry("state"),
            memory: entry("memory"),
            parent,
            template: None,
        };
        let bytes = manifest.to_bytes();
        std::fs::write(place.join(NAME), &bytes).unwrap();
        Parent {
            id,
            directory: format!("../s{number}"),
            checksum: checksum(&bytes),
        }
    }

    #[test]
    fn a_chain_is_followed_to_its_end_and_a_longer_one_refused() {
        let dir = tempfile::tempdir().unwrap();
        let mut parent = None;
        for number in 1..=65 {
            parent = Some(put(dir.path(), number, parent));
        }
        let follow = |name: &str| follow(&dir.path().join(name), &Opener::new());
        let links = follow("s64").unwrap();
        assert_eq!(links.len(), 64);
        assert_eq!(links[63].manifest.id, format!("{:032x}", 1));
        let deep = follow("s65").err().unwrap().to_string();
        assert!(
            deep.contains("s65/manifest.json needs more than 64"),
            "{deep}"
        );
    }

    #[test]
    fn a_circle_is_refused_whatever_its_checksums_are() {
        let dir = tempfile::tempdir().unwrap();
        let first = put(dir.path(), 1, None);
        let second = put(dir.path(), 2, Some(first));
        put(dir.path(), 1, Some(second));
        for name in ["s1", "s2"] {
            let told = follow(&dir.path().join(name), &Opener::new());
            let told = told.err().unwrap().to_string();
            assert!(
                told.contains("needs itself") || told.contains("has been altered"),
                "{told}"
            );
        }
        let own = Parent {
            id: format!("{:032x}", 3),
            directory: "../s3".to_owned(),
            checksum: "0".repeat(8),
        };
        put(dir.path(), 3, Some(own));
        let told = follow(&dir.path().join("s3"), &Opener::new())
            .err()
            .unwrap();
        assert!(
            matches!(told, RestoreFailure::Chain(ChainError::Circle { .. })),
            "{told}"
        );
    }
}
