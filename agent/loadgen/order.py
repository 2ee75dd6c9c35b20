"""From what a person asked to a run: everything checked and prepared, then performed, then reported."""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent.loadgen import datasets, report, scenario, schedule, traces
from agent.loadgen.engine import NS, Limits, Share, Tick
from agent.loadgen.metrics import Limit
from agent.loadgen.report import Asked, Report
from agent.loadgen.run import Outcome, run
from agent.loadgen.schedule import Schedule
from agent.loadgen.target import Target, parse_url
from agent.loadgen.words import Tokenizer, Words
from agent.loadgen.workload import Style, Workload, api_for, prepare

CLOSED_PREPARED = 2_000  # conversations prepared for a closed loop whose number is not known
MAX_WORKERS = 256
MAX_SLOTS = 100_000
MAX_BODY = 64 << 20
SLO_METRICS = ("ttft", "tpot", "e2e")
_STEP = re.compile(r"(\d+(?:\.\d+)?)x(\d+(?:\.\d+)?)(ms|s|m|h)?")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, None: 1.0}


@dataclass(frozen=True, slots=True)
class Order:
    """A run that can be performed."""

    asked: Asked
    target: Target
    style: Style
    workload: Workload
    schedule: Schedule | None
    given: Mapping[str, Any]
    limits: Limits
    tokenizer: Tokenizer | None

    @property
    def total_s(self) -> float | None:
        """How long it sends; None where only the number of requests is known."""
        return self.asked.until_s


def order_of(given: Mapping[str, Any]) -> Order:
    """Checks everything and prepares every request. Raises: ValueError that says what to change; OSError."""
    is_open = given["concurrency"] is None
    _check_load(given, is_open)
    trace = traces.read(Path(given["trace"])) if given["trace"] else None
    texts = given["scenarios"] or (("dataset",) if given["dataset"] else ("D(100,50)",))
    plain = given["api"] == "http" or trace is not None
    scenarios = [scenario.parse(text) for text in texts] if not plain or given["scenarios"] else []
    api = api_for(scenarios, given["api"])
    headers = [_header(text) for text in given["headers"]]
    target = parse_url(
        given["target"], api, path=given["path"], headers=headers, is_unverified=given["insecure"],
        ca_file=given["ca_file"],
    )  # fmt: skip
    until_s = None
    if given["duration"] is not None:
        until_s = given["warmup"] + given["duration"] + given["cooldown"]
    drawn = _schedule(given, trace, until_s) if is_open else None
    if drawn is not None and not len(drawn.times_ns):
        raise ValueError("no request falls into this time; a longer --duration or a higher --rate")
    style = _style(given, api)
    tokenizer = Tokenizer(Path(given["tokenizer"])) if given["tokenizer"] else None
    dataset = datasets.read(given["dataset"]) if given["dataset"] else None
    lines = [row.turns[0][0] for row in dataset.rows[:20_000]] if dataset is not None else []
    workload = prepare(
        scenarios,
        style,
        target,
        Words(lines, tokenizer),
        count=len(drawn.times_ns) if drawn is not None else given["requests"] or CLOSED_PREPARED,
        seed=given["seed"],
        dataset=dataset,
        trace=trace.arrivals if trace is not None else None,
    )
    asked = Asked(
        _plan(given, drawn, target, api.name, [made.text for made in scenarios], workload, trace, dataset),
        is_open,
        given["warmup"],
        until_s,
        given["cooldown"],
        drawn.times_ns if drawn is not None else (),
        [_limit(text) for text in given["slos"]],
        workload,
        style.is_exact and api.makes_tokens,
    )
    limits = Limits(first_s=given["first_timeout"], total_s=given["timeout"], drain_s=given["drain"])
    return Order(asked, target, style, workload, drawn, given, limits, tokenizer)


