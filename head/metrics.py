"""The head's own metrics, in Prometheus' text form, under `herder_`.

Hot paths count in plain integers that stand where the work is done; a collector reads them at a scrape. Objects are
counted from the state in slices between which the loop turns, so that a scrape of 100,000 jobs stalls nobody. There
is no series per node, GPU or model here: agents export their own.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client import Counter as PrometheusCounter
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from common.clock import boottime_ms
from common.telemetry import GcWatch
from head.core.state import State

if TYPE_CHECKING:
    from head.driver import Driver
    from head.feed import Feed
    from head.journal import Journal
    from head.sessions import Sessions

SLICE_OBJECTS = 5_000
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
NODE_STATES = ("online", "suspect", "unreachable", "left")
BENCHMARK_STATES = ("pending", "preparing", "running", "finishing", "completed", "failed", "cancelled")
JOB_STATES = ("pending", "running", "completed", "failed", "cancelled")
_FAST = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)


class Metrics:
    """Everything that /metrics shows. Made first; `attach` names what it reads once that exists."""

    def __init__(self, version: str) -> None:
        self.registry = CollectorRegistry()
        self.version = version
        self.commit_seconds = Histogram(
            "herder_journal_commit_seconds",
            "One commit of the journal, sync included",
            buckets=_FAST,
            registry=self.registry,
        )
        self.records = PrometheusCounter(
            "herder_journal_records", "Records made durable by the journal", registry=self.registry
        )
        self.loop_lag_seconds = Histogram(
            "herder_loop_lag_seconds",
            "How much later than planned the event loop ran, once a second",
            buckets=_FAST,
            registry=self.registry,
        )
        self.gc_pause_seconds = Histogram(
            "herder_gc_pause_seconds", "Pauses of the garbage collector", buckets=_FAST, registry=self.registry
        )
        self.http_seconds = Histogram(
            "herder_http_request_seconds",
            "HTTP requests by route template, method and status",
            ("route", "method", "status"),
            buckets=(0.001, 0.005, 0.025, 0.1, 0.5, 2.5, 10.0, 60.0),
            registry=self.registry,
        )
        self.gc_watch = GcWatch(self.gc_pause_seconds.observe)
        ProcessCollector(namespace="herder", registry=self.registry)
        self._counted: list[Metric] = []
        self._render_lock = asyncio.Lock()
        self._driver: Driver | None = None

    def attach(self, driver: Driver, journal: Journal, sessions: Sessions, feed: Feed) -> None:
        """Names the parts that are read at each scrape."""
        self._driver = driver
        journal.on_commit = self.observe_commit
        driver.on_lag = self.observe_lag
        self.registry.register(_Shell(self, driver, journal, sessions, feed))

    def observe_commit(self, seconds: float, records: int) -> None:
        """One commit of the journal; called in its thread."""
        self.commit_seconds.observe(seconds)
        self.records.inc(records)

    def observe_lag(self, lag_ms: int) -> None:
        """One tick of the driver."""
        self.loop_lag_seconds.observe(lag_ms / 1000)

    def http(self, route: str, method: str, status: int, seconds: float) -> None:
        """One answered request. `route` is the template, never the path, so that the series stay few."""
        self.http_seconds.labels(route, method, str(status)).observe(seconds)

    async def render(self) -> bytes:
        """The text for a scrape."""
        async with self._render_lock:
            if self._driver is not None:
                self._counted = [metric async for metric in _count(self._driver.state)]
            return generate_latest(self.registry)

    @property
    def counted(self) -> list[Metric]:
        """What the last scrape counted in the state."""
        return self._counted


class _Shell(Collector):
    """Reads the plain counters of the shell's parts."""

    def __init__(self, metrics: Metrics, driver: Driver, journal: Journal, sessions: Sessions, feed: Feed) -> None:
        self.metrics = metrics
        self.driver = driver
        self.journal = journal
        self.sessions = sessions
        self.feed = feed

    def describe(self) -> Iterable[Metric]:
        """Nothing ahead of time: names are known to be unique."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """All families."""
        yield InfoMetricFamily("herder_build", "Version of the head", value={"version": self.metrics.version})
        yield from self._driver_metrics()
        yield from self._session_metrics()
        yield from self._benchmark_metrics()
        yield from self.metrics.counted

    def _driver_metrics(self) -> Iterator[Metric]:
        driver, state = self.driver, self.driver.state
        yield _gauge("herder_head_epoch", "Number of this head start", state.head_epoch)
        yield _gauge("herder_uptime_seconds", "Since start", (boottime_ms() - driver.started_boottime_ms) / 1000)
        yield _gauge("herder_journal_revision", "Revision of the last durable record", self.journal.revision)
        yield _gauge("herder_journal_read_only", "1 while the journal cannot be written", int(driver.is_read_only))
        yield _gauge("herder_queue_depth", "Events that wait to be handled", driver.queue_depth)
        yield _gauge("herder_undecided_records", "Records on their way to the disk", driver.undecided_records)
        yield _gauge("herder_parked_events", "Agents' facts that wait for the journal", driver.parked_events)
        yield _gauge("herder_settling", "1 while nodes get time to return after a start", int(driver.is_settling))
        yield _gauge("herder_replacement_frozen", "1 while most nodes are gone at once", int(state.is_frozen))
        yield _gauge("herder_feed_readers", "Who follows the change feed", self.feed.subscribers)
        yield _counter("herder_step_seconds", "Time spent deciding", driver.step_seconds)
        alarms = GaugeMetricFamily("herder_alarm", "1 while this alarm is on", labels=("name",))
        for name in sorted(driver.alarms):
            alarms.add_metric((name,), 1)
        yield alarms
        events = CounterMetricFamily("herder_events", "Events handled, by type", labels=("type",))
        for name, count in sorted(driver.counts.items()):
            if name[0].isupper():
                events.add_metric((name,), count)
        yield events
        yield _counter("herder_bugs", "Steps and effects that failed in our own code", driver.counts["bugs"])
        yield _counter("herder_submits_timed_out", "Changes whose outcome came too late", driver.counts["timed_out"])
        yield _counter("herder_submits_refused", "Changes refused by a full queue", driver.counts["refused_full"])

    def _session_metrics(self) -> Iterator[Metric]:
        sessions = self.sessions
        yield _gauge("herder_sessions", "Open sessions of agents", len(sessions))
        yield _gauge("herder_log_readers", "Logs being read", sessions.logs.readers)
        frames = CounterMetricFamily("herder_frames", "Frames of sessions", labels=("direction", "kind"))
        refused = CounterMetricFamily("herder_sessions_refused", "Agents turned away", labels=("code",))
        for name, count in sorted(sessions.counts.items()):
            direction, _, kind = name.partition(" ")
            if kind:
                frames.add_metric((direction, kind), count)
            elif name.startswith("refused_"):
                refused.add_metric((name.removeprefix("refused_"),), count)
        yield frames
        yield refused
        yield _counter("herder_frames_bad", "Frames that could not be read", sessions.counts["bad"])
        yield _counter("herder_outbox_overflows", "Agents that did not read and were cut", sessions.counts["overflow"])

    def _benchmark_metrics(self) -> Iterator[Metric]:
        """The last second of each benchmark that sends load, all load nodes together: at most BENCHMARKS_LIVE."""
        state, live = self.driver.state, self.sessions.live
        labels = ("benchmark", "name")
        families = {
            field: GaugeMetricFamily(f"herder_benchmark_{name}", text, labels=labels)
            for field, (name, text) in _BENCHMARK_SERIES.items()
        }
        for tick in live.in_motion(self.driver.clock.now_ms()):
            benchmark = state.benchmarks.get(tick.benchmark)
            if benchmark is None:
                continue
            for field, family in families.items():
                value = getattr(tick, field)
                if value is not None:
                    family.add_metric((benchmark.id, benchmark.name), value / 1000 if field.endswith("_ms") else value)
        yield from families.values()
        yield _counter(
            "herder_benchmark_ticks_dropped", "Seconds of runs that came too late or were none", live.dropped
        )


_BENCHMARK_SERIES = {
    "point": ("point", "Number of the point that runs"),
    "nodes": ("load_nodes", "Load nodes that told of the last second"),
    "sent": ("sent_per_second", "Requests sent in the last second"),
    "done": ("done_per_second", "Requests answered well in the last second"),
    "failed": ("failed_per_second", "Requests that failed in the last second"),
    "tokens": ("output_tokens_per_second", "Output tokens of the last second"),
    "in_flight": ("in_flight", "Requests on their way"),
    "ttft_p50_ms": ("ttft_p50_seconds", "Median time to first token of the last second, mean over the load nodes"),
    "ttft_p99_ms": ("ttft_p99_seconds", "p99 of the time to first token of the last second, of the worst load node"),
}


async def _count(state: State) -> AsyncIterator[Metric]:
    """Counts of objects by state; yields families, turning the loop between slices."""
    nodes = await _tally(state.nodes, lambda node: (_node_state(state, node),))
    yield _by("herder_nodes", "Nodes by state", ("state",), nodes, [(name,) for name in NODE_STATES])
    yield _gauge("herder_nodes_cordoned", "Nodes that take no new work", await _how_many(state.nodes, "is_cordoned"))
    yield _gauge("herder_models", "Registered models", len(state.models))
    copies = await _tally(state.copies, lambda copy: (copy.state, _device_kind(copy.device)))
    yield _by("herder_copies", "Copies by state and kind of device", ("state", "kind"), copies)
    yield _gauge("herder_services", "Services", len(state.services))
    replicas = await _tally(state.replicas, lambda replica: (replica.state,))
    yield _by("herder_replicas", "Replicas by state", ("state",), replicas)
    benchmarks = await _tally(state.benchmarks, lambda benchmark: (benchmark.state,))
    always = [(name,) for name in BENCHMARK_STATES]
    yield _by("herder_benchmarks", "Benchmarks kept, by state", ("state",), benchmarks, always)
    points = await _tally(state.points, lambda point: (point.state,))
    yield _by("herder_benchmark_points", "Points of the benchmarks kept, by state", ("state",), points)
    jobs = await _tally(state.jobs.facts, lambda facts: (facts.state,))
    yield _by("herder_jobs", "Jobs kept, by state", ("state",), jobs, [(name,) for name in JOB_STATES])


async def _tally(table: Mapping[str, Any], label: Callable[[Any], tuple[str, ...]]) -> Counter[tuple[str, ...]]:
    counts: Counter[tuple[str, ...]] = Counter()
    things = list(table.values())
    for start in range(0, len(things), SLICE_OBJECTS):
        counts.update(map(label, things[start : start + SLICE_OBJECTS]))
        await asyncio.sleep(0)
    return counts


async def _how_many(table: dict[str, Any], flag: str) -> int:
    counts = await _tally(table, lambda thing: ("yes" if getattr(thing, flag) else "no",))
    return counts[("yes",)]


def _node_state(state: State, node: Any) -> str:
    """As /nodes shows it: `suspect` is an online node without a session."""
    live = state.live.get(node.id)
    is_suspect = node.status == "online" and (live is None or not live.session_id)
    return "suspect" if is_suspect else str(node.status)


def _device_kind(device: str) -> str:
    return device.partition(":")[2].rstrip("0123456789")


def _by(
    name: str,
    text: str,
    labels: tuple[str, ...],
    counts: Counter[tuple[str, ...]],
    always: Iterable[tuple[str, ...]] = (),
) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=labels)
    for values in sorted({*counts, *always}):
        family.add_metric(values, counts[values])
    return family


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, value=value)


def _counter(name: str, text: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(name, text, value=value)
