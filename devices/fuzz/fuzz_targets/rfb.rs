//! Any bytes as what a viewer says to the VNC server, in any pieces, while it reads much or little and the screen changes.
//!
//! A client that has not proven the password is shown nothing and moves nothing. The server comes to rest. What it holds for a
//! client is bounded. No key stays down when the server has ended.
//!
//! The first byte of an input says what the client must do to be let in, and whether it has done it already. What follows are steps: a
//! byte `b`, and for `b & 7` of 0 to 4 as many bytes of what the client says as the next byte counts; of 5, it reads as many times
//! 64 bytes as the next says; of 6, the guest draws at the place that the next says; of 7, it sets the mode that the next says.
#![no_main]

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use devices::display::rfb::{
    CHALLENGE, Options, Password, Security, Service, Sharing, Stream, TlsAcceptor,
};
use devices::display::{Button, FrameSource, InputSink, Mode, PixelFormat, Screen};
use libfuzzer_sys::fuzz_target;

/// The most bytes that may be on their way to a client that reads nothing: what is encoded before it is full, and a piece more.
const MOST: usize = 1 << 20;
/// The screen's memory.
const MEMORY: usize = 130 * 520;

/// The client's end.
#[derive(Default)]
struct Wire {
    said: Vec<u8>,
    /// Bytes that the client reads before it pauses.
    room: usize,
    heard: usize,
    /// How many of the last bytes are those of the screen's name.
    matched: usize,
    named: bool,
}

const NAME: &[u8] = b"a secret screen";

#[derive(Clone)]
struct End(Arc<Mutex<Wire>>, Arc<File>);

impl Read for End {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut wire = self.0.lock().expect("a lock");
        let len = wire.said.len().min(buffer.len());
        if len == 0 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        buffer[..len].copy_from_slice(&wire.said[..len]);
        wire.said.drain(..len);
        Ok(len)
    }
}

impl Write for End {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        assert!(buffer.len() < MOST, "{} bytes wait", buffer.len());
        let mut wire = self.0.lock().expect("a lock");
        let len = wire.room.min(buffer.len());
        if len == 0 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        wire.room -= len;
        wire.heard += len;
        for byte in &buffer[..len] {
            let next = NAME.get(wire.matched) == Some(byte);
            wire.matched = if next { wire.matched + 1 } else { 0 };
            wire.named |= wire.matched == NAME.len();
        }
        Ok(len)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl AsFd for End {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.1.as_fd()
    }
}

impl Stream for End {}

/// TLS that leaves all as it is.
struct Open;

impl TlsAcceptor for Open {
    fn accept(&self, stream: Box<dyn Stream>) -> io::Result<Box<dyn Stream>> {
        Ok(stream)
    }
}

#[derive(Default)]
struct Keys(Mutex<(BTreeSet<u16>, usize)>);

impl Keys {
    fn told(&self) {
        self.0.lock().expect("a lock").1 += 1;
    }
}

impl InputSink for Keys {
    fn key(&self, code: u16, down: bool) {
        self.told();
        let keys = &mut self.0.lock().expect("a lock").0;
        assert!(if down {
            keys.insert(code);
            true
        } else {
            keys.remove(&code)
        });
    }

    fn place(&self, x: u16, y: u16) {
        self.told();
        assert!(x <= devices::display::PLACE_MAX && y <= devices::display::PLACE_MAX);
    }

    fn go(&self, _right: i32, _down: i32) {
        self.told();
    }

    fn button(&self, _button: Button, _down: bool) {
        self.told();
    }

    fn wheel(&self, _away: i32, _right: i32) {
        self.told();
    }

    fn takes_places(&self) -> bool {
        self.0.lock().expect("a lock").1 % 64 < 32
    }
}

struct Drawn {
    bytes: Vec<u8>,
    mode: Option<Mode>,
}

#[derive(Clone)]
struct Guest(Arc<Mutex<Drawn>>);

impl Guest {
    fn set(&self, choice: u8) {
        let side = |bits: u8| [1, 17, 64, 130][usize::from(bits & 3)];
        let format = [
            PixelFormat::Xrgb8888,
            PixelFormat::Rgb888,
            PixelFormat::Rgb565,
            PixelFormat::Xrgb1555,
        ][usize::from(choice >> 4 & 3)];
        let mode = Mode::new((side(choice), side(choice >> 2)), 520, 0, format, MEMORY).ok();
        self.0.lock().expect("a lock").mode = mode.filter(|_| choice < 0xc0);
    }

