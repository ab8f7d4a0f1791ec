//! Bitmaps of images that are written here.

use crate::support::{open, qemu_img};

#[test]
fn a_bitmap_that_misses_changes_is_marked_and_one_that_is_disabled_stays() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    qemu_img(directory, &["create", "-q", "-f", "qcow2", "image", "8M"]);
    qemu_img(directory, &["bitmap", "--add", "image", "live"]);
    qemu_img(
        directory,
        &["bitmap", "--add", "--disable", "image", "kept"],
    );
    let image = open(&directory.join("image"));
    image.write(0, &[1; 100_000]).unwrap();
    drop(image);
    let text = qemu_img(directory, &["info", "--output=json", "image"]);
    let info: String = text.split_whitespace().collect();
    let bitmaps = info.split("\"bitmaps\":").nth(1).unwrap();
    let live = bitmaps.split('}').find(|b| b.contains("live")).unwrap();
    let kept = bitmaps.split('}').find(|b| b.contains("kept")).unwrap();
    assert!(live.contains("in-use"), "{live}");
    assert!(!kept.contains("in-use"), "{kept}");
    qemu_img(directory, &["check", "-q", "image"]);
}
