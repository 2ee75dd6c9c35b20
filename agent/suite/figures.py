"""What an executor measured, live or finished, and the forms in which it is told: the toolkit's JSON under the names of
its document and of its code, and Prometheus text. Percentiles come from histograms; several executors' add up.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from common.bench.histogram import Histogram

NS = 1_000_000_000
SHARES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
MERGED = ("ttft", "ttft_sched", "tpot", "icl", "itl", "e2e_sched", "send_lag")
"""Beside the latency itself (e2e)."""


@dataclass(slots=True)
class Figures:
    """Counts and histograms of the measured window."""

    requests: int = 0
    """All that were due in the window, failed ones included."""
    errors: int = 0
    latency: Histogram = field(default_factory=Histogram)
    """Of good requests, in nanoseconds."""
    window_s: float = 0.0
    """How much of the window has passed."""
    output_tokens: int = 0
    """That came in the window."""
    input_tokens: int = 0
    output_tok_s: float = 0.0
    threads: int = 0
    others: dict[str, Histogram] = field(default_factory=dict)
    errors_by_kind: dict[str, int] = field(default_factory=dict)
    thread_errors: list[str] = field(default_factory=list)

    @property
    def throughput_rps(self) -> float:
        """Good requests per second of the window."""
        return (self.requests - self.errors) / self.window_s if self.window_s > 0 else 0.0

    def merge(self, other: Figures) -> None:
        """Adds what another executor measured at the same time."""
        self.requests += other.requests
        self.errors += other.errors
        self.latency.merge(other.latency)
        self.window_s = max(self.window_s, other.window_s)
        self.output_tokens += other.output_tokens
        self.input_tokens += other.input_tokens
        self.output_tok_s += other.output_tok_s
        self.threads += other.threads
        for name, histogram in other.others.items():
            self.others.setdefault(name, Histogram()).merge(histogram)
        for kind, count in other.errors_by_kind.items():
            self.errors_by_kind[kind] = self.errors_by_kind.get(kind, 0) + count
        self.thread_errors += other.thread_errors

    def add_tick(self, tick: Mapping[str, Any]) -> None:
        """Adds a second's `measured`, `measured_failed`, `e2e` and `e2e_sum_ns`."""
        self.requests += int(tick["measured"])
        self.errors += int(tick["measured_failed"])
        made = histogram_of(tick["e2e"], int(tick["e2e_sum_ns"]))
        self.latency.merge(made)

    def to_wire(self) -> dict[str, Any]:
        """As plain data."""
        named = ("requests", "errors", "window_s", "output_tokens", "input_tokens", "output_tok_s", "threads",
                 "errors_by_kind", "thread_errors")  # fmt: skip
        return {name: getattr(self, name) for name in named} | {
            "latency": self.latency.to_wire(),
            "others": {name: histogram.to_wire() for name, histogram in self.others.items()},
        }

    @classmethod
    def from_wire(cls, data: Mapping[str, Any]) -> Figures:
        """What `to_wire` wrote. Raises: ValueError, KeyError, TypeError for anything else."""
        rest = {name: value for name, value in data.items() if name in cls.__slots__}
        rest["latency"] = Histogram.from_wire(data["latency"])
        rest["others"] = {name: Histogram.from_wire(value) for name, value in data["others"].items()}
        rest["errors_by_kind"], rest["thread_errors"] = dict(data["errors_by_kind"]), list(data["thread_errors"])
        return cls(**rest)


def histogram_of(buckets: Mapping[Any, int], total_ns: int) -> Histogram:
    """A histogram of counts by bucket; least and greatest are its outer buckets' edges."""
    from common.bench.histogram import bounds_of

    made = Histogram()
    made.counts = {int(bucket): int(times) for bucket, times in buckets.items()}
    made.count, made.sum = sum(made.counts.values()), total_ns
    if made.counts:
        made.min, made.max = bounds_of(min(made.counts))[0], bounds_of(max(made.counts))[1]
    return made


def in_seconds(histogram: Histogram) -> dict[str, float]:
    """avg, p50, p90, p99 in seconds; 0 without samples, as the toolkit has it."""
    made = {"avg": (histogram.mean() or 0.0) / NS}
    return made | {name: (histogram.percentile(share) or 0.0) / NS for name, share in SHARES.items()}


