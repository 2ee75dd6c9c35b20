"""Job files: both dialects become one list of steps, or are refused with the step and the field that is wrong.

In order: `action/model/source/from/to/target/device/port`; each action depends on the one before. As a graph:
`action_id/action_type/model_name/devices/source_url/dependencies`. `action` or `action_type` says which it is, one file
speaks one dialect, and what makes a graph (ids, dependencies, several devices) has no place in the other; the words for
one model and one place mean the same in both. In a graph an action with several target devices becomes one step for
each; whatever depends on the action depends on all of them.

Pure: what is asked here is only whether a file makes sense; whether its models and devices exist is asked by `jobs`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from msgspec.structs import replace

from common import limits
from common.errors import InvalidJob, JobCycle
from head.core.objects import Step
from herder.types import JobAction

_ORDER_ONLY = ("action",)
_GRAPH_ONLY = ("action_type", "action_id", "devices", "dependencies")
_PLACES = ("from_", "to", "target", "device")
_HAS_SOURCE_DEVICE = ("move", "copy")
_ID_CHARS = 128


def steps_of(actions: Iterable[JobAction]) -> tuple[Step, ...]:
    """The steps of a job file, in the order written, dependencies resolved and free of cycles.

    Raises: InvalidJob naming step and field, JobCycle naming the cycle.
    """
    actions = tuple(actions)
    is_order = _dialect(actions)
    steps = _in_order(actions) if is_order else _as_graph(actions)
    if len(steps) > limits.STEPS_PER_JOB:
        raise InvalidJob(f"the job has {len(steps)} steps; at most {limits.STEPS_PER_JOB}", limit=limits.STEPS_PER_JOB)
    _refuse_cycles(steps)
    return steps


def _dialect(actions: tuple[JobAction, ...]) -> bool:
    """Whether the file is of the dialect in order (else: a graph); refuses a mixture."""
    first: tuple[str, bool] | None = None
    for number, action in enumerate(actions, 1):
        order = [name for name in _ORDER_ONLY if getattr(action, name) is not None]
        graph = [name for name in _GRAPH_ONLY if getattr(action, name) not in (None, ())]
        where = _where(number, action)
        if order and graph:
            raise _wrong(where, graph[0], f"{order[0]!r} and {graph[0]!r} are of two dialects; use one")
        if action.action is None and action.action_type is None:
            raise _wrong(where, "action", "what to do is missing: `action` (in order) or `action_type` (a graph)")
        is_order = action.action is not None
        if first is not None and first[1] != is_order:
            raise _wrong(where, "action" if is_order else "action_type", f"{first[0]} is of the other dialect; use one")
        first = first or (where, is_order)
    if first is None:
        raise InvalidJob("the job has no actions", field="actions")
    return first[1]


def _in_order(actions: tuple[JobAction, ...]) -> tuple[Step, ...]:
    steps: list[Step] = []
    for number, action in enumerate(actions, 1):
        where = _where(number, action)
        kind = action.action or ""
        source_url, source_device, target = _places(where, kind, action)
        before = (steps[-1].id,) if steps else ()
        step_id = f"{number}-{kind}"
        steps.append(_step(where, step_id, kind, action, source_url, source_device, target, before))
    return tuple(steps)


def _places(where: str, kind: str, action: JobAction) -> tuple[str, str, str]:
    """Source URL, source device and target device of an action that names its places one by one."""
    source, source_url = action.from_, action.source_url or ""
    if action.source is not None:
        if action.source_url is not None:
            raise _wrong(where, "source_url", "`source` and `source_url` say the same; use one")
        if action.from_ is not None:
            raise _wrong(where, "source", "`source` and `from` say the same; use one")
        if "://" in action.source:
            source_url = action.source
        else:
            source = action.source
    targets = {"target": action.target, "to": action.to, "device": action.device}
    if kind in ("delete", "stop_serve", "health_check") and source is not None and not any(targets.values()):
        targets["from"], source = source, None
    named = [name for name, value in targets.items() if value is not None]
    if len(named) > 1:
        raise _wrong(where, named[1], f"`{named[0]}` and `{named[1]}` say the same; use one")
    target = targets[named[0]] if named else None
    return source_url, source or "", target or ""


def _as_graph(actions: tuple[JobAction, ...]) -> tuple[Step, ...]:
    ids: dict[str, int] = {}
    for number, action in enumerate(actions, 1):
        step_id = action.action_id or ""
        if not step_id or len(step_id) > _ID_CHARS or not step_id.isprintable():
            raise _wrong(
                _where(number, action), "action_id", f"an id of 1 to {_ID_CHARS} printable characters is needed"
            )
        if step_id in ids:
            raise _wrong(_where(number, action), "action_id", f"{step_id!r} is also the id of action {ids[step_id]}")
        ids[step_id] = number
    made: dict[str, tuple[Step, ...]] = {}
    for number, action in enumerate(actions, 1):
        where = _where(number, action)
        wanted = tuple(dict.fromkeys(action.dependencies or ()))
        if len(wanted) > limits.STEP_DEPENDENCIES:
            raise _wrong(where, "dependencies", f"{len(wanted)} dependencies; at most {limits.STEP_DEPENDENCIES}")
        unknown = [name for name in wanted if name not in ids]
        if unknown:
            raise _wrong(where, "dependencies", f"there is no action {unknown[0]!r} in this job", unknown=unknown[:20])
        made[action.action_id or ""] = _fan_out(where, action, wanted)
    lasts = {name: tuple(step.id for step in steps) for name, steps in made.items()}
    flat = [step for steps in made.values() for step in steps]
    seen: set[str] = set()
    for step in flat:
        if step.id in seen:
            raise InvalidJob(f"two steps would have the id {step.id!r}", step=step.id, field="action_id")
        seen.add(step.id)
    return tuple(_with_dependencies(step, lasts, {step.id for step in made[_origin(step, made)]}) for step in flat)


def _origin(step: Step, made: dict[str, tuple[Step, ...]]) -> str:
    return step.id if step.id in made else step.id.rpartition(".")[0]


def _with_dependencies(step: Step, lasts: dict[str, tuple[str, ...]], siblings: set[str]) -> Step:
    """Dependencies on actions become dependencies on all their steps; those on siblings are meant as they stand."""
    names: dict[str, None] = {}
    for name in step.dependencies:
        inside = name in siblings and name != step.id and name not in lasts
        names |= dict.fromkeys((name,) if inside else lasts[name])
    return replace(step, dependencies=tuple(names))


def _fan_out(where: str, action: JobAction, dependencies: tuple[str, ...]) -> tuple[Step, ...]:
    """One step for each target device. A move to several copies to all and drops the source with the last."""
    kind, step_id = action.action_type or "", action.action_id or ""
    devices = action.devices
    if not devices:
        url, source, target = _places(where, kind, action)
        return (_step(where, step_id, kind, action, url, source, target, dependencies),)
    named = next((name for name in _PLACES if getattr(action, name) is not None), "")
    if named or "://" not in (action.source or "://"):
        raise _wrong(where, _field(named or "source"), "`devices` names the places already; use one way")
    source, url = "", action.source_url or action.source or ""
    if kind in _HAS_SOURCE_DEVICE and len(devices) > 1:
        source, devices = devices[0], devices[1:]
    if len(set(devices)) != len(devices):
        raise _wrong(where, "devices", "a device is named twice")
    if len(devices) == 1:
        return (_step(where, step_id, kind, action, url, source, devices[0], dependencies),)
    steps: list[Step] = []
    for number, target in enumerate(devices, 1):
        is_last = number == len(devices)
        one, depends = kind, dependencies
        if kind == "move" and not is_last:
            one = "copy"
        elif kind == "move":
            depends = (*dependencies, *(step.id for step in steps))
        steps.append(_step(where, f"{step_id}.{number}", one, action, url, source, target, depends))
    return tuple(steps)


def _step(
    where: str,
    step_id: str,
    kind: str,
    action: JobAction,
    source_url: str,
    source_device: str,
    target_device: str,
    dependencies: tuple[str, ...],
) -> Step:
    if action.model is not None and action.model_name is not None:
        raise _wrong(where, "model_name", "`model` and `model_name` say the same; use one")
    step = Step(
        id=step_id,
        action=kind,
        model=action.model or action.model_name or "",
        source_device=source_device,
        target_device=target_device,
        source_url=source_url,
        dependencies=dependencies,
        port=action.port,
        config=action.config,
        keep_source=bool(action.keep_source),
        is_forced=action.force,
        target_url=action.target_url or "",
        timeout_ms=action.timeout_s * 1000 if action.timeout_s is not None else 0,
        retries=action.retries if action.retries is not None else -1,
    )
    _require(where, step, is_order=action.action is not None)
    _refuse_unused(where, step, action)
    return step


def _require(where: str, step: Step, *, is_order: bool) -> None:
    """Refuses a step that leaves out what its action needs."""
    model_field = "model" if is_order else "model_name"
    target_field = (
        {"download": "target", "move": "to", "copy": "to"}.get(step.action, "device") if is_order else "devices"
    )
    if step.action == "stop_serve" and step.config.get("name"):
        return
    if step.action == "health_check" and step.target_url:
        return
    if step.action == "benchmark":
        _require_benchmark(where, step)
        return
    if not step.model:
        raise _wrong(where, model_field, f"{step.action} needs a model")
    if not step.target_device:
        wanted = "two devices: source and target" if step.action == "move" and not is_order else "a device"
        raise _wrong(where, target_field, f"{step.action} needs {wanted}")
    if step.source_device and step.source_device == step.target_device:
        raise _wrong(where, target_field, "source and target are the same device")


def _require_benchmark(where: str, step: Step) -> None:
    """A benchmark's recipe says which server and which nodes."""
    if not step.config.get("recipe") and not step.config.get("document"):
        raise _wrong(where, "config", "benchmark needs config.recipe, the name of one, or config.document, a whole one")
    if step.model or step.target_device:
        raise _wrong(where, "model" if step.model else "device", "the benchmark's recipe says what is measured where")


