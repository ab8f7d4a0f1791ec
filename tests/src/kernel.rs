//! Kernel images: `vmlinux` out of a bzImage.

use std::io::Write;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

/// Takes the compressed kernel out of a bzImage and inflates it with the
/// program that its magic number calls for.
///
/// The payload's place is in the setup header (Linux,
/// `Documentation/arch/x86/boot.rst`, `payload_offset` and `payload_length`).
///
/// # Errors
/// The image is no bzImage, its compression is unknown, or the program for it
/// is missing or fails.
pub fn extract_vmlinux(bzimage: &[u8]) -> Result<Vec<u8>> {
    ensure!(
        bzimage.get(0x202..0x206) == Some(b"HdrS"),
        "no bzImage: the setup header has no HdrS"
    );
    let setup_sectors = match byte(bzimage, 0x1F1)? {
        0 => 4,
        sectors => usize::from(sectors),
    };
    let start = (setup_sectors + 1) * 512 + word(bzimage, 0x248)? as usize;
    let length = word(bzimage, 0x24C)? as usize;
    let payload = bzimage
        .get(start..start.saturating_add(length))
        .context("the bzImage ends before its payload")?;
    let vmlinux = inflate(payload)?;
    ensure!(
        vmlinux.starts_with(b"\x7fELF"),
        "the bzImage's payload is no ELF file"
    );
    Ok(vmlinux)
}

/// Inflates by magic number: gzip, xz, zstd, LZ4 (legacy frame).
///
/// # Errors
/// Unknown magic, or the program is missing or fails.
pub fn inflate(data: &[u8]) -> Result<Vec<u8>> {
    // All but gzip are followed by the inflated size, four bytes that the
    // programs would take for a second frame.
    let trimmed = &data[..data.len().saturating_sub(4)];
    match data.get(..4).context("too short to be compressed")? {
        [0x1F, 0x8B, ..] => through("gzip", data),
        [0xFD, b'7', b'z', b'X'] => through("xz", trimmed),
        [0x28, 0xB5, 0x2F, 0xFD] => through("zstd", trimmed),
        [0x02, 0x21, 0x4C, 0x18] => through("lz4", trimmed),
        other => anyhow::bail!("unknown compression, magic {other:02x?}"),
    }
}

/// Pipes `data` through `program -dc`.
///
/// # Errors
/// The program is missing or fails.
pub fn through(program: &str, data: &[u8]) -> Result<Vec<u8>> {
    let mut child = Command::new(program)
        .arg("-dc")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("{program} does not start; run `make setup`"))?;
    let mut stdin = child.stdin.take().context("no pipe")?;
    let output = std::thread::scope(|scope| {
        scope.spawn(move || {
            // A program that ends early is told by its exit status.
            let _ = stdin.write_all(data);
        });
        child.wait_with_output()
    })?;
    ensure!(
        output.status.success(),
        "{program} -dc failed: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(output.stdout)
}

fn byte(data: &[u8], at: usize) -> Result<u8> {
    data.get(at).copied().context("the image is truncated")
}

fn array<const N: usize>(data: &[u8], at: usize) -> Result<[u8; N]> {
    let bytes = data
        .get(at..at.saturating_add(N))
        .context("the image is truncated")?;
    Ok(bytes.try_into()?)
}

fn word(data: &[u8], at: usize) -> Result<u32> {
    Ok(u32::from_le_bytes(array(data, at)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_bzimage_is_refused() {
        assert!(extract_vmlinux(&[0; 4096]).is_err());
        assert!(extract_vmlinux(b"").is_err());
    }
}
