//! Scripted reads and writes of an image, in the words and with the answers of `qemu-io`.
//!
//! The command `help` lists what there is. What `qemu-io` does asynchronously is done at once here, so
//! `aio_flush` has nothing to wait for.

mod args;
mod report;

use std::io::{self, Write};
use std::time::{Duration, Instant};

use self::args::{Flags, number, pattern};
use self::report::{Report, dump, reason};
use super::size::ExactSize;
use super::{resize, zeros};
use crate::Preallocation;
use crate::image::{Image, Kept};
use crate::qcow2::geometry::Geometry;

/// What writes fill with unless they are told otherwise.
const FILL: u8 = 0xcd;

/// The most bytes that one command moves.
const MOST: u64 = 1 << 30;

/// What commands do.
#[derive(Clone, Copy)]
enum Verb {
    Alloc,
    Discard,
    Flush,
    Help,
    Info,
    Length,
    Map,
    Nothing,
    Quit,
    Read,
    Sleep,
    Truncate,
    Write,
}

/// A command.
struct Command {
    name: &'static str,
    alias: &'static str,
    /// The fewest and the most arguments, options included.
    counts: (usize, usize),
    usage: &'static str,
    about: &'static str,
    verb: Verb,
}

const ANY: usize = usize::MAX;

/// All commands, by name.
const COMMANDS: [Command; 17] = [
    command(
        "aio_flush",
        "",
        (0, 0),
        "",
        "completes all outstanding aio requests",
        Verb::Nothing,
    ),
    command(
        "aio_read",
        "",
        (2, ANY),
        "[-Cqv] [-P pattern] off len [len..]",
        "reads a number of bytes",
        Verb::Read,
    ),
    command(
        "aio_write",
        "",
        (2, ANY),
        "[-Cfquz] [-P pattern] off len [len..]",
        "writes a number of bytes",
        Verb::Write,
    ),
    command(
        "alloc",
        "",
        (1, 2),
        "offset [count]",
        "checks if offset is allocated in the file",
        Verb::Alloc,
    ),
    command(
        "discard",
        "d",
        (2, ANY),
        "[-Cq] off len",
        "discards a number of bytes at a specified offset",
        Verb::Discard,
    ),
    command(
        "flush",
        "f",
        (0, 0),
        "",
        "flush all in-core file state to disk",
        Verb::Flush,
    ),
    command(
        "help",
        "?",
        (0, 1),
        "[command]",
        "help for one or all commands",
        Verb::Help,
    ),
    command(
        "info",
        "i",
        (0, 0),
        "",
        "prints information about the current file",
        Verb::Info,
    ),
    command(
        "length",
        "l",
        (0, 0),
        "",
        "gets the length of the current file",
        Verb::Length,
    ),
    command(
        "map",
        "",
        (0, 0),
        "",
        "prints the allocated areas of a file",
        Verb::Map,
    ),
    command("quit", "q", (0, 0), "", "exit the program", Verb::Quit),
    command(
        "read",
        "r",
        (2, ANY),
        "[-Cqv] [-P pattern [-s off] [-l len]] off len",
        "reads a number of bytes at a specified offset",
        Verb::Read,
    ),
    command(
        "readv",
        "",
        (2, ANY),
        "[-Cqv] [-P pattern] off len [len..]",
        "reads a number of bytes at a specified offset",
        Verb::Read,
    ),
    command(
        "sleep",
        "",
        (1, 1),
        "ms",
        "waits for the given value in milliseconds",
        Verb::Sleep,
    ),
    command(
        "truncate",
        "t",
        (1, 1),
        "off",
        "truncates the current file at the given offset",
        Verb::Truncate,
    ),
    command(
        "write",
        "w",
        (2, ANY),
        "[-cCfquz] [-P pattern] off len",
        "writes a number of bytes at a specified offset",
        Verb::Write,
    ),
    command(
        "writev",
        "",
        (2, ANY),
        "[-Cfq] [-P pattern] off len [len..]",
        "writes a number of bytes at a specified offset",
        Verb::Write,
    ),
];

const fn command(
    name: &'static str,
    alias: &'static str,
    counts: (usize, usize),
    usage: &'static str,
    about: &'static str,
    verb: Verb,
) -> Command {
    Command {
        name,
        alias,
        counts,
        usage,
        about,
        verb,
    }
}

