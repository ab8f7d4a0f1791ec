//! The platform devices: serial port, keyboard controller, clock, ACPI
//! registers, panic port, debug console; and their places on the buses.

use std::os::fd::RawFd;
use std::sync::Arc;

use devices::acpi::hotplug::{self, NewsDesk, SlotKind, SlotRegisters};
use devices::acpi::{EventRegister, ResetRegister, SleepRegisters};
use devices::debugcon::DebugConsole;
use devices::i8042::I8042;
use devices::pci::PciRoot;
use devices::pvpanic::IsaPanic;
use devices::rtc::{Rtc, SystemClock};
use devices::serial::{InputReady, Serial};
use devices::{BusDevice, GuestRequests, Unit};

use super::MachineError;
use super::alarm::Alarm;
use super::inbox::{Mailbox, Message};
use crate::config::{DebugconConfig, SerialConfig, VmConfig};
use crate::console::{Console, Input, OnBacklog, Output};
use crate::kvm::irq::IrqRouter;
use crate::kvm::vcpu::Buses;
use crate::layout::{MEMORY_SLOTS, ged_event, gsi, memory, port};
use crate::opener::Opener;

/// The host's ends of the consoles.
pub struct Hosts {
    serial: Option<Console>,
    debugcon: Option<Console>,
    pty: Option<String>,
}

impl Hosts {
    /// Opens what the configuration names.
    ///
    /// # Errors
    ///
    /// [`MachineError::Open`] and [`MachineError::Console`], naming the flag.
    pub fn open(
        config: &VmConfig,
        opener: &Opener,
        mailbox: &Mailbox,
    ) -> Result<Self, MachineError> {
        let mailbox = mailbox.clone();
        let on_backlog: OnBacklog = Arc::new(move || {
            mailbox.send(Message::OutputWaiting);
        });
        let console = |flag| move |source| MachineError::Console { flag, source };
        let file = |flag, path| {
            let file = opener.create_output(path);
            file.map(Console::file)
                .map_err(|source| MachineError::Open { flag, source })
        };
        let mut pty = None;
        let serial = match &config.serial {
            SerialConfig::Off => None,
            SerialConfig::Null => Some(Console::null()),
            SerialConfig::File(path) => Some(file("--serial", path)?),
            SerialConfig::Tty => {
                let stdio = opener
                    .open_stdout()
                    .and_then(|stdout| Console::stdio(stdout, Arc::clone(&on_backlog)));
                Some(stdio.map_err(console("--serial tty"))?)
            }
            SerialConfig::Pty => {
                let (console, path) =
                    Console::pty(Arc::clone(&on_backlog)).map_err(console("--serial pty"))?;
                pty = Some(path);
                Some(console)
            }
        };
        let debugcon = match &config.debugcon {
            DebugconConfig::Off => None,
            DebugconConfig::File(path) => Some(file("--debugcon", path)?),
            DebugconConfig::Stdio => {
                let stdout = opener.open_stdout().map_err(console("--debugcon stdio"))?;
                Some(Console::output_only(stdout, on_backlog))
            }
        };
        Ok(Self {
            serial,
            debugcon,
            pty,
        })
    }

    /// The far end of the serial port's pseudo-terminal, where there is one.
    #[must_use]
    pub fn pty(&self) -> Option<&str> {
        self.pty.as_deref()
    }

    /// Takes out what the driver waits on.
    #[must_use]
    pub fn split(mut self) -> (Self, Option<Input>, Vec<Output>) {
        let input = self
            .serial
            .as_mut()
            .and_then(|console| console.input.take());
        let consoles = [&mut self.serial, &mut self.debugcon];
        let outputs = consoles
            .into_iter()
            .flatten()
            .filter_map(|c| c.output.take())
            .collect();
        (self, input, outputs)
    }
}

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
    /// vCPUs that there may be, and that are there at boot, where they come and go.
    pub cpu_slots: Option<(u32, u32)>,
    /// Whether memory can be added.
    pub memory_slots: bool,
}

