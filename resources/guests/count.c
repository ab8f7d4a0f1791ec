/*
 * count: counts in memory for ever, at CPL 3, and tells on request how far it
 * is and whether all of its memory says so. For snapshots and migrations: what
 * it tells after one is right only if every page has come along.
 *
 * 'c' asks how far it is, 't' the same without a look at memory. 'h' has it hold, or count on; while it holds, each 's'
 * is STEPS more. 'q' ends it, and 'r' has it reset.
 */
#include "runtime.h"

#define PAGE 4096
#define COM1 0x3F8
#define LSR_DATA 1
/* Rounds between looks at the serial port, which are dear at CPL 3. */
#define LOOK 50000
/* How far a step goes. */
#define STEPS 100

static uint64_t pages;
static uint8_t *memory;
volatile uint64_t counter;
static unsigned answers;

/* The word of a page; it lies at another place in each. */
static volatile uint64_t *word_of(uint64_t page)
{
    return (volatile uint64_t *)(memory + page * PAGE + page * 8 % PAGE);
}

/* Page p was written last by the greatest number up to the counter that leaves p. */
static uint64_t wrong_pages(void)
{
    uint64_t now = counter, wrong = 0;

    for (uint64_t page = 0; page < pages; page++) {
        uint64_t behind = (now % pages + pages - page) % pages;
        uint64_t wanted = now >= behind ? now - behind : 0;

        if (*word_of(page) != wanted)
            wrong++;
    }
    return wrong;
}

static void step(unsigned rounds)
{
    for (unsigned round = 0; round < rounds; round++) {
        uint64_t next = counter + 1;

        *word_of(next % pages) = next;
        counter = next;
    }
}

static void count(void)
{
    bool held = false;

    for (;;) {
        if (!held)
            step(LOOK);
        if (!(inb(COM1 + 5) & LSR_DATA))
            continue;
        switch (inb(COM1)) {
        case 'c':
            print("count=%lu wrong=%lu answer=%u\n", counter, wrong_pages(), ++answers);
            break;
        case 't':
            print("at=%lu\n", counter);
            break;
        case 'h':
            held = !held;
            break;
        case 's':
            step(STEPS);
            break;
        case 'r':
            outb(0xCF9, 0x02);
            outb(0xCF9, 0x06);
            break;
        case 'q':
            return;
        }
    }
}

void main(void)
{
    pages = number_word("mib", 16) << 8;
    memory = allocate(pages * PAGE, PAGE);
    print("pages=%lu\n", pages);
    to_cpl3(count, false);
}
