//! How large an image's file would become.

use super::{Control, OpError, Status, map};
use crate::image::{Image, Kept};
use crate::options::Format;
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
    })
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
