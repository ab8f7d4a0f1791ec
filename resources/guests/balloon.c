/*
 * balloon: drives a memory balloon. Fills mib=16 of its memory with a pattern
 * and gives pages of it up, or takes them back, as the device asks: `actual=PAGES
 * zero=PAGES` whenever it is there, with how many of those it ever got back were zeros.
 * Pages come in order, and with `scattered` every other one first. With `bench` it gives
 * all up and takes all back, without being asked: the ticks of both.
 * Asked for hints it tells of all those pages as free, and writes one of them (`rewrite`: all) before it has told of the last:
 * `hinted round=ID`. When it may use them again: `hints-done zero=PAGES`, with how many hold zeros and no pattern any more. With
 * `leave` it does not touch them the first time, and says `hints-done left`.
 */
#include "runtime/virtio.h"

#define VIRTIO_BALLOON 5
#define PAGE 4096
#define BATCH 256
#define PATTERN 0x5a5a5a5a5a5a5a5aull
#define NUM_PAGES 0
#define ACTUAL 4
#define HINT_COMMAND 8
#define HINT_DONE 1
#define HINT_FIRST 2
#define FREE_MEMORY 4
#define TOTAL_MEMORY 5

enum { INFLATE, DEFLATE, STATISTICS, HINTS, REPORTS, QUEUES };

struct statistic {
    uint16_t tag;
    uint64_t value;
} __attribute__((packed));

static struct virtio_device device;
static struct virtq queues[QUEUES];
static uint8_t *area;
static uint32_t pages, have, zero, command, round_id;
static uint32_t *numbers;
static struct statistic *statistics;
static bool scattered;

/* The nth page that is given up. */
static uint64_t *page(uint32_t n)
{
    if (scattered)
        n = n < pages / 2 ? 2 * n : 2 * (n - pages / 2) + 1;
    return (uint64_t *)(area + (uint64_t)n * PAGE);
}

static void send(struct virtq *queue, const void *buffer, uint32_t length, uint16_t flags)
{
    uint32_t id, written;

    virtq_describe(queue->desc, 0, (uint64_t)buffer, length, flags, 0);
    virtq_add(queue, 0);
    virtq_kick(queue);
    while (!virtq_poll(queue, &id, &written))
        pause();
}

static void send_pages(struct virtq *queue, uint32_t first, uint32_t count)
{
    for (uint32_t i = 0; i < count; i++)
        numbers[i] = (uint32_t)((uint64_t)page(first + i) / PAGE);
    send(queue, numbers, count * sizeof *numbers, 0);
}

static uint32_t least(uint32_t a, uint32_t b)
{
    return a < b ? a : b;
}

static void step(uint32_t target)
{
    uint32_t count;

    if (target > have) {
        count = least(target - have, BATCH);
        send_pages(&queues[INFLATE], have, count);
        have += count;
        return;
    }
    count = least(have - target, BATCH);
    have -= count;
    send_pages(&queues[DEFLATE], have, count);
    for (uint32_t i = have; i < have + count; i++) {
        if (*page(i) == 0)
            zero++;
        else if (*page(i) != PATTERN)
            fail("a page is neither what it was nor zero");
        *page(i) = PATTERN;
    }
}

static void tell_statistics(void)
{
    statistics[0].tag = FREE_MEMORY;
    statistics[0].value = (uint64_t)(pages - have) * PAGE;
    statistics[1].tag = TOTAL_MEMORY;
    statistics[1].value = (uint64_t)pages * PAGE;
    virtq_describe(queues[STATISTICS].desc, 0, (uint64_t)statistics, 2 * sizeof *statistics, 0, 0);
    virtq_add(&queues[STATISTICS], 0);
    virtq_kick(&queues[STATISTICS]);
}

/* As a guest that takes pages back in a round, for it needs memory: it has told of them, and writes them nevertheless. */
static void tell_hints(void)
{
    uint32_t first = has_word("rewrite") ? 0 : 1500, count = has_word("rewrite") ? pages : 1;

    if (command == round_id)
        fail("a round has the id of the last one");
    round_id = command;
    numbers[0] = round_id;
    send(&queues[HINTS], numbers, sizeof *numbers, 0);
    send(&queues[HINTS], area, pages / 2 * PAGE, DESC_WRITE);
    send(&queues[HINTS], area + (uint64_t)pages / 2 * PAGE, pages / 2 * PAGE, DESC_WRITE);
    for (uint32_t i = first; i < first + count; i++)
        *(volatile uint64_t *)page(i) = PATTERN;
    numbers[0] = 0;
    send(&queues[HINTS], numbers, sizeof *numbers, 0);
    print("hinted round=%u\n", round_id);
}

static void count_hinted(void)
{
    static bool left;
    uint32_t zeros = 0;

    if (has_word("leave") && !left) {
        left = true;
        print("hints-done left\n");
        return;
    }
    for (uint32_t i = 0; i < pages; i++) {
        if (*page(i) == 0)
            zeros++;
        else if (*page(i) != PATTERN)
            fail("a page is neither what it was nor zero");
        *page(i) = PATTERN;
    }
    print("hints-done zero=%u\n", zeros);
}

static void heed_hints(void)
{
    uint32_t wanted = read32(device.config + HINT_COMMAND);

    if (wanted == command)
        return;
    command = wanted;
    if (command >= HINT_FIRST)
        tell_hints();
    else if (command == HINT_DONE)
        count_hinted();
}

/* A monitor may give pages to the host after it has said so, but not after it has given one back. */
static void bench(void)
{
    uint64_t begin = rdtsc(), middle, end;

    while (have < pages)
        step(pages);
    step(pages - 1);
    middle = rdtsc();
    while (have > 0)
        step(0);
    end = rdtsc();
    print("balloon inflate-ticks=%lu deflate-ticks=%lu pages=%u zero=%u\n", middle - begin,
          end - middle, pages, zero);
    finish();
}

static void work(void)
{
    uint32_t told = 1, id, length;

    for (uint32_t i = 0; i < pages; i++)
        *page(i) = PATTERN;
    if (has_word("bench"))
        bench();
    tell_statistics();
    print("ready pages=%u\n", pages);
    if (has_word("report")) {
        send(&queues[REPORTS], area, pages * PAGE, DESC_WRITE);
        for (uint32_t i = 0; i < pages; i++)
            zero += *page(i) == 0;
        print("reported zero=%u\n", zero);
    }
    for (;;) {
        uint32_t target = least(read32(device.config + NUM_PAGES), pages);

        heed_hints();
        if (virtq_poll(&queues[STATISTICS], &id, &length))
            tell_statistics();
        if (target != have) {
            step(target);
            told = 1;
        } else if (told) {
            told = 0;
            write32(device.config + ACTUAL, have);
            print("actual=%u zero=%u\n", have, zero);
        } else {
            pause();
        }
    }
}

void main(void)
{
    pages = (uint32_t)(number_word("mib", 16) << 20) / PAGE;
    scattered = has_word("scattered");
    area = allocate((uint64_t)pages * PAGE, 2 << 20);
    numbers = allocate(PAGE, PAGE);
    statistics = allocate(PAGE, PAGE);
    if (!virtio_find(&device, VIRTIO_BALLOON, 0))
        fail("no balloon");
    if (!virtio_negotiate(&device, 0x3f))
        fail("the device refuses the features");
    for (uint16_t i = 0; i < virtio_queue_count(&device); i++)
        virtq_set_up(&device, &queues[i], i, 8, NO_VECTOR);
    virtio_driver_ok(&device);
    to_cpl3(work, false);
}
