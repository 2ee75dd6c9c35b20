"""Continuous batching with chunked prefill, step by step: latency against load.

A small discrete-event simulation of one engine: requests arrive, wait for a place, are prefilled in chunks beside the
running sequences' tokens, and decode until they have all their output. Steps in which nothing changes are taken in one
leap, so its cost grows with events and not with tokens. Deterministic: random gaps are the exponential distribution's
quantiles in a fixed order. The estimates' closed form answers single questions; this one draws curves and tails.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_right
from collections import deque
from collections.abc import Sequence

import msgspec

from common.errors import InvalidValue

_GOLDEN = 0.6180339887498949  # multiples of it are spread evenly over [0, 1): a quantile for each arrival
STEPS_LIMIT = 200_000
REQUESTS_LIMIT = 20_000


class StepCost(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of a step: those of the running sequences (linear between `decode_points`), and of its prompt tokens."""

    decode_points: tuple[tuple[float, float], ...]  # sequences, seconds; ascending
    prompt_token_s: float
    chunk_s: float = 0.0  # for each step that prefills
    ttft_fixed_s: float = 0.0  # outside the engine's steps: tokenizer, HTTP

    def decode_s(self, sequences: float) -> float:
        """Seconds of a step with so many running sequences; extrapolated linearly beyond the last point."""
        points = self.decode_points
        if sequences <= points[0][0] or len(points) == 1:
            return points[0][1]
        at = min(bisect_right(points, (sequences, math.inf)), len(points) - 1)
        (x0, y0), (x1, y1) = points[at - 1], points[at]
        return y0 + (y1 - y0) * (sequences - x0) / (x1 - x0)


