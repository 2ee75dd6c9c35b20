"""Measured rows, the constants fitted to them, and how wrong they are."""
