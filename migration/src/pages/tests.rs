use std::cell::RefCell;

use proptest::prelude::*;

use super::*;

pub(super) const MIB: u64 = 1 << 20;

/// Two ranges of RAM with a hole between them; the second ends within a chunk.
pub(super) struct Memory {
    pub low: RefCell<Vec<u8>>,
    pub high: RefCell<Vec<u8>>,
}

pub(super) const HIGH: u64 = 1 << 32;

impl Memory {
    pub fn new() -> Self {
        Self {
            low: RefCell::new(vec![0; 4 << 20]),
            high: RefCell::new(vec![0; 3 << 20]),
        }
    }

    fn at<T>(&self, address: u64, len: usize, act: impl FnOnce(&mut [u8]) -> T) -> io::Result<T> {
        let (part, start) = if address < HIGH {
            (&self.low, address)
        } else {
            (&self.high, address - HIGH)
        };
        let start = usize::try_from(start).unwrap();
        let mut part = part.borrow_mut();
        let bytes = part.get_mut(start..start + len);
        bytes
            .map(act)
            .ok_or_else(|| io::ErrorKind::InvalidInput.into())
    }
}

impl Ram for Memory {
    fn ranges(&self) -> Vec<(u64, u64)> {
        vec![(0, 4 * MIB), (HIGH, 3 * MIB)]
    }

    fn read(&self, address: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.at(address, bytes.len(), |from| bytes.copy_from_slice(from))
    }

    fn write(&self, address: u64, bytes: &[u8]) -> io::Result<()> {
        self.at(address, bytes.len(), |to| to.copy_from_slice(bytes))
    }
}

fn saved(memory: &Memory) -> (File, PageIndex) {
    let file = tempfile::tempfile().unwrap();
    let index = PageIndex::write(&file, memory, &mut |_| true).unwrap();
    (file, index)
}

fn restored(file: &File, index: &PageIndex) -> Result<Memory, PagesError> {
    let memory = Memory::new();
    let mut take = |address, bytes: &[u8]| memory.write(address, bytes);
    index.read(file, &mut take, &mut |_| true)?;
    Ok(memory)
}

fn len_of(file: &File) -> u64 {
    file.metadata().unwrap().len()
}

#[test]
fn memory_comes_back_and_zeros_are_holes() {
    let memory = Memory::new();
    memory.write(0x1ffe, b"across two pages").unwrap();
    memory.write(HIGH + 3 * MIB - 4, b"last").unwrap();
    let (file, index) = saved(&memory);
    index.check(&memory.ranges(), len_of(&file)).unwrap();
    assert_eq!((index.total(), index.data()), (7 * MIB, 3 * PAGE));
    let back = restored(&file, &index).unwrap();
    assert_eq!(back.low, memory.low);
    assert_eq!(back.high, memory.high);
    let mut mapped = [0; 4];
    file.read_exact_at(&mut mapped, 7 * MIB - 4).unwrap();
    assert_eq!(&mapped, b"last");
    let blocks = std::os::unix::fs::MetadataExt::blocks(&file.metadata().unwrap());
    assert!(blocks * 512 < MIB, "{blocks}");
}

#[test]
fn a_byte_that_has_changed_is_found_with_its_place() {
    let memory = Memory::new();
    memory.write(HIGH + 2 * MIB, &[7; 9000]).unwrap();
    let (file, index) = saved(&memory);
    file.write_all_at(b"x", 4 * MIB + 2 * MIB + 8999).unwrap();
    let error = restored(&file, &index).err().unwrap();
    assert!(
        matches!(error, PagesError::Checksum { address, .. } if address == HIGH + 2 * MIB),
        "{error}"
    );
}

#[test]
fn an_index_for_other_memory_or_another_file_is_refused() {
    let memory = Memory::new();
    memory.write(0, b"here").unwrap();
    let (file, index) = saved(&memory);
    let len = len_of(&file);
    for (ranges, len, word) in [
        (vec![(0, 4 * MIB)], len, "the machine has 0x400000"),
        (
            vec![(0, 4 * MIB), (HIGH, 4 * MIB)],
            len,
            "0x400000 bytes at 0x100000000",
        ),
        (memory.ranges(), len - 1, "the file has"),
        (memory.ranges(), len + 1, "the file has"),
    ] {
        let error = index.check(&ranges, len).unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
    }
}

