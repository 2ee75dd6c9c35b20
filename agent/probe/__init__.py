"""What this node has and how it is doing: NVML, CPUs, memory, disks, network."""
