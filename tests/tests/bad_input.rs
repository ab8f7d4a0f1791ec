//! Wrong flags and files: one readable line that names the flag and the mend,
//! exit 1 or 2, and every file as it was.
//!
//! These need no guest and no nested machine, only the program.
#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "helpers of tests fail as tests do"
)]

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::{Command, Output, Stdio};

use tests::{kit, suite};

/// What to run and what its one line must hold.
struct Bad {
    what: &'static str,
    /// Words after `vireo run`; `{long}` is a command line that is too long.
    args: &'static str,
    says: &'static [&'static str],
    exit: i32,
}

const fn bad(
    what: &'static str,
    args: &'static str,
    exit: i32,
    says: &'static [&'static str],
) -> Bad {
    Bad {
        what,
        args,
        says,
        exit,
    }
}

const KERNELS: &[Bad] = &[
    bad(
        "missing kernel",
        "--kernel none",
        1,
        &["--kernel", "none", "No such file", "check the path"],
    ),
    bad(
        "kernel is a directory",
        "--kernel dir",
        1,
        &["--kernel", "directory", "give"],
    ),
    bad(
        "kernel is a pipe",
        "--kernel pipe",
        1,
        &["--kernel", "pipe"],
    ),
    bad(
        "kernel is empty",
        "--kernel empty",
        1,
        &["--kernel", "empty"],
    ),
    bad(
        "kernel is text",
        "--kernel text",
        1,
        &["--kernel", "text", "vmlinu"],
    ),
    bad(
        "kernel is truncated",
        "--kernel cut",
        1,
        &["--kernel", "cut off"],
    ),
    bad(
        "bzImage is truncated",
        "--kernel cut-bzimage",
        1,
        &["--kernel", "cut-bzimage"],
    ),
    bad(
        "kernel for aarch64",
        "--kernel arm",
        1,
        &["--kernel", "aarch64", "x86-64"],
    ),
    bad(
        "kernel for 32 bits",
        "--kernel i386",
        1,
        &["--kernel", "i386"],
    ),
    bad(
        "kernel larger than memory",
        "--kernel large --memory size=16M",
        1,
        &["--kernel", "of memory or more"],
    ),
    bad(
        "initramfs missing",
        "--kernel hello --initramfs none",
        1,
        &["--initramfs", "none", "check the path"],
    ),
    bad(
        "initramfs is a directory",
        "--kernel hello --initramfs dir",
        1,
        &["--initramfs", "directory"],
    ),
    bad(
        "initramfs does not fit",
        "--kernel hello --initramfs big --memory size=64M",
        1,
        &["--initramfs", "of memory or more"],
    ),
    bad(
        "command line too long",
        "--kernel hello --cmdline {long}",
        2,
        &["--cmdline", "shorten"],
    ),
    bad("no kernel", "", 2, &["--kernel"]),
    bad(
        "kernel twice",
        "--kernel hello --kernel hello",
        2,
        &["--kernel"],
    ),
];

