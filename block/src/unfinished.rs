//! The mark of an image into which images above it are being merged.
//!
//! Until such a merge has ended, the image by itself shows some of what it held and some of what they hold. It shows one instant only
//! where the topmost of them lies on it, which hides the difference; the mark names that. The mark is written before the
//! first change and taken away when all is there. It is a header extension of a type of its own, which other programs keep and pass
//! over. What has no extensions, a raw image, has no mark, nor has an image whose first cluster has no room for it.

use std::path::Path;

use crate::ops::ImageInfo;
use crate::qcow2::ChangeError;
use crate::qcow2::Qcow2;
use crate::qcow2::extension::UnknownExtension;
use crate::qcow2::header::Header;
use crate::qcow2::session::Part;
use crate::raw::OpenError;

/// The type of the extension.
const KIND: u32 = 0x5652_6d67;

/// The longest name, in bytes; what is longer is cut off. With it, a header without the chain's names still fits into the sector that is
/// written at once.
const NAME_MAX: usize = 96;

/// The name of an image, as it is in marks: its last part, without what a terminal or a shell would act on.
pub(crate) fn name_of(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default();
    plain(name.as_encoded_bytes())
}

fn plain(bytes: &[u8]) -> String {
    let harmless = |byte: &u8| byte.is_ascii_alphanumeric() || b"._-+,:@%".contains(byte);
    let bytes = bytes.iter().take(NAME_MAX);
    bytes
        .map(|byte| char::from(if harmless(byte) { *byte } else { b'?' }))
        .collect()
}

impl Header {
    /// The topmost image of a merge into this one that has not ended.
    pub(crate) fn unfinished(&self) -> Option<String> {
        let mark = self.unknown_extensions.iter().find(|e| e.kind == KIND)?;
        Some(plain(&mark.data))
    }

    /// With this mark, or without one.
    fn marked(mut self, top: Option<&str>) -> Self {
        self.unknown_extensions.retain(|other| other.kind != KIND);
        self.unknown_extensions
            .extend(top.map(|top| UnknownExtension {
                kind: KIND,
                data: top.bytes().take(NAME_MAX).collect(),
            }));
        self
    }

    /// The mark alone, of all extensions that are not of the format.
    pub(crate) fn mark(&self) -> Vec<UnknownExtension> {
        let all = self.unknown_extensions.iter();
        all.filter(|other| other.kind == KIND).cloned().collect()
    }
}

impl Qcow2 {
    /// Marks the image, or takes the mark away, durably. Requests may be under way.
    ///
    /// # Errors
    ///
    /// [`ChangeError`]; the image is as it was then.
    pub(crate) fn mark_unfinished(&self, top: Option<&str>) -> Result<(), ChangeError> {
        let mut session = self.session()?;
        if session.meta.header.unfinished().as_deref() == top {
            return Ok(());
        }
        let header = session.meta.header.clone().marked(top);
        if header.encode().is_err() {
            tracing::warn!("the first cluster of the image has no room for the mark of a merge");
            return Ok(());
        }
        session.switch(header, Part::Whole)?;
        session.finish();
        Ok(())
    }
}

/// The images of a chain, as they are looked at one after the other from the topmost on.
#[derive(Debug, Default)]
pub(crate) struct Seen(Vec<String>);

impl Seen {
    /// The next one is at `path`, and has this mark.
    ///
    /// # Errors
    ///
    /// [`OpenError::Unfinished`]: what would make it whole does not lie on it.
    pub(crate) fn next(&mut self, path: &Path, mark: Option<String>) -> Result<(), OpenError> {
        if let Some(top) = mark.filter(|top| !self.0.contains(top)) {
            return Err(OpenError::Unfinished {
                path: path.to_owned(),
                top,
            });
        }
        self.0.push(name_of(path));
        Ok(())
    }
}

/// Refuses a chain, given from the topmost image on, that does not show one instant.
///
/// # Errors
///
/// [`OpenError::Unfinished`].
pub(crate) fn check<'a>(images: impl IntoIterator<Item = &'a ImageInfo>) -> Result<(), OpenError> {
    let mut seen = Seen::default();
    for image in images {
        seen.next(&image.path, image.unfinished.clone())?;
    }
    Ok(())
}

