//! A look at a guest's screen by VNC, with what is typed and clicked before.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use crate::control::Connection;
use crate::viewer::{Encoding, Picture, Viewer};

/// How long a server may be silent.
const SILENCE: Duration = Duration::from_secs(20);

/// What is done at the screen, and what must be seen then.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Look {
    /// The VNC server's socket in the case's directory.
    pub socket: String,
    /// What is typed.
    pub types: String,
    /// Where the left button is clicked.
    pub clicks: Option<(u16, u16)>,
    /// The sides that the picture must have then.
    pub sides: Option<(usize, usize)>,
    /// The colour that most of it must have, and how many of a thousand pixels.
    pub shows: Option<([u8; 3], usize)>,
    /// The control socket's screenshot must be the same picture, pixel by pixel.
    pub same: bool,
}

impl Look {
    /// A look at what the server at `socket` shows.
    #[must_use]
    pub fn at(socket: &str) -> Self {
        Self {
            socket: socket.to_owned(),
            ..Self::default()
        }
    }

    /// Types first.
    #[must_use]
    pub fn types(mut self, text: &str) -> Self {
        text.clone_into(&mut self.types);
        self
    }

    /// Clicks on a pixel, behind what is typed.
    #[must_use]
    pub fn clicks(mut self, x: u16, y: u16) -> Self {
        self.clicks = Some((x, y));
        self
    }

    /// Demands a picture of these sides with so many of a thousand pixels in this colour, and the same in a screenshot.
    #[must_use]
    pub fn sees(mut self, sides: (usize, usize), colour: [u8; 3], share: usize) -> Self {
        self.sides = Some(sides);
        self.shows = Some((colour, share));
        self.same = true;
        self
    }

    /// Does it in the case's `directory`, whose control socket is `control`.
    ///
    /// # Errors
    /// The server is none, or the picture does not become as wanted by `deadline`.
    pub fn take(&self, directory: &Path, control: &Path, deadline: Instant) -> Result<()> {
        let stream = UnixStream::connect(directory.join(&self.socket))
            .with_context(|| format!("nobody listens at {}", self.socket))?;
        stream.set_read_timeout(Some(SILENCE))?;
        let mut viewer = Viewer::connect(stream, Encoding::Raw)?;
        viewer.types(&self.types)?;
        if let Some((x, y)) = self.clicks {
            viewer.point(x, y, 0)?;
            viewer.point(x, y, 1)?;
            viewer.point(x, y, 0)?;
        }
        let looks = self.sides.is_some() || self.shows.is_some() || self.same;
        if !looks {
            // The guest may end by what was typed.
            return Ok(());
        }
        loop {
            viewer.ask(false)?;
            viewer.update()?;
            let Some(missing) = self.missing(&viewer.picture, control)? else {
                return Ok(());
            };
            ensure!(Instant::now() < deadline, "{missing}");
        }
    }

    /// What of the picture is not as wanted.
    fn missing(&self, picture: &Picture, control: &Path) -> Result<Option<String>> {
        let sides = (picture.width, picture.height);
        if self.sides.is_some_and(|wanted| wanted != sides) {
            return Ok(Some(format!("a picture of {sides:?}")));
        }
        if let Some((colour, share)) = self.shows
            && picture.share(colour) < share
        {
            let found = picture.share(colour);
            return Ok(Some(format!("{found} of 1000 pixels are {colour:?}")));
        }
        let same = !self.same || screenshot(control)? == *picture;
        Ok((!same).then(|| "the screenshot is another picture".to_owned()))
    }
}

fn screenshot(control: &Path) -> Result<Picture> {
    let mut connection = Connection::open_within(control, SILENCE)?;
    let answer = connection.ask("GET vm.screenshot", "")?;
    if answer.status != 200 {
        bail!("no screenshot: {} {}", answer.status, answer.text());
    }
    let mut reader = png::Decoder::new(std::io::Cursor::new(answer.body)).read_info()?;
    let size = reader.output_buffer_size();
    let mut bytes = vec![0; size.context("a picture of unknown size")?];
    let info = reader.next_frame(&mut bytes)?;
    ensure!(info.color_type == png::ColorType::Rgb, "no RGB");
    bytes.truncate(info.buffer_size());
    Ok(Picture {
        width: info.width.try_into()?,
        height: info.height.try_into()?,
        pixels: bytes.as_chunks::<3>().0.to_vec(),
    })
}
