//! The platform devices: serial port, keyboard controller, clock, ACPI
//! registers, panic port, watchdog, debug console; and their places on the buses.

use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::Instant;

use devices::acpi::hotplug::{self, NewsDesk, SlotKind, SlotRegisters};
use devices::acpi::{EventRegister, ResetRegister, SleepRegisters};
use devices::debugcon::DebugConsole;
use devices::display::Adapter;
use devices::i8042::I8042;
use devices::pci::{HOTPLUG_LEN, PciFunction, PciHotplug, PciRoot};
use devices::pvpanic::IsaPanic;
use devices::rtc::Rtc;
use devices::serial::Serial;
use devices::time::SystemClock;
use devices::watchdog::Watchdog;
use devices::{BusDevice, GuestRequests, StartError, StopError, Unit};
use migration::{RestoreError, SaveError, Section, SectionSet};

use super::MachineError;
use super::alarm::{Alarm, SteadyClock};
use super::fixtures::{Fixed, Fixture, Place};
use super::hosts::Hosts;
use super::hotplug::EjectDesk;
use super::inbox::{Mailbox, Message};
use crate::config::{COMS, DisplayConfig};
use crate::console::{ConsoleHub, PortLink};
use crate::kvm::Vm;
use crate::kvm::irq::IrqRouter;
use crate::kvm::vcpu::Buses;
use crate::layout::{
    self, DISPLAY_SLOT, MEMORY_SLOTS, WATCHDOG_SLOT, ged_event, gsi, memory, port,
};
use crate::memory::video::VideoRam;

/// What is in the page of the generation id, in bytes.
const GENERATION_ID_LEN: u64 = 16;

/// What the platform devices are connected to.
pub struct Wiring<'a> {
    /// Interrupt lines.
    pub router: &'a IrqRouter,
    /// Address spaces.
    pub buses: &'a Buses,
    /// Who hears what the guest asks.
    pub requests: Arc<dyn GuestRequests>,
    /// The control thread.
    pub mailbox: &'a Mailbox,
    /// The PCI bus.
    pub pci: &'a Arc<PciRoot>,
    /// Whether there is a panic port.
    pub pvpanic: bool,
    /// Whether there is a watchdog.
    pub watchdog: bool,
    /// The screen, where there is one.
    pub display: Option<&'a DisplayConfig>,
    /// Where the screen's memory is to be seen.
    pub vm: &'a Vm,
    /// vCPUs that there may be, and that are there at boot, where they come and go.
    pub cpu_slots: Option<(u32, u32)>,
    /// Whether memory can be added.
    pub memory_slots: bool,
}

/// Those platform devices that the control thread talks to.
pub struct Platform {
    events: Arc<EventRegister>,
    hotplug: Arc<PciHotplug>,
    rtc: Arc<Rtc>,
    alarm: Arc<Alarm>,
    watchdog: Option<(Arc<Watchdog>, Arc<Alarm>)>,
    display: Option<Arc<Adapter>>,
    ps2: Arc<I8042>,
    slots: Slots,
    fixtures: Arc<[Fixture]>,
}

/// The registers of what comes and goes.
#[derive(Clone)]
pub struct Slots {
    /// Those of vCPUs, where they come and go.
    pub cpus: Option<Arc<SlotRegisters>>,
    /// Those of memory, where it can be added.
    pub memory: Option<Arc<SlotRegisters>>,
}

struct News(Mailbox);

impl NewsDesk for News {
    fn news(&self) {
        self.0.send(Message::SlotNews);
    }
}

/// Lets input reach a console while the machine runs: while it is paused
/// its devices stay as they are.
struct ConsoleInput {
    name: String,
    link: PortLink,
}

impl Unit for ConsoleInput {
    fn name(&self) -> &str {
        &self.name
    }

    fn start(&self) -> Result<(), StartError> {
        self.link.open();
        Ok(())
    }

    fn stop(&self, _deadline: Instant) -> Result<(), StopError> {
        self.link.close();
        Ok(())
    }

    fn reset(&self) {}

    fn save(&self) -> Result<Vec<Section>, SaveError> {
        Ok(Vec::new())
    }

