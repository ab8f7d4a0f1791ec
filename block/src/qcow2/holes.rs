//! Space of an image's file that is reserved for data and has never been written: it is known to be zeros.

use std::io;
use std::os::unix::fs::MetadataExt;

use super::image::Qcow2;
use super::refblock;
use super::words::{each_word, is_hole};

impl Qcow2 {
    /// How far from a host offset of this image's data on, at most `max` bytes, it has been written or is a
    /// hole, and whether it has been written. Only files that clearly take less space than they are long are
    /// looked at.
    pub(crate) fn written(&self, host: u64, max: u64) -> (u64, bool) {
        if *self
            .sparse
            .get_or_init(|| self.find_sparse().unwrap_or(false))
        {
            self.storage().extent(host, max)
        } else {
            (max, true)
        }
    }

    /// Whether clearly more clusters are in use than the file has space for. QEMU asks the same, so both tell the
    /// same of an image. `None`: it cannot be told.
    fn find_sparse(&self) -> Option<bool> {
        let geometry = self.geometry();
        let file = self.storage().host_file().filter(|_| !geometry.data_file)?;
        let taken = file.file().metadata().ok()?.blocks().saturating_mul(512) / geometry.cluster();
        let enough = (taken.saturating_mul(10) / 9).max(taken.saturating_add(2));
        let (table, clusters) = {
            let meta = self.lock();
            (meta.header.reftable_offset, meta.header.reftable_clusters)
        };
        let all = geometry.clusters(self.storage().len().ok()?);
        let blocks = all.div_ceil(1 << geometry.refblock_bits());
        let len = (u64::from(clusters) * geometry.cluster()).min(blocks * 8);
        let mut offsets = Vec::new();
        let listed = each_word(self.storage(), table, len, io::Error::from, |_, entry| {
            offsets.push(entry & !511);
            Ok(())
        });
        listed.ok()?;
        // A block that counts for several is looked at once.
        offsets.sort_unstable();
        offsets.dedup();
        let mut used = 0;
        for offset in offsets {
            if offset == 0 || is_hole(self.storage(), offset, geometry.cluster()) {
                continue;
            }
            let mut block = vec![0; usize::try_from(geometry.cluster()).ok()?];
            self.storage().read_at(&mut block, offset).ok()?;
            let order = geometry.refcount_order;
            for index in 0..refblock::capacity(block.len(), order) {
                used += u64::from(refblock::get(&block, index, order) != 0);
            }
            if used >= enough {
                return Some(true);
            }
        }
        Some(false)
    }
}
