/* rng: prints 64 bytes (or bytes=N, up to 4096) of virtio-rng in hexadecimal. */
#include "runtime/virtio.h"

#define MOST 4096

static struct virtio_device device;
static struct virtq queue;

void main(void)
{
    uint32_t wanted = (uint32_t)number_word("bytes", 64), id, length, have = 0;
    uint8_t *buffer = allocate(MOST, 4096);

    if (wanted > MOST)
        wanted = MOST;
    if (!virtio_find(&device, VIRTIO_RNG, 0))
        fail("no virtio-rng");
    if (!virtio_negotiate(&device, 0))
        fail("the device refuses the features");
    virtq_set_up(&device, &queue, 0, 8, NO_VECTOR);
    virtio_driver_ok(&device);
    while (have < wanted) {
        virtq_describe(queue.desc, 0, (uint64_t)buffer + have, wanted - have, DESC_WRITE, 0);
        virtq_add(&queue, 0);
        virtq_kick(&queue);
        while (!virtq_poll(&queue, &id, &length))
            if (virtio_status(&device) & STATUS_NEEDS_RESET)
                fail("the device needs a reset");
        if (id != 0 || length == 0 || length > wanted - have)
            fail("a used entry that makes no sense");
        have += length;
    }
    print("bytes=%u\nrng=", have);
    for (uint32_t i = 0; i < have; i++)
        print("%02x", buffer[i]);
    print("\n");
}
