//! Cases with the small guests of `resources/guests`, which run on any
//! `/dev/kvm` in milliseconds.

use crate::case::{Action, Boot, Case, Fill, Want};

const MIB: u64 = 1 << 20;
/// Seconds for a guest of some milliseconds, on a machine under load.
const LIMIT: u64 = 60;

/// All of them.
#[must_use]
pub fn cases() -> Vec<Case> {
    let mut cases = ends();
    cases.extend(machine());
    cases.extend(consoles());
    cases.extend(disks());
    cases.extend(storms());
    cases.push(
        guest("rng-gives-bytes", "rng", "bytes=256")
            .args("--rng")
            .lines(["bytes=256"])
            .want(Want::NoText(format!("rng={}", "0".repeat(512)))),
    );
    cases
}

fn guest(name: &str, program: &str, words: &str) -> Case {
    Case::new(format!("native/{name}"), Boot::guest(program, words))
        .limit(LIMIT)
        .want(Want::NoText("error=".to_owned()))
        .want(Want::NoText("trap=".to_owned()))
}

/// How a run ends, and the exit codes.
fn ends() -> Vec<Case> {
    let mut cases = vec![
        guest("power-off-exits-with-0", "hello", "").lines(["Hello"]),
        guest("panic-exits-with-3", "poke", "panic halt")
            .lines(["panic=event"])
            .exits(3),
        guest("triple-fault-exits-with-4", "poke", "triple")
            .lines(["reset=triple"])
            .exits(4),
        guest(
            "sigterm-ends-a-deaf-guest-after-the-timeout-with-6",
            "poke",
            "outs halt",
        )
        .step("outs=", Action::Signal("TERM".to_owned()))
        .args("--shutdown-timeout 1")
        .exits(6)
        .want(Want::Message("did not power off".to_owned())),
    ];
    for how in ["i8042", "cf9"] {
        cases.push(
            guest(
                &format!("reset-by-{how}-restarts-in-place"),
                "poke",
                &format!("reboot-count={how}"),
            )
            .lines(["rebooted=2"])
            .want(Want::Times("image=fresh".to_owned(), 3)),
        );
    }
    cases
}

/// Guests that mean harm: whatever they do, the monitor hears its signals and
/// ends as it should.
fn storms() -> Vec<Case> {
    let mut cases = vec![
        guest(
            "a-storm-of-crash-reports-keeps-no-signal-out",
            "storm",
            "crash-loaded cpus=4",
        )
        .args("--cpus boot=4 --shutdown-timeout 0")
        .step("storm=begin", Action::Signal("TERM".to_owned())),
        guest("a-reset-puts-the-mtrrs-back", "storm", "mtrr")
            .want(Want::Times("mtrr=806".to_owned(), 2)),
        guest("any-port-at-any-width", "storm", "ports rounds=20000")
            .args("--debugcon file={dir}/e9.log")
            .lines(["storm=begin"]),
    ];
    for (name, words, done) in [
        (
            "registers-of-pci-devices-at-random",
            "pci rounds=5000",
            "pci=done",
        ),
        (
            "disks-are-reset-while-requests-fly",
            "blk rounds=60 queues=2",
            "blk=done",
        ),
    ] {
        cases.push(
            guest(name, "storm", words)
                .args("--cpus boot=2 --rng --disk path={dir}/disk")
                .file("disk", MIB, Fill::Noise)
                .lines([done]),
        );
    }
    cases
}

/// CPUs, memory, buses.
fn machine() -> Vec<Case> {
    let mut cases = vec![
        guest("memory-map-below-the-hole", "poke", "memmap")
            .args("--memory size=256M")
            .lines(["poke=done"])
            .want(Want::Text("hole=free".to_owned()))
            .want(Want::Text("high=0 ".to_owned()))
            .want(Want::NoText("touch=bad".to_owned())),
        guest("memory-map-round-the-hole", "poke", "memmap")
            .args("--memory size=4G")
            .want(Want::Text("high=1073741824 hole=free".to_owned()))
            .want(Want::NoText("touch=bad".to_owned())),
        guest("memory-shared", "poke", "memmap")
            .args("--memory size=64M,shared=on,prefault=on")
            .want(Want::NoText("touch=bad".to_owned()))
            .lines(["poke=done"]),
        guest("cpuid-is-kvm-with-x2apic", "poke", "cpuid msr")
            .lines(["hypervisor=KVMKVMKVM", "poke=done"])
            .want(Want::Text("x2apic=1 hypervisor-bit=1".to_owned()))
            .want(Want::Text("msr.12345678=gp".to_owned())),
        guest("string-port-io", "poke", "outs").lines(["outs=0123456789abcdef"]),
        guest("rtc-tells-the-date", "poke", "rtc").want(Want::Text("rtc=20".to_owned())),
        guest("pci-by-port-and-by-ecam-agree", "pci", "")
            .args("--rng --disk path={dir}/disk")
            .file("disk", MIB, Fill::Zero)
            .lines(["agree=yes"])
            .want(Want::Text("id=1af4:1042".to_owned()))
            .want(Want::Text("id=1af4:1044".to_owned()))
            .want(Want::NoText("assigned=".to_owned())),
    ];
    for cpus in [1, 2, 4, 16] {
        cases.push(
            guest(&format!("{cpus}-cpus-start"), "smp", "")
                .args(&format!("--cpus boot={cpus}"))
                .lines([format!("madt={cpus}"), format!("cpus={cpus}")]),
        );
    }
    cases
}