const MACHINE: &[Bad] = &[
    bad(
        "no CPUs",
        "--kernel hello --cpus boot=0",
        2,
        &["--cpus", "254"],
    ),
    bad(
        "too many CPUs",
        "--kernel hello --cpus boot=255",
        2,
        &["--cpus", "254"],
    ),
    bad(
        "CPUs past 64 bits",
        "--kernel hello --cpus boot=99999999999999999999",
        2,
        &["--cpus"],
    ),
    bad(
        "negative CPUs",
        "--kernel hello --cpus boot=-1",
        2,
        &["--cpus"],
    ),
    bad(
        "CPUs no number",
        "--kernel hello --cpus boot=x",
        2,
        &["--cpus", "number"],
    ),
    bad(
        "fewer CPUs at most than at boot",
        "--kernel hello --cpus boot=4,max=2",
        2,
        &["--cpus", "max=2", "boot=4"],
    ),
    bad(
        "too many CPUs at most",
        "--kernel hello --cpus boot=4,max=99999",
        2,
        &["--cpus", "max=99999", "254"],
    ),
    bad(
        "a topology of other CPUs",
        "--kernel hello --cpus boot=2,max=8,topology=2:2:1:1",
        2,
        &["--cpus", "topology=2:2:1:1", "8"],
    ),
    bad(
        "a topology that is none",
        "--kernel hello --cpus boot=2,topology=2:x",
        2,
        &["--cpus", "topology=2:x", "THREADS:CORES:DIES:PACKAGES"],
    ),
    bad(
        "memory to add in odd pieces",
        "--kernel hello --memory size=64M,hotplug_size=100M",
        2,
        &["--memory", "hotplug_size=100M", "128M"],
    ),
    bad(
        "more memory to add than the host has",
        "--kernel hello --memory size=64M,hotplug_size=100T",
        2,
        &["--memory", "hotplug_size=100T", "smaller"],
    ),
    bad(
        "memory of 0",
        "--kernel hello --memory size=0",
        2,
        &["--memory", "size="],
    ),
    bad(
        "memory of 1 byte",
        "--kernel hello --memory size=1",
        2,
        &["--memory", "size="],
    ),
    bad(
        "more memory than the host",
        "--kernel hello --memory size=100T",
        2,
        &["--memory", "smaller"],
    ),
    bad(
        "memory past 64 bits",
        "--kernel hello --memory size=99999999999999999999G",
        2,
        &["--memory"],
    ),
    bad(
        "memory no size",
        "--kernel hello --memory size=big",
        2,
        &["--memory", "big"],
    ),
    bad(
        "unknown key",
        "--kernel hello --memory size=64M,sise=1",
        2,
        &["--memory", "sise", "size"],
    ),
    bad(
        "repeated key",
        "--kernel hello --cpus boot=1,boot=2",
        2,
        &["--cpus", "boot", "once"],
    ),
    bad(
        "unknown flag",
        "--kernel hello --bogus",
        2,
        &["--bogus", "--help"],
    ),
    bad(
        "serial of no kind",
        "--kernel hello --serial nowhere",
        2,
        &["--serial", "tty"],
    ),
    bad(
        "serial file without a path",
        "--kernel hello --serial file=",
        2,
        &["--serial", "file="],
    ),
    bad(
        "serial file in no directory",
        "--kernel hello --serial file=none/log",
        1,
        &["--serial", "none/log"],
    ),
    bad(
        "serial file is a directory",
        "--kernel hello --serial file=dir",
        1,
        &["--serial", "dir"],
    ),
    bad(
        "serial on a tty and off",
        "--kernel hello --serial tty --serial off",
        2,
        &["--serial", "'off'", "alone"],
    ),
    bad(
        "serial file with a tiny limit",
        "--kernel hello --serial file=log,max_size=1",
        2,
        &["--serial", "max_size=1", "4K"],
    ),
    bad(
        "serial socket where a file is",
        "--kernel hello --serial socket=hello",
        1,
        &["--serial", "hello", "a regular file"],
    ),
    bad(
        "serial twice to one file",
        "--kernel hello --serial file=log --serial file=log",
        2,
        &["--serial", "log", "a file of its own"],
    ),
    bad(
        "more serial replay than is kept",
        "--kernel hello --serial-replay 1G",
        2,
        &["--serial-replay", "16M"],
    ),
];

const NETWORKS: &[Bad] = &[
    bad(
        "vhost on a socket",
        "--kernel hello --net socket=/s,vhost=on",
        2,
        &["--net (id _net0)", "vhost", "socket", "vhost=off"],
    ),
    bad(
        "vhost with a limit",
        "--kernel hello --net tap=t0,vhost=on,ops_size=9,ops_refill_time=9",
        2,
        &["--net (id _net0)", "vhost", "limits", "vhost=off"],
    ),
    bad(
        "vhost of another word",
        "--kernel hello --net tap=t0,vhost=maybe",
        2,
        &["--net", "vhost", "off", "on", "auto"],
    ),
];

const ADDRESSES: &[Bad] = &[
    bad(
        "an address of letters",
        "--kernel hello --net tap=t0,mac=52:54:00:12:34:zz",
        2,
        &["--net (id _net0)", "52:54:00:12:34:zz", "52:54:00:12:34:56"],
    ),
    bad(
        "the address of many",
        "--kernel hello --net tap=t0,mac=01:00:5e:00:00:01",
        2,
        &["--net (id _net0)", "01:00:5e:00:00:01", "multicast"],
    ),
    bad(
        "an address of zeros",
        "--kernel hello --net tap=t0,mac=00:00:00:00:00:00",
        2,
        &["--net (id _net0)", "00:00:00:00:00:00 is no address"],
    ),
    bad(
        "one address for two cards",
        "--kernel hello --net tap=t0,mac=52:54:00:00:00:01 --net tap=t1,mac=52:54:00:00:00:01",
        2,
        &["52:54:00:00:00:01", "_net0", "_net1"],
    ),
    bad(
        "an MTU that no network has",
        "--kernel hello --net tap=t0,mtu=70000",
        2,
        &["--net (id _net0)", "mtu", "70000", "65521"],
    ),
    bad(
        "half a pair of queues",
        "--kernel hello --net tap=t0,num_queues=3",
        2,
        &["--net (id _net0)", "num_queues", "an even number"],
    ),
    bad(
        "a descriptor that is not open",
        "--kernel hello --net fd=77",
        2,
        &[
            "--net fd=77",
            "this process was not started with it",
            "tap=",
        ],
    ),
    bad(
        "a descriptor of something else",
        "--kernel hello --net fd=0:1",
        2,
        &["--net (id _net0)", "fd", "from 3 on"],
    ),
];

