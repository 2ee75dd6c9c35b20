"""The process that sends an executor's load: it gets its order on stdin, says what happens on stdout, one JSON a line.

    {"kind": "armed", ...}        everything is written and connected; the load begins
    {"kind": "tick", ...}         once a second
    {"kind": "done", ...}         the figures
    {"kind": "refused", "said"}   the order cannot be done

`stop` on stdin, or its end, stops sending; answers that are on their way are awaited for a moment. What plugins print
goes to stderr.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import select
import signal
import sys
import threading
import time
from array import array
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from agent.loadgen.engine import NS, Tick
from agent.loadgen.order import Order, order_of, shares_of
from agent.loadgen.run import LEAD_NS, Crew
from agent.runs.runner import guard_lookups
from agent.suite import workload
from agent.suite.errors import SuiteError
from agent.suite.executors import BaseWorkloadExecutor
from agent.suite.figures import Figures, of_report
from agent.suite.registry import load_plugins
from common.bench import outcome as outcome_file
from common.bench import report
from common.bench.histogram import bucket_of
from common.bench.outcome import Asked
from common.errors import AddressRefused

STOP_GRACE_S = 5.0
MAX_ORDER = 4 << 20


class Line:
    """The way to the executor."""

    def __init__(self) -> None:
        self._out = os.dup(1)
        os.dup2(2, 1)
        self._lock = threading.Lock()
        self._buffer = b""
        self.is_stopped = False

    def order(self) -> dict[str, Any]:
        """The first line."""
        while b"\n" not in self._buffer:
            data = os.read(0, 1 << 16)
            if not data or len(self._buffer) > MAX_ORDER:
                raise ValueError("no order came")
            self._buffer += data
        first, _, self._buffer = self._buffer.partition(b"\n")
        found = json.loads(first)
        assert isinstance(found, dict)
        return found

    def say(self, kind: str, **said: Any) -> None:
        """One message."""
        data = msgspec.json.encode({"kind": kind} | said) + b"\n"
        with self._lock:
            view = memoryview(data)
            while view:
                view = view[os.write(self._out, view) :]

    def wants_stop(self) -> bool:
        """Whether the executor has said to stop, or has gone."""
        while not self.is_stopped and select.select([0], [], [], 0)[0]:
            data = os.read(0, 1 << 16)
            self._buffer += data
            if not data or b"stop" in self._buffer:
                self.is_stopped = True
        return self.is_stopped

    def on_signal(self, number: int, frame: Any) -> None:
        """SIGTERM is a stop."""
        self.is_stopped = True


def main() -> int:
    """One order."""
    line = Line()
    signal.signal(signal.SIGTERM, line.on_signal)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        order = line.order()
        load_plugins(order["plugins"])
        executor = executor_of(order["executor"])
        plan = workload.plan_of(order["config"])
        if executor.has_threads:
            Threads(line, executor, order["config"], plan).run()
        else:
            _load(line, executor, order, plan)
    except AddressRefused as error:
        line.say("refused", said=error.message)
        return 1
    except (ValueError, TypeError, OverflowError, OSError, SuiteError, msgspec.ValidationError) as error:
        line.say("refused", said=str(error) or type(error).__name__)
        return 1
    return 0


def executor_of(reference: str) -> BaseWorkloadExecutor:
    """The executor that `BaseWorkloadExecutor.reference` names. Raises: ValueError."""
    place, _, name = reference.rpartition(":")
    if place.endswith(".py"):
        spec = importlib.util.spec_from_file_location("herder_suite_program", place)
        if spec is None or spec.loader is None:
            raise ValueError(f"{place} cannot be imported")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(place)
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part)
    made = found(0)
    if not isinstance(made, BaseWorkloadExecutor):
        raise ValueError(f"{reference} is no BaseWorkloadExecutor")
    return made


def _load(line: Line, executor: BaseWorkloadExecutor, order: dict[str, Any], plan: workload.Plan) -> None:
    """The load generator's run."""
    roots = [Path(root) for root in order["file_roots"]]
    spec = workload.spec_of(order["config"], plan, executor.style, roots)
    guard_lookups()
    aim = workload.aim_of(plan, order["headers"], order.get("ca_file"))
    made = order_of(spec, aim, part=plan.part, parts=plan.parts)
    count = made.tokenizer.count if made.tokenizer is not None else None

    def on_tick(worker: int, tick: Tick) -> None:
        line.say("tick", worker=worker, **{name: getattr(tick, name) for name in Tick.__slots__ if name != "ttft_ns"})

    crew = Crew(shares_of(made), count_tokens=count, on_tick=on_tick)
    try:
        crew.arm()
        crew.start(time.monotonic_ns() + LEAD_NS)
        line.say(
            "armed", start_wall_s=crew.outcome.start_wall_s, digest=made.digest, prepared=len(made.workload.items),
            schedule=made.asked.plan["schedule"],
        )  # fmt: skip
        cancel_at = float("inf")
        stops = 0

        def on_turn() -> None:
            nonlocal cancel_at, stops
            now = time.monotonic()
            if stops == 0 and line.wants_stop():
                crew.stop()
                stops, cancel_at = 1, now + STOP_GRACE_S
            elif now > cancel_at:
                crew.stop()
                stops, cancel_at = stops + 1, now + STOP_GRACE_S

        outcome = crew.finish(on_turn)
    finally:
        crew.close()
    built = report.build(_own_part(made), outcome)
    notes = []
    if order.get("result"):
        try:
            Path(order["result"]).write_bytes(outcome_file.encode(made.asked, outcome))
        except OSError as error:
            Path(order["result"]).unlink(missing_ok=True)
            notes = [f"single requests could not be kept: {error.strerror or error}"]
    plain = msgspec.to_builtins(built)
    for left_out in ("histograms", "formulas", "rules"):
        plain_left = plain.pop(left_out)
        if left_out == "histograms":
            figures = of_report(plain | {"histograms": plain_left}, plan.slots or made.spec.workers)
    line.say("done", figures=figures.to_wire(), report=plain, notes=notes, start_wall_s=outcome.start_wall_s)


