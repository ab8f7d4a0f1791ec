#include "virtio.h"

#define VENDOR_VIRTIO 0x1AF4
#define DEVICE_MODERN 0x1040

/* Virtio 1.2, 4.1.4: struct virtio_pci_cap. */
#define CAP_TYPE 3
#define CAP_BAR 4
#define CAP_OFFSET 8
#define CAP_MULTIPLIER 16
#define CAP_COMMON 1
#define CAP_NOTIFY 2
#define CAP_ISR 3
#define CAP_DEVICE 4

/* 4.1.4.3: struct virtio_pci_common_cfg. */
#define COMMON_DEVICE_FEATURE_SELECT 0
#define COMMON_DEVICE_FEATURE 4
#define COMMON_DRIVER_FEATURE_SELECT 8
#define COMMON_DRIVER_FEATURE 12
#define COMMON_CONFIG_VECTOR 16
#define COMMON_QUEUES 18
#define COMMON_STATUS 20
#define COMMON_QUEUE_SELECT 22
#define COMMON_QUEUE_SIZE 24
#define COMMON_QUEUE_VECTOR 26
#define COMMON_QUEUE_ENABLE 28
#define COMMON_QUEUE_NOTIFY_OFF 30
#define COMMON_QUEUE_DESC 32
#define COMMON_QUEUE_DRIVER 40
#define COMMON_QUEUE_DEVICE 48

#define AVAIL_NO_INTERRUPT 1
#define USED_NO_NOTIFY 1

/* Orders a store before a later load. CPL 0 of some hosts has no mfence. */
static void full_barrier(void)
{
    __asm__ volatile("lock; addl $0, (%%rsp)" : : : "memory", "cc");
}

static void read_capabilities(struct virtio_device *device)
{
    uint64_t bar_address[6] = { 0 };

    for (unsigned at = 0; (at = pci_capability(device->slot, PCI_CAP_VENDOR, at));) {
        unsigned bar = pci_read8(device->slot, at + CAP_BAR);
        uint8_t type = pci_read8(device->slot, at + CAP_TYPE);
        uint64_t address;

        if (bar > 5 || type < CAP_COMMON || type > CAP_DEVICE)
            continue;
        if (!bar_address[bar])
            bar_address[bar] = pci_bar_address(device->slot, bar);
        address = bar_address[bar] + pci_read32(device->slot, at + CAP_OFFSET);
        if (type == CAP_COMMON && !device->common)
            device->common = address;
        if (type == CAP_ISR && !device->isr)
            device->isr = address;
        if (type == CAP_DEVICE && !device->config)
            device->config = address;
        if (type == CAP_NOTIFY && !device->notify) {
            device->notify = address;
            device->notify_multiplier = pci_read32(device->slot, at + CAP_MULTIPLIER);
        }
    }
}

bool virtio_find(struct virtio_device *device, uint16_t type, unsigned nth)
{
    for (unsigned slot = 0; slot < 256; slot += 8) {
        uint32_t id = pci_read32((pci_slot)slot, PCI_VENDOR);

        if (id != ((uint32_t)(DEVICE_MODERN + type) << 16 | VENDOR_VIRTIO) || nth--)
            continue;
        *device = (struct virtio_device){ .slot = (pci_slot)slot };
        read_capabilities(device);
        if (!device->common || !device->notify || !device->isr)
            fail("a virtio device lacks a capability");
        pci_write16(device->slot, PCI_COMMAND,
                    pci_read16(device->slot, PCI_COMMAND) | PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER);
        return true;
    }
    return false;
}

uint8_t virtio_status(const struct virtio_device *device)
{
    return read8(device->common + COMMON_STATUS);
}

bool virtio_reset(struct virtio_device *device)
{
    uint64_t deadline = rdtsc() + 20000000000;

    write8(device->common + COMMON_STATUS, 0);
    while (virtio_status(device))
        if (rdtsc() > deadline)
            return false;
    return true;
}

uint64_t virtio_offered(const struct virtio_device *device)
{
    uint64_t features;

    write32(device->common + COMMON_DEVICE_FEATURE_SELECT, 1);
    features = (uint64_t)read32(device->common + COMMON_DEVICE_FEATURE) << 32;
    write32(device->common + COMMON_DEVICE_FEATURE_SELECT, 0);
    return features | read32(device->common + COMMON_DEVICE_FEATURE);
}

unsigned virtio_queue_count(const struct virtio_device *device)
{
    return read16(device->common + COMMON_QUEUES);
}

bool virtio_negotiate(struct virtio_device *device, uint64_t wanted)
{
    if (!virtio_reset(device))
        return false;
    write8(device->common + COMMON_STATUS, STATUS_ACKNOWLEDGE);
    write8(device->common + COMMON_STATUS, STATUS_ACKNOWLEDGE | STATUS_DRIVER);
    device->features = virtio_offered(device) & (wanted | VIRTIO_F_VERSION_1);
    for (uint32_t half = 0; half < 2; half++) {
        write32(device->common + COMMON_DRIVER_FEATURE_SELECT, half);
        write32(device->common + COMMON_DRIVER_FEATURE, (uint32_t)(device->features >> (32 * half)));
    }
    write8(device->common + COMMON_STATUS, STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_FEATURES_OK);
    return virtio_status(device) & STATUS_FEATURES_OK;
}

