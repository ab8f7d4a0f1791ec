//! Snapshots within images.

use crate::place::Place;

/// What a disk holds, as QEMU reads it.
fn content(place: &Place, name: &str) -> Vec<u8> {
    place
        .qemu(&["convert", "-O", "raw", name, "content"])
        .done();
    std::fs::read(place.path("content")).unwrap()
}

#[test]
fn snapshots_are_made_applied_and_deleted() {
    let place = Place::new();
    place.zoo();
    for image in ["plain", "v2", "extended", "overlay"] {
        let first = content(&place, image);
        place.vireo(&["snapshot", "-c", "one", image]).done();
        place
            .vireo(&["io", "-c", "write -q -P 77 0 3M", image])
            .done();
        place.qemu(&["check", image]).done();
        let second = content(&place, image);
        assert!(first != second);
        place.qemu(&["snapshot", "-c", "two", image]).done();
        for (name, wanted) in [("one", &first), ("two", &second)] {
            place.vireo(&["snapshot", "-a", name, image]).done();
            place.qemu(&["check", image]).done();
            assert!(content(&place, image) == *wanted, "{image} {name}");
        }
        for name in ["one", "snapshot.name=one"] {
            place
                .vireo(&["convert", "-l", name, "-O", "raw", image, "copy"])
                .done();
            assert!(
                std::fs::read(place.path("copy")).unwrap() == first,
                "{image}"
            );
        }
        place.vireo(&["snapshot", "-d", "one", image]).done();
        place.qemu(&["check", image]).done();
        assert!(content(&place, image) == second);
        let list = place.vireo(&["snapshot", "-l", image]).done();
        assert!(list.contains("two") && !list.contains("one"), "{list}");
        for flag in ["-a", "-d"] {
            let said = place.vireo(&["snapshot", flag, "one", image]);
            assert_eq!(said.code, 1, "{said:?}");
        }
    }
    assert_eq!(place.vireo(&["snapshot", "-c", "x", "raw"]).code, 1);
    assert_eq!(place.vireo(&["snapshot", "-c", "x", "data"]).code, 1);
    assert_eq!(
        place
            .vireo(&["snapshot", "-c", "x", "-d", "x", "plain"])
            .code,
        1
    );
}
