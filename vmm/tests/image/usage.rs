//! Wrong usage: an exit code, one line that says what is wrong, and nothing else.

use crate::place::Place;

/// All verbs, with arguments that would be right for an image that is there.
const VERBS: [(&str, &[&str]); 16] = [
    ("create", &["FILE", "1M"]),
    ("info", &["FILE"]),
    ("check", &["FILE"]),
    ("convert", &["FILE", "copy"]),
    ("resize", &["FILE", "+1M"]),
    ("amend", &["-o", "size=9M", "FILE"]),
    ("commit", &["FILE"]),
    ("rebase", &["-b", "", "FILE"]),
    ("snapshot", &["FILE"]),
    ("bitmap", &["--add", "FILE", "x"]),
    ("map", &["FILE"]),
    ("compare", &["FILE", "FILE"]),
    ("measure", &["FILE"]),
    ("bench", &["FILE"]),
    ("io", &["FILE"]),
    ("nonsense", &["FILE"]),
];

#[track_caller]
fn refused(place: &Place, arguments: &[&str]) {
    let said = place.vireo(arguments);
    let wanted = if arguments.first() == Some(&"compare") {
        2
    } else {
        1
    };
    assert_eq!(said.code, wanted, "{arguments:?}: {said:?}");
    assert_eq!(said.out, "", "{arguments:?}");
    assert!(said.err.starts_with("vireo: "), "{arguments:?}: {said:?}");
    assert_eq!(said.err.lines().count(), 1, "{arguments:?}: {said:?}");
    assert!(!said.err.contains("fault in Vireo"), "{said:?}");
}

#[test]
fn every_verb_refuses_wrong_usage_in_one_line() {
    let place = Place::new();
    place.zoo();
    let before = std::fs::read(place.path("plain")).unwrap();
    // That is a question rather than a mistake: the verbs are told.
    let said = place.vireo(&[]);
    assert_eq!((said.code, said.out.as_str()), (1, ""), "{said:?}");
    for (verb, right) in VERBS {
        let with = |file: &'static str| -> Vec<&'static str> {
            let fill = |word: &&'static str| if *word == "FILE" { file } else { *word };
            std::iter::once(verb)
                .chain(right.iter().map(fill))
                .collect()
        };
        refused(&place, &[verb]);
        refused(&place, &[&with("plain")[..], &["--nonsense"]].concat());
        refused(&place, &[&with("plain")[..], &["-f", "vmdk"]].concat());
        refused(
            &place,
            &[&with("plain")[..], &["one", "two", "three"]].concat()[..],
        );
        if verb == "create" {
            continue;
        }
        refused(&place, &with("nothing"));
        refused(&place, &with("."));
        refused(&place, &with("/dev/null/x"));
        for flags in [
            &["--image-opts"][..],
            &["--object", "secret,id=s"],
            &["-T", "sometimes"],
            &["--output", "xml"],
            &["--backing-policy", "perhaps"],
        ] {
            refused(&place, &[&with("plain")[..], flags].concat());
        }
    }
    assert!(std::fs::read(place.path("plain")).unwrap() == before);
}

#[test]
fn every_value_that_is_none_is_refused_by_name() {
    let place = Place::new();
    place.zoo();
    for (arguments, named) in [
        (&["convert", "-m", "0", "plain", "copy"][..], "-m"),
        (&["convert", "-m", "17", "plain", "copy"], "-m"),
        (&["convert", "-S", "1000", "plain", "copy"], "-S"),
        (&["convert", "-S", "-1", "plain", "copy"], "-1"),
        (&["convert", "-r", "fast", "plain", "copy"], "-r"),
        (&["convert", "-c", "plain", "copy"], "-c"),
        (&["convert", "-n", "-o", "size=1M", "plain", "large"], "-o"),
        (&["convert", "-n", "-B", "raw", "plain", "large"], "-B"),
        (
            &["convert", "-C", "-c", "-O", "qcow2", "plain", "copy"],
            "--compress",
        ),
        (
            &["convert", "--target-is-zero", "plain", "copy"],
            "--no-create",
        ),
        (
            &[
                "convert", "-B", "nothing", "-F", "raw", "-O", "qcow2", "plain", "copy",
            ],
            "nothing",
        ),
        (
            &["convert", "-B", "raw", "-O", "qcow2", "plain", "copy"],
            "-F raw",
        ),
        (&["commit", "-r", "fast", "deep"], "-r"),
        (&["commit", "-b", "large", "deep"], "large"),
        (&["check", "-r", "some", "plain"], "leaks"),
        (&["check", "-U", "-r", "all", "plain"], "-U"),
        (&["resize", "plain", "1Q"], "1Q"),
        (&["resize", "plain", "+16E"], "16E"),
        (&["resize", "plain", "-16E"], "16E"),
        (&["resize", "--preallocation=some", "plain", "+1M"], "some"),
        (
            &["resize", "--preallocation=full", "--shrink", "small", "1M"],
            "--preallocation",
        ),
        (&["resize", "-U", "plain", "+1M"], "-U"),
        (&["rebase", "deep"], "-b"),
        (&["rebase", "-b", "plain", "deep"], "-F qcow2"),
        (&["rebase", "-b", "nothing", "-F", "raw", "deep"], "nothing"),
        (&["rebase", "-f", "raw", "-b", "", "raw"], "only qcow2"),
        (&["map", "-s", "x", "plain"], "--start-offset"),
        (&["map", "--max-length=1x", "plain"], "--max-length"),
        (&["measure", "--size", "1M", "plain"], "--size"),
        (
            &["measure", "-O", "qcow2", "-o", "cluster_size=3", "plain"],
            "cluster",
        ),
        (&["bench", "-d", "many", "plain"], "-d"),
        (&["bench", "-U", "-w", "plain"], "-U"),
        (&["io", "-U", "-c", "length", "plain"], "-U"),
        (&["info", "-f", "raw,qcow2", "plain"], "formats"),
    ] {
        refused(&place, arguments);
        let said = place.vireo(arguments);
        let named = named.trim_start_matches('-');
        assert!(said.err.contains(named), "{arguments:?}: {said:?}");
    }
    assert!(!place.path("copy").exists());
}
