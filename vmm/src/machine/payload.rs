//! What a machine boots: files that are open, and what goes into its memory with them.

use std::fs::File;
use std::path::{Path, PathBuf};

use virtio::memory::GuestMap;
use vm_memory::{Bytes, GuestAddress};

use super::MachineError;
use crate::acpi::AcpiImage;
use crate::boot::{self, BootError, BootSource, Entry, Protocol, Role};
use crate::config::{BootProtocol, DisplayConfig, VmConfig};
use crate::layout::memory;
use crate::opener::Opener;
use crate::smbios::{self, SmbiosImage};

/// What a machine boots. The files stay open, because a guest reset loads them again.
pub struct Payload {
    kernel: (PathBuf, File),
    initramfs: Option<(PathBuf, File)>,
    cmdline: String,
    protocol: Protocol,
    screen: Option<boot::Screen>,
    smbios: SmbiosImage,
    /// New for each machine that is built, and the same over the guest's resets.
    pub(super) generation: [u8; 16],
}

impl Payload {
    pub(super) fn open(config: &VmConfig, opener: &Opener) -> Result<Self, MachineError> {
        let payload = &config.payload;
        let open = |flag, path: &Path| {
            opener
                .open_input(path)
                .map_err(|source| MachineError::Open { flag, source })
        };
        let path = payload.kernel.as_ref().ok_or(MachineError::NoKernel)?;
        let kernel = open("--kernel", path)?;
        let initramfs = match &payload.initramfs {
            Some(path) => Some((path.clone(), open("--initramfs", path)?)),
            None => None,
        };
        Ok(Self {
            kernel: (path.clone(), kernel),
            initramfs,
            cmdline: payload.cmdline.clone(),
            protocol: match payload.boot_protocol {
                BootProtocol::Auto => Protocol::Auto,
                BootProtocol::Linux => Protocol::Linux64,
                BootProtocol::Pvh => Protocol::Pvh,
            },
            screen: config.display.as_ref().map(screen),
            smbios: smbios::build(config)?,
            generation: random()?,
        })
    }

    /// Puts ACPI and SMBIOS tables, the generation id, kernel, initial RAM disk and command line into guest
    /// memory, which reads as zeros elsewhere.
    ///
    /// # Errors
    ///
    /// [`MachineError::Boot`], naming what could not be loaded.
    pub fn load(&mut self, memory: &GuestMap, acpi: &AcpiImage) -> Result<Entry, MachineError> {
        let SmbiosImage { bytes, address } = &self.smbios;
        let pieces: [(&[u8], u64); 3] = [
            (bytes, *address),
            (&acpi.bytes, acpi.address),
            (&self.generation, memory::GENERATION_ID),
        ];
        for (bytes, address) in pieces {
            memory
                .write_slice(bytes, GuestAddress(address))
                .map_err(|_| MachineError::GuestMemory { address })?;
        }
        let source = BootSource {
            kernel: &mut self.kernel.1,
            initramfs: self.initramfs.as_mut().map(|(_, file)| file),
            cmdline: &self.cmdline,
            protocol: self.protocol,
            screen: self.screen,
        };
        boot::load(memory, source, acpi.address).map_err(|source| self.failed(source))
    }

    /// What of guest memory, at which guest-physical address, tells this machine from the one that was `saved`: the generation id, and the
    /// SMBIOS tables where their texts are as long as they were. Others are there after the guest's next reset.
    #[must_use]
    pub fn identity(&self, saved: &VmConfig) -> Vec<(u64, &[u8])> {
        let mut own = vec![(memory::GENERATION_ID, &self.generation[..])];
        let SmbiosImage { bytes, address } = &self.smbios;
        let before = smbios::build(saved).ok();
        let fits = |before: SmbiosImage| before.bytes.len() == bytes.len() && before != self.smbios;
        if before.is_some_and(fits) {
            own.push((*address, bytes));
        }
        own
    }

    /// Names the flag and the file that `source` is about.
    #[must_use]
    pub fn failed(&self, source: BootError) -> MachineError {
        let what = match (subject(&source), &self.initramfs) {
            (Subject::Initramfs, Some((path, _))) => format!("--initramfs {}", path.display()),
            (Subject::CommandLine, _) => "--cmdline".to_owned(),
            _ => format!("--kernel {}", self.kernel.0.display()),
        };
        MachineError::Boot { what, source }
    }
}

/// The display as it is at power-on.
fn screen(display: &DisplayConfig) -> boot::Screen {
    let DisplayConfig {
        width,
        height,
        memory: len,
        input: _,
        vnc: _,
        web: _,
    } = *display;
    boot::Screen {
        base: memory::FRAMEBUFFER,
        len,
        width,
        height,
    }
}

/// Random bytes of the host.
pub(super) fn random<const N: usize>() -> Result<[u8; N], MachineError> {
    crate::random::random().map_err(|error| MachineError::Host {
        what: "no random numbers",
        source: error.into(),
    })
}

enum Subject {
    Kernel,
    Initramfs,
    CommandLine,
}

fn subject(error: &BootError) -> Subject {
    match error {
        BootError::Directory(Role::Initramfs)
        | BootError::Empty(Role::Initramfs)
        | BootError::NotSeekable {
            role: Role::Initramfs,
            ..
        }
        | BootError::Read {
            role: Role::Initramfs,
            ..
        }
        | BootError::Truncated {
            role: Role::Initramfs,
            ..
        }
        | BootError::InitramfsNoRoom { .. }
        | BootError::InitramfsTooLarge { .. } => Subject::Initramfs,
        BootError::CommandLineTooLong { .. } | BootError::CommandLineNul { .. } => {
            Subject::CommandLine
        }
        _ => Subject::Kernel,
    }
}
