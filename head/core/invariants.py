"""`check_invariants(state)`: what must hold after every step; tests and the simulator call it, production does not.

Each rule is a function that returns the broken facts in words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import get_args

from common import ids, limits
from head.core import admission, benchmark_facts, copy_facts, placement
from head.core.objects import Step
from head.core.state import BENCHMARK_ENDED, JOB_ENDED, POINT_ENDED, RUN_ENDED, STEP_ENDED, State, restore
from herder.types import BenchmarkState, CopyState, PointState, ReplicaState, StepState

Rule = Callable[[State], Iterator[str]]
RULES: list[Rule] = []


def rule(function: Rule) -> Rule:
    """Adds a rule."""
    RULES.append(function)
    return function


def check_invariants(state: State) -> None:
    """Raises AssertionError that names every broken rule."""
    broken = [f"{function.__name__}: {fact}" for function in RULES for fact in function(state)]
    assert not broken, "; ".join(broken[:20])


# nodes, models and copies
_COPY_STATES = frozenset(get_args(CopyState))
_INDICES = (
    "copies_by_model",
    "copies_by_node",
    "projections",
    "replicas_by_service",
    "replicas_by_node",
    "replicas_by_model",
    "active_copies",
    "pinned_copies",
    "ready_by_model",
    "warm_by_model",
    "draining_nodes",
    "live_jobs",
    "waiters",
    "running_steps",
    "queued_steps",
    "live_benchmarks",
    "points_by_benchmark",
    "runs_by_benchmark",
    "runs_by_node",
)
_TABLES = ("nodes", "copies", "services", "replicas", "jobs", "benchmarks", "points", "runs")
_SMALL = 200  # bigger states are compared with a recomputation at every 64th revision only


@rule
def indices_equal_a_recomputation(state: State) -> Iterator[str]:
    """The indices that `apply` keeps are those of a state built from nothing."""
    objects = [thing for name in _TABLES for thing in getattr(state, name).values()]
    if len(objects) > _SMALL and state.revision % 64:
        return
    fresh = State()
    for thing in objects:
        restore(fresh, thing)
    for name in _INDICES:
        kept, wanted = (_as_sets(getattr(one, name)) for one in (state, fresh))
        if kept != wanted:
            yield f"{name} is {kept}, not {wanted}"


@rule
def copies_stand_on_something(state: State) -> Iterator[str]:
    """Every copy is of a registered model and on a known node; a RAM copy has its disk copy under it."""
    for copy in state.copies.values():
        node = copy_facts.node_of(copy)
        if copy.model not in state.models:
            yield f"{copy.key} is of no registered model"
        if copy_facts.is_projection(copy):
            continue
        if node not in state.nodes:
            yield f"{copy.key} is on no known node"
        is_meant = copy.desired == "present" and copy.state != "failed"
        if copy_facts.storage_of(copy) == "dram" and is_meant and copy_facts.backing_of(state, copy) is None:
            yield f"{copy.key} has no disk copy under it"


@rule
def copies_are_in_order(state: State) -> Iterator[str]:
    """Words are known, what is undesired is dropping, what failed says why, what is ready matches the manifest."""
    for key, copy in state.copies.items():
        if copy.key != key or copy.state not in _COPY_STATES or copy.desired not in ("present", "absent"):
            yield f"{key}: {copy.desired}, {copy.state}"
        if copy_facts.is_projection(copy):
            continue
        if (copy.desired == "absent") != (copy.state == "dropping"):
            yield f"{key} is {copy.state} and desired {copy.desired}"
        if copy.state == "failed" and copy.error is None:
            yield f"{key} failed without a reason"
        manifest = copy_facts.manifest_of(state, copy.model, copy.revision)
        if copy.state == "ready" and manifest is not None and copy.digest not in ("", manifest.digest):
            yield f"{key} is ready with another content than its revision has"
        if copy.attempts > limits.STEP_ATTEMPTS and copy.desired == "present":
            yield f"{key} was tried {copy.attempts} times"


@rule
def devices_are_not_overbooked(state: State) -> Iterator[str]:
    """What the head admitted fits; more can only be there because agents report it, and then nothing new begins."""
    for node_id, node in state.nodes.items():
        for device in admission.devices_of(state, node.id):
            place = ids.parse_device(device)
            if place.kind == "gpu":
                continue
            over = admission.committed_bytes(state, place) - admission.budget_bytes(state, place)
            begun_later = [
                copy.key
                for copy in admission.copies_on(state, place)
                if copy.desired == "present" and copy.state in copy_facts.NOT_BEGUN and copy_facts.size_of(state, copy)
            ]
            if over > 0 and begun_later:
                yield f"{node_id}: {device} is overbooked by {over} bytes, and {begun_later} are to begin"


@rule
def models_end(state: State) -> Iterator[str]:
    """A model that is being deleted has copies left, all on their way out; manifests belong to models."""
    for model in state.models.values():
        if not model.is_deleting:
            continue
        copies = [state.copies[key] for key in state.copies_by_model.get(model.name, ())]
        if not copies:
            yield f"{model.name} is being deleted, has no copy and is still there"
        for copy in copies:
            if copy.desired == "present" and not copy_facts.is_projection(copy):
                yield f"{model.name} is being deleted and {copy.key} is not"
    for key, kept in state.manifests.items():
        if kept.manifest.model not in state.models:
            yield f"the manifest {key} is of no registered model"


@rule
def sessions_are_unique(state: State) -> Iterator[str]:
    """A session belongs to one node; live facts are of known nodes; who counts as lost is unreachable."""
    owners: dict[str, str] = {}
    for node_id, live in state.live.items():
        if node_id not in state.nodes:
            yield f"there are live facts of {node_id}, which is not known"
        if live.session_id and owners.setdefault(live.session_id, node_id) != node_id:
            yield f"session {live.session_id} is of {owners[live.session_id]} and of {node_id}"
    for node_id in state.lost_ms:
        if node_id not in state.nodes or state.nodes[node_id].status != "unreachable":
            yield f"{node_id} counts as lost and is not unreachable"


@rule
def readers_are_counted(state: State) -> Iterator[str]:
    """Who reads from where is the same seen from both ends, is of copies at work, and keeps its limit."""
    for key, offered in state.offered.items():
        copy = state.copies.get(key)
        if copy is None or copy.desired != "present" or copy.state not in (*copy_facts.IN_FLIGHT, "planned"):
            yield f"{key} reads and is {copy.state if copy else 'gone'}"
        for served in offered:
            node = served.rpartition("|")[2].partition(":")[0]
            if node in state.nodes and key not in state.readers.get(node, ()):
                yield f"{key} reads from {served}, which {node} does not count"
    for node, readers in state.readers.items():
        if len(readers) > limits.READERS_PER_SERVING_NODE:
            yield f"{len(readers)} fetches read from {node}"
        for key in readers:
            if not any(served.endswith(f"|{node}:disk") for served in state.offered.get(key, ())):
                yield f"{node} counts {key}, which does not read from it"


# services, replicas and jobs
_REPLICA_STATES = frozenset(get_args(ReplicaState))
_GOING = frozenset({"draining", "stopping"})
_STEP_STATES = frozenset(get_args(StepState))


@rule
def gpus_are_not_overbooked(state: State) -> Iterator[str]:
    """What replicas have reserved of a GPU fits, and who has it whole has it alone."""
    for node_id, node in state.nodes.items():
        use = placement.gpu_use(state, node_id)
        for gpu in node.inventory.gpus:
            holders = use.get(gpu.index, [])
            names = [holder.id for holder in holders]
            if len(holders) > 1 and any(holder.is_exclusive for holder in holders):
                yield f"{node_id}:gpu{gpu.index} is held whole and shared by {names}"
            elif gpu.memory_bytes and placement.reserved_gpu_bytes(holders, gpu) > gpu.memory_bytes:
                yield f"{node_id}:gpu{gpu.index} is overbooked by {names}"


@rule
def slots_hold_one_replica(state: State) -> Iterator[str]:
    """A slot has at most one replica, named after it; one that shall go is stopping, one that failed says why."""
    for key, replica in state.replicas.items():
        if key != f"{replica.service}-{replica.slot}" or replica.slot < 0:
            yield f"{key} is slot {replica.slot} of {replica.service}"
        if replica.service not in state.services:
            yield f"{key} is of the service {replica.service}, which is gone"
        if replica.state not in _REPLICA_STATES or (replica.desired == "stopped") != (replica.state in _GOING):
            yield f"{key} is {replica.state} and desired {replica.desired}"
        if (replica.state == "draining") != (replica.drain_until_ms > 0):
            yield f"{key} is {replica.state} and drains until {replica.drain_until_ms}"
        if replica.state == "failed" and replica.error is None:
            yield f"{key} failed without a reason"
        if replica.state == "ready" and replica.port <= 0:
            yield f"{key} is ready and listens nowhere"


@rule
def projections_follow_replicas(state: State) -> Iterator[str]:
    """A copy on a GPU is a replica's, which is there."""
    for key, copy in state.copies.items():
        if not copy_facts.is_projection(copy):
            continue
        replica = state.replicas.get(copy.replica)
        index = ids.parse_device(copy.device).index
        if replica is None or replica.node != copy_facts.node_of(copy) or index not in replica.gpus:
            yield f"{key} projects {copy.replica or 'nothing'}, which is not there"


