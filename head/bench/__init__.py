"""Benchmarks at the head, outside the core: their files, what their runs send, judging, clocks, the live view."""
