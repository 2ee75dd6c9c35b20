"""The agent's own HTTP door: /metrics for Prometheus (per-GPU series live here) and /healthz.

Values are read from the daemon when a scrape comes; nothing is counted twice. Bound to loopback by default; /metrics
asks for the configured token, compared in constant time.
"""

from __future__ import annotations

import hmac
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import msgspec
from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from agent.core import copies, replicas
from agent.core.state import State
from agent.monitor.node import NodeSample
from agent.monitor.procfs import HostSample
from agent.monitor.series import gpu_series, host_series
from common import wire

REPLICA_STATES = ("waiting_copy", "starting", "ready", "unhealthy", "stopping", "stopped", "failed")


class Facts(msgspec.Struct, frozen=True):
    """What the shell knows beside the core's state."""

    node: str
    version: str
    has_session: bool
    sessions: int
    telemetry: wire.Telemetry
    inventory: wire.Inventory
    dram_budget_bytes: int
    mover_starts: int
    holder_starts: int
    events: int
    records: int
    is_ledger_stuck: bool
    loop_lag_s: float
    followers: int = 0
    sample: NodeSample | None = None
    load_sent: int = 0
    load_failed: int = 0
    load_in_flight: int = 0


class AgentCollector(Collector):
    """Turns state and facts into series at each scrape."""

    def __init__(self, state: State, facts: Callable[[], Facts]) -> None:
        self._state = state
        self._facts = facts

    def collect(self) -> Iterable[Metric]:
        """Every series."""
        facts = self._facts()
        yield from _own(facts, self._state)
        yield from _host(facts)
        yield from _gpus(facts)
        yield from _copies(self._state)
        yield from _replicas(self._state)
        yield from _runs(facts, self._state)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)


def _own(facts: Facts, state: State) -> Iterator[Metric]:
    yield InfoMetricFamily("herder_agent", "This agent.", value={"node": facts.node, "version": facts.version})
    yield _gauge("herder_agent_session_open", "1 while a session with the head is open.", float(facts.has_session))
    yield CounterMetricFamily("herder_agent_sessions", "Sessions opened.", value=facts.sessions)
    yield _gauge("herder_agent_head_epoch", "Highest head epoch seen.", state.meta.max_head_epoch)
    yield CounterMetricFamily("herder_agent_events", "Events handled by the core.", value=facts.events)
    yield CounterMetricFamily("herder_agent_ledger_records", "Records made durable.", value=facts.records)
    yield _gauge("herder_agent_ledger_stuck", "1 while the ledger cannot be written.", float(facts.is_ledger_stuck))
    unacked = sum(not outcome.is_acked for outcome in state.outcomes.values())
    yield _gauge("herder_agent_results_unacknowledged", "Results that the head has not made durable.", unacked)
    yield CounterMetricFamily("herder_agent_mover_starts", "Movers started.", value=facts.mover_starts)
    yield CounterMetricFamily("herder_agent_holder_starts", "Holders started.", value=facts.holder_starts)
    yield _gauge("herder_agent_mover_up", "1 while the mover answers.", float(state.is_mover_up))
    yield _gauge("herder_agent_holder_up", "1 while the holder answers.", float(state.is_holder_up))
    yield _gauge("herder_agent_loop_lag_seconds", "How late the last tick of the control loop was.", facts.loop_lag_s)


def _host(facts: Facts) -> Iterator[Metric]:
    now = facts.telemetry
    yield _gauge("herder_node_cpu_ratio", "CPU in use, 0..1 over all CPUs.", now.cpu)
    yield _gauge("herder_node_load1", "Load average over one minute.", now.load1)
    yield _gauge("herder_node_memory_bytes", "Memory of the node.", facts.inventory.memory_bytes)
    yield _gauge("herder_node_memory_available_bytes", "Memory that is available.", now.memory_available_bytes)
    store = GaugeMetricFamily("herder_store_bytes", "Bytes of the disk store by kind.", labels=["kind"])
    store.add_metric(["used"], now.disk_used_bytes)
    store.add_metric(["reserved"], now.disk_reserved_bytes)
    store.add_metric(["file_system_free"], now.disk_free_bytes)
    store.add_metric(["budget"], facts.inventory.disk_budget_bytes)
    yield store
    dram = GaugeMetricFamily("herder_dram_bytes", "Bytes of the RAM tier by kind.", labels=["kind"])
    dram.add_metric(["used"], now.dram_used_bytes)
    dram.add_metric(["budget"], facts.dram_budget_bytes)
    yield dram
    yield from host_series(facts.sample.host if facts.sample is not None else HostSample())