@rule
def jobs_are_in_order(state: State) -> Iterator[str]:
    """Steps run after what they depend on; ended jobs have ended steps; what runs waits on something or says why."""
    for key, job in state.jobs.items():
        by_id = {step.id: step for step in job.steps}
        is_ended = job.state in JOB_ENDED
        if is_ended == (key in state.live_jobs):
            yield f"{key} is {job.state} and {'' if is_ended else 'not '}among the live jobs"
        if is_ended != all(step.state in STEP_ENDED for step in job.steps):
            yield f"{key} is {job.state} with steps {[step.state for step in job.steps][:20]}"
        for step in job.steps:
            early = [name for name in step.dependencies if by_id[name].state != "completed"]
            if step.state not in _STEP_STATES:
                yield f"{key}/{step.id} is {step.state}"
            if early and step.state in ("running", "completed"):
                yield f"{key}/{step.id} is {step.state} before {early}"
            if step.state == "running" and not _has_target(state, step) and not step.note:
                yield f"{key}/{step.id} waits on {step.target or 'nothing'} and does not say why"
            if step.state == "failed" and step.error is None:
                yield f"{key}/{step.id} failed without a reason"


# benchmarks
_BENCHMARK_STATES = frozenset(get_args(BenchmarkState))
_POINT_STATES = frozenset(get_args(PointState))
_RUN_STATES = frozenset({"pending", "preparing", "armed", "running", "uploading"}) | RUN_ENDED
_RUN_DESIRED = frozenset({"armed", "fired", "ended", "absent"})


