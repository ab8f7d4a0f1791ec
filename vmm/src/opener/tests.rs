use std::io::Write;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixStream;

use super::outputs::begin_anew;
use super::*;
use block::Opener as _;

fn dir() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

fn make_pipe(path: &Path) {
    let status = std::process::Command::new("mkfifo").arg(path).status();
    assert!(status.unwrap().success());
}

fn is_close_on_exec(file: &File) -> bool {
    use std::os::fd::AsRawFd;
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", file.as_raw_fd())).unwrap();
    let flags = info.lines().find_map(|l| l.strip_prefix("flags:")).unwrap();
    let flags = i32::from_str_radix(flags.trim(), 8).unwrap();
    flags & libc::O_CLOEXEC != 0
}

#[test]
fn an_input_is_a_regular_file_even_through_a_link() {
    let dir = dir();
    let (file, link) = (dir.path().join("k"), dir.path().join("l"));
    fs::write(&file, "kernel").unwrap();
    symlink(&file, &link).unwrap();
    let mut text = String::new();
    let mut opened = Opener::new().open_input(&link).unwrap();
    opened.read_to_string(&mut text).unwrap();
    assert_eq!(text, "kernel");
    assert!(is_close_on_exec(&opened));
}

#[test]
fn inputs_of_other_types_are_refused_without_waiting() {
    let dir = dir();
    let pipe = dir.path().join("pipe");
    make_pipe(&pipe);
    for (path, found) in [
        (dir.path(), "a directory"),
        (&pipe, "a pipe"),
        (Path::new("/dev/null"), "a character device"),
    ] {
        let message = Opener::new().open_input(path).unwrap_err().to_string();
        assert!(message.contains(found) && message.contains(path.to_str().unwrap()));
    }
    let missing = Opener::new()
        .open_input(&dir.path().join("no"))
        .unwrap_err();
    assert!(missing.to_string().starts_with("cannot open /"));
}

#[test]
fn an_output_is_created_for_its_owner_and_emptied_when_it_is_there() {
    let dir = dir();
    let path = dir.path().join("log");
    let mut file = Opener::new().create_output(&path).unwrap();
    assert_eq!(mode(&path), 0o600);
    assert!(is_close_on_exec(&file));
    file.write_all(b"first").unwrap();
    drop(file);
    Opener::new().create_output(&path).unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"");
}

#[test]
fn a_disk_in_use_is_no_output_and_an_output_in_use_no_disk() {
    let dir = dir();
    let (path, log) = (dir.path().join("disk"), dir.path().join("log"));
    fs::write(&path, [7; 512]).unwrap();
    let opener = Opener::new();
    let options = block::DiskOptions::default();
    let disk = block::RawDisk::open(&path, &opener, &options).unwrap();
    let current = opener.create_output(&log).unwrap();
    let facts = fs::symlink_metadata(&path).unwrap();
    let ours = Some((facts.dev(), facts.ino()));
    for refused in [
        opener.create_output(&path),
        opener.append_output(&path),
        opener.create_event_output(&path),
        opener.rotate_output(&log, &current, &path, ours),
        opener.create_output(&log),
    ] {
        let message = refused.map(|_| ()).unwrap_err();
        assert!(matches!(message, OpenError::InUse { .. }), "{message}");
    }
    assert!(opener.check_kept(&path, ours).is_err());
    assert_eq!(fs::read(&path).unwrap(), [7; 512]);
    drop(disk);
    let output = opener.create_output(&path).unwrap();
    output.set_len(512).unwrap();
    assert!(block::RawDisk::open(&path, &opener, &options).is_err());
    drop(output);
    assert!(block::RawDisk::open(&path, &opener, &options).is_ok());
}

#[test]
fn an_output_is_not_written_through_a_link_nor_made_of_a_directory() {
    let dir = dir();
    let (file, link) = (dir.path().join("precious"), dir.path().join("l"));
    fs::write(&file, "precious").unwrap();
    symlink(&file, &link).unwrap();
    assert!(matches!(
        Opener::new().create_output(&link),
        Err(OpenError::SymbolicLink { .. })
    ));
    assert_eq!(fs::read(&file).unwrap(), b"precious");
    assert!(Opener::new().create_output(dir.path()).is_err());
    assert!(
        Opener::new()
            .create_output(&dir.path().join("no/log"))
            .is_err()
    );
}

#[test]
fn an_output_may_be_a_device_but_not_a_pipe_without_a_reader() {
    let dir = dir();
    let pipe = dir.path().join("pipe");
    make_pipe(&pipe);
    let mut null = Opener::new().create_output(Path::new("/dev/null")).unwrap();
    null.write_all(b"x").unwrap();
    assert!(Opener::new().create_output(&pipe).is_err());
}