def _check_load(given: Mapping[str, Any], is_open: bool) -> None:
    is_trace = given["arrivals"] == "trace" or given["trace"] is not None
    if not is_open and (given["rate"] is not None or is_trace or given["steps"]):
        raise ValueError("--concurrency is a closed loop, --rate, --step and --trace an open one; take one")
    if is_open and given["rate"] is None and not is_trace and not given["steps"]:
        raise ValueError("say how much load: --rate R (open loop) or --concurrency C (closed loop)")
    if given["duration"] is None and given["requests"] is None and not is_trace:
        raise ValueError("say how long: --duration or --requests")
    if given["arrivals"] == "trace" and not given["trace"]:
        raise ValueError("--arrivals trace needs --trace FILE")
    if is_open and (given["think"] or given["stagger"]):
        raise ValueError("--think and --stagger belong to the closed loop (--concurrency)")
    bounds = {"concurrency": MAX_SLOTS, "requests": schedule.MAX_ARRIVALS, "workers": MAX_WORKERS, "turns": 1000,
              "batch": 10_000, "prefix_groups": 100_000}  # fmt: skip
    for name, most in bounds.items():
        if given[name] is not None and not 1 <= given[name] <= most:
            raise ValueError(f"--{name.replace('_', '-')} is 1 to {most:,}")
    if given["concurrency"] is not None and given["workers"] > given["concurrency"]:
        raise ValueError("more --workers than --concurrency")
    if not given["model"] and given["api"] != "http":
        raise ValueError("--model is missing")


def _schedule(given: Mapping[str, Any], trace: traces.Trace | None, until_s: float | None) -> Schedule:
    """The schedule that the options describe."""
    if trace is not None:
        times = [arrival.at_s for arrival in trace.arrivals[: given["requests"]]]
        name = f"{trace.format} trace {Path(given['trace']).name} at {given['speed']:g} times its speed"
        return schedule.from_times(times, speed=given["speed"], name=name, limit_s=until_s)
    profile, kind = _profile(given, until_s), given["arrivals"]
    burstiness = given["burstiness"]
    if burstiness is None:
        if kind == "gamma":
            raise ValueError("--arrivals gamma needs --burstiness")
        burstiness = schedule.EVEN if kind == "constant" else 1.0
    elif kind in ("poisson", "constant"):
        raise ValueError(f"--burstiness is for --arrivals gamma and the rates that change, not {kind}")
    return schedule.draw(
        profile, burstiness=burstiness, seed=given["seed"], duration_s=until_s, requests=given["requests"]
    )


def _profile(given: Mapping[str, Any], until_s: float | None) -> schedule.Profile:
    kind, rate, peak = given["arrivals"], given["rate"], given["peak"]
    if given["steps"] or kind == "steps":
        if not given["steps"]:
            raise ValueError("--arrivals steps needs --step RATExTIME, several times")
        return schedule.Steps(tuple(_step(text) for text in given["steps"]))
    if kind in ("ramp", "spike", "sine"):
        if peak is None or until_s is None:
            raise ValueError(f"--arrivals {kind} needs --peak and --duration")
        if kind == "ramp":
            return schedule.Ramp(rate, peak, until_s)
        if kind == "spike":
            at_s = given["peak_at"] if given["peak_at"] is not None else until_s / 3
            return schedule.spike(rate, peak, at_s, given["peak_for"] or until_s / 6)
        return schedule.Sine(rate, peak - rate, given["period"] or until_s)
    if peak is not None:
        raise ValueError("--peak is for --arrivals ramp, spike and sine")
    return schedule.Flat(rate)


def _step(text: str) -> tuple[float, float]:
    found = _STEP.fullmatch(text)
    if found is None:
        raise ValueError(f"{text!r} is not a step; write 10x30s")
    return float(found[1]), float(found[2]) * _SECONDS[found[3]]


def _header(text: str) -> tuple[str, str]:
    name, colon, value = text.partition(":")
    if not colon:
        raise ValueError(f"a header is written 'Name: value', not {name[:20]!r}")
    return name.strip(), value.strip()


def _limit(text: str) -> Limit:
    name, _, value = text.partition(":")
    if name not in SLO_METRICS or not re.fullmatch(r"\d+(\.\d+)?", value):
        raise ValueError(f"{text!r} is not a limit; write ttft:500, tpot:50 or e2e:10000 (milliseconds)")
    return Limit(name, float(value))


