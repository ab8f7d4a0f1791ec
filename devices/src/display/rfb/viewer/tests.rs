use super::super::super::canvas::tests::Memory;
use super::super::super::{FrameSource, Mode, PixelFormat};
use super::super::encode::decode::Decoder;
use super::super::hands::tests::Notes;
use super::super::service::Sharing;
use super::*;

/// A viewer of a screen, and the screen as it has been sent.
struct Look {
    memory: Memory,
    canvas: Canvas,
    viewer: Viewer,
    notes: Notes,
    out: Vec<u8>,
    decoder: Decoder,
    size: (usize, usize),
    screen: Vec<u32>,
}

/// A rectangle's place, size and encoding.
type Head = ([u16; 4], i32);

impl Look {
    fn new(width: u32, height: u32) -> Self {
        let memory = Memory::screen(width, height);
        let mut canvas = Canvas::new();
        canvas.refresh(&memory);
        let mut out = Vec::new();
        let options = Options {
            name: "screen".into(),
            sharing: Sharing::default(),
            pastes: false,
        };
        let viewer = Viewer::new(&options, &canvas, &mut out);
        let side = |pixels| u16::try_from(pixels).unwrap().to_be_bytes();
        assert_eq!(out[..4], [side(width), side(height)].concat());
        assert_eq!(out[20..], *b"\0\0\0\x06screen");
        out.clear();
        let size = (width.try_into().unwrap(), height.try_into().unwrap());
        Self {
            memory,
            canvas,
            viewer,
            notes: Notes::default(),
            out,
            decoder: Decoder::default(),
            size,
            screen: vec![0x00ab_cdef; size.0 * size.1],
        }
    }

    fn say(&mut self, bytes: &[u8]) {
        let mut input = bytes.to_vec();
        self.viewer.hear(&mut input, &self.notes).unwrap();
        assert!(input.is_empty());
        self.go_on();
    }

    fn ask(&mut self, incremental: bool) {
        let [w, h] = [self.size.0, self.size.1].map(|side| u16::try_from(side).unwrap());
        let mut message = vec![3, u8::from(incremental), 0, 0, 0, 0];
        message.extend(w.to_be_bytes());
        message.extend(h.to_be_bytes());
        self.say(&message);
    }

    fn understand(&mut self, numbers: &[i32]) {
        let mut message = vec![2, 0, 0, u8::try_from(numbers.len()).unwrap()];
        message.extend(numbers.iter().flat_map(|number| number.to_be_bytes()));
        self.say(&message);
    }

