//! What images hold in a few places, by which a destination sees that it has another image than the source.
//!
//! The source tells it when its guest stands, all of a disk is on stable storage, and its locks are given up, right before it
//! lets the destination run the guest, and where both can ([`Capabilities::SAMPLES`](super::message::Capabilities::SAMPLES)). Digests find mistakes, and nobody who
//! makes an image on purpose; places that are not told can differ.

use std::io;

use serde::{Deserialize, Serialize};

use super::disks::DISKS;

/// The most places of one disk.
const PLACES: usize = 64;
/// The longest name of a disk or image, in bytes.
const NAME: usize = 4096;

/// A place of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sample {
    /// Where, in bytes.
    pub offset: u64,
    /// The CRC-32 of what is there: 4 KiB, or what is left up to the end of the disk.
    pub digest: u32,
}

impl Sample {
    /// Of these bytes at `offset`.
    #[must_use]
    pub fn of(offset: u64, bytes: &[u8]) -> Self {
        Self {
            offset,
            digest: crc32fast::hash(bytes),
        }
    }
}

/// What a disk holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Samples {
    /// The disk's id.
    pub disk: String,
    /// Where its image is at the source, for messages.
    pub path: String,
    /// In these places.
    pub places: Vec<Sample>,
}

impl Samples {
    /// The first place that is not the same, where `read` gives what is at an offset; `None`: all are.
    ///
    /// # Errors
    ///
    /// Those of `read`.
    pub fn differs(
        &self,
        mut read: impl FnMut(u64) -> io::Result<Vec<u8>>,
    ) -> io::Result<Option<u64>> {
        for place in &self.places {
            if Sample::of(place.offset, &read(place.offset)?) != *place {
                return Ok(Some(place.offset));
            }
        }
        Ok(None)
    }

    /// The path is shown to people, on terminals too.
    pub(super) fn make_plain(&mut self) {
        let plain = |c: char| if c.is_control() { '?' } else { c };
        self.path = self.path.chars().map(plain).collect();
    }
}

/// Whether a peer may tell so much.
pub(super) fn fit(told: &[Samples]) -> bool {
    let fits = |samples: &Samples| {
        samples.places.len() <= PLACES && samples.disk.len().max(samples.path.len()) <= NAME
    };
    told.len() <= DISKS && told.iter().all(fits)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples(offsets: &[u64]) -> Samples {
        Samples {
            disk: "d".to_owned(),
            path: "/d\n".to_owned(),
            places: offsets.iter().map(|at| Sample::of(*at, b"same")).collect(),
        }
    }

    #[test]
    fn the_first_place_that_is_another_is_found() {
        let samples = samples(&[0, 8, 16]);
        let same = samples.differs(|_| Ok(b"same".to_vec())).unwrap();
        assert_eq!(same, None);
        let other = |at| {
            if at < 8 {
                b"same".to_vec()
            } else {
                b"some".to_vec()
            }
        };
        assert_eq!(samples.differs(|at| Ok(other(at))).unwrap(), Some(8));
        let failed = samples.differs(|_| Err(io::ErrorKind::InvalidInput.into()));
        assert_eq!(failed.unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }

    #[test]
    fn no_more_is_heard_than_there_may_be() {
        assert!(fit(&[samples(&[0; PLACES])]));
        assert!(!fit(&[samples(&[0; PLACES + 1])]));
        assert!(!fit(&vec![samples(&[]); DISKS + 1]));
        let long = Samples {
            path: "x".repeat(NAME + 1),
            ..samples(&[])
        };
        assert!(!fit(&[long]));
        let mut told = samples(&[]);
        told.make_plain();
        assert_eq!(told.path, "/d?");
    }
}
