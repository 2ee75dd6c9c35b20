"""The cluster's own calibration that counts while a question is answered; without one, the shipped calibration alone.

Set for the time of one question (`endpoints.base.ask`), so that an answer stays a function of the question, the desk
and the calibration. Bound to the context: threads and tasks do not see each other's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from head.planner.calibration.serving_near import Block, Point
    from head.planner.training.constants import Constants


class Active(NamedTuple):
    """What estimates take from a calibration: constants with rows of the cluster, and its serving points by curve."""

    name: str
    training: Constants | None = None
    curves: tuple[tuple[Block, tuple[Point, ...]], ...] = ()
    note: str = ""


_ACTIVE: ContextVar[Active | None] = ContextVar("the cluster's own calibration", default=None)


def active() -> Active | None:
    """The calibration that counts now, beside the shipped one."""
    return _ACTIVE.get()


@contextmanager
def using(found: Active | None) -> Iterator[None]:
    """Estimates inside take `found`."""
    token = _ACTIVE.set(found)
    try:
        yield
    finally:
        _ACTIVE.reset(token)
