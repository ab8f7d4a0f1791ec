//! Random operations, done here and by qemu-io in turn, against a model in memory.
//!
//! `QCOW2_SEQUENCES` says how many sequences are run, `QCOW2_SEED` where they begin. A failure names its seed.

use std::path::Path;
use std::sync::Arc;

use block::{Image, Preallocation};

use crate::support::{Rng, open, qemu_img, qemu_io};

const SECTOR: u64 = 512;

/// What an image is made with.
#[derive(Debug)]
struct Shape {
    size: u64,
    options: String,
    backing: bool,
    data: bool,
}

impl Shape {
    fn random(rng: &mut Rng) -> Self {
        let v2 = rng.below(5) == 0;
        let extended = !v2 && rng.below(4) == 0;
        let bits = if extended {
            14 + rng.below(8)
        } else {
            9 + rng.below(13)
        };
        let mut options = format!(
            "compat={},cluster_size={}",
            if v2 { "0.10" } else { "1.1" },
            1_u64 << bits
        );
        if !v2 {
            options += &format!(",refcount_bits={}", 1 << rng.below(7));
            if extended {
                options += ",extended_l2=on";
            }
            if rng.below(3) == 0 {
                options += ",compression_type=zstd";
            }
            if rng.below(5) == 0 {
                options += ",lazy_refcounts=on";
            }
        }
        if rng.below(6) == 0 {
            options += ",preallocation=metadata";
        }
        let mut data = false;
        if !v2 && rng.below(6) == 0 && !options.contains("preallocation") {
            data = true;
            options += ",data_file=data";
            if rng.below(2) == 0 {
                options += ",data_file_raw=on";
            }
        }
        let most = if bits < 12 { 2 << 20 } else { 16 << 20 };
        Self {
            size: (1 + rng.below(most / SECTOR)) * SECTOR,
            backing: rng.below(2) == 0
                && !options.contains("preallocation")
                && !options.contains("data_file_raw"),
            data,
            options,
        }
    }
}

/// One operation on both.
#[derive(Clone, Debug)]
enum Op {
    Write(u64, u64, u8),
    Zero(u64, u64, bool),
    Discard(u64, u64),
    Flush,
}

fn random_op(rng: &mut Rng, size: u64) -> Op {
    let sectors = size / SECTOR;
    let offset = rng.below(sectors);
    let most = *rng.pick(&[1, 8, 130, 1024, 9000]);
    let len = (1 + rng.below(most)).min(sectors - offset);
    let (offset, len) = (offset * SECTOR, len * SECTOR);
    match rng.below(10) {
        0..=4 => Op::Write(offset, len, 1 + rng.below(255) as u8),
        5 | 6 => Op::Zero(offset, len, rng.below(2) == 0),
        7 | 8 => Op::Discard(offset, len),
        _ => Op::Flush,
    }
}

fn range(offset: u64, len: u64) -> std::ops::Range<usize> {
    offset as usize..(offset + len) as usize
}

fn perform(image: &Arc<dyn Image>, op: &Op, model: &mut [u8]) {
    match *op {
        Op::Write(offset, len, byte) => {
            image.write(offset, &vec![byte; len as usize]).unwrap();
            model[range(offset, len)].fill(byte);
        }
        Op::Zero(offset, len, unmap) => {
            image.write_zeroes(offset, len, unmap).unwrap();
            model[range(offset, len)].fill(0);
        }
        Op::Discard(offset, len) => {
            image.discard(offset, len).unwrap();
            adopt(image, offset, len, model);
        }
        Op::Flush => image.flush().unwrap(),
    }
}

/// After a discard, every byte is what it was or zero.
fn adopt(image: &Arc<dyn Image>, offset: u64, len: u64, model: &mut [u8]) {
    let mut now = vec![0; len as usize];
    image.read(offset, &mut now).unwrap();
    let before = &mut model[range(offset, len)];
    for (at, (old, new)) in before.iter_mut().zip(&now).enumerate() {
        assert!(
            *new == 0 || new == old,
            "byte {at} of a discard at {offset} became {new:#x}"
        );
        *old = *new;
    }
}

fn verify(image: &Arc<dyn Image>, model: &[u8]) {
    let mut now = vec![0; model.len()];
    image.read(0, &mut now).unwrap();
    if let Some(at) = now.iter().zip(model).position(|(a, b)| a != b) {
        panic!(
            "byte {at:#x} is {:#x} and should be {:#x}",
            now[at], model[at]
        );
    }
}

fn with_qemu(directory: &Path, ops: &[Op], model: &mut [u8]) {
    let commands: Vec<String> = ops
        .iter()
        .map(|op| match *op {
            Op::Write(offset, len, byte) => {
                model[range(offset, len)].fill(byte);
                format!("write -P {byte} {offset} {len}")
            }
            Op::Zero(offset, len, unmap) => {
                model[range(offset, len)].fill(0);
                let unmap = if unmap { "-u " } else { "" };
                format!("write -z {unmap}{offset} {len}")
            }
            Op::Discard(offset, len) => format!("discard {offset} {len}"),
            Op::Flush => "flush".to_owned(),
        })
        .collect();
    qemu_io(directory, "image", &commands);
}

