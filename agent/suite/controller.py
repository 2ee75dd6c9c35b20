"""The orchestrator's side of the executors: asks them all at once, bounds every wait, merges what they measured.

An executor that does not answer is never taken for one that runs: after `lost_after` seconds it is lost, and what the
others measured is told with the exact share that it covers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

from agent.suite import figures as forms
from agent.suite import times, tokens
from agent.suite.asking import ask, ask_json, at_once, reason
from agent.suite.errors import SuiteError
from agent.suite.figures import Figures
from agent.suite.workload import DRAIN_S
from herder.errors import HerderError

START_S = 180.0
LOST_AFTER_S = 20.0
MARGIN_S = 60.0
POLL_S = 1.0
TOKEN_S = 15.0
GONE_S = 3.0


class BaseWorkloadController:
    """Executors of one service."""

    def __init__(
        self, client_nodes: Sequence[str], port: int = 5000, timeout: float = 600, health_timeout: float | None = None
    ) -> None:
        """client_nodes: host names, or host:port where one differs."""
        self.client_nodes = list(client_nodes)
        self.port = port
        self.timeout = timeout
        self.health_timeout = min(float(timeout), 120.0) if health_timeout is None else float(health_timeout)
        self.request_timeout = min(float(timeout), 30.0)
        self.lost_after = LOST_AFTER_S
        self.service = ""
        self.problems: list[str] = []
        self.token: str | None = self._found_token()
        self.lost: dict[str, str] = {}
        """Clients that are given up, with the reason."""
        self._token_until = 0.0
        self._sent: set[str] = set()
        """Clients that may work for this controller: asked to start, and not known to have refused."""
        self._started: dict[str, float] = {}
        self._seen: dict[str, dict[str, Any]] = {}

    @staticmethod
    def _found_token() -> str | None:
        path = tokens.path_of()
        try:
            return tokens.read(path) if path.exists() else None
        except HerderError as error:
            raise SuiteError("E002", error.message, hint=error.hint or "") from None

    def get_service_name(self) -> str:
        """The service."""
        return self.service or type(self).__name__.replace("WorkloadController", "").lower()

    def url(self, node: str, path: str) -> str:
        """Of one executor."""
        place = node if ":" in node and not node.endswith("]") else f"{node}:{self.port}"
        return f"http://{place}{path}"

    def verify_client_health(self) -> bool:
        """Whether all executors answer in time, for this service, and take the token."""
        deadline = time.monotonic() + self.health_timeout
        self._token_until = time.monotonic() + TOKEN_S

        def until(node: str) -> str:
            while True:
                said, is_final = self._health(node)
                if not said or is_final or time.monotonic() + 0.5 > deadline:
                    return said and f"{node}: {said}"
                time.sleep(0.5)

        self.problems = [said for said in self._each(until) if said]
        return not self.problems

    def _health(self, node: str) -> tuple[str, bool]:
        """(what is wrong, whether waiting cannot mend it)."""
        try:
            status, found = ask_json("GET", self.url(node, "/health"), timeout_s=5.0)
            if status != 200:
                return f"/health answers {status}", False
            other = found.get("service")
            if self.service and other and other != self.service:
                return f"its executor is for {other}, not {self.service}", True
            # An executor that has just begun has just made the token, in a folder that may come over the network.
            self.token = self.token or self._found_token()
            status, _ = ask("GET", self.url(node, "/metrics"), token=self.token, timeout_s=5.0)
        except OSError as error:
            return f"{reason(error)} at port {self.port}; executors listen on loopback unless --host says more", False
        if status == 401:
            is_wrong = self.token is not None
            said = f"the executor's token is {'wrong' if is_wrong else 'missing'}: copy its file to {tokens.path_of()}"
            return said, is_wrong or time.monotonic() > self._token_until
        return "", False

    def start_workload(
        self, workload_config: dict[str, Any], targets: Mapping[str, Sequence[str]] | None = None
    ) -> bool:
        """Starts it on all executors, each with its part. targets: other server_endpoints for some of them.

        When one refuses, those that have begun are stopped; one that works for somebody else goes on.
        """
        self.lost, self._started, self._seen = {}, {}, {}
        self._sent = set()
        parts = len(self.client_nodes)

        def start(node: str) -> str:
            config = dict(workload_config)
            config.setdefault("parts", parts)
            config.setdefault("part", self.client_nodes.index(node))
            if targets and node in targets:
                config["server_endpoints"] = list(targets[node])
            self._sent.add(node)
            try:
                status, said = ask_json(
                    "POST", self.url(node, "/start"), body=config, token=self.token, timeout_s=START_S
                )
            except OSError as error:
                return f"{node}: {reason(error)}"
            if status != 200 or not (said.get("success") or said.get("status") == "started"):
                self._sent.discard(node)
                return f"{node}: {said.get('error') or f'answers {status}'}"
            if said.get("start_wall_s") is not None:
                self._started[node] = float(said["start_wall_s"])
            return ""

        self.problems = [said for said in self._each(start) if said]
        if self.problems:
            self.stop_own()
        return not self.problems

    def fetch_metrics(self) -> dict[str, Any]:
        """What each executor says now, by node; one that does not answer has `error` and is not running."""
        found = self._each(self._fetch)
        return dict(zip(self.client_nodes, found, strict=True))

    def _fetch(self, node: str) -> dict[str, Any]:
        try:
            status, said = ask_json(
                "GET", self.url(node, "/metrics"), token=self.token, timeout_s=min(self.request_timeout, 10.0)
            )
        except OSError as error:
            is_gone = isinstance(error, ConnectionRefusedError)
            return {"error": reason(error), "running": False, "is_reachable": False, "is_gone": is_gone}
        if status != 200:
            return {"error": f"answers {status}: {said.get('error')}", "running": False, "is_reachable": False}
        return said | {"is_reachable": True}

    def wait(
        self,
        workload_config: Mapping[str, Any],
        *,
        on_poll: Callable[[dict[str, Any]], None] | None = None,
        is_stopped: Callable[[], bool] | None = None,
    ) -> dict[str, Any]:
        """Polls until every executor is over or lost; the metrics of each. Never longer than the workload can take."""
        whole = times.seconds(workload_config.get("warmup") or 0) + times.seconds(workload_config.get("duration") or 0)
        deadline = time.monotonic() + whole + DRAIN_S + MARGIN_S
        last_heard = dict.fromkeys(self.client_nodes, time.monotonic())
        while True:
            found = self.fetch_metrics()
            now = time.monotonic()
            for node, said in found.items():
                self._judge(node, said, now, last_heard)
            if on_poll is not None:
                on_poll(found)
            over = [node for node, said in found.items() if node in self.lost or self._is_over(said)]
            if len(over) == len(found) or (is_stopped is not None and is_stopped()):
                return found
            if now > deadline:
                for node in set(found) - set(over):
                    self.lost[node] = f"E007: still running {DRAIN_S + MARGIN_S:g} s after its end"
                self._stop(sorted(set(found) - set(over)))
                return found
            time.sleep(POLL_S)

    @staticmethod
    def _is_over(said: Mapping[str, Any]) -> bool:
        return bool(said.get("is_reachable")) and not said.get("running")

    def _judge(self, node: str, said: dict[str, Any], now: float, last_heard: dict[str, float]) -> None:
        """Keeps what was heard; gives up a client that is silent too long, or that has forgotten its workload."""
        if node in self.lost:
            return
        if not said.get("is_reachable"):
            # Where nobody listens any longer the process has gone; a machine that is only slow gets more time.
            patience = min(GONE_S, self.lost_after) if said.get("is_gone") else self.lost_after
            if now - last_heard[node] > patience:
                self.lost[node] = f"E008: no answer for {now - last_heard[node]:.0f} s ({said.get('error')})"
            return
        last_heard[node] = now
        started, begun = said.get("start_wall_s"), self._started.get(node)
        is_other = started is not None and begun is not None and abs(started - begun) > 1e-3
        if said.get("phase") == "idle" or is_other:
            self.lost[node] = "its executor was started anew"
        elif not said.get("running") and said.get("error"):
            self.lost[node] = str(said["error"])
        elif said.get("phase") == "failed":
            self.lost[node] = "its load generator failed"
        else:
            self._seen[node] = said

    def get_metrics(self) -> dict[str, Any]:
        """All executors together, under the toolkit's names, with `per_client`."""
        return self.aggregated(self.fetch_metrics())

    def aggregated(self, found: Mapping[str, Any]) -> dict[str, Any]:
        """The metrics of all: histograms merged, counts added, lost clients told and never made up for."""
        good: dict[str, Figures] = {}
        lost = dict(self.lost)
        for node, said in found.items():
            if node in lost:
                continue
            try:
                good[node] = Figures.from_wire(said["figures"])
            except (KeyError, TypeError, ValueError):
                if said.get("error") or not said.get("is_reachable", True):
                    lost[node] = str(said.get("error") or "no answer")
        whole = forms.merged(good.values())
        elapsed = whole.window_s
        latency = forms.in_seconds(whole.latency)
        coverage = Fraction(len(good), max(1, len(found)))
        starts = [said["start_wall_s"] for node, said in found.items() if node in good and said.get("start_wall_s")]
        made: dict[str, Any] = {
            "total_requests": whole.requests,
            "total_errors": whole.errors,
        }
        made |= {f"{name}_latency": value for name, value in latency.items()}
        made |= forms.nested(whole, elapsed_s=elapsed)
        return made | {
            "clients": len(found),
            "clients_lost": [
                {"node": node, "reason": why, "last_seen": _seen(self._seen.get(node))}
                for node, why in sorted(lost.items())
            ],
            "coverage": f"{coverage.numerator}/{coverage.denominator}",
            "coverage_share": float(coverage),
            "is_degraded": coverage < 1,
            "is_valid": bool(good)
            and coverage == 1
            and all(found[node].get("is_valid") is not False and not found[node].get("is_stopped") for node in good),
            "reasons": [{"node": node} | finding for node in good for finding in found[node].get("reasons") or ()],
            "notes": [f"{node}: {note}" for node in good for note in found[node].get("notes") or ()],
            "start_skew_seconds": max(starts) - min(starts) if starts else None,
            "per_client": [_client(node, good[node], found[node]) for node in good],
            "figures": whole.to_wire(),
        }

    def fetch_result(self, node: str) -> bytes | None:
        """Every request of one executor's last run, as its file; None where it has none."""
        try:
            status, data = ask("GET", self.url(node, "/result"), token=self.token, timeout_s=self.request_timeout)
        except OSError:
            return None
        return data if status == 200 else None

    def terminate_workload(self) -> bool:
        """Stops it on all executors that can be reached, whoever started it."""
        return self._stop(self.client_nodes)

    def stop_own(self) -> bool:
        """Stops what this controller has started, and leaves alone executors that work for somebody else."""
        return self._stop([node for node in self.client_nodes if node in self._sent])

    def _stop(self, nodes: Sequence[str]) -> bool:
        def stop(node: str) -> str:
            try:
                status, said = ask_json("POST", self.url(node, "/stop"), token=self.token, timeout_s=20.0)
            except OSError as error:
                return f"{node}: {reason(error)}"
            return "" if status == 200 and said.get("success", True) else f"{node}: {said.get('error') or status}"

        said = [one for one in at_once(stop, [node for node in nodes if node not in self.lost]) if one]
        self.problems += said
        return not said

    def stop_workload(self) -> bool:
        """The same under the document's name."""
        return self.terminate_workload()

    def _each(self, work: Callable[[str], Any]) -> list[Any]:
        return at_once(work, self.client_nodes)


def _client(node: str, one: Figures, said: Mapping[str, Any]) -> dict[str, Any]:
    latency = forms.in_seconds(one.latency)
    return {
        "node": node,
        "requests": one.requests,
        "errors": one.errors,
        **{f"{name}_latency": value for name, value in latency.items()},
        "throughput_rps": one.throughput_rps,
        "threads": one.threads,
        "is_valid": said.get("is_valid"),
    }


def _seen(said: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What a lost client had told last."""
    if said is None:
        return None
    return {name: said.get(name) for name in ("requests_total", "errors_total", "elapsed_seconds", "phase")}


class OllamaWorkloadController(BaseWorkloadController):
    """Ollama's executors."""


class VllmWorkloadController(BaseWorkloadController):
    """vLLM's executors."""


class DummyWorkloadController(BaseWorkloadController):
    """The dummy's executors."""
