"""Views: what the API shows of the state, figure by figure, and what it must never show."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import wire
from common.errors import ErrorInfo
from common.manifest import Manifest, ManifestFile
from head.api import render, render_nodes
from head.core import admission
from head.core.objects import ApiKey, Copy, Job, Model, ModelManifest, Node, Object, Pin, Replica, Service, Step
from head.core.state import Live, Progress, State, restore

NOW_MS = 1_000_000
GIB = 1 << 30


def state_of(*things: Object) -> State:
    """A state that holds these."""
    state = State()
    for thing in things:
        restore(state, thing)
    return state


def node(name: str = "n1", **changes: Any) -> Node:
    """A node with two GPUs."""
    inventory = wire.Inventory(
        hostname=name,
        disk_budget_bytes=1000 * GIB,
        dram_budget_bytes=100 * GIB,
        gpus=tuple(wire.Gpu(index, f"GPU-{index}", "H100", 80 * GIB) for index in range(2)),
    )
    made = Node(name, "boot", "agent", "1", inventory, 1, "online", 5, 1, advertise="10.0.0.1")
    return msgspec.structs.replace(made, **changes)


def copy(device: str = "n1:disk", state: str = "ready", **changes: Any) -> Copy:
    """A copy of org/m."""
    made = Copy("org/m", "main", device, "present", state, 1, "req-1", 1, bytes=10 * GIB)
    return msgspec.structs.replace(made, **changes)


def replica(slot: int = 0, **changes: Any) -> Replica:
    """A replica of `chat` on n1:gpu0."""
    made = Replica(
        f"chat-{slot}",
        "chat",
        slot,
        "org/m",
        "main",
        "n1",
        "n1:gpu0",
        1,
        "running",
        "ready",
        "req-1",
        1,
        port=20_000,
        host="0.0.0.0",
        api_key="engine-secret",
    )
    return msgspec.structs.replace(made, **changes)


def service(replicas: int = 1, **changes: Any) -> Service:
    """The service `chat`."""
    made = Service("chat", "org/m", "main", "llamacpp", replicas, 1, "hash", 1, "req-1")
    return msgspec.structs.replace(made, **changes)


def online(state: State, name: str = "n1", telemetry: wire.Telemetry | None = None) -> State:
    """Makes a node connected."""
    state.live[name] = Live("s", NOW_MS + 1, NOW_MS, readings=telemetry)
    return state


def test_devices_add_up() -> None:
    """Used is what stands there, reserved what is on its way, free the rest, and never more than the disk says."""
    fetching = copy("n1:disk", "fetching", model="b", bytes=0)
    state = online(
        state_of(node(), copy(), copy("n1:dram"), fetching, copy("n1:disk", "failed", model="c")),
        telemetry=wire.Telemetry(
            disk_free_bytes=500 * GIB, gpus=(wire.GpuReading(1, "GPU-1", 30 * GIB, 50 * GIB, 0.5, 0.1, 60.0, 300.0),)
        ),
    )
    state.progress[fetching.key] = Progress("fetching", GIB, 40 * GIB)
    disk, dram, gpu0, gpu1 = render_nodes.device_views(state, state.nodes["n1"])
    assert (disk.used_bytes, disk.reserved_bytes, disk.free_bytes) == (10 * GIB, 40 * GIB, 500 * GIB)
    assert (dram.used_bytes, dram.free_bytes) == (10 * GIB, 90 * GIB)
    assert (gpu0.device, gpu0.used_bytes, gpu0.utilisation) == ("n1:gpu0", 0, None)
    assert (gpu1.used_bytes, gpu1.free_bytes, gpu1.power_w) == (30 * GIB, 50 * GIB, 300.0)


def test_free_space_before_the_first_reading() -> None:
    """Until telemetry comes, the disk is as free as the hello's inventory said, not as the budget would allow."""
    known = node()
    inventory = msgspec.structs.replace(known.inventory, disks=(wire.Disk("/store", "ext4", 900 * GIB, 7 * GIB),))
    state = online(state_of(msgspec.structs.replace(known, inventory=inventory)))
    assert render_nodes.device_views(state, state.nodes["n1"])[0].free_bytes == 7 * GIB
    assert admission.free_bytes(state, "n1:disk") == 7 * GIB


