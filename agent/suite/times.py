"""Times as recipes write them."""

from __future__ import annotations

import re
from typing import Any

_TIME = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)?")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0, None: 1.0}
_LIMIT = re.compile(r"(?:(\d{1,3})-)?(\d{1,3}):([0-5]\d):([0-5]\d)")
MAX_SECONDS = 30 * 86_400


def seconds(value: Any) -> float:
    """Seconds of `10m`, `300s`, `2h`, `7d`, or of a number. Raises: ValueError."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"{value!r} is not a time; write 30s, 10m, 2h or a number of seconds")
    found = _TIME.fullmatch(str(value).strip())
    if found is None:
        raise ValueError(f"{value!r} is not a time; write 30s, 10m, 2h or a number of seconds")
    made = float(found[1]) * _SECONDS[found[2]]
    if made > MAX_SECONDS:
        raise ValueError(f"{value!r} is more than 30 days")
    return made


def time_limit(value: Any) -> float:
    """Seconds of Slurm's `HH:MM:SS` or `D-HH:MM:SS`. Raises: ValueError.

    YAML reads an unquoted 12:30:00 as the number 45000, which is the same in seconds.
    """
    if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MAX_SECONDS:
        return float(value)
    found = _LIMIT.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        raise ValueError(f"{value!r} is not a time limit; write HH:MM:SS")
    days, hours, minutes, rest = (int(part or 0) for part in found.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + rest)


def slurm_time(value: float) -> str:
    """As Slurm takes it."""
    whole = int(value)
    return f"{whole // 3600:02d}:{whole % 3600 // 60:02d}:{whole % 60:02d}"


def plain(value: float) -> str:
    """As recipes write it."""
    for unit, size in (("h", 3600), ("m", 60)):
        if value >= size and value % size == 0:
            return f"{value / size:g}{unit}"
    return f"{value:g}s"
