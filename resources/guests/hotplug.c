/*
 * hotplug: hears of PCI functions that come and go by the hot-plug registers,
 * drives the disks among them, and gives up what it is asked for. See README.md.
 */
#include "runtime/apic.h"
#include "runtime/blkdev.h"

#define EVENT_PCI_HOTPLUG 2

#define UP (PORT_PCI_HOTPLUG + 0)
#define DOWN (PORT_PCI_HOTPLUG + 4)
#define EJECT (PORT_PCI_HOTPLUG + 8)

static bool driven, undriven, busy, unasked;
static unsigned left;

static uint32_t id_at(unsigned slot)
{
    return pci_read32((pci_slot)(slot << 3), PCI_VENDOR);
}

/* Reads the disk's first sector, and writes its second. */
static void drive(unsigned slot)
{
    static char sector[SECTOR] __attribute__((aligned(512)));
    char text[17] = { 0 };
    uint8_t status;
    unsigned nth = 0;

    do {
        if (!virtio_find(&blk.device, VIRTIO_BLK, nth++))
            return;
    } while (blk.device.slot >> 3 != slot);
    driven = true;
    blk_start(1, 16, 4, BLK_F_ALL, false);
    status = blk_do(BLK_IN, 0, sector, SECTOR);
    memcpy(text, sector, sizeof(text) - 1);
    print("disk=%02x sectors=%lu status=%u text=%s\n", slot, blk.sectors, status, text);
    memset(sector, 0x5A, SECTOR);
    status = blk_do(BLK_OUT, 1, sector, SECTOR);
    print("wrote=%02x status=%u\n", slot, status);
}

static void give_up(unsigned slot)
{
    uint64_t common = blk.device.common;

    if (driven && !busy && !virtio_reset(&blk.device))
        fail("the device does not reset");
    outl(EJECT, 1u << slot);
    while (inl(EJECT) & 1u << slot)
        pause();
    if (id_at(slot) != 0xFFFFFFFF) {
        print("kept=%02x down=%08x\n", slot, inl(DOWN));
        return;
    }
    /* Nothing answers where its registers were. */
    print("gone=%02x down=%08x", slot, inl(DOWN));
    if (driven)
        print(" registers=%08x", read32(common));
    print("\n");
    driven = false;
    left--;
}

static void came(unsigned slot)
{
    print("up=%02x id=%08x\n", slot, id_at(slot));
    if (unasked)
        give_up(slot);
    else if (!undriven)
        drive(slot);
}

static void handle(void)
{
    uint32_t events = inl(PORT_GED_EVENTS), up, down;

    if (!(events & EVENT_PCI_HOTPLUG))
        return;
    up = inl(UP);
    down = inl(DOWN);
    for (unsigned slot = 0; slot < 32; slot++)
        if (up & 1u << slot)
            came(slot);
    for (unsigned slot = 0; slot < 32; slot++)
        if (down & 1u << slot)
            give_up(slot);
}

static volatile unsigned interrupts;

static void on_event(unsigned vector)
{
    (void)vector;
    interrupts++;
    /* The line is high until the register has been read. */
    handle();
    apic_end_of_interrupt();
}

/* Listens only once the event is there: it must not have been lost. */
static void listen_late(void)
{
    apic_enable();
    on_interrupt(VECTOR_GED, on_event);
    print("hotplug=deaf\n");
    while (!inl(DOWN))
        pause();
    ioapic_route_level(GSI_GED, VECTOR_GED);
    while (left)
        wait_for_interrupt();
    print("interrupts=%u\n", interrupts);
}

void main(void)
{
    undriven = has_word("undriven");
    busy = has_word("busy");
    unasked = has_word("unasked");
    left = (unsigned)number_word("count", 1);
    if (has_word("irq")) {
        listen_late();
        return;
    }
    print("hotplug=ready up=%08x down=%08x\n", inl(UP), inl(DOWN));
    while (left)
        handle();
}
