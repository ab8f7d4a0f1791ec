//! Removing an image for good.

use std::path::Path;

use crate::opener::{Access, Opener};
use crate::raw::{OpenError, open_file};

/// Removes the image at `path`, which nobody uses and which may be written to.
///
/// # Errors
///
/// [`OpenError::InUse`] where somebody uses it, and [`OpenError::NotWritable`] for one that is sealed; it stays then.
pub fn remove(path: &Path, opener: &dyn Opener) -> Result<(), OpenError> {
    let access = Access {
        write: true,
        direct: false,
    };
    // Who would open it is kept out until it is gone.
    let _held = open_file(path, opener, access, true)?;
    opener
        .remove(path)
        .map_err(|source| OpenError::NotWritable {
            path: path.to_owned(),
            source,
        })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::open::{ImageOptions, open_disk};
    use crate::options::Format;
    use crate::testing::AnyPath;

    #[test]
    fn an_image_that_somebody_reads_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        fs::write(&path, vec![0; 4096]).unwrap();
        let mut options = ImageOptions::default();
        options.disk.format = Some(Format::Raw);
        options.disk.read_only = true;
        let reader = open_disk(&path, &AnyPath, &options).unwrap();
        let refused = remove(&path, &AnyPath).unwrap_err();
        assert!(matches!(refused, OpenError::InUse { .. }), "{refused}");
        assert!(path.exists());
        drop(reader);
        remove(&path, &AnyPath).unwrap();
        assert!(!path.exists());
        let missing = remove(&path, &AnyPath).unwrap_err();
        assert!(matches!(missing, OpenError::Missing { .. }), "{missing}");
    }
}
