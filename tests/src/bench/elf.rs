//! How much of an ELF file is loaded.

use anyhow::{Context, Result, ensure};

const PT_LOAD: u32 = 1;

/// The sum of the loaded segments' bytes in the file. ELF-64, little endian
/// (System V ABI, "Program Header").
///
/// # Errors
/// It is no such file.
pub fn loaded_bytes(file: &[u8]) -> Result<u64> {
    ensure!(file.starts_with(b"\x7fELF\x02\x01"), "no 64-bit ELF file");
    let at = usize::try_from(u64::from_le_bytes(field(file, 0x20)?))?;
    let size = usize::from(u16::from_le_bytes(field(file, 0x36)?));
    let count = usize::from(u16::from_le_bytes(field(file, 0x38)?));
    let mut total = 0;
    for header in 0..count {
        let start = at
            .checked_add(header * size)
            .context("program headers out of the file")?;
        if u32::from_le_bytes(field(file, start)?) == PT_LOAD {
            total += u64::from_le_bytes(field(file, start.saturating_add(0x20))?);
        }
    }
    Ok(total)
}

fn field<const N: usize>(file: &[u8], at: usize) -> Result<[u8; N]> {
    file.get(at..)
        .and_then(|rest| rest.first_chunk())
        .copied()
        .context("the file ends early")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_program_loads_some_but_not_all_of_its_file() {
        let file = std::fs::read("/proc/self/exe").unwrap();
        let loaded = loaded_bytes(&file).unwrap();
        assert!(loaded > 10_000 && loaded < u64::try_from(file.len()).unwrap());
    }

    #[test]
    fn a_truncated_file_is_an_error() {
        let file = std::fs::read("/proc/self/exe").unwrap();
        for length in [0, 6, 0x30, 0x50] {
            assert!(loaded_bytes(&file[..length]).is_err());
        }
    }
}
