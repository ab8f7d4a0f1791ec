//! Any bytes as a qcow2 image: checked, repaired, and checked again.
//!
//! A check changes nothing. What was without fault before a repair reads the same afterwards. What is without fault after one
//! stays so, while it is checked again and while it is written to.
#![no_main]

mod memory;

use std::os::unix::fs::FileExt;
use std::path::Path;

use block::ops::check;
use block::{CheckReport, Finding, Format, Repair, open_image};
use libfuzzer_sys::{Corpus, fuzz_target};

use memory::{InMemory, PATH, options};

/// How much of a disk is looked at, in bytes.
const LOOK: u64 = 1 << 20;
/// What follows an image before it is repaired, in bytes: a check does not see what is counted past the end of the file.
const ROOM: u64 = 1 << 20;
/// The largest clusters, as a power of two, with which writes stay within that.
const ROOMY: u8 = 14;

fuzz_target!(|input: &[u8]| -> Corpus {
    if input.len() > 1 << 20 {
        return Corpus::Reject;
    }
    let opener = InMemory::new(input, 0);
    if run(&opener, None).is_none() {
        return Corpus::Keep;
    }
    let mut bytes = vec![0; input.len() + 1];
    let len = opener.0.read_at(&mut bytes, 0).expect("memory");
    assert!(&bytes[..len] == input);
    // A larger file may show more.
    let opener = InMemory::new(input, ROOM);
    let Some(before) = run(&opener, None) else {
        return Corpus::Keep;
    };
    let content = is_clean(&before).then(|| content(&opener)).flatten();
    for mend in [Repair::Leaks, Repair::All] {
        let opener = InMemory::new(input, ROOM);
        let Some(report) = run(&opener, Some(mend)) else {
            continue;
        };
        if let Some(content) = &content {
            assert!(self::content(&opener).as_ref() == Some(content));
        }
        assert!(mend == Repair::All || report.corruptions <= before.corruptions);
        if !is_clean(&report) {
            continue;
        }
        let again = run(&opener, None).expect("it was checked");
        assert!(is_clean(&again) && again.leaks == report.leaks);
        if report.leaks == 0 && input[23] <= ROOMY {
            written(&opener);
        }
    }
    Corpus::Keep
});

fn run(opener: &InMemory, mend: Option<Repair>) -> Option<CheckReport> {
    check(
        Path::new(PATH),
        opener,
        Format::Qcow2,
        mend,
        false,
        &mut |_| (),
    )
    .ok()
}

fn is_clean(report: &CheckReport) -> bool {
    report.corruptions == 0 && report.check_errors == 0
}

/// How a disk begins, if it can be read.
fn content(opener: &InMemory) -> Option<Vec<u8>> {
    let image = open_image(Path::new(PATH), opener, &options(true)).ok()?;
    let mut bytes = vec![0; image.size().min(LOOK) as usize];
    image.read(0, &mut bytes).ok()?;
    Some(bytes)
}

/// An image without fault takes writes, has them, and stays without fault.
fn written(opener: &InMemory) {
    let Ok(image) = open_image(Path::new(PATH), opener, &options(false)) else {
        return;
    };
    let size = image.size();
    let mut wrote = false;
    for (offset, byte) in [(0, 1), (size / 3, 2), (size / 2, 3)] {
        let data = vec![byte; 3000.min(size - offset) as usize];
        // There may be no room in the format for another cluster.
        if image.write(offset, &data).is_err() {
            continue;
        }
        wrote = true;
        let mut found = vec![0; data.len()];
        image.read(offset, &mut found).expect("it was written");
        assert!(found == data);
    }
    let closed = image.as_qcow2().is_some_and(|image| image.close().is_ok());
    drop(image);
    if wrote && closed {
        let mut findings = Vec::new();
        let mut sink = |finding: Finding| findings.push(finding.message);
        let path = Path::new(PATH);
        check(path, opener, Format::Qcow2, None, false, &mut sink).expect("it was checked");
        // A cluster that two entries shared, with the bit in neither, is one entry's alone once the other was written.
        findings.retain(|message| !message.contains("COPIED"));
        assert!(findings.is_empty(), "{findings:?}");
    }
}