/// In a network that has these alone: a tap, one of several queues, a tun, a bridge, and a tap of somebody else's.
const TAPS: &[Bad] = &[
    bad(
        "the loopback",
        "--kernel hello --net tap=lo",
        1,
        &[
            "--net (id _net0)",
            "'lo' is of another kind",
            "tap or macvtap",
        ],
    ),
    bad(
        "a tun",
        "--kernel hello --net tap=tun7",
        1,
        &["--net (id _net0)", "'tun7' is a tun interface"],
    ),
    bad(
        "a bridge",
        "--kernel hello --net tap=br7",
        1,
        &["--net (id _net0)", "'br7' is one of the driver bridge"],
    ),
    bad(
        "a tap that is in use",
        "--kernel hello --net tap=one --net tap=one",
        1,
        &["--net (id _net1)", "'one' is in use", "another tap"],
    ),
    bad(
        "a tap of several queues that is in use",
        "--kernel hello --net tap=many,queues=2 --net tap=many",
        1,
        &["--net (id _net1)", "'many' is in use", "another tap"],
    ),
    bad(
        "more queues than the tap has",
        "--kernel hello --net tap=one,queues=2",
        1,
        &["--net (id _net0)", "'one' has one pair", "multi_queue"],
    ),
    bad(
        "a tap that is not there",
        "--kernel hello --net tap=none",
        1,
        &["--net (id _net0)", "no interface 'none'", "ip tuntap add"],
    ),
    bad(
        "somebody else's tap",
        "--kernel hello --net tap=theirs",
        1,
        &["--net (id _net0)", "'theirs' belongs to another user"],
    ),
    bad(
        "an MTU that may not be set",
        "--kernel hello --net tap=one,mtu=9000",
        1,
        &["--net (id _net0)", "'one' has an MTU of 1500", "mtu 9000"],
    ),
];

const DISKS: &[Bad] = &[
    bad(
        "missing disk",
        "--kernel hello --disk path=none",
        1,
        &["--disk", "none", "create it"],
    ),
    bad(
        "disk is a directory",
        "--kernel hello --disk path=dir",
        1,
        &["--disk", "dir", "give"],
    ),
    bad(
        "disk of an odd size",
        "--kernel hello --disk path=odd",
        1,
        &["--disk", "odd", "512", "truncate"],
    ),
    bad(
        "disk without a path",
        "--kernel hello --disk path=",
        2,
        &["--disk", "path"],
    ),
    bad(
        "the same disk twice",
        "--kernel hello --disk path=disk --disk path=disk",
        2,
        &["--disk", "same", "once"],
    ),
    bad(
        "the same disk by a link",
        "--kernel hello --disk path=disk --disk path=link",
        2,
        &["--disk", "same"],
    ),
    bad(
        "unknown key of a disk",
        "--kernel hello --disk path=disk,bogus=1",
        2,
        &["--disk", "bogus", "path"],
    ),
    bad(
        "repeated key of a disk",
        "--kernel hello --disk path=disk,path=disk",
        2,
        &["--disk", "twice"],
    ),
    bad(
        "no such cache mode",
        "--kernel hello --disk path=disk,cache=fast",
        2,
        &["--disk", "fast", "writeback"],
    ),
    bad(
        "too many queues",
        "--kernel hello --disk path=disk,num_queues=1000",
        2,
        &["--disk", "num_queues", "256"],
    ),
    bad(
        "serial number too long",
        "--kernel hello --disk path=disk,serial=123456789012345678901",
        2,
        &["--disk", "serial", "20"],
    ),
    bad(
        "format not given",
        "--kernel hello --disk path=qcow",
        1,
        &["--disk", "qcow2", "format="],
    ),
];

#[test]
fn wrong_flags_and_files_get_one_readable_line() {
    let directory = tempfile::tempdir().unwrap();
    make_files(directory.path());
    let before = snapshot(directory.path());
    let mut failures = Vec::new();
    let all = KERNELS
        .iter()
        .chain(MACHINE)
        .chain(NETWORKS)
        .chain(ADDRESSES)
        .chain(DISKS);
    for bad in all.clone() {
        if let Err(why) = check(bad, directory.path()) {
            failures.push(format!("{}: {why}", bad.what));
        }
        if snapshot(directory.path()) != before {
            failures.push(format!("{}: it changed a file or left one", bad.what));
        }
    }
    suite::note(
        "bad-input",
        &format!(
            "bad-input: {} tried, {} failed",
            all.count(),
            failures.len()
        ),
    )
    .unwrap();
    assert!(failures.is_empty(), "\n{}", failures.join("\n"));
}