#[test]
fn devices_and_files_that_do_something_when_they_are_written_are_no_outputs() {
    let opener = Opener::new();
    let version = fs::read("/proc/self/comm").unwrap();
    for path in [
        "/proc/self/comm",
        "/proc/self/mem",
        "/dev/ptmx",
        "/dev/kmsg",
    ] {
        let path = Path::new(path);
        if path.exists() {
            let refused = opener.create_output(path);
            assert!(
                matches!(
                    refused,
                    Err(OpenError::WrongType { .. }
                        | OpenError::SymbolicLink { .. }
                        | OpenError::Denied { .. })
                ),
                "{refused:?}"
            );
        }
    }
    assert_eq!(fs::read("/proc/self/comm").unwrap(), version);
    for path in ["/dev/null", "/dev/full"] {
        assert!(opener.create_output(Path::new(path)).is_ok(), "{path}");
    }
    let (_near, _far, name) = crate::console::open_pty().unwrap();
    assert!(opener.create_output(Path::new(&name)).is_ok());
}

#[test]
fn a_new_output_that_somebody_has_taken_does_not_keep_the_next_one_from_being_begun() {
    let dir = dir();
    let path = dir.path().join("log");
    fs::write(&path, "").unwrap();
    let made = File::options().read(true).write(true).open(&path).unwrap();
    let taken = Opener::new().append_output(&path).unwrap();
    assert!(begin_anew(&made, &path).is_err());
    assert!(!path.exists());
    drop(taken);
    fs::write(&path, "").unwrap();
    let made = File::options().read(true).write(true).open(&path).unwrap();
    begin_anew(&made, &path).unwrap();
    assert!(path.exists());
}

#[test]
fn a_file_that_cannot_be_looked_at_is_not_replaced() {
    let path = Path::new("/proc/self/comm/below");
    let refused = Opener::new().check_kept(path, None);
    assert!(
        matches!(refused, Err(OpenError::System { .. })),
        "{refused:?}"
    );
}

#[test]
fn disks_are_files_or_block_devices_and_are_never_created() {
    let dir = dir();
    let (disk, pipe) = (dir.path().join("d"), dir.path().join("pipe"));
    let opener = Opener::new();
    let write = Access {
        write: true,
        direct: false,
    };
    assert_eq!(
        opener.open(&disk, write).unwrap_err().kind(),
        io::ErrorKind::NotFound
    );
    assert!(!disk.exists());
    fs::write(&disk, "data").unwrap();
    opener.open(&disk, write).unwrap().write_all(b"D").unwrap();
    assert_eq!(fs::read(&disk).unwrap(), b"Data");
    let mut read_only = opener.open(&disk, Access::default()).unwrap();
    assert!(read_only.write_all(b"x").is_err());
    make_pipe(&pipe);
    for (path, kind) in [
        (dir.path(), io::ErrorKind::IsADirectory),
        (&pipe, io::ErrorKind::InvalidInput),
    ] {
        assert_eq!(
            opener.open(path, Access::default()).unwrap_err().kind(),
            kind
        );
    }
    let mut zeros = opener
        .open(Path::new("/dev/zero"), Access::default())
        .unwrap();
    let mut byte = [1];
    zeros.read_exact(&mut byte).unwrap();
    assert_eq!(byte, [0], "a character device is a source of bytes");
}

#[test]
fn a_socket_is_private_and_a_live_one_is_not_taken_over() {
    let dir = dir();
    let path = dir.path().join("s");
    let listener = Opener::new().listen_unix(&path).unwrap();
    assert_eq!(mode(&path), 0o600);
    assert!(matches!(
        Opener::new().listen_unix(&path),
        Err(OpenError::SocketInUse { .. })
    ));
    listener.set_nonblocking(true).unwrap();
    let visitor = listener.accept().unwrap_err();
    assert_eq!(visitor.kind(), io::ErrorKind::WouldBlock);
    drop(listener);
    let listener = Opener::new().listen_unix(&path).unwrap();
    UnixStream::connect(&path).unwrap();
    listener.accept().unwrap();
}

#[test]
fn a_socket_that_a_device_listens_at_goes_with_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("v");
    let opener = Opener::new();
    let listening = block::Opener::listen(&opener, &path).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
    let refused = block::Opener::listen(&opener, &path).unwrap_err();
    assert!(
        refused.to_string().contains("another process does"),
        "{refused}"
    );
    drop(listening);
    assert!(!path.exists());
    // One that a dead process left is replaced.
    drop(UnixListener::bind(&path).unwrap());
    block::Opener::listen(&opener, &path).unwrap();
}