def _refuse_unused(where: str, step: Step, action: JobAction) -> None:
    """Refuses what the action would silently ignore."""
    uses: dict[str, tuple[str, ...]] = {
        "port": ("serve",),
        "keep_source": ("move",),
        "force": ("delete",),
        "target_url": ("health_check",),
    }
    given: dict[str, Any] = {
        "port": action.port or None,
        "keep_source": action.keep_source,
        "force": action.force or None,
        "target_url": action.target_url,
    }
    for name, actions in uses.items():
        origin = action.action or action.action_type or step.action
        if given[name] is not None and origin not in actions:
            raise _wrong(where, name, f"`{name}` means nothing to {origin}")
    if step.source_url and step.action != "download":
        raise _wrong(where, "source", f"{step.action} takes no URL; `download` does")
    if step.source_device and step.action not in ("download", "move", "copy"):
        raise _wrong(where, "from", f"{step.action} has no source")
    if step.config and step.action == "delete":
        raise _wrong(where, "config", f"`config` means nothing to {step.action}")


def _refuse_cycles(steps: tuple[Step, ...]) -> None:
    """Walks the graph without recursion; a step met again on its own path closes a cycle."""
    by_id = {step.id: step for step in steps}
    done: set[str] = set()
    for start in by_id:
        path: list[str] = []
        on_path: set[str] = set()
        stack: list[tuple[str, bool]] = [(start, False)]
        while stack:
            name, is_leaving = stack.pop()
            if is_leaving:
                on_path.discard(path.pop())
                done.add(name)
            elif name in on_path:
                cycle = [*path[path.index(name) :], name]
                raise JobCycle(
                    f"the steps wait for each other: {' -> '.join(cycle[:20])}",
                    hint="take one of these dependencies out",
                    cycle=cycle[:100],
                )
            elif name not in done:
                path.append(name)
                on_path.add(name)
                stack.append((name, True))
                stack.extend((dependency, False) for dependency in reversed(by_id[name].dependencies))


def _where(number: int, action: JobAction) -> str:
    return f"action {number}" + (f" ({action.action_id[:_ID_CHARS]!r})" if action.action_id else "")


def _field(name: str) -> str:
    return "from" if name == "from_" else name


def _wrong(where: str, field: str, reason: str, **details: Any) -> InvalidJob:
    return InvalidJob(f"{where}, field `{field}`: {reason}", step=where, field=field, **details)
