/* CPU, memory and the way in and out. See runtime.h. */
#include "runtime.h"

#define PVH_MAGIC 0x336EC578

/* Xen's hvm_start_info, version 1. */
struct pvh_start_info {
    uint32_t magic, version, flags, modules;
    uint64_t module_list, cmdline, rsdp, memory_map;
    uint32_t memory_map_entries, reserved;
};

struct pvh_module {
    uint64_t start, length, cmdline, reserved;
};

struct pvh_memory {
    uint64_t start, length;
    uint32_t type, reserved;
};

/* boot_params of the Linux boot protocol: the offsets used here. */
#define LINUX_RSDP 0x070
#define LINUX_E820_ENTRIES 0x1E8
#define LINUX_INITRD 0x218
#define LINUX_INITRD_LENGTH 0x21C
#define LINUX_CMDLINE 0x228
#define LINUX_E820 0x2D0
#define LINUX_E820_ENTRY 20

struct boot_info boot;

extern uint64_t pdpt[512];
extern const char call0_trap[];
_Noreturn void enter_cpl3(void (*fn)(void), uint64_t rflags);

static interrupt_fn *interrupt_handler[VECTORS];
/* Where a #GP goes on; 0 when none is expected. */
static volatile uint64_t recover_rip;
static void (*cpl3_main)(void);
volatile unsigned breakpoints;

/* --- CPU ---------------------------------------------------------------- */

bool at_cpl0(void)
{
    uint16_t cs;

    __asm__("mov %%cs, %0" : "=r"(cs));
    return !(cs & 3);
}

static void cpl3_start(void)
{
    cpl3_main();
    finish();
}

#define PORT_PIC1_MASK 0x21
#define PORT_PIC2_MASK 0xA1

/* IOPL 3 and the bit that is always set; IF. */
#define RFLAGS_CPL3 0x3002
#define RFLAGS_IF 0x200

void to_cpl3(void (*fn)(void), bool interrupts)
{
    /* Firmware may have left the PIT's interrupt on. */
    outb(PORT_PIC1_MASK, 0xFF);
    outb(PORT_PIC2_MASK, 0xFF);
    cpl3_main = fn;
    enter_cpl3(cpl3_start, RFLAGS_CPL3 | (interrupts ? RFLAGS_IF : 0));
}

struct cpuid cpuid(uint32_t leaf, uint32_t subleaf)
{
    struct cpuid c;

    __asm__ volatile("cpuid"
                     : "=a"(c.eax), "=b"(c.ebx), "=c"(c.ecx), "=d"(c.edx)
                     : "a"(leaf), "c"(subleaf));
    return c;
}

/* One instruction that may raise #GP: ok is then 0. */
#define EXPECT_GP(instruction)                                                         \
    "movq $1f, recover_rip\n\t"                                                        \
    "xor %[ok], %[ok]\n\t" instruction "\n\t"                                          \
    "inc %[ok]\n"                                                                      \
    "1:\n\t"                                                                           \
    "movq $0, recover_rip"

bool rdmsr(uint32_t msr, uint64_t *value)
{
    uint32_t low = 0, high = 0;
    uint64_t ok;

    __asm__ volatile(EXPECT_GP("rdmsr")
                     : "+a"(low), "+d"(high), [ok] "=&r"(ok)
                     : "c"(msr)
                     : "memory", "cc");
    *value = (uint64_t)high << 32 | low;
    return ok != 0;
}

bool wrmsr(uint32_t msr, uint64_t value)
{
    uint64_t ok;

    __asm__ volatile(EXPECT_GP("wrmsr")
                     : [ok] "=&r"(ok)
                     : "c"(msr), "a"((uint32_t)value), "d"((uint32_t)(value >> 32))
                     : "memory", "cc");
    return ok != 0;
}

void on_interrupt(unsigned vector, interrupt_fn *fn)
{
    if (vector < VECTORS)
        interrupt_handler[vector] = fn;
}

void wait_for_interrupt(void)
{
    __asm__ volatile("sti; hlt; cli" : : : "memory");
}

void triple_fault(void)
{
    static const struct {
        uint16_t limit;
        uint64_t base;
    } __attribute__((packed)) no_idt = { 0, 0 };

    __asm__ volatile("lidt %0; ud2" : : "m"(no_idt));
    __builtin_unreachable();
}

static uint64_t halt0(uint64_t a, uint64_t b)
{
    (void)a;
    (void)b;
    for (;;)
        __asm__ volatile("cli; hlt" : : : "memory");
    return 0;
}

void halt(void)
{
    if (at_cpl0())
        halt0(0, 0);
    call0(halt0, 0, 0);
    __builtin_unreachable();
}

#define VECTOR_BREAKPOINT 3
#define VECTOR_INVALID_OPCODE 6
#define VECTOR_GP 13
#define VECTOR_FIRST_INTERRUPT 0x20

/* Called by trap_gate. */
void trap(struct trap_frame *frame);
void trap(struct trap_frame *frame)
{
    uint64_t cr2;

    if (frame->vector >= VECTOR_FIRST_INTERRUPT) {
        if (interrupt_handler[frame->vector])
            interrupt_handler[frame->vector]((unsigned)frame->vector);
        return;
    }
    if (frame->vector == VECTOR_INVALID_OPCODE && frame->rip == (uint64_t)call0_trap) {
        uint64_t (*fn)(uint64_t, uint64_t) = (uint64_t(*)(uint64_t, uint64_t))frame->rdi;

        frame->rax = fn(frame->rsi, frame->rdx);
        frame->rip += 2; /* past ud2 */
        return;
    }
    if (frame->vector == VECTOR_BREAKPOINT) {
        breakpoints++;
        return;
    }
    if (frame->vector == VECTOR_GP && recover_rip) {
        frame->rip = recover_rip;
        return;
    }
    __asm__ volatile("mov %%cr2, %0" : "=r"(cr2));
    print("trap=%lu code=%lx rip=%lx cs=%lx rsp=%lx cr2=%lx\n", frame->vector, frame->error,
          frame->rip, frame->cs, frame->rsp, cr2);
    power_off();
}

