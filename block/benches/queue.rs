//! How fast the queues of disks are: raw files and qcow2 images beside each other, for each engine.
//!
//! Run by hand: `cargo bench -p block`; an argument picks the lines that contain it. Raw and qcow2 take turns, so that what
//! else the machine does weighs on both. Each line has requests per second, the processor time per request, and
//! both as a part of raw's (medians of the turns). qcow2 lines want `qemu-img`.

use std::any::Any;
use std::error::Error;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use block::{
    Access, Aio, Buffers, Cache, Completed, Disk, DiskOptions, Format, ImageOptions, IoQueue,
    IoVec, Op, Opener, Request, open_disk,
};

const SIZE: u64 = 256 << 20;
/// Where a fresh qcow2 image of that size has its data. The raw disk's blocks are as far into its file:
/// the page cache is slower at some offsets than at others.
const SHIFT: u64 = 320 << 10;
const TIME: Duration = Duration::from_millis(300);
const TURNS: usize = 7;

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

/// Memory that is never freed.
struct Memory {
    base: *mut u8,
    owner: Arc<dyn Any + Send + Sync>,
}

impl Memory {
    fn new(len: usize) -> Self {
        let bytes: &'static mut [u8] = Vec::leak(vec![0xa5; len + 4096]);
        let base = bytes.as_mut_ptr();
        Self {
            base: base.wrapping_add(base.align_offset(4096)),
            owner: Arc::new(()),
        }
    }

    #[expect(unsafe_code, reason = "buffers are raw memory")]
    fn buffers(&self, offset: usize, len: usize) -> Buffers {
        let base = self.base.wrapping_add(offset);
        // SAFETY: leaked memory lives for ever, and nothing else refers to it.
        unsafe { Buffers::from_slice(&[IoVec { base, len }], Arc::clone(&self.owner)) }
    }
}

/// The load that a line is about.
#[derive(Clone, Copy)]
struct Load {
    op: Op,
    /// Bytes per request.
    block: usize,
    depth: usize,
    random: bool,
    /// Ends after the whole disk has been covered once.
    once: bool,
    /// Added to all offsets, in bytes.
    shift: u64,
}

/// What a turn gave, per request, in nanoseconds.
#[derive(Clone, Copy)]
struct Figures {
    wall: f64,
    cpu: f64,
}

#[expect(unsafe_code, reason = "the clock has no safe wrapper")]
fn cpu_time() -> Duration {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: writes one timespec at the given address.
    unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &raw mut time) };
    let [seconds, nanoseconds] = [time.tv_sec, time.tv_nsec].map(|n| u64::try_from(n).unwrap_or(0));
    Duration::from_secs(seconds) + Duration::from_nanos(nanoseconds)
}

fn measure(queue: &mut dyn IoQueue, memory: &Memory, load: Load) -> io::Result<Figures> {
    let blocks = SIZE / load.block as u64;
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = 0;
    let mut push = |queue: &mut dyn IoQueue, slot: usize| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        // An odd factor passes every block once, far from the one before.
        let number = match (load.random, load.once) {
            (true, false) => seed,
            (true, true) => next * 40_503,
            (false, _) => next,
        };
        next += 1;
        queue.push(Request {
            token: slot as u64,
            op: load.op,
            offset: load.shift + number % blocks * load.block as u64,
            buffers: memory.buffers(slot * load.block, load.block),
        });
        next
    };
    let (start, cpu) = (Instant::now(), cpu_time());
    for slot in 0..load.depth {
        push(queue, slot);
    }
    let mut out = Vec::new();
    let mut done = 0_u32;
    let mut more = true;
    while queue.in_flight() > 0 {
        queue.wait(None, &mut out)?;
        more &= load.once || start.elapsed() < TIME;
        for completed in out.drain(..) {
            if let Completed::Request { token, result, .. } = completed {
                result?;
                done += 1;
                if more {
                    let pushed = push(queue, usize::try_from(token).unwrap_or_default());
                    more = !load.once || pushed < blocks;
                }
            }
        }
    }
    let each = |time: Duration| time.as_secs_f64() * 1e9 / f64::from(done.max(1));
    Ok(Figures {
        wall: each(start.elapsed()),
        cpu: each(cpu_time().saturating_sub(cpu)),
    })
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn print(name: &str, figures: &[Figures], raw: Option<&[Figures]>) {
    let wall = median(figures.iter().map(|f| f.wall).collect());
    let cpu = median(figures.iter().map(|f| f.cpu).collect());
    print!("{name:58} {:9.0}/s {cpu:8.0} ns cpu", 1e9 / wall);
    if let Some(raw) = raw {
        let turns = || figures.iter().zip(raw);
        let rate = median(turns().map(|(f, raw)| raw.wall / f.wall).collect());
        let cpu = median(turns().map(|(f, raw)| f.cpu / raw.cpu).collect());
        print!("  rate {rate:5.3} cpu {cpu:5.3} of raw");
    }
    println!();
}

