//! What a guest does, and what the machine around it does meanwhile, as an input says.

use std::collections::BTreeMap;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use devices::Unit;
use migration::{Section, SectionSet};
use virtio::models::balloon::{BalloonChange, HintChange};

use crate::driver::{
    COMMON, DEVICE, DRIVER_OK, Driver, INDIRECT, NEXT, NOTIFY, Ring, Step, VERSION_1, WRITE,
};
use crate::input::Input;
use crate::rig::{HIGH_WINDOW, PATIENCE, RAM, RAM_END, Rig};
use crate::subjects::{Subject, context};

/// The most that one input does.
const ACTS: usize = 64;
/// Changes of one model or another.
const PATCHES: &[&str] = &[
    r#"{"add":"a"}"#,
    r#"{"add":"b"}"#,
    r#"{"remove":"a"}"#,
    r#"{"remove":"b"}"#,
    r#"{"link":"down"}"#,
    r#"{"link":"up"}"#,
];
/// The most descriptors of one chain.
const LONGEST: u16 = 12;
/// How long workers are given before the guest goes on. They need a fraction of it.
const PAUSE: Duration = Duration::from_millis(2);

/// A machine, and what its driver knows.
pub struct Guest<'s> {
    subject: &'s Subject,
    rig: Rig,
    rings: Vec<Ring>,
    /// The next descriptor of each ring.
    slots: Vec<u16>,
    /// The device is not what a new one is: its state is for another.
    resized: bool,
}

impl<'s> Guest<'s> {
    /// A machine whose driver uses the device.
    pub fn new(subject: &'s Subject) -> Self {
        let mut guest = Self {
            subject,
            rig: Rig::new(subject),
            rings: Vec::new(),
            slots: Vec::new(),
            resized: false,
        };
        guest.boot(u64::MAX, Step::Running);
        guest
    }

    /// Does what the input says, and sees whether the device can still be used.
    pub fn run(mut self, mut input: Input<'_>) {
        for _ in 0..ACTS {
            let Some(what) = input.next() else { break };
            self.act(what, &mut input);
        }
        self.settle();
        self.fresh();
        Driver::probe(&self.rig).boot();
    }

    fn act(&mut self, what: u8, input: &mut Input<'_>) {
        match what % 16 {
            0..=4 => self.request(input),
            5 => self.settle(),
            6 => self.poke_register(input),
            7 => self.poke_device(input),
            8 => self.poke_config_space(input),
            9 => self.poke_ring(input),
            10 => {
                let features = !input.number();
                let step =
                    [Step::Running, Step::Queues, Step::Interrupts][usize::from(what >> 4) % 3];
                self.boot(features, step);
            }
            11 => {
                self.stop();
                self.rig.device.start().expect("a transport starts");
            }
            12 => self.move_house(input),
            13 => self.manage(input),
            14 => {
                let queue = u16::from(input.byte());
                if self.reachable() {
                    Driver::probe(&self.rig).write(NOTIFY, u64::from(queue) * 4, queue);
                }
            }
            _ => {
                if self.reachable() {
                    Driver::probe(&self.rig).set_status(input.byte());
                }
            }
        }
    }

    /// The device as it was in the beginning, wherever it was.
    fn fresh(&mut self) {
        self.stop();
        self.rig.device.reset();
        self.rig.root.reset();
        self.rig.device.start().expect("a transport starts");
    }

    fn stop(&self) {
        let begun = Instant::now();
        self.rig.stop();
        assert!(begun.elapsed() < PATIENCE / 4, "it stops slowly");
    }

    fn boot(&mut self, features: u64, step: Step) {
        self.fresh();
        self.slots.clear();
        let driver = Driver::probe(&self.rig);
        driver.bring_to(Step::Acknowledged, 0);
        if !driver.negotiate(features & driver.offered() | VERSION_1) {
            self.rings = driver.boot();
        } else {
            driver.enable_interrupts();
            let size = if features & 1 == 0 { 8 } else { 64 };
            let queues = 0..driver.queues();
            self.rings = queues.map(|queue| driver.ring(queue, size)).collect();
            if step >= Step::Queues {
                self.rings.iter().for_each(|ring| driver.enable(ring));
            }
            if step >= Step::Running {
                driver.add_status(DRIVER_OK);
            }
        }
        self.slots.resize(self.rings.len(), 0);
    }

