//! How each monitor is told the same thing in L1.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::{Control, Run};
use crate::nested::KERNEL;
use crate::{kit, nested};

/// A path of the kit in L1.
pub fn at(path: &str) -> String {
    format!("{}/{path}", kit::NESTED)
}

/// The kernel's ELF file in L1, which every monitor boots by PVH.
pub fn vmlinux() -> String {
    at(&format!("kernels/{KERNEL}.vmlinux"))
}

pub fn words(text: &str) -> Vec<String> {
    text.split_whitespace().map(ToOwned::to_owned).collect()
}

/// Our monitor, with `flags` besides the guest `l2` of the kit, one processor and 512 MiB.
pub fn ours(name: &str, kernel: &str, flags: &str, cmdline: &str) -> Run {
    let mut args = words(&format!(
        "run --memory size=512M --kernel {kernel} --initramfs {} {flags} --cmdline",
        at("l2")
    ));
    args.push(cmdline.to_owned());
    Run {
        name: name.to_owned(),
        program: at("vireo"),
        libraries: None,
        args,
        plug: String::new(),
        control: None,
    }
}

/// QEMU's `machine` with the same guest.
pub fn qemu(name: &str, machine: &str, flags: &str, cmdline: &str) -> Run {
    let mut args = words(&format!(
        "-L {} -M {machine} -accel kvm -cpu host -m 512 -name bench,debug-threads=on \
         -nodefaults -no-user-config -display none -no-reboot \
         -kernel {} -initrd {} {flags} -append",
        at("qemu/share"),
        vmlinux(),
        at("l2"),
    ));
    args.push(cmdline.to_owned());
    Run {
        name: name.to_owned(),
        program: at("qemu/qemu"),
        libraries: Some(at("qemu/lib")),
        args,
        plug: String::new(),
        control: None,
    }
}

impl Run {
    /// The same, with its control socket in L1.
    pub fn controlled(mut self) -> Self {
        let socket = "/tmp/control";
        let (flags, control) = if self.libraries.is_none() {
            (
                words(&format!("--api-socket {socket}")),
                Control::Api(socket.to_owned()),
            )
        } else {
            (
                words(&format!("-qmp unix:{socket},server=on,wait=off")),
                Control::Qmp(socket.to_owned()),
            )
        };
        self.args.extend(flags);
        self.control = Some(control);
        self
    }

    /// The same, with shell words that follow its start.
    pub fn plugged(mut self, script: &str) -> Self {
        script.clone_into(&mut self.plug);
        self
    }
}

/// QEMU with its libraries and firmware; nothing when it is not unpacked.
pub fn qemu_files() -> Result<BTreeMap<String, PathBuf>> {
    let mut files = BTreeMap::new();
    let qemu = nested::qemu();
    let program = PathBuf::from(qemu.get_program());
    if !program.is_file() {
        return Ok(files);
    }
    let mut ldd = Command::new("ldd");
    ldd.arg(&program);
    for (key, value) in qemu.get_envs() {
        ldd.env(key, value.unwrap_or_default());
    }
    let output = ldd.output().context("ldd does not start")?;
    ensure!(
        output.status.success(),
        "ldd fails for {}",
        program.display()
    );
    for path in String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')))
        .map(PathBuf::from)
    {
        if let Some(name) = path.file_name() {
            files.insert(format!("qemu/lib/{}", name.to_string_lossy()), path.clone());
        }
    }
    let directories: Vec<PathBuf> = qemu
        .get_args()
        .filter(|arg| *arg != "-L")
        .map(PathBuf::from)
        .collect();
    for name in [
        "bios-256k.bin",
        "bios-microvm.bin",
        "qboot.rom",
        "kvmvapic.bin",
        "linuxboot_dma.bin",
        "pvh.bin",
    ] {
        let found = directories
            .iter()
            .map(|directory| directory.join(name))
            .find(|path| path.is_file());
        if let Some(path) = found {
            files.insert(format!("qemu/share/{name}"), path);
        }
    }
    files.insert("qemu/qemu".to_owned(), program);
    Ok(files)
}

/// Whether the kit has QEMU.
pub fn has_qemu(files: &BTreeMap<String, PathBuf>) -> bool {
    files.contains_key("qemu/qemu")
}
