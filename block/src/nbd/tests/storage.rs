//! Exports as bytes at offsets.

use std::sync::Arc;
use std::thread;

use super::fake::{
    FLUSH, FLUSH_CMD, FUA, Honest, MULTI_CONN, Manners, READ_ONLY, TRIM, WRITE, ZEROES,
};
use super::server::{SIZE, each};
use crate::DiskOptions;
use crate::nbd::storage::NbdStorage;
use crate::storage::Storage;
use crate::testing::AnyPath;

fn storage(server: &Honest) -> NbdStorage {
    let options = DiskOptions {
        read_only: server.manners.flags & READ_ONLY != 0,
        ..DiskOptions::default()
    };
    NbdStorage::open("nbd://fake/x".as_ref(), &server.opener(), &options).unwrap()
}

fn pattern(len: usize, seed: usize) -> Vec<u8> {
    (0..len)
        .map(|i| u8::try_from((i / 3 + seed) % 251).unwrap())
        .collect()
}

#[test]
fn bytes_at_any_offset_are_kept_whatever_the_servers_blocks_are() {
    for blocks in [
        None,
        Some((512, 4096, 8192)),
        Some((65_536, 65_536, 65_536)),
    ] {
        let server = Honest::new(Manners {
            flags: 1 | FLUSH | ZEROES | TRIM,
            blocks,
            ..Manners::default()
        });
        let storage = storage(&server);
        let mut model = vec![0xaa; 1 << 20];
        for (at, len) in [
            (0, 4096),
            (1, 1),
            (511, 2),
            (70_000, 200_001),
            (65_536, 65_536),
            (1_048_575, 1),
        ] {
            let bytes = pattern(len, at);
            storage.write_at(&bytes, at as u64).unwrap();
            model[at..at + len].copy_from_slice(&bytes);
            let mut got = vec![0; len + 2];
            let from = at.saturating_sub(1);
            storage.read_at(&mut got, from as u64).unwrap();
            let there = got.len().min(model.len() - from);
            assert!(
                got[..there] == model[from..from + there],
                "{blocks:?}, {at}, {len}"
            );
            assert!(got[there..].iter().all(|byte| *byte == 0));
        }
        for (at, len) in [(3, 5), (1000, 300_000), (524_288, 65_536), (0, 1)] {
            storage.zero(at as u64, len as u64).unwrap();
            model[at..at + len].fill(0);
        }
        storage.discard(100, 20).unwrap();
        storage.sync().unwrap();
        assert!(*server.bytes.lock().unwrap() == model, "{blocks:?}");
    }
}

#[test]
fn an_export_never_grows_and_beyond_it_are_zeros() {
    let server = Honest::new(Manners::default());
    let storage = storage(&server);
    let size = storage.len().unwrap();
    assert_eq!(size, 1 << 20);
    let mut buf = [1; 16];
    for offset in [size, size + 1, u64::MAX] {
        storage.read_at(&mut buf, offset).unwrap();
        assert_eq!(buf, [0; 16]);
        buf.fill(1);
        let error = storage.write_at(&buf, offset).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
        storage.zero(offset, 4096).unwrap();
        storage.discard(offset, 4096).unwrap();
    }
    storage.set_len(size).unwrap();
    assert_eq!(
        storage.set_len(size + 1).unwrap_err().raw_os_error(),
        Some(libc::ENOSPC)
    );
    assert!(!storage.grows_zeroed());
    assert_eq!(
        storage.reserve(0, 512).unwrap_err().kind(),
        std::io::ErrorKind::Unsupported
    );
    assert!(server.take().iter().all(|asked| asked.0 != WRITE));
}

#[test]
fn a_read_only_storage_refuses_changes() {
    let server = Honest::new(Manners {
        flags: 1 | READ_ONLY,
        ..Manners::default()
    });
    let storage = storage(&server);
    for result in [
        storage.write_at(&[0], 0),
        storage.zero(0, 512),
        storage.discard(0, 512),
    ] {
        assert_eq!(result.unwrap_err().raw_os_error(), Some(libc::EROFS));
    }
    storage.sync().unwrap();
    assert_eq!(server.take(), []);
}

#[test]
fn what_is_written_is_durable_after_a_sync_and_a_failed_sync_is_for_ever() {
    for (offers, asked) in [
        (FLUSH | FUA, vec![(WRITE, 0, 0, 512), (FLUSH_CMD, 0, 0, 0)]),
        (FUA, vec![(WRITE, 1, 0, 512)]),
        (0, vec![(WRITE, 0, 0, 512)]),
    ] {
        let server = Honest::new(Manners {
            flags: 1 | offers,
            ..Manners::default()
        });
        let storage = storage(&server);
        storage.write_at(&[1; 512], 0).unwrap();
        storage.sync().unwrap();
        assert_eq!(server.take(), asked);
    }
    let server = Honest::new(Manners::default());
    let storage = storage(&server);
    server.refuse.lock().unwrap().push((FLUSH_CMD, 5));
    assert!(storage.sync().is_err());
    server.refuse.lock().unwrap().clear();
    assert_eq!(storage.sync().unwrap_err().raw_os_error(), Some(libc::EIO));
}

#[test]
fn threads_share_what_connections_there_are() {
    for flags in [1 | FLUSH, 1 | FLUSH | MULTI_CONN] {
        let server = Honest::new(Manners {
            flags,
            ..Manners::default()
        });
        let storage = Arc::new(storage(&server));
        thread::scope(|scope| {
            for worker in 0..8 {
                let storage = &storage;
                scope.spawn(move || {
                    for round in 0..50 {
                        let bytes = pattern(1000, worker * 50 + round);
                        storage.write_at(&bytes, worker as u64 * 1000).unwrap();
                        let mut got = vec![0; 1000];
                        storage.read_at(&mut got, worker as u64 * 1000).unwrap();
                        assert!(got == bytes);
                    }
                });
            }
        });
    }
}

#[test]
fn a_connection_that_is_lost_is_an_error_of_every_call_and_of_every_sync() {
    let fake = super::fake::Fake::new(|mut stream| {
        Manners::default().welcome(&mut stream)?;
        super::fake::read_request(&mut stream).map(|_| ())
    });
    let options = DiskOptions::default();
    let storage = NbdStorage::open("nbd://fake/x".as_ref(), &fake, &options).unwrap();
    for _ in 0..2 {
        let error = storage.read_at(&mut [0; 512], 0).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOTCONN));
    }
    assert_eq!(storage.sync().unwrap_err().raw_os_error(), Some(libc::EIO));
}

#[test]
fn every_server_keeps_what_is_stored_in_it() {
    each(|case, server| {
        let options = DiskOptions::default();
        let open = || NbdStorage::open(&server.uri(""), &AnyPath, &options).unwrap();
        let storage = open();
        assert_eq!(storage.len().unwrap(), SIZE, "{case}");
        let bytes = pattern(300_000, 1);
        storage.write_at(&bytes, 12_345).unwrap();
        storage.zero(100_001, 99_999).unwrap();
        storage.discard(SIZE - 65_536, 65_536).unwrap();
        storage.sync().unwrap();
        drop(storage);
        let mut wanted = bytes;
        wanted[100_001 - 12_345..200_000 - 12_345].fill(0);
        let mut got = vec![0; wanted.len()];
        open().read_at(&mut got, 12_345).unwrap();
        assert!(got == wanted, "{case}");
    });
}