def _own_part(order: Order) -> Asked:
    """What was asked of this executor alone, by which its own report is judged."""
    if order.schedule is None or order.parts == 1:
        return order.asked
    workers = range(order.part * order.spec.workers, (order.part + 1) * order.spec.workers)
    everywhere = order.parts * order.spec.workers
    due = sorted(at for number in workers for at in order.schedule.slice_of(number, everywhere)[1])
    return replace(order.asked, due_ns=array("q", due))


class Threads:
    """A run of an executor that has its own threads."""

    def __init__(self, line: Line, executor: BaseWorkloadExecutor, config: dict[str, Any], plan: workload.Plan) -> None:
        self.line, self.executor, self.plan = line, executor, plan
        # Names that the toolkit's own executors read.
        self.config = config | {"server_endpoints": list(plan.urls)}
        self.figures = Figures(threads=plan.slots)
        self._told: dict[int, int] = {}
        self._told_counts = [0, 0]

    def run(self) -> None:
        """Warm-up, the measured run, the figures."""
        line, plan, executor = self.line, self.plan, self.executor
        if not plan.slots:
            raise ValueError("target_rps is for services of the load generator: this one has threads of its own")
        executor._prepare_shared_resources(self.config)
        started = time.time()
        line.say("armed", start_wall_s=started, digest="", prepared=0, schedule=f"{plan.slots} threads")
        if plan.warmup_s:
            self._phase(self.config | {"duration": f"{max(1, round(plan.warmup_s))}s"}, plan.warmup_s, is_told=False)
        begun = time.monotonic()
        said = [] if line.wants_stop() else self._phase(self.config, plan.duration_s, is_told=True)
        self.figures.window_s = max(time.monotonic() - begun, 1e-9)
        notes = self._add_rest(said)
        line.say("done", figures=self.figures.to_wire(), report=None, notes=notes, start_wall_s=started)

    def _phase(self, config: dict[str, Any], length_s: float, *, is_told: bool) -> list[dict[str, Any]]:
        """Runs the threads to their end; what they returned, a failed one with `error`."""
        executor = self.executor
        executor.per_thread_metrics, executor.recorded, executor.recorded_errors = {}, [], 0
        executor.workload_running = True
        said: list[dict[str, Any]] = []

        def work(number: int) -> None:
            try:
                said.append(executor._run_benchmark(config, number) or {"thread_id": number})
            except Exception as error:  # noqa: BLE001  # the border of somebody's thread: it is told
                said.append({"thread_id": number, "error": f"{type(error).__name__}: {error}"})

        threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(self.plan.slots)]
        for thread in threads:
            thread.start()
        ends = time.monotonic() + length_s + workload.DRAIN_S
        stop_at = float("inf")
        begun = time.monotonic()
        while any(thread.is_alive() for thread in threads):
            next(thread for thread in threads if thread.is_alive()).join(1.0)
            if is_told:
                self._tell(time.monotonic() - begun)
            if self.line.wants_stop() and executor.workload_running:
                executor.workload_running, stop_at = False, time.monotonic() + STOP_GRACE_S
            if time.monotonic() > min(ends, stop_at):
                break
        executor.workload_running = False
        for thread in threads:
            if thread.is_alive():
                said.append({"error": "a thread did not end in time", "thread_id": thread.name})
        return said

    def _tell(self, at_s: float) -> None:
        """What was counted since the last time."""
        executor, buckets, total = self.executor, dict[int, int](), 0
        with executor.metrics_lock:
            fresh = executor.recorded[self._told.get(-1, 0) :]
            self._told[-1] = len(executor.recorded)
            for number, counted in list(executor.per_thread_metrics.items()):
                latencies = list(counted.get("latencies") or ())
                fresh += latencies[self._told.get(number, 0) :]
                self._told[number] = len(latencies)
            errors = executor.recorded_errors + sum(
                int(counted.get("errors") or 0) for counted in executor.per_thread_metrics.values()
            )
        for seconds in fresh:
            took = int(seconds * NS)
            bucket = bucket_of(took)
            buckets[bucket] = buckets.get(bucket, 0) + 1
            total += took
            self.figures.latency.add(took)
        failed = max(0, errors - self._told_counts[1])
        self._told_counts = [self._told_counts[0] + len(fresh), max(errors, self._told_counts[1])]
        self.figures.requests, self.figures.errors = sum(self._told_counts), self._told_counts[1]
        self.line.say(
            "tick", worker=0, at_s=at_s + self.plan.warmup_s, measured=len(fresh) + failed, measured_failed=failed,
            e2e=buckets, e2e_sum_ns=total, in_flight=self.plan.slots,
        )  # fmt: skip

    def _add_rest(self, said: list[dict[str, Any]]) -> list[str]:
        """What threads only told at their end; sentences about what is missing."""
        figures, notes = self.figures, []
        good = errors = 0
        listed: list[float] = []
        for one in said:
            if "error" in one:
                figures.thread_errors.append(str(one["error"])[:300])
                continue
            good += int(one.get("total_requests") or 0)
            errors += int(one.get("errors") or 0)
            listed += [float(value) for value in one.get("latencies") or ()]
        if good + errors > figures.requests or (listed and not figures.latency.count):
            figures.requests, figures.errors = good + errors, errors
            if listed:
                figures.latency = Figures().latency
                figures.latency.add_all([int(value * NS) for value in listed])
        if figures.requests - figures.errors > figures.latency.count:
            notes.append("the service's threads told no latency for some requests: percentiles leave those out")
        return notes


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)  # threads of others may never end
