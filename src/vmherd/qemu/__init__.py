"""The privileged helper: turns a checked description of a machine into a QEMU process, and knows which ones live."""
