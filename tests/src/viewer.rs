//! A viewer of VNC servers (RFC 6143) for cases and benches: it looks, types and points, and counts what it is sent.

use std::io::{Read, Write};

use anyhow::{Result, bail, ensure};

/// How pixels are sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    /// As they are.
    Raw = 0,
    /// Compressed in tiles. They are passed over.
    Zrle = 16,
}

const DESKTOP_SIZE: i32 = -223;

/// Pixels of 32 bits, little-endian, red at bit 16.
const FORMAT: [u8; 16] = [32, 24, 0, 1, 0, 255, 0, 255, 0, 255, 16, 8, 0, 0, 0, 0];

/// A picture, whose pixels are known with [`Encoding::Raw`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Picture {
    /// Pixels of a line.
    pub width: usize,
    /// Lines.
    pub height: usize,
    /// Red, green and blue of each pixel, line by line.
    pub pixels: Vec<[u8; 3]>,
}

impl Picture {
    fn black(width: u16, height: u16) -> Self {
        let (width, height) = (width.into(), height.into());
        Self {
            width,
            height,
            pixels: vec![[0; 3]; width * height],
        }
    }

    /// How many of a thousand pixels have this colour.
    #[must_use]
    pub fn share(&self, colour: [u8; 3]) -> usize {
        let like = self.pixels.iter().filter(|pixel| **pixel == colour);
        like.count() * 1000 / self.pixels.len().max(1)
    }
}

/// A connection to a server that lets everybody in.
#[derive(Debug)]
pub struct Viewer<S> {
    stream: S,
    /// What it has been sent.
    pub picture: Picture,
    /// Bytes that it has been sent since it was let in.
    pub bytes: u64,
    /// Pixels of which it has been told since.
    pub pixels: u64,
}

impl<S: Read + Write> Viewer<S> {
    /// Does the handshake, and asks for pixels in an encoding.
    ///
    /// # Errors
    /// The server wants a password, or is none.
    pub fn connect(stream: S, encoding: Encoding) -> Result<Self> {
        let mut viewer = Self {
            stream,
            picture: Picture::black(0, 0),
            bytes: 0,
            pixels: 0,
        };
        ensure!(&viewer.hear::<12>()? == b"RFB 003.008\n", "no RFB 3.8");
        viewer.say(b"RFB 003.008\n")?;
        let [count] = viewer.hear()?;
        let offered = viewer.hear_all(count.into())?;
        ensure!(offered.contains(&1), "not everybody is let in: {offered:?}");
        viewer.say(&[1])?;
        ensure!(viewer.hear()? == [0; 4], "it is not let in");
        viewer.say(&[1])?;
        let [a, b, c, d] = viewer.hear()?;
        let [width, height] = [[a, b], [c, d]].map(u16::from_be_bytes);
        viewer.picture = Picture::black(width, height);
        viewer.hear::<16>()?;
        let name = u32::from_be_bytes(viewer.hear()?);
        viewer.hear_all(name.try_into()?)?;
        viewer.say(&[&[0; 4][..], &FORMAT].concat())?;
        let [high, low] = (encoding as u16).to_be_bytes();
        let size = DESKTOP_SIZE.to_be_bytes();
        viewer.say(&[&[2, 0, 0, 2, 0, 0, high, low][..], &size].concat())?;
        viewer.bytes = 0;
        Ok(viewer)
    }

    /// The stream, for its time limits.
    pub fn stream(&mut self) -> &mut S {
        &mut self.stream
    }

    /// Asks for what has changed, or for all.
    ///
    /// # Errors
    /// The server is gone.
    pub fn ask(&mut self, changes: bool) -> Result<()> {
        let [a, b] = u16::try_from(self.picture.width)?.to_be_bytes();
        let [c, d] = u16::try_from(self.picture.height)?.to_be_bytes();
        self.say(&[3, changes.into(), 0, 0, 0, 0, a, b, c, d])
    }