fn make(directory: &Path, shape: &Shape, rng: &mut Rng) -> Vec<u8> {
    let size = shape.size.to_string();
    let mut model = vec![0; shape.size as usize];
    if shape.backing {
        let below = (1 + rng.below(shape.size / SECTOR + 40)) * SECTOR;
        let format = *rng.pick(&["raw", "qcow2"]);
        let text = below.to_string();
        qemu_img(directory, &["create", "-q", "-f", format, "base", &text]);
        let half = (below / 2 / SECTOR).max(1) * SECTOR;
        let command = format!("write -P 119 0 {half}");
        crate::support::tool(
            directory,
            "qemu-io",
            &["-f", format, "-c", &command, "base"],
        )
        .unwrap();
        let hidden = (half as usize).min(model.len());
        model[..hidden].fill(119);
        qemu_img(
            directory,
            &[
                "create",
                "-q",
                "-f",
                "qcow2",
                "-b",
                "base",
                "-F",
                format,
                "-o",
                &shape.options,
                "image",
                &size,
            ],
        );
    } else {
        qemu_img(
            directory,
            &[
                "create",
                "-q",
                "-f",
                "qcow2",
                "-o",
                &shape.options,
                "image",
                &size,
            ],
        );
    }
    model
}

fn sequence(seed: u64) {
    let mut rng = Rng::new(seed);
    let mut shape = Shape::random(&mut rng);
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let mut model = make(directory, &shape, &mut rng);
    let path = directory.join("image");
    for _ in 0..2 + rng.below(3) {
        let image = open(&path);
        verify(&image, &model);
        for _ in 0..1 + rng.below(25) {
            let op = random_op(&mut rng, shape.size);
            perform(&image, &op, &mut model);
        }
        verify(&image, &model);
        drop(image);
        resize(directory, &path, &mut rng, &mut shape.size, &mut model);
        qemu_img(directory, &["check", "-q", "-f", "qcow2", "image"]);
        let ops: Vec<Op> = (0..rng.below(8))
            .map(|_| random_op(&mut rng, shape.size))
            .collect();
        if !ops.is_empty() {
            with_qemu(directory, &ops, &mut model);
            // What qemu-io's discards made of the bytes is QEMU's to say.
            qemu_img(directory, &["convert", "-O", "raw", "image", "flat"]);
            let flat = std::fs::read(directory.join("flat")).unwrap();
            for (now, model) in flat.iter().zip(&mut model) {
                assert!(*now == 0 || now == model);
                *model = *now;
            }
        }
    }
    if shape.data && shape.options.contains("raw") {
        // Whatever the tables say, the data file is the disk.
        let data = std::fs::read(directory.join("data")).unwrap();
        assert!(
            data.iter()
                .chain(std::iter::repeat(&0))
                .zip(&model)
                .all(|(a, b)| a == b)
        );
    }
    std::fs::write(directory.join("flat"), &model).unwrap();
    qemu_img(
        directory,
        &["compare", "-q", "-f", "qcow2", "-F", "raw", "image", "flat"],
    );
}

/// Now and then another size, by us or by qemu-img.
fn resize(directory: &Path, path: &Path, rng: &mut Rng, size: &mut u64, model: &mut Vec<u8>) {
    if rng.below(3) != 0 {
        return;
    }
    let grown = *size + (1 + rng.below(4000)) * SECTOR;
    let to = if rng.below(3) == 0 {
        (1 + rng.below(*size / SECTOR)) * SECTOR
    } else {
        grown
    };
    if rng.below(3) == 0 {
        let text = to.to_string();
        qemu_img(
            directory,
            &["resize", "-q", "--shrink", "-f", "qcow2", "image", &text],
        );
    } else {
        let image = open(path);
        let how = *rng.pick(&[Preallocation::Off, Preallocation::Metadata]);
        match block::ops::resize(&*image, to, how) {
            // A raw data file stays as long as it is.
            Err(error) if error.kind() == std::io::ErrorKind::Unsupported => return,
            other => other.unwrap(),
        }
        assert_eq!(image.size(), to);
    }
    *size = to;
    model.resize(to as usize, 0);
    verify(&open(path), model);
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap())
}

#[test]
fn random_sequences_read_as_the_model_and_check_clean() {
    let first = number("QCOW2_SEED", 1);
    for seed in first..first + number("QCOW2_SEQUENCES", 25) {
        if std::panic::catch_unwind(|| sequence(seed)).is_err() {
            let shape = Shape::random(&mut Rng::new(seed));
            panic!("sequence {seed} failed: {shape:?}");
        }
    }
}
