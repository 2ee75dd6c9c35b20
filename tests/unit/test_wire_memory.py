"""What 10,000 machines have in common is kept once."""

from __future__ import annotations

import msgspec

from common import wire


def decoded(number: int) -> wire.Inventory:
    """One machine's inventory, as it comes from the wire."""
    gpu = wire.Gpu(0, f"GPU-{number}", "NVIDIA H200", 1 << 37, "9.0", nvlink_peers=tuple(range(8)))
    made = wire.Inventory(f"n{number}", os="Debian GNU/Linux 12", cuda_version="12.8", gpus=(gpu,))
    return msgspec.json.decode(msgspec.json.encode(made), type=wire.Inventory)


def test_equal_words_of_two_machines_are_one_object() -> None:
    """Names of cards and systems and the peers of a GPU, which a decoder would make anew each time."""
    one, other = decoded(1), decoded(2)
    assert one.os is other.os
    assert one.cuda_version is other.cuda_version
    assert one.gpus[0].name is other.gpus[0].name
    assert one.gpus[0].compute_capability is other.gpus[0].compute_capability
    assert one.gpus[0].nvlink_peers is other.gpus[0].nvlink_peers
    assert one.gpus[0].uuid != other.gpus[0].uuid


def test_an_inventory_survives_the_wire() -> None:
    """Nothing of it changes on the way."""
    inventory = decoded(3)
    assert msgspec.json.decode(msgspec.json.encode(inventory), type=wire.Inventory) == inventory
    assert inventory.gpus[0].nvlink_peers == tuple(range(8))
