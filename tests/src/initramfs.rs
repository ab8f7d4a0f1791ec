//! Initramfs images: the guest's (L2) and the nested machine's own (L1).

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufWriter};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::cpio::Archive;
use crate::kit;
use crate::modules::in_load_order;

/// What a guest loads; names that a kernel has built in are passed over.
const GUEST_MODULES: &[&str] = &[
    "virtio_pci",
    "virtio_blk",
    "virtio_net",
    "virtio_rng",
    "virtio_console",
    "virtio_balloon",
    "virtio_input",
    "virtio_mem",
    "vmw_vsock_virtio_transport",
    "pvpanic_mmio",
    "pvpanic_pci",
    "i6300esb",
    "button",
    "evdev",
];

/// What a script loads by itself, in the order of `/modules/screen`, where the kernel has it.
const SCREEN_MODULES: &[&str] = &["bochs"];

/// The same for the PS/2 mouse, by `/modules/ps2`.
const PS2_MODULES: &[&str] = &["psmouse"];

/// What the nested machine loads to have `/dev/kvm`.
const NESTED_MODULES: &[&str] = &[
    "virtio_pci",
    "virtio_console",
    "kvm",
    "kvm_amd",
    "loop",
    "tun",
];

/// What cases with networks load beside that.
const NET_MODULES: &[&str] = &[
    "bridge",
    "8021q",
    "veth",
    "macvtap",
    "vhost_net",
    "sch_netem",
    "sch_tbf",
];

/// Runs `/case.sh` when there is one, else a shell; then powers off.
///
/// Lines for the test begin with `@@`, which kernel messages do not.
const GUEST_INIT: &str = r#"#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin HOME=/ PS1='vireo:\w# '
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs tmp /tmp
for module in $(cat /modules/order); do
    insmod "/modules/$module.ko" 2>/tmp/why || echo "@@ insmod $module: $(cat /tmp/why)"
done
# Only drained output survives a power-off.
drain() { stty -F /dev/console cs8; }
if [ -e /case.sh ]; then
    echo '@@ up'
    . /case.sh
    echo '@@ end'
else
    echo "Linux $(uname -r) in Vireo, $(nproc) CPU(s). Leave with poweroff -f, or Ctrl-a x."
    setsid cttyhack sh
fi
drain
poweroff -f
"#;

