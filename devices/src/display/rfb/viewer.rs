//! A client that has been let in: what it has, what it waits for, and what it is sent.
//!
//! One update is on its way at a time. It is decided upon as a list of rectangles when everything before it has left,
//! and its pixels are taken from the canvas and encoded as there is room for them: a client that does not read costs
//! the bytes of one piece of its picture and nothing else, however long it waits. What is answered to the client
//! meanwhile waits behind the update, for rectangles cannot be interrupted, and while too much waits the client is
//! not listened to.

use std::collections::VecDeque;
use std::time::Duration;

use bitflags::bitflags;

use super::super::area::{Rect, Runs, Size};
use super::super::canvas::Canvas;
use super::super::input::InputSink;
use super::encode::{EncodeError, Encoder, Encoding, Wish, header};
use super::format::{ClientFormat, Packing, Translation, colour_map, put};
use super::hands::Hands;
use super::message::{Message, MessageError, parse};
use super::paste::Paste;
use super::service::Options;

/// Bytes that may wait to be sent before more pixels are encoded.
const LOW_WATER: usize = 256 << 10;
/// Bytes of answers that may wait behind an update before the client is not listened to.
const MAX_ANSWERS: usize = 16 << 10;
/// Updates that may be on their way to a client that says when they arrive.
const MAX_FLIGHTS: u32 = 2;
/// Areas of an update; with more, one is drawn around all. The pieces that they are sent in are no more than can be counted.
const MAX_RECTS: usize = 8192;

/// Numbers of encodings that are no pixels.
mod number {
    pub const COPY_RECT: i32 = 1;
    pub const DESKTOP_SIZE: i32 = -223;
    pub const LAST_RECT: i32 = -224;
    pub const CURSOR: i32 = -239;
    pub const POINTER_TYPE: i32 = -257;
    pub const EXTENDED_KEY: i32 = -258;
    pub const DESKTOP_NAME: i32 = -307;
    pub const EXTENDED_DESKTOP_SIZE: i32 = -308;
    pub const FENCE: i32 = -312;
    pub const CONTINUOUS: i32 = -313;
    /// The first of ten levels of compression, and of ten of quality.
    pub const EFFORT: i32 = -256;
    pub const QUALITY: i32 = -32;
}

bitflags! {
    /// What a client understands beside pixels.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    struct Abilities: u16 {
        const COPY_RECT = 1 << 0;
        const DESKTOP_SIZE = 1 << 1;
        const EXTENDED_DESKTOP_SIZE = 1 << 2;
        const CURSOR = 1 << 3;
        const POINTER_TYPE = 1 << 4;
        const EXTENDED_KEY = 1 << 5;
        const DESKTOP_NAME = 1 << 6;
        const FENCE = 1 << 7;
        const CONTINUOUS = 1 << 8;
        /// Understood as all do: updates say how many rectangles they have.
        const LAST_RECT = 1 << 9;
    }
}

/// Bits of a fence's flags.
mod fence {
    pub const BLOCK_BEFORE: u32 = 1;
    pub const BLOCK_AFTER: u32 = 2;
    pub const SYNC_NEXT: u32 = 4;
    pub const REQUEST: u32 = 1 << 31;
}

/// Where a client's answers and updates go.
pub struct Sending<'a> {
    /// Bytes to the client.
    pub out: &'a mut Vec<u8>,
    /// Bytes of it that have left.
    pub sent: usize,
}

impl Sending<'_> {
    fn waiting(&self) -> usize {
        self.out.len().saturating_sub(self.sent)
    }
}

/// One client.
#[derive(Debug)]
pub struct Viewer {
    name: String,
    /// The picture as the client has it.
    size: Size,
    /// The canvas's size generation for which `known` is.
    grid: u64,
    /// The generation at which each tile was last sent.
    known: Vec<u64>,
    /// The canvas's generation when the last pixels were encoded.
    shown: u64,
    wish: Wish,
    encoder: Encoder,
    abilities: Abilities,
    /// What the client is to be told with its next update.
    news: Abilities,
    /// The answer to a client that would like another size.
    refused_size: bool,
    relative: bool,
    asked: Option<Rect>,
    /// What is to be sent whether it is new or not.
    whole: Option<Rect>,
    continuous: Option<Rect>,
    flights: u32,
    /// The rest of the update that is being sent.
    rects: VecDeque<Rect>,
    pixels: Vec<u32>,
    answers: Vec<u8>,
    /// Bytes of a text that are still to come.
    text: u32,
    /// The text that is typed, where texts are.
    paste: Option<Paste>,
    hands: Hands,
}

