use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::file::Alignment;
use crate::testing::Arena;

const FILE: FileId = FileId(0);

fn regular() -> Abilities {
    Abilities::new(Kind::Regular, false, Alignment::NONE)
}

fn direct(memory: u32, offset: u32) -> Abilities {
    Abilities::new(Kind::Regular, true, Alignment { memory, offset })
}

fn job(op: Op, offset: u64, buffers: Buffers, durable: bool) -> Job {
    Job::new(1, FILE, op, offset, buffers, durable)
}

fn code(result: Option<io::Result<()>>) -> Option<c_int> {
    result.and_then(|r| r.unwrap_err().raw_os_error())
}

fn allocate(step: Step<'_>) -> c_int {
    match step {
        Step::Allocate { mode, .. } => mode,
        other => panic!("{other:?}"),
    }
}

/// A file in memory that answers like a host: short, interrupted, or with an error.
struct FakeHost {
    bytes: Vec<u8>,
    /// The largest transfer, by turns.
    limits: Vec<u64>,
    calls: usize,
    durable_writes: usize,
}

impl FakeHost {
    fn new(bytes: Vec<u8>, limits: Vec<u64>) -> Self {
        Self {
            bytes,
            limits,
            calls: 0,
            durable_writes: 0,
        }
    }

    #[expect(unsafe_code, reason = "plays the kernel, which follows raw addresses")]
    fn answer(&mut self, step: &Step<'_>) -> Result<u64, c_int> {
        let limit = self.limits[self.calls % self.limits.len()];
        self.calls += 1;
        let (offset, pieces, write) = match *step {
            Step::Read { offset, pieces } => (offset, pieces, false),
            Step::Write {
                offset,
                pieces,
                dsync,
            } => {
                self.durable_writes += usize::from(dsync);
                (offset, pieces, true)
            }
            _ => return Err(libc::EOPNOTSUPP),
        };
        assert!(!pieces.is_empty() && pieces.len() <= MAX_PIECES);
        if limit == 0 {
            return Err([libc::EINTR, libc::EAGAIN, libc::ECANCELED][self.calls % 3]);
        }
        let mut at = usize::try_from(offset).unwrap();
        let mut moved = 0;
        for_window(pieces, 0, limit, |piece| {
            let file = &mut self.bytes[at..at + piece.len];
            // SAFETY: the pieces are the job's, whose memory lives; the file is other memory.
            unsafe {
                if write {
                    std::ptr::copy(piece.base, file.as_mut_ptr(), piece.len);
                } else {
                    std::ptr::copy(file.as_ptr(), piece.base, piece.len);
                }
            }
            at += piece.len;
            moved += piece.len as u64;
            true
        });
        Ok(moved)
    }

    fn run(&mut self, job: &mut Job, abilities: &Abilities) -> io::Result<()> {
        if let Some(end) = job.begin(abilities) {
            return end;
        }
        loop {
            let answer = self.answer(&job.step(abilities));
            if let Some(end) = job.advance(answer, abilities) {
                return end;
            }
        }
    }
}

fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len)
        .map(|i| u8::try_from(i % 251).unwrap() ^ seed)
        .collect()
}

/// Pieces of these lengths, with gaps between them.
fn scattered(arena: &Arc<Arena>, lens: &[usize]) -> (Buffers, Vec<(usize, usize)>) {
    let mut at = 3;
    let places: Vec<_> = lens
        .iter()
        .map(|len| {
            let place = (at, *len);
            at += len + 5;
            place
        })
        .collect();
    (arena.buffers(&places), places)
}

