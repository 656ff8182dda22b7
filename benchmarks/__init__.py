"""What `make bench` runs: vmherd against bare QEMU, in turn, in one run."""
