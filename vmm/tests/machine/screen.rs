//! The screen: what a guest draws is what a picture of it shows.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use api::client::ClientError;

use crate::support::{Collected, Served, can_run, until};

/// A guest that draws, and takes letters on its serial port.
struct Drawing {
    served: Served,
    serial: UnixStream,
    says: Collected,
}

/// A picture: its sides, and red, green and blue of each pixel.
#[derive(PartialEq, Eq)]
struct Picture {
    width: u32,
    height: u32,
    pixels: Vec<[u8; 3]>,
}

impl Drawing {
    fn start(display: &str) -> Self {
        let flags = ["--display", display, "--serial", "socket={dir}/serial"];
        let served = Served::start("screen", "", &flags);
        let path = served.path("serial");
        let serial = until("the serial port", || UnixStream::connect(&path).ok());
        let says = Collected::from(serial.try_clone().unwrap());
        Self {
            served,
            serial,
            says,
        }
    }

    fn types(&mut self, letter: &str) {
        self.serial.write_all(letter.as_bytes()).unwrap();
    }

    fn picture(&self) -> Picture {
        decoded(&self.served.client().screenshot().unwrap())
    }
}

fn decoded(file: &[u8]) -> Picture {
    let mut reader = png::Decoder::new(std::io::Cursor::new(file))
        .read_info()
        .unwrap();
    let mut bytes = vec![0; reader.output_buffer_size().unwrap()];
    let info = reader.next_frame(&mut bytes).unwrap();
    assert_eq!(info.color_type, png::ColorType::Rgb);
    bytes.truncate(info.buffer_size());
    Picture {
        width: info.width,
        height: info.height,
        pixels: bytes.as_chunks::<3>().0.to_vec(),
    }
}

/// What the guest draws.
fn drawn(width: u32, height: u32, seed: u32) -> Picture {
    let low = |value: u32| value.to_le_bytes()[0];
    let lines = (0..height).flat_map(|y| (0..width).map(move |x| (x, y)));
    let pixels = lines.map(|(x, y)| [low(x + seed), low(y * 3 + seed), low(x ^ y)]);
    Picture {
        width,
        height,
        pixels: pixels.collect(),
    }
}

fn assert_same(got: &Picture, wanted: &Picture, what: &str) {
    let sides = |picture: &Picture| (picture.width, picture.height);
    assert_eq!(sides(got), sides(wanted), "{what}");
    let differ = |(got, wanted): &(&[u8; 3], &[u8; 3])| got != wanted;
    let count = got.pixels.iter().zip(&wanted.pixels).filter(differ).count();
    assert_eq!(count, 0, "{what}: pixels that differ");
}

#[test]
fn a_picture_shows_what_the_guest_has_drawn() {
    if !can_run() {
        return;
    }
    let mut guest = Drawing::start("width=320,height=200");
    guest
        .says
        .wait_for("power-on=320x200 bits=32 enable=41 memory=c0000000\n");
    guest.says.wait_for("drawn seed=0 ");
    assert_same(&guest.picture(), &drawn(320, 200, 0), "at power-on");

    guest.types("m");
    guest.says.wait_for("drawn seed=0 640x480");
    assert_same(&guest.picture(), &drawn(640, 480, 0), "another mode");
    guest.types("d");
    guest.says.wait_for("drawn seed=1 640x480");
    assert_same(&guest.picture(), &drawn(640, 480, 1), "another picture");

    // A paused guest has a screen too.
    guest.served.client().pause().unwrap();
    assert_same(&guest.picture(), &drawn(640, 480, 1), "paused");
    guest.served.client().resume().unwrap();

    // 16 bits have less of each colour.
    guest.types("l");
    guest.says.wait_for("drawn seed=1 640x480 bits=16");
    let wanted = drawn(640, 480, 1);
    let got = guest.picture();
    let near = got.pixels.iter().zip(&wanted.pixels);
    let near = near.filter(|(got, wanted)| {
        got.iter()
            .zip(*wanted)
            .all(|(got, wanted)| got.abs_diff(*wanted) < 8)
    });
    assert_eq!(near.count(), wanted.pixels.len());
    guest.types("o");
    guest.says.wait_for("off\n");
    assert!(guest.picture().pixels.iter().all(|pixel| *pixel == [0; 3]));
}

#[test]
fn modes_that_nobody_can_have_harm_nobody() {
    if !can_run() {
        return;
    }
    let mut guest = Drawing::start("width=320,height=200");
    guest.says.wait_for("drawn");
    guest.types("h");
    for _ in 0..20 {
        guest.picture();
    }
    guest.says.wait_for("storm=10000\ndrawn seed=0 320x200");
    assert_same(&guest.picture(), &drawn(320, 200, 0), "after the storm");
}

#[test]
fn a_reset_clears_the_screen_and_a_reboot_too() {
    if !can_run() {
        return;
    }
    let mut guest = Drawing::start("width=320,height=200");
    guest.types("m");
    guest.says.wait_for("drawn seed=0 640x480");
    guest.served.client().reset().unwrap();
    let anew = "power-on=320x200 bits=32 enable=41 memory=c0000000\ndrawn seed=0 320x200 bits=32\n";
    guest.says.wait_for(&format!("640x480 bits=32\n{anew}"));
    assert_same(&guest.picture(), &drawn(320, 200, 0), "after a reset");
    guest.served.client().reboot().unwrap();
    guest.says.wait_for(&format!("{anew}{anew}"));
    assert_same(&guest.picture(), &drawn(320, 200, 0), "another machine");
}

#[test]
fn a_machine_without_a_screen_says_so() {
    if !can_run() {
        return;
    }
    let served = Served::start("screen", "", &["--serial", "null"]);
    let refused = served.client().screenshot().unwrap_err();
    let ClientError::Refused {
        status: 404, chain, ..
    } = &refused
    else {
        panic!("{refused:?}");
    };
    assert!(chain.concat().contains("--display"), "{chain:?}");
}

#[test]
fn the_verb_writes_a_file_or_to_its_output() {
    if !can_run() {
        return;
    }
    let mut guest = Drawing::start("width=320,height=200");
    guest.says.wait_for("drawn");
    let vireo = |file: &str| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_vireo"));
        command.arg("screenshot").arg("--api-socket");
        command.arg(guest.served.socket()).arg(file);
        command.output().unwrap()
    };
    let path = guest.served.path("a.png");
    let done = vireo(path.to_str().unwrap());
    assert!(done.status.success(), "{done:?}");
    let mut written = Vec::new();
    let mut file = std::fs::File::open(&path).unwrap();
    file.read_to_end(&mut written).unwrap();
    assert_same(&decoded(&written), &drawn(320, 200, 0), "the file");
    assert_same(
        &decoded(&vireo("-").stdout),
        &drawn(320, 200, 0),
        "the output",
    );
    let refused = vireo("/nowhere/a.png");
    assert_eq!(refused.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("FILE /nowhere/a.png"));
}
