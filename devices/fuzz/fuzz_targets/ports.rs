//! Any bytes as what a guest does with the registers of the machine's own devices: every access is answered, time may pass at any moment,
//! and each device's state goes to another machine, where it is the same.
//!
//! Six bytes are one step: which device, what is done, where (two bytes), and with what (two bytes).
#![no_main]

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use devices::acpi::hotplug::{NewsDesk, SlotKind, SlotRegisters};
use devices::acpi::{EventRegister, ResetRegister, SleepRegisters};
use devices::debugcon::DebugConsole;
use devices::display::{Adapter, VideoMemory};
use devices::i8042::I8042;
use devices::pci::PciFunction;
use devices::pvpanic::IsaPanic;
use devices::rtc::Rtc;
use devices::serial::{InputReady, Serial};
use devices::time::{Clock, WakeTimer};
use devices::watchdog::Watchdog;
use devices::{BusDevice, GuestRequest, GuestRequests, IrqLine, LevelLine, Unit};
use libfuzzer_sys::fuzz_target;
use migration::SectionSet;

/// Everything around the devices; only its clock does something.
#[derive(Default)]
struct Around(AtomicU64);

impl IrqLine for Around {
    fn pulse(&self) {}
}

impl LevelLine for Around {
    fn set(&self, _: bool) {}
}

impl GuestRequests for Around {
    fn request(&self, _: GuestRequest) {}
}

impl InputReady for Around {
    fn ready(&self) {}
}

impl NewsDesk for Around {
    fn news(&self) {}
}

impl WakeTimer for Around {
    fn arm(&self, _: Option<Duration>) {}
}

impl Clock for Around {
    fn now(&self) -> Duration {
        Duration::from_millis(self.0.load(Ordering::Relaxed))
    }
}

/// A screen's memory that nobody looks at.
struct Picture;

impl VideoMemory for Picture {
    fn size(&self) -> usize {
        16 << 20
    }
    fn place(&self, _: Option<u64>) {}
    fn track(&self, _: bool) {}
    fn changed(&self, pages: &mut [u64]) {
        pages.fill(u64::MAX);
    }
    fn read(&self, _: usize, buffer: &mut [u8]) {
        buffer.fill(0);
    }
    fn write(&self, _: usize, _: &[u8]) {}
    fn clear(&self) {}
}

/// A function whose configuration and BARs are one range: the first page is its configuration.
struct Flat<T>(Arc<T>);

const CONFIG: u64 = 0x1000;

impl<T: PciFunction> BusDevice for Flat<T> {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match u16::try_from(offset) {
            Ok(place) if offset < CONFIG => self.0.config_read(place, data),
            _ => self.0.bar_read(2, offset - CONFIG, data),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        match u16::try_from(offset) {
            Ok(place) if offset < CONFIG => self.0.config_write(place, data),
            _ => self
                .0
                .bar_write(if offset % 2 == 0 { 0 } else { 2 }, offset - CONFIG, data),
        }
    }
}

struct Machine {
    around: Arc<Around>,
    registers: Vec<Arc<dyn BusDevice>>,
    units: Vec<Arc<dyn Unit>>,
    rtc: Arc<Rtc>,
    watchdog: Arc<Watchdog>,
}

impl Machine {
    fn new() -> Self {
        let around = Arc::new(Around::default());
        let line = || Arc::clone(&around) as Arc<dyn IrqLine>;
        let requests = || Arc::clone(&around) as Arc<dyn GuestRequests>;
        let serial = Serial::new(
            "com1",
            line(),
            Box::new(io::sink()),
            Arc::clone(&around) as _,
        );
        let (serial, i8042) = (
            Arc::new(serial),
            Arc::new(I8042::new(line(), line(), requests())),
        );
        let rtc = Arc::new(Rtc::new(
            line(),
            Arc::clone(&around) as _,
            Arc::clone(&around) as _,
        ));
        let sleep = Arc::new(SleepRegisters::new(requests()));
        let reset = Arc::new(ResetRegister::new(requests()));
        let events = Arc::new(EventRegister::new(Arc::clone(&around) as _));
        let slots = |kind| Arc::new(SlotRegisters::new(kind, 8, 2, Arc::clone(&around) as _));
        let (cpus, memory) = (slots(SlotKind::Cpus), slots(SlotKind::Memory));
        let panic = Arc::new(IsaPanic::new(requests()));
        let console = Arc::new(DebugConsole::new(Box::new(io::sink())));
        let dog = Watchdog::new(
            requests(),
            Arc::clone(&around) as _,
            Arc::clone(&around) as _,
        );
        let watchdog = Arc::new(dog.expect("its BAR fits"));
        let adapter = Arc::new(Adapter::new(Arc::new(Picture), 1024, 768).expect("it fits"));
        let registers: Vec<Arc<dyn BusDevice>> = vec![
            Arc::clone(&serial) as _,
            Arc::clone(&i8042) as _,
            Arc::clone(&rtc) as _,
            Arc::clone(&sleep) as _,
            Arc::clone(&reset) as _,
            Arc::clone(&events) as _,
            Arc::clone(&cpus) as _,
            Arc::clone(&memory) as _,
            Arc::clone(&panic) as _,
            Arc::clone(&console) as _,
            Arc::new(Flat(Arc::clone(&watchdog))),
            Arc::new(Flat(Arc::clone(&adapter))),
        ];
        let dog = Arc::clone(&watchdog);
        let units: Vec<Arc<dyn Unit>> = vec![
            serial,
            i8042,
            Arc::clone(&rtc) as _,
            sleep,
            reset,
            events,
            cpus,
            memory,
            panic,
            console,
            dog,
            adapter,
        ];
        Self {
            around,
            registers,
            units,
            rtc,
            watchdog,
        }
    }

    fn step(&self, step: [u8; 6]) {
        let [device, what, low, high, first, second] = step;
        let device = &self.registers[usize::from(device) % self.registers.len()];
        let offset = u64::from(u16::from_le_bytes([low, high]));
        let width = 1 << (what & 3);
        let value = u64::from(u16::from_le_bytes([first, second]));
        let value = value.rotate_left(u32::from(what >> 3));
        match what & 7 {
            0..=3 => device.read(offset, &mut vec![0xff; width]),
            _ => device.write(offset, &value.to_le_bytes()[..width]),
        }
        if what >> 5 == 7 {
            self.around
                .0
                .fetch_add(1 << (first & 31), Ordering::Relaxed);
            self.rtc.tick();
            self.watchdog.tick();
        }
    }
}

fuzz_target!(|input: &[u8]| {
    let machine = Machine::new();
    for unit in &machine.units {
        unit.start().expect("it starts");
    }
    for step in input.chunks_exact(6) {
        machine.step(step.try_into().expect("six"));
    }
    let other = Machine::new();
    other
        .around
        .0
        .store(machine.around.0.load(Ordering::Relaxed), Ordering::Relaxed);
    for (unit, twin) in machine.units.iter().zip(&other.units) {
        unit.stop(std::time::Instant::now())
            .expect("nothing is in flight");
        twin.stop(std::time::Instant::now())
            .expect("nothing is in flight");
        let saved = unit.save().expect("it is saved");
        let mut set = SectionSet::default();
        for section in saved.clone() {
            set.push(section);
        }
        twin.restore(&mut set).expect("its own state");
        assert_eq!(twin.save().expect("it is saved"), saved, "{}", unit.name());
    }
});
