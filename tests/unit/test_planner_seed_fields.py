"""Clients of the planner that this one replaces: every endpoint, parameter, default and field that it documented."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from head.planner.endpoints.base import ask
from head.planner.endpoints.questions import Desk
from head.planner.endpoints.table import BY_PATH

DOCUMENTED: dict[str, Any] = msgspec.json.decode(
    (Path(__file__).parent.parent / "golden" / "planner_seed.json").read_bytes()
)
REQUIRED = "(required)"
GETS = {"", "health", "presets", "topology"}
PARAMETERS: dict[str, dict[str, Any]] = DOCUMENTED["parameters"]
FIELDS: dict[str, list[str]] = {path: names.split() for path, names in DOCUMENTED["fields"].items()}
# 0 leaves these to the machine or the model; without either they come out as documented.
LEFT_OPEN = {"dp", "memory", "gpus", "mock_gpus", "gpus_per_node", "num_experts", "experts_per_token"}
LEFT_OPEN |= {"current_tp", "current_pp", "current_dp", "current_batch_size"}


def answer(path: str, question: dict[str, Any]) -> dict[str, Any]:
    """What goes over the wire."""
    decoded = msgspec.json.decode(msgspec.json.encode(ask(BY_PATH[path], question, Desk())))
    assert isinstance(decoded, dict)
    return decoded


def has(value: Any, path: str) -> bool:
    """Whether a field is there; `[]` looks into the first of a list that must not be empty."""
    for part in path.split("."):
        name = part.removesuffix("[]")
        if not isinstance(value, dict) or name not in value:
            return False
        value = value[name]
        if part != name:
            if not isinstance(value, list) or not value:
                return False
            value = value[0]
    return True


def test_every_endpoint_is_there() -> None:
    """All 30 paths, by their method."""
    assert len(set(PARAMETERS) | GETS) == 30
    assert set(FIELDS) == set(PARAMETERS) | GETS
    assert all(BY_PATH[path].method == ("GET" if path in GETS else "POST") for path in FIELDS)


@pytest.mark.parametrize("path", PARAMETERS)
def test_every_parameter_has_its_name_and_default(path: str) -> None:
    """Parameters keep their names; defaults are the documented ones, or 0 for what the machine or the model says."""
    fields = {field.name: field for field in msgspec.structs.fields(BY_PATH[path].question)}
    for name, default in PARAMETERS[path].items():
        assert name in fields
        ours = fields[name].default
        if default != REQUIRED and not (default is None and not ours):
            assert ours == default or (name in LEFT_OPEN and ours == 0), (name, default, ours)


@pytest.mark.parametrize(("path", "question"), DOCUMENTED["calls"])
def test_documented_calls_are_answered(path: str, question: dict[str, Any]) -> None:
    """Null stands for a default, as the documents wrote it."""
    assert answer(path, question)


@pytest.mark.parametrize("path", FIELDS)
def test_documented_fields_are_answered(path: str) -> None:
    """Fields keep their names, also where two documents named one thing differently."""
    found = answer(path, dict(BY_PATH[path].example))
    assert [field for field in FIELDS[path] if not has(found, field)] == []


def test_the_four_steps_of_the_old_documents() -> None:
    """Analyze, recommend, validate, launch: each step takes what the one before answered."""
    model = "llama-3.1-70b"
    assert answer("analyze", {"model": model})["memory_analysis"]["total_gb"] > 0
    found = answer("recommend", {"model": model, "training": True, "gpus": 64, "gpu": "h100"})
    assert found["best"] == found["best_strategy"]
    best = found["best"]
    degrees = {name: best[name] for name in ("tp", "pp", "dp")}
    assert degrees == {name: best["strategy"][name] for name in degrees}
    strategy = best["strategy"]
    asked = {"model": model, "gpu": "h100", **degrees, "virtual_stages": strategy["virtual_stages"]}
    asked |= {"sharding": strategy["sharding"], "checkpointing": strategy["activation_checkpointing"]}
    asked |= {"global_batch": strategy["global_batch"], "micro_batch": strategy["micro_batch_size"]}
    checked = answer("validate", asked)
    assert (checked["valid"], checked["status"], checked["can_proceed"]) == (True, "valid", True)
    started = answer("launch", {"nodes": 8, "gpus": 8, **degrees, "framework": "megatron"})
    assert started["framework"] == "megatron"
    assert f"--tensor-model-parallel-size {degrees['tp']}" in started["commands"]["command"]
