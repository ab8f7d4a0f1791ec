//! Viewers from packages look at a picture that is served to them, and show what was drawn.
//!
//! They are where `make setup` has unpacked them; elsewhere there is nothing to test.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use des::Des;
use des::cipher::{BlockCipherEncrypt, KeyInit};
use devices::display::rfb::{Options, Password, Security, Server, Sharing};
use devices::display::{Button, FrameSource, InputSink, Mode, PixelFormat, Screen};
use devices::time::Clock;

const WIDTH: usize = 320;
const HEIGHT: usize = 200;
/// How far a level may be from what was drawn: the viewer writes a JPEG of the best quality.
const NEAR: u8 = 6;

/// A picture that stays as it is.
struct Still(Vec<u8>);

impl FrameSource for Still {
    fn mode(&self) -> Option<Mode> {
        let (width, height) = (
            u32::try_from(WIDTH).unwrap(),
            u32::try_from(HEIGHT).unwrap(),
        );
        let format = PixelFormat::Xrgb8888;
        Mode::new((width, height), width * 4, 0, format, self.0.len()).ok()
    }

    fn track(&self, _on: bool) {}

    fn changed(&self, _pages: &mut [u64]) {}

    fn size(&self) -> usize {
        self.0.len()
    }

    fn read(&self, offset: usize, buffer: &mut [u8]) {
        buffer.copy_from_slice(&self.0[offset..offset + buffer.len()]);
    }
}

struct Nobody;

impl InputSink for Nobody {
    fn key(&self, _code: u16, _down: bool) {}
    fn place(&self, _x: u16, _y: u16) {}
    fn go(&self, _right: i32, _down: i32) {}
    fn button(&self, _button: Button, _down: bool) {}
    fn wheel(&self, _away: i32, _right: i32) {}
    fn takes_places(&self) -> bool {
        true
    }
}

struct Since(Instant);

impl Clock for Since {
    fn now(&self) -> Duration {
        self.0.elapsed()
    }
}

/// Above, grey dots as close as text's; below, squares of 16 pixels in colours. Red, green and blue.
fn drawn(x: usize, y: usize) -> [u8; 3] {
    let level = |number: usize| u8::try_from(number % 256).unwrap();
    if y < HEIGHT / 2 {
        let dot = (x * 7919 + y * 104_729) % 13;
        return [level(if dot < 4 { 230 } else { 20 + dot }); 3];
    }
    let (column, row) = (x / 16, y / 16);
    [
        level(column * 12 + 10),
        level(row * 18 + 5),
        level(column * row + 90),
    ]
}

/// Whether a pixel is far enough from other colours that a JPEG with fewer samples of colour than of light keeps it.
fn is_kept(x: usize, y: usize) -> bool {
    let inside = |at: usize| (3..13).contains(&(at % 16));
    if y < HEIGHT / 2 {
        y < HEIGHT / 2 - 16
    } else {
        inside(x) && inside(y) && y >= HEIGHT / 2 + 16
    }
}

fn picture() -> Vec<u8> {
    let pixels = (0..WIDTH * HEIGHT).map(|at| drawn(at % WIDTH, at / WIDTH));
    pixels
        .flat_map(|[red, green, blue]| [blue, green, red, 0xee])
        .collect()
}

/// The viewer, where it is unpacked.
fn vncsnapshot() -> Option<(PathBuf, PathBuf)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/testbed/viewers/usr");
    let program = root.join("bin/vncsnapshot");
    let found = program.is_file();
    if !found {
        eprintln!("skipped: no {}; run `make setup`", program.display());
    }
    found.then(|| (program, root.join("lib/x86_64-linux-gnu")))
}

/// A password as the viewer keeps it in a file: enciphered with the key that all of its kind have.
fn kept_password(text: &str) -> [u8; 8] {
    let key = [23, 82, 107, 6, 35, 78, 88, 7_u8].map(u8::reverse_bits);
    let mut block = [0; 8];
    block[..text.len()].copy_from_slice(text.as_bytes());
    let mut block = block.into();
    Des::new(&key.into()).encrypt_block(&mut block);
    block.into()
}

