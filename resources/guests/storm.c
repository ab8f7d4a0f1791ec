/*
 * storm: does what no driver would, without end or for a number of rounds, so
 * that a test can watch the monitor meanwhile. See README.md for the words.
 */
#include "runtime/acpi.h"
#include "runtime/apic.h"
#include "runtime/blkdev.h"

/* Every started CPU writes the byte at AP_BYTE to the port at AP_PORT for ever. */
#define AP_PORT 0x9000
#define AP_BYTE 0x9002

extern const char storm_trampoline[], storm_trampoline_end[];
__asm__(".section .rodata\n"
        "    .code16\n"
        "storm_trampoline:\n"
        "    cli\n"
        "    xor %eax, %eax\n"
        "    mov %ax, %ds\n"
        "1:  mov 0x9000, %dx\n"
        "    mov 0x9002, %al\n"
        "    out %al, %dx\n"
        "    jmp 1b\n"
        "storm_trampoline_end:\n"
        "    .code64\n"
        "    .previous\n");

/* All CPUs write `byte` to `port` for ever. */
static _Noreturn void all_write(uint16_t port, uint8_t byte)
{
    unsigned cpus = (unsigned)number_word("cpus", 4);

    apic_enable();
    write16(AP_PORT, port);
    write8(AP_BYTE, byte);
    memcpy((void *)AP_TRAMPOLINE, storm_trampoline,
           (size_t)(storm_trampoline_end - storm_trampoline));
    for (unsigned id = 1; id < cpus; id++)
        apic_send(id, ICR_INIT);
    for (unsigned id = 1; id < cpus; id++)
        apic_send(id, ICR_STARTUP | AP_TRAMPOLINE >> 12);
    for (;;)
        outb(port, byte);
}

/* Ports that end the machine by design. */
static bool ends(uint16_t port, unsigned width)
{
    static const uint16_t fatal[] = { PORT_I8042_COMMAND, PORT_PVPANIC, PORT_SLEEP_CONTROL, PORT_RESET };

    for (unsigned i = 0; i < sizeof(fatal) / sizeof(fatal[0]); i++)
        if (port <= fatal[i] && port + width > fatal[i])
            return true;
    return false;
}

static void fuzz_ports(uint64_t rounds)
{
    static const struct {
        uint16_t first, count;
    } range[] = {
        { 0x20, 2 }, { 0x40, 4 }, { 0x60, 5 }, { 0x70, 2 }, { 0x80, 1 }, { 0x92, 1 }, { 0xA0, 2 },
        { 0xE9, 1 }, { 0x3F8, 8 }, { 0x4D0, 2 }, { 0x500, 16 }, { 0x600, 32 }, { 0xCF8, 8 },
        { 0xFFFC, 4 },
    };

    for (uint64_t i = 0; i < rounds; i++) {
        uint64_t r = random_next();
        unsigned n = (unsigned)(r % (sizeof(range) / sizeof(range[0])));
        uint16_t port = (uint16_t)(range[n].first + (r >> 8) % range[n].count);
        unsigned width = 1u << (r >> 16) % 3;
        uint32_t value = (uint32_t)(r >> 32);

        if (r >> 20 & 1) {
            if (width == 1)
                inb(port);
            else if (width == 2)
                inw(port);
            else
                inl(port);
            continue;
        }
        if (ends(port, width))
            continue;
        if (width == 1)
            outb(port, (uint8_t)value);
        else if (width == 2)
            outw(port, (uint16_t)value);
        else
            outl(port, value);
    }
}

static void access_at(uint64_t address, unsigned width, bool write, uint64_t value)
{
    switch (width << 1 | write) {
    case 2: read8(address); break;
    case 3: write8(address, (uint8_t)value); break;
    case 4: read16(address); break;
    case 5: write16(address, (uint16_t)value); break;
    case 8: read32(address); break;
    case 9: write32(address, (uint32_t)value); break;
    case 16: read64(address); break;
    default: write64(address, value); break;
    }
}

/* A value that is interesting more often than chance makes it. */
static uint64_t spicy(uint64_t r)
{
    static const uint64_t list[] = { 0, 1, 2, 3, 4, 7, 0xF, 0xFF, 0x100, 0x7FFF, 0x8000, 0xFFFF,
                                     0xFFFFFFFF, 0x80000000, 0xC0000000, 0xE0000000, 0xFEE00000,
                                     ~0ull, 0x8000000000000000ull, 0xFFFFFFFFFFFFF000ull };

    return r & 1 ? list[(r >> 1) % (sizeof(list) / sizeof(list[0]))] : random_next();
}

