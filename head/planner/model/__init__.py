"""What a model is: dimensions, parameters, FLOPs, KV cache."""
