/*
 * poke: does what the words of its command line say, in their order, and
 * prints the results as lines of key=value. See README.md for the words.
 */
#include "runtime/apic.h"
#include "runtime/pci.h"

static _Noreturn void after_reset_request(const char *what)
{
    uint64_t deadline = rdtsc() + 20000000000;

    while (rdtsc() < deadline)
        pause();
    print("still-here=%s\n", what);
    finish();
}

/* --- CPU ---------------------------------------------------------------- */

static void show_leaf(uint32_t leaf, uint32_t subleaf)
{
    struct cpuid c = cpuid(leaf, subleaf);

    /* Leaves that say nothing are left out. */
    if (c.eax | c.ebx | c.ecx | c.edx)
        print("cpuid.%x.%x=%08x,%08x,%08x,%08x\n", leaf, subleaf, c.eax, c.ebx, c.ecx, c.edx);
}

static void show_leaves(uint32_t first, uint32_t cap)
{
    uint32_t last = cpuid(first, 0).eax;

    print("cpuid.%x.max=%x\n", first, last);
    for (uint32_t leaf = first; leaf <= last && leaf < first + cap; leaf++) {
        unsigned subleaves = leaf == 4 || leaf == 0x1F || leaf == 0xB ? 4 : leaf == 7 || leaf == 0xD ? 2 : 1;

        for (uint32_t subleaf = 0; subleaf < subleaves; subleaf++)
            show_leaf(leaf, subleaf);
    }
}

static void poke_cpuid(void)
{
    struct cpuid signature = cpuid(0x40000000, 0);
    uint32_t text[4] = { signature.ebx, signature.ecx, signature.edx, 0 };

    show_leaves(0, 0x24);
    show_leaves(0x80000000, 0x23);
    show_leaf(0x40000000, 0);
    show_leaf(0x40000001, 0);
    print("hypervisor=%s\n", (const char *)text);
    print("x2apic=%u hypervisor-bit=%u tsc-deadline=%u\n", cpuid(1, 0).ecx >> 21 & 1,
          cpuid(1, 0).ecx >> 31, cpuid(1, 0).ecx >> 24 & 1);
    print("physical-bits=%u\n", cpuid(0x80000008, 0).eax & 0xFF);
}

static void poke_msr(void)
{
    static const struct {
        uint32_t msr;
        const char *name;
    } list[] = {
        { 0x10, "tsc" },           { 0x1B, "apic-base" },    { 0x3A, "feature-control" },
        { 0x8B, "microcode" },     { 0xCE, "platform-info" }, { 0xFE, "mtrr-cap" },
        { 0x10A, "arch-capabilities" }, { 0x1A0, "misc-enable" }, { 0x277, "pat" },
        { 0x2FF, "mtrr-def-type" }, { 0x802, "x2apic-id" },   { 0xC0000080, "efer" },
        { 0xC0000081, "star" },    { 0xC0000103, "tsc-aux" }, { 0x4B564D00, "kvm-wall-clock" },
        { 0x4B564D01, "kvm-system-time" }, { 0x12345678, "none-such" },
    };
    uint64_t value;

    for (unsigned i = 0; i < sizeof(list) / sizeof(list[0]); i++) {
        if (rdmsr(list[i].msr, &value))
            print("msr.%x=%lx name=%s\n", list[i].msr, value, list[i].name);
        else
            print("msr.%x=gp name=%s\n", list[i].msr, list[i].name);
    }
}

/* The KVM paravirtual clock: struct pvclock_vcpu_time_info. */
struct pvclock {
    volatile uint32_t version, pad;
    volatile uint64_t tsc, system_time;
    volatile uint32_t multiplier;
    volatile int8_t shift;
    volatile uint8_t flags, pad2[2];
};

static void poke_kvmclock(void)
{
    static struct pvclock clock __attribute__((aligned(64)));

    if (!wrmsr(0x4B564D01, (uint64_t)&clock | 1)) {
        print("kvmclock=gp\n");
        return;
    }
    print("kvmclock=%lu version=%u multiplier=%u shift=%d flags=%x\n", clock.system_time,
          clock.version, clock.multiplier, clock.shift, clock.flags);
}

/* --- Memory ------------------------------------------------------------- */

#define RANGE_RAM 1
#define PAGE 4096

static bool touch(uint64_t page)
{
    uint64_t old;
    bool good;

    if (!map(page, PAGE))
        return false;
    old = read64(page + PAGE - 8);
    write64(page + PAGE - 8, ~old);
    good = read64(page + PAGE - 8) == ~old;
    write64(page + PAGE - 8, old);
    return good;
}

