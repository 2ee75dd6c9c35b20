"""Training: memory per GPU, time per step, search over layouts."""
