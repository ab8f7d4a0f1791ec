//! What commands answer.

use std::io::{self, Write};
use std::time::Duration;

use crate::ops::size::ExactSize;

/// How a read or write went.
pub(super) struct Report {
    pub what: &'static str,
    pub offset: u64,
    pub len: u64,
    pub time: Duration,
}

impl Report {
    #[expect(clippy::cast_precision_loss, reason = "only some digits are shown")]
    pub(super) fn write(&self, out: &mut dyn Write, machine: bool) -> io::Result<()> {
        let seconds = self.time.as_secs_f64().max(1e-9);
        let (bytes, operations) = (self.len as f64 / seconds, 1.0 / seconds);
        if machine {
            let time = self.long_time();
            return writeln!(out, "{},1,{time},{bytes:.3},{operations:.3}", self.len);
        }
        let Self {
            what, offset, len, ..
        } = self;
        writeln!(out, "{what} {len}/{len} bytes at offset {offset}")?;
        writeln!(
            out,
            "{}, 1 ops; {} ({}/sec and {operations:.4} ops/sec)",
            ExactSize::from(*len),
            self.time(),
            ExactSize(bytes)
        )
    }

    fn hundredths(&self) -> u32 {
        self.time.subsec_millis() / 10
    }

    fn time(&self) -> String {
        let seconds = self.time.as_secs();
        if seconds >= 60 {
            return self.long_time();
        }
        format!("{seconds:02}.{:02} sec", self.hundredths())
    }

    fn long_time(&self) -> String {
        let seconds = self.time.as_secs();
        let (hours, minutes) = (seconds / 3600, seconds / 60 % 60);
        format!(
            "{hours}:{minutes:02}:{:02}.{:02}",
            seconds % 60,
            self.hundredths()
        )
    }
}

/// Prints bytes in rows of 16, each with its offset.
pub(super) fn dump(out: &mut dyn Write, data: &[u8], offset: u64) -> io::Result<()> {
    for (row, bytes) in data.chunks(16).enumerate() {
        write!(out, "{:08x}:  ", offset + row as u64 * 16)?;
        for byte in bytes {
            write!(out, "{byte:02x} ")?;
        }
        let text: String = bytes
            .iter()
            .map(|&byte| {
                if byte.is_ascii_alphanumeric() {
                    char::from(byte)
                } else {
                    '.'
                }
            })
            .collect();
        writeln!(out, " {text}")?;
    }
    Ok(())
}

/// An error as the system's library words it.
pub(super) fn reason(error: &io::Error) -> String {
    match (error.raw_os_error(), error.kind()) {
        (Some(code), _) => {
            let text = error.to_string();
            let number = format!(" (os error {code})");
            text.strip_suffix(&number).unwrap_or(&text).to_owned()
        }
        (None, io::ErrorKind::InvalidInput) => "Input/output error".to_owned(),
        (None, io::ErrorKind::Unsupported) => "Operation not supported".to_owned(),
        (None, _) => error.to_string(),
    }
}