#[test]
fn a_file_or_link_at_a_sockets_path_is_left_alone() {
    let dir = dir();
    let (file, link, target) = (
        dir.path().join("f"),
        dir.path().join("l"),
        dir.path().join("t"),
    );
    fs::write(&file, "precious").unwrap();
    symlink(&target, &link).unwrap();
    for (path, found) in [(&file, "a regular file"), (&link, "a symbolic link")] {
        let error = Opener::new().listen_unix(path).unwrap_err();
        assert!(error.to_string().contains(found), "{error}");
    }
    assert_eq!(fs::read(&file).unwrap(), b"precious");
    assert!(!target.exists() && link.symlink_metadata().is_ok());
}

#[test]
fn kvm_that_is_missing_or_no_device_is_refused_with_the_mend() {
    let dir = dir();
    let opener = Opener::new();
    let missing = opener.open_kvm_at(&dir.path().join("kvm")).unwrap_err();
    assert!(missing.to_string().contains("modprobe"), "{missing}");
    assert!(matches!(
        opener.open_kvm_at(Path::new("/proc/self/status")),
        Err(OpenError::System { .. } | OpenError::KvmPermission | OpenError::WrongType { .. })
    ));
}

#[test]
fn text_is_read_up_to_the_limit_and_made_utf_8() {
    let dir = dir();
    let path = dir.path().join("t");
    fs::write(&path, b"ab\xffcdef").unwrap();
    assert_eq!(Opener::new().read_text(&path, 4).unwrap(), "ab\u{fffd}c");
}

#[test]
fn a_tcp_port_in_use_is_refused_with_its_name() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let error = Opener::new().listen_tcp("127.0.0.1", port).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!("cannot listen at 127.0.0.1:{port}")
    );
}

#[test]
fn the_file_of_a_socket_goes_with_its_owner_and_another_file_stays() {
    let dir = dir();
    let path = dir.path().join("s");
    let opener = Opener::new();
    let _listener = opener.listen_unix(&path).unwrap();
    drop(opener.own_socket(&path).unwrap());
    assert!(!path.exists());

    let listener = opener.listen_unix(&path).unwrap();
    let owned = opener.own_socket(&path).unwrap();
    let other = dir.path().join("other");
    fs::write(&other, "").unwrap();
    fs::rename(&other, &path).unwrap();
    drop((listener, owned));
    assert!(path.exists());
}

#[test]
fn a_created_image_is_new_private_and_never_replaces_another() {
    let dir = dir();
    let path = |name: &str| dir.path().join(name);
    let opener = Opener::new();
    let mut file = opener.create(&path("new"), Access::default()).unwrap();
    file.write_all(b"new").unwrap();
    assert_eq!(mode(&path("new")), 0o600);
    assert!(is_close_on_exec(&file));
    let again = opener.create(&path("new"), Access::default()).unwrap_err();
    assert_eq!(again.kind(), io::ErrorKind::AlreadyExists);
    symlink(path("elsewhere"), path("link")).unwrap();
    opener.create(&path("link"), Access::default()).unwrap_err();
    assert!(!path("elsewhere").exists());

    fs::write(path("old"), "old").unwrap();
    for taken in ["old", "link"] {
        let refused = opener.rename(&path("new"), &path(taken)).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::AlreadyExists);
    }
    assert_eq!(fs::read_to_string(path("old")).unwrap(), "old");
    opener.rename(&path("new"), &path("named")).unwrap();
    assert!(!path("new").exists());
    assert_eq!(fs::read_to_string(path("named")).unwrap(), "new");
    opener.remove(&path("named")).unwrap();
    assert!(!path("named").exists());
}

#[test]
fn an_output_that_is_appended_to_keeps_what_it_has() {
    let dir = dir();
    let path = dir.path().join("log");
    fs::write(&path, "old ").unwrap();
    let opener = Opener::new();
    let mut file = opener.append_output(&path).unwrap();
    // Others that append do so at the end, too.
    let mut other = OpenOptions::new().append(true).open(&path).unwrap();
    file.write_all(b"a").unwrap();
    other.write_all(b"b").unwrap();
    file.write_all(b"c").unwrap();
    assert_eq!(fs::read_to_string(&path).unwrap(), "old abc");
    let new = dir.path().join("new");
    drop(opener.append_output(&new).unwrap());
    assert_eq!(mode(&new), 0o600);
    symlink(&path, dir.path().join("link")).unwrap();
    let refused = opener.append_output(&dir.path().join("link"));
    assert!(matches!(refused, Err(OpenError::SymbolicLink { .. })));
}

