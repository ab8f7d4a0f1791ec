//! Images that both sides of a migration are to reach.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use api::wire::{MigrationMemoryMode, MigrationPhase, ReceiveMigrationData, SendMigrationData};

use crate::migrations::{Side, to, unix};
use crate::snapshots::ask;
use crate::support::can_run;

/// A shared disk's image is looked at before the guest runs on it: another one of the same size is no place to go.
#[test]
fn another_image_of_the_same_size_is_refused_by_both_paths_and_the_guest_goes_on() {
    if !can_run() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut source = Side::counting(dir.path());
    let last = ask(&mut source.vireo, 1);
    let (image, other) = (dir.path().join("disk"), dir.path().join("other"));
    let file = File::create(&other).unwrap();
    file.set_len(1 << 20).unwrap();
    // In the last bytes alone.
    file.write_all_at(b"another disk", (1 << 20) - 512).unwrap();
    let before = file.metadata().unwrap().modified().unwrap();
    let there = |path: &Path| ReceiveMigrationData {
        overrides: Some(
            serde_json::from_value(serde_json::json!({
                "devices": [{ "id": "d", "config": { "path": path } }],
            }))
            .unwrap(),
        ),
        ..ReceiveMigrationData::default()
    };
    let postcopy = MigrationMemoryMode::Postcopy;
    for (number, mode) in [MigrationMemoryMode::Precopy, postcopy]
        .into_iter()
        .enumerate()
    {
        let target = Side::empty(dir.path(), &format!("other-{number}.sock"));
        let url = unix(dir.path(), &format!("m{number}"));
        let waits = target.receive_as(&url, there(&other));
        let request = SendMigrationData {
            memory_mode: mode,
            ..to(&url)
        };
        source.client().send_migration(&request).unwrap();
        let told = waits.join().unwrap().unwrap_err().to_string();
        let here = source.ended();
        assert_eq!(here.phase, MigrationPhase::Failed);
        for told in [told, here.error.unwrap()] {
            for path in [&image, &other] {
                assert!(told.contains(path.to_str().unwrap()), "{told}");
            }
        }
        // Nobody has had it.
        assert_eq!(file.metadata().unwrap().modified().unwrap(), before);
        assert_eq!(target.state(), None);
    }
    let now = ask(&mut source.vireo, 2);
    assert!(now > last, "{now} {last}");
    // By another name it is the same one.
    let link = dir.path().join("link");
    std::fs::hard_link(&image, &link).unwrap();
    let mut target = Side::empty(dir.path(), "same.sock");
    let url = unix(dir.path(), "m");
    let waits = target.receive_as(&url, there(&link));
    source.client().send_migration(&to(&url)).unwrap();
    waits.join().unwrap().unwrap();
    source.vireo.ends_with(0);
    assert!(ask(&mut target.vireo, 3) > now);
}