/// The mark of `base` while `images` from `top` on are merged into it; `None`: a merge that begins further up has to end first, and its mark
/// stays.
///
/// # Errors
///
/// [`OpenError::Unfinished`]: the images that would go make one whole that stays.
pub(crate) fn of_merge(
    images: &[ImageInfo],
    (top, base): (usize, usize),
) -> Result<Option<String>, OpenError> {
    check(images)?;
    let (above, from) = images.split_at_checked(top).unwrap_or_default();
    let below = from.get(base.saturating_sub(top)..).unwrap_or_default();
    let mut seen = Seen::default();
    for image in above {
        seen.next(&image.path, image.unfinished.clone())?;
    }
    let kept = match below.first().and_then(|base| base.unfinished.as_ref()) {
        Some(mark) => seen.0.contains(mark),
        None => false,
    };
    for (depth, image) in below.iter().enumerate() {
        seen.next(&image.path, image.unfinished.clone().filter(|_| depth > 0))?;
    }
    let top = from.first().map(|top| name_of(&top.path));
    Ok(top.filter(|_| !kept))
}

/// From which image a merge has not ended that leaves the disk of this chain a mixture of two times. The chain is given from its topmost image on.
#[must_use]
pub fn unfinished_in(images: &[ImageInfo]) -> Option<String> {
    match check(images) {
        Err(OpenError::Unfinished { top, .. }) => Some(top),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use super::*;
    use crate::ops::{Commit, CommitError, Control, OpError, commit};
    use crate::qcow2::testing::Bench;
    use crate::testing::AnyPath;
    use crate::{DiskOptions, Format, ImageOptions, open_disk};

    #[test]
    fn a_commit_that_is_interrupted_leaves_a_mark_and_one_that_ends_takes_it_away() {
        let Some(bench) = Bench::with_qemu() else {
            return;
        };
        for (name, below) in [("base", ""), ("middle", "base"), ("top", "middle")] {
            let below = match below {
                "" => String::new(),
                below => format!("-F qcow2 -b {below}"),
            };
            bench.line(&format!("qemu-img create -q -f qcow2 {below} {name} 1M"));
        }
        let options = ImageOptions {
            disk: DiskOptions {
                format: Some(Format::Qcow2),
                ..DiskOptions::default()
            },
            ..ImageOptions::default()
        };
        let run = |name: &str, base: &str, cancel: bool| {
            let (path, base) = (bench.path(name), bench.path(base));
            let how = Commit {
                path: &path,
                options: &options,
                base: Some(&base),
                keep: false,
                threads: 1,
                rate: None,
            };
            let control = Control {
                progress: &|_, _| {},
                cancel: &AtomicBool::new(cancel),
            };
            commit(&how, &AnyPath, &control)
        };
        let opens = |name: &str| open_disk(&bench.path(name), &AnyPath, &options).map(drop);
        let cancelled = run("top", "base", true).unwrap_err();
        let CommitError::Copy { source, .. } = cancelled else {
            panic!("{cancelled}");
        };
        assert!(matches!(source, OpError::Cancelled), "{source}");
        let said = opens("base").unwrap_err().to_string();
        assert!(said.contains("top was being merged into it"), "{said}");
        // It may be the one that was called so.
        opens("middle").unwrap();
        opens("top").unwrap();
        // What would leave it a mixture is not begun, and others keep the mark.
        assert!(matches!(
            run("middle", "base", false),
            Err(CommitError::Open(_))
        ));
        bench.line("qemu-img amend -f qcow2 -o lazy_refcounts=on base");
        assert!(opens("base").is_err());
        run("top", "base", false).unwrap();
        opens("base").unwrap();
    }

    #[test]
    fn a_mark_shows_nothing_that_a_terminal_acts_on_and_is_compared_by_name() {
        let path = Path::new("/x/\u{1b}[2Jname");
        let name = name_of(path);
        assert_eq!(name, "??2Jname");
        let mut seen = Seen::default();
        seen.next(path, None).unwrap();
        seen.next(Path::new("/y/base"), Some(name)).unwrap();
        let wrong = seen.next(Path::new("/y/c"), Some("other".to_owned()));
        assert!(matches!(wrong, Err(OpenError::Unfinished { .. })));
    }
}
