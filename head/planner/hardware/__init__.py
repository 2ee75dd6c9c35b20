"""What a model runs on: accelerators, how they are joined, what collectives cost."""