/// Why a command did not do what it was to do.
enum Failed {
    /// To be told on the error output: it was not tried.
    Wrong(String),
    /// To be told among the answers: it was tried, or its options exclude each other.
    Answer(String),
    /// All is told already.
    Told,
    /// An answer could not be written.
    Output(io::Error),
}

impl From<io::Error> for Failed {
    fn from(error: io::Error) -> Self {
        Self::Output(error)
    }
}

/// An image to which commands are given, line by line.
pub struct Session<'a> {
    image: &'a dyn Image,
    out: &'a mut dyn Write,
    errors: &'a mut dyn Write,
    /// What `info` tells of the format.
    about: &'a dyn Fn() -> String,
    done: bool,
}

impl std::fmt::Debug for Session<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session")
            .field("image", &self.image)
            .finish_non_exhaustive()
    }
}

impl<'a> Session<'a> {
    /// A session on an opened image. Answers go to `out`, complaints about commands to `errors`; `about` gives the lines that
    /// `info` adds.
    pub fn new(
        image: &'a dyn Image,
        out: &'a mut dyn Write,
        errors: &'a mut dyn Write,
        about: &'a dyn Fn() -> String,
    ) -> Self {
        Self {
            image,
            out,
            errors,
            about,
            done: false,
        }
    }