impl Viewer {
    /// A client that has just been let in, and is told how the screen is (RFC 6143, section 7.3.2).
    #[must_use]
    pub fn new(options: &Options, canvas: &Canvas, out: &mut Vec<u8>) -> Self {
        let Options { name, pastes, .. } = options;
        let size = canvas.size();
        out.extend(size.width.to_be_bytes());
        out.extend(size.height.to_be_bytes());
        ClientFormat::SERVER.write(out);
        put_text(out, name);
        let wish = Wish {
            format: ClientFormat::SERVER,
            encoding: Encoding::Raw,
            effort: 2,
            quality: None,
        };
        Self {
            name: name.clone(),
            size,
            grid: 0,
            known: Vec::new(),
            shown: 0,
            wish,
            encoder: Encoder::new(wish),
            abilities: Abilities::empty(),
            news: Abilities::empty(),
            refused_size: false,
            relative: false,
            asked: None,
            whole: None,
            continuous: None,
            flights: 0,
            rects: VecDeque::new(),
            pixels: Vec::new(),
            answers: Vec::new(),
            text: 0,
            paste: pastes.then(Paste::default),
            hands: Hands::default(),
        }
    }

    /// Whether there is room for answers to what the client says.
    #[must_use]
    pub fn listens(&self) -> bool {
        self.answers.len() < MAX_ANSWERS
    }

    /// Takes what it understands off the front of `input`, until it listens no more. Whether the user did something.
    ///
    /// # Errors
    ///
    /// [`MessageError`], when the client is to be sent away.
    pub fn hear(
        &mut self,
        input: &mut Vec<u8>,
        sink: &dyn InputSink,
    ) -> Result<bool, MessageError> {
        let (mut taken, mut active) = (0, false);
        while self.listens() {
            let rest = input.get(taken..).unwrap_or_default();
            if self.text > 0 {
                let pass = u32::try_from(rest.len()).unwrap_or(u32::MAX).min(self.text);
                if pass == 0 {
                    break;
                }
                self.text -= pass;
                let pass = usize::try_from(pass).unwrap_or(usize::MAX);
                if let Some(paste) = &mut self.paste {
                    paste.add(rest.get(..pass).unwrap_or_default());
                }
                taken += pass;
                continue;
            }
            let Some((message, len)) = parse(rest)? else {
                break;
            };
            taken += len;
            active |= self.obey(message, sink);
        }
        input.drain(..taken);
        Ok(active)
    }

    fn obey(&mut self, message: Message, sink: &dyn InputSink) -> bool {
        match message {
            Message::Format(format) => {
                self.wish.format = format;
                if format.is_mapped() {
                    colour_map(&mut self.answers);
                }
            }
            Message::Encodings(numbers) => self.understand(&numbers),
            Message::Update { incremental, area } => {
                if !incremental {
                    self.whole = Some(self.whole.map_or(area, |whole| whole.with(&area)));
                }
                self.asked = Some(self.asked.map_or(area, |asked| asked.with(&area)));
            }
            Message::Continuous { on, area } => {
                self.continuous = on.then_some(area);
                if !on {
                    // Tells that no more come.
                    self.answers.push(150);
                }
            }
            Message::Fence { flags, payload } => self.answer_fence(flags, &payload),
            Message::CutText(len) => {
                self.text = len;
                self.paste.iter_mut().for_each(Paste::begin);
            }
            Message::Resize(_) => self.refused_size = true,
            Message::Key { symbol, down } => {
                self.hands.key(None, symbol, down, sink);
                return true;
            }
            Message::ExtendedKey {
                symbol,
                scancode,
                down,
            } => {
                self.hands.key(Some(scancode), symbol, down, sink);
                return true;
            }
            Message::Pointer { buttons, x, y } => {
                let place = (x, y);
                self.hands
                    .pointer(place, self.relative, buttons, self.size, sink);
                return true;
            }
        }
        false
    }