fn consoles() -> Vec<Case> {
    let echo = |name: &str, word: &str| {
        guest(name, "poke", word)
            .step("echo=ready", Action::Type("hello there\nq\n".to_owned()))
            .lines(["echo:hello there", "echo:q", "poke=done"])
    };
    vec![
        echo("serial-input-by-polling", "serial-echo"),
        echo("serial-input-by-interrupt", "serial-echo-irq"),
        guest("serial-to-a-file", "hello", "")
            .args("--serial file={dir}/serial.log")
            .after("grep -q '^Hello' serial.log && echo the file has it")
            .lines(["the file has it"])
            .want(Want::NoText("Hello".to_owned())),
        guest("serial-on-several-sinks", "hello", "")
            .args("--serial tty --serial file={dir}/serial.log,append=on --serial pty")
            .before("echo before > serial.log")
            .after("cat serial.log")
            .lines(["Hello", "before"])
            .want(Want::Times("Hello".to_owned(), 2)),
        guest("serial-null-drops-output", "hello", "")
            .args("--serial null")
            .want(Want::NoText("ello".to_owned())),
        guest("debug-console-to-a-file", "poke", "e9=from-port-e9")
            .args("--debugcon file={dir}/e9.log")
            .after("cat e9.log")
            .lines(["from-port-e9", "poke=done"]),
    ]
}

fn disks() -> Vec<Case> {
    let verify = |name: &str, flags: &str, words: &str| {
        guest(
            &format!("disk-{name}"),
            "blk",
            &format!("verify mib=8 {words}"),
        )
        .args(&format!("--disk path={{dir}}/disk{flags}"))
        .file("disk", 8 * MIB, Fill::Noise)
        .lines(["verify=ok errors=0"])
        .after("test $(stat -c %s disk) = 8388608")
    };
    let mut cases = vec![
        verify("verify", "", ""),
        verify("four-queues", ",num_queues=4", "queues=4"),
        verify("odd-pieces", "", "odd indirect"),
        verify("event-index", "", "event-idx"),
        guest("disk-read-only", "blk", "verify")
            .args("--disk path={dir}/disk,readonly=on")
            .file("disk", MIB, Fill::Noise)
            .before("md5sum disk > sum")
            .lines(["write=1 kept=yes"])
            .after("md5sum -c sum"),
        guest("disk-serial-and-size", "blk", "")
            .args("--disk path={dir}/disk,serial=abc123")
            .file("disk", MIB, Fill::Zero)
            .lines(["id=abc123 id-status=0"])
            .want(Want::Text("sectors=2048".to_owned())),
        guest("disk-interrupts", "blk", "irq")
            .args("--disk path={dir}/disk")
            .file("disk", MIB, Fill::Noise)
            .want(Want::Text("irq-requests=16 done=16".to_owned())),
        guest("disk-survives-hostile-rings", "blk", "hostile")
            .args("--disk path={dir}/disk")
            .file("disk", MIB, Fill::Noise)
            .lines(["hostile=survived"])
            .want(Want::NoText("after=".to_owned())),
        guest("disk-by-a-symbolic-link", "blk", "verify keep mib=8")
            .args("--disk path={dir}/link")
            .file("disk", 8 * MIB, Fill::Zero)
            .before("ln -s disk link")
            .lines(["verify=ok errors=0"]),
    ];
    for cache in ["none", "writeback", "writethrough", "directsync", "unsafe"] {
        for aio in ["io_uring", "threads"] {
            let flags = format!(",cache={cache},aio={aio}");
            cases.push(verify(
                &format!("{cache}-{}", aio.replace('_', "-")),
                &flags,
                "",
            ));
        }
    }
    cases
}