/// Serves one viewer that is started with `arguments`, and returns the picture that it shows, or what it said instead.
fn seen(security: &Security, arguments: &[&str]) -> Option<Result<Vec<u8>, String>> {
    let (program, libraries) = vncsnapshot()?;
    let directory = tempfile::tempdir().unwrap();
    let (file, secret) = (
        directory.path().join("seen.jpg"),
        directory.path().join("secret"),
    );
    fs::write(&secret, kept_password("secret")).unwrap();
    let options = Options {
        name: "picture".into(),
        sharing: Sharing::default(),
        pastes: false,
    };
    let screen = Arc::new(Screen::new(Box::new(Still(picture()))));
    let clock = Arc::new(Since(Instant::now()));
    let server = Server::start(screen, Arc::new(Nobody), clock, options).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let child = Command::new("timeout")
        .arg("60")
        .arg(program)
        .env("LD_LIBRARY_PATH", libraries)
        .arg("-passwd")
        .arg(&secret)
        .args(arguments)
        // The viewer counts its ports from there.
        .arg(format!("127.0.0.1:{}", address.port() - 5900))
        .arg(&file)
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let security = security.clone();
    // Left to itself where the viewer never comes, which its output tells.
    std::thread::spawn(move || {
        while let Ok((stream, peer)) = listener.accept() {
            stream.set_nonblocking(true).unwrap();
            let stream = Box::new(stream);
            server.connect(stream, &security, peer.to_string()).unwrap();
        }
    });
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    if !output.status.success() {
        return Some(Err(said));
    }
    let bytes = fs::read(&file).unwrap();
    let mut decoder = jpeg_decoder::Decoder::new(bytes.as_slice());
    let pixels = decoder.decode().unwrap();
    let info = decoder.info().unwrap();
    assert_eq!(
        (usize::from(info.width), usize::from(info.height)),
        (WIDTH, HEIGHT)
    );
    Some(Ok(pixels))
}

fn assert_is_drawn(pixels: &[u8], near: u8, what: &[&str]) {
    for (at, pixel) in pixels.as_chunks::<3>().0.iter().enumerate() {
        let (x, y) = (at % WIDTH, at / WIDTH);
        let right = drawn(x, y);
        let close = pixel
            .iter()
            .zip(right)
            .all(|(one, other)| one.abs_diff(other) <= near);
        assert!(
            close || !is_kept(x, y),
            "{what:?}: {pixel:?} for {right:?} at {x}, {y}"
        );
    }
}

#[test]
fn vncsnapshot_shows_the_picture_by_each_encoding() {
    for encoding in ["raw", "hextile", "zrle", "tight"] {
        let arguments = ["-encodings", encoding, "-nojpeg"];
        let Some(seen) = seen(&Security::default(), &arguments) else {
            return;
        };
        assert_is_drawn(&seen.unwrap(), NEAR, &arguments);
    }
}

#[test]
fn vncsnapshot_shows_the_picture_by_tight_with_jpeg() {
    let arguments = ["-encodings", "tight copyrect", "-jpeg", "-vncQuality", "9"];
    let Some(seen) = seen(&Security::default(), &arguments) else {
        return;
    };
    assert_is_drawn(&seen.unwrap(), NEAR, &arguments);
}

#[test]
fn vncsnapshot_is_let_in_with_the_right_password_alone() {
    let security = |password| Security {
        password: Some(Password::new(password).unwrap()),
        tls: None,
    };
    let Some(right) = seen(&security("secret"), &["-encodings", "raw"]) else {
        return;
    };
    assert_is_drawn(&right.unwrap(), NEAR, &["-passwd"]);
    let wrong = seen(&security("other"), &["-encodings", "raw"]).unwrap();
    assert!(wrong.unwrap_err().contains("uthentication"));
}
