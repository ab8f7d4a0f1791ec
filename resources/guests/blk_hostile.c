/*
 * hostile: broken rings and chains, one after the other on a fresh device
 * each, and an honest read after every one of them.
 */
#include "runtime/blkdev.h"

#define QUEUE_SIZE 64

static struct virtq *queue;
static struct blk_header *header;
static volatile uint8_t *status;
static uint8_t *data;

/* Where no RAM is: under the I/O APIC in any machine these guests know. */
#define NOWHERE 0xFE000000ull

static void describe(uint16_t at, uint64_t address, uint32_t length, uint16_t flags, uint16_t next)
{
    virtq_describe(queue->desc, at, address, length, flags, next);
}

static void header_at(uint16_t at, uint16_t next)
{
    describe(at, (uint64_t)header, sizeof(*header), DESC_NEXT, next);
}

static void status_at(uint16_t at)
{
    describe(at, (uint64_t)status, 1, DESC_WRITE, 0);
}

static void data_is(uint64_t address, uint32_t length)
{
    header_at(0, 1);
    describe(1, address, length, DESC_WRITE | DESC_NEXT, 2);
    status_at(2);
    virtq_add(queue, 0);
}

static void loop_to_self(void)
{
    header_at(0, 1);
    describe(1, (uint64_t)data, SECTOR, DESC_WRITE | DESC_NEXT, 1);
    virtq_add(queue, 0);
}

static void loop_of_two(void)
{
    header_at(0, 1);
    describe(1, (uint64_t)data, SECTOR, DESC_WRITE | DESC_NEXT, 2);
    describe(2, (uint64_t)data, SECTOR, DESC_WRITE | DESC_NEXT, 1);
    virtq_add(queue, 0);
}

static void next_outside(void)
{
    header_at(0, 0xFFF0);
    virtq_add(queue, 0);
}

static void head_outside(void)
{
    virtq_add(queue, 0xFFF0);
}

static void index_jump(void)
{
    queue->made = (uint16_t)(queue->made + QUEUE_SIZE + 7);
}

static void data_nowhere(void)
{
    data_is(NOWHERE, SECTOR);
}

static void data_wraps(void)
{
    data_is(~0ull - 100, SECTOR);
}

static void data_past_ram(void)
{
    data_is(1ull << 45, SECTOR);
}

static void data_huge(void)
{
    data_is((uint64_t)data, 0xFFFFFE00);
}

static void data_empty(void)
{
    data_is((uint64_t)data, 0);
}

static void data_in_rings(void)
{
    data_is((uint64_t)queue->used, SECTOR);
}

static void header_nowhere(void)
{
    describe(0, NOWHERE, sizeof(*header), DESC_NEXT, 1);
    describe(1, (uint64_t)data, SECTOR, DESC_WRITE | DESC_NEXT, 2);
    status_at(2);
    virtq_add(queue, 0);
}

static void header_alone(void)
{
    describe(0, (uint64_t)header, sizeof(*header), 0, 0);
    virtq_add(queue, 0);
}

static void header_short(void)
{
    describe(0, (uint64_t)header, 7, DESC_NEXT, 1);
    status_at(1);
    virtq_add(queue, 0);
}

static void header_writable(void)
{
    describe(0, (uint64_t)header, sizeof(*header), DESC_WRITE | DESC_NEXT, 1);
    status_at(1);
    virtq_add(queue, 0);
}

static void status_read_only(void)
{
    header_at(0, 1);
    describe(1, (uint64_t)data, SECTOR, DESC_WRITE | DESC_NEXT, 2);
    describe(2, (uint64_t)status, 1, 0, 0);
    virtq_add(queue, 0);
}

static void status_nowhere(void)
{
    header_at(0, 1);
    describe(1, (uint64_t)data, SECTOR, DESC_WRITE | DESC_NEXT, 2);
    describe(2, NOWHERE, 1, DESC_WRITE, 0);
    virtq_add(queue, 0);
}

static void status_empty(void)
{
    header_at(0, 1);
    describe(1, (uint64_t)status, 0, DESC_WRITE, 0);
    virtq_add(queue, 0);
}

static void sector_overflow(void)
{
    header->sector = ~0ull;
    data_is((uint64_t)data, SECTOR);
}

static void get_id_short(void)
{
    header->type = BLK_GET_ID;
    data_is((uint64_t)data, 3);
}

static void discard_overflow(void)
{
    struct blk_range *range = (struct blk_range *)data;

    *range = (struct blk_range){ ~0ull - 1, 0xFFFFFFFF, 0xFFFFFFFF };
    header->type = BLK_DISCARD;
    header_at(0, 1);
    describe(1, (uint64_t)range, sizeof(*range), DESC_NEXT, 2);
    status_at(2);
    virtq_add(queue, 0);
}

static void indirect_odd_length(void)
{
    describe(0, (uint64_t)data, 17, DESC_INDIRECT, 0);
    virtq_add(queue, 0);
}

static void indirect_with_next(void)
{
    describe(0, (uint64_t)data, 32, DESC_INDIRECT | DESC_NEXT, 1);
    status_at(1);
    virtq_add(queue, 0);
}

