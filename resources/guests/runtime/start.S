/*
 * Entry points and everything the CPU needs to reach C.
 *
 * GDT, IDT, TSS and page tables are data of the image, so that the way from
 * the first instruction to main() is some thirty instructions: hosts without
 * hardware virtualization interpret every one of them.
 */
#include "layout.h"

/* PVH ABI: the note names the 32-bit entry point. */
#define XEN_ELFNOTE_PHYS32_ENTRY 18
#define XEN_NATIVE_ENTRY 1

    .section .note.Xen, "a", @note
    .balign 4
    .long 4, 4, XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .long pvh_entry

/*
 * .head is linked at HIMEM_START, which makes the low 16 bits of an address
 * in it its offset, and so lets the assembler fill descriptors in.
 */
    .section .head, "awx"
    .globl head
head:
#define HEAD_LOW(symbol) ((symbol) - head)
#define HEAD_MID (HIMEM_START >> 16)

    .balign 8
gdt:
    .quad 0
    .quad 0
    .quad 0x00AF9B000000FFFF            /* 0x10: CPL 0 code, 64 bits */
    .quad 0x00CF93000000FFFF            /* 0x18: CPL 0 data */
    .quad 0x00CF9B000000FFFF            /* 0x20: CPL 0 code, 32 bits */
    .quad 0x00CFF3000000FFFF            /* 0x28: CPL 3 data */
    .quad 0x00AFFB000000FFFF            /* 0x30: CPL 3 code, 64 bits */
    .quad 0
    .word tss_end - tss - 1             /* 0x40: TSS, 64 bits */
    .word HEAD_LOW(tss)
    .byte HEAD_MID, 0x89, 0, 0
    .long 0, 0
gdt_end:

    .globl gdt_pointer
gdt_pointer:
    .word gdt_end - gdt - 1
    .quad gdt

    .globl idt_pointer
idt_pointer:
    .word idt_end - idt - 1
    .quad idt

/* Interrupt gates, open to CPL 3 (for int3); stubs are 16 bytes apart. */
    .balign 16
idt:
    .set vector, 0
    .rept VECTORS
    .word HEAD_LOW(stubs) + 16 * vector
    .word SEL_CODE0
    .byte 0, 0xEE
    .word HEAD_MID
    .long 0, 0
    .set vector, vector + 1
    .endr
idt_end:

    .code64
    .balign 16
stubs:
    .set vector, 0
    .rept VECTORS
    .balign 16
    /* Only these exceptions push an error code. */
    .if !(vector == 8 || (vector >= 10 && vector <= 14) || vector == 17 || vector == 21 || vector == 29 || vector == 30)
    push $0
    .endif
    push $vector
    jmp trap_gate
    .set vector, vector + 1
    .endr

/* The TSS: a stack for CPL 0, and an I/O bitmap that allows every port. */
    .balign 16
    .globl tss
tss:
    .long 0
    .quad kernel_stack_top
    .fill 0x66 - 12, 1, 0
    .word io_bitmap - tss
io_bitmap:
    .fill 8192, 1, 0
    .byte 0xFF
tss_end:

trap_gate:
    push %rax
    push %rcx
    push %rdx
    push %rsi
    push %rdi
    push %r8
    push %r9
    push %r10
    push %r11
    mov %rsp, %rdi
    call trap
    pop %r11
    pop %r10
    pop %r9
    pop %r8
    pop %rdi
    pop %rsi
    pop %rdx
    pop %rcx
    pop %rax
    add $16, %rsp
    iretq

/*
 * The 32-bit entry of PVH: flat segments, no paging, %ebx = start info.
 * A guest may put its own pvh_entry before it.
 */
    .code32
    .weak pvh_entry
    .globl pvh_start
pvh_entry:
pvh_start:
    lgdt gdt_pointer
    mov $pml4, %eax
    mov %eax, %cr3
    mov $0x20, %eax                     /* CR4.PAE */
    mov %eax, %cr4
    mov $0xC0000080, %ecx               /* EFER.LME */
    xor %edx, %edx
    mov $0x100, %eax
    wrmsr
    mov $0x80010011, %eax               /* CR0.PG, WP, ET, PE */
    mov %eax, %cr0
    mov %ebx, %edi
    xor %esi, %esi
    ljmp $SEL_CODE0, $enter_c

/*
 * The 64-bit entry of the Linux boot protocol: identity-mapped long mode,
 * %rsi = boot_params.
 */
    .code64
    .globl linux_entry
linux_entry:
    lgdt gdt_pointer
    mov $pml4, %eax
    mov %rax, %cr3
    mov %esi, %edi
    mov $1, %esi
    mov $kernel_stack_top, %esp
    push $SEL_CODE0
    push $enter_c
    lretq

/* %edi: what the boot loader left; %esi: 0 for PVH, 1 for Linux. */
enter_c:
    mov $SEL_DATA3, %eax                /* good at both levels */
    mov %eax, %ds
    mov %eax, %es
    mov $SEL_DATA0, %eax
    mov %eax, %ss
    lidt idt_pointer
    mov $SEL_TSS, %eax
    ltr %ax
    mov $kernel_stack_top, %esp
    call runtime_start

/* enter_cpl3(fn, rflags): fn() at CPL 3 on its own stack; see to_cpl3(). */
    .globl enter_cpl3
enter_cpl3:
    push $SEL_DATA3
    push $user_stack_top - 8
    push %rsi
    push $SEL_CODE3
    push %rdi
    iretq

/*
 * call0(fn, a, b): fn(a, b) at CPL 0. trap() knows the ud2 by its address: it
 * raises #UD everywhere, while a host without hardware virtualization knows no
 * int instruction.
 */
    .globl call0, call0_trap
call0:
call0_trap:
    ud2
    ret

/* count_port(port, n): n reads of a port. */
    .globl count_port
count_port:
    mov %edi, %edx
    mov %rsi, %rcx
1:  in %dx, %al
    dec %rcx
    jnz 1b
    ret

/*
 * Identity map of 4 GiB by 2 MiB pages, open to CPL 3. What lies above gets
 * its page directories when it is asked for.
 */
    .section .tables, "aw"
    .balign 4096
    .globl pml4
pml4:
    .quad pdpt + 7
    .fill 511, 8, 0
    .globl pdpt
pdpt:
    .quad low_directories + 0x0007
    .quad low_directories + 0x1007
    .quad low_directories + 0x2007
    .quad low_directories + 0x3007
    .fill 508, 8, 0
low_directories:
    .set page, 0
    .rept 2048
    .if page < (LOW_RAM_END >> 21)
    .quad (page << 21) + 0xE7           /* size, dirty, accessed, user, write, present */
    .else
    .quad (page << 21) + 0xFF           /* and uncached */
    .endif
    .set page, page + 1
    .endr

    .section .noinit, "aw", @nobits
    .balign 4096
    .skip 16384
user_stack_top:
    .skip 16384
    .globl kernel_stack_top
kernel_stack_top:

    .section .note.GNU-stack, "", @progbits