struct Bench {
    dir: tempfile::TempDir,
    filter: String,
    memory: Memory,
}

impl Bench {
    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn picks(&self, name: &str) -> bool {
        name.contains(&self.filter)
    }

    fn open(&self, name: &str, cache: Cache, aio: Aio) -> Result<Arc<dyn Disk>, Box<dyn Error>> {
        let qcow2 = Path::new(name).extension().is_some_and(|e| e == "qcow2");
        let options = ImageOptions {
            disk: DiskOptions {
                cache,
                aio,
                format: Some(if qcow2 { Format::Qcow2 } else { Format::Raw }),
                ..DiskOptions::default()
            },
            ..ImageOptions::default()
        };
        Ok(open_disk(&self.path(name), &AnyPath, &options)?)
    }

    fn qemu_img(&self, line: &str) -> Result<(), Box<dyn Error>> {
        let mut command = Command::new("qemu-img");
        command.args(line.split_whitespace()).arg("-q");
        let status = command.current_dir(self.dir.path()).status()?;
        status.success().then_some(()).ok_or("qemu-img fails")?;
        Ok(())
    }

    /// All clusters mapped: raw and qcow2 in turns.
    fn mapped(&self, cache: Cache, aio: Aio) -> Result<(), Box<dyn Error>> {
        let disks = ["disk.raw", "disk.qcow2"].map(|name| self.open(name, cache, aio));
        let [raw, qcow2] = disks;
        let mut queues = [raw?.queue(64)?, qcow2?.queue(64)?];
        for op in [Op::Read, Op::Write] {
            for (block, depth, random) in [(4096, 1, true), (4096, 32, true), (1 << 20, 4, false)] {
                let load = Load {
                    op,
                    block,
                    depth,
                    random,
                    once: false,
                    shift: 0,
                };
                let name = format!(
                    "mapped {cache:?} {aio:?} {op:?} {}K depth {depth}",
                    block >> 10
                );
                if !self.picks(&name) {
                    continue;
                }
                let mut figures = [Vec::new(), Vec::new()];
                for turn in 0..TURNS * 2 {
                    // Neither is always the first.
                    let which = (turn ^ turn >> 1) & 1;
                    let queue = queues[which].as_mut();
                    let load = Load {
                        shift: [SHIFT, 0][which],
                        ..load
                    };
                    figures[which].push(measure(queue, &self.memory, load)?);
                }
                let [raw, qcow2] = figures;
                print(&format!("{name} raw"), &raw, None);
                print(&format!("{name} qcow2"), &qcow2, Some(&raw));
            }
        }
        Ok(())
    }

