"""Worlds of two nodes for tests about jobs, and actions in both dialects."""

from __future__ import annotations

from typing import Any

from tests.doubles.head_core import GIB, manifest
from tests.doubles.head_engines import EngineWorld

ALIVE = ("n1", "n2")


def new_world(*, gpus: tuple[int, ...] = (24 * GIB,), dram: int = 20 * GIB) -> EngineWorld:
    """Two nodes and a model m that is nowhere yet."""
    world = EngineWorld()
    for node in ALIVE:
        world.add_node(node, gpus=gpus, dram=dram)
    world.add_model("m")
    return world


def download(target: str = "n1:disk", **fields: Any) -> dict[str, Any]:
    """A download in the dialect in order."""
    return {"action": "download", "model": "m", "target": target, **fields}


def graph(name: str, *dependencies: str, device: str = "n1:disk", **fields: Any) -> dict[str, Any]:
    """A download in the graph dialect."""
    return {
        "action_id": name,
        "action_type": "download",
        "model_name": "m",
        "devices": [device],
        "dependencies": list(dependencies),
        **fields,
    }


def fetched(world: EngineWorld, model: str = "m", node: str = "n1", size: int = GIB) -> None:
    """The agent has fetched a copy."""
    world.result(f"{model}@main|{node}:disk", manifest=manifest(model, size))
