"""Threads in which logs are read: their own few, because a file of a Slurm job may lie on a file system that hangs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
THREADS = 8
_pool = ThreadPoolExecutor(THREADS, thread_name_prefix="log-reader")


async def in_thread(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """What the function returns; the loop goes on meanwhile, and so does whatever else needs a thread."""
    return await asyncio.get_running_loop().run_in_executor(_pool, partial(function, *args, **kwargs))
