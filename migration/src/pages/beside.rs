//! Writing beside who copies: memory is copied into buffers, which a thread of its own writes.
//!
//! Whoever waits for a chunk waits for its copy, and for storage only when that has not taken as many as there are buffers.

use std::fs::File;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread::{Builder, scope};

use super::packed::Frame;
use super::set::PageSet;
use super::write::{Place, Store, scan};
use super::{CHUNK_LEN, Chunk, PAGE_LEN, PageWriter, PagesError, Ram, Run};

/// How many buffers there are.
const BUFFERS: usize = 6;

/// Room for a chunk that begins where direct I/O wants it.
pub(super) struct Buffer {
    bytes: Vec<u8>,
    start: usize,
}

impl Buffer {
    pub fn new() -> Self {
        let bytes = vec![0; CHUNK_LEN + PAGE_LEN];
        let start = bytes.as_ptr().align_offset(PAGE_LEN).min(PAGE_LEN);
        Self { bytes, start }
    }

    pub fn bytes(&self) -> &[u8] {
        self.bytes.get(self.start..).unwrap_or_default()
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        self.bytes.get_mut(self.start..).unwrap_or_default()
    }
}

/// A chunk that has been copied.
struct Copied {
    index: usize,
    offset: u64,
    runs: Vec<Run>,
    buffer: Buffer,
}

/// Copies chunks for the thread that writes them.
pub struct Feeder<'a> {
    ram: &'a dyn Ram,
    places: &'a [Place],
    since: Option<&'a PageSet>,
    chunks: &'a mut [Option<Chunk>],
    copied: SyncSender<Copied>,
    spare: Receiver<Buffer>,
    /// One that has nothing to be written.
    idle: Option<Buffer>,
    made: usize,
}

impl Feeder<'_> {
    /// Copies the pages of a chunk that are not zeros: how many bytes of RAM that is. The chunk does not change meanwhile, and may when
    /// this returns. `None` when there is no such chunk.
    ///
    /// # Errors
    ///
    /// [`PagesError`]. [`PagesError::Cancelled`] also when the file takes nothing any more, which [`PageWriter::beside`] then tells.
    pub fn copy(&mut self, index: usize) -> Result<Option<u64>, PagesError> {
        let (Some(place), Some(to)) = (self.places.get(index), self.chunks.get_mut(index)) else {
            return Ok(None);
        };
        let idle = self.idle.take().or_else(|| self.spare.try_recv().ok());
        let mut buffer = match idle {
            Some(buffer) => buffer,
            None if self.made < BUFFERS => {
                self.made += 1;
                Buffer::new()
            }
            None => self.spare.recv().map_err(|_| PagesError::Cancelled)?,
        };
        let since = self.since.map(|pages| pages.of_chunk(index));
        let chunk = scan(self.ram, (*place, since), buffer.bytes_mut())?;
        let runs = chunk.runs.clone();
        *to = Some(chunk);
        if runs.is_empty() {
            self.idle = Some(buffer);
            return Ok(Some(place.2 as u64));
        }
        let copied = Copied {
            index,
            offset: place.1,
            runs,
            buffer,
        };
        let sent = self.copied.send(copied);
        sent.map_err(|_| PagesError::Cancelled)?;
        Ok(Some(place.2 as u64))
    }
}

/// Writes what comes, until nothing more does: where it is that has been compressed.
fn write(
    store: &mut Store,
    file: &File,
    copied: Receiver<Copied>,
    spare: &Sender<Buffer>,
) -> Result<Vec<(usize, Frame)>, PagesError> {
    let mut frames = Vec::new();
    for Copied {
        index,
        offset,
        runs,
        buffer,
    } in copied
    {
        let frame = store.put((file, offset), &runs, buffer.bytes())?;
        frames.extend(frame.map(|frame| (index, frame)));
        // Nobody needs it at the end.
        let _ = spare.send(buffer);
    }
    Ok(frames)
}

