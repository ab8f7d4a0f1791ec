use std::sync::mpsc::Receiver;

use devices::input::{Axis, InputError, Key};
use serde_json::json;

use super::*;
use crate::memory::GuestMemory;
use crate::testing::{DATA, Driver, END, Notice, memory, reset_reason, soon, start};

fn key(name: &str, down: bool) -> InputEvent {
    InputEvent::key(Key::from_name(name).unwrap(), down)
}

/// What configuration space says: the length of the answer, and the answer.
fn ask(device: &mut Input, select: u8, subsel: u8) -> Vec<u8> {
    device.write_config(0, &[select, subsel]);
    let mut space = [0xff; 140];
    device.read_config(0, &mut space);
    assert_eq!(space[..2], [select, subsel]);
    assert_eq!(space[3..8], [0; 5]);
    assert_eq!(space[136..], [0; 4]);
    let len = usize::from(space[2]);
    assert!(space[8 + len..136].iter().all(|byte| *byte == 0));
    space[8..8 + len].to_vec()
}

const NOTHING: [u8; 0] = [];

fn bit(bits: &[u8], code: u16) -> bool {
    let byte = bits.get(usize::from(code / 8)).copied();
    byte.unwrap_or(0) >> (code % 8) & 1 == 1
}

struct Rig {
    device: Input,
    events: Driver,
    status: Driver,
    notices: Receiver<Notice>,
}

fn rig(kind: InputKind, size: u16) -> Rig {
    let memory: GuestMemory = memory();
    let events = Driver::new(&memory, 0, size);
    let status = Driver::new(&memory, 1, 8);
    let mut device = Input::new("kbd0", kind, "");
    let queues = vec![events.activate(), status.activate()];
    let notices = start(&mut device, 0, &memory, queues);
    Rig {
        device,
        events,
        status,
        notices,
    }
}

impl Rig {
    /// Gives the device `count` buffers of one event, of which the first is at `DATA + 8 * first`.
    fn offer(&mut self, first: u64, count: u64) {
        for place in first..first + count {
            self.events.offer(&[(DATA + 8 * place, 8, true)]);
        }
        self.events.kick();
    }

    /// The events in the next `count` buffers that come back.
    fn told(&mut self, count: usize) -> Vec<(u16, u16, u32)> {
        let mut told = Vec::new();
        for _ in 0..count {
            let (head, len) = self.events.wait(&self.notices);
            assert_eq!(len, 8);
            let at: u64 = self.events.get(self.events.table() + 16 * u64::from(head));
            let driver = &self.events;
            told.push((driver.get(at), driver.get(at + 2), driver.get(at + 4)));
        }
        told
    }
}

#[test]
fn configuration_space_answers_what_it_is_asked() {
    let mut keyboard = Input::new("kbd0", InputKind::Keyboard, "A-1");
    assert_eq!(ask(&mut keyboard, 1, 0), b"Vireo keyboard");
    assert_eq!(ask(&mut keyboard, 2, 0), b"A-1");
    assert_eq!(ask(&mut keyboard, 3, 0), [6, 0, 0xf4, 0x1a, 1, 0, 1, 0]);
    assert_eq!(ask(&mut keyboard, 0x10, 0), NOTHING);
    let keys = ask(&mut keyboard, 0x11, 1);
    assert!(bit(&keys, 30) && bit(&keys, 127) && !bit(&keys, 0) && !bit(&keys, 0x110));
    assert_eq!(ask(&mut keyboard, 0x11, 17), [7]);
    assert_eq!(ask(&mut keyboard, 0x11, 20), [3]);
    assert_eq!(ask(&mut keyboard, 0x11, 3), NOTHING);
    let mut tablet = Input::new("tab0", InputKind::Tablet, "");
    assert_eq!(ask(&mut tablet, 2, 0), NOTHING);
    assert_eq!(ask(&mut tablet, 0x10, 0), [1]);
    assert_eq!(ask(&mut tablet, 0x11, 3), [3]);
    assert_eq!(ask(&mut tablet, 0x11, 20), NOTHING);
    let range = [0_u32, 0x7fff, 0, 0, 0].map(u32::to_le_bytes).concat();
    assert_eq!(ask(&mut tablet, 0x12, 1), range);
    assert_eq!(ask(&mut tablet, 0x12, 2), NOTHING);
    let mut mouse = Input::new("mouse0", InputKind::Mouse, "");
    assert_eq!(ask(&mut mouse, 0x11, 2), [0x43, 1]);
    assert!(bit(&ask(&mut mouse, 0x11, 1), 0x110));
    for (select, subsel) in [(0, 0), (4, 0), (1, 1), (0x11, 0), (0x11, 255), (255, 255)] {
        assert_eq!(
            ask(&mut mouse, select, subsel),
            NOTHING,
            "{select} {subsel}"
        );
    }
}

