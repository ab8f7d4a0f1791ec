/*
 * Where things are in the guest. Addresses and ports of the machine mirror
 * vmm/src/layout.rs; the rest is how these guests use their memory.
 * Read by assembly too: plain #defines without suffixes.
 */
#ifndef LAYOUT_H
#define LAYOUT_H

/* The machine: guest-physical addresses. */
#define LOW_RAM_END 0xC0000000
#define HIGH_RAM_START 0x100000000
#define PCI_MMIO32_START 0xC0000000
#define ECAM_START 0xE0000000
#define IOAPIC_BASE 0xFEC00000
#define LAPIC_BASE 0xFEE00000
#define EBDA_START 0x9FC00
#define ACPI_START 0xE0000
#define HIMEM_START 0x100000

/* The machine: ports. */
#define PORT_COM1 0x3F8
#define PORT_I8042_DATA 0x60
#define PORT_I8042_COMMAND 0x64
#define PORT_RTC 0x70
#define PORT_DEBUGCON 0xE9
#define PORT_PVPANIC 0x505
#define PORT_SLEEP_CONTROL 0x600
#define PORT_SLEEP_STATUS 0x601
#define PORT_GED_EVENTS 0x604
#define PORT_PCI_HOTPLUG 0x610
#define PORT_PCI_ADDRESS 0xCF8
#define PORT_PCI_DATA 0xCFC
#define PORT_RESET 0xCF9

/* The machine: global system interrupts. */
#define GSI_COM1 4
#define GSI_GED 20
#define IOAPIC_PINS 24

/* ACPI 6.4, 4.8.3.7: SLP_EN with the sleep type of S5. */
#define SLEEP_S5 0x34

/* QEMU's isa-debug-exit, where a machine has no sleep control register. */
#define PORT_DEBUG_EXIT 0xF4

/* The guest's own memory. The image starts at HIMEM_START. */
#define AP_TRAMPOLINE 0x8000
#define BOOT_COUNT_CELL 0x90000
#define HEAP_START 0x400000
#define HEAP_END 0x40000000

/*
 * Selectors. Ring 3 must be 0x33 and 0x2B: a host that runs guests without
 * hardware virtualization starts CPL 3 with exactly these.
 */
#define SEL_CODE0 0x10
#define SEL_DATA0 0x18
#define SEL_CODE0_32 0x20
#define SEL_DATA3 0x2B
#define SEL_CODE3 0x33
#define SEL_TSS 0x40

/* Vectors. */
#define VECTORS 64
#define VECTOR_COM1 0x24
#define VECTOR_GED 0x25
#define VECTOR_MSI 0x30
#define VECTOR_SPURIOUS 0x3F

#endif