impl PageWriter {
    /// Has `work` copy chunks of `ram`, which are written to `file` meanwhile, and are when this returns.
    ///
    /// # Errors
    ///
    /// [`PagesError`], of what was written; the file is then of no use.
    pub fn beside<T>(
        &mut self,
        file: &File,
        ram: &dyn Ram,
        work: impl FnOnce(&mut Feeder<'_>) -> T,
    ) -> Result<T, PagesError> {
        let Self {
            places,
            chunks,
            since,
            store,
            ..
        } = self;
        let (full, copied) = sync_channel(BUFFERS);
        let (empty, spare) = channel();
        let (done, frames) = scope(|scope| {
            let run = move || write(store, file, copied, &empty);
            let writer = Builder::new().name("snapshot-write".to_owned());
            let writer = writer.spawn_scoped(scope, run);
            let failed = |source| PagesError::Write { offset: 0, source };
            let writer = writer.map_err(failed)?;
            let mut feeder = Feeder {
                ram,
                places,
                since: since.as_ref(),
                chunks: chunks.as_mut_slice(),
                copied: full,
                spare,
                idle: None,
                made: 0,
            };
            let done = work(&mut feeder);
            // It ends when it has written what there is.
            drop(feeder);
            let frames = writer.join();
            let lost = |_| failed(std::io::ErrorKind::BrokenPipe.into());
            Ok((done, frames.map_err(lost)??))
        })?;
        for (index, frame) in frames {
            if let Some(Some(chunk)) = chunks.get_mut(index) {
                chunk.frame = Some(frame);
            }
        }
        Ok(done)
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::fs::OpenOptions;
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::{MetadataExt, OpenOptionsExt};

    use super::super::tests::{HIGH, MIB, Memory};
    use super::super::{PageIndex, PageSet};
    use super::*;

    const O_DIRECT: i32 = 0o40_000;

    /// Every chunk, and its memory has changed as soon as it was copied.
    fn written(memory: &Memory, writer: PageWriter, file: &File) -> PageIndex {
        let mut writer = writer;
        let copy = |feeder: &mut Feeder<'_>| {
            for (index, at) in [0, 2 * MIB, HIGH, HIGH + 2 * MIB].into_iter().enumerate() {
                feeder.copy(index).unwrap().unwrap();
                memory.write(at, b"too late").unwrap();
            }
            assert_eq!(feeder.copy(4).unwrap(), None);
        };
        writer.beside(file, memory, copy).unwrap();
        let index = writer.finish(file).unwrap().unwrap();
        let len = file.metadata().unwrap().len();
        index.check(&memory.ranges(), len).unwrap();
        index
    }

    fn filled() -> Memory {
        let memory = Memory::new();
        memory.write(0, &vec![7; 1 << 20]).unwrap();
        for page in (0..400).step_by(3) {
            memory.write(2 * MIB + page * 4096, &[8; 4096]).unwrap();
        }
        memory.write(HIGH + 3 * MIB - 9, &[9; 9]).unwrap();
        memory
    }

    fn direct(file: &File) -> Option<File> {
        let place = format!("/proc/self/fd/{}", file.as_raw_fd());
        let mut options = OpenOptions::new();
        let opened = options.write(true).custom_flags(O_DIRECT).open(place);
        opened
            .inspect_err(|error| println!("no direct I/O here: {error}"))
            .ok()
    }

    #[test]
    fn what_is_copied_is_written_as_it_was_in_every_way() {
        for way in ["plain", "direct", "packed"] {
            let memory = filled();
            let file = tempfile::tempfile().unwrap();
            let writer = PageWriter::new(&memory.ranges());
            let writer = match way {
                "direct" => writer.past_the_cache(direct(&file)),
                "packed" => writer.packed().unwrap(),
                _ => writer,
            };
            let index = written(&memory, writer, &file);
            let back = Memory::new();
            let mut take = |address, bytes: &[u8]| back.write(address, bytes);
            index.read(&file, &mut take, &mut |_| true).unwrap();
            let wanted = filled();
            assert!(back.low == wanted.low && back.high == wanted.high, "{way}");
            assert_eq!(index.is_packed(), way == "packed");
            let blocks = file.metadata().unwrap().blocks();
            assert!(blocks * 512 < 3 * MIB, "{way}: {blocks}");
        }
    }

    /// A file that direct I/O refuses is written nevertheless.
    #[test]
    fn a_file_that_takes_no_direct_writes_is_written_through_the_cache() {
        let memory = filled();
        let file = tempfile::tempfile().unwrap();
        // Opened for reading.
        let deaf = File::open(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap();
        let writer = PageWriter::new(&memory.ranges()).past_the_cache(Some(deaf));
        let index = written(&memory, writer, &file);
        index
            .read(&file, &mut |_, _| Ok(()), &mut |_| true)
            .unwrap();
    }

    #[test]
    fn a_file_that_takes_nothing_more_ends_the_work_and_tells_why() {
        let memory = Memory::new();
        for at in [0, 2 * MIB, HIGH, HIGH + 2 * MIB] {
            memory.write(at, b"here").unwrap();
        }
        let full = File::options().write(true).open("/dev/full").unwrap();
        let mut writer = PageWriter::new(&memory.ranges());
        let ended = Cell::new(false);
        let failed = writer.beside(&full, &memory, |feeder| {
            // More than there are buffers.
            let all = (0..1000).try_for_each(|index| feeder.copy(index % 4).map(drop));
            ended.set(all.is_err());
        });
        assert!(ended.get());
        assert!(matches!(failed, Err(PagesError::Write { offset: 0, .. })));
    }

    #[test]
    fn only_what_has_changed_is_copied() {
        let memory = filled();
        let mut changed = PageSet::new(&memory.ranges());
        changed.add_word(0, 0, 0b10);
        let mut writer = PageWriter::new(&memory.ranges()).since(Some(changed));
        let file = tempfile::tempfile().unwrap();
        let copied = writer.beside(&file, &memory, |feeder| feeder.copy(0));
        assert_eq!(copied.unwrap().unwrap(), Some(2 * MIB));
        let index = writer.finish(&file).unwrap().unwrap();
        assert_eq!((index.data(), index.kept()), (4096, 7 * MIB - 4096));
    }
}
