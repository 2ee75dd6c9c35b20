"""Views of the API as a busy cluster gives them, for tests of what the command line prints."""

from __future__ import annotations

from herder import types
from tests.doubles.api_double import NOW_MS, job, model, step

MINUTE_MS, HOUR_MS, DAY_MS = 60_000, 3_600_000, 86_400_000
GIB = 1 << 30

COPIES = [
    types.CopyView(
        "smollm2",
        "main",
        "n1:disk",
        "ready",
        92 << 20,
        92 << 20,
        pins=("operator",),
        last_used_ms=NOW_MS - 5 * MINUTE_MS,
    ),
    types.CopyView(
        "meta-llama/Llama-3.1-70B-Instruct",
        "main",
        "gpu-node-17.rack-3:dram",
        "fetching",
        31 * GIB,
        131 * GIB,
        2.1e9,
        51.0,
    ),
    types.CopyView(
        "org/name",
        "v2",
        "n2:gpu0",
        "failed",
        error=types.ErrorDetail("memory_full", "needs 16.0 GiB, 3.2 GiB are free on n2:gpu0"),
        is_node_reachable=False,
    ),
]
MODELS = [
    model(
        "smollm2",
        format="gguf",
        size=92 << 20,
        locations=("n1:disk", "n1:dram"),
        services={"n1:dram": "http://127.0.0.1:20001"},
    ),
    model(
        "meta-llama/Llama-3.1-70B-Instruct",
        format="safetensors",
        size=131 * GIB,
        copies=(COPIES[1],),
    ),
    model("intfloat/e5-large", type="embedding"),
]


def device(where: str, total: int, used: int, **rest: object) -> types.DeviceView:
    """A device."""
    kind = where.rpartition(":")[2].rstrip("0123456789")
    return types.DeviceView(where, kind, total, used, 0, total - used, **rest)  # type: ignore[arg-type]


DEVICES = [
    device("n1:disk", 227 * GIB, 92 << 20),
    device("n1:dram", 12 * GIB, 0),
    device(
        "gpu-node-17.rack-3:gpu0",
        80 * GIB,
        71 * GIB,
        name="NVIDIA H100 80GB HBM3",
        utilisation=0.87,
        temperature_c=61.0,
    ),
]


def node(node_id: str, state: types.NodeState = "online", **rest: object) -> types.NodeView:
    """A node."""
    fields: dict[str, object] = {
        "node_id": node_id,
        "hostname": node_id,
        "state": state,
        "state_since_ms": NOW_MS - HOUR_MS,
        "last_seen_ms": NOW_MS - 3_000,
        "is_cordoned": False,
        "drain": "",
        "drain_deadline_ms": None,
        "labels": {},
        "version": "0.1.0",
        "address": "10.0.0.1",
        "gpu_count": 0,
        "gpu_reason": "no NVIDIA driver",
        "devices": (device(f"{node_id}:disk", 227 * GIB, 92 << 20), device(f"{node_id}:dram", 12 * GIB, 0)),
        "inventory": {},
        "telemetry": None,
        "copies": 2,
        "replicas": 1,
    }
    return types.NodeView(**{**fields, **rest})  # type: ignore[arg-type]


NODES = [
    node("n1"),
    node("gpu-node-17.rack-3.example", "unreachable", last_seen_ms=NOW_MS - 2 * HOUR_MS, gpu_count=8, copies=117),
    node("n3", is_cordoned=True, drain="draining"),
]


def replica(name: str, state: types.ReplicaState, **rest: object) -> types.ReplicaView:
    """A replica."""
    fields: dict[str, object] = {
        "replica": name,
        "service": name.rpartition("-")[0],
        "model": "smollm2",
        "device": "n1:dram",
        "node": "n1",
        "state": state,
        "endpoint": "",
        "generation": 4,
        "restarts": 0,
        "pid": 1_234,
        "started_ms": NOW_MS - HOUR_MS,
        "ready_ms": None,
        "memory_bytes": 0,
        "gpu_memory_bytes": 0,
        "exit_code": None,
        "error": None,
        "last_log": (),
    }
    return types.ReplicaView(**{**fields, **rest})  # type: ignore[arg-type]


REPLICAS = [
    replica(
        "smollm2-0",
        "ready",
        endpoint="http://127.0.0.1:20001",
        ready_ms=NOW_MS - 50 * MINUTE_MS,
        memory_bytes=340 << 20,
    ),
    replica("a-service-with-a-long-name-11", "starting", device="gpu-node-17.rack-3:gpu0", restarts=3),
]


def service(name: str, state: types.ServiceState, *replicas: types.ReplicaView) -> types.ServiceView:
    """A service."""
    return types.ServiceView(
        name=name,
        model="smollm2",
        revision="main",
        recipe="llamacpp",
        state=state,
        replicas_wanted=max(1, len(replicas)),
        replicas_ready=sum(one.state == "ready" for one in replicas),
        spec_hash="0a1b2c",
        config={},
        replicas=replicas,
        created_ms=NOW_MS - DAY_MS,
        reason="",
    )


SERVICES = [
    service("smollm2", "ready", REPLICAS[0]),
    service("a-service-with-a-long-name", "starting", REPLICAS[1]),
    service("waiting", "pending"),
]
STEPS = [
    step("completed", bytes_done=92 << 20, bytes_total=92 << 20, ended_ms=NOW_MS + 1_300),
    step(
        "running", id="copy", action="copy", devices=("n1:disk", "n1:dram"), bytes_done=40 << 20, bytes_total=92 << 20
    ),
    step("pending", id="serve-on-the-gpu", action="serve", devices=("n1:gpu0",), started_ms=None),
]
JOBS = [
    job("running", *STEPS),
    job("failed", step("failed"), id="job-000000000002"),
    job("completed", id="job-000000000003"),
]
KEYS = [
    types.KeyView("key-9b2e4f10c7aa", "first-admin", "admin", NOW_MS - DAY_MS, None, False),
    types.KeyView(
        "key-0000000000aa", "nightly benchmark of the lab", "operator", NOW_MS - HOUR_MS, NOW_MS + DAY_MS, False
    ),
    types.KeyView("key-0000000000bb", "old", "viewer", NOW_MS - 9 * DAY_MS, NOW_MS - DAY_MS, False),
    types.KeyView("key-0000000000cc", "lost", "agent", NOW_MS - 9 * DAY_MS, None, True),
]
RECIPES = [
    types.RecipeView(
        "llamacpp", "inference", "llamacpp", "llama.cpp's server for GGUF models, on CPU or GPU.", ("gguf",), {}, "a"
    ),
    types.RecipeView(
        "command", "inference", "command", "Any program that listens on a port; give its argv.", (), {}, "b"
    ),
]
LINES = [
    types.StoryLine(0, 3, "model_registered", "model", "smollm2", "req-1"),
    types.StoryLine(
        0,
        4,
        "copy_wanted",
        "copy",
        "meta-llama/Llama-3.1-70B-Instruct@main|gpu-node-17:disk",
        "job-000000000001/download",
        {"source": "https://host/llama.gguf", "size_bytes": 3 * GIB},
    ),
]
CANDIDATES = [
    types.Candidate("n1", "refused", "not enough GPU memory", {"needed_bytes": 16 * GIB, "free_bytes": 3 * GIB}),
    types.Candidate("n2", "fits", "", {}),
]
