"""Numbers of the planner's answers as people read them: four digits, a size that suits, ranges as low-high."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from herder.cli.table import clean

_BYTES = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B"))
_SECONDS = ((86_400.0, "d"), (3_600.0, "h"), (60.0, "min"), (1.0, "s"), (1e-3, "ms"), (1e-6, "us"))
_QUANTITY = {"value", "unit", "low", "high"}
# Units that names of fields end in: (suffix, unit); the title loses the suffix, the value gets the unit.
_SUFFIXES = (
    ("_tokens_per_s", "tokens/s"),
    ("_gb_per_s", "GB/s"),
    ("_per_s", "/s"),
    ("_p50", "s"),
    ("_p99", "s"),
    ("_gb_s", "GB/s"),
    ("_tps", "tokens/s"),
    ("_gb", "GB"),
    ("_mb", "MB"),
    ("_mwh", "MWh"),
    ("_ms", "ms"),
    ("_pct", "%"),
    ("_usd", "$"),
    ("_bytes", "bytes"),
    ("_hours", "h"),
    ("_minutes", "min"),
    ("_days", "days"),
    ("_s", "s"),
    ("_billions", "billion"),
    ("_billion", "billion"),
    ("_b", "billion"),
)
_DOLLARS = re.compile(r"(^|_)(usd|cost)(_|$)|^price")
# Names that say no unit, and objects whose numbers are all in one.
_UNITS = {"throughput": "tokens/s", "current_throughput": "tokens/s", "memory_per_gpu": "GB"}
_UNITS |= {"per_gpu_throughput": "tokens/s"}
_PARENTS = {"breakdown": "GB", "parts_s": "s", "step_parts_s": "s"}
_SHARES = ("_share", "_fraction", "_probability", "_efficiency", "_overhead", "_severity")
_SHARE_NAMES = {"mfu", "hfu", "efficiency", "utilization", "time breakdown", "time_breakdown"}


def is_quantity(item: Any) -> bool:
    """Whether it is a value with an interval."""
    return isinstance(item, Mapping) and item.keys() >= _QUANTITY


def number(value: float) -> str:
    """Four significant digits, thousands apart, no exponent between a millionth and a thousand billion."""
    if value == 0:
        return "0"
    if not 1e-6 <= abs(value) < 1e15:
        return f"{value:.3e}"
    if abs(value) >= 1_000:
        return f"{value:,.0f}"
    return f"{value:.4g}" if abs(value) >= 1e-4 else f"{value:.6f}".rstrip("0")


def amount(value: float, unit: str) -> str:
    """A value with its unit in a size that reads well."""
    scale, word = _scale(value, unit)
    return _with_unit(number(value / scale) if unit != "bytes" else f"{value / scale:.4g}", word)


def quantity(item: Mapping[str, Any]) -> str:
    """`23.1 ms (18.3-28.5)`: the value and, in the same unit, its interval."""
    unit = "%" if item["unit"] in ("ratio", "1", "share") and 0 <= item["value"] <= 1 else item["unit"]
    factor = 100.0 if unit == "%" and item["unit"] != "%" else 1.0
    value, low, high = (factor * item[name] for name in ("value", "low", "high"))
    scale, word = _scale(value, unit)
    return f"{_with_unit(_short(value / scale), word)} ({_short(low / scale)}-{_short(high / scale)})"


def _short(value: float) -> str:
    """Three significant digits, thousands apart."""
    if value == 0 or not 1e-6 <= abs(value) < 1e15:
        return "0" if value == 0 else f"{value:.2e}"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _scale(value: float, unit: str) -> tuple[float, str]:
    if unit == "bytes":
        return next(((float(s), w) for s, w in _BYTES if abs(value) >= s), (1.0, "B"))
    if unit in ("s", "seconds"):
        return next(((s, w) for s, w in _SECONDS if abs(value) >= s), (1.0, "s"))
    return 1.0, "" if unit in ("ratio", "1") else unit


def _with_unit(text: str, unit: str) -> str:
    return f"${text}" if unit == "$" else f"{text} {unit}".rstrip()


def unit_of(name: str) -> tuple[str, str]:
    """(the name without its unit, the unit) of a field."""
    if name in ("tokens_per_s", "gb_per_s"):
        return name.removesuffix("_per_s"), "/s"
    if "cost" in name and _DOLLARS.search(name):
        return name.removesuffix("_usd"), "$"
    if name in _UNITS:
        return name, _UNITS[name]
    for suffix, unit in _SUFFIXES:
        if name.endswith(suffix) and len(name) > len(suffix):
            return name.removesuffix(suffix), unit
    return name, ""


def title(name: str) -> str:
    """A field's name as words, without the unit; names of variables and files stay as they are."""
    if name.endswith(("_p50", "_p99")):
        return clean(name.replace("_", " "))
    if "." in name or name != name.lower():
        return clean(name)
    return clean(unit_of(name)[0].replace("_", " "))


def plain(item: Any, name: str = "", *, parent: str = "") -> str:
    """A plain value as words: with the unit that its name says."""
    if is_quantity(item):
        return quantity(item)
    if isinstance(item, bool):
        return "yes" if item else "no"
    if isinstance(item, int | float):
        unit = _PARENTS.get(parent) or unit_of(name)[1]
        if unit:
            return amount(item, unit)
        if isinstance(item, float) and 0 <= item <= 1 and (_is_share(name) or parent in _SHARE_NAMES):
            return percent(item)
        if isinstance(item, float):
            return number(item)
        return f"{item:,}" if abs(item) >= 10_000 and not name.endswith(("port", "seed", "date")) else str(item)
    return clean(str(item)) if item is not None else ""


def _is_share(name: str) -> bool:
    return name in _SHARE_NAMES or name.endswith(_SHARES)


def percent(share: float) -> str:
    """A share in hundredths."""
    return "<0.1 %" if 0 < share < 0.001 else f"{100 * share:.3g} %"


def shell_lines(command: str, width: int) -> list[str]:
    """A command over several lines that a shell takes as one when they are copied."""
    try:
        words = [_quoted(word) for word in shlex.split(command)]
    except ValueError:
        return [clean(command)]
    lines: list[str] = []
    for group in _options(words):
        if lines and len(lines[-1]) + 1 + len(group) <= width - 2:
            lines[-1] += f" {group}"
        else:
            lines.append(("  " if lines else "") + group)
    return [f"{line} \\" for line in lines[:-1]] + lines[-1:]


def _quoted(word: str) -> str:
    name, separator, value = word.partition("=")
    if separator and name.isidentifier():
        return f"{name}={shlex.quote(value)}"
    return shlex.quote(word)


def _options(words: Sequence[str]) -> list[str]:
    """Words with an option and its value kept together."""
    groups: list[str] = []
    for word in words:
        is_value = groups and groups[-1].startswith("--") and "=" not in groups[-1] and " " not in groups[-1]
        if is_value and not word.startswith("-"):
            groups[-1] += f" {word}"
        else:
            groups.append(word)
    return groups
