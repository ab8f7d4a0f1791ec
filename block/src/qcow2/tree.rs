//! What an L1 table leads to: L2 tables and clusters, with their refcounts and COPIED bits.
//!
//! A cluster has one reference for each way that leads to it from an L1 table. So L2 tables that snapshots share count
//! for each of them, and so does what they map.

use std::collections::{HashMap, HashSet};
use std::io;
use std::sync::Arc;

use super::check::Counts;
use super::entry::{self, COPIED, L2, OFFSET};
use super::meta::{Meta, Unlinked, eio};
use super::pages::Page;
use super::session::{ChangeError, Session};
use super::snapshot_table::Snapshot;

/// A reference, from the walk over a tree.
#[derive(Debug)]
pub(crate) struct Reference<'a> {
    /// The first cluster's number.
    first: u64,
    /// How many clusters: more than one for compressed data only.
    count: u64,
    /// The L2 entry that refers to it; `None` for the reference of an L1 entry to its table.
    entry: Option<Entry<'a>>,
}

#[derive(Debug)]
struct Entry<'a> {
    page: &'a Arc<Page>,
    page_at: u64,
    word: usize,
    table: u64,
    packed: bool,
}

impl Reference<'_> {
    fn clusters(&self) -> std::ops::Range<u64> {
        self.first..self.first.saturating_add(self.count)
    }
}

impl Meta {
    /// Changes the COPIED bit of an L2 entry in memory.
    fn set_copied(&mut self, entry: &Entry<'_>, copied: bool) {
        let old = entry.page.get(entry.word);
        let new = if copied { old | COPIED } else { old & !COPIED };
        if new != old {
            entry.page.set(entry.word, new);
            self.mark_l2(entry.table, entry.page_at);
        }
    }

    /// One more reference to a cluster that must have some.
    fn raise_used(&mut self, cluster: u64) -> Result<(), ChangeError> {
        let count = self.refcount(cluster)?;
        if count == 0 {
            return Err(self
                .corrupt(format!("cluster {cluster} is in use and counts as free"))
                .into());
        }
        if count >= self.geometry.refcount_max() {
            return Err(self.full(cluster, count));
        }
        Ok(self.set_refcount(cluster, count + 1)?)
    }

    fn full(&self, cluster: u64, count: u64) -> ChangeError {
        ChangeError::RefcountFull {
            cluster,
            count,
            bits: 1 << self.geometry.refcount_order,
        }
    }

    /// One reference less to a cluster; when it was the last, the cluster is to be freed, which joins `freed`.
    fn drop_reference(
        &mut self,
        cluster: u64,
        freed: &mut Vec<Unlinked>,
        tag: u64,
    ) -> io::Result<()> {
        if self.refcount(cluster)? > 1 {
            self.lower(cluster)?;
            return Ok(());
        }
        match freed.last_mut() {
            Some(last) if last.first + last.count == cluster => last.count += 1,
            _ => freed.push(Unlinked {
                first: cluster,
                count: 1,
                tag,
            }),
        }
        Ok(())
    }
}

