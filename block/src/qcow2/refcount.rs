//! Refcounts: how many references a host cluster has ("Host cluster management").

use std::io;

use super::meta::{Meta, TableMove, Unlinked};
use super::pages::{Page, Stage};

/// The most bytes of a refcount table, as in QEMU.
const MAX_REFTABLE: u64 = 8 << 20;

impl Meta {
    fn refcount_width(&self) -> u32 {
        1 << self.geometry.refcount_order
    }

    /// Where a cluster's refcount is: index in the refcount table, page within the block, bit within the page.
    fn refcount_place(&self, cluster: u64) -> (usize, u64, usize) {
        let bits = self.geometry.refblock_bits();
        let bit = (cluster & ((1 << bits) - 1)) << self.geometry.refcount_order;
        let byte = bit / 8;
        let page = byte & !(self.pages.size() - 1);
        (
            usize::try_from(cluster >> bits).unwrap_or(usize::MAX),
            page,
            usize::try_from(bit - page * 8).unwrap_or(0),
        )
    }

    /// A cluster's refcount; 0 where no block counts it.
    pub(crate) fn refcount(&mut self, cluster: u64) -> io::Result<u64> {
        let (index, page, bit) = self.refcount_place(cluster);
        let Some(block) = self.refblock(index)? else {
            return Ok(0);
        };
        let page = self.page(block + page, true)?;
        Ok(page.map_or(0, |page| page.refcount(bit, self.refcount_width())))
    }

    /// Sets the refcount of a cluster that a block counts.
    pub(crate) fn set_refcount(&mut self, cluster: u64, value: u64) -> io::Result<()> {
        let (index, page, bit) = self.refcount_place(cluster);
        let Some(block) = self.refblock(index)? else {
            return Err(self.corrupt(format!("cluster {cluster} is in use and has no refcount")));
        };
        let at = block + page;
        if let Some(page) = self.page(at, true)? {
            page.set_refcount(bit, self.refcount_width(), value);
            self.pages.mark(at, Stage::Early);
            self.soil();
        }
        Ok(())
    }

    /// One more reference to a cluster that has some.
    ///
    /// # Errors
    ///
    /// `InvalidInput` when the refcount is at its largest.
    pub(crate) fn raise(&mut self, cluster: u64) -> io::Result<()> {
        let count = self.refcount(cluster)?;
        if count >= self.geometry.refcount_max() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("the refcount of cluster {cluster} is at its largest, {count}"),
            ));
        }
        self.set_refcount(cluster, count + 1)
    }

    /// One reference less; the result is what is left.
    pub(crate) fn lower(&mut self, cluster: u64) -> io::Result<u64> {
        match self.refcount(cluster)? {
            0 => Err(self.corrupt(format!("cluster {cluster} is freed and counts as free"))),
            count => {
                self.set_refcount(cluster, count - 1)?;
                Ok(count - 1)
            }
        }
    }

    /// Makes sure that a block counts `cluster`, which is free. `true` when a block had to be made; it then
    /// occupies the cluster at the frontier, so the caller looks for a free one anew.
    pub(crate) fn ensure_block(&mut self, cluster: u64) -> io::Result<bool> {
        let index = usize::try_from(cluster >> self.geometry.refblock_bits())
            .map_err(|_| io::ErrorKind::FileTooLarge)?;
        if index >= self.reftable.len() {
            self.grow_reftable(index)?;
            return Ok(true);
        }
        if self.refblock(index)?.is_some() {
            return Ok(false);
        }
        let at = self.frontier;
        let own = usize::try_from(at >> self.geometry.refblock_bits()).unwrap_or(usize::MAX);
        if own != index && own >= self.reftable.len() {
            self.grow_reftable(own)?;
            return Ok(true);
        }
        if own != index && self.refblock(own)?.is_none() {
            // The block that counts the frontier comes first.
            return self.ensure_block(at);
        }
        self.advance_frontier(at + 1);
        if self.metadata.contains(at) || self.refcount(at)? != 0 {
            // Counted, though past the end of the file: not this one.
            return Ok(true);
        }
        self.metadata.insert(at, at + 1);
        self.new_block(index, at);
        self.set_refcount(at, 1)?;
        Ok(true)
    }

    /// An empty refcount block in `cluster`, in memory.
    fn new_block(&mut self, index: usize, cluster: u64) {
        let offset = cluster << self.geometry.cluster_bits;
        self.new_table_pages(offset);
        if let Some(entry) = self.reftable.get_mut(index) {
            *entry = offset;
        }
        self.reftable_changed(index);
    }

    /// Empty pages for a whole cluster of a table, to be written early.
    pub(crate) fn new_table_pages(&mut self, offset: u64) {
        let size = self.pages.size();
        for page in 0..self.geometry.cluster() / size {
            let at = offset + page * size;
            let len = usize::try_from(size).unwrap_or(4096);
            self.pages.insert(at, Page::zeroed(len));
            self.pages.mark(at, Stage::Early);
        }
        self.soil();
    }

    /// Makes the refcount table of a move the image's; the clusters of the old one, which the header on disk may still lead to.
    pub(crate) fn take_reftable(&mut self, table: TableMove) -> Unlinked {
        let TableMove { to, from } = table;
        (self.header.reftable_offset, self.header.reftable_clusters) = to;
        self.reftable_move = None;
        Unlinked {
            first: from.0 >> self.geometry.cluster_bits,
            count: u64::from(from.1),
            tag: self.shared.epochs.advance(),
        }
    }

    /// Makes a refcount table that has an entry `index`, with the blocks that count it and themselves.
    fn grow_reftable(&mut self, index: usize) -> io::Result<()> {
        if self.reftable_move.is_some() {
            // The last one has not reached the disk yet; a checkpoint comes first.
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let bits = self.geometry.refblock_bits();
        let start = self.frontier.max((self.reftable.len() as u64) << bits);
        let entries_per_cluster = self.geometry.cluster() / 8;
        let (mut blocks, mut clusters) = (0_u64, 0_u64);
        // More clusters may need more blocks, and those more clusters.
        loop {
            let end = start + blocks + clusters;
            let wanted = (index as u64 + 1).max((end >> bits) + 1);
            let room = wanted + wanted / 2;
            let need_clusters = room.div_ceil(entries_per_cluster);
            let need_blocks = ((start + blocks + need_clusters) >> bits) - (start >> bits) + 1;
            if need_clusters <= clusters && need_blocks <= blocks {
                break;
            }
            clusters = clusters.max(need_clusters);
            blocks = blocks.max(need_blocks);
        }
        let bytes = clusters * self.geometry.cluster();
        if bytes > MAX_REFTABLE {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        let end = start + blocks + clusters;
        if let Some(cluster) = self.metadata.next_from(start).filter(|it| *it < end) {
            return Err(self.corrupt(format!("cluster {cluster} is used and not counted")));
        }
        let entries = usize::try_from(bytes / 8).map_err(|_| io::ErrorKind::FileTooLarge)?;
        self.reftable.resize(entries, 0);
        for block in 0..blocks {
            let index = usize::try_from((start >> bits) + block).unwrap_or(usize::MAX);
            self.new_block(index, start + block);
        }
        self.advance_frontier(end);
        self.metadata.insert(start, end);
        for cluster in start..end {
            self.set_refcount(cluster, 1)?;
        }
        self.reftable_move = Some(TableMove {
            to: (
                (start + blocks) << self.geometry.cluster_bits,
                u32::try_from(clusters).map_err(|_| io::ErrorKind::FileTooLarge)?,
            ),
            from: (self.header.reftable_offset, self.header.reftable_clusters),
        });
        Ok(())
    }
}
