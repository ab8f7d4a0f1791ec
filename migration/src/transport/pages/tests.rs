use super::*;
use proptest::prelude::*;
use std::sync::Mutex;

const RANGES: [(u64, u64); 2] = [(0, 64 << 12), (1 << 32, 300 << 12)];

/// Memory below and above a hole.
struct Memory(Mutex<Vec<u8>>);

impl Memory {
    fn new() -> Self {
        Self(Mutex::new(vec![0xaa; 364 << 12]))
    }

    fn at(address: u64) -> usize {
        let inside = if address < 1 << 32 {
            address
        } else {
            address - (1 << 32) + (64 << 12)
        };
        usize::try_from(inside).unwrap()
    }
}

impl PageSink for Memory {
    fn write(&self, address: u64, bytes: &[u8]) -> io::Result<()> {
        let at = Self::at(address);
        self.0.lock().unwrap()[at..at + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    fn zero(&self, address: u64, len: u64) -> io::Result<()> {
        let at = Self::at(address);
        let len = usize::try_from(len).unwrap();
        self.0.lock().unwrap()[at..at + len].fill(0);
        Ok(())
    }

    fn read(&self, address: u64, bytes: &mut [u8]) -> io::Result<()> {
        let at = Self::at(address);
        bytes.copy_from_slice(&self.0.lock().unwrap()[at..at + bytes.len()]);
        Ok(())
    }
}

fn decoder() -> Decoder {
    Decoder::new(Ranges::new(&RANGES)).unwrap()
}

type Frames = Vec<(Kind, Vec<u8>)>;

fn encode(encoder: &mut Encoder, runs: &[Run], data: &[u8]) -> (Frames, Counts) {
    let mut frames = Vec::new();
    let mut emit = |kind, parts: &[&[u8]]| {
        frames.push((kind, parts.concat()));
        Ok::<(), PagesError>(())
    };
    let counts = encoder.batch(runs, &mut data.to_vec(), &mut emit).unwrap();
    encoder.finish(&mut emit).unwrap();
    (frames, counts)
}

/// Pages of three kinds: zeros, of one byte, and of noise.
fn data(kinds: &[u8]) -> Vec<u8> {
    let mut noise = 0x9e37_79b9_u32;
    let page = |kind: &u8| -> Vec<u8> {
        let byte = |_| {
            noise = noise.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            match kind % 3 {
                0 => 0,
                1 => *kind,
                _ => noise.to_le_bytes()[3],
            }
        };
        (0..PAGE).map(byte).collect()
    };
    kinds.iter().flat_map(page).collect()
}

const RUNS: [Run; 2] = [
    Run {
        address: 62 << 12,
        pages: 2,
    },
    Run {
        address: 1 << 32,
        pages: 4,
    },
];

#[test]
fn pages_arrive_by_every_codec_as_they_were() {
    let data = data(&[0, 1, 2, 0, 0, 4]);
    for (codec, kind) in [
        (Codec::Raw, Kind::Pages),
        (Codec::Zstd, Kind::Zstd),
        (Codec::Lz4, Kind::Lz4),
    ] {
        let mut encoder = Encoder::new(codec, 0).unwrap();
        let (frames, counts) = encode(&mut encoder, &RUNS, &data);
        let kinds: Vec<Kind> = frames.iter().map(|(kind, _)| *kind).collect();
        assert_eq!(kinds, [kind, Kind::Zeros]);
        assert_eq!((counts.pages, counts.zeros), (6, 3));
        let memory = Memory::new();
        let taken = frames.iter().map(|(kind, payload)| {
            let taken = decoder().take(*kind, payload, &memory);
            taken.unwrap()
        });
        assert_eq!(taken.fold(Counts::default(), Counts::plus), counts);
        let bytes = memory.0.lock().unwrap();
        assert!(bytes[62 << 12..68 << 12] == data, "{codec:?}");
        assert!(
            bytes[..62 << 12]
                .iter()
                .chain(&bytes[68 << 12..])
                .all(|b| *b == 0xaa)
        );
    }
}

#[test]
fn noise_is_not_compressed_and_zeros_of_many_batches_are_one_run() {
    let mut encoder = Encoder::new(Codec::Zstd, 0).unwrap();
    let run = |page: u64, pages| Run {
        address: page << 12,
        pages,
    };
    let (frames, _) = encode(&mut encoder, &[run(0, 2)], &data(&[2, 5]));
    assert_eq!(frames[0].0, Kind::Pages);
    let mut none = |_, _: &[&[u8]]| -> Result<(), PagesError> { panic!("not yet") };
    encoder.zeros(run(0, 30), &mut none).unwrap();
    encoder
        .batch(&[run(30, 2)], &mut [0; 2 * PAGE], &mut none)
        .unwrap();
    let (frames, _) = encode(&mut encoder, &[], &[]);
    let (runs, _) = decode_runs(&frames[0].1, &Ranges::new(&RANGES)).unwrap();
    assert_eq!(runs, [run(0, 32)]);
}

#[test]
fn a_page_that_was_sent_before_goes_as_what_differs() {
    let mut encoder = Encoder::new(Codec::Lz4, 64 * PAGE).unwrap();
    let memory = Memory::new();
    let mut decoder = decoder();
    let mut bytes = data(&[2, 5, 8, 11, 14, 17]);
    let before = bytes.clone();
    let mut seen = Vec::new();
    for round in 0..4_u8 {
        let (frames, counts) = encode(&mut encoder, &RUNS, &bytes);
        seen.push(counts.deltas);
        for (kind, payload) in &frames {
            decoder.take(*kind, payload, &memory).unwrap();
        }
        assert!(memory.0.lock().unwrap()[62 << 12..68 << 12] == bytes);
        // One byte of each page; then two pages that are zeros; and then those are as before, which the peer has not any more.
        match round {
            0 => bytes.iter_mut().step_by(PAGE).for_each(|byte| *byte ^= 1),
            1 => bytes[..2 * PAGE].fill(0),
            _ => bytes[..2 * PAGE].copy_from_slice(&before[..2 * PAGE]),
        }
    }
    assert_eq!(seen, [0, 6, 4, 4]);
}

#[test]
fn wrong_frames_are_refused_and_memory_stays_as_it_was() {
    let run = |address, pages| encode_runs(&[Run { address, pages }]);
    let with = |mut runs: Vec<u8>, len: usize| {
        runs.extend(vec![1; len]);
        runs
    };
    let cases = [
        (Kind::Zeros, vec![], "ends within its runs"),
        (Kind::Zeros, vec![0, 0], "0 runs"),
        (Kind::Zeros, vec![0xff, 0xff], "65535 runs"),
        (Kind::Zeros, vec![2, 0, 1], "ends within its runs"),
        (Kind::Zeros, run(0, 0), "no run"),
        (Kind::Zeros, run(5, 1), "no run"),
        (Kind::Zeros, run(0, 65), "not in memory"),
        (Kind::Zeros, run(1 << 20, 1), "not in memory"),
        (
            Kind::Zeros,
            run(0xffff_ffff_ffff_f000, u32::MAX),
            "not in memory",
        ),
        (Kind::Zeros, with(run(0, 1), 1), "behind zeros"),
        (Kind::Pages, with(run(0, 2), PAGE), "4096 bytes for 2 pages"),
        (
            Kind::Pages,
            with(run(0, 1), 2 * PAGE),
            "8192 bytes for 1 pages",
        ),
        (Kind::Zstd, with(run(0, 1), 50), "do not decompress"),
        (Kind::Lz4, with(run(0, 1), 50), "do not decompress"),
        (Kind::Delta, with(run(0, 1), 1), "not whole"),
        (Kind::Delta, with(run(0, 1), 100), "not whole"),
    ];
    for (kind, payload, text) in cases {
        let memory = Memory::new();
        let error = decoder().take(kind, &payload, &memory).unwrap_err();
        assert!(error.to_string().contains(text), "{kind:?}: {error}");
        assert!(memory.0.lock().unwrap().iter().all(|byte| *byte == 0xaa));
    }
    // More pages than a frame may have, in a memory that has them.
    let mut decoder = Decoder::new(Ranges::new(&[(0, 1 << 30)])).unwrap();
    let error = decoder
        .take(Kind::Zstd, &run(0, 513), &Memory::new())
        .unwrap_err();
    assert!(error.to_string().contains("at most 512"), "{error}");
}

#[test]
fn a_bomb_does_not_get_past_its_pages() {
    let bomb = zstd::bulk::compress(&vec![0; 8 << 20], 1).unwrap();
    let mut payload = encode_runs(&RUNS);
    payload.extend_from_slice(&bomb);
    assert!(
        decoder()
            .take(Kind::Zstd, &payload, &Memory::new())
            .is_err()
    );
    let mut payload = encode_runs(&RUNS);
    payload.extend_from_slice(&lz4::compress(&vec![0; 8 << 20]));
    assert!(decoder().take(Kind::Lz4, &payload, &Memory::new()).is_err());
}

#[test]
fn a_single_byte_makes_a_page_none_of_zeros() {
    let mut page = [0; PAGE];
    assert!(is_zero(&page) && is_zero(&[]) && is_zero(&page[..131]));
    for at in 0..PAGE {
        page[at] = 1;
        assert!(!is_zero(&page), "{at}");
        page[at] = 0;
    }
    page[130] = 1;
    assert!(!is_zero(&page[..131]));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_payload_is_taken_without_a_panic(
        kind in 4_u8..9,
        runs in prop::collection::vec((0_u64..70, 1_u32..5), 1..4),
        data in prop::collection::vec(any::<u8>(), 0..200),
    ) {
        let run = |(page, pages): &(u64, u32)| Run { address: page << 12, pages: *pages };
        let mut payload = encode_runs(&runs.iter().map(run).collect::<Vec<_>>());
        payload.extend(data);
        let _ = decoder().take(Kind::of(kind).unwrap(), &payload, &Memory::new());
    }

    #[test]
    fn any_batch_arrives(kinds in prop::collection::vec(any::<u8>(), 1..12), codec in 0..3) {
        let codec = [Codec::Raw, Codec::Zstd, Codec::Lz4][usize::try_from(codec).unwrap()];
        let mut encoder = Encoder::new(codec, 16 * PAGE).unwrap();
        let data = data(&kinds);
        let pages = u32::try_from(kinds.len()).unwrap();
        let memory = Memory::new();
        let mut decoder = decoder();
        for _ in 0..2 {
            let (frames, _) = encode(&mut encoder, &[Run { address: 4096, pages }], &data);
            for (kind, payload) in &frames {
                decoder.take(*kind, payload, &memory).unwrap();
            }
        }
        prop_assert!(memory.0.lock().unwrap()[4096..4096 + data.len()] == data);
    }
}
