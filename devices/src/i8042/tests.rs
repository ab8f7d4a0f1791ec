use super::*;
use crate::conformance::{self, Asked, Pulses};

struct Bench {
    device: I8042,
    keyboard: Arc<Pulses>,
    mouse: Arc<Pulses>,
    asked: Arc<Asked>,
}

impl Bench {
    fn new() -> Self {
        let (keyboard, mouse) = (Arc::new(Pulses::default()), Arc::new(Pulses::default()));
        let asked = Arc::new(Asked::default());
        let device = I8042::new(keyboard.clone(), mouse.clone(), asked.clone());
        Self {
            device,
            keyboard,
            mouse,
            asked,
        }
    }

    /// A controller with both ports on and their interrupts off, as between
    /// two commands of a driver that polls.
    fn quiet() -> Self {
        let bench = Bench::new();
        bench.configure(0x44);
        bench
    }

    fn status(&self) -> u8 {
        let mut data = [0xff];
        self.device.read(STATUS_COMMAND, &mut data);
        data[0]
    }

    fn data(&self) -> u8 {
        let mut data = [0xff];
        self.device.read(DATA, &mut data);
        data[0]
    }

    fn out(&self, byte: u8) {
        self.device.write(DATA, &[byte]);
    }

    fn command(&self, command: u8) {
        self.device.write(STATUS_COMMAND, &[command]);
    }

    fn configure(&self, command_byte: u8) {
        self.command(0x60);
        self.out(command_byte);
    }

    fn command_byte(&self) -> u8 {
        self.command(0x20);
        assert_eq!(self.status() & 0x21, 0x01);
        self.data()
    }

    /// Reads all that waits; bytes of the auxiliary port are marked by `0x100`.
    fn drain(&self) -> Vec<u16> {
        let mut bytes = Vec::new();
        while self.status() & 1 != 0 {
            let aux = u16::from(self.status() & 0x20) << 3;
            bytes.push(aux | u16::from(self.data()));
        }
        bytes
    }

    fn keyboard_says(&self, sent: &[u8]) -> Vec<u16> {
        for byte in sent {
            self.out(*byte);
        }
        self.drain()
    }

    fn mouse_says(&self, sent: &[u8]) -> Vec<u16> {
        for byte in sent {
            self.command(0xD4);
            self.out(*byte);
        }
        self.drain()
            .into_iter()
            .map(|byte| byte.checked_sub(0x100).expect("a byte of the keyboard"))
            .collect()
    }
}

#[test]
fn linuxs_controller_probe_finds_a_sane_controller() {
    let bench = Bench::new();
    assert!(bench.drain().is_empty(), "nothing to flush");
    assert_eq!(bench.status() & 0x10, 0x10, "keylock is off");
    let initial = bench.command_byte();
    assert_eq!(initial, 0x47);
    // Both ports and interrupts off.
    bench.configure(0x74);
    assert_eq!(bench.command_byte(), 0x74);
    bench.command(0xAA);
    assert_eq!(bench.data(), 0x55);
    bench.command(0xAB);
    assert_eq!(bench.data(), 0x00);
    bench.command(0xA9);
    assert_eq!(bench.data(), 0x00);
}

#[test]
fn linuxs_aux_probe_finds_a_working_port_and_no_multiplexer() {
    let bench = Bench::new();
    bench.configure(0x74);
    bench.command(0xD3);
    bench.out(0x5a);
    assert_eq!(bench.status() & 0x21, 0x21);
    assert_eq!(bench.data(), 0x5a);
    bench.command(0xA7);
    assert_eq!(bench.command_byte() & 0x20, 0x20);
    bench.command(0xA8);
    assert_eq!(bench.command_byte() & 0x20, 0);
    // A multiplexer would answer the last of these with its version.
    for magic in [0xf0, 0x56, 0xa4] {
        bench.command(0xD3);
        bench.out(magic);
        assert_eq!(bench.data(), magic);
    }
    // The test of the interrupt.
    bench.configure(0x56);
    assert_eq!(bench.mouse.take(), 0);
    bench.command(0xD3);
    bench.out(0xa5);
    assert_eq!((bench.mouse.take(), bench.status() & 0x21), (1, 0x21));
    assert_eq!(bench.data(), 0xa5);
}