#[test]
fn only_the_question_can_be_written() {
    let mut device = Input::new("kbd0", InputKind::Keyboard, "");
    device.write_config(0, &[0xff; 200]);
    assert_eq!(ask(&mut device, 1, 0), b"Vireo keyboard");
    device.write_config(2, &[7; 8]);
    device.write_config(u64::MAX, &[7; 8]);
    let mut name = [0; 14];
    device.read_config(8, &mut name);
    assert_eq!(&name, b"Vireo keyboard");
    device.reset();
    device.read_config(0, &mut name);
    assert_eq!(name, [0; 14]);
}

#[test]
fn a_report_reaches_the_driver_whole() {
    let mut rig = rig(InputKind::Mouse, 16);
    let queue = rig.device.input().unwrap();
    rig.offer(0, 2);
    // Two buffers are too few for three events.
    let step = [
        InputEvent::moved(Axis::X, -2),
        InputEvent::moved(Axis::Y, 3),
    ];
    queue.send(&step).unwrap();
    rig.events.kick_and_wait();
    assert_eq!(rig.events.used_index(), 0);
    rig.offer(2, 1);
    let told = rig.told(3);
    assert_eq!(told, [(2, 0, 0xffff_fffe), (2, 1, 3), (0, 0, 0)]);
    let counters = rig.device.counters().unwrap().read();
    assert!(counters.contains(&("reports", 1)) && counters.contains(&("lost_reports", 0)));
}

#[test]
fn what_waits_survives_a_stop_with_the_drivers_buffers() {
    let mut rig = rig(InputKind::Keyboard, 16);
    let queue = rig.device.input().unwrap();
    rig.offer(0, 1);
    queue.send(&[key("a", true)]).unwrap();
    rig.events.kick_and_wait();
    let stopped = rig.device.stop(soon()).unwrap();
    let refused = Err(InputError::Unused(InputKind::Keyboard));
    assert_eq!(queue.send(&[key("a", false)]), refused);
    let saved = rig.device.save().unwrap();
    assert_eq!((saved.reports.len(), &saved.down[..]), (1, &[30][..]));
    let mut other = Input::new("kbd0", InputKind::Keyboard, "");
    other.restore(saved).unwrap();
    let queues = stopped.into_iter().map(Driver::reactivate).collect();
    rig.notices = start(&mut other, 0, &rig.events.memory, queues);
    rig.device = other;
    rig.offer(1, 3);
    // Nobody holds the key on this side.
    let told = rig.told(4);
    assert_eq!(told, [(1, 30, 1), (0, 0, 0), (1, 30, 0), (0, 0, 0)]);
}

#[test]
fn buffers_that_hold_no_event_come_back_empty() {
    let mut rig = rig(InputKind::Keyboard, 16);
    let queue = rig.device.input().unwrap();
    for bad in [(DATA, 8, false), (DATA, 7, true), (DATA, 0, true)] {
        rig.events.offer(&[bad]);
    }
    rig.offer(1, 2);
    queue.send(&[key("a", true)]).unwrap();
    for _ in 0..3 {
        assert_eq!(rig.events.wait(&rig.notices).1, 0);
    }
    assert_eq!(rig.told(2), [(1, 30, 1), (0, 0, 0)]);
    let counters = rig.device.counters().unwrap().read();
    assert!(counters.contains(&("bad_buffers", 3)));
    // One that is no memory swallows its event.
    rig.events.offer(&[(END, 8, true)]);
    rig.offer(4, 1);
    queue.send(&[key("a", false)]).unwrap();
    assert_eq!(rig.events.wait(&rig.notices).1, 0);
    assert_eq!(rig.told(1), [(0, 0, 0)]);
}

