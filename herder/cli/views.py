"""How each thing of the API looks in a table. Pure: `now_ms` is given."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from herder import types
from herder.cli import text
from herder.cli.table import Column

Rows = list[list[str]]
FINISHED = ("completed", "skipped")

MODELS = (
    Column("NAME", shrinks_to=24),
    Column("TYPE", rank=2),
    Column("FORMAT", rank=3),
    Column("SIZE", is_number=True),
    Column("WHERE", shrinks_to=14),
    Column("SERVED", shrinks_to=6, rank=1),
)
COPIES = (
    Column("MODEL", shrinks_to=20),
    Column("DEVICE", shrinks_to=18),
    Column("STATE"),
    Column("SIZE", is_number=True),
    Column("RATE", is_number=True, rank=3),
    Column("LEFT", is_number=True, rank=2),
    Column("USED", is_number=True, rank=4),
    Column("NOTE", shrinks_to=14, rank=1),
)
NODES = (
    Column("NODE", shrinks_to=24),
    Column("STATE"),
    Column("GPUS", is_number=True),
    Column("DISK FREE", is_number=True),
    Column("RAM FREE", is_number=True),
    Column("COPIES", is_number=True, rank=2),
    Column("ENGINES", is_number=True, rank=1),
    Column("SEEN", is_number=True, rank=3),
)
DEVICES = (
    Column("DEVICE", shrinks_to=24),
    Column("TOTAL", is_number=True),
    Column("USED", is_number=True),
    Column("RESERVED", is_number=True, rank=2),
    Column("FREE", is_number=True),
    Column("LOAD", is_number=True, rank=1),
    Column("TEMP", is_number=True, rank=3),
    Column("NAME", shrinks_to=8, rank=4),
)
SERVICES = (
    Column("SERVICE", shrinks_to=20),
    Column("MODEL", shrinks_to=18),
    Column("STATE"),
    Column("READY", is_number=True),
    Column("RECIPE", rank=1),
    Column("WHERE", shrinks_to=12, rank=2),
)
REPLICAS = (
    Column("REPLICA", shrinks_to=20),
    Column("STATE"),
    Column("DEVICE", shrinks_to=16),
    Column("ENDPOINT"),
    Column("MEMORY", is_number=True, rank=2),
    Column("RESTARTS", is_number=True, rank=1),
    Column("UP", is_number=True, rank=3),
)
JOBS = (
    Column("ID"),
    Column("NAME", shrinks_to=12),
    Column("STATUS"),
    Column("STEPS", is_number=True),
    Column("AGE", is_number=True),
    Column("TOOK", is_number=True, rank=1),
)
STEPS = (
    Column("STEP", shrinks_to=10),
    Column("ACTION"),
    Column("MODEL", shrinks_to=12),
    Column("TO", shrinks_to=10),
    Column("STATE"),
    Column("BYTES", is_number=True, rank=2),
    Column("TOOK", is_number=True, rank=1),
)
KEYS = (
    Column("ID"),
    Column("NAME", shrinks_to=10),
    Column("ROLE"),
    Column("STATE"),
    Column("AGE", is_number=True, rank=2),
    Column("EXPIRES", is_number=True, rank=1),
)
RECIPES = (
    Column("RECIPE"),
    Column("CATEGORY", rank=2),
    Column("RUNTIME", rank=1),
    Column("FORMATS", shrinks_to=8),
    Column("DESCRIPTION", shrinks_to=20),
)
LINES = (
    Column("TIME"),
    Column("WHAT", shrinks_to=14),
    Column("KIND"),
    Column("KEY", shrinks_to=16),
    Column("DETAIL", shrinks_to=14, rank=1),
    Column("CAUSE", shrinks_to=10, rank=2),
)
CANDIDATES = (
    Column("NODE", shrinks_to=12),
    Column("VERDICT"),
    Column("REASON", shrinks_to=20),
    Column("NUMBERS", shrinks_to=10, rank=1),
)
FILES = (Column("FILE", shrinks_to=20), Column("SIZE", is_number=True), Column("SHA256", shrinks_to=12, rank=1))


def model_row(model: types.ModelView) -> list[str]:
    """A row of MODELS."""
    served = ", ".join(sorted(model.services)) or "-"
    where = ", ".join(model.locations) or _coming(model.copies) or "-"
    return [model.name, model.type, model.format or "-", text.size(model.size or None), where, served]


def _coming(copies: Sequence[types.CopyView]) -> str:
    return ", ".join(f"{copy.device} ({copy.state})" for copy in copies)


def copy_row(copy: types.CopyView, now_ms: int) -> list[str]:
    """A row of COPIES. While bytes are on their way SIZE shows the part that is there."""
    is_partial = copy.state not in ("ready", "asleep", "dropping") and copy.bytes_total
    shown = text.size(copy.bytes_total or None)
    if is_partial:
        shown = f"{100 * copy.bytes_done // copy.bytes_total}% of {shown}"
    notes = [f"pinned ({pin})" for pin in copy.pins]
    if copy.is_locked:
        notes.append("locked")
    if copy.in_use:
        notes.append(f"in use: {copy.in_use}")
    if not copy.is_node_reachable:
        notes.append("node unreachable")
    if copy.error:
        notes.append(copy.error.message)
    left = text.duration(copy.eta_s) if copy.eta_s is not None else ""
    used = text.age(copy.last_used_ms, now_ms)
    return [copy.model, copy.device, copy.state, shown, text.rate(copy.rate_bytes_per_s), left, used, ", ".join(notes)]


def node_state(node: types.NodeView) -> str:
    """The node's state with what an operator asked of it."""
    asked = node.drain or ("cordoned" if node.is_cordoned else "")
    return f"{node.state},{asked}" if asked else node.state


