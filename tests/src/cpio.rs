//! Initramfs archives: cpio in the "newc" format, uncompressed.
//!
//! Linux documents the format in `Documentation/driver-api/early-userspace/
//! buffer-format.rst`. Archives may be put one after the other; later entries
//! replace earlier ones. Uncompressed, because a guest under emulation takes
//! longer to inflate than to copy.

use std::io::{self, Write};

/// Writes one archive, entry by entry. Parents must come before children.
#[derive(Debug)]
pub struct Archive<W: Write> {
    out: W,
    next_inode: u32,
}

const FILE: u32 = 0o100_000;
const DIRECTORY: u32 = 0o040_000;
const SYMLINK: u32 = 0o120_000;
const CHARACTER_DEVICE: u32 = 0o020_000;

impl<W: Write> Archive<W> {
    /// Starts an archive on `out`.
    pub fn new(out: W) -> Self {
        Self { out, next_inode: 1 }
    }

    /// A directory, mode 0755. `path` has no leading slash.
    ///
    /// # Errors
    /// What writing to the output gives.
    pub fn directory(&mut self, path: &str) -> io::Result<()> {
        self.entry(path, DIRECTORY | 0o755, (0, 0), &[])
    }

    /// A file with the permission bits `mode`.
    ///
    /// # Errors
    /// What writing gives; a file of 4 GiB or more does not fit the format.
    pub fn file(&mut self, path: &str, mode: u32, content: &[u8]) -> io::Result<()> {
        self.entry(path, FILE | (mode & 0o7777), (0, 0), content)
    }

    /// A symbolic link at `path` to `target`.
    ///
    /// # Errors
    /// What writing to the output gives.
    pub fn symlink(&mut self, path: &str, target: &str) -> io::Result<()> {
        self.entry(path, SYMLINK | 0o777, (0, 0), target.as_bytes())
    }

    /// A character device, mode 0600, with its major and minor number.
    ///
    /// # Errors
    /// What writing to the output gives.
    pub fn character_device(&mut self, path: &str, major: u32, minor: u32) -> io::Result<()> {
        self.entry(path, CHARACTER_DEVICE | 0o600, (major, minor), &[])
    }

    /// Writes the trailer and gives the output back.
    ///
    /// # Errors
    /// What writing to the output gives.
    pub fn finish(mut self) -> io::Result<W> {
        self.entry("TRAILER!!!", 0, (0, 0), &[])?;
        Ok(self.out)
    }

    fn entry(
        &mut self,
        path: &str,
        mode: u32,
        device: (u32, u32),
        content: &[u8],
    ) -> io::Result<()> {
        let size = u32::try_from(content.len())
            .map_err(|_| io::Error::other(format!("{path} is too large for a cpio archive")))?;
        let name_size = u32::try_from(path.len() + 1).map_err(io::Error::other)?;
        let inode = self.next_inode;
        self.next_inode += 1;
        let links = if mode & DIRECTORY == 0 { 1 } else { 2 };
        let fields = [
            inode, mode, 0, 0, links, 0, size, 0, 0, device.0, device.1, name_size, 0,
        ];
        self.out.write_all(b"070701")?;
        for field in fields {
            write!(self.out, "{field:08x}")?;
        }
        self.out.write_all(path.as_bytes())?;
        self.out.write_all(b"\0")?;
        // Name and content each end at a multiple of four; the header has 110 bytes.
        self.pad(110 + path.len() + 1)?;
        self.out.write_all(content)?;
        self.pad(content.len())
    }

    fn pad(&mut self, written: usize) -> io::Result<()> {
        self.out.write_all(&[0; 3][..written.wrapping_neg() % 4])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_aligned_and_carry_their_sizes() {
        let mut archive = Archive::new(Vec::new());
        archive.directory("d").unwrap();
        archive.file("d/file", 0o644, b"hello").unwrap();
        archive.character_device("console", 5, 1).unwrap();
        let bytes = archive.finish().unwrap();
        assert_eq!(bytes.len() % 4, 0);
        let text = String::from_utf8_lossy(&bytes);
        assert_eq!(text.matches("070701").count(), 4);
        let at = text.find("d/file").unwrap() - 110;
        assert_eq!(&text[at + 14..at + 22], "000081a4", "mode");
        assert_eq!(&text[at + 54..at + 62], "00000005", "size");
        assert_eq!(&text[at + 94..at + 102], "00000007", "size of the name");
        let at = text.find("console").unwrap() - 110;
        assert_eq!(&text[at + 78..at + 94], "0000000500000001", "device");
    }

    #[test]
    fn host_tools_that_read_cpio_agree() {
        let mut archive = Archive::new(Vec::new());
        archive.directory("etc").unwrap();
        archive.file("etc/name", 0o600, b"vireo\n").unwrap();
        archive.symlink("etc/link", "name").unwrap();
        let bytes = archive.finish().unwrap();
        let busybox = crate::places::testbed().join("busybox/bin/busybox");
        let dir = tempfile::tempdir().unwrap();
        let Ok(mut child) = std::process::Command::new(&busybox)
            .args(["cpio", "-i"])
            .current_dir(dir.path())
            .stdin(std::process::Stdio::piped())
            .spawn()
        else {
            println!(
                "skipped: {} is not there; run `make setup`",
                busybox.display()
            );
            return;
        };
        child.stdin.take().unwrap().write_all(&bytes).unwrap();
        assert!(child.wait().unwrap().success());
        let content = std::fs::read(dir.path().join("etc/link")).unwrap();
        assert_eq!(content, b"vireo\n");
    }
}
