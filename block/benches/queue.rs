//! How fast a raw disk's queue is: cached 4 KiB requests at random places,
//! depth 1 and 32, for each engine. Run by hand: `cargo bench -p block`.

use std::any::Any;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use block::{
    Access, Aio, Buffers, Cache, Completed, Disk, DiskOptions, IoQueue, IoVec, Op, Opener, RawDisk,
    Request,
};

const SIZE: u64 = 256 << 20;
const BLOCK: usize = 4096;
const TIME: Duration = Duration::from_millis(500);

struct AnyPath;

impl Opener for AnyPath {
    fn open(&self, path: &Path, access: Access) -> io::Result<File> {
        let direct = if access.direct { libc::O_DIRECT } else { 0 };
        OpenOptions::new()
            .read(true)
            .write(access.write)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC | direct)
            .open(path)
    }
}

/// Memory that is never freed, as (address, owner).
fn memory(len: usize) -> (*mut u8, Arc<dyn Any + Send + Sync>) {
    let bytes: &'static mut [u8] = Vec::leak(vec![0; len + BLOCK]);
    let base = bytes.as_mut_ptr();
    (base.wrapping_add(base.align_offset(BLOCK)), Arc::new(()))
}

#[expect(unsafe_code, reason = "buffers are raw memory")]
fn buffers(base: *mut u8, owner: &Arc<dyn Any + Send + Sync>) -> Buffers {
    // SAFETY: leaked memory lives for ever, and nothing else refers to it.
    unsafe { Buffers::from_slice(&[IoVec { base, len: BLOCK }], Arc::clone(owner)) }
}

/// Requests per second at this depth.
fn measure(queue: &mut dyn IoQueue, op: Op, depth: usize) -> io::Result<f64> {
    let (base, owner) = memory(depth * BLOCK);
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    let mut push = |queue: &mut dyn IoQueue, slot: usize| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        queue.push(Request {
            token: slot as u64,
            op,
            offset: seed % (SIZE / BLOCK as u64) * BLOCK as u64,
            buffers: buffers(base.wrapping_add(slot * BLOCK), &owner),
        });
    };
    for slot in 0..depth {
        push(queue, slot);
    }
    let mut out = Vec::new();
    let mut done = 0_u32;
    let start = Instant::now();
    while start.elapsed() < TIME {
        queue.wait(None, &mut out)?;
        for completed in out.drain(..) {
            if let Completed::Request { token, result, .. } = completed {
                result?;
                done += 1;
                push(queue, usize::try_from(token).unwrap_or_default());
            }
        }
    }
    let rate = f64::from(done) / start.elapsed().as_secs_f64();
    while queue.in_flight() > 0 {
        queue.wait(None, &mut out)?;
    }
    Ok(rate)
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let file = tempfile::NamedTempFile::new()?;
    for i in 0..SIZE >> 20 {
        file.as_file().write_all_at(&vec![1; 1 << 20], i << 20)?;
    }
    file.as_file().sync_all()?;
    println!("4 KiB random, {} MiB file, IOPS (median of 5)", SIZE >> 20);
    for cache in [Cache::Writeback, Cache::None] {
        for aio in [Aio::IoUring, Aio::Threads] {
            let options = DiskOptions {
                cache,
                aio,
                ..DiskOptions::default()
            };
            let disk = RawDisk::open(file.path(), &AnyPath, &options)?;
            let mut queue = disk.queue(64)?;
            for op in [Op::Read, Op::Write] {
                for depth in [1, 32] {
                    let mut rates = Vec::new();
                    for _ in 0..5 {
                        rates.push(measure(queue.as_mut(), op, depth)?);
                    }
                    rates.sort_by(f64::total_cmp);
                    let rate = rates[rates.len() / 2];
                    println!("{cache:?} {aio:?} {op:?} depth {depth:2}: {rate:9.0}");
                }
            }
        }
    }
    Ok(())
}