def node_row(node: types.NodeView, now_ms: int) -> list[str]:
    """A row of NODES."""
    free = {device.kind: device.free_bytes for device in node.devices if device.kind != "gpu"}
    return [
        node.node_id,
        node_state(node),
        str(node.gpu_count),
        text.size(free.get("disk")),
        text.size(free.get("dram")),
        str(node.copies),
        str(node.replicas),
        text.age(node.last_seen_ms, now_ms),
    ]


def device_row(device: types.DeviceView) -> list[str]:
    """A row of DEVICES."""
    return [
        device.device,
        text.size(device.total_bytes),
        text.size(device.used_bytes),
        text.size(device.reserved_bytes),
        text.size(device.free_bytes),
        "" if device.utilisation is None else f"{_percent(device.utilisation)}%",
        "" if device.temperature_c is None else f"{device.temperature_c:.0f} C",
        f"{device.name} (lost)".strip() if device.is_lost else device.name,
    ]


def _percent(share: float) -> str:
    return f"{share * 100:.0f}"


def service_row(service: types.ServiceView) -> list[str]:
    """A row of SERVICES."""
    where = ", ".join(replica.device for replica in service.replicas) or "-"
    ready = f"{service.replicas_ready}/{service.replicas_wanted}"
    return [service.name, service.model or "-", service.state, ready, service.recipe, where]


def replica_row(replica: types.ReplicaView, now_ms: int) -> list[str]:
    """A row of REPLICAS."""
    on_gpu = replica.measured_gpu_memory_bytes or replica.gpu_memory_bytes
    memory = on_gpu or replica.measured_memory_bytes or replica.memory_bytes
    return [
        replica.replica,
        replica.state,
        replica.device,
        replica.endpoint or "-",
        text.size(memory or None),
        str(replica.restarts),
        text.age(replica.ready_ms, now_ms),
    ]


def job_row(job: types.JobView, now_ms: int) -> list[str]:
    """A row of JOBS."""
    done = sum(step.state in FINISHED for step in job.steps)
    took = span(job.started_ms, job.ended_ms, now_ms)
    return [job.id, job.name, job.status, f"{done}/{len(job.steps)}", text.age(job.created_ms, now_ms), took]


def step_row(step: types.StepView, now_ms: int) -> list[str]:
    """A row of STEPS."""
    moved = text.size(step.bytes_done) if step.bytes_done else ""
    if step.bytes_total and step.bytes_done < step.bytes_total:
        moved = f"{100 * step.bytes_done // step.bytes_total}% of {text.size(step.bytes_total)}"
    target = step.devices[-1] if step.devices else "-"
    took = span(step.started_ms, step.ended_ms, now_ms)
    return [step.id, step.action, step.model or "-", target, step.state, moved, took]


def span(started_ms: int | None, ended_ms: int | None, now_ms: int) -> str:
    """From start to end, or to now."""
    if not started_ms:
        return "-"
    return text.duration(((ended_ms or now_ms) - started_ms) / 1000)


def key_row(key: types.KeyView, now_ms: int) -> list[str]:
    """A row of KEYS."""
    is_expired = bool(key.expires_ms) and (key.expires_ms or 0) <= now_ms
    state = "revoked" if key.is_revoked else "expired" if is_expired else "valid"
    left = "never" if not key.expires_ms else "-" if is_expired else f"in {text.age(now_ms, key.expires_ms)}"
    return [key.id, key.name, key.role, state, text.age(key.created_ms, now_ms), left]


def recipe_row(recipe: types.RecipeView) -> list[str]:
    """A row of RECIPES."""
    formats = ", ".join(recipe.model_formats) or "any"
    return [recipe.name, recipe.category, recipe.runtime, formats, recipe.description]


def line_row(line: types.Event | types.StoryLine) -> list[str]:
    """A row of LINES."""
    return [clock(line.at_ms), line.what, line.kind, line.key, numbers(line.detail), line.cause]


def candidate_row(candidate: types.Candidate) -> list[str]:
    """A row of CANDIDATES."""
    return [candidate.node, candidate.verdict, candidate.reason, numbers(candidate.numbers)]


def numbers(values: dict[str, Any]) -> str:
    """`name=value` pairs; bytes in their units."""
    return " ".join(
        f"{name}={text.size(value) if name.endswith('_bytes') and isinstance(value, int | float) else value}"
        for name, value in values.items()
    )


def clock(at_ms: int) -> str:
    """Local time of day; with the date when it is not today."""
    if not at_ms:
        return "-"
    moment = time.localtime(at_ms / 1000)
    is_today = moment[:3] == time.localtime()[:3]
    return time.strftime("%H:%M:%S" if is_today else "%m-%d %H:%M:%S", moment)


def error_lines(error: types.ErrorDetail | None) -> str:
    """An error for a field: message, and hint on a second line."""
    if error is None:
        return ""
    return f"[{error.code}] {error.message}" + (f"\n  hint: {error.hint}" if error.hint else "")
