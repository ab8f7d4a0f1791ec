/*
 * mem: drives memory that comes and goes by virtio-mem, block by block from the lowest, for ever. Says what there is, then what becomes
 * of requests that are none (`hostile`), and whenever as much is plugged as is asked for `plugged mib=N`. A block that comes
 * is zeros, and keeps what is written; where the host has none it says `busy mib=N` and tries no more until another size is
 * asked for. With `touch` it looks at a block that is not plugged, when it has plugged what it can: `touched=VALUE`.
 */
#include "runtime/virtio.h"

#define VIRTIO_MEM 24
#define UNPLUGGED_INACCESSIBLE (1ull << 1)
#define MIB (1ull << 20)
#define PATTERN 0x5a5a5a5a5a5a5a5aull

#define BLOCK_SIZE 0
#define ADDRESS 16
#define REGION_SIZE 24
#define PLUGGED_SIZE 40
#define REQUESTED_SIZE 48

enum { PLUG, UNPLUG, UNPLUG_ALL, STATE };
enum { ACK, NACK, BUSY, ERROR };

struct request {
    uint16_t kind, padding[3];
    uint64_t address;
    uint16_t blocks, padding_2[3];
};

struct response {
    uint16_t kind, padding[3], state;
};

static struct virtio_device device;
static struct virtq queue;
static struct request *request;
static struct response *response;
static uint64_t block, region, length;

static uint64_t config(uint32_t offset)
{
    return read32(device.config + offset) | (uint64_t)read32(device.config + offset + 4) << 32;
}

static uint16_t ask(uint16_t kind, uint64_t address, uint16_t blocks)
{
    uint32_t id, written;

    request->kind = kind;
    request->address = address;
    request->blocks = blocks;
    response->kind = 0xFFFF;
    virtq_describe(queue.desc, 0, (uint64_t)request, sizeof *request, DESC_NEXT, 1);
    virtq_describe(queue.desc, 1, (uint64_t)response, sizeof *response, DESC_WRITE, 0);
    virtq_add(&queue, 0);
    virtq_kick(&queue);
    while (!virtq_poll(&queue, &id, &written))
        if (virtio_status(&device) & STATUS_NEEDS_RESET)
            fail("the device needs a reset");
    return response->kind;
}

static uint16_t plug(uint64_t address)
{
    uint16_t answer = ask(PLUG, address, 1);
    uint64_t last = address + block - 8;

    if (answer != ACK)
        return answer;
    if (read64(address) || read64(address + block / 2) || read64(last))
        fail("a block that comes is not zeros");
    write64(address, PATTERN);
    write64(last, PATTERN);
    if (read64(address) != PATTERN || read64(last) != PATTERN)
        fail("memory that does not keep what is written");
    return ACK;
}

/* Parts of the host's pages, blocks beside the region, none, too many, and those that are what they are to become. */
static void be_hostile(void)
{
    uint64_t end = region + length;
    const struct {
        uint16_t kind, blocks;
        uint64_t address;
    } bad[] = {
        { PLUG, 1, region + 4096 },   { PLUG, 1, region + block / 2 }, { PLUG, 0, region },
        { PLUG, 1, region - block },  { PLUG, 1, end },                { PLUG, 2, end - block },
        { PLUG, 1, end - 4096 },      { PLUG, 0xFFFF, region },        { PLUG, 0xFFFF, -block },
        { UNPLUG, 1, region },        { UNPLUG, 1, region + 4096 },    { UNPLUG, 0xFFFF, region },
        { STATE, 1, region + 4096 },  { STATE, 1, end },               { 7, 1, region },
    };
    unsigned refused = 0;

    for (unsigned i = 0; i < sizeof bad / sizeof *bad; i++) {
        if (ask(bad[i].kind, bad[i].address, bad[i].blocks) != ERROR)
            print("error=taken number=%u\n", i);
        else
            refused++;
    }
    print("refused=%u of=%u plugged=%lu\n", refused, (unsigned)(sizeof bad / sizeof *bad),
          (unsigned long)config(PLUGGED_SIZE));
}

static void touch(uint64_t plugged)
{
    print("touches\n");
    print("touched=%lx\n", read64(region + plugged));
    write64(region + plugged, PATTERN);
    print("touched=%lx\n", read64(region + plugged));
}

static void work(void)
{
    uint64_t told = -1ull, gave_up = -1ull;

    if (has_word("hostile"))
        be_hostile();
    for (;;) {
        uint64_t wanted = config(REQUESTED_SIZE), plugged = config(PLUGGED_SIZE);

        if (plugged < wanted && gave_up != wanted) {
            uint16_t answer = plug(region + plugged);

            if (answer == ACK)
                continue;
            if (answer != BUSY)
                fail("a block that is asked for is refused");
            gave_up = wanted;
            print("busy mib=%lu\n", (unsigned long)(plugged / MIB));
            if (has_word("touch"))
                touch(plugged);
        } else if (plugged > wanted) {
            if (ask(UNPLUG, region + plugged - block, 1) != ACK)
                fail("a block cannot be given back");
            told = -1ull;
        } else if (plugged == wanted && told != plugged) {
            told = plugged;
            gave_up = -1ull;
            print("plugged mib=%lu\n", (unsigned long)(plugged / MIB));
            if (has_word("touch") && plugged)
                touch(plugged);
        } else {
            pause();
        }
    }
}

void main(void)
{
    request = allocate(sizeof *request, 64);
    response = allocate(sizeof *response, 64);
    if (!virtio_find(&device, VIRTIO_MEM, 0))
        fail("no virtio-mem");
    if (!virtio_negotiate(&device, UNPLUGGED_INACCESSIBLE))
        fail("the device refuses the features");
    virtq_set_up(&device, &queue, 0, 8, NO_VECTOR);
    virtio_driver_ok(&device);
    block = config(BLOCK_SIZE);
    region = config(ADDRESS);
    length = config(REGION_SIZE);
    if (!map(region, length))
        fail("the region cannot be mapped");
    print("block=%lu region=%lu\n", (unsigned long)(block / MIB), (unsigned long)(length / MIB));
    /* At CPL 0 an access to memory that the host has not got may be taken for one to a device. */
    to_cpl3(work, false);
}
