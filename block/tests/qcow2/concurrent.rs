//! Many threads on one image: each owns every n-th sector, so that all of them work in the same
//! clusters, and knows what its own sectors hold.

use std::path::Path;
use std::sync::Arc;

use block::Image;

use crate::support::{Rng, open, qemu_img, tool};

const SECTOR: u64 = 512;
const THREADS: u64 = 6;
const SIZE: u64 = 6 << 20;

/// One thread's work; what its sectors hold in the end.
fn work(image: &Arc<dyn Image>, own: u64, rounds: u64, start: &[u8]) -> Vec<(u64, u8)> {
    let mut rng = Rng::new(own + 1);
    let count = SIZE / SECTOR / THREADS;
    let mut held: Vec<u8> = (0..count)
        .map(|n| start[usize::try_from((n * THREADS + own) * SECTOR).unwrap()])
        .collect();
    let mut sector = [0; 512];
    for round in 0..rounds {
        // Now and then all threads are in one cluster.
        let number = if rng.below(2) == 0 {
            rng.below(count)
        } else {
            (round * 37 / 8 + rng.below(20)) % count
        };
        let offset = (number * THREADS + own) * SECTOR;
        let slot = &mut held[usize::try_from(number).unwrap()];
        match rng.below(10) {
            0..=5 => {
                *slot = 1 + (rng.next() % 255) as u8;
                image.write(offset, &[*slot; 512]).unwrap();
            }
            6 => {
                *slot = 0;
                image.write_zeroes(offset, SECTOR, true).unwrap();
            }
            7 if rng.below(8) == 0 => image.flush().unwrap(),
            _ => {
                image.read(offset, &mut sector).unwrap();
                assert!(
                    sector.iter().all(|byte| byte == slot),
                    "sector {offset:#x} of thread {own} is {:#x} and should be {slot:#x}",
                    sector[0]
                );
            }
        }
    }
    (0..count)
        .map(|n| (n * THREADS + own) * SECTOR)
        .zip(held)
        .collect()
}

fn run(directory: &Path, start: &[u8], rounds: u64) {
    let image = open(&directory.join("image"));
    let mut model = start.to_vec();
    let ends: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS)
            .map(|own| {
                let image = &image;
                scope.spawn(move || work(image, own, rounds, start))
            })
            .collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    for (offset, byte) in ends.into_iter().flatten() {
        let offset = usize::try_from(offset).unwrap();
        model[offset..offset + 512].fill(byte);
    }
    drop(image);
    qemu_img(directory, &["check", "-q", "-f", "qcow2", "image"]);
    std::fs::write(directory.join("flat"), &model).unwrap();
    qemu_img(
        directory,
        &["compare", "-q", "-f", "qcow2", "-F", "raw", "image", "flat"],
    );
}

#[test]
fn threads_in_the_same_clusters_never_see_another_s_bytes() {
    for options in [
        "cluster_size=4096",
        "cluster_size=64k",
        "cluster_size=16k,extended_l2=on",
    ] {
        let directory = tempfile::tempdir().unwrap();
        let directory = directory.path();
        let size = SIZE.to_string();
        qemu_img(
            directory,
            &["create", "-q", "-f", "qcow2", "-o", options, "image", &size],
        );
        run(directory, &vec![0; SIZE as usize], 3000);
    }
}

#[test]
fn threads_on_an_overlay_copy_from_its_backing_file_once() {
    for options in [
        "cluster_size=4096",
        "cluster_size=64k",
        "cluster_size=32k,extended_l2=on",
    ] {
        let directory = tempfile::tempdir().unwrap();
        let directory = directory.path();
        let size = SIZE.to_string();
        qemu_img(directory, &["create", "-q", "-f", "qcow2", "base", &size]);
        tool(
            directory,
            "qemu-io",
            &["-f", "qcow2", "-c", "write -P 85 0 6M", "base"],
        )
        .unwrap();
        qemu_img(
            directory,
            &[
                "create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", "-o", options, "image",
            ],
        );
        run(directory, &vec![85; SIZE as usize], 3000);
    }
}
