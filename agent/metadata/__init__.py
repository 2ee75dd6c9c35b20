"""What a model's own files say about it, read without reading tensors and without believing any number in them."""

from __future__ import annotations

from agent.metadata.inspect import inspect

__all__ = ["inspect"]
