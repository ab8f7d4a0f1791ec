//! The kit: everything a case needs, in one directory.
//!
//!     vireo                   the monitor
//!     kernels/NAME.bzImage    Debian's kernels as they come
//!     kernels/NAME.vmlinux    the ELF file inside
//!     initramfs/NAME          the guest's initramfs with that kernel's modules
//!     guests/NAME             the small guests
//!     guest-agent             QEMU's guest agent and `vsock`, to be put behind an initramfs
//!     net-tools               programs and modules for networks, the same
//!     virtiofsd               the program that serves directories, to be put behind the nested machine's
//!
//! In the nested machine it is `/kit`; here its files are where they were built
//! ([`files`]), and [`build`] makes those that are missing.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::case::{Boot, Case, Form};
use crate::{initramfs, kernel, nested, places};

/// Where the nested machine has its kit.
pub const NESTED: &str = "/kit";

/// The guest agent's archive in the kit, and its package in the testbed.
pub const GUEST_AGENT: &str = "guest-agent";

/// The archive of what cases with networks need in the kit, and its packages in the testbed.
pub const NET_TOOLS: &str = "net-tools";

/// The archive of the program that serves directories in the kit, and its package in the testbed.
pub const VIRTIOFSD: &str = "virtiofsd";

/// Paths in the kit for one case's kernel and initramfs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Payload {
    /// The kernel.
    pub kernel: String,
    /// The initramfs, for Linux.
    pub initramfs: Option<String>,
}

/// The kit's paths that `boot` uses.
#[must_use]
pub fn payload(boot: &Boot) -> Payload {
    match boot {
        Boot::Linux { kernel, form, .. } => Payload {
            kernel: match form {
                Form::BzImage => format!("kernels/{kernel}.bzImage"),
                Form::Pvh | Form::Elf64 => format!("kernels/{kernel}.vmlinux"),
            },
            initramfs: Some(format!("initramfs/{kernel}")),
        },
        Boot::Guest { name, .. } => Payload {
            kernel: format!("guests/{name}"),
            initramfs: None,
        },
    }
}

/// The names of the kernels that `tests/setup` unpacked, such as `6.12-cloud`.
#[must_use]
pub fn kernels() -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(places::testbed().join("kernels"))
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| package(name).join("boot").is_dir())
        .collect();
    names.sort();
    names
}

/// The unpacked package of the kernel `name`.
#[must_use]
pub fn package(name: &str) -> PathBuf {
    places::testbed().join("kernels").join(name)
}

/// The static busybox.
#[must_use]
pub fn busybox() -> PathBuf {
    places::testbed().join("busybox/bin/busybox")
}

/// The package's bzImage.
///
/// # Errors
/// The package is not there or has none.
pub fn bzimage(name: &str) -> Result<PathBuf> {
    let boot = package(name).join("boot");
    fs::read_dir(&boot)
        .with_context(|| format!("no kernel {name} in {}; run `make setup`", boot.display()))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| {
            path.file_name()
                .is_some_and(|name| name.to_string_lossy().starts_with("vmlinuz"))
        })
        .with_context(|| format!("{} has no vmlinuz", boot.display()))
}

/// The monitor: `$VIREO`, else the newer of the release and the debug build.
///
/// # Errors
/// There is none.
pub fn vireo() -> Result<PathBuf> {
    program("VIREO", "vireo", "cargo build --release -p vmm")
}

/// The agent of the nested machine; `$TESTBED_AGENT`, or as for [`vireo`].
///
/// # Errors
/// There is none.
pub fn agent() -> Result<PathBuf> {
    program("TESTBED_AGENT", "agent", "cargo build -p tests --bins")
}

fn program(variable: &str, name: &str, mend: &str) -> Result<PathBuf> {
    if let Some(path) = std::env::var_os(variable) {
        let path = PathBuf::from(path);
        ensure!(
            path.is_file(),
            "{variable} names {}, which is no file",
            path.display()
        );
        return Ok(path);
    }
    ["release", "debug"]
        .iter()
        .map(|profile| places::target().join(profile).join(name))
        .filter_map(|path| Some((fs::metadata(&path).ok()?.modified().ok()?, path)))
        .max()
        .map(|(_, path)| path)
        .with_context(|| format!("{name} is not built; run `{mend}`"))
}