/// Those platform devices that the control thread talks to.
pub struct Platform {
    serial: Option<Arc<Serial>>,
    events: Arc<EventRegister>,
    rtc: Arc<Rtc>,
    alarm: Arc<Alarm>,
    slots: Slots,
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

struct Ready(Mailbox);

impl InputReady for Ready {
    fn ready(&self) {
        self.0.send(Message::InputReady);
    }
}

impl Platform {
    /// Makes the devices, puts them on the buses, and returns them as units too.
    ///
    /// # Errors
    ///
    /// [`MachineError::Kvm`] when the host is out of interrupt descriptors.
    pub fn build(
        wiring: &Wiring<'_>,
        hosts: Hosts,
    ) -> Result<(Self, Vec<Arc<dyn Unit>>), MachineError> {
        let Wiring {
            router,
            requests,
            mailbox,
            pci,
            ..
        } = wiring;
        let mut placed = Placed {
            wiring,
            units: Vec::new(),
        };
        let serial = match hosts.serial {
            None => None,
            Some(console) => {
                let ready = Arc::new(Ready((*mailbox).clone()));
                let irq = router.line(gsi::COM1)?;
                let serial = Arc::new(Serial::new("com1", irq, console.sink, ready));
                placed.port(port::COM1, 8, serial.clone());
                Some(serial)
            }
        };
        if let Some(console) = hosts.debugcon {
            placed.port(port::DEBUGCON, 1, Arc::new(DebugConsole::new(console.sink)));
        }
        let i8042 = Arc::new(I8042::new(
            router.line(gsi::KEYBOARD)?,
            router.line(gsi::MOUSE)?,
            Arc::clone(requests),
        ));
        placed.port(port::I8042, 5, i8042);
        let alarm = Alarm::new().map_err(|source| MachineError::Host {
            what: "no timer for the real-time clock",
            source,
        })?;
        let alarm = Arc::new(alarm);
        let timer = Arc::clone(&alarm) as Arc<_>;
        let rtc = Arc::new(Rtc::new(
            router.line(gsi::RTC)?,
            Arc::new(SystemClock),
            timer,
        ));
        placed.port(port::RTC, 2, rtc.clone());
        placed.port(
            port::SLEEP_CONTROL,
            2,
            Arc::new(SleepRegisters::new(Arc::clone(requests))),
        );
        let events = Arc::new(EventRegister::new(router.line(gsi::GED)?));
        placed.port(port::GED_EVENTS, 4, events.clone());
        let slots = placed.slots();
        if wiring.pvpanic {
            placed.port(
                port::PVPANIC,
                1,
                Arc::new(IsaPanic::new(Arc::clone(requests))),
            );
        }
        let reset = Arc::new(ResetRegister::new(Arc::clone(requests)));
        placed.units.push(reset.clone());
        placed.pci(pci, reset);
        Ok((
            Self {
                serial,
                events,
                rtc,
                alarm,
                slots,
            },
            placed.units,
        ))
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

    /// Offers input to the serial port; returns how much it took.
    #[must_use]
    pub fn serial_input(&self, typed: &[u8]) -> usize {
        self.serial
            .as_ref()
            .map_or(typed.len(), |serial| serial.input(typed))
    }

    /// Serves what is due on the real-time clock.
    pub fn tick(&self) {
        if self.alarm.take() {
            self.rtc.tick();
        }
    }

    /// Readable when [`Platform::tick`] has something to serve.
    #[must_use]
    pub fn tick_fd(&self) -> RawFd {
        self.alarm.raw_fd()
    }
}

/// Puts devices at the addresses of [`crate::layout`].
struct Placed<'a> {
    wiring: &'a Wiring<'a>,
    units: Vec<Arc<dyn Unit>>,
}

impl Placed<'_> {
    fn port<D: BusDevice + Unit + 'static>(&mut self, base: u16, len: u64, device: Arc<D>) {
        let on_bus = Arc::clone(&device) as Arc<dyn BusDevice>;
        // The layout has no overlaps, which its test checks.
        let placed = self.wiring.buses.pio.insert(base.into(), len, on_bus);
        debug_assert_eq!(placed, Ok(()));
        self.units.push(device);
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