def flat(figures: Figures, *, elapsed_s: float, config: Mapping[str, Any]) -> dict[str, Any]:
    """The flat names: those of finished runs, and those that the toolkit's code had while one was running."""
    latency = in_seconds(figures.latency)
    made: dict[str, Any] = {
        "total_requests": figures.requests,
        "errors": figures.errors,
        "elapsed_seconds": elapsed_s,
    }
    made |= {f"{name}_latency_seconds": value for name, value in latency.items()}
    made |= {f"{name}_latency": value for name, value in latency.items()}
    made |= {
        "throughput_rps": figures.throughput_rps,
        "throughput": figures.throughput_rps,
        "num_threads": figures.threads,
        "thread_errors": list(figures.thread_errors) or None,
        "model": config.get("model"),
        "duration": config.get("duration"),
    }
    return made


def nested(figures: Figures, *, elapsed_s: float) -> dict[str, Any]:
    """The names of the toolkit's document, and what only we have."""
    return {
        "requests_total": figures.requests,
        "errors_total": figures.errors,
        "latency": in_seconds(figures.latency),
        "throughput_rps": figures.throughput_rps,
        "elapsed_seconds": elapsed_s,
        "error_rate": figures.errors / figures.requests if figures.requests else None,
        "errors_by_kind": dict(figures.errors_by_kind),
        "output_tokens": figures.output_tokens,
        "input_tokens": figures.input_tokens,
        "output_tokens_per_second": figures.output_tok_s,
        "latency_seconds": {
            name: in_seconds(histogram) | {"count": histogram.count}
            for name, histogram in sorted(figures.others.items())
            if histogram.count
        },
    }


def prometheus(service: str, figures: Figures, *, running: bool, elapsed_s: float, host: str) -> str:
    """Prometheus text under the toolkit's names, with the label host."""
    latency = in_seconds(figures.latency)
    service = re.sub(r"[^a-zA-Z0-9_:]", "_", service)
    service = f"_{service}" if service[:1].isdigit() else service
    label = 'host="' + host.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
    rows: list[tuple[str, str, str, float]] = [
        ("workload_running", "gauge", "Whether a workload is running", float(running)),
        ("requests_total", "counter", "Total requests", figures.requests),
        ("errors_total", "counter", "Total errors", figures.errors),
        ("request_latency_seconds", "gauge", "Request latency, the mean of good requests", latency["avg"]),
        ("throughput_rps", "gauge", "Good requests per second of the measured window", figures.throughput_rps),
        ("elapsed_seconds", "gauge", "Time since the measured window began", elapsed_s),
        ("threads", "gauge", "Requests kept on their way", figures.threads),
        ("output_tokens_total", "counter", "Tokens of answers", figures.output_tokens),
    ]
    lines = []
    for name, kind, said, value in rows:
        full = f"{service}_{name}"
        lines += [f"# HELP {full} {said}", f"# TYPE {full} {kind}", f"{full}{{{label}}} {_number(value)}"]
    full = f"{service}_request_latency_quantile_seconds"
    lines += [f"# HELP {full} Request latency by quantile, from a histogram", f"# TYPE {full} summary"]
    for name, share in SHARES.items():
        lines.append(f'{full}{{{label},quantile="{share:g}"}} {_number(latency[name])}')
    lines += [
        f"{full}_sum{{{label}}} {_number(figures.latency.sum / NS)}",
        f"{full}_count{{{label}}} {figures.latency.count}",
    ]
    return "\n".join(lines) + "\n"


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else f"{value:.9g}"


def of_report(report: Mapping[str, Any], threads: int) -> Figures:
    """The figures of a finished run's report, as plain data."""
    histograms = report["histograms"]
    counts = report["counts"]
    window, rates = report["window"], report["throughput"]
    window_s = window["end_s"] - window["begin_s"]
    return Figures(
        requests=counts["in_window"],
        errors=counts["failed"],
        latency=Histogram.from_wire(histograms["e2e"]),
        window_s=window_s,
        output_tokens=round(rates["output_tok_s"] * window_s),
        input_tokens=round(rates["input_tok_s"] * window_s),
        output_tok_s=rates["output_tok_s"],
        threads=threads,
        others={name: Histogram.from_wire(histograms[name]) for name in MERGED if name in histograms},
        errors_by_kind=dict(report["errors"]),
    )


def merged(parts: Iterable[Figures]) -> Figures:
    """All together."""
    made = Figures()
    for part in parts:
        made.merge(part)
    return made