def _gpus(facts: Facts) -> Iterator[Metric]:
    """The full samples; telemetry's readings while there are none (at the start, or the driver was too slow)."""
    names = {gpu.uuid: gpu.name for gpu in facts.inventory.gpus}
    sampled = facts.sample.gpus if facts.sample is not None else None
    return gpu_series(sampled or facts.telemetry.gpus, names)


def _copies(state: State) -> Iterator[Metric]:
    counts: Counter[tuple[str, str]] = Counter()
    sizes: Counter[tuple[str, str]] = Counter()
    for task in state.copies.values():
        status = copies.status(state, task)
        counts[(status.storage, status.state)] += 1
        sizes[(status.storage, status.state)] += status.bytes_done
    number = GaugeMetricFamily("herder_node_copies", "Model copies by place and state.", labels=["storage", "state"])
    size = GaugeMetricFamily("herder_node_copies_bytes", "Their bytes that are here.", labels=["storage", "state"])
    for labels, value in sorted(counts.items()):
        number.add_metric(labels, value)
        size.add_metric(labels, sizes[labels])
    yield number
    yield size


def _replicas(state: State) -> Iterator[Metric]:
    labels = ["service", "replica", "model"]
    up = GaugeMetricFamily("herder_replica_state", "1 for the state that a replica is in.", labels=[*labels, "state"])
    restarts = CounterMetricFamily("herder_replica_restarts", "Restarts of a replica.", labels=labels)
    memory = GaugeMetricFamily("herder_replica_memory_bytes", "Resident memory of a replica.", labels=labels)
    gpu = GaugeMetricFamily("herder_replica_gpu_memory_bytes", "GPU memory of a replica, by NVML.", labels=labels)
    for task in state.replicas.values():
        status = replicas.status(state, task)
        names = [task.order.service, task.key, task.order.model]
        for name in REPLICA_STATES:
            up.add_metric([*names, name], float(status.state == name))
        restarts.add_metric(names, status.restarts)
        memory.add_metric(names, status.memory_bytes)
        gpu.add_metric(names, status.gpu_memory_bytes)
    yield from (up, restarts, memory, gpu)


def _runs(facts: Facts, state: State) -> Iterator[Metric]:
    counts = Counter((task.order.kind, task.state) for task in state.runs.values())
    number = GaugeMetricFamily("herder_agent_runs", "Parts of benchmarks by kind and state.", labels=["kind", "state"])
    for labels, value in sorted(counts.items()):
        number.add_metric(labels, value)
    yield number
    yield CounterMetricFamily(
        "herder_agent_load_requests", "Requests that load generators of this node sent.", value=facts.load_sent
    )
    yield CounterMetricFamily("herder_agent_load_failures", "Of those the ones that failed.", value=facts.load_failed)
    yield _gauge("herder_agent_load_in_flight", "Requests on their way at the last look.", facts.load_in_flight)


class Exporter:
    """Serves /metrics and /healthz."""

    def __init__(self, state: State, facts: Callable[[], Facts], *, token: str = "", is_open: bool = True) -> None:
        self.port = 0
        self.scrape_s = 0.0
        self._facts = facts
        self._token = token
        self._is_open = is_open
        self._registry = CollectorRegistry()
        self._registry.register(AgentCollector(state, facts))
        ProcessCollector(namespace="herder", registry=self._registry)
        self._runner: web.AppRunner | None = None

    async def start(self, host: str, port: int) -> None:
        """Listens. Raises: OSError when the port is taken."""
        app = web.Application(client_max_size=1024)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/healthz", self._healthz)
        self._runner = web.AppRunner(app, access_log=None, keepalive_timeout=75.0)
        await self._runner.setup()
        site = web.TCPSite(self._runner, host, port)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def close(self) -> None:
        """Stops listening."""
        if self._runner is not None:
            await self._runner.cleanup()

    async def _metrics(self, request: web.Request) -> web.Response:
        if not self._may_read(request):
            return web.Response(status=401, text="a token is needed\n", headers={"WWW-Authenticate": "Bearer"})
        started = time.perf_counter()
        body = generate_latest(self._registry)
        self.scrape_s = time.perf_counter() - started
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})

    def _may_read(self, request: web.Request) -> bool:
        if not self._token:
            return self._is_open
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        return scheme.lower() == "bearer" and hmac.compare_digest(given.encode(), self._token.encode())

    async def _healthz(self, request: web.Request) -> web.Response:
        facts = self._facts()
        body = {"status": "ok" if not facts.is_ledger_stuck else "ledger_stuck", "session": facts.has_session}
        return web.json_response(body, status=200 if not facts.is_ledger_stuck else 503)
