//! What goes out of the process goes through the places that may be moved out of it.

use std::collections::BTreeSet;

use tests::places::workspace;

use crate::report;
use crate::source::{Source, sources};

/// A way out of the process, how code writes it, and where it is taken. A place ends with `/` where it is a directory.
struct Door {
    what: &'static str,
    words: &'static [&'static str],
    places: &'static [(&'static str, &'static str)],
}

const DOORS: &[Door] = &[
    Door {
        what: "files are opened by the opener",
        words: &[
            "File::open(",
            "File::create(",
            "File::options(",
            "OpenOptions::new(",
            "fs::read(",
            "fs::read_to_string(",
            "fs::read_dir(",
            "fs::read_link(",
            "fs::write(",
            "fs::copy(",
            "fs::rename(",
            "fs::remove_",
            "fs::create_dir",
            "fs::hard_link(",
            "fs::open(",
            "fs::openat(",
        ],
        places: &[
            ("vmm/src/opener.rs", "the opener"),
            ("vmm/src/opener/", "its parts"),
            ("net/src/tap.rs", "taps, which the opener asks for"),
            ("net/src/kernel.rs", "vhost-net, which the opener asks for"),
            ("vmm/src/monitor/socket.rs", "no descriptor: /dev/null"),
            ("api/build.rs", "pages of the web console, when it is built"),
            ("virtio/src/vhost/peer.rs", "a peer that tests have"),
            ("virtio/src/vhost/peer/record.rs", "the same"),
        ],
    },
    Door {
        what: "connections and sockets with a name are the opener's",
        words: &[
            "UnixStream::connect",
            "UnixListener::bind",
            "UnixDatagram::bind",
            "TcpStream::connect",
            "TcpListener::bind",
            "UdpSocket::bind",
            "net::connect",
            "net::bind",
        ],
        places: &[
            ("vmm/src/opener.rs", "the opener"),
            ("vmm/src/opener/", "its parts"),
            ("virtio/src/vhost/peer.rs", "a peer that tests have"),
        ],
    },
    Door {
        what: "programs are started by the opener, outside of all filters",
        words: &["Command::new("],
        places: &[("vmm/src/opener/", "editors, leases, tunnels")],
    },
    Door {
        what: "threads start with their filters",
        words: &["thread::spawn("],
        places: &[("virtio/src/vhost/peer.rs", "a peer that tests have")],
    },
    Door {
        what: "nobody sleeps to wait for something",
        words: &["thread::sleep("],
        places: &[
            (
                "block/src/lock.rs",
                "locks that others give up without a word",
            ),
            ("block/src/ops/convert.rs", "the pace of a copy"),
            ("block/src/ops/io/mod.rs", "a command of its user's"),
            (
                "vmm/src/cli/remote/migrate/follow.rs",
                "the next time to ask",
            ),
            (
                "vmm/src/cli/target.rs",
                "a monitor that has no place for a client now",
            ),
            (
                "vmm/src/console/mod.rs",
                "what the reader of a pseudo-terminal has not taken at the end",
            ),
            (
                "vmm/src/machine/driver/copies/pace.rs",
                "the pace of a copy",
            ),
            ("vmm/src/migrate/limits.rs", "the pace of a migration"),
        ],
    },
];

/// Of the program, not of its tests.
fn is_program(source: &Source) -> bool {
    let of_tests = ["tests/", "testing", "/fuzz/", "/benches/", "resources/"];
    !source.is_test() && !of_tests.iter().any(|part| source.path.contains(part))
}

/// The lines of the program's code that take this way, as `path:line`, with the path apart.
fn taken(source: &Source, door: &Door) -> Vec<(String, usize)> {
    let end = source.tests_begin().unwrap_or(usize::MAX);
    let lines = source.code.lines().enumerate().take(end);
    lines
        .filter(|(_, line)| {
            door.words.iter().any(|word| {
                line.match_indices(word)
                    .any(|(at, _)| !line[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_'))
            })
        })
        .map(|(number, _)| (source.path.clone(), number + 1))
        .collect()
}

#[test]
fn whatever_leaves_the_process_goes_through_its_door() {
    let sources = sources(&workspace());
    let mut broken = Vec::new();
    for door in DOORS {
        let mut used = BTreeSet::new();
        for (path, line) in sources
            .iter()
            .filter(|source| is_program(source))
            .flat_map(|source| taken(source, door))
        {
            let place = door.places.iter().find(|(place, _)| {
                path == *place || place.ends_with('/') && path.starts_with(place)
            });
            match place {
                Some((place, _)) => {
                    used.insert(*place);
                }
                None => broken.push(format!("{path}:{line}: {}", door.what)),
            }
        }
        let idle = door
            .places
            .iter()
            .filter(|(place, _)| !used.contains(place));
        broken.extend(idle.map(|(place, _)| format!("{place}: off the list: {}", door.what)));
    }
    report("whatever leaves the process goes through its door", broken);
}

#[test]
fn a_way_out_is_seen_in_code_and_not_in_tests_or_comments() {
    let text = "// fs::read(\nfn a() {\n    let x = fs::read(p);\n    my_fs::read(p);\n}\n#[cfg(test)]\nmod tests {\n    fn b() { fs::read(p); }\n}\n";
    let source = Source::new("a/src/lib.rs".to_owned(), text.to_owned());
    assert_eq!(taken(&source, &DOORS[0]), [("a/src/lib.rs".to_owned(), 3)]);
}
