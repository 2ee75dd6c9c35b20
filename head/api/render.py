"""The state as people see it: pure functions from the head's objects to the views of `herder/types.py`.

Nothing here changes anything or waits. Secrets never pass: engine keys and key hashes are left out, and
passwords or signatures inside URLs are replaced by `***`.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import cast

from common.errors import ErrorInfo
from common.manifest import Manifest
from common.recipe import Recipe
from head.core import node_facts, service_views
from head.core.objects import ApiKey, Copy, Job, Model, Replica, Service, Step
from head.core.state import JOB_ENDED, Progress, State
from herder import types as api

IN_FLIGHT = frozenset({"planned", "waiting", "reserved", "fetching", "verifying", "syncing", "loading"})
ETA_AFTER_MS = 3_000  # before this a rate says more about the start than about the rest
STALLED_MS = 15_000  # bytes that stood still for so long promise no end
_SIZES = 20_000  # manifests whose size is remembered

_PASSWORD = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://[^/@\s:]*):[^/@\s]*@")
_SECRET_QUERY = re.compile(
    r"(?i)([?&][^=&#\s]*(?:token|signature|sig|secret|password|credential|key)[^=&#\s]*=)[^&#\s]*"
)


def without_secrets(url: str) -> str:
    """The URL with passwords and signed query values replaced by `***`."""
    if "://" not in url:
        return url
    return _SECRET_QUERY.sub(r"\1***", _PASSWORD.sub(r"\1:***@", url))


def error_detail(error: ErrorInfo | None) -> api.ErrorDetail | None:
    """An error as data, as the API shows it."""
    if error is None:
        return None
    return api.ErrorDetail(error.code, without_secrets(error.message), error.hint, error.details)


# models and copies
def state_of_copy(state: State, copy: Copy) -> api.CopyState:
    """A copy's state, refined by its last progress."""
    progress = state.progress.get(copy.key) if copy.state in IN_FLIGHT else None
    return cast(api.CopyState, (progress.state if progress else "") or copy.state)


def copy_view(state: State, copy: Copy, now_ms: int) -> api.CopyView:
    """A copy with its progress."""
    progress = state.progress.get(copy.key)
    in_flight = copy.state in IN_FLIGHT
    total = max(copy.bytes, progress.bytes_total if progress and in_flight else 0)
    done = copy.bytes if not in_flight and copy.state not in ("failed", "dropping") else 0
    rate = eta = None
    if progress is not None and in_flight:
        done = progress.bytes_done
        rate, eta = _rate_and_eta(progress, now_ms)
    last_used_ms = max(copy.last_used_ms, state.last_used_ms.get(copy.key, 0))
    return api.CopyView(
        model=copy.model,
        revision=copy.revision,
        device=copy.device,
        state=state_of_copy(state, copy),
        bytes_done=done,
        bytes_total=total,
        rate_bytes_per_s=rate,
        eta_s=eta,
        source=without_secrets((progress.source if progress and in_flight else "") or copy.source),
        pins=tuple(pin.name for pin in copy.pins if not pin.until_ms or pin.until_ms > now_ms),
        in_use=_leases(state, copy),
        is_locked=copy.is_locked,
        last_used_ms=last_used_ms or None,
        verified_ms=copy.verified_ms or None,
        is_node_reachable=node_facts.is_reachable(state, copy.device.partition(":")[0], now_ms),
        error=error_detail(copy.error),
    )


def _rate_and_eta(progress: Progress, now_ms: int) -> tuple[float | None, float | None]:
    """Rate and seconds left; None until they mean something."""
    rate = progress.rate_bytes_per_s or None
    if (
        rate is None
        or progress.bytes_total <= 0
        or now_ms - progress.started_ms < ETA_AFTER_MS
        or now_ms - progress.changed_ms > STALLED_MS
    ):
        return rate, None
    return rate, round(max(0, progress.bytes_total - progress.bytes_done) / rate, 1)


def _leases(state: State, copy: Copy) -> int:
    """What holds the copy now: engines that run from it, and copies elsewhere that read from it."""
    node, _, storage = copy.device.partition(":")
    engines = sum(
        1
        for key in state.replicas_by_node.get(node, ())
        if (replica := state.replicas[key]).model == copy.model
        and replica.revision == copy.revision
        and replica.desired == "running"
        and (replica.device == copy.device or storage == "disk")
    )
    readers = sum(copy.key in state.offered.get(key, ()) for key in state.readers.get(node, ()))
    return engines + (readers if storage == "disk" else 0)


