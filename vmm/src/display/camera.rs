//! Pictures of the screen.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use api::{Answer, ControlError, ErrorKind, Reply};
use devices::display::Screen;

use super::Stage;
use crate::sandbox::{Builder, Kind};

/// Takes pictures of the screen, one at a time: each takes time in proportion to its pixels, which neither the
/// control thread nor the socket's has to spare.
#[derive(Clone)]
pub struct Camera {
    stage: Stage,
    busy: Arc<AtomicBool>,
}

/// Lets the next picture be taken.
struct Busy(Arc<AtomicBool>);

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

impl Camera {
    /// A camera in front of `stage`.
    #[must_use]
    pub fn new(stage: Stage) -> Self {
        Self {
            stage,
            busy: Arc::default(),
        }
    }

    /// Answers with a picture, as a PNG file, on a thread of its own.
    pub fn take(&self, answer: Answer) {
        if !self.stage.is_there() {
            let message = "the machine has no screen: describe it with one (--display)";
            return answer(Err(ControlError::new(ErrorKind::NotFound, message)));
        }
        if self.busy.swap(true, Ordering::Acquire) {
            let message = "another picture is being taken: try again";
            return answer(Err(ControlError::new(ErrorKind::Busy, message)));
        }
        let busy = Busy(Arc::clone(&self.busy));
        let stage = self.stage.clone();
        let work = move || {
            let png = photograph(stage);
            // The one who has this picture may ask for the next.
            drop(busy);
            answer(png.map(Reply::Picture));
        };
        // Without a thread the answer is dropped, which is an answer too.
        if let Err(error) = Builder::new(Kind::Api)
            .name("picture".to_owned())
            .spawn(work)
        {
            tracing::warn!("no thread to take a picture: {error}");
        }
    }
}

fn photograph(stage: Stage) -> Result<Vec<u8>, ControlError> {
    let picture = Screen::new(Box::new(stage)).picture();
    let mut png = Vec::new();
    let written = picture.write_png(&mut png);
    written.map_err(|error| ControlError::from_error(ErrorKind::Failed, &error))?;
    Ok(png)
}