    /// Waits for the update that was asked for.
    ///
    /// # Errors
    /// The server is gone, or says something else.
    pub fn update(&mut self) -> Result<()> {
        let [kind, _, high, low] = self.hear()?;
        ensure!(kind == 0, "message {kind} where an update was to come");
        for _ in 0..u16::from_be_bytes([high, low]) {
            let place: [u8; 8] = self.hear()?;
            let side = |at: usize| u16::from_be_bytes([place[at], place[at + 1]]);
            let [x, y, width, height] = [0, 2, 4, 6].map(side);
            let kind = i32::from_be_bytes(self.hear()?);
            if kind != DESKTOP_SIZE {
                self.pixels += u64::from(width) * u64::from(height);
            }
            match kind {
                0 => self.raw([x, y, width, height].map(usize::from))?,
                16 => {
                    let len = u32::from_be_bytes(self.hear()?);
                    self.hear_all(len.try_into()?)?;
                }
                DESKTOP_SIZE => self.picture = Picture::black(width, height),
                other => bail!("encoding {other}, which was not asked for"),
            }
        }
        Ok(())
    }

    fn raw(&mut self, [x, y, width, height]: [usize; 4]) -> Result<()> {
        let bytes = self.hear_all(width * height * 4)?;
        let mut pixels = bytes.as_chunks::<4>().0.iter();
        for line in y..y + height {
            let from = line * self.picture.width + x;
            let Some(to) = self.picture.pixels.get_mut(from..from + width) else {
                bail!("a rectangle past the picture");
            };
            for (to, [blue, green, red, _]) in to.iter_mut().zip(&mut pixels) {
                *to = [*red, *green, *blue];
            }
        }
        Ok(())
    }

    /// Presses or releases a key by its X symbol.
    ///
    /// # Errors
    /// The server is gone.
    pub fn key(&mut self, symbol: u32, down: bool) -> Result<()> {
        let [a, b, c, d] = symbol.to_be_bytes();
        self.say(&[4, down.into(), 0, 0, a, b, c, d])
    }

    /// Types a text, with Return for each end of a line.
    ///
    /// # Errors
    /// The server is gone.
    pub fn types(&mut self, text: &str) -> Result<()> {
        for letter in text.chars() {
            let symbol = if letter == '\n' {
                0xff0d
            } else {
                letter.into()
            };
            self.key(symbol, true)?;
            self.key(symbol, false)?;
        }
        Ok(())
    }

    /// Puts the pointer on a pixel, with buttons as bits.
    ///
    /// # Errors
    /// The server is gone.
    pub fn point(&mut self, x: u16, y: u16, buttons: u8) -> Result<()> {
        let ([a, b], [c, d]) = (x.to_be_bytes(), y.to_be_bytes());
        self.say(&[5, buttons, a, b, c, d])
    }

    fn say(&mut self, bytes: &[u8]) -> Result<()> {
        Ok(self.stream.write_all(bytes)?)
    }

    fn hear<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.stream.read_exact(&mut bytes)?;
        self.bytes += N as u64;
        Ok(bytes)
    }

    fn hear_all(&mut self, len: usize) -> Result<Vec<u8>> {
        let mut bytes = vec![0; len];
        self.stream.read_exact(&mut bytes)?;
        self.bytes += len as u64;
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_picture_is_what_was_sent_of_it() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut said = b"RFB 003.008\n\x01\x01\0\0\0\0\0\x02\0\x01".to_vec();
        said.extend([0; 16]);
        said.extend([0, 0, 0, 1, b'x']);
        // A larger screen, then its second line.
        said.extend([0, 0, 0, 2, 0, 0, 0, 0, 0, 1, 0, 2]);
        said.extend(DESKTOP_SIZE.to_be_bytes());
        said.extend([0, 0, 0, 1, 0, 1, 0, 1, 0, 0, 0, 0, 3, 2, 1, 0]);
        theirs.write_all(&said).unwrap();
        let mut viewer = Viewer::connect(ours, Encoding::Raw).unwrap();
        assert_eq!((viewer.picture.width, viewer.bytes), (2, 0));
        viewer.ask(false).unwrap();
        viewer.update().unwrap();
        assert_eq!(viewer.picture.pixels, [[0; 3], [1, 2, 3]]);
        assert_eq!(viewer.picture.share([1, 2, 3]), 500);
        assert_eq!(viewer.bytes, 32);
    }
}