    /// Whether `quit` was said.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.done
    }

    /// Runs one line; whether its command succeeded. An empty line does nothing.
    ///
    /// # Errors
    ///
    /// Those of the outputs alone.
    pub fn run(&mut self, line: &str) -> io::Result<bool> {
        let words: Vec<&str> = line.split_whitespace().collect();
        let Some((name, arguments)) = words.split_first() else {
            return Ok(true);
        };
        let known = COMMANDS
            .iter()
            .find(|command| command.name == *name || (command.alias == *name && !name.is_empty()));
        let result = match known {
            None => Err(Failed::Wrong(format!("command \"{name}\" not found"))),
            Some(command) => match command.miscounted(arguments.len()) {
                Some(wrong) => Err(Failed::Wrong(wrong)),
                None => self.execute(command, arguments),
            },
        };
        match result {
            Ok(()) => Ok(true),
            Err(Failed::Wrong(text)) => writeln!(self.errors, "{text}").map(|()| false),
            Err(Failed::Answer(text)) => writeln!(self.out, "{text}").map(|()| false),
            Err(Failed::Told) => Ok(false),
            Err(Failed::Output(error)) => Err(error),
        }
    }

    fn execute(&mut self, command: &Command, arguments: &[&str]) -> Result<(), Failed> {
        match command.verb {
            Verb::Alloc => self.alloc(arguments),
            Verb::Discard => self.discard(command, arguments),
            Verb::Flush => self.flush(),
            Verb::Help => self.help(arguments),
            Verb::Info => self.info(),
            Verb::Length => self.length(),
            Verb::Map => self.map(),
            Verb::Nothing => Ok(()),
            Verb::Quit => {
                self.done = true;
                Ok(())
            }
            Verb::Read => self.read(command, arguments),
            Verb::Sleep => sleep(arguments),
            Verb::Truncate => self.truncate(arguments),
            Verb::Write => self.write(command, arguments),
        }
    }

    fn help(&mut self, arguments: &[&str]) -> Result<(), Failed> {
        let mut found = false;
        for command in &COMMANDS {
            if arguments.first().is_none_or(|name| *name == command.name) {
                found = true;
                writeln!(self.out, "{}", command.help())?;
            }
        }
        match arguments.first() {
            Some(name) if !found => Err(Failed::Answer(format!("command {name} not found"))),
            _ => Ok(()),
        }
    }

    fn length(&mut self) -> Result<(), Failed> {
        writeln!(self.out, "{}", ExactSize::from(self.image.size()))?;
        Ok(())
    }

    fn info(&mut self) -> Result<(), Failed> {
        let geometry = self.image.as_qcow2().map(crate::Qcow2::geometry);
        let name = if geometry.is_some() { "qcow2" } else { "raw" };
        let cluster = geometry.map_or(0, Geometry::cluster);
        // The machine's state is kept behind what the L1 table of the disk maps.
        let state = geometry.map_or(0, |geometry| {
            geometry.l1_entries(self.image.size()) << geometry.table_bits()
        });
        writeln!(self.out, "format name: {name}")?;
        writeln!(self.out, "cluster size: {}", ExactSize::from(cluster))?;
        writeln!(self.out, "vm state offset: {}", ExactSize::from(state))?;
        write!(self.out, "{}", (self.about)())?;
        Ok(())
    }

    fn flush(&mut self) -> Result<(), Failed> {
        self.image
            .flush()
            .map_err(|error| Failed::Answer(format!("flush failed: {}", reason(&error))))
    }

    fn truncate(&mut self, arguments: &[&str]) -> Result<(), Failed> {
        let size = number(arguments.first().copied().unwrap_or_default())?;
        resize(self.image, size, Preallocation::Off)
            .map_err(|error| Failed::Wrong(format!("truncate failed: {}", reason(&error))))
    }

    /// Whether the image itself has something at `offset`, and how far it goes on like that.
    fn allocated(&self, offset: u64, max: u64) -> Result<(bool, u64), Failed> {
        let raw = self.image.as_raw().is_some();
        let (mut kept, mut len) = (None, 0);
        while len < max {
            let extent = self
                .image
                .extent(offset + len, max - len)
                .map_err(|error| Failed::Answer(format!("map failed: {}", reason(&error))))?;
            let allocated = raw || extent.kept != Kept::Absent;
            if *kept.get_or_insert(allocated) != allocated {
                break;
            }
            len += extent.len;
        }
        Ok((kept.unwrap_or(false), len))
    }

    fn check_range(&self, what: &str, offset: u64, len: u64) -> Result<(), Failed> {
        match offset.checked_add(len) {
            Some(end) if end <= self.image.size() && len <= MOST => Ok(()),
            _ => Err(Failed::Answer(format!("{what} failed: Input/output error"))),
        }
    }

    fn alloc(&mut self, arguments: &[&str]) -> Result<(), Failed> {
        let offset = number(arguments.first().copied().unwrap_or_default())?;
        let left = self
            .image
            .size()
            .checked_sub(offset)
            .ok_or_else(|| Failed::Answer("alloc failed: Input/output error".to_owned()))?;
        let count = match arguments.get(1) {
            Some(count) => number(count)?,
            None => 512,
        }
        .min(left);
        let (mut sum, mut at) = (0, offset);
        while at < offset + count {
            let (allocated, len) = self.allocated(at, offset + count - at)?;
            sum += if allocated { len } else { 0 };
            at += len;
        }
        let place = ExactSize::from(offset);
        writeln!(self.out, "{sum}/{count} bytes allocated at offset {place}")?;
        Ok(())
    }

    fn map(&mut self) -> Result<(), Failed> {
        let (size, mut at) = (self.image.size(), 0);
        while at < size {
            let (allocated, len) = self.allocated(at, size - at)?;
            let kind = if allocated {
                "    allocated"
            } else {
                "not allocated"
            };
            writeln!(
                self.out,
                "{} (0x{len:x}) bytes {kind} at offset {} (0x{at:x})",
                ExactSize::from(len),
                ExactSize::from(at)
            )?;
            at += len;
        }
        Ok(())
    }

    fn discard(&mut self, command: &Command, arguments: &[&str]) -> Result<(), Failed> {
        let flags = Flags::parse(command.name, "Cq", arguments)?;
        let (offset, len) = flags.range(command)?;
        self.check_range("discard", offset, len)?;
        let start = Instant::now();
        self.image
            .discard(offset, len)
            .map_err(|error| Failed::Answer(format!("discard failed: {}", reason(&error))))?;
        self.report(&flags, "discard", offset, len, start)
    }

    fn report(
        &mut self,
        flags: &Flags<'_>,
        what: &'static str,
        offset: u64,
        len: u64,
        start: Instant,
    ) -> Result<(), Failed> {
        if flags.has('q') {
            return Ok(());
        }
        let report = Report {
            what,
            offset,
            len,
            time: start.elapsed(),
        };
        report.write(self.out, flags.has('C'))?;
        Ok(())
    }

    fn read(&mut self, command: &Command, arguments: &[&str]) -> Result<(), Failed> {
        let options = if command.name == "read" {
            "CqvpP:s:l:"
        } else {
            "CqvpP:"
        };
        let flags = Flags::parse(command.name, options, arguments)?;
        let (offset, len) = flags.range(command)?;
        let wanted = flags.value('P').map(pattern).transpose()?;
        let from = flags.value('s').map(number).transpose()?;
        let count = flags.value('l').map(number).transpose()?;
        if wanted.is_none() && (from.is_some() || count.is_some()) {
            return Err(Failed::Answer(format!(
                "{} {}",
                command.name, command.usage
            )));
        }
        let from = from.unwrap_or(0);
        let count = count.unwrap_or(len.saturating_sub(from));
        if from.checked_add(count).is_none_or(|end| end > len) {
            return Err(Failed::Answer(
                "pattern verification range exceeds end of read data".to_owned(),
            ));
        }
        self.check_range("read", offset, len)?;
        let mut data = buffer(len, 0)?;
        let start = Instant::now();
        self.image
            .read(offset, &mut data)
            .map_err(|error| Failed::Answer(format!("read failed: {}", reason(&error))))?;
        let checked = index(from)..index(from + count);
        let matches = wanted.is_none_or(|wanted| {
            let checked = data.get(checked).unwrap_or_default();
            checked.iter().all(|&byte| byte == wanted)
        });
        if !matches {
            let at = offset + from;
            writeln!(
                self.out,
                "Pattern verification failed at offset {at}, {count} bytes"
            )?;
        }
        if flags.has('v') && !flags.has('q') {
            dump(self.out, &data, offset)?;
        }
        self.report(&flags, "read", offset, len, start)?;
        if matches { Ok(()) } else { Err(Failed::Told) }
    }

    fn write(&mut self, command: &Command, arguments: &[&str]) -> Result<(), Failed> {
        let flags = Flags::parse(command.name, "cCfnpquzP:", arguments)?;
        flags.exclude(
            'z',
            'P',
            "Only one of -z and -P can be specified at the same time",
        )?;
        flags.exclude('z', 'c', "-c and -z cannot be specified at the same time")?;
        flags.need('u', 'z', "-u requires -z to be specified")?;
        flags.need('n', 'z', "-n requires -z to be specified")?;
        let (offset, len) = flags.range(command)?;
        let fill = flags.value('P').map(pattern).transpose()?.unwrap_or(FILL);
        self.check_range(
            "write",
            offset,
            if flags.has('z') { len.min(MOST) } else { len },
        )?;
        let data = buffer(if flags.has('z') { 0 } else { len }, fill)?;
        let start = Instant::now();
        let written = if flags.has('z') {
            self.image.write_zeroes(offset, len, flags.has('u'))
        } else if flags.has('c') {
            self.write_compressed(offset, &data)
        } else {
            self.image.write(offset, &data)
        };
        let durable = || {
            if flags.has('f') {
                self.image.flush()
            } else {
                Ok(())
            }
        };
        written
            .and_then(|()| durable())
            .map_err(|error| Failed::Answer(format!("write failed: {}", reason(&error))))?;
        self.report(&flags, "wrote", offset, len, start)
    }

    fn write_compressed(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let image = self.image.as_qcow2().ok_or(io::ErrorKind::Unsupported)?;
        let cluster = image.geometry().cluster();
        if !offset.is_multiple_of(cluster) {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        for (number, part) in data.chunks(index(cluster).max(1)).enumerate() {
            let at = offset + number as u64 * cluster;
            if zeros::is_zero(part) && part.len() as u64 == cluster {
                self.image.write_zeroes(at, cluster, true)?;
            } else if !image.write_compressed(at, part)? {
                self.image.write(at, part)?;
            }
        }
        Ok(())
    }
}

