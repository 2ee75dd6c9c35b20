"""How requests are written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from agent.loadgen.apis import Api


@dataclass(frozen=True, slots=True)
class Style:
    """How requests are written."""

    api: Api
    model: str
    is_streaming: bool = True
    is_exact: bool = True
    """Ask for exactly as many answer tokens: min_tokens and ignore_eos beside max_tokens."""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    class_parameters: tuple[Mapping[str, Any], ...] = ()
    """Those of each class of requests, by its number."""
    batch: int = 1
    """Documents in a request of embeddings or rerank."""
    prefix_tokens: int = 0
    prefix_groups: int = 1
    turns: int = 1
    default_output_tokens: int = 128
    """For rows of a dataset that do not say."""
    method: str = "POST"
    body: bytes = b""
    """Of plain HTTP."""
    content_type: str = "application/json"
    wants_chunk_usage: bool = False
    has_live_replies: bool = False
