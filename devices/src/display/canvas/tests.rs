use std::sync::{Arc, Mutex};

use super::*;

/// A framebuffer in memory that records its writes.
#[derive(Clone)]
pub struct Memory(Arc<Mutex<State>>);

struct State {
    bytes: Vec<u8>,
    mode: Option<Mode>,
    tracked: bool,
    changed: Vec<usize>,
    asked: usize,
}

impl Memory {
    pub fn new(len: usize) -> Self {
        Self(Arc::new(Mutex::new(State {
            bytes: vec![0; len],
            mode: None,
            tracked: false,
            changed: Vec::new(),
            asked: 0,
        })))
    }

    /// One of `width` by `height` pixels of 4 bytes.
    pub fn screen(width: u32, height: u32) -> Self {
        let len = usize::try_from(width * height * 4).unwrap();
        let memory = Self::new(len);
        memory.set(Mode::new((width, height), width * 4, 0, PixelFormat::Xrgb8888, len).ok());
        memory
    }

    pub fn set(&self, mode: Option<Mode>) {
        self.0.lock().unwrap().mode = mode;
    }

    pub fn fill(&self, offset: usize, bytes: &[u8]) {
        let mut state = self.0.lock().unwrap();
        state.bytes[offset..offset + bytes.len()].copy_from_slice(bytes);
        if state.tracked {
            let pages = offset / PAGE..=(offset + bytes.len() - 1) / PAGE;
            state.changed.extend(pages);
        }
    }

    /// Draws a pixel of a [`Memory::screen`].
    pub fn draw(&self, x: usize, y: usize, pixel: u32) {
        let width = self.0.lock().unwrap().mode.unwrap().width();
        let at = y * usize::try_from(width).unwrap() + x;
        self.fill(at * 4, &pixel.to_le_bytes());
    }

    pub fn tracked(&self) -> bool {
        self.0.lock().unwrap().tracked
    }

    /// How often its changes were asked for.
    pub fn asked(&self) -> usize {
        self.0.lock().unwrap().asked
    }
}

impl FrameSource for Memory {
    fn mode(&self) -> Option<Mode> {
        self.0.lock().unwrap().mode
    }

    fn track(&self, on: bool) {
        self.0.lock().unwrap().tracked = on;
    }

    fn changed(&self, pages: &mut [u64]) {
        let mut state = self.0.lock().unwrap();
        state.asked += 1;
        for page in state.changed.drain(..) {
            pages[page / 64] |= 1 << (page % 64);
        }
    }

    fn size(&self) -> usize {
        self.0.lock().unwrap().bytes.len()
    }

    fn read(&self, offset: usize, buffer: &mut [u8]) {
        let state = self.0.lock().unwrap();
        let len = buffer.len();
        buffer.copy_from_slice(&state.bytes[offset..offset + len]);
    }
}

fn newer(canvas: &Canvas, than: u64) -> Vec<usize> {
    let tiles = canvas.tiles().iter().enumerate();
    tiles
        .filter(|(_, generation)| **generation > than)
        .map(|(at, _)| at)
        .collect()
}

fn all(canvas: &Canvas) -> Vec<u32> {
    let mut pixels = Vec::new();
    canvas.copy(canvas.size().area(), &mut pixels);
    pixels
}

#[test]
fn the_first_look_takes_all_and_a_change_only_its_tile() {
    let memory = Memory::screen(200, 40);
    memory.draw(3, 3, 7);
    let mut canvas = Canvas::new();
    assert!(canvas.refresh(&memory) && memory.tracked());
    assert_eq!((canvas.size().width, canvas.size().height), (200, 40));
    assert_eq!(all(&canvas)[3 * 200 + 3], 7);
    let seen = canvas.generation();
    assert!(!canvas.refresh(&memory));
    assert_eq!(canvas.generation(), seen);
    // The last pixel of the third tile of the second line.
    memory.draw(191, 31, 9);
    assert!(canvas.refresh(&memory));
    assert_eq!(newer(&canvas, seen), [4 + 2]);
    assert_eq!(
        canvas.tile(6),
        Rect {
            x: 128,
            y: 16,
            width: 64,
            height: 16
        }
    );
    assert_eq!(all(&canvas)[31 * 200 + 191], 9);
}

#[test]
fn pages_written_with_what_they_held_are_no_change() {
    let memory = Memory::screen(64, 64);
    let mut canvas = Canvas::new();
    canvas.refresh(&memory);
    memory.draw(0, 0, 0xff00_0000);
    assert!(!canvas.refresh(&memory), "the fourth byte means nothing");
    memory.draw(0, 0, 0xff00_0001);
    assert!(canvas.refresh(&memory));
}

#[test]
fn a_size_begins_a_generation_in_which_all_is_new() {
    let memory = Memory::screen(64, 64);
    let mut canvas = Canvas::new();
    canvas.refresh(&memory);
    let seen = canvas.generation();
    memory.set(Mode::new((100, 20), 400, 0, PixelFormat::Xrgb8888, 64 * 64 * 4).ok());
    assert!(canvas.refresh(&memory));
    assert_eq!(canvas.resized(), canvas.generation());
    assert_eq!(newer(&canvas, seen).len(), 4);
}

