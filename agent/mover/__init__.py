"""The process that moves model bytes: blocking threads, no event loop."""