#[test]
fn runs_that_overlap_touch_or_reach_out_are_refused() {
    let memory = Memory::new();
    let (file, index) = saved(&memory);
    let run = |first, count| Run { first, count };
    for (region, chunk, runs) in [
        (0, 0, vec![run(0, 0)]),
        (0, 0, vec![run(0, 513)]),
        (0, 0, vec![run(511, 2)]),
        (0, 0, vec![run(u16::MAX, u16::MAX)]),
        (0, 1, vec![run(4, 4), run(6, 1)]),
        (0, 1, vec![run(4, 4), run(8, 1)]),
        (0, 1, vec![run(4, 4), run(0, 1)]),
        // The last chunk has half as many pages.
        (1, 1, vec![run(256, 1)]),
    ] {
        let mut damaged = index.clone();
        damaged.regions[region].chunks[chunk].runs = runs.clone();
        let error = damaged.check(&memory.ranges(), len_of(&file));
        assert!(error.is_err(), "{runs:?}");
    }
    for (runs, kept, fine) in [
        (vec![run(0, 4)], vec![run(4, 508)], true),
        (vec![run(2, 2), run(9, 1)], vec![run(0, 2), run(4, 5)], true),
        (vec![run(0, 4)], vec![run(3, 1)], false),
        (vec![run(8, 1)], vec![run(0, 9)], false),
        (vec![], vec![run(511, 2)], false),
        (vec![], vec![run(0, 1), run(1, 1)], false),
    ] {
        let mut damaged = index.clone();
        let chunk = &mut damaged.regions[0].chunks[1];
        (chunk.runs, chunk.kept) = (runs, kept);
        let checked = damaged.check(&memory.ranges(), len_of(&file)).is_ok();
        assert_eq!(checked, fine, "{damaged:?}");
        assert!(!damaged.is_whole() && index.is_whole());
    }
    let mut short = index.clone();
    short.regions[0].chunks.pop();
    assert!(short.check(&memory.ranges(), len_of(&file)).is_err());
}

#[test]
fn no_index_is_longer_than_the_longest() {
    let memory = Memory::new();
    for page in (0..7 * MIB / PAGE).step_by(2) {
        let address = page * PAGE;
        let address = address.checked_sub(4 * MIB).map_or(address, |at| HIGH + at);
        memory.write(address, &[1]).unwrap();
    }
    let (_, mut index) = saved(&memory);
    for chunk in index.regions.iter_mut().flat_map(|r| &mut r.chunks) {
        let kept = |run: &Run| Run {
            first: run.first + 1,
            count: 1,
        };
        chunk.kept = chunk.runs.iter().map(kept).collect();
    }
    let len = crate::Section::encode("memory", &index).unwrap().body.len() as u64;
    let longest = PageIndex::longest(&memory.ranges());
    assert!(len <= longest && longest < 4 * len, "{len} {longest}");
}

#[test]
fn a_save_or_load_that_is_cancelled_or_has_no_room_says_so() {
    let memory = Memory::new();
    memory.write(0, b"here").unwrap();
    let file = tempfile::tempfile().unwrap();
    let cancelled = PageIndex::write(&file, &memory, &mut |done| done < 2 * MIB);
    assert!(matches!(cancelled, Err(PagesError::Cancelled)));
    let full = File::options().write(true).open("/dev/full").unwrap();
    let failed = PageIndex::write(&full, &memory, &mut |_| true);
    assert!(matches!(failed, Err(PagesError::Write { offset: 0, .. })));
    let (file, index) = saved(&memory);
    let cancelled = index.read(&file, &mut |_, _| Ok(()), &mut |_| false);
    assert!(matches!(cancelled, Err(PagesError::Cancelled)));
    file.set_len(0).unwrap();
    let short = index.read(&file, &mut |_, _| Ok(()), &mut |_| true);
    assert!(matches!(short, Err(PagesError::Read { offset: 0, .. })));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn whatever_is_written_comes_back(writes in prop::collection::vec(
        (0_u64..7 * MIB - 5000, 1_usize..5000, 1_u8..), 0..24,
    )) {
        let memory = Memory::new();
        for (at, len, byte) in writes {
            let (address, room) = match at.checked_sub(4 * MIB) {
                None => (at, 4 * MIB - at),
                Some(at) => (HIGH + at, 3 * MIB - at),
            };
            let len = len.min(usize::try_from(room).unwrap());
            memory.write(address, &vec![byte; len]).unwrap();
        }
        let (file, index) = saved(&memory);
        let bytes = crate::Section::encode("memory", &index).unwrap();
        let decoded: PageIndex = bytes.decode().unwrap();
        prop_assert_eq!(&decoded, &index);
        decoded.check(&memory.ranges(), len_of(&file)).unwrap();
        let back = restored(&file, &decoded).unwrap();
        prop_assert!(back.low == memory.low && back.high == memory.high);
    }
}

#[test]
fn bytes_where_no_page_was_written_are_found_before_they_are_mapped() {
    let memory = Memory::new();
    memory.write(0x1000, &[7; 4096]).unwrap();
    memory.write(HIGH + 2 * MIB, &[7; 9000]).unwrap();
    let (file, index) = saved(&memory);
    let check = || index.check_zeros(&file, &mut |_| true);
    check().unwrap();
    for (at, wanted) in [
        (0xfff, 0),
        (0x2000, 0x2000),
        (3 * MIB + 5, 3 * MIB),
        (6 * MIB + 3 * PAGE, HIGH + 2 * MIB + 3 * PAGE),
        (7 * MIB - 1, HIGH + 3 * MIB - PAGE),
    ] {
        file.write_all_at(b"x", at).unwrap();
        assert!(restored(&file, &index).is_ok(), "nobody reads them");
        let error = check().unwrap_err();
        assert!(
            matches!(error, PagesError::NotZeros { address } if address == wanted),
            "{error}"
        );
        file.write_all_at(&[0], at).unwrap();
    }
    check().unwrap();
}
