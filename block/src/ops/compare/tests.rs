use std::io::Write as _;
use std::sync::Arc;

use super::*;
use crate::testing::AnyPath;
use crate::{Format, ImageOptions, open_image};

fn raw(bytes: &[u8]) -> (tempfile::NamedTempFile, Arc<dyn Image>) {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    let mut options = ImageOptions::default();
    options.disk.format = Some(Format::Raw);
    options.disk.read_only = true;
    options.any_size = true;
    let image = open_image(file.path(), &AnyPath, &options).unwrap();
    (file, image)
}

#[track_caller]
fn check(a: &[u8], b: &[u8], strict: bool, wanted: Option<Difference>) {
    let ((_a, a), (_b, b)) = (raw(a), raw(b));
    let found = compare([&*a, &*b], strict, 4, &Control::none()).unwrap();
    assert_eq!(found, wanted);
}

#[test]
fn the_first_difference_is_found_among_many() {
    let a = vec![5; 9 << 20];
    let mut b = a.clone();
    check(&a, &b, true, None);
    for at in [8 << 20, (7 << 20) + 77, (1 << 20) - 1] {
        b[at] = 6;
        let sector = (at / 512 * 512) as u64;
        check(&a, &b, false, Some(Difference::Content(sector)));
    }
}

#[test]
fn what_one_has_more_must_be_zeros() {
    let a = vec![5; 1 << 20];
    let mut b = a.clone();
    b.resize(3 << 20, 0);
    check(&a, &b, false, None);
    check(&b, &a, false, None);
    check(&a, &b, true, Some(Difference::Size));
    b[(2 << 20) + 700] = 1;
    check(&a, &b, false, Some(Difference::Content((2 << 20) + 512)));
    check(&b, &a, false, Some(Difference::Content((2 << 20) + 512)));
}

#[test]
fn written_zeros_and_holes_differ_only_strictly() {
    let zeros = vec![0; 1 << 20];
    let (_a, a) = raw(&zeros);
    let (file, _) = raw(&[1]);
    file.as_file().set_len(0).unwrap();
    file.as_file().set_len(1 << 20).unwrap();
    let mut options = ImageOptions::default();
    options.disk.format = Some(Format::Raw);
    options.disk.read_only = true;
    let b = open_image(file.path(), &AnyPath, &options).unwrap();
    let found = |strict| compare([&*a, &*b], strict, 2, &Control::none()).unwrap();
    assert_eq!(found(false), None);
    assert_eq!(found(true), Some(Difference::Allocation(0)));
}