@rule
def benchmarks_are_in_order(state: State) -> Iterator[str]:
    """One point at a time, none after the end; what failed says why, and an own service is gone, going or kept."""
    for key, benchmark in state.benchmarks.items():
        points = benchmark_facts.points_of(state, key)
        going = [point.number for point in points if point.state not in POINT_ENDED and point.state != "pending"]
        is_ended = benchmark.state in BENCHMARK_ENDED
        if benchmark.state not in _BENCHMARK_STATES:
            yield f"{key} is {benchmark.state}"
        if [point.number for point in points] != list(range(len(points))):
            yield f"{key} has the points {[point.number for point in points]}"
        if len(going) > 1 or (going and benchmark.state not in ("running", "finishing")):
            yield f"{key} is {benchmark.state} and is at the points {going}"
        if is_ended and any(point.state not in POINT_ENDED for point in points):
            yield f"{key} is {benchmark.state} and has points that have not ended"
        if is_ended and (state.runs_by_benchmark.get(key) or not benchmark.ended_ms):
            yield f"{key} is {benchmark.state} and has runs, or no time of its end"
        if (benchmark.state in ("failed", "cancelled")) != (benchmark.error is not None) and is_ended:
            yield f"{key} is {benchmark.state} with the error {benchmark.error}"
        service = state.services.get(benchmark.service) if benchmark.is_own_service else None
        serve = benchmark.recipe["server"].get("serve") or {}
        if is_ended and service is not None and service.desired == "running" and not serve.get("keep"):
            yield f"{key} is {benchmark.state} and its service {service.name} goes on"


