//! What the chains of a machine's disks consist of.

use std::path::Path;

use api::wire::{ChainLayer, DiskChain};
use block::{BackingPolicy, Format, Opener, ops, unfinished_in};
use virtio::models::blk::BlkConfig;

use crate::config::VmConfig;
use crate::error::chain;

/// The disks of a machine that have images of their own, by their ids.
#[must_use]
pub fn disks(config: &VmConfig) -> Vec<(String, BlkConfig)> {
    let ids = config.devices.iter().map(|device| device.id.clone());
    ids.filter_map(|id| Some((id.clone(), config.disk(&id)?)))
        .collect()
}

/// The chain of the disk `id`, whose image may be in use. It takes as long as its storage does.
#[must_use]
pub fn of(id: String, config: &BlkConfig, opener: &dyn Opener) -> DiskChain {
    let format = config.format.unwrap_or(Format::Raw);
    match layers(&config.path, format, config.backing, opener) {
        Ok(layers) => DiskChain {
            id,
            layers,
            error: None,
        },
        Err(error) => DiskChain {
            id,
            layers: Vec::new(),
            error: Some(chain(&error)),
        },
    }
}

fn layers(
    path: &Path,
    format: Format,
    policy: BackingPolicy,
    opener: &dyn Opener,
) -> Result<Vec<ChainLayer>, block::OpenError> {
    let images = ops::chain(path, opener, format, policy, false)?;
    let unfinished: Vec<_> = (0..images.len())
        .map(|depth| unfinished_in(images.get(depth..).unwrap_or_default()))
        .collect();
    let layer = |(image, unfinished): (ops::ImageInfo, Option<String>)| ChainLayer {
        unfinished,
        format: image.format.name().to_owned(),
        size: image.virtual_size,
        used: image.actual_size,
        changed: image.modified,
        internal_snapshots: image.qcow2.as_ref().map_or(0, |own| own.snapshots.len()) as u64,
        path: image.path,
    };
    Ok(images.into_iter().zip(unfinished).map(layer).collect())
}
