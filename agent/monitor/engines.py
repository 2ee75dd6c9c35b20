"""What engines say of themselves: a chosen few of their Prometheus series, under one name for every engine.

Each engine has a thread of its own and a deadline per look, so that one that hangs delays neither the others nor
the sampling. Engines are asked at most once a second: writing its page costs vLLM milliseconds of its event loop.
Understood are vLLM (`vllm:`), SGLang (`sglang:`) and llama.cpp (`llamacpp:`, started with `--metrics`).
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Sequence
from typing import Literal
from urllib.parse import urlsplit, urlunsplit

import msgspec

from agent.monitor.schedule import Schedule
from agent.monitor.web import WebError, ask, checked_url
from common.clock import boottime_ns

EVERY_MIN_S = 1.0
TIMEOUT_S = 2.0
PAGE_MAX_BYTES = 8 << 20
ENGINES_MAX = 256


class Field(msgspec.Struct, frozen=True):
    """One column: the series that carry it, in order of preference, and how a series' label sets become one number."""

    name: str
    series: tuple[str, ...]
    how: Literal["sum", "max", "rate"] = "sum"  # rate: growth a second of the column that `series` names


FIELDS = (
    Field("requests_running", ("vllm:num_requests_running", "sglang:num_running_reqs", "llamacpp:requests_processing")),
    Field("requests_waiting", ("vllm:num_requests_waiting", "sglang:num_queue_reqs", "llamacpp:requests_deferred")),
    Field(
        "kv_cache_used_ratio",
        (
            "vllm:kv_cache_usage_perc",
            "vllm:gpu_cache_usage_perc",
            "sglang:token_usage",
            "llamacpp:kv_cache_usage_ratio",
        ),
        "max",
    ),
    Field(
        "prompt_tokens_total",
        ("vllm:prompt_tokens_total", "sglang:prompt_tokens_total", "llamacpp:prompt_tokens_total"),
    ),
    Field(
        "generation_tokens_total",
        ("vllm:generation_tokens_total", "sglang:generation_tokens_total", "llamacpp:tokens_predicted_total"),
    ),
    Field("prompt_tokens_per_s", ("prompt_tokens_total",), "rate"),
    Field("generation_tokens_per_s", ("generation_tokens_total",), "rate"),
    Field("requests_finished_total", ("vllm:request_success_total", "sglang:num_requests_total")),
    Field("preemptions_total", ("vllm:num_preemptions_total",)),
    Field("prefix_cache_queries_total", ("vllm:prefix_cache_queries_total", "vllm:gpu_prefix_cache_queries_total")),
    Field("prefix_cache_hits_total", ("vllm:prefix_cache_hits_total", "vllm:gpu_prefix_cache_hits_total")),
    Field("ttft_seconds_sum", ("vllm:time_to_first_token_seconds_sum", "sglang:time_to_first_token_seconds_sum")),
    Field("ttft_count", ("vllm:time_to_first_token_seconds_count", "sglang:time_to_first_token_seconds_count")),
    Field(
        "itl_seconds_sum",
        (
            "vllm:inter_token_latency_seconds_sum",
            "vllm:time_per_output_token_seconds_sum",
            "sglang:inter_token_latency_seconds_sum",
        ),
    ),
    Field(
        "itl_count",
        (
            "vllm:inter_token_latency_seconds_count",
            "vllm:time_per_output_token_seconds_count",
            "sglang:inter_token_latency_seconds_count",
        ),
    ),
    Field("e2e_seconds_sum", ("vllm:e2e_request_latency_seconds_sum", "sglang:e2e_request_latency_seconds_sum")),
    Field("e2e_count", ("vllm:e2e_request_latency_seconds_count", "sglang:e2e_request_latency_seconds_count")),
    Field("queue_seconds_sum", ("vllm:request_queue_time_seconds_sum", "sglang:queue_time_seconds_sum")),
    Field("decodes_total", ("llamacpp:n_decode_total",)),
    Field("busy_slots_per_decode", ("llamacpp:n_busy_slots_per_decode",)),
)
_WANTED = sorted({series for field in FIELDS if field.how != "rate" for series in field.series})
# name{labels} value [timestamp]; a label's value may hold anything, an escaped quote too
_LINE = re.compile(
    rf'^({"|".join(_WANTED)})(?:\{{(?:[^"}}\n]|"(?:[^"\\\n]|\\.)*")*\}})?[ \t]+(\S+)'.encode(), re.MULTILINE
)


class Target(msgspec.Struct, frozen=True):
    """An engine to ask; `url` is its base (or its metrics page itself)."""

    url: str
    replica: str = ""
    api_key: str = ""


class EngineSample(msgspec.Struct):
    """One look at one engine; `values` by column, without those that it does not say."""

    replica: str
    wall_ms: int
    boottime_ms: int
    elapsed_s: float
    is_up: bool
    scrape_s: float
    values: dict[str, float]
    error: str = ""