static void poke_memmap(void)
{
    uint64_t low = 0, high = 0;
    bool hole_is_free = true;

    print("protocol=%s rsdp=%lx initrd=%lx+%lx\n", boot.protocol, boot.rsdp, boot.initrd,
          boot.initrd_length);
    for (unsigned i = 0; i < boot.ranges; i++) {
        const struct memory_range *r = &boot.range[i];
        uint64_t end = r->start + r->length;
        uint64_t first = (r->start + PAGE - 1) & ~(uint64_t)(PAGE - 1);
        uint64_t last = (end & ~(uint64_t)(PAGE - 1)) - PAGE;

        print("memory=%lx-%lx type=%u", r->start, end, r->type);
        if (r->type == RANGE_RAM) {
            /* Page 0 may hold nothing a guest should write. */
            print(" touch=%s", touch(first ? first : PAGE) && touch(last) ? "ok" : "bad");
            if (r->start < HIGH_RAM_START)
                low += r->length;
            else
                high += r->length;
            if (r->start < HIGH_RAM_START && end > LOW_RAM_END)
                hole_is_free = false;
        }
        print("\n");
    }
    print("ram=%lu low=%lu high=%lu hole=%s\n", low + high, low, high, hole_is_free ? "free" : "taken");
}

/* --- Ports -------------------------------------------------------------- */

static uint8_t cmos(uint8_t index)
{
    outb(PORT_RTC, index);
    return inb(PORT_RTC + 1);
}

static void cmos_write(uint8_t index, uint8_t value)
{
    outb(PORT_RTC, index);
    outb(PORT_RTC + 1, value);
}

#define RTC_A 0x0A
#define RTC_B 0x0B
#define RTC_A_UPDATING 0x80
#define RTC_B_BINARY 0x04
#define RTC_CENTURY 0x32

static unsigned from_rtc(uint8_t value)
{
    return cmos(RTC_B) & RTC_B_BINARY ? value : (value >> 4) * 10u + (value & 15);
}

static void poke_rtc(void)
{
    unsigned field[7] = { 0 };
    static const uint8_t index[7] = { 0, 2, 4, 7, 8, 9, RTC_CENTURY };

    for (unsigned tries = 0; tries < 10000 && (cmos(RTC_A) & RTC_A_UPDATING); tries++)
        pause();
    for (unsigned i = 0; i < 7; i++)
        field[i] = from_rtc(cmos(index[i]));
    print("rtc=%02u%02u-%02u-%02uT%02u:%02u:%02uZ\n", field[6], field[5], field[4], field[3],
          field[2], field[1], field[0]);
}

/* String instructions come to the monitor as one exit of several bytes. */
static void poke_outs(void)
{
    const char *text = "outs=0123456789abcdef\n";
    size_t length = strlen(text);
    uint8_t back[4] = { 0 };
    void *to = back;
    uint64_t count = sizeof(back);

    __asm__ volatile("rep outsb" : "+S"(text), "+c"(length) : "d"(PORT_COM1) : "memory");
    __asm__ volatile("rep insb" : "+D"(to), "+c"(count) : "d"(PORT_COM1 + 5) : "memory");
    print("ins=%02x,%02x,%02x,%02x\n", back[0], back[1], back[2], back[3]);
}

static uint64_t port_reads;

static void time_ports(const char *where)
{
    uint64_t begin = rdtsc(), ticks;

    count_port(PORT_PVPANIC, port_reads);
    ticks = rdtsc() - begin;
    print("portloop=%s reads=%lu ticks=%lu ticks-per-read=%lu\n", where, port_reads, ticks,
          ticks / port_reads);
}

static void portloop_cpl3(void)
{
    time_ports("cpl3");
}

static void poke_reset(const char *how)
{
    print("reset=%s\n", how);
    if (equal(how, "i8042")) {
        outb(PORT_I8042_COMMAND, 0xFE);
    } else if (equal(how, "cf9")) {
        outb(PORT_RESET, 0x02);
        outb(PORT_RESET, 0x06);
    } else if (equal(how, "triple")) {
        triple_fault();
    }
    after_reset_request(how);
}

/* --- Boots -------------------------------------------------------------- */

#define BOOT_MAGIC 0x4F45524956ull /* "VIREO" */
#define CMOS_MAGIC_AT 0x70
#define CMOS_COUNT_AT 0x71
#define CMOS_MAGIC 0xB7