/// What makes the network of [`TAPS`] and then runs the program there as somebody who may use taps and make none.
const NETWORK: &str = "ip tuntap add dev one mode tap && ip tuntap add dev many mode tap multi_queue && \
    ip tuntap add dev tun7 mode tun && ip link add br7 type bridge && \
    ip tuntap add dev theirs mode tap user 4242 && for name in one many; do ip link set $name up; done || exit 99
    exec setpriv --bounding-set=-net_admin timeout -s KILL 60 \"$@\"";

#[test]
fn taps_that_cannot_be_had_get_one_readable_line() {
    const CLASS: &str = "taps";
    let directory = tempfile::tempdir().unwrap();
    make_files(directory.path());
    let mut failures = Vec::new();
    for bad in TAPS {
        let output = Command::new("unshare")
            .args(["--net", "sh", "-c", NETWORK, "sh"])
            .arg(kit::vireo().unwrap())
            .arg("run")
            .args(bad.args.split_whitespace())
            .current_dir(directory.path())
            .stdin(Stdio::null())
            .output()
            .unwrap();
        if output.status.code() == Some(99) || output.stderr.starts_with(b"unshare") {
            let why = String::from_utf8_lossy(&output.stderr);
            println!("SKIP  {CLASS}: {why}");
            return suite::note(CLASS, &format!("skipped: no taps can be made here: {why}"))
                .unwrap();
        }
        if let Err(why) = one_line(&output, bad.exit, bad.says) {
            failures.push(format!("{}: {why}", bad.what));
        }
    }
    suite::note(
        CLASS,
        &format!("{} tried, {} failed", TAPS.len(), failures.len()),
    )
    .unwrap();
    assert!(failures.is_empty(), "\n{}", failures.join("\n"));
}

#[test]
fn a_disk_that_may_not_be_written_is_named() {
    let directory = tempfile::tempdir().unwrap();
    make_files(directory.path());
    // Root may write to anything that has mode bits, but not to a file being run.
    let running = directory.path().join("running");
    fs::copy("/bin/sleep", &running).unwrap();
    let length = fs::metadata(&running).unwrap().len();
    fs::File::options()
        .write(true)
        .open(&running)
        .unwrap()
        .set_len(length.next_multiple_of(512))
        .unwrap();
    fs::set_permissions(&running, fs::Permissions::from_mode(0o755)).unwrap();
    let mut busy = Command::new(&running).arg("60").spawn().unwrap();
    let output = vireo(
        directory.path(),
        &["--kernel", "hello", "--disk", "path=running"],
    );
    busy.kill().unwrap();
    busy.wait().unwrap();
    one_line(&output, 1, &["--disk", "running", "readonly=on"]).unwrap();
}

#[test]
fn a_host_without_kvm_is_told_what_to_do() {
    let directory = tempfile::tempdir().unwrap();
    make_files(directory.path());
    for (hide, says) in [
        ("mount -t tmpfs none /dev", &["/dev/kvm", "modprobe"][..]),
        ("mount --bind /dev/null /dev/kvm", &["/dev/kvm"][..]),
    ] {
        let vireo = kit::vireo().unwrap();
        let output = Command::new("unshare")
            .args(["--map-root-user", "--mount", "sh", "-c"])
            .arg(format!(
                "{hide} || exit 99; exec {} run --kernel hello",
                vireo.display()
            ))
            .current_dir(directory.path())
            .output()
            .unwrap();
        if output.status.code() == Some(99) || output.stderr.starts_with(b"unshare") {
            println!("SKIP  {hide}: no mount namespace may be made here");
            continue;
        }
        one_line(&output, 1, says).unwrap();
    }
}

fn check(bad: &Bad, directory: &Path) -> Result<(), String> {
    let long = "a".repeat(70_000);
    let args: Vec<&str> = bad
        .args
        .split_whitespace()
        .map(|word| if word == "{long}" { &long } else { word })
        .collect();
    one_line(&vireo(directory, &args), bad.exit, bad.says)
}

