//! The screen: what a guest draws is what a picture of it shows.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::Command;

use api::client::{Client, ClientError};
use api::wire::{VmInfoState, VmRemoveDevice, VmSnapshotConfig};
use api::{Command as Ask, Control, Reply};
use devices::display::rfb::Password;
use serde_json::json;

use crate::snapshots::{url, vireo};
use crate::support::{Collected, Local, Served, can_run, config, until};

/// A guest that draws, and takes letters on its serial port.
pub struct Drawing {
    pub served: Served,
    serial: UnixStream,
    pub says: Collected,
}

/// A picture: its sides, and red, green and blue of each pixel.
#[derive(PartialEq, Eq)]
pub struct Picture {
    width: u32,
    height: u32,
    pixels: Vec<[u8; 3]>,
}

impl Drawing {
    pub fn start(display: &str) -> Self {
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

    pub fn types(&mut self, letter: &str) {
        self.serial.write_all(letter.as_bytes()).unwrap();
    }

    pub fn picture(&self) -> Picture {
        decoded(&self.served.client().screenshot().unwrap())
    }
}

pub fn decoded(file: &[u8]) -> Picture {
    let mut reader = png::Decoder::new(std::io::Cursor::new(file))
        .read_info()
        .unwrap();
    let mut bytes = vec![0; reader.output_buffer_size().unwrap()];
    let info = reader.next_frame(&mut bytes).unwrap();
    bytes.truncate(info.buffer_size());
    let pixels = match info.color_type {
        png::ColorType::Rgb => bytes.as_chunks::<3>().0.to_vec(),
        // Viewers from packages write so, and none of it is seen through.
        png::ColorType::Rgba => {
            let pixels = bytes.as_chunks::<4>().0.iter();
            pixels
                .map(|&[red, green, blue, _]| [red, green, blue])
                .collect()
        }
        other => panic!("a picture of {other:?}"),
    };
    Picture {
        width: info.width,
        height: info.height,
        pixels,
    }
}

impl Picture {
    /// A part of it.
    pub fn part(&self, x: u32, y: u32, width: u32, height: u32) -> Self {
        let lines = (y..y + height).map(|y| (y * self.width + x) as usize);
        let pixels = lines.flat_map(|from| &self.pixels[from..from + width as usize]);
        Self {
            width,
            height,
            pixels: pixels.copied().collect(),
        }
    }
}

/// What the guest draws.
pub fn drawn(width: u32, height: u32, seed: u32) -> Picture {
    let low = |value: u32| value.to_le_bytes()[0];
    let lines = (0..height).flat_map(|y| (0..width).map(move |x| (x, y)));
    let pixels = lines.map(|(x, y)| [low(x + seed), low(y * 3 + seed), low(x ^ y)]);
    Picture {
        width,
        height,
        pixels: pixels.collect(),
    }
}

pub fn assert_same(got: &Picture, wanted: &Picture, what: &str) {
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
    guest.says.wait_for("drawn seed=0 640x480 bits=32\n");
    assert_same(&guest.picture(), &drawn(640, 480, 0), "another mode");
    guest.types("d");
    guest.says.wait_for("drawn seed=1 640x480 bits=32\n");
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
    for _ in 0..5 {
        guest.picture();
    }
    guest.says.wait_for("storm=500\ndrawn seed=0 320x200");
    assert_same(&guest.picture(), &drawn(320, 200, 0), "after the storm");
}

#[test]
fn a_reset_clears_the_screen_and_a_reboot_too() {
    if !can_run() {
        return;
    }
    let mut guest = Drawing::start("width=320,height=200");
    guest.types("m");
    guest.says.wait_for("drawn seed=0 640x480 bits=32\n");
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
    let served = Served::start("screen", "stay", &["--serial", "null"]);
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
        let mut command = Command::new(env!("CARGO_BIN_EXE_vireo"));
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

/// What a viewer talks through.
pub trait Wire: Read + Write + Send {}
impl<T: Read + Write + Send> Wire for T {}

/// A viewer that knows as much of the protocol as it must (RFC 6143).
pub struct Viewer {
    stream: Box<dyn Wire>,
    width: u32,
    height: u32,
}

impl Viewer {
    /// Connects, chooses a security type, and proves that it knows `password`.
    pub fn connect(guest: &Drawing, password: Option<&str>) -> Result<Self, String> {
        let mut viewer = Self::greeting(guest);
        viewer.choose(if password.is_some() { 2 } else { 1 });
        viewer.enter(password)
    }

    /// Has connected, and nothing more.
    pub fn greeting(guest: &Drawing) -> Self {
        let stream = UnixStream::connect(guest.served.path("vnc")).unwrap();
        stream
            .set_read_timeout(Some(crate::support::LIMIT))
            .unwrap();
        Self::over(Box::new(stream))
    }

    /// The same by another way.
    pub fn over(stream: Box<dyn Wire>) -> Self {
        Self {
            stream,
            width: 0,
            height: 0,
        }
    }

    /// Chooses the one security type that is offered.
    pub fn choose(&mut self, wanted: u8) {
        assert_eq!(&self.hear::<12>(), b"RFB 003.008\n");
        self.say(b"RFB 003.008\n");
        let count = usize::from(self.hear::<1>()[0]);
        assert_eq!(self.hear_all(count), [wanted]);
        self.say(&[wanted]);
    }

    /// Talks through another stream from now on.
    pub fn inside(self, wrap: impl FnOnce(Box<dyn Wire>) -> Box<dyn Wire>) -> Self {
        Self {
            stream: wrap(self.stream),
            ..self
        }
    }

    /// Proves that it knows `password`, and is told how the screen is.
    pub fn enter(self, password: Option<&str>) -> Result<Self, String> {
        let mut viewer = self;
        if let Some(password) = password {
            let challenge = viewer.hear::<16>();
            let answer = Password::new(password).unwrap().answer(&challenge);
            viewer.say(&answer);
        }
        if viewer.hear::<4>() != [0; 4] {
            let len = u32::from_be_bytes(viewer.hear()) as usize;
            return Err(String::from_utf8(viewer.hear_all(len)).unwrap());
        }
        viewer.say(&[1]);
        let [a, b, c, d] = viewer.hear::<4>();
        viewer.width = u16::from_be_bytes([a, b]).into();
        viewer.height = u16::from_be_bytes([c, d]).into();
        viewer.hear::<16>();
        let len = u32::from_be_bytes(viewer.hear()) as usize;
        assert_eq!(viewer.hear_all(len), b"vireo");
        // Pixels of 32 bits, little-endian, red at 16; Raw and DesktopSize.
        let format = [32, 24, 0, 1, 0, 255, 0, 255, 0, 255, 16, 8, 0, 0, 0, 0];
        viewer.say(&[&[0, 0, 0, 0][..], &format].concat());
        viewer.say(&[2, 0, 0, 2, 0, 0, 0, 0, 255, 255, 255, 0x21]);
        Ok(viewer)
    }

    /// Whether the other end has said in TLS that it wants none of this viewer.
    pub fn is_refused(&mut self) -> bool {
        let heard = self.stream.read(&mut [0; 4]);
        heard.is_err_and(|error| error.kind() == std::io::ErrorKind::InvalidData)
    }

    pub fn say(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    pub fn hear<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        self.stream.read_exact(&mut bytes).unwrap();
        bytes
    }

    pub fn hear_all(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.stream.read_exact(&mut bytes).unwrap();
        bytes
    }

    pub fn key(&mut self, symbol: u32) {
        for down in [1, 0] {
            let [a, b, c, d] = symbol.to_be_bytes();
            self.say(&[4, down, 0, 0, a, b, c, d]);
        }
    }

    /// Takes updates into a picture until it is as wanted. The first asks for all.
    pub fn sees(&mut self, wanted: &Picture, what: &str) {
        let mut picture = self.black();
        let mut changes = 0;
        loop {
            let [a, b] = u16::try_from(self.width).unwrap().to_be_bytes();
            let [c, d] = u16::try_from(self.height).unwrap().to_be_bytes();
            self.say(&[3, changes, 0, 0, 0, 0, a, b, c, d]);
            changes = 1;
            self.update(&mut picture);
            if picture == *wanted {
                return;
            }
            assert_eq!(wanted.width % 2, 0, "{what}");
        }
    }

    fn black(&self) -> Picture {
        Picture {
            width: self.width,
            height: self.height,
            pixels: vec![[0; 3]; (self.width * self.height) as usize],
        }
    }

    fn update(&mut self, picture: &mut Picture) {
        let [kind, _, high, low] = self.hear::<4>();
        assert_eq!(kind, 0, "an update");
        for _ in 0..u16::from_be_bytes([high, low]) {
            let place = self.hear::<8>();
            let [x, y, width, height] =
                [0, 2, 4, 6].map(|at| u32::from(u16::from_be_bytes([place[at], place[at + 1]])));
            match i32::from_be_bytes(self.hear()) {
                0 => {
                    let bytes = self.hear_all((width * height * 4) as usize);
                    let places = (y..y + height).flat_map(|y| (x..x + width).map(move |x| (x, y)));
                    for ((x, y), pixel) in places.zip(bytes.as_chunks::<4>().0) {
                        let [blue, green, red, _] = *pixel;
                        picture.pixels[(y * picture.width + x) as usize] = [red, green, blue];
                    }
                }
                -223 => {
                    (self.width, self.height) = (width, height);
                    *picture = self.black();
                }
                other => panic!("encoding {other}"),
            }
        }
    }
}

#[test]
fn a_viewer_sees_what_the_guest_draws_and_types_into_it() {
    if !can_run() {
        return;
    }
    let mut guest = Drawing::start("width=320,height=200,vnc=unix:{dir}/vnc");
    guest.says.wait_for("drawn");
    let mut viewer = Viewer::connect(&guest, None).unwrap();
    viewer.sees(&drawn(320, 200, 0), "at first");
    guest.types("d");
    viewer.sees(&drawn(320, 200, 1), "another picture");
    guest.types("m");
    viewer.sees(&drawn(640, 480, 1), "another mode");

    viewer.key(u32::from('a'));
    guest.says.wait_for("key=1e\nkey=9e\n");
    // Ctrl, Alt and Delete, of which the last comes behind E0.
    viewer.key(0xffff);
    guest.says.wait_for("key=e0\nkey=53\nkey=e0\nkey=d3\n");
    // The left button at a place.
    viewer.say(&[5, 1, 0, 10, 0, 10]);
    guest.says.wait_for("mouse=09\n");
    // A key that is held is let go when its viewer goes.
    viewer.say(&[4, 1, 0, 0, 0, 0, 0, b'b']);
    guest.says.wait_for("key=30\n");
    drop(viewer);
    guest.says.wait_for("key=b0\n");

    // Whoever comes again sees the same; the machine's end is theirs.
    let mut viewer = Viewer::connect(&guest, None).unwrap();
    viewer.sees(&drawn(640, 480, 1), "again");
    guest.types("q");
    guest.served.vireo.ends_with(0);
    assert!(!guest.served.path("vnc").exists());
}

#[test]
fn a_viewer_that_does_not_know_the_password_sees_nothing() {
    if !can_run() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("password");
    std::fs::write(&file, "secret\nand more\n").unwrap();
    let display = format!(
        "width=320,height=200,vnc=unix:{{dir}}/vnc,vnc_password_file={}",
        file.display()
    );
    let mut guest = Drawing::start(&display);
    guest.says.wait_for("drawn");
    assert!(Viewer::connect(&guest, Some("Secret")).is_err());
    let mut viewer = Viewer::connect(&guest, Some("secret")).unwrap();
    viewer.sees(&drawn(320, 200, 0), "with the password");
}

#[test]
fn a_viewer_stays_over_a_reboot() {
    if !can_run() {
        return;
    }
    let mut guest = Drawing::start("width=320,height=200,vnc=unix:{dir}/vnc");
    guest.types("d");
    guest.says.wait_for("drawn seed=1 320x200 bits=32\n");
    let mut viewer = Viewer::connect(&guest, None).unwrap();
    viewer.sees(&drawn(320, 200, 1), "before");
    guest.served.client().reboot().unwrap();
    viewer.sees(&drawn(320, 200, 0), "after");
}

#[test]
fn a_password_that_is_none_is_the_users_fault() {
    if !can_run() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("password");
    for (text, part) in [("", "is empty"), ("ninebytes", "9 bytes")] {
        std::fs::write(&file, text).unwrap();
        let display = format!("vnc=:1,vnc_password_file={}", file.display());
        let arguments = crate::support::run_arguments("screen", "", &["--display", &display]);
        let mut command = Command::new(env!("CARGO_BIN_EXE_vireo"));
        let output = command.args(arguments).output().unwrap();
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(told.contains(part), "{told}");
    }
}

#[test]
fn the_viewers_door_is_closed_with_the_description() {
    if !can_run() {
        return;
    }
    let display = "vnc=unix:{dir}/vnc";
    let flags = ["--display", display, "--serial", "null", "--no-shutdown"];
    let served = Served::start("screen", "", &flags);
    let door = served.path("vnc");
    assert!(door.exists());
    served.client().shutdown().unwrap();
    assert!(door.exists(), "for the next boot");
    served.client().delete().unwrap();
    assert!(!door.exists());
}

#[test]
fn the_verb_send_key_types_on_the_guests_keyboard() {
    if !can_run() {
        return;
    }
    let flags = [
        "--display",
        "width=640,height=480,input=off",
        "--serial",
        "tty",
    ];
    let mut machine = Served::start("screen", "", &flags);
    machine.vireo.stdout.wait_for("drawn seed=0");
    let socket = machine.socket();
    let send = |words: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vireo"));
        command.args(["send-key", "--api-socket"]).arg(&socket);
        command.args(words).output().unwrap()
    };
    let sent = send(&["a"]);
    assert!(sent.status.success(), "{sent:?}");
    machine.vireo.stdout.wait_for("key=1e\n");
    machine.vireo.stdout.wait_for("key=9e\n");
    let sent = send(&["--text", "Z"]);
    assert!(sent.status.success(), "{sent:?}");
    for code in ["2a", "2c", "ac", "aa"] {
        machine.vireo.stdout.wait_for(&format!("key={code}\n"));
    }
    let refused = send(&["nosuchkey"]);
    let told = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(
        !refused.status.success() && told.contains("nosuchkey"),
        "{told}"
    );
}

#[test]
fn a_keyboard_and_a_tablet_that_were_taken_out_stay_away_over_a_reboot() {
    if !can_run() {
        return;
    }
    let more = json!({ "display": {} });
    let machine = Local::boot(&config("poke", "spin", more));
    let inputs = || {
        let devices = machine.handle.devices().unwrap();
        let there = devices
            .iter()
            .filter(|device| device.id.starts_with("__") && device.bdf.is_some());
        let config = machine.handle.info().unwrap().config;
        (there.count(), config.display.unwrap().input)
    };
    assert_eq!(inputs(), (2, true));
    for (id, left) in [("__keyboard", (1, true)), ("__tablet", (0, false))] {
        let removal = VmRemoveDevice { id: id.to_owned() };
        assert_eq!(machine.ask(Ask::RemoveDevice(removal)), Ok(Reply::Done));
        // The guest hears of nothing, and so keeps it for its life.
        assert_eq!(machine.ask(Ask::Reboot), Ok(Reply::Done));
        until("its end", || (inputs() == left).then_some(()));
        assert_eq!(machine.ask(Ask::Reboot), Ok(Reply::Done));
        assert_eq!(inputs(), left);
    }
}

#[test]
fn a_viewer_of_a_restored_machine_sees_the_screen_that_was_saved() {
    if !can_run() {
        return;
    }
    let mut guest = Drawing::start("width=320,height=200,vnc=unix:{dir}/vnc");
    guest.types("md");
    guest.says.wait_for("drawn seed=1 640x480 bits=32\n");
    let mut viewer = Viewer::connect(&guest, None).unwrap();
    viewer.sees(&drawn(640, 480, 1), "before");
    let directory = guest.served.path("s");
    let to = VmSnapshotConfig::of(url(&directory));
    guest.served.client().snapshot(&to).unwrap();
    guest.types("q");
    guest.served.vireo.ends_with(0);

    let socket = guest.served.socket();
    let place = format!("{},resume=off", directory.display());
    let words = ["run", "--restore", &place, "--api-socket"];
    guest.served.vireo = vireo(&[&words[..], &[socket.to_str().unwrap()]].concat());
    until("the machine", || {
        let info = Client::connect(&socket).ok()?.info().ok()?;
        (info.state == VmInfoState::Paused).then_some(())
    });
    assert_same(&guest.picture(), &drawn(640, 480, 1), "paused");
    let mut viewer = Viewer::connect(&guest, None).unwrap();
    viewer.sees(&drawn(640, 480, 1), "the viewer's");
    guest.serial = UnixStream::connect(guest.served.path("serial")).unwrap();
    guest.says = Collected::from(guest.serial.try_clone().unwrap());
    guest.served.client().resume().unwrap();
    guest.types("d");
    guest.says.wait_for("drawn seed=2 640x480 bits=32\n");
    viewer.sees(&drawn(640, 480, 2), "what is drawn on");
    viewer.key(u32::from('a'));
    guest.says.wait_for("key=1e\nkey=9e\n");
}
