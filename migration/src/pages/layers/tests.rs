use proptest::prelude::*;

use super::super::tests::{HIGH, MIB, Memory};
use super::super::{CHUNK, PAGE, PageSet, PageWriter, Ram};
use super::*;

/// Where page `page` of all is.
fn address(page: u64) -> u64 {
    let at = page * PAGE;
    at.checked_sub(4 * MIB).map_or(at, |at| HIGH + at)
}

const PAGES: u64 = 7 * MIB / PAGE;

/// Adds page `page` of all.
fn add(set: &mut PageSet, page: u64) {
    let (range, page) = page.checked_sub(1024).map_or((0, page), |page| (1, page));
    set.add_word(range, usize::try_from(page / 64).unwrap(), 1 << (page % 64));
}

fn layer(name: usize, memory: &Memory, changed: Option<PageSet>) -> Layer {
    layer_by(name, memory, changed, false)
}

fn layer_by(name: usize, memory: &Memory, changed: Option<PageSet>, packed: bool) -> Layer {
    let file = tempfile::tempfile().unwrap();
    let mut writer = PageWriter::new(&memory.ranges()).since(changed);
    if packed {
        writer = writer.packed().unwrap();
    }
    let index = writer.write_all(&file, memory, &mut |_| true).unwrap();
    let len = file.metadata().unwrap().len();
    index.check(&memory.ranges(), len).unwrap();
    let path = PathBuf::from(name.to_string());
    Layer { path, index, file }
}

/// Memory as `layers` has it, chunk by chunk.
fn loaded(layers: &Layers) -> Memory {
    let back = Memory::new();
    let mut take = |address, bytes: &[u8]| back.write(address, bytes);
    layers.read(&mut take, &mut |_| true).unwrap();
    back
}

/// As files that are mapped, in at most `most` pieces, and pages that are copied show it.
fn painted(layers: &Layers, most: usize) -> Memory {
    let back = Memory::new();
    let painting = layers.paint(most);
    assert!(painting.mapped.len() <= most.max(2));
    for (layer, Placed { start, len, offset }) in &painting.mapped {
        let mut bytes = vec![0; usize::try_from(*len).unwrap()];
        let file = &layers.layers()[*layer].file;
        file.read_exact_at(&mut bytes, *offset).unwrap();
        back.write(*start, &bytes).unwrap();
    }
    let mut take = |address, bytes: &[u8]| back.write(address, bytes);
    layers.copy(&painting, &mut take, &mut || true).unwrap();
    back
}

/// As one file that all of it has been written to.
fn flat(layers: &Layers) -> Memory {
    let file = tempfile::tempfile().unwrap();
    let mut writer = PageWriter::new(&layers.ranges());
    // What was there is no matter.
    let mut buffer = vec![0xaa; CHUNK_LEN];
    for number in 0..writer.count() {
        let there = layers.load(u32::try_from(number).unwrap(), &mut buffer);
        writer.put(number, &file, &buffer, &there.unwrap()).unwrap();
    }
    let index = writer.finish(&file).unwrap().unwrap();
    index
        .check(&layers.ranges(), file.metadata().unwrap().len())
        .unwrap();
    let path = PathBuf::new();
    loaded(&Layers::new(vec![Layer { path, index, file }]).unwrap())
}

fn same(a: &Memory, b: &Memory) -> bool {
    a.low == b.low && a.high == b.high
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn whatever_changes_between_snapshots_the_chain_is_memory_as_it_was_at_each(
        steps in prop::collection::vec(
            prop::collection::vec((0_u64..PAGES, 1_u64..400, 0_u8..3, any::<bool>()), 0..8),
            1..5,
        ),
        most in 1_usize..6,
        packed in any::<u8>(),
    ) {
        // Half of all chains have no file that is compressed.
        let packed = |name: usize| packed & 1 == 0 && packed >> (name % 8) & 1 == 1;
        let memory = Memory::new();
        for page in (0..PAGES).filter(|page| page % 700 < 300) {
            memory.write(address(page) + 9, &[7]).unwrap();
        }
        let mut all = vec![layer_by(0, &memory, None, packed(0))];
        for (name, writes) in steps.into_iter().enumerate() {
            let mut changed = PageSet::new(&memory.ranges());
            for (first, count, byte, sparse) in writes {
                let pages = (first..PAGES.min(first + count)).step_by(if sparse { 9 } else { 1 });
                for page in pages {
                    // Zeros are written, too.
                    memory.write(address(page), &vec![byte; 4096]).unwrap();
                    add(&mut changed, page);
                }
            }
            let count = changed.count();
            all.insert(0, layer_by(name + 1, &memory, Some(changed), packed(name + 1)));
            prop_assert_eq!(all[0].index.kept(), (PAGES - count) * PAGE);
            let layers = Layers::new(all).unwrap();
            prop_assert!(same(&loaded(&layers), &memory), "loaded");
            if !layers.is_packed() {
                prop_assert!(same(&painted(&layers, most), &memory), "painted");
                prop_assert!(same(&painted(&layers, 9), &memory), "painted in many");
            }
            prop_assert!(same(&flat(&layers), &memory), "flat");
            layers.verify(&mut |_| true).unwrap();
            let filled: Vec<u32> = layers.written().iter().map(|c| c.number).collect();
            let zeros = |at: u64| {
                let mut bytes = vec![0; usize::try_from(CHUNK.min(HIGH + 3 * MIB - at)).unwrap()];
                memory.read(at, &mut bytes).unwrap();
                bytes.iter().all(|byte| *byte == 0)
            };
            let starts = [0, CHUNK, HIGH, HIGH + CHUNK];
            let wanted = (0..4).zip(starts).filter(|(_, at)| !zeros(*at)).map(|(n, _)| n);
            // A page of one byte is of no zeros; what is filled has such.
            prop_assert_eq!(filled, wanted.collect::<Vec<u32>>());
            all = layers.all;
        }
    }
}

