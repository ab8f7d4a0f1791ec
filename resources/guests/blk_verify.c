/*
 * verify: fills the disk with patterns in shuffled order and odd pieces,
 * overwrites parts of it, reads everything back, and tries what is not data.
 */
#include "runtime/blkdev.h"

#define BLOCK 4096u
#define CHUNK (64u << 10)
#define BLOCKS_PER_CHUNK (CHUNK / BLOCK)
#define DEPTH 8
#define STRIDE (MAX_SEGMENTS + 2)

static uint8_t *buffer[DEPTH];
static uint8_t *version; /* of each block of the disk: part of its pattern */
static uint64_t first; /* sector of the disk where all this begins */
static uint64_t chunks, seed;
static uint64_t busy_with[DEPTH];
static unsigned errors;

static void complain(const char *what, uint64_t sector, uint64_t detail)
{
    if (errors++ < 8)
        print("wrong=%s sector=%lu detail=%lx\n", what, sector, detail);
}

/* The word at an index of 8 bytes into the disk. */
static uint64_t pattern(uint64_t index)
{
    uint64_t x = (index + seed + ((uint64_t)version[index * 8 / BLOCK] << 40)) * 0x9E3779B97F4A7C15;

    return x ^ x >> 29;
}

static void fill(uint8_t *at, uint64_t offset, uint32_t length)
{
    for (uint32_t i = 0; i < length; i += 8)
        *(uint64_t *)(at + i) = pattern((offset + i) / 8);
}

static void check(const uint8_t *at, uint64_t offset, uint32_t length)
{
    for (uint32_t i = 0; i < length; i += 8) {
        if (*(const uint64_t *)(at + i) != pattern((offset + i) / 8)) {
            complain("data", (offset + i) / SECTOR, *(const uint64_t *)(at + i));
            return;
        }
    }
}

/* Cuts a buffer into pieces: of whole sectors, or with the word `odd` of any length. */
static unsigned cut(uint8_t *at, uint32_t length, struct blk_segment *segments)
{
    uint32_t unit = has_word("odd") ? 1 : SECTOR;
    unsigned n = 0;

    while (length && n + 1 < MAX_SEGMENTS) {
        uint32_t piece = ((uint32_t)(random_next() >> 40) % (length / unit / 2 + 1) + 1) * unit;

        if (piece > length)
            piece = length;
        segments[n++] = (struct blk_segment){ at, piece };
        at += piece;
        length -= piece;
    }
    if (length)
        segments[n++] = (struct blk_segment){ at, length };
    return n;
}

/* An order over all chunks that is neither rising nor random. */
static uint64_t shuffled(uint64_t n)
{
    uint64_t step = chunks % 7919 ? 7919 : 7927;

    return n * step % chunks;
}

static void start_chunk(unsigned slot, uint32_t type, uint64_t n)
{
    struct blk_segment segments[MAX_SEGMENTS];
    uint64_t offset = shuffled(n) * CHUNK;
    unsigned count;

    busy_with[slot] = offset;
    if (type == BLK_OUT)
        fill(buffer[slot], offset, CHUNK);
    else
        memset(buffer[slot], 0xEE, CHUNK);
    count = cut(buffer[slot], CHUNK, segments);
    blk_submit(slot, type, first + offset / SECTOR, segments, count);
}

static void all_chunks(uint32_t type)
{
    unsigned depth = blk.slots < DEPTH ? blk.slots : DEPTH;
    uint64_t started = 0, done = 0;

    while (started < depth && started < chunks) {
        start_chunk((unsigned)started, type, started);
        started++;
    }
    blk_kick();
    while (done < chunks) {
        int slot = blk_reap();
        uint32_t expected = type == BLK_IN ? CHUNK + 1 : 1;

        if (slot < 0)
            continue;
        done++;
        if (blk.status[slot] != BLK_OK)
            complain("status", busy_with[slot] / SECTOR, blk.status[slot]);
        else if (type == BLK_IN)
            check(buffer[slot], busy_with[slot], CHUNK);
        if (blk.written[slot] != expected)
            complain("used-length", busy_with[slot] / SECTOR, blk.written[slot]);
        if (started < chunks) {
            start_chunk((unsigned)slot, type, started++);
            blk_kick();
        }
    }
    print("%s=%lu errors=%u\n", type == BLK_OUT ? "written" : "read", chunks * CHUNK, errors);
}

static void overwrite_some(void)
{
    uint64_t blocks = chunks * BLOCKS_PER_CHUNK, count = blocks / 4 < 512 ? blocks / 4 : 512;

    for (uint64_t n = 0; n < count; n++) {
        uint64_t block = (random_next() >> 11) % blocks;

        version[block]++;
        fill(buffer[0], block * BLOCK, BLOCK);
        if (blk_do(BLK_OUT, first + block * (BLOCK / SECTOR), buffer[0], BLOCK) != BLK_OK)
            complain("overwrite", block * (BLOCK / SECTOR), blk.status[0]);
    }
    print("overwritten=%lu errors=%u\n", count, errors);
}

