use std::io;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Receiver;

use proptest::prelude::*;
use serde_json::json;

use super::view::Blocks;
use super::*;
use crate::testing::{DATA, Driver, END, Notice, memory, reset_reason, soon, start};

const MIB: u64 = 1 << 20;
const BLOCK: u64 = 2 * MIB;
const BASE: u64 = 1 << 32;
const SIZE: u64 = 100 * BLOCK;

/// A host that keeps account of what it has been asked for.
#[derive(Default)]
struct Host {
    asked: Mutex<Vec<(bool, u64, u64)>>,
    poor: AtomicBool,
}

impl MemoryHost for Host {
    fn address(&self) -> u64 {
        BASE
    }

    fn plug(&self, offset: u64, len: u64) -> io::Result<()> {
        if self.poor.load(Ordering::SeqCst) {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        self.asked.lock().unwrap().push((true, offset, len));
        Ok(())
    }

    fn unplug(&self, offset: u64, len: u64) -> io::Result<()> {
        self.asked.lock().unwrap().push((false, offset, len));
        Ok(())
    }
}

impl Host {
    /// What it was asked for since the last call: whether to plug, first block, blocks.
    fn asked(&self) -> Vec<(bool, u64, u64)> {
        let asked = std::mem::take(&mut *self.asked.lock().unwrap());
        let blocks = asked.into_iter();
        blocks
            .map(|(plug, offset, len)| (plug, offset / BLOCK, len / BLOCK))
            .collect()
    }
}

fn device(requested: u64) -> (Mem, Arc<Host>) {
    let config = MemConfig {
        size: SIZE,
        requested: requested * BLOCK,
        block: BLOCK,
    };
    let device = Mem::new("mem0", &config);
    let host = Arc::new(Host::default());
    device.view.connect(Arc::clone(&host) as _);
    (device, host)
}

struct Rig {
    device: Mem,
    host: Arc<Host>,
    driver: Driver,
    notices: Receiver<Notice>,
}

fn rig(requested: u64) -> Rig {
    let (mut device, host) = device(requested);
    let memory = memory();
    let driver = Driver::new(&memory, 0, 16);
    let notices = start(&mut device, 0, &memory, vec![driver.activate()]);
    Rig {
        device,
        host,
        driver,
        notices,
    }
}

const ACK: (u16, u16) = (0, 0);
const NACK: (u16, u16) = (1, 0);
const BUSY: (u16, u16) = (2, 0);
const ERROR: (u16, u16) = (3, 0);

impl Rig {
    /// Sends a request and gives type and state of the answer.
    fn ask_at(&mut self, kind: u16, address: u64, blocks: u16) -> (u16, u16) {
        let driver = &mut self.driver;
        driver.put(DATA, u64::from(kind));
        driver.put(DATA + 8, address);
        driver.put(DATA + 16, u64::from(blocks));
        driver.put(DATA + 0x100, [0xff_u8; 10]);
        driver.offer(&[(DATA, 24, false), (DATA + 0x100, 10, true)]);
        driver.kick();
        assert_eq!(driver.wait(&self.notices).1, 10);
        (driver.get(DATA + 0x100), driver.get(DATA + 0x108))
    }

    fn ask(&mut self, kind: u16, first: u64, blocks: u16) -> (u16, u16) {
        self.ask_at(kind, BASE + first * BLOCK, blocks)
    }

    /// What the device tells next of how much is plugged, in blocks.
    fn reached(&self) -> u64 {
        loop {
            let notice = self.notices.recv_timeout(crate::testing::PATIENCE);
            if let Notice::Memory(plugged) = notice.unwrap() {
                return plugged / BLOCK;
            }
        }
    }

