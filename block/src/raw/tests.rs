use std::error::Error;
use std::os::unix::net::UnixListener;
use std::process::{Command, Output};

use super::*;
use crate::options::{Cache, Discard, Format};
use crate::testing::{AnyPath, Arena, perform};
use crate::{Buffers, DiskEvent, Op};

fn image(size: u64) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(size).unwrap();
    file
}

fn read_only() -> DiskOptions {
    DiskOptions {
        read_only: true,
        ..DiskOptions::default()
    }
}

fn open(path: &Path) -> Result<RawDisk, OpenError> {
    RawDisk::open(path, &AnyPath, &DiskOptions::default())
}

/// The message of an error with its sources, as a user sees it.
fn refused(path: &Path, options: &DiskOptions) -> String {
    let error = RawDisk::open(path, &AnyPath, options).unwrap_err();
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    assert!(text.contains(&path.display().to_string()), "{text}");
    text
}

fn qemu(program: &str, arguments: &[&str], path: &Path) -> Output {
    Command::new(program)
        .args(arguments)
        .arg(path)
        .output()
        .unwrap_or_else(|e| panic!("{program} (Debian package qemu-utils): {e}"))
}

#[test]
fn a_missing_file_is_refused_and_not_created() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("none.img");
    assert!(refused(&path, &DiskOptions::default()).contains("no such file"));
    assert!(!path.exists());
}

#[test]
fn a_directory_is_refused_for_writing_and_reading() {
    let dir = tempfile::tempdir().unwrap();
    for options in [DiskOptions::default(), read_only()] {
        assert!(refused(dir.path(), &options).contains("a directory"));
    }
}

#[test]
fn a_pipe_a_socket_and_a_character_device_are_refused_without_waiting() {
    let dir = tempfile::tempdir().unwrap();
    let fifo = dir.path().join("fifo");
    assert!(
        Command::new("mkfifo")
            .arg(&fifo)
            .status()
            .unwrap()
            .success()
    );
    let socket = dir.path().join("socket");
    let _listener = UnixListener::bind(&socket).unwrap();
    for options in [DiskOptions::default(), read_only()] {
        assert!(refused(&fifo, &options).contains("a named pipe"));
        assert!(refused(&socket, &options).contains("a socket"));
        let text = refused(Path::new("/dev/zero"), &options);
        assert!(text.contains("a character device"), "{text}");
    }
}

/// Refuses writing, as the system does to those who may only read (root may always write).
struct NoWriting;

impl Opener for NoWriting {
    fn open(&self, path: &Path, access: Access) -> io::Result<File> {
        if access.write {
            return Err(io::Error::from_raw_os_error(libc::EACCES));
        }
        AnyPath.open(path, access)
    }
}

#[test]
fn a_file_that_may_not_be_written_is_refused_with_readonly_as_the_mend() {
    let file = image(4096);
    let error = RawDisk::open(file.path(), &NoWriting, &DiskOptions::default()).unwrap_err();
    assert!(matches!(error, OpenError::NotWritable { .. }));
    assert!(error.to_string().contains("readonly=on"), "{error}");
    RawDisk::open(file.path(), &NoWriting, &read_only()).unwrap();
}

#[test]
fn odd_sizes_are_refused_and_whole_sectors_taken() {
    for size in [1, 511, 513, 4097] {
        let text = refused(image(size).path(), &DiskOptions::default());
        assert!(text.contains("not a multiple of 512"), "{text}");
    }
    assert!(refused(image(0).path(), &DiskOptions::default()).contains("empty"));
    for size in [512, 1536, 4096, 1 << 40] {
        let file = image(size);
        let info = open(file.path()).unwrap().info();
        assert_eq!((info.size, info.logical_block), (size, 512));
        assert!(info.physical_block.is_power_of_two() && info.physical_block >= 512);
    }
}