fn vireo(directory: &Path, args: &[&str]) -> Output {
    // A guest that starts after all must not keep the test.
    Command::new("timeout")
        .args(["-s", "KILL", "60"])
        .arg(kit::vireo().unwrap())
        .arg("run")
        .args(args)
        .current_dir(directory)
        .env("RUST_BACKTRACE", "1")
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

fn one_line(output: &Output, exit: i32, says: &[&str]) -> Result<(), String> {
    let text = String::from_utf8_lossy(&output.stderr);
    let mut short: String = text.chars().take(300).collect();
    short.push_str(if text.len() > short.len() { "…" } else { "" });
    if output.status.code() != Some(exit) {
        return Err(format!("ended with {}, not {exit}: {short}", output.status));
    }
    if text.lines().count() != 1 || !text.starts_with("vireo: ") || text.len() > 600 {
        return Err(format!("not one readable line: {short}"));
    }
    if text.contains("panicked") || text.contains("Os {") || text.contains("Error(") {
        return Err(format!("not meant for people: {short}"));
    }
    for word in says {
        if !text.contains(word) {
            return Err(format!("does not say \"{word}\": {short}"));
        }
    }
    if !output.stdout.is_empty() {
        return Err(format!(
            "printed: {}",
            String::from_utf8_lossy(&output.stdout)
        ));
    }
    Ok(())
}

fn make_files(directory: &Path) {
    let path = |name: &str| directory.join(name);
    let sized = |name: &str, size: u64| {
        fs::File::create(path(name)).unwrap().set_len(size).unwrap();
    };
    let hello = fs::read(kit::file("guests/hello").unwrap())
        .expect("the small guests are not built; run `make -C resources/guests`");
    let patched = |name: &str, at: usize, value: u8| {
        let mut bytes = hello.clone();
        bytes[at] = value;
        fs::write(path(name), bytes).unwrap();
    };
    fs::write(path("hello"), &hello).unwrap();
    fs::write(path("cut"), &hello[..3000]).unwrap();
    fs::write(path("text"), "this is no kernel\n".repeat(500)).unwrap();
    // e_machine of the ELF header: 183 is aarch64, 3 is i386; e_ident[4]: 1 is 32 bits.
    patched("arm", 18, 183);
    patched("i386", 18, 3);
    let mut bzimage = vec![0; 4096];
    bzimage[0x1F1] = 4;
    bzimage[0x1FE..0x200].copy_from_slice(&[0x55, 0xAA]);
    bzimage[0x202..0x206].copy_from_slice(b"HdrS");
    bzimage[0x206..0x208].copy_from_slice(&0x20F_u16.to_le_bytes());
    bzimage[0x211] = 1;
    bzimage[0x1F4..0x1F8].copy_from_slice(&0x10_0000_u32.to_le_bytes());
    fs::write(path("cut-bzimage"), bzimage).unwrap();
    fs::create_dir(path("dir")).unwrap();
    sized("empty", 0);
    sized("disk", 1 << 20);
    sized("odd", 1000);
    sized("big", 300 << 20);
    sized("qcow", 1 << 20);
    fs::write(
        path("qcow"),
        [b"QFI\xfb".as_slice(), &[0; 1 << 20][4..]].concat(),
    )
    .unwrap();
    // One segment of 1 GiB by its program header's p_memsz and p_filesz.
    fs::write(path("large"), large(&hello)).unwrap();
    symlink("disk", path("link")).unwrap();
    assert!(
        Command::new("mkfifo")
            .arg(path("pipe"))
            .status()
            .unwrap()
            .success()
    );
}

/// The guest with its first loaded segment grown to 1 GiB in memory.
fn large(elf: &[u8]) -> Vec<u8> {
    let mut bytes = elf.to_vec();
    let half = |at: usize| usize::from(u16::from_le_bytes([elf[at], elf[at + 1]]));
    let table = usize::from(elf[32]) | usize::from(elf[33]) << 8;
    let header = (0..half(56))
        .map(|n| table + n * half(54))
        .find(|&at| elf[at..at + 4] == [1, 0, 0, 0])
        .unwrap();
    bytes[header + 40..header + 48].copy_from_slice(&(1_u64 << 30).to_le_bytes());
    bytes
}

/// Every file's name, length, time of change and, for small ones, content.
fn snapshot(directory: &Path) -> BTreeMap<String, (u64, std::time::SystemTime, Vec<u8>)> {
    fs::read_dir(directory)
        .unwrap()
        .map(|entry| {
            let entry = entry.unwrap();
            let data = entry.metadata().unwrap();
            let small = data.is_file() && data.len() <= 1 << 20;
            let content = if small {
                fs::read(entry.path()).unwrap()
            } else {
                Vec::new()
            };
            (
                entry.file_name().into_string().unwrap(),
                (data.len(), data.modified().unwrap(), content),
            )
        })
        .collect()
}
