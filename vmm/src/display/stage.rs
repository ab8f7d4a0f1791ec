//! The screen of whatever machine there is: it outlives machines, as consoles do, and is dark without one.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use devices::display::{FrameSource, Mode};

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
