"""Why something is as it is, or is not yet: the state put into words with its numbers. Changes nothing."""

from __future__ import annotations

from collections.abc import Callable

from common.errors import (
    BenchmarkNotFound,
    CopyNotFound,
    InvalidValue,
    JobNotFound,
    ModelNotFound,
    NodeNotFound,
    NotFound,
    ServiceNotFound,
)
from common.wire import CopyStatus
from head.core import (
    benchmark_facts,
    commands,
    drains,
    memory_needs,
    node_facts,
    placement,
    replica_facts,
    service_specs,
    service_views,
)
from head.core.objects import Copy, Job, Node, Replica, Service
from head.core.state import STEP_ENDED, State
from herder.types import Candidate, Why

_LISTED = 5


def why(state: State, kind: str, key: str, now_ms: int) -> Why:
    """The reason for a service, replica, job, copy, node or model being as it is, with candidates where that helps.

    A copy may be named by its key or as "MODEL|DEVICE", with the model's own revision then.
    Raises: NotFound (by kind), InvalidValue for a kind that cannot be asked about.
    """
    ask = _KINDS.get(kind)
    if ask is None:
        raise InvalidValue(f"nothing is known of the kind {kind[:40]!r}", hint=f"one of {', '.join(_KINDS)}", kind=kind)
    return ask(state, key, now_ms)


# services
def _service(state: State, key: str, now_ms: int) -> Why:
    service = state.services.get(key)
    if service is None:
        raise ServiceNotFound(f"no service {key[:80]!r}", hint="`herder services` lists them", service=key)
    shown = service_views.service_state(state, key)
    held = replica_facts.of_service(state, key)
    ready = service_views.ready_count(state, key)
    words = [f"{ready} of {service.replicas} replicas answer"]
    if service.reason:
        words.append(service.reason)
    words += [
        f"{replica.id} on {replica.device} is {_replica_words(state, replica, now_ms)}"
        for replica in held
        if replica.state != "ready" or not service_views.is_serving(state, replica)
    ][:_LISTED]
    is_short = sum(replica.desired == "running" for replica in held) < service.replicas
    is_asked = service.desired == "running" and (is_short or service.reason)
    candidates = _candidates(state, service, now_ms) if is_asked else ()
    return Why(key, "service", shown, "; ".join(words), candidates)


def _candidates(state: State, service: Service, now_ms: int) -> tuple[Candidate, ...]:
    recipe = state.recipes.get(service.recipe)
    declared = service_specs.declared_bytes(recipe, service) if recipe is not None else (0, 0)
    need = placement.need_of(state, service, f"{service.name}-next", recipe, *declared)
    return placement.candidates(state, need, now_ms)


def _replica(state: State, key: str, now_ms: int) -> Why:
    replica = state.replicas.get(key)
    if replica is None:
        raise NotFound(f"no replica {key[:80]!r}", hint="`herder services` lists them", replica=key)
    words = f"{replica.device}: {_replica_words(state, replica, now_ms)}"
    if replica.memory_bytes or replica.gpu_memory_bytes:
        words += f"; {replica.memory_bytes} bytes of memory"
        words += f" and {replica.gpu_memory_bytes} bytes of each GPU are reserved" if replica.gpus else " are reserved"
    service = state.services.get(replica.service)
    words += _estimate_words(state, replica, service)
    is_lost = replica.state == "failed" and service is not None and replica.desired == "running"
    return Why(key, "replica", replica.state, words, _candidates(state, service, now_ms) if is_lost and service else ())


def _estimate_words(state: State, replica: Replica, service: Service | None) -> str:
    """The parts of what is reserved, where that is the planner's estimate of now."""
    if service is None:
        return ""
    on_host, on_gpus = memory_needs.needs_of(state, service, state.recipes.get(service.recipe))
    need = on_gpus if replica.gpus else on_host
    if need is None or not need.host or need.host_bytes != replica.memory_bytes:
        return ""
    return f" ({memory_needs.shown(need, 'host')})"