#[test]
fn a_report_that_no_queue_of_the_drivers_can_hold_is_lost_whole() {
    let mut rig = rig(InputKind::Mouse, 2);
    let queue = rig.device.input().unwrap();
    rig.offer(0, 2);
    queue.send(&[InputEvent::moved(Axis::X, 1)]).unwrap();
    rig.events.kick_and_wait();
    // Once it has slept again, it has looked.
    rig.events.kick_and_wait();
    assert_eq!(rig.events.used_index(), 0);
    assert_eq!(queue.counts(), (1, 1));
}

#[test]
fn the_driver_switches_lights() {
    let mut rig = rig(InputKind::Keyboard, 16);
    let queue = rig.device.input().unwrap();
    let events: [(u16, u16, u32); 4] = [(17, 1, 1), (17, 9, 1), (1, 0, 1), (17, 0, 1)];
    for (place, (kind, code, value)) in (0..).zip(events) {
        let at = DATA + 8 * place;
        rig.status.put(at, kind);
        rig.status.put(at + 2, code);
        rig.status.put(at + 4, value);
        rig.status.offer(&[(at, 8, false)]);
    }
    rig.status.offer(&[(DATA, 3, false)]);
    rig.status.kick();
    for _ in 0..5 {
        assert_eq!(rig.status.wait(&rig.notices).1, 0);
    }
    let leds = queue.leds();
    assert!(leds.num && leds.caps && !leds.scroll);
    rig.device.stop(soon()).unwrap();
    rig.device.reset();
    assert_eq!(queue.leds(), Leds::default());
}

#[test]
fn a_broken_ring_breaks_the_device_and_not_the_queue() {
    let mut rig = rig(InputKind::Keyboard, 16);
    let queue = rig.device.input().unwrap();
    rig.events.set_avail_index(17);
    queue.send(&[key("a", true)]).unwrap();
    assert!(reset_reason(&rig.notices).contains("available ring"));
    rig.device.stop(soon()).unwrap();
    rig.device.reset();
    assert_eq!(queue.take(), None);
}

#[test]
fn what_is_no_configuration_is_refused() {
    let refused = |config: Value| {
        let context = BuildContext {
            id: "kbd0".to_owned(),
            networks: Arc::new(crate::testing::NoNetworks),
            opener: Arc::new(NoFiles),
            cpus: 1,
            groups: crate::limit::RateGroups::default(),
            ports: Arc::new(crate::models::console::NoPorts),
            awaited: None,
        };
        build(config, &context).err().map(|error| error.to_string())
    };
    assert_eq!(refused(json!({"type": "mouse", "serial": "1"})), None);
    for bad in [
        json!({}),
        json!({"type": "joystick"}),
        json!({"type": "mouse", "x": 1}),
    ] {
        assert!(refused(bad).unwrap().contains("shape"));
    }
    for serial in ["x".repeat(65), "a\nb".to_owned()] {
        let error = refused(json!({"type": "tablet", "serial": serial})).unwrap();
        assert!(error.contains("at most 64 bytes"), "{error}");
    }
}

struct NoFiles;

impl block::Opener for NoFiles {
    fn open(&self, _: &std::path::Path, _: block::Access) -> std::io::Result<std::fs::File> {
        Err(std::io::ErrorKind::NotFound.into())
    }
}

#[test]
fn state_that_is_not_this_devices_is_refused() {
    let mut device = Input::new("kbd0", InputKind::Keyboard, "");
    let mut state = device.save().unwrap();
    state.down = vec![0x110];
    assert!(device.restore(state).is_err());
}