/* Configuration space of all slots and the devices' registers, while they move about. */
static void fuzz_pci(uint64_t rounds)
{
    struct virtio_device device[8];
    unsigned devices = 0;

    while (devices < 4 && virtio_find(&device[devices], VIRTIO_BLK, devices))
        devices++;
    if (virtio_find(&device[devices], VIRTIO_RNG, 0))
        devices++;
    print("devices=%u\n", devices);
    for (uint64_t i = 0; i < rounds; i++) {
        uint64_t r = random_next();
        unsigned width = 1u << (r >> 4) % 4;
        bool write = r >> 8 & 1;
        struct virtio_device *d = &device[(r >> 12) % devices];
        uint64_t value = spicy(random_next());

        switch (r & 7) {
        case 0:
            access_at(ECAM_START + (random_next() & 0xFFFFF), width, write, value);
            break;
        case 1: /* the header and capabilities of a device */
            access_at(ECAM_START + ((uint64_t)d->slot << 12) + (random_next() & 0xFF), width, write, value);
            break;
        case 2:
            pci_write32(d->slot, PCI_BAR0 + 4 * (unsigned)(r >> 20 & 7), (uint32_t)value);
            break;
        case 3: /* decoding and mastering on again */
            pci_write16(d->slot, PCI_COMMAND, r >> 24 & 3 ? 6 : (uint16_t)value);
            break;
        case 4:
            if (r >> 20 & 7)
                access_at(0xC0000000 + (random_next() & 0x1FFFFFFF & ~7ull), width, write, value);
            else
                access_at(d->common + (random_next() & 0xFFFFF), width, write, value);
            break;
        default: {
            uint64_t bar = pci_read32(d->slot, PCI_BAR0 + 4 * (unsigned)(r >> 24 & 4)) & ~15ull;
            bar |= (uint64_t)pci_read32(d->slot, PCI_BAR0 + 4 * (unsigned)(r >> 24 & 4) + 4) << 32;
            uint64_t offset = r >> 27 & 1 ? random_next() & 0x7F : random_next() & 0x7FFFF;
            if (bar >= 0xC0000000 && bar < 0xE0000000)
                access_at(bar + offset, width, write, value);
            else if (bar >= HIGH_RAM_START && bar < (20ull << 30) && map(bar & ~0x1FFFFFull, 0x400000))
                access_at(bar + offset, width, write, value);
        }
        }
    }
}

/* Requests are on their way while status, queues and places change. */
static void fuzz_blk(uint64_t rounds)
{
    struct blk_segment segment;

    if (!virtio_find(&blk.device, VIRTIO_BLK, 0))
        fail("no disk");
    segment.at = allocate(65536, 4096);
    segment.length = 65536;
    for (uint64_t i = 0; i < rounds; i++) {
        uint64_t r = random_next();
        unsigned queues = 1 + (unsigned)(r >> 3) % (unsigned)number_word("queues", 1);

        blk_start(queues, 64, 4, blk_wanted(), r >> 10 & 1);
        for (unsigned s = 0; s < 32 && s < blk.slots; s++) {
            segment.length = 512u << random_next() % 8;
            blk_submit(s, random_next() & 1, random_next() % 1024, &segment, 1);
        }
        blk_kick();
        switch (r & 7) {
        case 0: virtio_reset(&blk.device); break;
        case 1: pci_write16(blk.device.slot, PCI_COMMAND, 0); break;
        case 2: pci_write16(blk.device.slot, PCI_COMMAND, 2); break;
        case 3: write16(blk.device.common + 0x16, 0); write16(blk.device.common + 0x18, 3); break;
        case 4: write8(blk.device.common + 0x14, 0x80); break;
        case 5: write64(blk.device.common + 0x20, ~0ull); break;
        case 6: memset((void *)blk.queue[0].desc, 0xFF, 64 * 16); blk_kick(); break;
        default:
            for (unsigned k = 0; k < 100; k++)
                write16(blk.queue[0].doorbell, (uint16_t)random_next());
        }
        pci_write16(blk.device.slot, PCI_COMMAND, 6);
    }
}

#define MSR_MTRR_DEF_TYPE 0x2FF
#define CMOS_FLAG_AT 0x72
#define CMOS_FLAG 0xA5

/* Switches the MTRRs off and resets, once: what does the next boot find? */
static void reset_without_mtrrs(void)
{
    uint64_t value = 0;

    rdmsr(MSR_MTRR_DEF_TYPE, &value);
    print("mtrr=%lx\n", value);
    outb(PORT_RTC, CMOS_FLAG_AT);
    if (inb(PORT_RTC + 1) == CMOS_FLAG)
        return;
    outb(PORT_RTC + 1, CMOS_FLAG);
    wrmsr(MSR_MTRR_DEF_TYPE, 0);
    outb(PORT_I8042_COMMAND, 0xFE);
    halt();
}

void main(void)
{
    for (uint64_t seed = number_word("seed", 1); seed; seed--)
        random_next();
    print("storm=begin\n");
    if (has_word("crash-loaded"))
        all_write(PORT_PVPANIC, 2);
    if (text_word("all-write"))
        all_write((uint16_t)number_word("all-write", 0), (uint8_t)number_word("byte", 0));
    if (has_word("ports")) {
        fuzz_ports(number_word("rounds", 100000));
        print("ports=done\n");
    }
    if (has_word("mtrr"))
        reset_without_mtrrs();
    if (has_word("pci")) {
        fuzz_pci(number_word("rounds", 100000));
        print("pci=done\n");
    }
    if (has_word("blk")) {
        fuzz_blk(number_word("rounds", 1000));
        print("blk=done\n");
    }
}
