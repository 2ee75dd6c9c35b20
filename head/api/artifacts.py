"""PUT /agent/runs/{run}/artifacts/{artifact}: what a benchmark's runs send, taken from the agents of their nodes."""

from __future__ import annotations

from aiohttp import web

from common import limits
from common.errors import Conflict, Forbidden, NotFound, Unavailable
from head.api import bodies
from head.api.benchmarks import TAG, performer_of
from head.api.call import Call
from head.api.routes import PREFIX, Route
from head.bench.uploads import announced
from head.core.events import ArtifactStored
from head.core.objects import Run
from head.core.state import State
from herder import types as api

NOTED_S = limits.SUBMIT_S


async def put(call: Call) -> web.StreamResponse:
    """Streams it to the disk, has it noted, and only then says that it is there. A repeat is taken again."""
    performer, name = performer_of(call), call.path("artifact")
    coming = announced(call.request.headers)
    run = _wanted(call, await call.read())
    size = await performer.uploads.take(run.benchmark, run.id, name, coming, bodies.pieces(call.request))
    run = _wanted(call, call.state)  # it may have been given up while the bytes came
    call.context.driver.post(ArtifactStored(run.id, run.generation, name, size))

    def is_noted(state: State) -> bool:
        there = state.runs.get(run.id)
        return there is None or there.desired == "absent" or name in there.artifacts

    if not await call.waiters.until(f"run:{run.id}", is_noted, NOTED_S):
        raise Unavailable("the artifact is stored and could not be noted", hint="send it again")
    _wanted(call, await call.read())
    call.changed = f"run:{run.id}"
    return call.answer(api.BenchmarkFile(f"runs/{run.id}/{name}", size))


def _wanted(call: Call, state: State) -> Run:
    """The run, when this agent may speak for its node and somebody waits for what it measured.

    Raises: NotFound, Forbidden, Conflict.
    """
    run = state.runs.get(call.path("run"))
    if run is None:
        raise NotFound(f"no run {call.path('run')[:80]!r}", hint="its benchmark has ended or was removed")
    key = state.keys.get(call.principal.key_id)
    session_key = call.context.sessions.key_of(run.node)
    if key is None or key.node not in ("", run.node) or session_key not in ("", call.principal.key_id):
        raise Forbidden(f"the key of this agent is not that of node {run.node}")
    if run.desired == "absent":
        raise Conflict(f"nobody waits for {run.id} any more")
    return run


ROUTES = (
    Route(
        "PUT",
        f"{PREFIX}/agent/runs/{{run}}/artifacts/{{artifact}}",
        put,
        "agent",
        TAG,
        "Send a file of a run (agents)",
        api.BenchmarkFile,
        streams_body="The file's bytes.",
        codes=(
            *("not_found", "conflict", "invalid_name", "invalid_value", "invalid_request", "body_too_large"),
            *("size_mismatch", "digest_mismatch", "disk_full"),
        ),
        description="Needs Content-Length and X-Content-SHA256 (hex). Answers once the file is on the disk and noted; "
        "may be repeated.",
    ),
)
