/*
 * net: drives a network card without interrupts, at CPL 3. One job by the command line:
 * send sends count=N frames of bytes=64, receive takes so many, reply sends each of so many back.
 * Frames are of Ethernet's experimental type, so that no host answers them. `net=ready` when the card is
 * there, then `frames=N ticks=T`, from the first frame to the last.
 */
#include "runtime/virtio.h"

#define VIRTIO_NET 1
#define VIRTIO_NET_F_MRG_RXBUF (1ull << 15)
#define HEADER 12
#define BUFFER 2048
#define DEPTH 256
/* After how many frames buffers are given back; a driver of Linux does so too. */
#define BATCH 16

enum { RX, TX };

static struct virtio_device device;
static struct virtq queues[2];
static uint8_t *buffers;
static uint64_t count;
static uint32_t bytes;

static uint8_t *buffer(uint32_t id)
{
    return buffers + (uint64_t)id * BUFFER;
}

static void post(uint16_t id)
{
    virtq_describe(queues[RX].desc, id, (uint64_t)buffer(id), BUFFER, DESC_WRITE, 0);
    virtq_add(&queues[RX], id);
}

static void transmit(uint16_t id, uint32_t length)
{
    virtq_describe(queues[TX].desc, id, (uint64_t)buffer(id), length, 0, 0);
    virtq_add(&queues[TX], id);
}

static void report(uint64_t frames, uint64_t ticks)
{
    print("net=end\nframes=%lu ticks=%lu ticks-per-frame=%lu\n", frames, ticks, ticks / frames);
}

static void send_frames(void)
{
    uint64_t sent = 0, done = 0, begin;
    uint32_t id, written;

    for (uint16_t n = 0; n < queues[TX].size; n++) {
        /* To nobody, from nobody, of type 88B5. */
        static const uint8_t start[14] = { 2, 0, 0, 0, 0, 9, 2, 0, 0, 0, 0, 8, 0x88, 0xB5 };

        memset(buffer(n), 0, BUFFER);
        for (unsigned i = 0; i < sizeof start; i++)
            buffer(n)[HEADER + i] = start[i];
    }
    print("net=ready\n");
    begin = rdtsc();
    while (sent < queues[TX].size && sent < count) {
        transmit((uint16_t)sent++, HEADER + bytes);
        virtq_kick(&queues[TX]);
    }
    while (done < count) {
        if (!virtq_poll(&queues[TX], &id, &written)) {
            pause();
            continue;
        }
        done++;
        if (sent < count) {
            transmit((uint16_t)id, HEADER + bytes);
            virtq_kick(&queues[TX]);
            sent++;
        }
    }
    report(done, rdtsc() - begin);
}

static void fill(void)
{
    for (uint16_t n = 0; n < queues[RX].size; n++)
        post(n);
    virtq_kick(&queues[RX]);
    print("net=ready\n");
}

static void receive_frames(void)
{
    uint64_t done = 0, begin = 0;
    uint32_t id, written;

    fill();
    while (done < count) {
        if (!virtq_poll(&queues[RX], &id, &written)) {
            virtq_kick(&queues[RX]);
            pause();
            continue;
        }
        if (!done++)
            begin = rdtsc();
        post((uint16_t)id);
        if (done % BATCH == 0)
            virtq_kick(&queues[RX]);
    }
    report(done, rdtsc() - begin);
}

/* A frame goes back in the buffer that it came in. */
static void reply_to_frames(void)
{
    uint64_t done = 0, begin = 0;
    uint32_t id, written;

    fill();
    while (done < count) {
        if (virtq_poll(&queues[TX], &id, &written)) {
            post((uint16_t)id);
            virtq_kick(&queues[RX]);
        }
        if (!virtq_poll(&queues[RX], &id, &written)) {
            pause();
            continue;
        }
        /* What the host's own stack sends is not for this. */
        if (buffer(id)[HEADER + 12] != 0x88 || buffer(id)[HEADER + 13] != 0xB5) {
            post((uint16_t)id);
            continue;
        }
        if (!done++)
            begin = rdtsc();
        memset(buffer(id), 0, HEADER);
        transmit((uint16_t)id, written);
        virtq_kick(&queues[TX]);
    }
    while (!virtq_poll(&queues[TX], &id, &written))
        pause();
    report(done, rdtsc() - begin);
}

void main(void)
{
    uint64_t wanted = VIRTIO_NET_F_MRG_RXBUF | VIRTIO_F_EVENT_IDX;

    if (!virtio_find(&device, VIRTIO_NET, 0))
        fail("no virtio-net");
    if (!virtio_negotiate(&device, wanted))
        fail("the device refuses its features");
    count = number_word("count", 100000);
    bytes = (uint32_t)number_word("bytes", 64);
    if (!count || bytes < 14 || bytes > BUFFER - HEADER)
        fail("count is not 0, bytes are 14 to 2036");
    buffers = allocate(DEPTH * BUFFER, 4096);
    virtq_set_up(&device, &queues[RX], RX, DEPTH, NO_VECTOR);
    virtq_set_up(&device, &queues[TX], TX, DEPTH, NO_VECTOR);
    virtio_driver_ok(&device);
    if (has_word("send"))
        to_cpl3(send_frames, false);
    if (has_word("receive"))
        to_cpl3(receive_frames, false);
    if (has_word("reply"))
        to_cpl3(reply_to_frames, false);
    fail("say send, receive or reply");
}
