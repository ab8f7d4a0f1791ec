//! How large an image's file would become.

use super::{Control, OpError, Status, map};
use crate::image::{Image, Kept};
use crate::options::Format;
use crate::qcow2::ChangeError;
use crate::qcow2::create::full_size;
use crate::{CreateError, CreateOptions, Preallocation};

/// The unit of a disk's size, in bytes.
const SECTOR: u64 = 512;

/// How large a file would become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Measured {
    /// With what the source has now, in bytes.
    pub required: u64,
    /// With all of the disk written, in bytes.
    pub fully_allocated: u64,
    /// What the source's bitmaps take besides, in bytes; `None` where one side cannot have any.
    pub bitmaps: Option<u64>,
}

/// Why the size cannot be told.
#[derive(Debug, thiserror::Error)]
pub enum MeasureError {
    /// There cannot be such an image.
    #[error(transparent)]
    Create(#[from] CreateError),
    /// The source cannot be read.
    #[error(transparent)]
    Source(#[from] OpError),
    /// The bitmaps of the source cannot be read.
    #[error(transparent)]
    Bitmaps(#[from] ChangeError),
}

/// Tells how large the file of a new image would become: of a `source` when it is copied into it (its whole chain,
/// or its topmost image alone if the new image has a backing file), otherwise of an empty disk. The disk's size is
/// the source's, or `options.size` without one.
///
/// # Errors
///
/// [`MeasureError`].
pub fn measure(
    source: Option<&dyn Image>,
    format: Format,
    options: &CreateOptions,
    control: &Control<'_>,
) -> Result<Measured, MeasureError> {
    let mut options = options.clone();
    if let Some(source) = source {
        options.size = source.size();
    }
    let size = options.size.div_ceil(SECTOR).saturating_mul(SECTOR);
    if format == Format::Raw {
        return Ok(Measured {
            required: size,
            fully_allocated: size,
            bitmaps: None,
        });
    }
    let fully_allocated = full_size(&options)?;
    let cluster = options.cluster_size;
    let disk = size.div_ceil(cluster).saturating_mul(cluster);
    let data = match (options.preallocation, source) {
        (Preallocation::Falloc | Preallocation::Full, _) => disk,
        (_, None) => 0,
        (_, Some(source)) => {
            let clusters = data_clusters(source, cluster, options.backing.is_some(), control)?;
            clusters.saturating_mul(cluster).min(disk)
        }
    };
    let data = if options.data_file.is_some() { 0 } else { data };
    Ok(Measured {
        required: fully_allocated.saturating_sub(disk).saturating_add(data),
        fully_allocated,
        bitmaps: bitmaps_size(source, &options)?,
    })
}

/// What copies of the source's bitmaps would take.
fn bitmaps_size(
    source: Option<&dyn Image>,
    options: &CreateOptions,
) -> Result<Option<u64>, MeasureError> {
    let source = source.and_then(Image::as_qcow2);
    let Some(source) = source.filter(|it| it.geometry().version >= 3 && options.version >= 3)
    else {
        return Ok(None);
    };
    let cluster = options.cluster_size;
    let whole = |len: u64| len.div_ceil(cluster).saturating_mul(cluster);
    let (mut directory, mut all) = (0_u64, 0_u64);
    for bitmap in source.list_bitmaps()? {
        let bits = source.disk_size().div_ceil(1 << bitmap.granularity_bits);
        let clusters = whole(bits.div_ceil(8)) / cluster;
        let table = whole(clusters.saturating_mul(8));
        all = all
            .saturating_add(clusters.saturating_mul(cluster))
            .saturating_add(table);
        directory = directory.saturating_add(bitmap.entry_len());
    }
    Ok(Some(all.saturating_add(whole(directory))))
}

/// How many clusters of the target would hold data of the source.
fn data_clusters(
    source: &dyn Image,
    cluster: u64,
    topmost: bool,
    control: &Control<'_>,
) -> Result<u64, OpError> {
    let (mut clusters, mut counted_to) = (0, 0);
    let mut count = |start: u64, len: u64| {
        let first = (start / cluster).max(counted_to);
        let end = (start + len).div_ceil(cluster);
        clusters += end.saturating_sub(first);
        counted_to = counted_to.max(end);
    };
    if !topmost {
        map(source, 0..source.size(), control, |found: Status| {
            if found.data && !found.zero {
                count(found.start, found.len);
            }
        })?;
        return Ok(clusters);
    }
    let mut at = 0;
    while at < source.size() {
        control.go_on()?;
        let extent = source
            .extent(at, source.size() - at)
            .map_err(|source| OpError::Status { offset: at, source })?;
        if matches!(extent.kept, Kept::Data { .. }) {
            count(at, extent.len);
        }
        at += extent.len;
    }
    Ok(clusters)
}
