//! Where things are in the guest: physical addresses, ports and interrupts.
//!
//! This is the machine type's contract with its guests: a change here is a
//! new machine type.

/// Guest-physical addresses, in bytes.
pub mod memory {
    /// Low RAM ends here at the latest; the rest continues at [`HIGH_RAM_START`].
    pub const LOW_RAM_END: u64 = 0xC000_0000;
    /// Where RAM goes on above the hole for devices.
    pub const HIGH_RAM_START: u64 = 0x1_0000_0000;
    /// 32-bit window for PCI base address registers.
    pub const PCI_MMIO32_START: u64 = 0xC000_0000;
    /// Its length.
    pub const PCI_MMIO32_LEN: u64 = 0x2000_0000;
    /// The display's memory: the display comes first to the PCI bus, where there is one, so that
    /// kernels can be told of it before the bus is there.
    pub const FRAMEBUFFER: u64 = PCI_MMIO32_START;
    /// PCI Express enhanced configuration space, for bus 0.
    pub const ECAM_START: u64 = 0xE000_0000;
    /// One MiB for each bus, and there is one bus.
    pub const ECAM_LEN: u64 = 0x10_0000;
    /// The I/O APIC.
    pub const IOAPIC: u64 = 0xFEC0_0000;
    /// The local APIC of every vCPU.
    pub const LAPIC: u64 = 0xFEE0_0000;
    /// One page for KVM's identity map (used on Intel hosts).
    pub const KVM_IDENTITY_MAP: u64 = 0xFFFB_C000;
    /// Three pages for KVM's task state segment (used on Intel hosts).
    pub const KVM_TSS: u64 = 0xFFFB_D000;
    /// Memory that is added later starts at the end of RAM, rounded up to this.
    pub const HOTPLUG_ALIGN: u64 = 1 << 30;
    /// It comes in multiples of this: a memory block of Linux, as small as they get.
    pub const HOTPLUG_BLOCK: u64 = 128 << 20;
    /// The 64-bit PCI window starts at the end of RAM and of what can be
    /// added to it, rounded up to this.
    pub const PCI_MMIO64_ALIGN: u64 = 1 << 30;
    /// The 64-bit PCI window's length, unless the address width cuts it off.
    pub const PCI_MMIO64_LEN: u64 = 64 << 30;

    /// The boot-time GDT.
    pub const BOOT_GDT: u64 = 0x500;
    /// PVH start info, module list and memory map.
    pub const PVH_START_INFO: u64 = 0x6000;
    /// `boot_params` of the Linux boot protocol.
    pub const ZERO_PAGE: u64 = 0x7000;
    /// Initial stack pointer.
    pub const BOOT_STACK: u64 = 0x8FF0;
    /// Boot page tables: PML4, PDPT, then page directories.
    pub const BOOT_PAGE_TABLES: u64 = 0x9000;
    /// The kernel's command line.
    pub const CMDLINE: u64 = 0x20000;
    /// Space for the command line, in bytes.
    pub const CMDLINE_LEN: u64 = 0x10000;
    /// Usable low memory ends here (the extended BIOS data area follows).
    pub const EBDA_START: u64 = 0x9FC00;
    /// ACPI tables, the RSDP first, in the BIOS area.
    pub const ACPI_START: u64 = 0xE0000;
    /// The generation id: 16 bytes in a page of their own, behind the ACPI tables.
    pub const GENERATION_ID: u64 = 0xF_7000;
    /// SMBIOS tables, from here to the reset vector; they end there.
    pub const SMBIOS_START: u64 = 0xF_8000;
    /// Where a BIOS would start (F000:FFF0): code that resets the machine.
    pub const RESET_VECTOR: u64 = 0xF_FFF0;
    /// Where RAM proper starts and kernels are loaded.
    pub const HIMEM_START: u64 = 0x10_0000;
}

