//! The screen of whatever machine there is: it outlives machines, as consoles do, and is dark without one.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::Builder;

use api::{Answer, ControlError, ErrorKind, Reply};
use devices::display::{FrameSource, Mode, Screen};

/// Where pictures come from while a machine has a display. Clones are of the same.
#[derive(Clone, Default)]
pub struct Stage(Arc<Mutex<Scene>>);

#[derive(Default)]
struct Scene {
    source: Option<Box<dyn FrameSource>>,
    /// Somebody wants to know what changes.
    tracked: bool,
    /// All is new: another machine's screen is shown.
    turned: bool,
}

impl Stage {
    /// Shows this from now on, or nothing.
    pub fn show(&self, source: Option<Box<dyn FrameSource>>) {
        let mut scene = self.lock();
        if let Some(source) = &source {
            source.track(scene.tracked);
        }
        scene.turned = true;
        // The old one lives until the lock is free: its memory may take its time.
        let old = std::mem::replace(&mut scene.source, source);
        drop(scene);
        drop(old);
    }

    /// Whether there is a screen.
    #[must_use]
    pub fn is_there(&self) -> bool {
        self.lock().source.is_some()
    }

    fn lock(&self) -> MutexGuard<'_, Scene> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl FrameSource for Stage {
    fn mode(&self) -> Option<Mode> {
        self.lock().source.as_ref()?.mode()
    }

    fn track(&self, on: bool) {
        let mut scene = self.lock();
        scene.tracked = on;
        if let Some(source) = &scene.source {
            source.track(on);
        }
    }

    fn changed(&self, pages: &mut [u64]) {
        let mut scene = self.lock();
        if let Some(source) = &scene.source {
            source.changed(pages);
        }
        if std::mem::take(&mut scene.turned) {
            pages.fill(u64::MAX);
        }
    }

    fn size(&self) -> usize {
        self.lock()
            .source
            .as_ref()
            .map_or(0, |source| source.size())
    }

    fn read(&self, offset: usize, buffer: &mut [u8]) {
        if let Some(source) = &self.lock().source {
            source.read(offset, buffer);
        }
    }
}

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
        if let Err(error) = Builder::new().name("picture".to_owned()).spawn(work) {
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