#[test]
fn a_read_only_image_of_an_odd_size_ends_in_zeros() {
    for (size, aio, cache) in [1, 511, 1000, 2048, 4097, (256 << 10) + 700]
        .into_iter()
        .flat_map(|size| [Aio::IoUring, Aio::Threads].map(|aio| (size, aio)))
        .flat_map(|(size, aio)| [Cache::Writeback, Cache::None].map(|cache| (size, aio, cache)))
    {
        let case = format!("{size} bytes, {aio:?}, {cache:?}");
        let file = image(0);
        let bytes: Vec<u8> = (0..size)
            .map(|i| u8::try_from(i % 251).unwrap() + 1)
            .collect();
        std::fs::write(file.path(), &bytes).unwrap();
        let options = DiskOptions {
            aio,
            cache,
            ..read_only()
        };
        let disk = RawDisk::open(file.path(), &AnyPath, &options).unwrap();
        let info = disk.info();
        let unit = u64::from(info.logical_block);
        assert_eq!(info.size, (size as u64).next_multiple_of(unit), "{case}");
        let whole = usize::try_from(info.size).unwrap();
        let arena = Arena::new(whole + 4096);
        let mut queue = disk.queue(1).unwrap();
        // Memory that suits direct I/O, and memory that does not.
        for at in [0, 1] {
            arena.put(0, &vec![0xee; whole + 4096]);
            let buffers = arena.buffers(&[(at, whole)]);
            perform(queue.as_mut(), Op::Read, 0, buffers).unwrap();
            assert_eq!(arena.get(at, size), bytes, "{case}");
            assert_eq!(
                arena.get(at + size, whole - size),
                vec![0; whole - size],
                "{case}"
            );
            assert_eq!(arena.get(at + whole, 8), [0xee; 8], "{case}");
        }
        let last = arena.buffers(&[(0, info.logical_block as usize)]);
        perform(queue.as_mut(), Op::Read, info.size - unit, last).unwrap();
        let past = arena.buffers(&[(0, info.logical_block as usize)]);
        let error = perform(queue.as_mut(), Op::Read, info.size, past).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{case}");
    }
}

#[test]
fn a_foreign_format_is_refused_unless_raw_is_stated() {
    let file = image(0);
    let out = qemu("qemu-img", &["create", "-q", "-f", "qcow2"], file.path());
    assert!(!out.status.success(), "no size was given");
    for format in ["qcow2", "vmdk", "vdi", "vhdx", "vpc", "qed", "parallels"] {
        let path = file.path().to_str().unwrap();
        let out = Command::new("qemu-img")
            .args(["create", "-q", "-f", format, path, "64M"])
            .output()
            .unwrap();
        assert!(out.status.success(), "{format}: {out:?}");
        let text = refused(file.path(), &DiskOptions::default());
        assert!(text.contains("format=raw"), "{format}: {text}");
        assert!(
            text.contains(format.trim_end_matches('2')),
            "{format}: {text}"
        );
        // What is stated goes, provided that the size does.
        let len = file.as_file().metadata().unwrap().len();
        file.as_file().set_len(len.next_multiple_of(512)).unwrap();
        let stated = DiskOptions {
            format: Some(Format::Raw),
            ..DiskOptions::default()
        };
        RawDisk::open(file.path(), &AnyPath, &stated).unwrap();
    }
}

#[test]
fn a_disk_opened_twice_for_writing_is_refused_and_two_readers_are_fine() {
    let file = image(4096);
    let first = open(file.path()).unwrap();
    for options in [DiskOptions::default(), read_only()] {
        assert!(refused(file.path(), &options).contains("in use by another program"));
    }
    drop(first);
    let readers = [(); 2].map(|()| RawDisk::open(file.path(), &AnyPath, &read_only()).unwrap());
    assert!(refused(file.path(), &DiskOptions::default()).contains("readonly=on"));
    drop(readers);
    let unlocked = DiskOptions {
        lock: false,
        ..DiskOptions::default()
    };
    let _held = open(file.path()).unwrap();
    RawDisk::open(file.path(), &AnyPath, &unlocked).unwrap();
}

