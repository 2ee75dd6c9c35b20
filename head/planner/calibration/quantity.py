"""A predicted number with what one must know to believe it."""

from __future__ import annotations

import msgspec


class NearRow(msgspec.Struct, frozen=True, kw_only=True):
    """A measured row like the question: what was measured there, and what the planner says of it."""

    id: str
    source: str
    measured: float
    predicted: float
    distance: float  # 0: the same configuration; grows without limit


class Quantity(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`low` and `high` bound the 80 % interval; `convention` says what is counted, `calibration` what was fitted."""

    value: float
    unit: str
    low: float
    high: float
    convention: str = ""
    calibration: str = ""
    near: tuple[NearRow, ...] = ()