    fn sending(out: &mut Vec<u8>) -> Sending<'_> {
        Sending { out, sent: 0 }
    }

    fn go_on(&mut self) {
        let mut sending = Self::sending(&mut self.out);
        self.viewer.go_on(&self.canvas, &mut sending).unwrap();
    }

    /// Looks at the screen, and reads what the viewer is sent of it.
    fn update(&mut self) -> Vec<Head> {
        self.canvas.refresh(&self.memory);
        self.received()
    }

    /// Reads what the viewer is sent of what it knows.
    fn received(&mut self) -> Vec<Head> {
        assert!(self.out.is_empty());
        let mut sending = Self::sending(&mut self.out);
        if self.viewer.waits(&sending) {
            self.viewer.begin(&self.canvas, &self.notes, &mut sending);
        }
        let mut bytes = std::mem::take(&mut self.out);
        while self.viewer.is_amid() {
            self.go_on();
            bytes.append(&mut self.out);
        }
        self.go_on();
        bytes.append(&mut self.out);
        let mut input = bytes.as_slice();
        let heads = self.read(&mut input);
        assert!(input.is_empty(), "{input:?}");
        heads
    }

    fn read(&mut self, input: &mut &[u8]) -> Vec<Head> {
        if input.is_empty() {
            return Vec::new();
        }
        let [0, _, high, low] = take(input) else {
            panic!("no update");
        };
        let count = u16::from_be_bytes([high, low]);
        (0..count).map(|_| self.read_rect(input)).collect()
    }

    fn read_rect(&mut self, input: &mut &[u8]) -> Head {
        let place: [u16; 4] = std::array::from_fn(|_| u16::from_be_bytes(take(input)));
        let encoding = i32::from_be_bytes(take(input));
        let [x, y, w, h] = place.map(usize::from);
        match encoding {
            0 | 5 | 7 | 16 => {
                let bytes = if encoding == 0 || encoding == 5 { 4 } else { 3 };
                let mut pixels = self.decoder.decode(encoding, (w, h), bytes, input);
                if encoding == 7 {
                    // Red comes first.
                    for pixel in &mut pixels {
                        *pixel = pixel.swap_bytes() >> 8;
                    }
                }
                for (line, row) in pixels.chunks(w).enumerate() {
                    let start = (y + line) * self.size.0 + x;
                    self.screen[start..start + w].copy_from_slice(row);
                }
            }
            1 => {
                let [from_x, from_y]: [usize; 2] =
                    std::array::from_fn(|_| u16::from_be_bytes(take(input)).into());
                let old = self.screen.clone();
                for line in 0..h {
                    let (from, to) = ((from_y + line) * self.size.0, (y + line) * self.size.0);
                    self.screen[to + x..to + x + w]
                        .copy_from_slice(&old[from + from_x..from + from_x + w]);
                }
            }
            -223 | -308 => {
                if (x, y) == (0, 0) {
                    self.size = (w, h);
                    self.screen = vec![0x00ab_cdef; w * h];
                }
                let len = if encoding == -308 { 20 } else { 0 };
                *input = &input[len..];
            }
            -239 => *input = &input[w * h * 4 + w.div_ceil(8) * h..],
            -257 | -258 => {}
            -307 => *input = &input[4 + 6..],
            _ => panic!("encoding {encoding}"),
        }
        (place, encoding)
    }

    /// Whether the client has what the screen shows.
    fn is_same(&self) -> bool {
        let side = |pixels| u16::try_from(pixels).unwrap();
        let size = Size {
            width: side(self.size.0),
            height: side(self.size.1),
        };
        let mut pixels = Vec::new();
        self.canvas.copy(size.area(), &mut pixels);
        pixels == self.screen
    }
}

fn take<const N: usize>(input: &mut &[u8]) -> [u8; N] {
    let (taken, rest) = input.split_first_chunk().unwrap();
    *input = rest;
    *taken
}

#[test]
fn a_client_that_asks_gets_all_and_then_what_changed() {
    for encoding in [0, 5, 7, 16] {
        let mut look = Look::new(300, 100);
        look.understand(&[encoding]);
        for at in 0..90 {
            look.memory.draw(at * 3, at, 0x0012_3456);
        }
        look.ask(false);
        look.update();
        assert!(look.is_same());
        look.ask(true);
        assert_eq!(look.update(), []);
        look.memory.draw(299, 99, 7);
        assert_eq!(look.update(), [([256, 96, 44, 4], encoding)]);
        assert!(look.is_same());
        // It has not asked again.
        look.memory.draw(0, 0, 8);
        assert_eq!(look.update(), []);
        look.ask(true);
        assert_eq!(look.received(), [([0, 0, 64, 16], encoding)]);
        assert!(look.is_same());
    }
}

