//! What CPUs say of themselves under a baseline.

use std::fs;
use std::process::{Command, Stdio};

use crate::support::{Vireo, can_run, run_arguments};

/// EAX to EDX of a leaf, as the guest prints it; zeros for one that says nothing.
fn leaf(output: &str, name: &str) -> [u32; 4] {
    let line = output
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
    let mut words = [0; 4];
    for (word, text) in words.iter_mut().zip(line.unwrap_or("").split(',')) {
        *word = u32::from_str_radix(text, 16).unwrap_or(0);
    }
    words
}

fn guest_with(flags: &[&str]) -> String {
    let mut vireo = Vireo::start("poke", "cpuid", flags);
    let output = vireo.stdout.rest();
    vireo.ends_with(0);
    assert!(output.contains("hypervisor=KVMKVMKVM"), "{output}");
    output
}

fn vireo(arguments: &[&str]) -> (Option<i32>, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_vireo"))
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (
        output.status.code(),
        text(output.stdout),
        text(output.stderr),
    )
}

/// The one line that says why a machine does not start.
fn refused(flags: &[&str]) -> String {
    let arguments = run_arguments("poke", "cpuid", flags);
    let arguments: Vec<&str> = arguments.iter().map(AsRef::as_ref).collect();
    let (code, _, errors) = vireo(&arguments);
    assert_eq!(code, Some(1), "{errors}");
    assert_eq!(errors.lines().count(), 1, "{errors}");
    errors
}

#[test]
fn a_guest_sees_the_features_of_its_level_and_no_more() {
    if !can_run() {
        return;
    }
    let v2 = ["--cpus", "baseline=x86-64-v2"];
    let (_, own, _) = vireo(&["doctor", "--cpu-baseline"]);
    // A kernel that interprets guests knows less than any level.
    let ecx = own
        .lines()
        .find_map(|line| line.strip_prefix("leaf_1_ecx = 0x"));
    if u32::from_str_radix(ecx.unwrap(), 16).unwrap() & 1 << 23 == 0 {
        let error = refused(&v2);
        assert!(error.contains("this host lacks"), "{error}");
        assert!(error.contains("popcnt"), "{error}");
        return;
    }
    let output = guest_with(&v2);
    let [_, _, ecx, edx] = leaf(&output, "cpuid.1.0");
    let (popcnt, xsave, avx, aes) = (1 << 23, 1 << 26, 1 << 28, 1 << 25);
    assert_eq!(ecx & (popcnt | xsave | avx | aes), popcnt, "{output}");
    assert_ne!(edx & 1 << 26, 0, "SSE2: {output}");
    let [_, ebx, ..] = leaf(&output, "cpuid.7.0");
    // SMEP and SMAP alone.
    assert_eq!(ebx & !(1 << 7 | 1 << 20), 0, "{output}");
    assert_eq!(leaf(&output, "cpuid.d.0"), [0; 4], "{output}");
}

#[test]
fn a_host_s_own_baseline_takes_nothing_away_and_one_of_another_host_is_refused_by_name() {
    if !can_run() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (own, other) = (dir.path().join("own.toml"), dir.path().join("other.toml"));
    let (code, text, errors) = vireo(&["doctor", "--cpu-baseline"]);
    assert_eq!((code, errors.as_str()), (Some(0), ""));
    fs::write(&own, &text).unwrap();
    let plain = guest_with(&[]);
    let flag = format!("baseline={}", own.display());
    let bounded = guest_with(&["--cpus", &flag]);
    for name in [
        "cpuid.1.0",
        "cpuid.7.0",
        "cpuid.80000001.0",
        "cpuid.80000008.0",
    ] {
        let (mut plain, mut bounded) = (leaf(&plain, name), leaf(&bounded, name));
        if name == "cpuid.7.0" {
            // The number of subleaves.
            (plain[0], bounded[0]) = (0, 0);
        }
        assert_eq!(plain, bounded, "{name}");
    }
    // Once more on the same host, as on a second one.
    let (code, common, _) = vireo(&["doctor", "--cpu-baseline", own.to_str().unwrap()]);
    assert_eq!((code, common), (Some(0), text.clone()));

    let more = text.replace("leaf_7_1_edx = 0x0", "leaf_7_1_edx = 0x8");
    assert_ne!(more, text);
    fs::write(&other, more).unwrap();
    let flag = format!("baseline={}", other.display());
    let flags = ["--cpus", flag.as_str()];
    let error = refused(&flags);
    assert!(
        error.contains("this host lacks bit 31 of leaf_7_1_edx"),
        "{error}"
    );
    fs::write(&other, "no baseline").unwrap();
    assert!(refused(&flags).contains("no CPU baseline"));
    fs::remove_file(&other).unwrap();
    assert!(refused(&flags).contains("--cpus baseline="));
}
