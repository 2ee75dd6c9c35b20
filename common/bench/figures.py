"""The main figures of a report by name, and what a figure is called, measured in, and better as."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

LATENCIES = ("ttft", "ttft_sched", "tpot", "itl", "e2e", "e2e_sched")
SHARES = ("p50", "p90", "p99")


@dataclass(frozen=True, slots=True)
class Figure:
    """What one figure is. is_more_better: None where neither is."""

    name: str
    title: str
    unit: str
    is_more_better: bool | None


RATES = (
    Figure("req_s", "requests/s", "1/s", True),
    Figure("output_tok_s", "tokens/s out", "1/s", True),
    Figure("input_tok_s", "tokens/s in", "1/s", None),
    Figure("goodput_req_s", "goodput requests/s", "1/s", True),
    Figure("slo_attainment", "SLO attainment", "share", True),
    Figure("error_rate", "error rate", "share", False),
)
FIGURES: dict[str, Figure] = {figure.name: figure for figure in RATES} | {
    f"{metric}_{share}_ms": Figure(f"{metric}_{share}_ms", f"{metric.upper()} {share}", "ms", False)
    for metric in LATENCIES
    for share in ("mean", *SHARES)
}
"""Every figure, in the order in which they are shown."""


def figures_of(report: Mapping[str, Any]) -> dict[str, float]:
    """The main figures of a report (as plain data). What was not measured is left out, never 0."""
    found: dict[str, Any] = {}
    rates = report.get("throughput") or {}
    for name in ("req_s", "output_tok_s", "input_tok_s"):
        found[name] = rates.get(name)
    goodput = report.get("goodput") or {}
    found |= {name: goodput.get(name) for name in ("goodput_req_s", "slo_attainment")}
    found["error_rate"] = report.get("error_rate")
    for metric in LATENCIES:
        summary = (report.get("latency") or {}).get(metric) or {}
        if summary.get("count"):
            found[f"{metric}_mean_ms"] = summary.get("mean")
            for share in SHARES:
                found[f"{metric}_{share}_ms"] = (summary.get("percentiles") or {}).get(share)
    return {name: float(value) for name, value in found.items() if is_number(value)}


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def told(value: float | None) -> str:
    """A number with about three digits: `0.0123`, `4.56`, `78.9`, `1,234`. None: `-`."""
    if value is None or not math.isfinite(value):
        return "-"
    size = abs(value)
    if size >= 99.95:
        return f"{value:,.0f}"
    if size >= 9.995:
        return f"{value:.1f}"
    if size >= 0.9995:
        return f"{value:.2f}"
    return f"{value:.3g}" if size else "0"


def told_ms(value: float | None) -> str:
    """Milliseconds in the unit that reads best: `850 µs`, `12.3 ms`, `1.24 s`. None: `-`."""
    if value is None or not math.isfinite(value):
        return "-"
    size = abs(value)
    if size and size < 0.9995:
        return f"{told(value * 1000)} µs"
    return f"{told(value / 1000)} s" if size >= 999.5 else f"{told(value)} ms"


def told_share(value: float | None) -> str:
    """A share as percent: `99.2 %`; what is near 0 or 1 keeps its digits. None: `-`."""
    if value is None or not math.isfinite(value):
        return "-"
    percent = value * 100
    if 99.95 <= percent < 100 or 0 < percent < 0.05:
        return f"{percent:.3g} %" if percent < 1 else f"{percent:.3f} %"
    return f"{percent:.1f} %" if percent % 1 else f"{percent:.0f} %"


def told_figure(name: str, value: float | None) -> str:
    """A figure with its unit, as `told_ms`, `told_share` or `told` write it."""
    unit = FIGURES[name].unit if name in FIGURES else ""
    return told_ms(value) if unit == "ms" else told_share(value) if unit == "share" else told(value)


def changes_told(changes: Mapping[str, Any]) -> str:
    """What a point varies, in words: `rate=8, scenarios=D(100,50)`; empty for nothing."""
    return ", ".join(f"{name}={_value_told(value)}" for name, value in changes.items())


def _value_told(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return "+".join(_value_told(entry) for entry in value)
    if isinstance(value, Mapping):
        return "{" + changes_told(value) + "}"
    return str(value)