/* Non-zero contents of these would mean that a reset did not load the image again. */
static volatile uint32_t dirty_bss;
static volatile uint32_t dirty_data = 0x600DDA7A;

/* Counts in RAM and in CMOS, for either may survive a reset; the larger one counts. */
static void poke_reboot_count(const char *how)
{
    uint64_t in_ram = 0, count;
    uint8_t in_cmos = 0;
    bool fresh = dirty_bss == 0 && dirty_data == 0x600DDA7A;

    if (read64(BOOT_COUNT_CELL) == BOOT_MAGIC)
        in_ram = read64(BOOT_COUNT_CELL + 8);
    if (cmos(CMOS_MAGIC_AT) == CMOS_MAGIC)
        in_cmos = cmos(CMOS_COUNT_AT);
    count = (in_ram > in_cmos ? in_ram : in_cmos) + 1;
    print("boot=%lu ram=%lu cmos=%u image=%s\n", count, in_ram, in_cmos, fresh ? "fresh" : "stale");
    dirty_bss = 1;
    dirty_data = 1;
    if (count >= 3) {
        write64(BOOT_COUNT_CELL, 0);
        cmos_write(CMOS_MAGIC_AT, 0);
        print("rebooted=2\n");
        return;
    }
    write64(BOOT_COUNT_CELL, BOOT_MAGIC);
    write64(BOOT_COUNT_CELL + 8, count);
    cmos_write(CMOS_MAGIC_AT, CMOS_MAGIC);
    cmos_write(CMOS_COUNT_AT, (uint8_t)count);
    poke_reset(how);
}

/* --- Console input ------------------------------------------------------ */

#define UART_IER 1
#define UART_IIR 2
#define UART_MCR 4
#define UART_LSR 5
#define UART_LSR_DATA 1
#define UART_LSR_EMPTY 0x20
#define UART_IER_RECEIVED 1
#define UART_MCR_OUT2 8

static volatile unsigned serial_interrupts;

static void on_serial(unsigned vector)
{
    (void)vector;
    serial_interrupts++;
    apic_end_of_interrupt();
}

static void poke_serial_echo(bool by_interrupt)
{
    char line[80];
    unsigned length = 0;

    if (by_interrupt) {
        apic_enable();
        on_interrupt(VECTOR_COM1, on_serial);
        ioapic_route(GSI_COM1, VECTOR_COM1);
        outb(PORT_COM1 + UART_MCR, UART_MCR_OUT2 | 3);
        outb(PORT_COM1 + UART_IER, UART_IER_RECEIVED);
    }
    print("echo=ready\n");
    for (;;) {
        char c;

        while (!(inb(PORT_COM1 + UART_LSR) & UART_LSR_DATA)) {
            if (by_interrupt)
                wait_for_interrupt();
            else
                pause();
        }
        c = (char)inb(PORT_COM1);
        if (c == '\n' || c == '\r' || length + 1 == sizeof(line)) {
            line[length] = 0;
            print("echo:%s\n", line);
            if (equal(line, "q"))
                break;
            length = 0;
        } else {
            line[length++] = c;
        }
    }
    if (by_interrupt)
        print("serial-interrupts=%u\n", serial_interrupts);
}

/* Gives back each letter that comes at COM2 to COM4, at the same port and in the other case. */
static void poke_serial_others(void)
{
    static const uint16_t ports[] = { 0x2F8, 0x3E8, 0x2E8 };

    print("others=ready\n");
    for (;;) {
        for (unsigned i = 0; i < sizeof(ports) / sizeof(ports[0]); i++) {
            uint8_t c;

            if (!(inb(ports[i] + UART_LSR) & UART_LSR_DATA))
                continue;
            c = inb(ports[i]);
            while (!(inb(ports[i] + UART_LSR) & UART_LSR_EMPTY))
                pause();
            outb(ports[i], c ^ 0x20);
        }
        pause();
    }
}

/* --- For debuggers, at CPL 3 -------------------------------------------- */

volatile uint64_t bp_calls, bp_argument, spin_count;

/* Break here; the argument is in %rdi. */
void bp_target(uint64_t argument);
__attribute__((noinline, noclone)) void bp_target(uint64_t argument)
{
    bp_argument = argument;
    bp_calls++;
}

static void gdb_cpl3(void)
{
    uint64_t calls = number_word("gdb", 3);

    for (uint64_t i = 1; i <= calls; i++)
        bp_target(i * 0x1111);
    print("bp-calls=%lu bp-argument=%lx\n", bp_calls, bp_argument);
}

