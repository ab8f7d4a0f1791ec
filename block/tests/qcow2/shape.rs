//! What images are made with, by us or by qemu-img.

use std::path::Path;

use block::ops::{NewImage, create};
use block::{Compression, CreateOptions, Preallocation};

use crate::support::{AnyPath, Rng, qemu_img, tool};

const SECTOR: u64 = 512;

/// What an image is made with.
#[derive(Debug)]
pub struct Shape {
    pub new: CreateOptions,
    /// We make it, not QEMU.
    ours: bool,
    backing: bool,
}

impl Shape {
    pub fn random(rng: &mut Rng) -> Self {
        let v2 = rng.below(5) == 0;
        let extended_l2 = !v2 && rng.below(4) == 0;
        let bits = if extended_l2 {
            14 + rng.below(8)
        } else {
            9 + rng.below(13)
        };
        let most = if bits < 12 { 2 << 20 } else { 16 << 20 };
        let mut new = CreateOptions {
            size: (1 + rng.below(most / SECTOR)) * SECTOR,
            cluster_size: 1 << bits,
            extended_l2,
            ..CreateOptions::default()
        };
        if v2 {
            new.version = 2;
        } else {
            new.refcount_bits = 1 << rng.below(7);
            new.lazy_refcounts = rng.below(5) == 0;
            if rng.below(3) == 0 {
                new.compression = Compression::Zstd;
            }
        }
        if rng.below(6) == 0 {
            new.preallocation = Preallocation::Metadata;
        } else if !v2 && rng.below(6) == 0 {
            new.data_file = Some("data".into());
            new.data_file_raw = rng.below(2) == 0;
        }
        let plain = new.preallocation == Preallocation::Off && !new.data_file_raw;
        Self {
            ours: rng.below(2) == 0,
            backing: plain && rng.below(2) == 0,
            new,
        }
    }

    pub fn v2(&self) -> bool {
        self.new.version == 2
    }

    pub fn has_backing(&self) -> bool {
        self.backing
    }

    pub fn has_data_file(&self) -> bool {
        self.new.data_file.is_some()
    }

    /// Refcounts are so narrow that snapshots may be refused.
    pub fn counts_few(&self) -> bool {
        self.new.refcount_bits < 16
    }

    /// In qemu-img's words.
    fn words(&self) -> String {
        let new = &self.new;
        let mut words = format!("cluster_size={}", new.cluster_size);
        if self.v2() {
            words += ",compat=0.10";
        } else {
            words += &format!(",refcount_bits={}", new.refcount_bits);
        }
        let given = [
            (new.extended_l2, ",extended_l2=on"),
            (
                new.compression == Compression::Zstd,
                ",compression_type=zstd",
            ),
            (new.lazy_refcounts, ",lazy_refcounts=on"),
            (
                new.preallocation == Preallocation::Metadata,
                ",preallocation=metadata",
            ),
            (new.data_file.is_some(), ",data_file=data"),
            (new.data_file_raw, ",data_file_raw=on"),
        ];
        let given = given.iter().filter(|(is, _)| *is);
        words + &given.map(|(_, word)| *word).collect::<String>()
    }

    /// Makes `image`, and its backing file if it has one; what it reads as.
    pub fn make(&self, directory: &Path, rng: &mut Rng) -> Vec<u8> {
        let mut model = vec![0; self.new.size as usize];
        let mut new = self.new.clone();
        let mut below = Vec::new();
        let format = *rng.pick(&["raw", "qcow2"]);
        if self.backing {
            let size = (1 + rng.below(new.size / SECTOR + 40)) * SECTOR;
            fill(directory, format, size, &mut model);
            new.backing = Some(("base".into(), Some(format.into())));
            below = vec!["-b", "base", "-F", format];
        }
        if self.ours {
            let path = directory.join("image");
            create(&path, &AnyPath, &NewImage::Qcow2(Box::new(new))).unwrap();
        } else {
            let (words, size) = (self.words(), new.size.to_string());
            let first = ["create", "-q", "-f", "qcow2", "-o", &words];
            qemu_img(directory, &[&first, &below[..], &["image", &size]].concat());
        }
        model
    }
}

/// Makes a backing file whose first half is not zero.
fn fill(directory: &Path, format: &str, size: u64, model: &mut [u8]) {
    let text = size.to_string();
    qemu_img(directory, &["create", "-q", "-f", format, "base", &text]);
    let half = (size / 2 / SECTOR).max(1) * SECTOR;
    let command = format!("write -P 119 0 {half}");
    let words = ["-f", format, "-c", &command, "base"];
    tool(directory, "qemu-io", &words).unwrap();
    let shown = model.len().min(half as usize);
    model[..shown].fill(119);
}
