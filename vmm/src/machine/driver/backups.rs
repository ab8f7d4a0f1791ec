//! The commands `vm.disk-backup`, `vm.disk-bitmap` and `vm.disk-bitmaps`: copies of what a disk holds at one instant, and the bitmaps
//! that tell what has been written since.
//!
//! For a change of a bitmap the guest stands still for an instant, so that no write is half on one side of it.

use std::sync::Arc;

use api::wire::{BitmapAction, DiskBitmap, DiskBitmaps, VmDiskBackup, VmDiskBitmap};
use api::{Answer, ControlError, ErrorKind, Reply};
use block::{Backup, BackupRequest, Disk, LiveBitmap, LiveBitmapChange};
use virtio::transport::VirtioPci;

use super::Driver;
use super::copies::{Target, Work, failed, format};
use super::streams::no_disk;
use crate::chains;
use crate::config::files;
use crate::error::chain;
use crate::machine::inbox::ended;
use crate::opener::Opener;

impl Driver {
    /// Begins to copy what a disk holds now. The answer is the job.
    pub(super) fn back_up_disk(&mut self, request: VmDiskBackup, answer: Answer) {
        let Some(description) = &self.ears.description else {
            return answer(Err(ended()));
        };
        for path in std::iter::once(&request.path).chain(&request.base) {
            if !path.is_absolute() || path.file_name().is_none() {
                let message = format!("{}: give an absolute path", path.display());
                return answer(Err(ControlError::new(ErrorKind::Invalid, message)));
            }
        }
        let (config, models) = (description.config.clone(), self.tools.models);
        let own = self.ears.consoles.reserved().clone();
        let base_format = format(request.base_format);
        let wanted = BackupRequest {
            path: request.path,
            format: format(request.format),
            bitmap: request.bitmap,
            incremental: request.incremental,
            base: request.base.map(|base| (base, base_format)),
        };
        let look = move |disk: Arc<dyn Disk>, target: &Target, opener: Arc<Opener>| {
            let place = (files::COPY, wanted.path.as_path());
            files::check_new(&config, models, &opener, &own, place)
                .map_err(|error| ControlError::from_error(ErrorKind::Conflict, &error))?;
            let backup = Backup::of(disk, wanted, opener, &target.options);
            let backup = backup.map_err(|error| failed(&error))?;
            Ok(Work::Backup(Box::new(backup)))
        };
        self.copy_disk((request.id, request.speed), look, answer);
    }

    /// Changes a bitmap of a disk.
    pub(super) fn change_bitmap(&mut self, request: VmDiskBitmap, answer: Answer) {
        let begun = self
            .change_of(&request)
            .and_then(|change| Ok((change, self.begin_copy(&request.id, None)?)));
        let (change, (target, device)) = match begun {
            Ok(begun) => begun,
            Err(error) => return answer(Err(error)),
        };
        let answer = self.asides.wait_with(answer);
        // So that little is left to be written while the guest stands still.
        let write_out = move || {
            let live = device.disk().and_then(|disk| disk.live());
            let flushed = live.map(|live| live.flush());
            drop(device);
            match flushed {
                Some(Err(error)) => {
                    let failed = ControlError::from_error(ErrorKind::Failed, &error);
                    Err(failed.context("what the disk holds cannot be made durable"))
                }
                _ => Ok(()),
            }
        };
        let mark = target.clone();
        let started = self.holding("bitmap", write_out, move |driver, written| {
            driver.when_free(move |driver| {
                let changed =
                    written.and_then(|()| driver.change_still(&target, request.name, change));
                driver.asides.finish(&target.id, &target.device);
                driver.asides.answer(answer, changed.map(|()| Reply::Done));
            });
        });
        if let Err(error) = started {
            self.asides.finish(&mark.id, &mark.device);
            self.asides.answer(answer, Err(error));
        }
    }

    fn change_of(&self, request: &VmDiskBitmap) -> Result<LiveBitmapChange, ControlError> {
        if request.granularity.is_some() && request.action != BitmapAction::Add {
            let message = "granularity: only a new bitmap takes one";
            return Err(ControlError::new(ErrorKind::Invalid, message));
        }
        Ok(match request.action {
            BitmapAction::Add => LiveBitmapChange::Add {
                granularity: request.granularity,
                enabled: true,
            },
            BitmapAction::Remove => LiveBitmapChange::Remove,
            BitmapAction::Clear => LiveBitmapChange::Clear,
            BitmapAction::Enable => LiveBitmapChange::Enable,
            BitmapAction::Disable => LiveBitmapChange::Disable,
        })
    }

    /// The change itself, for which the guest stands still.
    fn change_still(
        &mut self,
        target: &Target,
        name: String,
        change: LiveBitmapChange,
    ) -> Result<(), ControlError> {
        let devices = [self.same(target)?];
        let live = disk_of(&devices[0])?.live();
        let live = live.ok_or_else(|| no_disk(&target.id))?;
        let id = target.id.clone();
        let work = move |go: &dyn Fn() -> bool| {
            if !go() {
                return Err(ended());
            }
            live.change_bitmap(&name, change)
                .map_err(|error| failed(&error).context(format!("disk {id}")))
        };
        self.stall(&devices, |driver| driver.while_still(&target.id, work))?;
        Ok(())
    }

    /// Tells which bitmaps all disks have.
    pub(super) fn disk_bitmaps(&mut self, answer: Answer) {
        let Some(description) = &self.ears.description else {
            return answer(Err(ended()));
        };
        let ids = chains::disks(&description.config).into_iter();
        let disks: Vec<_> = ids
            .filter_map(|(id, _)| Some((self.settled_device(&id).ok()?, id)))
            .collect();
        let look = move || {
            let disks = disks.into_iter();
            disks.map(|(device, id)| bitmaps(&device, id)).collect()
        };
        let answer = self.asides.wait_with(answer);
        let started = self.holding("bitmaps", look, move |driver, told: Vec<_>| {
            driver.asides.answer(answer, Ok(Reply::Bitmaps(told)));
        });
        if let Err(error) = started {
            self.asides.answer(answer, Err(error));
        }
    }
}

fn disk_of(device: &VirtioPci) -> Result<Arc<dyn Disk>, ControlError> {
    device.disk().ok_or_else(|| no_disk(device.id()))
}

fn bitmaps(device: &VirtioPci, id: String) -> DiskBitmaps {
    let live = device.disk().and_then(|disk| disk.live());
    let found = live.map_or(Ok(Vec::new()), |live| live.bitmaps());
    let (bitmaps, error) = match found {
        Ok(found) => (found.into_iter().map(told).collect(), None),
        Err(error) => (Vec::new(), Some(chain(&error))),
    };
    DiskBitmaps { id, bitmaps, error }
}

fn told(bitmap: LiveBitmap) -> DiskBitmap {
    let LiveBitmap {
        name,
        granularity,
        enabled,
        broken,
        persistent,
        marked,
    } = bitmap;
    DiskBitmap {
        name,
        granularity,
        enabled,
        broken,
        persistent,
        marked,
    }
}
