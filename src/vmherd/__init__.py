"""vmherd: a gRPC and HTTP controller for QEMU virtual machines."""