/* What a chunk reads as now: zero, kept or mixed. */
static const char *reads_as(uint64_t chunk)
{
    bool zero = true, kept = true;

    if (blk_do(BLK_IN, first + chunk * (CHUNK / SECTOR), buffer[0], CHUNK) != BLK_OK)
        return "error";
    for (uint32_t i = 0; i < CHUNK; i += 8) {
        uint64_t word = *(uint64_t *)(buffer[0] + i);

        zero = zero && word == 0;
        kept = kept && word == pattern((chunk * CHUNK + i) / 8);
    }
    return zero ? "zero" : kept ? "kept" : "mixed";
}

/* Discards or zeroes one chunk, looks at it and at its neighbours, and writes it again. */
static void range_request(const char *name, uint32_t type, uint32_t flags)
{
    uint64_t chunk = chunks / 2;
    struct blk_range range = { first + chunk * (CHUNK / SECTOR), CHUNK / SECTOR, flags };
    uint8_t status = blk_do(type, 0, &range, sizeof(range));
    const char *here = reads_as(chunk);

    print("%s=%u reads=%s before=%s after=%s\n", name, status, here,
          chunk ? reads_as(chunk - 1) : "none", chunk + 1 < chunks ? reads_as(chunk + 1) : "none");
    if (status == BLK_OK && type == BLK_WRITE_ZEROES && !equal(here, "zero"))
        complain("write-zeroes", chunk * (CHUNK / SECTOR), 0);
    range.sector = blk.sectors;
    print("%s-past-end=%u\n", name, blk_do(type, 0, &range, sizeof(range)));
    fill(buffer[0], chunk * CHUNK, CHUNK);
    blk_do(BLK_OUT, first + chunk * (CHUNK / SECTOR), buffer[0], CHUNK);
}

/* Requests that must fail without harm; the numbers are status bytes. */
static void refused(void)
{
    print("read-past-end=%u\n", blk_do(BLK_IN, blk.sectors, buffer[0], SECTOR));
    print("read-across-end=%u\n", blk_do(BLK_IN, blk.sectors - 1, buffer[0], 2 * SECTOR));
    print("read-far=%u\n", blk_do(BLK_IN, ~0ull, buffer[0], SECTOR));
    print("write-across-end=%u\n", blk_do(BLK_OUT, blk.sectors - 1, buffer[0], 2 * SECTOR));
    print("read-part-sector=%u\n", blk_do(BLK_IN, 0, buffer[0], 100));
    print("unknown-type=%u\n", blk_do(77, 0, buffer[0], SECTOR));
}

static void read_only(void)
{
    uint8_t status, *before = buffer[1];

    print("readonly=1\n");
    blk_do(BLK_IN, 0, before, BLOCK);
    memset(buffer[0], 0x5A, BLOCK);
    status = blk_do(BLK_OUT, 0, buffer[0], BLOCK);
    blk_do(BLK_IN, 0, buffer[0], BLOCK);
    print("write=%u kept=%s\n", status, memcmp(before, buffer[0], BLOCK) ? "no" : "yes");
    refused();
}

void blk_verify(void)
{
    uint64_t mib = number_word("mib", 64);

    seed = number_word("seed", 1);
    blk_start((unsigned)number_word("queues", 1), 256, STRIDE,
              blk_wanted(), false);
    first = number_word("first", 0);
    if (first >= blk.sectors)
        fail("first is past the end of the disk");
    chunks = (blk.sectors - first) * SECTOR / CHUNK;
    if (chunks > mib * 16)
        chunks = mib * 16;
    if (!chunks)
        fail("verify wants a disk of 64 KiB or more");
    for (unsigned i = 0; i < DEPTH; i++)
        buffer[i] = allocate(CHUNK, 4096);
    version = allocate(chunks * BLOCKS_PER_CHUNK, 64);
    memset(version, 0, chunks * BLOCKS_PER_CHUNK);
    if (blk.device.features & BLK_F_RO) {
        read_only();
        return;
    }
    /* With `reread`, an earlier run with the same seed wrote this: before a reboot, say. */
    if (!has_word("reread"))
        all_chunks(BLK_OUT);
    if (blk.device.features & BLK_F_FLUSH)
        print("flush=%u\n", blk_do(BLK_FLUSH, 0, NULL, 0));
    all_chunks(BLK_IN);
    if (!has_word("keep")) {
        overwrite_some();
        all_chunks(BLK_IN);
        if (blk.device.features & BLK_F_DISCARD)
            range_request("discard", BLK_DISCARD, 0);
        if (blk.device.features & BLK_F_WRITE_ZEROES) {
            range_request("write-zeroes", BLK_WRITE_ZEROES, 0);
            range_request("write-zeroes-unmap", BLK_WRITE_ZEROES, 1);
        }
        refused();
        all_chunks(BLK_IN);
    }
    print("verify=%s errors=%u\n", errors ? "bad" : "ok", errors);
}
