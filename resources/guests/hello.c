/*
 * hello: the smallest guest. Its first instructions write 'H' to COM1, which
 * is the mark for start times; the runtime comes after. (By the Linux entry, the
 * byte comes from main.)
 */
#include "runtime.h"

__asm__(".section .text\n"
        "    .code32\n"
        "    .globl pvh_entry\n"
        "pvh_entry:\n"
        "    mov $0x3F8, %edx\n" /* PORT_COM1 */
        "    mov $'H', %al\n"
        "    out %al, %dx\n"
        "    jmp pvh_start\n"
        "    .code64\n"
        "    .previous\n");

void main(void)
{
    if (equal(boot.protocol, "linux64"))
        serial_write("H", 1);
    serial_write("ello\n", 5);
}
