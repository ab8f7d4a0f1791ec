/*
 * screen: draws on a display adapter with the Bochs interface, and tells what is typed on the PS/2
 * keyboard and mouse. See README.md.
 */
#include "runtime/pci.h"

#define BOCHS 0x11111234
#define REGISTERS 0x500
#define XRES 1
#define YRES 2
#define BPP 3
#define ENABLE 4
#define VIRT_WIDTH 6
#define X_OFFSET 8
#define Y_OFFSET 9
#define ENABLED 0x41
#define KEEP 0x80

#define I8042_FULL 0x01
#define I8042_AUX 0x20
#define MOUSE_COMMAND 0xD4
#define MOUSE_REPORTS 0xF4
#define WRITE_MODE 0x60
#define TRANSLATED 0x44

#define UART_LSR 5
#define UART_LSR_DATA 1

static uint64_t memory, registers;
static unsigned width, height, bits, seed;
/* By the keyboard alone, and without a word: a bench measures what the host does. */
static bool driven, plays;

static void set(unsigned index, uint16_t value)
{
    write16(registers + REGISTERS + index * 2, value);
}

static unsigned get(unsigned index)
{
    return read16(registers + REGISTERS + index * 2);
}

static void set_mode(uint16_t flags)
{
    set(ENABLE, 0);
    set(BPP, (uint16_t)bits);
    set(XRES, (uint16_t)width);
    set(YRES, (uint16_t)height);
    set(X_OFFSET, 0);
    set(Y_OFFSET, 0);
    set(ENABLE, ENABLED | flags);
}

/* Red, green and blue of a pixel: what the host looks for. */
static uint32_t colour(unsigned x, unsigned y)
{
    uint32_t red = (x + seed) & 0xFF, green = (y * 3 + seed) & 0xFF, blue = (x ^ y) & 0xFF;

    return red << 16 | green << 8 | blue;
}

static void put(unsigned x, unsigned y, uint32_t rgb)
{
    uint64_t at = memory + ((uint64_t)y * width + x) * ((bits + 7) / 8);

    if (bits == 32)
        write32(at, rgb);
    else if (bits == 16)
        write16(at, (uint16_t)((rgb >> 8 & 0xF800) | (rgb >> 5 & 0x07E0) | (rgb >> 3 & 0x001F)));
}

static void draw(void)
{
    for (unsigned y = 0; y < height; y++)
        for (unsigned x = 0; x < width; x++)
            put(x, y, colour(x, y));
    if (!driven)
        print("drawn seed=%u %ux%u bits=%u\n", seed, width, height, bits);
}

/* A square of one colour in the upper left corner of a picture that stays. */
static void touch(void)
{
    for (unsigned y = 0; y < 16; y++)
        for (unsigned x = 0; x < 16; x++)
            put(x, y, 0xFFFFFF);
    print("touched\n");
}

/* Up by 16 lines, as a text console does. */
static void scroll(void)
{
    uint64_t line = (uint64_t)width * ((bits + 7) / 8);

    for (uint64_t at = 0; at < line * (height - 16); at += 8)
        write64(memory + at, read64(memory + at + line * 16));
    print("scrolled\n");
}

/* A line of text comes up from below. */
static void new_line(void)
{
    uint64_t line = (uint64_t)width * ((bits + 7) / 8);

    seed++;
    for (uint64_t at = 0; at < line * (height - 16); at += 8)
        write64(memory + at, read64(memory + at + line * 16));
    for (unsigned y = 0; y < 16; y++)
        for (unsigned x = 0; x < width; x++)
            put(x, height - 16 + y, (x / 8 * 7 + seed * 13) >> (y / 2 & 7) & (x & 3) ? 0xAAAAAA : 0);
}

/* A square whose colour changes each time. */
static void blink(void)
{
    seed++;
    for (unsigned y = 0; y < 16; y++)
        for (unsigned x = 0; x < 16; x++)
            put(x, y, seed & 1 ? 0xFFFFFF : 0);
}

/* What a key does, by its code in set 1. */
static void played(uint8_t code)
{
    switch (code) {
    case 0x1F: /* s */
        new_line();
        break;
    case 0x14: /* t */
        blink();
        break;
    case 0x19: /* p */
        plays = !plays;
        break;
    }
}

