//! Images that lie: whatever the bytes are, operations end with success or an error, and the host's memory is safe.
//!
//! `QCOW2_MUTANTS` says how many images are tried.

use std::path::Path;

use block::{Image, open_image};

use crate::support::{AnyPath, Rng, options, qemu_img, qemu_io};

/// Images with something of everything in them.
fn originals(directory: &Path) -> Vec<Vec<u8>> {
    let shapes = [
        ("cluster_size=512", "512k"),
        ("cluster_size=4096,refcount_bits=1", "3m"),
        ("cluster_size=1024,compat=0.10", "1m"),
        ("cluster_size=16k,extended_l2=on", "2m"),
        (
            "cluster_size=512,refcount_bits=64,compression_type=zstd",
            "256k",
        ),
    ];
    let mut images = Vec::new();
    for (shape, size) in shapes {
        qemu_img(
            directory,
            &["create", "-q", "-f", "qcow2", "-o", shape, "image", size],
        );
        let commands = [
            "write -P 1 0 20k",
            "write -c -P 2 32k 16k",
            "write -z 64k 16k",
        ];
        qemu_io(directory, "image", &commands.map(str::to_owned));
        if !shape.contains("refcount_bits=1,") && !shape.ends_with("refcount_bits=1") {
            qemu_img(directory, &["snapshot", "-c", "one", "image"]);
        }
        if !shape.contains("compat=0.10") {
            qemu_img(
                directory,
                &["bitmap", "--add", "-f", "qcow2", "image", "bits"],
            );
        }
        qemu_io(directory, "image", &["write -P 3 4k 30k".to_owned()]);
        images.push(std::fs::read(directory.join("image")).unwrap());
    }
    images
}

/// Changes some words, most of them where they matter.
fn mutate(rng: &mut Rng, image: &mut Vec<u8>) {
    let len = image.len() as u64;
    for _ in 0..1 + rng.below(4) {
        let at = match rng.below(4) {
            0 => rng.below(112),
            1 => rng.below(len.min(4096)) & !7,
            _ => rng.below(len - 8) & !7,
        } as usize;
        let old = u64::from_be_bytes(image[at..at + 8].try_into().unwrap());
        let new = match rng.below(8) {
            0 => 0,
            1 => u64::MAX,
            2 => old ^ 1 << rng.below(64),
            3 => rng.next(),
            4 => rng.below(len / 512 + 4) * 512,
            5 => 1 << 63 | (rng.below(len / 512) * 512),
            6 => 1 << 62 | rng.next() >> 3,
            _ => old.wrapping_add(rng.below(1024)).wrapping_sub(512),
        };
        image[at..at + 8].copy_from_slice(&new.to_be_bytes());
    }
    if rng.below(20) == 0 {
        image.truncate(rng.below(len) as usize);
    }
}

/// Uses an image in every way.
fn exercise(path: &Path, rng: &mut Rng) {
    let Ok(image) = open_image(path, &AnyPath, &options()) else {
        let mut readable = options();
        readable.disk.read_only = true;
        if let Ok(image) = open_image(path, &AnyPath, &readable) {
            look(&*image, rng);
        }
        return;
    };
    look(&*image, rng);
    for _ in 0..6 {
        let size = image.size();
        let offset = rng.below(size.max(1)).min(rng.next() >> rng.below(64));
        let len = (1 + rng.below(20_000)).min(size.saturating_sub(offset));
        // Errors are as good an answer as success here.
        let _ = match rng.below(5) {
            0 | 1 => image.write(offset, &vec![7; len as usize]),
            2 => image.write_zeroes(offset, len, true),
            3 => image.discard(offset, len),
            _ => image.flush(),
        };
    }
    look(&*image, rng);
}

fn look(image: &dyn Image, rng: &mut Rng) {
    let size = image.size();
    for _ in 0..3 {
        let offset = rng.below(size.max(1)).min(rng.next() >> rng.below(64));
        let len = 30_000.min(size.saturating_sub(offset));
        let _ = image.read(offset, &mut vec![0; len as usize]);
        if len > 0 {
            let _ = image.extent(offset, len);
        }
    }
}

#[test]
fn mutated_images_end_in_success_or_an_error() {
    let directory = tempfile::tempdir().unwrap();
    let originals = originals(directory.path());
    let count = std::env::var("QCOW2_MUTANTS").map_or(1500, |text| text.parse().unwrap());
    for seed in 0..count {
        let mut rng = Rng::new(seed + 77);
        let mut bytes = rng.pick(&originals).clone();
        mutate(&mut rng, &mut bytes);
        let path = directory.path().join("mutant");
        std::fs::write(&path, &bytes).unwrap();
        let done = std::panic::catch_unwind(|| exercise(&path, &mut rng.clone()));
        if done.is_err() {
            let kept = std::env::temp_dir().join(format!("qcow2-mutant-{seed}"));
            std::fs::write(&kept, &bytes).unwrap();
            panic!("mutant {seed} did it; kept as {}", kept.display());
        }
    }
}