    /// Whether the guest has left the registers where the driver finds them.
    fn reachable(&self) -> bool {
        let mut command = [0; 2];
        let mut bar = [0; 8];
        self.rig.read(self.rig.config(4), &mut command);
        self.rig.read(self.rig.config(0x10), &mut bar[..4]);
        self.rig.read(self.rig.config(0x14), &mut bar[4..]);
        let bar = u64::from_le_bytes(bar) & !0xf;
        command[0] & 2 == 2 && (HIGH_WINDOW..HIGH_WINDOW << 4).contains(&bar)
    }

    /// A chain as a driver makes it, or nearly so.
    fn request(&mut self, input: &mut Input<'_>) {
        let Some(count) = u8::try_from(self.rings.len())
            .ok()
            .filter(|count| *count > 0)
        else {
            return;
        };
        let form = input.byte();
        let number = usize::from(input.byte() % count);
        let (ring, slot) = (&self.rings[number], &mut self.slots[number]);
        let driver = blind(&self.rig);
        let length = (u16::from(form & 15) + 1).min(LONGEST).min(ring.size);
        let table = (form & 0x10 != 0).then_some(ring.buffers + 0x3800);
        let head = *slot % ring.size;
        for number in 0..length {
            let (buffer, flags) = buffer(&driver, ring, input, number);
            let next = if number + 1 < length { NEXT } else { 0 };
            let (table, at, after) = match table {
                Some(table) => (table, number, number + 1),
                None => {
                    let at = slot.wrapping_add(number) % ring.size;
                    (ring.desc, at, (at + 1) % ring.size)
                }
            };
            driver.describe(table, at, buffer, flags | next, after);
        }
        if let Some(table) = table {
            let len = u32::from(length) * 16;
            driver.describe(ring.desc, head, (table, len), INDIRECT, 0);
        }
        *slot = slot.wrapping_add(if table.is_some() { 1 } else { length });
        driver.offer(ring, head);
        let index = ring.index;
        if form & 0x20 == 0 && self.reachable() {
            Driver::probe(&self.rig).write(NOTIFY, u64::from(index) * 4, index);
        }
        if form & 0x40 != 0 {
            self.settle();
        }
    }

    /// Gives the workers the time to do what there is to do.
    fn settle(&self) {
        if !self.rig.device.is_active() || self.rig.device.needs_reset() {
            return;
        }
        // What was there when they looked up the first time is done when they do so again.
        for _ in 0..2 {
            let begun = Instant::now();
            let bells = self.rig.bells.registered.lock().expect("no test panics");
            for bell in bells.values() {
                let _ = std::io::Write::write(&mut &*bell, &1_u64.to_ne_bytes());
            }
            let ringing = || bells.values().any(|bell| readable(bell.as_raw_fd()));
            while ringing() && begun.elapsed() < PAUSE {
                std::thread::yield_now();
            }
        }
    }

    fn poke_register(&self, input: &mut Input<'_>) {
        if self.reachable() {
            let (offset, value) = (u64::from(input.byte() & 63), input.number());
            let len = usize::from(input.byte() % 8) + 1;
            poke(
                &self.rig,
                Driver::probe(&self.rig).region(COMMON) + offset,
                value,
                len,
            );
        }
    }

    fn poke_device(&self, input: &mut Input<'_>) {
        if self.reachable() {
            let (offset, value) = (u64::from(input.byte()), input.number());
            let len = usize::from(input.byte() % 8) + 1;
            poke(
                &self.rig,
                Driver::probe(&self.rig).region(DEVICE) + offset,
                value,
                len,
            );
        }
    }

    fn poke_config_space(&self, input: &mut Input<'_>) {
        let (offset, value) = (u64::from(input.byte()), input.number());
        let len = usize::from(input.byte() % 4) + 1;
        poke(&self.rig, self.rig.config(offset), value, len);
    }

    fn poke_ring(&self, input: &mut Input<'_>) {
        let (place, value) = (input.half(), input.number());
        if let Some(ring) = self.rings.get(usize::from(place >> 12)) {
            let at = ring.desc + u64::from(place & 0xfff) * 8;
            blind(&self.rig).put(at, value);
        }
    }

