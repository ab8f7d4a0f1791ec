//! Power cuts while a header is rewritten.

use super::changes::cut;
use super::crash::Rng;
use super::memory::{Event, Memory};
use crate::qcow2::extension::BitmapsExtension;
use crate::qcow2::header::{BITMAPS, Header};
use crate::qcow2::testing::Bench;

/// The header with another backing file, and a bitmap directory more or less.
fn changed(old: &Header, round: u64) -> Header {
    let mut new = old.clone();
    let len = usize::try_from(1 + round * 37 % 900).unwrap();
    new.backing = Some("b".repeat(len).into());
    new.backing_format = Some(
        if round.is_multiple_of(3) {
            "raw"
        } else {
            "qcow2"
        }
        .into(),
    );
    new.bitmaps = None;
    new.autoclear &= !BITMAPS;
    if round.is_multiple_of(2) {
        new.autoclear |= BITMAPS;
        new.bitmaps = Some(BitmapsExtension {
            count: 1,
            reserved: 0,
            directory_size: 32,
            directory_offset: (1 + round) << new.cluster_bits,
        });
    }
    new
}

/// What must be one or the other.
fn essence(header: &Header) -> (u64, Option<std::ffi::OsString>, Option<String>) {
    let (name, format) = (header.backing.clone(), header.backing_format.clone());
    (header.l1_offset, name, format)
}

#[test]
fn a_header_that_is_rewritten_is_the_old_one_or_the_new_one() {
    let Some(bench) = Bench::with_qemu() else {
        return;
    };
    let options = "backing_file=base,backing_fmt=qcow2,cluster_size=4096";
    bench.line(&format!(
        "qemu-img create -q -u -f qcow2 -o {options} image 64M"
    ));
    let mut bytes = std::fs::read(bench.path("image")).unwrap();
    let mut rng = Rng(5);
    for round in 1..40 {
        let storage = Memory::new(bytes.clone());
        let old = Header::load(&*storage).unwrap();
        let new = changed(&old, round);
        new.store(&*storage).unwrap();
        let mut durable = bytes;
        let mut pending: Vec<Event> = Vec::new();
        for event in storage.log() {
            let is_sync = matches!(event, Event::Sync);
            pending.push(event);
            for _ in 0..20 {
                let left = Memory::new(cut(&durable, &pending, false, &mut rng));
                let found = Header::load(&*left).unwrap();
                let known = [essence(&old), essence(&new)].contains(&essence(&found));
                assert!(known, "round {round}: {found:?}");
                let bitmaps = found.consistent_bitmaps();
                let known = [None, old.consistent_bitmaps(), new.consistent_bitmaps()];
                assert!(known.contains(&bitmaps), "round {round}: {bitmaps:?}");
            }
            if is_sync {
                pending
                    .drain(..)
                    .for_each(|event| event.apply_to(&mut durable));
            }
        }
        assert!(Header::load(&*storage).unwrap() == new, "round {round}");
        bytes = storage.bytes();
    }
}
