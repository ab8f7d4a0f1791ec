//! The commands `vm.disk-layers` and `vm.disk-revert`: what chains of disks consist of, and going back in one.
//!
//! A guest that works goes on with what it has in memory of its disk, so one whose disk goes back is restarted in place: it is
//! stopped first, its disk's image emptied in one write, and then reset.

use std::sync::Arc;

use api::wire::VmDiskRevert;
use api::{Answer, ControlError, ErrorKind, EventKind, PauseReason, Reply, VmState};
use block::{Emptied, ImageOptions, Revert};
use virtio::device::DiskImage;
use virtio::transport::VirtioPci;

use super::Driver;
use super::streams::no_disk;
use crate::chains;
use crate::machine::fault;
use crate::machine::inbox::ended;

fn failed<E: std::error::Error + 'static>(error: &E) -> ControlError {
    ControlError::from_error(fault::of(error), error)
}

impl Driver {
    /// Tells what the chains of all disks consist of.
    pub(super) fn disk_layers(&mut self, answer: Answer) {
        let Some(description) = &self.ears.description else {
            return answer(Err(ended()));
        };
        let disks = chains::disks(&description.config);
        let opener = Arc::clone(&self.tools.opener);
        let look = move || {
            let chain = |(id, config)| chains::of(id, &config, &*opener);
            disks.into_iter().map(chain).collect::<Vec<_>>()
        };
        let answer = self.asides.wait_with(answer);
        let started = self.beside("layers", look, move |driver, chains| {
            driver.asides.answer(answer, Ok(Reply::Layers(chains)));
        });
        if let Err(error) = started {
            self.asides.answer(answer, Err(error));
        }
    }

    /// Has a disk hold again what an image below its own does, and restarts the guest in place.
    pub(super) fn revert_disk(&mut self, request: VmDiskRevert, answer: Answer) {
        let (device, config) = match self.begin_revert(&request) {
            Ok(begun) => begun,
            Err(error) => return answer(Err(error)),
        };
        let (id, weak) = (request.id.clone(), Arc::downgrade(&device));
        let (options, path) = (config.image_options(), config.path);
        let (opener, wanted) = (Arc::clone(&self.tools.opener), options.clone());
        let place = path.clone();
        let look = move || {
            let disk = device.disk().ok_or_else(|| no_disk(&request.id))?;
            let layer = request.layer.as_deref();
            let found = Revert::of(&*disk, &place, layer, &*opener, &wanted);
            found.map_err(|error| failed(&error).context(format!("disk {}", request.id)))
        };
        let answer = self.asides.wait_with(answer);
        let (mark, held) = (id.clone(), weak.clone());
        let started = self.holding("revert", look, move |driver, looked| {
            let reverted = looked.and_then(|revert| {
                let device = driver.settled_device(&id)?;
                if !weak.ptr_eq(&Arc::downgrade(&device)) {
                    return Err(no_disk(&id));
                }
                let image = |disk| DiskImage::of(disk, path, &options);
                driver.go_back_and_reset(&device, revert, &options, image)
            });
            driver.asides.finish(&id, &weak);
            let told = reverted.map(|emptied| {
                // It holds nothing whether or not this is done.
                let _ = driver.holding("free", move || emptied.free(), |_, ()| ());
                Reply::Done
            });
            driver.asides.answer(answer, told);
        });
        if let Err(error) = started {
            self.asides.finish(&mark, &held);
            self.asides.answer(answer, Err(error));
        }
    }

    fn begin_revert(
        &mut self,
        request: &VmDiskRevert,
    ) -> Result<(Arc<VirtioPci>, virtio::models::blk::BlkConfig), ControlError> {
        self.check_no_capture()?;
        let refused = |message: &str| Err(ControlError::new(ErrorKind::Conflict, message));
        if !request.reset {
            return refused(
                "the guest would go on with what it remembers of the disk: end it first, or say reset to have it restarted in \
                 place",
            );
        }
        if self.once {
            return refused(
                "the guest was booted for once and is not restarted in place: reboot it first",
            );
        }
        let description = self.ears.description.as_ref().ok_or_else(ended)?;
        let config = description.config.disk(&request.id);
        let device = self.settled_device(&request.id)?;
        let config = config.ok_or_else(|| no_disk(&request.id))?;
        self.asides.begin(&device)?;
        Ok((device, config))
    }

    /// The instant itself.
    fn go_back_and_reset(
        &mut self,
        device: &VirtioPci,
        revert: Revert,
        options: &ImageOptions,
        image: impl FnOnce(Arc<dyn block::Disk>) -> DiskImage,
    ) -> Result<Emptied, ControlError> {
        self.check_no_capture()?;
        let control = |error: crate::machine::MachineError| error.to_control();
        let ran = match self.state().0 {
            VmState::Running => true,
            VmState::Paused => false,
            _ => return Err(ended()),
        };
        if ran {
            self.pause(PauseReason::Command).map_err(control)?;
        }
        let wanted = options.clone();
        let finish = move |go: &dyn Fn() -> bool| {
            let finished = revert.finish(&wanted, go);
            finished.map_err(|error| failed(&error))
        };
        let gone_back = self
            .while_still(device.id(), finish)
            .and_then(|(cut, emptied)| {
                let exchanged = device.exchange_disk(image(cut.disk()));
                let old = exchanged
                    .map_err(|error| ControlError::from_error(ErrorKind::Failed, &error))?;
                cut.keep();
                Ok((old, emptied))
            });
        let emptied = match gone_back {
            Ok((old, emptied)) => {
                self.close_beside(old);
                emptied
            }
            Err(error) => {
                if ran && self.outcome.is_none() {
                    self.resume().map_err(control)?;
                }
                return Err(error);
            }
        };
        self.tell_of_images(std::iter::once(&device.id().to_owned()));
        self.reset(EventKind::Reset).map_err(control)?;
        if ran {
            self.resume().map_err(control)?;
        }
        Ok(emptied)
    }
}
