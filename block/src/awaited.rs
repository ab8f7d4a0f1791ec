//! A disk of which the facts are known, and whose image another machine still has.

use std::io;

use crate::disk::{Disk, DiskInfo, IoQueue, QueueError};

/// What stands for a disk until its image is there: a device can be built with it, and not be started. In a live migration the image is opened, under
/// its locks, when the machine that it comes from has let it go.
#[derive(Clone, Debug)]
pub struct Awaited(DiskInfo);

impl Awaited {
    /// Of what the image is known to be.
    #[must_use]
    pub fn new(info: DiskInfo) -> Self {
        Self(info)
    }
}

impl Disk for Awaited {
    fn info(&self) -> DiskInfo {
        self.0.clone()
    }

    fn queue(&self, depth: u32) -> Result<Box<dyn IoQueue>, QueueError> {
        let why = "its image is still with the machine that it comes from";
        let source = io::Error::new(io::ErrorKind::NotConnected, why);
        Err(QueueError { depth, source })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_tells_what_is_known_and_moves_nothing() {
        let info = DiskInfo {
            size: 1 << 20,
            logical_block: 512,
            physical_block: 4096,
            read_only: false,
            discard: true,
        };
        let awaited = Awaited::new(info.clone());
        assert_eq!(awaited.info(), info);
        let refused = awaited.queue(8).err().unwrap().to_string();
        assert!(refused.contains("still with the machine"), "{refused}");
        assert!(awaited.live().is_none() && awaited.resize(1).is_err());
    }
}
