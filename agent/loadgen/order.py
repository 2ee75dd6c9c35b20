"""From a spec to a run: everything checked and prepared, then performed, then reported."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from agent.loadgen import datasets, traces, vectors
from agent.loadgen.apis import Api
from agent.loadgen.connection import Endpoint
from agent.loadgen.engine import NS, Limits, Share, Tick
from agent.loadgen.run import run
from agent.loadgen.server_tokens import ServerWords, is_server, server_of
from agent.loadgen.spread import SPREADS, chooser
from agent.loadgen.style import Style
from agent.loadgen.target import Target, parse_postgres, parse_url
from agent.loadgen.vector_store import filled
from agent.loadgen.words import Tokenizer, Words
from agent.loadgen.workload import Workload, api_for, prepare
from common.bench import report, scenario, schedule, spec
from common.bench.outcome import Asked, Outcome
from common.bench.report import Report
from common.bench.schedule import Schedule
from common.bench.spec import LoadSpec

CLOSED_PREPARED = 2_000  # conversations prepared for a closed loop whose number is not known
OFFLINE_IN_FLIGHT = 1_000  # over all processes, where nothing else is said
MAX_BODY = 64 << 20
MAX_ENDPOINTS = 1_000


@dataclass(frozen=True, slots=True)
class Aim:
    """Where load goes and with which credentials; never part of a report but for the URLs and headers' names."""

    urls: tuple[str, ...]
    spread: str = "round-robin"
    """How requests go to several URLs: one of spread.SPREADS."""
    headers: tuple[str, ...] = ()
    """Each as `Name: value`; sent to all of them."""
    ca_file: str | None = None
    client: tuple[str, str] | None = None
    """Files of the certificate and its key that are shown to servers that ask for one."""
    is_unverified: bool = False
    password_file: str | None = None
    """Of PostgreSQL's user."""


@dataclass(frozen=True, slots=True)
class Order:
    """A run, or this node's part of one, that can be performed."""

    spec: LoadSpec
    asked: Asked
    targets: tuple[Target, ...]
    spread: str
    style: Style
    workload: Workload
    schedule: Schedule | None
    limits: Limits
    tokenizer: Tokenizer | None
    """A file's; it counts answers as they end."""
    counter: Callable[[str], int] | None
    """A server's; it counts, after the run, answers whose tokens were not told."""
    part: int = 0
    """Which part of the run this is, of `parts`: one for each load node."""
    parts: int = 1

    @property
    def total_s(self) -> float | None:
        """How long it sends; None where only the number of requests is known."""
        return self.asked.until_s

    @property
    def digest(self) -> str:
        """Of everything that is sent and when: parts of one run must agree in it before they are started."""
        made = hashlib.sha256()
        if self.schedule is not None:
            made.update(self.schedule.times_ns.tobytes())
        for item in self.workload.items:
            made.update(hashlib.sha256(item.wire).digest())
        made.update(f"{self.spread} {self.spec.seed} {[target.url for target in self.targets]}".encode())
        return made.hexdigest()


def order_of(asked_for: LoadSpec, aim: Aim, *, part: int = 0, parts: int = 1) -> Order:
    """Checks everything and prepares every request. Raises: ValueError that says what to change; OSError."""
    assert 0 <= part < parts
    spec.check(asked_for)
    trace = traces.read(Path(asked_for.trace)) if asked_for.trace else None
    texts = asked_for.scenarios or (("dataset",) if asked_for.dataset else ("D(100,50)",))
    is_search = asked_for.api in spec.VECTOR_APIS
    plain = asked_for.api == "http" or trace is not None or is_search
    scenarios = [scenario.parse(text) for text in texts] if not plain or asked_for.scenarios else []
    api = vectors.api_of(asked_for) if is_search else api_for(scenarios, asked_for.api)
    if not asked_for.model and api.name != "http" and not is_search:
        raise ValueError("model is missing")
    _check_fit(asked_for, api)
    targets = _targets(aim, api, asked_for)
    if asked_for.points and (parts > 1 or len(targets) > 1):
        raise ValueError("points are put in for one load node and one URL; fill the collection beforehand")
    drawn: Schedule | None = None
    if trace is not None:
        drawn = spec.trace_schedule(asked_for, [arrival.at_s for arrival in trace.arrivals], trace.format)
    elif asked_for.is_open:
        drawn = spec.schedule_of(asked_for)
    style = _style(asked_for, api, [made.text for made in scenarios])
    dataset = datasets.read(asked_for.dataset) if asked_for.dataset else None
    lines = [row.turns[0][0] for row in dataset.rows[:20_000]] if dataset is not None else []
    tokenizer = None
    if asked_for.tokenizer and not is_server(asked_for.tokenizer):
        tokenizer = Tokenizer(Path(asked_for.tokenizer))
    words = _words(asked_for, api, targets[0], lines, tokenizer)
    count = len(drawn.times_ns) if drawn is not None else asked_for.requests or CLOSED_PREPARED
    if is_search:
        workload = vectors.prepare(asked_for, targets[0], count)
    else:
        rows = trace.arrivals if trace is not None else None
        workload = prepare(
            scenarios, style, targets[0], words, count=count, seed=asked_for.seed, dataset=dataset, trace=rows
        )
    checked = words.check() if isinstance(words, ServerWords) else None
    asked = Asked(
        _plan(asked_for, drawn, targets, api.name, [made.text for made in scenarios], workload, trace, dataset)
        | {
            "nodes": parts,
            "tokenizer": checked or asked_for.tokenizer,
            "spread": aim.spread if len(targets) > 1 else None,
        },
        asked_for.is_open,
        asked_for.warmup,
        asked_for.until_s,
        asked_for.cooldown,
        drawn.times_ns if drawn is not None else (),
        spec.limits_of(asked_for),
        style.is_exact and api.makes_tokens,
        prepared=len(workload.items),
        counted_by=workload.counted_by,
        classes=tuple(workload.classes),
        endpoints=tuple(target.url for target in targets),
        is_offline=asked_for.is_offline,
    )
    limits = Limits(first_s=asked_for.first_timeout, total_s=asked_for.timeout, drain_s=asked_for.drain)
    return Order(
        asked_for, asked, targets, aim.spread, style, workload, drawn, limits, tokenizer,
        words.count_answer if isinstance(words, ServerWords) else None, part, parts,
    )  # fmt: skip


