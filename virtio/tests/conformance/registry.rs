//! What belongs to every model beside its file.

use std::fs;
use std::path::Path;

use virtio::models::MODELS;

use crate::driver::Driver;
use crate::rig::Rig;
use crate::subjects::{Subject, all};

/// One line for each model that does not have it.
fn report(rule: &str, lacks: impl Fn(&Subject) -> bool) {
    let subjects = all();
    let mut lacking = Vec::new();
    for model in MODELS {
        let subject = subjects.iter().find(|subject| subject.name == model.kind);
        if subject.is_none_or(&lacks) {
            lacking.push(model.kind);
        }
    }
    assert!(lacking.is_empty(), "{rule}: {lacking:?}");
}

#[test]
fn every_model_is_in_the_conformance_and_hostile_suites() {
    report("add it to subjects.rs", |_| false);
}

#[test]
fn every_model_counts_what_it_does() {
    report("VirtioDevice::counters gives nothing", |subject| {
        let counters = subject.make().counters();
        counters.is_none_or(|counters| counters.read().is_empty())
    });
}

#[test]
fn every_model_saves_a_section_of_its_own_that_can_be_put_back() {
    report(
        "its section is not named virtio-KIND, or is refused",
        |subject| {
            let rig = Rig::new(subject);
            Driver::probe(&rig).boot();
            rig.stop();
            let saved = rig.save();
            let schema = format!("virtio-{}", subject.name);
            let own = saved.sections().iter().any(|s| s.schema == schema);
            !own || rig.successor(subject).save() != saved
        },
    );
}

#[test]
fn every_model_has_a_fuzz_target() {
    let makefile = Path::new(env!("CARGO_MANIFEST_DIR")).join("../Makefile");
    let makefile = fs::read_to_string(makefile).unwrap();
    let words: Vec<&str> = makefile.split_whitespace().collect();
    report("add virtio/KIND to FUZZED in the Makefile", |subject| {
        let target = format!("virtio/{}", subject.name);
        !words.contains(&target.as_str())
    });
}
