//! Bitmaps of images that are written here, as QEMU sees them afterwards.

use std::path::Path;

use crate::support::{marked, open, qemu_img};

/// The flags of a bitmap, as qemu-img lists them.
fn flags(directory: &Path, image: &str, name: &str) -> String {
    let text = qemu_img(directory, &["info", "--output=json", image]);
    let info: String = text.split_whitespace().collect();
    let bitmaps = info.split("\"bitmaps\":").nth(1).unwrap();
    let name = format!("\"name\":\"{name}\"");
    let bitmap = bitmaps.split('}').find(|it| it.contains(&name)).unwrap();
    let flags = bitmap.split("\"flags\":[").nth(1).unwrap();
    flags.split(']').next().unwrap().to_owned()
}

fn make(directory: &Path) {
    qemu_img(directory, &["create", "-q", "-f", "qcow2", "image", "8M"]);
    qemu_img(directory, &["bitmap", "--add", "image", "live"]);
    let words = ["bitmap", "--add", "--disable", "image", "kept"];
    qemu_img(directory, &words);
}

#[test]
fn what_is_written_is_in_the_bitmaps_that_record_and_in_no_other() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    make(directory);
    for (offset, len) in [(0_u64, 100_000_usize), (5 << 20, 1)] {
        let image = open(&directory.join("image"));
        image.write(offset, &vec![1; len]).unwrap();
        drop(image);
        assert_eq!(flags(directory, "image", "live"), "\"auto\"");
        assert_eq!(flags(directory, "image", "kept"), "");
    }
    let unit = 64 << 10;
    assert_eq!(marked(directory, "live"), [(0, 2 * unit), (5 << 20, unit)]);
    assert_eq!(marked(directory, "kept"), []);
    qemu_img(directory, &["check", "-q", "image"]);
}

#[test]
fn a_session_that_is_cut_off_leaves_a_bitmap_that_nobody_trusts() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    make(directory);
    let path = directory.join("image");
    let image = open(&path);
    let mut bytes = [0; 512];
    image.read(0, &mut bytes).unwrap();
    std::fs::copy(&path, directory.join("read")).unwrap();
    image.write(0, &[1; 512]).unwrap();
    image.flush().unwrap();
    std::fs::copy(&path, directory.join("cut")).unwrap();
    assert_eq!(flags(directory, "read", "live"), "\"auto\"");
    assert_eq!(flags(directory, "cut", "live"), "\"in-use\",\"auto\"");
    assert_eq!(flags(directory, "cut", "kept"), "");
    // It stays so, whoever writes the image next.
    let next = open(&directory.join("cut"));
    next.write(0, &[2; 512]).unwrap();
    drop(next);
    assert_eq!(flags(directory, "cut", "live"), "\"in-use\",\"auto\"");
    qemu_img(directory, &["check", "-q", "cut"]);
}
