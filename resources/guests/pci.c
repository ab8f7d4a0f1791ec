/* pci: lists bus 0, and compares the two ways into configuration space. */
#include "runtime/pci.h"

static bool agree = true;

static void complain(pci_slot slot, unsigned offset, uint32_t by_port, uint32_t by_ecam)
{
    agree = false;
    print("differ=%02x.%x offset=%03x port=%08x ecam=%08x\n", slot >> 3, slot & 7, offset, by_port,
          by_ecam);
}

/* The low 256 bytes by dwords, and narrow accesses of the first dword. */
static void compare(pci_slot slot, uint64_t ecam)
{
    uint64_t base = ecam + ((uint64_t)slot << 12);

    for (unsigned offset = 0; offset < 256; offset += 4) {
        uint32_t by_port = pci_read32(slot, offset);
        uint32_t by_ecam = read32(base + offset);

        if (by_port != by_ecam)
            complain(slot, offset, by_port, by_ecam);
    }
    for (unsigned offset = 0; offset < 16; offset++) {
        if (pci_read8(slot, offset) != read8(base + offset))
            complain(slot, offset, pci_read8(slot, offset), read8(base + offset));
        if (offset % 2 == 0 && pci_read16(slot, offset) != read16(base + offset))
            complain(slot, offset, pci_read16(slot, offset), read16(base + offset));
    }
}

/* A write through one way must show through the other. */
static void cross_write(pci_slot slot, uint64_t ecam)
{
    uint64_t line = ecam + ((uint64_t)slot << 12) + 0x3C;
    uint8_t old = read8(line);

    write8(line, 0x5A);
    if (pci_read8(slot, 0x3C) != 0x5A)
        complain(slot, 0x3C, pci_read8(slot, 0x3C), 0x5A);
    pci_read32(slot, 0x3C);
    outb(PORT_PCI_DATA, 0xA5);
    if (read8(line) != 0xA5)
        complain(slot, 0x3C, 0xA5, read8(line));
    write8(line, old);
}

static void show_bars(pci_slot slot, unsigned count)
{
    for (unsigned i = 0; i < count; i++) {
        struct pci_bar bar = pci_bar(slot, i);

        if (bar.size)
            print(" bar%u=%s%s:%lx+%lx", i, bar.io ? "io" : bar.wide ? "mem64" : "mem32",
                  bar.prefetch ? "p" : "", bar.address, bar.size);
        if (bar.wide)
            i++;
    }
}

static void show(pci_slot slot)
{
    uint32_t class = pci_read32(slot, PCI_REVISION);
    uint8_t header = pci_read8(slot, PCI_HEADER_TYPE) & 0x7F;
    struct pci_msix msix = pci_msix(slot);

    print("pci=%02x.%x id=%04x:%04x subsystem=%04x:%04x class=%06x revision=%02x header=%02x "
          "command=%04x",
          slot >> 3, slot & 7, pci_read16(slot, PCI_VENDOR), pci_read16(slot, PCI_DEVICE),
          pci_read16(slot, PCI_SUBSYSTEM_VENDOR), pci_read16(slot, PCI_SUBSYSTEM), class >> 8,
          class & 0xFF, header, pci_read16(slot, PCI_COMMAND));
    show_bars(slot, header == 0 ? 6 : header == 1 ? 2 : 0);
    if (msix.capability)
        print(" msix=%u table=%u:%x pending=%u:%x", msix.vectors, msix.table_bar, msix.table_offset,
              msix.pending_bar, msix.pending_offset);
    print("\n");
}

void main(void)
{
    uint64_t ecam = pci_ecam();
    unsigned functions = 0;

    print("ecam=%lx\n", ecam);
    for (unsigned slot = 0; slot < 256; slot++) {
        uint16_t vendor = pci_read16((pci_slot)slot, PCI_VENDOR);

        /* An absent function answers all ones, by either way. */
        if (ecam && read16(ecam + ((uint64_t)slot << 12)) != vendor)
            complain((pci_slot)slot, 0, vendor, read16(ecam + ((uint64_t)slot << 12)));
        if (vendor != 0xFFFF) {
            functions++;
            if (ecam) {
                compare((pci_slot)slot, ecam);
                cross_write((pci_slot)slot, ecam);
            }
            show((pci_slot)slot);
        }
        if (slot % 8 == 0 &&
            (vendor == 0xFFFF || !(pci_read8((pci_slot)slot, PCI_HEADER_TYPE) & PCI_MULTIFUNCTION)))
            slot += 7;
    }
    print("functions=%u\nagree=%s\n", functions, !ecam ? "no-ecam" : agree ? "yes" : "no");
}
