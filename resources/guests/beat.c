/*
 * beat: watches the time stamp counter at CPL 3 while it rewrites its memory at a set pace. For benches of snapshots: how long
 * it stood is the greatest step that the counter made between two looks.
 *
 * 'g' asks for that, and begins anew. 'p' has it write a dot every so often, by which one that is restored is seen to run.
 * 'q' ends it.
 */
#include "runtime.h"

#define PAGE 4096
#define COM1 0x3F8
#define LSR_DATA 1

static uint64_t pages;
static uint8_t *memory;

/* The words of one page; nothing in it is zero, so that it is not passed over. */
static void fill(uint64_t page, uint64_t seed)
{
    volatile uint64_t *words = (volatile uint64_t *)(memory + page * PAGE);

    for (unsigned word = 0; word < PAGE / sizeof *words; word++)
        words[word] = seed = seed * 6364136223846793005ull + 1442695040888963407ull;
}

static void beat(void)
{
    uint64_t write = number_word("write", 0), look = number_word("look", 10000000), dot = number_word("dot", 2000000);
    uint64_t written = 0, page = 0, gap = 0, last, next_write, next_look, next_dot;
    bool dots = false;

    for (uint64_t at = 0; at < pages; at++)
        fill(at, at + 1);
    print("filled=%lu\n", pages);
    last = next_write = next_look = next_dot = rdtsc();
    for (;;) {
        uint64_t now = rdtsc();

        if (now - last > gap)
            gap = now - last;
        last = now;
        if (write && now >= next_write) {
            next_write = now + write;
            *(volatile uint64_t *)(memory + page * PAGE) = ++written;
            page = (page + 1) % pages;
        }
        if (dots && now >= next_dot) {
            next_dot = now + dot;
            outb(COM1, '.');
        }
        if (now < next_look)
            continue;
        next_look = now + look;
        if (!(inb(COM1 + 5) & LSR_DATA))
            continue;
        switch (inb(COM1)) {
        case 'g':
            print("gap=%lu writes=%lu\n", gap, written);
            gap = 0;
            last = rdtsc();
            break;
        case 'p':
            dots = !dots;
            break;
        case 'q':
            return;
        }
    }
}

void main(void)
{
    pages = number_word("mib", 256) << 8;
    memory = allocate(pages * PAGE, PAGE);
    to_cpl3(beat, false);
}
