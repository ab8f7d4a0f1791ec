//! Disks that are copied to another machine, and what becomes of their images there.

use super::*;
use crate::live::landing::{Landing, LandingError};
use crate::live::transfer::{Piece, Transfer};
use crate::ops::{CreateImageError, NewFile, NewImage};
use crate::{CreateOptions, Preallocation};

fn land(path: &Path) -> Result<Landing, LandingError> {
    Landing::create(path, SIZE as u64, None, opener(), &qcow2())
}

#[test]
fn an_image_that_is_not_kept_leaves_what_there_was() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("new");
    drop(land(&path).unwrap());
    assert!(!path.exists());
    let landing = land(&path).unwrap();
    landing.keep(true);
    drop(landing);
    assert!(fs::metadata(&path).unwrap().len() > 0);
    assert!(matches!(land(&path), Err(LandingError::Exists(_))));
    let empty = dir.path().join("empty");
    fs::write(&empty, b"").unwrap();
    drop(land(&empty).unwrap());
    assert_eq!(fs::read(&empty).unwrap(), b"");
}

#[test]
fn a_file_that_was_put_in_the_place_of_one_meanwhile_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["new", "empty"] {
        let path = dir.path().join(name);
        if name == "empty" {
            fs::write(&path, b"").unwrap();
        }
        let landing = land(&path).unwrap();
        let other = dir.path().join("other");
        fs::write(&other, b"somebody's").unwrap();
        fs::rename(&other, &path).unwrap();
        drop(landing);
        assert_eq!(fs::read(&path).unwrap(), b"somebody's", "{name}");
    }
}

#[test]
fn an_image_in_use_is_not_emptied_by_one_that_could_not_be_opened() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    fs::write(&path, b"").unwrap();
    let landing = land(&path).unwrap();
    let len = fs::metadata(&path).unwrap().len();
    assert!(land(&path).is_err());
    assert_eq!(fs::metadata(&path).unwrap().len(), len);
    landing.keep(true);
}

#[test]
fn what_is_not_empty_any_more_when_it_is_locked_is_not_written_to() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    fs::write(&path, b"somebody's").unwrap();
    let raw = NewImage::Raw {
        size: SIZE as u64,
        preallocation: Preallocation::Off,
    };
    let qcow2 = NewImage::Qcow2(Box::new(CreateOptions {
        size: SIZE as u64,
        ..CreateOptions::default()
    }));
    for image in [raw, qcow2] {
        let error = NewFile::begin_fresh(&path, &AnyPath, &image).err().unwrap();
        assert!(matches!(error, CreateImageError::Create { .. }), "{error}");
        assert_eq!(fs::read(&path).unwrap(), b"somebody's");
    }
}

#[test]
fn a_disk_that_is_worked_on_is_whole_there_once_its_notes_have_been_gone_through() {
    for format in [Format::Raw, Format::Qcow2] {
        let Some(bench) = Bench::with_qemu() else {
            return;
        };
        let mut guest = Guest::on(&bench, format, 7);
        guest.work(20);
        let moved = Transfer::of(
            Arc::clone(&guest.disk),
            &guest.path,
            false,
            &AnyPath,
            &guest.options,
        );
        let moved = moved.unwrap();
        guest.disk = moved.begin();
        let there = land(&bench.path("there")).unwrap();
        let copy = |range: std::ops::Range<u64>| {
            let mut at = range.start;
            while at < range.end {
                let piece = moved.piece(at..range.end).unwrap();
                match &piece {
                    Piece::Data(bytes) => there.write(at, bytes).unwrap(),
                    Piece::Zeros(len) | Piece::Below(len) => there.clear(at, *len).unwrap(),
                }
                at += piece.len();
            }
        };
        copy(0..moved.size());
        for _ in 0..5 {
            guest.work(20);
            while let Some(range) = moved.changed(0) {
                copy(range);
            }
            assert_eq!(moved.left(), 0);
        }
        there.flush().unwrap();
        let mut found = vec![0; SIZE];
        there
            .disk()
            .live()
            .unwrap()
            .source()
            .read(0, &mut found)
            .unwrap();
        assert!(found == guest.model, "{format:?}");
    }
}
