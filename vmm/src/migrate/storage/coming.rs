//! The images of disks that come, and what is written to them.

use std::io::{BufReader, Read, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use block::{Disk, DiskInfo, Landing, Opener};
use migration::transport::disks::{DiskAnswer, DiskFrame};
use virtio::models::blk::BlkConfig;

use crate::error::chain;
use crate::migrate::facts::Copied;

/// A disk that comes.
struct Coming {
    id: String,
    landing: Landing,
}

/// How far the disks are.
#[derive(Default)]
struct Progress {
    /// They take nothing any more.
    closed: bool,
    /// Before which pause all has been made durable, behind which nothing has come.
    flushed: Option<u32>,
    /// Why a disk is not whole.
    failed: Option<String>,
    /// Why one cannot be written.
    unwritten: Option<String>,
}

/// Disks that come, in the order in which they are numbered.
pub struct Landings {
    disks: Mutex<Vec<Arc<Coming>>>,
    sizes: Vec<u64>,
    /// Held while something is written, for as long as storage takes.
    writes: Mutex<()>,
    progress: Mutex<Progress>,
}

impl Landings {
    /// Makes images for `copied` as the machine here has its disks, whose sizes the source has told, or none: for each, why.
    ///
    /// # Errors
    ///
    /// By their ids, why disks cannot be had. Nothing is left then.
    pub fn make(
        copied: &[Copied],
        here: &[(String, BlkConfig)],
        told: &[(String, DiskInfo)],
        opener: &Arc<dyn Opener>,
    ) -> Result<Self, Vec<(String, String)>> {
        let mut disks = Vec::new();
        let mut failed = Vec::new();
        for Copied { id, base } in copied {
            let found = here.iter().find(|(other, _)| other == id);
            let info = told.iter().find(|(other, _)| other == id);
            let (Some((_, config)), Some((_, info))) = (found, info) else {
                failed.push((id.clone(), "it is no disk here".to_owned()));
                continue;
            };
            let options = config.image_options();
            let opener = Arc::clone(opener);
            match Landing::create(&config.path, info.size, base.as_ref(), opener, &options) {
                Ok(landing) => disks.push(Arc::new(Coming {
                    id: id.clone(),
                    landing,
                })),
                Err(error) => failed.push((id.clone(), chain(&error))),
            }
        }
        if !failed.is_empty() {
            return Err(failed);
        }
        let sizes = disks.iter().map(|disk| disk.landing.disk().info().size);
        Ok(Self {
            sizes: sizes.collect(),
            disks: Mutex::new(disks),
            writes: Mutex::default(),
            progress: Mutex::default(),
        })
    }

    fn disks(&self) -> Vec<Arc<Coming>> {
        let disks = self.disks.lock().unwrap_or_else(PoisonError::into_inner);
        disks.clone()
    }

    fn progress(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What its disks are, by their ids.
    #[must_use]
    pub fn infos(&self) -> Vec<(String, DiskInfo)> {
        let info = |disk: &Arc<Coming>| (disk.id.clone(), disk.landing.disk().info());
        self.disks().iter().map(info).collect()
    }

    /// The disk `id`, if it is one of these.
    #[must_use]
    pub fn disk(&self, id: &str) -> Option<Arc<dyn Disk>> {
        let disks = self.disks();
        let found = disks.iter().find(|disk| disk.id == id)?;
        Some(found.landing.disk())
    }

    /// Why a disk cannot be written, if one could not be: known before the source hears of it, so that it is never taken for what comes of it.
    #[must_use]
    pub fn unwritten(&self) -> Option<String> {
        self.progress().unwritten.clone()
    }

    /// Whether all is there, and durable, that belongs to the state of this pause.
    ///
    /// # Errors
    ///
    /// Why not.
    pub fn check(&self, attempt: u32) -> Result<(), String> {
        let progress = self.progress();
        if let Some(why) = progress.unwritten.as_ref().or(progress.failed.as_ref()) {
            return Err(why.clone());
        }
        if progress.flushed != Some(attempt) {
            return Err("the source sends its state before all of its disks".to_owned());
        }
        Ok(())
    }

    /// Takes nothing any more: from here on the disks are the machine's. Waits for what is being written.
    pub fn close(&self) {
        self.progress().closed = true;
        drop(self.writes.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// Whether the images stay: the guest is about to run on them, or is not.
    pub fn keep(&self, kept: bool) {
        self.disks().iter().for_each(|disk| disk.landing.keep(kept));
    }

    /// Lets go of the images: what is not kept is removed as soon as nobody writes to it. Waits for no storage.
    pub fn let_go(&self) {
        self.progress().closed = true;
        let disks = std::mem::take(&mut *self.disks.lock().unwrap_or_else(PoisonError::into_inner));
        drop(disks);
    }

    /// Does what comes, until nothing does or something cannot be done. Who sends hears of each frame.
    ///
    /// # Errors
    ///
    /// Why it has ended.
    pub fn take<R: Read>(&self, mut from: BufReader<R>, to: &mut impl Write) -> Result<(), String> {
        let mut payload = Vec::new();
        let mut done: u64 = 0;
        let ended = loop {
            let frame = match DiskFrame::read(&mut from, &mut payload, &self.sizes) {
                Ok(frame) => frame,
                Err(error) => break chain(&error),
            };
            if let Err((disk, why)) = self.act(&frame) {
                let told = DiskAnswer::Failed(disk, why.clone());
                // It finds the end of the connection otherwise.
                let _unheard = told.write(to);
                break why;
            }
            done = done.saturating_add(1);
            if let Err(error) = DiskAnswer::Done(done).write(to) {
                break chain(&error);
            }
        };
        let mut progress = self.progress();
        if !progress.closed && progress.flushed.is_none() {
            progress.failed.get_or_insert_with(|| ended.clone());
        }
        Err(ended)
    }

    /// Does what a frame says.
    fn act(&self, frame: &DiskFrame<'_>) -> Result<(), (u16, String)> {
        let _writes = self.writes.lock().unwrap_or_else(PoisonError::into_inner);
        if self.progress().closed {
            return Err((0, "the disks are not taken any more".to_owned()));
        }
        let written = self.write(frame);
        if let Err((_, why)) = &written {
            let mut progress = self.progress();
            progress.unwritten.get_or_insert_with(|| why.clone());
        }
        written
    }

    fn write(&self, frame: &DiskFrame<'_>) -> Result<(), (u16, String)> {
        let disks = self.disks();
        let on = |number: u16, at: u64, act: &dyn Fn(&Landing) -> std::io::Result<()>| {
            let Some(disk) = disks.get(usize::from(number)) else {
                return Err((number, "there is no such disk".to_owned()));
            };
            act(&disk.landing).map_err(|error| (number, told(disk, at, &error)))
        };
        match frame {
            DiskFrame::Data {
                disk,
                offset,
                bytes,
            } => {
                self.progress().flushed = None;
                on(*disk, *offset, &|landing| landing.write(*offset, bytes))
            }
            DiskFrame::Zeros { disk, offset, len } => {
                self.progress().flushed = None;
                on(*disk, *offset, &|landing| landing.clear(*offset, *len))
            }
            DiskFrame::Flush { attempt } => {
                for number in (0..).take(disks.len()) {
                    on(number, 0, &Landing::flush)?;
                }
                self.progress().flushed = Some(*attempt);
                Ok(())
            }
            DiskFrame::Keepalive => Ok(()),
        }
    }
}

/// What is told of a disk that cannot be written at the byte `at`.
fn told(disk: &Coming, at: u64, error: &std::io::Error) -> String {
    let mend = match error.kind() {
        std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
            ": make room there, and begin again"
        }
        _ => "",
    };
    format!(
        "disk {}: {}: at byte {at}: {}{mend}",
        disk.id,
        disk.landing.path().display(),
        chain(error)
    )
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};

    use super::*;

    /// Who is told, and has to find that it is known already.
    struct Source<'a>(&'a Landings, Vec<u8>);

    impl Write for Source<'_> {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            let why = self.0.unwritten().unwrap();
            assert!(why.starts_with("disk d: "), "{why}");
            self.1.extend(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    /// A disk in memory that comes.
    fn landings() -> (Landings, std::os::fd::OwnedFd) {
        let file = memfd_create("disk", MemfdFlags::ALLOW_SEALING | MemfdFlags::CLOEXEC).unwrap();
        let config: BlkConfig = serde_json::from_value(serde_json::json!({
            "path": format!("/proc/self/fd/{}", file.as_raw_fd()), "format": "raw",
        }))
        .unwrap();
        let info = DiskInfo {
            size: 1 << 20,
            read_only: false,
            logical_block: 512,
            physical_block: 512,
            discard: true,
        };
        let copied = [Copied {
            id: "d".to_owned(),
            base: None,
        }];
        let id = || "d".to_owned();
        let opener: Arc<dyn Opener> = Arc::new(crate::opener::Opener::new());
        let landings = Landings::make(&copied, &[(id(), config)], &[(id(), info)], &opener);
        (landings.unwrap(), file)
    }

    #[test]
    fn disks_are_let_go_while_storage_does_not_answer() {
        let (landings, _file) = landings();
        let _writes = landings.writes.lock().unwrap();
        assert_eq!(landings.unwritten(), None);
        landings.let_go();
        assert!(landings.disk("d").is_none());
    }

    #[test]
    fn why_a_disk_cannot_be_written_is_known_before_the_source_hears_of_it() {
        let (landings, file) = landings();
        assert_eq!(landings.unwritten(), None);
        fcntl_add_seals(&file, SealFlags::WRITE).unwrap();
        let mut frame = Vec::new();
        let data = DiskFrame::Data {
            disk: 0,
            offset: 4096,
            bytes: &[1; 4096],
        };
        data.write(&mut frame).unwrap();
        let mut source = Source(&landings, Vec::new());
        let why = landings.take(BufReader::new(&frame[..]), &mut source);
        let why = why.unwrap_err();
        assert!(why.contains("disk d: ") && !source.1.is_empty(), "{why}");
        assert_eq!(landings.check(0), Err(why));
    }
}