#[test]
fn the_lock_outlives_the_disk_with_its_queues_and_goes_with_the_last() {
    let file = image(4096);
    for aio in [Aio::IoUring, Aio::Threads] {
        let options = DiskOptions {
            aio,
            ..DiskOptions::default()
        };
        for _ in 0..20 {
            let disk = RawDisk::open(file.path(), &AnyPath, &options).unwrap();
            let mut queue = disk.queue(4).unwrap();
            drop(disk);
            assert!(open(file.path()).is_err(), "{aio:?}");
            let arena = Arena::new(512);
            perform(queue.as_mut(), Op::Write, 0, arena.buffers(&[(0, 512)])).unwrap();
            perform(queue.as_mut(), Op::Flush, 0, Buffers::none()).unwrap();
        }
    }
}

/// A qcow2 image to be opened as raw here. QEMU's driver for raw images lets others write
/// unless a virtual machine's device forbids it; the one for qcow2 never does.
fn qcow2_image() -> tempfile::NamedTempFile {
    let file = image(0);
    let path = file.path().to_str().unwrap();
    let out = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", path, "1M"])
        .output()
        .unwrap_or_else(|e| panic!("qemu-img (Debian package qemu-utils): {e}"));
    assert!(out.status.success(), "{out:?}");
    let len = file.as_file().metadata().unwrap().len();
    file.as_file().set_len(len.next_multiple_of(512)).unwrap();
    file
}

fn stated(read_only: bool) -> DiskOptions {
    DiskOptions {
        read_only,
        format: Some(Format::Raw),
        ..DiskOptions::default()
    }
}

#[test]
fn qemu_is_kept_out_while_the_disk_is_open() {
    for (file, format) in [(image(1 << 20), "raw"), (qcow2_image(), "qcow2")] {
        let succeeds = |program, arguments: &[&str]| {
            let arguments = [arguments, &["-f", format]].concat();
            let out = qemu(program, &arguments, file.path());
            let text = String::from_utf8_lossy(&out.stderr);
            assert_eq!(out.status.success(), !text.contains("lock"), "{out:?}");
            out.status.success()
        };
        let writes = || succeeds("qemu-io", &["-c", "write 0 4k"]);
        let reads = || succeeds("qemu-io", &["-r", "-c", "read 0 4k"]);
        let checks = || succeeds("qemu-img", &["info"]);

        let writer = RawDisk::open(file.path(), &AnyPath, &stated(false)).unwrap();
        assert!(!writes());
        if format == "qcow2" {
            assert!(!reads() && !checks());
        }
        drop(writer);
        let reader = RawDisk::open(file.path(), &AnyPath, &stated(true)).unwrap();
        assert!(!writes() && reads() && checks());
        drop(reader);
        assert!(writes() && reads() && checks());
    }
}

/// A qemu-io that has `path` open until its input closes.
fn qemu_holding(path: &Path, format: &str, read_only: bool) -> std::process::Child {
    use std::io::{BufRead, BufReader, Write};
    let mut command = Command::new("qemu-io");
    if read_only {
        command.arg("-r");
    }
    let mut child = command
        .args(["-f", format])
        .arg(path)
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap_or_else(|e| panic!("qemu-io (Debian package qemu-utils): {e}"));
    // It answers once the image is open.
    let input = child.stdin.as_mut().unwrap();
    input.write_all(b"length\n").unwrap();
    let mut answer = String::new();
    let mut output = BufReader::new(child.stdout.as_mut().unwrap());
    while !answer.contains("MiB") {
        assert_ne!(output.read_line(&mut answer).unwrap(), 0, "{answer}");
    }
    child
}

