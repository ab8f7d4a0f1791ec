/*
 * The runtime of the guests.
 *
 * main() runs at CPL 0 with interrupts off, in an identity map of 4 GiB that
 * is open to CPL 3.
 *
 * Hosts without hardware virtualization (KVM on page tables alone) interpret
 * CPL 0 at a third of a microsecond an instruction, and know only the plain
 * integer ones: no int, no int3, no cmpxchg16b, no SSE. CPL 3 runs at full
 * speed there. So main() sets up at CPL 0 and hands the work that must be fast
 * to to_cpl3(), from where call0() reaches back for what CPL 3 may not do.
 * Ports and MMIO work at both levels; an exit costs more from CPL 3.
 */
#ifndef RUNTIME_H
#define RUNTIME_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "layout.h"

/* What the trap handler sees. */
struct trap_frame {
    uint64_t r11, r10, r9, r8, rdi, rsi, rdx, rcx, rax;
    uint64_t vector, error;
    uint64_t rip, cs, rflags, rsp, ss;
};

/* A range of guest-physical memory, in the words of PVH and e820. */
struct memory_range {
    uint64_t start, length;
    uint32_t type; /* 1 is RAM */
};

/* What the boot loader told, from PVH's start info or Linux's boot_params. */
struct boot_info {
    const char *protocol;
    const char *cmdline; /* "" when there is none */
    uint64_t rsdp;       /* 0 when not told */
    uint64_t initrd, initrd_length;
    unsigned ranges;
    struct memory_range range[64];
};

extern struct boot_info boot;
extern char image_end[];

/* The guest's own part, at CPL 0. Returning from it is finish(). */
void main(void);

/* --- CPU ---------------------------------------------------------------- */

/*
 * Goes on in fn at CPL 3, for good, with interrupts off or on. Returning from
 * fn is finish().
 */
_Noreturn void to_cpl3(void (*fn)(void), bool interrupts);
/* fn(a, b) at CPL 0, from CPL 3. Registers that a call preserves are preserved. */
uint64_t call0(uint64_t (*fn)(uint64_t a, uint64_t b), uint64_t a, uint64_t b);
bool at_cpl0(void);
/* n reads of a port, in a loop of three instructions. */
void count_port(uint16_t port, uint64_t n);

/* The rest of this part is for CPL 0. */

struct cpuid {
    uint32_t eax, ebx, ecx, edx;
};
/* At CPL 3 a host without hardware virtualization would answer for itself. */
struct cpuid cpuid(uint32_t leaf, uint32_t subleaf);
/* False when the MSR raises #GP. */
bool rdmsr(uint32_t msr, uint64_t *value);
bool wrmsr(uint32_t msr, uint64_t value);
/* Called for vectors from 0x20 on, with interrupts off. */
typedef void interrupt_fn(unsigned vector);
void on_interrupt(unsigned vector, interrupt_fn *fn);
/* Halts with interrupts on until one has come, then turns them off again. */
void wait_for_interrupt(void);
/* How many #BP there were: int3 at CPL 3 does nothing else. */
extern volatile unsigned breakpoints;
/* Ends in a triple fault. */
_Noreturn void triple_fault(void);
/* Halts for ever, from either level. */
_Noreturn void halt(void);

static inline uint64_t rdtsc(void)
{
    uint32_t low, high;
    __asm__ volatile("rdtsc" : "=a"(low), "=d"(high));
    return (uint64_t)high << 32 | low;
}

static inline void pause(void)
{
    __asm__ volatile("pause");
}

/* At whatever CPL the caller has; an exit from CPL 3 may cost ten times one from CPL 0. */
#define PORT_IO(suffix, type)                                                          \
    static inline type in##suffix(uint16_t port)                                       \
    {                                                                                  \
        type value;                                                                    \
        __asm__ volatile("in" #suffix " %1, %0" : "=a"(value) : "Nd"(port));           \
        return value;                                                                  \
    }                                                                                  \
    static inline void out##suffix(uint16_t port, type value)                          \
    {                                                                                  \
        __asm__ volatile("out" #suffix " %0, %1" : : "a"(value), "Nd"(port) : "memory"); \
    }
PORT_IO(b, uint8_t)
PORT_IO(w, uint16_t)
PORT_IO(l, uint32_t)

#define MMIO(bits)                                                                     \
    static inline uint##bits##_t read##bits(uint64_t address)                          \
    {                                                                                  \
        uint##bits##_t value;                                                          \
        __asm__ volatile("mov %1, %0" : "=r"(value) : "m"(*(volatile uint##bits##_t *)address)); \
        return value;                                                                  \
    }                                                                                  \
    static inline void write##bits(uint64_t address, uint##bits##_t value)             \
    {                                                                                  \
        __asm__ volatile("mov %1, %0" : "=m"(*(volatile uint##bits##_t *)address) : "r"(value) : "memory"); \
    }
MMIO(8)
MMIO(16)
MMIO(32)
MMIO(64)

/* --- Memory ------------------------------------------------------------- */

/* Makes [start, start + length) usable; 16 GiB apart from the low four at most. */
bool map(uint64_t start, uint64_t length);
/* Memory that nobody gives back, not cleared, below 1 GiB; ends the guest when there is none. */
void *allocate(uint64_t length, uint64_t align);

void *memset(void *to, int byte, size_t length);
void *memcpy(void *to, const void *from, size_t length);
int memcmp(const void *a, const void *b, size_t length);
size_t strlen(const char *text);

/* --- Output ------------------------------------------------------------- */

/* To COM1. Formats: %s %c %d %u %x %lu %lx %%, and a width as in %08lx. */
void print(const char *format, ...) __attribute__((format(printf, 1, 2)));
void serial_write(const char *text, size_t length);
void debugcon_write(const char *text, size_t length);

/* --- Command line ------------------------------------------------------- */

/*
 * Takes the next word off *cursor, which starts as boot.cmdline, into at most
 * size bytes with the closing 0; false at the end.
 */
bool next_word(const char **cursor, char *word, size_t size);
/* Whether the word is there as it stands. */
bool has_word(const char *word);
/* The number in "key=NUMBER" (decimal or 0x…), or otherwise. */
uint64_t number_word(const char *key, uint64_t otherwise);
/* The text in "key=TEXT", in a buffer that the next call reuses, or NULL. */
const char *text_word(const char *key);
/* If text starts with prefix, what follows it; else NULL. */
const char *after(const char *text, const char *prefix);
bool equal(const char *a, const char *b);
/* A decimal or 0x… number; stops at the first other character. */
uint64_t parse_number(const char *text);

/* --- The end ------------------------------------------------------------ */

/* Sleep state S5; where that does nothing, QEMU's debug exit; then halts. */
_Noreturn void power_off(void);
/* With the word `stay`, halts; else powers off. */
_Noreturn void finish(void);
/* Prints the line "error=…" and finishes. */
_Noreturn void fail(const char *what);

#endif
