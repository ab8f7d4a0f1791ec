//! What this process uses of the host.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::opener::Opener;

/// Enough of a line of `/proc/self/stat`.
const LIMIT: usize = 4096;

/// What the process uses now, and has used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// How long all its mappings are together, in bytes.
    pub virtual_bytes: u64,
    /// How much of them is in memory, in bytes; guest memory that has been touched is.
    pub resident_bytes: u64,
    /// How much of that belongs to files and shared memory, in bytes.
    pub shared_bytes: u64,
    /// Processor time, in microseconds, to a hundredth of a second.
    pub cpu_micros: u64,
    /// How many threads it has.
    pub threads: u64,
}

/// Where the host tells it, open already: who asks may open nothing.
#[derive(Debug)]
pub struct Meter {
    statm: File,
    stat: File,
}

impl Meter {
    /// Of this process; `None` where the host does not tell.
    #[must_use]
    pub fn open(opener: &Opener) -> Option<Self> {
        let open = |path| opener.open_input(Path::new(path)).ok();
        Some(Self {
            statm: open("/proc/self/statm")?,
            stat: open("/proc/self/stat")?,
        })
    }

    /// Asks the host; `None` where it does not say.
    #[must_use]
    pub fn read(&self) -> Option<Usage> {
        let read = |file: &File| {
            let mut text = vec![0; LIMIT];
            let len = file.read_at(&mut text, 0).ok()?;
            text.truncate(len);
            String::from_utf8(text).ok()
        };
        let page = u64::try_from(rustix::param::page_size()).ok()?;
        let tick = rustix::param::clock_ticks_per_second();
        parse(&read(&self.statm)?, &read(&self.stat)?, page, tick)
    }
}

/// The largest piece that the allocator keeps for later when it has been freed, in bytes: larger ones are mappings of their own.
#[cfg(target_env = "gnu")]
const KEPT: libc::c_int = 128 << 10;
/// How many heaps there are. Where threads come and go with each job, each of them would take another of very many, and leave what it freed there.
#[cfg(target_env = "gnu")]
const HEAPS: libc::c_int = 2;

/// Has the allocator keep little of what is freed, for a process that is there for months. Called once, before there are other threads.
pub(crate) fn keep_little() {
    #[cfg(target_env = "gnu")]
    #[expect(unsafe_code, reason = "mallopt(3) is a C function")]
    // SAFETY: it takes no pointers, and numbers that it does not understand change nothing.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, HEAPS);
        // A threshold that is set stays; by itself it grows with what is freed.
        libc::mallopt(libc::M_MMAP_THRESHOLD, KEPT);
        libc::mallopt(libc::M_TRIM_THRESHOLD, KEPT);
    }
}

/// Gives the host back what has been freed and is still kept. Takes a moment: for the end of what took much.
pub(crate) fn give_back() {
    #[cfg(target_env = "gnu")]
    #[expect(unsafe_code, reason = "malloc_trim(3) is a C function")]
    // SAFETY: it takes no pointers, and any thread may call it at any time.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Reads `statm` (in pages) and `stat` (times in ticks of a second's `tick`-th part) as proc(5) has them.
fn parse(statm: &str, stat: &str, page: u64, tick: u64) -> Option<Usage> {
    let mut pages = statm.split_ascii_whitespace().map(str::parse::<u64>);
    let mut bytes = || Some(pages.next()?.ok()?.saturating_mul(page));
    // The second field is the program's name in brackets, which may hold anything.
    let (_, rest) = stat.rsplit_once(')')?;
    let fields: Vec<_> = rest.split_ascii_whitespace().collect();
    // Fields are numbered from 1, and the rest begins with the third.
    let field = |number: usize| fields.get(number.checked_sub(3)?)?.parse::<u64>().ok();
    let ticks = field(14)?.saturating_add(field(15)?);
    Some(Usage {
        virtual_bytes: bytes()?,
        resident_bytes: bytes()?,
        shared_bytes: bytes()?,
        cpu_micros: ticks.saturating_mul(1_000_000).checked_div(tick)?,
        threads: field(20)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_may_hold_anything() {
        let statm = "100 20 3 1 0 50 0\n";
        let rest = "S 1 2 3 0 -1 4194304 10 11 12 13 250 50 0 0 20 0 7 0 99 409600 20";
        for name in ["vireo", "a b", "x) R 1 (2"] {
            let stat = format!("42 ({name}) {rest}");
            let expected = Usage {
                virtual_bytes: 409_600,
                resident_bytes: 81_920,
                shared_bytes: 12_288,
                cpu_micros: 3_000_000,
                threads: 7,
            };
            assert_eq!(parse(statm, &stat, 4096, 100), Some(expected));
        }
        assert_eq!(parse(statm, "42 (vireo) S 1 2", 4096, 100), None);
        assert_eq!(parse("1 2", &format!("42 (v) {rest}"), 4096, 100), None);
    }

    #[test]
    fn this_process_has_memory_and_a_thread() {
        let usage = Meter::open(&Opener::new()).unwrap().read().unwrap();
        assert!(usage.resident_bytes > 0 && usage.resident_bytes <= usage.virtual_bytes);
        assert!(usage.threads >= 1);
    }
}
