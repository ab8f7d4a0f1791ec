//! Sound requests: what each kind of device is asked for, and what makes it take the driver's buffers.

use std::time::Instant;

use devices::input::{InputEvent, Key};
use virtio::models::balloon::{BalloonChange, HintChange};

use crate::driver::{DEVICE, Driver, NEXT, Ring, WRITE};
use crate::rig::{RAM, RAM_END, Rig, soon};

/// Where a request's bytes are, and its answer, from the beginning of a queue's buffers.
const BYTES: u64 = 0x2000;
const ANSWER: u64 = 0x3000;

/// Makes a chain available: `bytes`, then `room` bytes for an answer, either of which may be none.
pub fn offer(driver: &Driver<'_>, ring: &Ring, bytes: &[u8], room: u32) {
    let from = ring.buffers + BYTES;
    for (at, byte) in (from..).zip(bytes) {
        driver.put(at, *byte);
    }
    let readable = (from, u32::try_from(bytes.len()).unwrap());
    let writable = (ring.buffers + ANSWER, room);
    // Behind what attacks and other chains are made of.
    let slot = ring.size - 2;
    match (bytes.is_empty(), room) {
        (false, 0) => driver.describe(ring.desc, slot, readable, 0, 0),
        (true, _) => driver.describe(ring.desc, slot, writable, WRITE, 0),
        (false, _) => {
            driver.describe(ring.desc, slot, readable, NEXT, slot + 1);
            driver.describe(ring.desc, slot + 1, writable, WRITE, 0);
        }
    }
    driver.offer(ring, slot);
    driver.kick(ring.index);
}

/// Waits until the device has returned a chain, or is broken.
fn returned(driver: &Driver<'_>, ring: &Ring, before: u16) {
    let deadline = soon();
    while driver.used_index(ring) == before && !driver.rig.device.needs_reset() {
        let queue = ring.index;
        assert!(Instant::now() < deadline, "queue {queue} returns nothing");
        std::thread::yield_now();
    }
}

/// Offers a chain and waits until it has come back.
pub fn ask(driver: &Driver<'_>, ring: &Ring, bytes: &[u8], room: u32) {
    let before = driver.used_index(ring);
    offer(driver, ring, bytes, room);
    returned(driver, ring, before);
}

/// Whether another program looks at the queues. It does so from when it has answered for the first time ([`reach`]).
pub fn is_peered(kind: &str) -> bool {
    ["fs", "vhost-user-blk", "vhost-user-net"].contains(&kind)
}

/// Waits until the program that serves a device looks at its queues, by a request in one of them.
pub fn reach(kind: &str, driver: &Driver<'_>, ring: &Ring) {
    if is_peered(kind) {
        ask(driver, ring, &[], 64);
    }
}

/// Gives a device that has just been taken into use something to do with buffers in queue `target`.
pub fn rouse(kind: &str, driver: &Driver<'_>, rings: &[Ring], target: usize) {
    match (kind, target) {
        ("console", _) => {
            let ready = [(0, 0, 1), (0, 3, 1), (1, 3, 1), (2, 3, 1)];
            control(driver, &rings[3], &ready);
            control(driver, &rings[3], &[(0, 6, 1), (1, 6, 1), (2, 6, 1)]);
            // What is written to a port comes back from it.
            if let 0 | 4 | 6 = target {
                ask(driver, &rings[target + 1], b"x", 0);
            }
        }
        ("input", 0) => press(driver.rig, 1),
        // The other pair is to be used; what is sent comes back.
        ("net", 2 | 3) => ask(driver, &rings[4], &[4, 0, 2, 0], 1),
        ("net", 0) => ask(driver, &rings[1], &frame(), 0),
        ("vsock", 0) => ask(driver, &rings[1], &packet(1, &[]), 0),
        _ => {}
    }
}

/// Control messages of a console's driver: port, event and value of each.
fn control(driver: &Driver<'_>, ring: &Ring, messages: &[(u32, u16, u16)]) {
    for (port, event, value) in messages {
        let mut bytes = port.to_le_bytes().to_vec();
        bytes.extend(event.to_le_bytes());
        bytes.extend(value.to_le_bytes());
        ask(driver, ring, &bytes, 0);
    }
}

/// A key goes down and up so many times.
fn press(rig: &Rig, times: usize) {
    let queue = rig.device.input().unwrap();
    let key = Key::from_name("a").unwrap();
    for _ in 0..times {
        for down in [true, false] {
            // It may have as much as it holds.
            let _ = queue.send(&[InputEvent::key(key, down)]);
        }
    }
}

/// A frame for everybody, behind its header.
fn frame() -> Vec<u8> {
    let mut frame = vec![0; 12];
    frame.extend([0xff; 100]);
    frame
}

/// A packet of a socket with these bytes.
fn packet(op: u16, bytes: &[u8]) -> Vec<u8> {
    let len = u32::try_from(bytes.len()).unwrap();
    let mut packet = Vec::new();
    packet.extend([3_u64.to_le_bytes(), 2_u64.to_le_bytes()].concat());
    packet.extend(
        [
            1000_u32.to_le_bytes(),
            9_u32.to_le_bytes(),
            len.to_le_bytes(),
        ]
        .concat(),
    );
    packet.extend([1_u16.to_le_bytes(), op.to_le_bytes()].concat());
    packet.extend(
        [
            0_u32.to_le_bytes(),
            0x1000_u32.to_le_bytes(),
            0_u32.to_le_bytes(),
        ]
        .concat(),
    );
    packet.extend(bytes);
    packet
}