#[test]
fn a_full_output_is_kept_under_its_other_name_and_begun_anew() {
    let dir = dir();
    let (path, kept) = (dir.path().join("log"), dir.path().join("log.1"));
    let opener = Opener::new();
    let mut file = opener.create_output(&path).unwrap();
    for (text, before) in [("one", None), ("two", Some("one"))] {
        file.write_all(text.as_bytes()).unwrap();
        assert_eq!(fs::read_to_string(&kept).ok().as_deref(), before);
        file = opener.rotate_output(&path, &file, &kept, None).unwrap();
        assert_eq!(fs::read_to_string(&kept).unwrap(), text);
        assert_eq!(fs::read_to_string(&path).unwrap(), "");
        assert_eq!(mode(&path), 0o600);
    }
    // Somebody else has moved it away.
    fs::rename(&path, dir.path().join("elsewhere")).unwrap();
    let mut file = opener.rotate_output(&path, &file, &kept, None).unwrap();
    assert_eq!(fs::read_to_string(&kept).unwrap(), "two");
    file.write_all(b"three").unwrap();
    assert_eq!(fs::read_to_string(&path).unwrap(), "three");
}

#[test]
fn an_output_is_not_rotated_over_what_is_no_log() {
    let dir = dir();
    let (path, kept) = (dir.path().join("log"), dir.path().join("log.1"));
    let opener = Opener::new();
    let file = opener.create_output(&path).unwrap();
    fs::create_dir(&kept).unwrap();
    let error = opener.rotate_output(&path, &file, &kept, None).unwrap_err();
    assert!(
        error.to_string().contains("log.1 is a directory"),
        "{error}"
    );
    fs::remove_dir(&kept).unwrap();
    fs::remove_file(&path).unwrap();
    fs::write(&path, "another's").unwrap();
    let error = opener.rotate_output(&path, &file, &kept, None).unwrap_err();
    assert!(error.to_string().contains("another file"), "{error}");
    assert_eq!(fs::read_to_string(&path).unwrap(), "another's");
}

#[test]
fn what_a_killed_process_left_behind_does_not_keep_a_file_from_being_written() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("kept");
    let left = directory
        .path()
        .join(format!("kept.{}-0.new", std::process::id()));
    fs::write(&left, "left behind").unwrap();
    let opener = Opener::new();
    opener.replace_file(&path, b"one").unwrap();
    assert_eq!(fs::read_to_string(&path).unwrap(), "one");
    let other = directory.path().join("other");
    let left_too = directory
        .path()
        .join(format!("other.{}-0.new", std::process::id()));
    fs::write(&left_too, "left behind").unwrap();
    opener.begin_file(&other).unwrap().keep().unwrap();
    assert_eq!(fs::read_to_string(&other).unwrap(), "");
    for left in [left, left_too] {
        assert_eq!(fs::read_to_string(left).unwrap(), "left behind");
    }
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 4);
}

#[test]
fn a_file_whose_new_name_is_not_durable_has_its_old_one() {
    let dir = tempfile::tempdir().unwrap();
    let (from, to) = (dir.path().join("from"), dir.path().join("to"));
    fs::write(&from, b"1").unwrap();
    let fails = |_: &Path| Err(io::ErrorKind::Other.into());
    documents::rename_new(&from, &to, &fails).unwrap_err();
    assert!(from.exists() && !to.exists());
    let works = |_: &Path| Ok(());
    documents::rename_new(&from, &to, &works).unwrap();
    assert!(!from.exists() && to.exists());
    fs::write(&from, b"2").unwrap();
    let error = documents::rename_new(&from, &to, &works).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
    assert_eq!(
        (fs::read(&from).unwrap(), fs::read(&to).unwrap()),
        (b"2".to_vec(), b"1".to_vec())
    );
}

#[test]
fn files_are_removed_together_unless_the_first_stays() {
    let dir = tempfile::tempdir().unwrap();
    let paths = ["first", "second", "third"].map(|name| dir.path().join(name));
    let opener = Opener::new();
    fs::write(&paths[1], b"").unwrap();
    opener.remove_files(&paths).unwrap_err();
    assert!(paths[1].exists());
    for path in [&paths[0], &paths[2]] {
        fs::write(path, b"").unwrap();
    }
    fs::remove_file(&paths[1]).unwrap();
    opener.remove_files(&paths).unwrap_err();
    assert!(!paths[0].exists() && !paths[2].exists());
}
