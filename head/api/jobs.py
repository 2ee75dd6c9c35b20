"""/jobs: durable graphs of steps. Both dialects of job files are taken, as JSON or YAML."""

from __future__ import annotations

from typing import Annotated

from aiohttp import web
from msgspec import Meta

from common.errors import Internal, JobNotFound
from head.api import render
from head.api.call import Call, near
from head.api.routes import PREFIX, ListQuery, PageOf, Route, WaitQuery
from head.core.events import CancelJobRequested, CreateJobRequested
from head.core.objects import Job
from head.core.state import State
from herder import types as api

TAG = "jobs"


class JobsQuery(ListQuery, frozen=True, kw_only=True):
    """Filters of the list of jobs."""

    status: Annotated[api.JobState | None, Meta(description="Only jobs in this state.")] = None
    name: Annotated[str, Meta(max_length=128, description="Only jobs of this name.")] = ""


def find(state: State, job_id: str) -> Job:
    """The job of an id. Raises: JobNotFound."""
    job = state.jobs.get(job_id)
    if job is None:
        raise JobNotFound(
            f"no job {job_id[:80]!r}",
            hint=near(job_id, reversed(state.live_jobs), "GET /api/v1/jobs lists them; old ones are pruned"),
        )
    return job


async def index(call: Call) -> web.StreamResponse:
    query, state, now_ms = call.query(JobsQuery), await call.read(), call.now_ms

    def wants(job_id: str) -> bool:
        facts = state.jobs.facts[job_id]
        return (query.status is None or facts.state == query.status) and (not query.name or facts.name == query.name)

    return await call.page(
        "jobs",
        query,
        call.lists["job"].order(),
        lambda job_id: render.job_view(state, state.jobs[job_id], now_ms),
        wants=wants if query.status or query.name else None,
        weight=lambda job_id: state.jobs.facts[job_id].step_count,
    )


async def create(call: Call) -> web.StreamResponse:
    return await run(call, call.body(api.CreateJob))


async def show(call: Call) -> web.StreamResponse:
    job = find(await call.read(), call.path("id"))
    return call.answer(render.job_view(call.state, job, call.now_ms))


async def cancel(call: Call) -> web.StreamResponse:
    job = find(await call.read(), call.path("id"))
    await call.submit(CancelJobRequested, job=job.id)
    return await _outcome(call, job.id)


async def run(call: Call, body: api.CreateJob) -> web.StreamResponse:
    """Creates a job and answers with it: 200 when it ended within ?wait, else 202."""
    reply = await call.submit(CreateJobRequested, fresh="job", body=body)
    return await _outcome(call, reply.reference.removeprefix("job:"))


async def _outcome(call: Call, job_id: str) -> web.StreamResponse:
    def has_ended(state: State) -> bool:
        job = state.jobs.get(job_id)
        return job is None or render.has_ended(job)

    await call.waiters.until(f"job:{job_id}", has_ended, call.query(WaitQuery).wait)
    job = call.state.jobs.get(job_id)
    if job is None:
        raise Internal("the job is not in the state that made it", job=job_id)
    return call.answer(
        render.job_view(call.state, job, call.now_ms),
        status=200 if render.has_ended(job) else 202,
        location=f"{PREFIX}/jobs/{job.id}",
    )


ROUTES = (
    Route(
        "GET",
        f"{PREFIX}/jobs",
        index,
        "viewer",
        TAG,
        "List jobs, newest first",
        PageOf(api.JobView),
        query=JobsQuery,
    ),
    Route(
        "POST",
        f"{PREFIX}/jobs",
        create,
        "operator",
        TAG,
        "Run a job",
        api.JobView,
        body=api.CreateJob,
        query=WaitQuery,
        status=202,
        takes_yaml=True,
        codes=("invalid_job", "job_cycle", "invalid_device", "model_not_found", "node_not_found", "too_many"),
        description="A graph of steps in either dialect: `action/model/source/from/to/device/port` run in the order "
        "written, `action_id/action_type/model_name/devices/dependencies` as the graph says. "
        "Answers 200 when the job ended within `wait`.",
    ),
    Route("GET", f"{PREFIX}/jobs/{{id}}", show, "viewer", TAG, "Show a job", api.JobView, codes=("job_not_found",)),
    Route(
        "POST",
        f"{PREFIX}/jobs/{{id}}/cancel",
        cancel,
        "operator",
        TAG,
        "Cancel a job",
        api.JobView,
        query=WaitQuery,
        status=202,
        codes=("job_not_found",),
        description="Running steps are stopped; answers 200 once the job has ended.",
    ),
)
