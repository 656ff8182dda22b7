"""What this host offers to machines: QEMU, accelerators, memory."""