def test_what_starts_on_a_gpu_is_reserved_until_it_is_ready() -> None:
    """A starting engine's memory is reserved; a ready one's is in the reading."""
    state = online(state_of(node(), replica(state="starting", gpu_memory_bytes=20 * GIB)))
    assert render_nodes.device_views(state, state.nodes["n1"])[2].reserved_bytes == 20 * GIB
    state = online(state_of(node(), replica(gpu_memory_bytes=20 * GIB)))
    assert render_nodes.device_views(state, state.nodes["n1"])[2].reserved_bytes == 0


def test_a_node_shows_presence_labels_and_drain() -> None:
    """Labels of the operator win over the agent's; drain and presence are words."""
    state = online(state_of(node(labels={"rack": "a"}, agent_labels={"rack": "b", "gpu": "h100"}, drain_deadline_ms=9)))
    view = render_nodes.node_view(state, state.nodes["n1"], NOW_MS)
    assert (view.state, view.drain, view.drain_deadline_ms) == ("online", "draining", 9)
    assert view.labels == {"rack": "a", "gpu": "h100"}
    assert view.inventory["hostname"] == "n1"
    assert view.unknown_copies == 0
    state.live["n1"].unknown_copies = (wire.CopyStatus("x", "main", "disk", "ready"),)
    assert render_nodes.node_view(state, state.nodes["n1"], NOW_MS).unknown_copies == 1
    gone = state_of(node(status="unreachable", is_drained=True))
    assert render_nodes.node_view(gone, gone.nodes["n1"], NOW_MS).drain == "drained"
    assert render_nodes.node_view(gone, gone.nodes["n1"], NOW_MS).state == "unreachable"


def test_the_row_of_a_list_is_the_view() -> None:
    """The cheap form for lists encodes to the same JSON, also once an inventory, readings or a reservation changed."""
    readings = wire.Telemetry(cpu=0.5, gpus=(wire.GpuReading(0, "GPU-0", 1, 2, 0.5),))
    later = wire.Telemetry(cpu=0.7, disk_used_bytes=5, gpus=(wire.GpuReading(0, "GPU-0", 9, 2, 0.9),))
    engine = replica(state="starting", gpu_memory_bytes=20 * GIB)
    for inventory, said, more in (
        (node().inventory, readings, ()),
        (node().inventory, readings, ()),
        (node().inventory, later, ()),
        (node().inventory, None, ()),
        (node().inventory, later, (engine,)),
        (wire.Inventory(hostname="other"), readings, ()),
        (node().inventory, readings, ()),
    ):
        state = online(state_of(node(inventory=inventory), copy(), *more), telemetry=said)
        view = render_nodes.node_view(state, state.nodes["n1"], NOW_MS)
        row = render_nodes.node_row(state, state.nodes["n1"], NOW_MS)
        assert msgspec.json.encode(row) == msgspec.json.encode(view)
        assert view.inventory["hostname"] == inventory.hostname


@pytest.mark.parametrize(
    ("progress", "rate", "eta"),
    [
        (Progress("fetching", 2 * GIB, 10 * GIB, 0.0, "", NOW_MS, NOW_MS - 60_000), None, None),
        (Progress("fetching", 2 * GIB, 10 * GIB, GIB, "", NOW_MS, NOW_MS - 100), float(GIB), None),
        (Progress("fetching", 2 * GIB, 10 * GIB, GIB, "", NOW_MS, NOW_MS - 60_000), float(GIB), 8.0),
        (Progress("fetching", 2 * GIB, 10 * GIB, GIB, "", NOW_MS - 60_000, NOW_MS - 90_000), float(GIB), None),
        (Progress("fetching", 2 * GIB, 0, GIB, "", NOW_MS, NOW_MS - 60_000), float(GIB), None),
    ],
    ids=["no-rate", "just-begun", "steady", "stalled", "size-unknown"],
)
def test_eta_only_when_it_means_something(progress: Progress, rate: float | None, eta: float | None) -> None:
    """Too early, stalled or of unknown size: no ETA."""
    fetching = copy(state="fetching", bytes=0)
    state = online(state_of(node(), fetching))
    state.progress[fetching.key] = progress
    view = render.copy_view(state, fetching, NOW_MS)
    assert (view.rate_bytes_per_s, view.eta_s) == (rate, eta)
    assert view.bytes_done == 2 * GIB