proptest! {
    #[test]
    fn short_and_interrupted_transfers_move_every_byte_once(
        lens in prop::collection::vec(0_usize..3000, 1..9),
        limits in prop::collection::vec(0_u64..2000, 0..6),
        through_bounce in any::<bool>(),
        durable in any::<bool>(),
    ) {
        let mut limits = limits;
        limits.push(700);
        let total: usize = lens.iter().sum();
        let arena = Arena::new(32 << 10);
        let (buffers, places) = scattered(&arena, &lens);
        let data = pattern(total, 0x5a);
        let mut at = 0;
        for (offset, len) in &places {
            arena.put(*offset, &data[at..at + len]);
            at += len;
        }
        let abilities = regular();
        let mut host = FakeHost::new(vec![0xee; total + 200], limits);
        let mut write = job(Op::Write, 100, buffers, durable);
        if through_bounce {
            write.lend(AlignedBuf::new(BOUNCE_SIZE).unwrap());
        }
        host.run(&mut write, &abilities).unwrap();
        prop_assert_eq!(write.bytes(&Ok(())), total as u64);
        prop_assert_eq!(&host.bytes[100..100 + total], &data[..]);
        prop_assert!(host.bytes[..100].iter().chain(&host.bytes[100 + total..]).all(|b| *b == 0xee));
        prop_assert_eq!(host.durable_writes > 0, durable && total > 0);

        let arena = Arena::new(32 << 10);
        let (buffers, places) = scattered(&arena, &lens);
        let mut read = job(Op::Read, 100, buffers, false);
        if through_bounce {
            read.lend(AlignedBuf::new(BOUNCE_SIZE).unwrap());
        }
        host.run(&mut read, &abilities).unwrap();
        let got: Vec<u8> = places.iter().flat_map(|(o, l)| arena.get(*o, *l)).collect();
        prop_assert_eq!(got, data);
        // Between the pieces nothing was touched.
        for (offset, len) in places {
            prop_assert_eq!(arena.get(offset + len, 5), vec![0; 5]);
        }
    }
}

#[test]
fn a_large_request_passes_the_bounce_buffer_in_turns() {
    let len = 3 * BOUNCE_SIZE + 512;
    let arena = Arena::new(len + 4096);
    let data = pattern(len, 1);
    arena.put(1, &data);
    let mut host = FakeHost::new(vec![0; len], vec![u64::MAX]);
    let abilities = direct(512, 512);
    let mut write = job(Op::Write, 0, arena.buffers(&[(1, len)]), false);
    assert!(write.needs_bounce(&abilities));
    write.lend(AlignedBuf::new(BOUNCE_SIZE).unwrap());
    host.run(&mut write, &abilities).unwrap();
    assert_eq!((host.calls, write.bytes(&Ok(()))), (4, len as u64));
    assert_eq!(host.bytes, data);
    assert!(write.take_bounce().is_some());
}

#[test]
fn more_pieces_than_one_call_takes_are_moved_in_several() {
    let count = 2 * MAX_PIECES + 1;
    let arena = Arena::new(count);
    let pieces: Vec<_> = (0..count).map(|i| (i, 1)).collect();
    let data = pattern(count, 9);
    arena.put(0, &data);
    let mut host = FakeHost::new(vec![0; count], vec![u64::MAX]);
    let mut write = job(Op::Write, 0, arena.buffers(&pieces), false);
    host.run(&mut write, &regular()).unwrap();
    assert_eq!(host.calls, 3);
    assert_eq!(host.bytes, data);
}

#[test]
fn direct_io_continues_where_it_may_start() {
    let arena = Arena::new(8192);
    let abilities = direct(512, 512);
    let mut read = job(Op::Read, 4096, arena.buffers(&[(0, 4096)]), false);
    assert!(!read.needs_bounce(&abilities));
    assert!(read.begin(&abilities).is_none());
    assert!(read.advance(Ok(1000), &abilities).is_none());
    match read.step(&abilities) {
        Step::Read { offset, pieces } => {
            assert_eq!((offset, pieces.len(), pieces[0].len), (4608, 1, 3584));
        }
        other => panic!("{other:?}"),
    }
    // Less than a block is no progress.
    let end = read.advance(Ok(100), &abilities).unwrap().unwrap_err();
    assert_eq!(end.kind(), io::ErrorKind::UnexpectedEof);
    assert_eq!(read.bytes(&Ok(())), 512);
}

#[test]
fn the_end_of_the_file_inside_the_disk_is_an_error() {
    let arena = Arena::new(4096);
    for (op, kind) in [
        (Op::Read, io::ErrorKind::UnexpectedEof),
        (Op::Write, io::ErrorKind::WriteZero),
    ] {
        let mut job = job(op, 0, arena.buffers(&[(0, 1024)]), false);
        assert!(job.begin(&regular()).is_none());
        assert!(job.advance(Ok(512), &regular()).is_none());
        let end = job.advance(Ok(0), &regular()).unwrap().unwrap_err();
        assert_eq!((end.kind(), job.bytes(&Ok(()))), (kind, 512));
    }
}

#[test]
fn an_endless_read_finds_zeros_past_the_end_of_the_file_even_within_a_block() {
    for (abilities, ends) in [(regular(), 1300), (direct(1, 512), 1300), (regular(), 0)] {
        let arena = Arena::new(4096);
        arena.put(0, &[0xee; 4096]);
        let mut host = FakeHost::new(pattern(4096, 1), vec![]);
        let mut read = job(
            Op::Read,
            0,
            arena.buffers(&[(0, 1024), (2048, 1024)]),
            false,
        )
        .endless();
        assert!(read.begin(&abilities).is_none());
        let mut left = ends;
        let result = loop {
            // A host gives what there is up to the end.
            host.limits = vec![left];
            let answer = if left == 0 {
                Ok(0)
            } else {
                host.answer(&read.step(&abilities))
            };
            left -= answer.unwrap();
            if let Some(end) = read.advance(answer, &abilities) {
                break end;
            }
        };
        result.unwrap();
        assert_eq!(read.bytes(&Ok(())), 2048);
        let mut got = arena.get(0, 1024);
        got.extend(arena.get(2048, 1024));
        let held = usize::try_from(ends).unwrap();
        assert_eq!(got[..held], pattern(4096, 1)[..held]);
        assert!(got[held..].iter().all(|byte| *byte == 0), "{ends}");
        assert!(arena.get(1024, 1024).iter().all(|byte| *byte == 0xee));
    }
}

#[test]
fn zeroes_that_stand_for_a_write_count_its_bytes_on_success_only() {
    let mut zeroes = job(
        Op::WriteZeroes {
            len: 512,
            may_unmap: true,
        },
        0,
        Buffers::none(),
        false,
    )
    .standing_for(512);
    let abilities = regular();
    assert!(zeroes.begin(&abilities).is_none());
    let result = zeroes.advance(Ok(0), &abilities).unwrap();
    assert_eq!(zeroes.bytes(&result), 512);
    assert_eq!(zeroes.bytes(&Err(os(libc::EIO))), 0);
}

#[test]
fn errors_end_a_transfer_and_say_what_the_host_said() {
    let arena = Arena::new(4096);
    for error in [libc::EIO, libc::ENOSPC, libc::EDQUOT, libc::EFBIG] {
        let mut job = job(Op::Write, 0, arena.buffers(&[(0, 1024)]), false);
        assert!(job.begin(&regular()).is_none());
        assert!(job.advance(Ok(512), &regular()).is_none());
        assert_eq!(code(job.advance(Err(error), &regular())), Some(error));
        assert_eq!(job.bytes(&Ok(())), 512);
    }
}

#[test]
fn a_host_that_is_always_short_of_resources_ends_in_its_error() {
    let arena = Arena::new(4096);
    let mut job = job(Op::Read, 0, arena.buffers(&[(0, 512)]), false);
    assert!(job.begin(&regular()).is_none());
    for _ in 0..MAX_RETRIES {
        assert!(job.advance(Err(libc::EAGAIN), &regular()).is_none());
    }
    let end = job.advance(Err(libc::EAGAIN), &regular());
    assert_eq!(code(end), Some(libc::EAGAIN));
}

#[test]
fn more_bytes_than_were_asked_for_count_as_what_was_asked_for() {
    let arena = Arena::new(4096);
    let mut job = job(Op::Read, 0, arena.buffers(&[(0, 512)]), false);
    assert!(job.begin(&regular()).is_none());
    assert!(job.advance(Ok(u64::MAX), &regular()).unwrap().is_ok());
    assert_eq!(job.bytes(&Ok(())), 512);
}

#[test]
fn a_failed_flush_fails_all_later_ones_where_the_page_cache_is_used() {
    for (abilities, later) in [(regular(), Some(libc::EIO)), (direct(512, 512), None)] {
        let mut flush = job(Op::Flush, 0, Buffers::none(), false);
        assert!(flush.begin(&abilities).is_none());
        assert_eq!(flush.step(&abilities), Step::Sync);
        assert_eq!(
            code(flush.advance(Err(libc::ENOSPC), &abilities)),
            Some(libc::ENOSPC)
        );
        let mut flush = job(Op::Flush, 0, Buffers::none(), false);
        assert_eq!(code(flush.begin(&abilities)), later);
    }
}