impl Command {
    fn miscounted(&self, given: usize) -> Option<String> {
        let (least, most) = self.counts;
        if (least..=most).contains(&given) {
            return None;
        }
        let name = self.name;
        Some(if most == ANY {
            format!("bad argument count {given} to {name}, expected at least {least} arguments")
        } else if least == most {
            format!("bad argument count {given} to {name}, expected {least} arguments")
        } else {
            format!(
                "bad argument count {given} to {name}, expected between {least} and {most} arguments"
            )
        })
    }

    fn help(&self) -> String {
        format!("{} {} -- {}", self.name, self.usage, self.about)
    }
}

fn sleep(arguments: &[&str]) -> Result<(), Failed> {
    let text = arguments.first().copied().unwrap_or_default();
    let time = text
        .parse()
        .map_err(|_| Failed::Answer(format!("{text} is not a valid time: give milliseconds")))?;
    std::thread::sleep(Duration::from_millis(time));
    Ok(())
}

fn index(number: u64) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}

fn buffer(len: u64, fill: u8) -> Result<Vec<u8>, Failed> {
    let mut data = Vec::new();
    data.try_reserve_exact(index(len))
        .map_err(|_| Failed::Answer("there is not that much memory".to_owned()))?;
    data.resize(index(len), fill);
    Ok(data)
}

#[cfg(test)]
mod tests;