_sizes: dict[str, tuple[Manifest, int]] = {}


def _manifest_bytes(manifest: Manifest) -> int:
    """Bytes of all files, added up once per manifest."""
    kept = _sizes.get(manifest.digest)
    if kept is None or kept[0] is not manifest:
        if len(_sizes) >= _SIZES:
            _sizes.clear()
        kept = _sizes[manifest.digest] = (manifest, manifest.size_bytes)
    return kept[1]


def model_view(state: State, model: Model, now_ms: int) -> api.ModelView:
    """A model, what its files say, and where it is."""
    found = state.manifests.get(f"{model.name}@{model.revision}")
    manifest = found.manifest if found else None
    copies = sorted((state.copies[key] for key in state.copies_by_model.get(model.name, ())), key=_copy_order)
    return api.ModelView(
        name=model.name,
        type=cast(api.ModelType, model.type),
        revision=model.revision,
        sources=tuple(without_secrets(source) for source in model.sources),
        metadata=model.metadata,
        detected=manifest.detected if manifest else {},
        format=manifest.format if manifest else "",
        size=_manifest_bytes(manifest) if manifest else 0,
        files=len(manifest.files) if manifest else 0,
        digest=manifest.digest if manifest else "",
        locations=tuple(copy.device for copy in copies if copy.state == "ready" and copy.revision == model.revision),
        services=_engines(state, model.name),
        copies=tuple(copy_view(state, copy, now_ms) for copy in copies),
        created_ms=model.created_ms,
        updated_ms=model.updated_ms,
        is_deleting=model.is_deleting,
    )


def _copy_order(copy: Copy) -> tuple[str, str]:
    return copy.device, copy.revision


def _engines(state: State, model: str) -> dict[str, str]:
    """URL of the ready engine on each device."""
    found: dict[str, str] = {}
    for key in sorted(state.replicas_by_model.get(model, ())):
        replica = state.replicas[key]
        if replica.state == "ready" and replica.port:
            found.setdefault(replica.device, endpoint(state, replica))
    return found


def manifest_view(manifest: Manifest) -> api.ManifestView:
    """The files of a model at a revision."""
    return api.ManifestView(
        model=manifest.model,
        revision=manifest.revision,
        digest=manifest.digest,
        format=manifest.format,
        size=_manifest_bytes(manifest),
        files=tuple(
            api.ManifestFileView(file.path, file.size, file.blob, file.chunk_bytes, file.sha256)
            for file in manifest.files
        ),
    )


# services and replicas
def endpoint(state: State, replica: Replica) -> str:
    """URL of an engine as other machines reach it; empty until it listens."""
    if not replica.port:
        return ""
    host = replica.host
    if host in ("", "0.0.0.0", "::"):
        node = state.nodes.get(replica.node)
        host = node.advertise if node else ""
    if not host:
        return ""
    return (
        f"http://[{host}]:{replica.port}"
        if ":" in host and not host.startswith("[")
        else f"http://{host}:{replica.port}"
    )


def replica_view(state: State, replica: Replica) -> api.ReplicaView:
    """One engine, with what was reserved for it and what was measured of it."""
    resident, on_gpus = state.measured.get(replica.id, (0, 0))
    return api.ReplicaView(
        replica=replica.id,
        service=replica.service,
        model=replica.model,
        device=replica.device,
        node=replica.node,
        state=cast(api.ReplicaState, replica.state),
        endpoint=endpoint(state, replica),
        generation=replica.generation,
        restarts=replica.restarts,
        pid=replica.pid,
        started_ms=replica.started_ms or None,
        ready_ms=replica.ready_ms or None,
        memory_bytes=replica.memory_bytes,
        gpu_memory_bytes=replica.gpu_memory_bytes,
        exit_code=replica.exit_code,
        error=error_detail(replica.error),
        last_log=replica.last_log,
        measured_memory_bytes=resident or None,
        measured_gpu_memory_bytes=on_gpus // max(1, len(replica.gpus)) or None,
    )


def service_view(state: State, service: Service) -> api.ServiceView:
    """Desired state and what became of it."""
    replicas = [state.replicas[key] for key in state.replicas_by_service.get(service.name, ())]
    replicas.sort(key=lambda replica: replica.slot)
    shown = service_views.service_state(state, service.name)
    return api.ServiceView(
        name=service.name,
        model=service.model,
        revision=service.revision,
        recipe=service.recipe,
        state=shown,
        replicas_wanted=service.replicas,
        replicas_ready=service_views.ready_count(state, service.name),
        spec_hash=service.spec_hash,
        config=service.config,
        replicas=tuple(replica_view(state, replica) for replica in replicas),
        created_ms=service.created_ms,
        reason="" if shown == "ready" else _service_reason(service, replicas),
    )


