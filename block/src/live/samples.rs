//! A few places of a disk in use, for who wants to know whether another image holds the same.

use std::io;

use super::Live;
use crate::image::{Image, Kept};

/// How long a sample is, in bytes, where the disk does not end before.
pub const SAMPLE: usize = 4096;
/// In so many parts of a disk a sample is looked for.
const PARTS: u64 = 16;
/// How many extents of a part are looked at for one that holds data.
const STEPS: usize = 8;

impl Live {
    /// Offsets in bytes that say most of what the disk holds, in ascending order: its first and last bytes, and of each sixteenth the
    /// first data that is found without a long search.
    ///
    /// # Errors
    ///
    /// The host's, and `EIO` where the image is corrupt.
    pub fn places(&self) -> io::Result<Vec<u64>> {
        let image = self.source();
        let size = image.size();
        let step = SAMPLE as u64;
        let down = |offset: u64| offset - offset % step;
        let mut places = vec![0, down(size.saturating_sub(1))];
        let part = down(size / PARTS).max(step);
        for number in 0..PARTS {
            let start = part.saturating_mul(number);
            let end = start.saturating_add(part).min(size);
            if start < end {
                places.push(down(first_data(&*image, start, end)?));
            }
        }
        places.sort_unstable();
        places.dedup();
        Ok(places)
    }

    /// What the disk holds at `offset`, in bytes: [`SAMPLE`] of them, or those up to its end.
    ///
    /// # Errors
    ///
    /// The host's, `EIO` where the image is corrupt, and `InvalidInput` behind its end.
    pub fn sample(&self, offset: u64) -> io::Result<Vec<u8>> {
        let image = self.source();
        let left = image.size().saturating_sub(offset);
        if left == 0 {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let len = usize::try_from(left).map_or(SAMPLE, |left| left.min(SAMPLE));
        let mut bytes = vec![0; len];
        image.read(offset, &mut bytes)?;
        Ok(bytes)
    }
}

/// Where data begins that is not known to be zeros: in the image, else below it; `start` where none is found soon. Below it many images
/// hold the same.
fn first_data(image: &dyn Image, start: u64, end: u64) -> io::Result<u64> {
    let (mut at, mut below) = (start, None);
    for _ in 0..STEPS {
        if at >= end {
            break;
        }
        let extent = image.extent(at, end.saturating_sub(at))?;
        let is_below = || image.backing().is_some_and(|below| at < below.size());
        match extent.kept {
            Kept::Data { .. } => return Ok(at),
            Kept::Absent if is_below() => {
                below.get_or_insert(at);
            }
            _ => {}
        }
        at = at.saturating_add(extent.len);
    }
    Ok(below.unwrap_or(start))
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::os::unix::fs::FileExt;
    use std::path::Path;

    use super::*;
    use crate::open::{ImageOptions, open_disk};
    use crate::options::{DiskOptions, Format};
    use crate::testing::AnyPath;

    fn live(path: &Path, read_only: bool) -> Live {
        let disk = DiskOptions {
            format: Some(Format::Raw),
            read_only,
            ..DiskOptions::default()
        };
        let options = ImageOptions {
            disk,
            ..ImageOptions::default()
        };
        open_disk(path, &AnyPath, &options).unwrap().live().unwrap()
    }

    #[test]
    fn places_are_the_first_the_last_and_where_data_is() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("raw");
        let file = File::create(&path).unwrap();
        let size = 64 << 20;
        file.set_len(size + 512).unwrap();
        // In the second part, and not at its begin.
        let data = (6 << 20) + (128 << 10);
        file.write_all_at(&[7; 4096], data).unwrap();
        for read_only in [true, false] {
            let live = live(&path, read_only);
            let places = live.places().unwrap();
            assert!((16..=18).contains(&places.len()), "{places:?}");
            assert_eq!((places.first(), places.last()), (Some(&0), Some(&size)));
            assert!(places.contains(&data), "{places:?}");
            assert_eq!(live.sample(data).unwrap(), [7; SAMPLE]);
            assert_eq!(live.sample(size).unwrap(), [0; 512]);
            assert_eq!(
                live.sample(size + 512).unwrap_err().kind(),
                io::ErrorKind::InvalidInput
            );
            live.sample(u64::MAX).unwrap_err();
        }
    }

    #[test]
    fn the_smallest_disk_has_a_place() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("raw");
        fs::write(&path, [3; 512]).unwrap();
        let live = live(&path, false);
        assert_eq!(live.places().unwrap(), [0]);
        assert_eq!(live.sample(0).unwrap(), [3; 512]);
    }
}
