/*
 * smp: starts every CPU of the MADT by INIT and SIPI, and counts them. A
 * started CPU notes its APIC id, in real mode, and halts.
 */
#include "runtime/acpi.h"
#include "runtime/apic.h"

#define MADT_FIRST 44
#define MADT_LOCAL_APIC 0
#define MADT_LOCAL_X2APIC 9
#define MADT_ENABLED 1

#define MAX_IDS 1024

/* One byte for each APIC id, below 64 KiB for real mode to reach. */
#define SEEN 0x9000

/* At AP_TRAMPOLINE, cs = AP_TRAMPOLINE >> 4: sets the byte of the CPU's own id. */
extern const char trampoline[], trampoline_end[];
__asm__(".section .rodata\n"
        "    .code16\n"
        "trampoline:\n"
        "    cli\n"
        "    xor %eax, %eax\n"
        "    mov %ax, %ds\n"
        "    cpuid\n"
        "    cmp $0xB, %eax\n"
        "    jb 1f\n"
        "    mov $0xB, %eax\n"
        "    xor %ecx, %ecx\n"
        "    cpuid\n"
        "    test %ebx, %ebx\n"
        "    jnz 2f\n"
        "1:  mov $1, %eax\n"
        "    cpuid\n"
        "    shr $24, %ebx\n"
        "    mov %ebx, %edx\n"
        "2:  and $1023, %edx\n"
        "    incb 0x9000(%edx)\n"
        "3:  hlt\n"
        "    jmp 3b\n"
        "trampoline_end:\n"
        "    .code64\n"
        "    .previous\n");

static uint32_t ids[MAX_IDS];
static unsigned id_count;

static void read_madt(void)
{
    const struct acpi_table *madt = acpi_find("APIC");
    uint64_t at, end;

    if (!madt)
        fail("no MADT");
    end = (uint64_t)madt + madt->length;
    for (at = (uint64_t)madt + MADT_FIRST; at + 2 <= end && read8(at + 1) >= 2; at += read8(at + 1)) {
        uint32_t id, flags;

        if (read8(at) == MADT_LOCAL_APIC) {
            id = read8(at + 3);
            flags = read32(at + 4);
        } else if (read8(at) == MADT_LOCAL_X2APIC) {
            id = read32(at + 4);
            flags = read32(at + 8);
        } else {
            continue;
        }
        if ((flags & MADT_ENABLED) && id_count < MAX_IDS)
            ids[id_count++] = id;
    }
}

static unsigned count_seen(void)
{
    unsigned n = 0;

    for (unsigned i = 0; i < id_count; i++)
        n += read8(SEEN + ids[i] % MAX_IDS) == 1;
    return n;
}

void main(void)
{
    uint32_t self;
    unsigned started = 0;
    uint64_t deadline;

    read_madt();
    apic_enable();
    self = apic_id();
    memset((void *)SEEN, 0, MAX_IDS);
    memcpy((void *)AP_TRAMPOLINE, trampoline, (size_t)(trampoline_end - trampoline));
    for (unsigned i = 0; i < id_count; i++)
        if (ids[i] != self)
            apic_send(ids[i], ICR_INIT);
    for (unsigned i = 0; i < id_count; i++)
        if (ids[i] != self)
            apic_send(ids[i], ICR_STARTUP | AP_TRAMPOLINE >> 12);
    write8(SEEN + self % MAX_IDS, 1);
    /* Seconds: nothing here depends on the length, only a failure takes it. */
    deadline = rdtsc() + number_word("ticks", 20000000000);
    while (started < id_count && rdtsc() < deadline)
        started = count_seen();
    for (unsigned i = 0; i < id_count; i++)
        if (read8(SEEN + ids[i] % MAX_IDS) != 1)
            print("missing=%u\n", ids[i]);
    print("mode=%s\nbsp=%u\nmadt=%u\ncpus=%u\n", apic_is_x2() ? "x2apic" : "xapic", self, id_count,
          started);
}