#[test]
fn a_screen_that_goes_off_keeps_its_size_and_is_black() {
    let memory = Memory::screen(64, 64);
    memory.draw(1, 1, 5);
    let mut canvas = Canvas::new();
    canvas.refresh(&memory);
    let resized = canvas.resized();
    memory.set(None);
    assert!(canvas.refresh(&memory));
    assert_eq!(canvas.resized(), resized);
    assert_eq!(all(&canvas), vec![0; 64 * 64]);
    assert!(!canvas.refresh(&memory));
}

#[test]
fn another_part_of_the_memory_is_read_anew_without_writes() {
    let memory = Memory::new(2 * 64 * 64 * 4);
    let mode = |offset| Mode::new((64, 64), 256, offset, PixelFormat::Xrgb8888, 2 << 14).ok();
    memory.set(mode(0));
    memory.fill((1 << 14) + 4, &[8]);
    let mut canvas = Canvas::new();
    canvas.refresh(&memory);
    memory.set(mode(1 << 14));
    assert!(canvas.refresh(&memory));
    assert_eq!(all(&canvas)[1], 8);
}

#[test]
fn who_closes_lets_the_source_rest_and_sees_all_again() {
    let memory = Memory::screen(64, 64);
    let mut canvas = Canvas::new();
    canvas.refresh(&memory);
    let seen = canvas.generation();
    canvas.close(&memory);
    assert!(!memory.tracked());
    memory.draw(9, 9, 9);
    assert!(canvas.refresh(&memory) && memory.tracked());
    assert_eq!(all(&canvas)[9 * 64 + 9], 9);
    assert_eq!(newer(&canvas, seen).len(), 4);
}

#[test]
fn outside_of_the_screen_is_black() {
    let memory = Memory::screen(64, 16);
    memory.draw(63, 15, 6);
    let mut canvas = Canvas::new();
    canvas.refresh(&memory);
    let mut pixels = Vec::new();
    let past = |x, y| Rect {
        x,
        y,
        width: 2,
        height: 2,
    };
    canvas.copy(past(63, 15), &mut pixels);
    assert_eq!(pixels, [6, 0, 0, 0]);
    canvas.copy(past(500, 500), &mut pixels);
    assert_eq!(pixels.len(), 8);
}

#[test]
fn every_format_reaches_black_and_white() {
    let unpacked = |format, bytes: &[u8]| {
        let mut pixels = Vec::new();
        unpack(format, bytes, &mut pixels);
        pixels
    };
    let white = 0x00ff_ffff;
    assert_eq!(
        unpacked(PixelFormat::Rgb565, &[0, 0, 255, 255, 0, 0xf8]),
        [0, white, 0x00ff_0000]
    );
    assert_eq!(
        unpacked(PixelFormat::Xrgb1555, &[0, 128, 255, 127, 0, 0x7c, 0xe0, 3]),
        [0, white, 0x00ff_0000, 0x0000_ff00]
    );
    assert_eq!(
        unpacked(PixelFormat::Rgb888, &[1, 2, 3, 255, 255, 255]),
        [0x0003_0201, white]
    );
    assert_eq!(unpacked(PixelFormat::Xrgb8888, &[255; 4]), [white]);
}

/// Lines that are each different, from `first`.
fn text(memory: &Memory, first: u32, lines: usize) {
    for y in 0..lines {
        for x in 0..64 {
            let line = first + u32::try_from(y).unwrap();
            memory.draw(x, y, line * 64 + u32::try_from(x).unwrap());
        }
    }
}

#[test]
fn text_that_moves_up_is_a_scroll_for_those_who_had_it() {
    let memory = Memory::screen(64, 160);
    text(&memory, 1, 160);
    let mut canvas = Canvas::new();
    canvas.refresh(&memory);
    let (shown, known) = (canvas.generation(), canvas.tiles().to_vec());
    text(&memory, 17, 160);
    canvas.refresh(&memory);
    let scroll = canvas.scroll(&known, shown).unwrap();
    assert_eq!((scroll.by, scroll.to.y, scroll.to.height), (16, 0, 144));
    // One that lacks a tile, or was sent some of what is there now, cannot make use of it.
    assert!(canvas.scroll(&known[1..], shown).is_none());
    let mut old = known.clone();
    old[5] = 0;
    assert!(canvas.scroll(&old, shown).is_none());
    assert!(canvas.scroll(&known, canvas.generation()).is_none());
    // It is of the last refresh alone.
    canvas.refresh(&memory);
    assert!(canvas.scroll(&known, shown).is_none());
}

#[test]
fn a_picture_that_is_another_is_no_scroll() {
    let memory = Memory::screen(64, 160);
    text(&memory, 1, 160);
    let mut canvas = Canvas::new();
    canvas.refresh(&memory);
    let (shown, known) = (canvas.generation(), canvas.tiles().to_vec());
    text(&memory, 1000, 160);
    canvas.refresh(&memory);
    assert!(canvas.scroll(&known, shown).is_none());
}