def _check_fit(asked_for: LoadSpec, api: Api) -> None:
    """What an API cannot do is refused, not passed over. Raises: ValueError."""
    if asked_for.turns > 1 and not api.makes_tokens:
        raise ValueError(f"turns are for APIs that answer in words, not {api.name}")
    if asked_for.batch > 1 and api.name not in ("embeddings", "ollama-embed", "rerank"):
        raise ValueError(f"batch is for embeddings and rerank, not {api.name}")
    if asked_for.body and api.name != "http":
        raise ValueError("body is for plain HTTP")
    if asked_for.chunk_usage and (api.name not in ("chat", "completions") or not asked_for.stream):
        raise ValueError("chunk_usage is for streamed chat and completions")


def _words(asked_for: LoadSpec, api: Api, target: Target, lines: Sequence[str], tokenizer: Tokenizer | None) -> Words:
    """What texts are drawn from."""
    if asked_for.tokenizer is not None and tokenizer is None and api.name != "http":
        tails = (api.path, api.tail)
        return ServerWords(server_of(asked_for.tokenizer, target, tails, asked_for.model), lines)
    return Words(lines, tokenizer)


def _targets(aim: Aim, api: Api, asked_for: LoadSpec) -> tuple[Target, ...]:
    if aim.spread not in SPREADS:
        raise ValueError(f"spread {aim.spread!r}: one of {', '.join(SPREADS)}")
    if not 1 <= len(aim.urls) <= MAX_ENDPOINTS:
        raise ValueError(f"give 1 to {MAX_ENDPOINTS} URLs")
    safety: dict[str, Any] = {"is_unverified": aim.is_unverified, "ca_file": aim.ca_file, "client": aim.client}
    if api.framing == "rows":
        statement, settings = vectors.statement_of(asked_for), vectors.settings_of(asked_for)
        targets = [
            parse_postgres(url, statement=statement, settings=settings, password_file=aim.password_file, **safety)
            for url in aim.urls
        ]
    else:
        headers = [_header(text) for text in aim.headers]
        targets = [parse_url(url, api, path=asked_for.path, headers=headers, **safety) for url in aim.urls]
    if len({target.url for target in targets}) < len(targets):
        raise ValueError("a URL is named twice")
    return tuple(targets)


def _header(text: str) -> tuple[str, str]:
    name, colon, value = text.partition(":")
    if not colon:
        raise ValueError(f"a header is written 'Name: value', not {name[:20]!r}")
    return name.strip(), value.strip()


def _style(asked_for: LoadSpec, api: Api, classes: Sequence[str]) -> Style:
    body = b""
    if asked_for.body:
        with Path(asked_for.body).open("rb") as file:
            body = file.read(MAX_BODY + 1)
        if len(body) > MAX_BODY:
            raise ValueError("body is larger than 64 MiB")
    return Style(
        api,
        asked_for.model,
        is_streaming=asked_for.stream,
        is_exact=asked_for.exact,
        parameters=dict(asked_for.parameters),
        class_parameters=tuple(asked_for.class_parameters.get(name, {}) for name in classes),
        batch=asked_for.batch,
        prefix_tokens=max(0, asked_for.prefix_tokens),
        prefix_groups=asked_for.prefix_groups,
        turns=asked_for.turns,
        has_live_replies=asked_for.live_replies,
        method=asked_for.method,
        body=body,
        wants_chunk_usage=asked_for.chunk_usage,
    )


