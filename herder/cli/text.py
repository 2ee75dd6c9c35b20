"""Numbers as people read them: sizes, rates, ages, durations; and durations and sizes as people write them."""

from __future__ import annotations

import re

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(s|m|h|d)?", re.IGNORECASE)
_SECONDS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}


def size(count: int | float | None) -> str:
    """Bytes in binary units with about three digits: `512 B`, `1.50 MiB`, `84.7 MiB`, `120 GiB`. None: `-`."""
    if count is None:
        return "-"
    value = float(count)
    for unit in _UNITS:
        # 999.5 would print as 1000: the next unit is shorter.
        if value < 999.5 or unit == _UNITS[-1]:
            break
        value /= 1024
    if unit == "B":
        return f"{int(value)} B"
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{digits}f} {unit}"


def rate(bytes_per_s: float | None) -> str:
    """Bytes per second; None: ""."""
    return "" if bytes_per_s is None else f"{size(bytes_per_s)}/s"


def duration(seconds: float | None) -> str:
    """A span in its two largest units: `0.4s`, `12s`, `3m05s`, `2h10m`, `4d03h`. None: `-`."""
    if seconds is None:
        return "-"
    if seconds < 0:
        seconds = 0.0
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3_600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86_400:
        return f"{whole // 3_600}h{whole % 3_600 // 60:02d}m"
    return f"{whole // 86_400}d{whole % 86_400 // 3_600:02d}h"


def age(then_ms: int | None, now_ms: int) -> str:
    """How long ago, in one unit: `5s`, `3m`, `2h`, `9d`. None or 0: `-`."""
    if not then_ms:
        return "-"
    seconds = max(0, now_ms - then_ms) // 1000
    for name, unit in (("d", 86_400), ("h", 3_600), ("m", 60)):
        if seconds >= unit:
            return f"{seconds // unit}{name}"
    return f"{seconds}s"


def plural(count: int, word: str) -> str:
    """`1 step`, `2 steps`."""
    return f"{count} {word}" if count == 1 else f"{count} {word}{'es' if word.endswith(('s', 'x')) else 's'}"


def parse_duration(text: str) -> float:
    """Seconds of `90`, `90s`, `15m`, `2h`, `7d`, `1h30m`. Raises: ValueError."""
    parts = _DURATION.findall(text.strip())
    if not parts or "".join(f"{number}{unit}" for number, unit in parts) != re.sub(r"\s", "", text):
        raise ValueError(f"{text!r} is not a duration; write 90s, 15m, 2h or 7d")
    return sum(float(number) * _SECONDS[(unit or "s").lower()] for number, unit in parts)