def _replica_words(state: State, replica: Replica, now_ms: int) -> str:
    seen = node_facts.node_state(state, replica.node, now_ms)
    if seen != "online":
        return f"{replica.state} when {replica.node} was last heard of; the node is {seen}"
    if state.unwell.get(replica.id) == replica.generation:
        return f"{replica.state} by its agent, but it did not answer the head's own probe"
    words = drains.words(replica, now_ms) if replica.state == "draining" else replica.state
    if replica.state == "pending":
        was_sent = commands.was_sent(state, replica.node, f"replica:{replica.id}", replica.generation)
        words += ": the order was sent and is not confirmed yet" if was_sent else ": the order waits to be sent"
    if replica.error is not None:
        words += f" ({replica.error.message})"
    if replica.restarts:
        words += f" after {replica.restarts} restarts"
    if replica.state == "failed" and replica.last_log:
        words += f"; its last words: {replica.last_log[-1][:200]}"
    return words


# jobs
def _job(state: State, key: str, now_ms: int) -> Why:
    job = state.jobs.get(key)
    if job is None:
        raise JobNotFound(f"no job {key[:80]!r}", hint="`herder jobs` lists them", job=key)
    return Why(key, "job", job.state, _job_words(job, now_ms))


def _job_words(job: Job, now_ms: int) -> str:
    ended = sum(step.state in STEP_ENDED for step in job.steps)
    words = [f"{ended} of {len(job.steps)} steps have ended"]
    if job.error is not None:
        words.append(job.error.message)
    if job.is_cancelling:
        words.append("it is being cancelled")
    for step in [step for step in job.steps if step.state == "running"][:_LISTED]:
        words.append(f"{step.id} runs for {max(0, now_ms - step.started_ms) // 1000} s: {step.note or step.action}")
    for step in [step for step in job.steps if step.state == "pending" and step.note][:_LISTED]:
        words.append(f"{step.id}: {step.note}")
    return "; ".join(words)


# benchmarks
def _benchmark(state: State, key: str, now_ms: int) -> Why:
    benchmark = state.benchmarks.get(key)
    if benchmark is None:
        raise BenchmarkNotFound(f"no benchmark {key[:80]!r}", hint="`herder benchmarks` lists them", benchmark=key)
    done = benchmark_facts.points_done(state, key)
    words = [f"{done} of {max(benchmark.planned, done)} points have ended"]
    note = benchmark_facts.note_of(state, benchmark)
    if note:
        words.append(note)
    if benchmark.error is not None:
        words.append(benchmark.error.message)
    if benchmark.best:
        words.append(str(benchmark.best.get("why", "")))
    for run in benchmark_facts.runs_of(state, key):
        seen = node_facts.node_state(state, run.node, now_ms)
        if seen != "online":
            words.append(f"{run.id} is {run.state} on {run.node}, which is {seen}")
    candidates: tuple[Candidate, ...] = ()
    if benchmark.state == "preparing" and benchmark.service in state.services:
        service = _service(state, benchmark.service, now_ms)
        words.append(f"{benchmark.service}: {service.reason}")
        candidates = service.candidates
    return Why(key, "benchmark", benchmark.state, "; ".join(words[: 2 * _LISTED]), candidates)


# copies, models, nodes
def _copy(state: State, key: str, now_ms: int) -> Why:
    copy = state.copies.get(key)
    if copy is None and "|" in key:
        model, _, device = key.partition("|")
        registered = state.models.get(model)
        copy = state.copies.get(f"{model}@{registered.revision}|{device}") if registered is not None else None
    if copy is None:
        raise CopyNotFound(f"no copy {key[:300]!r}", hint="`herder models locations NAME` lists the copies", copy=key)
    return Why(copy.key, "copy", copy.state, _copy_words(state, copy, now_ms))


