//! The headers of a qcow2 image's chain, read while anybody may have the image.

use std::cell::RefCell;
use std::path::Path;
use std::sync::Arc;

use super::{
    Chain, ImageOptions, MAX_DEPTH, allowed, backing_error, backing_format, check_clusters,
    data_name, part, unusable,
};
use crate::admit::Policy;
use crate::disk::DiskInfo;
use crate::opener::Opener;
use crate::options::Format;
use crate::qcow2::disk;
use crate::qcow2::header::{self, Header};
use crate::raw::{OpenError, check_raw};
use crate::storage::Storage;

/// What the headers of a chain say of the disk.
pub(crate) struct Headers {
    /// What the disk is when it is opened with the same options.
    pub info: DiskInfo,
    /// The files that the disk writes to.
    pub written: Vec<Arc<dyn Storage>>,
}

impl Headers {
    /// Opens the files of the chain, reads their headers, and keeps those open that have data.
    ///
    /// # Errors
    ///
    /// [`OpenError`], as where the disk is opened.
    pub(crate) fn read(
        path: &Path,
        opener: &dyn Opener,
        options: &ImageOptions,
    ) -> Result<Self, OpenError> {
        let chain = Chain {
            opener,
            options,
            seen: Some(RefCell::default()),
        };
        let mut data = Vec::new();
        let write = !options.disk.read_only;
        let (size, mut written) = chain.header(path, write, 0, &mut data)?;
        let info = disk::facts(size, &data, &Policy::new(&options.disk));
        let unit = u64::from(info.logical_block);
        if !info.size.is_multiple_of(unit) {
            let (path, size) = (path.to_owned(), info.size);
            return Err(OpenError::OddDirectSize { path, size, unit });
        }
        written.retain(|_| write);
        Ok(Self { info, written })
    }
}

impl Chain<'_> {
    /// The disk's size, and the image's own files. The files with data of all images, this one first, go to `data`.
    fn header(
        &self,
        path: &Path,
        write: bool,
        depth: usize,
        data: &mut Vec<Arc<dyn Storage>>,
    ) -> Result<(u64, Vec<Arc<dyn Storage>>), OpenError> {
        if depth > MAX_DEPTH {
            let (path, depth) = (path.to_owned(), MAX_DEPTH);
            return Err(OpenError::EndlessChain { path, depth });
        }
        let storage = self.storage(path, write)?;
        let header = Header::load(&*storage).map_err(|error| unusable(path, "qcow2", error))?;
        self.judge_mark(path, &header, depth)?;
        check_clusters(path, &header, &*storage)?;
        if write && header.incompatible & header::CORRUPT != 0 {
            let path = path.to_owned();
            return Err(OpenError::Corrupt { path });
        }
        let mut own = vec![storage];
        if let Some(name) = data_name(path, &header)? {
            let other = allowed(self.options.backing, path, name)?;
            let opened = self.storage(&other, write);
            own.push(opened.map_err(|source| part(path, "data file", source))?);
        }
        data.extend(own.last().cloned());
        if let Some(name) = &header.backing {
            let format = backing_format(path, &header)?;
            let below = allowed(self.options.backing, path, name)?;
            let read = match format {
                Some(Format::Qcow2) => self
                    .header(&below, false, depth.saturating_add(1), data)
                    .map(|_| ()),
                _ => self.raw_below(&below, format.is_some(), data),
            };
            read.map_err(|source| backing_error(path, format, source))?;
        }
        Ok((header.size, own))
    }

    fn raw_below(
        &self,
        path: &Path,
        stated: bool,
        data: &mut Vec<Arc<dyn Storage>>,
    ) -> Result<(), OpenError> {
        let storage = self.storage(path, false)?;
        if let Some(file) = storage.host_file() {
            check_raw(path, file, stated)?;
        }
        data.push(storage);
        Ok(())
    }
}