    /// The state goes to another machine, and may be damaged on its way.
    fn move_house(&mut self, input: &mut Input<'_>) {
        self.stop();
        let sections = self.rig.save();
        let damage = input.byte();
        let mut set = SectionSet::default();
        for section in sections.sections() {
            let mut section: Section = section.clone();
            if let Some(byte) = pick(&mut section.body, damage) {
                *byte = input.byte();
            }
            set.push(section);
        }
        let other = Rig::stopped(self.subject, self.rig.memory.clone());
        let restored = other.device.restore(&mut set);
        if restored.is_ok() {
            other.root.start().expect("a bus starts");
            other.device.start().expect("a transport starts");
            self.rig = other;
            self.resized = false;
        } else {
            assert!(
                damage != 0 || self.resized,
                "a state is refused that was saved: {restored:?}"
            );
            self.rig.device.start().expect("a transport starts");
        }
    }

    /// What the machine's owner may ask of any device; errors are as good an answer as success.
    fn manage(&mut self, input: &mut Input<'_>) {
        let device = &self.rig.device;
        let _ = match input.byte() % 6 {
            0 => device
                .change_balloon(BalloonChange::Target(input.number() << 12))
                .is_ok(),
            1 => device
                .change_balloon(BalloonChange::Hints(HintChange::Start))
                .is_ok(),
            2 => device
                .change_balloon(BalloonChange::Hints(HintChange::Done))
                .is_ok(),
            3 => {
                self.resized |= device.resize_disk(input.number() << 9 & 0xff_ffff).is_ok();
                self.resized
            }
            4 => {
                let patch = PATCHES[usize::from(input.byte()) % PATCHES.len()];
                let patch = serde_json::from_str(patch).expect("it is JSON");
                let prepared = device
                    .prepare(patch, context())
                    .and_then(|prepare| prepare());
                let changed = prepared.and_then(|prepared| device.reconfigure(prepared));
                // The next machine is built from what this one was.
                self.resized |= changed.is_ok();
                self.resized
            }
            _ => device.counters().is_empty(),
        };
    }
}

/// A driver that reaches memory alone.
fn blind(rig: &Rig) -> Driver<'_> {
    Driver {
        rig,
        capabilities: BTreeMap::new(),
        msix: 0,
        bar: 0,
        multiplier: 0,
    }
}

/// One byte of a body that is to be another; none for 0.
fn pick(body: &mut [u8], damage: u8) -> Option<&mut u8> {
    let place = usize::from(damage.checked_sub(1)?);
    let len = body.len().max(1);
    body.get_mut(place % len)
}

/// Where a descriptor points and what it is, with something in it to read.
fn buffer(
    driver: &Driver<'_>,
    ring: &Ring,
    input: &mut Input<'_>,
    number: u16,
) -> ((u64, u32), u16) {
    let kind = input.byte();
    let place = ring.buffers + u64::from(number) * 0x400;
    let lengths = [1, 2, 8, 12, 16, 64, 512, 0x400];
    let length = lengths[usize::from(kind >> 4 & 7)];
    match kind & 15 {
        // What a request says.
        0..=5 => {
            let bytes = input.bytes(usize::from(kind >> 4) * 2 + 2 - usize::from(kind & 15 == 5));
            for (at, byte) in (place..).zip(bytes) {
                driver.put(at, *byte);
            }
            ((place, bytes.len() as u32), 0)
        }
        6 => ((place, length), 0),
        7..=11 => ((place, length), WRITE),
        12 => ((place, 0x3000), u16::from(kind >> 7) * WRITE),
        13 => ((input.number(), u32::from(input.half())), WRITE),
        14 => {
            let places = [
                0,
                RAM[0].1 - 8,
                RAM_END - 1,
                HIGH_WINDOW,
                u64::MAX - 8,
                ring.used,
                ring.desc,
            ];
            let at = places[usize::from(kind >> 4) % places.len()];
            ((at, u32::from(input.half())), u16::from(kind >> 7) * WRITE)
        }
        _ => ((place, input.number() as u32), input.half()),
    }
}

fn poke(rig: &Rig, address: u64, value: u64, len: usize) {
    rig.write(address, &value.to_le_bytes()[..len]);
    let mut back = [0; 8];
    rig.read(address, &mut back[..len]);
}

fn readable(fd: i32) -> bool {
    let mut poll = libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one structure that is ours, and it is not waited.
    unsafe { libc::poll(&raw mut poll, 1, 0) == 1 }
}
