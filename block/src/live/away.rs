//! The files of a disk, which another machine is to have: in a live migration over storage that both sides see.
//!
//! # How a disk goes from one to the other
//!
//! 1. All queues of the disk have ended. [`Live::let_go`] makes everything durable that it holds, refuses changes, and gives up the locks of
//!    its whole chain.
//! 2. The other side opens the disk, under locks of its own, and marks its files before a guest runs on it ([`Live::mark`]).
//! 3. Should that come to nothing, [`Away::take_back`] takes the locks again, all or none, and says whether a file has been changed since; where none
//!    has, [`Away::go_on`] lets the disk be changed again.
//!
//! Between the two nobody here may read the disk, and nobody can change it.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::time::SystemTime;

use super::{Live, Top};
use crate::file::{HostFile, Kind};
use crate::lock::{Intent, LockError};
use crate::qcow2::image::{Backing, Qcow2};
use crate::storage::Storage;

/// Why a disk is not handed over, or not taken back.
#[derive(Debug, thiserror::Error)]
pub enum AwayError {
    /// What it holds cannot be made durable.
    #[error("what the disk holds cannot be made durable")]
    Flush(#[source] io::Error),
    /// A program is asked who may open its image.
    #[error(
        "a disk with lease= cannot be handed over: its program gives the lease to one opening alone"
    )]
    Lease,
    /// A file of its chain cannot be looked at.
    #[error("a file of the disk cannot be looked at")]
    Facts(#[source] io::Error),
    /// Somebody else has a file of its chain.
    #[error("somebody else uses a file of the disk")]
    Busy,
    /// The file system does not lock any more.
    #[error("the file system refuses the disk's locks")]
    Locks(#[source] io::Error),
}

/// What became of a disk's files while another machine could have them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Back {
    /// They are as they were: the disk can go on ([`Away::go_on`]).
    Same,
    /// A file may have been changed: the disk is to be opened anew.
    Touched,
}

/// What tells that a regular file has been changed: device, inode, length, and the times of its last changes.
type Print = (u64, u64, u64, (i64, i64), (i64, i64));

/// One file of the chain.
#[derive(Debug)]
struct File {
    file: Arc<HostFile>,
    intent: Intent,
    /// `None`: it is a block device, which does not tell.
    before: Option<Print>,
}

impl File {
    fn print(file: &HostFile) -> io::Result<Option<Print>> {
        if file.abilities().kind == Kind::Device {
            return Ok(None);
        }
        let facts = file.file().metadata()?;
        Ok(Some((
            facts.dev(),
            facts.ino(),
            facts.len(),
            (facts.mtime(), facts.mtime_nsec()),
            (facts.ctime(), facts.ctime_nsec()),
        )))
    }
}

/// A disk whose files another machine may have. They stay open as long as this is there.
#[derive(Debug)]
pub struct Away {
    live: Live,
    files: Vec<File>,
    /// It takes no changes because of this alone.
    sealed: bool,
}

impl Live {
    /// Makes all durable, refuses changes, and gives up the locks of all files of the chain. The disk's queues have ended.
    ///
    /// # Errors
    ///
    /// [`AwayError`]; the disk is as it was, under its locks.
    pub fn let_go(&self) -> Result<Away, AwayError> {
        let mut all = Vec::new();
        self.host_files(&mut |file| all.push(Arc::clone(file)));
        if all.iter().any(|file| file.is_leased()) {
            return Err(AwayError::Lease);
        }
        let sealed = !self.is_sealed();
        if sealed {
            self.seal().map_err(AwayError::Flush)?;
        }
        let held = all.into_iter().filter_map(|file| {
            let intent = file.intent()?;
            let before = File::print(&file);
            Some(before.map(|before| File {
                file,
                intent,
                before,
            }))
        });
        let files: io::Result<Vec<File>> = held.collect();
        let files = files.map_err(|error| {
            if sealed {
                self.unseal();
            }
            AwayError::Facts(error)
        })?;
        files.iter().for_each(|held| held.file.give_up());
        Ok(Away {
            live: self.clone(),
            files,
            sealed,
        })
    }

