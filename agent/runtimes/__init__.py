"""How each engine is started, asked whether it is ready, and stopped."""