#[test]
fn atkbds_probe_finds_a_translated_keyboard() {
    let bench = Bench::quiet();
    assert_eq!(bench.keyboard_says(&[0xF5]), [0xFA]);
    assert_eq!(bench.keyboard_says(&[0xF2]), [0xFA, 0xAB, 0x41]);
    assert_eq!(bench.keyboard_says(&[0xED, 0x00]), [0xFA, 0xFA]);
    assert_eq!(bench.keyboard_says(&[0xF3, 0x00]), [0xFA, 0xFA]);
    assert_eq!(bench.keyboard_says(&[0xF4]), [0xFA]);
    assert_eq!(bench.keyboard_says(&[0xFF]), [0xFA, 0xAA]);
}

#[test]
fn an_untranslated_keyboard_gives_its_own_codes() {
    let bench = Bench::new();
    bench.configure(0x04);
    assert_eq!(bench.keyboard_says(&[0xF2]), [0xFA, 0xAB, 0x83]);
    assert_eq!(bench.keyboard_says(&[0xF0, 0x00]), [0xFA, 0xFA, 0x02]);
    assert_eq!(
        bench.keyboard_says(&[0xF0, 0x01, 0xF0, 0x00]),
        [0xFA, 0xFA, 0xFA, 0xFA, 0x01]
    );
    assert_eq!(bench.keyboard_says(&[0xF0, 0x03]), [0xFA, 0xFE], "no set 3");
    assert_eq!(bench.keyboard_says(&[0xF6]), [0xFA]);
    assert_eq!(bench.keyboard_says(&[0xF0, 0x00]), [0xFA, 0xFA, 0x02]);
}

#[test]
fn the_keyboard_asks_again_for_what_it_does_not_know() {
    let bench = Bench::quiet();
    assert_eq!(bench.keyboard_says(&[0x00]), [0xFE]);
    assert_eq!(bench.keyboard_says(&[0xFB]), [0xFE]);
    assert_eq!(bench.keyboard_says(&[0xF0, 0x04]), [0xFA, 0xFE]);
    assert_eq!(bench.keyboard_says(&[0xEE]), [0xEE]);
    assert_eq!(bench.keyboard_says(&[0xFE]), [0xEE], "sent last");
    // A command in place of a parameter is a command.
    assert_eq!(bench.keyboard_says(&[0xED, 0xEE]), [0xFA, 0xEE]);
    assert_eq!(bench.keyboard_says(&[0x02]), [0xFE]);
}

#[test]
fn psmouses_probe_finds_a_mouse_with_a_wheel() {
    let bench = Bench::quiet();
    assert_eq!(bench.mouse_says(&[0xF2]), [0xFA, 0x00]);
    assert_eq!(bench.mouse_says(&[0xF5]), [0xFA]);
    assert_eq!(bench.mouse_says(&[0xFF]), [0xFA, 0xAA, 0x00]);
    // The knock that a wheel mouse answers with another identity.
    for rate in [200, 100, 80] {
        assert_eq!(bench.mouse_says(&[0xF3, rate]), [0xFA, 0xFA]);
    }
    assert_eq!(bench.mouse_says(&[0xF2]), [0xFA, 0x03]);
    // The knock of other extensions: a resolution four times, then status.
    for _ in 0..4 {
        assert_eq!(bench.mouse_says(&[0xE8, 0x00]), [0xFA, 0xFA]);
    }
    assert_eq!(bench.mouse_says(&[0xE9]), [0xFA, 0x00, 0x00, 80]);
    assert_eq!(bench.mouse_says(&[0xE1]), [0xFE]);
    for command in [0xF6, 0xE7, 0xEA, 0xF4] {
        assert_eq!(bench.mouse_says(&[command]), [0xFA]);
    }
    assert_eq!(bench.mouse_says(&[0xE9]), [0xFA, 0x30, 0x02, 100]);
    assert_eq!(bench.mouse_says(&[0xE6]), [0xFA]);
    assert_eq!(bench.mouse_says(&[0xE9]), [0xFA, 0x20, 0x02, 100]);
}