/// I/O ports.
pub mod port {
    /// COM1, eight ports.
    pub const COM1: u16 = 0x3F8;
    /// COM2.
    pub const COM2: u16 = 0x2F8;
    /// COM3.
    pub const COM3: u16 = 0x3E8;
    /// COM4.
    pub const COM4: u16 = 0x2E8;
    /// i8042 data (0x60) to command (0x64).
    pub const I8042: u16 = 0x60;
    /// CMOS index and data.
    pub const RTC: u16 = 0x70;
    /// Bochs debug console: a byte written here goes to the console's file.
    pub const DEBUGCON: u16 = 0xE9;
    /// pvpanic's ISA register.
    pub const PVPANIC: u16 = 0x505;
    /// ACPI sleep control (byte), sleep status (byte).
    pub const SLEEP_CONTROL: u16 = 0x600;
    /// ACPI sleep status.
    pub const SLEEP_STATUS: u16 = 0x601;
    /// Generic event device: which events are pending, 32 bits, cleared by reading.
    pub const GED_EVENTS: u16 = 0x604;
    /// PCI hot-plug: up, down and eject, 32 bits each.
    pub const PCI_HOTPLUG: u16 = 0x610;
    /// The slots of vCPUs (`devices::acpi::hotplug`), where they can be added.
    pub const CPU_SLOTS: u16 = 0x620;
    /// The slots of memory, where it can be added.
    pub const MEMORY_SLOTS: u16 = 0x640;
    /// PCI configuration address and data (0xCF8 to 0xCFF).
    pub const PCI_CONFIG: u16 = 0xCF8;
    /// Reset control register; inside the range above, handled by byte access.
    pub const RESET: u16 = 0xCF9;
}

/// Global system interrupts: I/O APIC pins, edge-triggered but for [`GED`](gsi::GED).
pub mod gsi {
    /// i8042 keyboard.
    pub const KEYBOARD: u32 = 1;
    /// COM2, and COM4.
    pub const COM2: u32 = 3;
    /// COM1, and COM3.
    pub const COM1: u32 = 4;
    /// CMOS real-time clock.
    pub const RTC: u32 = 8;
    /// i8042 auxiliary device.
    pub const MOUSE: u32 = 12;
    /// ACPI generic event device: a level, high while events are pending.
    pub const GED: u32 = 20;
    /// Pins of the I/O APIC; message-signalled interrupts come after.
    pub const IOAPIC_PINS: u32 = 24;
}

/// Where a serial port is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Com {
    /// The first of its eight ports.
    pub port: u16,
    /// Its interrupt. Those of one interrupt share it, as on every PC.
    pub gsi: u32,
}

/// The serial ports that there may be.
pub const COMS: [Com; 4] = [
    Com {
        port: port::COM1,
        gsi: gsi::COM1,
    },
    Com {
        port: port::COM2,
        gsi: gsi::COM2,
    },
    Com {
        port: port::COM3,
        gsi: gsi::COM1,
    },
    Com {
        port: port::COM4,
        gsi: gsi::COM2,
    },
];

/// Bits of [`port::GED_EVENTS`].
pub mod ged_event {
    /// The power button was pressed.
    pub const POWER_BUTTON: u32 = 1 << 0;
    /// PCI functions came or are to go; see the hot-plug registers.
    pub const PCI_HOTPLUG: u32 = 1 << 1;
    /// vCPUs came or are to go; see [`super::port::CPU_SLOTS`].
    pub const CPU_HOTPLUG: u32 = 1 << 2;
    /// Memory came; see [`super::port::MEMORY_SLOTS`].
    pub const MEMORY_HOTPLUG: u32 = 1 << 3;
    /// The generation id has changed; see [`super::memory::GENERATION_ID`].
    pub const GENERATION_ID: u32 = 1 << 4;
}

/// The most vCPUs a machine has: APIC ids are 8 bits wide and 255 means all.
pub const MAX_CPUS: u32 = 254;
/// How often memory can be added until the guest is reset, which makes it part of
/// what the guest boots with.
pub const MEMORY_SLOTS: u32 = 32;
/// Devices on the PCI bus besides the host bridge in slot 0.
pub const PCI_SLOTS: u8 = 31;
/// The watchdog's slot: the last, so that no other device changes its place for it.
pub const WATCHDOG_SLOT: u8 = 31;
/// The display's slot, for the same reason.
pub const DISPLAY_SLOT: u8 = 30;
/// The slots of the keyboard and the tablet that come with the display, where nothing else has them.
pub const DISPLAY_INPUT_SLOTS: [u8; 2] = [29, 28];
/// KVM's slot for the display's memory, after all those of RAM.
pub const VIDEO_SLOT: u32 = 400;