/* Modes that nobody can have, and one that everybody can, over and over. */
static void storm(unsigned rounds)
{
    static const uint16_t sides[] = { 0, 1, 640, 65535 };

    for (unsigned i = 0; i < rounds; i++) {
        set(ENABLE, 0);
        set(BPP, (uint16_t)(i * 7));
        set(XRES, sides[i & 3]);
        set(YRES, sides[i >> 2 & 3]);
        set(ENABLE, ENABLED | KEEP);
        set(VIRT_WIDTH, sides[i >> 4 & 3]);
        set(X_OFFSET, sides[i >> 6 & 3]);
        set(Y_OFFSET, sides[i >> 8 & 3]);
    }
    print("storm=%u\n", rounds);
    set_mode(0);
    draw();
}

/* A thousand modes, some of which are none, as fast as they can be set. */
static void change_modes(void)
{
    static const uint16_t widths[] = { 320, 640, 1024, 0 }, heights[] = { 200, 480, 768, 65535 };
    static const uint8_t depths[] = { 32, 16, 24, 32, 15, 8 };

    for (unsigned i = 0; i < 1000; i++) {
        width = widths[i & 3];
        height = heights[i & 3];
        bits = depths[i % sizeof depths];
        set_mode(i & 1 ? KEEP : 0);
    }
    print("modes=1000\n");
    width = 640;
    height = 480;
    bits = 32;
    set_mode(0);
    seed++;
    draw();
}

static void command(char word)
{
    switch (word) {
    case 'c':
        change_modes();
        break;
    case 'd':
        seed++;
        draw();
        break;
    case 't':
        touch();
        break;
    case 's':
        scroll();
        break;
    case 'm':
        width = width == 640 ? 800 : 640;
        height = width == 640 ? 480 : 600;
        set_mode(0);
        draw();
        break;
    case 'l':
        bits = bits == 32 ? 16 : 32;
        set_mode(0);
        draw();
        break;
    case 'o':
        set(ENABLE, 0);
        print("off\n");
        break;
    case 'h':
        storm(500);
        break;
    case 'p':
        /* Where is the cursor? A terminal answers. */
        print("\033[6nasked\n");
        break;
    case 'q':
        power_off();
    }
}

/* What came from the keyboard, or from the mouse. */
static void input(void)
{
    uint8_t status = inb(PORT_I8042_COMMAND);

    if (status & I8042_FULL) {
        uint8_t byte = inb(PORT_I8042_DATA);

        if (driven)
            return played(byte);
        print(status & I8042_AUX ? "mouse=%02x\n" : "key=%02x\n", byte);
    }
}

static void run(void)
{
    outb(PORT_I8042_COMMAND, MOUSE_COMMAND);
    outb(PORT_I8042_DATA, MOUSE_REPORTS);
    while (!(inb(PORT_I8042_COMMAND) & I8042_FULL))
        pause();
    inb(PORT_I8042_DATA);
    draw();
    if (driven) {
        outb(PORT_I8042_COMMAND, WRITE_MODE);
        outb(PORT_I8042_DATA, TRANSLATED);
        print("driven\n");
    }
    for (;;) {
        input();
        if (plays) {
            seed++;
            draw();
        } else if (!driven && inb(PORT_COM1 + UART_LSR) & UART_LSR_DATA) {
            command((char)inb(PORT_COM1));
        }
    }
}

void main(void)
{
    unsigned slot = 0;

    while (slot < 256 && pci_read32((pci_slot)slot, PCI_VENDOR) != BOCHS)
        slot += 8;
    if (slot == 256)
        fail("no display adapter");
    memory = pci_bar_address((pci_slot)slot, 0);
    registers = pci_bar_address((pci_slot)slot, 2);
    pci_write16((pci_slot)slot, PCI_COMMAND, PCI_COMMAND_MEMORY);
    if ((get(0) & 0xFFF0) != 0xB0C0)
        fail("no Bochs interface");
    width = get(XRES);
    height = get(YRES);
    bits = get(BPP);
    if (!bits)
        bits = 32;
    print("power-on=%ux%u bits=%u enable=%02x memory=%lx\n", width, height, bits, get(ENABLE), memory);
    width = (unsigned)number_word("width", width);
    height = (unsigned)number_word("height", height);
    driven = number_word("driven", 0) != 0;
    if (width != get(XRES) || height != get(YRES))
        set_mode(0);
    to_cpl3(run, false);
}