#[test]
fn the_mouse_wraps_and_reports_on_request() {
    let bench = Bench::quiet();
    assert_eq!(bench.mouse_says(&[0xEE]), [0xFA]);
    assert_eq!(bench.mouse_says(&[0xF2, 0x12]), [0xF2, 0x12]);
    assert_eq!(bench.mouse_says(&[0xEC]), [0xFA]);
    assert_eq!(bench.mouse_says(&[0xF0]), [0xFA]);
    assert_eq!(bench.mouse_says(&[0xEB]), [0xFA, 0x08, 0, 0]);
    assert_eq!(bench.mouse_says(&[0xE9]), [0xFA, 0x40, 0x02, 100]);
    assert_eq!(bench.mouse_says(&[0xE8, 0x04]), [0xFA, 0xFE]);
}

#[test]
fn each_byte_interrupts_once_on_the_line_of_its_port() {
    let bench = Bench::new();
    bench.configure(0x47);
    bench.out(0xF2);
    for byte in [0xFA, 0xAB, 0x41] {
        assert_eq!(bench.keyboard.take(), 1);
        assert_eq!(bench.data(), byte);
    }
    bench.command(0xD4);
    bench.out(0xF2);
    for byte in [0xFA, 0x00] {
        assert_eq!(bench.mouse.take(), 1);
        assert_eq!(bench.data(), byte);
    }
    assert_eq!((bench.keyboard.take(), bench.mouse.take()), (0, 0));
}

#[test]
fn enabling_an_interrupt_while_a_byte_waits_raises_it() {
    let bench = Bench::quiet();
    bench.out(0xEE);
    assert_eq!(bench.keyboard.take(), 0);
    bench.configure(0x45);
    assert_eq!(bench.keyboard.take(), 1);
    bench.configure(0x45);
    assert_eq!(bench.keyboard.take(), 0, "the line was high");
    assert_eq!(bench.data(), 0xEE);
}

#[test]
fn a_disabled_port_keeps_its_bytes_until_it_is_enabled() {
    let bench = Bench::quiet();
    bench.out(0xF2);
    bench.command(0xAD);
    assert_eq!(bench.data(), 0xFA);
    assert_eq!(bench.status() & 1, 0);
    bench.command(0xAE);
    assert_eq!(bench.drain(), [0xAB, 0x41]);
    // Writing to a device turns its port on.
    bench.configure(0x74);
    assert_eq!(bench.keyboard_says(&[0xEE]), [0xEE]);
    assert_eq!(bench.mouse_says(&[0xE6]), [0xFA]);
    assert_eq!(bench.command_byte(), 0x44);
}

#[test]
fn a_reply_comes_before_a_devices_byte_which_is_not_lost() {
    let bench = Bench::quiet();
    bench.out(0xF2);
    assert_eq!(bench.command_byte(), 0x44);
    bench.command(0xD4);
    bench.out(0xF2);
    assert_eq!(
        bench.drain(),
        [0xFA, 0xAB, 0x41, 0x1FA, 0x100],
        "keyboard first"
    );
    bench.command(0xD4);
    bench.out(0xF2);
    assert_eq!(bench.command_byte(), 0x44);
    assert_eq!(bench.drain(), [0x1FA, 0x100]);
}

#[test]
fn a_flood_of_commands_does_not_grow_the_queues() {
    let bench = Bench::quiet();
    for _ in 0..1000 {
        bench.out(0xF2);
        bench.command(0x20);
        bench.command(0xD4);
        bench.out(0xE9);
        bench.command(0x20);
    }
    bench.data();
    assert_eq!(bench.drain().len(), 32);
    assert_eq!(bench.keyboard_says(&[0xFF]), [0xFA, 0xAA]);
}

#[test]
fn only_a_pulse_or_a_low_level_of_bit_0_resets() {
    let bench = Bench::new();
    for (command, resets) in [(0xFE, true), (0xF0, true), (0xFF, false), (0xFD, false)] {
        bench.command(command);
        assert_eq!(!bench.asked.take().is_empty(), resets, "{command:#04x}");
    }
    for (port, resets) in [(0xFE, true), (0x01, false), (0xDF, false)] {
        bench.command(0xD1);
        bench.out(port);
        let expected: &[GuestRequest] = if resets { &[GuestRequest::Reset] } else { &[] };
        assert_eq!(bench.asked.take(), expected, "{port:#04x}");
    }
}

#[test]
fn the_output_port_shows_who_fills_the_buffer() {
    let bench = Bench::quiet();
    let port = || {
        bench.command(0xD0);
        bench.data()
    };
    assert_eq!(port(), 0x03);
    bench.out(0xEE);
    assert_eq!(port(), 0x13);
    bench.drain();
    bench.command(0xD3);
    bench.out(0);
    assert_eq!(port(), 0x23);
    bench.command(0xD1);
    bench.out(0xFD);
    assert_eq!(port(), 0xCD);
}

