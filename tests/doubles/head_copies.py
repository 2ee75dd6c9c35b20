"""Worlds of one model for tests about copies, and what is done with them there."""

from __future__ import annotations

import pytest

from common import wire
from common.errors import HerderError
from head.core import copies
from head.core.objects import Copy
from tests.doubles.head_core import World

DISK = "m@main|n1:disk"


DRAM = "m@main|n1:dram"


def make(*sources: str, nodes: tuple[str, ...] = ("n1",), dram: int = 0) -> World:
    """A world with nodes and the model m, by default from the web."""
    world = World()
    for node in nodes:
        world.join(node, dram=dram)
    world.register("m", *(sources or ("https://h/m.gguf",)))
    return world


def ensure(world: World, node: str = "") -> wire.EnsureCopy | None:
    """The EnsureCopy among the last effects."""
    command = world.command(wire.EnsureCopy, node)
    body = command.body if command else None
    assert body is None or isinstance(body, wire.EnsureCopy)
    return body


def refusal(world: World, *args: str, **fields: str) -> HerderError:
    """The error of a want that must be refused, and that leaves nothing behind."""
    before = (dict(world.state.copies), world.state.revision)
    with pytest.raises(HerderError) as caught:
        world.want(*args, **fields)
    assert (dict(world.state.copies), world.state.revision) == before
    return caught.value


def drop(world: World, key: str, *, force: bool = False) -> Copy | None:
    """Makes a copy unwanted."""
    dropped: Copy | None = world.do(lambda turn: copies.unwant(turn, key, cause="test", force=force))
    return dropped
