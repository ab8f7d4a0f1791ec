//! What one client's user holds down, and where the pointer is.

use super::super::area::Size;
use super::super::input::{
    Button, InputSink, KEYS, LEFT_SHIFT, PLACE_MAX, RIGHT_SHIFT, of_scancode, of_symbol,
};

/// The middle of what a pointer that tells how far it went says.
const STILL: u16 = 0x7fff;

/// A client's keyboard and pointer.
#[derive(Debug, Default)]
pub struct Hands {
    /// A bit for each key that is down.
    keys: [u64; (KEYS / 64) as usize],
    buttons: u8,
    place: Option<(u16, u16)>,
}

impl Hands {
    /// A key goes down or up: by its scancode where there is one that means a key, else by its symbol. Keys that no
    /// keyboard has do nothing.
    pub fn key(&mut self, scancode: Option<u32>, symbol: u32, down: bool, sink: &dyn InputSink) {
        if let Some(code) = scancode.and_then(of_scancode) {
            return self.press(code, down, sink);
        }
        let Some((shifted, code)) = of_symbol(symbol) else {
            return;
        };
        // Who sends symbols alone, as a phone's keyboard does, need not send the shift.
        let shift = down && shifted && !self.holds(LEFT_SHIFT) && !self.holds(RIGHT_SHIFT);
        if shift {
            self.press(LEFT_SHIFT, true, sink);
        }
        self.press(code, down, sink);
        if shift {
            self.press(LEFT_SHIFT, false, sink);
        }
    }

    fn press(&mut self, code: u16, down: bool, sink: &dyn InputSink) {
        let Some(word) = self.keys.get_mut(usize::from(code / 64)) else {
            return;
        };
        let bit = 1 << (code % 64);
        if !down && *word & bit == 0 {
            return;
        }
        *word = if down { *word | bit } else { *word & !bit };
        sink.key(code, down);
    }

    fn holds(&self, code: u16) -> bool {
        let word = self.keys.get(usize::from(code / 64)).copied();
        word.unwrap_or(0) >> (code % 64) & 1 != 0
    }

    /// The pointer is at a pixel of a picture of `size`, or `relative` to where it was, and these buttons are down.
    pub fn pointer(
        &mut self,
        (x, y): (u16, u16),
        relative: bool,
        buttons: u8,
        size: Size,
        sink: &dyn InputSink,
    ) {
        if relative {
            go(sink, (x, y), (STILL, STILL));
        } else {
            let x = x.min(size.width.saturating_sub(1));
            let y = y.min(size.height.saturating_sub(1));
            let before = self.place.replace((x, y));
            if !sink.takes_places() {
                go(sink, (x, y), before.unwrap_or((x, y)));
            } else if before != Some((x, y)) {
                sink.place(scaled(x, size.width), scaled(y, size.height));
            }
        }
        self.press_buttons(buttons, sink);
    }

    fn press_buttons(&mut self, buttons: u8, sink: &dyn InputSink) {
        let changed = self.buttons ^ buttons;
        self.buttons = buttons;
        for (bit, button) in [Button::Left, Button::Middle, Button::Right]
            .into_iter()
            .enumerate()
        {
            if changed >> bit & 1 != 0 {
                sink.button(button, buttons >> bit & 1 != 0);
            }
        }
        let pressed = changed & buttons;
        for (bit, away, right) in [(3, 1, 0), (4, -1, 0), (5, 0, -1), (6, 0, 1)] {
            if pressed >> bit & 1 != 0 {
                sink.wheel(away, right);
            }
        }
    }

    /// The user is gone: nothing is held any more.
    pub fn let_go(&mut self, sink: &dyn InputSink) {
        for code in 0..KEYS {
            self.press(code, false, sink);
        }
        self.press_buttons(0, sink);
    }
}

fn go(sink: &dyn InputSink, (x, y): (u16, u16), (from_x, from_y): (u16, u16)) {
    let right = i32::from(x) - i32::from(from_x);
    let down = i32::from(y) - i32::from(from_y);
    if (right, down) != (0, 0) {
        sink.go(right, down);
    }
}

/// A pixel's place from 0 to [`PLACE_MAX`], so that the first and the last are the ends.
fn scaled(at: u16, pixels: u16) -> u16 {
    let last = u32::from(pixels.saturating_sub(1)).max(1);
    let place = (u32::from(at) * u32::from(PLACE_MAX) + last / 2) / last;
    u16::try_from(place).unwrap_or(PLACE_MAX).min(PLACE_MAX)
}