def test_a_copy_shows_pins_use_and_reach() -> None:
    """Pins that ran out are not shown; engines and readers hold the copy; the node's silence shows."""
    pinned = copy(pins=(Pin("a"), Pin("old", NOW_MS - 1), Pin("new", NOW_MS + 1)), last_used_ms=5)
    state = online(state_of(node(), pinned, replica()))
    state.last_used_ms[pinned.key] = 9
    state.readers["n1"]["k"] = None
    state.offered["k"] = (pinned.key,)
    view = render.copy_view(state, pinned, NOW_MS)
    assert (view.pins, view.in_use, view.last_used_ms, view.is_node_reachable) == (("a", "new"), 2, 9, True)
    lost = state_of(node(status="unreachable"), pinned)
    assert render.copy_view(lost, pinned, NOW_MS).is_node_reachable is False


def test_old_progress_does_not_colour_a_ready_copy() -> None:
    """What is left in memory of a fetch says nothing once the copy is ready."""
    ready = copy()
    state = online(state_of(node(), ready))
    state.progress[ready.key] = Progress("syncing", 1, 2, 5.0)
    view = render.copy_view(state, ready, NOW_MS)
    assert (view.state, view.bytes_done, view.rate_bytes_per_s) == ("ready", 10 * GIB, None)


def test_a_model_shows_its_manifest_locations_and_engines() -> None:
    """Locations are ready copies of the present revision; services map devices to URLs that can be reached."""
    manifest = Manifest(
        "org/m", "main", (ManifestFile("a", 3, "b3:1", 1), ManifestFile("b", 4, "b3:2", 1)), "b3:m", "gguf"
    )
    model = Model("org/m", "llm", "main", 1, 2, sources=("hf://org/m",))
    state = online(
        state_of(
            node(),
            model,
            ModelManifest(manifest, "n1", 1),
            copy("n1:dram"),
            copy("n1:disk"),
            copy("n2:disk", "fetching"),
            copy("n3:disk", revision="old"),
            replica(),
        )
    )
    view = render.model_view(state, model, NOW_MS)
    assert (view.size, view.files, view.format, view.digest) == (7, 2, "gguf", "b3:m")
    assert view.locations == ("n1:disk", "n1:dram")
    assert [item.device for item in view.copies] == ["n1:disk", "n1:dram", "n2:disk", "n3:disk"]
    assert view.services == {"n1:gpu0": "http://10.0.0.1:20000"}


def test_endpoints_are_urls() -> None:
    """The node's address stands in for "everywhere", IPv6 gets brackets, and without a port there is none."""
    state = state_of(node(advertise="fd00::1"))
    assert render.endpoint(state, replica()) == "http://[fd00::1]:20000"
    assert render.endpoint(state, replica(host="10.1.1.1")) == "http://10.1.1.1:20000"
    assert render.endpoint(state, replica(port=0)) == ""
    assert render.endpoint(State(), replica()) == ""


def test_an_engine_shows_what_was_reserved_and_what_was_measured() -> None:
    """Both by their names: what placement set aside, and what was last reported, per GPU; nothing before that."""
    engine = replica(memory_bytes=8 * GIB, gpu_memory_bytes=20 * GIB, gpus=(0, 1))
    state = online(state_of(node(), service(), engine))
    view = render.replica_view(state, engine)
    assert (view.memory_bytes, view.gpu_memory_bytes) == (8 * GIB, 20 * GIB)
    assert (view.measured_memory_bytes, view.measured_gpu_memory_bytes) == (None, None)
    state.measured[engine.id] = (3 * GIB, 34 * GIB)
    view = render.replica_view(state, engine)
    assert (view.memory_bytes, view.gpu_memory_bytes) == (8 * GIB, 20 * GIB)
    assert (view.measured_memory_bytes, view.measured_gpu_memory_bytes) == (3 * GIB, 17 * GIB)


def test_a_service_says_why_it_is_not_ready() -> None:
    """Its own reason first, then a replica's error, then what the replicas do; nothing once it is ready."""
    failed = replica(state="failed", error=ErrorInfo("engine_failed", "no memory"))
    state = online(state_of(node(), service(), failed))
    assert render.service_view(state, service()).reason == "chat-0 on n1:gpu0: no memory"
    assert render.service_view(state, service(reason="nothing fits")).reason == "nothing fits"
    starting = online(state_of(node(), service(), replica(state="starting")))
    assert render.service_view(starting, service()).reason == "chat-0 is starting"
    ready = online(state_of(node(), service(), replica()))
    view = render.service_view(ready, service(reason="old news"))
    assert (view.state, view.replicas_ready, view.reason) == ("ready", 1, "")


def test_a_job_shows_the_progress_of_its_copies() -> None:
    """A running step has the bytes of the copy it waits on, a completed one the whole."""
    fetching, ready = copy("n1:disk", "fetching", bytes=0), copy("n2:disk")
    steps = (
        Step("1", "download", "running", model="org/m", target_device="n1:disk", target=f"copy:{fetching.key}"),
        Step("2", "copy", "completed", source_device="n1:disk", target_device="n2:disk", target=f"copy:{ready.key}"),
    )
    job = Job("job-1", "j", "me", "running", 1, steps)
    state = state_of(fetching, ready, job)
    state.progress[fetching.key] = Progress("fetching", GIB, 4 * GIB, 2.0, "", NOW_MS, 1)
    first, second = render.job_view(state, job, NOW_MS).steps
    assert (first.bytes_done, first.bytes_total, first.rate_bytes_per_s) == (GIB, 4 * GIB, 2.0)
    assert (second.devices, second.bytes_done) == (("n1:disk", "n2:disk"), 10 * GIB)


def test_no_view_holds_a_secret() -> None:
    """Engine keys, key hashes, and passwords and signatures in URLs never pass."""
    model = Model("org/m", "llm", "main", 1, 2, sources=("https://u:hunter2@h/x?X-Amz-Signature=abc&a=b",))
    key = ApiKey("key-1", "n", "admin", "f00d" * 16, 1)
    asked = copy(state="failed", source="https://h/?token=abc", error=ErrorInfo("x", "GET https://u:hunter2@h/ failed"))
    state = online(state_of(node(), model, asked, service(), replica(), key))
    text = msgspec.json.encode(
        [
            render.model_view(state, model, NOW_MS),
            render.service_view(state, service()),
            render.key_view(key),
            render_nodes.node_view(state, state.nodes["n1"], NOW_MS),
        ]
    ).decode()
    for secret in ("engine-secret", "hunter2", "abc", "f00d"):
        assert secret not in text
    assert "https://u:***@h/x?X-Amz-Signature=***&a=b" in text


@pytest.mark.parametrize(
    "url", ["hf://org/name@rev", "hf://name@rev", "ssh://me@host/x", "file:///a/b", "https://h/x?a=b", "n1:disk", ""]
)
def test_urls_without_secrets_stay(url: str) -> None:
    """Revisions and user names are not secrets."""
    assert render.without_secrets(url) == url


@given(st.text(max_size=60))
def test_any_text_can_be_shown(text: str) -> None:
    """Redaction takes any text."""
    assert isinstance(render.without_secrets(f"https://{text}"), str)


def test_health_counts_and_degrades() -> None:
    """Only nodes with an open session are online; a read-only journal or an alarm degrades."""
    state = online(
        state_of(node("n1"), node("n2"), Model("m", "llm", "main", 1, 1), Job("j", "j", "x", "running", 1, ()))
    )
    state.started_ms = NOW_MS - 1_500
    view = render.health_view(state, version="1", now_ms=NOW_MS, is_read_only=False)
    assert (view.status, view.nodes, view.nodes_online, view.models, view.jobs_running) == ("healthy", 2, 1, 1, 1)
    assert view.uptime_s == 1.5
    for changes in ({"is_read_only": True}, {"is_read_only": False, "alarms": ("x",)}):
        sick = render.health_view(state, version="1", now_ms=NOW_MS, **changes)
        assert sick.status == "degraded"


def test_views_fit_their_types() -> None:
    """What is encoded decodes again as the declared type: no field holds what its type refuses."""
    state = online(
        state_of(node(), copy(), service(), replica(error=ErrorInfo("engine_failed", "x", details={"a": 1})))
    )
    for view in (
        render_nodes.node_view(state, state.nodes["n1"], NOW_MS),
        render.copy_view(state, copy(), NOW_MS),
        render.service_view(state, service()),
        render.health_view(state, version="1", now_ms=NOW_MS, is_read_only=False),
    ):
        encoded = msgspec.json.encode(view)
        assert msgspec.json.encode(msgspec.json.decode(encoded, type=type(view))) == encoded
