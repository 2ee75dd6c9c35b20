"""Serving: memory, latency and throughput of inference engines."""
