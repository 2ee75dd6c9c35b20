"""The agent's decisions: pure functions over state, events and time. No clock, no I/O, no asyncio."""