    /// Has the files that are written to tell that somebody has got the disk, even if nothing is ever written: their times are set, where they belong to
    /// this user. Of block devices [`Away::take_back`] believes it anyway.
    ///
    /// # Errors
    ///
    /// The host's.
    pub fn mark(&self) -> io::Result<()> {
        let mut result = Ok(());
        self.host_files(&mut |file| {
            if file.intent() == Some(Intent::Write)
                && file.abilities().kind != Kind::Device
                && result.is_ok()
            {
                result = file.file().set_modified(SystemTime::now());
                if result
                    .as_ref()
                    .is_err_and(|error| error.kind() == io::ErrorKind::PermissionDenied)
                {
                    // It may be written to all the same.
                    result = Ok(());
                }
            }
        });
        result
    }

    /// The files of the whole chain that are of this host.
    fn host_files(&self, each: &mut dyn FnMut(&Arc<HostFile>)) {
        match &self.0 {
            Top::Raw(file) => each(file),
            Top::Qcow2(image) => chain_files(image, each),
        }
    }

    /// Whether it refuses changes by itself: it is only read.
    fn is_sealed(&self) -> bool {
        match &self.0 {
            Top::Raw(_) => false,
            Top::Qcow2(image) => image.is_sealed(),
        }
    }

    fn unseal(&self) {
        match &self.0 {
            Top::Raw(_) => (),
            Top::Qcow2(image) => image.unseal(),
        }
    }
}

fn chain_files(top: &Qcow2, each: &mut dyn FnMut(&Arc<HostFile>)) {
    let mut own = |storage: &dyn Storage| storage.host_file().into_iter().for_each(&mut *each);
    let mut next = Some(top);
    while let Some(image) = next {
        let (tables, data) = image.storages();
        own(&*tables);
        data.iter().for_each(|data| own(&**data));
        next = match image.below() {
            Some(Backing::Qcow2(below)) => Some(below),
            Some(Backing::Raw(raw)) => {
                own(&*raw.storage);
                None
            }
            None => None,
        };
    }
}

impl Away {
    /// Whether the locks keep others out of all that the disk writes to: who has given them up can tell by them that nobody else has the disk.
    #[must_use]
    pub fn is_locked(&self) -> bool {
        self.files.iter().any(|held| held.intent == Intent::Write)
    }

    /// Takes the locks of all files again, or of none. The disk still refuses changes.
    ///
    /// # Errors
    ///
    /// [`AwayError`]; it can be tried again.
    pub fn take_back(&self) -> Result<Back, AwayError> {
        self.take()?;
        let is_same = |held: &File| {
            let print = File::print(&held.file)?;
            Ok(print.is_some() && print == held.before)
        };
        let all: io::Result<Vec<bool>> = self.files.iter().map(is_same).collect();
        let all = all.map_err(|error| {
            self.give_up();
            AwayError::Facts(error)
        })?;
        if all.contains(&false) {
            return Ok(Back::Touched);
        }
        Ok(Back::Same)
    }

    /// Lets the disk be changed again, whose locks [`Away::take_back`] has taken of files that are as they were.
    pub fn go_on(&self) {
        if self.sealed {
            self.live.unseal();
        }
    }

    /// Gives up the locks again that [`Away::take_back`] has taken.
    pub fn give_up(&self) {
        self.files.iter().for_each(|held| held.file.give_up());
    }

    fn take(&self) -> Result<(), AwayError> {
        for (count, held) in self.files.iter().enumerate() {
            if let Err(error) = held.file.take(held.intent) {
                let taken = self.files.iter().take(count);
                taken.for_each(|held| held.file.give_up());
                return Err(match error {
                    LockError::Held { .. } => AwayError::Busy,
                    LockError::Unsupported { source, .. } => AwayError::Locks(source),
                });
            }
        }
        Ok(())
    }
}
