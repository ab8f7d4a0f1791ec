#include "blkdev.h"

#define MSIX_QUEUES 1

struct blk blk;

static bool is_out(uint32_t type)
{
    return type == BLK_OUT || type == BLK_DISCARD || type == BLK_WRITE_ZEROES;
}

void blk_start(unsigned queues, unsigned size, unsigned stride, uint64_t features, bool interrupts)
{
    if (!blk.header) {
        blk.header = allocate(MAX_SLOTS * sizeof(*blk.header), 4096);
        blk.written = allocate(MAX_SLOTS * sizeof(*blk.written), 64);
        blk.status = allocate(MAX_SLOTS, 64);
        blk.tables = allocate(MAX_SLOTS * (MAX_SEGMENTS + 2) * sizeof(*blk.tables), 4096);
    }
    if (!virtio_negotiate(&blk.device, features))
        fail("the device refuses the features");
    blk.sectors = read64(blk.device.config + BLK_CONFIG_CAPACITY);
    if (queues > MAX_QUEUES || queues > virtio_queue_count(&blk.device))
        fail("the device has fewer queues");
    blk.queues = queues;
    blk.stride = stride;
    for (unsigned i = 0; i < queues; i++)
        virtq_set_up(&blk.device, &blk.queue[i], (uint16_t)i, (uint16_t)size,
                     interrupts ? MSIX_QUEUES : NO_VECTOR);
    blk.slots = blk.queue[0].size / stride * queues;
    if (blk.slots > MAX_SLOTS)
        blk.slots = MAX_SLOTS;
    virtio_driver_ok(&blk.device);
}

uint64_t blk_wanted(void)
{
    return BLK_F_ALL | (has_word("event-idx") ? VIRTIO_F_EVENT_IDX : 0) |
           (has_word("indirect") ? VIRTIO_F_INDIRECT_DESC : 0);
}

void blk_submit(unsigned slot, uint32_t type, uint64_t sector, const struct blk_segment *segments,
                unsigned count)
{
    struct virtq *queue = &blk.queue[slot % blk.queues];
    uint16_t head = (uint16_t)(slot / blk.queues * blk.stride), at = head;
    uint16_t direction = is_out(type) ? 0 : DESC_WRITE;
    bool indirect = blk.device.features & VIRTIO_F_INDIRECT_DESC;
    volatile struct virtq_desc *table = queue->desc;

    if (count + 2 > blk.stride)
        fail("too many segments for the stride");
    if (indirect) {
        table = blk.tables + slot * (MAX_SEGMENTS + 2);
        at = 0;
        virtq_describe(queue->desc, head, (uint64_t)table, (count + 2) * (uint32_t)sizeof(*table),
                       DESC_INDIRECT, 0);
    }
    blk.header[slot] = (struct blk_header){ type, 0, sector };
    blk.status[slot] = BLK_PENDING;
    virtq_describe(table, at, (uint64_t)&blk.header[slot], sizeof(blk.header[slot]), DESC_NEXT,
                   (uint16_t)(at + 1));
    for (unsigned i = 0; i < count; i++) {
        at++;
        virtq_describe(table, at, (uint64_t)segments[i].at, segments[i].length,
                       direction | DESC_NEXT, (uint16_t)(at + 1));
    }
    at++;
    virtq_describe(table, at, (uint64_t)&blk.status[slot], 1, DESC_WRITE, 0);
    virtq_add(queue, head);
}

void blk_kick(void)
{
    for (unsigned i = 0; i < blk.queues; i++)
        if (blk.queue[i].made != blk.queue[i].kicked)
            virtq_kick(&blk.queue[i]);
}

int blk_reap(void)
{
    uint32_t id, length;

    for (unsigned i = 0; i < blk.queues; i++) {
        unsigned slot;

        if (!virtq_poll(&blk.queue[i], &id, &length))
            continue;
        slot = id / blk.stride * blk.queues + i;
        if (id % blk.stride || slot >= blk.slots || blk.status[slot] == BLK_PENDING)
            fail("a used entry that makes no sense");
        blk.written[slot] = length;
        return (int)slot;
    }
    return -1;
}

uint8_t blk_do(uint32_t type, uint64_t sector, void *at, uint32_t length)
{
    struct blk_segment segment = { at, length };

    blk_submit(0, type, sector, &segment, length ? 1 : 0);
    blk_kick();
    while (blk_reap() < 0)
        if (virtio_status(&blk.device) & STATUS_NEEDS_RESET)
            fail("the device needs a reset");
    return blk.status[0];
}

uint64_t random_next(void)
{
    static uint64_t state = 0x9E3779B97F4A7C15;

    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return state * 0x2545F4914F6CDD1D;
}