def _copy_words(state: State, copy: Copy, now_ms: int) -> str:
    node = copy.device.partition(":")[0]
    if copy.replica:
        return f"it is what {copy.replica} has on {copy.device}"
    words = [f"it shall be {copy.desired}, because of {copy.cause}"]
    seen = node_facts.node_state(state, node, now_ms)
    if seen != "online":
        words.append(f"{node} is {seen}")
    progress = state.progress.get(copy.key)
    if progress is not None:
        source = f" from {progress.source}" if progress.source else ""
        words.append(f"{progress.bytes_done} of {progress.bytes_total or 'unknown'} bytes are here{source}")
    if copy.state == "waiting":
        words.append(f"it waits for room on {copy.device} or for a source that is free")
    if copy.error is not None:
        words.append(f"attempt {copy.attempts} failed: {copy.error.message}")
    if copy.not_before_ms > now_ms:
        words.append(f"it is tried again in {(copy.not_before_ms - now_ms + 999) // 1000} s")
    if copy.pins:
        words.append(f"pinned by {', '.join(pin.name for pin in copy.pins)}")
    if replica_facts.uses_copy(state, copy.key):
        words.append("an engine uses it")
    return "; ".join(words)


def _node(state: State, key: str, now_ms: int) -> Why:
    node = state.nodes.get(key)
    if node is None:
        raise NodeNotFound(f"no node {key[:80]!r}", hint="`herder nodes` lists them", node=key)
    return Why(key, "node", node_facts.node_state(state, key, now_ms), _node_words(state, node, now_ms))


def _node_words(state: State, node: Node, now_ms: int) -> str:
    words = [f"it is {node.status} since {max(0, now_ms - node.status_since_ms) // 1000} s"]
    live = state.live.get(node.id)
    if live is not None and live.last_seen_ms:
        words.append(f"it was last heard {max(0, now_ms - live.last_seen_ms) // 1000} s ago")
    is_placeable, reason = node_facts.is_placeable(state, node.id, now_ms)
    words.append("new work may go there" if is_placeable else f"nothing new goes there: {reason}")
    if node.drain_deadline_ms and not node.is_drained:
        left = len(state.replicas_by_node.get(node.id, ()))
        seconds = max(0, node.drain_deadline_ms - now_ms) // 1000
        words.append(f"{left} replicas are left to drain, {seconds} s to its deadline")
    if not node.inventory.gpus and node.inventory.gpu_reason:
        words.append(f"no GPUs: {node.inventory.gpu_reason}")
    if not node.identity_sha256:
        words.append("it has no secret of its own: any agent with a join token may take its place")
    if live is not None and live.unknown_copies:
        words.append(_unknown_words(live.unknown_copies))
    return "; ".join(words)


def _unknown_words(unknown: tuple[CopyStatus, ...]) -> str:
    """Copies that the node has and the head has no model for: they take room, and are never touched."""
    held = sum(max(0, copy.bytes_total) for copy in unknown)
    named = [f"{copy.model[:200]}@{copy.revision[:64]} ({copy.storage[:20]}, {copy.state[:20]})" for copy in unknown]
    more = f" and {len(unknown) - _LISTED} more" if len(unknown) > _LISTED else ""
    words = f"{len(unknown)} copies in its store are of no registered model and stay as they are"
    return f"{words} ({held} bytes): {', '.join(named[:_LISTED])}{more}; register the model to take them in"


def _model(state: State, key: str, now_ms: int) -> Why:
    model = state.models.get(key)
    if model is None:
        raise ModelNotFound(f"no model {key[:200]!r}", hint="`herder models` lists them", model=key)
    held = [state.copies[name] for name in sorted(state.copies_by_model.get(key, ()))]
    words = [f"{sum(copy.state == 'ready' for copy in held)} of {len(held)} copies are ready"]
    if not held and not model.sources:
        words.append("it has no source to be fetched from")
    if f"{key}@{model.revision}" not in state.manifests:
        words.append("its files are not known yet: no node has fetched it")
    words += [f"{copy.device}: {copy.error.message}" for copy in held if copy.error is not None][:_LISTED]
    if model.is_deleting:
        words.append("it is being deleted, when its last copy is gone")
    return Why(key, "model", "deleting" if model.is_deleting else "registered", "; ".join(words))


_KINDS: dict[str, Callable[[State, str, int], Why]] = {
    "service": _service,
    "replica": _replica,
    "job": _job,
    "benchmark": _benchmark,
    "copy": _copy,
    "node": _node,
    "model": _model,
}
