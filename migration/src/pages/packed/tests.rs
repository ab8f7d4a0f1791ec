use super::super::tests::{HIGH, MIB, Memory};
use super::super::{CHUNK, PAGE, PageIndex, PageWriter, Ram};
use super::*;
use crate::section::Section;
use crate::state::SavedState;

fn packed(memory: &Memory) -> (File, PageIndex) {
    let file = tempfile::tempfile().unwrap();
    let writer = PageWriter::new(&memory.ranges()).packed().unwrap();
    let index = writer.write_all(&file, memory, &mut |_| true).unwrap();
    (file, index)
}

/// Pages that compress, with holes between them, in three chunks.
fn memory() -> Memory {
    let memory = Memory::new();
    for page in (0..300_u64).filter(|page| page % 7 != 3) {
        let byte = u8::try_from(page % 200 + 1).unwrap();
        memory.write(page * PAGE, &[byte; 4096]).unwrap();
    }
    memory.write(CHUNK + 9, b"second").unwrap();
    memory.write(HIGH + 3 * MIB - 4, b"last").unwrap();
    memory
}

fn back(file: &File, index: &PageIndex) -> Result<Memory, PagesError> {
    let memory = Memory::new();
    let mut take = |address, bytes: &[u8]| memory.write(address, bytes);
    index.read(file, &mut take, &mut |_| true)?;
    Ok(memory)
}

fn len_of(file: &File) -> u64 {
    file.metadata().unwrap().len()
}

#[test]
fn what_is_compressed_comes_back_and_is_small() {
    let memory = memory();
    let (file, index) = packed(&memory);
    index.check(&memory.ranges(), len_of(&file)).unwrap();
    assert!(index.is_packed() && index.is_whole());
    assert_eq!(index.stored(), len_of(&file));
    assert!(index.stored() * 20 < index.data(), "{}", index.stored());
    let section = Section::encode("machine", &index).unwrap();
    assert_eq!(section.decode::<PageIndex>().unwrap(), index);
    let back = back(&file, &index).unwrap();
    assert!(back.low == memory.low && back.high == memory.high);
}

#[test]
fn memory_of_noise_takes_no_more_than_a_frame_may() {
    let memory = Memory::new();
    let mut seed = 1_u64;
    let mut next = || {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        seed.to_be_bytes()[0]
    };
    let noise: Vec<u8> = (0..CHUNK).map(|_| next()).collect();
    memory.write(0, &noise).unwrap();
    let (file, index) = packed(&memory);
    assert!(index.stored() > CHUNK);
    index.check(&memory.ranges(), len_of(&file)).unwrap();
    assert!(back(&file, &index).unwrap().low == memory.low);
}

#[test]
fn frames_that_lie_elsewhere_or_are_missing_or_too_long_are_refused() {
    let memory = memory();
    let (file, index) = packed(&memory);
    let len = len_of(&file);
    let frame = |offset, len| Some(Frame { offset, len });
    for (region, chunk, wrong) in [
        (0, 0, None),
        (0, 0, frame(len, 1)),
        (0, 0, frame(u64::MAX, 1)),
        (0, 0, frame(0, u32::MAX)),
        // A chunk of zeros.
        (1, 0, frame(0, 1)),
    ] {
        let mut damaged = index.clone();
        damaged.regions[region].chunks[chunk].frame = wrong;
        let refused = damaged.check(&memory.ranges(), len);
        assert!(refused.is_err(), "{wrong:?}");
    }
    // In a file that is as memory is there are none.
    let mut damaged = index.clone();
    damaged.packed = false;
    assert!(damaged.check(&memory.ranges(), 8 * MIB).is_err());
    assert!(index.check(&memory.ranges(), len - 1).is_err());
}

/// Neither one that is longer than it says, nor one that is shorter, nor one of another chunk, nor noise.
#[test]
fn frames_that_do_not_give_what_was_written_are_told_by_address() {
    let memory = memory();
    let (file, index) = packed(&memory);
    let refused = |index: &PageIndex, file: &File| back(file, index).err().unwrap();
    let long = zstd::bulk::compress(&vec![1; 1 << 30], 1).unwrap();
    let short = zstd::bulk::compress(&[1; 4096], 1).unwrap();
    for bytes in [long, short, vec![0xff; 64], Vec::new()] {
        let other = tempfile::tempfile().unwrap();
        other.write_all_at(&bytes, 0).unwrap();
        let len = u32::try_from(bytes.len()).unwrap();
        let mut damaged = index.clone();
        damaged.regions[0].chunks[0].frame = Some(Frame { offset: 0, len });
        let error = refused(&damaged, &other);
        assert!(
            matches!(error, PagesError::Frame { address: 0, .. }),
            "{error}"
        );
    }
    // Of as many bytes, and not those.
    let pages = index.regions[0].chunks[0]
        .runs
        .iter()
        .map(|run| run.bytes().len());
    let same = zstd::bulk::compress(&vec![3; pages.sum()], 1).unwrap();
    let other = tempfile::tempfile().unwrap();
    other.write_all_at(&same, 0).unwrap();
    let mut damaged = index.clone();
    let len = u32::try_from(same.len()).unwrap();
    damaged.regions[0].chunks[0].frame = Some(Frame { offset: 0, len });
    let error = refused(&damaged, &other);
    assert!(
        matches!(error, PagesError::Checksum { address: 0, .. }),
        "{error}"
    );
    file.set_len(1).unwrap();
    let error = refused(&index, &file);
    assert!(
        matches!(error, PagesError::Read { offset: 0, .. }),
        "{error}"
    );
}

/// Two ranges of 2 MiB: a page that is there and one that the parent has, and zeros.
#[test]
fn an_index_that_was_written_before_files_were_compressed_is_read() {
    const BODY: &[u8] = &[
        2, // ranges
        0, 128, 128, 128, 1, 0, 1, // from 0, 2 MiB long, at 0, one chunk
        1, 5, 1, // page 5
        1, 7, 2, // pages 7 and 8 are the parent's
        210, 9, // the checksum
        128, 128, 128, 128, 16, 128, 128, 128, 1, 128, 128, 128, 1,
        1, // from 4 GiB, 2 MiB long, at 2 MiB
        0, 0, 0,
    ];
    let section = |version, body: &[u8]| Section {
        unit: "machine".to_owned(),
        schema: PageIndex::SCHEMA.to_owned(),
        version,
        body: body.to_vec(),
    };
    let index: PageIndex = section(2, BODY).decode().unwrap();
    index
        .check(&[(0, CHUNK), (HIGH, CHUNK)], 2 * CHUNK)
        .unwrap();
    assert_eq!((index.data(), index.kept()), (PAGE, 2 * PAGE));
    assert_eq!((index.is_packed(), index.stored()), (false, PAGE));
    assert_eq!(index.regions[0].chunks[0].crc, 1234);
    for version in [1, 4] {
        assert!(section(version, BODY).decode::<PageIndex>().is_err());
    }
    for end in 0..BODY.len() {
        assert!(section(2, &BODY[..end]).decode::<PageIndex>().is_err());
    }
}