impl Session<'_> {
    /// Visits all references of a tree: first those of each L2 table, then that to it.
    fn walk(
        &mut self,
        l1: &[u64],
        mut visit: impl FnMut(&mut Meta, Reference<'_>) -> Result<(), ChangeError>,
    ) -> Result<(), ChangeError> {
        let geometry = self.meta.geometry;
        let size = self.meta.pages.size();
        for (index, &l1_entry) in l1.iter().enumerate() {
            let table = match entry::l1(l1_entry, &geometry) {
                Ok(None) => continue,
                Ok(Some(table)) => table,
                Err(error) => {
                    let finding = format!("L1 entry {index}: {error}");
                    return Err(self.meta.corrupt(finding).into());
                }
            };
            for page_at in
                (table..table + geometry.cluster()).step_by(usize::try_from(size).unwrap_or(4096))
            {
                let page = self.meta.table_page(page_at)?;
                self.walk_page(&page, page_at, table, &mut visit)?;
                self.make_room()?;
            }
            let reference = Reference {
                first: table >> geometry.cluster_bits,
                count: 1,
                entry: None,
            };
            visit(&mut self.meta, reference)?;
        }
        Ok(())
    }

    fn walk_page(
        &mut self,
        page: &Arc<Page>,
        page_at: u64,
        table: u64,
        visit: &mut impl FnMut(&mut Meta, Reference<'_>) -> Result<(), ChangeError>,
    ) -> Result<(), ChangeError> {
        let step = if self.meta.geometry.extended { 2 } else { 1 };
        for word in (0..page.len()).step_by(step) {
            if page.get(word) == 0 {
                continue;
            }
            // Where on the disk it is does not matter, but that may be shown.
            let entry = self.meta.l2_entry(page, word, 0)?;
            let Some((first, count)) = self.meta.held(entry) else {
                continue;
            };
            let entry = Entry {
                page,
                page_at,
                word,
                table,
                packed: matches!(entry, L2::Compressed(_)),
            };
            let reference = Reference {
                first,
                count,
                entry: Some(entry),
            };
            visit(&mut self.meta, reference)?;
        }
        Ok(())
    }

    /// Whether every refcount of a tree has room for one more reference of each kind that is there.
    pub(crate) fn check_room(&mut self, l1: &[u64]) -> Result<(), ChangeError> {
        let max = self.meta.geometry.refcount_max();
        let mut packed: HashMap<u64, u64> = HashMap::new();
        self.walk(l1, |meta, reference| {
            let several = reference.entry.as_ref().is_some_and(|entry| entry.packed);
            for cluster in reference.clusters() {
                let more = if several {
                    let more = packed.entry(cluster).or_default();
                    *more += 1;
                    *more
                } else {
                    1
                };
                let count = meta.refcount(cluster)?;
                if count > max.saturating_sub(more) {
                    return Err(meta.full(cluster, count));
                }
            }
            Ok(())
        })
    }

    /// One more reference to all that a tree refers to, and no COPIED bits in its L2 tables any more. When it fails, the
    /// references that were added are taken away again.
    pub(crate) fn raise_tree(&mut self, l1: &[u64]) -> Result<(), ChangeError> {
        let mut done = 0_u64;
        let raised = self.walk(l1, |meta, reference| {
            for cluster in reference.clusters() {
                meta.raise_used(cluster)?;
                done += 1;
            }
            match &reference.entry {
                Some(entry) if !entry.packed => meta.set_copied(entry, false),
                _ => {}
            }
            Ok(())
        });
        if raised.is_err() {
            self.lower_tree(l1, done);
        }
        raised
    }

    /// Takes the references away that [`Session::raise_tree`] added, the first `most` of them.
    pub(crate) fn lower_tree(&mut self, l1: &[u64], most: u64) {
        let mut left = most;
        let lowered = self.walk(l1, |meta, reference| {
            for cluster in reference.clusters() {
                if left == 0 {
                    break;
                }
                left -= 1;
                meta.lower(cluster)?;
            }
            Ok(())
        });
        if let Err(error) = lowered {
            tracing::warn!(%error, "clusters of a change that failed stay counted: a leak");
        }
    }

    /// Whether all that this snapshot's tree shares with the disk or with other snapshots counts that, so that none of it is
    /// freed with the tree. When it does not, the image is marked corrupt.
    pub(crate) fn check_drop(
        &mut self,
        l1: &[u64],
        others: &[Snapshot],
    ) -> Result<(), ChangeError> {
        let mut dropped = Counts::default();
        self.walk(l1, |_, reference| {
            let clusters = reference.clusters();
            clusters.for_each(|cluster| dropped.add(cluster, 1));
            Ok(())
        })?;
        let mut seen = HashSet::new();
        let mut trees = vec![self.meta.l1.clone()];
        let mut others = others.iter();
        while let Some(mut l1) = trees.pop() {
            // A table that several share is looked at once.
            for entry in &mut l1 {
                if *entry != 0 && !seen.insert(*entry & OFFSET) {
                    *entry = 0;
                }
            }
            let mut shared = None;
            self.walk(&l1, |meta, reference| {
                for cluster in reference.clusters() {
                    let less = dropped.get(cluster);
                    if less != 0 && meta.refcount(cluster)? <= less {
                        shared.get_or_insert(cluster);
                    }
                }
                Ok(())
            })?;
            if let Some(cluster) = shared {
                let finding = format!("cluster {cluster} has more uses than references");
                self.meta.corrupt(finding.clone());
                return Err(ChangeError::Corrupt(finding));
            }
            if let Some(other) = others.next() {
                trees.push(self.l1_of(other)?);
            }
        }
        Ok(())
    }

    /// Takes all references away that a tree has that nothing on disk leads to any more, and frees what that leaves unused.
    pub(crate) fn drop_tree(&mut self, l1: &[u64]) -> Result<(), ChangeError> {
        let tag = self.meta.shared.epochs.advance();
        let mut freed = Vec::new();
        let dropped = self.walk(l1, |meta, reference| {
            for cluster in reference.clusters() {
                meta.drop_reference(cluster, &mut freed, tag)?;
            }
            Ok(())
        });
        self.meta.released.extend(freed);
        self.meta.soil();
        dropped
    }

    /// Gives all entries of the active tables the COPIED bit that their refcounts say.
    pub(crate) fn refresh_copied(&mut self) -> Result<(), ChangeError> {
        let geometry = self.meta.geometry;
        for index in 0..self.meta.l1.len() {
            let Some(table) = self.meta.table(index)? else {
                continue;
            };
            let sole = self.meta.refcount(table >> geometry.cluster_bits)? == 1;
            let entry = self.meta.l1.get_mut(index).ok_or_else(eio)?;
            let new = table | if sole { COPIED } else { 0 };
            if *entry != new {
                *entry = new;
                self.meta.l1_changed(index);
            }
            self.walk(&[table], |meta, reference| {
                if let Some(entry) = reference.entry.as_ref().filter(|entry| !entry.packed) {
                    // What a shared table maps is shared.
                    let copied = sole && meta.refcount(reference.first)? == 1;
                    meta.set_copied(entry, copied);
                }
                Ok(())
            })?;
        }
        Ok(())
    }

    /// Takes the COPIED bits out of the active L1 table.
    pub(crate) fn clear_l1_copied(&mut self) {
        for index in 0..self.meta.l1.len() {
            let Some(entry) = self.meta.l1.get_mut(index) else {
                break;
            };
            if *entry & COPIED != 0 {
                *entry &= !COPIED;
                self.meta.l1_changed(index);
            }
        }
    }
}
