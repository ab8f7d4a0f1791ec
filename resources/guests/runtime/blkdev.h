/*
 * virtio-blk requests (Virtio 1.2, 5.2). A slot holds one request at a time:
 * slot s is on queue s % queues, and owns `stride` descriptors there.
 */
#ifndef BLKDEV_H
#define BLKDEV_H

#include "virtio.h"

#define BLK_F_SEG_MAX (1ull << 2)
#define BLK_F_RO (1ull << 5)
#define BLK_F_BLK_SIZE (1ull << 6)
#define BLK_F_FLUSH (1ull << 9)
#define BLK_F_TOPOLOGY (1ull << 10)
#define BLK_F_CONFIG_WCE (1ull << 11)
#define BLK_F_MQ (1ull << 12)
#define BLK_F_DISCARD (1ull << 13)
#define BLK_F_WRITE_ZEROES (1ull << 14)
#define BLK_F_ALL                                                                              \
    (BLK_F_SEG_MAX | BLK_F_RO | BLK_F_BLK_SIZE | BLK_F_FLUSH | BLK_F_TOPOLOGY | BLK_F_CONFIG_WCE | \
     BLK_F_MQ | BLK_F_DISCARD | BLK_F_WRITE_ZEROES)

#define BLK_IN 0
#define BLK_OUT 1
#define BLK_FLUSH 4
#define BLK_GET_ID 8
#define BLK_DISCARD 11
#define BLK_WRITE_ZEROES 13

#define BLK_OK 0
#define BLK_IOERR 1
#define BLK_UNSUPP 2
#define BLK_PENDING 0xFF

#define BLK_ID_LENGTH 20
#define SECTOR 512

/* Offsets in the configuration space. */
#define BLK_CONFIG_CAPACITY 0
#define BLK_CONFIG_SEG_MAX 12
#define BLK_CONFIG_BLK_SIZE 20
#define BLK_CONFIG_WCE 32
#define BLK_CONFIG_QUEUES 34
#define BLK_CONFIG_MAX_DISCARD 36
#define BLK_CONFIG_MAX_WRITE_ZEROES 48

#define MAX_SLOTS 256
#define MAX_QUEUES 8
#define MAX_SEGMENTS 16

struct blk_header {
    uint32_t type, reserved;
    uint64_t sector;
};

struct blk_range {
    uint64_t sector;
    uint32_t sectors, flags;
};

struct blk_segment {
    void *at;
    uint32_t length;
};

struct blk {
    struct virtio_device device;
    struct virtq queue[MAX_QUEUES];
    unsigned queues, stride, slots;
    uint64_t sectors;
    struct blk_header *header;
    volatile uint8_t *status; /* of each slot's last request */
    uint32_t *written;        /* used length of each slot's last request */
    struct virtq_desc *tables; /* of each slot, when VIRTIO_F_INDIRECT_DESC is on */
};

extern struct blk blk;

/*
 * Resets the device and gets it going, with `queues` queues of up to `size`
 * entries, and interrupts at MSI-X entry 1 for all of them when asked for.
 */
void blk_start(unsigned queues, unsigned size, unsigned stride, uint64_t features, bool interrupts);
/* Makes a request available; blk_kick announces what was submitted on a queue. */
void blk_submit(unsigned slot, uint32_t type, uint64_t sector, const struct blk_segment *segments,
                unsigned count);
void blk_kick(void);
/* The slot of one finished request, or -1; a used entry that makes no sense ends the guest. */
int blk_reap(void);
/* One request on slot 0, start to end: its status. Nothing else may be under way. */
uint8_t blk_do(uint32_t type, uint64_t sector, void *at, uint32_t length);

/* BLK_F_ALL and what the words event-idx and indirect add. */
uint64_t blk_wanted(void);

/* xorshift64*: the same sequence on every run. */
uint64_t random_next(void);

/* The modes that have a file of their own. At CPL 3. */
void blk_verify(void);
void blk_hostile(void);
void blk_churn(void);

#endif