    /// Every request takes a cluster, or the rest of one.
    fn allocating(&self, aio: Aio) -> Result<(), Box<dyn Error>> {
        for (block, depth, random) in [
            (4096, 1, false),
            (4096, 32, false),
            (4096, 32, true),
            (64 << 10, 1, true),
            (64 << 10, 32, true),
            (1 << 20, 4, false),
        ] {
            let order = if random { "random" } else { "sequential" };
            let name = format!("allocating {aio:?} {}K {order} depth {depth}", block >> 10);
            if !self.picks(&name) {
                continue;
            }
            let load = Load {
                op: Op::Write,
                block,
                depth,
                random,
                once: true,
                shift: 0,
            };
            let mut figures = [Vec::new(), Vec::new()];
            for _ in 0..3 {
                for (which, file) in ["fresh.raw", "fresh.qcow2"].into_iter().enumerate() {
                    let format = file.split('.').next_back().unwrap_or_default();
                    self.qemu_img(&format!("create -f {format} {file} {SIZE}"))?;
                    let disk = self.open(file, Cache::Writeback, aio)?;
                    let mut queue = disk.queue(64)?;
                    figures[which].push(measure(queue.as_mut(), &self.memory, load)?);
                }
            }
            let [raw, qcow2] = figures;
            print(&format!("{name} raw"), &raw, None);
            print(&format!("{name} qcow2"), &qcow2, Some(&raw));
        }
        Ok(())
    }

    /// Reads whose clusters are at the bottom of a chain.
    fn chains(&self, aio: Aio) -> Result<(), Box<dyn Error>> {
        let mut below = "disk.qcow2".to_owned();
        for depth in 1..=16 {
            let name = format!("over{depth}.qcow2");
            self.qemu_img(&format!("create -f qcow2 -b {below} -F qcow2 {name}"))?;
            below = name;
        }
        let names = ["disk.raw", "over1.qcow2", "over4.qcow2", "over16.qcow2"];
        for depth in [1, 32] {
            let name = format!("chain {aio:?} Read 4K depth {depth}");
            if !self.picks(&name) {
                continue;
            }
            let load = Load {
                op: Op::Read,
                block: 4096,
                depth,
                random: true,
                once: false,
                shift: 0,
            };
            let mut figures = names.map(|_| Vec::new());
            for _ in 0..TURNS {
                for (name, figures) in names.iter().zip(&mut figures) {
                    let shift = if *name == "disk.raw" { SHIFT } else { 0 };
                    let load = Load { shift, ..load };
                    let mut queue = self.open(name, Cache::Writeback, aio)?.queue(64)?;
                    // The first reads fetch tables.
                    measure(queue.as_mut(), &self.memory, load)?;
                    figures.push(measure(queue.as_mut(), &self.memory, load)?);
                }
            }
            let [raw, rest @ ..] = figures;
            for (layers, figures) in ["1", "4", "16"].iter().zip(rest) {
                print(&format!("{name} over {layers}"), &figures, Some(&raw));
            }
        }
        Ok(())
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let filter = std::env::args().skip(1).find(|word| !word.starts_with('-'));
    let bench = Bench {
        dir: tempfile::tempdir()?,
        filter: filter.unwrap_or_default(),
        memory: Memory::new(32 << 20),
    };
    // Both are written alike, so that the page cache holds them alike.
    let fill = Load {
        op: Op::Write,
        block: 1 << 20,
        depth: 1,
        random: false,
        once: true,
        shift: 0,
    };
    for (format, name, shift) in [("raw", "disk.raw", SHIFT), ("qcow2", "disk.qcow2", 0)] {
        bench.qemu_img(&format!("create -f {format} {name} {}", SIZE + shift))?;
        let disk = bench.open(name, Cache::Writeback, Aio::Auto)?;
        let fill = Load { shift, ..fill };
        measure(disk.queue(1)?.as_mut(), &bench.memory, fill)?;
        drop(disk);
        File::open(bench.path(name))?.sync_all()?;
    }
    for aio in [Aio::IoUring, Aio::Threads] {
        for cache in [Cache::Writeback, Cache::None] {
            bench.mapped(cache, aio)?;
        }
        bench.allocating(aio)?;
        bench.chains(aio)?;
    }
    Ok(())
}