/// Where the file `path` of the kit is on this machine.
///
/// # Errors
/// The monitor or a kernel is not there.
pub fn file(path: &str) -> Result<PathBuf> {
    if path == "vireo" {
        return vireo();
    }
    match path.split_once('/') {
        Some(("kernels", image)) if image.ends_with(".bzImage") => {
            bzimage(image.trim_end_matches(".bzImage"))
        }
        Some(("guests", name)) => Ok(places::target().join("guests").join(name)),
        _ => Ok(places::testbed().join("kit").join(path)),
    }
}

/// The files of the kit that `cases` use, by their paths in it.
///
/// # Errors
/// As [`file()`].
pub fn files(cases: &[Case]) -> Result<BTreeMap<String, PathBuf>> {
    let mut files = BTreeMap::from([("vireo".to_owned(), vireo()?)]);
    for case in cases {
        let payload = payload(&case.boot);
        for path in [Some(payload.kernel), payload.initramfs]
            .into_iter()
            .flatten()
        {
            let here = file(&path)?;
            files.insert(path, here);
        }
        if case.guest_agent {
            files.insert(GUEST_AGENT.to_owned(), file(GUEST_AGENT)?);
        }
        if case.net_tools || case.net_host {
            files.insert(NET_TOOLS.to_owned(), file(NET_TOOLS)?);
        }
        if case.virtiofsd {
            files.insert(VIRTIOFSD.to_owned(), file(VIRTIOFSD)?);
        }
    }
    Ok(files)
}

/// Makes what the kernel `name` needs and is not there or older than its package.
///
/// Tests run in processes of their own: a lock keeps them from doing it twice.
///
/// # Errors
/// The package is not there or its kernel cannot be unpacked.
pub fn build(name: &str) -> Result<()> {
    let kit = places::testbed().join("kit");
    fs::create_dir_all(kit.join("kernels"))?;
    fs::create_dir_all(kit.join("initramfs"))?;
    let lock = File::create(kit.join("lock"))?;
    lock.lock()?;
    let image = bzimage(name)?;
    let vmlinux = kit.join(format!("kernels/{name}.vmlinux"));
    if !newer(&vmlinux, &image) {
        let elf = kernel::extract_vmlinux(&fs::read(&image)?)
            .with_context(|| format!("cannot unpack {}", image.display()))?;
        let part = vmlinux.with_extension("part");
        fs::write(&part, elf)?;
        fs::rename(&part, &vmlinux)?;
    }
    // Built each time: it takes half a second and its scripts are in this program.
    let agent = kit.join(GUEST_AGENT);
    let sockets = program("TESTBED_VSOCK", "vsock", "cargo build -p tests --bins")?;
    if !newer(&agent, &sockets) {
        let package = places::testbed().join(GUEST_AGENT);
        initramfs::guest_agent(&package, &sockets, &agent)?;
    }
    let tools = kit.join(NET_TOOLS);
    let packages = places::testbed().join(NET_TOOLS);
    // Its list of modules is in this program too.
    let this = std::env::current_exe()?;
    if name == nested::KERNEL && !(newer(&tools, &packages) && newer(&tools, &this)) {
        initramfs::net_tools(&packages, &package(name), &tools)?;
    }
    let virtiofsd = kit.join(VIRTIOFSD);
    let package_of = places::testbed().join(VIRTIOFSD);
    if name == nested::KERNEL && !newer(&virtiofsd, &package_of) {
        initramfs::virtiofsd(&package_of, &virtiofsd)?;
    }
    initramfs::guest(
        &package(name),
        &busybox(),
        &kit.join("initramfs").join(name),
    )
}

fn newer(made: &Path, source: &Path) -> bool {
    let time = |path: &Path| fs::metadata(path).and_then(|data| data.modified()).ok();
    time(made) > time(source)
}
