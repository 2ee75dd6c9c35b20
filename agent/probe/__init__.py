"""What a node is (`host`, `nvml`) and how it fares (`telemetry`): blocking functions, called from a thread."""
