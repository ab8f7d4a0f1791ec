/*
 * resize: takes vCPUs and memory that come, and gives vCPUs back, by the
 * registers that the machine's AML uses (devices/src/acpi/hotplug.rs). Says
 * at each boot what it found.
 */
#include "runtime/acpi.h"
#include "runtime/apic.h"

#define GED_EVENTS 0x604
#define EVENT_CPU 4
#define EVENT_MEMORY 8

#define CPU_SLOTS 0x620
#define MEMORY_SLOTS 0x640
#define SELECT 0
#define STATUS 4
#define NEXT 8
#define OST_EVENT 8
#define OST_STATUS 12
#define BASE 16
#define LENGTH 24
#define NEW 2
#define TO_GO 4
#define GIVE_BACK 8
#define NO_SLOT 0xFFFFFFFF
#define DEVICE_CHECK 1
#define EJECT_REQUEST 3
#define BUSY 0x82

#define MADT_FIRST 44
#define MIB (1ull << 20)

/* Counts the starts of each APIC id, below 64 KiB for real mode to reach. */
#define SEEN 0x9000

extern const char trampoline[], trampoline_end[];
__asm__(".section .rodata\n"
        "    .code16\n"
        "trampoline:\n"
        "    cli\n"
        "    xor %eax, %eax\n"
        "    mov %ax, %ds\n"
        "    mov $1, %eax\n"
        "    cpuid\n"
        "    shr $24, %ebx\n"
        "    incb 0x9000(%ebx)\n"
        "1:  hlt\n"
        "    jmp 1b\n"
        "trampoline_end:\n"
        "    .code64\n"
        "    .previous\n");

/* How many processors the MADT has with this flag. */
static unsigned processors(uint32_t flag)
{
    const struct acpi_table *madt = acpi_find("APIC");
    unsigned count = 0;
    uint64_t at, end;

    if (!madt)
        fail("no MADT");
    end = (uint64_t)madt + madt->length;
    for (at = (uint64_t)madt + MADT_FIRST; at + 8 <= end; at += read8(at + 1))
        count += read8(at) == 0 && (read32(at + 4) & flag);
    return count;
}

static void start(uint32_t id)
{
    uint8_t before = read8(SEEN + id);

    apic_send(id, ICR_INIT);
    apic_send(id, ICR_STARTUP | AP_TRAMPOLINE >> 12);
    while (read8(SEEN + id) == before)
        pause();
    print("cpu=%u starts=%u\n", id, read8(SEEN + id));
}

static void answer(uint16_t slots, uint32_t event, uint32_t status)
{
    outl(slots + OST_EVENT, event);
    outl(slots + OST_STATUS, status);
}

static void take_cpu(uint32_t slot, uint32_t status)
{
    if (status & NEW) {
        start(slot);
        answer(CPU_SLOTS, DEVICE_CHECK, 0);
    }
    if (!(status & TO_GO))
        return;
    if (has_word("keep")) {
        print("keeps=%u\n", slot);
        answer(CPU_SLOTS, EJECT_REQUEST, BUSY);
    } else {
        print("gives=%u\n", slot);
        outl(CPU_SLOTS + STATUS, GIVE_BACK);
    }
}

static uint64_t in64(uint16_t port)
{
    return inl(port) | (uint64_t)inl(port + 4) << 32;
}

static void take_memory(uint32_t slot, uint32_t status)
{
    uint64_t base = in64(MEMORY_SLOTS + BASE), length = in64(MEMORY_SLOTS + LENGTH);
    uint64_t last = base + length - 8;
    bool clear;

    if (!(status & NEW) || !map(base, length))
        fail("memory that is none");
    clear = !read64(base) && !read64(last);
    write64(base, base);
    write64(last, last);
    if (read64(base) != base || read64(last) != last)
        fail("memory that does not keep what is written");
    print("memory=%u at=%lx mib=%lu clear=%u\n", slot, base, (unsigned long)(length / MIB), clear);
    answer(MEMORY_SLOTS, DEVICE_CHECK, 0);
}

static void take(uint16_t slots, void (*each)(uint32_t slot, uint32_t status))
{
    uint32_t slot, status;

    while ((slot = inl(slots + NEXT)) != NO_SLOT) {
        outl(slots + SELECT, slot);
        status = inl(slots + STATUS);
        outl(slots + STATUS, status & (NEW | TO_GO));
        each(slot, status);
    }
}

void main(void)
{
    uint64_t ram = 0;

    apic_enable();
    memset((void *)SEEN, 0, 256);
    memcpy((void *)AP_TRAMPOLINE, trampoline, (size_t)(trampoline_end - trampoline));
    for (unsigned i = 0; i < boot.ranges; i++)
        if (boot.range[i].type == 1 && boot.range[i].start >= HIMEM_START)
            ram += boot.range[i].length;
    print("boot cpus=%u more=%u mib=%lu\n", processors(1), processors(2),
          (unsigned long)(ram / MIB + 1));
    while (!has_word("deaf")) {
        uint32_t events = inl(GED_EVENTS);

        if (events & EVENT_CPU)
            take(CPU_SLOTS, take_cpu);
        if (events & EVENT_MEMORY)
            take(MEMORY_SLOTS, take_memory);
    }
    halt();
}
