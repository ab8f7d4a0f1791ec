#include "acpi.h"
#include "pci.h"

#define ADDRESS_ENABLE 0x80000000u

#define BAR_IO 0x1
#define BAR_64 0x4
#define BAR_PREFETCH 0x8

#define MSIX_CONTROL 2
#define MSIX_TABLE 4
#define MSIX_PENDING 8
#define MSIX_ENABLE 0x8000
#define MSIX_ENTRY_SIZE 16

/* PCI firmware specification 3.2, 4.1.2: one allocation of MCFG. */
#define MCFG_FIRST 44
#define MCFG_ENTRY 16

static void point_at(pci_slot slot, unsigned offset)
{
    outl(PORT_PCI_ADDRESS, ADDRESS_ENABLE | (uint32_t)slot << 8 | (offset & 0xFC));
}

uint32_t pci_read32(pci_slot slot, unsigned offset)
{
    point_at(slot, offset);
    return inl(PORT_PCI_DATA);
}

uint16_t pci_read16(pci_slot slot, unsigned offset)
{
    point_at(slot, offset);
    return inw((uint16_t)(PORT_PCI_DATA + (offset & 2)));
}

uint8_t pci_read8(pci_slot slot, unsigned offset)
{
    point_at(slot, offset);
    return inb((uint16_t)(PORT_PCI_DATA + (offset & 3)));
}

void pci_write32(pci_slot slot, unsigned offset, uint32_t value)
{
    point_at(slot, offset);
    outl(PORT_PCI_DATA, value);
}

void pci_write16(pci_slot slot, unsigned offset, uint16_t value)
{
    point_at(slot, offset);
    outw((uint16_t)(PORT_PCI_DATA + (offset & 2)), value);
}

uint64_t pci_ecam(void)
{
    const struct acpi_table *mcfg = acpi_find("MCFG");
    uint64_t base;

    for (uint32_t at = MCFG_FIRST; mcfg && at + MCFG_ENTRY <= mcfg->length; at += MCFG_ENTRY) {
        uint64_t entry = (uint64_t)mcfg + at;

        base = read64(entry);
        /* Segment 0, first bus 0. */
        if (read16(entry + 8) == 0 && read8(entry + 10) == 0 && map(base, 1 << 20))
            return base;
    }
    return 0;
}

unsigned pci_capability(pci_slot slot, uint8_t id, unsigned from)
{
    unsigned at;

    if (!(pci_read16(slot, PCI_STATUS) & PCI_STATUS_CAPABILITIES))
        return 0;
    at = pci_read8(slot, from ? from + 1 : PCI_CAPABILITIES);
    /* 48 capabilities fit: a longer list is a loop. */
    for (unsigned n = 0; at >= 0x40 && n < 48; n++) {
        if (pci_read8(slot, at) == id)
            return at;
        at = pci_read8(slot, at + 1);
    }
    return 0;
}

static uint32_t probe(pci_slot slot, unsigned offset, uint32_t old)
{
    uint32_t answer;

    pci_write32(slot, offset, 0xFFFFFFFF);
    answer = pci_read32(slot, offset);
    pci_write32(slot, offset, old);
    return answer;
}

struct pci_bar pci_bar(pci_slot slot, unsigned index)
{
    struct pci_bar bar = { 0 };
    unsigned offset = PCI_BAR0 + 4 * index;
    uint32_t low = pci_read32(slot, offset), high = 0, mask;
    uint16_t command = pci_read16(slot, PCI_COMMAND);
    uint64_t size;

    pci_write16(slot, PCI_COMMAND, command & (uint16_t)~(PCI_COMMAND_IO | PCI_COMMAND_MEMORY));
    bar.io = low & BAR_IO;
    bar.wide = !bar.io && (low & BAR_64);
    bar.prefetch = !bar.io && (low & BAR_PREFETCH);
    mask = bar.io ? 0xFFFFFFFC : 0xFFFFFFF0;
    size = probe(slot, offset, low) & mask;
    if (bar.wide) {
        high = pci_read32(slot, offset + 4);
        size |= (uint64_t)probe(slot, offset + 4, high) << 32;
    } else if (size) {
        size |= bar.io ? 0xFFFFFFFFFFFF0000 : 0xFFFFFFFF00000000;
    }
    pci_write16(slot, PCI_COMMAND, command);
    bar.size = size ? ~size + 1 : 0;
    bar.address = (uint64_t)high << 32 | (low & mask);
    return bar;
}

/* Some firmware (qboot) assigns nothing: then these guests do, from here. */
static uint64_t assign(pci_slot slot, unsigned index, const struct pci_bar *bar)
{
    static uint64_t next = PCI_MMIO32_START + 0x8000000;
    uint64_t address = (next + bar->size - 1) & ~(bar->size - 1);

    next = address + bar->size;
    pci_write32(slot, PCI_BAR0 + 4 * index, (uint32_t)address);
    if (bar->wide)
        pci_write32(slot, PCI_BAR0 + 4 * index + 4, 0);
    print("assigned=%02x.%x bar%u=%lx\n", slot >> 3, slot & 7, index, address);
    return address;
}

uint64_t pci_bar_address(pci_slot slot, unsigned index)
{
    struct pci_bar bar = pci_bar(slot, index);

    if (!bar.size || bar.io)
        fail("a BAR is not there or not memory");
    if (!bar.address)
        bar.address = assign(slot, index, &bar);
    if (!map(bar.address, bar.size))
        fail("a BAR lies where it cannot be mapped");
    return bar.address;
}

struct pci_msix pci_msix(pci_slot slot)
{
    struct pci_msix msix = { 0 };
    uint32_t table, pending;

    msix.capability = pci_capability(slot, PCI_CAP_MSIX, 0);
    if (!msix.capability)
        return msix;
    table = pci_read32(slot, msix.capability + MSIX_TABLE);
    pending = pci_read32(slot, msix.capability + MSIX_PENDING);
    msix.vectors = (pci_read16(slot, msix.capability + MSIX_CONTROL) & 0x7FFu) + 1;
    msix.table_bar = table & 7;
    msix.table_offset = table & ~7u;
    msix.pending_bar = pending & 7;
    msix.pending_offset = pending & ~7u;
    return msix;
}

void pci_msix_set(pci_slot slot, unsigned entry, uint32_t address, uint32_t data)
{
    struct pci_msix msix = pci_msix(slot);
    uint64_t at;

    if (entry >= msix.vectors)
        fail("the device has too few MSI-X vectors");
    at = pci_bar_address(slot, msix.table_bar) + msix.table_offset + entry * MSIX_ENTRY_SIZE;
    pci_write16(slot, msix.capability + MSIX_CONTROL,
                pci_read16(slot, msix.capability + MSIX_CONTROL) | MSIX_ENABLE);
    write32(at, address);
    write32(at + 4, 0);
    write32(at + 8, data);
    write32(at + 12, 0);
}