/// A request of a disk: number, sector, and data.
fn disk(kind: u32, sector: u64, data: &[u8]) -> Vec<u8> {
    let mut bytes = kind.to_le_bytes().to_vec();
    bytes.extend(0_u32.to_le_bytes());
    bytes.extend(sector.to_le_bytes());
    bytes.extend(data);
    bytes
}

/// A request of memory that comes and goes.
fn blocks(kind: u64, count: u64) -> Vec<u8> {
    [kind, 0, count].map(u64::to_le_bytes).concat()
}

/// Asks a device that has just been taken into use for everything that it does, and for what it refuses.
pub fn exercise(kind: &str, rig: &Rig, driver: &Driver<'_>, rings: &[Ring]) {
    match kind {
        "balloon" => balloon(rig, driver, rings),
        "blk" => {
            let ring = &rings[0];
            // Eight sectors from the first, which may be freed.
            let range = [0_u64.to_le_bytes(), (8_u64 | 1 << 32).to_le_bytes()].concat();
            let discard = [0_u64.to_le_bytes(), 8_u64.to_le_bytes()].concat();
            ask(driver, ring, &disk(1, 0, &[7; 512]), 1);
            ask(driver, ring, &disk(0, 0, &[]), 513);
            ask(driver, ring, &disk(4, 0, &[]), 1);
            ask(driver, ring, &disk(11, 0, &discard), 1);
            ask(driver, ring, &disk(13, 0, &range), 1);
            ask(driver, ring, &disk(99, 0, &[]), 1);
        }
        "console" => {
            rouse(kind, driver, rings, 0);
            ask(driver, &rings[0], &[], 64);
            // A port that there is not, and one that is spoken of.
            ask(driver, &rings[9], b"lost", 0);
            control(driver, &rings[3], &[(9, 3, 1)]);
        }
        "input" => {
            for slot in 0..2 {
                let at = rings[0].buffers + 8 * u64::from(slot);
                driver.describe(rings[0].desc, slot, (at, 8), WRITE, 0);
                driver.offer(&rings[0], slot);
            }
            press(rig, 1);
            rig.settle();
            // More than anybody would keep.
            press(rig, 10_000);
            ask(driver, &rings[1], &[0x11, 0, 0, 0, 1, 0, 0, 0], 0);
            ask(driver, &rings[1], &[], 8);
        }
        "mem" => {
            for (kind, count) in [(0, 2), (1, 2), (0, 20), (9, 1), (0, 1)] {
                ask(driver, &rings[0], &blocks(kind, count), 10);
            }
        }
        "net" => net(driver, rings),
        "rng" => {
            ask(driver, &rings[0], &[], 64);
            let outside = (RAM_END, 64);
            driver.describe(rings[0].desc, 0, outside, WRITE, 0);
            let before = driver.used_index(&rings[0]);
            driver.offer(&rings[0], 0);
            driver.kick(0);
            returned(driver, &rings[0], before);
        }
        "vsock" => {
            ask(driver, &rings[1], &packet(1, &[]), 0);
            ask(driver, &rings[0], &[], 0x200);
            // The server is the socket of clients, who say something else.
            ask(driver, &rings[1], &packet(5, b"HELLO\n"), 0);
            ask(driver, &rings[1], &[0; 8], 0);
        }
        _ => ask(driver, &rings[0], &[], 64),
    }
}

fn balloon(rig: &Rig, driver: &Driver<'_>, rings: &[Ring]) {
    let page = u32::try_from(RAM_END >> 12).unwrap() - 1;
    ask(driver, &rings[0], &page.to_le_bytes(), 0);
    let hole = u32::try_from(RAM[0].1 >> 12).unwrap();
    ask(driver, &rings[0], &hole.to_le_bytes(), 0);
    ask(driver, &rings[1], &page.to_le_bytes(), 0);
    offer(driver, &rings[2], &[4, 0, 1, 0, 0, 0, 0, 0, 0, 0], 0);
    rig.settle();
    let hints = BalloonChange::Hints(HintChange::Start);
    rig.device.change_balloon(hints).unwrap();
    let command: u32 = driver.read(DEVICE, 8);
    ask(driver, &rings[3], &command.to_le_bytes(), 0);
    for ring in &rings[3..=4] {
        let free = (RAM_END - 0x1000, 0x1000);
        driver.describe(ring.desc, 0, free, WRITE, 0);
        let before = driver.used_index(ring);
        driver.offer(ring, 0);
        driver.kick(ring.index);
        returned(driver, ring, before);
    }
}

fn net(driver: &Driver<'_>, rings: &[Ring]) {
    let (rx, tx, control) = (&rings[0], &rings[1], &rings[4]);
    // A buffer that holds no frame, and then two that do. Something has come before the first.
    ask(driver, rx, &[], 8);
    ask(driver, rx, &[], 0x600);
    let before = driver.used_index(rx);
    offer(driver, rx, &[], 0x600);
    ask(driver, tx, &frame(), 0);
    returned(driver, rx, before);
    ask(driver, tx, &[0; 8], 0);
    // Nothing but what is for it, and not what is for all.
    ask(driver, control, &[0, 0, 0], 1);
    ask(driver, control, &[0, 5, 1], 1);
    offer(driver, rx, &[], 0x600);
    ask(driver, tx, &frame(), 0);
    driver.rig.settle();
}