#[test]
fn the_disk_is_refused_while_qemu_has_it_open() {
    // QEMU's format and whether it only reads; then who may enter here: a writer, a reader.
    for (format, qemu_reads, writer, reader) in [
        ("raw", false, false, false),
        ("qcow2", false, false, false),
        ("qcow2", true, false, true),
    ] {
        let file = if format == "raw" {
            image(1 << 20)
        } else {
            qcow2_image()
        };
        let mut child = qemu_holding(file.path(), format, qemu_reads);
        for (read_only, welcome) in [(false, writer), (true, reader)] {
            let result = RawDisk::open(file.path(), &AnyPath, &stated(read_only));
            let case = format!("{format}, QEMU reads: {qemu_reads}, we read: {read_only}");
            match result {
                Ok(_) => assert!(welcome, "{case}"),
                Err(OpenError::InUse { .. }) => assert!(!welcome, "{case}"),
                Err(error) => panic!("{case}: {error}"),
            }
        }
        drop(child.stdin.take());
        child.wait().unwrap();
        RawDisk::open(file.path(), &AnyPath, &stated(false)).unwrap();
    }
}

#[test]
fn direct_io_on_a_disk_of_odd_blocks_names_the_mend() {
    let file = image(4096);
    let options = DiskOptions {
        cache: Cache::None,
        ..DiskOptions::default()
    };
    let unit = RawDisk::open(file.path(), &AnyPath, &options)
        .unwrap()
        .info()
        .logical_block;
    file.as_file().set_len(4096 + 512).unwrap();
    let result = RawDisk::open(file.path(), &AnyPath, &options);
    if unit == 512 {
        result.unwrap();
    } else {
        assert!(refused(file.path(), &options).contains("direct=off"));
    }
}

#[test]
fn a_file_system_without_direct_io_names_the_mend() {
    struct NoDirect;
    impl Opener for NoDirect {
        fn open(&self, path: &Path, access: Access) -> io::Result<File> {
            if access.direct {
                return Err(io::Error::from_raw_os_error(libc::EINVAL));
            }
            AnyPath.open(path, access)
        }
    }
    let file = image(4096);
    let options = DiskOptions {
        cache: Cache::Directsync,
        ..DiskOptions::default()
    };
    let error = RawDisk::open(file.path(), &NoDirect, &options).unwrap_err();
    assert!(error.to_string().contains("direct=off"), "{error}");
}

#[test]
fn options_are_named_as_in_qemu() {
    use serde::Deserialize;
    use serde::de::value::{Error, StrDeserializer};
    fn parse<'a, T: Deserialize<'a>>(word: &'a str) -> Result<T, Error> {
        T::deserialize(StrDeserializer::new(word))
    }
    for (word, cache) in [
        ("none", Cache::None),
        ("writeback", Cache::Writeback),
        ("writethrough", Cache::Writethrough),
        ("directsync", Cache::Directsync),
        ("unsafe", Cache::Unsafe),
    ] {
        assert_eq!(parse::<Cache>(word), Ok(cache));
    }
    assert_eq!(parse::<Aio>("io_uring"), Ok(Aio::IoUring));
    assert_eq!(parse::<Aio>("threads"), Ok(Aio::Threads));
    assert_eq!(parse::<Aio>("auto"), Ok(Aio::Auto));
    assert_eq!(parse::<Discard>("unmap"), Ok(Discard::Unmap));
    assert_eq!(parse::<Discard>("ignore"), Ok(Discard::Ignore));
    assert_eq!(parse::<Format>("raw"), Ok(Format::Raw));
    assert_eq!(parse::<Format>("qcow2"), Ok(Format::Qcow2));
    assert!(parse::<Format>("vmdk").is_err());
}