#[test]
fn status_tells_a_command_from_data() {
    let bench = Bench::new();
    bench.command(0xD2);
    assert_eq!(bench.status(), 0x1c);
    bench.out(0x12);
    assert_eq!(bench.status(), 0x15);
    assert_eq!(bench.data(), 0x12);
}

#[test]
fn a_command_in_place_of_a_parameter_is_a_command() {
    let bench = Bench::quiet();
    bench.command(0x60);
    bench.command(0xAE);
    assert_eq!(bench.keyboard_says(&[0xEE]), [0xEE]);
    assert_eq!(bench.command_byte(), 0x44);
}

#[test]
fn port_b_shows_no_nmi_and_a_finished_timer() {
    let bench = Bench::new();
    let mut data = [0xff];
    bench.device.write(PORT_B, &[0]);
    bench.device.read(PORT_B, &mut data);
    assert_eq!(data, [0x20]);
}

#[test]
fn a_restored_controller_goes_on_with_its_bytes_and_interrupts() {
    let bench = Bench::quiet();
    bench.configure(0x45);
    bench.out(0xF2);
    let mut set = SectionSet::default();
    set.push(bench.device.save().unwrap().remove(0));
    let copy = Bench::new();
    copy.device.restore(&mut set).unwrap();
    copy.command(0xAE);
    assert_eq!(copy.keyboard.take(), 0, "the edge was before");
    assert_eq!(copy.data(), 0xFA);
    assert_eq!(copy.keyboard.take(), 1);
    assert_eq!(copy.drain(), [0xAB, 0x41]);
}

#[test]
fn any_access_is_answered_and_state_round_trips() {
    conformance::check(5, || Bench::new().device);
}

#[test]
fn state_that_no_controller_is_in_is_refused() {
    let device = Bench::new().device;
    let good = device.controller().save().unwrap();
    let refused = |why: &str, change: fn(&mut I8042V1)| {
        let mut state = good.clone();
        change(&mut state);
        conformance::assert_refused(&device, &state, why);
    };
    refused("interrupt lines", |s| s.output_port = 0x13);
    refused("LEDs", |s| s.keyboard.leds = 8);
    refused("scan set", |s| s.keyboard.scan_set = 0);
    refused("queue", |s| s.keyboard.queue = vec![0; 19]);
    refused("queue with a byte out", |s| {
        s.keyboard.queue = vec![0; 17];
        s.output = Some(Output {
            byte: 0,
            source: Source::Keyboard,
            released: false,
        });
    });
    refused("resolution", |s| s.mouse.resolution = 4);
}

#[test]
fn keys_are_translated_as_firmware_leaves_it() {
    let bench = Bench::new();
    bench.device.key(30, true);
    assert_eq!(bench.keyboard.take(), 1);
    bench.device.key(30, false);
    bench.device.key(105, true);
    bench.device.key(105, false);
    assert_eq!(bench.drain(), [0x1e, 0x9e, 0xe0, 0x4b, 0xe0, 0xcb]);
    bench.configure(0x05);
    bench.device.key(30, true);
    bench.device.key(30, false);
    assert_eq!(bench.drain(), [0x1c, 0xf0, 0x1c], "set 2");
}

#[test]
fn a_release_that_a_reply_displaces_is_not_lost() {
    let bench = Bench::quiet();
    bench.device.key(30, true);
    bench.device.key(30, false);
    assert_eq!(bench.data(), 0x1e);
    // The released key's byte is in the output buffer when the reply comes.
    assert_eq!(bench.command_byte(), 0x44);
    assert_eq!(bench.drain(), [0x9e]);
}

#[test]
fn a_keyboard_that_nobody_reads_tells_in_the_end_what_is_down() {
    let bench = Bench::quiet();
    for code in (2..60).chain(2..59) {
        bench.device.key(code, true);
    }
    for code in 2..59 {
        bench.device.key(code, false);
    }
    let mut down = std::collections::BTreeSet::new();
    for byte in bench.drain() {
        if byte & 0x80 == 0 {
            down.insert(byte);
        } else {
            down.remove(&(byte & 0x7f));
        }
    }
    assert_eq!(down.into_iter().collect::<Vec<_>>(), [59]);
}