#[cfg(test)]
pub mod tests {
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    /// Notes what it is told.
    #[derive(Default)]
    pub struct Notes {
        pub told: Mutex<Vec<String>>,
        pub mouse: AtomicBool,
    }

    impl Notes {
        pub fn take(&self) -> Vec<String> {
            std::mem::take(&mut self.told.lock().unwrap())
        }

        fn note(&self, text: String) {
            self.told.lock().unwrap().push(text);
        }
    }

    impl InputSink for Notes {
        fn key(&self, code: u16, down: bool) {
            self.note(format!("{}{code}", if down { '+' } else { '-' }));
        }

        fn place(&self, x: u16, y: u16) {
            self.note(format!("at {x} {y}"));
        }

        fn go(&self, right: i32, down: i32) {
            self.note(format!("by {right} {down}"));
        }

        fn button(&self, button: Button, down: bool) {
            self.note(format!("{button:?} {down}"));
        }

        fn wheel(&self, away: i32, right: i32) {
            self.note(format!("wheel {away} {right}"));
        }

        fn takes_places(&self) -> bool {
            !self.mouse.load(Ordering::Relaxed)
        }
    }

    const SIZE: Size = Size {
        width: 800,
        height: 600,
    };

    #[test]
    fn a_symbol_that_needs_shift_brings_it_unless_it_is_held() {
        let (notes, mut hands) = (Notes::default(), Hands::default());
        hands.key(None, u32::from('A'), true, &notes);
        hands.key(None, u32::from('A'), false, &notes);
        assert_eq!(notes.take(), ["+42", "+30", "-42", "-30"]);
        hands.key(None, 0xffe2, true, &notes);
        hands.key(None, u32::from('A'), true, &notes);
        assert_eq!(notes.take(), ["+54", "+30"]);
    }

    #[test]
    fn a_scancode_counts_more_than_its_symbol() {
        let (notes, mut hands) = (Notes::default(), Hands::default());
        // The key of Q where a French keyboard makes an a.
        hands.key(Some(0x10), u32::from('a'), true, &notes);
        hands.key(Some(0), u32::from('b'), true, &notes);
        hands.key(Some(u32::MAX), 0, true, &notes);
        assert_eq!(notes.take(), ["+16", "+48"]);
    }

    #[test]
    fn what_is_held_is_let_go_once_and_nothing_else() {
        let (notes, mut hands) = (Notes::default(), Hands::default());
        hands.key(Some(29), 0, true, &notes);
        hands.key(Some(29), 0, true, &notes);
        hands.key(Some(0xd3), 0, true, &notes);
        hands.key(Some(30), 0, false, &notes);
        hands.pointer((0, 0), false, 5, SIZE, &notes);
        notes.take();
        hands.let_go(&notes);
        assert_eq!(notes.take(), ["-29", "-111", "Left false", "Right false"]);
        hands.let_go(&notes);
        assert!(notes.take().is_empty());
    }

    #[test]
    fn the_corners_of_the_picture_are_the_ends_of_the_axes() {
        let (notes, mut hands) = (Notes::default(), Hands::default());
        for place in [(0, 0), (799, 599), (u16::MAX, u16::MAX), (400, 0)] {
            hands.pointer(place, false, 0, SIZE, &notes);
        }
        assert_eq!(notes.take(), ["at 0 0", "at 32767 32767", "at 16404 0"]);
        let dot = Size {
            width: 1,
            height: 1,
        };
        hands.pointer((9, 9), false, 0, dot, &notes);
        assert_eq!(notes.take(), ["at 0 0"]);
    }

    #[test]
    fn a_guest_with_a_mouse_is_told_how_far_it_went() {
        let (notes, mut hands) = (Notes::default(), Hands::default());
        notes.mouse.store(true, Ordering::Relaxed);
        hands.pointer((10, 10), false, 0, SIZE, &notes);
        hands.pointer((7, 12), false, 0, SIZE, &notes);
        hands.pointer((STILL - 5, STILL), true, 0, SIZE, &notes);
        assert_eq!(notes.take(), ["by -3 2", "by -5 0"]);
    }

    #[test]
    fn wheels_turn_when_their_buttons_go_down() {
        let (notes, mut hands) = (Notes::default(), Hands::default());
        for buttons in [8, 8, 0, 16, 32, 64, 2, 0x80] {
            hands.pointer((0, 0), false, buttons, SIZE, &notes);
        }
        assert_eq!(
            notes.take()[1..],
            [
                "wheel 1 0",
                "wheel -1 0",
                "wheel 0 -1",
                "wheel 0 1",
                "Middle true",
                "Middle false"
            ]
        );
    }
}
