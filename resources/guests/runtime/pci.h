/* PCI configuration space of bus 0, by ports 0xCF8 and 0xCFC and by ECAM. */
#ifndef PCI_H
#define PCI_H

#include "runtime.h"

#define PCI_VENDOR 0x00
#define PCI_DEVICE 0x02
#define PCI_COMMAND 0x04
#define PCI_STATUS 0x06
#define PCI_REVISION 0x08
#define PCI_HEADER_TYPE 0x0E
#define PCI_BAR0 0x10
#define PCI_SUBSYSTEM_VENDOR 0x2C
#define PCI_SUBSYSTEM 0x2E
#define PCI_CAPABILITIES 0x34

#define PCI_COMMAND_IO 0x1
#define PCI_COMMAND_MEMORY 0x2
#define PCI_COMMAND_MASTER 0x4
#define PCI_STATUS_CAPABILITIES 0x10
#define PCI_MULTIFUNCTION 0x80

#define PCI_CAP_VENDOR 0x09
#define PCI_CAP_MSIX 0x11

/* A function: device << 3 | function. */
typedef uint8_t pci_slot;

uint32_t pci_read32(pci_slot slot, unsigned offset);
uint16_t pci_read16(pci_slot slot, unsigned offset);
uint8_t pci_read8(pci_slot slot, unsigned offset);
void pci_write32(pci_slot slot, unsigned offset, uint32_t value);
void pci_write16(pci_slot slot, unsigned offset, uint16_t value);

/* Where ECAM is for bus 0 according to MCFG; 0 when there is none. */
uint64_t pci_ecam(void);

/* The first capability with this id past `from` (0: from the start), or 0. */
unsigned pci_capability(pci_slot slot, uint8_t id, unsigned from);

struct pci_bar {
    bool io, wide, prefetch;
    uint64_t address, size; /* size 0: no such BAR */
};
/* Measures a BAR; decoding is off meanwhile. */
struct pci_bar pci_bar(pci_slot slot, unsigned index);
/* The address alone, mapped; assigns one, and says so, when firmware did not. */
uint64_t pci_bar_address(pci_slot slot, unsigned index);

struct pci_msix {
    unsigned capability; /* 0: none */
    unsigned vectors;
    unsigned table_bar, pending_bar;
    uint32_t table_offset, pending_offset;
};
struct pci_msix pci_msix(pci_slot slot);
/* Enables MSI-X and unmasks one entry with this message. */
void pci_msix_set(pci_slot slot, unsigned entry, uint32_t address, uint32_t data);

#endif