/// Starts the agent on the results port; when it ends, the machine ends.
const NESTED_INIT: &str = r#"#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin HOME=/ RUST_BACKTRACE=1
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts pts /dev/pts
mount -t tmpfs -o size=90% tmp /tmp
mount -t tracefs tracing /sys/kernel/tracing
ip link set lo up
for module in $(cat /modules/order); do insmod "/modules/$module.ko"; done
mode=cases
for word in $(cat /proc/cmdline); do
    case $word in testbed=*) mode=${word#testbed=} ;; esac
done
port=
for name in /sys/class/virtio-ports/*/name; do
    [ "$(cat "$name")" = results ] && port=/dev/$(basename "$(dirname "$name")")
done
if [ "$mode" = interactive ]; then
    setsid -c /bin/agent interactive /kit "$port" </dev/hvc0 >/dev/hvc0 2>&1
else
    /bin/agent "$mode" /kit "$port"
fi
echo "agent ended with $?"
poweroff -f
"#;

/// Builds a guest's initramfs for the unpacked kernel package at `package`.
///
/// # Errors
/// A part is missing or the image cannot be written.
pub fn guest(package: &Path, busybox: &Path, output: &Path) -> Result<()> {
    write(output, |archive| {
        skeleton(archive, busybox, GUEST_INIT)?;
        modules(archive, package, GUEST_MODULES, "order")?;
        modules(archive, package, SCREEN_MODULES, "screen")?;
        modules(archive, package, PS2_MODULES, "ps2")
    })
}

/// One more archive to put behind a guest's initramfs, with its script.
///
/// # Errors
/// What writing to memory gives: nothing.
pub fn guest_script(script: &str) -> io::Result<Vec<u8>> {
    let mut archive = Archive::new(Vec::new());
    archive.file("case.sh", 0o755, script.as_bytes())?;
    archive.finish()
}

/// Builds the nested machine's initramfs: the kernel's modules, the agent,
/// and `kit` (paths in `/kit` to files here). Programs bring the shared
/// libraries that `ldd` names.
///
/// # Errors
/// A part is missing or the image cannot be written.
pub fn nested(
    package: &Path,
    busybox: &Path,
    agent: &Path,
    kit: &BTreeMap<String, PathBuf>,
    output: &Path,
) -> Result<()> {
    // The first is for both machines.
    let more = [kit::NET_TOOLS, kit::VIRTIOFSD].map(|name| kit.get(name).map(fs::read));
    write(output, |archive| {
        skeleton(archive, busybox, NESTED_INIT)?;
        modules(archive, package, NESTED_MODULES, "order")?;
        copy(archive, "bin/agent", agent)?;
        let mut libraries = shared_libraries(agent)?;
        let mut directories = vec![String::new()];
        for (path, file) in kit {
            if path == "vireo" {
                libraries.extend(shared_libraries(file)?);
            }
            let path = format!("kit/{path}");
            parents(archive, &path, &mut directories)?;
            copy(archive, &path, file)?;
        }
        for (path, file) in libraries {
            parents(archive, &path, &mut directories)?;
            copy(archive, &path, &file)?;
        }
        Ok(())
    })?;
    for archive in more.into_iter().flatten() {
        let mut file = File::options().append(true).open(output)?;
        io::Write::write_all(&mut file, &archive?)?;
    }
    Ok(())
}

/// One more archive to put behind a guest's initramfs: QEMU's guest agent, out of the
/// unpacked package at `package`, as `/bin/qemu-ga`; and the program `sockets` as `/bin/vsock`.
///
/// # Errors
/// The package is not there.
pub fn guest_agent(package: &Path, sockets: &Path, output: &Path) -> Result<()> {
    write(output, |archive| {
        let program = package.join("usr/sbin/qemu-ga");
        copy(archive, "bin/qemu-ga", &program)?;
        copy(archive, "bin/vsock", sockets)?;
        let mut libraries = libraries_in(sockets, Some(package))?;
        libraries.extend(libraries_in(&program, Some(package))?);
        let mut directories = vec![String::new()];
        for (path, file) in libraries {
            let path = library_path(&path, package);
            parents(archive, &path, &mut directories)?;
            copy(archive, &path, &file)?;
        }
        Ok(())
    })
}

/// One more archive for a guest of the nested machine's own kernel and for that machine itself: programs out of the
/// unpacked packages at `tools`, and modules of the unpacked kernel package at `kernel`, with `/modules/net` to load them.
///
/// # Errors
/// A package is not there.
pub fn net_tools(tools: &Path, kernel: &Path, output: &Path) -> Result<()> {
    write(output, |archive| {
        let mut directories = vec![String::new(), "bin".to_owned(), "modules".to_owned()];
        let mut libraries = BTreeMap::new();
        let programs = ["iperf3", "passt", "socat", "tcpdump"].map(|name| ("usr/bin", name));
        // Where Debian 12 has it, and where later releases do.
        let sbin = ["sbin", "usr/sbin"];
        let sbin = sbin
            .into_iter()
            .find(|place| tools.join(place).join("tc").is_file());
        for (place, program) in programs.into_iter().chain([(sbin.unwrap_or("sbin"), "tc")]) {
            let path = tools.join(place).join(program);
            copy(archive, &format!("bin/{program}"), &path)?;
            libraries.extend(libraries_in(&path, Some(tools))?);
        }
        for (path, file) in libraries {
            let path = library_path(&path, tools);
            parents(archive, &path, &mut directories)?;
            copy(archive, &path, &file)?;
        }
        let mut script = String::new();
        for module in in_load_order(kernel, NET_MODULES)? {
            let path = format!("modules/{}.ko", module.name);
            archive.file(&path, 0o644, &module.content)?;
            script.push_str(&format!("insmod /{path} 2> /dev/null || true\n"));
        }
        Ok(archive.file("modules/net", 0o755, script.as_bytes())?)
    })
}

/// One more archive to put behind the nested machine's initramfs: the program out of the unpacked package at
/// `package` that serves directories, as `/bin/virtiofsd`.
///
/// # Errors
/// The package is not there.
pub fn virtiofsd(package: &Path, output: &Path) -> Result<()> {
    // Where Debian 12 has it, and where later releases do.
    let places = ["usr/lib/qemu/virtiofsd", "usr/libexec/virtiofsd"];
    let program = places.map(|place| package.join(place));
    let program = program.iter().find(|path| path.is_file());
    let program = program.with_context(|| {
        let package = package.display();
        format!("{package} has no virtiofsd; run `make setup`")
    })?;
    write(output, |archive| {
        copy(archive, "bin/virtiofsd", program)?;
        let mut directories = vec![String::new(), "bin".to_owned()];
        for (path, file) in libraries_in(program, Some(package))? {
            let path = library_path(&path, package);
            parents(archive, &path, &mut directories)?;
            copy(archive, &path, &file)?;
        }
        Ok(())
    })
}

/// Where a library is in the guest: as on this machine, or as in its package.
fn library_path(path: &str, package: &Path) -> String {
    let package = package.to_string_lossy();
    let bare = path.strip_prefix(package.trim_start_matches('/'));
    bare.unwrap_or(path).trim_start_matches('/').to_owned()
}

fn write(
    output: &Path,
    fill: impl FnOnce(&mut Archive<BufWriter<File>>) -> Result<()>,
) -> Result<()> {
    let part = output.with_extension("part");
    let file = File::create(&part).with_context(|| format!("cannot write {}", part.display()))?;
    let mut archive = Archive::new(BufWriter::new(file));
    fill(&mut archive)?;
    archive.finish()?.into_inner()?;
    fs::rename(&part, output)?;
    Ok(())
}

fn skeleton<W: io::Write>(archive: &mut Archive<W>, busybox: &Path, init: &str) -> Result<()> {
    for directory in ["bin", "dev", "proc", "sys", "tmp", "root", "modules"] {
        archive.directory(directory)?;
    }
    // The kernel opens it for init before devtmpfs is there.
    archive.character_device("dev/console", 5, 1)?;
    copy(archive, "bin/busybox", busybox)?;
    archive.file("init", 0o755, init.as_bytes())?;
    Ok(())
}

/// Modules, and the list of them by which they are loaded, where there are any.
fn modules<W: io::Write>(
    archive: &mut Archive<W>,
    package: &Path,
    wanted: &[&str],
    list: &str,
) -> Result<()> {
    let mut order = String::new();
    for module in in_load_order(package, wanted)? {
        archive.file(
            &format!("modules/{}.ko", module.name),
            0o644,
            &module.content,
        )?;
        order.push_str(&module.name);
        order.push('\n');
    }
    if !order.is_empty() {
        archive.file(&format!("modules/{list}"), 0o644, order.as_bytes())?;
    }
    Ok(())
}

fn copy<W: io::Write>(archive: &mut Archive<W>, path: &str, file: &Path) -> Result<()> {
    let content = fs::read(file)
        .with_context(|| format!("{} is missing; run `make setup`", file.display()))?;
    archive.file(path, 0o755, &content)?;
    Ok(())
}

/// Makes the directories above `path` that are not made yet.
fn parents<W: io::Write>(
    archive: &mut Archive<W>,
    path: &str,
    made: &mut Vec<String>,
) -> Result<()> {
    for (at, _) in path.match_indices('/') {
        let directory = &path[..at];
        if !made.iter().any(|known| known == directory) {
            archive.directory(directory)?;
            made.push(directory.to_owned());
        }
    }
    Ok(())
}

/// Where the program's shared libraries and its loader belong, and are.
fn shared_libraries(program: &Path) -> Result<BTreeMap<String, PathBuf>> {
    libraries_in(program, None)
}

/// As [`shared_libraries`]; those of the unpacked `package` go first.
fn libraries_in(program: &Path, package: Option<&Path>) -> Result<BTreeMap<String, PathBuf>> {
    let mut command = Command::new("ldd");
    if let Some(package) = package {
        let places = ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"];
        let places = places.map(|place| package.join(place).display().to_string());
        command.env("LD_LIBRARY_PATH", places.join(":"));
    }
    let output = command
        .arg(program)
        .output()
        .context("ldd does not start")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let mut libraries = BTreeMap::new();
    for line in text.lines() {
        ensure!(
            !line.contains("not found"),
            "{}: {}",
            program.display(),
            line.trim()
        );
        let path = line.split_whitespace().find(|word| word.starts_with('/'));
        if let Some(path) = path {
            libraries.insert(path.trim_start_matches('/').to_owned(), PathBuf::from(path));
        }
    }
    Ok(libraries)
}