/// Whatever is in memory by then.
#[test]
fn a_chunk_that_is_left_zeros_has_what_the_parent_has_and_zeros_else() {
    let memory = Memory::new();
    memory.write(0, &[7; 3 * 4096]).unwrap();
    let old = layer(0, &memory, None);
    let mut changed = PageSet::new(&memory.ranges());
    add(&mut changed, 1);
    memory.write(0, &[8; 3 * 4096]).unwrap();
    let file = tempfile::tempfile().unwrap();
    let mut writer = PageWriter::new(&memory.ranges()).since(Some(changed));
    writer.leave_zeros(0);
    writer.leave_zeros(99);
    assert_eq!(writer.done(), 7 * MIB);
    let index = writer.finish(&file).unwrap().unwrap();
    index.check(&memory.ranges(), 7 * MIB).unwrap();
    let path = PathBuf::from("1");
    let layers = Layers::new(vec![Layer { path, index, file }, old]).unwrap();
    let back = loaded(&layers);
    for (page, byte) in [(0, 7), (1, 0), (2, 7), (3, 0)] {
        assert_eq!(back.low.borrow()[page * PAGE_LEN], byte, "{page}");
    }
    let file = tempfile::tempfile().unwrap();
    let mut writer = PageWriter::new(&memory.ranges());
    (0..writer.count()).for_each(|chunk| writer.leave_zeros(chunk));
    let index = writer.finish(&file).unwrap().unwrap();
    assert_eq!((index.data(), index.kept()), (0, 0));
}

#[test]
fn what_is_damaged_in_any_file_of_a_chain_is_found_and_the_file_named() {
    let memory = Memory::new();
    memory.write(HIGH, &[7; 2 * 4096]).unwrap();
    let old = layer(0, &memory, None);
    let mut changed = PageSet::new(&memory.ranges());
    add(&mut changed, 1024);
    memory.write(HIGH, &[8; 4096]).unwrap();
    let new = layer(1, &memory, Some(changed));
    // A page that the newer one replaces.
    old.file.write_all_at(b"x", 4 * MIB).unwrap();
    let layers = Layers::new(vec![new, old]).unwrap();
    let mut buffer = vec![0; CHUNK_LEN];
    for error in [
        layers.load(2, &mut buffer).unwrap_err(),
        layers.verify(&mut |_| true).unwrap_err(),
    ] {
        assert_eq!(error.path, PathBuf::from("0"));
        assert!(
            matches!(error.source, PagesError::Checksum { address: HIGH, .. }),
            "{error:?}"
        );
    }
    let [new, _] = <[Layer; 2]>::try_from(layers.all).ok().unwrap();
    assert!(Layers::new(vec![new]).is_err());
    assert!(Layers::new(Vec::new()).is_err());
}

#[test]
fn chunks_are_loaded_in_any_order_and_mapped_pieces_hold_all_that_was_written() {
    let memory = Memory::new();
    for (address, byte) in [
        (0, 1),
        (5 * PAGE, 2),
        (HIGH + 2 * MIB, 3),
        (HIGH + 3 * MIB - 1, 4),
    ] {
        memory.write(address, &[byte]).unwrap();
    }
    let layers = Layers::new(vec![layer(0, &memory, None)]).unwrap();
    let Layer { index, file, .. } = &layers.layers()[0];
    let written = layers.written();
    let numbers: Vec<_> = written.iter().map(|chunk| chunk.number).collect();
    assert_eq!(numbers, [0, 3]);
    let last = written[1].place;
    assert_eq!((last.start, last.len), (HIGH + 2 * MIB, MIB));
    let mut buffer = vec![0; CHUNK_LEN];
    assert_eq!(
        layers.load(3, &mut buffer).unwrap(),
        [0..4096, 255 * 4096..256 * 4096]
    );
    assert_eq!((buffer[0], buffer[(1 << 20) - 1]), (3, 4));
    let pages = layers.load(0, &mut buffer).unwrap();
    assert_eq!(pages, [0..4096, 5 * 4096..6 * 4096]);
    let pieces = index.filled(9);
    assert_eq!(
        pieces,
        written.iter().map(|chunk| chunk.place).collect::<Vec<_>>()
    );
    assert_eq!(index.filled(1), index.placed().collect::<Vec<_>>());
    file.write_all_at(&[9], written[1].place.offset).unwrap();
    let error = layers.load(3, &mut buffer).unwrap_err().source;
    assert!(matches!(error, PagesError::Checksum { address, .. } if address == last.start));
    file.set_len(PAGE).unwrap();
    let short = layers.load(0, &mut buffer).unwrap_err().source;
    assert!(matches!(short, PagesError::Read { .. }));
}
