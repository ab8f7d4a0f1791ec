//! Memory that many machines begin with: that of a snapshot, read once into a memory file that nobody can change.
//!
//! Each machine maps it privately, so that what is read is there once for all of them, and what a guest writes is its own. Pages of
//! zeros are holes. Other than the snapshot's file it cannot be cut short, and every checksum has been compared before a
//! machine sees a byte.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use migration::pages::{CHUNK, ChunkPlace, LayerError, Layers, PagesError, Placed};

use super::mapping::{seal, template_file};

/// The most pieces that are mapped, unless there are more ranges of RAM: gaps are mapped too, then.
const PIECES: usize = 256;

/// Memory for machines that begin alike.
#[derive(Debug)]
pub struct Template {
    file: File,
    /// What of it is to be mapped, by guest-physical address. All else reads as zeros.
    pieces: Vec<Placed>,
    /// The file that it was read from.
    path: PathBuf,
    /// Bytes that were read.
    data: u64,
}

impl Template {
    /// Reads the memory in `layers`. `step` hears how many bytes of memory have been gone through, of [`Layers::total`], and says whether
    /// to go on.
    ///
    /// # Errors
    ///
    /// [`LayerError`]: it is damaged, it was ended, or the host has not enough memory.
    pub fn load(layers: &Layers, step: &mut dyn FnMut(u64) -> bool) -> Result<Self, LayerError> {
        let newest = layers.layers().first();
        let path = newest.map(|layer| layer.path.clone()).unwrap_or_default();
        let failed = |source| LayerError {
            path: path.clone(),
            source,
        };
        let kept = |address| {
            let path = path.clone();
            move |source| LayerError {
                path,
                source: PagesError::Memory { address, source },
            }
        };
        let file = template_file(layers.total()).map_err(kept(0))?;
        let ranges = Range::all(&layers.ranges());
        let mut buffer = vec![0; usize::try_from(CHUNK).unwrap_or(0)];
        let (mut pieces, mut data) = (Vec::new(), 0_u64);
        for ChunkPlace { number, place } in layers.written() {
            let piece = Range::place(&ranges, &place);
            let Some(piece) = piece.filter(|piece| step(piece.offset)) else {
                return Err(failed(PagesError::Cancelled));
            };
            for part in layers.load(number, &mut buffer)? {
                let at = piece.offset.saturating_add(part.start as u64);
                let bytes = buffer.get(part).unwrap_or_default();
                data = data.saturating_add(bytes.len() as u64);
                file.write_all_at(bytes, at).map_err(kept(place.start))?;
            }
            join(&mut pieces, piece);
        }
        if pieces.len() > PIECES {
            pieces = ranges.iter().map(Range::whole).collect();
        }
        seal(&file).map_err(kept(0))?;
        Ok(Self {
            file,
            pieces,
            path,
            data,
        })
    }

    /// The memory file.
    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// What is to be mapped.
    pub(super) fn pieces(&self) -> &[Placed] {
        &self.pieces
    }

    /// The file that it was read from.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// How many bytes are no zeros.
    #[must_use]
    pub fn data(&self) -> u64 {
        self.data
    }
}

/// A range of RAM, and where its bytes are in the memory file.
struct Range {
    start: u64,
    len: u64,
    offset: u64,
}

impl Range {
    fn all(ranges: &[(u64, u64)]) -> Vec<Self> {
        let mut offset = 0_u64;
        let mut all = Vec::new();
        for &(start, len) in ranges {
            all.push(Self { start, len, offset });
            offset = offset.saturating_add(len);
        }
        all
    }

    fn whole(&self) -> Placed {
        Placed {
            start: self.start,
            len: self.len,
            offset: self.offset,
        }
    }

    /// Where a chunk lies in the memory file.
    fn place(all: &[Self], chunk: &Placed) -> Option<Placed> {
        let inside = |range: &&Self| {
            let end = chunk.start.saturating_add(chunk.len);
            range.start <= chunk.start && end <= range.start.saturating_add(range.len)
        };
        let range = all.iter().find(inside)?;
        let into = chunk.start.saturating_sub(range.start);
        Some(Placed {
            start: chunk.start,
            len: chunk.len,
            offset: range.offset.saturating_add(into),
        })
    }
}

