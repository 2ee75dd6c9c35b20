"""What the gateway counts, for /metrics. Label values are bounded: services that exist, our own paths and codes.

Counting happens on every request, so it is plain integers in dictionaries; Prometheus families are made of them
when somebody asks.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from head.gateway.bodies import Room

SERVICES = 1_000  # label values; what comes after them is counted together
OTHER = "other"
NOBODY = ""  # the request named nothing that exists
TTFT_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
DURATION_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)


class Histogram:
    """Counts by bucket, with the sum."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Counts one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def buckets(self) -> list[tuple[str, float]]:
        """(upper bound, cumulative count) as Prometheus wants them."""
        names = [*map(str, self.bounds), "+Inf"]
        running = 0
        found = []
        for name, count in zip(names, self.counts, strict=True):
            running += count
            found.append((name, float(running)))
        return found


class Metering(Collector):
    """The gateway's counters."""

    def __init__(self, room: Room) -> None:
        self.in_flight = 0
        self._room = room
        self.requests: Counter[tuple[str, str, str]] = Counter()  # service, path, code
        self.tokens: Counter[tuple[str, str]] = Counter()  # service, kind
        self.ttft: dict[str, Histogram] = {}
        self.duration: dict[str, Histogram] = {}
        self.disconnects = 0
        self._services: set[str] = set()

    def service_label(self, service: str) -> str:
        """The service, or `other` once there have been too many."""
        if service in self._services or not service:
            return service
        if len(self._services) >= SERVICES:
            return OTHER
        self._services.add(service)
        return service

    def count(self, service: str, path: str, code: str, duration_s: float) -> None:
        """Counts a request that has ended. code: "ok", an engine's refusal as "upstream_400", or our error code."""
        label = self.service_label(service)
        self.requests[label, path, code] += 1
        if label:
            histogram = self.duration.get(label)
            if histogram is None:
                histogram = self.duration[label] = Histogram(DURATION_BUCKETS_S)
            histogram.observe(duration_s)

    def count_tokens(self, service: str, prompt: int, completion: int) -> None:
        """Counts what an answer's usage says."""
        label = self.service_label(service)
        self.tokens[label, "prompt"] += prompt
        self.tokens[label, "completion"] += completion

    def first_token(self, service: str, seconds: float) -> None:
        """Notes the time to the first piece of a stream."""
        label = self.service_label(service)
        histogram = self.ttft.get(label)
        if histogram is None:
            histogram = self.ttft[label] = Histogram(TTFT_BUCKETS_S)
        histogram.observe(seconds)

    def collect(self) -> Iterator[Metric]:
        requests = CounterMetricFamily(
            "herder_gateway_requests", "Requests by how they ended.", labels=("service", "path", "code")
        )
        for labels, number in sorted(self.requests.items()):
            requests.add_metric(labels, number)
        yield requests
        tokens = CounterMetricFamily(
            "herder_gateway_tokens", "Tokens, as the answers' usage says.", labels=("service", "kind")
        )
        for pair, number in sorted(self.tokens.items()):
            tokens.add_metric(pair, number)
        yield tokens
        yield _histogram(
            "herder_gateway_time_to_first_token_seconds", "From a request to its stream's first piece.", self.ttft
        )
        yield _histogram("herder_gateway_duration_seconds", "From a request to its answer's end.", self.duration)
        yield GaugeMetricFamily("herder_gateway_in_flight", "Requests on their way.", value=self.in_flight)
        yield GaugeMetricFamily(
            "herder_gateway_bodies_bytes", "Memory of the request bodies that are held.", value=self._room.held
        )
        yield CounterMetricFamily(
            "herder_gateway_client_disconnects", "Clients that left before their answer was whole.", self.disconnects
        )


def _histogram(name: str, text: str, by_service: dict[str, Histogram]) -> HistogramMetricFamily:
    family = HistogramMetricFamily(name, text, labels=("service",))
    for service, histogram in sorted(by_service.items()):
        family.add_metric((service,), histogram.buckets(), histogram.total)
    return family
