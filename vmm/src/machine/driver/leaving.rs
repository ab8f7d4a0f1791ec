//! Disks that are copied with a machine that goes: what is told of them, and how they note what is changed.

use std::path::PathBuf;
use std::sync::{Arc, Weak};

use api::ControlError;
use api::wire::CopyStorage;
use block::{Disk, ImageOptions, Transfer};
use migration::transport::message::{Capabilities, Offer};
use virtio::device::DiskImage;
use virtio::transport::VirtioPci;

use super::migrate::LeavingDisk;
use super::streams::no_disk;
use super::{Desk, Driver};
use crate::error::chain;
use crate::migrate::facts::{Copied, copied_facts};
use crate::migrate::storage::leaving::Leaving;
use crate::opener::Opener;

/// What is told of a machine that has ended.
const GONE: &str = "the machine has ended";

/// A disk that is copied.
#[derive(Clone)]
struct Copy {
    id: String,
    device: Weak<VirtioPci>,
    path: PathBuf,
    options: ImageOptions,
    transfer: Arc<Transfer>,
}

/// The disks that are copied, for the thread that gives the machine away.
pub(super) struct Copies {
    how: Option<CopyStorage>,
    copies: Vec<Copy>,
}

/// Whether a disk is copied where disks are: it is written to, and what it holds can be read here.
pub(super) fn is_copied(disk: &LeavingDisk) -> bool {
    let device = disk.device.upgrade();
    let live = device.and_then(|device| device.disk()?.live());
    live.is_some() && !disk.options.disk.read_only
}

/// How many bytes there are of those that are.
pub(super) fn size(disks: &[LeavingDisk]) -> u64 {
    let size = |disk: &LeavingDisk| Some(disk.device.upgrade()?.disk()?.info().size);
    disks
        .iter()
        .filter(|disk| is_copied(disk))
        .filter_map(size)
        .fold(0, u64::saturating_add)
}

impl Copies {
    /// None yet.
    pub(super) fn new(how: Option<CopyStorage>) -> Self {
        Self {
            how,
            copies: Vec::new(),
        }
    }

    /// Looks at the disks, and tells of them in the offer.
    pub(super) fn offer(
        &mut self,
        disks: &[LeavingDisk],
        opener: &Opener,
        offer: &mut Offer,
    ) -> Result<(), String> {
        let Some(how) = self.how else {
            return Ok(());
        };
        self.copies.clear();
        let mut told = Vec::new();
        for leaving in disks.iter().filter(|disk| is_copied(disk)) {
            let LeavingDisk {
                id,
                device,
                path,
                options,
            } = leaving;
            let disk = device.upgrade().and_then(|device| device.disk());
            let disk = disk.ok_or(GONE)?;
            // What a job before could not put back is left out.
            let disk = disk.plain().unwrap_or(disk);
            let alone = how == CopyStorage::Inc;
            let transfer = Transfer::of(disk, path, alone, opener, options);
            let transfer = transfer.map_err(|error| format!("disk {id}: {}", chain(&error)))?;
            told.push(Copied {
                id: id.clone(),
                base: transfer.base().cloned(),
            });
            self.copies.push(Copy {
                id: id.clone(),
                device: Weak::clone(device),
                path: path.clone(),
                options: options.clone(),
                transfer: Arc::new(transfer),
            });
        }
        if !told.is_empty() {
            offer.facts.extend(copied_facts(&told));
            offer.capabilities = offer.capabilities.with(Capabilities::DISKS);
        }
        Ok(())
    }

    /// Has them note what is changed.
    pub(super) fn follow(&self, desk: &Desk) -> Result<Vec<Leaving>, String> {
        let copies = self.copies.clone();
        let done = desk.ask(move |driver| driver.follow_disks(&copies, true));
        done.unwrap_or_else(|| Err(GONE.to_owned()))?;
        let leaving = |copy: &Copy| Leaving {
            id: copy.id.clone(),
            transfer: Arc::clone(&copy.transfer),
        };
        Ok(self.copies.iter().map(leaving).collect())
    }

    /// Whether the disk `id` goes along.
    pub(super) fn has(&self, id: &str) -> bool {
        self.copies.iter().any(|copy| copy.id == id)
    }

    /// Has them go on as before.
    pub(super) fn give_up(&mut self, desk: &Desk) {
        let copies = std::mem::take(&mut self.copies);
        if copies.is_empty() {
            return;
        }
        let done = desk.ask(move |driver| driver.follow_disks(&copies, false));
        if let Some(Err(error)) = done {
            tracing::warn!("disks still note their changes after a migration: {error}");
        }
    }
}

impl Driver {
    /// Has disks go on with what notes their changes, or without that where they do: all or none.
    fn follow_disks(&mut self, copies: &[Copy], follow: bool) -> Result<(), String> {
        let mut exchanged = Vec::new();
        for copy in copies {
            let device = self.leaving_device(copy).map_err(|error| error.to_string());
            let device = match device {
                Ok(device) => device,
                // What is gone needs nothing.
                Err(_) if !follow => continue,
                Err(error) => return Err(error),
            };
            let now = device.disk();
            let noting = copy.transfer.begin();
            if !follow && !now.is_some_and(|now| Arc::ptr_eq(&now, &noting)) {
                continue;
            }
            let disk = if follow {
                noting
            } else {
                copy.transfer.given_up()
            };
            exchanged.push((device, copy.id.clone(), copy.image(disk)));
        }
        let devices: Vec<_> = exchanged
            .iter()
            .map(|(device, ..)| Arc::clone(device))
            .collect();
        if devices.is_empty() {
            return Ok(());
        }
        let images = exchanged.into_iter().map(|(_, id, image)| (id, image));
        let images: Vec<_> = images.collect();
        let failed = |error: String| ControlError::new(api::ErrorKind::Failed, error);
        let stalled = self.stall(&devices, |driver| driver.exchange(images).map_err(failed));
        let (old, _) = stalled.map_err(|error| error.to_string())?;
        self.close_beside(old);
        Ok(())
    }

    fn leaving_device(&self, copy: &Copy) -> Result<Arc<VirtioPci>, ControlError> {
        let device = self.settled_device(&copy.id)?;
        let same = copy.device.ptr_eq(&Arc::downgrade(&device));
        same.then_some(device).ok_or_else(|| no_disk(&copy.id))
    }
}

impl Copy {
    fn image(&self, disk: Arc<dyn Disk>) -> DiskImage {
        DiskImage::of(disk, &self.path, &self.options)
    }
}
