"""What a machine does, once a second or faster, written down: GPUs, CPUs, memory, disks, network, engines."""