def page_of(url: str) -> str:
    """The metrics page of an engine that is known by its base URL, with or without /v1. Raises: ValueError."""
    parts = urlsplit(checked_url(url))
    path = parts.path.rstrip("/")
    if not path.endswith("/metrics"):
        path = path.removesuffix("/v1") + "/metrics"
    return urlunsplit((parts.scheme, parts.netloc, path, parts.query, ""))


def read_page(page: bytes) -> dict[str, float]:
    """The columns that a metrics page tells, rates left out."""
    sums: dict[bytes, float] = {}
    greatest: dict[bytes, float] = {}
    for name, text in _LINE.findall(page):
        try:
            value = float(text)
        except ValueError:
            continue
        if value == value:  # not NaN
            sums[name] = sums.get(name, 0.0) + value
            greatest[name] = max(greatest.get(name, value), value)
    columns = {}
    for field in FIELDS:
        found = greatest if field.how == "max" else sums
        for series in () if field.how == "rate" else field.series:
            if series.encode() in found:
                columns[field.name] = found[series.encode()]
                break
    return columns


class EngineWatch:
    """Asks one engine at its own beat, in its own thread, and hands each look on."""

    def __init__(
        self,
        target: Target,
        take: Callable[[EngineSample], None],
        *,
        interval_s: float,
        timeout_s: float = TIMEOUT_S,
        start_s: float | None = None,
    ) -> None:
        """start_s: what `elapsed_s` counts from, by the monotonic clock. Raises: ValueError for a URL that is none."""
        self.target = msgspec.structs.replace(target, replica=target.replica or target.url)
        self.looks = 0
        self.failures = 0
        self.latest: EngineSample | None = None
        self._page = page_of(target.url)
        self._headers = {"Authorization": f"Bearer {target.api_key}"} if target.api_key else {}
        self._take = take
        self._schedule = Schedule(max(interval_s, EVERY_MIN_S))
        self._timeout_s = timeout_s
        self._start_s = time.monotonic() if start_s is None else start_s
        self._before: tuple[float, dict[str, float]] | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"engine {self.target.replica}"[:40], daemon=True)

    def start(self) -> None:
        """Begins to ask."""
        self._schedule.restart()
        self._thread.start()

    def stop(self) -> None:
        """Tells it to end; a look on its way is not waited for."""
        self._stop.set()

    def join(self, timeout_s: float) -> None:
        """Waits that long for its end."""
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _run(self) -> None:
        while not self._stop.wait(self._schedule.wait_s()):
            self._schedule.begin()
            sample = self.look()
            if self._stop.is_set():
                return
            self.latest = sample
            self._take(sample)

    def look(self) -> EngineSample:
        """One look, now."""
        self.looks += 1
        began_s = time.monotonic()
        values: dict[str, float] = {}
        error = ""
        wall_ms, boottime_ms = time.time_ns() // 1_000_000, boottime_ns() // 1_000_000
        try:
            status, page = ask(
                "GET", self._page, headers=self._headers, timeout_s=self._timeout_s, max_bytes=PAGE_MAX_BYTES
            )
            if status != 200:
                raise WebError(f"HTTP {status}")
            values = read_page(page)
        except WebError as problem:
            error = str(problem)
            self.failures += 1
        ended_s = time.monotonic()
        if not error:
            self._add_rates(values, ended_s)
        return EngineSample(
            replica=self.target.replica,
            wall_ms=wall_ms,
            boottime_ms=boottime_ms,
            elapsed_s=began_s - self._start_s,
            is_up=not error,
            scrape_s=ended_s - began_s,
            values=values,
            error=error,
        )

    def _add_rates(self, values: dict[str, float], now_s: float) -> None:
        before, self._before = self._before, (now_s, dict(values))
        if before is None or now_s <= before[0]:
            return
        for field in FIELDS:
            if field.how == "rate":
                after, then = values.get(field.series[0]), before[1].get(field.series[0])
                if after is not None and then is not None and after >= then:  # less: it was started anew
                    values[field.name] = (after - then) / (now_s - before[0])


def watches(
    targets: Sequence[Target], take: Callable[[EngineSample], None], *, interval_s: float
) -> tuple[EngineWatch, ...]:
    """One watch per engine. Raises: ValueError for too many, two of a name, or a URL that is none."""
    if len(targets) > ENGINES_MAX:
        raise ValueError(f"at most {ENGINES_MAX} engines can be watched")
    names = [target.replica or target.url for target in targets]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"two engines are called {twice[0]}: nobody could tell their values apart")
    start_s = time.monotonic()
    return tuple(EngineWatch(target, take, interval_s=interval_s, start_s=start_s) for target in targets)
