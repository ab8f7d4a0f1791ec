//! The compared monitors, and how each is told the same thing.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;

use crate::{kit, nested};

/// Guest RAM of most native measures, in MiB.
pub const MEMORY: u64 = 128;

/// A monitor with the machine type that it is compared by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Monitor {
    /// This project's.
    Vireo,
    /// QEMU's machine without PCI and ACPI: its fastest start.
    Microvm,
    /// QEMU's PC with PCI Express, by the small firmware qboot.
    Q35,
}

/// How a disk is handed to a monitor.
#[derive(Clone, Debug)]
pub struct Disk {
    /// A raw image.
    pub path: PathBuf,
    /// Past the host's page cache.
    pub direct: bool,
    /// `io_uring` or `threads`.
    pub engine: &'static str,
}

/// One small guest, the same for every monitor.
#[derive(Clone, Debug)]
pub struct Job {
    /// The guest's ELF file.
    pub kernel: PathBuf,
    /// Its words.
    pub words: String,
    /// Its RAM, in MiB.
    pub memory: u64,
    /// Its disk.
    pub disk: Option<Disk>,
    /// It has a balloon.
    pub balloon: bool,
    /// The tap of its network card.
    pub tap: Option<String>,
    /// Its screen.
    pub screen: Option<Screen>,
}

/// A screen with a VNC server.
#[derive(Clone, Debug)]
pub struct Screen {
    /// Pixels of a line.
    pub width: u16,
    /// Lines.
    pub height: u16,
    /// The server's unix socket.
    pub socket: PathBuf,
}

impl Job {
    /// The guest `name` with `words`.
    ///
    /// # Errors
    /// As [`kit::file`].
    pub fn guest(name: &str, words: &str) -> Result<Self> {
        Ok(Self {
            kernel: kit::file(&format!("guests/{name}"))?,
            words: words.to_owned(),
            memory: MEMORY,
            disk: None,
            balloon: false,
            tap: None,
            screen: None,
        })
    }
}

impl Monitor {
    /// All, in the order of the reports.
    pub const ALL: [Self; 3] = [Self::Vireo, Self::Microvm, Self::Q35];

    /// Its name in reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Vireo => "vireo",
            Self::Microvm => "qemu microvm",
            Self::Q35 => "qemu q35",
        }
    }

    /// The command that runs `job` with the serial port on standard output.
    ///
    /// # Errors
    /// The monitor is not built.
    pub fn command(self, job: &Job) -> Result<Command> {
        if self == Self::Vireo {
            return vireo(job);
        }
        let mut command = nested::qemu();
        command.args(["-accel", "kvm", "-cpu", "host,arch-capabilities=off"]);
        command.arg("-m").arg(job.memory.to_string());
        command.args(["-nodefaults", "-no-user-config", "-display", "none"]);
        command.args(["-serial", "stdio", "-no-reboot"]);
        // The guests end by it; and port 0x505 for those that read it.
        command.args(["-device", "isa-debug-exit,iobase=0xf4,iosize=4"]);
        command.args(["-device", "pvpanic"]);
        command.args(match self {
            // Without ACPI it takes qboot by itself.
            Self::Microvm => [
                "-M",
                "microvm,acpi=off,pit=off,pic=off,rtc=off,auto-kernel-cmdline=off",
            ]
            .as_slice(),
            _ => ["-M", "q35", "-bios", "qboot.rom"].as_slice(),
        });
        if let Some(disk) = &job.disk {
            command.args(["-object", "iothread,id=io"]);
            command.arg("-drive").arg(format!(
                "if=none,id=d,format=raw,file={},aio={},cache={}",
                disk.path.display(),
                disk.engine,
                if disk.direct { "none" } else { "writeback" }
            ));
            command.args([
                "-device",
                "virtio-blk-pci,drive=d,disable-legacy=on,iothread=io",
            ]);
        }
        if job.balloon {
            command.args(["-device", "virtio-balloon-pci,disable-legacy=on"]);
        }
        if let Some(tap) = &job.tap {
            command.args(["-name", "bench,debug-threads=on", "-netdev"]);
            command.arg(format!("tap,id=n,ifname={tap},script=no,downscript=no"));
            command.args([
                "-device",
                "virtio-net-pci,netdev=n,disable-legacy=on,romfile=",
            ]);
        }
        if let Some(screen) = &job.screen {
            let Screen { width, height, .. } = screen;
            command.args(["-name", "bench,debug-threads=on", "-device"]);
            command.arg(format!(
                "bochs-display,xres={width},yres={height},vgamem=16M"
            ));
            command.arg("-vnc");
            command.arg(format!("unix:{}", screen.socket.display()));
        }
        command.arg("-kernel").arg(&job.kernel);
        command.arg("-append").arg(&job.words);
        Ok(command)
    }

    /// The command by which ours restores the snapshot in `directory`, with memory in the way `mode`.
    ///
    /// # Errors
    /// It is not built.
    pub fn restore(directory: &Path, mode: &str) -> Result<Command> {
        let mut command = Command::new(kit::vireo()?);
        command.args(["run", "--restore"]).arg(format!(
            "source_url={},memory_restore_mode={mode}",
            directory.display()
        ));
        Ok(command)
    }
}

fn vireo(job: &Job) -> Result<Command> {
    let mut command = Command::new(kit::vireo()?);
    command.args(["run", "--serial", "tty", "--memory"]);
    command.arg(format!("size={}M", job.memory));
    command.arg("--kernel").arg(&job.kernel);
    command.arg("--cmdline").arg(&job.words);
    if let Some(disk) = &job.disk {
        command.arg("--disk").arg(format!(
            "path={},aio={},direct={}",
            disk.path.display(),
            disk.engine,
            if disk.direct { "on" } else { "off" }
        ));
    }
    if job.balloon {
        command.args(["--balloon", "size=0"]);
    }
    if let Some(tap) = &job.tap {
        command.arg("--net").arg(format!("tap={tap}"));
    }
    if let Some(screen) = &job.screen {
        let Screen {
            width,
            height,
            socket,
        } = screen;
        let socket = socket.display();
        command.arg("--display").arg(format!(
            "width={width},height={height},memory=16M,input=off,vnc=unix:{socket}"
        ));
    }
    Ok(command)
}

/// QEMU's version, if it runs.
#[must_use]
pub fn qemu_version() -> Option<String> {
    version(&mut nested::qemu())
}

/// The first line that `program --version` prints, if it runs.
#[must_use]
pub fn vireo_version(path: &Path) -> Option<String> {
    version(&mut Command::new(path))
}

fn version(command: &mut Command) -> Option<String> {
    let output = command.arg("--version").output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let line = text.lines().next()?.to_owned();
    output.status.success().then_some(line)
}