    fn restore(&self, _set: &mut SectionSet) -> Result<(), RestoreError> {
        Ok(())
    }
}

impl Platform {
    /// Makes the devices, puts them on the buses, and returns them as units too.
    ///
    /// # Errors
    ///
    /// [`MachineError::Kvm`] and [`MachineError::Host`] when the host is out of descriptors.
    pub fn build(
        wiring: &Wiring<'_>,
        hosts: Hosts,
    ) -> Result<(Self, Vec<Arc<dyn Unit>>), MachineError> {
        let Wiring {
            router,
            requests,
            pci,
            ..
        } = wiring;
        let mut placed = Placed {
            wiring,
            units: Vec::new(),
            fixtures: Vec::new(),
        };
        placed.serials(hosts.serials)?;
        if let Some((hub, port)) = hosts.console {
            placed.input("console", hub.connect(port));
        }
        if let Some(hub) = hosts.debugcon {
            let console = DebugConsole::new(Box::new(hub.writer()));
            placed.port(port::DEBUGCON, 1, Arc::new(console));
            placed.still("debugcon", "debugcon", Place::Ports(port::DEBUGCON, 1));
        }
        let i8042 = Arc::new(I8042::new(
            router.line(gsi::KEYBOARD)?,
            router.line(gsi::MOUSE)?,
            Arc::clone(requests),
        ));
        placed.port(port::I8042, 5, Arc::clone(&i8042));
        placed.still("i8042", "i8042", Place::Ports(port::I8042, 5));
        let (rtc, alarm) = placed.clock()?;
        placed.port(
            port::SLEEP_CONTROL,
            2,
            Arc::new(SleepRegisters::new(Arc::clone(requests))),
        );
        let (events, hotplug) = placed.events();
        let slots = placed.slots();
        if wiring.pvpanic {
            placed.port(
                port::PVPANIC,
                1,
                Arc::new(IsaPanic::new(Arc::clone(requests))),
            );
            placed.still("pvpanic", "pvpanic", Place::Ports(port::PVPANIC, 1));
        }
        // The first on the bus, which its memory's address follows from.
        let display = wiring.display.map(|config| placed.display(config));
        let display = display.transpose()?;
        let watchdog = match wiring.watchdog {
            true => Some(placed.watchdog()?),
            false => None,
        };
        let reset = Arc::new(ResetRegister::new(Arc::clone(requests)));
        let page = Place::Memory(memory::GENERATION_ID, GENERATION_ID_LEN);
        placed.still("vmgenid", "vmgenid", page);
        placed.units.push(reset.clone());
        placed.pci(pci, reset);
        Ok((
            Self {
                events,
                hotplug,
                rtc,
                alarm,
                watchdog,
                display,
                ps2: i8042,
                slots,
                fixtures: placed.fixtures.into(),
            },
            placed.units,
        ))
    }

    /// The devices that stay.
    #[must_use]
    pub fn fixtures(&self) -> &Arc<[Fixture]> {
        &self.fixtures
    }

    /// Presses the ACPI power button.
    pub fn press_power_button(&self) {
        self.events.raise(ged_event::POWER_BUTTON);
    }

    /// Raises events of the event device, by the bits of [`ged_event`].
    pub fn raise(&self, events: u32) {
        self.events.raise(events);
    }

    /// The registers of what comes and goes.
    #[must_use]
    pub fn slots(&self) -> Slots {
        self.slots.clone()
    }

    /// The registers of PCI hot-plug.
    #[must_use]
    pub fn hotplug(&self) -> &PciHotplug {
        &self.hotplug
    }

    /// Serves what is due by the real-time clock and the watchdog.
    pub fn tick(&self) {
        if self.alarm.take() {
            self.rtc.tick();
        }
        if let Some((watchdog, alarm)) = &self.watchdog
            && alarm.take()
        {
            watchdog.tick();
        }
    }

    /// Has the watchdog not count, or count on.
    pub fn hold_watchdog(&self, hold: bool) {
        if let Some((watchdog, _)) = &self.watchdog {
            // Neither can fail: it waits for nobody.
            let _held = if hold {
                watchdog.stop(Instant::now()).is_ok()
            } else {
                watchdog.start().is_ok()
            };
        }
    }