/// Adds a piece to those before it, as one with the last where both touch.
fn join(pieces: &mut Vec<Placed>, piece: Placed) {
    match pieces.last_mut() {
        Some(Placed { start, len, offset })
            if start.saturating_add(*len) == piece.start
                && offset.saturating_add(*len) == piece.offset =>
        {
            *len = len.saturating_add(piece.len);
        }
        _ => pieces.push(piece),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use migration::pages::{Layer, PageIndex, Ram};
    use rustix::fs::{SealFlags, fcntl_get_seals};
    use virtio::memory::GuestMap;
    use vm_memory::GuestAddressSpace;

    use super::super::{GuestRam, RamSpec};
    use super::*;
    use crate::machine::snapshot::SnapshotRam;

    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;
    /// Above the hole for devices, too: where each byte is, and which.
    const BYTES: [(u64, u8); 5] = [
        (7, 1),
        (2 * MIB + 3 * 4096, 2),
        (5 * MIB, 3),
        (3 * GIB - 1, 4),
        (4 * GIB + 9, 5),
    ];

    /// As much as has all [`BYTES`].
    const LARGE: u64 = 3 * GIB + 4 * MIB;
    /// And the first three.
    const SMALL: u64 = 8 * MIB;

    fn ram(size: u64) -> (GuestRam, SnapshotRam) {
        let ram = GuestRam::new(&RamSpec {
            size,
            shared: false,
            huge_page: None,
            thp: Some(false),
            prefault: false,
        })
        .unwrap();
        let view = SnapshotRam::new(GuestMap::clone(&ram.memory().memory()), false);
        (ram, view)
    }

    fn layers(size: u64, bytes: &[(u64, u8)]) -> Layers {
        let (_ram, view) = ram(size);
        for (address, byte) in bytes {
            view.write(*address, &[*byte]).unwrap();
        }
        let file = tempfile::tempfile().unwrap();
        let index = PageIndex::write(&file, &view, &mut |_| true).unwrap();
        let path = PathBuf::from("/t/memory");
        Layers::new(vec![Layer { path, index, file }]).unwrap()
    }

    fn at(view: &SnapshotRam, address: u64) -> u8 {
        let mut byte = [0];
        view.read(address, &mut byte).unwrap();
        byte[0]
    }

    #[test]
    fn machines_begin_with_its_bytes_and_see_nothing_of_each_others() {
        let template = Template::load(&layers(LARGE, &BYTES), &mut |_| true).unwrap();
        assert_eq!(template.data(), 5 * 4096);
        // Chunks that touch are one piece.
        assert_eq!(template.pieces().len(), 3);
        let mut machines: Vec<_> = (0..2).map(|_| ram(LARGE)).collect();
        for (ram, view) in &mut machines {
            let restored = ram.restorable().unwrap();
            restored.map_template(&template).unwrap();
            for (address, byte) in BYTES {
                assert_eq!(at(view, address), byte, "{address:#x}");
            }
            assert_eq!((at(view, 8), at(view, 100 * MIB)), (0, 0));
            let told = restored.info().unwrap();
            assert_eq!(told.file.as_deref(), Some(Path::new("/t/memory")));
        }
        machines[0].1.write(7, &[9]).unwrap();
        machines[0].1.write(100 * MIB, &[9]).unwrap();
        assert_eq!(
            (at(&machines[1].1, 7), at(&machines[1].1, 100 * MIB)),
            (1, 0)
        );
        // A guest that begins anew finds zeros.
        machines[0].0.discard().unwrap();
        assert_eq!((at(&machines[0].1, 7), at(&machines[1].1, 7)), (0, 1));
    }

    #[test]
    fn nobody_can_change_it_and_zeros_take_no_memory() {
        let template = Template::load(&layers(SMALL, &BYTES[..3]), &mut |_| true).unwrap();
        let file = template.file();
        let all = SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        assert_eq!(fcntl_get_seals(file).unwrap(), all);
        file.write_all_at(&[1], 0).unwrap_err();
        file.set_len(0).unwrap_err();
        assert_eq!(file.metadata().unwrap().blocks() * 512, 3 * 4096);
    }

    #[test]
    fn a_file_of_many_pieces_is_mapped_as_one_for_each_range() {
        let bytes: Vec<(u64, u8)> = (0..300).map(|place| (place * 4 * MIB, 1)).collect();
        let size = 1280 * MIB;
        let template = Template::load(&layers(size, &bytes), &mut |_| true).unwrap();
        assert_eq!(template.pieces().len(), 1);
        let (mut ram, view) = ram(size);
        ram.restorable().unwrap().map_template(&template).unwrap();
        assert!(
            bytes
                .iter()
                .all(|(address, byte)| at(&view, *address) == *byte)
        );
        assert_eq!((at(&view, 1), at(&view, size - 1)), (0, 0));
    }

    #[test]
    fn what_is_damaged_or_not_wanted_any_more_gives_none() {
        let layers = layers(SMALL, &BYTES[..3]);
        let told = Template::load(&layers, &mut |_| false).unwrap_err();
        assert!(matches!(told.source, PagesError::Cancelled), "{told}");
        layers.layers()[0].file.write_all_at(&[9], 7).unwrap();
        let told = Template::load(&layers, &mut |_| true).unwrap_err();
        assert!(
            matches!(told.source, PagesError::Checksum { .. }),
            "{told:?}"
        );
    }
}
