"""What the head and the agents share: ids, errors, wire messages, limits, clock, file I/O, telemetry."""