    fn understand(&mut self, numbers: &[i32]) {
        let before = self.abilities;
        self.abilities = Abilities::empty();
        let mut encoding = None;
        (self.wish.effort, self.wish.quality) = (2, None);
        for &each in numbers {
            encoding = encoding.or(Encoding::from_number(each));
            let level = |first| u8::try_from(each - first).ok();
            match each {
                number::EFFORT..=-247 => self.wish.effort = level(number::EFFORT).unwrap_or(2),
                number::QUALITY..=-23 => self.wish.quality = level(number::QUALITY),
                _ => self.abilities |= ability(each),
            }
        }
        self.wish.encoding = encoding.unwrap_or(Encoding::Raw);
        let new = self.abilities - before;
        self.news |= new
            & (Abilities::EXTENDED_DESKTOP_SIZE
                | Abilities::CURSOR
                | Abilities::POINTER_TYPE
                | Abilities::EXTENDED_KEY
                | Abilities::DESKTOP_NAME);
        self.news &= self.abilities;
        if new.contains(Abilities::CONTINUOUS) {
            self.answers.push(150);
        }
        if new.contains(Abilities::FENCE) {
            put_fence(&mut self.answers, fence::REQUEST, &[]);
            self.flights += 1;
        }
    }

    fn answer_fence(&mut self, flags: u32, payload: &[u8]) {
        if flags & fence::REQUEST == 0 {
            self.flights = self.flights.saturating_sub(1);
            return;
        }
        // Messages are obeyed one by one, so that each of these is kept.
        let kept = fence::BLOCK_BEFORE | fence::BLOCK_AFTER | fence::SYNC_NEXT;
        put_fence(&mut self.answers, flags & kept, payload);
    }

    /// Whether the client waits for a picture and could be sent one.
    #[must_use]
    pub fn waits(&self, sending: &Sending<'_>) -> bool {
        let wants = self.asked.or(self.continuous).is_some();
        wants && self.rects.is_empty() && sending.waiting() == 0 && self.flights <= MAX_FLIGHTS
    }

    /// Whether what it waits for is more than a change of the picture.
    #[must_use]
    pub fn is_urgent(&self) -> bool {
        self.whole.is_some() || !self.news.is_empty() || self.refused_size
    }

    /// Begins an update for a client that waits, where there is something new. Then [`Viewer::go_on`] sends it.
    pub fn begin(&mut self, canvas: &Canvas, sink: &dyn InputSink, sending: &mut Sending<'_>) {
        if self.abilities.contains(Abilities::POINTER_TYPE) && sink.takes_places() == self.relative
        {
            self.news |= Abilities::POINTER_TYPE;
        }
        if self.resize(canvas, sending) {
            return;
        }
        let all = self.size.area();
        let whole = self.whole.map(|whole| whole.clipped(&all));
        self.whole = whole.filter(|whole| !whole.is_empty());
        let moved = self.scrolled(canvas);
        let rects = self.choose(canvas);
        let count = self.news.bits().count_ones() + u32::from(self.refused_size);
        let count =
            usize::try_from(count).unwrap_or(0) + usize::from(moved.is_some()) + rects.len();
        if count == 0 {
            return;
        }
        (self.asked, self.whole) = (None, None);
        let out = &mut *sending.out;
        out.extend([0, 0]);
        out.extend(u16::try_from(count).unwrap_or(u16::MAX).to_be_bytes());
        self.put_news(sink, out);
        if let Some((to, from)) = moved {
            header(out, to, number::COPY_RECT);
            out.extend(to.x.to_be_bytes());
            out.extend(from.to_be_bytes());
        }
        self.encoder.set(self.wish);
        self.rects = rects.into();
        self.shown = canvas.generation();
        self.end(sending.out);
    }

    /// Encodes as much of the update as there is room for.
    ///
    /// # Errors
    ///
    /// [`EncodeError`]; the client is to be left.
    pub fn go_on(&mut self, canvas: &Canvas, sending: &mut Sending<'_>) -> Result<(), EncodeError> {
        while sending.waiting() < LOW_WATER {
            let Some(rect) = self.rects.pop_front() else {
                break;
            };
            self.pixels.clear();
            canvas.copy(rect, &mut self.pixels);
            self.encoder.encode(rect, &self.pixels, sending.out)?;
            self.shown = canvas.generation();
            self.end(sending.out);
        }
        if self.rects.is_empty() && sending.waiting() < LOW_WATER {
            sending.out.append(&mut self.answers);
        }
        Ok(())
    }

