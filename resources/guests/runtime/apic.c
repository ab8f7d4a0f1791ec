#include "apic.h"

/* Register numbers; the address in xAPIC mode is 16 times that. */
#define REG_ID 0x02
#define REG_EOI 0x0B
#define REG_SPURIOUS 0x0F
#define REG_ICR 0x30
#define REG_ICR_HIGH 0x31

#define SPURIOUS_ENABLE 0x100
#define ICR_PENDING 0x1000

#define MSR_APIC_BASE 0x1B
#define MSR_X2APIC 0x800
#define APIC_BASE_X2 (1u << 10)
#define APIC_BASE_ENABLE (1u << 11)
#define CPUID_1_ECX_X2APIC (1u << 21)

#define PORT_PIC1_MASK 0x21
#define PORT_PIC2_MASK 0xA1

#define IOAPIC_SELECT 0x00
#define IOAPIC_WINDOW 0x10
#define IOAPIC_REDIRECTION 0x10
#define IOAPIC_LEVEL 0x8000

static bool x2;

static uint32_t get(unsigned reg)
{
    uint64_t value;

    if (!x2)
        return read32(LAPIC_BASE + reg * 16);
    if (!rdmsr(MSR_X2APIC + reg, &value))
        fail("an x2APIC register cannot be read");
    return (uint32_t)value;
}

static void set(unsigned reg, uint32_t value)
{
    if (!x2)
        write32(LAPIC_BASE + reg * 16, value);
    else if (!wrmsr(MSR_X2APIC + reg, value))
        fail("an x2APIC register cannot be written");
}

void apic_enable(void)
{
    uint64_t base;

    outb(PORT_PIC1_MASK, 0xFF);
    outb(PORT_PIC2_MASK, 0xFF);
    if (!rdmsr(MSR_APIC_BASE, &base))
        fail("no APIC base MSR");
    x2 = (cpuid(1, 0).ecx & CPUID_1_ECX_X2APIC) && !has_word("xapic");
    if (!(base & APIC_BASE_ENABLE))
        wrmsr(MSR_APIC_BASE, base |= APIC_BASE_ENABLE);
    if (x2 && !(base & APIC_BASE_X2) && !wrmsr(MSR_APIC_BASE, base | APIC_BASE_X2))
        fail("x2APIC cannot be enabled");
    set(REG_SPURIOUS, SPURIOUS_ENABLE | VECTOR_SPURIOUS);
}

bool apic_is_x2(void)
{
    return x2;
}

uint32_t apic_id(void)
{
    return x2 ? get(REG_ID) : get(REG_ID) >> 24;
}

void apic_end_of_interrupt(void)
{
    set(REG_EOI, 0);
}

void apic_send(uint32_t id, uint32_t command)
{
    if (x2) {
        if (!wrmsr(MSR_X2APIC + REG_ICR, (uint64_t)id << 32 | command))
            fail("the x2APIC command register cannot be written");
        return;
    }
    set(REG_ICR_HIGH, id << 24);
    set(REG_ICR, command);
    while (get(REG_ICR) & ICR_PENDING)
        pause();
}

static void ioapic_write(unsigned reg, uint32_t value)
{
    write32(IOAPIC_BASE + IOAPIC_SELECT, reg);
    write32(IOAPIC_BASE + IOAPIC_WINDOW, value);
}

void ioapic_route(unsigned pin, unsigned vector)
{
    ioapic_write(IOAPIC_REDIRECTION + 2 * pin + 1, apic_id() << 24);
    ioapic_write(IOAPIC_REDIRECTION + 2 * pin, vector);
}

void ioapic_route_level(unsigned pin, unsigned vector)
{
    ioapic_route(pin, vector | IOAPIC_LEVEL);
}

uint32_t msi_address(void)
{
    return LAPIC_BASE | apic_id() << 12;
}
