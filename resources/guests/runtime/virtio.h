/*
 * A driver for virtio-pci, modern only, split rings (Virtio 1.2, 2.7 and 4.1).
 * virtio_find() needs no CPL; everything after it is MMIO and memory.
 */
#ifndef VIRTIO_H
#define VIRTIO_H

#include "pci.h"

#define VIRTIO_BLK 2
#define VIRTIO_RNG 4

#define VIRTIO_F_INDIRECT_DESC (1ull << 28)
#define VIRTIO_F_EVENT_IDX (1ull << 29)
#define VIRTIO_F_VERSION_1 (1ull << 32)

#define STATUS_ACKNOWLEDGE 0x01
#define STATUS_DRIVER 0x02
#define STATUS_DRIVER_OK 0x04
#define STATUS_FEATURES_OK 0x08
#define STATUS_NEEDS_RESET 0x40
#define STATUS_FAILED 0x80

#define DESC_NEXT 1
#define DESC_WRITE 2
#define DESC_INDIRECT 4

#define NO_VECTOR 0xFFFF

struct virtio_device {
    pci_slot slot;
    uint64_t common, notify, isr, config;
    uint32_t notify_multiplier;
    uint64_t features; /* negotiated */
};

struct virtq_desc {
    uint64_t address;
    uint32_t length;
    uint16_t flags, next;
};

struct virtq_avail {
    uint16_t flags, index;
    uint16_t ring[]; /* then used_event */
};

struct virtq_used {
    uint16_t flags, index;
    struct {
        uint32_t id, length;
    } ring[]; /* then avail_event */
};

struct virtq {
    uint16_t index, size;
    uint16_t made, kicked, seen; /* avail entries made and announced, used entries seen */
    bool event_idx, want_interrupts;
    volatile struct virtq_desc *desc;
    volatile struct virtq_avail *avail;
    volatile struct virtq_used *used;
    uint64_t doorbell;
};

/* The nth device of this type on bus 0; decoding and bus mastering on. */
bool virtio_find(struct virtio_device *device, uint16_t type, unsigned nth);
/* Writes status 0 and waits for it; false when the device does not get there. */
bool virtio_reset(struct virtio_device *device);
uint8_t virtio_status(const struct virtio_device *device);
uint64_t virtio_offered(const struct virtio_device *device);
unsigned virtio_queue_count(const struct virtio_device *device);
/* From reset up to FEATURES_OK; what is offered out of `wanted`, and VERSION_1. */
bool virtio_negotiate(struct virtio_device *device, uint64_t wanted);
/*
 * Sets a queue up and enables it; size is cut to what the device has. A second
 * call for the same struct uses the same memory again.
 */
void virtq_set_up(struct virtio_device *device, struct virtq *queue, uint16_t index, uint16_t size,
                  uint16_t vector);
void virtio_driver_ok(struct virtio_device *device);
/* Routes configuration changes to an MSI-X entry. */
void virtio_config_vector(struct virtio_device *device, uint16_t vector);

/* Fills in a descriptor of a queue or of an indirect table. */
void virtq_describe(volatile struct virtq_desc *table, uint16_t at, uint64_t address,
                    uint32_t length, uint16_t flags, uint16_t next);
/* Makes the chain at head available; virtq_kick announces. */
void virtq_add(struct virtq *queue, uint16_t head);
void virtq_kick(struct virtq *queue);
/* Takes the next used entry. */
bool virtq_poll(struct virtq *queue, uint32_t *id, uint32_t *length);

#endif