void virtio_config_vector(struct virtio_device *device, uint16_t vector)
{
    write16(device->common + COMMON_CONFIG_VECTOR, vector);
    if (read16(device->common + COMMON_CONFIG_VECTOR) != vector)
        fail("the device refuses a configuration vector");
}

/* Rings of the largest size these guests use. */
#define RING_SIZE 256

static void set_address(uint64_t at, volatile void *ring)
{
    write32(at, (uint32_t)(uint64_t)ring);
    write32(at + 4, (uint32_t)((uint64_t)ring >> 32));
}

void virtq_set_up(struct virtio_device *device, struct virtq *queue, uint16_t index, uint16_t size,
                  uint16_t vector)
{
    uint64_t common = device->common;
    uint16_t most;

    if (!queue->desc) {
        queue->desc = allocate(RING_SIZE * sizeof(struct virtq_desc), 4096);
        queue->avail = allocate(4 + 2 * RING_SIZE + 2, 64);
        queue->used = allocate(4 + 8 * RING_SIZE + 2, 64);
    }
    write16(common + COMMON_QUEUE_SELECT, index);
    most = read16(common + COMMON_QUEUE_SIZE);
    if (!most)
        fail("the device lacks a queue");
    if (size > RING_SIZE)
        size = RING_SIZE;
    queue->index = index;
    queue->size = size < most ? size : most;
    queue->made = queue->kicked = queue->seen = 0;
    queue->event_idx = device->features & VIRTIO_F_EVENT_IDX;
    queue->want_interrupts = vector != NO_VECTOR;
    memset((void *)queue->desc, 0, queue->size * sizeof(struct virtq_desc));
    memset((void *)queue->avail, 0, 4 + 2u * queue->size + 2);
    memset((void *)queue->used, 0, 4 + 8u * queue->size + 2);
    if (!queue->want_interrupts)
        queue->avail->flags = AVAIL_NO_INTERRUPT;
    write16(common + COMMON_QUEUE_SIZE, queue->size);
    write16(common + COMMON_QUEUE_VECTOR, vector);
    if (read16(common + COMMON_QUEUE_VECTOR) != vector)
        fail("the device refuses a queue vector");
    set_address(common + COMMON_QUEUE_DESC, queue->desc);
    set_address(common + COMMON_QUEUE_DRIVER, queue->avail);
    set_address(common + COMMON_QUEUE_DEVICE, queue->used);
    queue->doorbell = device->notify +
                      (uint64_t)read16(common + COMMON_QUEUE_NOTIFY_OFF) * device->notify_multiplier;
    write16(common + COMMON_QUEUE_ENABLE, 1);
}

void virtio_driver_ok(struct virtio_device *device)
{
    write8(device->common + COMMON_STATUS, virtio_status(device) | STATUS_DRIVER_OK);
}

void virtq_describe(volatile struct virtq_desc *table, uint16_t at, uint64_t address,
                    uint32_t length, uint16_t flags, uint16_t next)
{
    table[at].address = address;
    table[at].length = length;
    table[at].flags = flags;
    table[at].next = next;
}

void virtq_add(struct virtq *queue, uint16_t head)
{
    queue->avail->ring[queue->made % queue->size] = head;
    queue->made++;
}

void virtq_kick(struct virtq *queue)
{
    volatile uint16_t *avail_event = (volatile uint16_t *)&queue->used->ring[queue->size];
    bool wanted;

    __asm__ volatile("" : : : "memory");
    queue->avail->index = queue->made;
    full_barrier();
    /* 2.7.10: the device wants to hear when the index passes avail_event. */
    if (queue->event_idx)
        wanted = (uint16_t)(queue->made - *avail_event - 1) < (uint16_t)(queue->made - queue->kicked);
    else
        wanted = !(queue->used->flags & USED_NO_NOTIFY);
    queue->kicked = queue->made;
    if (wanted)
        write16(queue->doorbell, queue->index);
}

bool virtq_poll(struct virtq *queue, uint32_t *id, uint32_t *length)
{
    volatile uint16_t *used_event = &queue->avail->ring[queue->size];

    if (queue->used->index == queue->seen) {
        if (!queue->event_idx || !queue->want_interrupts)
            return false;
        *used_event = queue->seen;
        full_barrier();
        if (queue->used->index == queue->seen)
            return false;
    }
    *id = queue->used->ring[queue->seen % queue->size].id;
    *length = queue->used->ring[queue->seen % queue->size].length;
    queue->seen++;
    /* Without interrupts wanted: as far away as can be. */
    if (queue->event_idx && !queue->want_interrupts)
        *used_event = (uint16_t)(queue->seen - 1);
    return true;
}