    /// The display, where there is one.
    #[must_use]
    pub fn display(&self) -> Option<&Arc<Adapter>> {
        self.display.as_ref()
    }

    /// The keyboard and the mouse that every machine has.
    #[must_use]
    pub fn ps2(&self) -> &Arc<I8042> {
        &self.ps2
    }

    /// Readable when [`Platform::tick`] has something to serve.
    #[must_use]
    pub fn tick_fds(&self) -> [Option<RawFd>; 2] {
        let watchdog = self.watchdog.as_ref();
        let alarms = [Some(&self.alarm), watchdog.map(|(_, alarm)| alarm)];
        alarms.map(|alarm| alarm.map(|alarm| alarm.raw_fd()))
    }
}

/// Puts devices at the addresses of [`crate::layout`].
struct Placed<'a> {
    wiring: &'a Wiring<'a>,
    units: Vec<Arc<dyn Unit>>,
    fixtures: Vec<Fixture>,
}

impl Placed<'_> {
    /// One that is listed, and does not show whether the guest uses it.
    fn still(&mut self, id: &'static str, kind: &'static str, place: Place) {
        self.fixtures.push(Fixture::still(id, kind, place));
    }

    /// One that is listed, and shows it.
    fn live<D: Fixed + 'static>(
        &mut self,
        (id, kind): (&'static str, &'static str),
        place: Place,
        device: &Arc<D>,
    ) {
        let device = Arc::clone(device) as Arc<dyn Fixed>;
        self.fixtures.push(Fixture {
            device: Some(Arc::downgrade(&device)),
            ..Fixture::still(id, kind, place)
        });
    }

    fn port<D: BusDevice + Unit + 'static>(&mut self, base: u16, len: u64, device: Arc<D>) {
        let on_bus = Arc::clone(&device) as Arc<dyn BusDevice>;
        // The layout has no overlaps, which its test checks.
        let placed = self.wiring.buses.pio.insert(base.into(), len, on_bus);
        debug_assert_eq!(placed, Ok(()));
        self.units.push(device);
    }

    /// The serial ports that there are.
    fn serials(&mut self, hubs: [Option<ConsoleHub>; COMS]) -> Result<(), MachineError> {
        let places = ["com1", "com2", "com3", "com4"]
            .into_iter()
            .zip(layout::COMS);
        for (hub, (name, place)) in hubs.into_iter().zip(places) {
            let Some(hub) = hub else { continue };
            let irq = self.wiring.router.line(place.gsi)?;
            let ready = Arc::new(hub.clone());
            let serial = Arc::new(Serial::new(name, irq, Box::new(hub.writer()), ready));
            self.port(place.port, 8, serial.clone());
            self.live((name, "serial"), Place::Ports(place.port, 8), &serial);
            self.input(name, hub.connect(serial));
        }
        Ok(())
    }

    /// Input for the device `name`, while it is started.
    fn input(&mut self, name: &str, link: PortLink) {
        let name = format!("{name}-input");
        self.units.push(Arc::new(ConsoleInput { name, link }));
    }

    /// The real-time clock, with its timer.
    fn clock(&mut self) -> Result<(Arc<Rtc>, Arc<Alarm>), MachineError> {
        let alarm = Alarm::civil().map_err(|source| MachineError::Host {
            what: "no timer for the real-time clock",
            source,
        })?;
        let alarm = Arc::new(alarm);
        let timer = Arc::clone(&alarm) as Arc<_>;
        let irq = self.wiring.router.line(gsi::RTC)?;
        let rtc = Arc::new(Rtc::new(irq, Arc::new(SystemClock), timer));
        self.port(port::RTC, 2, rtc.clone());
        self.still("rtc", "rtc", Place::Ports(port::RTC, 2));
        Ok((rtc, alarm))
    }

    /// The watchdog in its slot, with its timer.
    fn watchdog(&mut self) -> Result<(Arc<Watchdog>, Arc<Alarm>), MachineError> {
        let failed = |source: Box<dyn std::error::Error + Send + Sync>| MachineError::Device {
            device: "--watchdog".to_owned(),
            source,
        };
        let alarm = Alarm::steady().map_err(|source| MachineError::Host {
            what: "no timer for the watchdog",
            source,
        })?;
        let alarm = Arc::new(alarm);
        let requests = Arc::clone(&self.wiring.requests);
        let watchdog = Watchdog::new(requests, Arc::new(SteadyClock), Arc::clone(&alarm) as _)
            .map_err(|error| failed(error.into()))?;
        let watchdog = Arc::new(watchdog);
        let function = Arc::clone(&watchdog) as Arc<dyn PciFunction>;
        let placed = self.wiring.pci.add(function, Some(WATCHDOG_SLOT));
        let address = placed.map_err(|error| failed(error.into()))?;
        self.live(("watchdog", "watchdog"), Place::Pci(address), &watchdog);
        self.units.push(Arc::clone(&watchdog) as _);
        Ok((watchdog, alarm))
    }

    /// The display in its slot.
    fn display(&mut self, config: &DisplayConfig) -> Result<Arc<Adapter>, MachineError> {
        let failed = |source: Box<dyn std::error::Error + Send + Sync>| MachineError::Device {
            device: "--display".to_owned(),
            source,
        };
        let memory = VideoRam::new(self.wiring.vm, config.memory);
        let memory = memory.map_err(|error| failed(error.into()))?;
        let adapter = Adapter::new(Arc::new(memory), config.width, config.height)
            .map_err(|error| failed(error.into()))?;
        let adapter = Arc::new(adapter);
        let function = Arc::clone(&adapter) as Arc<dyn PciFunction>;
        let placed = self.wiring.pci.add(function, Some(DISPLAY_SLOT));
        let address = placed.map_err(|error| failed(error.into()))?;
        self.live(("display", "display"), Place::Pci(address), &adapter);
        if adapter.home() != memory::FRAMEBUFFER {
            let home = adapter.home();
            return Err(failed(format!("its memory is at {home:#x}").into()));
        }
        self.units.push(Arc::clone(&adapter) as _);
        Ok(adapter)
    }

    /// The event register, and what it tells of.
    fn events(&mut self) -> (Arc<EventRegister>, Arc<PciHotplug>) {
        let events = Arc::new(EventRegister::new(self.wiring.router.level(gsi::GED)));
        self.port(port::GED_EVENTS, 4, Arc::clone(&events));
        let hotplug = Arc::new(PciHotplug::new(
            Arc::clone(&events),
            ged_event::PCI_HOTPLUG,
            Arc::new(EjectDesk(self.wiring.mailbox.clone())),
        ));
        self.port(port::PCI_HOTPLUG, HOTPLUG_LEN.into(), Arc::clone(&hotplug));
        (events, hotplug)
    }

    /// The registers of vCPUs and memory, where these come and go.
    fn slots(&mut self) -> Slots {
        let wiring = self.wiring;
        let mut place = |port, kind, count, filled| {
            let desk = Arc::new(News(wiring.mailbox.clone()));
            let registers = Arc::new(SlotRegisters::new(kind, count, filled, desk));
            self.port(port, hotplug::LEN.into(), Arc::clone(&registers));
            registers
        };
        let cpus = wiring
            .cpu_slots
            .map(|(most, boot)| place(port::CPU_SLOTS, SlotKind::Cpus, most, boot));
        let memory = wiring
            .memory_slots
            .then(|| place(port::MEMORY_SLOTS, SlotKind::Memory, MEMORY_SLOTS, 0));
        Slots { cpus, memory }
    }

    fn pci(&self, pci: &Arc<PciRoot>, reset: Arc<dyn BusDevice>) {
        let Buses { pio, mmio } = self.wiring.buses;
        let mut placed = vec![
            pio.insert(port::PCI_CONFIG.into(), 8, pci.ports(Some(reset))),
            mmio.insert(memory::ECAM_START, memory::ECAM_LEN, pci.ecam()),
        ];
        for (window, device) in pci.windows() {
            placed.push(mmio.insert(window.start, window.end - window.start, device));
        }
        debug_assert!(placed.iter().all(Result::is_ok));
    }
}