    /// When the next letter of a text is to be typed.
    #[must_use]
    pub fn types_at(&self) -> Option<Duration> {
        self.paste.as_ref()?.due()
    }

    /// Types the letter that is due. Whether there was one.
    pub fn type_on(&mut self, now: Duration, sink: &dyn InputSink) -> bool {
        let symbol = self.paste.as_mut().and_then(|paste| paste.next(now));
        if let Some(symbol) = symbol {
            self.hands.key(None, symbol, true, sink);
            self.hands.key(None, symbol, false, sink);
        }
        symbol.is_some()
    }

    /// Whether there is more of an update to send.
    #[must_use]
    pub fn is_amid(&self) -> bool {
        !self.rects.is_empty()
    }

    /// The client is gone.
    pub fn leave(&mut self, sink: &dyn InputSink) {
        self.hands.let_go(sink);
    }

    /// After the last rectangle: asks a client that can tell to say when it has them.
    fn end(&mut self, out: &mut Vec<u8>) {
        let tells = self.abilities.contains(Abilities::FENCE) && self.continuous.is_some();
        if self.rects.is_empty() && tells {
            put_fence(out, fence::REQUEST | fence::BLOCK_BEFORE, &[]);
            self.flights += 1;
        }
    }

    /// Tells the client of another size, if it can be told; that is an update of its own.
    fn resize(&mut self, canvas: &Canvas, sending: &mut Sending<'_>) -> bool {
        let can = Abilities::DESKTOP_SIZE | Abilities::EXTENDED_DESKTOP_SIZE;
        let other = self.size != canvas.size();
        let tell = other && self.abilities.intersects(can);
        if self.grid != canvas.resized() || tell {
            self.grid = canvas.resized();
            self.known = vec![0; canvas.tiles().len()];
        }
        if other && !tell && self.whole.is_none() && self.shown < canvas.resized() {
            // What the new screen has not is black.
            self.whole = Some(self.size.area());
        }
        if !tell {
            return false;
        }
        self.size = canvas.size();
        sending.out.extend([0, 0, 0, 1]);
        if self.abilities.contains(Abilities::EXTENDED_DESKTOP_SIZE) {
            put_extended_size(sending.out, self.size, (0, 0));
            self.news -= Abilities::EXTENDED_DESKTOP_SIZE;
        } else {
            header(sending.out, self.size.area(), number::DESKTOP_SIZE);
        }
        (self.asked, self.whole) = (None, None);
        true
    }

    /// The lines that the client can move itself, and from which line; it then has the tiles they fill.
    fn scrolled(&mut self, canvas: &Canvas) -> Option<(Rect, u16)> {
        let all = self.size.area();
        let area = self.asked.or(self.continuous)?;
        let usable = self.abilities.contains(Abilities::COPY_RECT)
            && self.size == canvas.size()
            && self.whole.is_none()
            && area.contains(&all);
        let scroll = canvas.scroll(&self.known, self.shown).filter(|_| usable)?;
        for (index, known) in self.known.iter_mut().enumerate() {
            if scroll.to.contains(&canvas.tile(index)) {
                *known = canvas.generation();
            }
        }
        Some((scroll.to, scroll.to.y + scroll.by))
    }

    /// What is to be sent; the client then has it.
    fn choose(&mut self, canvas: &Canvas) -> Vec<Rect> {
        let all = self.size.area();
        let whole = self.whole;
        let area = self.asked.or(self.continuous).unwrap_or(all).clipped(&all);
        let mut runs = Runs::default();
        let mut run: Option<Rect> = None;
        let columns = canvas.columns();
        for (index, (known, changed)) in self.known.iter_mut().zip(canvas.tiles()).enumerate() {
            let tile = canvas.tile(index).clipped(&all);
            let sent = whole.is_some_and(|whole| whole.contains(&tile));
            let new = !sent && *known < *changed && !tile.clipped(&area).is_empty();
            if sent || new {
                *known = canvas.generation();
            }
            run = match run {
                Some(run) if new => Some(run.with(&tile)),
                None if new => Some(tile),
                Some(done) => {
                    runs.add(done);
                    None
                }
                None => None,
            };
            if index % columns == columns - 1 {
                run.take().into_iter().for_each(|run| runs.add(run));
                runs.end_band();
            }
        }
        let pieces = |rect: Rect| Encoder::pieces(&self.wish, rect);
        let found = runs.finish();
        let around = |rects: &[Rect]| {
            let around = rects.iter().copied().reduce(|one, other| one.with(&other));
            around.into_iter().collect()
        };
        let found = if found.len() > MAX_RECTS {
            around(&found)
        } else {
            found
        };
        whole.into_iter().chain(found).flat_map(pieces).collect()
    }

