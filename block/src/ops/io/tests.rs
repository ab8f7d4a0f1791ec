use super::*;
use crate::testing::AnyPath;
use crate::{Format, ImageOptions, open_image};

/// Runs lines on an image of 1 MiB; the answers, the complaints, and how many lines succeeded.
fn talk(lines: &[&str]) -> (String, String, usize) {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(1 << 20).unwrap();
    let mut options = ImageOptions::default();
    options.disk.format = Some(Format::Raw);
    let image = open_image(file.path(), &AnyPath, &options).unwrap();
    let (mut out, mut errors) = (Vec::new(), Vec::new());
    let about = || "about it\n".to_owned();
    let mut session = Session::new(&*image, &mut out, &mut errors, &about);
    let mut done = 0;
    for line in lines {
        assert!(!session.is_done());
        done += usize::from(session.run(line).unwrap());
    }
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (text(out), text(errors), done)
}

#[test]
fn answers_are_those_of_the_model() {
    let (out, errors, done) = talk(&[
        "write -q -P 0x41 510 4",
        "read -qv 0 16",
        "read -vP 0x41 510 4",
        "  length  ",
        "info",
        "",
        "truncate 2M",
        "l",
    ]);
    let told: Vec<_> = out
        .lines()
        .filter(|line| !line.contains("ops/sec"))
        .collect();
    assert_eq!(
        told,
        [
            "000001fe:  41 41 41 41  AAAA",
            "read 4/4 bytes at offset 510",
            "1 MiB",
            "format name: raw",
            "cluster size: 0 bytes",
            "vm state offset: 0 bytes",
            "about it",
            "2 MiB",
        ]
    );
    assert_eq!((errors.as_str(), done), ("", 8));
}

#[test]
fn wrong_commands_are_told_and_change_nothing() {
    let lines = [
        "nonsense",
        "read",
        "read 0",
        "length 1",
        "read -X 0 512",
        "read 0 -P",
        "read 0 512 512",
        "write 1M 1",
        "write 0 2G",
        "write -c 0 64k",
        "write -zP 1 0 512",
        "write -P 256 0 512",
        "read -s 0 0 512",
        "read -P 0 -s 1k -l 1k 0 1k",
        "discard 1M 512",
        "alloc 2M",
        "sleep x",
        "help nonsense",
        "read -P 1 0 512",
    ];
    for line in lines {
        let (out, errors, done) = talk(&[line]);
        assert_eq!(done, 0, "{line}");
        assert!(!(out + &errors).is_empty(), "{line}");
    }
    assert_eq!(talk(&["read -q -P 0 0 1M"]).2, 1);
}

#[test]
fn help_lists_every_command_and_quit_ends_it() {
    let (out, _, _) = talk(&["help"]);
    assert_eq!(out.lines().count(), COMMANDS.len());
    let (out, _, _) = talk(&["help write", "quit"]);
    assert!(out.starts_with("write [-"));
}
