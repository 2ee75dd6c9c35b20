"""A head's benchmarks in small, for tests of the command line: views that a test scripts, ticks, reports and files."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import msgspec
from aiohttp import web

from herder import types
from tests.doubles.api_double import NOW_MS, ApiDouble

BENCHMARK = "bench-3f9a1c7e20b4"
RECIPE = types.BenchmarkRecipeView(
    "smoke", "Half a minute of light load.", "benchmark/smoke.yaml", "ab" * 32,
    {"name": "smoke", "server": {"serve": {"model": "smollm2", "replicas": 2}},
     "load": {"rate": 2.0, "duration": 25.0}},
)  # fmt: skip


def point(number: int, status: types.PointState = "completed", **others: Any) -> types.PointView:
    """A point of a sweep of rates."""
    base = types.PointView(
        number=number,
        changes={"rate": 2 ** (number // 2)},
        repetition=number % 2,
        status=status,
        is_valid=status == "completed",
        reasons=(),
        coverage=1.0,
        skew_ms=0.1,
        figures={"req_s": 2.0 ** (number // 2), "output_tok_s": 120.0, "ttft_p50_ms": 24.6, "ttft_p99_ms": 1240.0,
                 "tpot_p50_ms": 9.9, "e2e_p99_ms": 2100.0, "error_rate": 0.0, "slo_attainment": 0.995}
        if status == "completed" else {},
    )  # fmt: skip
    return msgspec.structs.replace(base, **others)


def view(status: types.BenchmarkState, *points: types.PointView, **others: Any) -> types.BenchmarkView:
    """A benchmark."""
    done = sum(one.status in ("completed", "failed") for one in points)
    has_ended = status in ("completed", "failed", "cancelled")
    base = types.BenchmarkView(
        id=BENCHMARK,
        name="chat-sweep",
        status=status,
        actor="first-admin(key-1)",
        recipe_sha256="ab" * 32,
        model="smollm2",
        service="chat",
        points_done=done,
        points_planned=len(points),
        is_valid=all(one.is_valid for one in points),
        is_degraded=any(one.coverage < 1 for one in points),
        note="",
        created_ms=NOW_MS,
        started_ms=NOW_MS,
        ended_ms=NOW_MS + 60_000 if has_ended else None,
        load_nodes=("n1", "n2"),
        server_nodes=("gpu1",),
        points=points,
        verdict=_verdict(points) if status == "completed" else "",
    )
    return msgspec.structs.replace(base, **others)


def _verdict(points: Sequence[types.PointView]) -> types.Verdict:
    """As the head says it."""
    if all(one.is_valid for one in points):
        return "valid"
    return "degraded" if all(one.is_valid or one.reasons == ("degraded",) for one in points) else "invalid"


def tick(point_number: int, at_s: float, **others: Any) -> types.BenchmarkTick:
    """A second of it."""
    base = types.BenchmarkTick(
        benchmark=BENCHMARK, point=point_number, at_s=at_s, nodes=2, sent=10, done=9, failed=0, in_flight=12,
        tokens=800, ttft_p50_ms=24.6, ttft_p99_ms=101.0,
    )  # fmt: skip
    return msgspec.structs.replace(base, **others)


class BenchmarkHead(ApiDouble):
    """`views`: what is answered for the benchmark, one after the other, the last for ever."""

    def __init__(self) -> None:
        super().__init__()
        self.views: deque[types.BenchmarkView] = deque()
        self.others: dict[str, types.BenchmarkView] = {}
        self.refusals: dict[int, int] = {}
        """How many looks at the benchmark are refused as by a head that stops, when so many views are left."""
        self.ticks: list[types.BenchmarkTick] = []
        self.reports: dict[tuple[str, str], bytes] = {}
        """(point or "", format) -> content."""
        self.files: dict[str, bytes] = {}
        self.asked: list[dict[str, Any]] = []

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        path = request.rel_url.path.removeprefix("/api/v1").strip("/").split("/")
        if path[0] == "benchmark-recipes":
            found = [RECIPE] if len(path) == 1 else RECIPE
            return _json({"items": found, "next": None, "total": 1} if len(path) == 1 else found)
        if path[0] != "benchmarks":
            return await super()._answer(request)
        if len(path) == 3 and path[2] == "live":
            return await self._live(request)
        return self._benchmarks(request, path)

    def _benchmarks(self, request: web.Request, path: list[str]) -> web.Response:
        match (request.method, *path):
            case ("GET", "benchmarks"):
                return _json({"items": list(self.views), "next": None, "total": len(self.views)})
            case ("POST", "benchmarks"):
                self.asked.append(msgspec.json.decode(self.bodies[-1]))
                return _json(self.views[0], 202)
            case ("GET", "benchmarks", name) if name in self.others:
                return _json(self.others[name])
            case ("GET", "benchmarks", name) if name == BENCHMARK and self.refusals.get(len(self.views), 0):
                self.refusals[len(self.views)] -= 1
                return _json(types.ErrorAnswer(types.ErrorDetail("unavailable", "it is about to stop")), 503)
            case ("GET", "benchmarks", name) if name == BENCHMARK:
                return _json(self.views.popleft() if len(self.views) > 1 else self.views[0])
            case ("POST", "benchmarks", _, "cancel"):
                return _json(view("cancelled"), 202)
            case ("DELETE", "benchmarks", name):
                return _json(types.Deleted("benchmark", name, True))
            case ("GET", "benchmarks", _, "report"):
                key = (request.query.get("point", ""), request.query.get("format", "json"))
                if key in self.reports:
                    return web.Response(body=self.reports[key])
            case ("GET", "benchmarks", _, "files"):
                return _json([types.BenchmarkFile(name, len(data)) for name, data in self.files.items()])
            case ("GET", "benchmarks", _, "files", *rest) if "/".join(rest) in self.files:
                return web.Response(body=self.files["/".join(rest)])
        missing = types.ErrorAnswer(types.ErrorDetail("not_found", f"there is nothing at {'/'.join(path)}"))
        return _json(missing, 404)

    async def _live(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for one in self.ticks:
            await response.write(b"event: tick\ndata: %s\n\n" % msgspec.json.encode(one))
        await response.write(b"event: end\ndata: {}\n\n")
        return response


def _json(value: Any, status: int = 200) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), status=status, content_type="application/json")