/* --- Memory ------------------------------------------------------------- */

static uint64_t heap = HEAP_START;

#define GIB_SHIFT 30
#define LARGE_PAGE (2ul << 20)
#define EXTRA_DIRECTORIES 16

bool map(uint64_t start, uint64_t length)
{
    static uint64_t directory[EXTRA_DIRECTORIES][512]
        __attribute__((aligned(4096), section(".noinit")));
    static unsigned used;

    if (length == 0)
        return true;
    for (uint64_t gib = start >> GIB_SHIFT; gib <= (start + length - 1) >> GIB_SHIFT; gib++) {
        if (gib >= 512)
            return false;
        if (pdpt[gib])
            continue;
        if (used == EXTRA_DIRECTORIES)
            return false;
        for (uint64_t i = 0; i < 512; i++)
            directory[used][i] = (gib << GIB_SHIFT) + i * LARGE_PAGE + 0xE7;
        /* A new entry over an absent one needs no invalidation. */
        __asm__ volatile("" : : : "memory");
        pdpt[gib] = (uint64_t)directory[used++] | 7;
    }
    return true;
}

void *allocate(uint64_t length, uint64_t align)
{
    uint64_t start = (heap + align - 1) & ~(align - 1);

    for (unsigned i = 0; i < boot.ranges; i++) {
        const struct memory_range *r = &boot.range[i];

        if (r->type == 1 && start >= r->start && start + length <= r->start + r->length &&
            start + length <= HEAP_END) {
            heap = start + length;
            return (void *)start;
        }
    }
    fail("out of memory");
}

void *memset(void *to, int byte, size_t length)
{
    void *at = to;

    __asm__ volatile("rep stosb" : "+D"(at), "+c"(length) : "a"(byte) : "memory");
    return to;
}

void *memcpy(void *to, const void *from, size_t length)
{
    void *at = to;

    __asm__ volatile("rep movsb" : "+D"(at), "+S"(from), "+c"(length) : : "memory");
    return to;
}

int memcmp(const void *a, const void *b, size_t length)
{
    const uint8_t *x = a, *y = b;

    for (size_t i = 0; i < length; i++)
        if (x[i] != y[i])
            return x[i] < y[i] ? -1 : 1;
    return 0;
}

size_t strlen(const char *text)
{
    size_t n = 0;

    while (text[n])
        n++;
    return n;
}

/* --- Start and end ------------------------------------------------------ */

static void add_range(uint64_t start, uint64_t length, uint32_t type)
{
    if (boot.ranges < sizeof(boot.range) / sizeof(boot.range[0]))
        boot.range[boot.ranges++] = (struct memory_range){ start, length, type };
}

static void read_pvh(const struct pvh_start_info *info)
{
    const struct pvh_memory *map_entry = (const struct pvh_memory *)info->memory_map;
    const struct pvh_module *module = (const struct pvh_module *)info->module_list;

    boot.protocol = "pvh";
    if (info->magic != PVH_MAGIC)
        fail("the PVH start info has another magic");
    if (info->cmdline)
        boot.cmdline = (const char *)info->cmdline;
    boot.rsdp = info->rsdp;
    if (info->modules) {
        boot.initrd = module->start;
        boot.initrd_length = module->length;
    }
    if (info->version < 1 || !map_entry)
        return;
    for (uint32_t i = 0; i < info->memory_map_entries; i++)
        add_range(map_entry[i].start, map_entry[i].length, map_entry[i].type);
}

static void read_linux(uint64_t params)
{
    boot.protocol = "linux64";
    boot.rsdp = read64(params + LINUX_RSDP);
    boot.initrd = read32(params + LINUX_INITRD);
    boot.initrd_length = read32(params + LINUX_INITRD_LENGTH);
    if (read32(params + LINUX_CMDLINE))
        boot.cmdline = (const char *)(uint64_t)read32(params + LINUX_CMDLINE);
    for (unsigned i = 0; i < read8(params + LINUX_E820_ENTRIES); i++) {
        uint64_t entry = params + LINUX_E820 + i * LINUX_E820_ENTRY;

        add_range(read64(entry), read64(entry + 8), read32(entry + 16));
    }
}

/* Called by start.S. The boot loader cleared .bss, as ELF wants. */
_Noreturn void runtime_start(uint64_t loaded, uint64_t is_linux);
void runtime_start(uint64_t loaded, uint64_t is_linux)
{
    boot.cmdline = "";
    if (is_linux)
        read_linux(loaded);
    else
        read_pvh((const struct pvh_start_info *)loaded);
    main();
    finish();
}

void power_off(void)
{
    outb(PORT_SLEEP_CONTROL, SLEEP_S5);
    outb(PORT_DEBUG_EXIT, 0);
    halt();
}

void finish(void)
{
    if (has_word("stay"))
        halt();
    power_off();
}

void fail(const char *what)
{
    print("error=%s\n", what);
    finish();
}
