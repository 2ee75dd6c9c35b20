"""The adapters that this agent has, by the name that recipes use."""

from __future__ import annotations

from agent.config import EnginesConfig
from agent.runtimes.base import Runtime
from agent.runtimes.command import Command
from agent.runtimes.llamacpp import LlamaCpp
from common.errors import EngineMissing


def make_runtimes(config: EnginesConfig) -> dict[str, Runtime]:
    """Every adapter by name."""
    return {"llamacpp": LlamaCpp(config.llamacpp), "command": Command(is_allowed=config.command)}


def find_engines(runtimes: dict[str, Runtime]) -> dict[str, str]:
    """Name and version of the engines that this node has. Blocks."""
    found = {}
    for name, runtime in runtimes.items():
        try:
            found[name] = runtime.find()
        except EngineMissing:
            continue
    return found
