//! The layer in the middle of three goes, in which clusters are zeros: down into the one below it, and up into the one above.

use super::merging::on_chain;
use super::*;
use crate::live::merge::Merged;

/// An image's cluster, in bytes.
const CLUSTER: usize = 64 << 10;

impl Guest {
    fn put(&mut self, at: usize, len: usize, byte: u8) {
        let arena = Arena::new(len);
        arena.put(0, &vec![byte; len]);
        let mut queue = self.disk.queue(1).unwrap();
        let buffers = arena.buffers(&[(0, len)]);
        perform(&mut *queue, Op::Write, at as u64, buffers).unwrap();
        self.model[at..at + len].fill(byte);
    }

    fn zero(&mut self, at: usize, len: usize, may_unmap: bool) {
        let mut queue = self.disk.queue(1).unwrap();
        let op = Op::WriteZeroes {
            len: len as u64,
            may_unmap,
        };
        perform(&mut *queue, op, at as u64, Buffers::none()).unwrap();
        self.model[at..at + len].fill(0);
    }
}

/// A guest on three images. In the middle one are clusters of zeros above data and above nothing, with a place of their own and without, alone and beside others; some of
/// them the top one hides, in part or all.
fn with_zeros(bench: &Bench, format: Format) -> Guest {
    let mut guest = on_chain(bench, format, 0, &[]);
    guest.zero(0, SIZE, true);
    guest.put(0, 12 * CLUSTER, 1);
    guest.snapshot_still(&bench.path("middle"));
    for cluster in [2, 3, 4, 20, 21] {
        guest.put(cluster * CLUSTER, CLUSTER, 2);
    }
    for (first, count, may_unmap) in [
        (1, 1, true),
        (3, 1, true),
        (4, 1, false),
        (6, 2, true),
        (9, 1, false),
        (16, 1, true),
        (20, 1, true),
        (21, 1, false),
        (30, 1, true),
    ] {
        guest.zero(first * CLUSTER, count * CLUSTER, may_unmap);
    }
    guest.snapshot_still(&bench.path("top"));
    guest.put(6 * CLUSTER + 512, 1024, 3);
    guest.put(9 * CLUSTER, CLUSTER, 3);
    guest.zero(20 * CLUSTER, CLUSTER, true);
    guest.holds_its_model();
    guest
}

impl Guest {
    /// Gets an overlay, and does nothing meanwhile.
    fn snapshot_still(&mut self, path: &Path) {
        let attached = self.overlay(path).unwrap().attach(&*self.disk).unwrap();
        self.disk = attached.disk();
        self.options = attached.options().clone();
        path.clone_into(&mut self.path);
        attached.keep().settle().unwrap();
    }
}

#[test]
fn a_layer_with_clusters_of_zeros_goes_down_or_up_and_leaves_nothing_unused() {
    for format in [Format::Raw, Format::Qcow2] {
        for down in [true, false] {
            let Some(bench) = Bench::with_qemu() else {
                return;
            };
            let mut guest = with_zeros(&bench, format);
            if down {
                let mut merge = guest.merge(Some("middle"), Some("base")).unwrap();
                guest.begin(&mut merge);
                let mut at = 0;
                while at < merge.size() {
                    at += merge.step(at).unwrap().0;
                }
                merge.name().unwrap();
                match merge.finish(&|| true).unwrap() {
                    Merged::Shorter(cut) => {
                        guest.disk = cut.disk();
                        cut.keep();
                    }
                    Merged::Base(..) => panic!("the disk's own image was not merged"),
                }
                merge.settle().unwrap();
            } else {
                let base = bench.path("base");
                let (disk, path) = (Arc::clone(&guest.disk), guest.path.clone());
                let stream = Stream::of(&*disk, &path, Some(&base), &AnyPath, &guest.options);
                let stream = stream.unwrap();
                drop(disk);
                let mut at = 0;
                while at < stream.size() {
                    at += stream.step(at).unwrap().0;
                }
                stream.name().unwrap();
                let cut = stream.finish(&guest.options, &|| true).unwrap();
                guest.disk = cut.disk();
                cut.keep();
            }
            fs::remove_file(bench.path("middle")).unwrap();
            guest.holds_its_model();
            let Guest { disk, model, .. } = guest;
            drop(disk);
            assert!(
                read_by_qemu(&bench, "top", Format::Qcow2) == model,
                "{format:?} {down}"
            );
            for (name, of) in [("base", format), ("top", Format::Qcow2)] {
                if of == Format::Qcow2 {
                    assert_eq!(bench.qemu_check(name), 0, "{name} {format:?} {down}");
                }
            }
        }
    }
}