#[test]
fn what_is_asked_for_again_is_sent_though_it_is_not_new() {
    let mut look = Look::new(64, 64);
    look.ask(false);
    look.update();
    look.say(&[3, 0, 0, 60, 0, 60, 255, 255, 255, 255]);
    assert_eq!(look.update(), [([60, 60, 4, 4], 0)]);
    // Nothing of the screen.
    look.say(&[3, 0, 255, 255, 0, 0, 0, 9, 0, 9]);
    assert_eq!(look.update(), []);
    look.say(&[3, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(look.update(), []);
}

#[test]
fn rectangles_past_every_edge_and_over_each_other_are_answered_once_with_what_there_is() {
    let mut look = Look::new(64, 32);
    for _ in 0..3 {
        // All, much more than all, and from places that a signed number calls negative.
        look.say(&[3, 0, 0, 0, 0, 0, 0, 64, 0, 32]);
        look.say(&[3, 0, 0, 1, 0, 1, 255, 255, 255, 255]);
        look.say(&[3, 0, 255, 255, 255, 255, 255, 255, 255, 255]);
        look.say(&[3, 1, 128, 0, 128, 0, 128, 0, 128, 0]);
    }
    let sent = look.update();
    let pixels: usize = sent
        .iter()
        .map(|([_, _, w, h], _)| usize::from(*w) * usize::from(*h))
        .sum();
    assert_eq!(pixels, 64 * 32, "{sent:?}");
    assert!(look.is_same());
    assert_eq!(look.update(), [], "nothing is owed any more");
    // Unasked updates of a part that is nowhere are none.
    look.say(&[150, 1, 255, 255, 255, 255, 255, 255, 255, 255]);
    look.memory.draw(3, 3, 1);
    assert_eq!(look.update(), []);
}

#[test]
fn a_part_that_is_asked_for_leaves_the_rest_new() {
    let mut look = Look::new(200, 64);
    look.ask(false);
    look.update();
    look.memory.draw(0, 0, 1);
    look.memory.draw(199, 63, 1);
    look.say(&[3, 1, 0, 0, 0, 0, 0, 9, 0, 9]);
    assert_eq!(look.update(), [([0, 0, 64, 16], 0)]);
    look.ask(true);
    assert_eq!(look.update(), [([192, 48, 8, 16], 0)]);
    assert!(look.is_same());
}

#[test]
fn text_that_moves_up_is_moved_by_the_client() {
    let mut look = Look::new(64, 160);
    let text = |look: &Look, first: u32| {
        for at in 0..64 * 160 {
            look.memory
                .draw(at % 64, at / 64, first * 64 + u32::try_from(at).unwrap());
        }
    };
    look.understand(&[1, 16]);
    text(&look, 1);
    look.ask(false);
    look.update();
    text(&look, 33);
    look.ask(true);
    assert_eq!(
        look.update(),
        [([0, 0, 64, 128], 1), ([0, 128, 64, 32], 16)]
    );
    assert!(look.is_same());
    // One that cannot is sent all of it.
    look.understand(&[16]);
    text(&look, 65);
    look.ask(true);
    assert_eq!(look.update(), [([0, 0, 64, 160], 16)]);
    assert!(look.is_same());
}

#[test]
fn an_update_is_sent_in_pieces_while_there_is_room() {
    let mut look = Look::new(1000, 600);
    look.memory.draw(999, 599, 1);
    look.ask(false);
    look.canvas.refresh(&look.memory);
    let mut sending = Look::sending(&mut look.out);
    look.viewer.begin(&look.canvas, &look.notes, &mut sending);
    look.go_on();
    look.go_on();
    assert!(look.viewer.is_amid() && look.out.len() < 2 * LOW_WATER);
    // While it is not read, nothing is added, nor is another begun.
    let len = look.out.len();
    look.ask(false);
    look.go_on();
    assert_eq!(look.out.len(), len);
    assert!(!look.viewer.waits(&Look::sending(&mut look.out)));
    // The screen goes on meanwhile; the client sees it in the end.
    look.memory.draw(0, 0, 2);
    look.canvas.refresh(&look.memory);
    let mut bytes = std::mem::take(&mut look.out);
    while look.viewer.is_amid() {
        look.go_on();
        bytes.append(&mut look.out);
    }
    look.read(&mut bytes.as_slice());
    assert!(!look.is_same());
    look.received();
    assert!(look.is_same());
}

#[test]
fn a_screen_may_shrink_amid_an_update() {
    let mut look = Look::new(1000, 600);
    look.understand(&[-223]);
    look.ask(false);
    look.canvas.refresh(&look.memory);
    let mut sending = Look::sending(&mut look.out);
    look.viewer.begin(&look.canvas, &look.notes, &mut sending);
    look.go_on();
    look.memory
        .set(Mode::new((50, 20), 200, 0, PixelFormat::Xrgb8888, 4000).ok());
    look.canvas.refresh(&look.memory);
    let mut bytes = std::mem::take(&mut look.out);
    while look.viewer.is_amid() {
        look.go_on();
        bytes.append(&mut look.out);
    }
    look.read(&mut bytes.as_slice());
    look.ask(true);
    assert_eq!(look.received(), [([0, 0, 50, 20], -223)]);
    look.ask(true);
    look.received();
    assert!(look.is_same());
}

fn resized(look: &Look, width: u32, height: u32) {
    let format = PixelFormat::Xrgb8888;
    let len = look.memory.size();
    let mode = Mode::new((width, height), width * 4, 0, format, len);
    look.memory.set(Some(mode.unwrap()));
}

#[test]
fn clients_are_told_of_another_size_as_they_understand_it() {
    for (numbers, told) in [(&[-223][..], -223), (&[-308, -223], -308)] {
        let mut look = Look::new(200, 100);
        look.understand(numbers);
        look.ask(false);
        look.update();
        look.ask(true);
        resized(&look, 100, 150);
        assert_eq!(look.update(), [([0, 0, 100, 150], told)]);
        look.ask(true);
        look.update();
        assert!(look.is_same());
    }
}

#[test]
fn a_client_that_knows_one_size_sees_what_fits_and_black() {
    let mut look = Look::new(200, 100);
    look.memory.draw(150, 20, 9);
    look.ask(false);
    look.update();
    resized(&look, 100, 150);
    look.memory.draw(3, 3, 5);
    look.ask(true);
    look.update();
    assert!(look.is_same());
    assert_eq!(look.size, (200, 100));
    look.memory.draw(4, 4, 5);
    look.ask(true);
    look.update();
    assert!(look.is_same());
}

#[test]
fn news_come_once_with_an_update() {
    let mut look = Look::new(64, 16);
    look.understand(&[0, -239, -257, -258, -307, -308, -224]);
    look.ask(false);
    let numbers: Vec<i32> = look.update().iter().map(|(_, number)| *number).collect();
    assert_eq!(numbers, [-308, -239, -257, -258, -307, 0]);
    look.understand(&[0, -239, -257, -258, -307, -308, -224]);
    look.ask(true);
    assert_eq!(look.update(), []);
    // A guest that takes movements now.
    look.notes
        .mouse
        .store(true, std::sync::atomic::Ordering::Relaxed);
    assert_eq!(look.update(), [([0; 4], -257)]);
    look.say(&[5, 0, 0x7f, 0xf0, 0x7f, 0xff]);
    assert_eq!(look.notes.take(), ["by -15 0"]);
}

#[test]
fn a_client_that_wants_another_size_is_told_no() {
    let mut look = Look::new(64, 16);
    look.understand(&[-308]);
    look.ask(false);
    look.update();
    look.say(&[251, 0, 255, 255, 255, 255, 0, 0]);
    look.ask(true);
    assert_eq!(look.update(), [([1, 1, 64, 16], -308)]);
}

#[test]
fn continuous_updates_come_unasked_but_not_faster_than_they_arrive() {
    let mut look = Look::new(64, 64);
    look.understand(&[0, -312, -313]);
    let answers = std::mem::take(&mut look.out);
    // It is told that they are there, and asked for its fence.
    assert_eq!(answers, [&[150][..], &fenced(fence::REQUEST)].concat());
    look.say(&fenced(0));
    look.say(&[150, 1, 0, 0, 0, 0, 0, 64, 0, 64]);
    let mut updates = 0;
    for at in 0..10 {
        look.memory.draw(at, at, 1);
        look.canvas.refresh(&look.memory);
        let mut sending = Look::sending(&mut look.out);
        if look.viewer.waits(&sending) {
            look.viewer.begin(&look.canvas, &look.notes, &mut sending);
            look.go_on();
            let bytes = std::mem::take(&mut look.out);
            let after = bytes.len() - 9;
            look.read(&mut &bytes[..after]);
            assert_eq!(bytes[after..], fenced(fence::REQUEST | fence::BLOCK_BEFORE));
            updates += 1;
        }
    }
    assert_eq!(updates, MAX_FLIGHTS + 1);
    look.say(&fenced(0));
    assert!(look.viewer.waits(&Look::sending(&mut Vec::new())));
    // It is told that no more come.
    look.say(&[150, 0, 0, 0, 0, 0, 0, 64, 0, 64]);
    assert_eq!(look.out, [150]);
    assert!(!look.viewer.waits(&Look::sending(&mut Vec::new())));
}

fn fenced(flags: u32) -> Vec<u8> {
    [&[248, 0, 0, 0][..], &flags.to_be_bytes(), &[0]].concat()
}

#[test]
fn fences_come_back_with_what_is_kept() {
    let mut look = Look::new(64, 64);
    look.say(&[248, 0, 0, 0, 255, 255, 255, 255, 3, 1, 2, 3]);
    assert_eq!(look.out, [248, 0, 0, 0, 0, 0, 0, 7, 3, 1, 2, 3]);
}

#[test]
fn a_client_that_is_answered_and_does_not_read_is_listened_to_no_more() {
    let mut look = Look::new(64, 64);
    let fence = [&[248, 0, 0, 0, 128, 0, 0, 0, 64][..], &[7; 64]].concat();
    let mut input = fence.repeat(100_000);
    for _ in 0..1000 {
        look.viewer.hear(&mut input, &look.notes).unwrap();
        look.go_on();
    }
    assert!(!look.viewer.listens() && !input.is_empty());
    assert!(look.out.len() < LOW_WATER + 2 * MAX_ANSWERS);
    look.out.clear();
    look.go_on();
    assert!(look.viewer.listens());
}

#[test]
fn a_text_is_passed_over_in_any_pieces() {
    let mut look = Look::new(64, 64);
    look.say(&[6, 0, 0, 0, 0, 0, 0, 5, b'a', b'b']);
    look.say(b"c");
    look.say(b"de\x04\x01\0\0\0\0\0a");
    assert_eq!(look.notes.take(), ["+30"]);
}

#[test]
fn a_storm_of_keys_reaches_the_guest_key_by_key() {
    let mut look = Look::new(64, 64);
    let press = [4, 1, 0, 0, 0, 0, 0, b'a'];
    look.say(&press.repeat(100_000));
    assert_eq!(look.notes.take().len(), 100_000);
    look.viewer.leave(&look.notes);
    assert_eq!(look.notes.take(), ["-30"]);
}

#[test]
fn a_client_with_a_map_is_sent_it_before_its_pixels() {
    let mut look = Look::new(64, 16);
    let mut message = vec![0, 0, 0, 0, 8, 8, 0, 0];
    message.extend([0; 12]);
    look.say(&message);
    let map = std::mem::take(&mut look.out);
    assert_eq!((map[0], map.len()), (1, 6 + 6 * 256));
    look.ask(false);
    look.canvas.refresh(&look.memory);
    let mut sending = Look::sending(&mut look.out);
    look.viewer.begin(&look.canvas, &look.notes, &mut sending);
    look.go_on();
    assert_eq!(look.out.len(), 4 + 12 + 64 * 16);
}