#[test]
fn a_text_loses_no_letter_however_slowly_it_is_read() {
    let bench = Bench::new();
    let stroke = |code| [(code, true), (code, false)];
    let text: Vec<(u16, bool)> = (0..200)
        .flat_map(|_| [30, 30, 105].map(stroke))
        .flatten()
        .collect();
    let unused = Err(InputError::Unused(InputKind::Keyboard));
    assert_eq!(bench.device.type_keys(&text), unused);
    assert!(!bench.device.is_used());
    bench.command_byte();
    assert!(bench.device.is_used());
    bench.device.type_keys(&text).unwrap();
    let mut expected = Vec::new();
    for _ in 0..200 {
        expected.extend([0x1e, 0x9e, 0x1e, 0x9e, 0xe0, 0x4b, 0xe0, 0xcb]);
    }
    let read = std::iter::from_fn(|| (bench.status() & 1 != 0).then(|| bench.data()));
    assert_eq!(read.collect::<Vec<u8>>(), expected);
}

#[test]
fn what_is_typed_is_bounded_and_forgotten_with_the_keyboards_reset() {
    let bench = Bench::new();
    bench.command_byte();
    let many = [(30, true), (30, false)].repeat(2040);
    bench.device.type_keys(&many).unwrap();
    let full = Err(InputError::Full(InputKind::Keyboard));
    assert_eq!(bench.device.type_keys(&[(31, true); 200]), full);
    bench.out(0xf5);
    assert_eq!(
        bench.device.type_keys(&[]),
        Err(InputError::Unused(InputKind::Keyboard))
    );
    while bench.status() & 1 != 0 {
        bench.data();
    }
    bench.out(0xf4);
    assert_eq!((bench.data(), bench.status() & 1), (0xfa, 0));
    bench.device.type_keys(&many).unwrap();
}

#[test]
fn keys_do_nothing_while_the_keyboard_does_not_scan() {
    let bench = Bench::quiet();
    bench.device.key(42, true);
    assert_eq!(bench.keyboard_says(&[0xf5])[..2], [0x2a, 0xfa]);
    bench.device.key(30, true);
    bench.device.key(42, false);
    assert_eq!(bench.keyboard_says(&[0xf4]), [0xfa]);
    bench.device.key(31, true);
    assert_eq!(bench.drain(), [0x1f]);
}

#[test]
fn a_mouse_reports_what_it_does_once_it_is_asked_to() {
    let bench = Bench::quiet();
    bench.device.point(5, 5, 0, 1);
    assert_eq!(bench.drain(), [0; 0]);
    let said = bench.mouse_says(&[0xf4]);
    assert_eq!(said, [0xfa, 0x09, 0, 0], "the button is down");
    bench.device.point(-3, 4, 1, 0);
    assert_eq!(bench.drain(), [0x138, 0x1fd, 0x1fc]);
    bench.device.point(300, 0, 0, 4);
    assert_eq!(bench.drain(), [0x10c, 0x1ff, 0x100, 0x10c, 0x12d, 0x100]);
}

#[test]
fn the_wheel_turns_where_the_driver_has_knocked() {
    let bench = Bench::quiet();
    bench.mouse_says(&[0xf3, 200, 0xf3, 100, 0xf3, 80]);
    assert_eq!(bench.mouse_says(&[0xf2]), [0xfa, 0x03]);
    bench.mouse_says(&[0xf4]);
    bench.device.point(0, 0, -1, 0);
    assert_eq!(bench.drain(), [0x108, 0x100, 0x100, 0x1ff]);
    bench.mouse_says(&[0xff]);
    assert_eq!(bench.mouse_says(&[0xf2]), [0xfa, 0x00], "after a reset");
}

#[test]
fn what_is_held_is_let_go_by_a_restore() {
    let bench = Bench::quiet();
    bench.mouse_says(&[0xf4]);
    bench.device.key(30, true);
    bench.device.point(0, 0, 0, 1);
    bench.drain();
    let mut set = SectionSet::default();
    set.push(bench.device.save().unwrap().remove(0));
    let copy = Bench::new();
    copy.device.restore(&mut set).unwrap();
    copy.device.key(31, true);
    assert_eq!(copy.drain(), [0x9e, 0x1f, 0x108, 0x100, 0x100]);
}