def _style(given: Mapping[str, Any], api: Any) -> Style:
    body = b""
    if given["body"]:
        with Path(given["body"]).open("rb") as file:
            body = file.read(MAX_BODY + 1)
        if len(body) > MAX_BODY:
            raise ValueError("--body is larger than 64 MiB")
    if not re.fullmatch(r"[A-Z]{1,20}", given["method"]) or given["method"] in ("HEAD", "CONNECT"):
        raise ValueError(f"--method {given['method']!r}: GET, POST, PUT, PATCH, DELETE or OPTIONS")
    return Style(
        api,
        given["model"],
        is_streaming=given["stream"],
        is_exact=given["exact"],
        parameters=dict(given["parameters"]),
        batch=given["batch"],
        prefix_tokens=max(0, given["prefix_tokens"]),
        prefix_groups=given["prefix_groups"],
        turns=given["turns"],
        method=given["method"],
        body=body,
        wants_chunk_usage=given["chunk_usage"],
    )


def _plan(
    given: Mapping[str, Any],
    drawn: Schedule | None,
    target: Target,
    api: str,
    scenarios: Sequence[str],
    workload: Workload,
    trace: traces.Trace | None,
    dataset: datasets.Dataset | None,
) -> dict[str, Any]:
    """What was asked, for the report; header values stay out of it."""
    names = ("model", "rate", "arrivals", "burstiness", "peak", "concurrency", "think", "stagger", "duration",
             "requests",
             "warmup", "cooldown", "prefix_tokens", "prefix_groups", "turns", "turn_think", "batch", "stream", "exact",
             "seed", "workers", "drain", "timeout", "first_timeout", "speed")  # fmt: skip
    plan = {name: given[name] for name in names if given[name] is not None}
    if plan.get("burstiness") == schedule.EVEN:
        plan["burstiness"] = "inf"
    if drawn is None:
        for name in ("arrivals", "speed"):
            plan.pop(name, None)
    return plan | {
        "loop": "open" if drawn is not None else "closed",
        "schedule": drawn.name if drawn is not None else f"closed loop of {given['concurrency']}",
        "planned_requests": len(drawn.times_ns) if drawn is not None else given["requests"],
        "api": api,
        "url": f"{'https' if target.is_tls else 'http'}://{target.host}:{target.port}{target.path}",
        "headers": sorted(name for name, _ in target.headers),
        "parameters": dict(given["parameters"]),
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
    """What each process does; together exactly the schedule. Raises: OSError where the host has no address."""
    given, asked, workers = order.given, order.asked, order.given["workers"]
    family, address = order.target.resolve()
    tls = order.target.tls()
    until_ns = None if asked.until_s is None else int(asked.until_s * NS)
    window = (int(asked.warmup_s * NS), None if until_ns is None else until_ns - int(asked.cooldown_s * NS))
    shares, slots_before = [], 0
    for number in range(workers):
        indices, times = range(0), array("q")
        slots, requests = 0, None
        if order.schedule is not None:
            indices, times = order.schedule.slice_of(number, workers)
            rate = order.schedule.asked_per_s or len(order.schedule.times_ns) * NS / max(order.schedule.span_ns, 1)
            connections = min(len(times), 64, int(rate / workers / 10) + 1)
        else:
            slots = _part(given["concurrency"], number, workers)
            requests = None if given["requests"] is None else _part(given["requests"], number, workers)
            connections = slots
        shares.append(
            Share(
                order.style.api, family, address, order.target.host, tls, order.workload.items, indices, times, slots,
                slots_before, given["concurrency"] or 0, requests, until_ns, given["think"], given["turn_think"],
                given["stagger"], window, connections, order.limits, given["seed"] + number,
                order.tokenizer is not None,
            )
        )  # fmt: skip
        slots_before += slots
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
    """Runs it and reports. The caller's process has one thread."""
    count = order.tokenizer.count if order.tokenizer is not None else None
    outcome = run(shares_of(order), count_tokens=count, on_tick=on_tick, on_start=on_start)
    return report.build(order.asked, outcome), outcome