#[test]
fn zeroes_fall_back_to_what_the_host_can_do_and_remember_it() {
    let abilities = regular();
    let op = Op::WriteZeroes {
        len: (1 << 20) + 512,
        may_unmap: true,
    };
    let mut zeroes = job(op, 512, Buffers::none(), true);
    assert!(zeroes.begin(&abilities).is_none());
    assert_ne!(
        allocate(zeroes.step(&abilities)) & libc::FALLOC_FL_PUNCH_HOLE,
        0
    );
    assert!(zeroes.advance(Err(libc::EOPNOTSUPP), &abilities).is_none());
    assert_ne!(
        allocate(zeroes.step(&abilities)) & libc::FALLOC_FL_ZERO_RANGE,
        0
    );
    assert!(zeroes.advance(Err(libc::EOPNOTSUPP), &abilities).is_none());
    let mut host = FakeHost::new(vec![1; (1 << 20) + 2048], vec![u64::MAX, 100_000]);
    loop {
        let answer = host.answer(&zeroes.step(&abilities));
        if let Some(end) = zeroes.advance(answer, &abilities) {
            end.unwrap();
            break;
        }
    }
    assert!(host.durable_writes > 0);
    let ones = host.bytes.iter().filter(|b| **b == 1).count();
    assert_eq!((ones, host.bytes[511], host.bytes[512]), (1536, 1, 0));
    // The next one does not ask again.
    let mut zeroes = job(op, 0, Buffers::none(), false);
    assert!(zeroes.begin(&abilities).is_none());
    assert!(matches!(zeroes.step(&abilities), Step::Write { .. }));
}

#[test]
fn zeroes_that_must_be_durable_are_synced_after_an_allocation() {
    let abilities = regular();
    let op = Op::WriteZeroes {
        len: 4096,
        may_unmap: false,
    };
    for durable in [false, true] {
        let mut zeroes = job(op, 0, Buffers::none(), durable);
        assert!(zeroes.begin(&abilities).is_none());
        assert_ne!(
            allocate(zeroes.step(&abilities)) & libc::FALLOC_FL_ZERO_RANGE,
            0
        );
        let end = zeroes.advance(Ok(0), &abilities);
        assert_eq!(end.is_none(), durable);
        if durable {
            assert_eq!(zeroes.step(&abilities), Step::Sync);
            assert!(zeroes.advance(Ok(0), &abilities).unwrap().is_ok());
        }
    }
}

#[test]
fn a_refusal_of_one_range_does_not_stop_later_ones() {
    let abilities = regular();
    let op = Op::WriteZeroes {
        len: 512,
        may_unmap: true,
    };
    let mut zeroes = job(op, 0, Buffers::none(), false);
    assert!(zeroes.begin(&abilities).is_none());
    assert!(zeroes.advance(Err(libc::EINVAL), &abilities).is_none());
    assert!(matches!(zeroes.step(&abilities), Step::Write { .. }));
    let mut zeroes = job(op, 0, Buffers::none(), false);
    assert!(zeroes.begin(&abilities).is_none());
    assert!(matches!(zeroes.step(&abilities), Step::Allocate { .. }));
}

#[test]
fn an_unsupported_discard_succeeds_and_is_not_tried_again() {
    for kind in [Kind::Regular, Kind::Device] {
        let abilities = Abilities::new(kind, false, Alignment::NONE);
        let op = Op::Discard { len: 512 };
        let mut discard = job(op, 0, Buffers::none(), false);
        assert!(discard.begin(&abilities).is_none());
        let device = matches!(discard.step(&abilities), Step::DiscardDevice { .. });
        assert_eq!(device, kind == Kind::Device);
        assert!(
            discard
                .advance(Err(libc::EOPNOTSUPP), &abilities)
                .unwrap()
                .is_ok()
        );
        let mut discard = job(op, 0, Buffers::none(), false);
        assert!(discard.begin(&abilities).unwrap().is_ok());
    }
    let abilities = regular();
    let mut discard = job(Op::Discard { len: 512 }, 0, Buffers::none(), false);
    assert!(discard.begin(&abilities).is_none());
    assert_eq!(
        code(discard.advance(Err(libc::EIO), &abilities)),
        Some(libc::EIO)
    );
}

#[test]
fn nothing_to_move_ends_at_once() {
    for op in [
        Op::Read,
        Op::Write,
        Op::Discard { len: 0 },
        Op::WriteZeroes {
            len: 0,
            may_unmap: true,
        },
    ] {
        let mut job = job(op, 512, Buffers::none(), true);
        assert!(job.begin(&regular()).unwrap().is_ok(), "{op:?}");
    }
}