    fn put_news(&mut self, sink: &dyn InputSink, out: &mut Vec<u8>) {
        let nowhere = Rect {
            x: 0,
            y: 0,
            width: 0,
            height: 0,
        };
        for news in std::mem::replace(&mut self.news, Abilities::empty()).iter() {
            match news {
                Abilities::EXTENDED_DESKTOP_SIZE => put_extended_size(out, self.size, (0, 0)),
                Abilities::CURSOR => put_cursor(out, &self.wish.format),
                Abilities::POINTER_TYPE => {
                    self.relative = !sink.takes_places();
                    let x = u16::from(!self.relative);
                    header(out, Rect { x, ..nowhere }, number::POINTER_TYPE);
                }
                Abilities::EXTENDED_KEY => header(out, nowhere, number::EXTENDED_KEY),
                _ => {
                    header(out, nowhere, number::DESKTOP_NAME);
                    put_text(out, &self.name);
                }
            }
        }
        if std::mem::take(&mut self.refused_size) {
            // By this client's wish, and prohibited: the guest alone sets its modes.
            put_extended_size(out, self.size, (1, 1));
        }
    }
}

fn ability(number: i32) -> Abilities {
    match number {
        number::COPY_RECT => Abilities::COPY_RECT,
        number::DESKTOP_SIZE => Abilities::DESKTOP_SIZE,
        number::LAST_RECT => Abilities::LAST_RECT,
        number::CURSOR => Abilities::CURSOR,
        number::POINTER_TYPE => Abilities::POINTER_TYPE,
        number::EXTENDED_KEY => Abilities::EXTENDED_KEY,
        number::DESKTOP_NAME => Abilities::DESKTOP_NAME,
        number::EXTENDED_DESKTOP_SIZE => Abilities::EXTENDED_DESKTOP_SIZE,
        number::FENCE => Abilities::FENCE,
        number::CONTINUOUS => Abilities::CONTINUOUS,
        _ => Abilities::empty(),
    }
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    out.extend(u32::try_from(text.len()).unwrap_or(0).to_be_bytes());
    out.extend(text.as_bytes());
}

fn put_fence(out: &mut Vec<u8>, flags: u32, payload: &[u8]) {
    out.extend([248, 0, 0, 0]);
    out.extend(flags.to_be_bytes());
    out.push(u8::try_from(payload.len()).unwrap_or(0));
    out.extend(payload);
}

/// A size of one screen, with who wished for it and what became of that.
fn put_extended_size(out: &mut Vec<u8>, size: Size, (reason, status): (u16, u16)) {
    let area = Rect {
        x: reason,
        y: status,
        ..size.area()
    };
    header(out, area, number::EXTENDED_DESKTOP_SIZE);
    // One screen: its number, its place, its size, and no flags.
    out.extend([1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    out.extend(size.width.to_be_bytes());
    out.extend(size.height.to_be_bytes());
    out.extend([0; 4]);
}

/// A dot in place of the client's own arrow: the guest draws its pointer itself, where it has one.
fn put_cursor(out: &mut Vec<u8>, format: &ClientFormat) {
    const DOT: [[u32; 5]; 5] = [
        [0, 0, 0, 0, 0],
        [0, 0x00ff_ffff, 0x00ff_ffff, 0x00ff_ffff, 0],
        [0, 0x00ff_ffff, 0x00ff_ffff, 0x00ff_ffff, 0],
        [0, 0x00ff_ffff, 0x00ff_ffff, 0x00ff_ffff, 0],
        [0, 0, 0, 0, 0],
    ];
    /// A line's pixels that are the dot's: all five.
    const LINE: u8 = 0xf8;
    let area = Rect {
        x: 2,
        y: 2,
        width: 5,
        height: 5,
    };
    header(out, area, number::CURSOR);
    let translation = Translation::new(format, Packing::Plain);
    for pixel in DOT.as_flattened() {
        put(out, translation.pixel(*pixel), translation.bytes());
    }
    out.extend([LINE; 5]);
}

#[cfg(test)]
mod tests;