def _plan(
    asked_for: LoadSpec,
    drawn: Schedule | None,
    targets: Sequence[Target],
    api: str,
    scenarios: list[str],
    workload: Workload,
    trace: traces.Trace | None,
    dataset: datasets.Dataset | None,
) -> dict[str, Any]:
    """What was asked, for the report; header values stay out of it."""
    names = (
        "model", "rate", "arrivals", "burstiness", "burst_size", "peak", "concurrency", "in_flight", "think",
        "stagger", "duration", "requests", "warmup", "cooldown", "prefix_tokens", "prefix_groups", "turns",
        "turn_think", "live_replies", "batch", "stream", "exact", "seed", "workers", "drain", "timeout",
        "first_timeout", "speed",
    )  # fmt: skip
    plan: dict[str, Any] = {name: value for name in names if (value := getattr(asked_for, name)) is not None}
    if asked_for.api in spec.VECTOR_APIS:
        own = ("collection", "vector_dim", "vectors", "top_k", "distance", "points", "vector_index")
        plan |= {name: getattr(asked_for, name) for name in own}
    if plan.get("burstiness") == schedule.EVEN:
        plan["burstiness"] = "inf"
    if drawn is None:
        for name in ("arrivals", "speed"):
            plan.pop(name, None)
    return plan | {
        "loop": "open" if drawn is not None else "closed",
        "schedule": drawn.name if drawn is not None else f"closed loop of {asked_for.concurrency}",
        "planned_requests": len(drawn.times_ns) if drawn is not None else asked_for.requests,
        "api": api,
        "url": ", ".join(target.url for target in targets),
        "urls": [target.url for target in targets],
        "headers": sorted(name for name, _ in targets[0].headers),
        "parameters": dict(asked_for.parameters),
        "class_parameters": {name: dict(own) for name, own in asked_for.class_parameters.items()},
        "scenarios": list(scenarios),
        "prepared": len(workload.items),
        "is_cut_short": workload.is_cut_short,
        "prompts_counted_by": workload.counted_by,
        "trace": {"format": trace.format, "left_out": trace.left_out} if trace is not None else None,
        "dataset": {"name": dataset.name, "kind": dataset.kind, "rows": len(dataset.rows), "left_out": dataset.left_out}
        if dataset is not None
        else None,
    }  # fmt: skip


def shares_of(order: Order) -> list[Share]:
    """What each process does; the shares of all parts together are exactly the schedule.

    Raises: OSError where the host has no address.
    """
    asked_for, asked = order.spec, order.asked
    everywhere = asked_for.workers * order.parts
    method = order.style.method if order.style.api.name == "http" else "POST"
    endpoints = [
        Endpoint(*target.resolve(), target.host, target.tls(), target.opening(method), target.login)
        for target in order.targets
    ]
    until_ns = None if asked.until_s is None else int(asked.until_s * NS)
    window = (int(asked.warmup_s * NS), None if until_ns is None else until_ns - int(asked.cooldown_s * NS))
    concurrency, shares = asked_for.concurrency or 0, []
    in_flight = asked_for.in_flight or (OFFLINE_IN_FLIGHT if asked_for.is_offline else None)
    for number in range(order.part * asked_for.workers, (order.part + 1) * asked_for.workers):
        indices, times = range(0), array("q")
        slots, requests, limits = 0, None, order.limits
        if order.schedule is not None:
            indices, times = order.schedule.slice_of(number, everywhere)
            rate = order.schedule.asked_per_s or len(order.schedule.times_ns) * NS / max(order.schedule.span_ns, 1)
            connections = min(len(times), 64, int(rate / everywhere / 10) + 1)
            if asked_for.is_offline or asked_for.burst_size:
                connections = min(len(times), asked_for.burst_size or OFFLINE_IN_FLIGHT, OFFLINE_IN_FLIGHT)
            if in_flight is not None:
                limits = replace(limits, in_flight=max(1, _part(in_flight, number, everywhere)))
                connections = min(connections, limits.in_flight)
        else:
            slots = _part(concurrency, number, everywhere)
            requests = None if asked_for.requests is None else _part(asked_for.requests, number, everywhere)
            connections = slots
        shares.append(
            Share(
                order.style.api, endpoints, order.workload.items,
                chooser(order.spread, len(endpoints), seed=asked_for.seed, part=order.part, process=number),
                indices, times, slots,
                concurrency * number // everywhere, concurrency, requests, until_ns, asked_for.think,
                asked_for.turn_think, asked_for.stagger, window, connections, limits,
                order.tokenizer is not None or order.counter is not None or asked_for.live_replies,
                schedule.MAX_ARRIVALS // everywhere, order.counter if order.style.api.makes_tokens else None,
            )
        )  # fmt: skip
    return shares


def _part(whole: int, number: int, workers: int) -> int:
    """One of `workers` nearly equal parts."""
    return whole * (number + 1) // workers - whole * number // workers


def perform(
    order: Order,
    *,
    on_tick: Callable[[int, Tick], None] | None = None,
    on_start: Callable[[], None] | None = None,
) -> tuple[Report, Outcome]:
    """Runs it and reports. The caller's process has one thread. Raises: ValueError where points cannot be stored."""
    count = order.tokenizer.count if order.tokenizer is not None else None
    with filled(order.spec, order.targets[0]) as left:
        outcome = run(shares_of(order), count_tokens=count, on_tick=on_tick, on_start=on_start)
    outcome.said += left
    return report.build(order.asked, outcome), outcome
