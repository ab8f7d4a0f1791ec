/* Serial output, formatting and the command line. See runtime.h. */
#include <stdarg.h>

#include "runtime.h"

/* 16550 registers, from COM1. */
#define UART_DATA 0
#define UART_FIFO_CONTROL 2
#define UART_LINE_STATUS 5
#define UART_THR_EMPTY 0x20
#define UART_FIFO_DEPTH 16

/* --- Output ------------------------------------------------------------- */

/*
 * The status is asked for once for each FIFO-full, since an exit is dear, and
 * not for ever: a machine without the port must not hang.
 */
void serial_write(const char *text, size_t length)
{
    static bool fifo_on;

    if (!fifo_on) {
        outb(PORT_COM1 + UART_FIFO_CONTROL, 1);
        fifo_on = true;
    }
    for (size_t i = 0; i < length; i++) {
        if (i % UART_FIFO_DEPTH == 0)
            for (unsigned tries = 0; tries < 100000; tries++)
                if (inb(PORT_COM1 + UART_LINE_STATUS) & UART_THR_EMPTY)
                    break;
        outb(PORT_COM1 + UART_DATA, (uint8_t)text[i]);
    }
}

void debugcon_write(const char *text, size_t length)
{
    for (size_t i = 0; i < length; i++)
        outb(PORT_DEBUGCON, (uint8_t)text[i]);
}

struct line {
    char text[256];
    size_t length;
};

static void put(struct line *line, char c)
{
    if (line->length == sizeof(line->text)) {
        serial_write(line->text, line->length);
        line->length = 0;
    }
    line->text[line->length++] = c;
}

static void put_number(struct line *line, uint64_t value, unsigned base, unsigned width, char pad)
{
    char digits[20];
    unsigned n = 0;

    do {
        digits[n++] = "0123456789abcdef"[value % base];
        value /= base;
    } while (value);
    while (width > n) {
        put(line, pad);
        width--;
    }
    while (n)
        put(line, digits[--n]);
}

static void put_argument(struct line *line, const char *conversion, uint64_t value, unsigned width, char pad)
{
    switch (*conversion) {
    case 'd':
        if ((int64_t)value < 0) {
            put(line, '-');
            value = -value;
        }
        put_number(line, value, 10, width, pad);
        break;
    case 'u':
        put_number(line, value, 10, width, pad);
        break;
    case 'x':
        put_number(line, value, 16, width, pad);
        break;
    case 'c':
        put(line, (char)value);
        break;
    case 's':
        for (const char *s = (const char *)value; *s; s++)
            put(line, *s);
        break;
    default:
        put(line, *conversion);
    }
}

void print(const char *format, ...)
{
    struct line line;
    va_list arguments;

    line.length = 0;
    va_start(arguments, format);
    for (; *format; format++) {
        unsigned width = 0;
        char pad = ' ';
        uint64_t value = 0;

        if (*format != '%') {
            put(&line, *format);
            continue;
        }
        if (*++format == '0')
            pad = '0';
        while (*format >= '0' && *format <= '9')
            width = width * 10 + (unsigned)(*format++ - '0');
        if (*format == 'l') {
            value = va_arg(arguments, uint64_t);
            format++;
        } else if (*format == 's') {
            value = (uint64_t)va_arg(arguments, const char *);
        } else if (*format == 'd') {
            value = (uint64_t)(int64_t)va_arg(arguments, int);
        } else if (*format != '%') {
            value = va_arg(arguments, unsigned);
        }
        put_argument(&line, format, value, width, pad);
    }
    va_end(arguments);
    serial_write(line.text, line.length);
}

/* --- Command line ------------------------------------------------------- */

bool equal(const char *a, const char *b)
{
    while (*a && *a == *b) {
        a++;
        b++;
    }
    return *a == *b;
}

const char *after(const char *text, const char *prefix)
{
    while (*prefix)
        if (*text++ != *prefix++)
            return NULL;
    return text;
}

bool next_word(const char **cursor, char *word, size_t size)
{
    const char *at = *cursor;
    size_t n = 0;

    while (*at == ' ')
        at++;
    if (!*at)
        return false;
    for (; *at && *at != ' '; at++)
        if (n + 1 < size)
            word[n++] = *at;
    word[n] = 0;
    *cursor = at;
    return true;
}

bool has_word(const char *word)
{
    const char *cursor = boot.cmdline;
    char found[64];

    while (next_word(&cursor, found, sizeof(found)))
        if (equal(found, word))
            return true;
    return false;
}

const char *text_word(const char *key)
{
    static char found[256];
    const char *cursor = boot.cmdline;

    while (next_word(&cursor, found, sizeof(found))) {
        const char *rest = after(found, key);

        if (rest && *rest == '=')
            return rest + 1;
    }
    return NULL;
}

uint64_t parse_number(const char *text)
{
    const char *hex = after(text, "0x");
    uint64_t value = 0;

    for (text = hex ? hex : text;; text++) {
        char lower = *text | 0x20;

        if (*text >= '0' && *text <= '9')
            value = value * (hex ? 16 : 10) + (uint64_t)(*text - '0');
        else if (hex && lower >= 'a' && lower <= 'f')
            value = value * 16 + (uint64_t)(lower - 'a' + 10);
        else
            return value;
    }
}

uint64_t number_word(const char *key, uint64_t otherwise)
{
    const char *text = text_word(key);

    return text ? parse_number(text) : otherwise;
}
