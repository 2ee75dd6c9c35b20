"""The OpenAI-compatible door at /v1: who may pass, which replica answers, and the bytes in between."""