static void indirect_nested(void)
{
    struct virtq_desc *table = (struct virtq_desc *)data;

    table[0] = (struct virtq_desc){ (uint64_t)data, 32, DESC_INDIRECT, 0 };
    table[1] = (struct virtq_desc){ (uint64_t)status, 1, DESC_WRITE, 0 };
    describe(0, (uint64_t)table, 32, DESC_INDIRECT, 0);
    virtq_add(queue, 0);
}

static void indirect_loop(void)
{
    struct virtq_desc *table = (struct virtq_desc *)data;

    table[0] = (struct virtq_desc){ (uint64_t)header, sizeof(*header), DESC_NEXT, 1 };
    table[1] = (struct virtq_desc){ (uint64_t)data + 512, SECTOR, DESC_WRITE | DESC_NEXT, 1 };
    describe(0, (uint64_t)table, 32, DESC_INDIRECT, 0);
    virtq_add(queue, 0);
}

static void indirect_huge(void)
{
    describe(0, (uint64_t)data, 0xFFFFFFF0, DESC_INDIRECT, 0);
    virtq_add(queue, 0);
}

static const struct {
    const char *name;
    void (*build)(void);
} cases[] = {
    { "loop-to-self", loop_to_self },
    { "loop-of-two", loop_of_two },
    { "next-outside", next_outside },
    { "head-outside", head_outside },
    { "index-jump", index_jump },
    { "data-nowhere", data_nowhere },
    { "data-wraps", data_wraps },
    { "data-past-ram", data_past_ram },
    { "data-huge", data_huge },
    { "data-empty", data_empty },
    { "data-in-rings", data_in_rings },
    { "header-nowhere", header_nowhere },
    { "header-alone", header_alone },
    { "header-short", header_short },
    { "header-writable", header_writable },
    { "status-read-only", status_read_only },
    { "status-nowhere", status_nowhere },
    { "status-empty", status_empty },
    { "sector-overflow", sector_overflow },
    { "get-id-short", get_id_short },
    { "discard-overflow", discard_overflow },
    { "indirect-odd-length", indirect_odd_length },
    { "indirect-with-next", indirect_with_next },
    { "indirect-nested", indirect_nested },
    { "indirect-loop", indirect_loop },
    { "indirect-huge", indirect_huge },
};

static void honest_read(const char *name)
{
    uint8_t answer;

    blk_start(1, QUEUE_SIZE, 3, BLK_F_ALL, false);
    answer = blk_do(BLK_IN, 0, data, SECTOR);
    if (answer != BLK_OK)
        print("after=%s read-status=%u\n", name, answer);
}

static void try_case(unsigned n)
{
    uint32_t id = 0, length = 0;
    uint8_t device_status = 0;
    bool used = false;
    uint64_t deadline;

    blk_start(1, QUEUE_SIZE, 3, BLK_F_ALL | VIRTIO_F_INDIRECT_DESC, false);
    *header = (struct blk_header){ BLK_IN, 0, 0 };
    *status = BLK_PENDING;
    cases[n].build();
    virtq_kick(queue);
    deadline = rdtsc() + number_word("ticks", 1000000000);
    while (!used && !(device_status & STATUS_NEEDS_RESET) && rdtsc() < deadline) {
        used = virtq_poll(queue, &id, &length);
        device_status = virtio_status(&blk.device);
    }
    print("hostile=%s needs-reset=%u used=%u status=%u length=%u\n", cases[n].name,
          !!(device_status & STATUS_NEEDS_RESET), used, *status, length);
    honest_read(cases[n].name);
}

/* Rings where no RAM is, then a kick. */
static void rings_nowhere(void)
{
    uint64_t deadline = rdtsc() + number_word("ticks", 1000000000);
    volatile struct virtq_desc *desc = queue->desc;
    uint8_t device_status = 0;

    blk_start(1, QUEUE_SIZE, 3, BLK_F_ALL, false);
    if (!virtio_negotiate(&blk.device, BLK_F_ALL))
        fail("the device refuses the features");
    for (uint64_t at = 32; at < 56; at += 4) /* the three ring addresses */
        write32(blk.device.common + at, at % 8 ? 0xFFFF : 0xFFFFF000);
    write16(blk.device.common + 28, 1); /* queue_enable */
    virtio_driver_ok(&blk.device);
    write16(queue->doorbell, 0);
    while (!(device_status & STATUS_NEEDS_RESET) && rdtsc() < deadline)
        device_status = virtio_status(&blk.device);
    queue->desc = desc;
    print("hostile=rings-nowhere needs-reset=%u\n", !!(device_status & STATUS_NEEDS_RESET));
    honest_read("rings-nowhere");
}

void blk_hostile(void)
{
    const char *only = text_word("case");
    unsigned which = sizeof(cases) / sizeof(cases[0]);

    queue = &blk.queue[0];
    header = allocate(sizeof(*header), 4096);
    status = allocate(1, 64);
    data = allocate(4096, 4096);
    for (unsigned n = 0; only && n < sizeof(cases) / sizeof(cases[0]); n++)
        if (equal(only, cases[n].name))
            which = n;
    if (only && which < sizeof(cases) / sizeof(cases[0])) {
        try_case(which);
    } else {
        for (unsigned n = 0; n < sizeof(cases) / sizeof(cases[0]); n++)
            try_case(n);
        rings_nowhere();
    }
    print("hostile=survived\n");
}
