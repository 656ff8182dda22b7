# A guest of some 400 bytes that does what a kernel does, so that the time it takes under KVM and under
# TCG tells which of the two to use. accelerator_probe.bin is this file, assembled:
#
#   as --64 -o probe.o accelerator_probe.S
#   ld -m elf_x86_64 -Ttext=0x100000 -e 0x100000 -o probe.elf probe.o
#   objcopy -O binary -j .text probe.elf accelerator_probe.bin
#
# Each round is the life of a small process: its page table is loaded, its pages are faulted in one by
# one, read word by word and unmapped. Every fourth round writes to an I/O port. The first 8 MiB of pages
# are RAM that nothing has touched yet. What each costs, in orders of magnitude:
#
#                              times   TCG      healthy KVM   KVM that shadows or emulates a guest's kernel
#   CR3 load                    1024   3 us     0.2 us        an exit, and shadow tables to synchronise
#   page fault, new PTE        16384   0.7 us   0.4 us        an exit or more, 20 us and up where nested
#   clearing the page          16384   0.8 us   0.05 us       300 us where instructions are emulated
#   call, load, add, return  8388608   10 ns    2 ns          4 us where instructions are emulated
#   first touch of RAM          2048   0.3 us   2 us          an exit, and shadow tables to synchronise
#   port write                   256   0.3 us   10 us         an exit to user space, 50 us where nested
#
# In all TCG needs about 0.12 s and a healthy KVM 0.03 s, each beside the 0.08 s of QEMU and its
# firmware. What costs KVM more than TCG (ports, first touches) is rare here, as it is in a kernel. A KVM
# that pays more than some 5 us for each fault comes out behind TCG, and so it would with a real kernel.
#
# The guest ends by writing FINISHED to the isa-debug-exit device, and only if its own counts are right.
# QEMU then exits with (FINISHED << 1) | 1. It is loaded as a multiboot kernel, which needs no disk:
# https://www.gnu.org/software/grub/manual/multiboot/multiboot.html

        .set ROUNDS, 1024
        .set PAGES, 16                  # faulted in and unmapped in each round
        .set WORDS, 512                 # of 8 bytes, in a page
        .set FINISHED, 0x2a
        .set WRONG, 0x01

        .set POST_PORT, 0x80            # ignores what is written, after a full exit to user space
        .set EXIT_PORT, 0xf4

        .set LOAD_ADDRESS, 0x100000
        .set PML4_A, 0x101000           # two roots that share everything below them
        .set PML4_B, 0x102000
        .set PDPT, 0x103000
        .set PD, 0x104000
        .set PT, 0x105000               # maps WINDOW
        .set IDT, 0x106000
        .set STACK_TOP, 0x108000
        .set WINDOW, 0x400000           # the virtual pages that fault
        .set FRAMES, 0x800000           # 8 MiB of RAM that they are mapped to, in turn
        .set FRAMES_MASK, 0x7ff000

        .set PRESENT_WRITABLE, 0x3
        .set PRESENT_WRITABLE_2MIB, 0x83
        .set PAGE_FAULT, 14

        .set MULTIBOOT_MAGIC, 0x1badb002
        .set MULTIBOOT_ADDRESSES, 0x10000       # the header has the addresses, so no ELF file is needed

        .text
        .code32
header:
        .long MULTIBOOT_MAGIC, MULTIBOOT_ADDRESSES, -(MULTIBOOT_MAGIC + MULTIBOOT_ADDRESSES)
        .long header, LOAD_ADDRESS, end, STACK_TOP, start   # from end to STACK_TOP the loader writes zeros

start:                                  # protected mode, paging off, interrupts off
        movl $PDPT + PRESENT_WRITABLE, PML4_A
        movl $PDPT + PRESENT_WRITABLE, PML4_B
        movl $PD + PRESENT_WRITABLE, PDPT
        movl $PRESENT_WRITABLE_2MIB, PD         # the first 2 MiB map to themselves
        movl $PT + PRESENT_WRITABLE, PD + 8 * (WINDOW >> 21)

        mov $page_fault, %eax
        mov %ax, IDT + 16 * PAGE_FAULT
        movw $8, IDT + 16 * PAGE_FAULT + 2    # selector of the code segment
        movw $0x8e00, IDT + 16 * PAGE_FAULT + 4       # present interrupt gate
        shr $16, %eax
        mov %ax, IDT + 16 * PAGE_FAULT + 6

        mov $1 << 5, %eax               # CR4.PAE
        mov %eax, %cr4
        mov $PML4_A, %ebp
        mov %ebp, %cr3
        mov $0xc0000080, %ecx           # EFER
        rdmsr
        or $1 << 8, %eax                # EFER.LME
        wrmsr
        mov $0x80010001, %eax           # CR0.PG, WP, PE
        mov %eax, %cr0
        lgdt gdt_pointer
        ljmp $8, $long_mode

        .code64
long_mode:
        mov $16, %eax
        mov %eax, %ss
        mov $STACK_TOP, %esp
        lidt idt_pointer
        xor %r9d, %r9d                  # page faults so far
        xor %edx, %edx                  # sum of all words read
        mov $ROUNDS, %r8d

round:
        xor $PML4_A ^ PML4_B, %ebp
        mov %rbp, %cr3
        mov $WINDOW, %ebx
touch:
        incq (%rbx)                     # faults; the page comes back full of zeros
        mov %ebx, %esi
        mov $WORDS, %ecx
1:      call add_word
        dec %ecx
        jnz 1b
        add $4096, %ebx
        cmp $WINDOW + 4096 * PAGES, %ebx
        jb touch

        mov $PT, %edi                   # unmap; the next CR3 load flushes the TLB
        xor %eax, %eax
        mov $PAGES, %ecx
        rep stosq

        test $3, %r8b
        jnz 2f
        out %al, $POST_PORT
2:      dec %r8d
        jnz round

        mov $WRONG, %al
        cmp $ROUNDS * PAGES, %r9d
        jne 3f
        cmp $ROUNDS * PAGES, %edx
        jne 3f
        mov $FINISHED, %al
3:      out %al, $EXIT_PORT             # does not return

add_word:
        add (%rsi), %rdx
        add $8, %esi
        ret

page_fault:
        push %rax
        push %rcx
        push %rdi
        mov %cr2, %rdi
        and $-4096, %rdi
        mov %r9d, %eax
        shl $12, %eax
        and $FRAMES_MASK, %eax
        add $FRAMES + PRESENT_WRITABLE, %eax
        mov %edi, %ecx
        shr $12, %ecx
        and $511, %ecx
        mov %rax, PT(, %rcx, 8)
        xor %eax, %eax
        mov $WORDS, %ecx
        rep stosq
        inc %r9d
        pop %rdi
        pop %rcx
        pop %rax
        add $8, %rsp                    # the error code
        iretq

        .balign 8
gdt:    .quad 0
        .quad 0x00af9a000000ffff        # 8: 64-bit code
        .quad 0x00cf92000000ffff        # 16: data
gdt_pointer:
        .word gdt_pointer - gdt - 1
        .long gdt
idt_pointer:
        .word 16 * (PAGE_FAULT + 1) - 1
        .quad IDT
end:
