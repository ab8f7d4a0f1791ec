/*
 * churn: writes to the disk for ever, and tells on request how often it has and
 * whether all of the disk says so. For disks that move while they are used.
 */
#include "runtime/blkdev.h"

#define BLOCK 4096u
#define COM1 0x3F8
#define LSR_DATA 1
/* Writes between looks at the serial port. */
#define LOOK 32

static uint64_t blocks, written;
static uint64_t *wanted; /* the words of each block */
static uint64_t *buffer;
static unsigned answers;

static void one(void)
{
    uint64_t block = random_next() % blocks;
    /* Some are zeros, as of a file that was removed. */
    uint64_t word = written % 7 ? written + 1 : 0;

    for (unsigned i = 0; i < BLOCK / 8; i++)
        buffer[i] = word;
    if (blk_do(BLK_OUT, block * (BLOCK / SECTOR), buffer, BLOCK) != BLK_OK)
        fail("a write failed");
    wanted[block] = word;
    written++;
}

static uint64_t wrong_blocks(void)
{
    uint64_t wrong = 0;

    for (uint64_t block = 0; block < blocks; block++) {
        if (blk_do(BLK_IN, block * (BLOCK / SECTOR), buffer, BLOCK) != BLK_OK)
            fail("a read failed");
        wrong += buffer[0] != wanted[block] || buffer[BLOCK / 8 - 1] != wanted[block];
    }
    return wrong;
}

void blk_churn(void)
{
    bool held = false;

    blocks = blk.sectors / (BLOCK / SECTOR);
    wanted = allocate(blocks * sizeof(*wanted), BLOCK);
    buffer = allocate(BLOCK, BLOCK);
    for (uint64_t block = 0; block < blocks; block++) {
        if (blk_do(BLK_IN, block * (BLOCK / SECTOR), buffer, BLOCK) != BLK_OK)
            fail("a read failed");
        wanted[block] = buffer[0];
    }
    print("churn=%lu\n", blocks);
    for (;;) {
        for (unsigned i = 0; i < LOOK && !held; i++)
            one();
        if (!(inb(COM1 + 5) & LSR_DATA))
            continue;
        switch (inb(COM1)) {
        case 'c':
            print("count=%lu wrong=%lu answer=%u\n", written, wrong_blocks(), ++answers);
            break;
        case 'h':
            held = !held;
            break;
        case 'q':
            if (blk_do(BLK_FLUSH, 0, 0, 0) != BLK_OK)
                fail("a flush failed");
            print("churn=end\n");
            return;
        }
    }
}
