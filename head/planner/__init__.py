"""The planner: arithmetic over models, hardware and layouts. It does no input or output and asks no clock.

    model/        what a model is: dimensions, exact parameter counts, FLOPs, KV cache
    hardware/     what it runs on: accelerators, topology, collectives
    training/     memory and step time of a training layout, search over layouts
    serving/      memory, latency and throughput of an inference engine, search over settings
    calibration/  measured rows, fitted constants, errors and intervals
    export/       launch commands and configuration files of other tools
    advice/       diagnosis, settings and explanations

Units, unless a name says otherwise: bytes, seconds, FLOPs, bytes per second; GB is 1e9 bytes and GiB is 2**30.
"""
