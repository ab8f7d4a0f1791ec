//! Stock Debian kernels: boots, devices, disks, power.
//!
//! One test is one class of cases: on nested ground it is one boot of the
//! nested machine. The tests that are ignored by default are `make test-full`.

use tests::{linux, suite};

#[test]
fn debian_6_12_cloud() -> Result<(), suite::Failed> {
    suite::run("linux-6.12-cloud", linux::cases("6.12-cloud"))
}

#[test]
fn debian_6_1_cloud() -> Result<(), suite::Failed> {
    suite::run("linux-6.1-cloud", linux::cases("6.1-cloud"))
}

#[test]
#[ignore = "long: part of `make test-full`"]
fn debian_6_12_cloud_more() -> Result<(), suite::Failed> {
    suite::run("linux-6.12-cloud-more", linux::more_cases("6.12-cloud"))
}

#[test]
#[ignore = "long: part of `make test-full`"]
fn debian_6_12_generic() -> Result<(), suite::Failed> {
    suite::run("linux-6.12-generic", linux::cases("6.12-generic"))
}

#[test]
#[ignore = "long: part of `make test-full`"]
fn debian_6_1_generic() -> Result<(), suite::Failed> {
    suite::run("linux-6.1-generic", linux::cases("6.1-generic"))
}