@rule
def points_are_in_order(state: State) -> Iterator[str]:
    """Points belong to benchmarks; what was fired was the same everywhere; figures are of what was judged."""
    for key, point in state.points.items():
        if point.benchmark not in state.benchmarks or point.state not in _POINT_STATES:
            yield f"{key} is {point.state}, of {point.benchmark}"
        if point.state == "failed" and point.error is None:
            yield f"{key} failed without a reason"
        if point.is_valid and (point.state != "completed" or point.coverage < 1 or point.reasons):
            yield f"{key} is valid, {point.state}, {point.reasons} and covers {point.coverage}"
        if point.figures and point.state != "completed":
            yield f"{key} is {point.state} and has figures"
        runs = benchmark_facts.load_runs(state, point)
        fired = {run.digest for run in runs if run.desired == "fired"}
        if len(fired) > 1:
            yield f"{key} was fired although its parts differ: {sorted(fired)}"
        if point.state in POINT_ENDED and any(run.desired != "absent" for run in runs):
            yield f"{key} is {point.state} and its runs are wanted"


@rule
def runs_are_in_order(state: State) -> Iterator[str]:
    """Runs belong to live benchmarks and known points, and are few on each node."""
    wanted: dict[str, int] = {}
    for key, run in state.runs.items():
        if run.benchmark not in state.live_benchmarks:
            yield f"{key} is of {run.benchmark}, which is not alive"
        if run.kind == "load" and f"{run.benchmark}.{run.point}" not in state.points:
            yield f"{key} is of no known point"
        if run.state not in _RUN_STATES or run.desired not in _RUN_DESIRED:
            yield f"{key} is {run.state} and desired {run.desired}"
        if run.state in ("failed", "lost") and run.error is None:
            yield f"{key} is {run.state} without a reason"
        if run.kind == "load" and run.desired == "fired" and not run.start_boottime_ns:
            yield f"{key} is fired without a moment"
        if len(run.artifacts) > limits.ARTIFACTS_PER_RUN:
            yield f"{key} has {len(run.artifacts)} files"
        if run.desired != "absent" and run.state not in RUN_ENDED:
            wanted[run.node] = wanted.get(run.node, 0) + 1
    for node, count in wanted.items():
        if count > limits.RUNS_PER_NODE:
            yield f"{count} runs are to be on {node}"


@rule
def queues_keep_their_limits(state: State) -> Iterator[str]:
    """Steps at work per node, live jobs, checks and services are bounded."""
    for node, running in state.running_steps.items():
        if len(running) > limits.STEPS_RUNNING_PER_NODE:
            yield f"{len(running)} steps run on {node}"
    for name, count, limit in (
        ("live jobs", len(state.live_jobs), limits.JOBS_LIVE),
        ("checks", len(state.checks), limits.CHECKS_LIVE),
        ("services", len(state.services), limits.SERVICES),
        ("live benchmarks", len(state.live_benchmarks), limits.BENCHMARKS_LIVE),
    ):
        if count > limit:
            yield f"{count} {name}; at most {limit}"


def _has_target(state: State, step: Step) -> bool:
    kind, _, key = step.target.partition(":")
    return bool(kind) and key in state.table(kind)


def _as_sets(index: dict[str, dict[str, None]] | dict[str, None]) -> dict[str, set[str]]:
    """An index without regard to order and empty entries."""
    return {name: set(keys) if keys else {name} for name, keys in index.items() if keys is None or keys}
