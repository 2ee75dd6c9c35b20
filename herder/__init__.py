"""What people and programs outside touch: API types, the Python client, the command line.

from herder import Client

with Client() as herder:
    for node in herder.nodes():
        print(node.node_id, node.state)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from herder.client import AsyncClient
    from herder.client_sync import Client
    from herder.errors import HerderApiError, HerderConnectionError, HerderError, HerderJobError, HerderTimeoutError

__version__ = "0.1.0"

__all__ = [
    "AsyncClient",
    "Client",
    "HerderApiError",
    "HerderConnectionError",
    "HerderError",
    "HerderJobError",
    "HerderTimeoutError",
]

_HOMES = {"AsyncClient": "herder.client", "Client": "herder.client_sync"}


def __getattr__(name: str) -> Any:
    """Loads a name at its first use: the types alone import without aiohttp."""
    if name not in __all__:
        raise AttributeError(f"module 'herder' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES.get(name, "herder.errors")), name)