class Latencies(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds over the requests that were measured."""

    mean: float
    p50: float
    p90: float
    p99: float


class LoadPoint(msgspec.Struct, frozen=True, kw_only=True):
    """One simulated load. `mean_in_flight` is the time average: Little's law is exact over the simulation."""

    offered_per_s: float
    requests_per_s: float
    output_tokens_per_s: float
    mean_in_flight: float
    mean_running: float
    ttft_s: Latencies
    tpot_s: Latencies
    e2e_s: Latencies
    requests: int
    steps: int
    is_stable: bool
    is_truncated: bool


def arrivals_at(rate: float, count: int) -> list[float]:
    """Times of `count` requests at `rate` a second with exponential gaps, the same ones every time."""
    if rate <= 0 or not 1 <= count <= REQUESTS_LIMIT:
        raise InvalidValue("a rate is positive and at most 20,000 requests are simulated", rate=rate, count=count)
    gaps = [-math.log1p(-((index * _GOLDEN + 0.5) % 1.0)) for index in range(count)]
    scale = count / sum(gaps) / rate
    times = []
    now = 0.0
    for gap in gaps:
        now += gap * scale
        times.append(now)
    return times


class _Engine:
    """The state of one simulation. A decoding sequence is known by the step count at which it will be done."""

    def __init__(self, cost: StepCost, prompt: float, output: int, places: int, chunk: float) -> None:
        self.cost = cost
        self.prompt = prompt
        self.output = output
        self.places = places
        self.chunk = chunk
        self.now = 0.0
        self.tokens = 0  # steps taken with any sequence decoding
        self.steps = 0
        self.waiting: deque[int] = deque()
        self.prefilling: deque[list[float]] = deque()  # request, tokens left
        self.decoding: list[tuple[int, int]] = []  # token count when done, request
        self.first: dict[int, float] = {}
        self.done: dict[int, float] = {}
        self.in_flight_s = 0.0
        self.running_s = 0.0

    def admit(self) -> None:
        while self.waiting and len(self.prefilling) + len(self.decoding) < self.places:
            self.prefilling.append([self.waiting.popleft(), self.prompt])

    def advance(self, seconds: float) -> None:
        running = len(self.prefilling) + len(self.decoding)
        self.now += seconds
        self.running_s += running * seconds
        self.in_flight_s += (running + len(self.waiting)) * seconds

    def step(self, next_arrival: float) -> list[int]:
        """One step, or as many equal ones as fit before something changes. Returns the requests that are done."""
        running = len(self.decoding)
        self.steps += 1
        if not self.prefilling:
            each = self.cost.decode_s(running)
            ahead = self.decoding[0][0] - self.tokens
            count = max(
                1, min(ahead, math.ceil((next_arrival - self.now) / each) if next_arrival < math.inf else ahead)
            )
            self.advance(each * count)
            self.tokens += count
            return self._finish()
        room = max(self.chunk - running, 1.0)
        taken = 0.0
        complete = []
        while self.prefilling and taken < room:
            head = self.prefilling[0]
            part = min(head[1], room - taken)
            head[1] -= part
            taken += part
            if head[1] > 1e-9:
                break
            complete.append(int(self.prefilling.popleft()[0]))
        decode_s = self.cost.decode_s(running) if running else 0.0
        kept = [[float(request), 0.0] for request in complete]
        self.prefilling.extendleft(reversed(kept))  # they hold their places while the step lasts
        self.advance(decode_s + taken * self.cost.prompt_token_s + self.cost.chunk_s)
        for _ in kept:
            self.prefilling.popleft()
        self.tokens += 1
        done = self._finish()
        for request in complete:
            self.first[request] = self.now
            if self.output <= 1:
                self.done[request] = self.now
                done.append(request)
            else:
                heapq.heappush(self.decoding, (self.tokens + self.output - 1, request))
        return done

    def _finish(self) -> list[int]:
        done = []
        while self.decoding and self.decoding[0][0] <= self.tokens:
            _, request = heapq.heappop(self.decoding)
            self.done[request] = self.now
            done.append(request)
        return done


def simulate(
    cost: StepCost,
    *,
    prompt: float,
    output: int,
    places: int,
    chunk: float = 8192.0,
    arrivals: Sequence[float] | None = None,
    concurrency: int = 0,
    requests: int = 0,
) -> LoadPoint:
    """Runs until every request is done (or STEPS_LIMIT). Either `arrivals`, or `concurrency` clients in a closed loop.

    places: sequences at once. requests: of the closed loop, in all (default 8 for each client).
    Raises: InvalidValue without a load or with numbers out of range.
    """
    if output < 1 or prompt < 1 or places < 1 or chunk < 1 or (arrivals is None) == (concurrency < 1):
        raise InvalidValue("a simulation needs arrivals or a concurrency, and positive sizes")
    engine = _Engine(cost, prompt, output, places, chunk)
    total = len(arrivals) if arrivals is not None else min(REQUESTS_LIMIT, requests or 8 * concurrency)
    sent: list[float] = []
    if arrivals is None:
        sent = [0.0] * min(concurrency, total)
        engine.waiting.extend(range(len(sent)))
    while len(engine.done) < total and engine.steps < STEPS_LIMIT:
        if arrivals is not None:
            while len(sent) < total and arrivals[len(sent)] <= engine.now:
                engine.in_flight_s += engine.now - arrivals[len(sent)]  # it came while a step ran
                engine.waiting.append(len(sent))
                sent.append(arrivals[len(sent)])
        engine.admit()
        coming = arrivals[len(sent)] if arrivals is not None and len(sent) < total else math.inf
        if not engine.prefilling and not engine.decoding:
            engine.advance(max(coming - engine.now, 0.0))
            continue
        for _ in engine.step(coming):
            if arrivals is None and len(sent) < total:
                engine.waiting.append(len(sent))
                sent.append(engine.now)
    return _summary(engine, sent, output, cost, total)


def _summary(engine: _Engine, sent: Sequence[float], output: int, cost: StepCost, total: int) -> LoadPoint:
    finished = sorted(engine.done)
    ttft = [engine.first[r] - sent[r] + cost.ttft_fixed_s for r in finished]
    e2e = [engine.done[r] - sent[r] + cost.ttft_fixed_s for r in finished]
    tpot = [(engine.done[r] - engine.first[r]) / max(1, output - 1) for r in finished]
    span = max(engine.now, 1e-12)
    last_sent = max(sent, default=0.0)
    offered = len(sent) / last_sent if last_sent > 0 else len(finished) / span
    half = len(e2e) // 2
    is_growing = half >= 20 and _mean(e2e[half:]) > 1.5 * _mean(e2e[:half])
    return LoadPoint(
        offered_per_s=offered,
        requests_per_s=len(finished) / span,
        output_tokens_per_s=len(finished) * output / span,
        mean_in_flight=engine.in_flight_s / span,
        mean_running=engine.running_s / span,
        ttft_s=_latencies(ttft),
        tpot_s=_latencies(tpot),
        e2e_s=_latencies(e2e),
        requests=len(finished),
        steps=engine.steps,
        is_stable=not is_growing and len(finished) == total,
        is_truncated=len(finished) < total,
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _latencies(values: Sequence[float]) -> Latencies:
    ordered = sorted(values) or [0.0]

    def quantile(share: float) -> float:
        return ordered[min(len(ordered) - 1, max(0, math.ceil(share * len(ordered)) - 1))]

    return Latencies(mean=_mean(ordered), p50=quantile(0.5), p90=quantile(0.9), p99=quantile(0.99))