void spin_here(void);
void spin_here(void)
{
    for (;;)
        spin_count++;
}

static void int3_cpl3(void)
{
    __asm__ volatile("int3");
    print("breakpoints=%u\n", breakpoints);
}

/* --- Watchdog ----------------------------------------------------------- */

#define WATCHDOG_SLOT (31 << 3)
#define WATCHDOG_CONFIG 0x60
#define WATCHDOG_LOCK 0x68
#define WATCHDOG_RELOAD 0x0C

static void unlock_watchdog(uint64_t registers)
{
    write16(registers + WATCHDOG_RELOAD, 0x80);
    write16(registers + WATCHDOG_RELOAD, 0x86);
}

/* Sets both stages of the i6300esb to some milliseconds and does not feed it. */
static void watchdog(void)
{
    uint64_t registers = pci_read32(WATCHDOG_SLOT, PCI_BAR0) & ~0xFu;

    print("watchdog=%08x\n", pci_read32(WATCHDOG_SLOT, PCI_VENDOR));
    if (pci_read32(WATCHDOG_SLOT, PCI_VENDOR) != 0x25AB8086)
        fail("there is no watchdog");
    print("ran-out=%u\n", read16(registers + WATCHDOG_RELOAD) >> 9 & 1);
    pci_write32(WATCHDOG_SLOT, WATCHDOG_CONFIG, 3);
    for (unsigned stage = 0; stage < 2; stage++) {
        unlock_watchdog(registers);
        write32(registers + 4 * stage, 4);
    }
    pci_write32(WATCHDOG_SLOT, WATCHDOG_LOCK, 2);
    to_cpl3(spin_here, false);
}

/* --- Words -------------------------------------------------------------- */

static void with_value(const char *word)
{
    const char *value;

    if ((value = after(word, "e9="))) {
        debugcon_write(value, strlen(value));
        debugcon_write("\n", 1);
    } else if ((value = after(word, "portloop="))) {
        port_reads = parse_number(value);
        if (!port_reads)
            fail("portloop wants a number");
        time_ports("cpl0");
        to_cpl3(portloop_cpl3, false);
    } else if ((value = after(word, "reset-"))) {
        poke_reset(value);
    } else if ((value = after(word, "reboot-count="))) {
        poke_reboot_count(value);
    } else if ((value = after(word, "out="))) {
        const char *comma = value;

        while (*comma && *comma != ',')
            comma++;
        outb((uint16_t)parse_number(value), *comma ? (uint8_t)parse_number(comma + 1) : 0);
    } else if ((value = after(word, "in="))) {
        print("in.%s=%02x\n", value, inb((uint16_t)parse_number(value)));
    } else if (after(word, "gdb=")) {
        to_cpl3(gdb_cpl3, false);
    }
}

static void panic(void)
{
    print("panic=event\n");
    outb(PORT_PVPANIC, 1);
}

static void reboot_count(void)
{
    poke_reboot_count("i8042");
}

static void echo_polling(void)
{
    poke_serial_echo(false);
}

static void echo_interrupts(void)
{
    poke_serial_echo(true);
}

static void triple(void)
{
    poke_reset("triple");
}

static void gdb(void)
{
    to_cpl3(gdb_cpl3, false);
}

static void int3(void)
{
    to_cpl3(int3_cpl3, false);
}

static void spin(void)
{
    print("spin=begin\n");
    to_cpl3(spin_here, false);
}

static const struct {
    const char *word;
    void (*run)(void);
} words[] = {
    { "cpuid", poke_cpuid },
    { "msr", poke_msr },
    { "kvmclock", poke_kvmclock },
    { "memmap", poke_memmap },
    { "rtc", poke_rtc },
    { "outs", poke_outs },
    { "panic", panic },
    { "poweroff", power_off },
    { "halt", halt },
    { "triple", triple },
    { "reboot-count", reboot_count },
    { "serial-echo", echo_polling },
    { "serial-echo-irq", echo_interrupts },
    { "serial-others", poke_serial_others },
    { "gdb", gdb },
    { "int3", int3 },
    { "spin", spin },
    { "watchdog", watchdog },
};

void main(void)
{
    const char *cursor = boot.cmdline;
    char word[256];

    while (next_word(&cursor, word, sizeof(word))) {
        unsigned i = 0;

        while (i < sizeof(words) / sizeof(words[0]) && !equal(words[i].word, word))
            i++;
        if (i < sizeof(words) / sizeof(words[0]))
            words[i].run();
        else
            with_value(word);
    }
    print("poke=done\n");
}
