/*
 * blk: a virtio-blk driver with several jobs, by the command line: verify,
 * bench=…, irq, irq-cpl3, grow, churn, hostile. Without one, it prints what the device is.
 */
#include "runtime/apic.h"
#include "runtime/blkdev.h"

static void show(void)
{
    uint64_t config = blk.device.config;
    char id[BLK_ID_LENGTH + 1] = { 0 };
    uint8_t status;

    print("blk=%02x.%x offered=%lx features=%lx sectors=%lu queues=%u\n", blk.device.slot >> 3,
          blk.device.slot & 7, virtio_offered(&blk.device), blk.device.features, blk.sectors,
          virtio_queue_count(&blk.device));
    print("queue-size=%u seg-max=%u blk-size=%u wce=%u num-queues=%u max-discard=%u "
          "max-write-zeroes=%u\n",
          blk.queue[0].size, read32(config + BLK_CONFIG_SEG_MAX), read32(config + BLK_CONFIG_BLK_SIZE),
          read8(config + BLK_CONFIG_WCE), read16(config + BLK_CONFIG_QUEUES),
          read32(config + BLK_CONFIG_MAX_DISCARD), read32(config + BLK_CONFIG_MAX_WRITE_ZEROES));
    status = blk_do(BLK_GET_ID, 0, id, BLK_ID_LENGTH);
    print("id=%s id-status=%u\n", id, status);
}

/* --- bench -------------------------------------------------------------- */

struct bench {
    uint32_t type;
    uint32_t bytes;
    uint64_t count, span; /* span: places of `bytes` bytes */
    bool random;
    unsigned depth;
    uint8_t *buffers;
};

static struct bench bench;

static void bench_submit(unsigned slot, uint64_t n)
{
    struct blk_segment segment = { bench.buffers + (uint64_t)slot * bench.bytes, bench.bytes };
    uint64_t place = (bench.random ? random_next() >> 11 : n) % bench.span;

    blk_submit(slot, bench.type, place * (bench.bytes / SECTOR), &segment, 1);
}

static void bench_run(void)
{
    uint64_t submitted = 0, done = 0, errors = 0, begin, ticks;
    uint64_t khz = number_word("khz", 0);

    /* Two small lines around the run: the host may time them instead. */
    print("bench=begin\n");
    begin = rdtsc();
    while (submitted < bench.depth && submitted < bench.count) {
        bench_submit((unsigned)submitted, submitted);
        submitted++;
    }
    blk_kick();
    while (done < bench.count) {
        int slot = blk_reap();

        if (slot < 0) {
            blk_kick();
            pause();
            continue;
        }
        done++;
        errors += blk.status[slot] != BLK_OK;
        if (submitted < bench.count)
            bench_submit((unsigned)slot, submitted++);
    }
    ticks = rdtsc() - begin;
    print("bench=end\n");
    print("op=%s random=%u depth=%u bs=%u queues=%u count=%lu errors=%lu ticks=%lu "
          "ticks-per-request=%lu",
          bench.type == BLK_OUT ? "write" : "read", bench.random, bench.depth, bench.bytes, blk.queues,
          done, errors, ticks, ticks / done);
    if (khz)
        print(" iops=%lu", done * 1000 / (ticks / khz + 1));
    print("\n");
}

static _Noreturn void bench_start(const char *op)
{
    unsigned queues = (unsigned)number_word("queues", 1);

    bench.type = equal(op, "write") ? BLK_OUT : BLK_IN;
    bench.bytes = (uint32_t)number_word("bs", 4096);
    bench.count = number_word("count", 10000);
    bench.random = number_word("random", 0);
    bench.depth = (unsigned)number_word("depth", 1);
    if (!bench.bytes || bench.bytes % SECTOR || !bench.count || !bench.depth)
        fail("bs is a multiple of 512; count and depth are not 0");
    blk_start(queues, 256, 3, blk_wanted(), false);
    bench.span = blk.sectors * SECTOR / bench.bytes;
    if (!bench.span)
        fail("the disk is smaller than one request");
    if (bench.depth > blk.slots)
        bench.depth = blk.slots;
    bench.buffers = allocate((uint64_t)bench.depth * bench.bytes, 4096);
    to_cpl3(bench_run, false);
}

