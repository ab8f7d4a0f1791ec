//! Who talks with the guests: a network of one, and a viewer.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

const LIMIT: Duration = Duration::from_secs(60);

/// The server of a card: what it sends comes back from the guest.
pub struct Echo {
    listener: UnixListener,
    stream: Option<UnixStream>,
    sent: u64,
}

impl Echo {
    pub fn listen(path: &Path) -> Result<Self> {
        Ok(Self {
            listener: UnixListener::bind(path)?,
            stream: None,
            sent: 0,
        })
    }

    /// Sends frames one after another, and looks at what comes back.
    pub fn exchange(&mut self, frames: u32) -> Result<()> {
        if self.stream.is_none() {
            let (stream, _) = self.listener.accept()?;
            stream.set_read_timeout(Some(LIMIT))?;
            self.stream = Some(stream);
        }
        let stream = self.stream.as_mut().context("no connection")?;
        for _ in 0..frames {
            self.sent += 1;
            let frame = frame(self.sent);
            let length = u32::try_from(frame.len())?.to_be_bytes();
            stream.write_all(&[&length, frame.as_slice()].concat())?;
            let mut length = [0; 4];
            stream
                .read_exact(&mut length)
                .context("the guest does not answer")?;
            let mut back = vec![0; u32::from_be_bytes(length).min(0x10000) as usize];
            stream.read_exact(&mut back)?;
            let data = back.get(14..frame.len());
            ensure!(
                data == Some(&frame[14..]),
                "frame {} came back as another",
                self.sent
            );
        }
        Ok(())
    }
}

/// A frame of a length and with bytes that follow from its number.
fn frame(number: u64) -> Vec<u8> {
    let length = 46 + number.wrapping_mul(0x9e37_79b9) % 1400;
    let mut frame = b"\x52\x54\x00\x00\x00\x01\x52\x54\x00\x00\x00\x02\x88\xb5".to_vec();
    frame.extend((0..length).map(|at| number.wrapping_mul(31).wrapping_add(at).to_le_bytes()[0]));
    frame
}

/// A viewer that comes, sees the whole screen once and goes.
pub fn look(socket: &Path) -> Result<()> {
    let mut stream = UnixStream::connect(socket).context("no viewer is let in")?;
    stream.set_read_timeout(Some(LIMIT))?;
    let mut take = |count: usize| -> Result<Vec<u8>> {
        let mut bytes = vec![0; count];
        stream.read_exact(&mut bytes)?;
        Ok(bytes)
    };
    ensure!(take(12)? == b"RFB 003.008\n");
    let mut give = stream.try_clone()?;
    give.write_all(b"RFB 003.008\n\x01")?;
    let mut take = |count: usize| -> Result<Vec<u8>> {
        let mut bytes = vec![0; count];
        stream.read_exact(&mut bytes)?;
        Ok(bytes)
    };
    let kinds = take(1)?[0];
    take(kinds.into())?;
    ensure!(take(4)? == [0; 4], "the viewer was not let in");
    give.write_all(&[1])?;
    let screen = take(24)?;
    let (width, height) = ([screen[0], screen[1]], [screen[2], screen[3]]);
    let name = u32::from_be_bytes([screen[20], screen[21], screen[22], screen[23]]);
    take(name as usize)?;
    give.write_all(&[&[3, 0, 0, 0, 0, 0], width.as_slice(), &height].concat())?;
    let head = take(16)?;
    ensure!(head[0] == 0, "no picture");
    Ok(())
}