    fn draw(&self, place: u8) {
        let bytes = &mut self.0.lock().expect("a lock").bytes;
        if place & 0x80 != 0 {
            // Text moves up.
            bytes.copy_within(usize::from(place & 15) * 520.., 0);
        } else {
            let mut value = u32::from(place);
            for byte in bytes.iter_mut().skip(usize::from(place) * 520).take(1560) {
                value = value.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                *byte = if place & 1 == 0 {
                    place
                } else {
                    (value >> 24) as u8
                };
            }
        }
    }
}

impl FrameSource for Guest {
    fn mode(&self) -> Option<Mode> {
        self.0.lock().expect("a lock").mode
    }

    fn track(&self, _on: bool) {}

    fn changed(&self, pages: &mut [u64]) {
        pages.fill(u64::MAX);
    }

    fn size(&self) -> usize {
        MEMORY
    }

    fn read(&self, offset: usize, buffer: &mut [u8]) {
        let bytes = &self.0.lock().expect("a lock").bytes;
        buffer.copy_from_slice(&bytes[offset..offset + buffer.len()]);
    }
}

/// Turns until nothing is left to do at once.
fn settle(service: &mut Service, now: Duration) {
    for _ in 0..10_000 {
        if service.turn(now, &|_| true).is_none_or(|until| until > now) {
            return;
        }
    }
    panic!("it never rests");
}

fuzz_target!(|input: &[u8]| {
    let Some((setup, mut steps)) = input.split_first() else {
        return;
    };
    let password = (setup & 1 != 0).then(|| Password::new("secret").expect("a password"));
    let tls: Option<Arc<dyn TlsAcceptor>> = (setup & 2 != 0).then(|| Arc::new(Open) as _);
    let is_in = setup & 4 != 0 && tls.is_none();
    let challenge = [0x5a; CHALLENGE];
    let wire = Arc::new(Mutex::new(Wire::default()));
    if is_in {
        let mut said = b"RFB 003.008\n".to_vec();
        match &password {
            Some(password) => {
                said.push(2);
                said.extend(password.answer(&challenge));
            }
            None => said.push(1),
        }
        said.push(1);
        *wire.lock().expect("a lock") = Wire {
            said,
            room: 100,
            ..Wire::default()
        };
    }
    let keys = Arc::new(Keys::default());
    let bytes = vec![0; MEMORY];
    let guest = Guest(Arc::new(Mutex::new(Drawn { bytes, mode: None })));
    let options = Options {
        name: String::from_utf8_lossy(NAME).into_owned(),
        sharing: Sharing::default(),
        pastes: false,
    };
    let screen = Arc::new(Screen::new(Box::new(guest.clone())));
    let mut service = Service::new(screen, keys.clone(), options);
    let mut now = Duration::from_secs(1);
    let null = Arc::new(File::open("/dev/null").expect("there is one"));
    let proven = is_in || password.is_none();
    let security = Security { password, tls };
    let end = Box::new(End(wire.clone(), null));
    service.connect(end, security, challenge, "fuzz".into(), now);
    settle(&mut service, now);
    while let [step, value, rest @ ..] = steps {
        steps = rest;
        match step & 7 {
            0..=4 => {
                let (said, rest) = rest.split_at(rest.len().min(usize::from(*value)));
                wire.lock().expect("a lock").said.extend(said);
                steps = rest;
            }
            5 => wire.lock().expect("a lock").room += usize::from(*value) * 64,
            6 => guest.draw(*value),
            _ => guest.set(*value),
        }
        now += Duration::from_millis(u64::from(step >> 3) * 20);
        settle(&mut service, now);
    }
    {
        let mut wire = wire.lock().expect("a lock");
        wire.room = usize::MAX;
        assert!(proven || !wire.named, "the screen was shown");
    }
    settle(&mut service, now);
    service.close();
    let keys = keys.0.lock().expect("a lock");
    assert!(keys.0.is_empty(), "{:?} are down", keys.0);
    assert!(proven || keys.1 == 0, "the guest was touched");
});
