//! The screen: what a guest draws on, and those who look at it.
//!
//! A framebuffer device is a [`FrameSource`]: memory that the guest writes without an exit, and a mode that says how
//! the memory is to be read. Whoever looks (a viewer's server, a screenshot) reads it at its own pace: the source
//! never waits for them, does nothing while nobody looks, and says which of its pages have been written since it was
//! asked last.

mod adapter;
mod area;
mod canvas;
mod input;
mod mode;
mod pace;
pub mod rfb;
mod screen;

pub use adapter::{Adapter, AdapterV1, RegistersV1, VideoMemory, VideoMemoryV1};
pub use area::Size;
pub use input::{Button, InputSink, PLACE_MAX};
pub use mode::{Mode, ModeError, PixelFormat};
pub use screen::{Picture, Screen};

/// Bytes for each bit of a [`FrameSource::changed`] map: a guest page.
pub const PAGE: usize = 4096;

/// Where pictures come from. Called by the threads of those who look, one at a time and never by a vCPU.
pub trait FrameSource: Send {
    /// The mode that the guest has set, or none while its screen is off. It may change at any moment: what is read
    /// with an old mode is a torn picture, and no more.
    fn mode(&self) -> Option<Mode>;

    /// Has writes recorded from now on, or no longer. While they are not, the guest runs as if there were no screen.
    fn track(&self, on: bool);

    /// Adds to `pages` those pages of the memory (bit `i` of word `i / 64` is the page at `i * PAGE`) that have been
    /// written since the last call, and forgets them. Bits past the memory's end are left alone; pages for which
    /// `pages` has no room are forgotten too. Where it cannot be told, all are said to be.
    fn changed(&self, pages: &mut [u64]);

    /// Bytes of the memory.
    fn size(&self) -> usize;

    /// Copies from the byte `offset` of the memory. What is past its end is left as it is.
    fn read(&self, offset: usize, buffer: &mut [u8]);
}