#[test]
fn a_running_disk_grows_and_its_queues_know() {
    let file = image(1 << 20);
    for direct in [false, true] {
        let options = DiskOptions {
            direct: Some(direct),
            ..DiskOptions::default()
        };
        let disk = RawDisk::open(file.path(), &AnyPath, &options).unwrap();
        let size = disk.info().size;
        let unit = u64::from(disk.info().logical_block);
        let mut queue = disk.queue(1).unwrap();
        let arena = Arena::new(4096);
        let mut read = |at| perform(queue.as_mut(), Op::Read, at, arena.buffers(&[(0, 4096)]));
        assert_eq!(read(size).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        disk.resize(size + (1 << 20)).unwrap();
        assert_eq!(disk.info().size, size + (1 << 20));
        read(size).unwrap();
        assert_eq!(arena.get(0, 4096), [0; 4096]);
        for bad in [
            0,
            size,
            size + (1 << 20) - unit,
            size + (2 << 20) + 256,
            u64::MAX,
        ] {
            let error = disk.resize(bad).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{bad}: {error}");
            assert_eq!(disk.info().size, size + (1 << 20));
        }
        let text = disk.resize(size).unwrap_err().to_string();
        assert!(text.contains("cannot shrink"), "{text}");
        let length = file.as_file().metadata().unwrap().len();
        assert_eq!(length, size + (1 << 20));
    }
}

#[test]
fn growing_keeps_what_others_have_appended_and_refuses_read_only() {
    let file = image(1 << 20);
    let disk = RawDisk::open(file.path(), &AnyPath, &DiskOptions::default()).unwrap();
    file.as_file().set_len(4 << 20).unwrap();
    disk.resize(2 << 20).unwrap();
    assert_eq!(file.as_file().metadata().unwrap().len(), 4 << 20);
    assert_eq!(disk.info().size, 2 << 20);
    drop(disk);
    let disk = RawDisk::open(file.path(), &AnyPath, &read_only()).unwrap();
    let error = disk.resize(8 << 20).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ReadOnlyFilesystem);
    assert!(error.to_string().contains("readonly=on"), "{error}");
}

/// Keeps what it hears.
#[derive(Default)]
struct Ear(std::sync::Mutex<Vec<DiskEvent>>);

impl Observer for Ear {
    fn event(&self, event: &DiskEvent) {
        self.0.lock().unwrap().push(event.clone());
    }
}

#[test]
fn the_first_write_past_the_threshold_is_told_once() {
    let file = image(1 << 20);
    let disk = RawDisk::open(file.path(), &AnyPath, &DiskOptions::default()).unwrap();
    let ear = Arc::new(Ear::default());
    disk.observe(ear.clone());
    let mut queue = disk.queue(1).unwrap();
    let arena = Arena::new(4096);
    let mut act = |op, offset| {
        let buffers = arena.buffers(&[(0, 4096)]);
        perform(queue.as_mut(), op, offset, buffers).unwrap();
        std::mem::take(&mut *ear.0.lock().unwrap())
    };
    assert_eq!(act(Op::Write, 512 << 10), []);
    disk.set_write_threshold(Some(512 << 10));
    assert_eq!(act(Op::Write, (512 << 10) - 4096), []);
    assert_eq!(act(Op::Read, 512 << 10), []);
    assert_eq!(act(Op::Discard { len: 4096 }, 512 << 10), []);
    let told = |offset| {
        [DiskEvent::WriteThreshold {
            threshold: 512 << 10,
            offset,
        }]
    };
    assert_eq!(act(Op::Write, 512 << 10), told((512 << 10) + 4096));
    assert_eq!(act(Op::Write, 600 << 10), [], "it is disarmed");
    disk.set_write_threshold(Some(512 << 10));
    let zeroes = Op::WriteZeroes {
        len: 8192,
        may_unmap: true,
    };
    assert_eq!(act(zeroes, 512 << 10), told((512 << 10) + 8192));
    disk.set_write_threshold(Some(512 << 10));
    disk.set_write_threshold(None);
    assert_eq!(act(Op::Write, 600 << 10), []);
}