/* --- irq ---------------------------------------------------------------- */

static volatile unsigned interrupts;

static void count_interrupt(unsigned vector)
{
    (void)vector;
    interrupts++;
    apic_end_of_interrupt();
}

static struct blk_segment irq_segment;

/*
 * One request at a time, each waited for by its interrupt. At CPL 0 the wait
 * is a halt; at CPL 3 interrupts come in the middle of the loop.
 */
static void irq_requests(void)
{
    unsigned count = (unsigned)number_word("count", 16), done = 0, halts = 0;

    for (unsigned n = 0; n < count; n++) {
        unsigned before = interrupts;

        blk_submit(n % blk.queues, BLK_IN, n % blk.sectors, &irq_segment, 1);
        blk_kick();
        while (interrupts == before) {
            if (!at_cpl0()) {
                pause();
                continue;
            }
            wait_for_interrupt();
            halts++;
        }
        for (int slot; (slot = blk_reap()) >= 0;)
            done += blk.status[slot] == BLK_OK;
    }
    print("irq-requests=%u done=%u interrupts=%u halts=%u\n", count, done, interrupts, halts);
}

static void irq_set_up(void)
{
    irq_segment = (struct blk_segment){ allocate(SECTOR, 4096), SECTOR };
    apic_enable();
    on_interrupt(VECTOR_MSI, count_interrupt);
    pci_msix_set(blk.device.slot, 1, msi_address(), MSI_DATA(VECTOR_MSI));
    blk_start((unsigned)number_word("queues", 1), 64, 3, blk_wanted(), true);
}

/* --- grow --------------------------------------------------------------- */

/* Waits, halted, for the interrupt that tells of a larger disk, and uses its last sector. */
static void grow(void)
{
    uint8_t *buffer = allocate(SECTOR, 4096);
    uint64_t config = blk.device.config, sectors;
    uint8_t past_end;

    apic_enable();
    on_interrupt(VECTOR_MSI, count_interrupt);
    pci_msix_set(blk.device.slot, 0, msi_address(), MSI_DATA(VECTOR_MSI));
    blk_start(1, 64, 3, blk_wanted(), false);
    virtio_config_vector(&blk.device, 0);
    past_end = blk_do(BLK_IN, blk.sectors, buffer, SECTOR);
    print("sectors=%lu past-end=%u\ngrow=ready\n", blk.sectors, past_end);
    while (!interrupts)
        wait_for_interrupt();
    sectors = read64(config + BLK_CONFIG_CAPACITY);
    memset(buffer, 0xA5, SECTOR);
    past_end = blk_do(BLK_OUT, sectors, buffer, SECTOR);
    print("grown-to=%lu write-last=%u write-past-end=%u\n", sectors,
          blk_do(BLK_OUT, sectors - 1, buffer, SECTOR), past_end);
}

void main(void)
{
    const char *op = text_word("bench");

    if (!virtio_find(&blk.device, VIRTIO_BLK, (unsigned)number_word("disk", 0)))
        fail("no virtio-blk");
    if (op)
        bench_start(op);
    if (has_word("irq") || has_word("irq-cpl3")) {
        irq_set_up();
        if (has_word("irq-cpl3"))
            to_cpl3(irq_requests, true);
        irq_requests();
        return;
    }
    if (has_word("grow")) {
        grow();
        return;
    }
    blk_start(1, 256, 3, BLK_F_ALL, false);
    show();
    if (has_word("verify"))
        to_cpl3(blk_verify, false);
    if (has_word("churn"))
        to_cpl3(blk_churn, false);
    if (has_word("hostile"))
        to_cpl3(blk_hostile, false);
}