    fn plugged(&self) -> u64 {
        let mut bytes = [0; 8];
        self.device.read_config(40, &mut bytes);
        assert_eq!(u64::from_le_bytes(bytes), self.device.view.plugged());
        u64::from_le_bytes(bytes) / BLOCK
    }
}

#[test]
fn configuration_space_tells_of_the_region() {
    let (mut device, _) = device(3);
    device.write_config(0, &[0xff; 56]);
    let mut space = [0xff; 60];
    device.read_config(0, &mut space);
    let word = |at: usize| u64::from_le_bytes(space[at..at + 8].try_into().unwrap());
    let words = [0, 8, 16, 24, 32, 40, 48].map(word);
    assert_eq!(words, [BLOCK, 0, BASE, SIZE, SIZE, 0, 3 * BLOCK]);
    assert_eq!(space[56..], [0; 4]);
    device.request_memory(5 * BLOCK + 1).unwrap();
    device.read_config(0, &mut space);
    assert_eq!(space[48..56], (5 * BLOCK).to_le_bytes());
    device.request_memory(u64::MAX).unwrap();
    assert_eq!(device.view.requested(), SIZE);
}

#[test]
fn blocks_come_and_go_and_the_host_hears_of_it() {
    let mut rig = rig(8);
    assert_eq!(rig.ask(3, 0, 100), (0, 1));
    assert_eq!(rig.ask(0, 2, 6), ACK);
    assert_eq!(rig.plugged(), 6);
    assert_eq!(rig.ask(0, 70, 2), ACK);
    assert_eq!(rig.reached(), 8);
    assert_eq!(rig.ask(3, 2, 6), (0, 0));
    assert_eq!(rig.ask(3, 0, 100), (0, 2));
    assert_eq!(rig.ask(1, 3, 2), ACK);
    assert_eq!(rig.plugged(), 6);
    let asked = [(true, 2, 6), (true, 70, 2), (false, 3, 2)];
    assert_eq!(rig.host.asked(), asked);
    assert_eq!(rig.ask(2, 0, 0), ACK);
    let runs = [(false, 2, 1), (false, 5, 3), (false, 70, 2)];
    assert_eq!(rig.host.asked(), runs);
    assert_eq!(rig.plugged(), 0);
    let counters = rig.device.counters().unwrap().read();
    for expected in [
        ("plugged_bytes", 0),
        ("plugged_blocks", 8),
        ("unplugged_blocks", 8),
        ("invalid_requests", 0),
    ] {
        assert!(counters.contains(&expected), "{counters:?}");
    }
}

#[test]
fn no_more_is_plugged_than_is_requested_and_less_can_be() {
    let mut rig = rig(4);
    assert_eq!(rig.ask(0, 0, 5), NACK);
    assert_eq!(rig.ask(0, 0, 3), ACK);
    assert_eq!(rig.ask(0, 3, 2), NACK);
    assert_eq!(rig.plugged(), 3);
    rig.device.request_memory(3 * BLOCK).unwrap();
    assert_eq!(rig.reached(), 3);
    rig.device.request_memory(BLOCK).unwrap();
    assert_eq!(rig.ask(0, 50, 1), NACK);
    assert_eq!(rig.ask(1, 0, 2), ACK);
    assert_eq!(rig.reached(), 1);
    assert_eq!(rig.host.asked(), [(true, 0, 3), (false, 0, 2)]);
}

#[test]
fn a_host_without_memory_says_busy_and_nothing_is_plugged() {
    let mut rig = rig(4);
    rig.host.poor.store(true, Ordering::SeqCst);
    assert_eq!(rig.ask(0, 0, 2), BUSY);
    assert_eq!(rig.plugged(), 0);
    rig.host.poor.store(false, Ordering::SeqCst);
    assert_eq!(rig.ask(0, 0, 2), ACK);
}

#[test]
fn requests_that_make_no_sense_are_errors_and_change_nothing() {
    let mut rig = rig(100);
    assert_eq!(rig.ask(0, 10, 5), ACK);
    for (kind, first, blocks) in [
        (0, 0, 0),
        (0, 8, 3),
        (0, 14, 2),
        (0, 99, 2),
        (0, 100, 1),
        (1, 9, 2),
        (1, 0, 1),
        (1, 14, 2),
        (3, 0, 0),
        (3, 100, 1),
        (3, 0, 101),
        (0, 0, u16::MAX),
        (4, 10, 1),
        (u16::MAX, 10, 1),
    ] {
        assert_eq!(
            rig.ask(kind, first, blocks),
            ERROR,
            "{kind} {first} {blocks}"
        );
    }
    let odd = [
        0,
        BASE - BLOCK,
        BASE + 1,
        BASE + MIB,
        u64::MAX,
        u64::MAX - BLOCK + 1,
    ];
    for address in odd {
        for kind in [0, 1, 3] {
            assert_eq!(rig.ask_at(kind, address, 1), ERROR, "{address:#x}");
        }
    }
    assert_eq!(rig.host.asked(), [(true, 10, 5)]);
    assert_eq!(rig.plugged(), 5);
}

#[test]
fn a_request_without_room_for_its_answer_does_nothing() {
    let mut rig = rig(10);
    rig.driver.put(DATA + 8, BASE);
    rig.driver.put(DATA + 16, 1_u64);
    for pieces in [
        &[(DATA, 24, false)][..],
        &[(DATA, 24, false), (DATA + 0x100, 9, true)],
        &[(DATA, 23, false), (DATA + 0x100, 10, true)],
        &[(END, 24, false), (DATA + 0x100, 10, true)],
        &[(DATA + 0x100, 10, true)],
    ] {
        rig.driver.offer(pieces);
        rig.driver.kick();
        rig.driver.wait(&rig.notices);
    }
    assert_eq!(rig.host.asked(), []);
    assert_eq!(rig.plugged(), 0);
}

#[test]
fn what_is_plugged_stays_over_the_drivers_reset_and_goes_with_the_machines() {
    let mut rig = rig(8);
    assert_eq!(rig.ask(0, 0, 8), ACK);
    rig.device.stop(soon()).unwrap();
    rig.device.reset();
    assert_eq!(rig.plugged(), 8);
    rig.device.view.unplug_all();
    assert_eq!(rig.plugged(), 0);
    assert_eq!(rig.device.view.requested(), 8 * BLOCK);
    assert_eq!(rig.host.asked(), [(true, 0, 8), (false, 0, 8)]);
}

#[test]
fn state_goes_to_a_device_of_the_same_region_and_plugs_there() {
    let mut rig = rig(8);
    assert_eq!(rig.ask(0, 1, 3), ACK);
    assert_eq!(rig.ask(0, 65, 1), ACK);
    rig.device.stop(soon()).unwrap();
    let (mut other, host) = device(0);
    other.restore(rig.device.save().unwrap()).unwrap();
    assert_eq!(host.asked(), [(true, 1, 3), (true, 65, 1)]);
    assert_eq!(other.save().unwrap(), rig.device.save().unwrap());
    assert_eq!(other.view.plugged(), 4 * BLOCK);
    assert_eq!(other.view.requested(), 8 * BLOCK);
}

#[test]
fn state_of_another_region_is_refused() {
    let saved = || device(8).0.save().unwrap();
    let with = |change: fn(&mut MemV1)| {
        let mut state = saved();
        change(&mut state);
        device(8).0.restore(state)
    };
    assert!(with(|_| ()).is_ok());
    for change in [
        (|state| state.address += BLOCK) as fn(&mut MemV1),
        |state| state.size -= BLOCK,
        |state| state.block *= 2,
        |state| state.requested += 1,
        |state| state.requested = SIZE + BLOCK,
        |state| state.plugged.push(0),
        |state| state.plugged.clear(),
        // Block 100, where there are 100.
        |state| state.plugged[1] = 1 << 36,
    ] {
        assert!(with(change).is_err());
    }
    let (mut poor, host) = device(8);
    host.poor.store(true, Ordering::SeqCst);
    let mut state = saved();
    state.plugged[0] = 1;
    assert!(poor.restore(state).is_err());
}

#[test]
fn a_broken_ring_breaks_the_device_and_its_memory_stays() {
    let mut rig = rig(8);
    assert_eq!(rig.ask(0, 0, 8), ACK);
    rig.driver.set_avail_index(100);
    rig.driver.kick();
    assert!(reset_reason(&rig.notices).contains("available ring"));
    assert_eq!(rig.plugged(), 8);
}

#[test]
fn what_is_no_configuration_is_refused() {
    let check = |config: Value| {
        let config: MemConfig = parse(MODEL.kind, config).map_err(|error| error.to_string())?;
        config.check().map_err(|error| error.to_string())
    };
    assert!(check(json!({"size": SIZE})).is_ok());
    for (config, told) in [
        (json!({}), "shape"),
        (json!({"size": 0}), "size: 0"),
        (json!({"size": 3 * MIB}), "blocks of"),
        (json!({"size": 1_u64 << 40}), "1 to 65536"),
        (json!({"size": SIZE, "block": 3 * MIB}), "power of two"),
        (json!({"size": SIZE, "block": 4096}), "at least 2M"),
        (json!({"size": SIZE, "block": 0}), "power of two"),
        (
            json!({"size": SIZE, "requested": SIZE + BLOCK}),
            "requested",
        ),
        (json!({"size": SIZE, "requested": 1}), "requested"),
    ] {
        let error = check(config).unwrap_err();
        assert!(error.contains(told), "{error}");
    }
}

proptest! {
    /// Whatever is asked for, the host holds what the device says, and no more than was requested at any time.
    #[test]
    fn the_account_is_always_right(asked in prop::collection::vec((0_u16..4, 0_u64..110, 0_u16..20, 0_u64..60), 1..60)) {
        let (device, host) = device(50);
        let view = &device.view;
        let mut held = std::collections::BTreeSet::new();
        for (kind, first, blocks, requested) in asked {
            let before = held.len();
            view.request(requested * BLOCK);
            let address = BASE + first * BLOCK;
            match kind {
                0 => view.plug(address, blocks),
                1 => view.unplug(address, blocks),
                2 if first == 0 => view.unplug_each(),
                _ => view.state(address, blocks),
            };
            for (plug, first, blocks) in host.asked() {
                for block in first..first + blocks {
                    let new = if plug { held.insert(block) } else { held.remove(&block) };
                    prop_assert!(new);
                }
            }
            prop_assert_eq!(view.plugged() / BLOCK, held.len() as u64);
            prop_assert!(held.len() <= before || held.len() as u64 <= requested);
        }
        let words = view.save().2;
        let blocks = Blocks::from_words(words, 100).unwrap();
        prop_assert!((0..100).all(|block| blocks.has(block) == held.contains(&block)));
    }
}