def _service_reason(service: Service, replicas: list[Replica]) -> str:
    if service.reason:
        return service.reason
    for replica in replicas:
        if replica.error is not None:
            return f"{replica.id} on {replica.device}: {without_secrets(replica.error.message)}"
    waiting = [f"{replica.id} is {replica.state}" for replica in replicas if replica.state != "ready"]
    return ", ".join(waiting[:5])


# jobs
def job_view(state: State, job: Job, now_ms: int) -> api.JobView:
    """A job and its steps."""
    return api.JobView(
        id=job.id,
        name=job.name,
        description=job.description,
        status=cast(api.JobState, job.state),
        priority=job.priority,
        actor=job.actor,
        created_ms=job.created_ms,
        started_ms=job.started_ms or None,
        ended_ms=job.ended_ms or None,
        steps=tuple(_step_view(state, step, now_ms) for step in job.steps),
        error=error_detail(job.error),
    )


def _step_view(state: State, step: Step, now_ms: int) -> api.StepView:
    done = total = 0
    rate = eta = None
    kind, _, key = step.target.partition(":")
    progress = state.progress.get(key) if kind == "copy" and step.state == "running" else None
    if progress is not None:
        done, total = progress.bytes_done, progress.bytes_total
        rate, eta = _rate_and_eta(progress, now_ms)
    elif kind == "copy" and step.state in ("running", "completed") and key in state.copies:
        copy = state.copies[key]
        done = total = copy.bytes if copy.state == "ready" else 0
    return api.StepView(
        id=step.id,
        action=cast(api.Action, step.action),
        model=step.model,
        devices=tuple(device for device in (step.source_device, step.target_device) if device),
        dependencies=step.dependencies,
        state=cast(api.StepState, step.state),
        attempts=step.attempts,
        bytes_done=done,
        bytes_total=total,
        rate_bytes_per_s=rate,
        eta_s=eta,
        started_ms=step.started_ms or None,
        ended_ms=step.ended_ms or None,
        error=error_detail(step.error),
        result=step.result,
        note=step.note,
    )


# the rest
def key_view(key: ApiKey, token: str | None = None) -> api.KeyView:
    """A key without its secret; `token` only in the answer that created it."""
    return api.KeyView(
        key.id,
        key.name,
        cast(api.Role, key.role),
        key.created_ms,
        key.expires_ms or None,
        key.is_revoked,
        token,
        node=key.node,
    )


def recipe_view(recipe: Recipe, path: str = "") -> api.RecipeView:
    """A recipe and the defaults of what a service may set."""
    return api.RecipeView(
        recipe.name,
        recipe.category,
        recipe.runtime,
        recipe.description,
        recipe.model_formats,
        recipe.config,
        path or f"{recipe.category}/{recipe.name}.yaml",
    )


def health_view(
    state: State, *, version: str, now_ms: int, is_read_only: bool, alarms: tuple[str, ...] = ()
) -> api.Health:
    """The head in one object."""
    return api.Health(
        status="degraded" if is_read_only or state.is_frozen or alarms else "healthy",
        version=version,
        cluster_id=state.cluster_id,
        head_epoch=state.head_epoch,
        is_settling=now_ms < state.settle_until_ms,
        is_read_only=is_read_only,
        nodes=len(state.nodes),
        nodes_online=_nodes_online(state, now_ms),
        models=len(state.models),
        services=len(state.services),
        jobs_running=len(state.live_jobs),
        uptime_s=round(max(0, now_ms - state.started_ms) / 1000, 1),
        alarms=alarms,
        timestamp_ms=now_ms,
        timestamp=datetime.fromtimestamp(now_ms // 1000, UTC).isoformat(),
    )


def _nodes_online(state: State, now_ms: int) -> int:
    """As node_facts.node_state counts them, in one pass over the sessions."""
    nodes = state.nodes
    return sum(
        1
        for node_id, live in state.live.items()
        if live.session_id
        and now_ms <= live.lease_until_ms
        and (node := nodes.get(node_id)) is not None
        and node.status == "online"
    )


def has_ended(job: Job) -> bool:
    """Whether a job is in a terminal state."""
    return job.state in JOB_ENDED
