//! The disks of a clone: overlays on the template's images, or copies of them.

use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use block::ops::{self, NewImage};
use block::{CreateOptions, Format};
use serde_json::{Map, Value, json};

use super::Plan;
use crate::chains;
use crate::config::VmConfig;
use crate::opener::Opener;

/// How a clone comes to its disks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// What it writes is in overlays.
    Thin,
    /// In overlays without names, which go with its process.
    Stateless,
    /// It has copies.
    Full,
}

/// A disk of the template that its guest can write to.
#[derive(Debug)]
pub(super) struct CloneDisk {
    id: String,
    image: PathBuf,
    format: Format,
    /// What the guest sees, in bytes.
    size: u64,
}

/// The keys that say what a disk is.
pub(super) type Keys = Map<String, Value>;

/// Those of disks, by id.
pub(super) type AllKeys = Vec<(String, Keys)>;

/// The disks of `config` that clones have for themselves.
///
/// # Errors
///
/// An image that somebody writes to, or that cannot be copied.
pub(super) fn of(config: &VmConfig, way: Way, opener: &Opener) -> anyhow::Result<Vec<CloneDisk>> {
    let mut disks = Vec::new();
    for (id, disk) in chains::disks(config) {
        if disk.readonly {
            continue;
        }
        let image = std::path::absolute(&disk.path)?;
        let format = disk.format.unwrap_or(Format::Raw);
        let layers = ops::chain(&image, opener, format, disk.backing, true);
        let layers = layers.with_context(|| format!("disk {id:?} of the template"))?;
        let below = ops::referred(&image, opener, disk.backing);
        if let Some(other) = below
            .first()
            .filter(|_| way == Way::Full && format != Format::Raw)
        {
            bail!(
                "--full: disk {id:?} is {}, which needs {}: leave --full out, or make the template with an image that needs no other \
                 (vireo image convert)",
                image.display(),
                other.display()
            );
        }
        let size = layers.first().map_or(0, |layer| layer.virtual_size);
        disks.push(CloneDisk {
            id,
            image,
            format,
            size,
        });
    }
    Ok(disks)
}

impl CloneDisk {
    /// What the image of this disk is called.
    fn file(&self, way: Way) -> String {
        let format = match way {
            Way::Full => self.format,
            Way::Thin | Way::Stateless => Format::Qcow2,
        };
        format!("{}.{}", self.id, format.name())
    }

    /// What a machine whose image is at `path` is told of it.
    fn keys(&self, way: Way, path: &Path) -> (String, Keys) {
        let mut keys = Keys::new();
        keys.insert("path".to_owned(), json!(path));
        if way != Way::Full {
            keys.insert("format".to_owned(), json!(Format::Qcow2));
            // The template's, which the overlay names by its absolute path.
            keys.insert("backing".to_owned(), json!("any"));
        }
        (self.id.clone(), keys)
    }

    /// Makes an overlay at `path`.
    fn overlay(&self, path: &Path, opener: &Opener) -> anyhow::Result<()> {
        let name = self.image.to_str();
        let name =
            name.with_context(|| format!("{}: its path is no UTF-8", self.image.display()))?;
        let options = CreateOptions {
            size: self.size,
            backing: Some((name.to_owned(), Some(self.format.name().to_owned()))),
            ..CreateOptions::default()
        };
        ops::create(path, opener, &NewImage::Qcow2(Box::new(options)))?;
        Ok(())
    }
}

/// What the disks of machine `number` are going to be, before any is made.
pub(super) fn expected(plan: &Plan, number: u32) -> AllKeys {
    let directory = plan.directory(number).unwrap_or_else(|| plan.above.clone());
    let keys = |disk: &CloneDisk| disk.keys(plan.way, &directory.join(disk.file(plan.way)));
    plan.disks.iter().map(keys).collect()
}

/// Makes the disks of machine `number`. Files without names are there as long as they are open here or elsewhere.
///
/// # Errors
///
/// Why the storage takes them not. Files stay in the machine's directory.
pub(super) fn make(plan: &Plan, number: u32) -> anyhow::Result<(AllKeys, Vec<File>)> {
    let (mut all, mut held) = (Vec::new(), Vec::new());
    for disk in &plan.disks {
        let directory = plan.directory(number);
        let path = match directory {
            Some(directory) => directory.join(disk.file(plan.way)),
            None => {
                let (file, path) = plan.opener.nameless(&plan.above).context("--stateless")?;
                held.push(file);
                path
            }
        };
        match plan.way {
            Way::Full => plan.opener.copy_image(&disk.image, &path, &mut |_| true)?,
            Way::Thin | Way::Stateless => disk.overlay(&path, &plan.opener)?,
        }
        all.push(disk.keys(plan.way, &path));
    }
    Ok((all, held))
}
